/* The forward of flash attention on a block of query rows: what it is given, the memory of a
 * worker, the softmax of one step, and which keys a step needs. See attention_forward.c. */
#ifndef CPU_KERNELS_ATTENTION_STEP_H
#define CPU_KERNELS_ATTENTION_STEP_H

#include <math.h>

#include "cpu/kernels/attention_amx.h"
#include "cpu/kernels/attention_score.h"

#define ROW_BLOCK 96 /* a multiple of every TILE_ROWS and of AMX_STEP */
#if AMX_TILES
#define MOST_STEP AMX_STEP /* rows of a step */
#else
#define MOST_STEP TILE_ROWS
#endif
#define WAVE_UNITS 256
#define SERIAL_FLOPS 4e5 /* below this a thread costs more than it brings */
#define GRANULE 32       /* keys of a step of direct units */

struct unit {
    int64_t sequence, kv_head, heads; /* several key/value heads: direct */
    int64_t rows, length;             /* query rows of a group; keys */
    float *keys, *values;             /* packed (with AMX: bf16); NULL: direct */
    float *partial; /* one softmax state for each task, where splits run in parallel */
    int64_t first_task, first_block;       /* within the wave */
    int64_t row_block, blocks, state_rows; /* rows of a block; blocks; rows of a block's state */
    bool direct;                           /* attention_direct.h; AMX: no */
};

struct forward {
    struct attention_call c;
    int64_t group, width, splits_parallel, row_block;
    float q_factor, softcap, softcap_out, keep_factor;
    bool amx;                /* products on AMX tiles; q_factor is then not in q */
    int64_t step;            /* rows of a step */
    int64_t key_step;        /* keys of one: KEY_BLOCK, or a part of it that the caller wants */
    bool adjusted;           /* softcap, ALiBi or bias */
    bool blocked;            /* the caller chose the tiles: everything goes packed */
    uint32_t drop_threshold; /* 0: no dropout */
    struct philox dropout;
    struct unit unit[WAVE_UNITS];
    int64_t units, tasks, blocks; /* of this wave */
    int64_t next_sequence, next_head;
    char *worker;
    int64_t worker_bytes;
    char *packed, *partial;
    int64_t packed_bytes, partial_bytes;
};

/* The softmax of a block of rows over some keys: o unnormalised [rows, width], m the maximum and l
 * the sum (one partial sum a lane) of 2^(score - m). */
struct state {
    float *o, *m, *l;
};

/* A worker's memory for one block of rows. */
struct rows {
    int64_t count, padded; /* padded to `step` with rows that see nothing */
    int64_t step;
    /* Direct: those of several heads behind one another, `each` of a head, padded to padded_each
     * with rows that see nothing and have row -1. */
    int64_t heads, each, padded_each;
    float *q;      /* [padded, width], times q_factor; with AMX strips of bf16 */
    float *s;      /* scores of a step [MOST_STEP, KEY_BLOCK] */
    float *p;      /* with AMX: the probabilities, a strip of bf16 */
    int64_t *seen; /* no keys from here on are visible; plain: all before are */
    int64_t *row, *position;
    int32_t *head, *index;  /* index: of the row in its sequence */
    struct row_range range; /* all of them */
    int64_t length;         /* keys of the sequence */
    /* If keys are not packed beforehand: a panel of keys (AMX: a block of K and V), at most
     * [KEY_BLOCK, width], and the scores of two blocks [2, ROW_BLOCK, KEY_BLOCK]. */
    float *block, *scores;
    char *copy; /* of GRANULE rows of one head's keys */
    struct state part, total;
};

static int64_t state_floats(int64_t rows, int64_t width) {
    return rows * (width + 1 + VF_WIDTH);
}

static struct state state_at(float *memory, int64_t rows, int64_t width) {
    return (struct state){memory, memory + rows * (width + VF_WIDTH), memory + rows * width};
}

static int64_t worker_size(int64_t width) {
    int64_t bytes = (ROW_BLOCK * width + (2 * MOST_STEP + width + 2 * ROW_BLOCK) * KEY_BLOCK) * 4;
    bytes += ROW_BLOCK * (3 * 8 + 2 * 4);
    bytes += 2 * 4 * state_floats(ROW_BLOCK, width);
    bytes = round_up(bytes, 64) + GRANULE * width * 4;
    return round_up(bytes, 4096) + 64 * 9; /* not a power of two apart */
}

static struct rows rows_at(char *memory, int64_t width) {
    struct rows b = {0};
    b.q = (float *)memory;
    b.block = b.q + ROW_BLOCK * width;
    b.scores = b.block + KEY_BLOCK * width;
    b.s = b.scores + 2 * ROW_BLOCK * KEY_BLOCK;
    b.p = b.s + MOST_STEP * KEY_BLOCK;
    float *state = b.p + MOST_STEP * KEY_BLOCK;
    b.part = state_at(state, ROW_BLOCK, width);
    b.total = state_at(state + state_floats(ROW_BLOCK, width), ROW_BLOCK, width);
    b.seen = (int64_t *)(void *)(state + 2 * state_floats(ROW_BLOCK, width));
    b.row = b.seen + ROW_BLOCK;
    b.position = b.row + ROW_BLOCK;
    b.head = (int32_t *)(b.position + ROW_BLOCK);
    b.index = b.head + ROW_BLOCK;
    b.copy = memory + round_up((char *)(b.index + ROW_BLOCK) - memory, 64);
    return b;
}

/* Row r of b (NULL: zeros) in the layout that the products want. */
static void query_load(const struct forward *f, struct rows *b, int64_t r, const void *row) {
    const struct tensor *q = &f->c.q;
#if AMX_TILES
    if (f->amx) {
        char *strip = (char *)b->q + r / b->step * b->step * f->width * 2;
        amx_pack_query(strip, b->step, r % b->step, row, f->c.width, f->width);
        return;
    }
#endif
    if (row)
        row_to_float(b->q + r * f->width, row, q->dtype, f->c.width, f->width, f->q_factor);
    else
        memset(b->q + r * f->width, 0, (size_t)f->width * 4);
}

/* Rows of a head that go directly: the nearest number that tiles of 1, 2, 4 and 6 make up. */
SIMD int64_t direct_padded(int64_t rows) {
    return rows == 1 ? 1 : round_up(rows, 2);
}

/* Gathers rows [begin, begin + count) of each of a unit's heads. */
static void rows_load(const struct forward *f, const struct unit *u, int64_t begin, int64_t count,
                      struct rows *b) {
    const struct attention_call *c = &f->c;
    int64_t first = c->q_offsets[u->sequence];
    int64_t ahead = u->length - (c->q_offsets[u->sequence + 1] - first);
    b->step = f->step;
#if AMX_TILES
    if (f->amx && !u->keys)
        b->step = AMX_STEP_DIRECT;
#endif
    b->heads = u->heads;
    b->each = count;
    b->padded_each = u->direct ? direct_padded(count) : round_up(count, b->step);
    b->padded = b->padded_each * u->heads;
    b->count = u->direct ? b->padded : count;
    b->length = u->length;
    b->range = (struct row_range){u->sequence, u->kv_head, f->group, begin, count};
    int64_t r = 0;
    for (int64_t k = 0; k < u->heads; k++) {
        int64_t head0 = (u->kv_head + k) * f->group, i = begin / f->group, g = begin % f->group;
        for (int64_t n = 0; n < count; n++, r++) {
            b->row[r] = first + i;
            b->head[r] = (int32_t)(head0 + g);
            b->index[r] = (int32_t)i;
            b->position[r] = ahead + i;
            b->seen[r] = attention_visible(c, u->sequence, i, head0 + g);
            query_load(f, b, r, element(&c->q, first + i, head0 + g));
            if (++g == f->group) {
                g = 0;
                i++;
            }
        }
        for (int64_t n = count; n < b->padded_each; n++, r++) {
            b->row[r] = -1;
            b->head[r] = b->index[r] = 0;
            b->position[r] = b->seen[r] = 0;
            query_load(f, b, r, NULL);
        }
    }
}

/* Whether some row of b may see some key of [j0, j1). */
static bool rows_any(const struct forward *f, const struct rows *b, int64_t j0, int64_t j1) {
    struct row_range range = b->range;
    for (int64_t k = 0; k < b->heads && !f->c.plain; k++, range.kv_head++)
        if (range_any(&f->c, &range, j0, j1))
            return true;
    return f->c.plain;
}

static void state_clear(struct state *s, int64_t rows, int64_t width) {
    memset(s->o, 0, (size_t)(rows * width) * 4);
    memset(s->l, 0, (size_t)(rows * VF_WIDTH) * 4);
    for (int64_t r = 0; r < rows; r++)
        s->m[r] = -INFINITY;
}

/* The natural log-sum-exp of a row whose scores' largest is m (base 2), l the sum of 2^(score - m).
 */
SIMD float row_lse(float m, float l) {
    return (float)(((double)m + (double)log2f(l)) * LN2);
}

/* Softcap, ALiBi and bias on the scores s of one row and the keys from j0 on, vectors [from, to).
 */
static void adjust(const struct forward *f, const struct rows *b, int64_t r, int64_t j0,
                   int64_t from, int64_t to, float *s) {
    if (f->softcap > 0)
        for (int64_t v = from; v < to; v++) {
            vf x = vf_tanh(vf_load(s + v * VF_WIDTH)) * vf_set(f->softcap_out);
            vf_store(s + v * VF_WIDTH, x);
        }
    if (f->c.slopes.data) {
        vf slope = vf_set(-(float)LOG2E * ((const float *)f->c.slopes.data)[b->head[r]]);
        vi distance = vi_set((int32_t)(b->position[r] - j0 - from * VF_WIDTH)) - vi_iota();
        for (int64_t v = from; v < to; v++) {
            vf x = vf_load(s + v * VF_WIDTH);
            vf_store(s + v * VF_WIDTH, vf_fma(slope, vf_abs(vf_from_vi(distance)), x));
            distance -= vi_set(VF_WIDTH);
        }
    }
    if (f->c.bias.data)
        for (int64_t v = from; v < to; v++) {
            int64_t j = j0 + v * VF_WIDTH;
            vf x = vf_load(s + v * VF_WIDTH);
            x = add_bias(&f->c.bias, b->head[r], b->index[r], j, b->length - j, x);
            vf_store(s + v * VF_WIDTH, x);
        }
}

/* One step of the online softmax for rows r0 .. r0 + rows - 1 of b and the keys from j0 on, whose
 * scores (vectors [from, to), from even) are in b->s: they become probabilities, unseen ones 0;
 * correction[i] is what the rows' outputs so far must be multiplied by. mask: a word of visible
 * keys for each row; NULL: those before `seen`. Never inlined: every path runs this code. */
static __attribute__((noinline)) void softmax_step(const struct forward *f, struct rows *b,
                                                   int64_t r0, int64_t rows, int64_t j0,
                                                   int64_t from, int64_t to, const uint64_t *mask,
                                                   float *correction) {
    const vf minus = vf_set(-INFINITY);
    float before[ROW_BLOCK], base[ROW_BLOCK]; /* of all rows first: their latencies overlap */
    for (int64_t i = 0; i < rows; i++) {
        float *s = b->s + i * KEY_BLOCK;
        int64_t r = r0 + i, visible = b->seen[r] - j0;
        if (f->amx)
            for (int64_t v = from; v < to; v++)
                vf_store(s + v * VF_WIDTH, vf_load(s + v * VF_WIDTH) * vf_set(f->q_factor));
        if (f->adjusted)
            adjust(f, b, r, j0, from, to, s);
        if (mask) {
            for (int64_t v = from; v < to; v++)
                vf_store(s + v * VF_WIDTH,
                         vf_select(mask_lanes(mask[i], v), vf_load(s + v * VF_WIDTH), minus));
        } else if (visible < to * VF_WIDTH) {
            vi limit = vi_set((int32_t)max_i64(visible, 0));
            vi lane = vi_iota() + vi_set((int32_t)(from * VF_WIDTH));
            for (int64_t v = from; v < to; v++) {
                vf_store(s + v * VF_WIDTH,
                         vf_select(lane < limit, vf_load(s + v * VF_WIDTH), minus));
                lane += vi_set(VF_WIDTH);
            }
        }
        vf most = minus;
        for (int64_t v = from; v < to; v++)
            most = vf_max(most, vf_load(s + v * VF_WIDTH));
        float m = max_lane(most);
        before[i] = b->part.m[r];
        m = before[i] > m ? before[i] : m;
        b->part.m[r] = m;
        base[i] = m == -INFINITY ? 0.0f : m; /* -inf - 0, never -inf + inf */
    }
    for (int64_t i = 0; i < rows; i += VF_WIDTH) {
        int n = (int)min_i64(VF_WIDTH, rows - i);
        vf old = vf_load_n(before + i, n);
        vf scale = vf_exp2(old - vf_load_n(base + i, n));
        vf_store_n(correction + i,
                   vf_select(vf_less(minus, old) | vf_is_nan(old), scale, vf_zero()), n);
    }
    for (int64_t i = 0; i < rows; i++) {
        float *s = b->s + i * KEY_BLOCK;
        int64_t r = r0 + i;
        vf sum = vf_zero();
        for (int64_t v = from; v < to; v++) {
            vf p = vf_exp2(vf_load(s + v * VF_WIDTH) - vf_set(base[i]));
            sum += p;
            vf_store(s + v * VF_WIDTH, p);
        }
        float *l = b->part.l + r * VF_WIDTH;
        vf_store(l, vf_fma(vf_load(l), vf_set(correction[i]), sum));
        if (f->drop_threshold) {
            uint64_t at = attention_dropout_element(&f->c, b->head[r], b->row[r], j0);
            for (int64_t v = from; v < to; v += 2) {
                vi keep[2];
                dropout_masks(&f->dropout, at + (uint64_t)(v * VF_WIDTH), f->drop_threshold, keep);
                for (int64_t k = v; k < to && k < v + 2; k++)
                    vf_store(s + k * VF_WIDTH,
                             vf_select(keep[k - v], vf_load(s + k * VF_WIDTH), vf_zero()));
            }
        }
    }
}

/* Which keys of the block from j0 on (`end`: where keys end) some of the `rows` rows of b from r on
 * see: none outside [*from, *to); false if there are none. *mask: NULL where it takes no words. */
static bool tile_keys(const struct forward *f, const struct rows *b, int64_t r, int64_t rows,
                      int64_t j0, int64_t end, int64_t *from, int64_t *to, uint64_t *words,
                      const uint64_t **mask) {
    *mask = NULL;
    *from = 0;
    if (f->c.plain) {
        int64_t most = 0;
        for (int64_t i = r; i < r + rows; i++)
            most = max_i64(most, b->seen[i]);
        *to = min_i64(most - j0, KEY_BLOCK);
        return *to > 0;
    }
    int64_t present = min_i64(rows, b->range.count - r), count = min_i64(KEY_BLOCK, end - j0);
    bool full;
    if (present <= 0)
        return false;
    struct row_range range = b->range;
    range.row += r;
    range.count = present;
    uint64_t any = range_masks(&f->c, &range, j0, count, words, &full);
    if (any == 0)
        return false;
    *from = __builtin_ctzll(any);
    *to = 64 - __builtin_clzll(any);
    if (full && present == rows && count == KEY_BLOCK)
        return true; /* and `seen` lies behind */
    for (int64_t i = 0; i < rows; i++)
        words[i] = i >= present ? 0 : full ? any : words[i];
    *mask = words;
    return true;
}

#endif
