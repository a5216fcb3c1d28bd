/* Linear layers. x [N, I], w [O, I], y [N, O].
 *
 *   forward:          pre = x w^T + bias,  y = act(pre) + residual
 *   backward, input:  dx = dy w
 *   backward, weight: dw += dy^T x,  dbias += column sums of dy */
#include "ops/reference.h"

static double product_flops(double N, double I, double O) {
    return 2 * N * I * O;
}

/* Sizes and dtypes of all three; `wide`: an output that may be fp32 whatever act is. */
static void linear_case(int *index, struct op_case *c, int wide) {
    static const int64_t sizes[][3] = {/* N, I, O */
                                       {1, 1, 1},     {3, 7, 5},     {1, 64, 64},   {17, 65, 33},
                                       {65, 17, 3},   {2, 257, 64},  {0, 8, 4},     {64, 64, 257},
                                       {33, 96, 130}, {1, 768, 515}, {130, 320, 96}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    *c = (struct op_case){.act = DT_F32, .label = "plain"};
    int s = case_pick(index, COUNT);
    c->size['N'] = sizes[s][0];
    c->size['I'] = sizes[s][1];
    c->size['O'] = sizes[s][2];
    switch (case_pick(index, 3)) {
    case 0:
        c->act = DT_BF16;
        break;
    case 1:
        c->act = DT_BF16;
        if (wide >= 0)
            c->dtype[wide] = case_dtype(DT_F32);
        break;
    default:
        break;
    }
}

/* ------------------------------------------------------------------ forward */

enum { F_X, F_W, F_BIAS, F_RESIDUAL, F_Y, F_PRE, F_ARGS };

/* w may be absent: a static weight's packings can replace its values. */
static const struct op_arg forward_args[F_ARGS] = {
    {"x", "N I", ARG_IN, .dtypes = DT_ACT, .strided = true, .act = true},
    {"w", "O I", ARG_IN, .dtypes = DT_FLOAT, .optional = true},
    {"bias", "O", ARG_IN, .dtypes = DT_MASK(DT_F32), .optional = true},
    {"residual", "N O", ARG_IN, .dtypes = DT_MASK(DT_F32), .optional = true},
    {"y", "N O", ARG_OUT, .dtypes = DT_ACT, .strided = true},
    {"pre", "N O", ARG_OUT, .dtypes = DT_ACT, .optional = true, .act = true},
};

tril_status linear_forward(struct op_context *ctx, struct tensor x, const struct weight *w,
                           struct tensor bias, struct tensor residual, struct tensor y,
                           struct tensor pre, enum activation activation, struct tril_error *err) {
    struct tensor args[F_ARGS] = {x, w->value, bias, residual, y, pre};
    struct linear_params p = {.activation = activation, .weight = w};
    return op_call(ctx, OP_LINEAR_FORWARD, args, &p, err);
}

static tril_status check_weight(const char *op, const struct tensor *w,
                                const struct linear_params *p, const struct tensor *x, int64_t O,
                                struct tril_error *err) {
    if (w->rank != 2 || w->shape[1] != x->shape[1] || w->shape[0] != O)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the weight does not have the shape [%lld, %lld] that its other "
                         "arguments ask for",
                         op, (long long)O, (long long)x->shape[1]);
    bool packed = p && p->weight && p->weight->state;
    if (!w->data && !packed && O > 0 && x->shape[1] > 0)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument w is missing (its data is NULL) and was not prepared", op);
    return TRIL_OK;
}

static tril_status forward_check(const struct tensor *a, const void *params,
                                 struct tril_error *err) {
    return check_weight("linear_forward", &a[F_W], params, &a[F_X], a[F_Y].shape[1], err);
}

static tril_status no_values(const char *op, struct tril_error *err) {
    return error_set(err, TRIL_ERR_UNSUPPORTED,
                     "%s: the values of this static weight were released after packing, so its "
                     "reference cannot run: prepare the weight without WEIGHT_STATIC",
                     op);
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    const struct linear_params *p = params;
    int64_t N = a[F_X].shape[0], I = a[F_X].shape[1], O = a[F_Y].shape[1];
    if (!a[F_W].data && O * I > 0)
        return no_values("linear_forward", err);
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < O; o++) {
            double sum = 0;
            for (int64_t i = 0; i < I; i++)
                sum += ref_at2(&a[F_X], n, i) * ref_at(&a[F_W], o * I + i);
            if (a[F_BIAS].data)
                sum += ref_at(&a[F_BIAS], o);
            if (a[F_PRE].data)
                ref_put(&a[F_PRE], n * O + o, sum);
            double y = ref_activation(p->activation, sum);
            if (a[F_RESIDUAL].data)
                y += ref_at(&a[F_RESIDUAL], n * O + o);
            ref_put(&a[F_Y], ref_offset2(&a[F_Y], n, o), y);
        }
    return TRIL_OK;
}

static bool forward_case(int index, struct op_case *c) {
    linear_case(&index, c, F_Y);
    int s = index;
    struct linear_params p = {.activation = ACT_NONE};
    switch (case_pick(&index, 6)) {
    case 0:
        c->absent = 1u << F_BIAS | 1u << F_RESIDUAL | 1u << F_PRE;
        break;
    case 1:
        c->absent = 1u << F_RESIDUAL | 1u << F_PRE;
        c->strided = 1u << F_X | 1u << F_Y;
        c->label = "bias, strided";
        break;
    case 2:
        c->absent = 1u << F_PRE;
        c->label = "bias, residual";
        break;
    case 3:
        c->absent = 1u << F_RESIDUAL;
        p.activation = ACT_GELU_TANH;
        c->label = "bias, gelu, pre kept";
        break;
    case 4: /* the residual stream, in place */
        c->absent = 1u << F_BIAS | 1u << F_PRE;
        if (op_case_dtype(&op_info_linear_forward, F_Y, c) == DT_F32)
            c->alias[F_Y] = F_RESIDUAL + 1;
        c->label = "residual in place";
        break;
    default: {
        static const enum activation kinds[] = {ACT_RELU, ACT_GELU_ERF, ACT_SILU};
        c->absent = 1u << F_RESIDUAL | 1u << F_PRE;
        p.activation = kinds[(unsigned)(s + c->size['O']) % 3];
        c->label = "bias, activation";
        break;
    }
    }
    case_params(c, &p, sizeof p);
    return index == 0;
}

static double forward_flops(const struct tensor *a, const void *params) {
    (void)params;
    return product_flops((double)a[F_X].shape[0], (double)a[F_X].shape[1], (double)a[F_Y].shape[1]);
}

static double forward_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)a[F_X].shape[1] + 2;
}

const struct op_info op_info_linear_forward = {
    .id = OP_LINEAR_FORWARD,
    .name = "linear_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .check = forward_check,
    .test_case = forward_case,
    .flops = forward_flops,
    .reduction = forward_reduction,
};

/* ------------------------------------------------------------------ backward, input */

enum { I_DY, I_W, I_DX, I_ARGS };

static const struct op_arg input_args[I_ARGS] = {
    {"dy", "N O", ARG_IN, .dtypes = DT_ACT},
    {"w", "O I", ARG_IN, .dtypes = DT_FLOAT, .optional = true},
    {"dx", "N I", ARG_OUT, .dtypes = DT_ACT},
};

tril_status linear_backward_input(struct op_context *ctx, struct tensor dy, const struct weight *w,
                                  struct tensor dx, struct tril_error *err) {
    struct tensor args[I_ARGS] = {dy, w->value, dx};
    struct linear_params p = {.activation = ACT_NONE, .weight = w};
    return op_call(ctx, OP_LINEAR_BACKWARD_INPUT, args, &p, err);
}

static tril_status input_check(const struct tensor *a, const void *params, struct tril_error *err) {
    return check_weight("linear_backward_input", &a[I_W], params, &a[I_DX], a[I_DY].shape[1], err);
}

static tril_status input_reference(struct op_context *ctx, const struct tensor *a,
                                   const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    int64_t N = a[I_DX].shape[0], I = a[I_DX].shape[1], O = a[I_DY].shape[1];
    if (!a[I_W].data && O * I > 0)
        return no_values("linear_backward_input", err);
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < I; i++) {
            double sum = 0;
            for (int64_t o = 0; o < O; o++)
                sum += ref_at(&a[I_DY], n * O + o) * ref_at(&a[I_W], o * I + i);
            ref_put(&a[I_DX], n * I + i, sum);
        }
    return TRIL_OK;
}

static bool input_case(int index, struct op_case *c) {
    linear_case(&index, c, I_DX);
    struct linear_params p = {.activation = ACT_NONE};
    case_params(c, &p, sizeof p);
    return index == 0;
}

static double input_flops(const struct tensor *a, const void *params) {
    (void)params;
    return product_flops((double)a[I_DX].shape[0], (double)a[I_DX].shape[1],
                         (double)a[I_DY].shape[1]);
}

static double input_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)a[I_DY].shape[1];
}

const struct op_info op_info_linear_backward_input = {
    .id = OP_LINEAR_BACKWARD_INPUT,
    .name = "linear_backward_input",
    .args = input_args,
    .arg_count = I_ARGS,
    .reference = input_reference,
    .check = input_check,
    .test_case = input_case,
    .flops = input_flops,
    .reduction = input_reduction,
};

/* ------------------------------------------------------------------ backward, weight */

enum { W_DY, W_X, W_DW, W_DBIAS, W_ARGS };

static const struct op_arg weight_args[W_ARGS] = {
    {"dy", "N O", ARG_IN, .dtypes = DT_ACT, .strided = true, .act = true},
    {"x", "N I", ARG_IN, .dtypes = DT_ACT, .strided = true, .act = true},
    {"dw", "O I", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32)},
    {"dbias", "O", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32), .optional = true},
};

tril_status linear_backward_weight(struct op_context *ctx, struct tensor dy, struct tensor x,
                                   struct tensor dw, struct tensor db, bool overwrite,
                                   struct tril_error *err) {
    struct tensor args[W_ARGS] = {dy, x, dw, db};
    struct linear_params p = {.overwrite = overwrite};
    return op_call(ctx, OP_LINEAR_BACKWARD_WEIGHT, args, &p, err);
}

static bool overwrites(const void *params) {
    return ((const struct linear_params *)params)->overwrite;
}

static enum op_role weight_role(int i, const struct tensor *a, const void *params) {
    (void)a;
    return i == W_DW && overwrites(params) ? ARG_OUT : weight_args[i].role;
}

static tril_status weight_reference(struct op_context *ctx, const struct tensor *a,
                                    const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    int64_t N = a[W_DY].shape[0], I = a[W_X].shape[1], O = a[W_DY].shape[1];
    for (int64_t o = 0; o < O; o++) {
        double total = 0;
        for (int64_t n = 0; n < N; n++)
            total += ref_at2(&a[W_DY], n, o);
        if (a[W_DBIAS].data)
            ref_add(&a[W_DBIAS], o, total);
        for (int64_t i = 0; i < I; i++) {
            double sum = 0;
            for (int64_t n = 0; n < N; n++)
                sum += ref_at2(&a[W_DY], n, o) * ref_at2(&a[W_X], n, i);
            if (overwrites(params))
                ref_put(&a[W_DW], o * I + i, sum);
            else
                ref_add(&a[W_DW], o * I + i, sum);
        }
    }
    return TRIL_OK;
}

static bool weight_case(int index, struct op_case *c) {
    linear_case(&index, c, -1);
    switch (case_pick(&index, 4)) {
    case 1:
        c->absent = 1u << W_DBIAS;
        c->label = "no bias";
        break;
    case 2:
        c->strided = 1u << W_DY | 1u << W_X;
        c->label = "strided";
        break;
    case 3:
        ((struct linear_params *)(void *)c->params)->overwrite = true;
        c->label = "overwriting";
        break;
    default:
        break;
    }
    return index == 0;
}

static double weight_flops(const struct tensor *a, const void *params) {
    (void)params;
    return product_flops((double)a[W_DY].shape[0], (double)a[W_X].shape[1],
                         (double)a[W_DY].shape[1]);
}

static double weight_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)a[W_DY].shape[0] + 1;
}

const struct op_info op_info_linear_backward_weight = {
    .id = OP_LINEAR_BACKWARD_WEIGHT,
    .name = "linear_backward_weight",
    .args = weight_args,
    .arg_count = W_ARGS,
    .reference = weight_reference,
    .role = weight_role,
    .test_case = weight_case,
    .flops = weight_flops,
    .reduction = weight_reduction,
};
