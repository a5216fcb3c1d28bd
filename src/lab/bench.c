/* Benchmarks of a model: warm up, time each repetition, report the median. */
#include "lab/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/progress.h"
#include "base/system.h"
#include "lab/lab.h"
#include "train/optimiser.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the benchmark");
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(double *x, int64_t n) {
    qsort(x, (size_t)n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* Median, fastest and slowest of `steps` times; sorts them. */
static void summarise(struct tril_bench_result *r, double *seconds, int64_t steps, double tokens) {
    double median = bench_median(seconds, steps);
    r->step_ms = median * 1e3;
    r->step_ms_min = seconds[0] * 1e3;
    r->step_ms_max = seconds[steps - 1] * 1e3;
    r->tokens_per_s = tokens / median;
    r->anonymous_bytes = (double)memory_anonymous();
    r->peak_rss_bytes = (double)memory_peak_rss();
}

/* A batch of random tokens; one allocation (free b->ids). */
static tril_status random_batch(struct batch *b, int64_t rows, int64_t seq, int64_t vocab,
                                struct tril_error *err) {
    struct random_key key = {.seed = 1, .op = RANDOM_TEST};
    int64_t n = rows * seq;
    int32_t *ids = malloc((size_t)(2 * n + rows + 1) * sizeof *ids);
    *b = (struct batch){.tokens = n, .sequences = rows};
    if (!ids)
        return no_memory(err);
    int32_t *targets = ids + n, *offsets = targets + n;
    for (int64_t i = 0; i < n; i++) {
        ids[i] = (int32_t)random_below(&key, (uint64_t)(2 * i), (uint64_t)vocab);
        targets[i] = (int32_t)random_below(&key, (uint64_t)(2 * i + 1), (uint64_t)vocab);
    }
    for (int64_t s = 0; s <= rows; s++)
        offsets[s] = (int32_t)(s * seq);
    b->ids = ids;
    b->targets = targets;
    b->offsets = offsets;
    return TRIL_OK;
}

tril_status bench_train(const struct bench_call *c, struct tril_bench_result *r,
                        struct tril_error *err) {
    struct model_options options = {.dtype = c->dtype, .training = true};
    struct workspace_options wo = {.max_tokens = c->batch * c->seq,
                                   .max_sequences = c->batch,
                                   .backward = true,
                                   .recompute = c->recompute};
    struct adamw_params adamw = {0.9f, 0.95f, 1e-8f, 0.1f};
    struct optimiser optimiser = {0};
    struct model_counts counts;
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct batch b = {0};
    struct progress progress;
    double *seconds = malloc((size_t)c->steps * sizeof *seconds), tokens, loss, norm;
    int64_t count;
    bool applied;
    tril_status st = seconds ? TRIL_OK : no_memory(err);
    progress_start(&progress, "training steps", c->steps);
    if (st != TRIL_OK)
        goto done;
    TRY(model_create(&m, c->config, &options, c->ctx, err));
    TRY(model_init(m, 1, err));
    TRY(workspace_create(&w, m, &wo, err));
    TRY(optimiser_create(&optimiser, m, &adamw, 1.0f, err));
    TRY(random_batch(&b, c->batch, c->seq, c->config->vocab, err));
    tokens = (double)b.tokens;
    for (int64_t step = -1; step < c->steps; step++) { /* step -1 warms up */
        struct train_call call = {
            .scale = 1.0f / (float)b.tokens, .step = (uint64_t)(step + 1), .overwrite = true};
        double begun = clock_seconds();
        TRY(model_forward_backward(m, w, &b, &call, &loss, &count, err));
        TRY(optimiser_step(&optimiser, step + 2, 1e-4, &norm, &applied, err));
        if (step >= 0)
            seconds[step] = clock_seconds() - begun;
        progress_update(&progress, step + 1, NULL);
    }
    summarise(r, seconds, c->steps, tokens);
    model_count(c->config, c->seq, &counts);
    r->parameters = counts.total;
    r->mfu = counts.train_flops_per_token * r->tokens_per_s / r->peak_flops;
done:
    progress_end(&progress);
    free((void *)b.ids);
    optimiser_free(&optimiser);
    workspace_free(w);
    model_free(m);
    free(seconds);
    return st;
}

/* What prefill and decoding share: a model for inference, its cache and workspace. */
struct inference {
    struct model *m;
    struct kv_cache *cache;
    struct workspace *w;
    struct batch b;
    int32_t *slots, *rows;
    float *logits;
};

static void inference_free(struct inference *x) {
    free((void *)x->b.ids);
    free(x->slots);
    free(x->rows);
    free(x->logits);
    workspace_free(x->w);
    kv_cache_free(x->cache);
    model_free(x->m);
}

static tril_status inference_create(struct inference *x, const struct bench_call *c,
                                    int64_t capacity, struct tril_error *err) {
    struct model_options options = {.dtype = c->dtype};
    struct model_config config = *c->config;
    struct workspace_options wo = {
        .max_tokens = c->batch * c->seq, .max_sequences = c->batch, .max_rows = c->batch};
    tril_status st = TRIL_OK;
    *x = (struct inference){0};
    if (config.context < capacity)
        config.context = capacity;
    TRY(model_create(&x->m, &config, &options, c->ctx, err));
    TRY(model_init(x->m, 1, err));
    TRY(kv_cache_create(&x->cache, x->m, c->batch, capacity, c->seq, c->cache, err));
    TRY(workspace_create(&x->w, x->m, &wo, err));
    TRY(random_batch(&x->b, c->batch, c->seq, config.vocab, err));
    x->slots = malloc((size_t)c->batch * sizeof *x->slots);
    x->rows = malloc((size_t)c->batch * sizeof *x->rows);
    x->logits = malloc((size_t)(c->batch * config.vocab) * sizeof *x->logits);
    if (!x->slots || !x->rows || !x->logits) {
        st = no_memory(err);
        goto done;
    }
    for (int64_t s = 0; s < c->batch; s++) {
        x->slots[s] = (int32_t)s;
        x->rows[s] = (int32_t)((s + 1) * c->seq - 1);
    }
    x->b.cache = x->cache;
    x->b.slots = x->slots;
    x->b.rows = x->rows;
    x->b.row_count = c->batch;
done:
    return st;
}

tril_status bench_prefill(const struct bench_call *c, struct tril_bench_result *r,
                          struct tril_error *err) {
    struct inference x = {0};
    struct model_counts counts;
    struct progress progress;
    double *seconds = malloc((size_t)c->steps * sizeof *seconds);
    tril_status st = seconds ? TRIL_OK : no_memory(err);
    progress_start(&progress, "prefill", c->steps);
    if (st != TRIL_OK)
        goto done;
    TRY(inference_create(&x, c, c->seq, err));
    for (int64_t step = -1; step < c->steps; step++) {
        memset(x.cache->length, 0, (size_t)c->batch * sizeof *x.cache->length);
        double begun = clock_seconds();
        TRY(model_forward(x.m, x.w, &x.b, x.logits, err));
        if (step >= 0)
            seconds[step] = clock_seconds() - begun;
        progress_update(&progress, step + 1, NULL);
    }
    summarise(r, seconds, c->steps, (double)x.b.tokens);
    model_count(c->config, c->seq, &counts);
    r->parameters = counts.total;
    /* One row of logits per sequence: the head's FLOPs are those of one token. */
    double per_token = counts.flops_attention + counts.flops_ffn + counts.flops_scores +
                       counts.flops_head / (double)c->seq;
    r->mfu = per_token * r->tokens_per_s / r->peak_flops;
done:
    progress_end(&progress);
    inference_free(&x);
    free(seconds);
    return st;
}

/* Bytes that one decoding step must read: every weight once, and each sequence's keys and values.
 */
static double decode_bytes(const struct bench_call *c, double tokens_cached) {
    struct model_counts n;
    double size = (double)dtype_size(c->dtype), kv;
    model_count(c->config, c->seq, &n);
    kv = 2.0 * (double)(c->config->layers * c->config->kv_heads) *
         (double)(c->config->head_dim * (int64_t)dtype_size(c->cache) +
                  (c->cache == DT_I8 ? (int64_t)sizeof(float) : 0)) *
         tokens_cached * (double)c->batch;
    double head = n.head > 0 ? n.head : n.embedding;
    return (n.attention + n.ffn + head) * size + n.norms * 4 + kv;
}

#define DECODE_STRETCHES 20

/* The machine's bandwidth drifts with its neighbours, so memory is read once before and after each
 * of up to 20 stretches of steps: the fraction is the median over the stretches of (bytes a step
 * must read / its median time) / (mean of the two reads). */
tril_status bench_decode(const struct bench_call *c, struct tril_bench_result *r,
                         struct tril_error *err) {
    double fraction[DECODE_STRETCHES], rate[DECODE_STRETCHES + 1];
    int stretches = c->steps < DECODE_STRETCHES ? (int)c->steps : DECODE_STRETCHES;
    struct inference x = {0};
    struct model_counts counts;
    struct progress progress;
    double *seconds = malloc((size_t)c->steps * sizeof *seconds);
    int32_t *offsets = malloc((size_t)(c->batch + 1) * sizeof *offsets);
    tril_status st = seconds && offsets ? TRIL_OK : no_memory(err);
    progress_start(&progress, "decoding", c->steps);
    if (st != TRIL_OK)
        goto done;
    TRY(inference_create(&x, c, c->seq + c->steps + 4, err));
    TRY(model_forward(x.m, x.w, &x.b, x.logits, err));
    struct batch b = x.b;
    b.tokens = c->batch;
    for (int64_t s = 0; s <= c->batch; s++) {
        offsets[s] = (int32_t)s;
        if (s < c->batch)
            x.rows[s] = (int32_t)s;
    }
    b.offsets = offsets;
    for (int warm = 0; warm < 3; warm++)
        TRY(model_forward(x.m, x.w, &b, x.logits, err));
    rate[0] = c->read_pass(c->probe);
    for (int64_t k = 0, step = 0; k < stretches; k++) {
        int64_t first = step, end = c->steps * (k + 1) / stretches;
        for (; step < end; step++) {
            double begun = clock_seconds();
            TRY(model_forward(x.m, x.w, &b, x.logits, err));
            seconds[step] = clock_seconds() - begun;
            progress_update(&progress, step + 1, NULL);
        }
        rate[k + 1] = c->read_pass(c->probe);
        double bytes = decode_bytes(c, (double)(c->seq + 3) + (double)(first + end) / 2);
        fraction[k] =
            bytes / bench_median(seconds + first, end - first) * 2 / (rate[k] + rate[k + 1]);
    }
    summarise(r, seconds, c->steps, (double)c->batch);
    model_count(c->config, c->seq, &counts);
    r->parameters = counts.total;
    r->peak_rss_bytes -= c->probe_bytes;
    r->anonymous_bytes -= c->probe_bytes;
    r->bandwidth = bench_median(rate, stretches + 1);
    r->bandwidth_fraction = bench_median(fraction, stretches);
    r->mfu = (counts.flops_attention + counts.flops_scores + counts.flops_ffn + counts.flops_head) *
             r->tokens_per_s / r->peak_flops;
done:
    progress_end(&progress);
    inference_free(&x);
    free(offsets);
    free(seconds);
    return st;
}

/* ------------------------------------------------------------------ single products */

struct product {
    struct op_context *ctx;
    struct weight w;
    struct tensor x, y, dx, dw;
};

static tril_status run_product(struct product *p, int kind, struct tril_error *err) {
    struct tensor none = tensor_none();
    if (kind == 0)
        return linear_forward(p->ctx, p->x, &p->w, none, none, p->y, none, ACT_NONE, err);
    if (kind == 1)
        return linear_backward_input(p->ctx, p->y, &p->w, p->dx, err);
    return linear_backward_weight(p->ctx, p->y, p->x, p->dw, none, true, err);
}

static tril_status fill(struct op_context *ctx, const struct tensor *t, uint64_t seed,
                        struct tril_error *err) {
    struct random_key key = {.seed = seed, .op = RANDOM_TEST};
    return lab_fill(ctx, t->data, t->dtype, tensor_count(t), 1, &key, err);
}

/* One layer's three products at n rows, appended to r. */
static tril_status time_layer(const struct bench_call *c, const char *name, int64_t n, int64_t o,
                              int64_t i, struct tril_bench_result *r, struct tril_error *err) {
    static const char *const kinds[] = {"forward", "dX", "dW"};
    const struct backend *backend = c->ctx->backend;
    int64_t size = (int64_t)dtype_size(c->dtype);
    struct product p = {.ctx = c->ctx};
    double *seconds = malloc((size_t)c->steps * sizeof *seconds);
    tril_status st = seconds ? TRIL_OK : no_memory(err);
    p.x = tensor_2d(NULL, c->dtype, n, i);
    p.y = tensor_2d(NULL, c->dtype, n, o);
    p.dx = tensor_2d(NULL, c->dtype, n, i);
    p.dw = tensor_2d(NULL, DT_F32, o, i);
    p.w.value = tensor_2d(NULL, c->dtype, o, i);
    if (st != TRIL_OK)
        goto done;
    TRY(backend->alloc(&p.x.data, n * i * size, true, "the inputs", err));
    TRY(backend->alloc(&p.y.data, n * o * size, true, "the outputs", err));
    TRY(backend->alloc(&p.dx.data, n * i * size, true, "the input gradients", err));
    TRY(backend->alloc(&p.dw.data, o * i * 4, true, "the weight gradients", err));
    TRY(backend->alloc(&p.w.value.data, o * i * size, true, "the weights", err));
    TRY(fill(c->ctx, &p.x, 1, err));
    TRY(fill(c->ctx, &p.y, 2, err));
    TRY(fill(c->ctx, &p.w.value, 3, err));
    TRY(backend->weight_prepare(c->ctx, &p.w, WEIGHT_FORWARD | WEIGHT_BACKWARD, err));
    for (int kind = 0; kind < 3 && r->product_count < TRIL_BENCH_MAX_PRODUCTS; kind++) {
        struct tril_bench_product *out = &r->products[r->product_count++];
        for (int64_t step = -1; step < c->steps; step++) {
            double begun = clock_seconds();
            TRY(run_product(&p, kind, err));
            TRY(backend->synchronise(c->ctx, err));
            if (step >= 0)
                seconds[step] = clock_seconds() - begun;
        }
        qsort(seconds, (size_t)c->steps, sizeof *seconds, ascending);
        snprintf(out->name, sizeof out->name, "%s %s", name, kinds[kind]);
        out->n = n;
        out->o = o;
        out->i = i;
        out->seconds = seconds[c->steps / 2];
        out->flops_per_s = 2.0 * (double)n * (double)o * (double)i / out->seconds;
        out->fraction = out->flops_per_s / r->peak_flops;
    }
done:
    backend->weight_release(&p.w);
    backend->release(p.x.data);
    backend->release(p.y.data);
    backend->release(p.dx.data);
    backend->release(p.dw.data);
    backend->release(p.w.value.data);
    free(seconds);
    return st;
}

tril_status bench_products(const struct bench_call *c, struct tril_bench_result *r,
                           struct tril_error *err) {
    const struct model_config *m = c->config;
    int64_t n = c->batch * c->seq, head_rows = n < 512 ? n : 512;
    tril_status st = TRIL_OK;
    TRY(time_layer(c, "qkv", n, (m->heads + 2 * m->kv_heads) * m->head_dim, m->dim, r, err));
    TRY(time_layer(c, "attention out", n, m->dim, m->heads * m->head_dim, r, err));
    if (m->ffn_kind != FFN_NONE) {
        TRY(time_layer(c, "ffn up", n, m->ffn * (m->ffn_kind == FFN_GATED ? 2 : 1), m->dim, r,
                       err));
        TRY(time_layer(c, "ffn down", n, m->dim, m->ffn, r, err));
    }
    TRY(time_layer(c, "head", head_rows, m->vocab, m->dim, r, err));
    r->peak_rss_bytes = (double)memory_peak_rss();
done:
    return st;
}
