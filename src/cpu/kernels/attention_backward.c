/* Flash attention, backward (Dao 2023), five products a block.
 *
 * As in the forward, a unit is one sequence and one key/value head, and its rows are the query rows
 * of all heads of the group; dK and dV are then plain sums over the rows. A task is one block of
 * KEY_BLOCK keys of a unit: it keeps K, V and their gradients at hand and goes over the rows that
 * see them, ROW_BLOCK at a time:
 *
 *   P = exp2(q K^T - lse)   dP = dO V^T   dS = P (dP - delta)
 *   dV += P^T dO            dK += dS^T q  dQ += dS K
 *
 * dQ is shared by the tasks of a unit. Each block of rows has a counter that names the next key
 * block to add to it, of those that it sees anything of: the order of summation is fixed, whatever
 * the threads, and the tasks of one head run as a wavefront. Nobody waits for ever, because
 * parallel_for hands out tasks in ascending order: the task waited for has begun. Groups of as many
 * units as there are threads are interleaved, so that waiting is rare where there is more than one
 * unit.
 *
 * Q (times scale * log2(e)), dO and dQ of a wave of units lie in scratch as dense fp32. With AMX
 * and q, k, v and dO in bf16 the products run on tiles (attention_backward_amx.h), P and dS rounded
 * to bf16, over larger blocks of rows.
 *
 * The gradient of a bias is dS, summed over sequences (and heads). Where there is one sequence and
 * a matrix for each head, tasks store it as they go; else, or where a softcap stands between dS and
 * it, a second pass makes dS again, a task for each block of keys, which goes over the units in
 * order. */
#include <sched.h>

#include "base/memory.h"
#include "base/threads.h"
#include "cpu/kernels/attention_backward_amx.h"

#define TAIL_ROWS (KEY_BLOCK % TILE_ROWS) /* 4, or 0 */

static int64_t worker_size(const struct backward *f) {
    int64_t bytes = (5 * KEY_BLOCK * f->width + 2 * ROW_BLOCK * KEY_BLOCK) * 4;
#if AMX_TILES
    if (f->amx)
        bytes += strips_size();
#endif
    return round_up(bytes, 4096) + 64 * 9; /* not a power of two apart */
}

static struct block block_at(char *memory, int64_t width) {
    struct block b;
    b.keys_t = (float *)(void *)memory;
    b.values_t = b.keys_t + KEY_BLOCK * width;
    b.keys = b.values_t + KEY_BLOCK * width;
    b.dk = b.keys + KEY_BLOCK * width;
    b.dv = b.dk + KEY_BLOCK * width;
    b.p = b.dv + KEY_BLOCK * width;
    b.ds = b.p + ROW_BLOCK * KEY_BLOCK;
    b.strips = (char *)(b.ds + ROW_BLOCK * KEY_BLOCK);
    return b;
}

/* Bytes of a unit in scratch, and its pointers (memory may be 0, for the sizes). */
static int64_t unit_layout(struct unit *u, int64_t row_block, int64_t ld, uintptr_t memory) {
    int64_t rows = u->row_blocks * row_block, matrix = rows * ld * 4;
    u->q = (float *)memory;
    u->dout = (float *)(memory + (uintptr_t)matrix);
    u->dq = (float *)(memory + (uintptr_t)(2 * matrix));
    memory += (uintptr_t)(3 * matrix);
    u->lse = (float *)memory;
    u->delta = (float *)(memory + (uintptr_t)(4 * rows));
    u->seen = (int32_t *)(memory + (uintptr_t)(8 * rows));
    u->next = (_Atomic int32_t *)(memory + (uintptr_t)(12 * rows));
    return round_up(3 * matrix + 12 * rows + 4 * u->row_blocks, 64);
}

/* ------------------------------------------------------------------ rows */

/* Whether a block of rows sees anything of the keys [j0, j1). */
static bool block_sees(const struct backward *f, const struct unit *u, int64_t block, int64_t j0,
                       int64_t j1) {
    struct row_range rows = block_rows(f, u, block);
    if (f->c.plain)
        return u->seen[rows.row + rows.count - 1] > j0;
    return range_any(&f->c, &rows, j0, min_i64(j1, u->length));
}

/* The first key block from `from` on of which a block of rows sees anything; -1: there is none.
 * SKIP blocks are asked about at once where that is possible (visible_any is monotone). */
#define SKIP 16
static int64_t next_block(const struct backward *f, const struct unit *u, int64_t block,
                          int64_t from) {
    int64_t end = (u->length + KEY_BLOCK - 1) / KEY_BLOCK;
    for (int64_t j = from; j < end;) {
        if (j % SKIP == 0 && !f->c.plain &&
            !block_sees(f, u, block, j * KEY_BLOCK, (j + SKIP) * KEY_BLOCK)) {
            j += SKIP;
            continue;
        }
        if (block_sees(f, u, block, j * KEY_BLOCK, (j + 1) * KEY_BLOCK))
            return j;
        if (f->c.plain)
            break;
        j++;
    }
    return -1;
}

SIMD float row_delta(const float *dout, const void *o, enum dtype type, int64_t d) {
    vf sum = vf_zero();
    for (int64_t t = 0; t < d; t += VF_WIDTH) {
        int n = (int)min_i64(VF_WIDTH, d - t);
        vf x = n == VF_WIDTH ? vf_load_as(o, type, t, VF_WIDTH) : vf_load_as(o, type, t, n);
        sum = vf_fma(x, vf_load(dout + t), sum);
    }
    return vf_sum(sum);
}

/* Item i: block of rows i of the wave, over all units. */
static void prepare_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct backward *f = arg;
    const struct attention_call *c = &f->c;
    float row[256 + 16];
    (void)worker;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = f->unit;
        int64_t block = item;
        for (; block >= u->row_blocks; u++)
            block -= u->row_blocks;
        const int64_t first_row = block * f->row_block, end_row = first_row + f->row_block;
#if AMX_TILES
        if (f->amx) {
            amx_pack_rows(f, u, &c->q, block, amx_rows(f, u->q, block));
            amx_pack_rows(f, u, &c->dout, block, amx_rows(f, u->dout, block));
        }
#endif
        for (int64_t r = first_row; r < end_row; r++) {
            float *q = f->amx ? row : u->q + r * f->ld, *dout = f->amx ? row : u->dout + r * f->ld;
            memset(u->dq + r * f->ld, 0, (size_t)f->ld * 4);
            if (r >= u->rows) {
                memset(q, 0, (size_t)f->ld * 4);
                memset(dout, 0, (size_t)f->ld * 4);
                u->lse[r] = INFINITY;
                u->delta[r] = 0;
                u->seen[r] = 0;
                continue;
            }
            int64_t n, head;
            unit_row(f, u, r, &n, &head);
            row_to_float(q, element(&c->q, n, head), c->q.dtype, c->width, f->ld, f->q_factor);
            row_to_float(dout, element(&c->dout, n, head), c->dout.dtype, c->width, f->ld, 1);
            const void *o = element(&c->o, n, head);
            u->delta[r] = c->o.dtype == DT_F32 ? row_delta(dout, o, DT_F32, c->width)
                                               : row_delta(dout, o, DT_BF16, c->width);
            float lse = ((const float *)c->lse.data)[head * c->rows + n];
            u->lse[r] = lse == -INFINITY ? INFINITY : (float)((double)lse * LOG2E);
            u->seen[r] = (int32_t)attention_visible(c, u->sequence, r / f->group, head);
        }
        int64_t first = next_block(f, u, block, 0);
        atomic_store_explicit(&u->next[block], (int32_t)first, memory_order_relaxed);
        if (first >= 0)
            continue;
        for (int64_t r = first_row; r < min_i64(u->rows, end_row); r++) {
            int64_t n, head;
            unit_row(f, u, r, &n, &head);
            memset((void *)(uintptr_t)element(&c->dq, n, head), 0,
                   (size_t)c->width * dtype_size(c->dq.dtype));
        }
    }
}

/* The units' shares of dsink, summed in the order of rows. */
static void add_sinks(const struct backward *f) {
    const float *sink = f->c.sink.data;
    for (int64_t k = 0; k < f->units; k++) {
        const struct unit *u = &f->unit[k];
        for (int64_t r = 0; r < u->rows; r++) {
            int64_t head = u->kv_head * f->group + r % f->group;
            f->dsink[head] -=
                exp2((double)sink[head] * LOG2E - (double)u->lse[r]) * (double)u->delta[r];
        }
    }
}

/* ------------------------------------------------------------------ one block of rows and keys */

/* Products over channels: panels [from, to) of out [TILE_ROWS, KEY_BLOCK] = a b, b packed by
 * pack_transposed. */
static void tile_channels(int64_t from, int64_t to, int64_t d, const float *a, int64_t lda,
                          const float *b, float *out) {
    for (int64_t p = from; p < to; p++)
        tile(TILE_ROWS, 2, START_ZERO, d, a, lda, 1, b + p * PANEL * d, PANEL, out + p * PANEL,
             KEY_BLOCK, NULL);
}

/* dq [TILE_ROWS, d] += ds [TILE_ROWS, keys] K. */
static void tile_keys(int64_t keys, int64_t d, const float *ds, const float *k, float *dq,
                      int64_t ld) {
    int64_t t = 0;
    for (; t + VF_WIDTH < d; t += PANEL)
        tile(TILE_ROWS, 2, START_ADD, keys, ds, KEY_BLOCK, 1, k + t * KEY_BLOCK, PANEL, dq + t, ld,
             NULL);
    if (t < d)
        tile(TILE_ROWS, 1, START_ADD, keys, ds, KEY_BLOCK, 1, k + t * KEY_BLOCK, PANEL, dq + t, ld,
             NULL);
}

/* out [rows of keys, d] += p^T b over n query rows. */
SIMD void tile_queries_as(int keys, int64_t n, int64_t d, const float *p, const float *b,
                          int64_t ld, float *out, int64_t width) {
    int64_t t = 0;
    for (; t + VF_WIDTH < d; t += PANEL)
        tile(keys, 2, START_ADD, n, p, 1, KEY_BLOCK, b + t, ld, out + t, width, NULL);
    if (t < d)
        tile(keys, 1, START_ADD, n, p, 1, KEY_BLOCK, b + t, ld, out + t, width, NULL);
}
static void tile_queries(int64_t n, int64_t d, const float *p, const float *b, int64_t ld,
                         float *out, int64_t width) {
    tile_queries_as(TILE_ROWS, n, d, p, b, ld, out, width);
}
static void tile_queries_tail(int64_t n, int64_t d, const float *p, const float *b, int64_t ld,
                              float *out, int64_t width) {
    tile_queries_as(TAIL_ROWS ? TAIL_ROWS : 1, n, d, p, b, ld, out, width);
}

static void await(_Atomic int32_t *counter, int32_t value) {
    for (int spins = 0; atomic_load_explicit(counter, memory_order_acquire) < value; spins++)
        if (spins > 64)
            sched_yield();
}

/* dbias[head][i][j0 ..] += dS, which is in ds, for the rows of a tile. */
static void add_bias_gradient(const struct backward *f, const struct unit *u, const float *ds,
                              int64_t row, int64_t j0, int64_t keys, const struct extent *e) {
    const struct tensor *t = &f->c.dbias;
    for (int64_t r = row; r < min_i64(row + f->step, u->rows); r++, ds += KEY_BLOCK) {
        int64_t i = r / f->group, head = u->kv_head * f->group + r % f->group;
        float *to = (float *)t->data + i * t->stride[1] + j0;
        if (t->shape[0] > 1)
            to += head * t->stride[0];
        for (int64_t j = e->from / VF_WIDTH * VF_WIDTH; j < e->to; j += VF_WIDTH) {
            int n = (int)min_i64(VF_WIDTH, keys - j);
            vf_store_n(to + j, vf_load_n(to + j, n) + vf_load(ds + j), n);
        }
    }
}

/* P and dS of a block of rows and a block of keys, of the tiles with extent, into b->p and b->ds
 * (with AMX b->strips); dS also to dbias where that is wanted. */
static void block_scores(const struct backward *f, const struct unit *u, const struct block *b,
                         int64_t block, int64_t j0, int64_t keys, enum scores kind, bool bias,
                         struct extent *extent) {
    int64_t d = f->c.width, r0 = block * f->row_block, ld = f->ld;
    const float *q = u->q + r0 * ld, *dout = u->dout + r0 * ld;
    for (int64_t r = 0; r < f->row_block; r += f->step) {
        struct extent *e = &extent[r / f->step];
        tile_extent(f, u, r0 + r, j0, keys, e);
        if (e->to == 0)
            continue;
        float *p = b->p, *ds = b->ds;
        int64_t from = e->from / PANEL, to = (e->to + PANEL - 1) / PANEL;
#if AMX_TILES
        if (f->amx)
            amx_strip_scores(f, u, b, block, r / AMX_STEP, from * PANEL, to * PANEL);
#endif
        if (!f->amx) {
            p += r * KEY_BLOCK;
            ds += r * KEY_BLOCK;
            tile_channels(from, to, d, q + r * ld, ld, b->keys_t, p);
            tile_channels(from, to, d, dout + r * ld, ld, b->values_t, ds);
        }
        for (int64_t i = 0; i < f->step; i++) {
            float *pi = p + i * KEY_BLOCK, *dsi = ds + i * KEY_BLOCK;
            const uint64_t *mask = e->mask ? &e->mask[i] : NULL;
            if (kind == SCORES_PLAIN)
                gradient_row(SCORES_PLAIN, f, u, r0 + r + i, j0, 2 * from, 2 * to, mask, pi, dsi);
            else if (kind == SCORES_ANY)
                gradient_row(SCORES_ANY, f, u, r0 + r + i, j0, 2 * from, 2 * to, mask, pi, dsi);
            else
                gradient_row(SCORES_BIAS, f, u, r0 + r + i, j0, 2 * from, 2 * to, mask, pi, dsi);
        }
        if (bias)
            add_bias_gradient(f, u, ds, r0 + r, j0, keys, e);
#if AMX_TILES
        if (f->amx)
            amx_pack_gradients(b, r / AMX_STEP);
#endif
    }
}

/* dk and dv of the keys [k, k + key_tile) of the block from the rows [r, r + n) of the block. */
static void add_keys(const struct backward *f, const struct unit *u, const struct block *b,
                     int64_t block, int64_t r, int64_t n, int64_t k) {
#if AMX_TILES
    if (f->amx) {
        amx_add_keys(f, u, b, block, r, n, k);
        return;
    }
#endif
    int64_t d = f->c.width, ld = f->ld, at = r * KEY_BLOCK + k, first = block * ROW_BLOCK + r;
    void (*product)(int64_t, int64_t, const float *, const float *, int64_t, float *, int64_t) =
        k + TILE_ROWS <= KEY_BLOCK ? tile_queries : tile_queries_tail;
    product(n, d, b->p + at, u->dout + first * ld, ld, b->dv + k * f->width, f->width);
    product(n, d, b->ds + at, u->q + first * ld, ld, b->dk + k * f->width, f->width);
}

/* dq of the tile of rows from r on of a block from the keys that it sees. */
static void add_queries(const struct backward *f, const struct unit *u, const struct block *b,
                        int64_t block, int64_t r, const struct extent *e) {
    float *dq = u->dq + (block * f->row_block + r) * f->ld;
#if AMX_TILES
    if (f->amx) {
        amx_add_queries(f, b, r / AMX_STEP, e->from, e->to, dq);
        return;
    }
#endif
    tile_keys(e->to - e->from, f->c.width, b->ds + r * KEY_BLOCK + e->from,
              b->keys + e->from * PANEL, dq, f->ld);
}

static void row_block(const struct backward *f, const struct unit *u, const struct block *b,
                      int64_t block, int64_t j0, int64_t keys) {
    int64_t d = f->c.width, r0 = block * f->row_block, step = f->step;
    struct extent extent[ROW_BLOCK / 4];
    block_scores(f, u, b, block, j0, keys, f->adjusted ? SCORES_ANY : SCORES_PLAIN, f->bias_once,
                 extent);
    /* Key tile by key tile: plain from the first row that sees one of its keys on, else (and with
     * AMX) runs of tiles of rows that do. */
    const bool by_row = f->c.plain && !f->amx;
    const int64_t key_tile = f->amx ? 32 : TILE_ROWS;
    int64_t first = f->row_block, last = 0; /* rows with extent lie in [first, last) */
    for (int64_t r = 0; r < f->row_block; r += step)
        if (extent[r / step].to > 0) {
            first = min_i64(first, r);
            last = r + step;
        }
    for (int64_t k = 0, r = first; k < keys && by_row; k += key_tile) {
        while (r < last && u->seen[r0 + r] <= j0 + k)
            r++;
        add_keys(f, u, b, block, r, last - r, k);
    }
    for (int64_t k = 0; k < keys && !by_row; k += key_tile)
        for (int64_t r = first, run = first; r <= last; r += step) {
            const struct extent *e = &extent[r / step];
            if (r < last && e->from < k + key_tile && e->to > k)
                continue;
            if (r > run)
                add_keys(f, u, b, block, run, r - run, k);
            run = r + step;
        }
    int32_t turn = (int32_t)(j0 / KEY_BLOCK);
    await(&u->next[block], turn);
    for (int64_t r = first; r < last; r += step)
        if (extent[r / step].to > 0)
            add_queries(f, u, b, block, r, &extent[r / step]);
    /* The last key block that these rows see writes them out. */
    int64_t next = next_block(f, u, block, turn + 1);
    if (next < 0) {
        next = INT32_MAX;
        for (int64_t r = r0; r < min_i64(u->rows, r0 + f->row_block); r++) {
            int64_t n, head;
            unit_row(f, u, r, &n, &head);
            row_from_float((void *)(uintptr_t)element(&f->c.dq, n, head), f->c.dq.dtype,
                           u->dq + r * f->ld, d, f->c.params->scale);
        }
    }
    atomic_store_explicit(&u->next[block], (int32_t)next, memory_order_release);
}

/* The next block of rows from `block` on that sees any of `keys` keys from j0 on; u->row_blocks:
 * there is none. */
static int64_t next_rows(const struct backward *f, const struct unit *u, int64_t block, int64_t j0,
                         int64_t keys) {
    for (; block < u->row_blocks; block++) {
        if (!f->c.plain && block % SKIP == 0) {
            struct row_range many = block_rows(f, u, block);
            many.count = min_i64(SKIP * f->row_block, u->rows - many.row);
            if (!range_any(&f->c, &many, j0, j0 + keys)) {
                block += SKIP - 1;
                continue;
            }
        }
        if (block_sees(f, u, block, j0, j0 + KEY_BLOCK))
            return block;
    }
    return u->row_blocks;
}

/* Packs the keys and values [j0, j0 + keys) of u as operands of products over channels; with
 * `rows`, the keys as operand of a product over keys too. */
static void pack_block(const struct backward *f, const struct unit *u, const struct block *b,
                       int64_t j0, int64_t keys, bool rows) {
    const struct attention_call *c = &f->c;
    struct row_list list = {.count = keys};
    int64_t start = c->kv_start[u->sequence] + j0;
    for (int64_t j = 0; j < KEY_BLOCK + PREFETCH_ROWS; j++)
        list.row[j] = element(&c->v, start + min_i64(j, keys - 1), u->kv_head);
#if AMX_TILES
    if (f->amx)
        amx_pack_keys((char *)b->values_t, &list, c->width, f->width);
#endif
    if (!f->amx)
        pack_transposed(b->values_t, &list, c->width, c->v.dtype);
    for (int64_t j = 0; j < KEY_BLOCK + PREFETCH_ROWS; j++)
        list.row[j] = element(&c->k, start + min_i64(j, keys - 1), u->kv_head);
#if AMX_TILES
    if (f->amx) {
        amx_pack_keys((char *)b->keys_t, &list, c->width, f->width);
        if (rows)
            amx_pack_values((char *)b->keys, &list, c->width, f->width);
        return;
    }
#endif
    pack_transposed(b->keys_t, &list, c->width, c->k.dtype);
    if (rows)
        pack_rows(b->keys, &list, c->width, c->k.dtype);
}

static void key_block(const struct backward *f, const struct unit *u, int64_t j0, int worker) {
    const struct attention_call *c = &f->c;
    struct block b = block_at(f->worker + worker * f->worker_bytes, f->width);
    int64_t keys = min_i64(KEY_BLOCK, u->length - j0), d = c->width;
    int64_t start = c->kv_start[u->sequence] + j0, i = next_rows(f, u, 0, j0, keys);
    memset(b.dk, 0, (size_t)(2 * KEY_BLOCK * f->width) * 4);
    if (i < u->row_blocks)
        pack_block(f, u, &b, j0, keys, true);
    for (; i < u->row_blocks; i = next_rows(f, u, i + 1, j0, keys))
        row_block(f, u, &b, i, j0, keys);
    for (int64_t j = 0; j < keys; j++) {
        row_from_float((void *)(uintptr_t)element(&c->dk, start + j, u->kv_head), c->dk.dtype,
                       b.dk + j * f->width, d, f->dk_factor);
        row_from_float((void *)(uintptr_t)element(&c->dv, start + j, u->kv_head), c->dv.dtype,
                       b.dv + j * f->width, d, f->keep_factor);
    }
}

/* Task (group of units, key block, unit of the group). */
static void run_tasks(void *arg, int64_t begin, int64_t end, int worker) {
    const struct backward *f = arg;
    tiles_begin(f->amx);
    for (int64_t task = begin; task < end; task++) {
        int64_t group = task / (f->interleave * f->most_blocks);
        int64_t local = task % (f->interleave * f->most_blocks);
        int64_t index = group * f->interleave + local % f->interleave;
        int64_t j0 = local / f->interleave * KEY_BLOCK;
        if (index < f->units && j0 < f->unit[index].length)
            key_block(f, &f->unit[index], j0, worker);
    }
    tiles_end(f->amx);
}

/* ------------------------------------------------------------------ gradient of the bias */

/* Task (key block, key/value head; all heads where the bias has one). */
static void run_bias(void *arg, int64_t begin, int64_t end, int worker) {
    const struct backward *f = arg;
    struct block b = block_at(f->worker + worker * f->worker_bytes, f->width);
    int64_t heads = f->c.dbias.shape[0] > 1 ? f->c.kv_heads : 1;
    tiles_begin(f->amx);
    for (int64_t task = begin; task < end; task++) {
        int64_t j0 = task / heads * KEY_BLOCK;
        for (int64_t k = 0; k < f->units; k++) {
            const struct unit *u = &f->unit[k];
            int64_t keys = min_i64(KEY_BLOCK, u->length - j0);
            if (keys <= 0 || (heads > 1 && u->kv_head != task % heads))
                continue;
            int64_t i = next_rows(f, u, 0, j0, keys);
            if (i < u->row_blocks)
                pack_block(f, u, &b, j0, keys, false);
            for (; i < u->row_blocks; i = next_rows(f, u, i + 1, j0, keys)) {
                struct extent extent[ROW_BLOCK / 4];
                block_scores(f, u, &b, i, j0, keys, SCORES_BIAS, true, extent);
            }
        }
    }
    tiles_end(f->amx);
}

/* Rows of dbias, over all its heads, get zeros. */
static void clear_bias(void *arg, int64_t begin, int64_t end, int worker) {
    const struct tensor *t = &((const struct backward *)arg)->c.dbias;
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        memset((float *)t->data + i / t->shape[1] * t->stride[0] + i % t->shape[1] * t->stride[1],
               0, (size_t)t->shape[2] * 4);
}

/* ------------------------------------------------------------------ waves */

static bool wave_next(struct backward *f) {
    const struct attention_call *c = &f->c;
    int64_t used = 0;
    f->units = f->most_blocks = 0;
    while (f->next_sequence < c->sequences && f->units < WAVE_UNITS) {
        int64_t s = f->next_sequence;
        if (f->next_head == c->kv_heads) {
            f->next_sequence++;
            f->next_head = 0;
            continue;
        }
        struct unit *u = &f->unit[f->units];
        *u = (struct unit){.sequence = s, .kv_head = f->next_head, .length = c->kv_length[s]};
        u->rows = (c->q_offsets[s + 1] - c->q_offsets[s]) * f->group;
        u->row_blocks = (u->rows + f->row_block - 1) / f->row_block;
        uintptr_t memory = (uintptr_t)f->memory + (uintptr_t)used;
        int64_t bytes = unit_layout(u, f->row_block, f->ld, memory);
        if (f->units && used + bytes > WAVE_BYTES)
            break;
        used += bytes;
        f->most_blocks = max_i64(f->most_blocks, (u->length + KEY_BLOCK - 1) / KEY_BLOCK);
        f->next_head++;
        f->units++;
    }
    f->memory_bytes = max_i64(f->memory_bytes, used);
    return f->units > 0;
}

static void wave_run(struct backward *f, bool serial) {
    int64_t blocks = 0, groups = (f->units + f->interleave - 1) / f->interleave;
    for (int64_t i = 0; i < f->units; i++)
        blocks += f->unit[i].row_blocks;
    int64_t tasks = groups * f->interleave * f->most_blocks, bias = 0;
    if (f->c.dbias.data && !f->bias_once)
        bias = f->most_blocks * (f->c.dbias.shape[0] > 1 ? f->c.kv_heads : 1);
    if (serial) {
        prepare_rows(f, 0, blocks, 0);
        run_tasks(f, 0, tasks, 0);
        run_bias(f, 0, bias, 0);
    } else {
        parallel_for(blocks, 4, prepare_rows, f);
        parallel_for(tasks, 1, run_tasks, f);
        parallel_for(bias, 1, run_bias, f);
    }
    if (f->c.dsink.data)
        add_sinks(f);
}

/* Rows of x that belong to no sequence get zeros. */
static void clear_rows(const struct tensor *x, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
        for (int64_t h = 0; h < x->shape[1]; h++)
            memset((void *)(uintptr_t)element(x, n, h), 0,
                   (size_t)x->shape[2] * dtype_size(x->dtype));
}

static tril_status backward(struct op_context *ctx, const struct tensor *args, const void *params,
                            struct tril_error *err) {
    struct backward f;
    struct attention_call *c = &f.c;
    tril_status st = attention_unpack_backward(c, args, params, err);
    if (st != TRIL_OK)
        return st;
    const struct attention_params *p = c->params;
    f.group = c->heads / c->kv_heads;
    f.width = round_up(c->width, PANEL);
    f.ld = f.width >= 128 ? f.width + 16 : f.width; /* rows not a power of two apart */
    f.amx = false;
    f.row_block = ROW_BLOCK;
    f.step = TILE_ROWS;
#if AMX_TILES
    if (c->q.dtype == DT_BF16 && c->k.dtype == DT_BF16 && c->dout.dtype == DT_BF16) {
        f.amx = true;
        f.row_block = ROW_BLOCK_AMX;
        f.step = AMX_STEP;
    }
#endif
    f.softcap = p->softcap;
    f.q_factor = p->softcap > 0 ? p->scale / p->softcap : p->scale * (float)LOG2E;
    f.softcap_out = p->softcap * (float)LOG2E;
    f.dk_factor = p->softcap > 0 ? p->softcap : (float)(1 / LOG2E);
    f.score_factor = 1;
    if (f.amx) {
        f.score_factor = f.q_factor;
        f.dk_factor = p->scale;
    }
    f.adjusted = p->softcap > 0 || c->slopes.data || c->bias.data || p->dropout > 0;
    f.bias_once =
        c->dbias.data && c->dbias.shape[0] == c->heads && c->sequences == 1 && p->softcap == 0;
    f.keep_factor = 1 / (1 - p->dropout);
    f.drop_threshold = (uint32_t)ceilf(p->dropout * 0x1p24f);
    f.dropout = philox_begin(&c->key);
    f.memory = NULL;
    f.memory_bytes = 0;
    f.next_sequence = f.next_head = 0;
    while (wave_next(&f))
        ;
    f.worker_bytes = worker_size(&f);
    int64_t workers = f.worker_bytes * threads_count(), sinks = round_up(c->heads * 8, 64);
    int64_t bytes = sinks + workers + f.memory_bytes;
    char *scratch = op_scratch(ctx, bytes);
    if (!scratch)
        return op_scratch_error(ctx, "attention_backward", bytes, err);
    f.dsink = (double *)(void *)scratch;
    f.worker = scratch + sinks;
    memset(f.dsink, 0, (size_t)c->heads * 8);
    if (c->dbias.data)
        parallel_for(c->dbias.shape[0] * c->dbias.shape[1], 16, clear_bias, &f);
    int64_t next_q = 0, next_k = 0;
    for (int64_t s = 0; s < c->sequences; s++) {
        clear_rows(&c->dq, next_q, c->q_offsets[s]);
        clear_rows(&c->dk, next_k, c->kv_start[s]);
        clear_rows(&c->dv, next_k, c->kv_start[s]);
        next_q = c->q_offsets[s + 1];
        next_k = c->kv_start[s] + c->kv_length[s];
    }
    clear_rows(&c->dq, next_q, c->rows);
    clear_rows(&c->dk, next_k, c->keys);
    clear_rows(&c->dv, next_k, c->keys);
    f.memory = f.worker + workers;
    f.next_sequence = f.next_head = 0;
    bool serial =
        threads_count() == 1 || 10 * (double)c->width * attention_most_pairs(c) < SERIAL_FLOPS;
    while (wave_next(&f)) {
        f.interleave = min_i64(f.units, threads_count());
        wave_run(&f, serial);
    }
    for (int64_t h = 0; h < c->heads && c->dsink.data; h++)
        ((float *)c->dsink.data)[h] = (float)f.dsink[h];
    return TRIL_OK;
}

void LEVEL(register_attention_backward)(struct backend *b) {
    b->table[OP_ATTENTION_BACKWARD] = backward;
}
