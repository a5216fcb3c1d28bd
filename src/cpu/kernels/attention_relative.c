/* Attention with relative positions (contract: relative_attention in ops.h), tiled with an online
 * softmax, forward and backward.
 *
 * A tile of BLOCK rows and BLOCK keys has its scores from two products: (q + u) K^T, and (q + w)
 * with the BAND rows of r whose distances occur in the tile. Row i of that second product holds the
 * tile's distances from the largest to 0: laid out backwards in time, the score of key j stands at
 * column BLOCK - 1 - i + j of the band, so that a row of the tile is a run of its row of the band.
 * The next tile's band begins where this one's second half does. The gradient takes the same way
 * back: dS, skewed into a band, times r and times q + w.
 *
 * Everything of a sequence's key/value head is first brought to fp32 matrices in scratch. The
 * backward's unit is one sequence and one key/value head, and its sums run in the order of the
 * rows; dr, du and dw are summed over sequences in their order: the bits do not depend on the
 * threads. */
#include <math.h>

#include "base/threads.h"
#include "cpu/kernels/attention_matrix.h"
#include "ops/relative_attention.h"

#define BLOCK 48 /* rows, and keys, of a tile: a multiple of every TILE_ROWS and VF_WIDTH */
#define BAND (2 * BLOCK)

/* Keys of one sequence that somebody sees, as fp32 matrices of one key/value head. */
struct unit {
    int64_t sequence, kv_head;
    int64_t base, keys; /* keys [base, base + keys) of the sequence */
    int64_t ldk;
    float *k, *v, *k_t, *v_t;  /* [keys + BLOCK, ld]; [ld, ldk]; some only forward or backward */
    float *dk, *dv, *dr, *sum; /* backward: [keys + BLOCK, ld]; [group, band_rows, ld]; du and dw,
                                  [group, 2, ld] */
};

struct relative {
    struct relative_attention_call c;
    bool backward;
    int64_t group, ld;
    int64_t reach;          /* distances 0 .. reach - 1 occur */
    int64_t band_rows, ldr; /* rows of r backwards: row y has distance reach + BLOCK - 1 - y */
    float *r, *r_t;         /* [H, band_rows, ld], [H, ld, ldr] */
    float *dr, *sum;        /* totals: [H, band_rows, ld], [H, 2, ld] */
    int64_t first, count;   /* sequences of this wave */
    int64_t most;           /* query blocks of the wave's longest sequence */
    struct unit *units;     /* [count, K] */
    char *worker;
    int64_t worker_bytes;
};

static const struct relative *relative_of(const void *arg) {
    return arg;
}

/* ------------------------------------------------------------------ loading */

static void load_key(const struct relative *f, const struct unit *u, int64_t j,
                     const struct tensor *past, const struct tensor *own, float *out) {
    const struct relative_attention_call *c = &f->c;
    int64_t before = relative_past(c, u->sequence), row = c->q_offsets[u->sequence] + j - before;
    if (j < before) {
        row = c->past_start[u->sequence] + j;
        own = past;
    }
    row_to_float(out, element(own, row, u->kv_head), own->dtype, c->width, f->ld, 1);
}

static void load_keys(const struct relative *f, const struct unit *u, int64_t begin,
                      const struct tensor *past, const struct tensor *own, float *out) {
    for (int64_t j = 0; j < BLOCK; j++)
        if (begin + j < u->keys)
            load_key(f, u, u->base + begin + j, past, own, out + j * f->ld);
        else
            memset(out + j * f->ld, 0, (size_t)f->ld * 4);
}

/* Item: a key/value head of a sequence. */
static void load_unit(void *arg, int64_t begin, int64_t end, int worker) {
    const struct relative *f = relative_of(arg);
    float *piece = (float *)(void *)(f->worker + worker * f->worker_bytes);
    for (int64_t i = begin; i < end; i++) {
        const struct unit *u = &f->units[i];
        for (int64_t j = 0; j < u->keys + BLOCK; j += BLOCK) {
            float *k = u->k && j < u->keys ? u->k + j * f->ld : piece;
            load_keys(f, u, j, &f->c.past_k, &f->c.k, k);
            transpose_matrix(u->k_t + j, u->ldk, k, f->ld, BLOCK, f->c.width);
            float *v = u->v && j < u->keys ? u->v + j * f->ld : piece;
            load_keys(f, u, j, &f->c.past_v, &f->c.v, v);
            if (u->v_t)
                transpose_matrix(u->v_t + j, u->ldk, v, f->ld, BLOCK, f->c.width);
        }
        if (u->k)
            memset(u->k + round_up(u->keys, BLOCK) * f->ld, 0, (size_t)(BLOCK * f->ld) * 4);
        if (u->v)
            memset(u->v + round_up(u->keys, BLOCK) * f->ld, 0, (size_t)(BLOCK * f->ld) * 4);
    }
}

/* Item: a head. */
static void load_positions(void *arg, int64_t begin, int64_t end, int worker) {
    const struct relative *f = relative_of(arg);
    (void)worker;
    for (int64_t h = begin; h < end; h++) {
        float *r = f->r + h * f->band_rows * f->ld;
        for (int64_t y = 0; y < f->band_rows; y++) {
            int64_t distance = f->reach + BLOCK - 1 - y;
            if (distance >= 0 && distance < f->reach)
                row_to_float(r + y * f->ld, element(&f->c.r, distance, h), f->c.r.dtype, f->c.width,
                             f->ld, 1);
            else
                memset(r + y * f->ld, 0, (size_t)f->ld * 4);
        }
        transpose_matrix(f->r_t + h * f->ld * f->ldr, f->ldr, r, f->ld, f->band_rows, f->c.width);
    }
}

/* x = scale (q + bias) of `rows` rows, zeros to BLOCK. */
static void load_biased(const struct relative *f, float *x, const struct tensor *bias, int64_t n,
                        int64_t h, int64_t rows) {
    float scale = f->c.params.scale;
    const float *b = (const float *)bias->data + h * f->c.width;
    matrix_load(x, f->ld, &f->c.q, n, h, rows, BLOCK, 1);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t t = 0; t < f->c.width; t++)
            x[i * f->ld + t] = scale * (x[i * f->ld + t] + b[t]);
}

/* ------------------------------------------------------------------ a tile's scores */

struct block {
    float *qu, *qw, *dout, *out, *dqu, *dqw; /* [BLOCK, ld] */
    float *s, *ds;                           /* [BLOCK, BLOCK] */
    float *band, *dband;                     /* [BLOCK, BAND] */
    int64_t rows, padded;                    /* padded to TILE_ROWS */
    int64_t position;                        /* of row 0 */
};

static int64_t worker_floats(int64_t ld) {
    return 6 * BLOCK * ld + 2 * BLOCK * BLOCK + 2 * BLOCK * BAND;
}

static struct block block_at(const struct relative *f, int worker) {
    struct block b = {.qu = (float *)(void *)(f->worker + worker * f->worker_bytes)};
    b.qw = b.qu + BLOCK * f->ld;
    b.dout = b.qw + BLOCK * f->ld;
    b.out = b.dout + BLOCK * f->ld;
    b.dqu = b.out + BLOCK * f->ld;
    b.dqw = b.dqu + BLOCK * f->ld;
    b.s = b.dqw + BLOCK * f->ld;
    b.ds = b.s + BLOCK * BLOCK;
    b.band = b.ds + BLOCK * BLOCK;
    b.dband = b.band + BLOCK * BAND;
    return b;
}

/* Row y of r with which the band of the tile with keys from j on begins. */
static int64_t band_begin(const struct relative *f, const struct block *b, int64_t j) {
    return f->reach - b->position + j;
}

/* s = the content's part, band = the position's, for keys from j on; `next`: the tile before this
 * one was that of the keys just before. */
static void tile_scores(const struct relative *f, const struct unit *u, const struct block *b,
                        int64_t h, int64_t j, bool next) {
    const float *r_t = f->r_t + h * f->ld * f->ldr + band_begin(f, b, j);
    multiply(b->padded, BLOCK, f->c.width, b->qu, f->ld, u->k_t + (j - u->base), u->ldk, b->s,
             BLOCK);
    if (!next) {
        multiply(b->padded, BAND, f->c.width, b->qw, f->ld, r_t, f->ldr, b->band, BAND);
        return;
    }
    for (int64_t i = 0; i < b->padded; i++)
        memcpy(b->band + i * BAND, b->band + i * BAND + BLOCK, BLOCK * 4);
    multiply(b->padded, BLOCK, f->c.width, b->qw, f->ld, r_t + BLOCK, f->ldr, b->band + BLOCK,
             BAND);
}

/* Lanes of keys j .. that the row at position p sees. */
SIMD vi seen_lanes(const struct relative *f, int64_t p, int64_t j) {
    int64_t first = relative_first(&f->c, p);
    vi at = vi_iota() + vi_set((int32_t)(j - first)), last = vi_set((int32_t)(p - first));
    return (at >= vi_set(0)) & (at <= last);
}

/* ------------------------------------------------------------------ forward */

/* Scores of row i become its weights relative to the maximum so far; returns what earlier sums are
 * to be multiplied by. */
static float soften_row(const struct relative *f, const struct block *b, int64_t i, int64_t j,
                        float *maximum, float *sum) {
    float *s = b->s + i * BLOCK;
    const float *band = b->band + i * BAND + BLOCK - 1 - i;
    vf most = vf_set(-INFINITY);
    for (int64_t t = 0; t < BLOCK; t += VF_WIDTH) {
        vi seen = seen_lanes(f, b->position + i, j + t);
        vf x = vf_select(seen, vf_load(s + t) + vf_load(band + t), vf_set(-INFINITY));
        most = vf_max(most, x);
        vf_store(s + t, x);
    }
    float before = *maximum, now = vf_max_lanes(most);
    if (!(now > before))
        now = before;
    if (now == -INFINITY) {
        memset(s, 0, BLOCK * 4);
        return 1;
    }
    vf total = vf_zero();
    for (int64_t t = 0; t < BLOCK; t += VF_WIDTH) {
        vf x = vf_load(s + t);
        x = vf_select(x == vf_set(-INFINITY), vf_zero(), vf_exp(x - vf_set(now)));
        total += x;
        vf_store(s + t, x);
    }
    float factor = before == -INFINITY ? 0 : expf(before - now);
    *maximum = now;
    *sum = *sum * factor + vf_sum(total);
    return factor;
}

static void forward_block(const struct relative *f, const struct unit *u, int64_t h, int64_t i0,
                          int worker) {
    const struct relative_attention_call *c = &f->c;
    struct block b = block_at(f, worker);
    int64_t n = c->q_offsets[u->sequence] + i0, ld = f->ld;
    float maximum[BLOCK], sum[BLOCK];
    b.rows = min_i64(BLOCK, relative_own(c, u->sequence) - i0);
    b.padded = round_up(b.rows, TILE_ROWS);
    b.position = relative_past(c, u->sequence) + i0;
    load_biased(f, b.qu, &c->u, n, h, b.rows);
    load_biased(f, b.qw, &c->w, n, h, b.rows);
    memset(b.out, 0, (size_t)(BLOCK * ld) * 4);
    memset(b.s, 0, sizeof(float) * BLOCK * BLOCK);
    for (int64_t i = 0; i < b.rows; i++) {
        maximum[i] = -INFINITY;
        sum[i] = 0;
    }
    int64_t first = relative_first(c, b.position);
    for (int64_t j = first; j < b.position + b.rows; j += BLOCK) {
        tile_scores(f, u, &b, h, j, j > first);
        for (int64_t i = 0; i < b.rows; i++) {
            float factor = soften_row(f, &b, i, j, &maximum[i], &sum[i]);
            for (int64_t t = 0; factor != 1 && t < ld; t += VF_WIDTH)
                vf_store(b.out + i * ld + t, vf_load(b.out + i * ld + t) * vf_set(factor));
        }
        multiply_add(b.padded, c->width, BLOCK, b.s, BLOCK, u->v + (j - u->base) * ld, ld, b.out,
                     ld);
    }
    for (int64_t i = 0; i < b.rows; i++) {
        matrix_store(&c->o, n + i, h, b.out + i * ld, ld, 1, 1 / sum[i]);
        if (c->lse.data)
            ((float *)c->lse.data)[h * c->rows + n + i] = maximum[i] + logf(sum[i]);
    }
}

/* Item: (sequence of the wave, head, query block). */
static void run_forward(void *arg, int64_t begin, int64_t end, int worker) {
    const struct relative *f = relative_of(arg);
    for (int64_t item = begin; item < end; item++) {
        int64_t s = item / (f->c.heads * f->most), h = item / f->most % f->c.heads;
        const struct unit *u = &f->units[s * f->c.kv_heads + h / f->group];
        int64_t i0 = item % f->most * BLOCK;
        if (i0 < relative_own(&f->c, u->sequence))
            forward_block(f, u, h, i0, worker);
    }
}

/* ------------------------------------------------------------------ backward */

/* Row i: s becomes the probabilities, ds (= do v) their gradient's, also skewed into dband. */
static void gradient_row(const struct relative *f, const struct block *b, int64_t i, int64_t j,
                         float lse, float delta) {
    float *s = b->s + i * BLOCK, *ds = b->ds + i * BLOCK;
    const float *band = b->band + i * BAND + BLOCK - 1 - i;
    float *dband = b->dband + i * BAND;
    memset(dband, 0, BAND * 4);
    for (int64_t t = 0; t < BLOCK; t += VF_WIDTH) {
        vi seen = seen_lanes(f, b->position + i, j + t);
        vf x = vf_exp(vf_load(s + t) + vf_load(band + t) - vf_set(lse));
        x = vf_select(seen, x, vf_zero());
        vf g = vf_select(seen, x * (vf_load(ds + t) - vf_set(delta)), vf_zero());
        vf_store(s + t, x);
        vf_store(ds + t, g);
        vf_store(dband + BLOCK - 1 - i + t, g);
    }
}

static void backward_block(const struct relative *f, const struct unit *u, int64_t h, int64_t i0,
                           int worker) {
    const struct relative_attention_call *c = &f->c;
    struct block b = block_at(f, worker);
    int64_t n = c->q_offsets[u->sequence] + i0, ld = f->ld, d = c->width;
    float delta[BLOCK];
    float *dr = u->dr + (h % f->group) * f->band_rows * ld, *sum = u->sum + (h % f->group) * 2 * ld;
    const float *lse = (const float *)c->lse.data + h * c->rows + n;
    b.rows = min_i64(BLOCK, relative_own(c, u->sequence) - i0);
    b.padded = round_up(b.rows, TILE_ROWS);
    b.position = relative_past(c, u->sequence) + i0;
    matrix_load(b.dout, ld, &c->dout, n, h, b.rows, BLOCK, 1);
    matrix_load(b.out, ld, &c->o, n, h, b.rows, BLOCK, 1);
    for (int64_t i = 0; i < b.rows; i++)
        delta[i] = row_dot(b.out + i * ld, b.dout + i * ld, ld);
    load_biased(f, b.qu, &c->u, n, h, b.rows);
    load_biased(f, b.qw, &c->w, n, h, b.rows);
    memset(b.dqu, 0, (size_t)(2 * BLOCK * ld) * 4);
    int64_t first = relative_first(c, b.position);
    for (int64_t j = first; j < b.position + b.rows; j += BLOCK) {
        int64_t at = j - u->base, y = band_begin(f, &b, j);
        tile_scores(f, u, &b, h, j, j > first);
        multiply(b.padded, BLOCK, d, b.dout, ld, u->v_t + at, u->ldk, b.ds, BLOCK);
        for (int64_t i = 0; i < b.rows; i++)
            gradient_row(f, &b, i, j, lse[i], delta[i]);
        for (int64_t i = b.rows; i < b.padded; i++) {
            memset(b.ds + i * BLOCK, 0, BLOCK * 4);
            memset(b.s + i * BLOCK, 0, BLOCK * 4);
            memset(b.dband + i * BAND, 0, BAND * 4);
        }
        multiply_add(b.padded, d, BLOCK, b.ds, BLOCK, u->k + at * ld, ld, b.dqu, ld);
        multiply_add(b.padded, d, BAND, b.dband, BAND, f->r + (h * f->band_rows + y) * ld, ld,
                     b.dqw, ld);
        multiply_transposed_add(BLOCK, d, b.rows, b.ds, BLOCK, b.qu, ld, u->dk + at * ld, ld);
        multiply_transposed_add(BLOCK, d, b.rows, b.s, BLOCK, b.dout, ld, u->dv + at * ld, ld);
        multiply_transposed_add(BAND, d, b.rows, b.dband, BAND, b.qw, ld, dr + y * ld, ld);
    }
    for (int64_t i = 0; i < b.rows; i++)
        for (int64_t t = 0; t < ld; t += VF_WIDTH) {
            vf x = vf_load(b.dqu + i * ld + t), y = vf_load(b.dqw + i * ld + t);
            vf_store(sum + t, vf_load(sum + t) + x);
            vf_store(sum + ld + t, vf_load(sum + ld + t) + y);
            vf_store(b.dqu + i * ld + t, x + y);
        }
    matrix_store(&c->dq, n, h, b.dqu, ld, b.rows, c->params.scale);
}

/* Item: a unit. */
static void run_backward(void *arg, int64_t begin, int64_t end, int worker) {
    const struct relative *f = relative_of(arg);
    const struct relative_attention_call *c = &f->c;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = &f->units[item];
        int64_t s = u->sequence, own = relative_own(c, s), past = relative_past(c, s);
        size_t keys = (size_t)((u->keys + BLOCK) * f->ld) * 4;
        memset(u->dk, 0, keys);
        memset(u->dv, 0, keys);
        memset(u->dr, 0, (size_t)(f->group * f->band_rows * f->ld) * 4);
        memset(u->sum, 0, (size_t)(f->group * 2 * f->ld) * 4);
        for (int64_t h = u->kv_head * f->group; h < (u->kv_head + 1) * f->group; h++)
            for (int64_t i0 = 0; i0 < own; i0 += BLOCK)
                backward_block(f, u, h, i0, worker);
        for (int64_t j = 0; j < u->keys; j++) {
            int64_t at = u->base + j, row = c->q_offsets[s] + at - past;
            const struct tensor *dk = &c->dk, *dv = &c->dv;
            if (at < past) {
                row = c->past_start[s] + at;
                dk = &c->dpast_k;
                dv = &c->dpast_v;
            }
            if (dk->data)
                matrix_store(dk, row, u->kv_head, u->dk + j * f->ld, f->ld, 1, 1);
            if (dv->data)
                matrix_store(dv, row, u->kv_head, u->dv + j * f->ld, f->ld, 1, 1);
        }
    }
}

/* Item: a head. Adds the wave's gradients of positions and biases to the totals. */
static void reduce(void *arg, int64_t begin, int64_t end, int worker) {
    const struct relative *f = relative_of(arg);
    (void)worker;
    for (int64_t h = begin; h < end; h++)
        for (int64_t s = 0; s < f->count; s++) {
            const struct unit *u = &f->units[s * f->c.kv_heads + h / f->group];
            int64_t size = f->band_rows * f->ld, at = h % f->group;
            for (int64_t x = 0; x < size; x += VF_WIDTH)
                vf_store(f->dr + h * size + x,
                         vf_load(f->dr + h * size + x) + vf_load(u->dr + at * size + x));
            for (int64_t x = 0; x < 2 * f->ld; x += VF_WIDTH)
                vf_store(f->sum + h * 2 * f->ld + x, vf_load(f->sum + h * 2 * f->ld + x) +
                                                         vf_load(u->sum + at * 2 * f->ld + x));
        }
}

static void store_totals(const struct relative *f) {
    const struct relative_attention_call *c = &f->c;
    matrix_clear(&c->dr, f->reach, c->distances);
    for (int64_t h = 0; h < c->heads; h++) {
        const float *dr = f->dr + h * f->band_rows * f->ld, *sum = f->sum + h * 2 * f->ld;
        for (int64_t t = 0; t < f->reach; t++)
            matrix_store(&c->dr, t, h, dr + (f->reach + BLOCK - 1 - t) * f->ld, f->ld, 1, 1);
        for (int64_t t = 0; t < c->width; t++) {
            ((float *)c->du.data)[h * c->width + t] += c->params.scale * sum[t];
            ((float *)c->dw.data)[h * c->width + t] += c->params.scale * sum[f->ld + t];
        }
    }
}

/* ------------------------------------------------------------------ waves */

/* `floats` of scratch from *used on; NULL while only the sizes are asked for. */
static float *take(char *memory, int64_t *used, int64_t floats) {
    float *at = memory ? (float *)(void *)(memory + *used) : NULL;
    *used += round_up(floats * 4, 64);
    return at;
}

static void unit_place(const struct relative *f, struct unit *u, char *memory, int64_t *used) {
    const struct relative_attention_call *c = &f->c;
    int64_t past = relative_past(c, u->sequence);
    u->base = relative_first(c, past);
    u->keys = past + relative_own(c, u->sequence) - u->base;
    u->ldk = round_up(u->keys, BLOCK) + BLOCK;
    int64_t matrix = u->ldk * f->ld; /* also transposed */
    u->k_t = take(memory, used, matrix);
    u->v = f->backward ? NULL : take(memory, used, matrix);
    if (!f->backward)
        return;
    u->v_t = take(memory, used, matrix);
    u->k = take(memory, used, matrix);
    u->dk = take(memory, used, matrix);
    u->dv = take(memory, used, matrix);
    u->dr = take(memory, used, f->group * f->band_rows * f->ld);
    u->sum = take(memory, used, f->group * 2 * f->ld);
}

/* Places the units of the wave that begins at f->first; returns its bytes. */
static int64_t wave_place(struct relative *f, char *memory) {
    int64_t used = 0;
    f->most = 0;
    for (int64_t s = 0; s < f->count; s++) {
        int64_t blocks = (relative_own(&f->c, f->first + s) + BLOCK - 1) / BLOCK;
        f->most = max_i64(f->most, blocks);
        for (int64_t h = 0; h < f->c.kv_heads; h++) {
            struct unit own, *u = memory ? &f->units[s * f->c.kv_heads + h] : &own;
            *u = (struct unit){.sequence = f->first + s, .kv_head = h};
            unit_place(f, u, memory, &used);
        }
    }
    return used;
}

static void wave_run(struct relative *f) {
    const struct relative_attention_call *c = &f->c;
    if (f->most == 0)
        return;
    parallel_for(f->count * c->kv_heads, 1, load_unit, f);
    if (!f->backward) {
        parallel_for(f->count * c->heads * f->most, 1, run_forward, f);
        return;
    }
    parallel_for(f->count * c->kv_heads, 1, run_backward, f);
    parallel_for(c->heads, 1, reduce, f);
}

/* Rows of x that belong to no sequence get zeros. */
static void clear_gaps(const struct relative_attention_call *c, const struct tensor *x) {
    int64_t next = 0;
    for (int64_t s = 0; s < c->sequences; s++) {
        matrix_clear(x, next, c->q_offsets[s]);
        next = c->q_offsets[s + 1];
    }
    matrix_clear(x, next, c->rows);
}

static void clear_outputs(const struct relative *f) {
    const struct relative_attention_call *c = &f->c;
    if (!f->backward) {
        clear_gaps(c, &c->o);
        for (int64_t i = 0; c->lse.data && i < c->heads * c->rows; i++)
            ((float *)c->lse.data)[i] = -INFINITY;
        return;
    }
    clear_gaps(c, &c->dq);
    clear_gaps(c, &c->dk);
    clear_gaps(c, &c->dv);
    if (c->dpast_k.data)
        matrix_clear(&c->dpast_k, 0, c->dpast_k.shape[0]);
    if (c->dpast_v.data)
        matrix_clear(&c->dpast_v, 0, c->dpast_v.shape[0]);
}

static tril_status run(struct relative *f, struct op_context *ctx, const char *name,
                       struct tril_error *err) {
    const struct relative_attention_call *c = &f->c;
    f->group = c->heads / c->kv_heads;
    f->ld = matrix_columns(c->width);
    f->reach = c->longest;
    if (c->params.segment && c->params.segment + c->params.memory < f->reach)
        f->reach = c->params.segment + c->params.memory;
    f->band_rows = round_up(f->reach + BLOCK + BAND, VF_WIDTH);
    f->ldr = f->band_rows;
    int64_t most = (2 * threads_count() + c->kv_heads - 1) / c->kv_heads; /* sequences at once */
    int64_t largest = 0, fixed = 0, table = f->band_rows * f->ld * c->heads;
    for (f->first = 0; f->first < c->sequences; f->first += most) {
        f->count = min_i64(most, c->sequences - f->first);
        largest = max_i64(largest, wave_place(f, NULL));
    }
    f->worker_bytes = round_up(worker_floats(f->ld) * 4, 4096) + 64 * 9;
    char *memory = NULL;
    for (int pass = 0; pass < 2; pass++) {
        fixed = f->worker_bytes * threads_count();
        f->worker = memory;
        f->r = take(memory, &fixed, table);
        f->r_t = take(memory, &fixed, table);
        f->dr = take(memory, &fixed, f->backward ? table : 0);
        f->sum = take(memory, &fixed, f->backward ? 2 * f->ld * c->heads : 0);
        f->units =
            (void *)take(memory, &fixed, most * c->kv_heads * (int64_t)sizeof(struct unit) / 4);
        if (memory)
            break;
        memory = op_scratch(ctx, fixed + largest);
        if (!memory)
            return op_scratch_error(ctx, name, fixed + largest, err);
    }
    clear_outputs(f);
    if (f->backward) {
        memset(f->dr, 0, (size_t)table * 4);
        memset(f->sum, 0, (size_t)(2 * f->ld * c->heads) * 4);
    }
    parallel_for(c->heads, 1, load_positions, f);
    for (f->first = 0; f->first < c->sequences; f->first += most) {
        f->count = min_i64(most, c->sequences - f->first);
        wave_place(f, memory + fixed);
        wave_run(f);
    }
    if (f->backward)
        store_totals(f);
    return TRIL_OK;
}

static tril_status forward(struct op_context *ctx, const struct tensor *args, const void *params,
                           struct tril_error *err) {
    struct relative f = {.backward = false};
    tril_status st = relative_attention_unpack_forward(&f.c, args, params, err);
    return st == TRIL_OK ? run(&f, ctx, "relative_attention_forward", err) : st;
}

static tril_status backward(struct op_context *ctx, const struct tensor *args, const void *params,
                            struct tril_error *err) {
    struct relative f = {.backward = true};
    tril_status st = relative_attention_unpack_backward(&f.c, args, params, err);
    return st == TRIL_OK ? run(&f, ctx, "relative_attention_backward", err) : st;
}

void LEVEL(register_attention_relative)(struct backend *b) {
    b->table[OP_RELATIVE_ATTENTION_FORWARD] = forward;
    b->table[OP_RELATIVE_ATTENTION_BACKWARD] = backward;
}
