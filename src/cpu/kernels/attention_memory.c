/* Attention over an external memory by exact search, and the gate that blends it with the local
 * attention (contracts: memory_attention, gate in ops.h).
 *
 * A thread takes ROWS query rows of one sequence and key/value head and goes through the memory in
 * pieces of PIECE entries, oldest first: a product gives the piece's scores; a row keeps those
 * above its threshold in a list, and when the list is full cuts it to the best `top` and raises the
 * threshold to the worst of them. An entry that only equals the threshold is younger than all that
 * hold it, and loses: the rule for ties costs nothing. A row's result depends on nothing else, so
 * neither on threads nor on the other rows. */
#include <math.h>
#include <stdlib.h>

#include "base/threads.h"
#include "cpu/kernels/attention_matrix.h"
#include "ops/memory_attention.h"

#define ROWS 48 /* a multiple of every TILE_ROWS */
#define PIECE 64
#define FEW_ROWS 3 /* up to so many rows take plain dot products: nothing is transposed */

struct candidate {
    float score;
    int32_t entry;
};

struct search {
    struct memory_attention_call c;
    int64_t group, ld, blocks; /* blocks of rows of the longest sequence */
    int64_t room;              /* candidates of a row */
    char *worker;
    int64_t worker_bytes;
};

/* A worker's memory. */
struct block {
    float *q;      /* [ROWS, ld] */
    float *keys;   /* [PIECE, ld] */
    float *keys_t; /* [ld, PIECE] */
    float *scores; /* [ROWS, PIECE] */
    struct candidate *found[ROWS];
    int64_t count[ROWS], begin[ROWS], end[ROWS]; /* entries that a row sees */
    float threshold[ROWS];
    int64_t rows, sequence, kv_head, first; /* row x is (first + x) / group, head % group */
};

static bool better(struct candidate a, struct candidate b) {
    return a.score > b.score || (a.score == b.score && a.entry < b.entry);
}

/* Brings the best `top` of n candidates to the front, in any order (Hoare's selection). */
static void select_best(struct candidate *x, int64_t n, int64_t top) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        struct candidate pivot = x[(low + high) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (better(x[i], pivot))
                i++;
            while (better(pivot, x[j]))
                j--;
            if (i <= j) {
                struct candidate other = x[i];
                x[i++] = x[j];
                x[j--] = other;
            }
        }
        if (top - 1 <= j)
            high = j;
        else if (top - 1 >= i)
            low = i;
        else
            return;
    }
}

static void cut(const struct search *f, struct block *b, int64_t x) {
    int64_t top = f->c.top;
    struct candidate *found = b->found[x];
    if (b->count[x] <= top)
        return;
    select_best(found, b->count[x], top);
    b->count[x] = top;
    float worst = found[0].score;
    for (int64_t i = 1; i < top; i++)
        worst = found[i].score < worst ? found[i].score : worst;
    b->threshold[x] = worst;
}

/* Takes what row x may want of the piece's scores, entries e .. e + PIECE - 1. */
static void take_row(const struct search *f, struct block *b, int64_t x, int64_t e) {
    const float *scores = b->scores + x * PIECE;
    int64_t from = max_i64(b->begin[x] - e, 0), to = min_i64(b->end[x] - e, PIECE);
    if (b->count[x] + PIECE > f->room)
        cut(f, b, x);
    struct candidate *found = b->found[x];
    int64_t count = b->count[x];
    float threshold = b->threshold[x];
    for (int64_t t = from - from % VF_WIDTH; t < to; t += VF_WIDTH) {
        if (!(vf_max_lanes(vf_load(scores + t)) > threshold))
            continue;
        int64_t last = min_i64(t + VF_WIDTH, to);
        for (int64_t j = max_i64(t, from); j < last; j++)
            if (scores[j] > threshold)
                found[count++] = (struct candidate){scores[j], (int32_t)(e + j)};
    }
    b->count[x] = count;
}

/* Entries [e, e + count) of the memory as fp32 rows; zeros up to PIECE. */
static void load_entries(const struct search *f, const struct block *b, const struct tensor *t,
                         int64_t e, int64_t count, float *out) {
    for (int64_t j = 0; j < count; j++)
        row_to_float(out + j * f->ld, element(t, memory_row(&f->c, b->sequence, e + j), b->kv_head),
                     t->dtype, f->c.width, f->ld, 1);
    memset(out + count * f->ld, 0, (size_t)((PIECE - count) * f->ld) * 4);
}

static void score_piece(const struct search *f, const struct block *b) {
    if (b->rows <= FEW_ROWS) {
        for (int64_t x = 0; x < b->rows; x++)
            for (int64_t j = 0; j < PIECE; j++)
                b->scores[x * PIECE + j] = row_dot(b->q + x * f->ld, b->keys + j * f->ld, f->ld);
        return;
    }
    transpose_matrix(b->keys_t, PIECE, b->keys, f->ld, PIECE, f->c.width);
    multiply(round_up(b->rows, TILE_ROWS), PIECE, f->c.width, b->q, f->ld, b->keys_t, PIECE,
             b->scores, PIECE);
}

static int by_age(const void *a, const void *b) {
    return ((const struct candidate *)a)->entry - ((const struct candidate *)b)->entry;
}

/* Softmax over what row x found, and its output. */
static void finish_row(const struct search *f, struct block *b, int64_t x) {
    const struct memory_attention_call *c = &f->c;
    cut(f, b, x);
    int64_t i = (b->first + x) / f->group, h = b->kv_head * f->group + (b->first + x) % f->group;
    int64_t n = c->q_offsets[b->sequence] + i, count = b->count[x];
    struct candidate *found = b->found[x];
    int32_t *index = (int32_t *)c->index.data + (n * c->heads + h) * c->top;
    float *weight = (float *)c->weight.data + (n * c->heads + h) * c->top;
    float *out = b->q + x * f->ld, maximum = -INFINITY, sum = 0;
    qsort(found, (size_t)count, sizeof *found, by_age);
    for (int64_t j = 0; j < count; j++)
        maximum = found[j].score > maximum ? found[j].score : maximum;
    for (int64_t j = 0; j < count; j++)
        sum += weight[j] = expf(found[j].score - maximum);
    memset(out, 0, (size_t)f->ld * 4);
    for (int64_t j = 0; j < c->top; j++) {
        index[j] = -1;
        if (j >= count) {
            weight[j] = 0;
            continue;
        }
        weight[j] /= sum;
        index[j] = (int32_t)memory_row(c, b->sequence, found[j].entry);
        row_to_float(b->keys, element(&c->v, index[j], b->kv_head), c->v.dtype, c->width, f->ld, 1);
        for (int64_t t = 0; t < f->ld; t += VF_WIDTH)
            vf_store(out + t, vf_fma(vf_set(weight[j]), vf_load(b->keys + t), vf_load(out + t)));
    }
    matrix_store(&c->o, n, h, out, f->ld, 1, 1);
    if (c->lse.data)
        ((float *)c->lse.data)[h * c->rows + n] = count ? maximum + logf(sum) : -INFINITY;
}

static struct block block_at(const struct search *f, int worker) {
    struct block b = {.q = (float *)(void *)(f->worker + worker * f->worker_bytes)};
    b.keys = b.q + ROWS * f->ld;
    b.keys_t = b.keys + PIECE * f->ld;
    b.scores = b.keys_t + f->ld * PIECE;
    b.found[0] = (struct candidate *)(void *)(b.scores + ROWS * PIECE);
    for (int x = 1; x < ROWS; x++)
        b.found[x] = b.found[x - 1] + f->room;
    return b;
}

/* Item: (sequence, key/value head, block of rows). */
static void run_search(void *arg, int64_t begin, int64_t end, int worker) {
    const struct search *f = arg;
    const struct memory_attention_call *c = &f->c;
    for (int64_t item = begin; item < end; item++) {
        struct block b = block_at(f, worker);
        b.sequence = item / (c->kv_heads * f->blocks);
        b.kv_head = item / f->blocks % c->kv_heads;
        b.first = item % f->blocks * ROWS;
        int64_t own = c->q_offsets[b.sequence + 1] - c->q_offsets[b.sequence];
        b.rows = min_i64(ROWS, own * f->group - b.first);
        if (b.rows <= 0)
            continue;
        int64_t first = INT64_MAX, last = 0;
        memset(b.q, 0, (size_t)(ROWS * f->ld) * 4);
        for (int64_t x = 0; x < b.rows; x++) {
            int64_t i = (b.first + x) / f->group;
            int64_t h = b.kv_head * f->group + (b.first + x) % f->group;
            row_to_float(b.q + x * f->ld, element(&c->q, c->q_offsets[b.sequence] + i, h),
                         c->q.dtype, c->width, f->ld, c->params.scale);
            memory_seen(c, b.sequence, i, &b.begin[x], &b.end[x]);
            b.count[x] = 0;
            b.threshold[x] = -INFINITY;
            first = min_i64(first, b.begin[x]);
            last = max_i64(last, b.end[x]);
        }
        for (int64_t e = first; e < last; e += PIECE) {
            load_entries(f, &b, &c->k, e, min_i64(PIECE, last - e), b.keys);
            score_piece(f, &b);
            for (int64_t x = 0; x < b.rows; x++)
                if (b.begin[x] < e + PIECE && b.end[x] > e)
                    take_row(f, &b, x, e);
        }
        for (int64_t x = 0; x < b.rows; x++)
            finish_row(f, &b, x);
    }
}

/* Rows of no sequence. */
static void clear_row(const struct memory_attention_call *c, int64_t n) {
    int64_t size = c->heads * c->top;
    matrix_clear(&c->o, n, n + 1);
    memset((float *)c->weight.data + n * size, 0, (size_t)size * 4);
    memset((int32_t *)c->index.data + n * size, 0xff, (size_t)size * 4);
    for (int64_t h = 0; c->lse.data && h < c->heads; h++)
        ((float *)c->lse.data)[h * c->rows + n] = -INFINITY;
}

static tril_status memory_forward(struct op_context *ctx, const struct tensor *args,
                                  const void *params, struct tril_error *err) {
    struct search f = {0};
    const struct memory_attention_call *c = &f.c;
    tril_status st = memory_attention_unpack(&f.c, args, params, err);
    if (st != TRIL_OK)
        return st;
    f.group = c->heads / c->kv_heads;
    f.ld = matrix_columns(c->width);
    f.room = 2 * c->top + 2 * PIECE;
    int64_t floats = ROWS * f.ld + 2 * PIECE * f.ld + ROWS * PIECE;
    f.worker_bytes =
        round_up(floats * 4 + ROWS * f.room * (int64_t)sizeof(struct candidate), 4096) + 64 * 9;
    f.worker = op_scratch(ctx, f.worker_bytes * threads_count());
    if (!f.worker)
        return op_scratch_error(ctx, "memory_attention_forward", f.worker_bytes * threads_count(),
                                err);
    int64_t next = 0, longest = 0;
    for (int64_t s = 0; s <= c->sequences; s++) {
        int64_t begin = s < c->sequences ? c->q_offsets[s] : c->rows;
        for (; next < begin; next++)
            clear_row(c, next);
        if (s < c->sequences) {
            next = c->q_offsets[s + 1];
            longest = max_i64(longest, next - begin);
        }
    }
    f.blocks = (longest * f.group + ROWS - 1) / ROWS;
    parallel_for(c->sequences * c->kv_heads * f.blocks, 1, run_search, &f);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ backward */

/* Item: row n for all heads. dq = scale sum_j w_j (do.v_j - do.o) k_j */
static void run_gradient(void *arg, int64_t begin, int64_t end, int worker) {
    const struct memory_attention_gradient *c = arg;
    enum { WIDEST = 256 };
    float dout[WIDEST], x[WIDEST], out[WIDEST];
    int64_t ld = round_up(c->width, VF_WIDTH), group = c->heads / c->kv_heads;
    (void)worker;
    for (int64_t item = begin; item < end; item++) {
        int64_t n = item / c->heads, h = item % c->heads, kv_head = h / group;
        const int32_t *index = (const int32_t *)c->index.data + item * c->top;
        const float *weight = (const float *)c->weight.data + item * c->top;
        row_to_float(dout, element(&c->dout, n, h), c->dout.dtype, c->width, ld, 1);
        row_to_float(x, element(&c->o, n, h), c->o.dtype, c->width, ld, 1);
        float delta = row_dot(dout, x, ld);
        memset(out, 0, (size_t)ld * 4);
        for (int64_t j = 0; j < c->top; j++) {
            if (index[j] < 0)
                continue;
            row_to_float(x, element(&c->v, index[j], kv_head), c->v.dtype, c->width, ld, 1);
            float ds = weight[j] * (row_dot(dout, x, ld) - delta);
            row_to_float(x, element(&c->k, index[j], kv_head), c->k.dtype, c->width, ld, 1);
            for (int64_t t = 0; t < ld; t += VF_WIDTH)
                vf_store(out + t, vf_fma(vf_set(ds), vf_load(x + t), vf_load(out + t)));
        }
        row_to_float(x, element(&c->dq, n, h), c->dq.dtype, c->width, ld, 1);
        for (int64_t t = 0; t < ld; t += VF_WIDTH)
            vf_store(out + t, vf_fma(vf_set(c->scale), vf_load(out + t), vf_load(x + t)));
        matrix_store(&c->dq, n, h, out, ld, 1, 1);
    }
}

static tril_status memory_backward(struct op_context *ctx, const struct tensor *args,
                                   const void *params, struct tril_error *err) {
    struct memory_attention_gradient c;
    tril_status st = memory_attention_unpack_backward(&c, args, params, err);
    if (st != TRIL_OK)
        return st;
    if (!op_scratch(ctx, 0))
        return op_scratch_error(ctx, "memory_attention_backward", 0, err);
    parallel_for(c.rows * c.heads, 16, run_gradient, &c);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ gate */

struct gate {
    struct tensor a, b, lse, gate, y; /* y: dy backward */
    struct tensor da, db;             /* backward */
    float *sums;                      /* [H]: of this call */
};

static float share(const struct gate *g, int64_t n, int64_t h) {
    float x = ((const float *)g->gate.data)[h];
    bool there = ((const float *)g->lse.data)[h * g->lse.shape[1] + n] != -INFINITY;
    return there ? 1 / (1 + expf(-x)) : 0;
}

/* Item: row n for all heads. */
static void run_gate(void *arg, int64_t begin, int64_t end, int worker) {
    const struct gate *g = arg;
    int64_t d = g->a.shape[2];
    (void)worker;
    for (int64_t n = begin; n < end; n++)
        for (int64_t h = 0; h < g->a.shape[1]; h++) {
            float s = share(g, n, h);
            const void *a = element(&g->a, n, h), *b = element(&g->b, n, h);
            void *y = (void *)(uintptr_t)element(&g->y, n, h);
            for (int64_t t = 0; t < d; t += VF_WIDTH) {
                int lanes = (int)min_i64(VF_WIDTH, d - t);
                vf x = vf_load_as(a, g->a.dtype, t, lanes);
                if (s > 0)
                    x = vf_set(1 - s) * x + vf_set(s) * vf_load_as(b, g->b.dtype, t, lanes);
                vf_store_as(y, g->y.dtype, t, x, lanes);
            }
        }
}

static tril_status gate_forward_kernel(struct op_context *ctx, const struct tensor *args,
                                       const void *params, struct tril_error *err) {
    struct gate g = {.a = args[0], .b = args[1], .lse = args[2], .gate = args[3], .y = args[4]};
    (void)ctx;
    (void)params;
    (void)err;
    parallel_for(g.a.shape[0], 32, run_gate, &g);
    return TRIL_OK;
}

/* Item: a head, so that its sum has one order. */
static void run_gate_backward(void *arg, int64_t begin, int64_t end, int worker) {
    const struct gate *g = arg;
    int64_t d = g->a.shape[2];
    (void)worker;
    for (int64_t h = begin; h < end; h++) {
        double sum = 0;
        for (int64_t n = 0; n < g->a.shape[0]; n++) {
            float s = share(g, n, h);
            const void *a = element(&g->a, n, h), *b = element(&g->b, n, h);
            const void *dy = element(&g->y, n, h);
            void *da = (void *)(uintptr_t)element(&g->da, n, h);
            void *db = (void *)(uintptr_t)element(&g->db, n, h);
            vf dot = vf_zero();
            for (int64_t t = 0; t < d; t += VF_WIDTH) {
                int lanes = (int)min_i64(VF_WIDTH, d - t);
                vf x = vf_load_as(dy, g->y.dtype, t, lanes);
                if (s > 0)
                    dot = vf_fma(x,
                                 vf_load_as(b, g->b.dtype, t, lanes) -
                                     vf_load_as(a, g->a.dtype, t, lanes),
                                 dot);
                vf_store_as(da, g->da.dtype, t, vf_set(1 - s) * x, lanes);
                vf_store_as(db, g->db.dtype, t, vf_set(s) * x, lanes);
            }
            sum += (double)(s * (1 - s)) * (double)vf_sum(dot);
        }
        g->sums[h] += (float)sum;
    }
}

static tril_status gate_backward_kernel(struct op_context *ctx, const struct tensor *args,
                                        const void *params, struct tril_error *err) {
    struct gate g = {.y = args[0],
                     .a = args[1],
                     .b = args[2],
                     .lse = args[3],
                     .gate = args[4],
                     .da = args[5],
                     .db = args[6],
                     .sums = args[7].data};
    (void)ctx;
    (void)params;
    (void)err;
    parallel_for(g.a.shape[1], 1, run_gate_backward, &g);
    return TRIL_OK;
}

void LEVEL(register_attention_memory)(struct backend *b) {
    b->table[OP_MEMORY_ATTENTION_FORWARD] = memory_forward;
    b->table[OP_MEMORY_ATTENTION_BACKWARD] = memory_backward;
    b->table[OP_GATE_FORWARD] = gate_forward_kernel;
    b->table[OP_GATE_BACKWARD] = gate_backward_kernel;
}
