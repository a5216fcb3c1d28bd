/* Cross-entropy over rows of logits (contract and formulas: src/ops/cross_entropy.c).
 *
 * The forward reads a row once: it takes blocks that fit the first-level cache, and when a block
 * raises the maximum, the sum so far is scaled down to it (Milakov, Gimelshein 2018). */
#include "cpu/kernels/softmax.h"
#include "ops/reference.h"

enum { BLOCK = 2048 };

struct call {
    struct tensor logits, targets, maximum, sum, target, dlogits;
    float scale;
};

static tril_status check_targets(const char *name, const struct tensor *targets, int64_t V,
                                 struct tril_error *err) {
    tril_status st = TRIL_OK;
    int64_t ignored;
    for (int64_t n = 0; n < targets->shape[0]; n++) {
        if (((const int32_t *)targets->data)[n] >= 0)
            TRY(ref_index(name, "targets", targets, n, V, &ignored, err));
    }
done:
    return st;
}

/* ------------------------------------------------------------------ forward */

/* The largest of n logits from `at` on, or `floor`. A NaN among them is dropped here; it comes out
 * of the sum. */
SIMD float block_maximum(const void *x, enum dtype t, int64_t at, int64_t n, float floor) {
    vf m[4];
    for (int k = 0; k < 4; k++)
        m[k] = vf_set(floor);
    int64_t i = 0;
    for (; i + 4 * VF_WIDTH <= n; i += 4 * VF_WIDTH) {
        for (int k = 0; k < 4; k++)
            m[k] = vf_max(vf_load_as(x, t, at + i + k * VF_WIDTH, VF_WIDTH), m[k]);
    }
    VF_FOR(j, i, n, {
        vf v = vf_load_as(x, t, at + j, lanes);
        if (lanes < VF_WIDTH)
            v = vf_select(vi_first(lanes), v, m[0]);
        m[0] = vf_max(v, m[0]);
    });
    return vf_max_lanes(vf_max(vf_max(m[0], m[1]), vf_max(m[2], m[3])));
}

SIMD void forward_row(const struct call *c, int64_t n, enum dtype t) {
    int64_t V = c->logits.shape[1], row = n * V;
    const void *x = c->logits.data;
    float maximum = -INFINITY, sum = 0;
    for (int64_t v = 0; v < V; v += BLOCK) {
        int64_t count = V - v < BLOCK ? V - v : BLOCK;
        float larger = block_maximum(x, t, row + v, count, maximum);
        if (larger > maximum) {
            sum *= expf(maximum - larger); /* 0 the first time */
            maximum = larger;
        }
        sum += exp_sum(x, t, row + v, count, maximum);
    }
    int32_t target = ((const int32_t *)c->targets.data)[n];
    ((float *)c->maximum.data)[n] = maximum;
    ((float *)c->sum.data)[n] = sum;
    ((float *)c->target.data)[n] = target < 0 ? 0 : vf_load_as(x, t, row + target, 1)[0];
}

static void forward_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    FOR_ACT(t, c->logits.dtype, {
        for (int64_t n = begin; n < end; n++)
            forward_row(c, n, t);
    });
}

static tril_status forward_kernel(struct op_context *ctx, const struct tensor *a,
                                  const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    struct call c = {.logits = a[0], .targets = a[1], .maximum = a[2], .sum = a[3], .target = a[4]};
    int64_t N = c.logits.shape[0], V = c.logits.shape[1];
    tril_status st = check_targets("cross_entropy_forward", &c.targets, V, err);
    if (st == TRIL_OK)
        parallel_for(N, chunk_items(N, V * (int64_t)dtype_size(c.logits.dtype)), forward_rows, &c);
    return st;
}

/* ------------------------------------------------------------------ backward */

SIMD void backward_row(const struct call *c, int64_t n, enum dtype t, enum dtype td) {
    int64_t V = c->logits.shape[1], row = n * V;
    int32_t target = ((const int32_t *)c->targets.data)[n];
    if (target < 0) {
        memset(element(&c->dlogits, row), 0, (size_t)V * dtype_size(td));
        return;
    }
    float maximum = ((const float *)c->maximum.data)[n], sum = ((const float *)c->sum.data)[n];
    vf m = vf_set(maximum), factor = vf_set(c->scale / sum);
    vf at_target = vf_load_as(c->logits.data, t, row + target, 1); /* (before it is overwritten) */
    VF_FOR(v, 0, V, {
        vf e = vf_exp(vf_load_as(c->logits.data, t, row + v, lanes) - m);
        vf_store_as(c->dlogits.data, td, row + v, e * factor, lanes);
    });
    vf p = vf_exp(at_target - m) / vf_set(sum);
    vf_store_as(c->dlogits.data, td, row + target, vf_set(c->scale) * (p - vf_set(1.0f)), 1);
}

static void backward_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    FOR_ACT(t, c->logits.dtype, FOR_ACT(td, c->dlogits.dtype, {
                for (int64_t n = begin; n < end; n++)
                    backward_row(c, n, t, td);
            }););
}

static tril_status backward_kernel(struct op_context *ctx, const struct tensor *a,
                                   const void *params, struct tril_error *err) {
    (void)ctx;
    const struct cross_entropy_params *p = params;
    struct call c = {.logits = a[0],
                     .targets = a[1],
                     .maximum = a[2],
                     .sum = a[3],
                     .dlogits = a[4],
                     .scale = p->scale};
    int64_t N = c.logits.shape[0], V = c.logits.shape[1];
    int64_t bytes = (int64_t)(dtype_size(c.logits.dtype) + dtype_size(c.dlogits.dtype));
    tril_status st = check_targets("cross_entropy_backward", &c.targets, V, err);
    if (st == TRIL_OK)
        parallel_for(N, chunk_items(N, V * bytes), backward_rows, &c);
    return st;
}

/* The loss phase is one logarithm per row: the reference serves. */
void LEVEL(register_cross_entropy)(struct backend *b) {
    b->table[OP_CROSS_ENTROPY_FORWARD] = forward_kernel;
    b->table[OP_CROSS_ENTROPY_BACKWARD] = backward_kernel;
}
