/* A description of tril/attention.h with random tensors of its own: what its tests compute and
 * compare, on the CPU and on a device. */
#ifndef TESTS_ATTENTION_CALLS_H
#define TESTS_ATTENTION_CALLS_H

#include "tril/attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "base/random.h"
#include "support/support.h"

enum { Q, K, V, O, DOUT, DQ, DK, DV, TENSORS };

/* A description with its tensors, which own their memory. */
struct problem {
    struct tril_attention a;
    struct tril_attention_buffers b;
    void *data[TENSORS];
    size_t count[TENSORS], size;
    float *bias, *sink, *slopes;
};

static inline bool of_keys(int t) {
    return t == K || t == V || t == DK || t == DV;
}

static inline void *memory(size_t bytes) {
    void *p = calloc(1, bytes ? bytes : 1);
    assert_non_null(p);
    return p;
}

/* Elements from the first to the last. */
static inline size_t extent(const struct tril_attention *a, int t) {
    const int64_t *strides[] = {a->q_stride, a->k_stride, a->v_stride, a->o_stride,
                                a->o_stride, a->q_stride, a->k_stride, a->v_stride};
    const int64_t *s = strides[t];
    int64_t heads = of_keys(t) ? a->kv_heads : a->heads, rows = of_keys(t) ? a->keys : a->queries;
    int64_t batch = a->query_offsets ? 1 : a->batch;
    if (!s[0] && !s[1] && !s[2])
        return (size_t)(batch * heads * rows * a->width);
    return (size_t)((batch - 1) * s[0] + (heads - 1) * s[1] + (rows - 1) * s[2] + a->width);
}

static inline int64_t offset(const struct tril_attention *a, int t, int64_t b, int64_t h,
                             int64_t r) {
    const int64_t *strides[] = {a->q_stride, a->k_stride, a->v_stride, a->o_stride,
                                a->o_stride, a->q_stride, a->k_stride, a->v_stride};
    const int64_t *s = strides[t];
    int64_t heads = of_keys(t) ? a->kv_heads : a->heads, rows = of_keys(t) ? a->keys : a->queries;
    if (!s[0] && !s[1] && !s[2])
        return ((b * heads + h) * rows + r) * a->width;
    return b * s[0] + h * s[1] + r * s[2];
}

static inline float value(uint64_t seed, int t, int64_t b, int64_t h, int64_t r, int64_t c) {
    struct random_key key = {.seed = seed, .layer = (uint32_t)t, .op = RANDOM_TEST};
    return 2 * random_uniform(&key, (uint64_t)(((b * 64 + h) * 4096 + r) * 256 + c)) - 1;
}

static inline float get(const struct problem *p, int t, int64_t at) {
    if (p->a.dtype == TRIL_FP32)
        return ((float *)p->data[t])[at];
    uint16_t x = ((uint16_t *)p->data[t])[at];
    return p->a.dtype == TRIL_BF16 ? bf16_to_f32(x) : f16_to_f32(x);
}

static inline void put(struct problem *p, int t, int64_t at, float x) {
    if (p->a.dtype == TRIL_FP32)
        ((float *)p->data[t])[at] = x;
    else
        ((uint16_t *)p->data[t])[at] = p->a.dtype == TRIL_BF16 ? f32_to_bf16(x) : f32_to_f16(x);
}

/* Tensors whose elements depend on their place in [B, H, T, d] only, whatever the strides. */
static inline void problem_make(struct problem *p, const struct tril_attention *a, bool sink,
                                bool alibi, uint64_t seed) {
    *p = (struct problem){.a = *a, .size = a->dtype == TRIL_FP32 ? 4 : 2};
    int64_t batch = a->query_offsets ? 1 : a->batch;
    for (int t = 0; t < TENSORS; t++) {
        p->count[t] = extent(a, t);
        p->data[t] = memory(p->count[t] * p->size);
        memset(p->data[t], t == Q || t == K || t == V || t == DOUT ? 0 : 0xff,
               p->count[t] * p->size);
        for (int64_t b = 0; (t < O || t == DOUT) && b < batch; b++)
            for (int64_t h = 0; h < (of_keys(t) ? a->kv_heads : a->heads); h++)
                for (int64_t r = 0; r < (of_keys(t) ? a->keys : a->queries); r++)
                    for (int64_t c = 0; c < a->width; c++)
                        put(p, t, offset(a, t, b, h, r) + c, value(seed, t, b, h, r, c));
    }
    p->b = (struct tril_attention_buffers){.q = p->data[Q],
                                           .k = p->data[K],
                                           .v = p->data[V],
                                           .o = p->data[O],
                                           .dout = p->data[DOUT],
                                           .dq = p->data[DQ],
                                           .dk = p->data[DK],
                                           .dv = p->data[DV]};
    if (a->implementation != TRIL_ATTENTION_LINEAR)
        p->b.lse = memory((size_t)(batch * a->heads * a->queries) * 4);
    size_t cells = (size_t)(a->bias_heads * a->queries * a->keys);
    if (cells) {
        p->bias = memory(cells * 4);
        for (size_t i = 0; i < cells; i++)
            p->bias[i] = value(seed, 20, 0, 0, (int64_t)i / 256, (int64_t)i % 256);
        p->b.bias = p->bias;
        p->b.dbias = memory(cells * 4);
    }
    if (sink) {
        p->sink = memory((size_t)a->heads * 4);
        for (int64_t h = 0; h < a->heads; h++)
            p->sink[h] = value(seed, 21, 0, h, 0, 0);
        p->b.sink = p->sink;
        p->b.dsink = memory((size_t)a->heads * 4);
    }
    if (alibi) {
        p->slopes = memory((size_t)a->heads * 4);
        tril_attention_alibi(a->heads, p->slopes);
        p->b.slopes = p->slopes;
    }
}

static inline void problem_free(struct problem *p) {
    for (int t = 0; t < TENSORS; t++)
        free(p->data[t]);
    free(p->b.lse);
    free(p->b.dbias);
    free(p->b.dsink);
    free(p->bias);
    free(p->sink);
    free(p->slopes);
}

static inline void good(tril_status st, const struct tril_error *err) {
    if (st != TRIL_OK)
        fail_msg("status %d: %s", st, err->message);
}

static inline void solve(struct problem *p) {
    struct tril_error err = {0};
    good(tril_attention_forward(&p->a, &p->b, NULL, 0, &err), &err);
    good(tril_attention_backward(&p->a, &p->b, NULL, 0, &err), &err);
}

/* The same elements in every tensor, place by place; layouts may differ. */
static inline void same(const struct problem *x, const struct problem *y) {
    static const int results[] = {O, DQ, DK, DV};
    const struct tril_attention *a = &x->a;
    for (int i = 0; i < 4; i++) {
        int t = results[i];
        for (int64_t b = 0; b < a->batch; b++)
            for (int64_t h = 0; h < (of_keys(t) ? a->kv_heads : a->heads); h++)
                for (int64_t r = 0; r < (of_keys(t) ? a->keys : a->queries); r++)
                    assert_memory_equal(
                        (char *)x->data[t] + (size_t)offset(&x->a, t, b, h, r) * x->size,
                        (char *)y->data[t] + (size_t)offset(&y->a, t, b, h, r) * y->size,
                        (size_t)a->width * x->size);
    }
    if (x->b.lse)
        assert_memory_equal(x->b.lse, y->b.lse, (size_t)(a->batch * a->heads * a->queries) * 4);
}

static inline struct tril_attention describe(int64_t B, int64_t H, int64_t Hk, int64_t T,
                                             int64_t Tk, int64_t d) {
    struct tril_attention a = tril_attention_defaults(B, H, T, d);
    a.kv_heads = Hk;
    a.keys = Tk;
    return a;
}

/* [B, T, H, d], as a model's fused projections leave it. */
static inline void interleave(struct tril_attention *a, int64_t gap) {
    int64_t q = a->heads * a->width + gap, k = a->kv_heads * a->width + gap;
    int64_t of_q[3] = {a->queries * q, a->width, q}, of_k[3] = {a->keys * k, a->width, k};
    memcpy(a->q_stride, of_q, sizeof of_q);
    memcpy(a->o_stride, of_q, sizeof of_q);
    memcpy(a->k_stride, of_k, sizeof of_k);
    memcpy(a->v_stride, of_k, sizeof of_k);
}

/* A random description number i. Scores are below 1 in size (|q|, |k| <= 1, scale 1 / d), so an
 * fp32 score is off by at most 4 d eps / d and a weight by twice that, relative; a weight
 * multiplies |v|
 * <= 1, a gradient sums at most `rows` of such products times |do| d <= 16: 8 eps * 16 * rows in
 * *bound. */
static inline struct tril_attention random_call(int i, bool *sink, bool *alibi, float *bound) {
    static const char *const rules[] = {
        NULL,        "full",      "window:5",  "full+sinks:2+dilated:3,4",
        "strided:4", "fixed:6,2", "global:3,7"};
    struct random_key key = {.seed = 77, .step = (uint64_t)i, .op = RANDOM_TEST};
    int64_t Hk = 1 + (int64_t)random_below(&key, 0, 2);
    struct tril_attention a = describe(
        1 + (int64_t)random_below(&key, 1, 3), Hk * (1 + (int64_t)random_below(&key, 2, 3)), Hk,
        1 + (int64_t)random_below(&key, 3, 30), 1 + (int64_t)random_below(&key, 4, 30),
        1 + (int64_t)random_below(&key, 5, 16));
    a.visible = rules[random_below(&key, 6, 7)];
    a.scale = 1 / (double)a.width;
    a.softcap = random_below(&key, 7, 3) ? 0 : 0.7;
    a.dropout = random_below(&key, 8, 3) ? 0 : 0.3;
    a.seed = 5;
    a.bias_heads = random_below(&key, 9, 2) ? 0 : random_below(&key, 10, 2) ? 1 : a.heads;
    *sink = random_below(&key, 11, 2);
    *alibi = random_below(&key, 12, 2);
    if (random_below(&key, 13, 2))
        interleave(&a, 3);
    float rows = (float)(a.keys + a.queries * a.batch * a.heads);
    *bound = 8 * 0x1p-23f * 16 * rows * (*alibi || a.bias_heads ? 30 : 1);
    return a;
}

/* Every result of x within `bound` of the reference's. */
static inline void near(const struct problem *x, const struct problem *ref, float bound,
                        const char *what) {
    static const int results[] = {O, DQ, DK, DV};
    const struct tril_attention *a = &ref->a;
    for (int n = 0; n < 4; n++) {
        int t = results[n];
        for (int64_t b = 0; b < (a->query_offsets ? 1 : a->batch); b++)
            for (int64_t h = 0; h < (of_keys(t) ? a->kv_heads : a->heads); h++)
                for (int64_t r = 0; r < (of_keys(t) ? a->keys : a->queries); r++)
                    for (int64_t c = 0; c < a->width; c++) {
                        float want = get(ref, t, offset(a, t, b, h, r) + c);
                        float is = get(x, t, offset(&x->a, t, b, h, r) + c);
                        if (!(fabsf(want - is) <= bound))
                            fail_msg("%s, tensor %d: %g, not %g", what, t, (double)is,
                                     (double)want);
                    }
    }
    for (int64_t n = 0; n < a->bias_heads * a->queries * a->keys; n++)
        assert_true(fabsf(ref->b.dbias[n] - x->b.dbias[n]) <= bound);
    for (int64_t h = 0; ref->b.dsink && h < a->heads; h++)
        assert_true(fabsf(ref->b.dsink[h] - x->b.dsink[h]) <= bound);
}

#endif
