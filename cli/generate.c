/* tril generate: a prompt, continued on the terminal as it is made. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"
#include "input.h"
#include "json.h"
#include "model_options.h"
#include "options.h"
#include "tril/tril.h"

static int to_stdout(void *arg, const char *text, size_t size) {
    (void)arg;
    return fwrite(text, 1, size, stdout) != size || fflush(stdout) != 0;
}

static void print_json(const struct tril_generation *g) {
    json_t *ids = json_array();
    for (int64_t i = 0; i < g->token_count; i++)
        json_array_append_new(ids, json_integer(g->tokens[i]));
    json_t *o =
        json_pack("{s:o, s:o, s:f, s:f, s:f, s:I, s:s}", "text", json_text(g->text, g->size),
                  "tokens", ids, "ttft_ms", g->ttft_ms, "tokens_per_s", g->tokens_per_second,
                  "prefill_tokens_per_s", g->prefill_tokens_per_second, "prompt_tokens",
                  (json_int_t)g->prompt_tokens, "finish", tril_finish_name(g->finish));
    if (isfinite(g->found))
        json_object_set_new(o, "found", json_real(g->found));
    json_print(o);
}

int cmd_generate(int argc, char **argv) {
    struct tril_generate_options g = tril_generate_defaults();
    struct tril_engine_options e = {.dtype = "bf16", .device = "cpu", .stream_sinks = -1};
    struct tril_model_overrides overrides = tril_model_overrides_none();
    struct tril_engine *engine = NULL;
    struct tril_generation out = {0};
    struct tril_error err = {0};
    struct option_list stop = {0};
    const char *prompt = NULL;
    char *input = NULL;
    bool greedy = false, json = false, quiet = false, shown = false;
    int64_t seed = (int64_t)g.seed, threads = 0;
    int code = 0;
    tril_status st = TRIL_OK;
    const struct option options[] = {
        {"model", "DIR", "a Hugging Face directory", OPTION_STRING, &e.model, 0, 0, NULL},
        {"tokenizer", "FILE|DIR", "instead of the model's own", OPTION_STRING, &e.tokenizer, 0, 0,
         NULL},
        {"prompt", "TEXT", "what to continue; '-' reads standard input", OPTION_STRING, &prompt, 0,
         0, NULL},
        {"max-tokens", "N", "at most so many (256)", OPTION_INT, &g.max_tokens, 0, 1e7, NULL},
        {.kind = OPTION_HEADING, .help = "Sampling"},
        {"greedy", NULL, "always the likeliest token", OPTION_FLAG, &greedy, 0, 0, NULL},
        {"temperature", "X", "0: greedy (0.8)", OPTION_NUMBER, &g.temperature, 0, 100, NULL},
        {"top-k", "K", "of the K likeliest; 0: all (0)", OPTION_INT, &g.top_k, 0, 1e9, NULL},
        {"top-p", "P", "of the likeliest that hold this probability (0.95)", OPTION_NUMBER,
         &g.top_p, 0, 1, NULL},
        {"min-p", "P", "of those with P times the greatest probability (0)", OPTION_NUMBER,
         &g.min_p, 0, 1, NULL},
        {"repetition-penalty", "X", "logits of seen tokens are divided by it (1)", OPTION_NUMBER,
         &g.repetition_penalty, 0.01, 100, NULL},
        {"seed", "S", "the same seed, the same text (1337)", OPTION_INT, &seed, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "Where it ends"},
        {"stop", "TEXT...", "end before any of these strings", OPTION_STRINGS, &stop, 0, 0, NULL},
        {"ignore-eos", NULL, "go on past the end-of-text token", OPTION_FLAG, &g.ignore_eos, 0, 0,
         NULL},
        {"roll", NULL, "at the context's end forget the older half and go on", OPTION_FLAG, &g.roll,
         0, 0, NULL},
        {"context", "N",
         "tokens held at most (default: the model's context; more only where positions go on)",
         OPTION_INT, &e.context, 1, 1e9, NULL},
        {"stream-window", "W", "never ends: holds the first tokens and the last W", OPTION_INT,
         &e.stream_window, 1, 1e9, NULL},
        {"sinks", "N", "... so many first ones (4)", OPTION_INT, &e.stream_sinks, 0, 1e6, NULL},
        {"stream-stride", "N", "... of which N leave at a time (W / 16)", OPTION_INT,
         &e.stream_stride, 1, 1e9, NULL},
        {"retrieve", "N", "each token looks at the N blocks of 64 tokens that can matter most",
         OPTION_INT, &e.retrieve, 1, 1e6, NULL},
        {"retrieve-check", NULL, "... and what part of full attention that is", OPTION_FLAG,
         &e.retrieve_check, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "The model, changed where its parameters stay the same"},
        VIEW_OPTIONS(overrides),
        {"ablate", "LIST", ABLATE_HELP, OPTION_STRING, &e.ablate, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "How"},
        {"dtype", "TYPE", "arithmetic of the matrices", OPTION_CHOICE, &e.dtype, 0, 0,
         "bf16|fp32|fp16|tf32"},
        {"kv-dtype", "TYPE", "of the key/value cache; q8: 8 bits (--dtype)", OPTION_CHOICE,
         &e.kv_dtype, 0, 0, "fp32|bf16|q8"},
        DEVICE_OPTION(&e.device),
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"quiet", NULL, "no figures at the end", OPTION_FLAG, &quiet, 0, 0, NULL},
        {"json", NULL, "print the continuation as one JSON object", OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "generate",
        .usage = "--model DIR --prompt TEXT [OPTIONS]",
        .summary =
            "Continues a text. Without --json the prompt and its continuation appear as they are "
            "made, and\nfigures follow on standard error. When the context is full, generation "
            "ends (finish: context),\nunless --roll or --stream-window is given.",
        .examples = "  tril generate --model out --prompt \"In the beginning\" --max-tokens 100\n"
                    "  tril generate --model gpt2/ --prompt \"2 + 2 =\" --greedy --stop $'\\n' "
                    "--json\n"
                    "  cat story.txt | tril generate --model out --prompt - --temperature 0.7",
        .options = options,
        .option_count = sizeof options / sizeof *options,
    };
    if (!command_begin(&command, argc, argv, &code))
        goto done;
    tril_threads_set((int)threads);
    e.overrides = &overrides;
    if (e.stream_sinks < 0)
        e.stream_sinks = e.stream_window > 0 ? 4 : 0;
    g.seed = (uint64_t)seed;
    g.stop = stop.values;
    g.stop_count = stop.count;
    if (greedy)
        g.temperature = 0;
    g.prompt = prompt ? prompt : "";
    g.prompt_size = strlen(g.prompt);
    if (prompt && strcmp(prompt, "-") == 0) {
        g.prompt = input = text_read("-", &g.prompt_size, &err);
        st = err.code;
        if (st != TRIL_OK)
            goto failed;
    }
    st = tril_engine_open(&engine, &e, &err);
    if (st != TRIL_OK)
        goto failed;
    if (!json) {
        g.on_text = to_stdout;
        to_stdout(NULL, g.prompt, g.prompt_size);
        shown = true;
    }
    st = tril_generate(engine, &g, &out, &err);
    if (st != TRIL_OK)
        goto failed;
    if (json) {
        print_json(&out);
        goto done;
    }
    putchar('\n');
    if (!quiet)
        fprintf(stderr,
                "\n%lld tokens, %.1f tokens/s; first token after %.0f ms (prompt of %lld tokens, "
                "%.0f tokens/s); ended by: %s\n",
                (long long)out.token_count, out.tokens_per_second, out.ttft_ms,
                (long long)out.prompt_tokens, out.prefill_tokens_per_second,
                tril_finish_name(out.finish));
    if (!quiet && isfinite(out.found))
        fprintf(stderr, "retrieval found %.4f of the attention\n", out.found);
failed:
    if (st != TRIL_OK) {
        if (shown)
            putchar('\n');
        fflush(stdout);
        code = command_fail("generate", st, &err);
    }
done:
    free(input);
    option_list_free(&stop);
    tril_generation_free(&out);
    tril_engine_close(engine);
    return code;
}
