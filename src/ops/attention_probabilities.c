/* The attention weights of chosen rows: description, argument checks, typed call and the scalar
 * reference. */
#include "ops/attention_probabilities.h"

#include <math.h>
#include <string.h>

#include "ops/attention_cases.h"
#include "ops/reference.h"

static const struct op_arg list[] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "M K d", ARG_IN, DT_ACT | DT_MASK(DT_I8), .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_start", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"pages", "S P", ARG_IN, DT_MASK(DT_I32), .optional = true},
    {"slopes", "H", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"bias", "G A U", ARG_IN, DT_ACT, .optional = true, .strided = true},
    {"k_scale", "M K", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"rows", "R", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "N"},
    {"lse", "H N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"p", "R H C", ARG_OUT, .dtypes = DT_MASK(DT_F32)},
};

/* The arguments that attention_forward would have had: all of its checks apply. */
static void as_forward(const struct tensor *args, struct tensor forward[F_ARGS]) {
    const struct tensor all[F_ARGS] = {[F_Q] = args[P_Q],
                                       [F_K] = args[P_K],
                                       [F_V] = args[P_K],
                                       [F_OFFSETS] = args[P_OFFSETS],
                                       [F_START] = args[P_START],
                                       [F_LENGTH] = args[P_LENGTH],
                                       [F_PAGES] = args[P_PAGES],
                                       [F_SLOPES] = args[P_SLOPES],
                                       [F_BIAS] = args[P_BIAS],
                                       [F_K_SCALE] = args[P_K_SCALE],
                                       [F_V_SCALE] = args[P_K_SCALE],
                                       [F_O] = args[P_Q],
                                       [F_LSE] = args[P_LSE]};
    memcpy(forward, all, sizeof all);
}

tril_status attention_unpack_probabilities(struct probabilities_call *c, const struct tensor *args,
                                           const struct attention_params *p,
                                           struct tril_error *err) {
    const char *name = "attention_probabilities";
    struct tensor forward[F_ARGS];
    as_forward(args, forward);
    *c = (struct probabilities_call){.rows = args[P_ROWS].data,
                                     .count = args[P_ROWS].shape[0],
                                     .columns = args[P_P].shape[2],
                                     .p = args[P_P]};
    tril_status st = attention_unpack_forward(&c->c, forward, p, err);
    if (st != TRIL_OK) {
        error_prefix(err, "%s", name);
        return st;
    }
    if (c->columns < c->c.longest_kv)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument p has %lld columns; the longest sequence has %lld keys",
                         name, (long long)c->columns, (long long)c->c.longest_kv);
    for (int64_t r = 0; r < c->count; r++)
        if (c->rows[r] < 0 || c->rows[r] >= c->c.rows)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: rows[%lld] is %d; q has %lld rows, counted from 0", name,
                             (long long)r, (int)c->rows[r], (long long)c->c.rows);
    return TRIL_OK;
}

static double weight(const struct attention_call *c, int64_t s, int64_t n, int64_t h, int64_t j) {
    int64_t i = n - c->q_offsets[s];
    double lse = ref_at(&c->lse, h * c->rows + n);
    if (j >= c->kv_length[s] || !attention_sees(c, s, i, j, h) || lse == -INFINITY)
        return 0;
    return exp(attention_score(c, s, i, j, h) - lse);
}

static tril_status reference(struct op_context *ctx, const struct tensor *args, const void *params,
                             struct tril_error *err) {
    struct probabilities_call call;
    const struct attention_call *c = &call.c;
    tril_status st = attention_unpack_probabilities(&call, args, params, err);
    if (st != TRIL_OK)
        return st;
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        return TRIL_OK;
    }
    for (int64_t r = 0; r < call.count; r++) {
        int64_t n = call.rows[r], s = 0;
        while (s < c->sequences && n >= c->q_offsets[s + 1])
            s++;
        bool owned = s < c->sequences && n >= c->q_offsets[s];
        for (int64_t h = 0; h < c->heads; h++)
            for (int64_t j = 0; j < call.columns; j++)
                ref_put(&call.p, (r * c->heads + h) * call.columns + j,
                        owned ? weight(c, s, n, h, j) : 0);
    }
    return TRIL_OK;
}

/* The cases of attention_forward, with some rows of each. */
static bool test_case(int index, struct op_case *out) {
    struct op_case f;
    if (!attention_forward_case(index, &f))
        return false;
    *out = f;
    out->absent = out->strided = 0;
    memset(out->dtype, 0, sizeof out->dtype);
    const int from[P_ARGS] = {F_Q,      F_K,    F_OFFSETS, F_START, F_LENGTH, F_PAGES,
                              F_SLOPES, F_BIAS, F_K_SCALE, -1,      -1,       -1};
    for (int i = 0; i < P_ARGS; i++) {
        if (from[i] < 0)
            continue;
        out->absent |= (f.absent >> from[i] & 1) << i;
        out->strided |= (f.strided >> from[i] & 1) << i;
        out->dtype[i] = f.dtype[from[i]];
    }
    out->size['R'] = index % 4 == 3 ? 1 : 5;
    out->size['C'] = f.size['M'] + index % 3;
    return true;
}

static void fill(const struct op_case *c, struct tensor *args, const struct random_key *key) {
    struct tensor forward[F_ARGS];
    as_forward(args, forward);
    attention_forward_fill(c, forward, key);
    /* Near what the forward would say, so that the weights are neither all 0 nor immense. */
    for (int64_t e = 0; e < tensor_count(&args[P_LSE]); e++)
        ref_put(&args[P_LSE], e, 2 + 0.5 * ref_at(&args[P_LSE], e));
}

static double flops(const struct tensor *args, const void *params) {
    (void)params;
    return 2 * (double)tensor_count(&args[P_P]) * (double)args[P_Q].shape[2];
}

static double reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)args[P_Q].shape[2] + 8;
}

const struct op_info op_info_attention_probabilities = {
    .id = OP_ATTENTION_PROBABILITIES,
    .name = "attention_probabilities",
    .args = list,
    .arg_count = P_ARGS,
    .reference = reference,
    .test_case = test_case,
    .test_fill = fill,
    .flops = flops,
    .reduction = reduction,
    .scratch_first = true,
};

tril_status attention_probabilities(struct op_context *ctx, const struct attention_inputs *in,
                                    struct tensor rows, struct tensor lse, struct tensor p,
                                    const struct attention_params *params, struct tril_error *err) {
    const struct tensor args[P_ARGS] = {in->q,         in->k,     in->q_offsets, in->kv_start,
                                        in->kv_length, in->pages, in->slopes,    in->bias,
                                        in->k_scale,   rows,      lse,           p};
    return op_call(ctx, OP_ATTENTION_PROBABILITIES, args, params, err);
}
