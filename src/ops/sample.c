/* Drawing tokens from logits (contract: sample.h): description, scalar reference by sorting. */
#include "ops/sample.h"

#include <math.h>
#include <stdlib.h>

#include "base/memory.h"
#include "ops/reference.h"

static const struct op_arg args_of_sample[] = {
    {"logits", "N V", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"options", "N 4", ARG_IN, .dtypes = DT_MASK(DT_F32)},
    {"top_k", "N", ARG_IN, .dtypes = DT_MASK(DT_I32)},
    {"seed", "N", ARG_IN, .dtypes = DT_MASK(DT_I64)},
    {"index", "N", ARG_INOUT, .dtypes = DT_MASK(DT_I64)},
    {"seen", "N W", ARG_INOUT, .dtypes = DT_MASK(DT_I32), .optional = true},
    {"token", "N", ARG_OUT, .dtypes = DT_MASK(DT_I32)},
    {"status", "N", ARG_OUT, .dtypes = DT_MASK(DT_I32)},
    {"log_probability", "N", ARG_OUT, .dtypes = DT_MASK(DT_F32), .optional = true},
};

static tril_status check(const struct tensor *args, const void *params, struct tril_error *err) {
    const struct tensor *seen = &args[SAMPLE_ARG_SEEN];
    int64_t V = args[SAMPLE_ARG_LOGITS].shape[1];
    (void)params;
    if (V < 1 || V > INT32_MAX / 2)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "sample: logits of %lld tokens; there must be 1 at least and %d at most",
                         (long long)V, INT32_MAX / 2);
    if (seen->data && seen->shape[1] < (V + 31) / 32)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "sample: seen has %lld words of 32 tokens for %lld tokens",
                         (long long)seen->shape[1], (long long)V);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ reference */

struct entry {
    double y, w;
    int32_t id;
};

static int by_order(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    if (x->y != y->y)
        return x->y < y->y ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

/* How many of the ordered entries the filters keep. */
static int64_t keep(const struct entry *e, int64_t V, int32_t top_k, double top_p, double min_p) {
    int64_t count = top_k > 0 && top_k < V ? top_k : V;
    double total = 0, mass = 0;
    for (int64_t i = 0; i < count; i++)
        total += e[i].w;
    for (int64_t i = 0; i < count && top_p < 1; i++) {
        mass += e[i].w;
        if (mass >= top_p * total)
            count = i + 1;
    }
    while (count > 1 && e[count - 1].w < min_p)
        count--;
    return count;
}

/* `weight` [V]: zeros, used for the kept tokens by id. */
static int32_t draw(const struct entry *e, int64_t count, double *weight, int64_t V, double u) {
    double total = 0, sum = 0;
    int32_t last = e[0].id;
    for (int64_t i = 0; i < count; i++) {
        weight[e[i].id] = e[i].w;
        total += e[i].w;
    }
    for (int64_t id = 0; id < V; id++) {
        sum += weight[id];
        last = weight[id] > 0 ? (int32_t)id : last;
        if (sum > u * total)
            break;
    }
    return last;
}

static double log_sum_exp(const struct tensor *logits, int64_t at, int64_t V) {
    double most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < V; i++)
        most = fmax(most, ref_at(logits, at + i));
    for (int64_t i = 0; i < V; i++)
        sum += exp(ref_at(logits, at + i) - most);
    return most + log(sum);
}

/* The penalised logits of row n, in order; false where there is nothing to draw from. */
static bool penalised(const struct tensor *a, int64_t n, struct entry *e) {
    const struct tensor *logits = &a[SAMPLE_ARG_LOGITS], *seen = &a[SAMPLE_ARG_SEEN];
    const int64_t V = logits->shape[1];
    const int32_t *words =
        seen->data ? (const int32_t *)seen->data + n * seen->shape[1] : (const int32_t *)NULL;
    double penalty = ref_at(&a[SAMPLE_ARG_OPTIONS], n * SAMPLE_OPTIONS + SAMPLE_PENALTY);
    bool bad = false;
    for (int64_t i = 0; i < V; i++) {
        double x = ref_at(logits, n * V + i);
        bad |= isnan(x);
        if (words && sample_seen(words, i))
            x = x > 0 ? x / penalty : x * penalty;
        e[i] = (struct entry){.y = x, .id = (int32_t)i};
    }
    if (!bad)
        qsort(e, (size_t)V, sizeof *e, by_order);
    return !bad && isfinite(e[0].y);
}

static int32_t choose(const struct tensor *a, int64_t n, struct entry *e, double *weight) {
    const struct tensor *options = &a[SAMPLE_ARG_OPTIONS];
    const int64_t V = a[SAMPLE_ARG_LOGITS].shape[1], at = n * SAMPLE_OPTIONS;
    double temperature = ref_at(options, at + SAMPLE_TEMPERATURE);
    if (!(temperature > 0))
        return e[0].id;
    for (int64_t i = 0; i < V; i++) {
        e[i].w = exp((e[i].y - e[0].y) / temperature);
        weight[i] = 0;
    }
    int64_t count = keep(e, V, ((const int32_t *)a[SAMPLE_ARG_TOP_K].data)[n],
                         ref_at(options, at + SAMPLE_TOP_P), ref_at(options, at + SAMPLE_MIN_P));
    struct random_key key = {.seed = (uint64_t)((const int64_t *)a[SAMPLE_ARG_SEED].data)[n],
                             .op = RANDOM_SAMPLE};
    uint64_t index = (uint64_t)((const int64_t *)a[SAMPLE_ARG_INDEX].data)[n];
    return draw(e, count, weight, V, random_u32(&key, index) * 0x1p-32);
}

static tril_status reference(struct op_context *ctx, const struct tensor *a, const void *params,
                             struct tril_error *err) {
    const struct tensor *logits = &a[SAMPLE_ARG_LOGITS], *seen = &a[SAMPLE_ARG_SEEN];
    const struct tensor *log_probability = &a[SAMPLE_ARG_LOG_PROBABILITY];
    const int64_t V = logits->shape[1];
    void *memory = NULL;
    tril_status st = TRIL_OK;
    (void)ctx;
    (void)params;
    TRY(mem_alloc(&memory, (size_t)V * (sizeof(struct entry) + sizeof(double)), "sampling", err));
    struct entry *e = memory;
    double *weight = (double *)(e + V);
    for (int64_t n = 0; n < logits->shape[0]; n++) {
        bool fine = penalised(a, n, e);
        int32_t token = fine ? choose(a, n, e, weight) : 0;
        ((int32_t *)a[SAMPLE_ARG_TOKEN].data)[n] = token;
        ((int32_t *)a[SAMPLE_ARG_STATUS].data)[n] = !fine;
        if (log_probability->data)
            ref_put(log_probability, n,
                    fine ? ref_at(logits, n * V + token) - log_sum_exp(logits, n * V, V)
                         : (double)NAN);
        ((int64_t *)a[SAMPLE_ARG_INDEX].data)[n] += fine;
        if (fine && seen->data)
            sample_mark((int32_t *)seen->data + n * seen->shape[1], token);
    }
done:
    mem_free(memory);
    return st;
}

/* ------------------------------------------------------------------ test and benchmark cases
 *
 * The rows of a case have the options of this list in turn. */

static const struct row_options {
    float temperature, top_p, min_p, penalty;
    int32_t top_k;
} row_options[] = {
    {1, 1, 0, 1, 0},           {0, 0.5f, 0.5f, 1.3f, 2}, {0.7f, 1, 0, 1, 3},
    {1.5f, 0.9f, 0, 1, 0},     {1, 1, 0.1f, 2, 0},       {0.8f, 0.8f, 0.02f, 1.2f, 40},
    {2, 0.95f, 0, 1, 1 << 30}, {1, 0, 0, 1, 0},          {3, 1, 0, 1, 1},
    {100, 1, 0, 0.5f, 0},      {2, 0.999f, 0, 1, 500},   {0.01f, 0.99f, 0, 1, 0},
    {4, 1, 1, 1, 0},           {1, 0.3f, 0.001f, 1, 7},
};
enum { LISTED = sizeof row_options / sizeof row_options[0] };

static const struct shape_case {
    const char *label;
    int n, v;
    bool seen, log_probability;
} cases[] = {
    {"", 14, 1, true, true},
    {"", 28, 2, true, false},
    {"", 28, 7, true, true},
    {"", 0, 9, true, true},
    {"", 42, 50, false, true},
    {"", 1, 257, true, false},
    {"", 28, 1000, true, true},
    {"", 15, 5003, true, true},
    {"", 3, 16384, false, true},
    {"ties", 28, 7, true, true},
    {"ties", 14, 4500, true, true},
    {"flat", 14, 4500, false, true},
    {"banned", 28, 33, true, true},
    {"banned", 14, 3000, true, true},
    {"greedy", 6, 4099, true, true},
    {"not finite", 30, 17, true, true},
    {"not finite", 10, 2300, true, true},
};

static bool test_case(int index, struct op_case *out) {
    if (index >= (int)(sizeof cases / sizeof cases[0]))
        return false;
    const struct shape_case *s = &cases[index];
    *out = (struct op_case){.label = s->label};
    out->size['N'] = s->n;
    out->size['V'] = s->v;
    out->size['W'] = (s->v + 31) / 32 + index % 2;
    if (!s->seen)
        out->absent |= 1u << SAMPLE_ARG_SEEN;
    if (!s->log_probability)
        out->absent |= 1u << SAMPLE_ARG_LOG_PROBABILITY;
    struct sample_params p = {.greedy = strcmp(s->label, "greedy") == 0};
    case_params(out, &p, sizeof p);
    return true;
}

/* What the labels say of row n. Equal logits are zeros: where a test multiplies them they stay so.
 */
static void fill_row(const char *label, const struct tensor *logits, int64_t n) {
    const int64_t V = logits->shape[1];
    for (int64_t i = 0; i < V; i++) {
        double x = ref_at(logits, n * V + i);
        if (strcmp(label, "ties") == 0)
            x = n % 3 == 0 ? fmin(0, floor(x)) : fmax(0, floor(x));
        else if (strcmp(label, "flat") == 0)
            x = 0;
        else if (strcmp(label, "banned") == 0)
            x = (i + n) % 3 ? (double)-INFINITY : x;
        else if (strcmp(label, "not finite") == 0)
            x = n % 5 == 0   ? (double)-INFINITY
                : i != V / 2 ? x
                : n % 5 == 1 ? (double)NAN
                : n % 5 == 2 ? (double)INFINITY
                             : (double)-INFINITY;
        ref_put(logits, n * V + i, x);
    }
}

static void test_fill(const struct op_case *c, struct tensor *args, const struct random_key *key) {
    const struct tensor *seen = &args[SAMPLE_ARG_SEEN];
    struct sample_params p;
    memcpy(&p, c->params, sizeof p);
    for (int64_t n = 0; n < c->size['N']; n++) {
        const struct row_options *o = &row_options[(n + c->size['V']) % LISTED];
        const float values[SAMPLE_OPTIONS] = {p.greedy ? 0 : o->temperature, o->top_p, o->min_p,
                                              o->penalty};
        for (int i = 0; i < SAMPLE_OPTIONS; i++)
            ref_put(&args[SAMPLE_ARG_OPTIONS], n * SAMPLE_OPTIONS + i, (double)values[i]);
        ((int32_t *)args[SAMPLE_ARG_TOP_K].data)[n] = o->top_k;
        ((int64_t *)args[SAMPLE_ARG_SEED].data)[n] = (int64_t)random_u32(key, (uint64_t)n) << 20;
        ((int64_t *)args[SAMPLE_ARG_INDEX].data)[n] = (int64_t)(n * 1000);
        for (int64_t w = 0; seen->data && w < seen->shape[1]; w++) /* few bits, all low ones */
            ((int32_t *)seen->data)[n * seen->shape[1] + w] =
                (int32_t)(random_u32(key, (uint64_t)(n * seen->shape[1] + w)) & 0x1111);
        fill_row(c->label, &args[SAMPLE_ARG_LOGITS], n);
    }
}

static double reduction(const struct tensor *args, const void *params) {
    (void)params;
    return (double)args[SAMPLE_ARG_LOGITS].shape[1];
}

const struct op_info op_info_sample = {
    .id = OP_SAMPLE,
    .name = "sample",
    .args = args_of_sample,
    .arg_count = SAMPLE_ARGS,
    .reference = reference,
    .test_case = test_case,
    .test_fill = test_fill,
    .reduction = reduction,
    .check = check,
};

tril_status sample(struct op_context *ctx, struct tensor logits, const struct sample_rows *rows,
                   struct tril_error *err) {
    struct tensor args[SAMPLE_ARGS] = {
        [SAMPLE_ARG_LOGITS] = logits,
        [SAMPLE_ARG_OPTIONS] = rows->options,
        [SAMPLE_ARG_TOP_K] = rows->top_k,
        [SAMPLE_ARG_SEED] = rows->seed,
        [SAMPLE_ARG_INDEX] = rows->index,
        [SAMPLE_ARG_SEEN] = rows->seen,
        [SAMPLE_ARG_TOKEN] = rows->token,
        [SAMPLE_ARG_STATUS] = rows->status,
        [SAMPLE_ARG_LOG_PROBABILITY] = rows->log_probability,
    };
    return op_call(ctx, OP_SAMPLE, args, &rows->params, err);
}
