/* Generating tokens: everything computed again for each token, against a key/value cache, and the
 * cache at a context eight times as long. */
#include <math.h>
#include <stdlib.h>

#include "base/progress.h"
#include "base/system.h"
#include "lab/bench.h"
#include "lab/learner.h"
#include "lab/lens.h"

enum { WAYS = 4 };

struct way {
    const char *name, *published;
    bool cached, materialised, longer;
    double tokens_per_s, ms, flops, cache_bytes; /* flops: executed for a token */
};

/* The prompt in pieces, then `count` tokens one by one; times of those. */
static tril_status decode(struct lens *lens, struct model *m, int64_t context, int64_t count,
                          struct way *w, float *logits, struct tril_error *err) {
    enum { PIECE = 1024 };
    const int64_t room = w->cached ? PIECE : context;
    struct workspace_options wo = {.max_tokens = room, .max_sequences = 1, .max_rows = 1};
    struct workspace *space = NULL;
    struct kv_cache *cache = NULL;
    double *seconds = malloc((size_t)count * sizeof *seconds);
    int32_t *ids = malloc((size_t)context * sizeof *ids), offsets[2] = {0}, slot = 0, row;
    const int64_t prompt = context - count;
    const bool on_device = lens->inner->device;
    struct random_key key = {.seed = 3, .op = RANDOM_TEST};
    tril_status st = TRIL_OK;
    if (!ids || !seconds) {
        st = lab_no_memory(err);
        goto done;
    }
    for (int64_t i = 0; i < context; i++)
        ids[i] = (int32_t)random_below(&key, (uint64_t)i, (uint64_t)m->config.vocab);
    TRY(workspace_create(&space, m, &wo, err));
    if (w->cached)
        TRY(kv_cache_create(&cache, m, 1, context, PIECE, m->dtype, err));
    lens->other = w->materialised;
    lens->implementation = ATTENTION_MATERIALISED;
    struct batch b = {.sequences = 1,
                      .offsets = offsets,
                      .cache = cache,
                      .slots = w->cached ? &slot : NULL,
                      .rows = &row,
                      .row_count = 1};
    for (int64_t at = 0, n; w->cached && at < prompt; at += n) {
        n = prompt - at < PIECE ? prompt - at : PIECE;
        b.ids = ids + at;
        b.tokens = offsets[1] = (int32_t)n;
        row = (int32_t)n - 1;
        TRY(model_forward(m, space, &b, logits, err));
    }
    for (int64_t i = -2; i < count; i++) { /* two to warm up, of the first token */
        int64_t end = prompt + (i < 0 ? 1 : i + 1), begin = w->cached ? end - 1 : 0;
        if (w->cached && i <= 0)
            kv_cache_rewind(cache, 0, prompt);
        b.ids = ids + begin;
        b.tokens = offsets[1] = (int32_t)(end - begin);
        row = offsets[1] - 1;
        lens_reset(lens);
        double begun = clock_seconds();
        TRY(model_forward(m, space, &b, logits, err));
        if (i >= 0)
            seconds[i] = clock_seconds() - begun;
        double attention = 4.0 * (double)(m->config.layers * m->config.heads * m->config.head_dim) *
                           (double)end * (w->cached ? 1 : (double)(end + 1) / 2);
        /* (a replayed graph is not seen) */
        w->flops = fmax(w->flops, lens_flops(lens) + (on_device ? attention : 0));
    }
    double median = bench_median(seconds, count);
    w->ms = median * 1e3;
    w->tokens_per_s = 1 / median;
    if (w->cached)
        w->cache_bytes = (double)kv_cache_bytes(&m->config, 1, context, PIECE, m->dtype);
done:
    kv_cache_free(cache);
    workspace_free(space);
    free(seconds);
    free(ids);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"way",      "context",     "published tokens/s",
                                          "tokens/s", "ms a token",  "GFLOPs a token",
                                          "cache MB", "beside naive"};
    struct way w[WAYS] = {
        {.name = "naive: all again, materialised", .published = "2000", .materialised = true},
        {.name = "all again, flash"},
        {.name = "cache, flash", .published = "14000", .cached = true},
        {.name = "cache, flash, 8x the context",
         .published = "9000",
         .cached = true,
         .longer = true},
    };
    const int64_t context = lab_choose(l, 256, 4096);
    const bool large = l->device && l->size != TRIL_LAB_QUICK; /* GPT-2's shape, half precision */
    struct model_config c =
        learner_config(false, large ? 12 : 2, large ? 768 : lab_choose(l, 64, 256), large ? 12 : 4,
                       lab_choose(l, 512, 4096), 8 * context);
    struct model_options mo = {.dtype = l->device ? DT_F16 : DT_F32};
    float *logits[WAYS] = {0};
    struct model *m = NULL;
    struct table *t = NULL;
    struct progress progress;
    struct lens lens;
    bool open = false;
    char title[160];
    tril_status st = TRIL_OK;
    progress_start(&progress, "inference", WAYS);
    TRY(lens_open(&lens, l->ctx, err));
    open = true;
    TRY(model_create(&m, &c, &mo, &lens.ctx, err));
    TRY(model_init(m, 1, err));
    TRY(table_create(&t, columns, 8, err));
    for (int i = 0; i < WAYS; i++) {
        int64_t n = w[i].longer ? 8 * context : context;
        logits[i] = malloc((size_t)c.vocab * sizeof **logits);
        if (!logits[i]) {
            st = lab_no_memory(err);
            goto done;
        }
        TRY(decode(&lens, m, n, lab_choose(l, 4, w[i].cached ? 32 : 3), &w[i], logits[i], err));
        table_add_text(t, w[i].name);
        table_add_int(t, n);
        table_add_text(t, w[i].published);
        table_add_number(t, w[i].tokens_per_s, 2);
        table_add_number(t, w[i].ms, 2);
        table_add_number(t, w[i].flops * 1e-9, 4);
        table_add_number(t, w[i].cached ? w[i].cache_bytes / 1e6 : NAN, 2);
        table_add_number(t, w[i].tokens_per_s / w[0].tokens_per_s, 1);
        progress_update(&progress, i + 1, w[i].name);
    }
    snprintf(title, sizeof title,
             "One sequence, %lld layers of width %lld, %lld heads, V = %lld, %s",
             (long long)c.layers, (long long)c.dim, (long long)c.heads, (long long)c.vocab,
             dtype_name(mo.dtype));
    st = lab_table(l, "tokens", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const char *labels[WAYS];
    double rate[WAYS], same = lab_difference(logits[0], logits[1], c.vocab);
    for (int i = 0; i < WAYS; i++) {
        labels[i] = w[i].name;
        rate[i] = w[i].tokens_per_s;
    }
    const struct bar_plot plot = {.title = "Generating, one sequence",
                                  .x_label = "tokens a second",
                                  .names = labels,
                                  .values = rate,
                                  .count = WAYS,
                                  .decimals = 1,
                                  .marked = 0};
    TRY(lab_bars(l, "tokens", &plot, err));
    double gain = rate[2] / rate[0], kept = rate[3] / rate[2];
    lab_claim(l, gain >= 7, "a cache over computing everything again",
              "14k against 2k tokens/s: 7x", "%.0f against %.2f tokens/s: %.0fx", rate[2], rate[0],
              gain);
    lab_claim(l, kept >= 9.0 / 14, "what is left at 8 times the context",
              "9k of 14k tokens/s: 0.64x", "%.0f of %.0f tokens/s: %.2fx", rate[3], rate[2], kept);
    lab_value(l, "gain", gain);
    lab_value(l, "kept", kept);
    lab_value(l, "flops_saved", 1 - w[2].flops / w[1].flops);
    lab_value(l, "difference_flash", same);
    lab_value(l, "difference_cache", lab_difference(logits[1], logits[2], c.vocab));
    for (int i = 0; i < WAYS; i++) {
        static const char *const names[WAYS] = {"naive", "again", "cached", "longer"};
        lab_value(l, names[i], rate[i]);
    }
    lab_say(
        l,
        "At %lld tokens of context a token costs %.1f ms when everything is computed again, %.1f "
        "of them with flash attention, and %.2f ms with a cache: %.2f%% of the FLOPs. What that "
        "gains grows with the context, since only the naive way computes it again.",
        (long long)context, w[0].ms, w[1].ms, w[2].ms, 100 * w[2].flops / w[1].flops);
    lab_say(
        l,
        "At %lld tokens the cache of %.0f MB is read for every token, which leaves %.2f of the "
        "rate. "
        "The published figures are of a GPU and a model whose sizes and batch are not stated; only "
        "the ratios can be compared.",
        (long long)(8 * context), w[3].cache_bytes / 1e6, kept);
done:
    for (int i = 0; i < WAYS; i++)
        free(logits[i]);
    model_free(m);
    if (open)
        lens_close(&lens);
    progress_end(&progress);
    table_free(t);
    return st;
}

const struct lab_experiment lab_inference = {
    {"inference", "tokens a second: everything again, a cache, a long cache", "E8", 3, 60, false,
     true},
    "Generating with and without a cache",
    run};
