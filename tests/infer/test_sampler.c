/* The sampler: filters against their definitions, frequencies against probabilities. */
#include "support/support.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "infer/sampler.h"

enum { V = 1000 };

static struct op_context context;

static struct sampler *make(struct sampler_options o) {
    struct sampler *s;
    struct tril_error err;
    assert_int_equal(sampler_create(&s, &context, &o, V, &err), TRIL_OK);
    return s;
}

static tril_status draw(struct sampler *s, float *logits, int32_t *token, double *lp) {
    struct tril_error err;
    assert_int_equal(sampler_draw(s, tensor_2d(logits, DT_F32, 1, V), &err), TRIL_OK);
    return sampler_read(s, token, lp, &err);
}

static int32_t next(struct sampler *s, float *logits) {
    int32_t token;
    assert_int_equal(draw(s, logits, &token, NULL), TRIL_OK);
    return token;
}

/* Token i has probability proportional to 2^-i, placed at shuffled ids: likeliest first in `order`.
 */
static void geometric(float *logits, int32_t *order) {
    for (int i = 0; i < V; i++) {
        order[i] = (i * 617 + 31) % V; /* 617 is coprime to 1000 */
        logits[order[i]] = -(float)M_LN2 * (float)i;
    }
}

static void test_greedy(void **state) {
    struct sampler_options o = sampler_defaults();
    float logits[V];
    int32_t order[V], token;
    double lp;
    (void)state;
    geometric(logits, order);
    o.temperature = 0;
    o.log_probability = true;
    struct sampler *s = make(o);
    assert_int_equal(next(s, logits), order[0]);
    assert_int_equal(draw(s, logits, &token, &lp), TRIL_OK);
    assert_int_equal(token, order[0]);
    assert_true(fabs(lp - log(0.5)) < 1e-6); /* 1 / (1 + 1/2 + 1/4 + ...) */
    sampler_free(s);
}

/* Draws n tokens; counts[rank] is how often the rank-th likeliest came. */
static void count(struct sampler *s, float *logits, const int32_t *order, int n, int *counts) {
    int rank[V];
    for (int i = 0; i < V; i++)
        rank[order[i]] = i;
    memset(counts, 0, V * sizeof *counts);
    for (int i = 0; i < n; i++)
        counts[rank[next(s, logits)]]++;
}

static void test_frequencies(void **state) {
    struct sampler_options o = sampler_defaults();
    float logits[V];
    int32_t order[V];
    int counts[V];
    (void)state;
    geometric(logits, order);
    struct sampler *s = make(o);
    count(s, logits, order, 20000, counts);
    for (int i = 0; i < 5; i++) { /* five standard deviations of a binomial */
        double p = ldexp(1, -i - 1), sd = sqrt(20000 * p * (1 - p));
        assert_true(fabs(counts[i] - 20000 * p) < 5 * sd);
    }
    sampler_free(s);
    o.temperature = 0.5; /* squares the probabilities: ratios of 4 */
    s = make(o);
    count(s, logits, order, 20000, counts);
    double p = 0.75, sd = sqrt(20000 * p * (1 - p));
    assert_true(fabs(counts[0] - 20000 * p) < 5 * sd);
    sampler_free(s);
}

static void test_filters(void **state) {
    float logits[V];
    int32_t order[V];
    int counts[V];
    (void)state;
    geometric(logits, order);
    for (int which = 0; which < 4; which++) {
        struct sampler_options o = sampler_defaults();
        int kept = 0;
        if (which == 0)
            o.top_k = 3, kept = 3;
        if (which == 1)
            o.top_p = 0.9, kept = 4; /* 0.5 + 0.25 + 0.125 + 0.0625 >= 0.9 */
        if (which == 2)
            o.min_p = 0.2, kept = 3; /* 1, 0.5, 0.25 >= 0.2 */
        if (which == 3)
            o.top_k = 2, o.top_p = 0.99, kept = 2;
        struct sampler *s = make(o);
        count(s, logits, order, 3000, counts);
        for (int i = 0; i < V; i++)
            assert_true(i < kept ? counts[i] > 0 : counts[i] == 0);
        sampler_free(s);
    }
}

/* A flat distribution: top-p must look beyond its first sorted prefix. */
static void test_flat_top_p(void **state) {
    struct sampler_options o = sampler_defaults();
    float logits[V];
    int32_t order[V];
    static int counts[V];
    int seen = 0;
    (void)state;
    for (int i = 0; i < V; i++) {
        logits[i] = 0;
        order[i] = i;
    }
    o.top_p = 0.7;
    struct sampler *s = make(o);
    count(s, logits, order, 20000, counts);
    for (int i = 0; i < V; i++)
        seen += counts[i] > 0;
    assert_true(seen >= 698 && seen <= 701);
    sampler_free(s);
}

static void test_penalty_and_seed(void **state) {
    struct sampler_options o = sampler_defaults();
    float logits[V] = {0};
    (void)state;
    logits[3] = 2;
    logits[5] = 1.5f;
    o.temperature = 0;
    o.repetition_penalty = 2;
    struct sampler *s = make(o);
    assert_int_equal(next(s, logits), 3);
    sampler_accept(s, 3); /* 2 / 2 < 1.5 */
    assert_int_equal(next(s, logits), 5);
    sampler_free(s);
    o = sampler_defaults();
    o.seed = 42;
    struct sampler *a = make(o), *b = make(o);
    for (int i = 0; i < 50; i++)
        assert_int_equal(next(a, logits), next(b, logits));
    sampler_free(a);
    sampler_free(b);
}

static void test_refusals(void **state) {
    struct sampler_options o = sampler_defaults();
    struct sampler *s = NULL;
    struct tril_error err;
    float logits[V] = {0};
    int32_t token;
    (void)state;
    o.top_p = 1.5;
    assert_int_equal(sampler_create(&s, &context, &o, V, &err), TRIL_ERR_ARGUMENT);
    s = make(sampler_defaults());
    logits[7] = NAN;
    assert_int_equal(draw(s, logits, &token, NULL), TRIL_ERR_NUMERIC);
    logits[7] = INFINITY;
    assert_int_equal(draw(s, logits, &token, NULL), TRIL_ERR_NUMERIC);
    logits[7] = -INFINITY; /* a banned token */
    assert_int_equal(draw(s, logits, &token, NULL), TRIL_OK);
    sampler_free(s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),           cmocka_unit_test(test_frequencies),
        cmocka_unit_test(test_filters),          cmocka_unit_test(test_flat_top_p),
        cmocka_unit_test(test_penalty_and_seed), cmocka_unit_test(test_refusals),
    };
    if (op_context_init(&context, backend_cpu(), NULL) != TRIL_OK)
        return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
