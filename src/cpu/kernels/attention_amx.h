/* Attention's products on AMX tiles, for q, k and v in bf16 (attention_backward_amx.h has more).
 *
 *   q, P      strips of `step` rows, 32 or 16 (decoding): [k / 32][step / 16][16][32] bf16, A tiles
 *   K         panels of 16 keys: [KEY_BLOCK / 16][width / 2][16][2], B tiles of 32 channels
 *   V         panels of 16 channels: [width / 16][KEY_BLOCK / 2][16][2], B tiles of 32 keys
 *
 * width is d rounded up to 32; what is not there is zeros. An accumulator tile gets its products in
 * the order of channels (keys), 32 at a time, whatever the step, and a row of a tile knows nothing
 * of the other rows: the bits of a row do not depend on which strip it stands in. Scores come
 * without the factor of q, which the softmax multiplies in. */
#ifndef CPU_KERNELS_ATTENTION_AMX_H
#define CPU_KERNELS_ATTENTION_AMX_H

#include "cpu/kernels/amx.h"
#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/units.h"

#if AMX_TILES

#define AMX_STEP 32        /* rows of a strip */
#define AMX_STEP_DIRECT 16 /* with few rows */
#define AMX_TILE 1024      /* bytes */

/* Row r of a strip, d bf16 channels (NULL: zeros). */
static void amx_pack_query(char *strip, int64_t step, int64_t r, const void *row, int64_t d,
                           int64_t width) {
    char *to = strip + (r / 16 * 16 + r % 16) * 64;
    for (int64_t t = 0; t < width; t += 32, to += step * 64)
        vu_store(to, row && t < d ? vu_load_bytes((const char *)row + 2 * t, 2 * (d - t))
                                  : (vu)vf_zero());
}

SIMD void amx_prefetch_row(const void *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch((const char *)row + at);
}

/* K of a block: panels up to the one that holds the last key, an even number of them. */
static void amx_pack_keys(char *out, const struct row_list *list, int64_t d, int64_t width) {
    for (int64_t j = 0; j < round_up(list->count, 32); j += 16, out += width * 32)
        for (int64_t t = 0; t < width; t += 32) {
            vu x[VF_WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < VF_WIDTH; i++) {
                const char *row = list->row[j + i];
                x[i] = (vu)vf_zero();
                if (j + i < list->count && t < d)
                    x[i] = vu_load_bytes(row + 2 * t, 2 * (d - t));
                __builtin_prefetch((const char *)list->row[j + PREFETCH_ROWS + i] + 2 * t);
            }
            vu_transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < VF_WIDTH; i++)
                vu_store(out + (t / 2 + i) * 64, x[i]);
        }
}

/* Two rows of d channels (NULL: zeros) as a pair: 16 channels each `stride` bytes. */
SIMD void amx_pack_pair(char *out, int64_t stride, const void *first, const void *second, int64_t d,
                        int64_t width) {
    const uint16_t *low = first, *high = second;
    for (int64_t t = 0; t < width; t += 16, out += stride) {
        const uint16_t *a = low && t < d ? low + t : NULL, *b = high && t < d ? high + t : NULL;
        vu x = t + 16 <= d ? vu_pair(a, b, 16) : vu_pair(a, b, (int)min_i64(16, d - t));
        vu_store(out, x);
    }
}

/* V of a block: pairs of keys up to a multiple of 32. */
static void amx_pack_values(char *out, const struct row_list *list, int64_t d, int64_t width) {
    for (int64_t j = 0; j < round_up(list->count, 32); j += 2) {
        amx_prefetch_row(list->row[j + PREFETCH_ROWS], 2 * d);
        amx_prefetch_row(list->row[j + 1 + PREFETCH_ROWS], 2 * d);
        amx_pack_pair(out + j * 32, KEY_BLOCK * 32, j < list->count ? list->row[j] : NULL,
                      j + 1 < list->count ? list->row[j + 1] : NULL, d, width);
    }
}

/* c [32, 32] = or += a b: `tiles` steps of 32, b's two panels `stride` bytes apart. */
SIMD void amx_2x2(int64_t tiles, const char *a, const char *b, int64_t stride, float *c,
                  int64_t ldc, bool add) {
    float *c1 = c + 16 * ldc;
    int64_t bytes = ldc * 4;
    if (add) {
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
    for (int64_t i = 0; i < tiles; i++, a += 2 * AMX_TILE, b += AMX_TILE) {
        AMX_LOAD(6, b, 64);
        AMX_LOAD(4, a, 64);
        AMX_DOT_BF16(0, 4, 6);
        AMX_LOAD(7, b + stride, 64);
        AMX_DOT_BF16(1, 4, 7);
        AMX_LOAD(5, a + AMX_TILE, 64);
        AMX_DOT_BF16(2, 5, 6);
        AMX_DOT_BF16(3, 5, 7);
    }
    AMX_STORE(0, c, bytes);
    AMX_STORE(1, c + 16, bytes);
    AMX_STORE(2, c1, bytes);
    AMX_STORE(3, c1 + 16, bytes);
}

/* The same for 16 rows. */
SIMD void amx_1x2(int64_t tiles, const char *a, const char *b, int64_t stride, float *c,
                  int64_t ldc, bool add) {
    int64_t bytes = ldc * 4;
    if (add) {
        AMX_LOAD(0, c, bytes);
        AMX_LOAD(1, c + 16, bytes);
    } else {
        AMX_ZERO(0);
        AMX_ZERO(1);
    }
    for (int64_t i = 0; i < tiles; i++, a += AMX_TILE, b += AMX_TILE) {
        AMX_LOAD(4, a, 64);
        AMX_LOAD(6, b, 64);
        AMX_DOT_BF16(0, 4, 6);
        AMX_LOAD(7, b + stride, 64);
        AMX_DOT_BF16(1, 4, 7);
    }
    AMX_STORE(0, c, bytes);
    AMX_STORE(1, c + 16, bytes);
}

/* Scores s [step, KEY_BLOCK] of a strip and the keys [from, to) of a block, multiples of 32. */
static void amx_scores(int64_t step, const char *q, const char *keys, int64_t from, int64_t to,
                       int64_t width, float *s) {
    for (int64_t j = from; j < to; j += 32) {
        const char *b = keys + j * width * 2;
        if (step == AMX_STEP)
            amx_2x2(width / 32, q, b, width * 32, s + j, KEY_BLOCK, false);
        else
            amx_1x2(width / 32, q, b, width * 32, s + j, KEY_BLOCK, false);
    }
}

/* Probabilities to bf16, as a strip. */
static void amx_pack_probabilities(int64_t step, const float *s, int64_t from, int64_t to,
                                   char *strip) {
    for (int64_t j = from; j < to; j += 32)
        for (int64_t i = 0; i < step; i++) {
            uint16_t *out = (uint16_t *)(void *)(strip + (j / 32 * step + i) * 64);
            vf a = vf_load(s + i * KEY_BLOCK + j), b = vf_load(s + i * KEY_BLOCK + j + 16);
#if SIMD_AVX512_BF16
            *(vi_memory *)out = (vi_memory)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
            vf_store_bf16_n(out, a, VF_WIDTH);
            vf_store_bf16_n(out + 16, b, VF_WIDTH);
#endif
        }
}

/* c [step, width] (rows ldc apart) += a b over the keys [from, to), multiples of 32: a is strips, b
 * pairs of keys. */
NOT_ALL_USE void amx_products(int64_t step, const char *strip, const char *pairs, int64_t from,
                              int64_t to, int64_t width, float *c, int64_t ldc) {
    const char *a = strip + from * step * 2;
    int64_t tiles = (to - from) / 32, stride = KEY_BLOCK * 32;
    for (int64_t t = 0; t < width; t += 32) {
        const char *b = pairs + t / 16 * stride + from * 32;
        if (step == AMX_STEP)
            amx_2x2(tiles, a, b, stride, c + t, ldc, true);
        else
            amx_1x2(tiles, a, b, stride, c + t, ldc, true);
    }
}

/* o [step, width] = correction o + P V over the keys [from, to). */
NOT_ALL_USE void amx_add_values(int64_t step, const char *strip, const char *values, int64_t from,
                                int64_t to, int64_t width, const float *correction, float *o) {
    for (int64_t i = 0; i < step; i++)
        for (int64_t t = 0; t < width && correction[i] != 1.0f; t += VF_WIDTH)
            vf_store(o + i * width + t, vf_load(o + i * width + t) * vf_set(correction[i]));
    amx_products(step, strip, values, from, to, width, o, width);
}

#endif

/* Around the work of a task: tiles are configured per thread. */
NOT_ALL_USE void tiles_begin(bool amx) {
    (void)amx;
#if AMX_TILES
    if (amx)
        amx_begin();
#endif
}
NOT_ALL_USE void tiles_end(bool amx) {
    (void)amx;
#if AMX_TILES
    if (amx)
        amx_end();
#endif
}

#endif
