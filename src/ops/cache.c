/* Moving rows by index, converting between dtypes on the way.
 *
 *   cache_store:  cache[rows[n]] = x[n]        keys and values of new tokens into the KV cache,
 *                                              also quantised to 8 bits
 *   gather_rows:  y[r] = x[rows[r]]            the rows whose logits are wanted
 *   scatter_rows: y[rows[r]] = x[r]            and their gradients back; other rows stay
 *
 * The rows that are written must all be different. */
#include <math.h>

#include "ops/reference.h"

/* Bytes of the rows that move, read and written. */
static double moved_bytes(const struct tensor *x, const struct tensor *y, double rows,
                          double width) {
    return rows * (4 + width * (double)(dtype_size(x->dtype) + dtype_size(y->dtype)));
}

/* `count` different rows below `limit`, in a scrambled order: an affine permutation. */
static void distinct_rows(struct tensor *rows, int64_t limit) {
    int64_t step = limit / 2 + 1;
    for (;; step++) { /* coprime to limit */
        int64_t a = step, b = limit;
        while (b) {
            int64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            break;
    }
    for (int64_t n = 0; n < rows->shape[0]; n++)
        ((int32_t *)rows->data)[n] = (int32_t)((n * step + 3) % limit);
}

/* ------------------------------------------------------------------ cache_store */

enum { S_X, S_ROWS, S_CACHE, S_SCALE, S_ARGS };

static const struct op_arg store_args[S_ARGS] = {
    {"x", "N K d", ARG_IN, .dtypes = DT_ACT, .strided = true},
    {"rows", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "M"},
    {"cache", "M K d", ARG_INOUT, .dtypes = DT_FLOAT | DT_MASK(DT_I8)},
    {"scale", "M K", ARG_INOUT, .dtypes = DT_MASK(DT_F32), .optional = true},
};

tril_status cache_store(struct op_context *ctx, struct tensor x, struct tensor rows,
                        struct tensor cache, struct tril_error *err) {
    struct tensor args[S_ARGS] = {x, rows, cache, tensor_none()};
    return op_call(ctx, OP_CACHE_STORE, args, NULL, err);
}

tril_status cache_store_quantised(struct op_context *ctx, struct tensor x, struct tensor rows,
                                  struct tensor cache, struct tensor scale,
                                  struct tril_error *err) {
    struct tensor args[S_ARGS] = {x, rows, cache, scale};
    return op_call(ctx, OP_CACHE_STORE, args, NULL, err);
}

static tril_status store_check(const struct tensor *a, const void *params, struct tril_error *err) {
    (void)params;
    if ((a[S_CACHE].dtype == DT_I8) == (a[S_SCALE].data != NULL) || a[S_CACHE].data == NULL)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT,
                     "cache_store: argument scale belongs to a cache of i8, and to no other");
}

/* Row n, head k. Computed in fp32 whatever x is, so that every backend rounds alike. */
static void store_quantised(const struct tensor *a, int64_t n, int64_t k, int64_t row) {
    int64_t K = a[S_X].shape[1], d = a[S_X].shape[2];
    float most = 0;
    for (int64_t i = 0; i < d; i++) {
        float x = fabsf((float)ref_at3(&a[S_X], n, k, i));
        most = x > most || isnan(x) ? x : most;
    }
    float inverse = most > 0 && isfinite(most) ? 127 / most : 0;
    ref_put(&a[S_SCALE], row * K + k, (double)(most / 127));
    for (int64_t i = 0; i < d; i++) {
        float x = inverse > 0 ? rintf((float)ref_at3(&a[S_X], n, k, i) * inverse) : 0;
        ref_put(&a[S_CACHE], (row * K + k) * d + i, (double)x);
    }
}

static tril_status store_reference(struct op_context *ctx, const struct tensor *a,
                                   const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    tril_status st = TRIL_OK;
    int64_t N = a[S_X].shape[0], K = a[S_X].shape[1], d = a[S_X].shape[2];
    for (int64_t n = 0; n < N; n++) {
        int64_t row;
        TRY(ref_index("cache_store", "rows", &a[S_ROWS], n, a[S_CACHE].shape[0], &row, err));
        for (int64_t k = 0; k < K; k++) {
            if (a[S_CACHE].dtype == DT_I8) {
                store_quantised(a, n, k, row);
                continue;
            }
            for (int64_t i = 0; i < d; i++)
                ref_put(&a[S_CACHE], (row * K + k) * d + i, ref_at3(&a[S_X], n, k, i));
        }
    }
done:
    return st;
}

static bool store_case(int index, struct op_case *c) {
    static const int64_t sizes[][4] = {/* N, K, d, M */
                                       {1, 1, 1, 1},    {3, 2, 7, 5},   {5, 3, 17, 8},
                                       {0, 2, 8, 4},    {7, 1, 64, 19}, {17, 4, 65, 17},
                                       {9, 12, 64, 100}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    int s = case_pick(&index, COUNT);
    *c = (struct op_case){.act = DT_F32, .label = "dense"};
    c->size['N'] = sizes[s][0];
    c->size['K'] = sizes[s][1];
    c->size['d'] = sizes[s][2];
    c->size['M'] = sizes[s][3];
    if (case_pick(&index, 2))
        c->act = DT_BF16;
    static const enum dtype cache[] = {DT_BF16, DT_F32, DT_F16, DT_I8};
    enum dtype type = cache[case_pick(&index, 4)];
    c->dtype[S_CACHE] = case_dtype(type);
    if (type != DT_I8)
        c->absent |= 1u << S_SCALE;
    if (case_pick(&index, 2)) {
        c->strided = 1u << S_X;
        c->label = "strided";
    }
    return index == 0;
}

static void store_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    distinct_rows(&a[S_ROWS], a[S_CACHE].shape[0]);
}

static double store_bytes(const struct tensor *a, const void *params) {
    (void)params;
    return moved_bytes(&a[S_X], &a[S_CACHE], (double)a[S_X].shape[0],
                       (double)(a[S_X].shape[1] * a[S_X].shape[2]));
}

const struct op_info op_info_cache_store = {
    .id = OP_CACHE_STORE,
    .name = "cache_store",
    .args = store_args,
    .arg_count = S_ARGS,
    .reference = store_reference,
    .check = store_check,
    .test_case = store_case,
    .test_fill = store_fill,
    .bytes = store_bytes,
};

/* ------------------------------------------------------------------ gather and scatter */

enum { R_X, R_ROWS, R_Y, R_ARGS };

static const struct op_arg gather_args[R_ARGS] = {
    {"x", "N D", ARG_IN, .dtypes = DT_FLOAT},
    {"rows", "R", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "N"},
    {"y", "R D", ARG_OUT, .dtypes = DT_FLOAT},
};
static const struct op_arg scatter_args[R_ARGS] = {
    {"x", "R D", ARG_IN, .dtypes = DT_FLOAT},
    {"rows", "R", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "N"},
    {"y", "N D", ARG_INOUT, .dtypes = DT_FLOAT},
};

tril_status gather_rows(struct op_context *ctx, struct tensor x, struct tensor rows,
                        struct tensor y, struct tril_error *err) {
    struct tensor args[R_ARGS] = {x, rows, y};
    return op_call(ctx, OP_GATHER_ROWS, args, NULL, err);
}

tril_status scatter_rows(struct op_context *ctx, struct tensor x, struct tensor rows,
                         struct tensor y, struct tril_error *err) {
    struct tensor args[R_ARGS] = {x, rows, y};
    return op_call(ctx, OP_SCATTER_ROWS, args, NULL, err);
}

static tril_status gather_reference(struct op_context *ctx, const struct tensor *a,
                                    const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    tril_status st = TRIL_OK;
    int64_t R = a[R_Y].shape[0], D = a[R_Y].shape[1];
    for (int64_t r = 0; r < R; r++) {
        int64_t row;
        TRY(ref_index("gather_rows", "rows", &a[R_ROWS], r, a[R_X].shape[0], &row, err));
        for (int64_t i = 0; i < D; i++)
            ref_put(&a[R_Y], r * D + i, ref_at(&a[R_X], row * D + i));
    }
done:
    return st;
}

static tril_status scatter_reference(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    tril_status st = TRIL_OK;
    int64_t R = a[R_X].shape[0], D = a[R_X].shape[1];
    for (int64_t r = 0; r < R; r++) {
        int64_t row;
        TRY(ref_index("scatter_rows", "rows", &a[R_ROWS], r, a[R_Y].shape[0], &row, err));
        for (int64_t i = 0; i < D; i++)
            ref_put(&a[R_Y], row * D + i, ref_at(&a[R_X], r * D + i));
    }
done:
    return st;
}

static void rows_case(int *index, struct op_case *c) {
    static const int64_t sizes[][3] = {/* N, D, R */
                                       {1, 1, 1},  {5, 7, 3},    {17, 64, 17},  {9, 65, 4},
                                       {4, 16, 0}, {33, 257, 8}, {100, 768, 33}};
    static const enum dtype pairs[][2] = {{DT_F32, DT_F32},
                                          {DT_BF16, DT_BF16},
                                          {DT_F32, DT_BF16},
                                          {DT_BF16, DT_F32},
                                          {DT_F16, DT_F32}};
    enum { COUNT = sizeof sizes / sizeof *sizes, PAIRS = sizeof pairs / sizeof *pairs };
    int s = case_pick(index, COUNT);
    *c = (struct op_case){.act = DT_F32, .label = "rows"};
    c->size['N'] = sizes[s][0];
    c->size['D'] = sizes[s][1];
    c->size['R'] = sizes[s][2];
    int p = case_pick(index, PAIRS);
    c->dtype[R_X] = case_dtype(pairs[p][0]);
    c->dtype[R_Y] = case_dtype(pairs[p][1]);
}

static bool rows_test_case(int index, struct op_case *c) {
    rows_case(&index, c);
    return index == 0;
}

static void scatter_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    distinct_rows(&a[R_ROWS], a[R_Y].shape[0]);
}

static double rows_bytes(const struct tensor *a, const void *params) {
    (void)params;
    return moved_bytes(&a[R_X], &a[R_Y], (double)a[R_ROWS].shape[0], (double)a[R_X].shape[1]);
}

const struct op_info op_info_gather_rows = {
    .id = OP_GATHER_ROWS,
    .name = "gather_rows",
    .args = gather_args,
    .arg_count = R_ARGS,
    .reference = gather_reference,
    .test_case = rows_test_case,
    .bytes = rows_bytes,
};

const struct op_info op_info_scatter_rows = {
    .id = OP_SCATTER_ROWS,
    .name = "scatter_rows",
    .args = scatter_args,
    .arg_count = R_ARGS,
    .reference = scatter_reference,
    .test_case = rows_test_case,
    .test_fill = scatter_fill,
    .bytes = rows_bytes,
};
