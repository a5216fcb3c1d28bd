/* Dropout (Srivastava et al. 2014), fused with the residual addition.
 *
 *   forward:  y[n, i] = keep(n, i) x[n, i] / (1 - p) + residual[n, i]
 *   backward: dx[n, i] = keep(n, i) dy[n, i] / (1 - p)
 *
 * keep(n, i) = random_uniform(key, n * D + i) >= p: a pure function, so nothing is stored. */
#include "ops/reference.h"

/* ------------------------------------------------------------------ forward */

enum { F_X, F_RESIDUAL, F_STEP, F_Y, F_ARGS };

static const struct op_arg forward_args[F_ARGS] = {
    {"x", "N D", ARG_IN, .dtypes = DT_ACT},
    {"residual", "N D", ARG_IN, .dtypes = DT_MASK(DT_F32), .optional = true},
    {"step", "1", ARG_IN, .dtypes = DT_MASK(DT_I64), .optional = true},
    {"y", "N D", ARG_OUT, .dtypes = DT_ACT},
};

tril_status dropout_forward(struct op_context *ctx, struct tensor x, struct tensor residual,
                            struct tensor step, struct tensor y, struct dropout_params p,
                            struct tril_error *err) {
    struct tensor args[F_ARGS] = {x, residual, step, y};
    return op_call(ctx, OP_DROPOUT_FORWARD, args, &p, err);
}

static tril_status check(const struct tensor *a, const void *params, struct tril_error *err) {
    (void)a;
    const struct dropout_params *p = params;
    if (!(p->p >= 0 && p->p < 1))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "dropout: the probability is %g, but must be at least 0 and below 1",
                         (double)p->p);
    return TRIL_OK;
}

/* The factor of one element: 0, or 1 / (1 - p). */
static double factor(const struct dropout_params *p, const struct tensor *step, int64_t element) {
    struct random_key key = p->key;
    if (step->data)
        key.step = (uint64_t)ref_int(step, 0);
    return random_uniform(&key, (uint64_t)element) >= p->p ? 1 / (1 - (double)p->p) : 0;
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    for (int64_t i = 0; i < tensor_count(&a[F_X]); i++) {
        double v = ref_at(&a[F_X], i) * factor(params, &a[F_STEP], i);
        if (a[F_RESIDUAL].data)
            v += ref_at(&a[F_RESIDUAL], i);
        ref_put(&a[F_Y], i, v);
    }
    return TRIL_OK;
}

/* Sizes, dtypes (`wide`: the argument that may be fp32) and probabilities. */
static void dropout_case(int *index, struct op_case *c, int wide) {
    static const int64_t sizes[][2] = {{1, 1}, {3, 7},  {2, 64},  {5, 65},
                                       {0, 8}, {1, 17}, {3, 257}, {5, 768}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    int s = case_pick(index, COUNT);
    *c = (struct op_case){.act = DT_F32, .label = "p = 0.1"};
    c->size['N'] = sizes[s][0];
    c->size['D'] = sizes[s][1];
    switch (case_pick(index, 3)) {
    case 0:
        c->act = DT_BF16;
        break;
    case 1:
        c->act = DT_BF16;
        c->dtype[wide] = case_dtype(DT_F32);
        break;
    default:
        break;
    }
    struct dropout_params p = {.p = 0.1f,
                               .key = {.seed = 0x123456789abcdefu + (unsigned)s,
                                       .step = 77,
                                       .layer = 3,
                                       .op = RANDOM_DROPOUT_RESIDUAL_FFN}};
    switch (case_pick(index, 3)) {
    case 1:
        p.p = 0;
        c->label = "p = 0";
        break;
    case 2:
        p.p = 0.75f;
        c->label = "p = 0.75";
        break;
    default:
        break;
    }
    case_params(c, &p, sizeof p);
}

static bool forward_case(int index, struct op_case *c) {
    dropout_case(&index, c, F_Y);
    switch (case_pick(&index, 3)) {
    case 1:
        c->absent = 1u << F_RESIDUAL | 1u << F_STEP;
        break;
    case 2: /* onto the residual stream */
        c->absent = 1u << F_STEP;
        if (op_case_dtype(&op_info_dropout_forward, F_Y, c) == DT_F32)
            c->alias[F_Y] = F_RESIDUAL + 1;
        break;
    default:
        break;
    }
    return index == 0;
}

static void forward_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    if (a[F_STEP].data)
        *(int64_t *)a[F_STEP].data = 0x100000005;
}

const struct op_info op_info_dropout_forward = {
    .id = OP_DROPOUT_FORWARD,
    .name = "dropout_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .check = check,
    .test_case = forward_case,
    .test_fill = forward_fill,
};

/* ------------------------------------------------------------------ backward */

enum { B_DY, B_STEP, B_DX, B_ARGS };

static const struct op_arg backward_args[B_ARGS] = {
    {"dy", "N D", ARG_IN, .dtypes = DT_ACT},
    {"step", "1", ARG_IN, .dtypes = DT_MASK(DT_I64), .optional = true},
    {"dx", "N D", ARG_OUT, .dtypes = DT_ACT},
};

tril_status dropout_backward(struct op_context *ctx, struct tensor dy, struct tensor step,
                             struct tensor dx, struct dropout_params p, struct tril_error *err) {
    struct tensor args[B_ARGS] = {dy, step, dx};
    return op_call(ctx, OP_DROPOUT_BACKWARD, args, &p, err);
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *a,
                                      const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    for (int64_t i = 0; i < tensor_count(&a[B_DX]); i++)
        ref_put(&a[B_DX], i, ref_at(&a[B_DY], i) * factor(params, &a[B_STEP], i));
    return TRIL_OK;
}

static bool backward_case(int index, struct op_case *c) {
    dropout_case(&index, c, B_DY);
    if (case_pick(&index, 2))
        c->absent = 1u << B_STEP;
    return index == 0;
}

static void backward_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    if (a[B_STEP].data)
        *(int64_t *)a[B_STEP].data = 0x100000005;
}

const struct op_info op_info_dropout_backward = {
    .id = OP_DROPOUT_BACKWARD,
    .name = "dropout_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .check = check,
    .test_case = backward_case,
    .test_fill = backward_fill,
};
