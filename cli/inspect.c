/* tril inspect: what a model consists of, costs and looks like inside. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cli.h"
#include "inspect.h"
#include "json.h"
#include "model_options.h"
#include "options.h"
#include "tril/tril.h"

/* ------------------------------------------------------------------ parameters and FLOPs */

static const char *human(double n, char buffer[32]) {
    static const char *const units[] = {"", "k", "M", "G", "T", "P"};
    int u = 0;
    while (n >= 1000 && u < 5) {
        n /= 1000;
        u++;
    }
    snprintf(buffer, 32, u ? "%.2f %s" : "%.0f%s", n, units[u]);
    return buffer;
}

static void part(const char *name, double n, double total, double flops, double all_flops) {
    char a[32], b[32] = "";
    if (n <= 0 && flops <= 0)
        return;
    printf("  %-22s %10s %5.1f%%", name, human(n, a), total > 0 ? 100 * n / total : 0);
    if (flops > 0)
        printf("   %10s %5.1f%%", human(flops, b), 100 * flops / all_flops);
    putchar('\n');
}

static tril_status show_params(const struct tril_model_source *source, int64_t seq, bool json,
                               struct tril_error *err) {
    struct tril_model_info i;
    struct tril_counts c;
    tril_status st = tril_inspect_params(source, seq, &i, &c, err);
    if (st != TRIL_OK)
        return st;
    if (seq <= 0)
        seq = i.context;
    if (json) {
        json_print(json_pack(
            "{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:b, s:{s:f, s:f, s:f, s:f, s:f, s:f, "
            "s:f}, s:{s:f, s:f, s:f, s:f, s:f, s:f}}",
            "type", i.type, "layers", (json_int_t)i.layers, "dim", (json_int_t)i.dim, "heads",
            (json_int_t)i.heads, "kv_heads", (json_int_t)i.kv_heads, "head_dim",
            (json_int_t)i.head_dim, "ffn", (json_int_t)i.ffn, "vocab", (json_int_t)i.vocab, "seq",
            (json_int_t)seq, "tied", i.tied, "parameters", "embedding", c.embedding, "position",
            c.position, "attention", c.attention, "ffn", c.ffn, "norms", c.norms, "head", c.head,
            "total", c.total, "flops_per_token", "attention", c.flops_attention, "scores",
            c.flops_scores, "ffn", c.flops_ffn, "head", c.flops_head, "total", c.flops_total,
            "train", c.train_flops));
        return TRIL_OK;
    }
    char a[32], b[32];
    printf("%s: %lld layers, width %lld, %lld heads of %lld (%lld key/value), FFN %lld, vocabulary "
           "%lld, context %lld, head %s\n\n",
           i.type, (long long)i.layers, (long long)i.dim, (long long)i.heads, (long long)i.head_dim,
           (long long)i.kv_heads, (long long)i.ffn, (long long)i.vocab, (long long)i.context,
           i.tied ? "tied" : "untied");
    printf("  %-22s %10s %6s   %10s (a token, at T = %lld)\n", "part", "parameters", "", "FLOPs",
           (long long)seq);
    part("token embedding", c.embedding, c.total, 0, 1);
    part("position embedding", c.position, c.total, 0, 1);
    part("attention projections", c.attention, c.total, c.flops_attention, c.flops_total);
    part("attention scores", 0, c.total, c.flops_scores, c.flops_total);
    part("FFN", c.ffn, c.total, c.flops_ffn, c.flops_total);
    part("norms", c.norms, c.total, 0, 1);
    part(i.tied ? "head (tied)" : "head", c.head, c.total, c.flops_head, c.flops_total);
    printf("  %-22s %10s          %10s\n", "total", human(c.total, a), human(c.flops_total, b));
    printf("\n  exactly %.0f parameters; training: %s FLOPs a token\n", c.total,
           human(c.train_flops, a));
    return TRIL_OK;
}

/* The same width cut into 1, 2, 4, ... heads. */
static tril_status show_heads(const struct tril_model_source *source, int64_t seq, bool json,
                              struct tril_error *err) {
    struct tril_model_info i;
    struct tril_counts c;
    json_t *rows = json_array();
    tril_status st = tril_inspect_params(source, seq, &i, &c, err);
    const int64_t width = st == TRIL_OK ? i.heads * i.head_dim : 0;
    if (st == TRIL_OK && !json)
        printf("  %6s %8s %14s %12s %14s %14s %16s\n", "heads", "of width", "parameters",
               "in attention", "FLOPs a token", "of the scores", "scores a layer");
    for (int64_t H = 1; st == TRIL_OK && H <= width && H <= 256; H *= 2) {
        char flops[32], scores[32], held[32];
        struct tril_model_source cut = *source;
        if (width % H || width / H > 256)
            continue;
        cut.overrides.heads = cut.overrides.kv_heads = H;
        cut.overrides.head_dim = width / H;
        st = tril_inspect_params(&cut, seq, &i, &c, err);
        if (st != TRIL_OK)
            break;
        const double T = (double)(seq > 0 ? seq : i.context), numbers = (double)H * T * T;
        json_array_append_new(rows, json_pack("{s:I, s:I, s:f, s:f, s:f, s:f, s:f}", "heads",
                                              (json_int_t)H, "head_dim", (json_int_t)i.head_dim,
                                              "parameters", c.total, "attention", c.attention,
                                              "flops_per_token", c.flops_total, "flops_scores",
                                              c.flops_scores, "scores", numbers));
        if (!json)
            printf("  %6lld %8lld %14.0f %12.0f %14s %14s %16s\n", (long long)H,
                   (long long)i.head_dim, c.total, c.attention, human(c.flops_total, flops),
                   human(c.flops_scores, scores), human(numbers, held));
    }
    if (st == TRIL_OK && json)
        json_print(json_pack("{s:O}", "heads", rows));
    else if (st == TRIL_OK)
        printf("\n  Parameters and products do not depend on the number of heads. What does: the\n"
               "  scores, H T^2 exponentials a layer (T = %lld), held in memory unless attention\n"
               "  is computed in tiles.\n",
               (long long)(seq > 0 ? seq : i.context));
    json_decref(rows);
    return st;
}

/* ------------------------------------------------------------------ memory */

/* One unit for the whole table: megabytes, or gigabytes for what no laptop holds. */
static void print_memory(const char *name, double bytes, double total) {
    bool giga = total >= 100e9;
    printf("  %-36s %10.2f %s\n", name, bytes / (giga ? 1e9 : 1e6), giga ? "GB" : "MB");
}

static void memory_row(const char *name, double bytes, double total) {
    if (bytes > 0)
        print_memory(name, bytes, total);
}

static tril_status show_memory(const struct tril_model_source *source,
                               const struct tril_memory_options *o, bool json,
                               struct tril_error *err) {
    struct tril_memory m;
    tril_status st = tril_inspect_memory(source, o, &m, err);
    if (st != TRIL_OK)
        return st;
    if (json) {
        json_print(json_pack("{s:b, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}",
                             "training", o->training, "weights", m.weights, "masters", m.masters,
                             "gradients", m.gradients, "optimiser", m.optimiser, "activations",
                             m.activations, "packings", m.packings, "logits", m.logits, "cache",
                             m.cache, "other", m.other, "scratch", m.scratch, "total", m.total,
                             "host", m.host));
        return TRIL_OK;
    }
    printf("%s, %lld x %lld tokens, %s%s%s\n\n", o->training ? "training" : "inference",
           (long long)o->batch, (long long)o->seq, o->dtype, o->training ? ", recompute " : "",
           o->training ? o->recompute : "");
    memory_row("weights", m.weights, m.total);
    memory_row("packed copies of the weights", m.packings, m.total);
    memory_row("fp32 masters", m.masters, m.total);
    memory_row("gradients", m.gradients, m.total);
    memory_row("optimiser (AdamW's two moments)", m.optimiser, m.total);
    memory_row("activations and scratch", m.activations, m.total);
    memory_row("logits (a chunk at a time)", m.logits, m.total);
    memory_row("key/value cache", m.cache, m.total);
    memory_row("operations and libraries", m.scratch, m.total);
    memory_row("other", m.other, m.total);
    print_memory("total", m.total, m.total);
    memory_row("beside it, of the host's (pinned)", m.host, m.total);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ shapes */

struct shape_list {
    bool json, all;
    json_t *rows;
    int skipped; /* last layer that was left out */
};

static void visit_shape(void *arg, int layer, const char *name, int rank, const int64_t *shape,
                        const char *dtype) {
    struct shape_list *l = arg;
    char text[128] = "";
    size_t n = 0;
    if (l->json) {
        json_t *sizes = json_array();
        for (int i = 0; i < rank; i++)
            json_array_append_new(sizes, json_integer(shape[i]));
        json_array_append_new(l->rows, json_pack("{s:i, s:s, s:o, s:s}", "layer", layer, "name",
                                                 name, "shape", sizes, "dtype", dtype));
        return;
    }
    if (layer > 0 && !l->all) {
        if (layer != l->skipped)
            printf("  layer %d: as layer 0\n", layer);
        l->skipped = layer;
        return;
    }
    for (int i = 0; i < rank && n < sizeof text; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s%lld", i ? " x " : "",
                              (long long)shape[i]);
    printf("  %-36s %-24s %s\n", name, text, dtype);
}

static tril_status show_shapes(const struct tril_model_source *source,
                               const struct tril_memory_options *m, bool all, bool json,
                               struct tril_error *err) {
    struct shape_list l = {.json = json, .all = all, .rows = json ? json_array() : NULL};
    tril_status st = tril_inspect_shapes(source, m->seq, m->dtype, m->device, visit_shape, &l, err);
    if (json && st == TRIL_OK)
        json_print(l.rows);
    else
        json_decref(l.rows);
    if (st != TRIL_OK || json)
        return st;
    struct tril_model_info i;
    struct tril_counts counts;
    st = tril_inspect_params(source, m->seq, &i, &counts, err);
    if (st == TRIL_OK)
        printf("\n  a token in attention: %lld -> %lld x %lld -> %lld\n", (long long)i.dim,
               (long long)i.heads, (long long)i.head_dim, (long long)i.dim);
    return st;
}

/* ------------------------------------------------------------------ weights */

static void weights_json(const struct tril_weights *w) {
    json_t *rows = json_array();
    for (int64_t i = 0; i < w->count; i++) {
        const struct tril_weight_row *r = &w->rows[i];
        json_t *bins = json_array();
        for (int b = 0; b < TRIL_WEIGHT_BINS; b++)
            json_array_append_new(bins, json_integer(r->bins[b]));
        json_t *row = json_pack(
            "{s:s, s:i, s:[I,I], s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "name", r->name, "layer",
            r->layer, "shape", (json_int_t)r->rows, (json_int_t)r->cols, "dtype", r->dtype, "mean",
            json_measured(r->mean), "std", json_measured(r->std), "min", json_measured(r->min),
            "max", json_measured(r->max), "near_zero", json_measured(r->near_zero), "reach",
            json_measured(r->reach), "bins", bins);
        if (isfinite(r->kurtosis))
            json_object_set_new(row, "kurtosis", json_real(r->kurtosis));
        if (isfinite(r->stable_rank)) {
            json_object_set_new(row, "spectral", json_real(r->spectral));
            json_object_set_new(row, "stable_rank", json_real(r->stable_rank));
        }
        json_array_append_new(rows, row);
    }
    json_print(json_pack("{s:o}", "tensors", rows));
}

static tril_status show_weights(const char *model, const char *csv, const char *svg, bool json,
                                struct tril_error *err) {
    struct tril_weights w;
    tril_status st = tril_inspect_weights(model, csv, svg, &w, err);
    if (st != TRIL_OK)
        return st;
    if (json) {
        weights_json(&w);
    } else {
        printf("  %-44s %13s %9s %9s %9s %9s %8s %7s %9s %8s\n", "tensor", "shape", "mean", "std",
               "min", "max", "kurtosis", "near 0", "spectral", "rank");
        for (int64_t i = 0; i < w.count; i++) {
            const struct tril_weight_row *r = &w.rows[i];
            char shape[32];
            if (r->rows > 1)
                snprintf(shape, sizeof shape, "%lld x %lld", (long long)r->rows,
                         (long long)r->cols);
            else
                snprintf(shape, sizeof shape, "%lld", (long long)r->cols);
            printf("  %-44s %13s %9.2g %9.4f %9.4f %9.4f", r->name, shape, r->mean, r->std, r->min,
                   r->max);
            if (isfinite(r->kurtosis))
                printf(" %8.2f %6.1f%%", r->kurtosis, 100 * r->near_zero);
            if (isfinite(r->stable_rank))
                printf(" %9.3f %8.1f", r->spectral, r->stable_rank);
            putchar('\n');
        }
        printf(
            "\n  kurtosis: 3 when normal; near 0: within a tenth of the standard deviation (8.0%% "
            "when normal);\n  spectral: the largest singular value; rank: the stable rank, how "
            "many directions matter\n");
    }
    tril_weights_free(&w);
    return TRIL_OK;
}

int cmd_inspect(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "attention") == 0)
        return cmd_inspect_attention(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "smoothing") == 0)
        return cmd_inspect_smoothing(argc - 1, argv + 1);
    struct tril_model_source source = {.overrides = tril_model_overrides_none()};
    struct tril_memory_options m = {
        .training = true, .batch = 8, .dtype = "bf16", .recompute = "none"};
    struct model_flags flags = {0};
    struct tril_error err = {0};
    bool params = false, memory = false, shapes = false, all = false, inference = false,
         json = false, weights = false, by_heads = false;
    const char *csv = NULL, *svg = NULL;
    int64_t threads = 0;
    int code = 0;
    const struct option options[] = {
        {.kind = OPTION_HEADING, .help = "Which model"},
        {"model", "DIR", "a Hugging Face directory", OPTION_STRING, &source.model, 0, 0, NULL},
        {"preset", "NAME", "model3, nano, gpt2, gpt2-medium/-large/-xl, llama-110m/-1b",
         OPTION_STRING, &source.preset, 0, 0, NULL},
        {"config", "FILE", "a config.json", OPTION_STRING, &source.config, 0, 0, NULL},
        MODEL_OPTIONS(source.overrides, flags),
        {"vocab", "V", "tokens", OPTION_INT, &source.overrides.vocab, 1, 1e8, NULL},
        {.kind = OPTION_HEADING, .help = "What to show"},
        {"params", NULL, "parameters and FLOPs by part (the default)", OPTION_FLAG, &params, 0, 0,
         NULL},
        {"by-heads", NULL, "the same width cut into 1, 2, 4, ... heads, side by side", OPTION_FLAG,
         &by_heads, 0, 0, NULL},
        {"memory", NULL, "predicted memory of a training step (nothing is allocated)", OPTION_FLAG,
         &memory, 0, 0, NULL},
        {"inference", NULL, "... of inference instead", OPTION_FLAG, &inference, 0, 0, NULL},
        {"shapes", NULL, "every tensor of one real forward pass", OPTION_FLAG, &shapes, 0, 0, NULL},
        {"all", NULL, "... of every layer, not the first alone", OPTION_FLAG, &all, 0, 0, NULL},
        {"weights", NULL, "the distribution of every tensor of a checkpoint", OPTION_FLAG, &weights,
         0, 0, NULL},
        {"csv", "FILE", "... as a table", OPTION_STRING, &csv, 0, 0, NULL},
        {"svg", "FILE", "... as histograms, layers side by side", OPTION_STRING, &svg, 0, 0, NULL},
        {.kind = OPTION_HEADING, .help = "At which size"},
        {"batch", "B", "rows (8)", OPTION_INT, &m.batch, 1, 1e7, NULL},
        {"seq", "T", "tokens a row (default: the context; shapes: 16)", OPTION_INT, &m.seq, 1, 1e9,
         NULL},
        {"dtype", "TYPE", "weights and activations", OPTION_CHOICE, &m.dtype, 0, 0,
         "bf16|fp32|fp16"},
        {"device", "NAME", "whose memory; where the pass of --shapes runs (cpu)", OPTION_CHOICE,
         &m.device, 0, 0, "cpu|cuda"},
        {"kv-dtype", "TYPE", "of the key/value cache (--dtype)", OPTION_CHOICE, &m.kv_dtype, 0, 0,
         "fp32|bf16|q8"},
        {"recompute", "WHAT", "activations computed again", OPTION_CHOICE, &m.recompute, 0, 0,
         "none|selective|full"},
        {"offload", "WHAT", "what waits in the host's memory (--device cuda)", OPTION_CHOICE,
         &m.offload, 0, 0, "none|optimizer|activations|all"},
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print JSON", OPTION_FLAG, &json, 0, 0, NULL},
    };
    const struct command command = {
        .name = "inspect",
        .usage = "(--model DIR | --preset NAME | --config FILE) [--params] [--memory] [--shapes]\n"
                 "tril inspect attention --help: what every head looks at, as a page, a picture or "
                 "arrays\n"
                 "tril inspect smoothing --help: how alike tokens become from layer to layer",
        .summary = "Parameters, FLOPs, memory, shapes and weights of a model.",
        .examples = "  tril inspect --preset gpt2\n"
                    "  tril inspect --preset gpt2 --memory --batch 4 --seq 1024 --recompute full\n"
                    "  tril inspect --preset model3 --dim 128 --heads 4 --shapes\n"
                    "  tril inspect --preset llama-1b --layers 96 --dim 8192 --heads 64 --memory "
                    "--inference --batch 1",
        .options = options,
        .option_count = sizeof options / sizeof *options,
    };
    if (!command_begin(&command, argc, argv, &code))
        return code;
    tril_threads_set((int)threads);
    model_flags_apply(&flags, &source.overrides);
    m.training = !inference;
    tril_status st = TRIL_OK;
    if (shapes)
        st = show_shapes(&source, &m, all, json, &err);
    if (st == TRIL_OK && (memory || inference)) {
        if (m.seq <= 0) {
            struct tril_model_info info;
            struct tril_counts counts;
            st = tril_inspect_params(&source, 0, &info, &counts, &err);
            m.seq = info.context;
        }
        if (st == TRIL_OK)
            st = show_memory(&source, &m, json, &err);
    }
    if (st == TRIL_OK && by_heads)
        st = show_heads(&source, m.seq, json, &err);
    if (st == TRIL_OK && weights)
        st = show_weights(source.model, csv, svg, json, &err);
    if (st == TRIL_OK && (params || !(shapes || memory || inference || weights || by_heads)))
        st = show_params(&source, m.seq, json, &err);
    return st == TRIL_OK ? 0 : command_fail("inspect", st, &err);
}
