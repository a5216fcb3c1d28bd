/* Attention over an external memory, by exact search (Wu et al. 2022): description, argument
 * checks, typed calls and the scalar reference. The backward needs neither q nor the scores: with
 * the rows found and their weights w, ds_j = w_j (do.v_j - do.o), dq = scale sum_j ds_j k_j. */
#include "ops/memory_attention.h"

#include <math.h>

#include "base/memory.h"
#include "ops/attention_checks.h"
#include "ops/reference.h"

/* ------------------------------------------------------------------ arguments */

static const struct op_arg forward_args[] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_start", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_first", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_position", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"o", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"index", "N H T", ARG_OUT, .dtypes = DT_MASK(DT_I32)},
    {"weight", "N H T", ARG_OUT, .dtypes = DT_MASK(DT_F32)},
    {"lse", "H N", ARG_OUT, DT_MASK(DT_F32), .optional = true},
};
enum {
    F_Q,
    F_K,
    F_V,
    F_OFFSETS,
    F_START,
    F_FIRST,
    F_LENGTH,
    F_POSITION,
    F_O,
    F_INDEX,
    F_WEIGHT,
    F_LSE,
    F_ARGS
};

static const struct op_arg backward_args[] = {
    {"k", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"index", "N H T", ARG_IN, .dtypes = DT_MASK(DT_I32), .index_of = "M"},
    {"weight", "N H T", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"o", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"do", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"dq", "N H d", ARG_ACCUMULATE, DT_ACT, .strided = true},
};
enum { B_K, B_V, B_INDEX, B_WEIGHT, B_O, B_DO, B_DQ, B_ARGS };

tril_status memory_attention_unpack(struct memory_attention_call *c, const struct tensor *args,
                                    const void *params, struct tril_error *err) {
    static const char name[] = "memory_attention_forward";
    *c = (struct memory_attention_call){
        .q = args[F_Q],
        .k = args[F_K],
        .v = args[F_V],
        .o = args[F_O],
        .index = args[F_INDEX],
        .weight = args[F_WEIGHT],
        .lse = args[F_LSE],
        .q_offsets = args[F_OFFSETS].data,
        .kv_start = args[F_START].data,
        .kv_first = args[F_FIRST].data,
        .kv_length = args[F_LENGTH].data,
        .kv_position = args[F_POSITION].data,
        .sequences = args[F_START].shape[0],
        .rows = args[F_Q].shape[0],
        .heads = args[F_Q].shape[1],
        .kv_heads = args[F_K].shape[1],
        .width = args[F_Q].shape[2],
        .top = args[F_INDEX].shape[2],
        .params = *(const struct memory_attention_params *)params,
    };
    const struct memory_attention_params *p = &c->params;
    tril_status st = attention_check_heads(c->heads, c->kv_heads, c->width, name, err);
    if (st != TRIL_OK)
        return st;
    if (c->top < 1 || c->top > 1024)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument index has room for %lld keys a row; it must be 1 to 1024",
                         name, (long long)c->top);
    if (!isfinite(p->scale) || p->segment < 0 || p->capacity < 0 || p->ring < 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the scale %g must be finite, the segment %lld and the capacity %lld "
                         "0 or more, the ring %lld at least 1",
                         name, (double)p->scale, (long long)p->segment, (long long)p->capacity,
                         (long long)p->ring);
    for (int64_t s = 0; s < c->sequences && st == TRIL_OK; s++) {
        int64_t start = c->kv_start[s], first = c->kv_first[s], length = c->kv_length[s];
        st = attention_check_span(c->q_offsets, s, c->rows, name, err);
        /* A ring that is not full yet may end at its last entry. */
        int64_t rows = first + length > p->ring ? p->ring : first + length;
        if (st == TRIL_OK && (start < 0 || first < 0 || first >= p->ring || length < 0 ||
                              length > p->ring || start + rows > c->k.shape[0]))
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "%s: the memory of sequence %lld (start %lld, first %lld, %lld entries, "
                           "ring of %lld) lies outside the %lld rows of k",
                           name, (long long)s, (long long)start, (long long)first,
                           (long long)length, (long long)p->ring, (long long)c->k.shape[0]);
        if (st == TRIL_OK && c->kv_position[s] < 0)
            st = error_set(err, TRIL_ERR_ARGUMENT, "%s: kv_position of sequence %lld is negative",
                           name, (long long)s);
    }
    return st;
}

tril_status memory_attention_unpack_backward(struct memory_attention_gradient *c,
                                             const struct tensor *args, const void *params,
                                             struct tril_error *err) {
    static const char name[] = "memory_attention_backward";
    *c = (struct memory_attention_gradient){
        .k = args[B_K],
        .v = args[B_V],
        .index = args[B_INDEX],
        .weight = args[B_WEIGHT],
        .o = args[B_O],
        .dout = args[B_DO],
        .dq = args[B_DQ],
        .rows = args[B_O].shape[0],
        .heads = args[B_O].shape[1],
        .kv_heads = args[B_K].shape[1],
        .width = args[B_K].shape[2],
        .top = args[B_INDEX].shape[2],
        .scale = ((const struct memory_attention_params *)params)->scale,
    };
    tril_status st = attention_check_heads(c->heads, c->kv_heads, c->width, name, err);
    const int32_t *index = c->index.data;
    for (int64_t e = 0; e < c->rows * c->heads * c->top && st == TRIL_OK; e++)
        if (index[e] < -1 || index[e] >= c->k.shape[0])
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "%s: index[%lld] is %d; it must be -1 or one of the %lld rows of k",
                           name, (long long)e, index[e], (long long)c->k.shape[0]);
    return st;
}

/* ------------------------------------------------------------------ reference */

/* The best entries so far, best first. */
struct found {
    double score;
    int64_t entry;
};

static void insert(struct found *best, int64_t *count, int64_t top, double score, int64_t entry) {
    int64_t at = *count;
    while (at > 0 && score > best[at - 1].score) /* equal: the older one stays before */
        at--;
    if (at >= top)
        return;
    *count = *count < top ? *count + 1 : top;
    for (int64_t i = *count - 1; i > at; i--)
        best[i] = best[i - 1];
    best[at] = (struct found){score, entry};
}

static void forward_row(const struct memory_attention_call *c, int64_t s, int64_t i, int64_t h,
                        struct found *best, double *out) {
    int64_t n = c->q_offsets[s] + i, kv_head = h / (c->heads / c->kv_heads), d = c->width;
    int64_t begin, end, count = 0, at = (n * c->heads + h) * c->top;
    double sum = 0;
    memory_seen(c, s, i, &begin, &end);
    for (int64_t e = begin; e < end; e++) {
        double score = 0;
        for (int64_t t = 0; t < d; t++)
            score += ref_at3(&c->q, n, h, t) * ref_at3(&c->k, memory_row(c, s, e), kv_head, t);
        insert(best, &count, c->top, score * (double)c->params.scale, e);
    }
    double maximum = count ? best[0].score : 0;
    for (int64_t x = 0; x < count; x++)
        sum += exp(best[x].score - maximum);
    for (int64_t x = 1; x < count; x++) /* by age */
        for (int64_t y = x; y > 0 && best[y].entry < best[y - 1].entry; y--) {
            struct found other = best[y];
            best[y] = best[y - 1];
            best[y - 1] = other;
        }
    for (int64_t t = 0; t < d; t++)
        out[t] = 0;
    for (int64_t x = 0; x < c->top; x++) {
        int64_t row = x < count ? memory_row(c, s, best[x].entry) : -1;
        double w = x < count ? exp(best[x].score - maximum) / sum : 0;
        ((int32_t *)c->index.data)[at + x] = (int32_t)row;
        ref_put(&c->weight, at + x, w);
        for (int64_t t = 0; t < d && x < count; t++)
            out[t] += w * ref_at3(&c->v, row, kv_head, t);
    }
    for (int64_t t = 0; t < d; t++)
        ref_put(&c->o, ref_offset3(&c->o, n, h, t), out[t]);
    if (c->lse.data)
        ref_put(&c->lse, h * c->rows + n, count ? maximum + log(sum) : -INFINITY);
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *args,
                                     const void *params, struct tril_error *err) {
    struct memory_attention_call c;
    void *memory = NULL;
    tril_status st;
    TRY(memory_attention_unpack(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    TRY(mem_alloc(&memory, (size_t)c.top * sizeof(struct found) + (size_t)c.width * sizeof(double),
                  "the keys found", err));
    struct found *best = memory;
    double *out = (double *)(void *)(best + c.top);
    ref_zero_rows(&c.o, 0, c.rows);
    for (int64_t e = 0; e < c.rows * c.heads * c.top; e++) {
        ((int32_t *)c.index.data)[e] = -1;
        ref_put(&c.weight, e, 0);
    }
    for (int64_t e = 0; c.lse.data && e < c.heads * c.rows; e++)
        ref_put(&c.lse, e, -INFINITY);
    for (int64_t s = 0; s < c.sequences; s++)
        for (int64_t i = 0; i < c.q_offsets[s + 1] - c.q_offsets[s]; i++)
            for (int64_t h = 0; h < c.heads; h++)
                forward_row(&c, s, i, h, best, out);
done:
    mem_free(memory);
    return st;
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *args,
                                      const void *params, struct tril_error *err) {
    struct memory_attention_gradient c;
    double x[256];
    tril_status st;
    TRY(memory_attention_unpack_backward(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    for (int64_t n = 0; n < c.rows; n++)
        for (int64_t h = 0; h < c.heads; h++) {
            int64_t kv_head = h / (c.heads / c.kv_heads), at = (n * c.heads + h) * c.top;
            double delta = 0;
            for (int64_t t = 0; t < c.width; t++) {
                delta += ref_at3(&c.dout, n, h, t) * ref_at3(&c.o, n, h, t);
                x[t] = 0;
            }
            for (int64_t e = 0; e < c.top; e++) {
                int64_t row = ((const int32_t *)c.index.data)[at + e];
                if (row < 0)
                    continue;
                double dp = 0;
                for (int64_t t = 0; t < c.width; t++)
                    dp += ref_at3(&c.dout, n, h, t) * ref_at3(&c.v, row, kv_head, t);
                double ds = ref_at(&c.weight, at + e) * (dp - delta) * (double)c.scale;
                for (int64_t t = 0; t < c.width; t++)
                    x[t] += ds * ref_at3(&c.k, row, kv_head, t);
            }
            for (int64_t t = 0; t < c.width; t++)
                ref_add(&c.dq, ref_offset3(&c.dq, n, h, t), x[t]);
        }
done:
    return st;
}

/* ------------------------------------------------------------------ test and benchmark cases */

static const struct shape_case {
    const char *label;
    int n, m, h, k, d, s, top, segment, capacity;
    bool wrapped, lse, strided;
    enum dtype act;
} shapes[] = {
    {"memory", 7, 40, 2, 2, 5, 1, 4, 0, 0, false, true, false, DT_F32},
    {"segments", 11, 23, 4, 2, 6, 1, 3, 4, 0, true, true, true, DT_F32},
    {"capacity", 12, 30, 2, 1, 4, 2, 5, 3, 6, true, true, false, DT_F32},
    {"fewer than top", 6, 9, 2, 2, 3, 1, 16, 4, 0, true, false, false, DT_F32},
    {"nothing seen", 5, 5, 1, 1, 4, 1, 2, 8, 0, false, true, false, DT_F32},
    {"one row", 1, 150, 4, 2, 8, 1, 32, 0, 100, true, true, true, DT_F32},
    {"top 32 bf16", 70, 300, 4, 2, 32, 1, 32, 16, 200, true, true, true, DT_BF16},
    {"packed bf16", 40, 210, 2, 2, 24, 3, 8, 0, 0, true, false, false, DT_BF16},
};

static struct memory_attention_params case_of(const struct shape_case *s, int64_t rows) {
    return (struct memory_attention_params){.scale = (float)(1 / sqrt(s->d)),
                                            .segment = s->segment,
                                            .capacity = s->capacity,
                                            .ring = rows};
}

static bool make_case(int index, struct op_case *out) {
    if (index >= (int)(sizeof shapes / sizeof shapes[0]))
        return false;
    const struct shape_case *s = &shapes[index];
    *out = (struct op_case){.label = s->label, .act = s->act};
    out->size['N'] = s->n;
    out->size['M'] = s->m;
    out->size['H'] = s->h;
    out->size['K'] = s->k;
    out->size['d'] = s->d;
    out->size['S'] = s->s;
    out->size['T'] = s->top;
    struct memory_attention_params p = case_of(s, s->m / s->s);
    case_params(out, &p, sizeof p);
    return true;
}

static bool forward_case(int index, struct op_case *out) {
    if (!make_case(index, out))
        return false;
    out->absent = shapes[index].lse ? 0 : 1u << F_LSE;
    if (shapes[index].strided)
        out->strided = 1u << F_Q | 1u << F_K | 1u << F_V | 1u << F_O;
    return true;
}

static bool backward_case(int index, struct op_case *out) {
    if (!make_case(index, out))
        return false;
    if (shapes[index].strided)
        out->strided = 1u << B_K | 1u << B_V | 1u << B_O | 1u << B_DO | 1u << B_DQ;
    return true;
}

/* Rings side by side, each begun in its middle when its case says so; full but for some rows. */
static void fill(const struct op_case *c, struct tensor *args, const struct random_key *key) {
    (void)key;
    int32_t *offsets = args[F_OFFSETS].data;
    struct memory_attention_params p;
    memcpy(&p, c->params, sizeof p);
    bool wrapped = false;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        if (shapes[i].label == c->label)
            wrapped = shapes[i].wrapped;
    int64_t sequences = c->size['S'];
    for (int64_t s = 0; s <= sequences; s++)
        offsets[s] = (int32_t)(c->size['N'] * s * (s + 1) / (sequences * (sequences + 1)));
    for (int64_t s = 0; s < sequences; s++) {
        ((int32_t *)args[F_START].data)[s] = (int32_t)(s * p.ring);
        ((int32_t *)args[F_FIRST].data)[s] = (int32_t)(wrapped ? p.ring * 2 / 3 : 0);
        ((int32_t *)args[F_LENGTH].data)[s] = (int32_t)(p.ring - (s > 0));
        ((int32_t *)args[F_POSITION].data)[s] = (int32_t)(wrapped ? 5 + s : 0);
    }
}

static double forward_flops(const struct tensor *args, const void *params) {
    struct memory_attention_call c;
    double pairs = 0;
    if (memory_attention_unpack(&c, args, params, NULL) != TRIL_OK)
        return 0;
    for (int64_t s = 0; s < c.sequences; s++)
        for (int64_t i = 0; i < c.q_offsets[s + 1] - c.q_offsets[s]; i++) {
            int64_t begin, end;
            memory_seen(&c, s, i, &begin, &end);
            pairs += (double)(end - begin + c.top);
        }
    return 2 * pairs * (double)c.width * (double)c.heads;
}
static double backward_flops(const struct tensor *args, const void *params) {
    (void)params;
    return 4 * (double)tensor_count(&args[B_WEIGHT]) * (double)args[B_K].shape[2];
}

static double reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)(args[F_Q].shape[2] + args[F_INDEX].shape[2]);
}
static double backward_reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)(args[B_K].shape[2] + args[B_INDEX].shape[2]);
}

const struct op_info op_info_memory_attention_forward = {
    .id = OP_MEMORY_ATTENTION_FORWARD,
    .name = "memory_attention_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .test_case = forward_case,
    .test_fill = fill,
    .flops = forward_flops,
    .reduction = reduction,
    .scratch_first = true,
};

const struct op_info op_info_memory_attention_backward = {
    .id = OP_MEMORY_ATTENTION_BACKWARD,
    .name = "memory_attention_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .test_case = backward_case,
    .flops = backward_flops,
    .reduction = backward_reduction,
    .scratch_first = true,
};

/* ------------------------------------------------------------------ typed calls */

tril_status memory_attention_forward(struct op_context *ctx,
                                     const struct memory_attention_inputs *in, struct tensor o,
                                     struct tensor index, struct tensor weight, struct tensor lse,
                                     struct memory_attention_params p, struct tril_error *err) {
    struct tensor args[] = {
        in->q,         in->k,           in->v, in->q_offsets, in->kv_start, in->kv_first,
        in->kv_length, in->kv_position, o,     index,         weight,       lse};
    return op_call(ctx, OP_MEMORY_ATTENTION_FORWARD, args, &p, err);
}

tril_status memory_attention_backward(struct op_context *ctx, struct tensor k, struct tensor v,
                                      struct tensor index, struct tensor weight, struct tensor o,
                                      struct tensor dout, struct tensor dq, float scale,
                                      struct tril_error *err) {
    struct tensor args[] = {k, v, index, weight, o, dout, dq};
    struct memory_attention_params p = {.scale = scale};
    return op_call(ctx, OP_MEMORY_ATTENTION_BACKWARD, args, &p, err);
}
