/* Element-wise activations and gated units (contracts and formulas: src/ops/activation.c).
 *
 * The tanh form of GELU is x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3): since tanh u =
 * 2 sigmoid(2 u) - 1 there is nothing to cancel, and the slope needs no second exponential:
 * sigmoid' = s (1 - s). */
#include "cpu/kernels/loops.h"

#define SQRT_2_OVER_PI 0.79788456080286535588f
#define SQRT_1_OVER_2PI 0.39894228040143267794f

/* sigmoid(x) and, with a small relative error of its own, 1 - sigmoid(x) = e^-x sigmoid(x); that is
 * 0 instead of 1 where sigmoid(x) is 0, which every use multiplies with it. */
SIMD vf sigmoid_and_rest(vf x, vf *rest) {
    vf e = vf_exp(-x), s = vf_set(1.0f) / (vf_set(1.0f) + e);
    *rest = vf_min(vf_set(1e30f), e) * s;
    return s;
}

/* act(x) and, where asked for, act'(x); `a` is a constant after inlining. */
SIMD vf act_value_slope(enum activation a, vf x, vf *slope) {
    vf one = vf_set(1.0f);
    switch (a) {
    case ACT_RELU: {
        vf zero = x * vf_zero(); /* NaN stays NaN */
        *slope = vf_select(vf_less(vf_zero(), x), one, zero);
        return vf_select(vf_less(vf_zero(), x), x, zero);
    }
    case ACT_GELU_ERF: {
        vf cdf = vf_normal_cdf(x);
        vf density = vf_set(SQRT_1_OVER_2PI) * vf_exp(vf_set(-0.5f) * x * x);
        *slope = vf_fma(x, density, cdf);
        return x * cdf;
    }
    case ACT_GELU_TANH: {
        vf z = vf_min(vf_set(1e8f), x * x); /* (finite: it meets zeros below) */
        vf u2 = x * vf_fma(z, vf_set(2 * SQRT_2_OVER_PI * 0.044715f), vf_set(2 * SQRT_2_OVER_PI));
        vf u2_slope = vf_fma(z, vf_set(6 * SQRT_2_OVER_PI * 0.044715f), vf_set(2 * SQRT_2_OVER_PI));
        vf rest, s = sigmoid_and_rest(u2, &rest), y = x * s;
        *slope = vf_fma(y * rest, u2_slope, s);
        return y;
    }
    case ACT_SILU: {
        vf rest, s = sigmoid_and_rest(x, &rest), y = x * s;
        *slope = vf_fma(y, rest, s);
        return y;
    }
    case ACT_NONE:
        break;
    }
    *slope = one;
    return x;
}

/* The statement(s) in ... with A a constant equal to a. */
#define FOR_ACTIVATION(A, a, ...)                                                                  \
    do {                                                                                           \
        switch (a) {                                                                               \
            FOR_ACTIVATION_CASE(A, ACT_RELU, __VA_ARGS__)                                          \
            FOR_ACTIVATION_CASE(A, ACT_GELU_ERF, __VA_ARGS__)                                      \
            FOR_ACTIVATION_CASE(A, ACT_GELU_TANH, __VA_ARGS__)                                     \
            FOR_ACTIVATION_CASE(A, ACT_SILU, __VA_ARGS__)                                          \
            FOR_ACTIVATION_CASE(A, ACT_NONE, __VA_ARGS__)                                          \
        }                                                                                          \
    } while (0)
#define FOR_ACTIVATION_CASE(A, value, ...)                                                         \
    case value: {                                                                                  \
        const enum activation A = value;                                                           \
        __VA_ARGS__                                                                                \
        break;                                                                                     \
    }

/* ------------------------------------------------------------------ activation */

struct call {
    enum activation activation;
    enum dtype t;
    const void *dy, *x; /* dy: of a backward */
    void *out;
    int64_t F; /* gated: the width of y */
};

static void activation_forward_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    FOR_ACT(t, c->t, FOR_ACTIVATION(act, c->activation, {
                VF_FOR(i, begin, end, {
                    vf unused;
                    vf y = act_value_slope(act, vf_load_as(c->x, t, i, lanes), &unused);
                    vf_store_as(c->out, t, i, y, lanes);
                });
            }););
}

static void activation_backward_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    FOR_ACT(t, c->t, FOR_ACTIVATION(act, c->activation, {
                VF_FOR(i, begin, end, {
                    vf slope;
                    act_value_slope(act, vf_load_as(c->x, t, i, lanes), &slope);
                    vf_store_as(c->out, t, i, slope * vf_load_as(c->dy, t, i, lanes), lanes);
                });
            }););
}

static tril_status activation_forward_kernel(struct op_context *ctx, const struct tensor *a,
                                             const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    struct call c = {
        .activation = p->activation, .t = a[0].dtype, .x = a[0].data, .out = a[1].data};
    int64_t n = tensor_count(&a[0]);
    parallel_for(n, chunk_elements(n, 2 * (int64_t)dtype_size(c.t)), activation_forward_chunk, &c);
    return TRIL_OK;
}

static tril_status activation_backward_kernel(struct op_context *ctx, const struct tensor *a,
                                              const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    struct call c = {.activation = p->activation,
                     .t = a[0].dtype,
                     .dy = a[0].data,
                     .x = a[1].data,
                     .out = a[2].data};
    int64_t n = tensor_count(&a[0]);
    parallel_for(n, chunk_elements(n, 3 * (int64_t)dtype_size(c.t)), activation_backward_chunk, &c);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ gated */

/* Elements begin .. end of y [N, F], cut at the ends of rows: in a row, y's from i are x's gates
 * from `gate` and ups from gate + F. */
#define FOR_GATED_ROWS(F, begin, end, ...)                                                         \
    for (int64_t i = (begin), stop; i < (end); i = stop) {                                         \
        int64_t n = i / (F), gate = i + n * (F);                                                   \
        stop = (n + 1) * (F) < (end) ? (n + 1) * (F) : (end);                                      \
        __VA_ARGS__                                                                                \
    }

static void gated_forward_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    FOR_ACT(t, c->t, FOR_ACTIVATION(act, c->activation, {FOR_GATED_ROWS(c->F, begin, end, {
                                        VF_FOR(k, 0, stop - i, {
                                            vf unused;
                                            vf g = act_value_slope(
                                                act, vf_load_as(c->x, t, gate + k, lanes), &unused);
                                            vf up = vf_load_as(c->x, t, gate + c->F + k, lanes);
                                            vf_store_as(c->out, t, i + k, g * up, lanes);
                                        });
                                    })}););
}

static void gated_backward_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    FOR_ACT(t, c->t,
            FOR_ACTIVATION(act, c->activation, {FOR_GATED_ROWS(c->F, begin, end, {
                               VF_FOR(k, 0, stop - i, {
                                   vf slope;
                                   vf g = act_value_slope(act, vf_load_as(c->x, t, gate + k, lanes),
                                                          &slope);
                                   vf up = vf_load_as(c->x, t, gate + c->F + k, lanes);
                                   vf dy = vf_load_as(c->dy, t, i + k, lanes);
                                   vf_store_as(c->out, t, gate + k, dy * up * slope, lanes);
                                   vf_store_as(c->out, t, gate + c->F + k, dy * g, lanes);
                               });
                           })}););
}

static tril_status gated_forward_kernel(struct op_context *ctx, const struct tensor *a,
                                        const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    struct call c = {.activation = p->activation,
                     .t = a[0].dtype,
                     .x = a[0].data,
                     .out = a[1].data,
                     .F = a[1].shape[1]};
    int64_t n = tensor_count(&a[1]);
    parallel_for(n, chunk_elements(n, 3 * (int64_t)dtype_size(c.t)), gated_forward_chunk, &c);
    return TRIL_OK;
}

static tril_status gated_backward_kernel(struct op_context *ctx, const struct tensor *a,
                                         const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    struct call c = {.activation = p->activation,
                     .t = a[0].dtype,
                     .dy = a[0].data,
                     .x = a[1].data,
                     .out = a[2].data,
                     .F = a[0].shape[1]};
    int64_t n = tensor_count(&a[0]);
    parallel_for(n, chunk_elements(n, 5 * (int64_t)dtype_size(c.t)), gated_backward_chunk, &c);
    return TRIL_OK;
}

void LEVEL(register_activation)(struct backend *b) {
    b->table[OP_ACTIVATION_FORWARD] = activation_forward_kernel;
    b->table[OP_ACTIVATION_BACKWARD] = activation_backward_kernel;
    b->table[OP_GATED_FORWARD] = gated_forward_kernel;
    b->table[OP_GATED_BACKWARD] = gated_backward_kernel;
}
