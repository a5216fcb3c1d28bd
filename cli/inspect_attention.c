/* tril inspect attention: mask, scores and softmax of every layer and head in one pass. */
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

/* A T x T matrix as rows. */
static json_t *matrix_json(const float *f, const uint8_t *u, int64_t T) {
    json_t *rows = json_array();
    for (int64_t i = 0; i < T; i++) {
        json_t *row = json_array();
        for (int64_t j = 0; j < T; j++)
            json_array_append_new(row, !f                       ? json_integer(u[i * T + j])
                                       : isfinite(f[i * T + j]) ? json_real((double)f[i * T + j])
                                                                : json_null());
        json_array_append_new(rows, row);
    }
    return rows;
}

static void print_json(const struct tril_look *k) {
    json_t *tokens = json_array(), *ids = json_array(), *heads = json_array();
    for (int64_t i = 0; i < k->tokens; i++) {
        json_array_append_new(tokens, json_string(k->labels[i]));
        json_array_append_new(ids, json_integer(k->ids[i]));
    }
    for (int64_t i = 0; i < k->head_count; i++) {
        const struct tril_look_head *h = &k->heads[i];
        json_array_append_new(
            heads,
            json_pack("{s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "layer", h->layer,
                      "head", h->head, "entropy", json_measured(h->entropy), "distance",
                      json_measured(h->distance), "first", json_measured(h->first), "previous",
                      json_measured(h->previous), "self", json_measured(h->self), "sink",
                      json_measured(h->sink), "largest", json_measured(h->largest), "uniform",
                      json_measured(h->uniform)));
    }
    struct tril_build_info b;
    tril_build_info_get(&b);
    json_t *root =
        json_pack("{s:s, s:I, s:I, s:f, s:s, s:s, s:i, s:o, s:o, s:o}", "type", k->info.type,
                  "layers", (json_int_t)k->info.layers, "tokens_count", (json_int_t)k->tokens,
                  "seconds", k->seconds, "processor", b.processor, "isa", b.isa, "threads",
                  b.threads, "tokens", tokens, "ids", ids, "heads", heads);
    if (k->weights) {
        json_object_set_new(root, "scores", matrix_json(k->scores, NULL, k->tokens));
        if (k->added)
            json_object_set_new(root, "added", matrix_json(k->added, NULL, k->tokens));
        json_object_set_new(root, "mask", matrix_json(NULL, k->mask, k->tokens));
        json_object_set_new(root, "weights", matrix_json(k->weights, NULL, k->tokens));
    }
    json_print(root);
}

static void print_row(const char *name, const struct tril_look_head *h, bool sink) {
    printf("  %-12s %8.3f %9.1f %8.1f%% %9.1f%% %8.1f%%", name, h->entropy, h->distance,
           100 * h->first, 100 * h->previous, 100 * h->self);
    if (sink)
        printf(" %6.1f%%", 100 * h->sink);
    putchar('\n');
}

/* Every head if they are few, else means of layers. */
static void print_table(const struct tril_look *k) {
    const bool each = k->head_count <= 48;
    bool sink = false;
    for (int64_t i = 0; i < k->head_count; i++)
        sink = sink || k->heads[i].sink > 0;
    printf("  %-12s %8s %9s %9s %10s %9s%s\n", each ? "layer.head" : "layer", "entropy", "distance",
           "first", "previous", "itself", sink ? "   sink" : "");
    for (int64_t i = 0, end; i < k->head_count; i = end) {
        struct tril_look_head mean = k->heads[i];
        char name[32];
        for (end = i + 1; !each && end < k->head_count && k->heads[end].layer == mean.layer;
             end++) {
            const struct tril_look_head *h = &k->heads[end];
            mean.entropy += h->entropy;
            mean.distance += h->distance;
            mean.first += h->first;
            mean.previous += h->previous;
            mean.self += h->self;
            mean.sink += h->sink;
        }
        const double n = (double)(end - i);
        mean.entropy /= n;
        mean.distance /= n;
        mean.first /= n;
        mean.previous /= n;
        mean.self /= n;
        mean.sink /= n;
        snprintf(name, sizeof name, each ? "%d.%d" : "%d", mean.layer, mean.head);
        print_row(name, &mean, sink);
    }
    printf("\n  entropy in nats, distance in tokens; shares of the weight%s\n",
           each ? "" : "; means over each layer's heads (--json has them all)");
}

int cmd_inspect_attention(int argc, char **argv) {
    struct tril_model_source source = {.overrides = tril_model_overrides_none()};
    struct tril_look_options o = {
        .source = &source, .dtype = "fp32", .device = "cpu", .layer = -1, .head = -1};
    struct model_flags flags = {0};
    struct tril_look look = {0};
    struct tril_error err = {0};
    const char *file = NULL, *ids = NULL;
    char *text = NULL;
    int32_t *list = NULL;
    bool json = false;
    int64_t threads = 0, layer = -1, head = -1;
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
        {"prompt", "TEXT", "what the model reads", OPTION_STRING, &o.prompt, 0, 0, NULL},
        {"prompt-file", "FILE", "'-': standard input", OPTION_STRING, &file, 0, 0, NULL},
        {"ids", "\"1 2 3\"", "instead of a text; needs no tokenizer", OPTION_STRING, &ids, 0, 0,
         NULL},
        {"tokenizer", "FILE|DIR", "instead of the model's own", OPTION_STRING, &o.tokenizer, 0, 0,
         NULL},
        {"seq", "T", "its first T tokens", OPTION_INT, &o.seq, 1, 1e9, NULL},
        {.kind = OPTION_HEADING, .help = "What of it"},
        {"layer", "L", "this layer alone, from 0", OPTION_INT, &layer, 0, 1e6, NULL},
        {"head", "H", "this head alone, from 0", OPTION_INT, &head, 0, 1e6, NULL},
        {"html", "FILE", "a page to explore every head in: one file, no network", OPTION_STRING,
         &o.html, 0, 0, NULL},
        {"svg", "FILE", "a picture: of one head (--layer and --head), or of all", OPTION_STRING,
         &o.svg, 0, 0, NULL},
        {"png", "FILE", "the same through rsvg-convert", OPTION_STRING, &o.png, 0, 0, NULL},
        {"out", "FILE", "arrays: scores, mask, weights, log-sum-exp (safetensors)", OPTION_STRING,
         &o.out, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "How"},
        {"dtype", "TYPE", "arithmetic of the pass", OPTION_CHOICE, &o.dtype, 0, 0,
         "fp32|bf16|fp16|tf32"},
        DEVICE_OPTION(&o.device),
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print JSON; of one head and at most 256 tokens with its matrices",
         OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "inspect attention",
        .usage = "--model DIR --prompt TEXT [--layer L --head H] [--html FILE] [--svg FILE] ...",
        .summary =
            "Mask, scaled QK^T and softmax of every layer and head, from the queries, keys and "
            "log-sum-exp of\none real forward pass through the usual kernels; and what each head "
            "does: entropy, distance, shares.",
        .examples =
            "  tril inspect attention --model out --prompt \"The cat sat on the mat\" --html "
            "a.html\n"
            "  tril inspect attention --model out --prompt \"To be or not to be\" --layer 2 --head "
            "1 "
            "--svg head.svg\n"
            "  tril inspect attention --preset nano --ids \"1 2 3 4\" --out random.safetensors",
        .options = options,
        .option_count = sizeof options / sizeof *options,
    };
    if (!command_begin(&command, argc, argv, &code))
        return code;
    tril_threads_set((int)threads);
    model_flags_apply(&flags, &source.overrides);
    o.layer = (int)layer;
    o.head = (int)head;
    st = look_text_read(&o, file, ids, "--prompt TEXT, --prompt-file FILE or --ids \"1 2 3\"",
                        &text, &list, &err);
    if (st == TRIL_OK)
        st = tril_look(&o, &look, &err);
    if (st != TRIL_OK)
        goto done;
    if (o.png && !look.png_made)
        fprintf(stderr, "tril inspect attention: no %s: rsvg-convert is not installed\n", o.png);
    if (json)
        print_json(&look);
    else
        print_table(&look);
done:
    if (st != TRIL_OK)
        code = command_fail(command.name, st, &err);
    tril_look_free(&look);
    free(text);
    free(list);
    return code;
}
