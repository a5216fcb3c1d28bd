/* Token and position embedding.
 *
 *   forward:  x[n] = wte[tokens[n]] + wpe[positions[n]]
 *   backward: dwte[tokens[n]] += dx[n],  dwpe[positions[n]] += dx[n]    in the order of n */
#include "ops/reference.h"

/* ------------------------------------------------------------------ forward */

enum { F_TOKENS, F_POSITIONS, F_WTE, F_WPE, F_X, F_ARGS };

static const struct op_arg forward_args[F_ARGS] = {
    {"tokens", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "V"},
    {"positions", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .optional = true, .index_of = "C"},
    {"wte", "V D", ARG_IN, .dtypes = DT_FLOAT},
    {"wpe", "C D", ARG_IN, .dtypes = DT_FLOAT, .optional = true},
    {"x", "N D", ARG_OUT, .dtypes = DT_MASK(DT_F32)},
};

tril_status embed_forward(struct op_context *ctx, struct tensor tokens, struct tensor positions,
                          struct tensor wte, struct tensor wpe, struct tensor x,
                          struct tril_error *err) {
    struct tensor args[F_ARGS] = {tokens, positions, wte, wpe, x};
    return op_call(ctx, OP_EMBED_FORWARD, args, NULL, err);
}

static tril_status forward_check(const struct tensor *a, const void *params,
                                 struct tril_error *err) {
    (void)params;
    if (a[F_WPE].data && !a[F_POSITIONS].data && a[F_TOKENS].shape[0] > 0)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "embed_forward: wpe is given without positions: give both or neither");
    return TRIL_OK;
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    tril_status st = TRIL_OK;
    int64_t N = a[F_X].shape[0], D = a[F_X].shape[1];
    for (int64_t n = 0; n < N; n++) {
        int64_t token, position = 0;
        TRY(ref_index("embed_forward", "tokens", &a[F_TOKENS], n, a[F_WTE].shape[0], &token, err));
        if (a[F_WPE].data)
            TRY(ref_index("embed_forward", "positions", &a[F_POSITIONS], n, a[F_WPE].shape[0],
                          &position, err));
        for (int64_t i = 0; i < D; i++) {
            double v = ref_at(&a[F_WTE], token * D + i);
            if (a[F_WPE].data)
                v += ref_at(&a[F_WPE], position * D + i);
            ref_put(&a[F_X], n * D + i, v);
        }
    }
done:
    return st;
}

static bool embed_sizes(int *index, struct op_case *c) {
    static const int64_t sizes[][4] = {/* N, D, V, C */
                                       {1, 1, 1, 1},        {3, 7, 5, 3},     {17, 17, 11, 7},
                                       {65, 64, 9, 4},      {5, 257, 64, 16}, {0, 8, 4, 4},
                                       {130, 768, 300, 128}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    int s = case_pick(index, COUNT);
    *c = (struct op_case){.act = DT_F32};
    c->size['N'] = sizes[s][0];
    c->size['D'] = sizes[s][1];
    c->size['V'] = sizes[s][2];
    c->size['C'] = sizes[s][3];
    return true;
}

static bool forward_case(int index, struct op_case *c) {
    embed_sizes(&index, c);
    static const enum dtype table[] = {DT_F32, DT_BF16, DT_F16};
    c->act = table[case_pick(&index, 3)];
    c->label = "tokens and positions";
    if (case_pick(&index, 2)) {
        c->absent = 1u << F_POSITIONS | 1u << F_WPE;
        c->label = "tokens only";
    }
    return index == 0;
}

/* Rows of the tables are read as often as they are named. */
static double forward_bytes(const struct tensor *a, const void *params) {
    (void)params;
    double row = (double)a[F_WTE].shape[1] * (double)dtype_size(a[F_WTE].dtype);
    double rows = (double)a[F_TOKENS].shape[0] * (a[F_WPE].data ? 2 : 1);
    return rows * (row + 4) + (double)tensor_bytes(&a[F_X]);
}

const struct op_info op_info_embed_forward = {
    .id = OP_EMBED_FORWARD,
    .name = "embed_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .check = forward_check,
    .test_case = forward_case,
    .bytes = forward_bytes,
};

/* ------------------------------------------------------------------ backward */

enum { B_TOKENS, B_POSITIONS, B_DX, B_DWTE, B_DWPE, B_ARGS };

static const struct op_arg backward_args[B_ARGS] = {
    {"tokens", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "V"},
    {"positions", "N", ARG_IN, .dtypes = DT_MASK(DT_I32), .optional = true, .index_of = "C"},
    {"dx", "N D", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"dwte", "V D", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32)},
    {"dwpe", "C D", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32), .optional = true},
};

tril_status embed_backward(struct op_context *ctx, struct tensor tokens, struct tensor positions,
                           struct tensor dx, struct tensor dwte, struct tensor dwpe,
                           struct tril_error *err) {
    struct tensor args[B_ARGS] = {tokens, positions, dx, dwte, dwpe};
    return op_call(ctx, OP_EMBED_BACKWARD, args, NULL, err);
}

static tril_status backward_check(const struct tensor *a, const void *params,
                                  struct tril_error *err) {
    (void)params;
    if (a[B_DWPE].data && !a[B_POSITIONS].data && a[B_TOKENS].shape[0] > 0)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "embed_backward: dwpe is given without positions: give both or neither");
    return TRIL_OK;
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *a,
                                      const void *params, struct tril_error *err) {
    (void)ctx;
    (void)params;
    tril_status st = TRIL_OK;
    int64_t N = a[B_DX].shape[0], D = a[B_DX].shape[1];
    for (int64_t n = 0; n < N; n++) {
        int64_t token, position = 0;
        TRY(ref_index("embed_backward", "tokens", &a[B_TOKENS], n, a[B_DWTE].shape[0], &token,
                      err));
        if (a[B_DWPE].data)
            TRY(ref_index("embed_backward", "positions", &a[B_POSITIONS], n, a[B_DWPE].shape[0],
                          &position, err));
        for (int64_t i = 0; i < D; i++) {
            double d = ref_at(&a[B_DX], n * D + i);
            ref_add(&a[B_DWTE], token * D + i, d);
            if (a[B_DWPE].data)
                ref_add(&a[B_DWPE], position * D + i, d);
        }
    }
done:
    return st;
}

static bool backward_case(int index, struct op_case *c) {
    embed_sizes(&index, c);
    c->label = "tokens and positions";
    if (case_pick(&index, 2)) {
        c->absent = 1u << B_POSITIONS | 1u << B_DWPE;
        c->label = "tokens only";
    }
    return index == 0;
}

static double backward_reduction(const struct tensor *a, const void *params) {
    (void)params;
    return (double)a[B_DX].shape[0] + 1;
}

/* Every named row is read, added to and written. */
static double backward_bytes(const struct tensor *a, const void *params) {
    (void)params;
    double tables = a[B_DWPE].data ? 2 : 1;
    return (double)tensor_bytes(&a[B_DX]) * (1 + 2 * tables) +
           4 * tables * (double)a[B_DX].shape[0];
}

const struct op_info op_info_embed_backward = {
    .id = OP_EMBED_BACKWARD,
    .name = "embed_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .check = backward_check,
    .test_case = backward_case,
    .reduction = backward_reduction,
    .bytes = backward_bytes,
};
