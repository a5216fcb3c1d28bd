/* Attention as the textbook has it: the whole matrix of scores of a head in memory.
 *
 *   forward    S = Q K^T    P = softmax(S)    O = P V
 *   backward   S = Q K^T    dP = dO V^T    P, dS from both    dQ = dS K    dK = dS^T Q    dV = P^T
 * dO
 *
 * Every step is a pass over whole matrices, one head after the other; P takes the place of S and dS
 * that of dP. Nothing is skipped: what a rule hides is computed and then set to -infinity. The
 * products use the register tiles that flash attention uses, so what separates the two in speed is
 * the memory: 4 n m bytes a head forward and 8 n m backward, reported as scratch. */
#include "cpu/kernels/attention_implementations.h"
#include "cpu/kernels/attention_rows.h"

#define ROWS 48 /* of one task; a multiple of every TILE_ROWS */

struct materialised {
    struct rows rows;         /* first: the loops pass a struct rows */
    float *q, *dout;          /* [n, ld] */
    float *keys, *values;     /* [m, ld] */
    float *keys_t, *values_t; /* [width, ldk] */
    float *s, *g;             /* [n, ldk]: S, then P; dP, then dS */
    float *dk, *dv;           /* [m, ld] */
    float *inverse, *delta;   /* [n]; [H, N] */
    char *worker;
    int64_t worker_bytes, head;
};

static struct materialised *of(void *arg) {
    return arg;
}

static int64_t tasks(int64_t n) {
    return (n + ROWS - 1) / ROWS;
}
static int64_t rows_of_task(const struct rows *r, int64_t task) {
    return min_i64(ROWS, rows_own(r) - task * ROWS);
}
static int64_t first_row(const struct rows *r) {
    return r->c.q_offsets[r->sequence];
}

/* Item: a piece of the unit's keys, and zeros for their gradients. */
static void load_unit(void *arg, int64_t begin, int64_t end, int worker) {
    struct materialised *f = of(arg);
    const struct rows *r = &f->rows;
    (void)worker;
    for (int64_t j0 = begin * KEY_BLOCK; j0 < end * KEY_BLOCK; j0 += KEY_BLOCK) {
        load_keys(r, &r->c.k, &r->c.k_scale, j0, f->keys + j0 * r->ld);
        load_keys(r, &r->c.v, &r->c.v_scale, j0, f->values + j0 * r->ld);
        transpose_matrix(f->keys_t + j0, r->ldk, f->keys + j0 * r->ld, r->ld, KEY_BLOCK,
                         r->c.width);
        if (!f->dk)
            continue;
        transpose_matrix(f->values_t + j0, r->ldk, f->values + j0 * r->ld, r->ld, KEY_BLOCK,
                         r->c.width);
        memset(f->dk + j0 * r->ld, 0, (size_t)(KEY_BLOCK * r->ld) * 4);
        memset(f->dv + j0 * r->ld, 0, (size_t)(KEY_BLOCK * r->ld) * 4);
    }
}

/* S = Q K^T, and backward dP = dO V^T and delta. Item: ROWS rows. */
static void multiply_scores(void *arg, int64_t begin, int64_t end, int worker) {
    struct materialised *f = of(arg);
    const struct rows *r = &f->rows;
    const struct attention_call *c = &r->c;
    int64_t columns = round_up(rows_keys(r), KEY_BLOCK);
    (void)worker;
    for (int64_t task = begin; task < end; task++) {
        int64_t i = task * ROWS, n = first_row(r) + i, count = rows_of_task(r, task);
        float *q = f->q + i * r->ld, *dout = f->dout + i * r->ld;
        if (f->dk) {
            matrix_load(q, r->ld, &c->o, n, f->head, count, ROWS, 1);
            matrix_load(dout, r->ld, &c->dout, n, f->head, count, ROWS, 1);
            for (int64_t k = 0; k < count; k++)
                f->delta[f->head * c->rows + n + k] =
                    row_dot(q + k * r->ld, dout + k * r->ld, r->ld);
            multiply(count, columns, c->width, dout, r->ld, f->values_t, r->ldk, f->g + i * r->ldk,
                     r->ldk);
        }
        matrix_load(q, r->ld, &c->q, n, f->head, count, ROWS, r->q_factor);
        multiply(count, columns, c->width, q, r->ld, f->keys_t, r->ldk, f->s + i * r->ldk, r->ldk);
    }
}

/* Scores with all that changes them. */
static void finish_row(const struct materialised *f, int64_t i, float *slope) {
    const struct rows *r = &f->rows;
    for (int64_t j0 = 0; j0 < rows_keys(r); j0 += KEY_BLOCK)
        finish_scores(r, i, f->head, j0, row_mask(r, i, f->head, j0), f->s + i * r->ldk + j0,
                      slope ? slope + j0 : NULL);
}

/* P = softmax(S), dropout applied. Item: a row. */
static void softmax(void *arg, int64_t begin, int64_t end, int worker) {
    struct materialised *f = of(arg);
    const struct rows *r = &f->rows;
    uint64_t *all = (uint64_t *)(void *)(f->worker + worker * f->worker_bytes);
    memset(all, 0xff, (size_t)r->blocks * 8);
    for (int64_t i = begin; i < end; i++) {
        int64_t n = first_row(r) + i;
        finish_row(f, i, NULL);
        float lse = softmax_row(r, n, f->head, f->s + i * r->ldk, all, &f->inverse[i]);
        if (r->c.lse.data)
            ((float *)r->c.lse.data)[f->head * r->c.rows + n] = lse;
        vf factor = vf_set(f->inverse[i] * r->keep_factor);
        for (int64_t j = 0; j < rows_keys(r); j += VF_WIDTH)
            vf_store(f->s + i * r->ldk + j, vf_load(f->s + i * r->ldk + j) * factor);
    }
}

/* P and dS of the backward. Item: a row. */
static void gradients(void *arg, int64_t begin, int64_t end, int worker) {
    struct materialised *f = of(arg);
    const struct rows *r = &f->rows;
    float *slope = (float *)(void *)(f->worker + worker * f->worker_bytes);
    for (int64_t i = begin; i < end; i++) {
        int64_t n = first_row(r) + i;
        float lse = row_lse(r, n, f->head), delta = f->delta[f->head * r->c.rows + n];
        float *dbias = dbias_row(r, i, f->head);
        finish_row(f, i, slope);
        for (int64_t j0 = 0; j0 < rows_keys(r); j0 += KEY_BLOCK)
            score_gradients(r, i, f->head, j0, lse, delta, slope + j0, f->s + i * r->ldk + j0,
                            f->g + i * r->ldk + j0, dbias ? dbias + j0 : NULL);
    }
}

/* O = P V, or dQ = dS K. Item: ROWS rows. */
static void multiply_values(void *arg, int64_t begin, int64_t end, int worker) {
    struct materialised *f = of(arg);
    const struct rows *r = &f->rows;
    float *out = (float *)(void *)(f->worker + worker * f->worker_bytes);
    for (int64_t task = begin; task < end; task++) {
        int64_t i = task * ROWS, n = first_row(r) + i, count = rows_of_task(r, task);
        multiply(count, r->c.width, rows_keys(r), (f->dk ? f->g : f->s) + i * r->ldk, r->ldk,
                 f->dk ? f->keys : f->values, r->ld, out, r->ld);
        matrix_store(f->dk ? &r->c.dq : &r->c.o, n, f->head, out, r->ld, count,
                     f->dk ? r->c.params->scale : 1);
    }
}

/* dK += dS^T Q and dV += P^T dO, over the heads of the group in order. Item: ROWS keys. */
static void multiply_transposes(void *arg, int64_t begin, int64_t end, int worker) {
    struct materialised *f = of(arg);
    const struct rows *r = &f->rows;
    int64_t d = r->c.width, ld = r->ld, n = rows_own(r);
    (void)worker;
    for (int64_t task = begin; task < end; task++) {
        int64_t j = task * ROWS, keys = min_i64(ROWS, rows_keys(r) - j);
        multiply_transposed_add(keys, d, n, f->g + j, r->ldk, f->q, ld, f->dk + j * ld, ld);
        multiply_transposed_add(keys, d, n, f->s + j, r->ldk, f->dout, ld, f->dv + j * ld, ld);
        if (f->head % r->group < r->group - 1)
            continue;
        int64_t first = r->c.kv_start[r->sequence] + j;
        matrix_store(&r->c.dk, first, r->kv_head, f->dk + j * ld, ld, keys, r->dk_factor);
        matrix_store(&r->c.dv, first, r->kv_head, f->dv + j * ld, ld, keys, r->keep_factor);
    }
}

/* ------------------------------------------------------------------ calls */

static bool layout(struct materialised *f, struct op_context *ctx, bool backward, const char *name,
                   struct tril_error *err) {
    const struct rows *r = &f->rows;
    /* A task writes whole tiles of rows; of keys, too. */
    int64_t n = round_up(r->c.longest_q, ROWS), m = round_up(r->blocks * KEY_BLOCK, ROWS), used = 0;
    int64_t width = round_up(r->c.width, VF_WIDTH), keys = m * r->ld;
    int64_t q = take(&used, n * r->ld), dout = take(&used, backward ? n * r->ld : 0);
    int64_t k = take(&used, keys), v = take(&used, keys);
    int64_t k_t = take(&used, width * r->ldk), v_t = take(&used, backward ? width * r->ldk : 0);
    int64_t s = take(&used, n * r->ldk), g = take(&used, backward ? n * r->ldk : 0);
    int64_t dk = take(&used, backward ? keys : 0), dv = take(&used, backward ? keys : 0);
    int64_t inverse = take(&used, n), delta = take(&used, backward ? r->c.heads * r->c.rows : 0);
    f->worker_bytes = round_up(max_i64(ROWS * r->ld, r->ldk) * 4, 4096) + 64 * 9;
    int64_t bytes = used * 4 + f->worker_bytes * threads_count();
    float *memory = op_scratch(ctx, bytes);
    if (!memory) {
        op_scratch_error(ctx, name, bytes, err);
        return false;
    }
    f->q = memory + q;
    f->dout = memory + dout;
    f->keys = memory + k;
    f->values = memory + v;
    f->keys_t = memory + k_t;
    f->values_t = memory + v_t;
    f->s = memory + s;
    f->g = memory + g;
    f->dk = backward ? memory + dk : NULL;
    f->dv = memory + dv;
    f->inverse = memory + inverse;
    f->delta = memory + delta;
    f->worker = (char *)(memory + used);
    return true;
}

tril_status LEVEL(attention_materialised_forward)(struct op_context *ctx, const struct tensor *args,
                                                  const void *params, struct tril_error *err) {
    struct materialised f = {.rows = {.kv_head = -1}};
    struct rows *r = &f.rows;
    tril_status st = attention_unpack_forward(&r->c, args, params, err);
    if (st != TRIL_OK)
        return st;
    rows_begin(r);
    if (!layout(&f, ctx, false, "attention_forward", err))
        return TRIL_ERR_MEMORY;
    clear_forward(&r->c);
    while (rows_next(r, 4)) {
        int64_t n = rows_own(r);
        if (n == 0)
            continue;
        rows_loop(r, (rows_keys(r) + KEY_BLOCK - 1) / KEY_BLOCK, 1, load_unit);
        for (int64_t h = 0; h < r->group; h++) {
            f.head = r->kv_head * r->group + h;
            rows_loop(r, tasks(n), 1, multiply_scores);
            rows_loop(r, n, 8, softmax);
            rows_loop(r, tasks(n), 1, multiply_values);
        }
    }
    return TRIL_OK;
}

tril_status LEVEL(attention_materialised_backward)(struct op_context *ctx,
                                                   const struct tensor *args, const void *params,
                                                   struct tril_error *err) {
    struct materialised f = {.rows = {.kv_head = -1}};
    struct rows *r = &f.rows;
    tril_status st = attention_unpack_backward(&r->c, args, params, err);
    if (st != TRIL_OK)
        return st;
    rows_begin(r);
    if (!layout(&f, ctx, true, "attention_backward", err))
        return TRIL_ERR_MEMORY;
    clear_backward(&r->c);
    while (rows_next(r, 10)) {
        int64_t n = rows_own(r);
        rows_loop(r, (rows_keys(r) + KEY_BLOCK - 1) / KEY_BLOCK, 1, load_unit);
        for (int64_t h = 0; h < r->group; h++) {
            f.head = r->kv_head * r->group + h;
            rows_loop(r, tasks(n), 1, multiply_scores);
            rows_loop(r, n, 8, gradients);
            rows_loop(r, tasks(n), 1, multiply_values);
            rows_loop(r, tasks(rows_keys(r)), 1, multiply_transposes);
        }
    }
    sink_gradient(&r->c, f.delta);
    return TRIL_OK;
}
