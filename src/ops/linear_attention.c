/* Linear attention (Katharopoulos et al. 2020): description, argument checks, typed calls and the
 * scalar reference, which is the recurrence of ops.h, row by row, in double.
 *
 * The normaliser z is one more column of the state S: with v' = (v, 1) the state is S' = sum phi(k)
 * v'^T [d, d+1], and phi(q) S' = (numerator, denominator). The backward keeps the same shape: with
 * g' = (do, -do.o) / denominator, R' = sum phi(q) g'^T over the rows that see a key, and
 *
 *   dphi(q) = S' g'     dphi(k) = R' v'     dv = R^T phi(k)     dstate = R' before the first row */
#include "ops/linear_attention.h"

#include <math.h>
#include <string.h>

#include "base/memory.h"
#include "ops/attention_checks.h"
#include "ops/reference.h"

/* ------------------------------------------------------------------ arguments */

static const struct op_arg forward_args[] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "N K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "N K d", ARG_IN, DT_ACT, .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"state", "S K d d+1", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"o", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"next", "S K d d+1", ARG_OUT, DT_MASK(DT_F32), .optional = true},
};
enum { F_Q, F_K, F_V, F_OFFSETS, F_STATE, F_O, F_NEXT, F_ARGS };

static const struct op_arg backward_args[] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "N K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "N K d", ARG_IN, DT_ACT, .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"state", "S K d d+1", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"o", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"do", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"dnext", "S K d d+1", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"dq", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"dk", "N K d", ARG_OUT, DT_ACT, .strided = true},
    {"dv", "N K d", ARG_OUT, DT_ACT, .strided = true},
    {"dstate", "S K d d+1", ARG_OUT, DT_MASK(DT_F32), .optional = true},
};
enum { B_Q, B_K, B_V, B_OFFSETS, B_STATE, B_O, B_DO, B_DNEXT, B_DQ, B_DK, B_DV, B_DSTATE, B_ARGS };

static tril_status unpack(struct linear_attention_call *c, const struct tensor *offsets,
                          const char *name, struct tril_error *err) {
    c->rows = c->q.shape[0];
    c->heads = c->q.shape[1];
    c->kv_heads = c->k.shape[1];
    c->width = c->q.shape[2];
    c->q_offsets = offsets->data;
    c->sequences = offsets->shape[0] - 1;
    tril_status st = attention_check_heads(c->heads, c->kv_heads, c->width, name, err);
    for (int64_t s = 0; s < c->sequences && st == TRIL_OK; s++) {
        int64_t length = (int64_t)c->q_offsets[s + 1] - c->q_offsets[s];
        st = attention_check_span(c->q_offsets, s, c->rows, name, err);
        c->longest = length > c->longest ? length : c->longest;
    }
    return st;
}

tril_status linear_attention_unpack_forward(struct linear_attention_call *c,
                                            const struct tensor *args, const void *params,
                                            struct tril_error *err) {
    *c = (struct linear_attention_call){
        .q = args[F_Q],
        .k = args[F_K],
        .v = args[F_V],
        .state = args[F_STATE],
        .o = args[F_O],
        .next = args[F_NEXT],
        .causal = ((const struct linear_attention_params *)params)->causal,
    };
    return unpack(c, &args[F_OFFSETS], "linear_attention_forward", err);
}

tril_status linear_attention_unpack_backward(struct linear_attention_call *c,
                                             const struct tensor *args, const void *params,
                                             struct tril_error *err) {
    *c = (struct linear_attention_call){
        .q = args[B_Q],
        .k = args[B_K],
        .v = args[B_V],
        .state = args[B_STATE],
        .o = args[B_O],
        .dout = args[B_DO],
        .dnext = args[B_DNEXT],
        .dq = args[B_DQ],
        .dk = args[B_DK],
        .dv = args[B_DV],
        .dstate = args[B_DSTATE],
        .causal = ((const struct linear_attention_params *)params)->causal,
    };
    return unpack(c, &args[B_OFFSETS], "linear_attention_backward", err);
}

/* ------------------------------------------------------------------ reference */

/* phi(x) = elu(x) + 1, and its derivative. */
static double feature(double x) {
    return x > 0 ? x + 1 : exp(x);
}
static double feature_slope(double x) {
    return x > 0 ? 1 : exp(x);
}

/* Memory for one sequence and key/value head. */
struct recurrence {
    const struct linear_attention_call *c;
    double *state;       /* S' or R' [d, d+1] */
    double *denominator; /* [rows, heads of the group] */
    double *x;           /* [d+1] */
};

static tril_status recurrence_create(struct recurrence *r, const struct linear_attention_call *c,
                                     struct tril_error *err) {
    int64_t d = c->width, group = c->heads / c->kv_heads;
    void *memory = NULL;
    tril_status st =
        mem_alloc(&memory, (size_t)((d + 1) * (d + 1) + c->longest * group) * sizeof(double),
                  "the state of one key/value head", err);
    *r = (struct recurrence){.c = c, .x = memory};
    if (st == TRIL_OK) {
        r->state = r->x + d + 1;
        r->denominator = r->state + d * (d + 1);
    }
    return st;
}

/* The matrix of sequence s and head h out of a [S, K, d, d+1] tensor; zeros if it is absent. */
static void state_read(struct recurrence *r, const struct tensor *t, int64_t s, int64_t h) {
    int64_t size = r->c->width * (r->c->width + 1);
    for (int64_t e = 0; e < size; e++)
        r->state[e] = t->data ? ref_at(t, (s * r->c->kv_heads + h) * size + e) : 0;
}
static void state_write(const struct recurrence *r, const struct tensor *t, int64_t s, int64_t h) {
    int64_t size = r->c->width * (r->c->width + 1);
    for (int64_t e = 0; t->data && e < size; e++)
        ref_put(t, (s * r->c->kv_heads + h) * size + e, r->state[e]);
}

/* S' += phi(k_n) v'_n^T */
static void add_key(struct recurrence *r, int64_t n, int64_t h) {
    const struct linear_attention_call *c = r->c;
    int64_t d = c->width;
    for (int64_t i = 0; i < d; i++) {
        double f = feature(ref_at3(&c->k, n, h, i));
        for (int64_t e = 0; e < d; e++)
            r->state[i * (d + 1) + e] += f * ref_at3(&c->v, n, h, e);
        r->state[i * (d + 1) + d] += f;
    }
}

/* x = phi(q_n) S': numerator and denominator. */
static void read_out(struct recurrence *r, int64_t n, int64_t h) {
    const struct linear_attention_call *c = r->c;
    int64_t d = c->width;
    memset(r->x, 0, (size_t)(d + 1) * sizeof(double));
    for (int64_t i = 0; i < d; i++) {
        double f = feature(ref_at3(&c->q, n, h, i));
        for (int64_t e = 0; e <= d; e++)
            r->x[e] += f * r->state[i * (d + 1) + e];
    }
}

static void forward_head(struct recurrence *r, int64_t s, int64_t kv_head) {
    const struct linear_attention_call *c = r->c;
    int64_t begin = c->q_offsets[s], end = c->q_offsets[s + 1], d = c->width;
    int64_t group = c->heads / c->kv_heads;
    state_read(r, &c->state, s, kv_head);
    for (int64_t n = begin; n < end && !c->causal; n++)
        add_key(r, n, kv_head);
    for (int64_t n = begin; n < end; n++) {
        if (c->causal)
            add_key(r, n, kv_head);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
            read_out(r, n, h);
            for (int64_t e = 0; e < d; e++)
                ref_put(&c->o, ref_offset3(&c->o, n, h, e), r->x[d] == 0 ? 0 : r->x[e] / r->x[d]);
        }
    }
    state_write(r, &c->next, s, kv_head);
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *args,
                                     const void *params, struct tril_error *err) {
    struct linear_attention_call c;
    struct recurrence r = {0};
    tril_status st;
    TRY(linear_attention_unpack_forward(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    TRY(recurrence_create(&r, &c, err));
    int64_t next = 0; /* rows before this are written */
    for (int64_t s = 0; s < c.sequences; s++) {
        ref_zero_rows(&c.o, next, c.q_offsets[s]);
        for (int64_t h = 0; h < c.kv_heads; h++)
            forward_head(&r, s, h);
        next = c.q_offsets[s + 1];
    }
    ref_zero_rows(&c.o, next, c.rows);
done:
    mem_free(r.x);
    return st;
}

/* x = g'_n = (do, -do.o) / denominator. */
static void gradient_row(struct recurrence *r, int64_t n, int64_t h, double denominator) {
    const struct linear_attention_call *c = r->c;
    double inverse = denominator == 0 ? 0 : 1 / denominator, sum = 0;
    for (int64_t e = 0; e < c->width; e++) {
        r->x[e] = ref_at3(&c->dout, n, h, e) * inverse;
        sum += r->x[e] * ref_at3(&c->o, n, h, e);
    }
    r->x[c->width] = -sum;
}

/* R' += phi(q_n) g'_n^T for all heads of the group. */
static void add_queries(struct recurrence *r, int64_t n, int64_t begin, int64_t kv_head) {
    const struct linear_attention_call *c = r->c;
    int64_t d = c->width, group = c->heads / c->kv_heads;
    for (int64_t i = 0; i < group; i++) {
        int64_t h = kv_head * group + i;
        gradient_row(r, n, h, r->denominator[(n - begin) * group + i]);
        for (int64_t a = 0; a < d; a++) {
            double f = feature(ref_at3(&c->q, n, h, a));
            for (int64_t e = 0; e <= d; e++)
                r->state[a * (d + 1) + e] += f * r->x[e];
        }
    }
}

static void backward_head(struct recurrence *r, int64_t s, int64_t kv_head) {
    const struct linear_attention_call *c = r->c;
    int64_t begin = c->q_offsets[s], end = c->q_offsets[s + 1], d = c->width;
    int64_t group = c->heads / c->kv_heads;
    /* Forward in time: S', and with it the denominators and dq. */
    state_read(r, &c->state, s, kv_head);
    for (int64_t n = begin; n < end && !c->causal; n++)
        add_key(r, n, kv_head);
    for (int64_t n = begin; n < end; n++) {
        if (c->causal)
            add_key(r, n, kv_head);
        for (int64_t i = 0; i < group; i++) {
            int64_t h = kv_head * group + i;
            read_out(r, n, h);
            gradient_row(r, n, h, r->denominator[(n - begin) * group + i] = r->x[d]);
            for (int64_t a = 0; a < d; a++) {
                double sum = 0;
                for (int64_t e = 0; e <= d; e++)
                    sum += r->state[a * (d + 1) + e] * r->x[e];
                ref_put(&c->dq, ref_offset3(&c->dq, n, h, a),
                        sum * feature_slope(ref_at3(&c->q, n, h, a)));
            }
        }
    }
    /* Backward in time: R', and with it dk and dv. */
    state_read(r, &c->dnext, s, kv_head);
    for (int64_t n = begin; n < end && !c->causal; n++)
        add_queries(r, n, begin, kv_head);
    for (int64_t n = end - 1; n >= begin; n--) {
        if (c->causal)
            add_queries(r, n, begin, kv_head);
        memset(r->x, 0, (size_t)d * sizeof(double));
        for (int64_t a = 0; a < d; a++) {
            const double *row = r->state + a * (d + 1);
            double x = ref_at3(&c->k, n, kv_head, a), sum = row[d];
            for (int64_t e = 0; e < d; e++) {
                sum += row[e] * ref_at3(&c->v, n, kv_head, e);
                r->x[e] += row[e] * feature(x);
            }
            ref_put(&c->dk, ref_offset3(&c->dk, n, kv_head, a), sum * feature_slope(x));
        }
        for (int64_t e = 0; e < d; e++)
            ref_put(&c->dv, ref_offset3(&c->dv, n, kv_head, e), r->x[e]);
    }
    state_write(r, &c->dstate, s, kv_head);
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *args,
                                      const void *params, struct tril_error *err) {
    struct linear_attention_call c;
    struct recurrence r = {0};
    tril_status st;
    TRY(linear_attention_unpack_backward(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    TRY(recurrence_create(&r, &c, err));
    int64_t next = 0;
    for (int64_t s = 0; s <= c.sequences; s++) {
        int64_t begin = s < c.sequences ? c.q_offsets[s] : c.rows;
        ref_zero_rows(&c.dq, next, begin);
        ref_zero_rows(&c.dk, next, begin);
        ref_zero_rows(&c.dv, next, begin);
        for (int64_t h = 0; h < c.kv_heads && s < c.sequences; h++)
            backward_head(&r, s, h);
        next = s < c.sequences ? c.q_offsets[s + 1] : c.rows;
    }
done:
    mem_free(r.x);
    return st;
}

/* ------------------------------------------------------------------ test and benchmark cases */

static const struct shape_case {
    const char *label;
    int n, h, k, d, s;
    bool causal, state, next, strided;
    enum dtype act;
} shapes[] = {
    {"causal", 13, 2, 2, 5, 1, true, false, false, false, DT_F32},
    {"causal bf16", 65, 4, 2, 64, 2, true, false, true, false, DT_BF16},
    {"carried state", 9, 2, 1, 4, 1, true, true, true, true, DT_F32},
    {"full", 11, 3, 1, 3, 1, false, false, false, false, DT_F32},
    {"full with state", 10, 2, 2, 4, 2, false, true, true, false, DT_F32},
    {"packed", 12, 2, 1, 3, 4, true, true, true, false, DT_F32},
    {"one row", 1, 6, 2, 5, 1, true, true, true, false, DT_F32},
    {"one row bf16", 1, 4, 4, 64, 1, true, true, true, true, DT_BF16},
    {"one channel", 20, 1, 1, 1, 1, true, false, true, false, DT_F32},
    {"chunks", 200, 2, 1, 33, 1, true, true, true, true, DT_F32},
    {"full chunks bf16", 211, 2, 2, 24, 2, false, false, true, false, DT_BF16},
    {"wide", 40, 1, 1, 256, 1, true, false, false, false, DT_F32},
};

static bool make_case(int index, struct op_case *out, unsigned states, unsigned nexts) {
    if (index >= (int)(sizeof shapes / sizeof shapes[0]))
        return false;
    const struct shape_case *s = &shapes[index];
    *out = (struct op_case){.label = s->label, .act = s->act};
    out->size['N'] = s->n;
    out->size['H'] = s->h;
    out->size['K'] = s->k;
    out->size['d'] = s->d;
    out->size['S'] = s->s;
    struct linear_attention_params p = {.causal = s->causal};
    case_params(out, &p, sizeof p);
    out->absent = (s->state ? 0 : states) | (s->next ? 0 : nexts);
    if (s->strided) /* q, k, v, o or their gradients: the rest are dense */
        out->strided = 1u << F_Q | 1u << F_K | 1u << F_V | 1u << F_O;
    return true;
}

static bool forward_case(int index, struct op_case *out) {
    return make_case(index, out, 1u << F_STATE, 1u << F_NEXT);
}

static bool backward_case(int index, struct op_case *out) {
    bool more = make_case(index, out, 1u << B_STATE | 1u << B_DSTATE, 1u << B_DNEXT);
    if (more && out->strided)
        out->strided |= 1u << B_DO | 1u << B_DQ | 1u << B_DK | 1u << B_DV;
    return more;
}

/* Sequences of different lengths, and a state as some 10 earlier keys would have left it: a
 * positive normaliser, larger than what it divides. */
static void fill(const struct op_case *c, struct tensor *args, const struct random_key *key) {
    (void)key;
    int32_t *offsets = args[F_OFFSETS].data;
    int64_t sequences = c->size['S'], d = c->size['d'];
    for (int64_t s = 0; s <= sequences; s++)
        offsets[s] = (int32_t)(c->size['N'] * s * (s + 1) / (sequences * (sequences + 1)));
    const struct tensor *state = &args[F_STATE];
    for (int64_t row = 0; state->data && row < sequences * c->size['K'] * d; row++) {
        int64_t at = row * (d + 1) + d;
        ref_put(state, at, 10 + fabs(ref_at(state, at)));
    }
}

/* 2 d^2 for every product of a row with a matrix. */
static double forward_flops(const struct tensor *args, const void *params) {
    (void)params;
    double d = (double)args[F_Q].shape[2];
    return 2 * d * d * (double)args[F_Q].shape[0] *
           (double)(args[F_Q].shape[1] + args[F_K].shape[1]);
}
static double backward_flops(const struct tensor *args, const void *params) {
    (void)params;
    double d = (double)args[F_Q].shape[2];
    return 2 * d * d * (double)args[F_Q].shape[0] *
           (double)(2 * args[F_Q].shape[1] + 3 * args[F_K].shape[1]);
}

static double reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)(args[F_Q].shape[0] + args[F_Q].shape[2]);
}

const struct op_info op_info_linear_attention_forward = {
    .id = OP_LINEAR_ATTENTION_FORWARD,
    .name = "linear_attention_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .test_case = forward_case,
    .test_fill = fill,
    .flops = forward_flops,
    .reduction = reduction,
    .scratch_first = true,
};

const struct op_info op_info_linear_attention_backward = {
    .id = OP_LINEAR_ATTENTION_BACKWARD,
    .name = "linear_attention_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .test_case = backward_case,
    .test_fill = fill,
    .flops = backward_flops,
    .reduction = reduction,
    .scratch_first = true,
};

/* ------------------------------------------------------------------ typed calls */

tril_status linear_attention_forward(struct op_context *ctx, struct tensor q, struct tensor k,
                                     struct tensor v, struct tensor q_offsets, struct tensor state,
                                     struct tensor o, struct tensor next,
                                     struct linear_attention_params p, struct tril_error *err) {
    struct tensor args[] = {q, k, v, q_offsets, state, o, next};
    return op_call(ctx, OP_LINEAR_ATTENTION_FORWARD, args, &p, err);
}

tril_status linear_attention_backward(struct op_context *ctx, struct tensor q, struct tensor k,
                                      struct tensor v, struct tensor q_offsets, struct tensor state,
                                      struct tensor o, struct tensor dout, struct tensor dnext,
                                      struct tensor dq, struct tensor dk, struct tensor dv,
                                      struct tensor dstate, struct linear_attention_params p,
                                      struct tril_error *err) {
    struct tensor args[] = {q, k, v, q_offsets, state, o, dout, dnext, dq, dk, dv, dstate};
    return op_call(ctx, OP_LINEAR_ATTENTION_BACKWARD, args, &p, err);
}
