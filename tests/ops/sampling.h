/* What every backend's drawing of tokens must pass: the same tokens as the reference, row by row,
 * whatever else is in the call; and frequencies as the probabilities say. */
#ifndef TESTS_OPS_SAMPLING_H
#define TESTS_OPS_SAMPLING_H

#include "support/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/random.h"
#include "ops/sample.h"

/* A call's memory, on the host: one block, as it travels. */
struct sampling {
    int64_t N, V, words, bytes;
    bool greedy;
    char *block;
    float *logits, *options;
    int32_t *top_k, *seen, *token, *status;
    int64_t *seed, *index;
};

static inline void sampling_create(struct sampling *s, int64_t N, int64_t V) {
    memset(s, 0, sizeof *s);
    s->N = N;
    s->V = V;
    s->words = (V + 31) / 32;
    s->bytes = N * (2 * 8 + (V + SAMPLE_OPTIONS + s->words + 3) * 4);
    s->block = calloc(1, (size_t)s->bytes);
    assert_non_null(s->block);
    s->seed = (int64_t *)(void *)s->block;
    s->index = s->seed + N;
    s->logits = (float *)(s->index + N);
    s->options = s->logits + N * V;
    s->top_k = (int32_t *)(s->options + N * SAMPLE_OPTIONS);
    s->seen = s->top_k + N;
    s->token = s->seen + N * s->words;
    s->status = s->token + N;
    for (int64_t n = 0; n < N; n++) {
        const float plain[SAMPLE_OPTIONS] = {1, 1, 0, 1};
        memcpy(s->options + n * SAMPLE_OPTIONS, plain, sizeof plain);
    }
}

/* Draws from rows [first, first + count) in ctx. */
static inline void sampling_run(const struct sampling *s, struct op_context *ctx, int64_t first,
                                int64_t count) {
    const struct backend *b = ctx->backend;
    struct tril_error err = {0};
    void *memory;
    assert_int_equal(b->alloc(&memory, s->bytes, false, "a test", &err), TRIL_OK);
    assert_int_equal(b->upload(ctx, memory, s->block, s->bytes, &err), TRIL_OK);
#define THERE(p, n) ((char *)memory + ((char *)((p) + (n)*first) - s->block))
    const struct sample_rows rows = {
        .options = tensor_2d(THERE(s->options, SAMPLE_OPTIONS), DT_F32, count, SAMPLE_OPTIONS),
        .top_k = tensor_1d(THERE(s->top_k, 1), DT_I32, count),
        .seed = tensor_1d(THERE(s->seed, 1), DT_I64, count),
        .index = tensor_1d(THERE(s->index, 1), DT_I64, count),
        .seen = tensor_2d(THERE(s->seen, s->words), DT_I32, count, s->words),
        .token = tensor_1d(THERE(s->token, 1), DT_I32, count),
        .status = tensor_1d(THERE(s->status, 1), DT_I32, count),
        .params = {.greedy = s->greedy},
    };
    struct tensor logits = tensor_2d(THERE(s->logits, s->V), DT_F32, count, s->V);
#undef THERE
    if (sample(ctx, logits, &rows, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    assert_int_equal(b->download(ctx, s->block, memory, s->bytes, &err), TRIL_OK);
    b->release(memory);
}

/* Logits in the manner of `kind`, options drawn from what users choose and from the corners. */
static inline void sampling_fill(struct sampling *s, int kind) {
    static const float temperatures[] = {0, 0.3f, 0.7f, 1, 1, 2, 50};
    static const float parts[] = {1, 1, 0, 0.1f, 0.5f, 0.9f, 0.95f, 0.999f};
    static const float least[] = {0, 0, 0, 0.01f, 0.2f, 1};
    static const float penalties[] = {1, 1, 1.1f, 3, 0.6f};
    const struct random_key key = {
        .seed = 7, .step = (uint64_t)(kind * 1000 + s->V), .op = RANDOM_TEST};
    const struct random_key other = {.seed = 8, .step = key.step, .op = RANDOM_TEST};
    const int32_t counts[] = {0, 0, 1, 2, 40, (int32_t)(s->V / 2), (int32_t)s->V, 1 << 30};
    for (int64_t n = 0; n < s->N; n++) {
        float *x = s->logits + n * s->V, *o = s->options + n * SAMPLE_OPTIONS;
        uint64_t r = (uint64_t)n * 16;
        o[SAMPLE_TEMPERATURE] = temperatures[random_below(&other, r, 7)];
        o[SAMPLE_TOP_P] = parts[random_below(&other, r + 1, 8)];
        o[SAMPLE_MIN_P] = least[random_below(&other, r + 2, 6)];
        o[SAMPLE_PENALTY] = penalties[random_below(&other, r + 3, 5)];
        s->top_k[n] = counts[random_below(&other, r + 4, 8)];
        s->seed[n] = (int64_t)random_below(&other, r + 5, UINT64_MAX);
        s->index[n] = (int64_t)random_below(&other, r + 6, 1000000);
        if (s->greedy)
            o[SAMPLE_TEMPERATURE] = 0;
        for (int64_t w = 0; w < s->words; w++) /* every fourth */
            s->seen[n * s->words + w] =
                (int32_t)(random_u32(&other, (uint64_t)(1000 + 2 * (n * s->words + w))) &
                          random_u32(&other, (uint64_t)(1001 + 2 * (n * s->words + w))));
        for (int64_t i = 0; i < s->V; i++) {
            float z = random_normal(&key, (uint64_t)(n * s->V + i));
            x[i] = kind == 0   ? 3 * z                           /* as a model's */
                   : kind == 1 ? floorf(2 * z)                   /* many equal ones */
                   : kind == 2 ? 0                               /* nothing else */
                   : kind == 3 ? (i % 3 ? 4 * z : -INFINITY)     /* banned tokens */
                   : kind == 4 ? (i == n % s->V ? 60 : 0.1f * z) /* one token */
                               : 1e-4f * z;                      /* close to each other */
        }
    }
}
enum { SAMPLING_KINDS = 6 };

/* Rows whose token is another one than the reference's. That happens where the draw lies within
 * rounding (some 1e-7 of the weight) of a token's share: in none of a few thousand rows, but for
 * one in a thousand runs; the rows here are always the same. */
static inline void sampling_compare(struct op_context *ctx, int64_t N, int64_t V, bool greedy) {
    struct op_context scalar;
    assert_int_equal(op_context_init(&scalar, backend_reference(), NULL), TRIL_OK);
    for (int kind = 0; kind < SAMPLING_KINDS; kind++) {
        struct sampling a, b;
        sampling_create(&a, N, V);
        sampling_create(&b, N, V);
        a.greedy = b.greedy = greedy;
        sampling_fill(&a, kind);
        memcpy(b.block, a.block, (size_t)a.bytes);
        sampling_run(&a, &scalar, 0, N);
        sampling_run(&b, ctx, 0, N);
        for (int64_t n = 0; n < N; n++) {
            const float *o = a.options + n * SAMPLE_OPTIONS;
            if (a.token[n] != b.token[n] || a.status[n] != b.status[n])
                fail_msg("V %d, kind %d, row %d: token %d (status %d) instead of %d; temperature "
                         "%g, top_k %d, top_p %g, min_p %g, penalty %g",
                         (int)V, kind, (int)n, b.token[n], b.status[n], a.token[n],
                         (double)o[SAMPLE_TEMPERATURE], a.top_k[n], (double)o[SAMPLE_TOP_P],
                         (double)o[SAMPLE_MIN_P], (double)o[SAMPLE_PENALTY]);
        }
        assert_memory_equal(a.block, b.block, (size_t)a.bytes); /* index and seen too */
        free(a.block);
        free(b.block);
    }
    op_context_free(&scalar);
}

/* A row alone gives what it gives among others. */
static inline void sampling_alone(struct op_context *ctx, int64_t N, int64_t V) {
    struct sampling a, b;
    sampling_create(&a, N, V);
    sampling_create(&b, N, V);
    sampling_fill(&a, 0);
    memcpy(b.block, a.block, (size_t)a.bytes);
    sampling_run(&a, ctx, 0, N);
    for (int64_t n = N; n-- > 0;)
        sampling_run(&b, ctx, n, 1);
    assert_memory_equal(a.block, b.block, (size_t)a.bytes);
    free(a.block);
    free(b.block);
}

enum { SAMPLING_TOKENS = 37, SAMPLING_TOP_K = 20 };

/* Pearson's statistic of N draws from one row against probabilities computed here with another
 * `temperature` than the draws' 0.8. Tokens are kept by top_k and by top_p. */
static inline double sampling_statistic(struct op_context *ctx, int64_t N, double temperature,
                                        int *freedom) {
    struct sampling s;
    double p[SAMPLING_TOKENS], total = 0, kept = 0, statistic = 0;
    int counts[SAMPLING_TOKENS] = {0};
    sampling_create(&s, N, SAMPLING_TOKENS);
    for (int64_t n = 0; n < N; n++) {
        for (int i = 0; i < SAMPLING_TOKENS; i++) /* 11 i mod 37: 0 is the likeliest */
            s.logits[n * SAMPLING_TOKENS + i] = -0.15f * (float)(11 * i % SAMPLING_TOKENS);
        s.options[n * SAMPLE_OPTIONS + SAMPLE_TEMPERATURE] = 0.8f;
        s.options[n * SAMPLE_OPTIONS + SAMPLE_TOP_P] = 0.9f;
        s.top_k[n] = SAMPLING_TOP_K;
        s.seed[n] = 12345;
        s.index[n] = n;
    }
    sampling_run(&s, ctx, 0, N);
    for (int64_t n = 0; n < N; n++)
        counts[11 * s.token[n] % SAMPLING_TOKENS]++; /* by rank */
    for (int i = 0; i < SAMPLING_TOP_K; i++)
        total += p[i] = exp(-0.15 * i / temperature);
    *freedom = -1;
    int last = 0;
    while (kept < 0.9 * total)
        kept += p[last++];
    for (int i = 0; i < SAMPLING_TOKENS; i++) {
        double expected = i < last ? (double)N * p[i] / kept : 0;
        if (i >= last && counts[i])
            fail_msg("token of rank %d was drawn, but %d are kept", i, last);
        if (i < last)
            statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
        *freedom += i < last;
    }
    free(s.block);
    return statistic;
}

/* P(chi^2 of f degrees >= f + 2 sqrt(f x) + 2 x) <= exp(-x) (Laurent, Massart 2000): with x = 14,
 * 8e-7. Draws at another temperature go beyond it. */
static inline void sampling_frequencies(struct op_context *ctx, int64_t N, double wrong) {
    int f;
    const double statistic = sampling_statistic(ctx, N, 0.8, &f);
    const double bound = f + 2 * sqrt(f * 14.0) + 28;
    print_message("chi^2 of %d degrees: %.1f, at most %.1f\n", f, statistic, bound);
    assert_true(f > 8);
    assert_true(statistic <= bound);
    assert_true(sampling_statistic(ctx, N, wrong, &f) > bound);
}

#endif
