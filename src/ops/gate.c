/* A learned gate between two outputs of attention (Wu et al. 2022): description and scalar
 * reference. With g = sigmoid(gate): dgate = g (1 - g) sum dy (b - a). */
#include <math.h>

#include "ops/reference.h"

static const struct op_arg forward_args[] = {
    {"a", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"b", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"lse", "H N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"gate", "H", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"y", "N H d", ARG_OUT, DT_ACT, .strided = true},
};
enum { F_A, F_B, F_LSE, F_GATE, F_Y, F_ARGS };

static const struct op_arg backward_args[] = {
    {"dy", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"a", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"b", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"lse", "H N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"gate", "H", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"da", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"db", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"dgate", "H", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32)},
};
enum { B_DY, B_A, B_B, B_LSE, B_GATE, B_DA, B_DB, B_DGATE, B_ARGS };

static double sigmoid(double x) {
    return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x));
}

/* The share of b in row n of head h. */
static double share(const struct tensor *gate, const struct tensor *lse, int64_t n, int64_t h) {
    bool there = ref_at(lse, h * lse->shape[1] + n) != -INFINITY;
    return there ? sigmoid(ref_at(gate, h)) : 0;
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *args,
                                     const void *params, struct tril_error *err) {
    const struct tensor *a = &args[F_A], *b = &args[F_B], *y = &args[F_Y];
    (void)ctx;
    (void)params;
    (void)err;
    for (int64_t n = 0; n < a->shape[0]; n++)
        for (int64_t h = 0; h < a->shape[1]; h++) {
            double g = share(&args[F_GATE], &args[F_LSE], n, h);
            for (int64_t t = 0; t < a->shape[2]; t++)
                ref_put(y, ref_offset3(y, n, h, t),
                        (1 - g) * ref_at3(a, n, h, t) + (g > 0 ? g * ref_at3(b, n, h, t) : 0));
        }
    return TRIL_OK;
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *args,
                                      const void *params, struct tril_error *err) {
    const struct tensor *a = &args[B_A], *b = &args[B_B], *dy = &args[B_DY];
    const struct tensor *da = &args[B_DA], *db = &args[B_DB];
    (void)ctx;
    (void)params;
    (void)err;
    for (int64_t h = 0; h < a->shape[1]; h++) {
        double sum = 0;
        for (int64_t n = 0; n < a->shape[0]; n++) {
            double g = share(&args[B_GATE], &args[B_LSE], n, h);
            for (int64_t t = 0; t < a->shape[2]; t++) {
                double x = ref_at3(dy, n, h, t);
                if (g > 0)
                    sum += g * (1 - g) * x * (ref_at3(b, n, h, t) - ref_at3(a, n, h, t));
                ref_put(da, ref_offset3(da, n, h, t), (1 - g) * x);
                ref_put(db, ref_offset3(db, n, h, t), g * x);
            }
        }
        ref_add(&args[B_DGATE], h, sum);
    }
    return TRIL_OK;
}

/* ------------------------------------------------------------------ test and benchmark cases */

static bool make_case(int index, struct op_case *out, unsigned strided) {
    static const int n[] = {7, 1, 130, 40}, h[] = {2, 3, 4, 5}, d[] = {5, 1, 32, 19};
    int shape = index / 2;
    if (shape >= 4)
        return false;
    *out = (struct op_case){.label = shape % 2 ? "strided" : "dense",
                            .act = index % 2 ? DT_BF16 : DT_F32};
    out->size['N'] = n[shape];
    out->size['H'] = h[shape];
    out->size['d'] = d[shape];
    out->strided = shape % 2 ? strided : 0;
    return true;
}
static bool forward_case(int index, struct op_case *out) {
    if (!make_case(index, out, 1u << F_A | 1u << F_B | 1u << F_Y))
        return false;
    if (index >= 4) /* in place */
        out->alias[F_Y] = F_A + 1;
    return true;
}
static bool backward_case(int index, struct op_case *out) {
    return make_case(index, out, 1u << B_DY | 1u << B_A | 1u << B_B | 1u << B_DA | 1u << B_DB);
}

/* Every third row of b is not there. */
static void clear_rows(struct tensor *lse) {
    for (int64_t e = 0; e < tensor_count(lse); e += 3)
        ref_put(lse, e, -INFINITY);
}
static void forward_fill(const struct op_case *c, struct tensor *args,
                         const struct random_key *key) {
    (void)c;
    (void)key;
    clear_rows(&args[F_LSE]);
}
static void backward_fill(const struct op_case *c, struct tensor *args,
                          const struct random_key *key) {
    (void)c;
    (void)key;
    clear_rows(&args[B_LSE]);
}

static double reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)(args[0].shape[0] * args[0].shape[2]);
}

const struct op_info op_info_gate_forward = {
    .id = OP_GATE_FORWARD,
    .name = "gate_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .test_case = forward_case,
    .test_fill = forward_fill,
};

const struct op_info op_info_gate_backward = {
    .id = OP_GATE_BACKWARD,
    .name = "gate_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .test_case = backward_case,
    .test_fill = backward_fill,
    .reduction = reduction,
};

tril_status gate_forward(struct op_context *ctx, struct tensor a, struct tensor b,
                         struct tensor lse, struct tensor gate, struct tensor y,
                         struct tril_error *err) {
    struct tensor args[] = {a, b, lse, gate, y};
    return op_call(ctx, OP_GATE_FORWARD, args, NULL, err);
}

tril_status gate_backward(struct op_context *ctx, struct tensor dy, struct tensor a,
                          struct tensor b, struct tensor lse, struct tensor gate, struct tensor da,
                          struct tensor db, struct tensor dgate, struct tril_error *err) {
    struct tensor args[] = {dy, a, b, lse, gate, da, db, dgate};
    return op_call(ctx, OP_GATE_BACKWARD, args, NULL, err);
}
