/* Attention with the relative positions of Transformer-XL (Dai et al. 2019): description, argument
 * checks, typed calls and the scalar reference, row by row in double, as ops.h says. */
#include "ops/relative_attention.h"

#include <math.h>

#include "base/memory.h"
#include "ops/attention_checks.h"
#include "ops/reference.h"

/* ------------------------------------------------------------------ arguments */

#define OWN_AND_PAST                                                                               \
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},                                               \
        {"k", "N K d", ARG_IN, DT_ACT, .strided = true},                                           \
        {"v", "N K d", ARG_IN, DT_ACT, .strided = true},                                           \
        {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},                                   \
        {"past_k", "P K d", ARG_IN, DT_ACT, .optional = true, .strided = true},                    \
        {"past_v", "P K d", ARG_IN, DT_ACT, .optional = true, .strided = true},                    \
        {"past_start", "S", ARG_IN, DT_MASK(DT_I32), .optional = true},                            \
        {"past_length", "S", ARG_IN, DT_MASK(DT_I32), .optional = true},                           \
        {"u", "H d", ARG_IN, .dtypes = DT_MASK(DT_F32)},                                           \
        {"w", "H d", ARG_IN, .dtypes = DT_MASK(DT_F32)}, {                                         \
        "r", "M H d", ARG_IN, DT_ACT, .strided = true                                              \
    }

static const struct op_arg forward_args[] = {
    OWN_AND_PAST,
    {"o", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"lse", "H N", ARG_OUT, DT_MASK(DT_F32), .optional = true},
};
enum {
    A_Q,
    A_K,
    A_V,
    A_OFFSETS,
    A_PAST_K,
    A_PAST_V,
    A_START,
    A_LENGTH,
    A_U,
    A_W,
    A_R,
    A_O,
    A_LSE,
    FORWARD_ARGS,
    A_DO = FORWARD_ARGS,
    A_DQ,
    A_DK,
    A_DV,
    A_DPAST_K,
    A_DPAST_V,
    A_DU,
    A_DW,
    A_DR,
    BACKWARD_ARGS
};

static const struct op_arg backward_args[] = {
    OWN_AND_PAST,
    {"o", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"lse", "H N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"do", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"dq", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"dk", "N K d", ARG_OUT, DT_ACT, .strided = true},
    {"dv", "N K d", ARG_OUT, DT_ACT, .strided = true},
    {"dpast_k", "P K d", ARG_OUT, DT_ACT, .optional = true, .strided = true},
    {"dpast_v", "P K d", ARG_OUT, DT_ACT, .optional = true, .strided = true},
    {"du", "H d", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32)},
    {"dw", "H d", ARG_ACCUMULATE, .dtypes = DT_MASK(DT_F32)},
    {"dr", "M H d", ARG_OUT, DT_ACT, .strided = true},
};

static tril_status check_past(struct relative_attention_call *c, int64_t s, bool backward,
                              const char *name, struct tril_error *err) {
    int64_t start = c->past_start[s], length = c->past_length[s], P = c->past_k.shape[0];
    if (start < 0 || length < 0 || start + length > P)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the past of sequence %lld, rows %lld to %lld, lies outside the %lld "
                         "rows of past_k",
                         name, (long long)s, (long long)start, (long long)(start + length),
                         (long long)P);
    if (backward && s > 0 && c->past_start[s - 1] + c->past_length[s - 1] > start)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the pasts of sequences %lld and %lld overlap; their gradients need "
                         "ascending, disjoint ranges",
                         name, (long long)(s - 1), (long long)s);
    return TRIL_OK;
}

static tril_status unpack(struct relative_attention_call *c, const struct tensor *args,
                          const void *params, bool backward, struct tril_error *err) {
    const char *name = backward ? "relative_attention_backward" : "relative_attention_forward";
    *c = (struct relative_attention_call){
        .q = args[A_Q],
        .k = args[A_K],
        .v = args[A_V],
        .past_k = args[A_PAST_K],
        .past_v = args[A_PAST_V],
        .u = args[A_U],
        .w = args[A_W],
        .r = args[A_R],
        .o = args[A_O],
        .lse = args[A_LSE],
        .q_offsets = args[A_OFFSETS].data,
        .past_start = args[A_START].data,
        .past_length = args[A_LENGTH].data,
        .sequences = args[A_OFFSETS].shape[0] - 1,
        .rows = args[A_Q].shape[0],
        .heads = args[A_Q].shape[1],
        .kv_heads = args[A_K].shape[1],
        .width = args[A_Q].shape[2],
        .distances = args[A_R].shape[0],
        .params = *(const struct relative_attention_params *)params,
    };
    const struct relative_attention_params *p = &c->params;
    bool some = c->past_k.data || c->past_v.data || c->past_start || c->past_length;
    bool all = c->past_k.data && c->past_v.data && c->past_start && c->past_length;
    tril_status st = attention_check_heads(c->heads, c->kv_heads, c->width, name, err);
    if (st == TRIL_OK && some != all)
        st =
            error_set(err, TRIL_ERR_ARGUMENT,
                      "%s: give past_k, past_v, past_start and past_length, or none of them", name);
    if (st == TRIL_OK && (!isfinite(p->scale) || p->segment < 0 || p->memory < 0))
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s: the scale %g must be finite, the segment %lld and the memory %lld 0 or "
                       "more",
                       name, (double)p->scale, (long long)p->segment, (long long)p->memory);
    for (int64_t s = 0; s < c->sequences && st == TRIL_OK; s++) {
        st = attention_check_span(c->q_offsets, s, c->rows, name, err);
        if (st == TRIL_OK && all)
            st = check_past(c, s, backward, name, err);
        if (st != TRIL_OK)
            break;
        int64_t own = relative_own(c, s), keys = own + relative_past(c, s);
        c->longest_q = own > c->longest_q ? own : c->longest_q;
        c->longest = own > 0 && keys > c->longest ? keys : c->longest;
    }
    int64_t reach = (int64_t)p->segment + p->memory; /* the most keys of a row */
    if (!p->segment || reach > c->longest)
        reach = c->longest;
    if (st == TRIL_OK && reach > c->distances)
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s: argument r holds %lld distances; a row sees up to %lld keys", name,
                       (long long)c->distances, (long long)reach);
    if (!backward)
        return st;
    c->dout = args[A_DO];
    c->dq = args[A_DQ];
    c->dk = args[A_DK];
    c->dv = args[A_DV];
    c->dpast_k = args[A_DPAST_K];
    c->dpast_v = args[A_DPAST_V];
    c->du = args[A_DU];
    c->dw = args[A_DW];
    c->dr = args[A_DR];
    return st;
}

tril_status relative_attention_unpack_forward(struct relative_attention_call *c,
                                              const struct tensor *args, const void *params,
                                              struct tril_error *err) {
    return unpack(c, args, params, false, err);
}

tril_status relative_attention_unpack_backward(struct relative_attention_call *c,
                                               const struct tensor *args, const void *params,
                                               struct tril_error *err) {
    return unpack(c, args, params, true, err);
}

/* ------------------------------------------------------------------ reference */

/* Key j of sequence s: a row of the past, or an own one. */
static const struct tensor *key_row(const struct relative_attention_call *c, int64_t s, int64_t j,
                                    const struct tensor *past, const struct tensor *own,
                                    int64_t *row) {
    int64_t before = relative_past(c, s);
    *row = j < before ? c->past_start[s] + j : c->q_offsets[s] + j - before;
    return j < before ? past : own;
}

static double score(const struct relative_attention_call *c, int64_t s, int64_t n, int64_t p,
                    int64_t j, int64_t h) {
    int64_t row, kv_head = h / (c->heads / c->kv_heads);
    const struct tensor *k = key_row(c, s, j, &c->past_k, &c->k, &row);
    double sum = 0;
    for (int64_t t = 0; t < c->width; t++) {
        double q = ref_at3(&c->q, n, h, t);
        sum += (q + ref_at2(&c->u, h, t)) * ref_at3(k, row, kv_head, t) +
               (q + ref_at2(&c->w, h, t)) * ref_at3(&c->r, p - j, h, t);
    }
    return sum * (double)c->params.scale;
}

static void forward_row(const struct relative_attention_call *c, int64_t s, int64_t i, int64_t h,
                        double *scores, double *out) {
    int64_t n = c->q_offsets[s] + i, p = relative_past(c, s) + i, d = c->width;
    double maximum = -INFINITY, sum = 0;
    for (int64_t j = relative_first(c, p); j <= p; j++) {
        scores[j] = score(c, s, n, p, j, h);
        maximum = scores[j] > maximum || isnan(scores[j]) ? scores[j] : maximum;
    }
    for (int64_t t = 0; t < d; t++)
        out[t] = 0;
    for (int64_t j = relative_first(c, p); j <= p; j++) {
        int64_t row;
        const struct tensor *v = key_row(c, s, j, &c->past_v, &c->v, &row);
        double e = exp(scores[j] - maximum);
        sum += e;
        for (int64_t t = 0; t < d; t++)
            out[t] += e * ref_at3(v, row, h / (c->heads / c->kv_heads), t);
    }
    for (int64_t t = 0; t < d; t++)
        ref_put(&c->o, ref_offset3(&c->o, n, h, t), out[t] / sum);
    if (c->lse.data)
        ref_put(&c->lse, h * c->rows + n, maximum + log(sum));
}

/* Rows that belong to no sequence. */
static void clear_gaps(const struct relative_attention_call *c, const struct tensor *x) {
    int64_t next = 0;
    for (int64_t s = 0; s <= c->sequences; s++) {
        ref_zero_rows(x, next, s < c->sequences ? c->q_offsets[s] : c->rows);
        next = s < c->sequences ? c->q_offsets[s + 1] : c->rows;
    }
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *args,
                                     const void *params, struct tril_error *err) {
    struct relative_attention_call c;
    void *memory = NULL;
    tril_status st;
    TRY(relative_attention_unpack_forward(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    TRY(mem_alloc(&memory, (size_t)(c.longest + c.width + 1) * sizeof(double), "a row of scores",
                  err));
    clear_gaps(&c, &c.o);
    for (int64_t i = 0; c.lse.data && i < c.heads * c.rows; i++)
        ref_put(&c.lse, i, -INFINITY);
    for (int64_t s = 0; s < c.sequences; s++)
        for (int64_t i = 0; i < relative_own(&c, s); i++)
            for (int64_t h = 0; h < c.heads; h++)
                forward_row(&c, s, i, h, memory, (double *)memory + c.longest);
done:
    mem_free(memory);
    return st;
}

/* Sums of gradients in double: of the keys and values of one key/value head, [keys][d] each, and
 * of r for all heads. */
struct sums {
    double *dk, *dv, *dr, *dq;
};

static void backward_row(const struct relative_attention_call *c, const struct sums *g, int64_t s,
                         int64_t i, int64_t h) {
    int64_t n = c->q_offsets[s] + i, p = relative_past(c, s) + i, d = c->width;
    int64_t kv_head = h / (c->heads / c->kv_heads);
    double delta = 0, lse = ref_at(&c->lse, h * c->rows + n), scale = (double)c->params.scale;
    for (int64_t t = 0; t < d; t++) {
        delta += ref_at3(&c->dout, n, h, t) * ref_at3(&c->o, n, h, t);
        g->dq[t] = 0;
    }
    for (int64_t j = relative_first(c, p); j <= p; j++) {
        int64_t row, unused;
        const struct tensor *k = key_row(c, s, j, &c->past_k, &c->k, &row);
        const struct tensor *v = key_row(c, s, j, &c->past_v, &c->v, &unused);
        double probability = exp(score(c, s, n, p, j, h) - lse), dp = 0;
        for (int64_t t = 0; t < d; t++)
            dp += ref_at3(&c->dout, n, h, t) * ref_at3(v, row, kv_head, t);
        double ds = probability * (dp - delta) * scale;
        for (int64_t t = 0; t < d; t++) {
            double q = ref_at3(&c->q, n, h, t), x = ds * ref_at3(k, row, kv_head, t);
            double y = ds * ref_at3(&c->r, p - j, h, t);
            g->dq[t] += x + y;
            ref_add(&c->du, h * d + t, x);
            ref_add(&c->dw, h * d + t, y);
            g->dk[j * d + t] += ds * (q + ref_at2(&c->u, h, t));
            g->dv[j * d + t] += probability * ref_at3(&c->dout, n, h, t);
            g->dr[((p - j) * c->heads + h) * d + t] += ds * (q + ref_at2(&c->w, h, t));
        }
    }
    for (int64_t t = 0; t < d; t++)
        ref_put(&c->dq, ref_offset3(&c->dq, n, h, t), g->dq[t]);
}

static void store_keys(const struct relative_attention_call *c, const struct sums *g, int64_t s,
                       int64_t kv_head) {
    int64_t keys = relative_past(c, s) + relative_own(c, s), d = c->width;
    for (int64_t j = 0; j < keys; j++) {
        int64_t row;
        const struct tensor *dk = key_row(c, s, j, &c->dpast_k, &c->dk, &row);
        const struct tensor *dv = key_row(c, s, j, &c->dpast_v, &c->dv, &row);
        for (int64_t t = 0; t < d; t++) {
            if (dk->data)
                ref_put(dk, ref_offset3(dk, row, kv_head, t), g->dk[j * d + t]);
            if (dv->data)
                ref_put(dv, ref_offset3(dv, row, kv_head, t), g->dv[j * d + t]);
        }
    }
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *args,
                                      const void *params, struct tril_error *err) {
    struct relative_attention_call c;
    void *memory = NULL;
    tril_status st;
    TRY(relative_attention_unpack_backward(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    const int64_t d = c.width, group = c.heads / c.kv_heads;
    int64_t keys = 0;
    for (int64_t s = 0; s < c.sequences; s++) {
        int64_t all = relative_past(&c, s) + relative_own(&c, s);
        keys = all > keys ? all : keys;
    }
    int64_t distances = c.distances * c.heads;
    TRY(mem_alloc_zero(&memory, (size_t)((2 * keys + distances + 1) * d) * sizeof(double),
                       "the gradients of a sequence", err));
    struct sums g = {.dk = memory};
    g.dv = g.dk + keys * d;
    g.dr = g.dv + keys * d;
    g.dq = g.dr + distances * d;
    clear_gaps(&c, &c.dq);
    clear_gaps(&c, &c.dk);
    clear_gaps(&c, &c.dv);
    if (c.dpast_k.data)
        ref_zero_rows(&c.dpast_k, 0, c.dpast_k.shape[0]);
    if (c.dpast_v.data)
        ref_zero_rows(&c.dpast_v, 0, c.dpast_v.shape[0]);
    for (int64_t s = 0; s < c.sequences; s++)
        for (int64_t kv_head = 0; kv_head < c.kv_heads; kv_head++) {
            memset(g.dk, 0, (size_t)(2 * keys * d) * sizeof(double));
            for (int64_t i = 0; i < relative_own(&c, s); i++)
                for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
                    backward_row(&c, &g, s, i, h);
            store_keys(&c, &g, s, kv_head);
        }
    for (int64_t x = 0; x < c.distances; x++)
        for (int64_t h = 0; h < c.heads; h++)
            for (int64_t t = 0; t < d; t++)
                ref_put(&c.dr, ref_offset3(&c.dr, x, h, t), g.dr[(x * c.heads + h) * d + t]);
done:
    mem_free(memory);
    return st;
}

/* ------------------------------------------------------------------ test and benchmark cases */

static const struct shape_case {
    const char *label;
    int n, p, m, h, k, d, s, segment, memory;
    bool past, strided;
    enum dtype act;
} shapes[] = {
    {"whole", 11, 0, 11, 2, 2, 5, 1, 0, 0, false, false, DT_F32},
    {"past", 7, 9, 16, 2, 1, 4, 1, 0, 0, true, true, DT_F32},
    {"segments", 14, 0, 10, 2, 2, 3, 1, 4, 6, false, false, DT_F32},
    {"one row", 1, 12, 13, 4, 2, 6, 1, 5, 3, true, false, DT_F32},
    {"packed", 13, 11, 18, 2, 2, 3, 3, 0, 0, true, true, DT_F32},
    {"past bf16", 70, 40, 120, 4, 2, 32, 2, 0, 0, true, false, DT_BF16},
    {"segments bf16", 150, 0, 72, 2, 2, 24, 1, 32, 40, false, true, DT_BF16},
    {"blocks", 200, 70, 275, 2, 1, 33, 1, 0, 0, true, true, DT_F32},
    {"one channel", 9, 4, 13, 1, 1, 1, 1, 3, 3, true, false, DT_F32},
};

static bool make_case(int index, struct op_case *out, bool backward) {
    if (index >= (int)(sizeof shapes / sizeof shapes[0]))
        return false;
    const struct shape_case *s = &shapes[index];
    *out = (struct op_case){.label = s->label, .act = s->act};
    out->size['N'] = s->n;
    out->size['P'] = s->p;
    out->size['M'] = s->m;
    out->size['H'] = s->h;
    out->size['K'] = s->k;
    out->size['d'] = s->d;
    out->size['S'] = s->s;
    struct relative_attention_params p = {
        .scale = (float)(1 / sqrt(s->d)), .segment = s->segment, .memory = s->memory};
    case_params(out, &p, sizeof p);
    if (!s->past)
        out->absent = 1u << A_PAST_K | 1u << A_PAST_V | 1u << A_START | 1u << A_LENGTH |
                      (backward ? 1u << A_DPAST_K | 1u << A_DPAST_V : 0);
    if (s->strided)
        out->strided = 1u << A_Q | 1u << A_K | 1u << A_V | 1u << A_R | 1u << A_O |
                       (s->past ? 1u << A_PAST_K | 1u << A_PAST_V : 0);
    if (s->strided && backward)
        out->strided |= 1u << A_DO | 1u << A_DQ | 1u << A_DK | 1u << A_DV | 1u << A_DR |
                        (s->past ? 1u << A_DPAST_K | 1u << A_DPAST_V : 0);
    return true;
}

static bool forward_case(int index, struct op_case *out) {
    return make_case(index, out, false);
}
static bool backward_case(int index, struct op_case *out) {
    return make_case(index, out, true);
}

/* Sequences of different lengths whose pasts share past_k evenly, one row left over between them.
 */
static void fill(const struct op_case *c, struct tensor *args, const struct random_key *key) {
    (void)key;
    int32_t *offsets = args[A_OFFSETS].data, *start = args[A_START].data;
    int32_t *length = args[A_LENGTH].data;
    int64_t sequences = c->size['S'];
    for (int64_t s = 0; s <= sequences; s++)
        offsets[s] = (int32_t)(c->size['N'] * s * (s + 1) / (sequences * (sequences + 1)));
    for (int64_t s = 0; start && s < sequences; s++) {
        start[s] = (int32_t)(c->size['P'] * s / sequences + (s > 0));
        length[s] = (int32_t)(c->size['P'] * (s + 1) / sequences - start[s]);
    }
}

/* Pairs of a row and a key that it sees, over all heads. */
static double pairs(const struct tensor *args, const struct relative_attention_params *p) {
    const int32_t *offsets = args[A_OFFSETS].data, *length = args[A_LENGTH].data;
    double sum = 0;
    struct relative_attention_call c = {.params = *p};
    for (int64_t s = 0; s + 1 < args[A_OFFSETS].shape[0]; s++)
        for (int64_t i = 0; i < offsets[s + 1] - offsets[s]; i++) {
            int64_t at = (length ? length[s] : 0) + i;
            sum += (double)(at + 1 - relative_first(&c, at));
        }
    return sum * (double)args[A_Q].shape[1];
}
static double forward_flops(const struct tensor *args, const void *params) {
    return 6 * (double)args[A_Q].shape[2] * pairs(args, params);
}
static double backward_flops(const struct tensor *args, const void *params) {
    return 16 * (double)args[A_Q].shape[2] * pairs(args, params);
}

static double reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)(args[A_Q].shape[0] + args[A_R].shape[0] + args[A_Q].shape[2]);
}

const struct op_info op_info_relative_attention_forward = {
    .id = OP_RELATIVE_ATTENTION_FORWARD,
    .name = "relative_attention_forward",
    .args = forward_args,
    .arg_count = FORWARD_ARGS,
    .reference = forward_reference,
    .test_case = forward_case,
    .test_fill = fill,
    .flops = forward_flops,
    .reduction = reduction,
    .scratch_first = true,
};

const struct op_info op_info_relative_attention_backward = {
    .id = OP_RELATIVE_ATTENTION_BACKWARD,
    .name = "relative_attention_backward",
    .args = backward_args,
    .arg_count = BACKWARD_ARGS,
    .reference = backward_reference,
    .test_case = backward_case,
    .test_fill = fill,
    .flops = backward_flops,
    .reduction = reduction,
    .scratch_first = true,
};

/* ------------------------------------------------------------------ typed calls */

tril_status relative_attention_forward(struct op_context *ctx,
                                       const struct relative_attention_inputs *in, struct tensor o,
                                       struct tensor lse, struct relative_attention_params p,
                                       struct tril_error *err) {
    struct tensor args[] = {
        in->q,           in->k, in->v, in->q_offsets, in->past_k, in->past_v, in->past_start,
        in->past_length, in->u, in->w, in->r,         o,          lse};
    return op_call(ctx, OP_RELATIVE_ATTENTION_FORWARD, args, &p, err);
}

tril_status relative_attention_backward(struct op_context *ctx,
                                        const struct relative_attention_inputs *in, struct tensor o,
                                        struct tensor lse, struct tensor dout,
                                        const struct relative_attention_gradients *g,
                                        struct relative_attention_params p,
                                        struct tril_error *err) {
    struct tensor args[] = {in->q,      in->k,      in->v,          in->q_offsets,
                            in->past_k, in->past_v, in->past_start, in->past_length,
                            in->u,      in->w,      in->r,          o,
                            lse,        dout,       g->dq,          g->dk,
                            g->dv,      g->dpast_k, g->dpast_v,     g->du,
                            g->dw,      g->dr};
    return op_call(ctx, OP_RELATIVE_ATTENTION_BACKWARD, args, &p, err);
}
