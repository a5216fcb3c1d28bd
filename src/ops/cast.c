/* Conversion between float dtypes, and scaled addition.
 *
 *   cast:       y = x, rounded to nearest even
 *   accumulate: y += alpha x */
#include "ops/reference.h"

static const struct op_arg cast_args[] = {
    {"x", "N", ARG_IN, .dtypes = DT_FLOAT},
    {"y", "N", ARG_OUT, .dtypes = DT_FLOAT},
};
static const struct op_arg accumulate_args[] = {
    {"x", "N", ARG_IN, .dtypes = DT_FLOAT},
    {"y", "N", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32)},
};

tril_status cast(struct op_context *ctx, struct tensor x, struct tensor y, struct tril_error *err) {
    struct tensor args[] = {x, y};
    return op_call(ctx, OP_CAST, args, NULL, err);
}

tril_status accumulate(struct op_context *ctx, struct tensor x, struct tensor y, float alpha,
                       struct tril_error *err) {
    struct tensor args[] = {x, y};
    struct accumulate_params p = {alpha};
    return op_call(ctx, OP_ACCUMULATE, args, &p, err);
}

static tril_status cast_reference(struct op_context *ctx, const struct tensor *a,
                                  const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    (void)err;
    for (int64_t i = 0; i < tensor_count(&a[0]); i++)
        ref_put(&a[1], i, ref_at(&a[0], i));
    return TRIL_OK;
}

static tril_status accumulate_reference(struct op_context *ctx, const struct tensor *a,
                                        const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct accumulate_params *p = params;
    for (int64_t i = 0; i < tensor_count(&a[0]); i++)
        ref_add(&a[1], i, p->alpha * ref_at(&a[0], i));
    return TRIL_OK;
}

static const enum dtype floats[] = {DT_F32, DT_BF16, DT_F16};

static void vector_case(int *index, struct op_case *c) {
    static const int64_t sizes[] = {1, 3, 0, 7, 17, 64, 65, 257, 70001};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    *c = (struct op_case){.act = DT_F32, .label = "vector"};
    c->size['N'] = sizes[case_pick(index, COUNT)];
    c->dtype[0] = case_dtype(floats[case_pick(index, 3)]);
}

static bool cast_case(int index, struct op_case *c) {
    vector_case(&index, c);
    c->dtype[1] = case_dtype(floats[case_pick(&index, 3)]);
    return index == 0;
}

static bool accumulate_case(int index, struct op_case *c) {
    vector_case(&index, c);
    struct accumulate_params p = {-0.375f};
    case_params(c, &p, sizeof p);
    return index == 0;
}

const struct op_info op_info_cast = {
    .id = OP_CAST,
    .name = "cast",
    .args = cast_args,
    .arg_count = 2,
    .reference = cast_reference,
    .test_case = cast_case,
};

const struct op_info op_info_accumulate = {
    .id = OP_ACCUMULATE,
    .name = "accumulate",
    .args = accumulate_args,
    .arg_count = 2,
    .reference = accumulate_reference,
    .test_case = accumulate_case,
};
