/* Attention: description, argument checks, typed calls and the scalar reference, forward and
 * backward side by side (test cases: attention_cases.c). Everything is computed in double, row by
 * row, exactly as the formulas in ops.h say; nothing here is fast. */
#include "ops/attention.h"

#include <math.h>
#include <string.h>

#include "base/memory.h"
#include "ops/attention_cases.h"
#include "ops/reference.h"

/* ------------------------------------------------------------------ arguments */

#define DT_CACHE (DT_ACT | DT_MASK(DT_I8))

static const struct op_arg forward_args[F_ARGS] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "M K d", ARG_IN, DT_CACHE, .strided = true},
    {"v", "M K d", ARG_IN, DT_CACHE, .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_start", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"pages", "S P", ARG_IN, DT_MASK(DT_I32), .optional = true},
    {"slopes", "H", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"bias", "G A U", ARG_IN, DT_ACT, .optional = true, .strided = true},
    {"sink", "H", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"k_scale", "M K", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"v_scale", "M K", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"step", "1", ARG_IN, DT_MASK(DT_I64), .optional = true},
    {"o", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"lse", "H N", ARG_OUT, DT_MASK(DT_F32), .optional = true},
};

static const struct op_arg backward_args[B_ARGS] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"q_offsets", "S+1", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_start", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"slopes", "H", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"bias", "G A U", ARG_IN, DT_ACT, .optional = true, .strided = true},
    {"sink", "H", ARG_IN, DT_MASK(DT_F32), .optional = true},
    {"step", "1", ARG_IN, DT_MASK(DT_I64), .optional = true},
    {"o", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"lse", "H N", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"do", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"dq", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"dk", "M K d", ARG_OUT, DT_ACT, .strided = true},
    {"dv", "M K d", ARG_OUT, DT_ACT, .strided = true},
    {"dbias", "G A U", ARG_OUT, DT_MASK(DT_F32), .optional = true, .strided = true},
    {"dsink", "H", ARG_OUT, DT_MASK(DT_F32), .optional = true},
};

tril_status attention_check_heads(int64_t heads, int64_t kv_heads, int64_t width, const char *name,
                                  struct tril_error *err) {
    if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: %lld query heads are not a multiple of %lld key/value heads; give a "
                         "number of key/value heads that divides the query heads",
                         name, (long long)heads, (long long)kv_heads);
    if (width < 1 || width > 256)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: the head width is %lld; it must be 1 to 256",
                         name, (long long)width);
    return TRIL_OK;
}

tril_status attention_check_span(const int32_t *q_offsets, int64_t s, int64_t rows,
                                 const char *name, struct tril_error *err) {
    int64_t begin = q_offsets[s], end = q_offsets[s + 1];
    if (begin < 0 || end < begin || end > rows)
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "%s: q_offsets of sequence %lld are %lld and %lld; they must ascend and lie "
            "in 0..%lld",
            name, (long long)s, (long long)begin, (long long)end, (long long)rows);
    return TRIL_OK;
}

static tril_status check_shapes(const struct attention_call *c, const char *name,
                                struct tril_error *err) {
    const struct attention_params *p = c->params;
    tril_status st = attention_check_heads(c->heads, c->kv_heads, c->width, name, err);
    if (st != TRIL_OK)
        return st;
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
    if ((c->k.dtype == DT_I8) != (c->k_scale.data && c->v_scale.data))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: k and v as i8 need k_scale and v_scale, other dtypes take none",
                         name);
    if (c->bias.data && c->bias.shape[0] != 1 && c->bias.shape[0] != c->heads)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument bias has %lld heads; it must have 1 or %lld", name,
                         (long long)c->bias.shape[0], (long long)c->heads);
    if (c->dbias.data && !c->bias.data)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: argument dbias needs a bias", name);
    if (c->dsink.data && !c->sink.data)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: argument dsink needs a sink", name);
    return TRIL_OK;
}

/* Rules, and a bias large enough, once the longest sequence is known. */
static tril_status check_rules(struct attention_call *c, const char *name, struct tril_error *err) {
    const struct attention_params *p = c->params;
    if (c->bias.data && (c->bias.shape[1] < c->longest_q || c->bias.shape[2] < c->longest_kv))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument bias has %lld rows and %lld columns; the longest sequence "
                         "has %lld queries and %lld keys",
                         name, (long long)c->bias.shape[1], (long long)c->bias.shape[2],
                         (long long)c->longest_q, (long long)c->longest_kv);
    if ((unsigned)p->implementation > ATTENTION_MATERIALISED)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: implementation %d is unknown", name,
                         (int)p->implementation);
    c->plain = true;
    if (!p->rules)
        return TRIL_OK;
    if (p->rule_count < 1)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: the list of visibility rules is empty", name);
    for (int64_t h = 0; p->head_rule && h < c->heads; h++)
        if (p->head_rule[h] >= p->rule_count)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: head %lld has the visibility rule %d of %d", name, (long long)h,
                             (int)p->head_rule[h], (int)p->rule_count);
    for (int32_t k = 0; k < p->rule_count; k++) {
        tril_status st = visible_check(&p->rules[k], c->longest_q, c->longest_kv, name, err);
        if (st != TRIL_OK)
            return st;
        c->plain &= p->rules[k].parts == 0 && p->rules[k].causal == p->rules[0].causal;
    }
    return TRIL_OK;
}

static tril_status check_sequence(struct attention_call *c, int64_t s, const char *name,
                                  struct tril_error *err) {
    int64_t begin = c->q_offsets[s], end = c->q_offsets[s + 1], length = c->kv_length[s];
    tril_status st = attention_check_span(c->q_offsets, s, c->rows, name, err);
    if (st != TRIL_OK)
        return st;
    if (length < 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: kv_length of sequence %lld is negative", name,
                         (long long)s);
    if (end - begin > c->longest_q)
        c->longest_q = end - begin;
    if (length > c->longest_kv)
        c->longest_kv = length;
    if (!c->pages && (c->kv_start[s] < 0 || c->kv_start[s] + length > c->keys))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: keys %lld..%lld of sequence %lld lie outside the %lld rows of k",
                         name, (long long)c->kv_start[s], (long long)(c->kv_start[s] + length),
                         (long long)s, (long long)c->keys);
    return TRIL_OK;
}

static tril_status check_pages(struct attention_call *c, int64_t s, const char *name,
                               struct tril_error *err) {
    int64_t length = c->kv_length[s];
    int64_t size = c->params->page_size, used = length / size + (length % size > 0);
    if (used > c->page_columns)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: sequence %lld has %lld keys but its table holds %lld pages of %lld",
                         name, (long long)s, (long long)length, (long long)c->page_columns,
                         (long long)size);
    for (int64_t i = 0; i < used; i++) {
        int64_t page = c->pages[s * c->page_columns + i];
        int64_t last = i == used - 1 ? (length - 1) % size : size - 1;
        if (page < 0) {
            if (attention_any(c, s, 0, c->heads, 0, attention_own(c, s), i * size,
                              i * size + last + 1))
                return error_set(
                    err, TRIL_ERR_ARGUMENT,
                    "%s: page %lld of sequence %lld is %lld, but the rule lets a query "
                    "see its keys",
                    name, (long long)i, (long long)s, (long long)page);
        } else if (page * size + last >= c->keys)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: page %lld of sequence %lld is %lld, outside the %lld rows of k",
                             name, (long long)i, (long long)s, (long long)page, (long long)c->keys);
    }
    return TRIL_OK;
}

/* Sizes and parameters. */
static tril_status check_sizes(struct attention_call *c, const char *name, struct tril_error *err) {
    c->rows = c->q.shape[0];
    c->keys = c->k.shape[0];
    c->heads = c->q.shape[1];
    c->kv_heads = c->k.shape[1];
    c->width = c->q.shape[2];
    c->key = c->params->key;
    tril_status st = check_shapes(c, name, err);
    if (st == TRIL_OK && c->pages && c->params->page_size < 1)
        st = error_set(err, TRIL_ERR_ARGUMENT, "%s: a page table needs a page size of 1 or more",
                       name);
    return st;
}

tril_status attention_check_unread(struct attention_call *c, const char *name,
                                   struct tril_error *err) {
    tril_status st = check_sizes(c, name, err);
    return st == TRIL_OK ? check_rules(c, name, err) : st;
}

static tril_status unpack(struct attention_call *c, const struct tensor *step, const char *name,
                          struct tril_error *err) {
    tril_status st = check_sizes(c, name, err);
    if (step->data)
        c->key.step = (uint64_t) * (const int64_t *)step->data;
    for (int64_t s = 0; s < c->sequences && st == TRIL_OK; s++)
        st = check_sequence(c, s, name, err);
    if (st == TRIL_OK)
        st = check_rules(c, name, err);
    for (int64_t s = 0; s < c->sequences && c->pages && st == TRIL_OK; s++)
        st = check_pages(c, s, name, err);
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
        .bias = args[F_BIAS],
        .sink = args[F_SINK],
        .k_scale = args[F_K_SCALE],
        .v_scale = args[F_V_SCALE],
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
        .bias = args[B_BIAS],
        .sink = args[B_SINK],
        .dbias = args[B_DBIAS],
        .dsink = args[B_DSINK],
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

bool attention_any(const struct attention_call *c, int64_t s, int64_t h0, int64_t h1, int64_t i0,
                   int64_t i1, int64_t j0, int64_t j1) {
    const struct visible_rule *last = NULL;
    int64_t position = attention_position(c, s) + i0;
    for (int64_t h = h0; h < h1; h++) {
        const struct visible_rule *rule = attention_rule(c, h);
        if (rule != last && visible_any(rule, i0, i1, position, j0, j1))
            return true;
        last = rule;
    }
    return false;
}

/* Pairs that one rule lets through in sequence s. */
static double rule_pairs(const struct attention_call *c, int64_t s, const struct visible_rule *rule,
                         bool parts) {
    enum { SPAN = 1024 }; /* keys, and rows, asked about at once */
    int64_t n = attention_own(c, s), length = c->kv_length[s], p0 = attention_position(c, s);
    double pairs = 0;
    parts = parts && rule->parts > 0;
    if (!parts && !rule->causal)
        return (double)n * (double)length;
    if (!parts) {
        /* Query i sees length - n + i + 1 keys; those with none or fewer are cut off. */
        double rows = (double)(n < length ? n : length);
        return rows * ((double)length - (rows - 1) / 2);
    }
    for (int64_t i0 = 0; i0 < n; i0 += SPAN)
        for (int64_t j0 = 0; j0 < length; j0 += SPAN) {
            int64_t i1 = i0 + SPAN < n ? i0 + SPAN : n,
                    j1 = j0 + SPAN < length ? j0 + SPAN : length;
            if (!visible_any(rule, i0, i1, p0 + i0, j0, j1))
                continue;
            for (int64_t i = i0; i < i1; i++)
                for (int64_t j = j0; j < j1; j += 64)
                    pairs += __builtin_popcountll(
                        visible_mask(rule, i, p0 + i, j, j1 - j < 64 ? (int)(j1 - j) : 64));
        }
    return pairs;
}

static double count_pairs(const struct attention_call *c, bool parts) {
    double pairs = 0;
    for (int64_t s = 0; s < c->sequences; s++) {
        const struct visible_rule *last = NULL;
        double of_last = 0;
        for (int64_t h = 0; h < c->heads; h++) {
            const struct visible_rule *rule = attention_rule(c, h);
            if (rule != last)
                of_last = rule_pairs(c, s, rule, parts);
            last = rule;
            pairs += of_last;
        }
    }
    return pairs;
}

double attention_pairs(const struct attention_call *c) {
    return count_pairs(c, true);
}

double attention_most_pairs(const struct attention_call *c) {
    return count_pairs(c, false);
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

/* Element t of the key or value vector [row, head], dequantised. */
static double cached(const struct tensor *x, const struct tensor *scale, int64_t row, int64_t head,
                     int64_t t) {
    double value = ref_at(x, at(x, row, head) + t);
    return scale->data ? value * ref_at(scale, row * scale->shape[1] + head) : value;
}

static int64_t bias_at(const struct tensor *b, int64_t h, int64_t i, int64_t j) {
    return (b->shape[0] == 1 ? 0 : h) * b->stride[0] + i * b->stride[1] + j;
}

/* Score of query i and key j of sequence s; *slope_in (optional) receives its derivative with
 * respect to q.k. */
static double score(const struct attention_call *c, int64_t s, int64_t i, int64_t j, int64_t h,
                    double *slope_in) {
    const struct attention_params *p = c->params;
    int64_t n = c->q_offsets[s] + i, key = attention_key_row(c, s, j);
    int64_t kv_head = h / (c->heads / c->kv_heads), q = at(&c->q, n, h);
    double x = 0, slope = (double)p->scale;
    for (int64_t t = 0; t < c->width; t++)
        x += ref_at(&c->q, q + t) * cached(&c->k, &c->k_scale, key, kv_head, t);
    x *= (double)p->scale;
    if (p->softcap > 0) {
        double t = tanh(x / (double)p->softcap);
        x = (double)p->softcap * t;
        slope *= 1 - t * t;
    }
    if (c->slopes.data)
        x -= ref_at(&c->slopes, h) * fabs((double)(attention_position(c, s) + i - j));
    if (c->bias.data)
        x += ref_at(&c->bias, bias_at(&c->bias, h, i, j));
    if (slope_in)
        *slope_in = slope;
    return x;
}

bool attention_sees(const struct attention_call *c, int64_t s, int64_t i, int64_t j, int64_t h) {
    return visible(attention_rule(c, h), i, attention_position(c, s) + i, j);
}

double attention_score(const struct attention_call *c, int64_t s, int64_t i, int64_t j, int64_t h) {
    return score(c, s, i, j, h, NULL);
}

/* What multiplies a probability: 1, or with dropout 0 or 1 / (1 - p). */
static double kept(const struct attention_call *c, int64_t h, int64_t n, int64_t j) {
    float p = c->params->dropout;
    if (p == 0)
        return 1;
    return random_uniform(&c->key, attention_dropout_element(c, h, n, j)) >= p ? 1 / (1 - (double)p)
                                                                               : 0;
}

static void forward_row(const struct attention_call *c, int64_t s, int64_t i, int64_t h,
                        double *probability, double *out) {
    int64_t n = c->q_offsets[s] + i, length = c->kv_length[s];
    int64_t kv_head = h / (c->heads / c->kv_heads), d = c->width;
    double sink = c->sink.data ? ref_at(&c->sink, h) : -INFINITY, maximum = sink;
    for (int64_t j = 0; j < length; j++) {
        probability[j] = attention_sees(c, s, i, j, h) ? score(c, s, i, j, h, NULL) : -INFINITY;
        maximum = probability[j] > maximum || isnan(probability[j]) ? probability[j] : maximum;
    }
    double base = maximum == -INFINITY ? 0 : maximum, sum = exp(sink - base);
    for (int64_t t = 0; t < d; t++)
        out[t] = 0;
    for (int64_t j = 0; j < length; j++) {
        if (probability[j] == -INFINITY) /* its key may lie nowhere */
            continue;
        double e = exp(probability[j] - base);
        sum += e;
        int64_t v = attention_key_row(c, s, j);
        e *= kept(c, h, n, j);
        for (int64_t t = 0; t < d; t++)
            out[t] += e * cached(&c->v, &c->v_scale, v, kv_head, t);
    }
    for (int64_t t = 0; t < d; t++)
        ref_put(&c->o, at(&c->o, n, h) + t, sum == 0 ? 0 : out[t] / sum);
    if (c->lse.data)
        ref_put(&c->lse, h * c->rows + n, base + log(sum));
}

static tril_status forward_reference(struct op_context *ctx, const struct tensor *args,
                                     const void *params, struct tril_error *err) {
    struct attention_call c;
    void *memory = NULL;
    tril_status st;
    TRY(attention_unpack_forward(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    TRY(mem_alloc(&memory, (size_t)(c.longest_kv + c.width) * sizeof(double),
                  "a row of attention scores", err));
    double *out = memory, *probability = out + c.width;
    int64_t next = 0; /* rows before this are written */
    for (int64_t s = 0; s <= c.sequences; s++) {
        int64_t begin = s < c.sequences ? c.q_offsets[s] : c.rows;
        int64_t end = s < c.sequences ? c.q_offsets[s + 1] : c.rows;
        ref_zero_rows(&c.o, next, begin);
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

/* The gradients of one call under way, in double. */
struct gradients {
    double *dq;      /* [d], of one row */
    double *dk, *dv; /* [keys of the sequence, d], of one key/value head */
    double *bias;    /* [heads of bias, longest q, longest kv]; NULL: not wanted */
    double *sink;    /* [H] */
};

/* One query row's share. dq is overwritten, the others accumulate. */
static void backward_row(const struct attention_call *c, int64_t s, int64_t i, int64_t h,
                         const struct gradients *g) {
    int64_t n = c->q_offsets[s] + i, d = c->width;
    int64_t kv_head = h / (c->heads / c->kv_heads);
    int64_t q = at(&c->q, n, h), o = at(&c->o, n, h), dout = at(&c->dout, n, h);
    double lse = ref_at(&c->lse, h * c->rows + n), delta = dot(&c->dout, dout, &c->o, o, d);
    memset(g->dq, 0, (size_t)d * sizeof(double));
    if (lse == -INFINITY)
        return;
    if (c->sink.data)
        g->sink[h] -= exp(ref_at(&c->sink, h) - lse) * delta;
    for (int64_t j = 0; j < c->kv_length[s]; j++) {
        if (!attention_sees(c, s, i, j, h))
            continue;
        int64_t row = attention_key_row(c, s, j);
        int64_t k = at(&c->k, row, kv_head), v = at(&c->v, row, kv_head);
        double slope, p = exp(score(c, s, i, j, h, &slope) - lse), keep = kept(c, h, n, j);
        double ds = p * (keep * dot(&c->dout, dout, &c->v, v, d) - delta);
        if (g->bias) {
            int64_t head = c->bias.shape[0] == 1 ? 0 : h;
            g->bias[(head * c->longest_q + i) * c->longest_kv + j] += ds;
        }
        ds *= slope;
        for (int64_t t = 0; t < d; t++) {
            g->dv[j * d + t] += p * keep * ref_at(&c->dout, dout + t);
            g->dk[j * d + t] += ds * ref_at(&c->q, q + t);
            g->dq[t] += ds * ref_at(&c->k, k + t);
        }
    }
}

static void put_score_gradients(const struct attention_call *c, const struct gradients *g) {
    const struct tensor *b = &c->dbias;
    for (int64_t h = 0; b->data && h < b->shape[0]; h++)
        for (int64_t i = 0; i < b->shape[1]; i++)
            for (int64_t j = 0; j < b->shape[2]; j++) {
                bool inside = i < c->longest_q && j < c->longest_kv;
                ref_put(b, bias_at(b, h, i, j),
                        inside ? g->bias[(h * c->longest_q + i) * c->longest_kv + j] : 0);
            }
    for (int64_t h = 0; c->dsink.data && h < c->heads; h++)
        ref_put(&c->dsink, h, g->sink[h]);
}

static void backward_sequence(const struct attention_call *c, int64_t s,
                              const struct gradients *g) {
    int64_t length = c->kv_length[s], start = c->kv_start[s], d = c->width;
    int64_t group = c->heads / c->kv_heads;
    for (int64_t kv_head = 0; kv_head < c->kv_heads; kv_head++) {
        memset(g->dk, 0, (size_t)(length * d) * sizeof(double));
        memset(g->dv, 0, (size_t)(length * d) * sizeof(double));
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
            for (int64_t n = c->q_offsets[s]; n < c->q_offsets[s + 1]; n++) {
                backward_row(c, s, n - c->q_offsets[s], h, g);
                for (int64_t t = 0; t < d; t++)
                    ref_put(&c->dq, at(&c->dq, n, h) + t, g->dq[t]);
            }
        for (int64_t j = 0; j < length; j++)
            for (int64_t t = 0; t < d; t++) {
                ref_put(&c->dk, at(&c->dk, start + j, kv_head) + t, g->dk[j * d + t]);
                ref_put(&c->dv, at(&c->dv, start + j, kv_head) + t, g->dv[j * d + t]);
            }
    }
}

static tril_status backward_reference(struct op_context *ctx, const struct tensor *args,
                                      const void *params, struct tril_error *err) {
    struct attention_call c;
    void *memory = NULL;
    tril_status st;
    TRY(attention_unpack_backward(&c, args, params, err));
    if (ctx->measuring) {
        op_scratch(ctx, 0);
        goto done;
    }
    int64_t d = c.width;
    int64_t of_bias = c.dbias.data ? c.bias.shape[0] * c.longest_q * c.longest_kv : 0;
    int64_t doubles = (2 * c.longest_kv + 1) * d + c.heads + of_bias;
    TRY(mem_alloc_zero(&memory, (size_t)doubles * sizeof(double),
                       "the gradients of one key/value head", err));
    struct gradients g = {.dq = memory};
    g.dk = g.dq + d;
    g.dv = g.dk + c.longest_kv * d;
    g.sink = g.dv + c.longest_kv * d;
    g.bias = c.dbias.data ? g.sink + c.heads : NULL;
    int64_t next_q = 0, next_k = 0; /* rows before these are written */
    for (int64_t s = 0; s < c.sequences; s++) {
        ref_zero_rows(&c.dq, next_q, c.q_offsets[s]);
        ref_zero_rows(&c.dk, next_k, c.kv_start[s]);
        ref_zero_rows(&c.dv, next_k, c.kv_start[s]);
        next_q = c.q_offsets[s + 1];
        next_k = c.kv_start[s] + c.kv_length[s];
        backward_sequence(&c, s, &g);
    }
    ref_zero_rows(&c.dq, next_q, c.rows);
    ref_zero_rows(&c.dk, next_k, c.keys);
    ref_zero_rows(&c.dv, next_k, c.keys);
    put_score_gradients(&c, &g);
done:
    mem_free(memory);
    return st;
}

/* ------------------------------------------------------------------ descriptions */

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
    .test_case = attention_forward_case,
    .test_fill = attention_forward_fill,
    .flops = forward_flops,
    .reduction = reduction,
    .rounds_intermediates = true,
    .scratch_first = true,
};

const struct op_info op_info_attention_backward = {
    .id = OP_ATTENTION_BACKWARD,
    .name = "attention_backward",
    .args = backward_args,
    .arg_count = B_ARGS,
    .reference = backward_reference,
    .test_case = attention_backward_case,
    .test_fill = attention_backward_fill,
    .flops = backward_flops,
    .reduction = reduction,
    .rounds_intermediates = true,
    .scratch_first = true,
};

/* ------------------------------------------------------------------ typed calls */

static void forward_list(struct tensor args[F_ARGS], const struct attention_inputs *in,
                         struct tensor o, struct tensor lse) {
    const struct tensor list[F_ARGS] = {[F_Q] = in->q,
                                        [F_K] = in->k,
                                        [F_V] = in->v,
                                        [F_OFFSETS] = in->q_offsets,
                                        [F_START] = in->kv_start,
                                        [F_LENGTH] = in->kv_length,
                                        [F_PAGES] = in->pages,
                                        [F_SLOPES] = in->slopes,
                                        [F_BIAS] = in->bias,
                                        [F_SINK] = in->sink,
                                        [F_K_SCALE] = in->k_scale,
                                        [F_V_SCALE] = in->v_scale,
                                        [F_STEP] = in->step,
                                        [F_O] = o,
                                        [F_LSE] = lse};
    memcpy(args, list, sizeof list);
}

static tril_status backward_list(struct tensor args[B_ARGS], const struct attention_inputs *in,
                                 struct tensor o, struct tensor lse, struct tensor dout,
                                 const struct attention_gradients *g, struct tril_error *err) {
    const struct tensor list[B_ARGS] = {[B_Q] = in->q,
                                        [B_K] = in->k,
                                        [B_V] = in->v,
                                        [B_OFFSETS] = in->q_offsets,
                                        [B_START] = in->kv_start,
                                        [B_LENGTH] = in->kv_length,
                                        [B_SLOPES] = in->slopes,
                                        [B_BIAS] = in->bias,
                                        [B_SINK] = in->sink,
                                        [B_STEP] = in->step,
                                        [B_O] = o,
                                        [B_LSE] = lse,
                                        [B_DO] = dout,
                                        [B_DQ] = g->dq,
                                        [B_DK] = g->dk,
                                        [B_DV] = g->dv,
                                        [B_DBIAS] = g->dbias,
                                        [B_DSINK] = g->dsink};
    memcpy(args, list, sizeof list);
    if (in->pages.data || in->k_scale.data || in->v_scale.data)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "attention_backward takes neither pages nor i8 keys; give it the keys in "
                         "one piece, as fp32 or bf16");
    return TRIL_OK;
}

tril_status attention_forward(struct op_context *ctx, const struct attention_inputs *in,
                              struct tensor o, struct tensor lse, const struct attention_params *p,
                              struct tril_error *err) {
    struct tensor args[F_ARGS];
    forward_list(args, in, o, lse);
    return op_call(ctx, OP_ATTENTION_FORWARD, args, p, err);
}

tril_status attention_backward(struct op_context *ctx, const struct attention_inputs *in,
                               struct tensor o, struct tensor lse, struct tensor dout,
                               const struct attention_gradients *g,
                               const struct attention_params *p, struct tril_error *err) {
    struct tensor args[B_ARGS];
    tril_status st = backward_list(args, in, o, lse, dout, g, err);
    return st == TRIL_OK ? op_call(ctx, OP_ATTENTION_BACKWARD, args, p, err) : st;
}

tril_status attention_scratch(struct op_context *ctx, const struct attention_inputs *in,
                              struct tensor o, struct tensor lse, struct tensor dout,
                              const struct attention_gradients *g, const struct attention_params *p,
                              int64_t *bytes, struct tril_error *err) {
    struct tensor args[B_ARGS];
    *bytes = 0;
    if (!g) {
        forward_list(args, in, o, lse);
        return op_scratch_needed(ctx, OP_ATTENTION_FORWARD, args, p, bytes, err);
    }
    tril_status st = backward_list(args, in, o, lse, dout, g, err);
    return st == TRIL_OK ? op_scratch_needed(ctx, OP_ATTENTION_BACKWARD, args, p, bytes, err) : st;
}
