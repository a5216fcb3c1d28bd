/* LayerNorm and RMSNorm (contracts and formulas: src/ops/layernorm.c, rmsnorm.c): one body, of
 * which RMSNorm is the one without mean and bias.
 *
 * A row is read once from memory; the further passes over it find it in the first-level cache. The
 * parameters' gradients are summed per chunk of rows into scratch, then over the chunks in their
 * order, so they do not depend on the number of threads. */
#include "cpu/kernels/loops.h"

/* ------------------------------------------------------------------ sums over a row */

/* sum (x - mean)^power, power 1 or 2, in four interleaved partial sums. */
SIMD float row_moment(const void *x, enum dtype t, int64_t at, int64_t D, float mean, int power) {
    vf s[4], m = vf_set(mean);
    for (int k = 0; k < 4; k++)
        s[k] = vf_zero();
    int64_t i = 0;
    for (; i + 4 * VF_WIDTH <= D; i += 4 * VF_WIDTH) {
        for (int k = 0; k < 4; k++) {
            vf v = vf_load_as(x, t, at + i + k * VF_WIDTH, VF_WIDTH) - m;
            s[k] = power == 2 ? vf_fma(v, v, s[k]) : s[k] + v;
        }
    }
    VF_FOR(j, i, D, {
        vf v = vf_load_as(x, t, at + j, lanes) - m;
        if (lanes < VF_WIDTH)
            v = vf_select(vi_first(lanes), v, vf_zero());
        s[0] = power == 2 ? vf_fma(v, v, s[0]) : s[0] + v;
    });
    return vf_sum((s[0] + s[1]) + (s[2] + s[3]));
}

/* ------------------------------------------------------------------ forward */

struct forward {
    struct tensor x, gain, bias, y, mean, rstd; /* RMSNorm: bias and mean are absent */
    struct norm_params p;
};

SIMD void forward_row(const struct forward *f, int64_t r, struct row_cursor at, enum dtype tx,
                      enum dtype ty, bool centred) {
    int64_t D = row_width(&f->x), x = row_offset(&f->x, at), y = row_offset(&f->y, at);
    const float *gain = f->gain.data, *bias = f->bias.data;
    float mean = 0, n = (float)D;
    if (centred) {
        /* Of the differences to the first element, so that a large common part does not cost
         * digits. */
        float first = vf_load_as(f->x.data, tx, x, 1)[0];
        mean = first + row_moment(f->x.data, tx, x, D, first, 1) / n;
    }
    float rstd = 1.0f / sqrtf(row_moment(f->x.data, tx, x, D, mean, 2) / n + f->p.eps);
    vf m = vf_set(mean), s = vf_set(rstd), offset = vf_set(f->p.gain_offset);
    VF_FOR(i, 0, D, {
        vf v = (vf_load_as(f->x.data, tx, x + i, lanes) - m) * s;
        vf g = vf_load_n(gain + i, lanes) + offset;
        v = bias ? vf_fma(v, g, vf_load_n(bias + i, lanes)) : v * g;
        vf_store_as(f->y.data, ty, y + i, v, lanes);
    });
    if (f->mean.data)
        ((float *)f->mean.data)[r] = mean;
    if (f->rstd.data)
        ((float *)f->rstd.data)[r] = rstd;
}

SIMD void forward_chunk(const struct forward *f, int64_t begin, int64_t end, bool centred) {
    struct row_cursor at = row_at(&f->x, begin);
    FOR_ACT(tx, f->x.dtype, FOR_ACT(ty, f->y.dtype, {
                for (int64_t r = begin; r < end; r++, row_next(&at))
                    forward_row(f, r, at, tx, ty, centred);
            }););
}

static void layernorm_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    forward_chunk(arg, begin, end, true);
}
static void rmsnorm_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    forward_chunk(arg, begin, end, false);
}

/* Bytes of a row of x and y together. */
static int64_t row_bytes(const struct tensor *x, const struct tensor *y) {
    return row_width(x) * (int64_t)(dtype_size(x->dtype) + dtype_size(y->dtype));
}

static tril_status layernorm_forward_kernel(struct op_context *ctx, const struct tensor *a,
                                            const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    struct forward f = {a[0], a[1], a[2], a[3], a[4], a[5], *(const struct norm_params *)params};
    int64_t rows = row_count(&f.x);
    parallel_for(rows, chunk_items(rows, row_bytes(&f.x, &f.y)), layernorm_rows, &f);
    return TRIL_OK;
}

static tril_status rmsnorm_forward_kernel(struct op_context *ctx, const struct tensor *a,
                                          const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    struct forward f = {
        .x = a[0], .gain = a[1], .y = a[2], .rstd = a[3], .p = *(const struct norm_params *)params};
    int64_t rows = row_count(&f.x);
    parallel_for(rows, chunk_items(rows, row_bytes(&f.x, &f.y)), rmsnorm_rows, &f);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ backward */

struct backward {
    struct tensor dy, x, gain, mean, rstd, dx, dgain, dbias;
    struct norm_params p;
    int64_t grain; /* rows per chunk */
    float *sums;   /* [chunks, 2, D]: dgain and dbias of each chunk */
    int64_t chunks;
};

/* One row; adds its part to dgain and dbias (NULL: not wanted). */
SIMD void backward_row(const struct backward *b, int64_t r, struct row_cursor at, enum dtype ty,
                       enum dtype tx, enum dtype tdx, bool add, bool centred, float *dgain,
                       float *dbias) {
    int64_t D = row_width(&b->x), x = row_offset(&b->x, at), dy = row_offset(&b->dy, at);
    int64_t dx = row_offset(&b->dx, at);
    const float *gain = b->gain.data;
    float rstd = ((const float *)b->rstd.data)[r];
    vf s = vf_set(rstd), m = vf_set(centred ? ((const float *)b->mean.data)[r] : 0);
    vf offset = vf_set(b->p.gain_offset), sum0 = vf_zero(), sum1 = vf_zero(), dot0 = vf_zero(),
       dot1 = vf_zero();
    /* sum a and sum a xhat, a = dy g; lanes beyond the row hold dy = 0. */
    int64_t i = 0;
    for (; i + 2 * VF_WIDTH <= D; i += 2 * VF_WIDTH) {
        int64_t j = i + VF_WIDTH;
        vf a0 = vf_load_as(b->dy.data, ty, dy + i, VF_WIDTH) * (vf_load(gain + i) + offset);
        vf a1 = vf_load_as(b->dy.data, ty, dy + j, VF_WIDTH) * (vf_load(gain + j) + offset);
        sum0 += a0;
        sum1 += a1;
        dot0 = vf_fma(a0, vf_load_as(b->x.data, tx, x + i, VF_WIDTH) - m, dot0);
        dot1 = vf_fma(a1, vf_load_as(b->x.data, tx, x + j, VF_WIDTH) - m, dot1);
    }
    VF_FOR(j, i, D, {
        vf a = vf_load_as(b->dy.data, ty, dy + j, lanes) * (vf_load_n(gain + j, lanes) + offset);
        sum0 += a;
        dot0 = vf_fma(a, vf_load_as(b->x.data, tx, x + j, lanes) - m, dot0);
    });
    float n = (float)D;
    vf mean_a = vf_set(centred ? vf_sum(sum0 + sum1) / n : 0);
    vf mean_dot = vf_set(vf_sum(dot0 + dot1) * rstd / n);
    VF_FOR(j, 0, D, {
        vf xhat = (vf_load_as(b->x.data, tx, x + j, lanes) - m) * s;
        vf d = vf_load_as(b->dy.data, ty, dy + j, lanes);
        vf g = vf_load_n(gain + j, lanes) + offset;
        vf v = s * (vf_fma(d, g, -mean_a) - xhat * mean_dot);
        if (add)
            v += vf_load_as(b->dx.data, tdx, dx + j, lanes);
        vf_store_n(dgain + j, vf_fma(d, xhat, vf_load_n(dgain + j, lanes)), lanes);
        if (dbias)
            vf_store_n(dbias + j, d + vf_load_n(dbias + j, lanes), lanes);
        vf_store_as(b->dx.data, tdx, dx + j, v, lanes);
    });
}

SIMD void backward_chunk(const struct backward *b, int64_t begin, int64_t end, bool centred) {
    int64_t D = row_width(&b->x);
    float *dgain = b->sums + begin / b->grain * 2 * D, *dbias = dgain + D;
    memset(dgain, 0, (size_t)D * 2 * sizeof *dgain);
    if (!b->dbias.data)
        dbias = NULL;
    bool add = b->dx.dtype == DT_F32 && !b->p.overwrite;
    struct row_cursor at = row_at(&b->x, begin);
    FOR_ACT(ty, b->dy.dtype, FOR_ACT(tx, b->x.dtype, {
                if (b->dx.dtype != DT_F32) {
                    for (int64_t r = begin; r < end; r++, row_next(&at))
                        backward_row(b, r, at, ty, tx, DT_BF16, false, centred, dgain, dbias);
                } else {
                    for (int64_t r = begin; r < end; r++, row_next(&at))
                        backward_row(b, r, at, ty, tx, DT_F32, add, centred, dgain, dbias);
                }
            }););
}

static void layernorm_backward_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    backward_chunk(arg, begin, end, true);
}
static void rmsnorm_backward_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    backward_chunk(arg, begin, end, false);
}

/* Columns begin .. end of the chunks' sums, added in the order of the chunks. */
static void backward_columns(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct backward *b = arg;
    int64_t D = row_width(&b->x);
    for (int which = 0; which < (b->dbias.data ? 2 : 1); which++) {
        float *out = which ? b->dbias.data : b->dgain.data;
        VF_FOR(i, begin, end, {
            vf sum = vf_zero();
            for (int64_t c = 0; c < b->chunks; c++)
                sum += vf_load_n(b->sums + (c * 2 + which) * D + i, lanes);
            vf_store_n(out + i, vf_load_n(out + i, lanes) + sum, lanes);
        });
    }
}

static tril_status backward_run(struct op_context *ctx, struct backward *b, parallel_fn *rows_fn,
                                struct tril_error *err) {
    enum { CHUNKS = 64 }; /* at most: each costs 2 D floats of scratch */
    int64_t rows = row_count(&b->x), D = row_width(&b->x);
    if (rows == 0 || D == 0)
        return TRIL_OK;
    b->grain = chunk_items(rows, row_bytes(&b->dy, &b->x) + row_bytes(&b->dx, &b->dx));
    if (b->grain < (rows + CHUNKS - 1) / CHUNKS)
        b->grain = (rows + CHUNKS - 1) / CHUNKS;
    b->chunks = (rows + b->grain - 1) / b->grain;
    int64_t bytes = b->chunks * 2 * D * (int64_t)sizeof *b->sums;
    b->sums = op_scratch(ctx, bytes);
    if (!b->sums)
        return error_set(err, TRIL_ERR_MEMORY,
                         "not enough memory for a norm's gradient sums: they need %lld bytes",
                         (long long)bytes);
    parallel_for(rows, b->grain, rows_fn, b);
    parallel_for(D, chunk_elements(D, 8 * b->chunks), backward_columns, b);
    return TRIL_OK;
}

static tril_status layernorm_backward_kernel(struct op_context *ctx, const struct tensor *a,
                                             const void *params, struct tril_error *err) {
    struct backward b = {.dy = a[0],
                         .x = a[1],
                         .gain = a[2],
                         .mean = a[3],
                         .rstd = a[4],
                         .dx = a[5],
                         .dgain = a[6],
                         .dbias = a[7],
                         .p = *(const struct norm_params *)params};
    return backward_run(ctx, &b, layernorm_backward_rows, err);
}

static tril_status rmsnorm_backward_kernel(struct op_context *ctx, const struct tensor *a,
                                           const void *params, struct tril_error *err) {
    struct backward b = {.dy = a[0],
                         .x = a[1],
                         .gain = a[2],
                         .rstd = a[3],
                         .dx = a[4],
                         .dgain = a[5],
                         .p = *(const struct norm_params *)params};
    return backward_run(ctx, &b, rmsnorm_backward_rows, err);
}

void LEVEL(register_norms)(struct backend *b) {
    b->table[OP_LAYERNORM_FORWARD] = layernorm_forward_kernel;
    b->table[OP_LAYERNORM_BACKWARD] = layernorm_backward_kernel;
    b->table[OP_RMSNORM_FORWARD] = rmsnorm_forward_kernel;
    b->table[OP_RMSNORM_BACKWARD] = rmsnorm_backward_kernel;
}
