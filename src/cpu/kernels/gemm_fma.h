/* Products with fp32 multiply-adds, for every level and dtype: a strip of rows (their values
 * broadcast one by one) times panels of 16 outputs, all sums in registers.
 *
 *   strip   [k][rows] fp32, rows = 1, 2, 4 or a full strip (generic 2, AVX2 6, AVX-512 12)
 *   panels  fp32, or bf16 pairs widened on the way in: the even k is the low half of a unit
 * (shift), the odd k the high half (mask)
 *
 * With few rows the weights only pass by: then several panels are computed at a time, so that the
 * sums do not wait for each other, and memory is asked for ahead of need. */
#ifndef CPU_KERNELS_GEMM_FMA_H
#define CPU_KERNELS_GEMM_FMA_H

#include "cpu/kernels/gemm_pack.h"

#define FMA_VECTORS (GEMM_PANEL / VF_WIDTH) /* of a panel's row */
#if VF_WIDTH == 16
#define FMA_STRIP 12
#elif VF_WIDTH == 8
#define FMA_STRIP 6
#else
#define FMA_STRIP 2
#endif
#define FMA_MAX_PANELS 4
#define FMA_AHEAD 1024 /* bytes of a panel that are fetched ahead when few rows are computed */

static int fma_strip_rows(int64_t rows) {
    static const int sizes[] = {1, 2, 4, 8, 12};
    for (int i = 0; sizes[i] < FMA_STRIP; i++)
        if (rows <= sizes[i])
            return sizes[i];
    return FMA_STRIP;
}

/* About 8 vectors of sums or more, as latency asks, and registers left for the operands. */
SIMD int fma_panels(int rows) {
    if (VF_WIDTH == 16)
        return rows <= 4 ? 4 : 2;
    if (VF_WIDTH == 8)
        return rows == 1 ? 4 : rows == 2 ? 2 : 1;
    return rows == 1 ? 2 : 1;
}
static int fma_strip_panels(int rows) {
    return fma_panels(rows);
}

/* ---------------------------------------------------------------- packing a strip */

SIMD void pack_strip_straight(const struct gemm_operand *a, int64_t row, int count, int rows,
                              int64_t k0, int64_t k1, enum dtype from, float *out) {
    int64_t size = (int64_t)dtype_size(from);
    const char *base = (const char *)a->data + (row * a->ld + k0) * size;
    for (int64_t k = 0; k < k1 - k0; k += VF_WIDTH) {
        int64_t left = k1 - k0 - k;
        int n = left < VF_WIDTH ? (int)left : VF_WIDTH;
        if (rows == 1) {
            vf_store_n(out + k,
                       n == VF_WIDTH ? vf_load_as(base, from, k, VF_WIDTH)
                                     : vf_load_as(base, from, k, n),
                       n);
            continue;
        }
        vu r[VF_WIDTH];
        UNROLL for (int i = 0; i < VF_WIDTH; i++) {
            if (i >= count)
                r[i] = (vu)vf_zero();
            else if (n == VF_WIDTH)
                r[i] = (vu)vf_load_as(base + i * a->ld * size, from, k, VF_WIDTH);
            else
                r[i] = (vu)vf_load_as(base + i * a->ld * size, from, k, n);
        }
        vu_transpose(r);
        for (int i = 0; i < n; i++) /* each store's surplus is overwritten by the next one */
            vu_store(out + (k + i) * rows, r[i]);
    }
    for (int64_t k = k1 - k0; k < gemm_round_up(k1 - k0, 2); k++)
        for (int i = 0; i < rows; i++)
            out[k * rows + i] = 0.0f;
}

SIMD void pack_a_fma_as(const struct gemm_operand *a, int64_t first, int64_t last, int64_t begin,
                        int64_t end, int64_t k0, int64_t k1, enum dtype from, char *out,
                        int64_t strip_bytes) {
    if (!a->transposed) {
        for (int64_t s = begin; s < end; s++) {
            int64_t row = first + s * FMA_STRIP;
            int64_t count = last - row < FMA_STRIP ? last - row : FMA_STRIP;
            pack_strip_straight(a, row, (int)count, fma_strip_rows(count), k0, k1, from,
                                (float *)(out + (s - begin) * strip_bytes));
        }
        return;
    }
    int64_t size = (int64_t)dtype_size(from);
    for (int64_t group = begin; group < end; group += 8) {
        for (int64_t k = k0; k < gemm_round_up(k1, 2); k++) {
            const char *row = (const char *)a->data + k * a->ld * size;
            for (int64_t s = group; s < end && s < group + 8; s++) {
                int64_t at = first + s * FMA_STRIP, left = last - at;
                int rows = fma_strip_rows(left < FMA_STRIP ? left : FMA_STRIP);
                float *o = (float *)(out + (s - begin) * strip_bytes) + (k - k0) * rows;
                for (int j = 0; j < rows; j += VF_WIDTH) {
                    vf x = vf_zero();
                    if (k < k1 && left - j >= VF_WIDTH)
                        x = vf_load_as(row, from, at + j, VF_WIDTH);
                    else if (k < k1 && left - j > 0)
                        x = vf_load_as(row, from, at + j, (int)(left - j));
                    vf_store(o + j, x);
                }
            }
        }
    }
}

static void pack_a_fma(const struct gemm_operand *a, int64_t first, int64_t last, int64_t begin,
                       int64_t end, int64_t k0, int64_t k1, void *out, int64_t strip_bytes) {
    if (a->type == DT_F32)
        pack_a_fma_as(a, first, last, begin, end, k0, k1, DT_F32, out, strip_bytes);
    else
        pack_a_fma_as(a, first, last, begin, end, k0, k1, DT_BF16, out, strip_bytes);
}

/* ---------------------------------------------------------------- the tile */

typedef vf fma_sums[FMA_STRIP][FMA_VECTORS * FMA_MAX_PANELS];

/* Steps [begin, end) of 64 bytes of each panel: one k of fp32, two of bf16. Fetches what lies
 * `ahead` bytes further (0: nothing). */
SIMD void fma_steps(const int rows, const int panels, const enum dtype t, int64_t begin,
                    int64_t end, const float *a, const char *b, int64_t panel_stride, int64_t ahead,
                    fma_sums sum) {
    const int vectors = panels * FMA_VECTORS, per_step = t == DT_BF16 ? 2 : 1;
    a += begin * per_step * rows;
    b += begin * 64;
    for (int64_t i = begin; i < end; i++, a += per_step * rows, b += 64) {
        vf even[FMA_VECTORS * FMA_MAX_PANELS], odd[FMA_VECTORS * FMA_MAX_PANELS];
        UNROLL for (int v = 0; v < vectors; v++) {
            const char *p = b + v / FMA_VECTORS * panel_stride + v % FMA_VECTORS * 4 * VF_WIDTH;
            vu unit = vu_load(p);
            if (t == DT_BF16) {
                even[v] = vf_even(unit, DT_BF16);
                odd[v] = vf_odd(unit, DT_BF16);
            } else {
                even[v] = (vf)unit;
            }
            if (ahead != 0 && v % FMA_VECTORS == 0)
                __builtin_prefetch(p + ahead);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vf x = vf_set(a[r]);
            UNROLL for (int v = 0; v < vectors; v++) {
                sum[r][v] = vf_fma(x, even[v], sum[r][v]);
            }
        }
        if (t == DT_BF16) {
            UNROLL for (int r = 0; r < rows; r++) {
                vf x = vf_set(a[rows + r]);
                UNROLL for (int v = 0; v < vectors; v++) {
                    sum[r][v] = vf_fma(x, odd[v], sum[r][v]);
                }
            }
        }
    }
}

SIMD void fma_tile_as(const int rows, const int panels, const enum dtype t, int64_t k,
                      const float *a, const char *b, int64_t panel_stride, float *c, int64_t ldc,
                      bool load) {
    const int vectors = panels * FMA_VECTORS;
    fma_sums sum;
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            sum[r][v] = load ? vf_load(c + r * ldc + v * VF_WIDTH) : vf_zero();
        }
    }
    int64_t steps = t == DT_BF16 ? k / 2 : k;
    if (rows <= 4) { /* towards a panel's end, ask for the beginning of the next group's */
        int64_t main = steps > FMA_AHEAD / 64 ? steps - FMA_AHEAD / 64 : 0;
        fma_steps(rows, panels, t, 0, main, a, b, panel_stride, FMA_AHEAD, sum);
        fma_steps(rows, panels, t, main, steps, a, b, panel_stride,
                  FMA_AHEAD + (panels - 1) * panel_stride, sum);
    } else {
        fma_steps(rows, panels, t, 0, steps, a, b, panel_stride, 0, sum);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            vf_store(c + r * ldc + v * VF_WIDTH, sum[r][v]);
        }
    }
}

/* Not inlined: each of these is a register allocation problem of its own. */
#define FMA_TILE(r)                                                                                \
    static __attribute__((noinline)) void fma_tile_##r(                                            \
        int panels, int64_t k, const float *a, const char *b, enum dtype t, int64_t stride,        \
        float *c, int64_t ldc, bool load) {                                                        \
        if (panels == 1 && t == DT_F32)                                                            \
            fma_tile_as(r, 1, DT_F32, k, a, b, stride, c, ldc, load);                              \
        else if (panels == 1)                                                                      \
            fma_tile_as(r, 1, DT_BF16, k, a, b, stride, c, ldc, load);                             \
        else if (t == DT_F32)                                                                      \
            fma_tile_as(r, fma_panels(r), DT_F32, k, a, b, stride, c, ldc, load);                  \
        else                                                                                       \
            fma_tile_as(r, fma_panels(r), DT_BF16, k, a, b, stride, c, ldc, load);                 \
    }
FMA_TILE(1)
FMA_TILE(2)
#if FMA_STRIP > 2
FMA_TILE(4)
#endif
#if FMA_STRIP == 6
FMA_TILE(6)
#elif FMA_STRIP == 12
FMA_TILE(8)
FMA_TILE(12)
#endif

static void fma_tile(int rows, int panels, int64_t k, const void *a, const void *b,
                     enum dtype b_type, int64_t panel_stride, float *c, int64_t ldc, bool load) {
    switch (rows) {
    case 1:
        fma_tile_1(panels, k, a, b, b_type, panel_stride, c, ldc, load);
        break;
    case 2:
        fma_tile_2(panels, k, a, b, b_type, panel_stride, c, ldc, load);
        break;
#if FMA_STRIP > 2
    case 4:
        fma_tile_4(panels, k, a, b, b_type, panel_stride, c, ldc, load);
        break;
#endif
#if FMA_STRIP == 6
    case 6:
        fma_tile_6(panels, k, a, b, b_type, panel_stride, c, ldc, load);
        break;
#elif FMA_STRIP == 12
    case 8:
        fma_tile_8(panels, k, a, b, b_type, panel_stride, c, ldc, load);
        break;
    case 12:
        fma_tile_12(panels, k, a, b, b_type, panel_stride, c, ldc, load);
        break;
#endif
    default:
        break;
    }
}

static void fma_nothing(void) {
}

static const struct gemm_path fma_path = {
    .a_type = DT_F32,
    .strip = FMA_STRIP,
    .k_multiple = 2,
    .k_chunk = 1024,
    .panel_bytes = 384 << 10,
    .strip_rows = fma_strip_rows,
    .strip_panels = fma_strip_panels,
    .pack_a = pack_a_fma,
    .tile = fma_tile,
    .begin = fma_nothing,
    .end = fma_nothing,
};

#endif
