/* The pieces that attention's forward and backward kernels are made of: register-tiled products of
 * packed operands, the packings, and the exponential.
 *
 * Sums behind one score and one output channel run in a fixed order, whatever the tile: a score
 * adds q[t] k[t] for t = 0, 1, ... in one lane of one accumulator, an output adds p[j] v[j] for j =
 * 0, 1,
 * ... within a block of KEY_BLOCK keys. So a query row gets the same bits from every path. */
#ifndef CPU_KERNELS_ATTENTION_TILE_H
#define CPU_KERNELS_ATTENTION_TILE_H

#include <string.h>

#include "cpu/kernels/simd.h"
#include "ops/tensor.h"

#define KEY_BLOCK 64         /* keys of one step of the online softmax */
#define PANEL (2 * VF_WIDTH) /* columns of one tile: two vectors */
#if SIMD_AVX512
#define TILE_ROWS 12 /* 24 accumulators of 32 registers */
#elif SIMD_AVX2
#define TILE_ROWS 6 /* 12 of 16 */
#else
#define TILE_ROWS 4
#endif
SIMD int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}
SIMD int64_t min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
SIMD int64_t max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* Vector [row, head] of a [rows, heads, d] tensor. */
SIMD const void *element(const struct tensor *t, int64_t row, int64_t head) {
    int64_t at = row * t->stride[0] + head * t->stride[1];
    return (const char *)t->data + at * (int64_t)dtype_size(t->dtype);
}

/* ------------------------------------------------------------------ products */

enum tile_start {
    START_ZERO, /* c = a b */
    START_ADD,  /* c += a b */
    START_SCALE /* c = scale[row] c + a b */
};

/* c [rows, vectors * VF_WIDTH] (rows ldc apart) from a b: a[row * row_step + t * t_step], b rows
 * ldb apart, t = 0 .. n - 1 in order, one accumulator an element. All but n and the pointers are
 * constants where it is inlined. */
SIMD void tile(int rows, int vectors, enum tile_start start, int64_t n, const float *a,
               int64_t row_step, int64_t t_step, const float *b, int64_t ldb, float *c, int64_t ldc,
               const float *scale) {
    vf acc[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            if (start == START_ZERO)
                acc[r][v] = vf_set(0.0f);
            else
                acc[r][v] = vf_load(c + r * ldc + v * VF_WIDTH);
            if (start == START_SCALE)
                acc[r][v] *= vf_set(scale[r]);
        }
    for (int64_t t = 0; t < n; t++) {
        vf x[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            x[v] = vf_load(b + v * VF_WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vf y = vf_set(a[r * row_step]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                acc[r][v] = vf_fma(y, x[v], acc[r][v]);
        }
        a += t_step;
        b += ldb;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            vf_store(c + r * ldc + v * VF_WIDTH, acc[r][v]);
}

/* The same with few rows in a (decoding, small calls), where b is not packed: row j of b is
 * b_row[j] in its own dtype, and n of the VF_WIDTH columns from `column` on are used. */
SIMD void tile_rows(int rows, int vectors, int64_t n, const float *a, int64_t lda,
                    const void *const *b_row, enum dtype type, int64_t column, int last, float *c,
                    int64_t ldc, const float *scale) {
    vf acc[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            acc[r][v] = vf_load(c + r * ldc + v * VF_WIDTH) * vf_set(scale[r]);
    for (int64_t j = 0; j < n; j++) {
        vf y[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            y[r] = vf_set(a[r * lda + j]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            vf x = vf_load_as(b_row[j], type, column + v * VF_WIDTH,
                              v == vectors - 1 ? last : VF_WIDTH);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                acc[r][v] = vf_fma(y[r], x, acc[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            vf_store(c + r * ldc + v * VF_WIDTH, acc[r][v]);
}

/* ------------------------------------------------------------------ transposes and packing */

/* x[i][j] becomes x[j][i]. */
SIMD void transpose(vf x[VF_WIDTH]) {
    vf y[VF_WIDTH];
#if VF_WIDTH == 4
#define SHUFFLE(a, b, i, j) __builtin_shufflevector(a, b, i, j, i + 1, j + 1)
#define SHUFFLE_PAIR(a, b, i) __builtin_shufflevector(a, b, i, i + 1, i + 4, i + 5)
#elif VF_WIDTH == 8
#define SHUFFLE(a, b, i, j)                                                                        \
    __builtin_shufflevector(a, b, i, j, i + 1, j + 1, i + 4, j + 4, i + 5, j + 5)
#define SHUFFLE_PAIR(a, b, i)                                                                      \
    __builtin_shufflevector(a, b, i, i + 1, i + 8, i + 9, i + 4, i + 5, i + 12, i + 13)
#else
#define SHUFFLE(a, b, i, j)                                                                        \
    __builtin_shufflevector(a, b, i, j, i + 1, j + 1, i + 4, j + 4, i + 5, j + 5, i + 8, j + 8,    \
                            i + 9, j + 9, i + 12, j + 12, i + 13, j + 13)
#define SHUFFLE_PAIR(a, b, i)                                                                      \
    __builtin_shufflevector(a, b, i, i + 1, i + 16, i + 17, i + 4, i + 5, i + 20, i + 21, i + 8,   \
                            i + 9, i + 24, i + 25, i + 12, i + 13, i + 28, i + 29)
#endif
    /* Within 128-bit lanes, four rows at a time: y[4k + c] holds column c (mod 4) of rows 4k.. */
#pragma GCC unroll 4
    for (int k = 0; k < VF_WIDTH; k += 4) {
        vf a = SHUFFLE(x[k], x[k + 1], 0, VF_WIDTH), b = SHUFFLE(x[k], x[k + 1], 2, VF_WIDTH + 2);
        vf c = SHUFFLE(x[k + 2], x[k + 3], 0, VF_WIDTH);
        vf d = SHUFFLE(x[k + 2], x[k + 3], 2, VF_WIDTH + 2);
        y[k] = SHUFFLE_PAIR(a, c, 0);
        y[k + 1] = SHUFFLE_PAIR(a, c, 2);
        y[k + 2] = SHUFFLE_PAIR(b, d, 0);
        y[k + 3] = SHUFFLE_PAIR(b, d, 2);
    }
    /* Then whole lanes. */
#if VF_WIDTH == 4
    for (int c = 0; c < 4; c++)
        x[c] = y[c];
#elif VF_WIDTH == 8
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        x[c] = __builtin_shufflevector(y[c], y[4 + c], 0, 1, 2, 3, 8, 9, 10, 11);
        x[4 + c] = __builtin_shufflevector(y[c], y[4 + c], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
#define LANES(a, b, i, j)                                                                          \
    __builtin_shufflevector(a, b, i, i + 1, i + 2, i + 3, j, j + 1, j + 2, j + 3, i + 16, i + 17,  \
                            i + 18, i + 19, j + 16, j + 17, j + 18, j + 19)
        vf a = LANES(y[c], y[4 + c], 0, 8), b = LANES(y[8 + c], y[12 + c], 0, 8);
        vf e = LANES(y[c], y[4 + c], 4, 12), f = LANES(y[8 + c], y[12 + c], 4, 12);
        x[c] = LANES(a, b, 0, 8);
        x[8 + c] = LANES(a, b, 4, 12);
        x[4 + c] = LANES(e, f, 0, 8);
        x[12 + c] = LANES(e, f, 4, 12);
#undef LANES
    }
#endif
#undef SHUFFLE
#undef SHUFFLE_PAIR
}

/* Channels t .. t + n - 1 of VF_WIDTH rows: x[c] = channel t + c, a lane each row. */
SIMD void load_transposed(const void *const *row, enum dtype type, int64_t t, int n,
                          vf x[VF_WIDTH]) {
#pragma GCC unroll 16
    for (int i = 0; i < VF_WIDTH; i++)
        x[i] = vf_load_as(row[i], type, t, n);
    transpose(x);
}

/* Rows (count of them, the rest zero) into panels [KEY_BLOCK / PANEL][d][PANEL]: the operand b of a
 * product over channels. */
SIMD void pack_transposed_as(float *out, const void *const *row, int64_t count, int64_t d,
                             enum dtype type) {
    const vf zero = vf_zero();
    for (int64_t j = 0; j < KEY_BLOCK; j += VF_WIDTH) {
        float *to = out + j / PANEL * PANEL * d + j % PANEL;
        vi present = vi_iota() < vi_set((int)(count - j));
        for (int64_t t = 0; t < d; t += VF_WIDTH) {
            vf x[VF_WIDTH];
            int n = (int)min_i64(VF_WIDTH, d - t);
            if (j >= count) {
                for (int c = 0; c < n; c++)
                    vf_store(to + (t + c) * PANEL, zero);
                continue;
            }
            if (n == VF_WIDTH)
                load_transposed(row + j, type, t, VF_WIDTH, x);
            else
                load_transposed(row + j, type, t, n, x);
            for (int c = 0; c < n; c++)
                vf_store(to + (t + c) * PANEL, vf_select(present, x[c], zero));
        }
    }
}

/* The same rows into panels [round_up(d, PANEL) / PANEL][KEY_BLOCK][PANEL]: the operand b of a
 * product over keys. Columns from d on are zero. */
SIMD void pack_rows_as(float *out, const void *const *row, int64_t count, int64_t d,
                       enum dtype type) {
    int64_t width = round_up(d, PANEL);
    for (int64_t j = 0; j < KEY_BLOCK; j++)
        for (int64_t t = 0; t < width; t += VF_WIDTH) {
            float *to = out + t / PANEL * PANEL * KEY_BLOCK + j * PANEL + t % PANEL;
            if (j >= count || t >= d)
                vf_store(to, vf_zero());
            else if (t + VF_WIDTH <= d)
                vf_store(to, vf_load_as(row[j], type, t, VF_WIDTH));
            else
                vf_store(to, vf_load_as(row[j], type, t, (int)(d - t)));
        }
}

static inline __attribute__((unused)) void
pack_transposed(float *out, const void *const *row, int64_t count, int64_t d, enum dtype type) {
    if (type == DT_F32)
        pack_transposed_as(out, row, count, d, DT_F32);
    else
        pack_transposed_as(out, row, count, d, DT_BF16);
}
static inline __attribute__((unused)) void pack_rows(float *out, const void *const *row,
                                                     int64_t count, int64_t d, enum dtype type) {
    if (type == DT_F32)
        pack_rows_as(out, row, count, d, DT_F32);
    else
        pack_rows_as(out, row, count, d, DT_BF16);
}

/* One row of d channels, times `factor`, to fp32 padded with zeros to `width` (a multiple of
 * VF_WIDTH). */
SIMD void row_to_float_as(float *out, const void *row, enum dtype type, int64_t d, int64_t width,
                          float factor) {
    for (int64_t t = 0; t < width; t += VF_WIDTH) {
        vf x = vf_zero();
        if (t + VF_WIDTH <= d)
            x = vf_load_as(row, type, t, VF_WIDTH);
        else if (t < d)
            x = vf_load_as(row, type, t, (int)(d - t));
        vf_store(out + t, x * vf_set(factor));
    }
}
static inline __attribute__((unused)) void
row_to_float(float *out, const void *row, enum dtype type, int64_t d, int64_t width, float factor) {
    if (type == DT_F32)
        row_to_float_as(out, row, DT_F32, d, width, factor);
    else
        row_to_float_as(out, row, DT_BF16, d, width, factor);
}
SIMD void row_from_float_as(void *row, enum dtype type, const float *in, int64_t d, float factor) {
    for (int64_t t = 0; t < d; t += VF_WIDTH) {
        vf x = vf_load(in + t) * vf_set(factor);
        if (t + VF_WIDTH <= d)
            vf_store_as(row, type, t, x, VF_WIDTH);
        else
            vf_store_as(row, type, t, x, (int)(d - t));
    }
}
/* d channels of a padded fp32 row, times `factor`, to a row of dtype `type`. */
static inline __attribute__((unused)) void
row_from_float(void *row, enum dtype type, const float *in, int64_t d, float factor) {
    if (type == DT_F32)
        row_from_float_as(row, DT_F32, in, d, factor);
    else
        row_from_float_as(row, DT_BF16, in, d, factor);
}

/* ------------------------------------------------------------------ scores */

/* The largest lane. */
SIMD float max_lane(vf a) {
#if VF_WIDTH == 16
    a = vf_max(a,
               __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    a = vf_max(a,
               __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    a = vf_max(a,
               __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    a = vf_max(a,
               __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif VF_WIDTH == 8
    a = vf_max(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3));
    a = vf_max(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
    a = vf_max(a, __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    a = vf_max(a, __builtin_shufflevector(a, a, 2, 3, 0, 1));
    a = vf_max(a, __builtin_shufflevector(a, a, 1, 0, 3, 2));
#endif
    return a[0];
}

/* Bit b: element first + b of the stream survives dropout (first a multiple of 4), b < n <= 64. The
 * threshold is p * 2^24 rounded up: uniform >= p for the 24-bit uniform of random.h. */
static inline __attribute__((unused)) uint64_t
dropout_word(const struct random_key *key, uint64_t first, int n, uint32_t threshold) {
    uint64_t word = 0;
    for (int b = 0; b < n; b += 4) {
        uint32_t x[4];
        random_block(key, (first + (uint64_t)b) / 4, x);
        for (int k = 0; k < 4; k++)
            word |= (uint64_t)(x[k] >> 8 >= threshold) << (b + k);
    }
    return word;
}
/* Lane i: all ones if bit i of word is set. */
SIMD vi lanes_from_bits(uint64_t word) {
    vi bit = vi_set(1) << vi_iota();
    return (vi_set((int32_t)(word & 0xffff)) & bit) == bit;
}

#endif
