/* The optimiser's operations: the norm of the gradient, clipping, AdamW (Loshchilov, Hutter 2019).
 *
 *   sum_squares: total += sum x^2
 *   clip_factor: norm = sqrt(total) unscale;  scale = unscale min(1, limit / (norm + 1e-6))
 *   adamw:       g' = g scale;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2
 *                p -= lr (m c1 / (sqrt(v c2) + eps) + decay p)
 *
 * lr, c1, c2 and scale lie in `hyper`, so that a captured step can be replayed. */
#include <math.h>

#include "ops/reference.h"

_Static_assert(HYPER_COUNT == 8, "the shape of hyper below is written as 8");

/* ------------------------------------------------------------------ sum_squares */

static const struct op_arg sum_squares_args[] = {
    {"x", "N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"total", "1", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F64)},
};

tril_status sum_squares(struct op_context *ctx, struct tensor x, struct tensor total,
                        struct tril_error *err) {
    struct tensor args[] = {x, total};
    return op_call(ctx, OP_SUM_SQUARES, args, NULL, err);
}

static tril_status sum_squares_reference(struct op_context *ctx, const struct tensor *a,
                                         const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    (void)err;
    double sum = 0;
    for (int64_t i = 0; i < tensor_count(&a[0]); i++)
        sum += ref_at(&a[0], i) * ref_at(&a[0], i);
    ref_add(&a[1], 0, sum);
    return TRIL_OK;
}

static bool sum_squares_case(int index, struct op_case *c) {
    static const int64_t sizes[] = {1, 3, 0, 7, 17, 64, 65, 257, 70001};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    *c = (struct op_case){.act = DT_F32, .label = "vector"};
    c->size['N'] = sizes[case_pick(&index, COUNT)];
    return index == 0;
}

static double sum_squares_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)a[0].shape[0] + 1;
}

const struct op_info op_info_sum_squares = {
    .id = OP_SUM_SQUARES,
    .name = "sum_squares",
    .args = sum_squares_args,
    .arg_count = 2,
    .reference = sum_squares_reference,
    .test_case = sum_squares_case,
    .reduction = sum_squares_reduction,
};

/* ------------------------------------------------------------------ clip_factor */

static const struct op_arg clip_factor_args[] = {
    {"total", "1", ARG_IN, .dtypes = DT_MASK(DT_F64)},
    {"hyper", "8", ARG_INOUT, .dtypes = DT_MASK(DT_F32)},
};

tril_status clip_factor(struct op_context *ctx, struct tensor total, struct tensor hyper,
                        float limit, float unscale, struct tril_error *err) {
    struct tensor args[] = {total, hyper};
    struct clip_params p = {.limit = limit, .unscale = unscale};
    return op_call(ctx, OP_CLIP_FACTOR, args, &p, err);
}

static tril_status clip_factor_reference(struct op_context *ctx, const struct tensor *a,
                                         const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct clip_params *p = params;
    double norm = sqrt(ref_at(&a[0], 0)) * p->unscale;
    double scale = p->unscale;
    if (p->limit > 0 && p->limit < norm + 1e-6)
        scale *= p->limit / (norm + 1e-6);
    ref_put(&a[1], HYPER_GRAD_NORM, norm);
    ref_put(&a[1], HYPER_GRAD_SCALE, scale);
    ref_put(&a[1], HYPER_FOUND_INF, !isfinite(norm));
    return TRIL_OK;
}

static bool clip_factor_case(int index, struct op_case *c) {
    *c = (struct op_case){.act = DT_F32, .label = "no limit"};
    struct clip_params p = {.limit = 0, .unscale = 1};
    switch (case_pick(&index, 3)) {
    case 1:
        p.limit = 1;
        c->label = "clipped";
        break;
    case 2:
        p.limit = 1e6f;
        p.unscale = 0.25f;
        c->label = "unscaled, under the limit";
        break;
    default:
        break;
    }
    case_params(c, &p, sizeof p);
    return index == 0;
}

static void clip_factor_fill(const struct op_case *c, struct tensor *a,
                             const struct random_key *key) {
    (void)c;
    (void)key;
    ref_put(&a[0], 0, 37.5);
}

const struct op_info op_info_clip_factor = {
    .id = OP_CLIP_FACTOR,
    .name = "clip_factor",
    .args = clip_factor_args,
    .arg_count = 2,
    .reference = clip_factor_reference,
    .test_case = clip_factor_case,
    .test_fill = clip_factor_fill,
};

/* ------------------------------------------------------------------ adamw */

enum { A_P, A_G, A_M, A_V, A_COPY, A_HYPER, A_ARGS };

static const struct op_arg adamw_args[A_ARGS] = {
    {"p", "N", ARG_INOUT, .dtypes = DT_MASK(DT_F32)},
    {"g", "N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"m", "N", ARG_INOUT, .dtypes = DT_MASK(DT_F32)},
    {"v", "N", ARG_INOUT, .dtypes = DT_MASK(DT_F32)},
    {"copy", "N", ARG_OUT, .dtypes = DT_MASK(DT_BF16) | DT_MASK(DT_F16), .optional = true},
    {"hyper", "8", ARG_IN, .dtypes = DT_MASK(DT_F32)},
};

tril_status adamw(struct op_context *ctx, struct tensor p, struct tensor g, struct tensor m,
                  struct tensor v, struct tensor copy, struct tensor hyper,
                  struct adamw_params params, struct tril_error *err) {
    struct tensor args[A_ARGS] = {p, g, m, v, copy, hyper};
    return op_call(ctx, OP_ADAMW, args, &params, err);
}

static tril_status adamw_reference(struct op_context *ctx, const struct tensor *a,
                                   const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct adamw_params *o = params;
    const struct tensor *hyper = &a[A_HYPER];
    if (ref_at(hyper, HYPER_FOUND_INF) != 0)
        return TRIL_OK;
    double lr = ref_at(hyper, HYPER_LR), scale = ref_at(hyper, HYPER_GRAD_SCALE);
    double c1 = ref_at(hyper, HYPER_CORRECTION1), c2 = ref_at(hyper, HYPER_CORRECTION2);
    for (int64_t i = 0; i < tensor_count(&a[A_P]); i++) {
        double g = ref_at(&a[A_G], i) * scale, p = ref_at(&a[A_P], i);
        double m = o->beta1 * ref_at(&a[A_M], i) + (1 - (double)o->beta1) * g;
        double v = o->beta2 * ref_at(&a[A_V], i) + (1 - (double)o->beta2) * g * g;
        p -= lr * (m * c1 / (sqrt(v * c2) + o->eps) + o->decay * p);
        ref_put(&a[A_M], i, m);
        ref_put(&a[A_V], i, v);
        ref_put(&a[A_P], i, p);
        if (a[A_COPY].data) /* of p as it is stored */
            ref_put(&a[A_COPY], i, ref_at(&a[A_P], i));
    }
    return TRIL_OK;
}

static bool adamw_case(int index, struct op_case *c) {
    static const int64_t sizes[] = {1, 3, 0, 7, 17, 64, 65, 257, 70001};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    *c = (struct op_case){.act = DT_F32, .label = "no copy"};
    c->size['N'] = sizes[case_pick(&index, COUNT)];
    switch (case_pick(&index, 3)) {
    case 0:
        c->absent = 1u << A_COPY;
        break;
    case 1:
        c->dtype[A_COPY] = case_dtype(DT_BF16);
        c->label = "bf16 copy";
        break;
    default:
        c->dtype[A_COPY] = case_dtype(DT_F16);
        c->label = "fp16 copy";
        break;
    }
    struct adamw_params p = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f};
    if (case_pick(&index, 2))
        p.decay = 0;
    case_params(c, &p, sizeof p);
    return index == 0;
}

/* The third step of a clipped run. */
static void adamw_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)key;
    const struct adamw_params *p = (const struct adamw_params *)(const void *)c->params;
    for (int64_t i = 0; i < tensor_count(&a[A_V]); i++)
        ref_put(&a[A_V], i, 0.01 + ref_at(&a[A_V], i) * ref_at(&a[A_V], i));
    for (int i = 0; i < HYPER_COUNT; i++)
        ref_put(&a[A_HYPER], i, 0);
    ref_put(&a[A_HYPER], HYPER_LR, 3e-4);
    ref_put(&a[A_HYPER], HYPER_CORRECTION1, 1 / (1 - pow(p->beta1, 3)));
    ref_put(&a[A_HYPER], HYPER_CORRECTION2, 1 / (1 - pow(p->beta2, 3)));
    ref_put(&a[A_HYPER], HYPER_GRAD_SCALE, 0.625);
}

const struct op_info op_info_adamw = {
    .id = OP_ADAMW,
    .name = "adamw",
    .args = adamw_args,
    .arg_count = A_ARGS,
    .reference = adamw_reference,
    .test_case = adamw_case,
    .test_fill = adamw_fill,
};
