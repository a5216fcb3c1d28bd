/* Fused attention, row by row: a thread takes one query row, computes its whole row of scores,
 * makes it probabilities and multiplies V with them, so that nothing of size T x T ever exists. The
 * row is read three times while it lies in the cache; flash attention needs it only in pieces, and
 * works on several rows at once.
 *
 *   forward     s = q K^T (those keys that the row sees) -> softmax -> o = s V
 *   backward 1  by rows:     p and dp = do V^T in pieces -> ds -> dq = ds K
 *   backward 2  by keys:     for a piece of keys, ROWS rows at a time, p and ds once more ->
 *                            dk += ds^T q, dv += p^T do
 *
 * The second pass computes every score again: two products more, in exchange for gradients of keys
 * that one thread sums in a fixed order. */
#include "cpu/kernels/attention_implementations.h"
#include "cpu/kernels/attention_rows.h"

#define ROWS 48                /* of one step of the second pass; a multiple of every TILE_ROWS */
#define PIECE (KEY_BLOCK + 16) /* floats from row to row of such a step's pieces */

struct fused {
    struct rows rows;     /* first: the loops pass a struct rows */
    float *keys, *values; /* [blocks * KEY_BLOCK, ld]: keys only backward, values only forward */
    float *keys_t, *values_t; /* [width, ldk]; values_t only backward */
    float *delta;             /* [H, N] */
    char *worker;
    int64_t worker_bytes;
};

static const struct fused *fused_of(const void *arg) {
    return arg;
}

static float *worker_memory(const struct fused *f, int worker) {
    return (float *)(void *)(f->worker + worker * f->worker_bytes);
}

/* Item: a piece of the unit's keys. */
static void load_unit(void *arg, int64_t begin, int64_t end, int worker) {
    const struct fused *f = fused_of(arg);
    const struct rows *r = &f->rows;
    float *piece = worker_memory(f, worker);
    for (int64_t j0 = begin * KEY_BLOCK; j0 < end * KEY_BLOCK; j0 += KEY_BLOCK) {
        float *keys = f->keys ? f->keys + j0 * r->ld : piece;
        load_keys(r, &r->c.k, &r->c.k_scale, j0, keys);
        transpose_matrix(f->keys_t + j0, r->ldk, keys, r->ld, KEY_BLOCK, r->c.width);
        float *values = f->values ? f->values + j0 * r->ld : piece;
        load_keys(r, &r->c.v, &r->c.v_scale, j0, values);
        if (f->values_t)
            transpose_matrix(f->values_t + j0, r->ldk, values, r->ld, KEY_BLOCK, r->c.width);
    }
}

/* ------------------------------------------------------------------ forward */

/* Item: row i of the unit for head h of the group, i * group + h. */
static void forward_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct fused *f = fused_of(arg);
    const struct rows *r = &f->rows;
    const struct attention_call *c = &r->c;
    int64_t length = rows_keys(r), d = c->width;
    float *q = worker_memory(f, worker), *o = q + r->ld, *s = o + r->ld;
    uint64_t *mask = (uint64_t *)(void *)(s + r->ldk);
    for (int64_t item = begin; item < end; item++) {
        int64_t i = item / r->group, h = r->kv_head * r->group + item % r->group;
        int64_t n = c->q_offsets[r->sequence] + i;
        row_to_float(q, element(&c->q, n, h), c->q.dtype, d, r->ld, r->q_factor);
        for (int64_t j0 = 0; j0 < length; j0 += KEY_BLOCK) {
            mask[j0 / KEY_BLOCK] = row_mask(r, i, h, j0);
            if (!mask[j0 / KEY_BLOCK])
                continue;
            multiply_row(KEY_BLOCK, d, q, f->keys_t + j0, r->ldk, s + j0);
            finish_scores(r, i, h, j0, mask[j0 / KEY_BLOCK], s + j0, NULL);
        }
        float inverse, lse = softmax_row(r, n, h, s, mask, &inverse);
        memset(o, 0, (size_t)r->ld * 4);
        for (int64_t j0 = 0; j0 < length; j0 += KEY_BLOCK)
            if (mask[j0 / KEY_BLOCK])
                multiply_row_add(d, min_i64(KEY_BLOCK, length - j0), s + j0, f->values + j0 * r->ld,
                                 r->ld, o);
        row_from_float((void *)(uintptr_t)element(&c->o, n, h), c->o.dtype, o, d,
                       inverse * r->keep_factor);
        if (c->lse.data)
            ((float *)c->lse.data)[h * c->rows + n] = lse;
    }
}

/* ------------------------------------------------------------------ backward */

/* Item: row i of the unit, for all heads of the group (they may share a row of dbias). */
static void backward_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct fused *f = fused_of(arg);
    const struct rows *r = &f->rows;
    const struct attention_call *c = &r->c;
    int64_t length = rows_keys(r), d = c->width;
    float *q = worker_memory(f, worker), *dout = q + r->ld, *dq = dout + r->ld;
    float *p = dq + r->ld, *ds = p + KEY_BLOCK, *slope = ds + KEY_BLOCK;
    for (int64_t i = begin; i < end; i++)
        for (int64_t h = r->kv_head * r->group; h < (r->kv_head + 1) * r->group; h++) {
            int64_t n = c->q_offsets[r->sequence] + i;
            row_to_float(q, element(&c->o, n, h), c->o.dtype, d, r->ld, 1);
            row_to_float(dout, element(&c->dout, n, h), c->dout.dtype, d, r->ld, 1);
            float delta = f->delta[h * c->rows + n] = row_dot(q, dout, r->ld);
            float lse = row_lse(r, n, h), *dbias = dbias_row(r, i, h);
            row_to_float(q, element(&c->q, n, h), c->q.dtype, d, r->ld, r->q_factor);
            memset(dq, 0, (size_t)r->ld * 4);
            for (int64_t j0 = 0; j0 < length; j0 += KEY_BLOCK) {
                uint64_t mask = row_mask(r, i, h, j0);
                if (!mask)
                    continue;
                multiply_row(KEY_BLOCK, d, q, f->keys_t + j0, r->ldk, p);
                multiply_row(KEY_BLOCK, d, dout, f->values_t + j0, r->ldk, ds);
                finish_scores(r, i, h, j0, mask, p, slope);
                score_gradients(r, i, h, j0, lse, delta, slope, p, ds, dbias ? dbias + j0 : NULL);
                multiply_row_add(d, min_i64(KEY_BLOCK, length - j0), ds, f->keys + j0 * r->ld,
                                 r->ld, dq);
            }
            row_from_float((void *)(uintptr_t)element(&c->dq, n, h), c->dq.dtype, dq, d,
                           c->params->scale);
        }
}

/* ROWS rows of head h from i0 on, with the keys from j0 on. */
static void key_step(const struct fused *f, int64_t h, int64_t i0, int64_t j0, float *memory,
                     float *dk, float *dv) {
    const struct rows *r = &f->rows;
    const struct attention_call *c = &r->c;
    int64_t d = c->width, ld = r->ld, first = c->q_offsets[r->sequence] + i0;
    int64_t count = min_i64(ROWS, rows_own(r) - i0), keys = min_i64(KEY_BLOCK, rows_keys(r) - j0);
    float *q = memory, *dout = q + ROWS * ld, *p = dout + ROWS * ld, *ds = p + ROWS * PIECE;
    float slope[KEY_BLOCK];
    matrix_load(q, ld, &c->q, first, h, count, ROWS, r->q_factor);
    matrix_load(dout, ld, &c->dout, first, h, count, ROWS, 1);
    multiply(count, KEY_BLOCK, d, q, ld, f->keys_t + j0, r->ldk, p, PIECE);
    multiply(count, KEY_BLOCK, d, dout, ld, f->values_t + j0, r->ldk, ds, PIECE);
    for (int64_t i = 0; i < count; i++) {
        uint64_t mask = row_mask(r, i0 + i, h, j0);
        finish_scores(r, i0 + i, h, j0, mask, p + i * PIECE, slope);
        score_gradients(r, i0 + i, h, j0, row_lse(r, first + i, h),
                        f->delta[h * c->rows + first + i], slope, p + i * PIECE, ds + i * PIECE,
                        NULL);
    }
    multiply_transposed_add(keys, d, count, ds, PIECE, q, ld, dk, ld);
    multiply_transposed_add(keys, d, count, p, PIECE, dout, ld, dv, ld);
}

/* Item: a piece of the unit's keys. */
static void backward_keys(void *arg, int64_t begin, int64_t end, int worker) {
    const struct fused *f = fused_of(arg);
    const struct rows *r = &f->rows;
    const struct attention_call *c = &r->c;
    int64_t own = rows_own(r), gradients = (KEY_BLOCK + TILE_ROWS) * r->ld;
    float *dk = worker_memory(f, worker), *dv = dk + gradients, *memory = dv + gradients;
    for (int64_t j0 = begin * KEY_BLOCK; j0 < end * KEY_BLOCK; j0 += KEY_BLOCK) {
        int64_t keys = min_i64(KEY_BLOCK, rows_keys(r) - j0);
        memset(dk, 0, (size_t)(2 * gradients) * 4);
        for (int64_t h = r->kv_head * r->group; h < (r->kv_head + 1) * r->group; h++)
            for (int64_t i0 = 0; i0 < own; i0 += ROWS)
                if (attention_any(c, r->sequence, h, h + 1, i0, min_i64(i0 + ROWS, own), j0,
                                  j0 + keys))
                    key_step(f, h, i0, j0, memory, dk, dv);
        int64_t first = c->kv_start[r->sequence] + j0;
        matrix_store(&c->dk, first, r->kv_head, dk, r->ld, keys, r->dk_factor);
        matrix_store(&c->dv, first, r->kv_head, dv, r->ld, keys, r->keep_factor);
    }
}

/* ------------------------------------------------------------------ calls */

/* Lays the scratch out; NULL (and err) when there is none. */
static float *layout(struct fused *f, struct op_context *ctx, bool backward, const char *name,
                     struct tril_error *err) {
    const struct rows *r = &f->rows;
    int64_t width = round_up(r->c.width, VF_WIDTH), used = 0;
    int64_t matrix = r->blocks * KEY_BLOCK * r->ld, transposed = width * r->ldk;
    int64_t by_row = 3 * r->ld + 3 * KEY_BLOCK, piece = KEY_BLOCK * r->ld;
    if (backward)
        by_row =
            max_i64(by_row, (2 * (KEY_BLOCK + TILE_ROWS) + 2 * ROWS) * r->ld + 2 * ROWS * PIECE);
    else
        by_row = max_i64(by_row, 2 * r->ld + r->ldk + 2 * r->blocks);
    f->worker_bytes = round_up(max_i64(by_row, piece) * 4, 4096) + 64 * 9;
    int64_t rows_at = take(&used, matrix), keys_t = take(&used, transposed);
    int64_t values_t = take(&used, backward ? transposed : 0);
    int64_t delta = take(&used, backward ? r->c.heads * r->c.rows : 0);
    int64_t bytes = used * 4 + f->worker_bytes * threads_count();
    float *memory = op_scratch(ctx, bytes);
    if (!memory) {
        op_scratch_error(ctx, name, bytes, err);
        return NULL;
    }
    f->keys = backward ? memory + rows_at : NULL;
    f->values = backward ? NULL : memory + rows_at;
    f->keys_t = memory + keys_t;
    f->values_t = backward ? memory + values_t : NULL;
    f->delta = memory + delta;
    f->worker = (char *)(memory + used);
    return memory;
}

tril_status LEVEL(attention_fused_forward)(struct op_context *ctx, const struct tensor *args,
                                           const void *params, struct tril_error *err) {
    struct fused f = {.rows = {.kv_head = -1}};
    struct rows *r = &f.rows;
    tril_status st = attention_unpack_forward(&r->c, args, params, err);
    if (st != TRIL_OK)
        return st;
    rows_begin(r);
    if (!layout(&f, ctx, false, "attention_forward", err))
        return TRIL_ERR_MEMORY;
    clear_forward(&r->c);
    while (rows_next(r, 4)) {
        if (rows_own(r) == 0)
            continue;
        rows_loop(r, (rows_keys(r) + KEY_BLOCK - 1) / KEY_BLOCK, 1, load_unit);
        rows_loop(r, rows_own(r) * r->group, 4, forward_rows);
    }
    return TRIL_OK;
}

tril_status LEVEL(attention_fused_backward)(struct op_context *ctx, const struct tensor *args,
                                            const void *params, struct tril_error *err) {
    struct fused f = {.rows = {.kv_head = -1}};
    struct rows *r = &f.rows;
    tril_status st = attention_unpack_backward(&r->c, args, params, err);
    if (st != TRIL_OK)
        return st;
    rows_begin(r);
    if (!layout(&f, ctx, true, "attention_backward", err))
        return TRIL_ERR_MEMORY;
    clear_backward(&r->c);
    while (rows_next(r, 14)) {
        int64_t pieces = (rows_keys(r) + KEY_BLOCK - 1) / KEY_BLOCK;
        rows_loop(r, pieces, 1, load_unit);
        rows_loop(r, rows_own(r), 4, backward_rows);
        rows_loop(r, pieces, 1, backward_keys);
    }
    sink_gradient(&r->c, f.delta);
    return TRIL_OK;
}
