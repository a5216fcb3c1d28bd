/* Retrieval by blocks of the cache (Tang et al. 2024, "Quest"): descriptions, checks, scalar
 * references. */
#include "ops/retrieve.h"

#include <math.h>

#include "base/memory.h"
#include "ops/attention_checks.h"
#include "ops/reference.h"

/* ------------------------------------------------------------------ arguments */

static const struct op_arg bounds_args[] = {
    {"k", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"kv_start", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_from", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "S", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"low", "B K d", ARG_INOUT, .dtypes = DT_MASK(DT_F32)},
    {"high", "B K d", ARG_INOUT, .dtypes = DT_MASK(DT_F32)},
};
enum { C_K, C_START, C_FROM, C_LENGTH, C_LOW, C_HIGH, C_ARGS };

static const struct op_arg retrieve_args[] = {
    {"q", "N H d", ARG_IN, DT_ACT, .strided = true},
    {"k", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"v", "M K d", ARG_IN, DT_ACT, .strided = true},
    {"kv_start", "N", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"kv_length", "N", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"low", "B K d", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"high", "B K d", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"o", "N H d", ARG_OUT, DT_ACT, .strided = true},
    {"lse", "H N", ARG_OUT, DT_MASK(DT_F32), .optional = true},
    {"blocks", "N K T", ARG_OUT, .dtypes = DT_MASK(DT_I32)},
};
enum { R_Q, R_K, R_V, R_START, R_LENGTH, R_LOW, R_HIGH, R_O, R_LSE, R_BLOCKS, R_ARGS };

static tril_status check_keys(int64_t start, int64_t length, int64_t block, const struct tensor *k,
                              const struct tensor *low, const char *name, struct tril_error *err) {
    if (start < 0 || length < 0 || start + length > k->shape[0])
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: keys %lld to %lld lie outside the rows of k",
                         name, (long long)start, (long long)(start + length));
    if (start % block || start / block + retrieve_blocks(length, block) > low->shape[0])
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: a sequence begins at row %lld, which must be a multiple of %lld and "
                         "have its blocks among the %lld rows of low",
                         name, (long long)start, (long long)block, (long long)low->shape[0]);
    return TRIL_OK;
}

tril_status bounds_unpack(struct bounds_call *c, const struct tensor *args, const void *params,
                          struct tril_error *err) {
    static const char name[] = "block_bounds";
    *c = (struct bounds_call){
        .k = args[C_K],
        .low = args[C_LOW],
        .high = args[C_HIGH],
        .kv_start = args[C_START].data,
        .kv_from = args[C_FROM].data,
        .kv_length = args[C_LENGTH].data,
        .sequences = args[C_START].shape[0],
        .kv_heads = args[C_K].shape[1],
        .width = args[C_K].shape[2],
        .block = ((const struct retrieve_params *)params)->block,
    };
    tril_status st = attention_check_heads(c->kv_heads, c->kv_heads, c->width, name, err);
    if (st == TRIL_OK && c->block < 1)
        st = error_set(err, TRIL_ERR_ARGUMENT, "%s: a block needs at least one key", name);
    for (int64_t s = 0; s < c->sequences && st == TRIL_OK; s++) {
        st = check_keys(c->kv_start[s], c->kv_length[s], c->block, &c->k, &c->low, name, err);
        if (st == TRIL_OK && (c->kv_from[s] < 0 || c->kv_from[s] > c->kv_length[s]))
            st = error_set(err, TRIL_ERR_ARGUMENT, "%s: kv_from of sequence %lld is out of range",
                           name, (long long)s);
    }
    return st;
}

tril_status retrieve_unpack(struct retrieve_call *c, const struct tensor *args, const void *params,
                            struct tril_error *err) {
    static const char name[] = "retrieve";
    *c = (struct retrieve_call){
        .q = args[R_Q],
        .k = args[R_K],
        .v = args[R_V],
        .low = args[R_LOW],
        .high = args[R_HIGH],
        .o = args[R_O],
        .lse = args[R_LSE],
        .blocks = args[R_BLOCKS],
        .kv_start = args[R_START].data,
        .kv_length = args[R_LENGTH].data,
        .rows = args[R_Q].shape[0],
        .heads = args[R_Q].shape[1],
        .kv_heads = args[R_K].shape[1],
        .width = args[R_Q].shape[2],
        .most = args[R_BLOCKS].shape[2],
        .params = *(const struct retrieve_params *)params,
    };
    const struct retrieve_params *p = &c->params;
    tril_status st = attention_check_heads(c->heads, c->kv_heads, c->width, name, err);
    if (st == TRIL_OK && (!isfinite(p->scale) || !(p->scale > 0) || p->block < 1 || p->first < 0 ||
                          p->last < 1 || p->top < 0 || p->first + p->last + p->top > c->most))
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s: the scale %g must be above 0, blocks of %lld keys hold at least one, "
                       "the last of them is always seen, and argument blocks has room for all "
                       "that is seen (%lld)",
                       name, (double)p->scale, (long long)p->block, (long long)c->most);
    for (int64_t n = 0; n < c->rows && st == TRIL_OK; n++)
        st = check_keys(c->kv_start[n], c->kv_length[n], p->block, &c->k, &c->low, name, err);
    return st;
}

/* ------------------------------------------------------------------ references */

static tril_status bounds_reference(struct op_context *ctx, const struct tensor *args,
                                    const void *params, struct tril_error *err) {
    struct bounds_call c;
    tril_status st = bounds_unpack(&c, args, params, err);
    (void)ctx;
    for (int64_t s = 0; s < c.sequences && st == TRIL_OK; s++)
        for (int64_t j = c.kv_from[s] / c.block * c.block; j < c.kv_length[s]; j++)
            for (int64_t e = 0; e < c.kv_heads * c.width && c.kv_from[s] < c.kv_length[s]; e++) {
                int64_t row = c.kv_start[s] + j;
                int64_t at = row / c.block * c.kv_heads * c.width + e;
                double x = ref_at3(&c.k, row, e / c.width, e % c.width);
                bool first = j % c.block == 0;
                if (first || x < ref_at(&c.low, at))
                    ref_put(&c.low, at, x);
                if (first || x > ref_at(&c.high, at))
                    ref_put(&c.high, at, x);
            }
    return st;
}

/* The largest score that a key of a block can have with any head of the group. */
static double bound(const struct retrieve_call *c, int64_t n, int64_t kv_head, int64_t b) {
    int64_t group = c->heads / c->kv_heads;
    int64_t at = ((c->kv_start[n] / c->params.block + b) * c->kv_heads + kv_head) * c->width;
    double most = -INFINITY;
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
        double sum = 0;
        for (int64_t t = 0; t < c->width; t++) {
            double q = ref_at3(&c->q, n, h, t);
            sum += fmax(q * ref_at(&c->low, at + t), q * ref_at(&c->high, at + t));
        }
        most = sum > most ? sum : most;
    }
    return most;
}

/* Chosen blocks of row n, ascending, into `out`; returns how many. */
static int64_t choose(const struct retrieve_call *c, int64_t n, int64_t kv_head, double *bounds,
                      int32_t *out) {
    const struct retrieve_params *p = &c->params;
    int64_t all = retrieve_blocks(c->kv_length[n], p->block), count = 0;
    for (int64_t b = 0; b < all; b++)
        bounds[b] = retrieve_always(p, b, all) ? INFINITY : bound(c, n, kv_head, b);
    for (int64_t b = 0; b < all; b++) {
        int64_t better = 0; /* of those that compete */
        for (int64_t x = 0; x < all; x++)
            better += bounds[x] < INFINITY &&
                      (bounds[x] > bounds[b] || (bounds[x] == bounds[b] && x < b));
        if (bounds[b] == INFINITY || better < p->top)
            out[count++] = (int32_t)b;
    }
    for (int64_t x = count; x < c->most; x++)
        out[x] = -1;
    return count;
}

static void attend(const struct retrieve_call *c, int64_t n, int64_t h, const int32_t *blocks,
                   int64_t count) {
    int64_t kv_head = h / (c->heads / c->kv_heads), block = c->params.block;
    double maximum = -INFINITY, sum = 0, out[256] = {0};
    for (int pass = 0; pass < 2; pass++)
        for (int64_t x = 0; x < count; x++)
            for (int64_t j = blocks[x] * block; j < (blocks[x] + 1) * block && j < c->kv_length[n];
                 j++) {
                double score = 0;
                for (int64_t t = 0; t < c->width; t++)
                    score +=
                        ref_at3(&c->q, n, h, t) * ref_at3(&c->k, c->kv_start[n] + j, kv_head, t);
                score *= (double)c->params.scale;
                if (pass == 0) {
                    maximum = score > maximum ? score : maximum;
                    continue;
                }
                double e = exp(score - maximum);
                sum += e;
                for (int64_t t = 0; t < c->width; t++)
                    out[t] += e * ref_at3(&c->v, c->kv_start[n] + j, kv_head, t);
            }
    for (int64_t t = 0; t < c->width; t++)
        ref_put(&c->o, ref_offset3(&c->o, n, h, t), sum > 0 ? out[t] / sum : 0);
    if (c->lse.data)
        ref_put(&c->lse, h * c->rows + n, sum > 0 ? maximum + log(sum) : -INFINITY);
}

static tril_status retrieve_reference(struct op_context *ctx, const struct tensor *args,
                                      const void *params, struct tril_error *err) {
    struct retrieve_call c;
    void *memory = NULL;
    tril_status st;
    (void)ctx;
    TRY(retrieve_unpack(&c, args, params, err));
    int64_t most = c.low.shape[0];
    TRY(mem_alloc(&memory, (size_t)(most + 1) * sizeof(double), "bounds of blocks", err));
    for (int64_t n = 0; n < c.rows; n++)
        for (int64_t kv_head = 0; kv_head < c.kv_heads; kv_head++) {
            int32_t *blocks = (int32_t *)c.blocks.data + (n * c.kv_heads + kv_head) * c.most;
            int64_t count = choose(&c, n, kv_head, memory, blocks), group = c.heads / c.kv_heads;
            for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
                attend(&c, n, h, blocks, count);
        }
done:
    mem_free(memory);
    return st;
}

/* ------------------------------------------------------------------ test and benchmark cases */

static const struct shape_case {
    int n, m, h, k, d, block, first, last, top;
    bool strided;
    enum dtype act;
} shapes[] = {
    {1, 60, 2, 2, 5, 4, 1, 1, 3, false, DT_F32},    {1, 64, 4, 2, 8, 8, 0, 1, 0, true, DT_F32},
    {3, 90, 6, 2, 7, 5, 1, 2, 2, false, DT_F32},    {1, 33, 1, 1, 1, 8, 2, 1, 1, false, DT_F32},
    {2, 512, 4, 1, 64, 16, 1, 2, 4, true, DT_BF16}, {1, 300, 4, 4, 33, 64, 1, 2, 8, false, DT_BF16},
};

static bool make_case(int index, struct op_case *out, bool bounds) {
    if (index >= (int)(sizeof shapes / sizeof shapes[0]))
        return false;
    const struct shape_case *s = &shapes[index];
    *out = (struct op_case){.act = s->act, .label = s->strided ? "strided" : "dense"};
    out->size['N'] = s->n;
    out->size['S'] = bounds ? s->n : 0;
    out->size['M'] = s->m;
    out->size['H'] = s->h;
    out->size['K'] = s->k;
    out->size['d'] = s->d;
    out->size['B'] = 62 * s->m / s->block + 1; /* enough where the test grows M too */
    out->size['T'] = s->first + s->last + s->top + 1;
    if (s->strided)
        out->strided = bounds ? 1u << C_K : 1u << R_Q | 1u << R_K | 1u << R_V | 1u << R_O;
    struct retrieve_params p = {.scale = (float)(1 / sqrt(s->d)),
                                .block = s->block,
                                .first = s->first,
                                .last = s->last,
                                .top = s->top};
    case_params(out, &p, sizeof p);
    return true;
}
static bool bounds_case(int index, struct op_case *out) {
    return make_case(index, out, true);
}
static bool retrieve_case(int index, struct op_case *out) {
    return make_case(index, out, false);
}

/* Sequence s of n takes its share of the keys, from a block's beginning on, but for its last keys.
 */
static void place(const struct op_case *c, int64_t s, int64_t n, int32_t *start, int32_t *length) {
    struct retrieve_params p;
    memcpy(&p, c->params, sizeof p);
    int64_t share = c->size['M'] / n / p.block * p.block;
    *start = (int32_t)(s * share);
    *length = (int32_t)(share > s ? share - s : 0);
}
static void bounds_fill(const struct op_case *c, struct tensor *args,
                        const struct random_key *key) {
    (void)key;
    for (int64_t s = 0; s < c->size['S']; s++) {
        int32_t *length = (int32_t *)args[C_LENGTH].data + s;
        place(c, s, c->size['S'], (int32_t *)args[C_START].data + s, length);
        ((int32_t *)args[C_FROM].data)[s] = s % 2 ? 0 : *length / 2;
    }
}
static void retrieve_fill(const struct op_case *c, struct tensor *args,
                          const struct random_key *key) {
    (void)key;
    for (int64_t n = 0; n < c->size['N']; n++)
        place(c, n, c->size['N'], (int32_t *)args[R_START].data + n,
              (int32_t *)args[R_LENGTH].data + n);
}

static double retrieve_flops(const struct tensor *args, const void *params) {
    const struct retrieve_params *p = params;
    double keys = (double)(args[R_BLOCKS].shape[2] * p->block), d = (double)args[R_Q].shape[2];
    double blocks = 0;
    for (int64_t n = 0; n < args[R_Q].shape[0]; n++)
        blocks += (double)(((const int32_t *)args[R_LENGTH].data)[n] / p->block);
    return (double)args[R_Q].shape[1] * d * (4 * keys * (double)args[R_Q].shape[0] + 2 * blocks);
}

static double retrieve_reduction(const struct tensor *args, const void *params) {
    const struct retrieve_params *p = params;
    return (double)(args[R_Q].shape[2] + args[R_BLOCKS].shape[2] * p->block);
}

const struct op_info op_info_block_bounds = {
    .id = OP_BLOCK_BOUNDS,
    .name = "block_bounds",
    .args = bounds_args,
    .arg_count = C_ARGS,
    .reference = bounds_reference,
    .test_case = bounds_case,
    .test_fill = bounds_fill,
};

const struct op_info op_info_retrieve = {
    .id = OP_RETRIEVE,
    .name = "retrieve",
    .args = retrieve_args,
    .arg_count = R_ARGS,
    .reference = retrieve_reference,
    .test_case = retrieve_case,
    .test_fill = retrieve_fill,
    .flops = retrieve_flops,
    .reduction = retrieve_reduction,
};

/* ------------------------------------------------------------------ typed calls */

tril_status block_bounds(struct op_context *ctx, struct tensor k, struct tensor kv_start,
                         struct tensor kv_from, struct tensor kv_length, struct tensor low,
                         struct tensor high, int64_t block, struct tril_error *err) {
    struct tensor args[] = {k, kv_start, kv_from, kv_length, low, high};
    struct retrieve_params p = {.block = block};
    return op_call(ctx, OP_BLOCK_BOUNDS, args, &p, err);
}

tril_status retrieve(struct op_context *ctx, const struct retrieve_inputs *in, struct tensor o,
                     struct tensor lse, struct tensor blocks, struct retrieve_params p,
                     struct tril_error *err) {
    struct tensor args[] = {in->q,   in->k,    in->v, in->kv_start, in->kv_length,
                            in->low, in->high, o,     lse,          blocks};
    return op_call(ctx, OP_RETRIEVE, args, &p, err);
}
