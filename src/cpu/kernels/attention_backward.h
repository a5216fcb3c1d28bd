/* The backward of flash attention on a block of query rows and a block of keys: what it is given,
 * what a tile of rows sees, and what becomes of its scores. See attention_backward.c. */
#ifndef CPU_KERNELS_ATTENTION_BACKWARD_H
#define CPU_KERNELS_ATTENTION_BACKWARD_H

#include <math.h>
#include <stdatomic.h>

#include "cpu/kernels/attention_amx.h"
#include "cpu/kernels/attention_score.h"

#define ROW_BLOCK 48 /* rows of a block: a multiple of every TILE_ROWS */
#if AMX_TILES
#define ROW_BLOCK_AMX 128 /* sums over rows are then four tiles long */
#define MOST_STEP AMX_STEP
#else
#define MOST_STEP TILE_ROWS
#endif
#define WAVE_UNITS 256
#define WAVE_BYTES (24 << 20)
#define SERIAL_FLOPS 4e5

struct unit {
    int64_t sequence, kv_head;
    int64_t rows, length, row_blocks;
    float *q, *dout, *dq;  /* [row_blocks * row_block, ld]; with AMX q and dout are packed bf16 */
    float *lse, *delta;    /* lse in base 2; +inf for a row that sees nothing */
    int32_t *seen;         /* plain: keys [0, seen) are visible; ascending; 0 for the padding */
    _Atomic int32_t *next; /* [row_blocks]: the key block that is to add to dq */
};

struct backward {
    struct attention_call c;
    int64_t group, width, ld;
    int64_t row_block, step; /* rows of a block and of a tile of scores */
    bool amx;                /* products on AMX tiles; q_factor is then not in q */
    float q_factor, score_factor, softcap, softcap_out, keep_factor, dk_factor;
    bool adjusted;  /* softcap, ALiBi, bias or dropout */
    bool bias_once; /* each element of dbias is one task's alone, and its dS */
    uint32_t drop_threshold;
    struct philox dropout;
    struct unit unit[WAVE_UNITS];
    int64_t units, interleave, most_blocks; /* most_blocks: key blocks of the longest unit */
    int64_t next_sequence, next_head;
    char *worker, *memory;
    double *dsink; /* [H] */
    int64_t worker_bytes, memory_bytes;
};

/* A worker's memory for one key block. With AMX keys_t, values_t and keys are bf16, packed. */
struct block {
    float *keys_t, *values_t; /* [KEY_BLOCK / PANEL][d][PANEL] */
    float *keys;              /* [width / PANEL][KEY_BLOCK][PANEL] */
    float *dk, *dv;           /* [KEY_BLOCK, width] */
    float *p, *ds;            /* [ROW_BLOCK, KEY_BLOCK]; with AMX [AMX_STEP, KEY_BLOCK] */
    char *strips;             /* with AMX: attention_backward_amx.h */
};

static void unit_row(const struct backward *f, const struct unit *u, int64_t r, int64_t *n,
                     int64_t *head) {
    *n = f->c.q_offsets[u->sequence] + r / f->group;
    *head = u->kv_head * f->group + r % f->group;
}

/* The rows of a block. */
static struct row_range block_rows(const struct backward *f, const struct unit *u, int64_t block) {
    int64_t begin = block * f->row_block;
    return (struct row_range){u->sequence, u->kv_head, f->group, begin,
                              min_i64(f->row_block, u->rows - begin)};
}

/* Which keys of a block a tile of rows sees: none outside [from, to) (empty: from = to = 0); mask:
 * NULL where `seen` says all. */
struct extent {
    int64_t from, to;
    const uint64_t *mask;
    uint64_t words[MOST_STEP];
};

/* What happens to the scores. */
enum scores {
    SCORES_PLAIN,
    SCORES_ANY,
    SCORES_BIAS /* as any, but dS before the softcap: the gradient of the bias */
};

/* From scores in p and dP in ds (vectors [from, to), from even): probabilities (those that dropout
 * leaves) and dS; zero where unseen and in the rest of KEY_BLOCK. Row r of u, keys from j0. */
SIMD void gradient_row(enum scores kind, const struct backward *f, const struct unit *u, int64_t r,
                       int64_t j0, int64_t from, int64_t to, const uint64_t *mask, float *p,
                       float *ds) {
    int64_t visible = u->seen[r] - j0;
    vf lse = vf_set(u->lse[r]), delta = vf_set(u->delta[r]), keep = vf_set(f->keep_factor);
    vi limit = vi_set((int32_t)min_i64(max_i64(visible, 0), KEY_BLOCK));
    vi lane = vi_iota() + vi_set((int32_t)(from * VF_WIDTH));
    vf slope = vf_zero();
    vi distance = lane;
    uint64_t element = 0;
    vi drop[2] = {lane, lane};
    int64_t n = 0, head = 0;
    const bool plain = kind == SCORES_PLAIN;
    if (!plain) {
        unit_row(f, u, r < u->rows ? r : 0, &n, &head);
        if (f->drop_threshold)
            element = attention_dropout_element(&f->c, head, n, j0);
        if (f->c.slopes.data) {
            int64_t first = f->c.q_offsets[u->sequence];
            int64_t ahead = attention_position(&f->c, u->sequence);
            slope = vf_set(-(float)LOG2E * ((const float *)f->c.slopes.data)[head]);
            distance = vi_set((int32_t)(ahead + (n - first) - j0)) - lane;
        }
        n -= f->c.q_offsets[u->sequence];
    }
    for (int64_t v = 0; v < from; v++) {
        vf_store(p + v * VF_WIDTH, vf_zero());
        vf_store(ds + v * VF_WIDTH, vf_zero());
    }
    int64_t v = from;
    for (; v < to; v++) {
        vf s = vf_load(p + v * VF_WIDTH), g = vf_load(ds + v * VF_WIDTH), inner = s;
#if AMX_TILES
        s *= vf_set(f->score_factor);
#endif
        if (!plain && f->softcap > 0) {
            vf t = vf_tanh(s);
            s = t * vf_set(f->softcap_out);
            inner = vf_fma(-t, t, vf_set(1.0f));
        }
        if (!plain) {
            s = vf_fma(slope, vf_abs(vf_from_vi(distance)), s);
            distance -= vi_set(VF_WIDTH);
            if (f->c.bias.data) {
                int64_t j = j0 + v * VF_WIDTH;
                s = add_bias(&f->c.bias, head, n, j, u->length - j, s);
            }
        }
        vf x = vf_exp2(s - lse);
        x = vf_select(mask ? mask_lanes(*mask, v) : lane < limit, x, vf_zero());
        lane += vi_set(VF_WIDTH);
        vf kept = x;
        if (!plain && f->drop_threshold) {
            if (v % 2 == 0)
                dropout_masks(&f->dropout, element + (uint64_t)(v * VF_WIDTH), f->drop_threshold,
                              drop);
            kept = vf_select(drop[v % 2], x, vf_zero());
            g = vf_select(drop[v % 2], g * keep, vf_zero());
        }
        vf d = x * (g - delta);
        if (kind == SCORES_ANY && f->softcap > 0)
            d *= inner;
        vf_store(p + v * VF_WIDTH, kept);
        vf_store(ds + v * VF_WIDTH, d);
    }
    for (; v < KEY_BLOCK / VF_WIDTH; v++) {
        vf_store(p + v * VF_WIDTH, vf_zero());
        vf_store(ds + v * VF_WIDTH, vf_zero());
    }
}

/* The extent of the tile of rows from r on of u in the block of `keys` keys from j0 on. */
static void tile_extent(const struct backward *f, const struct unit *u, int64_t r, int64_t j0,
                        int64_t keys, struct extent *e) {
    e->from = e->to = 0;
    e->mask = NULL;
    if (f->c.plain) {
        int64_t seen = 0;
        for (int64_t i = r; i < r + f->step; i++)
            seen = max_i64(seen, u->seen[i]);
        e->to = max_i64(min_i64(seen - j0, keys), 0);
        return;
    }
    struct row_range rows = {u->sequence, u->kv_head, f->group, r, min_i64(f->step, u->rows - r)};
    bool full;
    if (rows.count <= 0)
        return;
    uint64_t any = range_masks(&f->c, &rows, j0, keys, e->words, &full);
    if (any == 0)
        return;
    e->from = __builtin_ctzll(any);
    e->to = 64 - __builtin_clzll(any);
    e->mask = e->words;
    for (int64_t i = 0; i < f->step; i++)
        e->words[i] = i >= rows.count ? 0 : full ? any : e->words[i];
}

#endif
