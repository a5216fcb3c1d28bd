/* Rotary position embedding in place (Su et al. 2021). Pair i of a head, at angle
 * t = positions[n] * frequency i whose cos and sin lie in tables [C, R]:
 *
 *   forward:  (x1, x2) <- (x1 cos t - x2 sin t, x2 cos t + x1 sin t)
 *   backward: the transposed rotation, that is by -t
 *
 * Pairs are (i, i + R), or (2i, 2i + 1) when interleaved; channels from 2R on stay. */
#include <math.h>

#include "ops/reference.h"

enum { A_X, A_POSITIONS, A_COS, A_SIN, A_ARGS };

static const struct op_arg forward_args[A_ARGS] = {
    {"x", "N H d", ARG_INOUT, .dtypes = DT_ACT, .strided = true},
    {"positions", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "C"},
    {"cos", "C R", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"sin", "C R", ARG_IN, .dtypes = DT_MASK(DT_F32)},
};
static const struct op_arg backward_args[A_ARGS] = {
    {"dx", "N H d", ARG_INOUT, .dtypes = DT_ACT, .strided = true},
    {"positions", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "C"},
    {"cos", "C R", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"sin", "C R", ARG_IN, .dtypes = DT_MASK(DT_F32)},
};

tril_status rope_forward(struct op_context *ctx, struct tensor x, struct tensor positions,
                         struct tensor cos, struct tensor sin, struct rope_params p,
                         struct tril_error *err) {
    struct tensor args[A_ARGS] = {x, positions, cos, sin};
    return op_call(ctx, OP_ROPE_FORWARD, args, &p, err);
}

tril_status rope_backward(struct op_context *ctx, struct tensor dx, struct tensor positions,
                          struct tensor cos, struct tensor sin, struct rope_params p,
                          struct tril_error *err) {
    struct tensor args[A_ARGS] = {dx, positions, cos, sin};
    return op_call(ctx, OP_ROPE_BACKWARD, args, &p, err);
}

static tril_status check(const struct tensor *a, const void *params, struct tril_error *err) {
    (void)params;
    if (2 * a[A_COS].shape[1] > a[A_X].shape[2])
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "rope: %lld pairs do not fit into a head of %lld channels: make the "
                         "tables at most %lld wide",
                         (long long)a[A_COS].shape[1], (long long)a[A_X].shape[2],
                         (long long)(a[A_X].shape[2] / 2));
    return TRIL_OK;
}

static tril_status rotate(const char *op, const struct tensor *a, const struct rope_params *p,
                          double direction, struct tril_error *err) {
    const struct tensor *x = &a[A_X];
    tril_status st = TRIL_OK;
    int64_t C = a[A_COS].shape[0], R = a[A_COS].shape[1];
    for (int64_t n = 0; n < x->shape[0]; n++) {
        int64_t position;
        TRY(ref_index(op, "positions", &a[A_POSITIONS], n, C, &position, err));
        for (int64_t h = 0; h < x->shape[1]; h++)
            for (int64_t i = 0; i < R; i++) {
                int64_t at1 = ref_offset3(x, n, h, p->interleaved ? 2 * i : i);
                int64_t at2 = ref_offset3(x, n, h, p->interleaved ? 2 * i + 1 : i + R);
                double c = ref_at(&a[A_COS], position * R + i);
                double s = ref_at(&a[A_SIN], position * R + i) * direction;
                double x1 = ref_at(x, at1), x2 = ref_at(x, at2);
                ref_put(x, at1, x1 * c - x2 * s);
                ref_put(x, at2, x2 * c + x1 * s);
            }
    }
done:
    return st;
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    return rotate("rope_forward", a, params, 1, err);
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *a,
                                      const void *params, struct tril_error *err) {
    (void)ctx;
    return rotate("rope_backward", a, params, -1, err);
}

static bool rope_case(int index, struct op_case *c) {
    static const int64_t sizes[][5] = {
        /* N, H, d, R, C */
        {1, 1, 2, 1, 1},     {3, 2, 8, 4, 7},    {5, 3, 6, 3, 4},
        {7, 2, 17, 5, 9},    {4, 1, 64, 32, 65}, {0, 2, 8, 4, 4},
        {17, 5, 66, 33, 20}, {9, 3, 80, 20, 16}, {65, 12, 64, 32, 128}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    int s = case_pick(&index, COUNT);
    *c = (struct op_case){.act = DT_F32, .label = "dense"};
    c->size['N'] = sizes[s][0];
    c->size['H'] = sizes[s][1];
    c->size['d'] = sizes[s][2];
    c->size['R'] = sizes[s][3];
    c->size['C'] = sizes[s][4];
    if (case_pick(&index, 2))
        c->act = DT_BF16;
    struct rope_params p;
    memset(&p, 0, sizeof p);
    p.interleaved = case_pick(&index, 2);
    if (case_pick(&index, 2)) {
        c->strided = 1u << A_X;
        c->label = "strided";
    }
    case_params(c, &p, sizeof p);
    return index == 0;
}

static void rope_fill(const struct op_case *c, struct tensor *a, const struct random_key *key) {
    (void)c;
    (void)key;
    int64_t C = a[A_COS].shape[0], R = a[A_COS].shape[1];
    for (int64_t t = 0; t < C; t++)
        for (int64_t i = 0; i < R; i++) {
            double angle = (double)t * pow(10000, -(double)i / (double)R);
            ref_put(&a[A_COS], t * R + i, cos(angle));
            ref_put(&a[A_SIN], t * R + i, sin(angle));
        }
}

/* Of the tables only the named rows, which are few. */
static double rope_bytes(const struct tensor *a, const void *params) {
    (void)params;
    return 2.0 * (double)tensor_bytes(&a[A_X]) + (double)tensor_bytes(&a[A_POSITIONS]);
}

const struct op_info op_info_rope_forward = {
    .id = OP_ROPE_FORWARD,
    .name = "rope_forward",
    .args = forward_args,
    .arg_count = A_ARGS,
    .reference = forward_reference,
    .check = check,
    .test_case = rope_case,
    .test_fill = rope_fill,
    .bytes = rope_bytes,
};

const struct op_info op_info_rope_backward = {
    .id = OP_ROPE_BACKWARD,
    .name = "rope_backward",
    .args = backward_args,
    .arg_count = A_ARGS,
    .reference = backward_reference,
    .check = check,
    .test_case = rope_case,
    .test_fill = rope_fill,
    .bytes = rope_bytes,
};
