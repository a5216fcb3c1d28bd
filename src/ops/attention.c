/* Attention: description, argument checks, typed calls and the scalar reference, forward and
 * backward side by side. Everything is computed in double, row by row, exactly as the formulas in
 * ops.h say; nothing here is fast. */
#include "ops/attention.h"

#include <math.h>
#include <string.h>

#include "base/memory.h"
#include "ops/reference.h"

/* ------------------------------------------------------------------ arguments */

static const struct op_arg forward_args[] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_start", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"pages", "S P", ARG_IN, DT_MASK(DT_I32), .optional = true},
    {"slopes", "H", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"step", "1", ARG_IN, DT_MASK(DT_I64), .optional = true},
    {"o", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"lse", "H N", ARG_OUT, DT_MASK(DT_F32), .optional = true},
};
enum { F_Q, F_K, F_V, F_OFFSETS, F_START, F_LENGTH, F_PAGES, F_SLOPES, F_STEP, F_O, F_LSE, F_ARGS };

static const struct op_arg backward_args[] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_start", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"slopes", "H", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"step", "1", ARG_IN, DT_MASK(DT_I64), .optional = true},
    {"o", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"lse", "H N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"do", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"dq", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"dk", "M K d", ARG_OUT, DT_ACT, .strided = true},
    {"dv", "M K d", ARG_OUT, DT_ACT, .strided = true},
};
enum {
    B_Q,
    B_K,
    B_V,
    B_OFFSETS,
    B_START,
    B_LENGTH,
    B_SLOPES,
    B_STEP,
    B_O,
    B_LSE,
    B_DO,
    B_DQ,
    B_DK,
    B_DV,
    B_ARGS
};

static tril_status check_shapes(const struct attention_call *c, const char *name,
                                struct tril_error *err) {
    const struct attention_params *p = c->params;
    if (c->heads < 1 || c->kv_heads < 1 || c->heads % c->kv_heads != 0)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: %lld query heads are not a multiple of %lld key/value heads; give a "
                         "number of key/value heads that divides the query heads",
                         name, (long long)c->heads, (long long)c->kv_heads);
    if (c->width < 1 || c->width > 256)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: the head width is %lld; it must be 1 to 256",
                         name, (long long)c->width);
    if (c->k.dtype != c->v.dtype)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: k is %s but v is %s; give both one dtype",
                         name, dtype_name(c->k.dtype), dtype_name(c->v.dtype));
    if (c->rows > INT32_MAX || c->keys > INT32_MAX)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: more than 2^31 rows", name);
    if (!(p->dropout >= 0.0f && p->dropout < 1.0f))
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: the dropout probability %g is not in [0, 1)",
                         name, (double)p->dropout);
    if (!isfinite(p->scale) || !(p->softcap >= 0.0f) || !isfinite(p->softcap))
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "%s: the scale %g and the softcap %g must be finite, the softcap 0 or more", name,
            (double)p->scale, (double)p->softcap);
    return TRIL_OK;
}

static tril_status check_sequence(struct attention_call *c, int64_t s, const char *name,
                                  struct tril_error *err) {
    int64_t begin = c->q_offsets[s], end = c->q_offsets[s + 1], length = c->kv_length[s];
    if (begin < 0 || end < begin || end > c->rows)
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "%s: q_offsets of sequence %lld are %lld and %lld; they must ascend and lie "
            "in 0..%lld",
            name, (long long)s, (long long)begin, (long long)end, (long long)c->rows);
    if (length < 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: kv_length of sequence %lld is negative", name,
                         (long long)s);
    if (end - begin > c->longest_q)
        c->longest_q = end - begin;
    if (length > c->longest_kv)
        c->longest_kv = length;
    if (!c->pages) {
        if (c->kv_start[s] < 0 || c->kv_start[s] + length > c->keys)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: keys %lld..%lld of sequence %lld lie outside the %lld rows of k",
                             name, (long long)c->kv_start[s], (long long)(c->kv_start[s] + length),
                             (long long)s, (long long)c->keys);
        return TRIL_OK;
    }
    int64_t size = c->params->page_size, used = (length + size - 1) / size;
    if (used > c->page_columns)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: sequence %lld has %lld keys but its table holds %lld pages of %lld",
                         name, (long long)s, (long long)length, (long long)c->page_columns,
                         (long long)size);
    for (int64_t i = 0; i < used; i++) {
        int64_t page = c->pages[s * c->page_columns + i];
        int64_t last = i == used - 1 ? (length - 1) % size : size - 1;
        if (page < 0 || page * size + last >= c->keys)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: page %lld of sequence %lld is %lld, outside the %lld rows of k",
                             name, (long long)i, (long long)s, (long long)page, (long long)c->keys);
    }
    return TRIL_OK;
}

static tril_status unpack(struct attention_call *c, const struct tensor *step, const char *name,
                          struct tril_error *err) {
    c->rows = c->q.shape[0];
    c->keys = c->k.shape[0];
    c->heads = c->q.shape[1];
    c->kv_heads = c->k.shape[1];
    c->width = c->q.shape[2];
    c->key = c->params->key;
    if (step->data)
        c->key.step = (uint64_t) * (const int64_t *)step->data;
    tril_status st = check_shapes(c, name, err);
    if (st == TRIL_OK && c->pages && c->params->page_size < 1)
        st = error_set(err, TRIL_ERR_ARGUMENT, "%s: a page table needs a page size of 1 or more",
                       name);
    for (int64_t s = 0; s < c->sequences && st == TRIL_OK; s++)
        st = check_sequence(c, s, name, err);
    return st;
}

tril_status attention_unpack_forward(struct attention_call *c, const struct tensor *args,
                                     const struct attention_params *p, struct tril_error *err) {
    *c = (struct attention_call){
        .q = args[F_Q],
        .k = args[F_K],
        .v = args[F_V],
        .o = args[F_O],
        .lse = args[F_LSE],
        .slopes = args[F_SLOPES],
        .q_offsets = args[F_OFFSETS].data,
        .kv_start = args[F_START].data,
        .kv_length = args[F_LENGTH].data,
        .pages = args[F_PAGES].data,
        .sequences = args[F_START].shape[0],
        .page_columns = args[F_PAGES].data ? args[F_PAGES].shape[1] : 0,
        .params = p,
    };
    return unpack(c, &args[F_STEP], "attention_forward", err);
}

tril_status attention_unpack_backward(struct attention_call *c, const struct tensor *args,
                                      const struct attention_params *p, struct tril_error *err) {
    *c = (struct attention_call){
        .q = args[B_Q],
        .k = args[B_K],
        .v = args[B_V],
        .o = args[B_O],
        .lse = args[B_LSE],
        .slopes = args[B_SLOPES],
        .dout = args[B_DO],
        .dq = args[B_DQ],
        .dk = args[B_DK],
        .dv = args[B_DV],
        .q_offsets = args[B_OFFSETS].data,
        .kv_start = args[B_START].data,
        .kv_length = args[B_LENGTH].data,
        .sequences = args[B_START].shape[0],
        .params = p,
    };
    tril_status st = unpack(c, &args[B_STEP], "attention_backward", err);
    for (int64_t s = 0; s + 1 < c->sequences && st == TRIL_OK; s++)
        if (c->kv_start[s] + c->kv_length[s] > c->kv_start[s + 1])
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "attention_backward: the keys of sequences %lld and %lld overlap; their "
                           "gradients need ascending, disjoint ranges",
                           (long long)s, (long long)(s + 1));
    return st;
}

double attention_pairs(const struct attention_call *c) {
    double pairs = 0;
    for (int64_t s = 0; s < c->sequences; s++) {
        int64_t n = c->q_offsets[s + 1] - c->q_offsets[s], length = c->kv_length[s];
        if (!c->params->causal) {
            pairs += (double)n * (double)length;
            continue;
        }
        /* Query i sees length - n + i + 1 keys; those with none or fewer are cut off. */
        double rows = (double)(n < length ? n : length);
        pairs += rows * ((double)length - (rows - 1) / 2);
    }
    return pairs * (double)c->heads;
}

/* ------------------------------------------------------------------ reference */

/* Offset of element 0 of vector [row, head] of a [rows, heads, d] tensor. */
static int64_t at(const struct tensor *t, int64_t row, int64_t head) {
    return row * t->stride[0] + head * t->stride[1];
}

static double dot(const struct tensor *a, int64_t ia, const struct tensor *b, int64_t ib,
                  int64_t n) {
    double sum = 0;
    for (int64_t t = 0; t < n; t++)
        sum += ref_at(a, ia + t) * ref_at(b, ib + t);
    return sum;
}

/* Score of query i and key j of sequence s; *slope_in (optional) receives the derivative of the
 * score with respect to q.k. */
static double score(const struct attention_call *c, int64_t s, int64_t i, int64_t j, int64_t h,
                    double *slope_in) {
    const struct attention_params *p = c->params;
    int64_t n = c->q_offsets[s] + i, key = attention_key_row(c, s, j);
    int64_t group = c->heads / c->kv_heads;
    double x =
        (double)p->scale * dot(&c->q, at(&c->q, n, h), &c->k, at(&c->k, key, h / group), c->width);
    double slope = (double)p->scale;
    if (p->softcap > 0) {
        double t = tanh(x / (double)p->softcap);
        x = (double)p->softcap * t;
        slope *= 1 - t * t;
    }
    if (c->slopes.data) {
        int64_t length = c->kv_length[s], own = c->q_offsets[s + 1] - c->q_offsets[s];
        x -= ref_at(&c->slopes, h) * fabs((double)(length - own + i - j));
    }
    if (slope_in)
        *slope_in = slope;
    return x;
}

/* What multiplies a probability: 1, or with dropout 0 or 1 / (1 - p). */
static double kept(const struct attention_call *c, int64_t h, int64_t n, int64_t j) {
    float p = c->params->dropout;
    if (p == 0)
        return 1;
    return random_uniform(&c->key, attention_dropout_element(c, h, n, j)) >= p ? 1 / (1 - (double)p)
                                                                               : 0;
}

static void zero_rows(const struct tensor *t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t i = 0; i < t->shape[2]; i++)
                ref_put(t, at(t, r, h) + i, 0);
}

static void forward_row(const struct attention_call *c, int64_t s, int64_t i, int64_t h,
                        double *probability, double *out) {
    int64_t n = c->q_offsets[s] + i, seen = attention_visible(c, s, i);
    int64_t kv_head = h / (c->heads / c->kv_heads), d = c->width;
    double maximum = -INFINITY, sum = 0;
    for (int64_t j = 0; j < seen; j++) {
        probability[j] = score(c, s, i, j, h, NULL);
        maximum = fmax(maximum, probability[j]);
    }
    for (int64_t t = 0; t < d; t++)
        out[t] = 0;
    for (int64_t j = 0; j < seen; j++) {
        double e = exp(probability[j] - maximum);
        sum += e;
        int64_t v = at(&c->v, attention_key_row(c, s, j), kv_head);
        e *= kept(c, h, n, j);
        for (int64_t t = 0; t < d; t++)
            out[t] += e * ref_at(&c->v, v + t);
    }
    for (int64_t t = 0; t < d; t++)
        ref_put(&c->o, at(&c->o, n, h) + t, seen ? out[t] / sum : 0);
    if (c->lse.data)
        ref_put(&c->lse, h * c->rows + n, seen ? maximum + log(sum) : -INFINITY);
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *args,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    struct attention_call c;
    void *memory = NULL;
    tril_status st;
    TRY(attention_unpack_forward(&c, args, params, err));
    TRY(mem_alloc(&memory, (size_t)(c.longest_kv + c.width) * sizeof(double),
                  "a row of attention scores", err));
    double *out = memory, *probability = out + c.width;
    int64_t next = 0; /* rows before this are written */
    for (int64_t s = 0; s <= c.sequences; s++) {
        int64_t begin = s < c.sequences ? c.q_offsets[s] : c.rows;
        int64_t end = s < c.sequences ? c.q_offsets[s + 1] : c.rows;
        zero_rows(&c.o, next, begin);
        for (int64_t n = next; c.lse.data && n < begin; n++)
            for (int64_t h = 0; h < c.heads; h++)
                ref_put(&c.lse, h * c.rows + n, -INFINITY);
        for (int64_t n = begin; n < end; n++)
            for (int64_t h = 0; h < c.heads; h++)
                forward_row(&c, s, n - begin, h, probability, out);
        next = end > next ? end : next;
    }
done:
    mem_free(memory);
    return st;
}

/* One query row's share of dq, dk, dv. dq [d] is overwritten; dk, dv [keys of s, d] accumulate. */
static void backward_row(const struct attention_call *c, int64_t s, int64_t i, int64_t h,
                         double *dq, double *dk, double *dv) {
    int64_t n = c->q_offsets[s] + i, seen = attention_visible(c, s, i), d = c->width;
    int64_t kv_head = h / (c->heads / c->kv_heads);
    int64_t q = at(&c->q, n, h), o = at(&c->o, n, h), g = at(&c->dout, n, h);
    double lse = ref_at(&c->lse, h * c->rows + n), delta = dot(&c->dout, g, &c->o, o, d);
    memset(dq, 0, (size_t)d * sizeof(double));
    for (int64_t j = 0; j < seen; j++) {
        int64_t row = attention_key_row(c, s, j);
        int64_t k = at(&c->k, row, kv_head), v = at(&c->v, row, kv_head);
        double slope, p = exp(score(c, s, i, j, h, &slope) - lse), keep = kept(c, h, n, j);
        double ds = p * (keep * dot(&c->dout, g, &c->v, v, d) - delta) * slope;
        for (int64_t t = 0; t < d; t++) {
            dv[j * d + t] += p * keep * ref_at(&c->dout, g + t);
            dk[j * d + t] += ds * ref_at(&c->q, q + t);
            dq[t] += ds * ref_at(&c->k, k + t);
        }
    }
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *args,
                                      const void *params, struct tril_error *err) {
    (void)ctx;
    struct attention_call c;
    void *memory = NULL;
    tril_status st;
    TRY(attention_unpack_backward(&c, args, params, err));
    int64_t d = c.width, group = c.heads / c.kv_heads;
    TRY(mem_alloc(&memory, (size_t)((2 * c.longest_kv + 1) * d) * sizeof(double),
                  "the gradients of one key/value head", err));
    double *dq = memory, *dk = dq + d, *dv = dk + c.longest_kv * d;
    int64_t next_q = 0, next_k = 0; /* rows before these are written */
    for (int64_t s = 0; s < c.sequences; s++) {
        int64_t length = c.kv_length[s], start = c.kv_start[s];
        zero_rows(&c.dq, next_q, c.q_offsets[s]);
        zero_rows(&c.dk, next_k, start);
        zero_rows(&c.dv, next_k, start);
        next_q = c.q_offsets[s + 1];
        next_k = start + length;
        for (int64_t kv_head = 0; kv_head < c.kv_heads; kv_head++) {
            memset(dk, 0, (size_t)(length * d) * sizeof(double));
            memset(dv, 0, (size_t)(length * d) * sizeof(double));
            for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
                for (int64_t n = c.q_offsets[s]; n < c.q_offsets[s + 1]; n++) {
                    backward_row(&c, s, n - c.q_offsets[s], h, dq, dk, dv);
                    for (int64_t t = 0; t < d; t++)
                        ref_put(&c.dq, at(&c.dq, n, h) + t, dq[t]);
                }
            for (int64_t j = 0; j < length; j++)
                for (int64_t t = 0; t < d; t++) {
                    ref_put(&c.dk, at(&c.dk, start + j, kv_head) + t, dk[j * d + t]);
                    ref_put(&c.dv, at(&c.dv, start + j, kv_head) + t, dv[j * d + t]);
                }
        }
    }
    zero_rows(&c.dq, next_q, c.rows);
    zero_rows(&c.dk, next_k, c.keys);
    zero_rows(&c.dv, next_k, c.keys);
done:
    mem_free(memory);
    return st;
}

/* ------------------------------------------------------------------ test and benchmark cases */

/* N query rows in S sequences against M rows of keys; P > 0: paged. Sequence lengths are spread
 * unevenly by fill(). */
struct shape_case {
    const char *label;
    int n, m, h, k, d, s, p;
    bool causal, alibi;
    float softcap, dropout;
    enum dtype act;
};

static const struct shape_case forward_shapes[] = {
    {"causal", 33, 33, 4, 4, 16, 1, 0, true, false, 0, 0, DT_F32},
    {"causal bf16", 65, 65, 4, 2, 64, 2, 0, true, false, 0, 0, DT_BF16},
    {"full", 20, 47, 3, 1, 7, 1, 0, false, false, 0, 0, DT_F32},
    {"longer keys", 5, 130, 2, 2, 80, 1, 0, true, false, 0, 0, DT_F32},
    {"shorter keys", 40, 23, 2, 1, 33, 1, 0, true, false, 0, 0, DT_F32},
    {"packed", 100, 100, 2, 2, 32, 5, 0, true, true, 0, 0, DT_F32},
    {"paged", 6, 160, 4, 2, 128, 3, 10, true, false, 0, 0, DT_F32},
    {"softcap", 30, 30, 2, 2, 40, 1, 0, true, true, 1.5f, 0, DT_F32},
    {"dropout", 48, 48, 2, 1, 24, 2, 0, true, false, 0, 0.25f, DT_F32},
    {"one row", 1, 300, 6, 2, 64, 1, 0, true, false, 0, 0, DT_BF16},
    {"one channel", 9, 9, 1, 1, 1, 1, 0, true, false, 0, 0, DT_F32},
    {"wide", 70, 70, 1, 1, 256, 1, 0, true, false, 0, 0, DT_F32},
};
static const struct shape_case backward_shapes[] = {
    {"causal", 13, 13, 2, 2, 6, 1, 0, true, false, 0, 0, DT_F32},
    {"causal bf16", 65, 65, 4, 2, 64, 2, 0, true, false, 0, 0, DT_BF16},
    {"grouped", 12, 12, 4, 2, 5, 2, 0, true, true, 0, 0, DT_F32},
    {"full", 9, 17, 3, 1, 7, 1, 0, false, false, 0, 0, DT_F32},
    {"shorter keys", 12, 7, 2, 1, 3, 1, 0, true, false, 0, 0, DT_F32},
    {"softcap", 10, 10, 2, 2, 4, 1, 0, true, false, 1.5f, 0, DT_F32},
    {"dropout", 16, 16, 2, 1, 8, 2, 0, true, false, 0, 0.25f, DT_F32},
    {"packed", 100, 100, 2, 1, 32, 5, 0, true, false, 0, 0, DT_F32},
    {"wide", 40, 40, 1, 1, 256, 1, 0, true, false, 0, 0, DT_F32},
};

#define TEST_PAGE_SIZE 16

static void fill_case(const struct shape_case *s, struct op_case *out, int pages, int slopes,
                      int step) {
    *out = (struct op_case){.label = s->label, .act = s->act};
    out->size['N'] = s->n;
    out->size['M'] = s->m;
    out->size['H'] = s->h;
    out->size['K'] = s->k;
    out->size['d'] = s->d;
    out->size['S'] = s->s;
    out->size['P'] = s->p ? s->p : 1;
    struct attention_params p = {
        .scale = 1.0f / sqrtf((float)s->d),
        .softcap = s->softcap,
        .causal = s->causal,
        .page_size = s->p ? TEST_PAGE_SIZE : 0,
        .dropout = s->dropout,
        .key = {.seed = 7, .step = 3, .layer = 1, .op = RANDOM_DROPOUT_ATTENTION},
    };
    _Static_assert(sizeof p <= sizeof out->params, "parameters fit a test case");
    memcpy(out->params, &p, sizeof p);
    if (!s->p && pages >= 0)
        out->absent |= 1u << pages;
    if (!s->alibi)
        out->absent |= 1u << slopes;
    if (s->dropout == 0)
        out->absent |= 1u << step;
}

static bool forward_case(int index, struct op_case *out) {
    if (index >= (int)(sizeof forward_shapes / sizeof forward_shapes[0]))
        return false;
    fill_case(&forward_shapes[index], out, F_PAGES, F_SLOPES, F_STEP);
    return true;
}

static bool backward_case(int index, struct op_case *out) {
    if (index >= (int)(sizeof backward_shapes / sizeof backward_shapes[0]))
        return false;
    fill_case(&backward_shapes[index], out, -1, B_SLOPES, B_STEP);
    return true;
}

/* Sequence s of S gets rows in proportion to s + 1, so that lengths differ and odd ones occur. */
static void spread(int32_t *offsets, int64_t sequences, int64_t total) {
    int64_t weight = sequences * (sequences + 1) / 2;
    for (int64_t s = 0; s <= sequences; s++)
        offsets[s] = (int32_t)(total * (s * (s + 1) / 2) / weight);
}

static void fill(const struct op_case *c, struct tensor *args, const struct random_key *key,
                 int slopes, int step, bool backward) {
    int64_t sequences = c->size['S'], keys = c->size['M'];
    int32_t *start = args[F_START].data, *length = args[F_LENGTH].data;
    spread(args[F_OFFSETS].data, sequences, c->size['N']);
    for (int64_t s = 0; s < sequences; s++) {
        int64_t a = keys * (s * (s + 1) / 2) / (sequences * (sequences + 1) / 2);
        int64_t b = keys * ((s + 1) * (s + 2) / 2) / (sequences * (sequences + 1) / 2);
        start[s] = (int32_t)a;
        length[s] = (int32_t)(b - a);
    }
    if (!backward && args[F_PAGES].data) { /* pages in reverse order, the last one not full */
        int64_t columns = c->size['P'], count = keys / TEST_PAGE_SIZE;
        int32_t *pages = args[F_PAGES].data;
        for (int64_t s = 0, next = 0; s < sequences; s++)
            for (int64_t i = 0; i < columns; i++, next++)
                pages[s * columns + i] = (int32_t)(count - 1 - next % count);
        for (int64_t s = 0; s < sequences; s++)
            if (length[s] > columns * TEST_PAGE_SIZE)
                length[s] = (int32_t)(columns * TEST_PAGE_SIZE);
    }
    if (args[slopes].data)
        for (int64_t h = 0; h < c->size['H']; h++)
            ref_put(&args[slopes], h, exp2(-8.0 * (double)(h + 1) / (double)c->size['H']));
    if (args[step].data)
        *(int64_t *)args[step].data = (int64_t)(random_u32(key, 0) % 1000);
}

static void forward_fill(const struct op_case *c, struct tensor *args,
                         const struct random_key *key) {
    fill(c, args, key, F_SLOPES, F_STEP, false);
}

static void backward_fill(const struct op_case *c, struct tensor *args,
                          const struct random_key *key) {
    fill(c, args, key, B_SLOPES, B_STEP, true);
}

static double forward_flops(const struct tensor *args, const void *params) {
    struct attention_call c;
    if (attention_unpack_forward(&c, args, params, NULL) != TRIL_OK)
        return 0;
    return 4.0 * (double)c.width * attention_pairs(&c);
}

static double backward_flops(const struct tensor *args, const void *params) {
    struct attention_call c;
    if (attention_unpack_backward(&c, args, params, NULL) != TRIL_OK)
        return 0;
    return 10.0 * (double)c.width * attention_pairs(&c);
}

static double reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)(args[F_K].shape[0] + args[F_Q].shape[2]);
}

const struct op_info op_info_attention_forward = {
    .id = OP_ATTENTION_FORWARD,
    .name = "attention_forward",
    .args = forward_args,
    .arg_count = F_ARGS,
    .reference = forward_reference,
    .test_case = forward_case,
    .test_fill = forward_fill,
    .flops = forward_flops,
    .reduction = reduction,
    .rounds_intermediates = true,
};

const struct op_info op_info_attention_backward = {
    .id = OP_ATTENTION_BACKWARD,
    .name = "attention_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .test_case = backward_case,
    .test_fill = backward_fill,
    .flops = backward_flops,
    .reduction = reduction,
    .rounds_intermediates = true,
};

/* ------------------------------------------------------------------ typed calls */

tril_status attention_forward(struct op_context *ctx, struct tensor q, struct tensor k,
                              struct tensor v, struct tensor q_offsets, struct tensor kv_start,
                              struct tensor kv_length, struct tensor pages, struct tensor slopes,
                              struct tensor step, struct tensor o, struct tensor lse,
                              const struct attention_params *p, struct tril_error *err) {
    struct tensor args[] = {q, k, v, q_offsets, kv_start, kv_length, pages, slopes, step, o, lse};
    return op_call(ctx, OP_ATTENTION_FORWARD, args, p, err);
}

tril_status attention_backward(struct op_context *ctx, struct tensor q, struct tensor k,
                               struct tensor v, struct tensor q_offsets, struct tensor kv_start,
                               struct tensor kv_length, struct tensor slopes, struct tensor step,
                               struct tensor o, struct tensor lse, struct tensor dout,
                               struct tensor dq, struct tensor dk, struct tensor dv,
                               const struct attention_params *p, struct tril_error *err) {
    struct tensor args[] = {q,    k, v,   q_offsets, kv_start, kv_length, slopes,
                            step, o, lse, dout,      dq,       dk,        dv};
    return op_call(ctx, OP_ATTENTION_BACKWARD, args, p, err);
}
