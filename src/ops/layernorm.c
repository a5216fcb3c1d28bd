/* Layer normalisation (Ba, Kiros, Hinton 2016), over the last dimension, D wide.
 *
 *   forward:  mean = sum x / D,  var = sum (x - mean)^2 / D,  rstd = 1 / sqrt(var + eps)
 *             y = xhat * g + bias      with xhat = (x - mean) * rstd, g = gain + gain_offset
 *   backward: a = dy * g;  dx = rstd * (a - mean(a) - xhat * mean(a * xhat))
 *             dgain += sum over rows dy * xhat,  dbias += sum over rows dy */
#include <math.h>

#include "ops/norms.h"

/* ------------------------------------------------------------------ forward */

enum { F_X, F_GAIN, F_BIAS, F_Y, F_MEAN, F_RSTD, F_ARGS };

static const struct op_arg forward_args[F_ARGS] = {
    {"x", NORM_X, ARG_IN, .dtypes = DT_ACT, .strided = true},
    {"gain", "D", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"bias", "D", ARG_IN, .dtypes = DT_MASK(DT_F32), .optional = true},
    {"y", NORM_X, ARG_OUT, .dtypes = DT_ACT, .strided = true},
    {"mean", NORM_ROWS, ARG_OUT, .dtypes = DT_MASK(DT_F32), .optional = true},
    {"rstd", NORM_ROWS, ARG_OUT, .dtypes = DT_MASK(DT_F32), .optional = true},
};

tril_status layernorm_forward(struct op_context *ctx, struct tensor x, struct tensor gain,
                              struct tensor bias, struct tensor y, struct tensor mean,
                              struct tensor rstd, struct norm_params p, struct tril_error *err) {
    struct tensor args[F_ARGS] = {x, gain, bias, y, mean, rstd};
    return op_call(ctx, OP_LAYERNORM_FORWARD, args, &p, err);
}

static void statistics(const struct tensor *x, int64_t row, double eps, double *mean,
                       double *rstd) {
    int64_t D = ref_width(x);
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < D; i++)
        sum += ref_at(x, row + i);
    *mean = sum / (double)D;
    for (int64_t i = 0; i < D; i++) {
        double d = ref_at(x, row + i) - *mean;
        squares += d * d;
    }
    *rstd = 1 / sqrt(squares / (double)D + eps);
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct norm_params *p = params;
    int64_t rows = ref_row_count(&a[F_X]), D = ref_width(&a[F_X]);
    for (int64_t r = 0; r < rows; r++) {
        int64_t x = ref_row(&a[F_X], r), y = ref_row(&a[F_Y], r);
        double mean, rstd;
        statistics(&a[F_X], x, p->eps, &mean, &rstd);
        for (int64_t i = 0; i < D; i++) {
            double xhat = (ref_at(&a[F_X], x + i) - mean) * rstd;
            double v = xhat * (ref_at(&a[F_GAIN], i) + p->gain_offset);
            if (a[F_BIAS].data)
                v += ref_at(&a[F_BIAS], i);
            ref_put(&a[F_Y], y + i, v);
        }
        if (a[F_MEAN].data)
            ref_put(&a[F_MEAN], r, mean);
        if (a[F_RSTD].data)
            ref_put(&a[F_RSTD], r, rstd);
    }
    return TRIL_OK;
}

static bool forward_case(int index, struct op_case *c) {
    norm_case(&index, c, F_X, 1u << F_X | 1u << F_Y);
    switch (case_pick(&index, 4)) {
    case 1:
        c->absent = 1u << F_BIAS;
        break;
    case 2:
        c->absent = 1u << F_MEAN | 1u << F_RSTD;
        break;
    case 3: /* in place */
        if (op_case_dtype(&op_info_layernorm_forward, F_X, c) == c->act)
            c->alias[F_Y] = F_X + 1;
        c->label = "in place";
        break;
    default:
        break;
    }
    return index == 0;
}

static double forward_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)ref_width(&a[F_X]);
}

const struct op_info op_info_layernorm_forward = {
    .id = OP_LAYERNORM_FORWARD,
    .name = "layernorm_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .test_case = forward_case,
    .reduction = forward_reduction,
};

/* ------------------------------------------------------------------ backward */

enum { B_DY, B_X, B_GAIN, B_MEAN, B_RSTD, B_DX, B_DGAIN, B_DBIAS, B_ARGS };

static const struct op_arg backward_args[B_ARGS] = {
    {"dy", NORM_X, ARG_IN, .dtypes = DT_ACT, .strided = true},
    {"x", NORM_X, ARG_IN, .dtypes = DT_ACT, .strided = true},
    {"gain", "D", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"mean", NORM_ROWS, ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"rstd", NORM_ROWS, ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"dx", NORM_X, ARG_OUT, .dtypes = DT_ACT, .strided = true},
    {"dgain", "D", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32)},
    {"dbias", "D", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32), .optional = true},
};

tril_status layernorm_backward(struct op_context *ctx, struct tensor dy, struct tensor x,
                               struct tensor gain, struct tensor mean, struct tensor rstd,
                               struct tensor dx, struct tensor dgain, struct tensor dbias,
                               struct norm_params p, struct tril_error *err) {
    struct tensor args[B_ARGS] = {dy, x, gain, mean, rstd, dx, dgain, dbias};
    return op_call(ctx, OP_LAYERNORM_BACKWARD, args, &p, err);
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *a,
                                      const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct norm_params *p = params;
    bool add = norm_accumulates(&a[B_DX], p);
    int64_t rows = ref_row_count(&a[B_X]), D = ref_width(&a[B_X]);
    for (int64_t r = 0; r < rows; r++) {
        int64_t dy = ref_row(&a[B_DY], r), x = ref_row(&a[B_X], r), dx = ref_row(&a[B_DX], r);
        double mean = ref_at(&a[B_MEAN], r), rstd = ref_at(&a[B_RSTD], r);
        double sum = 0, dot = 0;
        for (int64_t i = 0; i < D; i++) {
            double g = ref_at(&a[B_GAIN], i) + p->gain_offset;
            double xhat = (ref_at(&a[B_X], x + i) - mean) * rstd;
            sum += ref_at(&a[B_DY], dy + i) * g;
            dot += ref_at(&a[B_DY], dy + i) * g * xhat;
        }
        for (int64_t i = 0; i < D; i++) {
            double g = ref_at(&a[B_GAIN], i) + p->gain_offset;
            double xhat = (ref_at(&a[B_X], x + i) - mean) * rstd;
            double d = ref_at(&a[B_DY], dy + i);
            double v = rstd * (d * g - sum / (double)D - xhat * dot / (double)D);
            ref_put(&a[B_DX], dx + i, v + (add ? ref_at(&a[B_DX], dx + i) : 0));
            ref_add(&a[B_DGAIN], i, d * xhat);
            if (a[B_DBIAS].data)
                ref_add(&a[B_DBIAS], i, d);
        }
    }
    return TRIL_OK;
}

static enum op_role backward_role(int i, const struct tensor *a, const void *params) {
    if (i == B_DX && norm_accumulates(&a[B_DX], params))
        return ARG_ACCUMULATE;
    return backward_args[i].role;
}

static bool backward_case(int index, struct op_case *c) {
    norm_case(&index, c, B_X, 1u << B_DY | 1u << B_X | 1u << B_DX);
    c->dtype[B_DX] = c->dtype[B_X];
    switch (case_pick(&index, 3)) {
    case 1:
        c->absent = 1u << B_DBIAS;
        break;
    case 2: { /* dx overwrites, in place of dy where it can */
        struct norm_params *p = (struct norm_params *)(void *)c->params;
        p->overwrite = true;
        if (op_case_dtype(&op_info_layernorm_backward, B_DX, c) == c->act)
            c->alias[B_DX] = B_DY + 1;
        c->label = "in place";
        break;
    }
    default:
        break;
    }
    return index == 0;
}

/* The statistics must be those of x. */
static void backward_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)key;
    const struct norm_params *p = (const struct norm_params *)(const void *)c->params;
    for (int64_t r = 0; r < ref_row_count(&a[B_X]); r++) {
        double mean, rstd;
        statistics(&a[B_X], ref_row(&a[B_X], r), p->eps, &mean, &rstd);
        ref_put(&a[B_MEAN], r, mean);
        ref_put(&a[B_RSTD], r, rstd);
    }
}

static double backward_reduction(const struct tensor *a, const void *params) {
    (void)params;
    double rows = (double)ref_row_count(&a[B_X]), D = (double)ref_width(&a[B_X]);
    return rows > D ? rows : D;
}

const struct op_info op_info_layernorm_backward = {
    .id = OP_LAYERNORM_BACKWARD,
    .name = "layernorm_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .role = backward_role,
    .test_case = backward_case,
    .test_fill = backward_fill,
    .reduction = backward_reduction,
};
