/* Three savings, each measured: flash attention's memory, the key/value cache's FLOPs, and
 * recomputation's memory (with what it costs in time). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/progress.h"
#include "base/system.h"
#include "lab/attend.h"
#include "lab/learner.h"
#include "lab/lens.h"

/* ------------------------------------------------------------------ flash */

struct attention_job {
    struct op_context *ctx;
    int64_t T;
    bool standard;
};

static tril_status attention_work(void *arg, struct tril_error *err) {
    const struct attention_job *j = arg;
    struct op_context fresh = {0};
    struct attend a = {0};
    struct standard s = {0};
    tril_status st = TRIL_OK;
    TRY(op_context_init(&fresh, j->ctx->backend, err));
    TRY(attend_create(&a, &fresh, 1, j->T, 8, 64, DT_F32, true, 1, err));
    if (j->standard) {
        TRY(standard_create(&s, &a, err));
        TRY(standard_forward(&s, err));
        TRY(standard_backward(&s, err));
    } else {
        TRY(attend_forward(&a, err));
        TRY(attend_backward(&a, err));
    }
done:
    standard_free(&s);
    attend_free(&a);
    op_context_free(&fresh);
    return st;
}

/* ------------------------------------------------------------------ the cache */

struct decoded {
    double flops, seconds, difference; /* difference: of the last logits */
};

/* `n` tokens one by one after a prompt of `n`, with a cache or from scratch each time. */
static tril_status decode(struct lens *lens, const struct model_config *c, int64_t n, bool cached,
                          float *last, struct decoded *out, struct tril_error *err) {
    struct model_options mo = {.dtype = DT_F32};
    struct workspace_options wo = {.max_tokens = 2 * n, .max_sequences = 1, .max_rows = 1};
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct kv_cache *cache = NULL;
    int32_t *ids = malloc((size_t)(2 * n) * sizeof *ids), offsets[2] = {0}, slot = 0, row;
    struct random_key key = {.seed = 3, .op = RANDOM_TEST};
    tril_status st = TRIL_OK;
    if (!ids)
        return lab_no_memory(err);
    for (int64_t i = 0; i < 2 * n; i++)
        ids[i] = (int32_t)random_below(&key, (uint64_t)i, (uint64_t)c->vocab);
    TRY(model_create(&m, c, &mo, &lens->ctx, err));
    TRY(model_init(m, 1, err));
    TRY(workspace_create(&w, m, &wo, err));
    if (cached)
        TRY(kv_cache_create(&cache, m, 1, 2 * n, 0, DT_F32, err));
    lens_reset(lens);
    double begun = clock_seconds();
    for (int64_t i = 0; i < n; i++) { /* the prompt's last token, then one more each time */
        int64_t end = n + i, begin = cached && i > 0 ? end - 1 : 0;
        offsets[1] = (int32_t)(end - begin);
        row = offsets[1] - 1;
        struct batch b = {.tokens = end - begin,
                          .sequences = 1,
                          .ids = ids + begin,
                          .offsets = offsets,
                          .cache = cache,
                          .slots = cached ? &slot : NULL,
                          .rows = &row,
                          .row_count = 1};
        TRY(model_forward(m, w, &b, last, err));
    }
    out->seconds = clock_seconds() - begun;
    out->flops = lens_flops(lens);
done:
    kv_cache_free(cache);
    workspace_free(w);
    model_free(m);
    free(ids);
    return st;
}

static tril_status compare_cache(struct lab *l, struct decoded out[2], int64_t *n,
                                 struct tril_error *err) {
    struct model_config c =
        learner_config(true, 4, lab_choose(l, 128, 256), 4, 4096, lab_choose(l, 128, 1024));
    struct lens lens;
    float *last[2] = {malloc((size_t)c.vocab * sizeof(float)),
                      malloc((size_t)c.vocab * sizeof(float))};
    bool open = false;
    tril_status st = TRIL_OK;
    *n = c.context / 2;
    if (!last[0] || !last[1]) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(lens_open(&lens, l->ctx, err));
    open = true;
    for (int cached = 0; cached < 2; cached++)
        TRY(decode(&lens, &c, *n, cached, last[cached], &out[cached], err));
    out[1].difference = lab_difference(last[0], last[1], c.vocab);
done:
    if (open)
        lens_close(&lens);
    free(last[0]);
    free(last[1]);
    return st;
}

/* ------------------------------------------------------------------ recomputation */

struct training_job {
    struct op_context *ctx;
    const struct model_config *c;
    enum recompute recompute;
    int64_t batch, seq;
    struct workspace *w;
    struct model *m;
    int32_t *ids;
    double loss, seconds;
};

/* The workspace alone: the model is there already. */
static tril_status train_once(void *arg, struct tril_error *err) {
    struct training_job *j = arg;
    int64_t n = j->batch * j->seq, count;
    struct workspace_options wo = {
        .max_tokens = n, .max_sequences = j->batch, .backward = true, .recompute = j->recompute};
    int32_t *offsets = malloc((size_t)(j->batch + 1) * sizeof *offsets);
    struct train_call call = {.scale = 1.0f / (float)n, .overwrite = true};
    tril_status st = TRIL_OK;
    if (!offsets)
        return lab_no_memory(err);
    for (int64_t b = 0; b <= j->batch; b++)
        offsets[b] = (int32_t)(b * j->seq);
    TRY(workspace_create(&j->w, j->m, &wo, err));
    struct batch b = {
        .tokens = n, .sequences = j->batch, .ids = j->ids, .targets = j->ids, .offsets = offsets};
    for (int i = 0; i < 3; i++) { /* the last is timed */
        double begun = clock_seconds();
        TRY(model_forward_backward(j->m, j->w, &b, &call, &j->loss, &count, err));
        j->seconds = clock_seconds() - begun;
    }
done:
    workspace_free(j->w);
    free(offsets);
    return st;
}

static tril_status compare_recompute(struct lab *l, double bytes[3], double seconds[3],
                                     double *loss_difference, struct tril_error *err) {
    struct model_config c =
        learner_config(true, lab_choose(l, 4, 12), lab_choose(l, 128, 512), 8, 1024, 512);
    struct model_options mo = {.dtype = DT_F32, .training = true};
    struct training_job j = {
        .ctx = l->ctx, .c = &c, .batch = lab_choose(l, 4, 4), .seq = lab_choose(l, 128, 512)};
    double loss[3];
    tril_status st = TRIL_OK;
    j.ids = calloc((size_t)(j.batch * j.seq), sizeof *j.ids);
    if (!j.ids)
        return lab_no_memory(err);
    for (int64_t i = 0; i < j.batch * j.seq; i++)
        j.ids[i] = (int32_t)(i * 37 % c.vocab);
    TRY(model_create(&j.m, &c, &mo, l->ctx, err));
    TRY(model_init(j.m, 1, err));
    j.recompute = RECOMPUTE_FULL;
    TRY(train_once(&j, err)); /* gradients and the library's scratch are touched once */
    for (int r = 0; r < 3; r++) {
        j.recompute = (enum recompute)r;
        TRY(lab_peak_memory(l->ctx, train_once, &j, &bytes[r], err));
        seconds[r] = j.seconds;
        loss[r] = j.loss;
    }
    *loss_difference = fmax(fabs(loss[1] - loss[0]), fabs(loss[2] - loss[0]));
done:
    model_free(j.m);
    free(j.ids);
    return st;
}

static void row(struct table *t, const char *what, const char *published, const char *unit,
                double without, double with, const char *cost) {
    table_add_text(t, what);
    table_add_text(t, published);
    table_add_text(t, unit);
    table_add_number(t, without, 1);
    table_add_number(t, with, 1);
    table_add_number(t, 100 * (1 - with / without), 1);
    table_add_text(t, cost);
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"saving", "published", "of",     "without",
                                          "with",   "saved %",   "in time"};
    struct attention_job j = {.ctx = l->ctx, .T = lab_choose(l, 1024, 4096)};
    double attention[2], bytes[3], seconds[3], loss_difference = 0;
    struct decoded cache[2] = {{0}};
    struct table *t = NULL;
    char words[3][64];
    int64_t n = 0;
    tril_status st = TRIL_OK;
    TRY(table_create(&t, columns, 7, err));
    for (int standard = 0; standard < 2; standard++) {
        j.standard = standard;
        TRY(lab_peak_memory(l->ctx, attention_work, &j, &attention[standard], err));
    }
    TRY(compare_cache(l, cache, &n, err));
    TRY(compare_recompute(l, bytes, seconds, &loss_difference, err));
    snprintf(words[0], sizeof words[0], "%.1fx as fast", cache[0].seconds / cache[1].seconds);
    snprintf(words[1], sizeof words[1], "%.2f times the step", seconds[1] / seconds[0]);
    snprintf(words[2], sizeof words[2], "%.2f times the step", seconds[2] / seconds[0]);
    row(t, "flash attention", "-80%", "MB, forward and backward", attention[1] / 1e6,
        attention[0] / 1e6, "see block-time");
    row(t, "key/value cache", "-90%", "GFLOPs executed", cache[0].flops * 1e-9,
        cache[1].flops * 1e-9, words[0]);
    row(t, "recomputation, selective", NULL, "MB of activations", bytes[0] / 1e6, bytes[1] / 1e6,
        words[1]);
    row(t, "recomputation, full", "-50%", "MB of activations", bytes[0] / 1e6, bytes[2] / 1e6,
        words[2]);
    st = lab_table(l, "savings", "Savings, measured", t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    double flash = 1 - attention[0] / attention[1], flops = 1 - cache[1].flops / cache[0].flops;
    double full = 1 - bytes[2] / bytes[0], selective = 1 - bytes[1] / bytes[0];
    double x[] = {1, 2, 3, 4}, y[] = {100 * flash, 100 * flops, 100 * selective, 100 * full};
    double theirs_x[] = {1, 2, 4}, theirs[] = {80, 90, 50};
    const struct curve curves[] = {
        {.label = "here", .x = x, .y = y, .n = 4, .style = CURVE_DOTS},
        {.label = "published", .x = theirs_x, .y = theirs, .n = 3, .style = CURVE_DOTS}};
    const struct curve_plot plot = {.title = "What is saved",
                                    .x_label =
                                        "1 flash, 2 cache, 3 selective, 4 full recomputation",
                                    .y_label = "%",
                                    .curves = curves,
                                    .curve_count = 2,
                                    .y_from_zero = true};
    TRY(lab_curves(l, "savings", &plot, err));
    lab_claim(l, flash >= 0.75, "flash attention's memory", "-80%", "%.0f%% at T = %lld",
              -100 * flash, (long long)j.T);
    lab_claim(l, flops >= 0.9, "the key/value cache's FLOPs", "-90%",
              "%.1f%% (%lld tokens after a prompt of as many)", -100 * flops, (long long)n);
    lab_claim(l, full >= 0.5, "recomputation's memory", "-50%",
              "%.0f%% of the activations, a step takes %.2f times as long", -100 * full,
              seconds[2] / seconds[0]);
    lab_value(l, "flash_saved", flash);
    lab_value(l, "cache_saved", flops);
    lab_value(l, "cache_difference", cache[1].difference);
    lab_value(l, "selective_saved", selective);
    lab_value(l, "full_saved", full);
    lab_value(l, "recompute_time", seconds[2] / seconds[0]);
    lab_value(l, "recompute_loss_difference", loss_difference);
    lab_say(
        l,
        "Attention forward and backward at T = %lld takes %.0f MB with its matrices and %.0f MB "
        "with flash (%.0f%% less). Generating %lld tokens after a prompt of %lld executes "
        "%.1f%% fewer FLOPs with a cache than without, as counted operation by operation, and "
        "the last logits differ by %.1g.",
        (long long)j.T, attention[1] / 1e6, attention[0] / 1e6, 100 * flash, (long long)n,
        (long long)n, 100 * flops, cache[1].difference);
    lab_say(
        l,
        "Full recomputation saves %.0f%% of the activations' memory for %.0f%% more time a step; "
        "selective %.0f%% for %.0f%%. The loss differs by %.1g.",
        100 * full, 100 * (seconds[2] / seconds[0] - 1), 100 * selective,
        100 * (seconds[1] / seconds[0] - 1), loss_difference);
done:
    table_free(t);
    return st;
}

const struct lab_experiment lab_savings = {
    {"savings", "flash's memory, the cache's FLOPs, recomputation, each measured", "E10", 5, 60,
     false, false},
    "Savings",
    run};
