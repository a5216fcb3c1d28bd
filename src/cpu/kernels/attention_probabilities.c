/* The attention weights of chosen rows: their scores once more, and the log-sum-exp that the
 * forward has already found. */
#include "ops/attention_probabilities.h"
#include "cpu/kernels/attention_rows.h"

struct weights {
    struct rows rows; /* first: the loops pass a struct rows */
    struct probabilities_call call;
    float *keys_t; /* [width, ldk] */
    char *worker;
    int64_t worker_bytes;
};

static float *worker_memory(const struct weights *f, int worker) {
    return (float *)(void *)(f->worker + worker * f->worker_bytes);
}

static void load_unit(void *arg, int64_t begin, int64_t end, int worker) {
    const struct weights *f = arg;
    const struct rows *r = &f->rows;
    float *keys = worker_memory(f, worker);
    for (int64_t j0 = begin * KEY_BLOCK; j0 < end * KEY_BLOCK; j0 += KEY_BLOCK) {
        load_keys(r, &r->c.k, &r->c.k_scale, j0, keys);
        transpose_matrix(f->keys_t + j0, r->ldk, keys, r->ld, KEY_BLOCK, r->c.width);
    }
}

/* Row n's weights in head h, to out [C]. */
static void weights_row(const struct weights *f, int64_t n, int64_t h, float *memory, float *out) {
    const struct rows *r = &f->rows;
    const struct attention_call *c = &r->c;
    int64_t i = n - c->q_offsets[r->sequence], length = rows_keys(r);
    float *q = memory, *s = q + r->ld;
    vf lse = vf_set(row_lse(r, n, h));
    row_to_float(q, element(&c->q, n, h), c->q.dtype, c->width, r->ld, r->q_factor);
    for (int64_t j0 = 0; j0 < length; j0 += KEY_BLOCK) {
        uint64_t mask = row_mask(r, i, h, j0);
        if (!mask)
            continue; /* zeros already */
        multiply_row(KEY_BLOCK, c->width, q, f->keys_t + j0, r->ldk, s);
        finish_scores(r, i, h, j0, mask, s, NULL);
        for (int64_t v = 0; v < KEY_BLOCK && j0 + v < length; v += VF_WIDTH)
            vf_store_n(out + j0 + v, vf_exp(vf_load(s + v) - lse),
                       (int)min_i64(VF_WIDTH, length - j0 - v));
    }
}

/* Item: chosen row and head of the group; rows of other sequences are left alone. */
static void run_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct weights *f = arg;
    const struct rows *r = &f->rows;
    const struct attention_call *c = &r->c;
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item / r->group, h = r->kv_head * r->group + item % r->group;
        int64_t n = f->call.rows[row];
        if (n >= c->q_offsets[r->sequence] && n < c->q_offsets[r->sequence + 1])
            weights_row(f, n, h, worker_memory(f, worker),
                        (float *)f->call.p.data + (row * c->heads + h) * f->call.columns);
    }
}

static bool any_row(const struct weights *f) {
    const int32_t *offsets = f->rows.c.q_offsets + f->rows.sequence;
    for (int64_t k = 0; k < f->call.count; k++)
        if (f->call.rows[k] >= offsets[0] && f->call.rows[k] < offsets[1])
            return true;
    return false;
}

static tril_status probabilities(struct op_context *ctx, const struct tensor *args,
                                 const void *params, struct tril_error *err) {
    struct weights f = {.rows = {.kv_head = -1}};
    struct rows *r = &f.rows;
    tril_status st = attention_unpack_probabilities(&f.call, args, params, err);
    if (st != TRIL_OK)
        return st;
    r->c = f.call.c;
    rows_begin(r);
    f.worker_bytes = round_up(KEY_BLOCK * r->ld * 4, 4096) + 64 * 9;
    int64_t keys = round_up(round_up(r->c.width, VF_WIDTH) * r->ldk, 16);
    int64_t bytes = keys * 4 + f.worker_bytes * threads_count();
    f.keys_t = op_scratch(ctx, bytes);
    if (!f.keys_t)
        return op_scratch_error(ctx, "attention_probabilities", bytes, err);
    f.worker = (char *)(f.keys_t + keys);
    if (f.call.p.data)
        memset(f.call.p.data, 0, (size_t)tensor_bytes(&f.call.p));
    while (rows_next(r, 2)) {
        if (!any_row(&f))
            continue;
        rows_loop(r, (rows_keys(r) + KEY_BLOCK - 1) / KEY_BLOCK, 1, load_unit);
        rows_loop(r, f.call.count * r->group, 1, run_rows);
    }
    return TRIL_OK;
}

void LEVEL(register_attention_probabilities)(struct backend *b) {
    b->table[OP_ATTENTION_PROBABILITIES] = probabilities;
}
