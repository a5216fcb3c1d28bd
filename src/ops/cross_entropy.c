/* Cross-entropy of logits against target tokens, in phases, so that a vocabulary cut into shards
 * can reduce in between. A negative target is ignored.
 *
 *   forward:  maximum[n] = max l[n],  sum[n] = sum exp(l[n] - maximum[n]),  target[n] = l[n, t[n]]
 *   loss:     row_loss[n] = log(sum[n]) + maximum[n] - target[n];  total += (sum of them, their
 * count) backward: dl[n, v] = scale (exp(l[n, v] - maximum[n]) / sum[n] - [v = t[n]]) */
#include <math.h>

#include "ops/reference.h"

/* A target: negative (ignored) or below V. */
static tril_status target_of(const char *op, const struct tensor *targets, int64_t n, int64_t V,
                             int64_t *out, struct tril_error *err) {
    *out = ref_int(targets, n);
    return *out < 0 ? TRIL_OK : ref_index(op, "targets", targets, n, V, out, err);
}

static double row_maximum(const struct tensor *logits, int64_t row, int64_t V) {
    double m = -INFINITY;
    for (int64_t v = 0; v < V; v++) {
        double l = ref_at(logits, row + v);
        if (l > m || isnan(l))
            m = l;
        if (isnan(m))
            break;
    }
    return m;
}

static double row_sum(const struct tensor *logits, int64_t row, int64_t V, double maximum) {
    double sum = 0;
    for (int64_t v = 0; v < V; v++)
        sum += exp(ref_at(logits, row + v) - maximum);
    return sum;
}

static void case_sizes(int *index, struct op_case *c) {
    static const int64_t sizes[][2] = {/* N, V */
                                       {1, 1},  {3, 7},   {2, 64},  {5, 65},
                                       {0, 16}, {1, 257}, {17, 33}, {9, 5003}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    int s = case_pick(index, COUNT);
    *c = (struct op_case){.act = DT_F32, .label = "rows"};
    c->size['N'] = sizes[s][0];
    c->size['V'] = sizes[s][1];
}

/* Every third row is ignored. */
static void ignore_some(struct tensor *targets) {
    for (int64_t n = 1; n < targets->shape[0]; n += 3)
        ((int32_t *)targets->data)[n] = -1;
}

/* ------------------------------------------------------------------ forward */

enum { F_LOGITS, F_TARGETS, F_MAXIMUM, F_SUM, F_TARGET, F_ARGS };

static const struct op_arg forward_args[F_ARGS] = {
    {"logits", "N V", ARG_IN, .dtypes = DT_ACT},
    {"targets", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "V"},
    {"maximum", "N", ARG_OUT, .dtypes = DT_MASK(DT_F32)},
    {"sum", "N", ARG_OUT, .dtypes = DT_MASK(DT_F32)},
    {"target", "N", ARG_OUT, .dtypes = DT_MASK(DT_F32)},
};

tril_status cross_entropy_forward(struct op_context *ctx, struct tensor logits,
                                  struct tensor targets, struct tensor maximum, struct tensor sum,
                                  struct tensor target, struct tril_error *err) {
    struct tensor args[F_ARGS] = {logits, targets, maximum, sum, target};
    return op_call(ctx, OP_CROSS_ENTROPY_FORWARD, args, NULL, err);
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    tril_status st = TRIL_OK;
    int64_t N = a[F_LOGITS].shape[0], V = a[F_LOGITS].shape[1];
    for (int64_t n = 0; n < N; n++) {
        int64_t t;
        TRY(target_of("cross_entropy_forward", &a[F_TARGETS], n, V, &t, err));
        double maximum = row_maximum(&a[F_LOGITS], n * V, V);
        ref_put(&a[F_MAXIMUM], n, maximum);
        ref_put(&a[F_SUM], n, row_sum(&a[F_LOGITS], n * V, V, maximum));
        ref_put(&a[F_TARGET], n, t < 0 ? 0 : ref_at(&a[F_LOGITS], n * V + t));
    }
done:
    return st;
}

static bool forward_case(int index, struct op_case *c) {
    case_sizes(&index, c);
    if (case_pick(&index, 2))
        c->act = DT_BF16;
    return index == 0;
}

static void forward_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    ignore_some(&a[F_TARGETS]);
    for (int64_t i = 0; i < tensor_count(&a[F_LOGITS]); i++) /* sharper than a unit normal */
        ref_put(&a[F_LOGITS], i, 4 * ref_at(&a[F_LOGITS], i));
}

static double forward_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)a[F_LOGITS].shape[1];
}

const struct op_info op_info_cross_entropy_forward = {
    .id = OP_CROSS_ENTROPY_FORWARD,
    .name = "cross_entropy_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .test_case = forward_case,
    .test_fill = forward_fill,
    .reduction = forward_reduction,
};

/* ------------------------------------------------------------------ loss */

enum { L_TARGETS, L_MAXIMUM, L_SUM, L_TARGET, L_ROW_LOSS, L_TOTAL, L_ARGS };

static const struct op_arg loss_args[L_ARGS] = {
    {"targets", "N", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"maximum", "N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"sum", "N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"target", "N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"row_loss", "N", ARG_OUT, .dtypes = DT_MASK(DT_F32)},
    {"total", "2", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F64)},
};

tril_status cross_entropy_loss(struct op_context *ctx, struct tensor targets, struct tensor maximum,
                               struct tensor sum, struct tensor target, struct tensor row_loss,
                               struct tensor total, struct tril_error *err) {
    struct tensor args[L_ARGS] = {targets, maximum, sum, target, row_loss, total};
    return op_call(ctx, OP_CROSS_ENTROPY_LOSS, args, NULL, err);
}

static tril_status loss_reference(struct op_context *ctx, const struct tensor *a,
                                  const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    (void)err;
    for (int64_t n = 0; n < a[L_ROW_LOSS].shape[0]; n++) {
        bool counted = ref_int(&a[L_TARGETS], n) >= 0;
        double loss =
            counted ? log(ref_at(&a[L_SUM], n)) + ref_at(&a[L_MAXIMUM], n) - ref_at(&a[L_TARGET], n)
                    : 0;
        ref_put(&a[L_ROW_LOSS], n, loss);
        ref_add(&a[L_TOTAL], 0, loss);
        ref_add(&a[L_TOTAL], 1, counted);
    }
    return TRIL_OK;
}

static bool loss_case(int index, struct op_case *c) {
    static const int64_t sizes[] = {1, 3, 0, 17, 64, 257, 4099};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    *c = (struct op_case){.act = DT_F32, .label = "rows"};
    c->size['N'] = sizes[case_pick(&index, COUNT)];
    return index == 0;
}

/* Statistics that a forward pass could have left. */
static void loss_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    ignore_some(&a[L_TARGETS]);
    for (int64_t n = 0; n < a[L_SUM].shape[0]; n++) {
        double maximum = ref_at(&a[L_MAXIMUM], n);
        ref_put(&a[L_SUM], n, 1 + fabs(100 * ref_at(&a[L_SUM], n)));
        ref_put(&a[L_TARGET], n, maximum - fabs(ref_at(&a[L_TARGET], n)));
    }
}

static double loss_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)a[L_ROW_LOSS].shape[0] + 1;
}

const struct op_info op_info_cross_entropy_loss = {
    .id = OP_CROSS_ENTROPY_LOSS,
    .name = "cross_entropy_loss",
    .args = loss_args,
    .arg_count = L_ARGS,
    .reference = loss_reference,
    .test_case = loss_case,
    .test_fill = loss_fill,
    .reduction = loss_reduction,
};

/* ------------------------------------------------------------------ backward */

enum { B_LOGITS, B_TARGETS, B_MAXIMUM, B_SUM, B_DLOGITS, B_ARGS };

static const struct op_arg backward_args[B_ARGS] = {
    {"logits", "N V", ARG_IN, .dtypes = DT_ACT},
    {"targets", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "V"},
    {"maximum", "N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"sum", "N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"dlogits", "N V", ARG_OUT, .dtypes = DT_ACT},
};

tril_status cross_entropy_backward(struct op_context *ctx, struct tensor logits,
                                   struct tensor targets, struct tensor maximum, struct tensor sum,
                                   struct tensor dlogits, float scale, struct tril_error *err) {
    struct tensor args[B_ARGS] = {logits, targets, maximum, sum, dlogits};
    struct cross_entropy_params p = {scale};
    return op_call(ctx, OP_CROSS_ENTROPY_BACKWARD, args, &p, err);
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *a,
                                      const void *params, struct tril_error *err) {
    (void)ctx;
    tril_status st = TRIL_OK;
    const struct cross_entropy_params *p = params;
    int64_t N = a[B_LOGITS].shape[0], V = a[B_LOGITS].shape[1];
    for (int64_t n = 0; n < N; n++) {
        int64_t t;
        TRY(target_of("cross_entropy_backward", &a[B_TARGETS], n, V, &t, err));
        double maximum = ref_at(&a[B_MAXIMUM], n), sum = ref_at(&a[B_SUM], n);
        for (int64_t v = 0; v < V; v++) {
            double probability = exp(ref_at(&a[B_LOGITS], n * V + v) - maximum) / sum;
            ref_put(&a[B_DLOGITS], n * V + v, t < 0 ? 0 : p->scale * (probability - (v == t)));
        }
    }
done:
    return st;
}

static bool backward_case(int index, struct op_case *c) {
    case_sizes(&index, c);
    switch (case_pick(&index, 3)) {
    case 0:
        c->act = DT_BF16;
        break;
    case 1:
        c->act = DT_BF16;
        c->dtype[B_LOGITS] = case_dtype(DT_F32);
        break;
    default:
        break;
    }
    if (case_pick(&index, 2) &&
        op_case_dtype(&op_info_cross_entropy_backward, B_LOGITS, c) == c->act)
        c->alias[B_DLOGITS] = B_LOGITS + 1;
    struct cross_entropy_params p = {0.125f};
    case_params(c, &p, sizeof p);
    return index == 0;
}

static void backward_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    ignore_some(&a[B_TARGETS]);
    int64_t V = a[B_LOGITS].shape[1];
    for (int64_t n = 0; n < a[B_LOGITS].shape[0]; n++) {
        double maximum = row_maximum(&a[B_LOGITS], n * V, V);
        ref_put(&a[B_MAXIMUM], n, maximum);
        ref_put(&a[B_SUM], n, row_sum(&a[B_LOGITS], n * V, V, maximum));
    }
}

const struct op_info op_info_cross_entropy_backward = {
    .id = OP_CROSS_ENTROPY_BACKWARD,
    .name = "cross_entropy_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .test_case = backward_case,
    .test_fill = backward_fill,
};
