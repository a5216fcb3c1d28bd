/* bf16 products on AMX tiles: 2 x 2 accumulators of 16 x 16 outputs, or 1 x 4 for up to 16 rows.
 *
 *   strip   [k/32][rows/16][16][32] bf16, rows = 16 or 32: A tiles one after the other
 *   panel   [k/2][16][2] bf16: every 1 KB is a B tile
 *
 * A strip's surplus rows are left as they are in memory (rows do not see each other, and the
 * products treat denormals as zero); its surplus k are zeros. */
#ifndef CPU_KERNELS_GEMM_AMX_H
#define CPU_KERNELS_GEMM_AMX_H

#include "cpu/kernels/amx.h"
#include "cpu/kernels/gemm_pack.h"

#if AMX_TILES

#define AMX_STRIP 32
#define TILE_K 32 /* bf16 of a tile's row */
#define TILE_BYTES 1024

static int amx_strip_rows(int64_t rows) {
    return rows <= 16 ? 16 : 32;
}
static int amx_strip_panels(int rows) {
    return rows <= 16 ? 4 : 2;
}

/* Rows [row, row + count) to tiles, `rows` of them apart in k. */
static void amx_pack_straight(const struct gemm_operand *a, int64_t row, int64_t count, int rows,
                              int64_t k0, int64_t k1, char *out) {
    const char *base = (const char *)a->data + (row * a->ld + k0) * 2;
    for (int64_t k = 0; k < k1 - k0; k += TILE_K) {
        int64_t bytes = (k1 - k0 - k) * 2;
        for (int64_t r = 0; r < count; r++)
            vu_store(out + r * 64, vu_load_bytes(base + r * a->ld * 2 + k * 2, bytes));
        out += rows * 64;
    }
}

/* 16 columns of 32 rows of memory: pairs of rows make units, a transpose makes them rows of a
 * tile. */
static void amx_pack_transposed(const struct gemm_operand *a, int64_t at, int64_t count, int64_t k,
                                int64_t k1, char *tile) {
    vu r[VF_WIDTH];
    for (int i = 0; i < VF_WIDTH; i++) {
        int64_t even = k + 2 * i, odd = even + 1;
        const uint16_t *p = (const uint16_t *)a->data + even * a->ld + at;
        const uint16_t *low = even < k1 ? p : NULL, *high = odd < k1 ? p + a->ld : NULL;
        r[i] = count >= VF_WIDTH ? vu_pair(low, high, VF_WIDTH) : vu_pair(low, high, (int)count);
    }
    vu_transpose(r);
    for (int i = 0; i < VF_WIDTH; i++)
        vu_store(tile + i * 64, r[i]);
}

static void pack_a_amx(const struct gemm_operand *a, int64_t first, int64_t last, int64_t begin,
                       int64_t end, int64_t k0, int64_t k1, void *out, int64_t strip_bytes) {
    if (!a->transposed) {
        for (int64_t s = begin; s < end; s++) {
            int64_t row = first + s * AMX_STRIP;
            int64_t count = last - row < AMX_STRIP ? last - row : AMX_STRIP;
            amx_pack_straight(a, row, count, amx_strip_rows(count), k0, k1,
                              (char *)out + (s - begin) * strip_bytes);
        }
        return;
    }
    for (int64_t k = k0; k < k1; k += TILE_K) {
        for (int64_t s = begin; s < end; s++) {
            int64_t row = first + s * AMX_STRIP;
            int64_t count = last - row < AMX_STRIP ? last - row : AMX_STRIP;
            int rows = amx_strip_rows(count);
            char *o = (char *)out + (s - begin) * strip_bytes + (k - k0) / TILE_K * rows * 64;
            for (int64_t i = 0; i < count; i += 16)
                amx_pack_transposed(a, row + i, count - i, k, k1, o + i * 64);
        }
    }
}

/* ---------------------------------------------------------------- tiles */

SIMD void amx_prefetch(const char *p) {
    for (int i = 0; i < TILE_BYTES; i += 64)
        __builtin_prefetch(p + i);
}

static void amx_tile_2x2(int64_t tiles, const char *a, const char *b, int64_t stride, float *c,
                         int64_t ldc, bool load) {
    float *c1 = c + 16 * ldc;
    const char *b1 = b + stride;
    int64_t bytes = ldc * 4;
    if (load) {
        AMX_LOAD(0, c, bytes);
        AMX_LOAD(1, c + 16, bytes);
        AMX_LOAD(2, c1, bytes);
        AMX_LOAD(3, c1 + 16, bytes);
    } else {
        AMX_ZERO(0);
        AMX_ZERO(1);
        AMX_ZERO(2);
        AMX_ZERO(3);
    }
    for (int64_t i = 0; i < tiles; i++) {
        AMX_LOAD(6, b, 64);
        AMX_LOAD(4, a, 64);
        AMX_DOT_BF16(0, 4, 6);
        AMX_LOAD(7, b1, 64);
        AMX_DOT_BF16(1, 4, 7);
        AMX_LOAD(5, a + TILE_BYTES, 64);
        AMX_DOT_BF16(2, 5, 6);
        AMX_DOT_BF16(3, 5, 7);
        a += 2 * TILE_BYTES;
        b += TILE_BYTES;
        b1 += TILE_BYTES;
    }
    AMX_STORE(0, c, bytes);
    AMX_STORE(1, c + 16, bytes);
    AMX_STORE(2, c1, bytes);
    AMX_STORE(3, c1 + 16, bytes);
}

static void amx_tile_2x1(int64_t tiles, const char *a, const char *b, float *c, int64_t ldc,
                         bool load) {
    float *c1 = c + 16 * ldc;
    int64_t bytes = ldc * 4;
    if (load) {
        AMX_LOAD(0, c, bytes);
        AMX_LOAD(2, c1, bytes);
    } else {
        AMX_ZERO(0);
        AMX_ZERO(2);
    }
    for (int64_t i = 0; i < tiles; i++) {
        AMX_LOAD(6, b, 64);
        AMX_LOAD(4, a, 64);
        AMX_LOAD(5, a + TILE_BYTES, 64);
        AMX_DOT_BF16(0, 4, 6);
        AMX_DOT_BF16(2, 5, 6);
        a += 2 * TILE_BYTES;
        b += TILE_BYTES;
    }
    AMX_STORE(0, c, bytes);
    AMX_STORE(2, c1, bytes);
}

/* Few rows: what counts is that the weights stream. Near the end, `ahead` reaches into the next
 * group of panels. */
static void amx_tile_1x4(int64_t tiles, const char *a, const char *b, int64_t stride, float *c,
                         int64_t ldc, bool load) {
    int64_t bytes = ldc * 4;
    if (load) {
        AMX_LOAD(0, c, bytes);
        AMX_LOAD(1, c + 16, bytes);
        AMX_LOAD(2, c + 32, bytes);
        AMX_LOAD(3, c + 48, bytes);
    } else {
        AMX_ZERO(0);
        AMX_ZERO(1);
        AMX_ZERO(2);
        AMX_ZERO(3);
    }
    for (int64_t i = 0; i < tiles; i++) {
        int64_t ahead = i + 2 < tiles ? 2 * TILE_BYTES : 2 * TILE_BYTES + 3 * stride;
        AMX_LOAD(4, a, 64);
        AMX_LOAD(5, b, 64);
        AMX_LOAD(6, b + stride, 64);
        AMX_LOAD(7, b + 2 * stride, 64);
        amx_prefetch(b + ahead);
        AMX_DOT_BF16(0, 4, 5);
        AMX_LOAD(5, b + 3 * stride, 64);
        amx_prefetch(b + stride + ahead);
        AMX_DOT_BF16(1, 4, 6);
        amx_prefetch(b + 2 * stride + ahead);
        AMX_DOT_BF16(2, 4, 7);
        amx_prefetch(b + 3 * stride + ahead);
        AMX_DOT_BF16(3, 4, 5);
        a += TILE_BYTES;
        b += TILE_BYTES;
    }
    AMX_STORE(0, c, bytes);
    AMX_STORE(1, c + 16, bytes);
    AMX_STORE(2, c + 32, bytes);
    AMX_STORE(3, c + 48, bytes);
}

static void amx_tile_1x1(int64_t tiles, const char *a, const char *b, float *c, int64_t ldc,
                         bool load) {
    if (load)
        AMX_LOAD(0, c, ldc * 4);
    else
        AMX_ZERO(0);
    for (int64_t i = 0; i < tiles; i++) {
        AMX_LOAD(4, a, 64);
        AMX_LOAD(5, b, 64);
        AMX_DOT_BF16(0, 4, 5);
        a += TILE_BYTES;
        b += TILE_BYTES;
    }
    AMX_STORE(0, c, ldc * 4);
}

static void amx_tile(int rows, int panels, int64_t k, const void *a, const void *b,
                     enum dtype b_type, int64_t panel_stride, float *c, int64_t ldc, bool load) {
    (void)b_type;
    int64_t tiles = k / TILE_K;
    if (rows == 32 && panels == 2)
        amx_tile_2x2(tiles, a, b, panel_stride, c, ldc, load);
    else if (rows == 32)
        amx_tile_2x1(tiles, a, b, c, ldc, load);
    else if (panels == 4)
        amx_tile_1x4(tiles, a, b, panel_stride, c, ldc, load);
    else
        amx_tile_1x1(tiles, a, b, c, ldc, load);
}

static const struct gemm_path amx_path = {
    .a_type = DT_BF16,
    .strip = AMX_STRIP,
    .k_multiple = TILE_K,
    .k_chunk = 384, /* 24 KB of A and 24 KB of two panels in a first cache of 48 KB */
    .panel_bytes = 768 << 10,
    .strip_rows = amx_strip_rows,
    .strip_panels = amx_strip_panels,
    .pack_a = pack_a_amx,
    .tile = amx_tile,
    .begin = amx_begin,
    .end = amx_end,
};

#endif
#endif
