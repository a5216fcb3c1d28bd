/* Flash attention, forward (Dao 2023; online softmax: Milakov and Gimelshein 2018).
 *
 * A unit is one sequence and one key/value head. Its rows are the query rows of all heads of the
 * group, position by position, so that grouped heads share every key read. Keys are taken in blocks
 * of KEY_BLOCK, and blocks in splits of SPLIT_KEYS: every split has a softmax of its own, and
 * splits are merged in order. Blocks and splits are counted from key 0, so a row's result does not
 * depend on the other rows of the call, on the number of threads, or on whether splits ran in
 * parallel: decoding through a cache, prefill in chunks and one full pass give the same bits.
 *
 *   packed  units with many rows: K transposed and V in panels of fp32 are packed once per wave of
 *           units (WAVE_BYTES); tasks are (unit, block of rows), for TILE_ROWS rows a step:
 *           scores = q K^T -> softmax -> o = o * correction + p V
 *   direct  units with at most DIRECT_ROWS rows (decoding) pack one block of keys at a time, in the
 *           first-level cache
 *
 * With AMX and q, k and v in bf16 both run on tiles (attention_amx.h): P is then rounded to bf16,
 * and steps are of 32 rows (direct: 16).
 *
 * Where a rule excludes something, splits, blocks of keys and tiles of rows that see nothing of
 * each other are skipped, and in what remains only panels of keys are computed that some row of the
 * tile sees (attention_score.h). What is skipped would have added zeros: a row's bits do not
 * change.
 *
 * Scores are in base 2: q carries scale * log2(e). A sink is one more score, added at the end. */
#include <math.h>

#include "base/memory.h"
#include "base/threads.h"
#include "cpu/kernels/attention_direct.h"
#include "cpu/kernels/attention_small.h"

#define DIRECT_ROWS 16
#define WAVE_BYTES (24 << 20)

/* ------------------------------------------------------------------ packed */

/* The TILE_ROWS rows from r on and keys [from, to) of the block from j0 on, `from` a panel's first.
 */
static void packed_step(const struct forward *f, const struct unit *u, struct rows *b, int64_t r,
                        int64_t j0, int64_t from, int64_t to, const uint64_t *mask) {
    const int64_t d = f->c.width, width = f->width, last = (to + PANEL - 1) / PANEL;
    const float *q = b->q + r * width, *keys = u->keys + j0 * d;
    float correction[TILE_ROWS];
    for (int64_t p = from / PANEL; p < last; p++)
        tile(TILE_ROWS, 2, START_ZERO, d, q, width, 1, keys + p * PANEL * d, PANEL,
             b->s + p * PANEL, KEY_BLOCK, NULL);
    softmax_step(f, b, r, TILE_ROWS, j0, from / VF_WIDTH, 2 * last, mask, correction);
    const float *values = u->values + j0 * width + from * PANEL, *s = b->s + from;
    float *o = b->part.o + r * width;
    int64_t t = 0;
    for (; t + PANEL <= d + VF_WIDTH - 1; t += PANEL)
        tile(TILE_ROWS, 2, START_SCALE, to - from, s, KEY_BLOCK, 1, values + t * KEY_BLOCK, PANEL,
             o + t, width, correction);
    if (t < d)
        tile(TILE_ROWS, 1, START_SCALE, to - from, s, KEY_BLOCK, 1, values + t * KEY_BLOCK, PANEL,
             o + t, width, correction);
}

/* Keys [begin, end) of a split, begin a multiple of KEY_BLOCK, into b->part. */
static void packed_split(const struct forward *f, const struct unit *u, struct rows *b,
                         int64_t begin, int64_t end) {
    uint64_t words[TILE_ROWS];
    const uint64_t *mask;
    state_clear(&b->part, b->padded, f->width);
    for (int64_t j0 = begin; j0 < end; j0 += KEY_BLOCK) {
        if (!rows_any(f, b, j0, min_i64(j0 + KEY_BLOCK, end)))
            continue;
        for (int64_t r = 0; r < b->padded; r += TILE_ROWS) {
            int64_t from, to;
            if (!tile_keys(f, b, r, TILE_ROWS, j0, end, &from, &to, words, &mask))
                continue;
            for (int64_t k = from / f->key_step * f->key_step; k < to; k += f->key_step)
                packed_step(f, u, b, r, j0, max_i64(from, k) / PANEL * PANEL,
                            min_i64(to, k + f->key_step), mask);
        }
    }
}

/* Where the rows of keys [j0, end) lie, as many as a packing and its prefetches want, the list
 * filled up with the last one. */
static void key_rows(const struct forward *f, const struct unit *u, const struct tensor *t,
                     const struct tensor *scale, int64_t j0, int64_t end, struct row_list *list) {
    const struct attention_call *c = &f->c;
    int64_t count = min_i64(KEY_BLOCK + PREFETCH_ROWS, end - j0);
    list->count = min_i64(KEY_BLOCK, end - j0);
    if (c->pages) {
        /* Keys of missing pages, which nobody sees, are zeros. */
        static const float zeros[256];
        for (int64_t j = 0; j < count; j++) {
            int64_t at = attention_key_row(c, u->sequence, j0 + j);
            list->row[j] = at < 0 ? zeros : element(t, at, u->kv_head);
        }
    } else {
        const char *first = element(t, c->kv_start[u->sequence] + j0, u->kv_head);
        int64_t step = t->stride[0] * dtype_bytes(t->dtype);
        for (int64_t j = 0; j < count; j++)
            list->row[j] = first + j * step;
    }
    for (int64_t j = count; j < KEY_BLOCK + PREFETCH_ROWS; j++)
        list->row[j] = list->row[count - 1];
    for (int64_t j = 0; j < KEY_BLOCK && scale->data; j++) {
        int64_t at = j < list->count ? attention_key_row(c, u->sequence, j0 + j) : -1;
        list->scale[j] = at < 0 ? 0 : ((const float *)scale->data)[at * c->kv_heads + u->kv_head];
    }
}

/* ------------------------------------------------------------------ AMX */

#if AMX_TILES
/* Keys [begin, end) of a split into b->part; packed or direct. */
static void amx_split(const struct forward *f, const struct unit *u, struct rows *b, int64_t begin,
                      int64_t end) {
    int64_t d = f->c.width, width = f->width, step = b->step;
    float correction[AMX_STEP];
    uint64_t words[AMX_STEP];
    const uint64_t *mask;
    struct row_list list;
    state_clear(&b->part, b->padded, width);
    for (int64_t j0 = begin; j0 < end; j0 += KEY_BLOCK) {
        int64_t last = min_i64(j0 + KEY_BLOCK, end), from, to;
        if (!rows_any(f, b, j0, last))
            continue;
        char *keys, *values;
        if (u->keys) {
            keys = (char *)u->keys + j0 * width * 2;
            values = (char *)u->values + j0 * width * 2;
        } else {
            keys = (char *)b->block;
            values = keys + KEY_BLOCK * width * 2;
            key_rows(f, u, &f->c.k, &f->c.k_scale, j0, end, &list);
            amx_pack_keys(keys, &list, d, width);
            key_rows(f, u, &f->c.v, &f->c.v_scale, j0, end, &list);
            amx_pack_values(values, &list, d, width);
        }
        for (int64_t r = 0; r < b->padded; r += step) {
            if (!tile_keys(f, b, r, step, j0, end, &from, &to, words, &mask))
                continue;
            to = round_up(to, 32);
            for (int64_t k = from / f->key_step * f->key_step; k < to; k += f->key_step) {
                int64_t first = max_i64(from / 32 * 32, k), last_key = min_i64(to, k + f->key_step);
                amx_scores(step, (const char *)b->q + r * width * 2, keys, first, last_key, width,
                           b->s);
                softmax_step(f, b, r, step, j0, first / VF_WIDTH, last_key / VF_WIDTH, mask,
                             correction);
                amx_pack_probabilities(step, b->s, first, last_key, (char *)b->p);
                amx_add_values(step, (const char *)b->p, values, first, last_key, width, correction,
                               b->part.o + r * width);
            }
        }
    }
}
#endif

/* ------------------------------------------------------------------ a block of rows */

/* Row r of `total` becomes the softmax over both parts' keys. l: every lane scaled alike. */
static __attribute__((noinline)) void merge_row(const struct state *total, const struct state *part,
                                                int64_t r, int64_t width) {
    float a = total->m[r], b = part->m[r], m = a > b ? a : b;
    vf base = vf_set(m == -INFINITY ? 0.0f : m);
    vf x = vf_exp2(vf_set(a) - base), y = vf_exp2(vf_set(b) - base);
    vf l = vf_load(part->l + r * VF_WIDTH) * y;
    vf_store(total->l + r * VF_WIDTH, vf_fma(vf_load(total->l + r * VF_WIDTH), x, l));
    for (int64_t t = r * width; t < (r + 1) * width; t += VF_WIDTH)
        vf_store(total->o + t, vf_fma(vf_load(total->o + t), x, vf_load(part->o + t) * y));
    total->m[r] = m;
}

static void rows_store(const struct forward *f, const struct unit *u, const struct rows *b,
                       const struct state *s) {
    const struct attention_call *c = &f->c;
    const float *sink = c->sink.data;
    for (int64_t r = 0; r < b->count; r++) {
        if (b->row[r] < 0)
            continue;
        float l = vf_sum(vf_load(s->l + r * VF_WIDTH)), m = s->m[r], factor = f->keep_factor;
        if (sink) { /* one more score */
            float x = sink[b->head[r]] * (float)LOG2E, larger = x > m ? x : m;
            float base = larger == -INFINITY ? 0.0f : larger;
            float mine = vf_exp2(vf_set(m - base))[0];
            l = l * mine + vf_exp2(vf_set(x - base))[0];
            factor *= mine;
            m = larger;
        }
        void *o = (void *)(uintptr_t)element(&c->o, b->row[r], b->head[r]);
        if (u->direct)
            direct_order(f, s->o + r * f->width);
        row_from_float(o, c->o.dtype, s->o + r * f->width, c->width, l == 0 ? 0.0f : factor / l);
        if (c->lse.data)
            ((float *)c->lse.data)[b->head[r] * c->rows + b->row[r]] = row_lse(m, l);
    }
}

static int64_t split_count(const struct unit *u) {
    int64_t n = (u->length + SPLIT_KEYS - 1) / SPLIT_KEYS;
    return n ? n : 1;
}

/* The last key that any row of b sees, plus one. */
static int64_t rows_seen(const struct rows *b) {
    int64_t most = 0;
    for (int64_t r = 0; r < b->count; r++)
        most = max_i64(most, b->seen[r]);
    return most;
}

static void run_split(const struct forward *f, const struct unit *u, struct rows *b, int64_t split,
                      int64_t seen) {
    int64_t begin = split * SPLIT_KEYS, end = min_i64(begin + SPLIT_KEYS, seen);
#if AMX_TILES
    if (f->amx) {
        amx_split(f, u, b, begin, end);
        return;
    }
#endif
    if (u->keys)
        packed_split(f, u, b, begin, end);
    else
        direct_split(f, u, b, begin, end);
}

/* Whether rows of b, which see no keys from `seen` on, see any of a split. */
static bool split_seen(const struct forward *f, const struct rows *b, int64_t split, int64_t seen) {
    int64_t begin = split * SPLIT_KEYS;
    return begin < seen && rows_any(f, b, begin, min_i64(begin + SPLIT_KEYS, seen));
}

static const struct unit *find_unit(const struct forward *f, int64_t task, bool blocks) {
    int64_t low = 0, high = f->units - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        const struct unit *u = &f->unit[middle];
        if ((blocks ? u->first_block : u->first_task) <= task)
            low = middle;
        else
            high = middle - 1;
    }
    return &f->unit[low];
}

/* Row blocks from the last, whose rows see the most keys, to the first. */
static struct rows task_rows(const struct forward *f, const struct unit *u, int64_t block,
                             int worker) {
    struct rows b = rows_at(f->worker + worker * f->worker_bytes, f->width);
    int64_t begin = (u->blocks - 1 - block) * u->row_block;
    rows_load(f, u, begin, min_i64(u->row_block, u->rows - begin), &b);
    return b;
}

static void run_tasks(void *arg, int64_t begin, int64_t end, int worker) {
    const struct forward *f = arg;
    tiles_begin(f->amx);
    for (int64_t task = begin; task < end; task++) {
        const struct unit *u = find_unit(f, task, false);
        struct rows b = task_rows(f, u, task - u->first_task, worker);
        int64_t seen = rows_seen(&b);
        bool some = false;
        for (int64_t split = 0; split * SPLIT_KEYS < seen; split++) {
            if (!split_seen(f, &b, split, seen))
                continue;
            run_split(f, u, &b, split, seen);
            if (!some) {
                struct state first = b.part;
                b.part = b.total;
                b.total = first;
            } else {
                for (int64_t r = 0; r < b.count; r++)
                    merge_row(&b.total, &b.part, r, f->width);
            }
            some = true;
        }
        if (!some)
            state_clear(&b.total, b.count, f->width);
        rows_store(f, u, &b, &b.total);
    }
    tiles_end(f->amx);
}

/* The same with a task for every split, and the merging in a second loop. */
static void run_split_tasks(void *arg, int64_t begin, int64_t end, int worker) {
    const struct forward *f = arg;
    tiles_begin(f->amx);
    for (int64_t task = begin; task < end; task++) {
        const struct unit *u = find_unit(f, task, false);
        int64_t local = task - u->first_task, splits = split_count(u);
        struct rows b = task_rows(f, u, local / splits, worker);
        int64_t seen = rows_seen(&b), split = local % splits;
        if (!split_seen(f, &b, split, seen))
            continue;
        b.part = state_at(u->partial + local * state_floats(u->state_rows, f->width), u->state_rows,
                          f->width);
        run_split(f, u, &b, split, seen);
    }
    tiles_end(f->amx);
}

static void run_merges(void *arg, int64_t begin, int64_t end, int worker) {
    const struct forward *f = arg;
    for (int64_t i = begin; i < end; i++) {
        int64_t task = i;
        const struct unit *u = f->unit;
        for (; task >= u->blocks; u++)
            task -= u->blocks;
        struct rows b = task_rows(f, u, task, worker);
        int64_t seen = rows_seen(&b), rows = u->state_rows;
        float *memory = u->partial + task * split_count(u) * state_floats(rows, f->width);
        struct state total = b.total;
        bool some = false;
        for (int64_t split = 0; split * SPLIT_KEYS < seen; split++) {
            struct state part = state_at(memory, rows, f->width);
            memory += state_floats(rows, f->width);
            if (!split_seen(f, &b, split, seen))
                continue;
            if (!some)
                total = part;
            else
                for (int64_t r = 0; r < b.count; r++)
                    merge_row(&total, &part, r, f->width);
            some = true;
        }
        if (!some)
            state_clear(&total, b.count, f->width);
        rows_store(f, u, &b, &total);
    }
}

static void run_packing(void *arg, int64_t begin, int64_t end, int worker) {
    const struct forward *f = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const struct unit *u = find_unit(f, i, true);
        struct row_list list;
        int64_t j0 = (i - u->first_block) * KEY_BLOCK;
        int64_t count = min_i64(KEY_BLOCK, u->length - j0);
        struct row_range all = {u->sequence, u->kv_head, f->group, 0, u->rows};
        if (!f->c.plain && !range_any(&f->c, &all, j0, j0 + count))
            continue;
        key_rows(f, u, &f->c.k, &f->c.k_scale, j0, u->length, &list);
#if AMX_TILES
        if (f->amx) {
            amx_pack_keys((char *)u->keys + j0 * f->width * 2, &list, f->c.width, f->width);
            key_rows(f, u, &f->c.v, &f->c.v_scale, j0, u->length, &list);
            amx_pack_values((char *)u->values + j0 * f->width * 2, &list, f->c.width, f->width);
            continue;
        }
#endif
        pack_transposed(u->keys + j0 * f->c.width, &list, f->c.width, f->c.k.dtype);
        key_rows(f, u, &f->c.v, &f->c.v_scale, j0, u->length, &list);
        pack_rows(u->values + j0 * f->width, &list, f->c.width, f->c.v.dtype);
    }
}

/* ------------------------------------------------------------------ waves */

/* How many key/value heads a direct unit has: those whose rows lie side by side in the cache, but
 * few enough to leave every thread something to do. */
static int64_t direct_heads(const struct forward *f, int64_t rows, int64_t splits) {
    const struct attention_call *c = &f->c;
    int64_t most = min_i64(c->kv_heads, ROW_BLOCK / direct_padded(rows));
    bool apart = c->k.stride[1] * c->kv_heads > c->k.stride[0] ||
                 c->v.stride[1] * c->kv_heads > c->v.stride[0];
    if (f->amx || apart)
        return 1;
    int64_t wanted = 2 * threads_count();
    while (most > 1 && c->sequences * splits * ((c->kv_heads + most - 1) / most) < wanted)
        most = (most + 1) / 2;
    return most;
}

/* Cuts a unit's rows into blocks. */
static void unit_cut(const struct forward *f, struct unit *u) {
    u->row_block = u->direct ? min_i64(u->rows, ROW_BLOCK) : f->row_block;
    u->blocks = (u->rows + u->row_block - 1) / u->row_block;
    u->state_rows =
        u->direct ? u->heads * direct_padded(u->row_block) : round_up(u->row_block, f->step);
}

/* Takes the next units until their packed keys fill a wave; false when none are left. */
static bool wave_next(struct forward *f) {
    const struct attention_call *c = &f->c;
    int64_t packed = 0, threads = threads_count();
    double pairs = 0;
    f->units = f->tasks = f->blocks = 0;
    while (f->next_sequence < c->sequences && f->units < WAVE_UNITS) {
        int64_t s = f->next_sequence, rows = (c->q_offsets[s + 1] - c->q_offsets[s]) * f->group;
        if (rows == 0 || f->next_head == c->kv_heads) {
            f->next_sequence++;
            f->next_head = 0;
            continue;
        }
        struct unit *u = &f->unit[f->units];
        *u = (struct unit){.sequence = s, .kv_head = f->next_head, .heads = 1, .rows = rows};
        u->length = c->kv_length[s];
        bool direct = (rows <= DIRECT_ROWS && !f->blocked) || u->length == 0;
        u->direct = direct && !f->amx;
        u->first_block = f->blocks;
        if (!direct) {
            int64_t keys = round_up(u->length, KEY_BLOCK);
            int64_t key_bytes = f->amx ? f->width * 2 : c->width * 4;
            int64_t bytes = keys * (key_bytes + f->width * (f->amx ? 2 : 4));
            if (f->units && packed + bytes > WAVE_BYTES)
                break;
            u->keys = (float *)((uintptr_t)f->packed + (uintptr_t)packed);
            u->values = (float *)((uintptr_t)u->keys + (uintptr_t)(keys * key_bytes));
            f->blocks += keys / KEY_BLOCK;
            packed += bytes;
        } else if (rows <= DIRECT_ROWS)
            u->heads = min_i64(direct_heads(f, rows, split_count(u)), c->kv_heads - f->next_head);
        pairs += (double)(rows * u->heads) * (double)u->length;
        f->next_head += u->heads;
        f->units++;
    }
    /* Blocks of rows: smaller ones where there is too little for the threads. */
    bool serial = threads == 1 || 4.0 * pairs * (double)c->width < SERIAL_FLOPS;
    int64_t given = c->params->block_q;
    f->row_block = given > 0 ? min_i64(round_up(given, f->step), ROW_BLOCK) : ROW_BLOCK;
    f->splits_parallel = 0;
    for (;;) {
        int64_t tasks = 0, splits = 0;
        for (int64_t i = 0; i < f->units; i++) {
            unit_cut(f, &f->unit[i]);
            tasks += f->unit[i].blocks;
            splits = max_i64(splits, split_count(&f->unit[i]));
        }
        f->tasks = tasks;
        if (serial || tasks >= 8 * threads)
            break;
        if (!given && f->row_block > (f->amx ? 1 : 2) * f->step && f->row_block > DIRECT_ROWS) {
            f->row_block = round_up(f->row_block / 2, f->step);
            continue;
        }
        f->splits_parallel = splits > 1 && tasks < 4 * threads;
        break;
    }
    int64_t first = 0, partial = 0;
    for (int64_t i = 0; i < f->units; i++) {
        struct unit *u = &f->unit[i];
        int64_t tasks = u->blocks * (f->splits_parallel ? split_count(u) : 1);
        u->first_task = first;
        first += tasks;
        if (f->splits_parallel) {
            u->partial = (float *)((uintptr_t)f->partial + (uintptr_t)partial);
            partial += tasks * 4 * state_floats(u->state_rows, f->width);
        }
    }
    f->packed_bytes = max_i64(f->packed_bytes, packed);
    f->partial_bytes = max_i64(f->partial_bytes, partial);
    if (serial)
        f->tasks = -f->tasks; /* run them here */
    return f->units > 0;
}

static void wave_run(struct forward *f) {
    bool serial = f->tasks < 0;
    int64_t tasks = serial ? -f->tasks : f->tasks;
    if (serial) {
        run_packing(f, 0, f->blocks, 0);
        run_tasks(f, 0, tasks, 0);
        return;
    }
    parallel_for(f->blocks, 4, run_packing, f);
    if (!f->splits_parallel) {
        parallel_for(tasks, 1, run_tasks, f);
        return;
    }
    const struct unit *last = &f->unit[f->units - 1];
    parallel_for(last->first_task + last->blocks * split_count(last), 1, run_split_tasks, f);
    parallel_for(tasks, 1, run_merges, f);
}

/* Keys of a step, as many as the caller wants at least: a divisor of KEY_BLOCK, in whole panels. */
static int64_t key_step(int64_t wanted, bool amx) {
    int64_t keys = KEY_BLOCK, least = amx ? 32 : PANEL;
    while (wanted > 0 && keys > least && keys / 2 >= wanted)
        keys /= 2;
    return keys;
}

/* Rows that belong to no sequence see nothing. */
static void clear_rows(const struct attention_call *c, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
        for (int64_t h = 0; h < c->heads; h++) {
            memset((void *)(uintptr_t)element(&c->o, n, h), 0,
                   (size_t)c->width * dtype_size(c->o.dtype));
            if (c->lse.data)
                ((float *)c->lse.data)[h * c->rows + n] = -INFINITY;
        }
}

static void clear_gaps(const struct attention_call *c) {
    int64_t next = 0;
    for (int64_t s = 0; s < c->sequences; s++) {
        clear_rows(c, next, c->q_offsets[s]);
        next = max_i64(next, c->q_offsets[s + 1]);
    }
    clear_rows(c, next, c->rows);
}

static tril_status forward(struct op_context *ctx, const struct tensor *args, const void *params,
                           struct tril_error *err) {
    struct forward f;
    struct attention_call *c = &f.c;
    tril_status st = attention_unpack_forward(c, args, params, err);
    if (st != TRIL_OK)
        return st;
    const struct attention_params *p = c->params;
    f.group = c->heads / c->kv_heads;
    f.width = round_up(c->width, PANEL);
    f.softcap = p->softcap;
    f.amx = false;
    f.step = TILE_ROWS;
#if AMX_TILES
    if (c->q.dtype == DT_BF16 && c->k.dtype == DT_BF16) {
        f.amx = true;
        f.step = AMX_STEP;
    }
#endif
    f.blocked = p->block_q > 0 || p->block_k > 0;
    f.key_step = key_step(p->block_k, f.amx);
    f.q_factor = p->softcap > 0 ? p->scale / p->softcap : p->scale * (float)LOG2E;
    f.softcap_out = p->softcap * (float)LOG2E;
    f.adjusted = p->softcap > 0 || c->slopes.data || c->bias.data;
    f.keep_factor = 1 / (1 - p->dropout);
    f.drop_threshold = (uint32_t)ceilf(p->dropout * 0x1p24f);
    f.dropout = philox_begin(&c->key);
    if (small_fits(&f)) {
        ctx->block_rows = SMALL_ROWS;
        ctx->block_keys = KEY_BLOCK;
        if (ctx->measuring) {
            op_scratch(ctx, 0);
            return TRIL_OK;
        }
        clear_gaps(c);
        small_forward(&f);
        return TRIL_OK;
    }
    /* Once without memory, for the sizes; then for good. */
    f.packed = f.partial = NULL;
    f.packed_bytes = f.partial_bytes = 0;
    f.next_sequence = f.next_head = 0;
    int64_t waves = 0, units = 0, tasks = 0;
    for (; wave_next(&f); waves++) {
        units = f.units;
        tasks = f.tasks;
        ctx->block_rows = f.row_block;
        ctx->block_keys = f.key_step;
    }
    f.worker_bytes = worker_size(f.width);
    int64_t workers = waves ? f.worker_bytes * threads_count() : 0;
    int64_t packed = round_up(f.packed_bytes, 64);
    int64_t bytes = workers + packed + f.partial_bytes;
    f.worker = op_scratch(ctx, bytes);
    if (!f.worker)
        return op_scratch_error(ctx, "attention_forward", bytes, err);
    clear_gaps(c);
    f.packed = f.worker + workers;
    f.partial = f.packed + packed;
    if (waves == 1 && f.packed_bytes + f.partial_bytes == 0) { /* no address to put in */
        f.units = units;
        f.tasks = tasks;
        wave_run(&f);
        return TRIL_OK;
    }
    f.next_sequence = f.next_head = 0;
    while (wave_next(&f))
        wave_run(&f);
    return TRIL_OK;
}

void LEVEL(register_attention_forward)(struct backend *b) {
    b->table[OP_ATTENTION_FORWARD] = forward;
}
