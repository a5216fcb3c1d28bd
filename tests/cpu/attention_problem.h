/* Random attention calls for the tests of the CPU kernels: tensors laid out as the model lays them
 * out (q, k, v in one fused buffer) or apart, with guard bytes, and the textbook computation in the
 * activations' own precision that the tolerance rule compares with. */
#ifndef TESTS_CPU_ATTENTION_PROBLEM_H
#define TESTS_CPU_ATTENTION_PROBLEM_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "base/threads.h"
#include "cpu/cpu.h"
#include "ops/attention.h"
#include "support/support.h"

#define MAX_SEQUENCES 8

struct problem {
    int sequences, q_length[MAX_SEQUENCES], kv_length[MAX_SEQUENCES];
    int heads, kv_heads, width;
    enum dtype act;
    bool causal, alibi, apart, outliers;
    bool cache_bf16; /* k and v in bf16 whatever `act`; with apart or pages */
    float softcap, dropout;
    int page_size; /* 0: contiguous */
    int block_q, block_k;
    int seed;
    int rules; /* 0: `causal` */
    struct visible_rule rule[4];
    bool by_head;   /* head h has rule h mod rules; else all have the first */
    int bias_heads; /* 0: none */
    enum dtype bias_type;
    bool with_sink;
    /* made by problem_make */
    int64_t rows, keys, page_columns;
    struct tensor q, k, v, o, lse, dout, dq, dk, dv;
    struct tensor offsets, start, length, pages, slopes, step, bias, dbias, sink, dsink;
    uint8_t head_rule[16];
    struct attention_params params;
    void *memory[24];
    int memories;
};

static inline void *problem_memory(struct problem *p, size_t bytes) {
    void *m = calloc(1, bytes + 64);
    assert_non_null(m);
    assert_true(p->memories < 24);
    p->memory[p->memories++] = m;
    return m;
}

/* [rows, heads, width], rows `stride` elements apart, from element `first` of memory on. */
static inline struct tensor problem_view(void *memory, enum dtype t, int64_t first, int64_t rows,
                                         int64_t heads, int64_t width, int64_t stride) {
    struct tensor x =
        tensor_3d((char *)memory + first * (int64_t)dtype_size(t), t, rows, heads, width);
    x.stride[0] = stride;
    return x;
}

static inline double element_get(const struct tensor *t, int64_t n, int64_t h, int64_t i) {
    int64_t at = n * t->stride[0] + h * t->stride[1] + i;
    return t->dtype == DT_F32 ? (double)((const float *)t->data)[at]
                              : (double)bf16_to_f32(((const uint16_t *)t->data)[at]);
}
static inline void element_set(const struct tensor *t, int64_t n, int64_t h, int64_t i, float x) {
    int64_t at = n * t->stride[0] + h * t->stride[1] + i;
    if (t->dtype == DT_F32)
        ((float *)t->data)[at] = x;
    else
        ((uint16_t *)t->data)[at] = f32_to_bf16(x);
}

static inline void problem_fill(const struct problem *p, const struct tensor *t, uint32_t op) {
    struct random_key key = {.seed = (uint64_t)p->seed, .op = op};
    uint64_t element = 0;
    for (int64_t n = 0; n < t->shape[0]; n++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t i = 0; i < t->shape[2]; i++, element++) {
                float x = random_normal(&key, element);
                struct random_key other = {.seed = (uint64_t)p->seed, .op = op + 100};
                if (p->outliers && random_uniform(&other, element) < 0.001f)
                    x += 10 * random_normal(&other, element + (1u << 30));
                element_set(t, n, h, i, x);
            }
}

static inline void problem_make(struct problem *p) {
    int64_t q_rows = 0, kv_rows = 0, size = p->page_size;
    p->memories = 0;
    int32_t *offsets = problem_memory(p, sizeof(int32_t) * MAX_SEQUENCES * 4);
    int32_t *start = offsets + MAX_SEQUENCES + 1, *length = start + MAX_SEQUENCES;
    for (int s = 0; s < p->sequences; s++) {
        offsets[s] = (int32_t)q_rows;
        start[s] = (int32_t)kv_rows;
        length[s] = p->kv_length[s];
        q_rows += p->q_length[s];
        if (size)
            p->page_columns = (p->kv_length[s] + size - 1) / size > p->page_columns
                                  ? (p->kv_length[s] + size - 1) / size
                                  : p->page_columns;
        kv_rows += size ? (p->kv_length[s] + size - 1) / size * size : p->kv_length[s];
    }
    offsets[p->sequences] = (int32_t)q_rows;
    p->rows = q_rows;
    p->keys = kv_rows;
    p->offsets = tensor_1d(offsets, DT_I32, p->sequences + 1);
    p->start = tensor_1d(start, DT_I32, p->sequences);
    p->length = tensor_1d(length, DT_I32, p->sequences);
    size_t bytes = dtype_size(p->act);
    int64_t H = p->heads, K = p->kv_heads, d = p->width;
    bool fused = !p->apart && q_rows == kv_rows && !size;
    for (int pass = 0; pass < 2; pass++) { /* the tensors, then their gradients */
        struct tensor *q = pass ? &p->dq : &p->q, *k = pass ? &p->dk : &p->k;
        struct tensor *v = pass ? &p->dv : &p->v, *o = pass ? &p->dout : &p->o;
        if (fused) {
            int64_t stride = (H + 2 * K) * d;
            void *m = problem_memory(p, (size_t)(q_rows * stride) * bytes);
            *q = problem_view(m, p->act, 0, q_rows, H, d, stride);
            *k = problem_view(m, p->act, H * d, q_rows, K, d, stride);
            *v = problem_view(m, p->act, (H + K) * d, q_rows, K, d, stride);
        } else { /* odd strides; rows unaligned */
            *q = problem_view(problem_memory(p, (size_t)(q_rows * (H * d + 1)) * bytes), p->act, 0,
                              q_rows, H, d, H * d + 1);
            *k = problem_view(problem_memory(p, (size_t)(kv_rows * (K * d + 3)) * bytes), p->act, 0,
                              kv_rows, K, d, K * d + 3);
            *v = problem_view(problem_memory(p, (size_t)(kv_rows * (K * d + 5)) * bytes), p->act, 0,
                              kv_rows, K, d, K * d + 5);
        }
        if (p->cache_bf16 && !fused && !pass)
            k->dtype = v->dtype = DT_BF16;
        *o = problem_view(problem_memory(p, (size_t)(q_rows * (H * d + 7)) * bytes), p->act, 0,
                          q_rows, H, d, H * d + 7);
    }
    p->lse = tensor_2d(problem_memory(p, (size_t)(H * q_rows) * 4), DT_F32, H, q_rows);
    problem_fill(p, &p->q, 1);
    problem_fill(p, &p->k, 2);
    problem_fill(p, &p->v, 3);
    problem_fill(p, &p->dout, 4);
    if (size) { /* pages in reverse order */
        int32_t *pages =
            problem_memory(p, (size_t)(p->sequences * p->page_columns) * sizeof(int32_t));
        int64_t next = kv_rows / size;
        for (int s = 0; s < p->sequences; s++)
            for (int64_t i = 0; i * size < p->kv_length[s]; i++)
                pages[s * p->page_columns + i] = (int32_t)--next;
        p->pages = tensor_2d(pages, DT_I32, p->sequences, p->page_columns);
    } else
        p->pages = tensor_none();
    p->slopes = p->step = tensor_none();
    if (p->alibi) {
        float *m = problem_memory(p, (size_t)H * 4);
        for (int64_t h = 0; h < H; h++)
            m[h] = exp2f(-8.0f * (float)(h + 1) / (float)H);
        p->slopes = tensor_1d(m, DT_F32, H);
    }
    p->bias = p->dbias = p->sink = p->dsink = tensor_none();
    if (p->bias_heads) { /* larger than it must be, gaps between its rows */
        int64_t A = 2, U = 3;
        for (int s = 0; s < p->sequences; s++) {
            A = p->q_length[s] + 2 > A ? p->q_length[s] + 2 : A;
            U = p->kv_length[s] + 3 > U ? p->kv_length[s] + 3 : U;
        }
        size_t cells = (size_t)(p->bias_heads * A * (U + 1));
        struct tensor *t[2] = {&p->bias, &p->dbias};
        for (int i = 0; i < 2; i++) {
            enum dtype type = i ? DT_F32 : p->bias_type;
            *t[i] =
                tensor_3d(problem_memory(p, cells * dtype_size(type)), type, p->bias_heads, A, U);
            t[i]->stride[0] = A * (U + 1);
            t[i]->stride[1] = U + 1;
        }
        problem_fill(p, &p->bias, 5);
    }
    if (p->with_sink) {
        float *m = problem_memory(p, (size_t)H * 8);
        for (int64_t h = 0; h < H; h++)
            m[h] = (float)(h % 3) * 1.5f - 1;
        p->sink = tensor_1d(m, DT_F32, H);
        p->dsink = tensor_1d(m + H, DT_F32, H);
    }
    assert_true(H <= 16);
    for (int64_t h = 0; h < H; h++)
        p->head_rule[h] = (uint8_t)(p->by_head && p->rules ? h % p->rules : 0);
    p->params = (struct attention_params){
        .scale = 1 / sqrtf((float)d),
        .softcap = p->softcap,
        .causal = p->causal,
        .page_size = p->page_size,
        .block_q = p->block_q,
        .block_k = p->block_k,
        .dropout = p->dropout,
        .key = {.seed = 5, .step = 9, .layer = 2, .op = RANDOM_DROPOUT_ATTENTION},
    };
}

static inline void problem_free(struct problem *p) {
    for (int i = 0; i < p->memories; i++)
        free(p->memory[i]);
    p->memories = 0;
}

static inline struct op_context *problem_context(bool reference) {
    static struct op_context contexts[2];
    struct op_context *ctx = &contexts[reference];
    if (!ctx->backend) {
        assert_int_equal(op_context_init(ctx, backend_cpu(), NULL), TRIL_OK);
        ctx->reference = reference;
    }
    return ctx;
}

static inline struct attention_inputs problem_inputs(const struct problem *p) {
    return (struct attention_inputs){.q = p->q,
                                     .k = p->k,
                                     .v = p->v,
                                     .q_offsets = p->offsets,
                                     .kv_start = p->start,
                                     .kv_length = p->length,
                                     .pages = p->pages,
                                     .slopes = p->slopes,
                                     .bias = p->bias,
                                     .sink = p->sink,
                                     .step = p->step};
}
/* The pointers into p itself, which may be a copy. */
static inline struct attention_params problem_params(const struct problem *p) {
    struct attention_params params = p->params;
    params.rules = p->rules ? p->rule : NULL;
    params.rule_count = p->rules;
    params.head_rule = p->by_head ? p->head_rule : NULL;
    return params;
}
static inline struct attention_gradients problem_gradients(const struct problem *p) {
    return (struct attention_gradients){
        .dq = p->dq, .dk = p->dk, .dv = p->dv, .dbias = p->dbias, .dsink = p->dsink};
}
static inline bool problem_sees(const struct problem *p, int64_t s, int64_t i, int64_t j,
                                int64_t h) {
    static const struct visible_rule cut = {.causal = true}, whole = {.causal = false};
    const struct visible_rule *rule = p->causal ? &cut : &whole;
    if (p->rules)
        rule = &p->rule[p->head_rule[h]];
    return visible(rule, i, i + p->kv_length[s] - p->q_length[s], j);
}
static inline tril_status problem_run(struct problem *p, struct op_context *ctx, bool backward,
                                      struct tril_error *err) {
    struct attention_inputs in = problem_inputs(p);
    struct attention_gradients g = problem_gradients(p);
    struct attention_params params = problem_params(p);
    if (backward)
        return attention_backward(ctx, &in, p->o, p->lse, p->dout, &g, &params, err);
    return attention_forward(ctx, &in, p->o, p->lse, &params, err);
}
static inline tril_status problem_scratch(struct problem *p, struct op_context *ctx, bool backward,
                                          int64_t *bytes, struct tril_error *err) {
    struct attention_inputs in = problem_inputs(p);
    struct attention_gradients g = problem_gradients(p);
    struct attention_params params = problem_params(p);
    return attention_scratch(ctx, &in, p->o, p->lse, p->dout, backward ? &g : NULL, &params, bytes,
                             err);
}
static inline tril_status problem_try_forward(struct problem *p, bool reference,
                                              struct tril_error *err) {
    return problem_run(p, problem_context(reference), false, err);
}
static inline tril_status problem_try_backward(struct problem *p, bool reference,
                                               struct tril_error *err) {
    return problem_run(p, problem_context(reference), true, err);
}
static inline void problem_forward(struct problem *p, bool reference) {
    struct tril_error err = {0};
    if (problem_try_forward(p, reference, &err) != TRIL_OK)
        fail_msg("%s", err.message);
}
static inline void problem_backward(struct problem *p, bool reference) {
    struct tril_error err = {0};
    if (problem_try_backward(p, reference, &err) != TRIL_OK)
        fail_msg("%s", err.message);
}

/* All elements of a tensor as doubles, malloc'ed. */
static inline double *tensor_values(const struct tensor *t) {
    int64_t n = t->shape[0] * t->shape[1] * (t->rank == 3 ? t->shape[2] : 1), at = 0;
    if (!t->data)
        return NULL;
    double *out = malloc((size_t)(n + 1) * sizeof(double));
    assert_non_null(out);
    for (int64_t i = 0; i < t->shape[0]; i++)
        for (int64_t j = 0; j < t->shape[1]; j++)
            for (int64_t k = 0; k < (t->rank == 3 ? t->shape[2] : 1); k++)
                out[at++] = t->rank == 3 ? element_get(t, i, j, k)
                                         : (double)((const float *)t->data)[i * t->stride[0] + j];
    return out;
}
static inline int64_t tensor_elements(const struct tensor *t) {
    return !t->data ? 0 : t->shape[0] * t->shape[1] * (t->rank == 3 ? t->shape[2] : 1);
}

/* The textbook in the activations' precision: scores, probabilities and gradients of scores as
 * whole rows, each rounded to the storage dtype, products summed in fp32. Overwrites o (and dq, dk,
 * dv if asked for, which here are floats that accumulate before rounding). */
static inline float plain_round(const struct problem *p, float x) {
    return p->act == DT_F32 ? x : bf16_to_f32(f32_to_bf16(x));
}
static inline float plain_dot(const struct tensor *a, int64_t na, int64_t ha,
                              const struct tensor *b, int64_t nb, int64_t hb, float factor_b,
                              const struct problem *p) {
    float sum = 0;
    for (int64_t i = 0; i < p->width; i++)
        sum += (float)element_get(a, na, ha, i) *
               plain_round(p, (float)element_get(b, nb, hb, i) * factor_b);
    return plain_round(p, sum);
}
static inline void plain(struct problem *p, bool backward) {
    int64_t d = p->width, group = p->heads / p->kv_heads;
    int64_t longest = 1;
    for (int s = 0; s < p->sequences; s++)
        longest = p->kv_length[s] > longest ? p->kv_length[s] : longest;
    /* A score of exactly 0 from a visible key stays, as exp makes it positive. */
    float *prob = malloc((size_t)longest * 8), *slope = prob + longest;
    float *out = malloc((size_t)d * 8), *dq = out + d;
    size_t kv = (size_t)(p->keys * p->kv_heads * d + 1);
    float *dk = calloc(2 * kv, 4), *dv = dk + kv;
    assert_true(prob && out && dk);
    for (int64_t h = 0; p->with_sink && backward && h < p->heads; h++)
        ((float *)p->dsink.data)[h] = 0;
    if (p->bias_heads && backward)
        memset(p->dbias.data, 0, (size_t)(p->dbias.shape[0] * p->dbias.stride[0]) * sizeof(float));
    struct attention_call c = {.q_offsets = p->offsets.data,
                               .kv_start = p->start.data,
                               .kv_length = p->length.data,
                               .pages = p->pages.data,
                               .page_columns = p->page_columns,
                               .rows = p->rows,
                               .params = &p->params,
                               .key = p->params.key};
    for (int64_t s = 0; s < p->sequences; s++)
        for (int64_t n = c.q_offsets[s]; n < c.q_offsets[s + 1]; n++)
            for (int64_t h = 0; h < p->heads; h++) {
                int64_t i = n - c.q_offsets[s], seen = p->kv_length[s];
                int64_t g = h / group, position = p->kv_length[s] - p->q_length[s] + i;
                float most = -INFINITY, sum = 0, delta = 0, of_sink = 0;
                int64_t hb = p->bias_heads == 1 ? 0 : h;
                if (p->with_sink)
                    most = ((float *)p->sink.data)[h];
                for (int64_t j = 0; j < seen; j++) {
                    prob[j] = -INFINITY;
                    if (!problem_sees(p, s, i, j, h))
                        continue;
                    int64_t row = attention_key_row(&c, s, j);
                    float x = plain_dot(&p->q, n, h, &p->k, row, g, p->params.scale, p);
                    slope[j] = 1;
                    if (p->softcap > 0) {
                        float t = tanhf(x / p->softcap);
                        slope[j] = 1 - t * t;
                        x = p->softcap * t;
                    }
                    if (p->alibi)
                        x -= ((float *)p->slopes.data)[h] * fabsf((float)(position - j));
                    if (p->bias_heads)
                        x += (float)element_get(&p->bias, hb, i, j);
                    prob[j] = plain_round(p, x);
                    most = fmaxf(most, prob[j]);
                }
                most = most == -INFINITY ? 0 : most;
                for (int64_t j = 0; j < seen; j++)
                    sum += prob[j] = expf(prob[j] - most);
                if (p->with_sink)
                    sum += of_sink = expf(((float *)p->sink.data)[h] - most);
                sum = sum == 0 ? 1 : sum;
                memset(out, 0, (size_t)d * 8);
                for (int64_t j = 0; j < seen; j++) {
                    if (prob[j] == 0)
                        continue;
                    prob[j] = plain_round(p, prob[j] / sum);
                    int64_t row = attention_key_row(&c, s, j);
                    float keep = 1;
                    if (p->dropout > 0)
                        keep = random_uniform(&c.key, attention_dropout_element(&c, h, n, j)) >=
                                       p->dropout
                                   ? 1 / (1 - p->dropout)
                                   : 0;
                    float x = plain_round(p, prob[j] * keep);
                    for (int64_t t = 0; t < d; t++) {
                        out[t] += x * (float)element_get(&p->v, row, g, t);
                        if (backward)
                            dv[(row * p->kv_heads + g) * d + t] +=
                                x * (float)element_get(&p->dout, n, h, t);
                    }
                    if (backward && keep == 0)
                        prob[j] = -prob[j] - 1e-30f; /* dropped, remembered by its sign */
                }
                for (int64_t t = 0; t < d; t++) {
                    element_set(&p->o, n, h, t, out[t]);
                    delta +=
                        (float)element_get(&p->o, n, h, t) * (float)element_get(&p->dout, n, h, t);
                }
                if (backward && p->with_sink)
                    ((float *)p->dsink.data)[h] -= of_sink / sum * delta;
                for (int64_t j = 0; backward && j < seen; j++) {
                    if (prob[j] == 0)
                        continue;
                    int64_t row = attention_key_row(&c, s, j);
                    float dp = plain_dot(&p->dout, n, h, &p->v, row, g, 1, p);
                    dp = prob[j] < 0 ? 0 : dp / (1 - p->dropout);
                    float ds = plain_round(p, fabsf(prob[j]) * (dp - delta));
                    if (p->bias_heads)
                        element_set(&p->dbias, hb, i, j,
                                    (float)element_get(&p->dbias, hb, i, j) + ds);
                    ds = plain_round(p, ds * slope[j]) * p->params.scale;
                    for (int64_t t = 0; t < d; t++) {
                        dq[t] += ds * (float)element_get(&p->k, row, g, t);
                        dk[(row * p->kv_heads + g) * d + t] +=
                            ds * (float)element_get(&p->q, n, h, t);
                    }
                }
                for (int64_t t = 0; backward && t < d; t++)
                    element_set(&p->dq, n, h, t, dq[t]);
            }
    for (int64_t r = 0; backward && r < p->keys; r++)
        for (int64_t g = 0; g < p->kv_heads; g++)
            for (int64_t t = 0; t < d; t++) {
                element_set(&p->dk, r, g, t, dk[(r * p->kv_heads + g) * d + t]);
                element_set(&p->dv, r, g, t, dv[(r * p->kv_heads + g) * d + t]);
            }
    free(prob);
    free(out);
    free(dk);
}

/* max|x - ref| <= factor max|plain - ref| + 2 max|(ref + 0.3 - 0.3) - ref|, the last in the storage
 * dtype; and what is infinite in ref is the same in x. Outputs (factor 2) get 16 eps more: a score
 * of 4 sigma may be rounded in base 2 where the textbook's is exact, times a value of 4 sigma.
 * Gradients (factor 3) may be sums that cancel exactly in the textbook's order and not in another:
 * dP - delta, two sums of d products of about 4, rounded as sqrt(d) 4 eps, times a key of about 4
 * times the scale 1 / sqrt(d): 32 eps more, and in dk as many such errors as there are rows, in
 * random directions. */
static inline void check_rule(const char *what, const struct problem *p, const double *ref,
                              const double *plain_values, const double *x, int64_t n,
                              double factor) {
    double worst = 0, worst_plain = 0, granule = 0;
    int64_t where = 0;
    for (int64_t i = 0; i < n; i++) {
        float up = plain_round(p, (float)ref[i] + 0.3f), down = plain_round(p, up - 0.3f);
        if (!isfinite(ref[i])) {
            assert_true(ref[i] == x[i]);
            continue;
        }
        if (!isfinite(x[i]))
            fail_msg("%s: element %lld is %g, expected %g", what, (long long)i, x[i], ref[i]);
        if (fabs(x[i] - ref[i]) > worst) {
            worst = fabs(x[i] - ref[i]);
            where = i;
        }
        worst_plain = fmax(worst_plain, fabs(plain_values[i] - ref[i]));
        granule = fmax(granule, fabs((double)down - ref[i]));
    }
    double cancelled =
        factor > 2 ? 32 * 0x1p-24 * sqrt((double)(p->rows * p->heads)) : 16 * 0x1p-24;
    if (worst > factor * worst_plain + 2 * granule + cancelled)
        fail_msg("%s of %d sequences (q %d, kv %d), heads %d/%d, width %d, %s%s%s, softcap %g, "
                 "dropout %g, seed %d: error %g at %lld, allowed %g * %g + 2 * %g",
                 what, p->sequences, p->q_length[0], p->kv_length[0], p->heads, p->kv_heads,
                 p->width, dtype_name(p->act), p->causal ? ", causal" : "",
                 p->alibi ? ", alibi" : "", (double)p->softcap, (double)p->dropout, p->seed, worst,
                 (long long)where, factor, worst_plain, granule);
}

/* ------------------------------------------------------------------ series of problems */

typedef void problem_check(struct problem p);

/* Every kind of head width, in both types: `rows` queries of 67 keys. */
static inline void each_width(problem_check *check, int rows) {
    const int widths[] = {1,  2,  7,  8,   10,  16,  31,  32,  40,  59,
                          64, 80, 96, 111, 128, 160, 192, 224, 255, 256};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++)
        for (int act = 0; act < 2; act++)
            check((struct problem){.sequences = 1,
                                   .q_length = {rows},
                                   .kv_length = {67},
                                   .heads = 2,
                                   .kv_heads = 1,
                                   .width = widths[i],
                                   .causal = true,
                                   .act = act ? DT_BF16 : DT_F32,
                                   .seed = (int)i});
}

static inline void each_length(problem_check *check, const int (*pairs)[2], size_t count) {
    for (size_t i = 0; i < count; i++)
        for (int causal = 0; causal < 2; causal++)
            check((struct problem){.sequences = 1,
                                   .q_length = {pairs[i][0]},
                                   .kv_length = {pairs[i][1]},
                                   .heads = 2,
                                   .kv_heads = 2,
                                   .width = 24,
                                   .causal = causal,
                                   .seed = (int)i});
}

static inline void each_grouping(problem_check *check) {
    const int heads[][2] = {{1, 1}, {3, 1}, {4, 2}, {5, 5}, {6, 2}, {7, 1}};
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++)
        for (int rows = 1; rows < 80; rows += 26)
            check((struct problem){.sequences = 1,
                                   .q_length = {rows},
                                   .kv_length = {90},
                                   .heads = heads[i][0],
                                   .kv_heads = heads[i][1],
                                   .width = 16,
                                   .causal = true,
                                   .seed = (int)i});
}

/* Causal or not, with and without ALiBi, softcap and dropout. */
static inline void each_score(problem_check *check) {
    for (int i = 0; i < 16; i++)
        check((struct problem){.sequences = 2,
                               .q_length = {70, i & 8 ? 2 : 40},
                               .kv_length = {70, 100},
                               .heads = 3,
                               .kv_heads = 1,
                               .width = 20,
                               .causal = i & 1,
                               .alibi = i & 2,
                               .softcap = i & 4 ? 2.0f : 0,
                               .dropout = i & 8 ? 0.17f : 0,
                               .seed = i});
}

static inline void each_outlier(problem_check *check, int length) {
    for (int act = 0; act < 2; act++)
        check((struct problem){.sequences = 1,
                               .q_length = {length},
                               .kv_length = {length},
                               .heads = 2,
                               .kv_heads = 2,
                               .width = 64,
                               .causal = true,
                               .outliers = true,
                               .act = act ? DT_BF16 : DT_F32});
}

#endif
