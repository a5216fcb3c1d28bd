/* Packing operands of matrix products (the layouts of gemm.h), and the epilogue after them.
 *
 * Everything is moved in units of 32 bits: an fp32 element, or a pair of bf16 elements that are
 * neighbours in k. With the units of VF_WIDTH rows in as many vectors, a transpose in registers
 * turns "k along the row" into panels; where k already runs across memory rows, packing is a copy.
 */
#ifndef CPU_KERNELS_GEMM_PACK_H
#define CPU_KERNELS_GEMM_PACK_H

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/units.h"

/* ---------------------------------------------------------------- B */

/* The two k of a unit of 16-bit elements, as fp32. */
SIMD vf vf_even(vu unit, enum dtype t) {
    return t == DT_BF16 ? (vf)(unit << 16)
                        : vf_from_f16(__builtin_convertvector(unit & (vu)vi_set(0xffff), vh));
}
SIMD vf vf_odd(vu unit, enum dtype t) {
    return t == DT_BF16 ? (vf)(unit & (vu)vi_set((int32_t)0xffff0000u))
                        : vf_from_f16(__builtin_convertvector(unit >> 16, vh));
}

/* k along the rows of memory: a block of VF_WIDTH rows x VF_WIDTH units is transposed at a time. */
SIMD void pack_b_straight(const struct gemm_operand *b, int64_t panel, int64_t k0, int64_t k1,
                          enum dtype from, enum dtype to, char *out) {
    int64_t size = (int64_t)dtype_size(from), per_unit = 4 / size;
    int64_t bytes = (k1 - k0) * size;
    for (int64_t group = 0; group < GEMM_PANEL; group += VF_WIDTH) {
        const char *row[VF_WIDTH];
        int64_t first = panel * GEMM_PANEL + group;
        for (int i = 0; i < VF_WIDTH; i++)
            row[i] = first + i < b->rows ? (const char *)b->data + ((first + i) * b->ld + k0) * size
                                         : NULL;
        for (int64_t at = 0; at < bytes; at += 4 * VF_WIDTH) {
            vu r[VF_WIDTH];
            UNROLL for (int i = 0; i < VF_WIDTH; i++) {
                r[i] = row[i] ? vu_load_bytes(row[i] + at, bytes - at) : (vu)vf_zero();
            }
            vu_transpose(r);
            int64_t units = (bytes - at + 3) / 4;
            for (int i = 0; i < VF_WIDTH && i < units; i++) {
                int64_t unit = at / 4 + i;
                if (to == from) {
                    vu_store(out + (unit * GEMM_PANEL + group) * 4, r[i]);
                } else {
                    float *f = (float *)out + unit * per_unit * GEMM_PANEL + group;
                    vf_store(f, vf_even(r[i], from));
                    if (unit * 2 + 1 < k1 - k0)
                        vf_store(f + GEMM_PANEL, vf_odd(r[i], from));
                }
            }
        }
    }
}

/* k across the rows of memory: 16 columns of each go to a panel, several panels side by side so
 * that whole lines of memory are used. */
SIMD void pack_b_transposed(const struct gemm_operand *b, int64_t begin, int64_t end, int64_t k0,
                            int64_t k1, enum dtype from, enum dtype to, char *out,
                            int64_t panel_bytes) {
    int64_t size = (int64_t)dtype_size(from);
    int64_t step = to == DT_BF16 ? 2 : 1;
    for (int64_t k = k0; k < k1; k += step) {
        const char *row = (const char *)b->data + k * b->ld * size;
        const char *next = k + 1 < k1 ? row + b->ld * size : NULL;
        for (int64_t p = begin; p < end; p++) {
            char *o = out + (p - begin) * panel_bytes + (k - k0) / step * GEMM_PANEL * 4;
            for (int64_t j = 0; j < GEMM_PANEL; j += VF_WIDTH) {
                int64_t col = p * GEMM_PANEL + j, left = b->rows - col;
                int n = left >= VF_WIDTH ? VF_WIDTH : left > 0 ? (int)left : 0;
                vu unit;
                if (n == 0)
                    unit = (vu)vf_zero();
                else if (to == DT_BF16)
                    unit = n == VF_WIDTH
                               ? vu_pair((const uint16_t *)row + col,
                                         next ? (const uint16_t *)next + col : NULL, VF_WIDTH)
                               : vu_pair((const uint16_t *)row + col,
                                         next ? (const uint16_t *)next + col : NULL, n);
                else
                    unit = n == VF_WIDTH ? (vu)vf_load_as(row, from, col, VF_WIDTH)
                                         : (vu)vf_load_as(row, from, col, n);
                vu_store(o + j * 4, unit);
            }
        }
    }
}

SIMD void pack_b_as(const struct gemm_operand *b, int64_t begin, int64_t end, int64_t k0,
                    int64_t k1, enum dtype from, enum dtype to, char *out) {
    int64_t panel_bytes = gemm_panel_bytes(k1 - k0, to);
    if (b->transposed) {
        for (int64_t p = begin; p < end; p += 8) /* 8 streams of writes at a time */
            pack_b_transposed(b, p, p + 8 < end ? p + 8 : end, k0, k1, from, to,
                              out + (p - begin) * panel_bytes, panel_bytes);
    } else {
        for (int64_t p = begin; p < end; p++)
            pack_b_straight(b, p, k0, k1, from, to, out + (p - begin) * panel_bytes);
    }
    if (to == DT_BF16) {
        int64_t used = gemm_round_up(k1 - k0, 2) * GEMM_PANEL * 2;
        for (int64_t p = begin; p < end; p++)
            memset(out + (p - begin) * panel_bytes + used, 0, (size_t)(panel_bytes - used));
    }
}

static void pack_b(const struct gemm_operand *b, int64_t begin, int64_t end, int64_t k0, int64_t k1,
                   enum dtype type, void *out) {
    if (b->type == DT_F32)
        pack_b_as(b, begin, end, k0, k1, DT_F32, DT_F32, out);
    else if (b->type == DT_F16)
        pack_b_as(b, begin, end, k0, k1, DT_F16, DT_F32, out);
    else if (type == DT_F32)
        pack_b_as(b, begin, end, k0, k1, DT_BF16, DT_F32, out);
    else
        pack_b_as(b, begin, end, k0, k1, DT_BF16, DT_BF16, out);
}

static void widen(const void *panel, int64_t k, float *out) {
    const char *p = panel;
    for (int64_t i = 0; i < k; i += 2, p += GEMM_PANEL * 4, out += 2 * GEMM_PANEL) {
        UNROLL for (int j = 0; j < GEMM_PANEL; j += VF_WIDTH) {
            vu unit = vu_load(p + j * 4);
            vf_store(out + j, vf_even(unit, DT_BF16));
            vf_store(out + GEMM_PANEL + j, vf_odd(unit, DT_BF16));
        }
    }
}

/* ---------------------------------------------------------------- sums and the epilogue */

SIMD void row_sums_as(const struct gemm_operand *a, int64_t begin, int64_t end, int64_t k0,
                      int64_t k1, enum dtype t, float *sum) {
    int64_t size = (int64_t)dtype_size(t);
    for (int64_t k = k0; k < k1; k++) {
        const char *row = (const char *)a->data + k * a->ld * size;
        int64_t j = begin;
        for (; j + VF_WIDTH <= end; j += VF_WIDTH)
            vf_store(sum + j, vf_load(sum + j) + vf_load_as(row, t, j, VF_WIDTH));
        if (j < end) {
            int n = (int)(end - j);
            vf_store_n(sum + j, vf_load_n(sum + j, n) + vf_load_as(row, t, j, n), n);
        }
    }
}
static void row_sums(const struct gemm_operand *a, int64_t begin, int64_t end, int64_t k0,
                     int64_t k1, float *sum) {
    if (a->type == DT_F32)
        row_sums_as(a, begin, end, k0, k1, DT_F32, sum);
    else
        row_sums_as(a, begin, end, k0, k1, DT_BF16, sum);
}

SIMD vf activate(vf x, enum activation a) {
    switch (a) {
    case ACT_RELU:
        return vf_select(x > vf_zero(), x, vf_zero());
    case ACT_GELU_ERF:
        return x * vf_normal_cdf(x);
    case ACT_GELU_TANH: /* x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) */
        return x *
               vf_sigmoid(vf_set(1.5957691216057308f) * vf_fma(x * x * x, vf_set(0.044715f), x));
    case ACT_SILU:
        return x * vf_sigmoid(x);
    case ACT_NONE:
        break;
    }
    return x;
}

SIMD void epilogue_lanes(const struct gemm_output *o, enum activation a, const float *c,
                         int64_t row, int64_t column, int n) {
    vf x = vf_load_n(c, n);
    if (o->bias)
        x += vf_load_n(o->bias + column, n);
    if (o->pre) {
        if (o->pre_type == DT_F32)
            vf_store_as(o->pre, DT_F32, row * o->pre_ld + column, x, n);
        else
            vf_store_as(o->pre, DT_BF16, row * o->pre_ld + column, x, n);
    }
    x = activate(x, a);
    if (o->residual)
        x += vf_load_n(o->residual + row * o->residual_ld + column, n);
    if (o->type == DT_F32)
        vf_store_as(o->y, DT_F32, row * o->ld + column, x, n);
    else
        vf_store_as(o->y, DT_BF16, row * o->ld + column, x, n);
}

SIMD void epilogue_as(const struct gemm_output *o, enum activation a, const float *c, int64_t ldc,
                      int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t j = 0;
        for (; j + VF_WIDTH <= columns; j += VF_WIDTH)
            epilogue_lanes(o, a, c + r * ldc + j, row + r, column + j, VF_WIDTH);
        if (j < columns)
            epilogue_lanes(o, a, c + r * ldc + j, row + r, column + j, (int)(columns - j));
    }
}

static void epilogue(const struct gemm_output *o, const float *c, int64_t ldc, int64_t row,
                     int64_t rows, int64_t column, int64_t columns) {
    switch (o->activation) {
    case ACT_NONE:
        epilogue_as(o, ACT_NONE, c, ldc, row, rows, column, columns);
        break;
    case ACT_RELU:
        epilogue_as(o, ACT_RELU, c, ldc, row, rows, column, columns);
        break;
    case ACT_GELU_ERF:
        epilogue_as(o, ACT_GELU_ERF, c, ldc, row, rows, column, columns);
        break;
    case ACT_GELU_TANH:
        epilogue_as(o, ACT_GELU_TANH, c, ldc, row, rows, column, columns);
        break;
    case ACT_SILU:
        epilogue_as(o, ACT_SILU, c, ldc, row, rows, column, columns);
        break;
    }
}

#endif
