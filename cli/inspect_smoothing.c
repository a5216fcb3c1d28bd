/* tril inspect smoothing: how alike the tokens of a text become from layer to layer. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "input.h"
#include "inspect.h"
#include "json.h"
#include "model_options.h"
#include "options.h"
#include "tril/tril.h"

static void print_json(const struct tril_smoothing *s) {
    struct tril_build_info b;
    tril_build_info_get(&b);
    json_t *rows = json_array();
    for (int64_t i = 0; i < s->count; i++) {
        const struct tril_smoothing_row *r = &s->rows[i];
        json_t *row = json_pack("{s:I, s:o, s:o, s:o}", "depth", (json_int_t)i, "similarity",
                                json_measured(r->similarity), "residual",
                                json_measured(r->residual), "norm", json_measured(r->norm));
        if (isfinite(r->entropy)) {
            json_object_set_new(row, "entropy", json_real(r->entropy));
            json_object_set_new(row, "uniform", json_real(r->uniform));
        }
        json_array_append_new(rows, row);
    }
    json_print(json_pack("{s:I, s:I, s:o, s:s, s:s, s:i, s:o}", "tokens", (json_int_t)s->tokens,
                         "windows", (json_int_t)s->windows, "loss", json_measured(s->loss),
                         "processor", b.processor, "isa", b.isa, "threads", b.threads, "depths",
                         rows));
}

static void print_table(const struct tril_smoothing *s) {
    printf("  %-12s %10s %10s %10s %10s %10s\n", "depth", "similarity", "residual", "norm",
           "entropy", "of even");
    for (int64_t i = 0; i < s->count; i++) {
        const struct tril_smoothing_row *r = &s->rows[i];
        char name[24] = "embeddings";
        if (i)
            snprintf(name, sizeof name, "%lld", (long long)i);
        printf("  %-12s %10.4f %10.4f %10.3f", name, r->similarity, r->residual, r->norm);
        if (isfinite(r->entropy))
            printf(" %10.4f %9.1f%%", r->entropy, 100 * r->entropy / r->uniform);
        putchar('\n');
    }
    printf("\n  %lld windows of %lld tokens; loss %.4f nats a token\n"
           "  similarity: mean cosine of two tokens; residual: what is left of them without their "
           "mean\n",
           (long long)s->windows, (long long)s->tokens, s->loss);
}

int cmd_inspect_smoothing(int argc, char **argv) {
    struct tril_model_source source = {.overrides = tril_model_overrides_none()};
    struct tril_look_options o = {
        .source = &source, .dtype = "fp32", .device = "cpu", .layer = -1, .head = -1};
    struct model_flags flags = {0};
    struct tril_smoothing s = {0};
    struct tril_error err = {0};
    const char *file = NULL, *ids = NULL, *csv = NULL;
    char *text = NULL;
    int32_t *list = NULL;
    bool json = false;
    int64_t threads = 0, windows = 8;
    int code = 0;
    tril_status st = TRIL_OK;
    const struct option options[] = {
        {.kind = OPTION_HEADING, .help = "Which model"},
        {"model", "DIR", "a Hugging Face directory", OPTION_STRING, &source.model, 0, 0, NULL},
        {"preset", "NAME", "random weights of this shape", OPTION_STRING, &source.preset, 0, 0,
         NULL},
        {"config", "FILE", "random weights of a config.json", OPTION_STRING, &source.config, 0, 0,
         NULL},
        MODEL_OPTIONS(source.overrides, flags),
        {"vocab", "V", "tokens, of random weights", OPTION_INT, &source.overrides.vocab, 1, 1e8,
         NULL},
        {"ablate", "LIST", ABLATE_HELP, OPTION_STRING, &o.ablate, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "Which text"},
        {"data", "FILE", "a text; '-': standard input", OPTION_STRING, &file, 0, 0, NULL},
        {"prompt", "TEXT", "instead of a file", OPTION_STRING, &o.prompt, 0, 0, NULL},
        {"ids", "\"1 2 3\"", "token ids", OPTION_STRING, &ids, 0, 0, NULL},
        {"tokenizer", "FILE|DIR", "instead of the model's own", OPTION_STRING, &o.tokenizer, 0, 0,
         NULL},
        {"seq", "T", "tokens of a window (default: the context, at most 512)", OPTION_INT, &o.seq,
         2, 1e9, NULL},
        {"windows", "N", "at most so many, from the text's beginning (8)", OPTION_INT, &windows, 1,
         1e6, NULL},
        {.kind = OPTION_HEADING, .help = "How"},
        {"svg", "FILE", "a plot", OPTION_STRING, &o.svg, 0, 0, NULL},
        {"csv", "FILE", "the table", OPTION_STRING, &csv, 0, 0, NULL},
        {"dtype", "TYPE", "arithmetic of the pass", OPTION_CHOICE, &o.dtype, 0, 0,
         "fp32|bf16|fp16|tf32"},
        DEVICE_OPTION(&o.device),
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print JSON", OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "inspect smoothing",
        .usage = "--model DIR --data FILE [--ablate LIST] [--svg FILE] [--csv FILE]",
        .summary =
            "How alike the tokens of a text become from layer to layer (over-smoothing), and "
            "the entropy of\neach layer's attention.",
        .examples = "  tril inspect smoothing --model out --data book.txt --svg smoothing.svg\n"
                    "  tril inspect smoothing --model out --data book.txt --ablate residual",
        .options = options,
        .option_count = sizeof options / sizeof *options,
    };
    if (!command_begin(&command, argc, argv, &code))
        return code;
    tril_threads_set((int)threads);
    model_flags_apply(&flags, &source.overrides);
    st = look_text_read(&o, file, ids, "--data FILE, --prompt TEXT or --ids \"1 2 3\"", &text,
                        &list, &err);
    if (st == TRIL_OK)
        st = tril_smoothing(&o, windows, csv, &s, &err);
    if (st == TRIL_OK && json)
        print_json(&s);
    else if (st == TRIL_OK)
        print_table(&s);
    if (st != TRIL_OK)
        code = command_fail(command.name, st, &err);
    tril_smoothing_free(&s);
    free(text);
    free(list);
    return code;
}
