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
 * dQ is shared by the tasks of a unit. Each block of rows has a counter, and key block j adds to it
 * when the counter says that blocks 0 .. j - 1 have: the order of summation is fixed, whatever the
 * threads, and the tasks of one head run as a wavefront. Nobody waits for ever, because
 * parallel_for hands out tasks in ascending order: the task waited for has begun. Groups of as many
 * units as there are threads are interleaved, so that waiting is rare where there is more than one
 * unit.
 *
 * Q (times scale * log2(e)), dO and dQ of a wave of units lie in scratch as dense fp32. */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>

#include "base/memory.h"
#include "base/threads.h"
#include "cpu/kernels/attention_score.h"

#define ROW_BLOCK 48 /* a multiple of every TILE_ROWS */
#define WAVE_UNITS 256
#define WAVE_BYTES (24 << 20)
#define SERIAL_FLOPS 4e5
#define TAIL_ROWS (KEY_BLOCK % TILE_ROWS) /* 4, or 0 */

struct unit {
    int64_t sequence, kv_head;
    int64_t rows, length, row_blocks;
    float *q, *dout, *dq;  /* [row_blocks * ROW_BLOCK, ld] */
    float *lse, *delta;    /* lse in base 2; +inf for a row that sees nothing */
    int32_t *seen;         /* keys [0, seen) are visible; ascending; 0 for the padding */
    _Atomic int32_t *done; /* [row_blocks]: key blocks that have added to dq */
};

struct backward {
    struct attention_call c;
    int64_t group, width, ld;
    float q_factor, softcap, softcap_out, keep_factor, dk_factor;
    uint32_t drop_threshold;
    struct philox dropout;
    struct unit unit[WAVE_UNITS];
    int64_t units, interleave, most_blocks; /* most_blocks: key blocks of the longest unit */
    int64_t next_sequence, next_head;
    char *worker, *memory;
    int64_t worker_bytes, memory_bytes;
};

/* A worker's memory for one key block. */
struct block {
    float *keys_t, *values_t; /* [KEY_BLOCK / PANEL][d][PANEL] */
    float *keys;              /* [width / PANEL][KEY_BLOCK][PANEL] */
    float *dk, *dv;           /* [KEY_BLOCK, width] */
    float *p, *ds;            /* [ROW_BLOCK, KEY_BLOCK] */
};

static int64_t worker_size(int64_t width) {
    int64_t floats = 5 * KEY_BLOCK * width + 2 * ROW_BLOCK * KEY_BLOCK;
    return round_up(floats * 4, 4096) + 64 * 9; /* not a power of two apart */
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
    return b;
}

/* Bytes of a unit in scratch, and its pointers (memory may be 0, for the sizes). */
static int64_t unit_layout(struct unit *u, int64_t ld, uintptr_t memory) {
    int64_t rows = u->row_blocks * ROW_BLOCK, matrix = rows * ld * 4;
    u->q = (float *)memory;
    u->dout = (float *)(memory + (uintptr_t)matrix);
    u->dq = (float *)(memory + (uintptr_t)(2 * matrix));
    memory += (uintptr_t)(3 * matrix);
    u->lse = (float *)memory;
    u->delta = (float *)(memory + (uintptr_t)(4 * rows));
    u->seen = (int32_t *)(memory + (uintptr_t)(8 * rows));
    u->done = (_Atomic int32_t *)(memory + (uintptr_t)(12 * rows));
    return round_up(3 * matrix + 12 * rows + 4 * u->row_blocks, 64);
}

/* ------------------------------------------------------------------ rows */

static void unit_row(const struct backward *f, const struct unit *u, int64_t r, int64_t *n,
                     int64_t *head) {
    *n = f->c.q_offsets[u->sequence] + r / f->group;
    *head = u->kv_head * f->group + r % f->group;
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
    (void)worker;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = f->unit;
        int64_t block = item;
        for (; block >= u->row_blocks; u++)
            block -= u->row_blocks;
        for (int64_t r = block * ROW_BLOCK; r < (block + 1) * ROW_BLOCK; r++) {
            float *q = u->q + r * f->ld, *dout = u->dout + r * f->ld;
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
        atomic_store_explicit(&u->done[block], 0, memory_order_relaxed);
        if (u->seen[min_i64(u->rows, (block + 1) * ROW_BLOCK) - 1] == 0)
            for (int64_t r = block * ROW_BLOCK; r < min_i64(u->rows, (block + 1) * ROW_BLOCK);
                 r++) {
                int64_t n, head;
                unit_row(f, u, r, &n, &head);
                memset((void *)(uintptr_t)element(&c->dq, n, head), 0,
                       (size_t)c->width * dtype_size(c->dq.dtype));
            }
    }
}

/* ------------------------------------------------------------------ one block of rows and keys */

/* From scores in p and dP in ds (whole vectors of `vectors`): probabilities (those that dropout
 * leaves) and dS; zero where unseen and from there to KEY_BLOCK. Row r of u, keys from j0. */
SIMD void gradient_row(bool plain, const struct backward *f, const struct unit *u, int64_t r,
                       int64_t j0, int64_t vectors, float *p, float *ds) {
    int64_t visible = u->seen[r] - j0;
    vf lse = vf_set(u->lse[r]), delta = vf_set(u->delta[r]), keep = vf_set(f->keep_factor);
    vi limit = vi_set((int32_t)min_i64(max_i64(visible, 0), KEY_BLOCK)), lane = vi_iota();
    vf slope = vf_zero();
    vi distance = lane;
    uint64_t element = 0;
    vi mask[2] = {lane, lane};
    if (!plain) {
        int64_t n, head;
        unit_row(f, u, r < u->rows ? r : 0, &n, &head);
        if (f->drop_threshold)
            element = attention_dropout_element(&f->c, head, n, j0);
        if (f->c.slopes.data) {
            int64_t first = f->c.q_offsets[u->sequence];
            int64_t own = f->c.q_offsets[u->sequence + 1] - first;
            slope = vf_set(-(float)LOG2E * ((const float *)f->c.slopes.data)[head]);
            distance = vi_set((int32_t)(u->length - own + (n - first) - j0)) - lane;
        }
    }
    int64_t v = 0;
    for (; v < vectors; v++) {
        vf s = vf_load(p + v * VF_WIDTH), g = vf_load(ds + v * VF_WIDTH), inner = s;
        if (!plain && f->softcap > 0) {
            vf t = vf_tanh(s);
            s = t * vf_set(f->softcap_out);
            inner = vf_fma(-t, t, vf_set(1.0f));
        }
        if (!plain) {
            s = vf_fma(slope, vf_abs(vf_from_vi(distance)), s);
            distance -= vi_set(VF_WIDTH);
        }
        vf x = vf_exp2(s - lse);
        x = vf_select(lane < limit, x, vf_zero());
        lane += vi_set(VF_WIDTH);
        vf kept = x;
        if (!plain && f->drop_threshold) {
            if (v % 2 == 0)
                dropout_masks(&f->dropout, element + (uint64_t)(v * VF_WIDTH), f->drop_threshold,
                              mask);
            kept = vf_select(mask[v % 2], x, vf_zero());
            g = vf_select(mask[v % 2], g * keep, vf_zero());
        }
        vf d = x * (g - delta);
        if (!plain && f->softcap > 0)
            d *= inner;
        vf_store(p + v * VF_WIDTH, kept);
        vf_store(ds + v * VF_WIDTH, d);
    }
    for (; v < KEY_BLOCK / VF_WIDTH; v++) {
        vf_store(p + v * VF_WIDTH, vf_zero());
        vf_store(ds + v * VF_WIDTH, vf_zero());
    }
}

/* Products over channels: out [TILE_ROWS, panels * PANEL] = a b, b packed by pack_transposed. */
static void tile_channels(int64_t panels, int64_t d, const float *a, int64_t lda, const float *b,
                          float *out) {
    for (int64_t p = 0; p < panels; p++)
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

static void row_block(const struct backward *f, const struct unit *u, const struct block *b,
                      int64_t block, int64_t j0, int64_t keys) {
    int64_t d = f->c.width, r0 = block * ROW_BLOCK, ld = f->ld;
    const float *q = u->q + r0 * ld, *dout = u->dout + r0 * ld;
    bool plain = f->softcap == 0 && !f->c.slopes.data && !f->drop_threshold;
    int64_t most[ROW_BLOCK / 4], first = ROW_BLOCK, last = 0; /* visible rows [first, last) */
    for (int64_t r = 0; r < ROW_BLOCK; r += TILE_ROWS) {
        int64_t seen = 0;
        for (int64_t i = r; i < r + TILE_ROWS; i++)
            seen = max_i64(seen, u->seen[r0 + i]);
        seen = most[r / TILE_ROWS] = min_i64(seen - j0, keys);
        if (seen <= 0)
            continue;
        first = min_i64(first, r);
        last = r + TILE_ROWS;
        float *p = b->p + r * KEY_BLOCK, *ds = b->ds + r * KEY_BLOCK;
        int64_t panels = (seen + PANEL - 1) / PANEL;
        tile_channels(panels, d, q + r * ld, ld, b->keys_t, p);
        tile_channels(panels, d, dout + r * ld, ld, b->values_t, ds);
        for (int64_t i = 0; i < TILE_ROWS; i++)
            if (plain)
                gradient_row(true, f, u, r0 + r + i, j0, 2 * panels, p + i * KEY_BLOCK,
                             ds + i * KEY_BLOCK);
            else
                gradient_row(false, f, u, r0 + r + i, j0, 2 * panels, p + i * KEY_BLOCK,
                             ds + i * KEY_BLOCK);
    }
    /* Key tile by key tile, from the first row that sees one of its keys. */
    for (int64_t k = 0, r = first; k < keys; k += TILE_ROWS) {
        while (r < last && u->seen[r0 + r] <= j0 + k)
            r++;
        void (*product)(int64_t, int64_t, const float *, const float *, int64_t, float *, int64_t) =
            k + TILE_ROWS <= KEY_BLOCK ? tile_queries : tile_queries_tail;
        int64_t at = r * KEY_BLOCK + k;
        product(last - r, d, b->p + at, dout + r * ld, ld, b->dv + k * f->width, f->width);
        product(last - r, d, b->ds + at, q + r * ld, ld, b->dk + k * f->width, f->width);
    }
    int32_t turn = (int32_t)(j0 / KEY_BLOCK);
    await(&u->done[block], turn);
    for (int64_t r = first; r < last; r += TILE_ROWS)
        if (most[r / TILE_ROWS] > 0)
            tile_keys(most[r / TILE_ROWS], d, b->ds + r * KEY_BLOCK, b->keys, u->dq + (r0 + r) * ld,
                      ld);
    /* The last key block that these rows see writes them out. */
    int64_t end = min_i64(u->rows, r0 + ROW_BLOCK);
    if (u->seen[end - 1] <= j0 + KEY_BLOCK)
        for (int64_t r = r0; r < end; r++) {
            int64_t n, head;
            unit_row(f, u, r, &n, &head);
            row_from_float((void *)(uintptr_t)element(&f->c.dq, n, head), f->c.dq.dtype,
                           u->dq + r * ld, d, f->c.params->scale);
        }
    atomic_store_explicit(&u->done[block], turn + 1, memory_order_release);
}

static void key_block(const struct backward *f, const struct unit *u, int64_t j0, int worker) {
    const struct attention_call *c = &f->c;
    struct block b = block_at(f->worker + worker * f->worker_bytes, f->width);
    int64_t keys = min_i64(KEY_BLOCK, u->length - j0), d = c->width;
    const void *row[KEY_BLOCK + PREFETCH_ROWS];
    int64_t start = c->kv_start[u->sequence] + j0;
    for (int64_t j = 0; j < KEY_BLOCK + PREFETCH_ROWS; j++)
        row[j] = element(&c->v, start + min_i64(j, keys - 1), u->kv_head);
    pack_transposed(b.values_t, row, keys, d, c->v.dtype);
    for (int64_t j = 0; j < KEY_BLOCK + PREFETCH_ROWS; j++)
        row[j] = element(&c->k, start + min_i64(j, keys - 1), u->kv_head);
    pack_transposed(b.keys_t, row, keys, d, c->k.dtype);
    pack_rows(b.keys, row, keys, d, c->k.dtype);
    memset(b.dk, 0, (size_t)(2 * KEY_BLOCK * f->width) * 4);
    for (int64_t i = 0; i < u->row_blocks; i++)
        if (u->seen[min_i64(u->rows, (i + 1) * ROW_BLOCK) - 1] > j0)
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
    for (int64_t task = begin; task < end; task++) {
        int64_t group = task / (f->interleave * f->most_blocks);
        int64_t local = task % (f->interleave * f->most_blocks);
        int64_t index = group * f->interleave + local % f->interleave;
        int64_t j0 = local / f->interleave * KEY_BLOCK;
        if (index < f->units && j0 < f->unit[index].length)
            key_block(f, &f->unit[index], j0, worker);
    }
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
        u->row_blocks = (u->rows + ROW_BLOCK - 1) / ROW_BLOCK;
        int64_t bytes = unit_layout(u, f->ld, (uintptr_t)f->memory + (uintptr_t)used);
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
    int64_t tasks = groups * f->interleave * f->most_blocks;
    if (serial) {
        prepare_rows(f, 0, blocks, 0);
        run_tasks(f, 0, tasks, 0);
    } else {
        parallel_for(blocks, 4, prepare_rows, f);
        parallel_for(tasks, 1, run_tasks, f);
    }
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
    if (!c->plain || c->params->rules || c->bias.data || c->sink.data || c->k.dtype == DT_I8)
        return op_info_get(OP_ATTENTION_BACKWARD)->reference(ctx, args, params, err);
    const struct attention_params *p = c->params;
    f.group = c->heads / c->kv_heads;
    f.width = round_up(c->width, PANEL);
    f.ld = f.width >= 128 ? f.width + 16 : f.width; /* rows not a power of two apart */
    f.softcap = p->softcap;
    f.q_factor = p->softcap > 0 ? p->scale / p->softcap : p->scale * (float)LOG2E;
    f.softcap_out = p->softcap * (float)LOG2E;
    f.dk_factor = p->softcap > 0 ? p->softcap : (float)(1 / LOG2E);
    f.keep_factor = 1 / (1 - p->dropout);
    f.drop_threshold = (uint32_t)ceilf(p->dropout * 0x1p24f);
    f.dropout = philox_begin(&c->key);
    f.memory = NULL;
    f.memory_bytes = 0;
    f.next_sequence = f.next_head = 0;
    while (wave_next(&f))
        ;
    f.worker_bytes = worker_size(f.width);
    int64_t workers = f.worker_bytes * threads_count();
    f.worker = op_scratch(ctx, workers + f.memory_bytes);
    if (!f.worker)
        return op_scratch_error(ctx, "attention_backward", workers + f.memory_bytes, err);
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
    bool serial = threads_count() == 1 || 10 * (double)c->width * attention_pairs(c) < SERIAL_FLOPS;
    while (wave_next(&f)) {
        f.interleave = min_i64(f.units, threads_count());
        wave_run(&f, serial);
    }
    return TRIL_OK;
}

void LEVEL(register_attention_backward)(struct backend *b) {
    b->table[OP_ATTENTION_BACKWARD] = backward;
}
