/* Whole matrices of fp32 in a worker's memory or in scratch, made of the register tiles of
 * attention_tile.h: products, transposes, and moving rows of [N, H, d] tensors in and out.
 *
 * All matrices are row-major. Row counts are rounded up to TILE_ROWS and column counts to whole
 * vectors: the memory must be there, and operands must be finite there (zeros, as the loading
 * functions leave them, where their values would enter a sum). */
#ifndef CPU_KERNELS_ATTENTION_MATRIX_H
#define CPU_KERNELS_ATTENTION_MATRIX_H

#include "cpu/kernels/attention_tile.h"

/* Columns of a matrix of d channels that serves as any operand. */
SIMD int64_t matrix_columns(int64_t d) {
    return round_up(round_up(d, TILE_ROWS), VF_WIDTH);
}

/* c [rows, columns] = or += a b over at most PRODUCT_BLOCK of n: what the tiles of a panel of b
 * share stays in the first-level cache. */
#define PRODUCT_BLOCK 256
SIMD void product_block(enum tile_start start, int64_t rows, int64_t columns, int64_t n,
                        const float *a, int64_t row_step, int64_t t_step, const float *b,
                        int64_t ldb, float *c, int64_t ldc) {
    int64_t t = 0;
    for (; t + VF_WIDTH < columns; t += PANEL)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            tile(TILE_ROWS, 2, start, n, a + r * row_step, row_step, t_step, b + t, ldb,
                 c + r * ldc + t, ldc, NULL);
    for (; t < columns; t += PANEL)
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            tile(TILE_ROWS, 1, start, n, a + r * row_step, row_step, t_step, b + t, ldb,
                 c + r * ldc + t, ldc, NULL);
}

/* The same over all n, in order: blocks change no bit. a[i][t] is a[i * row_step + t * t_step]. */
SIMD void product(bool add, int64_t rows, int64_t columns, int64_t n, const float *a,
                  int64_t row_step, int64_t t_step, const float *b, int64_t ldb, float *c,
                  int64_t ldc) {
    int64_t first = min_i64(n, PRODUCT_BLOCK);
    product_block(add ? START_ADD : START_ZERO, rows, columns, first, a, row_step, t_step, b, ldb,
                  c, ldc);
    for (int64_t i = first; i < n; i += PRODUCT_BLOCK)
        product_block(START_ADD, rows, columns, min_i64(n - i, PRODUCT_BLOCK), a + i * t_step,
                      row_step, t_step, b + i * ldb, ldb, c, ldc);
}

/* c [rows, columns] = a [rows, n] b [n, columns] */
NOT_ALL_USE void multiply(int64_t rows, int64_t columns, int64_t n, const float *a, int64_t lda,
                          const float *b, int64_t ldb, float *c, int64_t ldc) {
    product(false, rows, columns, n, a, lda, 1, b, ldb, c, ldc);
}
/* c += a b */
NOT_ALL_USE void multiply_add(int64_t rows, int64_t columns, int64_t n, const float *a, int64_t lda,
                              const float *b, int64_t ldb, float *c, int64_t ldc) {
    product(true, rows, columns, n, a, lda, 1, b, ldb, c, ldc);
}
/* c += a^T b, a [n, rows] */
NOT_ALL_USE void multiply_transposed_add(int64_t rows, int64_t columns, int64_t n, const float *a,
                                         int64_t lda, const float *b, int64_t ldb, float *c,
                                         int64_t ldc) {
    product(true, rows, columns, n, a, 1, lda, b, ldb, c, ldc);
}

/* c [columns] = or += a [n] b [n, columns], for a single row: wide tiles, to have enough sums under
 * way. */
SIMD void multiply_row_as(bool add, int64_t columns, int64_t n, const float *a, const float *b,
                          int64_t ldb, float *c) {
    enum tile_start start = add ? START_ADD : START_ZERO;
    int64_t t = 0;
    for (; t + 7 * VF_WIDTH < columns; t += 8 * VF_WIDTH)
        tile(1, 8, start, n, a, 0, 1, b + t, ldb, c + t, 0, NULL);
    for (; t + 3 * VF_WIDTH < columns; t += 4 * VF_WIDTH)
        tile(1, 4, start, n, a, 0, 1, b + t, ldb, c + t, 0, NULL);
    for (; t < columns; t += VF_WIDTH)
        tile(1, 1, start, n, a, 0, 1, b + t, ldb, c + t, 0, NULL);
}
NOT_ALL_USE void multiply_row(int64_t columns, int64_t n, const float *a, const float *b,
                              int64_t ldb, float *c) {
    multiply_row_as(false, columns, n, a, b, ldb, c);
}
NOT_ALL_USE void multiply_row_add(int64_t columns, int64_t n, const float *a, const float *b,
                                  int64_t ldb, float *c) {
    multiply_row_as(true, columns, n, a, b, ldb, c);
}

/* out [columns, rows] = x^T for x [rows, columns]; here both counts are rounded up to vectors. */
NOT_ALL_USE void transpose_matrix(float *out, int64_t ldo, const float *x, int64_t ldx,
                                  int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; r += VF_WIDTH)
        for (int64_t t = 0; t < columns; t += VF_WIDTH) {
            vf y[VF_WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < VF_WIDTH; i++)
                y[i] = vf_load(x + (r + i) * ldx + t);
            transpose(y);
#pragma GCC unroll 16
            for (int i = 0; i < VF_WIDTH; i++)
                vf_store(out + (t + i) * ldo + r, y[i]);
        }
}

NOT_ALL_USE float row_dot(const float *a, const float *b, int64_t n) {
    vf sum = vf_zero();
    for (int64_t t = 0; t < n; t += VF_WIDTH)
        sum = vf_fma(vf_load(a + t), vf_load(b + t), sum);
    return vf_sum(sum);
}

/* Rows [first, first + count) of head h, times `factor`, as a matrix [padded, ld], zeros around. */
NOT_ALL_USE void matrix_load(float *out, int64_t ld, const struct tensor *x, int64_t first,
                             int64_t h, int64_t count, int64_t padded, float factor) {
    for (int64_t i = 0; i < count; i++)
        row_to_float(out + i * ld, element(x, first + i, h), x->dtype, x->shape[2], ld, factor);
    memset(out + count * ld, 0, (size_t)((padded - count) * ld) * 4);
}
/* And back, without the padding. */
NOT_ALL_USE void matrix_store(const struct tensor *x, int64_t first, int64_t h, const float *in,
                              int64_t ld, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i++)
        row_from_float((void *)(uintptr_t)element(x, first + i, h), x->dtype, in + i * ld,
                       x->shape[2], factor);
}

/* Rows [begin, end) of a [N, H, d] tensor become zeros. */
NOT_ALL_USE void matrix_clear(const struct tensor *x, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
        for (int64_t h = 0; h < x->shape[1]; h++)
            memset((void *)(uintptr_t)element(x, n, h), 0,
                   (size_t)(x->shape[2] * dtype_bytes(x->dtype)));
}

#endif
