/* Moving rows by index (contracts: src/ops/cache.c). */
#include <math.h>

#include "cpu/kernels/convert.h"
#include "ops/reference.h"

struct call {
    struct tensor x, rows, y, scale;
    bool gather; /* y[r] = x[rows[r]]; otherwise y[rows[r]] = x[r] */
};

/* Rows begin .. end of the index; x and y are [., D] dense. */
static void move_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    int64_t D = c->x.shape[1];
    FOR_FLOAT(tx, c->x.dtype, FOR_FLOAT(ty, c->y.dtype, {
                  for (int64_t r = begin; r < end; r++) {
                      int64_t row = ((const int32_t *)c->rows.data)[r];
                      int64_t from = c->gather ? row : r, to = c->gather ? r : row;
                      convert_run(element(&c->y, to * D), ty, element(&c->x, from * D), tx, D);
                  }
              }););
}

static tril_status check_rows(const char *name, const struct tensor *rows, int64_t limit,
                              struct tril_error *err) {
    tril_status st = TRIL_OK;
    int64_t ignored;
    for (int64_t r = 0; r < rows->shape[0]; r++)
        TRY(ref_index(name, "rows", rows, r, limit, &ignored, err));
done:
    return st;
}

static int64_t pair_bytes(const struct tensor *x, const struct tensor *y) {
    return (int64_t)(dtype_size(x->dtype) + dtype_size(y->dtype));
}

static tril_status rows_run(const char *name, struct call *c, struct tril_error *err) {
    const struct tensor *indexed = c->gather ? &c->x : &c->y;
    int64_t R = c->rows.shape[0], D = c->x.shape[1];
    tril_status st = check_rows(name, &c->rows, indexed->shape[0], err);
    if (st == TRIL_OK)
        parallel_for(R, chunk_items(R, D * pair_bytes(&c->x, &c->y)), move_rows, c);
    return st;
}

static tril_status gather_kernel(struct op_context *ctx, const struct tensor *a, const void *params,
                                 struct tril_error *err) {
    (void)ctx;
    (void)params;
    struct call c = {.x = a[0], .rows = a[1], .y = a[2], .gather = true};
    return rows_run("gather_rows", &c, err);
}

static tril_status scatter_kernel(struct op_context *ctx, const struct tensor *a,
                                  const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    struct call c = {.x = a[0], .rows = a[1], .y = a[2]};
    return rows_run("scatter_rows", &c, err);
}

/* x [N, K, d] strided into cache [M, K, d]. */
static void store_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    int64_t K = c->x.shape[1], d = c->x.shape[2];
    if (c->x.stride[1] == d || K == 1) { /* heads side by side: one run */
        d *= K;
        K = 1;
    }
    FOR_ACT(tx, c->x.dtype, FOR_FLOAT(ty, c->y.dtype, {
                for (int64_t n = begin; n < end; n++) {
                    int64_t row = ((const int32_t *)c->rows.data)[n];
                    for (int64_t k = 0; k < K; k++)
                        convert_run(element(&c->y, (row * K + k) * d), ty,
                                    element(&c->x, n * c->x.stride[0] + k * c->x.stride[1]), tx, d);
                }
            }););
}

/* The same into i8: head k of row n has scale max|x| / 127. */
static void store_quantised(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    const int64_t K = c->x.shape[1], d = c->x.shape[2];
    for (int64_t n = begin; n < end; n++)
        for (int64_t k = 0; k < K; k++) {
            const void *x = element(&c->x, n * c->x.stride[0] + k * c->x.stride[1]);
            int64_t at = ((const int32_t *)c->rows.data)[n] * K + k;
            int8_t *y = (int8_t *)c->y.data + at * d;
            vf most = vf_zero();
            vi nan = vi_set(0);
            FOR_ACT(t, c->x.dtype, VF_FOR(i, 0, d, {
                        vf a = vf_load_as(x, t, i, lanes);
                        nan |= vf_is_nan(a);
                        most = vf_max(vf_abs(a), most);
                    }););
            float largest = vf_max_lanes(most);
            for (int i = 0; i < VF_WIDTH; i++)
                largest = nan[i] ? NAN : largest;
            float inverse = largest > 0 && isfinite(largest) ? 127 / largest : 0;
            ((float *)c->scale.data)[at] = largest / 127;
            FOR_ACT(t, c->x.dtype, VF_FOR(i, 0, d, {
                        vf a = vf_load_as(x, t, i, lanes) * vf_set(inverse);
                        /* |a| <= 127: adding 1.5 * 2^23 rounds to the nearest, ties to even */
                        vi q = (vi)(a + vf_set(SIMD_ROUND)) - (vi)vf_set(SIMD_ROUND);
                        for (int e = 0; e < lanes; e++)
                            y[i + e] = inverse > 0 ? (int8_t)q[e] : 0;
                    }););
        }
}

static tril_status store_kernel(struct op_context *ctx, const struct tensor *a, const void *params,
                                struct tril_error *err) {
    (void)ctx;
    (void)params;
    struct call c = {a[0], a[1], a[2], a[3], false};
    int64_t N = c.x.shape[0], width = c.x.shape[1] * c.x.shape[2];
    tril_status st = check_rows("cache_store", &c.rows, c.y.shape[0], err);
    if (st == TRIL_OK)
        parallel_for(N, chunk_items(N, width * pair_bytes(&c.x, &c.y)),
                     c.y.dtype == DT_I8 ? store_quantised : store_rows, &c);
    return st;
}

void LEVEL(register_cache)(struct backend *b) {
    b->table[OP_CACHE_STORE] = store_kernel;
    b->table[OP_GATHER_ROWS] = gather_kernel;
    b->table[OP_SCATTER_ROWS] = scatter_kernel;
}
