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

#include "cpu/kernels/philox.h"
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

SIMD int64_t dtype_bytes(enum dtype type) {
    return type == DT_F32 ? 4 : type == DT_I8 ? 1 : 2;
}

/* Vector [row, head] of a [rows, heads, d] tensor. */
SIMD const void *element(const struct tensor *t, int64_t row, int64_t head) {
    int64_t at = row * t->stride[0] + head * t->stride[1];
    return (const char *)t->data + at * dtype_bytes(t->dtype);
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
    vf acc[TILE_ROWS][8];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            if (start == START_ZERO)
                acc[r][v] = vf_set(0.0f);
            else
                acc[r][v] = vf_load(c + r * ldc + v * VF_WIDTH);
            if (start == START_SCALE)
                acc[r][v] *= vf_set(scale[r]);
        }
    for (int64_t t = 0; t < n; t++) {
        vf x[8];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            x[v] = vf_load(b + v * VF_WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vf y = vf_set(a[r * row_step]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                acc[r][v] = vf_fma(y, x[v], acc[r][v]);
        }
        a += t_step;
        b += ldb;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            vf_store(c + r * ldc + v * VF_WIDTH, acc[r][v]);
}

/* ------------------------------------------------------------------ transposes and packing */

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
/* Within each 128 bits, a transpose of four vectors: y[i][j] = x[j][i]. */
SIMD void transpose_quarters(vf y[4], const vf x[4]) {
    vf a = SHUFFLE(x[0], x[1], 0, VF_WIDTH), b = SHUFFLE(x[0], x[1], 2, VF_WIDTH + 2);
    vf c = SHUFFLE(x[2], x[3], 0, VF_WIDTH), d = SHUFFLE(x[2], x[3], 2, VF_WIDTH + 2);
    y[0] = SHUFFLE_PAIR(a, c, 0);
    y[1] = SHUFFLE_PAIR(a, c, 2);
    y[2] = SHUFFLE_PAIR(b, d, 0);
    y[3] = SHUFFLE_PAIR(b, d, 2);
}
#undef SHUFFLE
#undef SHUFFLE_PAIR

/* x[i][j] becomes x[j][i]. */
SIMD void transpose(vf x[VF_WIDTH]) {
    vf y[VF_WIDTH];
    /* Within 128-bit lanes, four rows at a time: y[4k + c] holds column c (mod 4) of rows 4k.. */
#pragma GCC unroll 4
    for (int k = 0; k < VF_WIDTH; k += 4)
        transpose_quarters(y + k, x + k);
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
}

/* n lanes from element t on of a row; of 8-bit integers too. */
SIMD vf load_lanes(const void *row, enum dtype type, int64_t t, int n) {
    if (type != DT_I8)
        return vf_load_as(row, type, t, n);
    int8_t some[16] = {0};
    const int8_t *from = (const int8_t *)row + t;
    if (n < VF_WIDTH) {
        memcpy(some, from, (size_t)n);
        from = some;
    }
#if SIMD_AVX512
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif SIMD_AVX2
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    vi wide;
    for (int i = 0; i < VF_WIDTH; i++)
        wide[i] = from[i];
    return vf_from_vi(wide);
#endif
}

/* Channels t .. t + n - 1 of VF_WIDTH rows: x[c] = channel t + c, a lane each row. */
SIMD void load_transposed(const char *const *row, enum dtype type, int64_t t, int n,
                          vf x[VF_WIDTH]) {
#pragma GCC unroll 16
    for (int i = 0; i < VF_WIDTH; i++)
        x[i] = load_lanes(row[i], type, t, n);
    transpose(x);
}

/* Units of 32 bits, VF_WIDTH of each of as many rows, from byte `offset` on: x[c] = units c. */
SIMD void load_transposed_units(const char *const *row, int64_t offset, vf x[VF_WIDTH]) {
#if VF_WIDTH == 8
    /* Halves of rows are put together on the way in: what is left happens within 128 bits. */
    vf y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const float *low = (const float *)(const void *)(row[i % 4] + offset + i / 4 * 16);
        const float *high = (const float *)(const void *)(row[i % 4 + 4] + offset + i / 4 * 16);
        y[i] = (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)),
                                        _mm_loadu_ps(high), 1);
    }
    transpose_quarters(x, y);
    transpose_quarters(x + 4, y + 4);
#else
#pragma GCC unroll 16
    for (int i = 0; i < VF_WIDTH; i++)
        x[i] = vf_load((const float *)(const void *)(row[i] + offset));
    transpose(x);
#endif
}

/* PANEL channels from t on of VF_WIDTH rows to out [PANEL][panel], a lane each row; 8-bit integers
 * times `scale`. bf16 moves as pairs of channels. */
SIMD void transpose_channels(float *out, int64_t panel, const char *const *row, int64_t t, vf scale,
                             enum dtype type) {
    vf x[VF_WIDTH];
    if (type == DT_BF16) {
        load_transposed_units(row, 2 * t, x);
#pragma GCC unroll 16
        for (int c = 0; c < VF_WIDTH; c++) {
            vf_store(out + 2 * c * panel, (vf)((vu)x[c] << 16));
            vf_store(out + (2 * c + 1) * panel, (vf)((vu)x[c] & (vu)vi_set((int32_t)0xffff0000u)));
        }
        return;
    }
    for (int k = 0; k < 2; k++, t += VF_WIDTH, out += VF_WIDTH * panel) {
        if (type == DT_F32)
            load_transposed_units(row, 4 * t, x);
        else
            load_transposed(row, type, t, VF_WIDTH, x);
#pragma GCC unroll 16
        for (int c = 0; c < VF_WIDTH; c++)
            vf_store(out + c * panel, type == DT_I8 ? x[c] * scale : x[c]);
    }
}

#define PREFETCH_ROWS 16

/* A list of rows to pack: `count` of them, and more to be fetched ahead; with 8-bit integers the
 * scale of each. */
struct row_list {
    const char *row[KEY_BLOCK + PREFETCH_ROWS];
    float scale[KEY_BLOCK];
    int64_t count;
};

/* Rows into panels [KEY_BLOCK / panel][d][panel]: the operand b of a product over channels. Zeros
 * follow them up to key `fill`, a multiple of VF_WIDTH; the rest is left as it was. */
SIMD void pack_transposed_as(float *out, const struct row_list *list, int64_t d, int64_t fill,
                             int64_t panel, enum dtype type) {
    const char *const *row = list->row;
    const int64_t count = list->count;
    const vf zero = vf_zero();
    const int64_t bytes = d * dtype_bytes(type);
    for (int64_t j = 0; j < fill; j += VF_WIDTH) {
        float *to = out + j / panel * panel * d + j % panel;
        vi present = vi_iota() < vi_set((int)(count - j));
        int64_t t = 0;
        if (j >= count) {
            for (; t < d; t++)
                vf_store(to + t * panel, zero);
            continue;
        }
        for (int i = 0; i < VF_WIDTH; i++)
            for (int64_t at = 0; at < bytes; at += 64)
                __builtin_prefetch((const char *)row[j + PREFETCH_ROWS + i] + at);
        vf x[VF_WIDTH], scale = type == DT_I8 ? vf_load(list->scale + j) : zero;
        for (; j + VF_WIDTH <= count && t + PANEL <= d; t += PANEL, to += PANEL * panel)
            transpose_channels(to, panel, row + j, t, scale, type);
        for (; t < d; t += VF_WIDTH, to += VF_WIDTH * panel) {
            int n = (int)min_i64(VF_WIDTH, d - t);
            load_transposed(row + j, type, t, n, x);
            for (int c = 0; c < n; c++)
                vf_store(to + c * panel,
                         vf_select(present, type == DT_I8 ? x[c] * scale : x[c], zero));
        }
    }
}

SIMD vf load_scaled(const void *row, enum dtype type, int64_t t, int n, vf scale) {
    vf x = load_lanes(row, type, t, n);
    return type == DT_I8 ? x * scale : x;
}

/* The same rows into panels [width / panel][KEY_BLOCK][panel]: the operand b of a product over
 * keys. width is d rounded up; columns from d on are zero; rows that are not there are left as they
 * were. */
SIMD void pack_rows_as(float *out, const struct row_list *list, int64_t d, int64_t width,
                       int64_t panel, enum dtype type) {
    const char *const *row = list->row;
    const int64_t count = list->count;
    const int64_t bytes = d * dtype_bytes(type), whole = d - d % panel;
    const int64_t next = panel * KEY_BLOCK;
    for (int64_t j = 0; j < count; j++, out += panel) {
        const char *ahead = row[j + PREFETCH_ROWS];
        const void *from = row[j];
        for (int64_t at = 0; at < bytes; at += 64)
            __builtin_prefetch(ahead + at);
        float *to = out;
        vf scale = vf_set(type == DT_I8 ? list->scale[j] : 1.0f);
        int64_t t = 0;
        for (; t < whole; to += next)
            for (int64_t v = 0; v < panel; v += PANEL, t += PANEL) {
                vf_store(to + v, load_scaled(from, type, t, VF_WIDTH, scale));
                vf_store(to + v + VF_WIDTH, load_scaled(from, type, t + VF_WIDTH, VF_WIDTH, scale));
            }
        for (int64_t v = 0; t < width; v += VF_WIDTH, t += VF_WIDTH) {
            vf x = vf_zero();
            if (t + VF_WIDTH <= d)
                x = load_scaled(from, type, t, VF_WIDTH, scale);
            else if (t < d)
                x = load_scaled(from, type, t, (int)(d - t), scale);
            vf_store(to + v, x);
        }
    }
}

#define NOT_ALL_USE static inline __attribute__((unused))
#define PACK_AS(function, type, ...)                                                               \
    do {                                                                                           \
        if ((type) == DT_F32)                                                                      \
            function(__VA_ARGS__, DT_F32);                                                         \
        else if ((type) == DT_I8)                                                                  \
            function(__VA_ARGS__, DT_I8);                                                          \
        else                                                                                       \
            function(__VA_ARGS__, DT_BF16);                                                        \
    } while (0)

/* For the tiles of two vectors. */
NOT_ALL_USE void pack_transposed(float *out, const struct row_list *list, int64_t d,
                                 enum dtype type) {
    PACK_AS(pack_transposed_as, type, out, list, d, round_up(list->count, PANEL), PANEL);
}
NOT_ALL_USE void pack_rows(float *out, const struct row_list *list, int64_t d, enum dtype type) {
    PACK_AS(pack_rows_as, type, out, list, d, round_up(d, PANEL), PANEL);
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
NOT_ALL_USE void row_to_float(float *out, const void *row, enum dtype type, int64_t d,
                              int64_t width, float factor) {
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
NOT_ALL_USE void row_from_float(void *row, enum dtype type, const float *in, int64_t d,
                                float factor) {
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

/* Which of the 2 VF_WIDTH elements from `first` on (a multiple of 4) survive dropout, as masks. The
 * threshold is p * 2^24 rounded up: uniform >= p for the 24-bit uniform of random.h. */
SIMD void dropout_masks(const struct philox *stream, uint64_t first, uint32_t threshold,
                        vi keep[2]) {
    vu x[2];
    philox_words(stream, first / 4, x);
    keep[0] = (vi)(x[0] >> 8) >= vi_set((int32_t)threshold);
    keep[1] = (vi)(x[1] >> 8) >= vi_set((int32_t)threshold);
}

#endif
