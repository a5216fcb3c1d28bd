/* Whole-sequence attention by the operation, and the textbook with every matrix in memory. */
#include "lab/attend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"

static tril_status take(struct op_context *ctx, void **out, double count, int64_t size,
                        struct tril_error *err) {
    return ctx->backend->alloc(out, (int64_t)count * size, false, "attention's tensors", err);
}

tril_status attend_describe(struct attend *a, struct op_context *ctx, int64_t B, int64_t T,
                            int64_t H, int64_t d, enum dtype dtype, struct tril_error *err) {
    int32_t *host = malloc((size_t)(3 * B + 1) * sizeof *host);
    tril_status st = TRIL_OK;
    *a = (struct attend){.ctx = ctx, .B = B, .T = T, .H = H, .d = d, .dtype = dtype, .row = H * d};
    if (!host)
        return lab_no_memory(err);
    for (int64_t b = 0; b <= B; b++) {
        host[b] = (int32_t)(b * T);
        if (b < B) {
            host[B + 1 + b] = (int32_t)(b * T);
            host[2 * B + 1 + b] = (int32_t)T;
        }
    }
    TRY(take(ctx, (void **)&a->offsets, (double)(3 * B + 1), 4, err));
    TRY(take(ctx, (void **)&a->lse, (double)(H * B * T), 4, err));
    TRY(ctx->backend->upload(ctx, a->offsets, host, (3 * B + 1) * 4, err));
    a->start = a->offsets + B + 1;
    a->length = a->start + B;
    a->params = (struct attention_params){.scale = (float)(1 / sqrt((double)d)),
                                          .causal = true,
                                          .max_q = (int32_t)T,
                                          .max_kv = (int32_t)T};
done:
    free(host);
    if (st != TRIL_OK)
        attend_free(a);
    return st;
}

tril_status attend_create(struct attend *a, struct op_context *ctx, int64_t B, int64_t T, int64_t H,
                          int64_t d, enum dtype dtype, bool backward, uint64_t seed,
                          struct tril_error *err) {
    int64_t n = B * T * H * d, size = (int64_t)dtype_size(dtype);
    tril_status st = attend_describe(a, ctx, B, T, H, d, dtype, err);
    void **const blocks[] = {&a->q, &a->k, &a->v, &a->o, &a->dout, &a->dq, &a->dk, &a->dv};
    if (st != TRIL_OK)
        return st;
    for (int i = 0; i < (backward ? 8 : 4); i++)
        TRY(take(ctx, blocks[i], (double)n, size, err));
    for (int i = 0; i < (backward ? 5 : 3); i++) {
        struct random_key key = {.seed = seed, .layer = (uint32_t)i, .op = RANDOM_TEST};
        if (i != 3)
            TRY(lab_fill(ctx, *blocks[i], dtype, n, 1, &key, err));
    }
done:
    if (st != TRIL_OK)
        attend_free(a);
    return st;
}

void attend_free(struct attend *a) {
    void *const blocks[] = {a->q,  a->k,  a->v,  a->o,   a->dout,
                            a->dq, a->dk, a->dv, a->lse, a->offsets};
    for (size_t i = 0; a->ctx && i < sizeof blocks / sizeof *blocks; i++)
        a->ctx->backend->release(blocks[i]);
    *a = (struct attend){0};
}

static struct tensor heads(const struct attend *a, void *data) {
    return tensor_3d(data, a->dtype, a->B * a->T, a->H, a->d);
}

static struct tensor inputs_of(const struct attend *a, void *data) {
    struct tensor t = heads(a, data);
    t.stride[0] = a->row;
    return t;
}

static struct attention_inputs inputs(const struct attend *a) {
    return (struct attention_inputs){.q = inputs_of(a, a->q),
                                     .k = inputs_of(a, a->k),
                                     .v = inputs_of(a, a->v),
                                     .q_offsets = tensor_1d(a->offsets, DT_I32, a->B + 1),
                                     .kv_start = tensor_1d(a->start, DT_I32, a->B),
                                     .kv_length = tensor_1d(a->length, DT_I32, a->B),
                                     .bias = a->bias};
}

tril_status attend_forward(void *arg, struct tril_error *err) {
    const struct attend *a = arg;
    struct attention_inputs in = inputs(a);
    return attention_forward(a->ctx, &in, heads(a, a->o),
                             tensor_2d(a->lse, DT_F32, a->H, a->B * a->T), &a->params, err);
}

tril_status attend_backward(void *arg, struct tril_error *err) {
    const struct attend *a = arg;
    struct attention_inputs in = inputs(a);
    struct attention_gradients g = {
        .dq = heads(a, a->dq), .dk = heads(a, a->dk), .dv = heads(a, a->dv)};
    return attention_backward(a->ctx, &in, heads(a, a->o),
                              tensor_2d(a->lse, DT_F32, a->H, a->B * a->T), heads(a, a->dout), &g,
                              &a->params, err);
}

/* ------------------------------------------------------------------ the textbook */

tril_status standard_create(struct standard *s, const struct attend *a, struct tril_error *err) {
    double T = (double)a->T;
    tril_status st = TRIL_OK;
    *s = (struct standard){.a = a};
    if (a->ctx->backend->device)
        return TRIL_OK;
    TRY(take(a->ctx, (void **)&s->scores, (double)(a->B * a->H) * T * T, 4, err));
    TRY(take(a->ctx, (void **)&s->q, T * (double)a->d, 4, err));
    TRY(take(a->ctx, (void **)&s->kv, T * (double)a->d, 4, err));
    TRY(take(a->ctx, (void **)&s->out, T * (double)a->d, 4, err));
done:
    if (st != TRIL_OK)
        standard_free(s);
    return st;
}

void standard_free(struct standard *s) {
    mem_free(s->scores);
    mem_free(s->q);
    mem_free(s->kv);
    mem_free(s->out);
    *s = (struct standard){0};
}

/* The device's own. */
static struct attend materialised(const struct attend *a) {
    struct attend m = *a;
    m.params.implementation = ATTENTION_MATERIALISED;
    return m;
}

/* One head's [T, d] out of [B T, H, d], or back, or transposed to [d, T]. */
static void head_copy(const struct attend *a, int64_t bh, const void *from, int64_t stride,
                      float *to, bool transposed) {
    int64_t b = bh / a->H, h = bh % a->H;
    for (int64_t t = 0; t < a->T; t++) {
        const float *row = (const float *)from + (b * a->T + t) * stride + h * a->d;
        for (int64_t c = 0; c < a->d; c++)
            to[transposed ? c * a->T + t : t * a->d + c] = row[c];
    }
}

static void head_store(const struct attend *a, int64_t bh, const float *from, void *to) {
    int64_t b = bh / a->H, h = bh % a->H;
    for (int64_t t = 0; t < a->T; t++)
        memcpy((float *)to + ((b * a->T + t) * a->H + h) * a->d, from + t * a->d,
               (size_t)a->d * sizeof *from);
}

/* y [n, o] = x [n, i] w [o, i]^T. */
static tril_status product(struct op_context *ctx, float *x, float *w, float *y, int64_t n,
                           int64_t o, int64_t i, struct tril_error *err) {
    struct weight weight = {.value = tensor_2d(w, DT_F32, o, i)};
    struct tensor none = tensor_none();
    tril_status st = ctx->backend->weight_prepare(ctx, &weight, WEIGHT_FORWARD, err);
    if (st == TRIL_OK)
        st = linear_forward(ctx, tensor_2d(x, DT_F32, n, i), &weight, none, none,
                            tensor_2d(y, DT_F32, n, o), none, ACT_NONE, err);
    ctx->backend->weight_release(&weight);
    return st;
}

struct rows {
    float *scores;
    const float *dp;
    int64_t T;
    float scale;
};

static void softmax_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct rows *r = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        float *row = r->scores + i * r->T, most = -INFINITY, total = 0;
        for (int64_t j = 0; j < r->T; j++) { /* scale, mask */
            row[j] = j <= i ? row[j] * r->scale : -INFINITY;
            most = row[j] > most ? row[j] : most;
        }
        for (int64_t j = 0; j < r->T; j++) {
            row[j] = expf(row[j] - most);
            total += row[j];
        }
        for (int64_t j = 0; j < r->T; j++)
            row[j] /= total;
    }
}

tril_status standard_forward(void *arg, struct tril_error *err) {
    struct standard *s = arg;
    const struct attend *a = s->a;
    int64_t T = a->T, d = a->d;
    tril_status st = TRIL_OK;
    if (a->ctx->backend->device) {
        struct attend m = materialised(a);
        return attend_forward(&m, err);
    }
    for (int64_t bh = 0; bh < a->B * a->H; bh++) {
        float *scores = s->scores + bh * T * T;
        struct rows r = {scores, NULL, T, a->params.scale};
        head_copy(a, bh, a->q, a->row, s->q, false);
        head_copy(a, bh, a->k, a->row, s->kv, false);
        TRY(product(a->ctx, s->q, s->kv, scores, T, T, d, err));
        parallel_for(T, 16, softmax_rows, &r);
        head_copy(a, bh, a->v, a->row, s->kv, true);
        TRY(product(a->ctx, scores, s->kv, s->out, T, d, T, err));
        head_store(a, bh, s->out, a->o);
    }
done:
    return st;
}

/* dp = p (dp - sum p dp) scale, row by row. */
static void softmax_gradient_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct rows *r = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const float *p = r->scores + i * r->T;
        float *dp = (float *)r->dp + i * r->T, total = 0;
        for (int64_t j = 0; j <= i; j++)
            total += p[j] * dp[j];
        for (int64_t j = 0; j < r->T; j++)
            dp[j] = p[j] * (dp[j] - total) * r->scale;
    }
}

tril_status standard_backward(void *arg, struct tril_error *err) {
    struct standard *s = arg;
    const struct attend *a = s->a;
    struct op_context *ctx = a->ctx;
    int64_t T = a->T, d = a->d;
    float *dp = NULL, *dout = NULL;
    struct tensor none = tensor_none();
    tril_status st = TRIL_OK;
    if (ctx->backend->device) {
        struct attend m = materialised(a);
        return attend_backward(&m, err);
    }
    TRY(take(ctx, (void **)&dp, (double)T * (double)T, 4, err));
    TRY(take(ctx, (void **)&dout, (double)T * (double)d, 4, err));
    for (int64_t bh = 0; bh < a->B * a->H; bh++) {
        float *p = s->scores + bh * T * T;
        struct rows r = {p, dp, T, a->params.scale};
        head_copy(a, bh, a->dout, a->H * a->d, dout, false);
        head_copy(a, bh, a->v, a->row, s->kv, false);
        TRY(product(ctx, dout, s->kv, dp, T, T, d, err)); /* dP = dO V^T */
        /* dV = P^T dO */
        TRY(linear_backward_weight(ctx, tensor_2d(p, DT_F32, T, T), tensor_2d(dout, DT_F32, T, d),
                                   tensor_2d(s->out, DT_F32, T, d), none, true, err));
        head_store(a, bh, s->out, a->dv);
        parallel_for(T, 16, softmax_gradient_rows, &r);
        head_copy(a, bh, a->k, a->row, s->kv, true);
        TRY(product(ctx, dp, s->kv, s->out, T, d, T, err)); /* dQ = dS K */
        head_store(a, bh, s->out, a->dq);
        head_copy(a, bh, a->q, a->row, s->q, false);
        TRY(linear_backward_weight(ctx, tensor_2d(dp, DT_F32, T, T), tensor_2d(s->q, DT_F32, T, d),
                                   tensor_2d(s->out, DT_F32, T, d), none, true, err));
        head_store(a, bh, s->out, a->dk);
    }
done:
    mem_free(dp);
    mem_free(dout);
    return st;
}
