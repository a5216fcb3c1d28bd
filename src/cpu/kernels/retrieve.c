/* Retrieval by blocks (contracts: block_bounds, retrieve in ops.h): one thread takes one row and
 * key/value head, so that a row's bits depend on nothing else. Keys are read once for all heads of
 * the group, where they lie. */
#include <math.h>
#include <stdlib.h>

#include "base/threads.h"
#include "cpu/kernels/attention_matrix.h"
#include "ops/retrieve.h"

/* ------------------------------------------------------------------ bounds */

/* Item: (sequence, key/value head). */
static void run_bounds(void *arg, int64_t begin, int64_t end, int worker) {
    const struct bounds_call *c = arg;
    (void)worker;
    for (int64_t item = begin; item < end; item++) {
        int64_t s = item / c->kv_heads, h = item % c->kv_heads, length = c->kv_length[s];
        if (c->kv_from[s] >= length)
            continue;
        for (int64_t j0 = c->kv_from[s] / c->block * c->block; j0 < length; j0 += c->block) {
            int64_t j1 = min_i64(j0 + c->block, length), d = c->width;
            int64_t at = ((c->kv_start[s] + j0) / c->block * c->kv_heads + h) * d;
            float *low = (float *)c->low.data + at, *high = (float *)c->high.data + at;
            for (int64_t t = 0; t < d; t += VF_WIDTH) {
                int lanes = (int)min_i64(VF_WIDTH, d - t);
                vf least = vf_set(INFINITY), most = vf_set(-INFINITY);
                for (int64_t j = j0; j < j1; j++) {
                    vf x = vf_load_as(element(&c->k, c->kv_start[s] + j, h), c->k.dtype, t, lanes);
                    least = vf_min(least, x);
                    most = vf_max(most, x);
                }
                vf_store_n(low + t, least, lanes);
                vf_store_n(high + t, most, lanes);
            }
        }
    }
}

static tril_status bounds_kernel(struct op_context *ctx, const struct tensor *args,
                                 const void *params, struct tril_error *err) {
    struct bounds_call c;
    tril_status st = bounds_unpack(&c, args, params, err);
    (void)ctx;
    if (st == TRIL_OK)
        parallel_for(c.sequences * c.kv_heads, 1, run_bounds, &c);
    return st;
}

/* ------------------------------------------------------------------ retrieve */

struct search {
    struct retrieve_call c;
    int64_t group, ld, keys; /* keys: the most that a row attends to */
    char *worker;
    int64_t worker_bytes;
};

struct candidate {
    float bound;
    int32_t block;
};

static bool better(struct candidate a, struct candidate b) {
    return a.bound > b.bound || (a.bound == b.bound && a.block < b.block);
}

/* Keeps the best in a heap whose first element is the worst of them. */
static void heap_offer(struct candidate *heap, int64_t *count, int64_t top, struct candidate x) {
    int64_t i;
    if (*count < top) {
        for (i = (*count)++; i > 0 && better(heap[(i - 1) / 2], x); i = (i - 1) / 2)
            heap[i] = heap[(i - 1) / 2];
        heap[i] = x;
        return;
    }
    if (top == 0 || !better(x, heap[0]))
        return;
    for (i = 0;;) {
        int64_t child = 2 * i + 1;
        if (child + 1 < top && better(heap[child], heap[child + 1]))
            child++; /* the worse one */
        if (child >= top || !better(x, heap[child]))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = x;
}

static int ascending(const void *a, const void *b) {
    return *(const int32_t *)a - *(const int32_t *)b;
}

/* The blocks of row n, as the contract says; q holds the group's heads. */
static int64_t choose(const struct search *f, int64_t n, int64_t kv_head, const float *q,
                      struct candidate *heap, int32_t *out) {
    const struct retrieve_call *c = &f->c;
    const struct retrieve_params *p = &c->params;
    int64_t all = retrieve_blocks(c->kv_length[n], p->block), kept = 0, count = 0, d = c->width;
    for (int64_t b = 0; b < all; b++) {
        if (retrieve_always(p, b, all)) {
            out[count++] = (int32_t)b;
            continue;
        }
        int64_t at = ((c->kv_start[n] / p->block + b) * c->kv_heads + kv_head) * d;
        const float *low = (const float *)c->low.data + at,
                    *high = (const float *)c->high.data + at;
        float most = -INFINITY;
        for (int64_t g = 0; g < f->group; g++) {
            vf sum = vf_zero();
            for (int64_t t = 0; t < d; t += VF_WIDTH) {
                int lanes = (int)min_i64(VF_WIDTH, d - t);
                vf x = vf_load(q + g * f->ld + t);
                sum += vf_max(x * vf_load_n(low + t, lanes), x * vf_load_n(high + t, lanes));
            }
            float bound = vf_sum(sum);
            most = bound > most ? bound : most;
        }
        heap_offer(heap, &kept, p->top, (struct candidate){most, (int32_t)b});
    }
    for (int64_t i = 0; i < kept; i++)
        out[count++] = heap[i].block;
    qsort(out, (size_t)count, sizeof *out, ascending);
    for (int64_t i = count; i < c->most; i++)
        out[i] = -1;
    return count;
}

/* Rows of a head lie K d apart: too far for the processor to guess. */
static void fetch_ahead(const struct retrieve_call *c, const struct tensor *t, int64_t n,
                        int64_t kv_head, int64_t j) {
    enum { AHEAD = 8 };
    int64_t row = min_i64(c->kv_start[n] + j + AHEAD, t->shape[0] - 1);
    const char *at = element(t, row, kv_head);
    for (int64_t byte = 0; byte < c->width * dtype_bytes(t->dtype); byte += 64)
        __builtin_prefetch(at + byte);
}

/* Item: (row, key/value head). */
static void run_retrieve(void *arg, int64_t begin, int64_t end, int worker) {
    const struct search *f = arg;
    const struct retrieve_call *c = &f->c;
    const int64_t block = c->params.block, ld = f->ld, G = f->group;
    for (int64_t item = begin; item < end; item++) {
        int64_t n = item / c->kv_heads, kv_head = item % c->kv_heads, count = 0;
        float *q = (float *)(void *)(f->worker + worker * f->worker_bytes);
        float *row = q + G * ld, *out = row + ld, *scores = out + G * ld; /* scores [G, keys] */
        struct candidate *heap = (struct candidate *)(void *)(scores + G * f->keys);
        int32_t *blocks = (int32_t *)c->blocks.data + item * c->most;
        for (int64_t g = 0; g < G; g++)
            row_to_float(q + g * ld, element(&c->q, n, kv_head * G + g), c->q.dtype, c->width, ld,
                         1);
        int64_t chosen = choose(f, n, kv_head, q, heap, blocks);
        for (int64_t x = 0; x < chosen; x++)
            for (int64_t j = blocks[x] * block;
                 j < min_i64((blocks[x] + 1) * block, c->kv_length[n]); j++, count++) {
                fetch_ahead(c, &c->k, n, kv_head, j);
                row_to_float(row, element(&c->k, c->kv_start[n] + j, kv_head), c->k.dtype, c->width,
                             ld, 1);
                for (int64_t g = 0; g < G; g++)
                    scores[g * f->keys + count] = c->params.scale * row_dot(q + g * ld, row, ld);
            }
        for (int64_t g = 0; g < G; g++) {
            float *s = scores + g * f->keys, maximum = -INFINITY, sum = 0;
            for (int64_t i = 0; i < count; i++)
                maximum = s[i] > maximum ? s[i] : maximum;
            for (int64_t i = 0; i < count; i += VF_WIDTH) {
                int lanes = (int)min_i64(VF_WIDTH, count - i);
                vf e = vf_exp(vf_load_n(s + i, lanes) - vf_set(maximum));
                e = vf_select(vi_first(lanes), e, vf_zero());
                sum += vf_sum(e);
                vf_store_n(s + i, e, lanes);
            }
            q[g * ld] = sum; /* q is not needed any more */
            if (c->lse.data)
                ((float *)c->lse.data)[(kv_head * G + g) * c->rows + n] =
                    count ? maximum + logf(sum) : -INFINITY;
        }
        memset(out, 0, (size_t)(G * ld) * 4);
        count = 0;
        for (int64_t x = 0; x < chosen; x++)
            for (int64_t j = blocks[x] * block;
                 j < min_i64((blocks[x] + 1) * block, c->kv_length[n]); j++, count++) {
                fetch_ahead(c, &c->v, n, kv_head, j);
                row_to_float(row, element(&c->v, c->kv_start[n] + j, kv_head), c->v.dtype, c->width,
                             ld, 1);
                for (int64_t g = 0; g < G; g++) {
                    vf w = vf_set(scores[g * f->keys + count]);
                    for (int64_t t = 0; t < ld; t += VF_WIDTH)
                        vf_store(out + g * ld + t,
                                 vf_fma(w, vf_load(row + t), vf_load(out + g * ld + t)));
                }
            }
        for (int64_t g = 0; g < G; g++)
            matrix_store(&c->o, n, kv_head * G + g, out + g * ld, ld, 1, count ? 1 / q[g * ld] : 0);
    }
}

static tril_status retrieve_kernel(struct op_context *ctx, const struct tensor *args,
                                   const void *params, struct tril_error *err) {
    struct search f = {0};
    tril_status st = retrieve_unpack(&f.c, args, params, err);
    if (st != TRIL_OK)
        return st;
    const struct retrieve_call *c = &f.c;
    f.group = c->heads / c->kv_heads;
    f.ld = matrix_columns(c->width);
    f.keys = round_up((c->params.first + c->params.last + c->params.top) * c->params.block, 16);
    int64_t floats = (2 * f.group + 1) * f.ld + f.group * f.keys;
    f.worker_bytes =
        round_up(floats * 4 + c->params.top * (int64_t)sizeof(struct candidate), 4096) + 64 * 9;
    f.worker = op_scratch(ctx, f.worker_bytes * threads_count());
    if (!f.worker)
        return op_scratch_error(ctx, "retrieve", f.worker_bytes * threads_count(), err);
    parallel_for(c->rows * c->kv_heads, 1, run_retrieve, &f);
    return TRIL_OK;
}

void LEVEL(register_retrieve)(struct backend *b) {
    b->table[OP_BLOCK_BOUNDS] = bounds_kernel;
    b->table[OP_RETRIEVE] = retrieve_kernel;
}
