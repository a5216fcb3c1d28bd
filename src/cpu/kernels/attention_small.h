/* The forward of flash attention where everything is small: one block of keys, few rows, narrow
 * heads. What goes on around the arithmetic elsewhere would cost more than the arithmetic, so a
 * unit is computed here from end to end on the stack. The sums are those of the other paths. */
#ifndef CPU_KERNELS_ATTENTION_SMALL_H
#define CPU_KERNELS_ATTENTION_SMALL_H

#include "cpu/kernels/attention_step.h"

#define SMALL_ROWS 16
#define SMALL_WIDTH 64

static bool small_fits(const struct forward *f) {
    const struct attention_call *c = &f->c;
    return c->plain && !c->pages && !f->amx && !f->blocked && !f->adjusted &&
           f->drop_threshold == 0 && !c->sink.data && c->k.dtype != DT_I8 &&
           c->v.dtype == c->k.dtype && c->width <= SMALL_WIDTH && c->longest_kv <= KEY_BLOCK &&
           c->longest_q * f->group <= SMALL_ROWS &&
           4.0 * (double)(c->rows * c->heads * c->longest_kv * c->width) < SERIAL_FLOPS;
}

/* Rows go in tiles of 4, 2 or 1. */
SIMD int64_t small_tile(int64_t rows) {
    return rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

SIMD void small_products(int64_t rows, int64_t n, const float *a, int64_t lda, const float *b,
                         int64_t ldb, float *c, int64_t ldc) {
    if (rows == 4)
        tile(4, 2, START_ZERO, n, a, lda, 1, b, ldb, c, ldc, NULL);
    else if (rows == 2)
        tile(2, 2, START_ZERO, n, a, lda, 1, b, ldb, c, ldc, NULL);
    else
        tile(1, 2, START_ZERO, n, a, lda, 1, b, ldb, c, ldc, NULL);
}

struct small {
    float q[SMALL_ROWS * SMALL_WIDTH], keys[SMALL_WIDTH * KEY_BLOCK];
    float values[KEY_BLOCK * SMALL_WIDTH], s[SMALL_ROWS * KEY_BLOCK], o[4 * SMALL_WIDTH];
};

/* Scores of one row become 2^(score - *most); returns their sum. */
SIMD float small_softmax(float *s, int64_t seen, int64_t vectors, float *most) {
    const vf minus = vf_set(-INFINITY);
    vf m = minus, sum = vf_zero();
    vi limit = vi_set((int32_t)seen);
    for (int64_t v = 0; v < vectors; v++) {
        vi lane = vi_iota() + vi_set((int32_t)(v * VF_WIDTH));
        vf x = vf_select(lane < limit, vf_load(s + v * VF_WIDTH), minus);
        vf_store(s + v * VF_WIDTH, x);
        m = vf_max(m, x);
    }
    *most = max_lane(m);
    vf base = vf_set(*most == -INFINITY ? 0.0f : *most);
    for (int64_t v = 0; v < vectors; v++) {
        vf p = vf_exp2(vf_load(s + v * VF_WIDTH) - base);
        vf_store(s + v * VF_WIDTH, p);
        sum += p;
    }
    return vf_sum(sum);
}

SIMD void small_unit_as(const struct forward *f, struct small *w, int64_t sequence, int64_t kv_head,
                        enum dtype act, enum dtype cache) {
    const struct attention_call *c = &f->c;
    int64_t d = c->width, width = f->width, group = f->group, length = c->kv_length[sequence];
    int64_t first = c->q_offsets[sequence], own = attention_own(c, sequence), rows = own * group;
    int64_t head0 = kv_head * group, start = c->kv_start[sequence], t;
    int64_t keys = round_up(length, PANEL);
    for (int64_t i = 0, r = 0; i < own; i++)
        for (int64_t g = 0; g < group; g++, r++)
            row_to_float_as(w->q + r * width, element(&c->q, first + i, head0 + g), act, d, width,
                            f->q_factor);
    for (int64_t j = 0; j < keys && length > 0; j += VF_WIDTH) {
        const char *row[VF_WIDTH];
        float *to = w->keys + j / PANEL * PANEL * d + j % PANEL;
        for (int i = 0; i < VF_WIDTH; i++)
            row[i] = element(&c->k, start + min_i64(j + i, length - 1), kv_head);
        for (t = 0; t + PANEL <= d; t += PANEL, to += PANEL * PANEL)
            transpose_channels(to, PANEL, row, t, vf_zero(), cache);
        for (; t < d; t += VF_WIDTH, to += VF_WIDTH * PANEL) {
            vf x[VF_WIDTH];
            int n = (int)min_i64(VF_WIDTH, d - t);
            load_transposed(row, cache, t, n, x);
            for (int k = 0; k < n; k++)
                vf_store(to + k * PANEL, x[k]);
        }
    }
    for (int64_t j = 0; j < length; j++)
        row_to_float_as(w->values + j * width, element(&c->v, start + j, kv_head), cache, d, width,
                        1.0f);
    int64_t i = 0, g = 0; /* of the row that is being stored */
    for (int64_t r = 0, n; r < rows; r += n) {
        float sum[4], most[4];
        int64_t seen[4], last = 0;
        n = small_tile(rows - r);
        for (int64_t k = 0, at = i, h = g; k < n; k++) {
            seen[k] = min_i64(attention_visible(c, sequence, at, head0 + h), length);
            last = max_i64(last, seen[k]);
            if (++h == group) {
                h = 0;
                at++;
            }
        }
        for (int64_t j = 0; j < last; j += PANEL)
            small_products(n, d, w->q + r * width, width, w->keys + j * d, PANEL, w->s + j,
                           KEY_BLOCK);
        for (int64_t k = 0; k < n; k++)
            sum[k] = small_softmax(w->s + k * KEY_BLOCK, seen[k], round_up(last, PANEL) / VF_WIDTH,
                                   &most[k]);
        for (t = 0; t < width; t += PANEL)
            small_products(n, last, w->s, KEY_BLOCK, w->values + t, width, w->o + t, width);
        for (int64_t k = 0; k < n; k++) {
            void *o = (void *)(uintptr_t)element(&c->o, first + i, head0 + g);
            row_from_float_as(o, act, w->o + k * width, d,
                              sum[k] == 0 ? 0.0f : f->keep_factor / sum[k]);
            if (c->lse.data)
                ((float *)c->lse.data)[(head0 + g) * c->rows + first + i] =
                    row_lse(most[k], sum[k]);
            if (++g == group) {
                g = 0;
                i++;
            }
        }
    }
}

static void small_forward(const struct forward *f) {
    const struct attention_call *c = &f->c;
    struct small w;
    for (int64_t s = 0; s < c->sequences; s++)
        for (int64_t g = 0; g < c->kv_heads; g++) {
            if (c->q.dtype == DT_F32 && c->k.dtype == DT_F32)
                small_unit_as(f, &w, s, g, DT_F32, DT_F32);
            else if (c->q.dtype == DT_F32)
                small_unit_as(f, &w, s, g, DT_F32, DT_BF16);
            else if (c->k.dtype == DT_F32)
                small_unit_as(f, &w, s, g, DT_BF16, DT_F32);
            else
                small_unit_as(f, &w, s, g, DT_BF16, DT_BF16);
        }
}

#endif
