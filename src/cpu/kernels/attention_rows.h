/* Attention one row of scores at a time, for the implementations that are written to be read:
 * attention_fused.c, attention_materialised.c and attention_probabilities.c. Here is what they
 * share: a unit's keys as dense fp32 whatever their storage, and everything between q K^T and the
 * products with V.
 *
 * A unit is one sequence and one key/value head; units are computed one after the other, their rows
 * by all threads. A row is handled in pieces of KEY_BLOCK keys, from key j0 on, each with its word
 * of visible keys; pieces that nobody sees are skipped. */
#ifndef CPU_KERNELS_ATTENTION_ROWS_H
#define CPU_KERNELS_ATTENTION_ROWS_H

#include <math.h>

#include "base/threads.h"
#include "cpu/kernels/attention_matrix.h"
#include "ops/attention.h"

#define SERIAL_FLOPS 4e5 /* below this a thread costs more than it brings */

struct rows {
    struct attention_call c;
    int64_t group;   /* query heads per key/value head */
    int64_t ld;      /* columns of a matrix of d channels */
    int64_t ldk;     /* columns of a matrix of keys: whole pieces, rows not a power of two apart */
    int64_t blocks;  /* pieces of the longest row */
    float q_factor;  /* of q in q K^T */
    float dk_factor; /* of dS^T (q_factor q), to make it dK */
    float keep_factor; /* of what dropout leaves */
    uint32_t drop_threshold;
    struct philox dropout;
    int64_t sequence, kv_head; /* the unit under way */
    bool serial;
};

/* Where `floats` floats of scratch begin, after the *used ones before them. */
SIMD int64_t take(int64_t *used, int64_t floats) {
    int64_t at = *used;
    *used += round_up(floats, 16);
    return at;
}

/* After attention_unpack_*. */
SIMD void rows_begin(struct rows *f) {
    const struct attention_call *c = &f->c;
    const struct attention_params *p = c->params;
    f->group = c->heads / c->kv_heads;
    f->ld = matrix_columns(c->width);
    f->blocks = (c->longest_kv + KEY_BLOCK - 1) / KEY_BLOCK;
    f->ldk = f->blocks * KEY_BLOCK + 16;
    f->q_factor = p->softcap > 0 ? p->scale / p->softcap : p->scale;
    f->dk_factor = p->softcap > 0 ? p->softcap : 1;
    f->keep_factor = 1 / (1 - p->dropout);
    f->drop_threshold = (uint32_t)ceilf(p->dropout * 0x1p24f);
    f->dropout = philox_begin(&c->key);
}

/* The next unit, in order; begin with sequence 0 and kv_head -1. */
SIMD bool rows_next(struct rows *f, double flops_per_pair) {
    const struct attention_call *c = &f->c;
    if (++f->kv_head == c->kv_heads) {
        f->kv_head = 0;
        f->sequence++;
    }
    if (f->sequence >= c->sequences)
        return false;
    double pairs = (double)attention_own(c, f->sequence) * (double)c->kv_length[f->sequence];
    f->serial = flops_per_pair * pairs * (double)(f->group * c->width) < SERIAL_FLOPS;
    return true;
}

SIMD void rows_loop(struct rows *f, int64_t n, int64_t grain, parallel_fn *fn) {
    if (f->serial)
        fn(f, 0, n, 0);
    else
        parallel_for(n, grain, fn, f);
}

SIMD int64_t rows_keys(const struct rows *f) {
    return f->c.kv_length[f->sequence];
}
SIMD int64_t rows_own(const struct rows *f) {
    return attention_own(&f->c, f->sequence);
}

/* ------------------------------------------------------------------ keys */

/* A unit's keys [j0, j0 + KEY_BLOCK) of x (k or v) as a matrix [KEY_BLOCK, ld]: dequantised, in the
 * order of the pages, zeros beyond the last key and on pages that are gone. */
NOT_ALL_USE void load_keys(const struct rows *f, const struct tensor *x, const struct tensor *scale,
                           int64_t j0, float *out) {
    const struct attention_call *c = &f->c;
    for (int64_t j = j0; j < j0 + KEY_BLOCK; j++, out += f->ld) {
        int64_t row = j < rows_keys(f) ? attention_key_row(c, f->sequence, j) : -1;
        if (row < 0 || x->dtype == DT_I8)
            memset(out, 0, (size_t)f->ld * 4);
        if (row < 0)
            continue;
        if (x->dtype != DT_I8) {
            row_to_float(out, element(x, row, f->kv_head), x->dtype, c->width, f->ld, 1);
            continue;
        }
        const int8_t *from = x->data;
        from += row * x->stride[0] + f->kv_head * x->stride[1];
        float factor = ((const float *)scale->data)[row * c->kv_heads + f->kv_head];
        for (int64_t t = 0; t < c->width; t++)
            out[t] = factor * (float)from[t];
    }
}

/* ------------------------------------------------------------------ scores */

/* Which of the keys from j0 on query i, head h sees. */
SIMD uint64_t row_mask(const struct rows *f, int64_t i, int64_t h, int64_t j0) {
    return visible_mask(attention_rule(&f->c, h), i, attention_position(&f->c, f->sequence) + i, j0,
                        (int)min_i64(KEY_BLOCK, rows_keys(f) - j0));
}

/* Lanes of vector v whose bit is set. */
SIMD vi mask_lanes(uint64_t mask, int64_t v) {
    vi bit = vi_set(1) << vi_iota();
    return (vi_set((int32_t)(mask >> (v * VF_WIDTH) & ((1u << VF_WIDTH) - 1))) & bit) == bit;
}

SIMD vf load_bias(const struct tensor *bias, int64_t at, int64_t n) {
    if (n <= 0)
        return vf_zero();
    int lanes = (int)min_i64(n, VF_WIDTH);
    return bias->dtype == DT_F32 ? vf_load_as(bias->data, DT_F32, at, lanes)
                                 : vf_load_as(bias->data, DT_BF16, at, lanes);
}

/* A piece x of q K^T becomes scores: softcap, ALiBi, bias; -infinity where unseen. `slope` (not
 * NULL) receives the softcap's derivative. */
NOT_ALL_USE void finish_scores(const struct rows *f, int64_t i, int64_t h, int64_t j0,
                               uint64_t mask, float *x, float *slope) {
    const struct attention_call *c = &f->c;
    float cap = c->params->softcap;
    const struct tensor *bias = &c->bias;
    int64_t count = min_i64(KEY_BLOCK, rows_keys(f) - j0), at = 0;
    vf alibi = vf_set(c->slopes.data ? -((const float *)c->slopes.data)[h] : 0);
    int64_t distance = attention_position(c, f->sequence) + i - j0;
    if (bias->data)
        at = (bias->shape[0] == 1 ? 0 : h) * bias->stride[0] + i * bias->stride[1] + j0;
    for (int64_t v = 0; v < KEY_BLOCK / VF_WIDTH; v++) {
        vf s = vf_load(x + v * VF_WIDTH);
        if (cap > 0) {
            vf t = vf_tanh(s);
            s = t * vf_set(cap);
            if (slope)
                vf_store(slope + v * VF_WIDTH, vf_fma(-t, t, vf_set(1.0f)));
        }
        if (c->slopes.data) {
            vi steps = vi_set((int32_t)(distance - v * VF_WIDTH)) - vi_iota();
            s = vf_fma(alibi, vf_abs(vf_from_vi(steps)), s);
        }
        if (bias->data)
            s += load_bias(bias, at + v * VF_WIDTH, count - v * VF_WIDTH);
        if (mask != ~UINT64_C(0))
            s = vf_select(mask_lanes(mask, v), s, vf_set(-INFINITY));
        vf_store(x + v * VF_WIDTH, s);
    }
}

/* Where dropout strikes in a piece: x becomes 0 there. */
SIMD void drop(const struct rows *f, int64_t n, int64_t h, int64_t j0, float *x) {
    uint64_t at = attention_dropout_element(&f->c, h, n, j0);
    for (int64_t v = 0; v < KEY_BLOCK / VF_WIDTH; v += 2) {
        vi keep[2];
        dropout_masks(&f->dropout, at + (uint64_t)(v * VF_WIDTH), f->drop_threshold, keep);
        for (int64_t k = v; k < v + 2; k++)
            vf_store(x + k * VF_WIDTH,
                     vf_select(keep[k - v], vf_load(x + k * VF_WIDTH), vf_zero()));
    }
}

/* A whole row of scores, in pieces of which those with mask 0 are skipped, becomes e^(score - max),
 * with dropout 0 where it strikes. *inverse: 1 / the sum of all (before dropout, the sink
 * included), 0 for a row that sees nothing. Returns the log-sum-exp. */
NOT_ALL_USE float softmax_row(const struct rows *f, int64_t n, int64_t h, float *x,
                              const uint64_t *mask, float *inverse) {
    int64_t length = rows_keys(f);
    float sink = f->c.sink.data ? ((const float *)f->c.sink.data)[h] : -INFINITY;
    vf most = vf_set(sink), sum = vf_zero();
    for (int64_t j0 = 0; j0 < length; j0 += KEY_BLOCK)
        for (int64_t v = 0; v < KEY_BLOCK && mask[j0 / KEY_BLOCK]; v += VF_WIDTH)
            most = vf_max(most, vf_load(x + j0 + v));
    float m = max_lane(most);
    vf base = vf_set(m == -INFINITY ? 0 : m);
    for (int64_t j0 = 0; j0 < length; j0 += KEY_BLOCK) {
        if (!mask[j0 / KEY_BLOCK])
            continue;
        for (int64_t v = 0; v < KEY_BLOCK; v += VF_WIDTH) {
            vf e = vf_exp(vf_load(x + j0 + v) - base);
            sum += e;
            vf_store(x + j0 + v, e);
        }
        if (f->drop_threshold)
            drop(f, n, h, j0, x + j0);
    }
    float total = vf_sum(sum) + vf_exp(vf_set(sink) - base)[0];
    *inverse = total == 0 ? 0 : 1 / total;
    return (float)((double)base[0] + log((double)total));
}

/* The log-sum-exp that the backward subtracts: +infinity for a row that saw nothing, so that its
 * probabilities are 0. */
SIMD float row_lse(const struct rows *f, int64_t n, int64_t h) {
    float lse = ((const float *)f->c.lse.data)[h * f->c.rows + n];
    return lse == -INFINITY ? INFINITY : lse;
}

/* A piece of scores p becomes probabilities (0 where dropout strikes, else still to be multiplied
 * by keep_factor), and g = dO V^T the gradient of q_factor q K^T. `slope` as finish_scores left it.
 * The gradient of the score itself is added to dbias (not NULL: where the piece begins). */
NOT_ALL_USE void score_gradients(const struct rows *f, int64_t i, int64_t h, int64_t j0, float lse,
                                 float delta, const float *slope, float *p, float *g,
                                 float *dbias) {
    int64_t n = f->c.q_offsets[f->sequence] + i, count = min_i64(KEY_BLOCK, rows_keys(f) - j0);
    float all[KEY_BLOCK];
    for (int64_t v = 0; v < KEY_BLOCK; v += VF_WIDTH)
        vf_store(all + v, vf_exp(vf_load(p + v) - vf_set(lse)));
    memcpy(p, all, sizeof all);
    if (f->drop_threshold) {
        drop(f, n, h, j0, p);
        drop(f, n, h, j0, g);
    }
    for (int64_t v = 0; v < KEY_BLOCK; v += VF_WIDTH) {
        vf ds = vf_load(all + v) * (vf_load(g + v) * vf_set(f->keep_factor) - vf_set(delta));
        if (dbias && v < count) {
            int lanes = (int)min_i64(VF_WIDTH, count - v);
            vf_store_n(dbias + v, vf_load_n(dbias + v, lanes) + ds, lanes);
        }
        if (f->c.params->softcap > 0)
            ds *= vf_load(slope + v);
        vf_store(g + v, ds);
    }
}

/* Where the gradient of query i's biases begins; NULL: not wanted. */
SIMD float *dbias_row(const struct rows *f, int64_t i, int64_t h) {
    const struct tensor *b = &f->c.dbias;
    if (!b->data)
        return NULL;
    return (float *)b->data + (b->shape[0] == 1 ? 0 : h) * b->stride[0] + i * b->stride[1];
}

/* ------------------------------------------------------------------ around the units */

/* Rows that belong to no sequence: o = 0, lse = -infinity. */
NOT_ALL_USE void clear_forward(const struct attention_call *c) {
    int64_t next = 0;
    for (int64_t s = 0; s <= c->sequences; s++) {
        int64_t begin = s < c->sequences ? c->q_offsets[s] : c->rows;
        matrix_clear(&c->o, next, begin);
        for (int64_t n = next; c->lse.data && n < begin; n++)
            for (int64_t h = 0; h < c->heads; h++)
                ((float *)c->lse.data)[h * c->rows + n] = -INFINITY;
        next = max_i64(next, s < c->sequences ? c->q_offsets[s + 1] : c->rows);
    }
}

/* Zeros in dq, dk, dv where no sequence has rows or keys, and all over dbias. */
NOT_ALL_USE void clear_backward(const struct attention_call *c) {
    int64_t next_q = 0, next_k = 0;
    for (int64_t s = 0; s <= c->sequences; s++) {
        bool last = s == c->sequences;
        matrix_clear(&c->dq, next_q, last ? c->rows : c->q_offsets[s]);
        matrix_clear(&c->dk, next_k, last ? c->keys : c->kv_start[s]);
        matrix_clear(&c->dv, next_k, last ? c->keys : c->kv_start[s]);
        next_q = last ? 0 : c->q_offsets[s + 1];
        next_k = last ? 0 : c->kv_start[s] + c->kv_length[s];
    }
    const struct tensor *b = &c->dbias;
    for (int64_t h = 0; b->data && h < b->shape[0]; h++)
        for (int64_t i = 0; i < b->shape[1]; i++)
            memset((float *)b->data + h * b->stride[0] + i * b->stride[1], 0,
                   (size_t)b->shape[2] * 4);
}

/* dsink from delta [H, N]: -sum over rows of (the sink's own weight) delta. */
NOT_ALL_USE void sink_gradient(const struct attention_call *c, const float *delta) {
    for (int64_t h = 0; c->dsink.data && h < c->heads; h++) {
        double sum = 0, sink = (double)((const float *)c->sink.data)[h];
        for (int64_t s = 0; s < c->sequences; s++)
            for (int64_t n = c->q_offsets[s]; n < c->q_offsets[s + 1]; n++) {
                double lse = (double)((const float *)c->lse.data)[h * c->rows + n];
                if (lse != -INFINITY)
                    sum -= exp(sink - lse) * (double)delta[h * c->rows + n];
            }
        ((float *)c->dsink.data)[h] = (float)sum;
    }
}

#endif
