/* Element-wise activations and gated units (Shazeer 2020).
 *
 *   activation: y = act(x),                dx = dy act'(x)
 *   gated:      x = (gate | up) [N, 2F],   y = act(gate) up
 *               dgate = dy up act'(gate),  dup = dy act(gate)
 *
 * GELU (Hendrycks, Gimpel 2016) exact: x Phi(x); tanh form: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715
 * x^3))). SiLU: x / (1 + exp(-x)). */
#include <math.h>

#include "ops/reference.h"

static const double sqrt_2_over_pi = 0.79788456080286535588;
static const double sqrt_half = 0.70710678118654752440;
static const double sqrt_1_over_2pi = 0.39894228040143267794;

double ref_activation(enum activation a, double x) {
    switch (a) {
    case ACT_RELU:
        return x > 0 ? x : 0 * x; /* NaN stays NaN */
    case ACT_GELU_ERF:
        return 0.5 * x * erfc(-x * sqrt_half);
    case ACT_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt_2_over_pi * (x + 0.044715 * x * x * x)));
    case ACT_SILU:
        return x / (1 + exp(-x));
    case ACT_NONE:
        break;
    }
    return x;
}

double ref_activation_slope(enum activation a, double x) {
    switch (a) {
    case ACT_RELU:
        return x > 0 ? 1 : 0 * x;
    case ACT_GELU_ERF:
        return 0.5 * erfc(-x * sqrt_half) + x * sqrt_1_over_2pi * exp(-0.5 * x * x);
    case ACT_GELU_TANH: {
        double t = tanh(sqrt_2_over_pi * (x + 0.044715 * x * x * x));
        double inner = sqrt_2_over_pi * (1 + 3 * 0.044715 * x * x);
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner;
    }
    case ACT_SILU: {
        double s = 1 / (1 + exp(-x));
        return s * (1 + x * (1 - s));
    }
    case ACT_NONE:
        break;
    }
    return 1;
}

/* Roundings in a row: a polynomial, an exponential, a quotient. */
static double roundings(const struct tensor *a, const void *params) {
    (void)a;
    (void)params;
    return 4;
}

/* ------------------------------------------------------------------ activation */

static const struct op_arg activation_forward_args[] = {
    {"x", "N F", ARG_IN, .dtypes = DT_ACT, .act = true},
    {"y", "N F", ARG_OUT, .dtypes = DT_ACT, .act = true},
};
static const struct op_arg activation_backward_args[] = {
    {"dy", "N F", ARG_IN, .dtypes = DT_ACT, .act = true},
    {"x", "N F", ARG_IN, .dtypes = DT_ACT, .act = true},
    {"dx", "N F", ARG_OUT, .dtypes = DT_ACT, .act = true},
};

tril_status activation_forward(struct op_context *ctx, struct tensor x, struct tensor y,
                               enum activation a, struct tril_error *err) {
    struct tensor args[] = {x, y};
    struct activation_params p = {a};
    return op_call(ctx, OP_ACTIVATION_FORWARD, args, &p, err);
}

tril_status activation_backward(struct op_context *ctx, struct tensor dy, struct tensor x,
                                struct tensor dx, enum activation a, struct tril_error *err) {
    struct tensor args[] = {dy, x, dx};
    struct activation_params p = {a};
    return op_call(ctx, OP_ACTIVATION_BACKWARD, args, &p, err);
}

static tril_status activation_forward_reference(struct op_context *ctx, const struct tensor *a,
                                                const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    for (int64_t i = 0; i < tensor_count(&a[0]); i++)
        ref_put(&a[1], i, ref_activation(p->activation, ref_at(&a[0], i)));
    return TRIL_OK;
}

static tril_status activation_backward_reference(struct op_context *ctx, const struct tensor *a,
                                                 const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    for (int64_t i = 0; i < tensor_count(&a[1]); i++)
        ref_put(&a[2], i, ref_at(&a[0], i) * ref_activation_slope(p->activation, ref_at(&a[1], i)));
    return TRIL_OK;
}

/* Sizes, dtypes and the four activations. */
static void elementwise_case(int *index, struct op_case *c) {
    static const int64_t sizes[][2] = {{1, 1},  {3, 7},  {2, 64},  {5, 65},
                                       {0, 16}, {1, 17}, {3, 257}, {17, 1031}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    int s = case_pick(index, COUNT);
    *c = (struct op_case){.act = DT_F32, .label = "relu"};
    c->size['N'] = sizes[s][0];
    c->size['F'] = sizes[s][1];
    if (case_pick(index, 2))
        c->act = DT_BF16;
    static const enum activation kinds[] = {ACT_RELU, ACT_GELU_ERF, ACT_GELU_TANH, ACT_SILU};
    static const char *const labels[] = {"relu", "gelu", "gelu (tanh)", "silu"};
    int k = case_pick(index, 4);
    struct activation_params p = {kinds[k]};
    c->label = labels[k];
    case_params(c, &p, sizeof p);
}

static bool activation_forward_case(int index, struct op_case *c) {
    elementwise_case(&index, c);
    if (case_pick(&index, 2))
        c->alias[1] = 0 + 1;
    return index == 0;
}

static bool activation_backward_case(int index, struct op_case *c) {
    elementwise_case(&index, c);
    if (case_pick(&index, 2))
        c->alias[2] = 0 + 1;
    return index == 0;
}

const struct op_info op_info_activation_forward = {
    .id = OP_ACTIVATION_FORWARD,
    .name = "activation_forward",
    .args = activation_forward_args,
    .arg_count = 2,
    .reference = activation_forward_reference,
    .test_case = activation_forward_case,
    .reduction = roundings,
};

const struct op_info op_info_activation_backward = {
    .id = OP_ACTIVATION_BACKWARD,
    .name = "activation_backward",
    .args = activation_backward_args,
    .arg_count = 3,
    .reference = activation_backward_reference,
    .test_case = activation_backward_case,
    .reduction = roundings,
};

/* ------------------------------------------------------------------ gated */

static const struct op_arg gated_forward_args[] = {
    {"x", "N 2F", ARG_IN, .dtypes = DT_ACT, .act = true},
    {"y", "N F", ARG_OUT, .dtypes = DT_ACT, .act = true},
};
static const struct op_arg gated_backward_args[] = {
    {"dy", "N F", ARG_IN, .dtypes = DT_ACT, .act = true},
    {"x", "N 2F", ARG_IN, .dtypes = DT_ACT, .act = true},
    {"dx", "N 2F", ARG_OUT, .dtypes = DT_ACT, .act = true},
};

tril_status gated_forward(struct op_context *ctx, struct tensor x, struct tensor y,
                          enum activation a, struct tril_error *err) {
    struct tensor args[] = {x, y};
    struct activation_params p = {a};
    return op_call(ctx, OP_GATED_FORWARD, args, &p, err);
}

tril_status gated_backward(struct op_context *ctx, struct tensor dy, struct tensor x,
                           struct tensor dx, enum activation a, struct tril_error *err) {
    struct tensor args[] = {dy, x, dx};
    struct activation_params p = {a};
    return op_call(ctx, OP_GATED_BACKWARD, args, &p, err);
}

static tril_status gated_forward_reference(struct op_context *ctx, const struct tensor *a,
                                           const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    int64_t N = a[1].shape[0], F = a[1].shape[1];
    for (int64_t n = 0; n < N; n++)
        for (int64_t f = 0; f < F; f++) {
            double gate = ref_at(&a[0], n * 2 * F + f), up = ref_at(&a[0], n * 2 * F + F + f);
            ref_put(&a[1], n * F + f, ref_activation(p->activation, gate) * up);
        }
    return TRIL_OK;
}

static tril_status gated_backward_reference(struct op_context *ctx, const struct tensor *a,
                                            const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct activation_params *p = params;
    int64_t N = a[0].shape[0], F = a[0].shape[1];
    for (int64_t n = 0; n < N; n++)
        for (int64_t f = 0; f < F; f++) {
            int64_t at_gate = n * 2 * F + f, at_up = at_gate + F;
            double gate = ref_at(&a[1], at_gate), up = ref_at(&a[1], at_up);
            double dy = ref_at(&a[0], n * F + f);
            ref_put(&a[2], at_gate, dy * up * ref_activation_slope(p->activation, gate));
            ref_put(&a[2], at_up, dy * ref_activation(p->activation, gate));
        }
    return TRIL_OK;
}

static bool gated_forward_case(int index, struct op_case *c) {
    elementwise_case(&index, c);
    return index == 0;
}

/* dx may overwrite x: a pair is read before it is written. */
static bool gated_backward_case(int index, struct op_case *c) {
    elementwise_case(&index, c);
    if (case_pick(&index, 2))
        c->alias[2] = 1 + 1;
    return index == 0;
}

const struct op_info op_info_gated_forward = {
    .id = OP_GATED_FORWARD,
    .name = "gated_forward",
    .args = gated_forward_args,
    .arg_count = 2,
    .reference = gated_forward_reference,
    .test_case = gated_forward_case,
    .reduction = roundings,
};

const struct op_info op_info_gated_backward = {
    .id = OP_GATED_BACKWARD,
    .name = "gated_backward",
    .args = gated_backward_args,
    .arg_count = 3,
    .reference = gated_backward_reference,
    .test_case = gated_backward_case,
    .reduction = roundings,
};
