/* Attention's backward products on AMX tiles, for q, k, v and dO in bf16.
 *
 * Scores and dP are made as in the forward, strips of 32 rows at a time. P and dS are rounded to
 * bf16 and become strips too: dS as it is, for dQ += dS K, and both transposed, strips of 32 keys,
 * for dV += P^T dO and dK += dS^T q, where dO and q are pairs of rows.
 *
 *   q and dO of a block of rows   strips [rows / 32][width / 32][2][16][32], then
 *                                 pairs  [width / 16][rows / 2][16][2]
 *   K, V over channels, K over keys: as amx_pack_keys and amx_pack_values leave them
 *   dS                            [rows / 32][KEY_BLOCK / 32][2][16][32]
 *   P^T, dS^T                     [KEY_BLOCK / 32][rows / 32][2][16][32]
 *
 * rows is ROW_BLOCK_AMX. A pair of blocks at d = 64 is 320 products of tiles (5120 cycles) beside
 * 1024 vectors of scores. */
#ifndef CPU_KERNELS_ATTENTION_BACKWARD_AMX_H
#define CPU_KERNELS_ATTENTION_BACKWARD_AMX_H

#include "cpu/kernels/attention_backward.h"

#if AMX_TILES

#define STRIP_BYTES (AMX_STEP * KEY_BLOCK * 2) /* of 32 rows and KEY_BLOCK keys */
#define STRIPS_BYTES (ROW_BLOCK_AMX * KEY_BLOCK * 2)
#define AMX_ROW_STRIPS (ROW_BLOCK_AMX / AMX_STEP)

/* What lies in block.strips. */
static char *p_strip(const struct block *b) {
    return b->strips;
}
static char *ds_strips(const struct block *b) {
    return b->strips + STRIP_BYTES;
}
static char *p_transposed(const struct block *b) {
    return ds_strips(b) + STRIPS_BYTES;
}
static char *ds_transposed(const struct block *b) {
    return p_transposed(b) + STRIPS_BYTES;
}
static int64_t strips_size(void) {
    return STRIP_BYTES + 3 * STRIPS_BYTES;
}

/* Rows of x, a block of u's, into `out` as strips and as pairs. */
static void amx_pack_rows(const struct backward *f, const struct unit *u, const struct tensor *x,
                          int64_t block, char *out) {
    const int64_t d = f->c.width, width = f->width, r0 = block * ROW_BLOCK_AMX;
    char *pairs = out + ROW_BLOCK_AMX * width * 2;
    const void *row[2];
    for (int64_t r = 0; r < ROW_BLOCK_AMX; r++) {
        row[r % 2] = NULL;
        if (r0 + r < u->rows) {
            int64_t n, head;
            unit_row(f, u, r0 + r, &n, &head);
            row[r % 2] = element(x, n, head);
        }
        char *strip = out + r / AMX_STEP * AMX_STEP * width * 2;
        amx_pack_query(strip, AMX_STEP, r % AMX_STEP, row[r % 2], d, width);
        if (r % 2 == 1)
            amx_pack_pair(pairs + (r - 1) * 32, ROW_BLOCK_AMX * 32, row[0], row[1], d, width);
    }
}

/* The strips and pairs of a block of u's rows, of what lies from `x` (u->q or u->dout) on. */
static char *amx_rows(const struct backward *f, const float *x, int64_t block) {
    return (char *)(uintptr_t)(x + block * ROW_BLOCK_AMX * f->ld);
}
static char *amx_row_pairs(const struct backward *f, const float *x, int64_t block) {
    return amx_rows(f, x, block) + ROW_BLOCK_AMX * f->width * 2;
}

/* Scores (without q's factor) and dP of strip s and the keys [from, to), multiples of 32. */
static void amx_strip_scores(const struct backward *f, const struct unit *u, const struct block *b,
                             int64_t block, int64_t s, int64_t from, int64_t to) {
    const int64_t width = f->width, at = s * AMX_STEP * width * 2;
    amx_scores(AMX_STEP, amx_rows(f, u->q, block) + at, (const char *)b->keys_t, from, to, width,
               b->p);
    amx_scores(AMX_STEP, amx_rows(f, u->dout, block) + at, (const char *)b->values_t, from, to,
               width, b->ds);
}

/* A strip [KEY_BLOCK / 32][2][16][32] of 32 rows as a part of strips of keys: strip s of each. */
static void amx_transpose_strip(const char *strip, int64_t s, char *out) {
    for (int64_t j = 0; j < KEY_BLOCK; j += 16) {
        const char *from = strip + j / 32 * (AMX_STEP * 64) + j % 32 * 2;
        char *to = out + (j / 32 * AMX_ROW_STRIPS + s) * (2 * AMX_TILE) + j % 32 / 16 * AMX_TILE;
        vu x[VF_WIDTH];
#pragma GCC unroll 16
        for (int i = 0; i < VF_WIDTH; i++)
            x[i] = vu_pair((const uint16_t *)(const void *)(from + 2 * i * 64),
                           (const uint16_t *)(const void *)(from + (2 * i + 1) * 64), VF_WIDTH);
        vu_transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < VF_WIDTH; i++)
            vu_store(to + i * 64, x[i]);
    }
}

/* P and dS of strip s, in b->p and b->ds, to the operands of the products that follow. */
static void amx_pack_gradients(const struct block *b, int64_t s) {
    char *ds = ds_strips(b) + s * STRIP_BYTES;
    amx_pack_probabilities(AMX_STEP, b->p, 0, KEY_BLOCK, p_strip(b));
    amx_transpose_strip(p_strip(b), s, p_transposed(b));
    amx_pack_probabilities(AMX_STEP, b->ds, 0, KEY_BLOCK, ds);
    amx_transpose_strip(ds, s, ds_transposed(b));
}

/* dk and dv of the keys [k, k + 32) from the rows [r, r + n) of a block, multiples of 32. */
static void amx_add_keys(const struct backward *f, const struct unit *u, const struct block *b,
                         int64_t block, int64_t r, int64_t n, int64_t k) {
    const int64_t width = f->width, stride = ROW_BLOCK_AMX * 32;
    const int64_t a = (k / 32 * AMX_ROW_STRIPS + r / AMX_STEP) * (2 * AMX_TILE);
    const char *dout = amx_row_pairs(f, u->dout, block) + r * 32;
    const char *q = amx_row_pairs(f, u->q, block) + r * 32;
    for (int64_t t = 0; t < width; t += 32) {
        const int64_t at = t / 16 * stride;
        amx_2x2(n / 32, p_transposed(b) + a, dout + at, stride, b->dv + k * width + t, width, true);
        amx_2x2(n / 32, ds_transposed(b) + a, q + at, stride, b->dk + k * width + t, width, true);
    }
}

/* dq of strip s, rows ld apart, += dS K over the keys [from, to). */
static void amx_add_queries(const struct backward *f, const struct block *b, int64_t s,
                            int64_t from, int64_t to, float *dq) {
    amx_products(AMX_STEP, ds_strips(b) + s * STRIP_BYTES, (const char *)b->keys, from / 32 * 32,
                 round_up(to, 32), f->width, dq, f->ld);
}

#endif
#endif
