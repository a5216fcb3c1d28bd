/* The 3-gram baseline against its definition, evaluated from the text by brute force. */
#include "lab/kneser_ney.h"

#include <math.h>
#include <stdlib.h>

#include "base/random.h"
#include "support/support.h"

enum { V = 6, N = 400 };

static uint32_t text[N];
static int64_t c3[V][V][V], c2[V][V], c1[V]; /* counts, continuation counts */

/* A skewed text, such that some 3-grams are frequent, many rare, and one token does not occur. */
static void text_make(void) {
    const struct random_key key = {.seed = 5, .op = RANDOM_TEST};
    for (uint64_t i = 0; i < N; i++) {
        double u = (double)random_uniform(&key, i);
        text[i] = i % 3 == 2 && u < 0.5 ? (text[i - 1] + 1) % (V - 1) : (uint32_t)(u * u * (V - 1));
    }
    for (int i = 2; i < N; i++)
        c3[text[i - 2]][text[i - 1]][text[i]]++;
    for (int u = 0; u < V; u++)
        for (int v = 0; v < V; v++)
            for (int w = 0; w < V; w++)
                c2[v][w] += c3[u][v][w] > 0;
    for (int v = 0; v < V; v++)
        for (int w = 0; w < V; w++)
            c1[w] += c2[v][w] > 0;
}

static double discount(const int64_t *counts, int size, int64_t count) {
    double n[5] = {0};
    for (int i = 0; i < size; i++)
        if (counts[i] >= 1 && counts[i] <= 4)
            n[counts[i]]++;
    if (count == 0)
        return 0;
    int k = count < 3 ? (int)count : 3;
    if (n[1] == 0 || n[2] == 0 || n[3] == 0 || n[4] == 0)
        return 0.5 * k;
    double y = n[1] / (n[1] + 2 * n[2]);
    double d = k - (k + 1) * y * n[k + 1] / n[k];
    return d < 0 ? 0 : d > k ? k : d;
}

/* p(w | h) for all w, from the counts of one context and the distribution below it. */
static void level(const int64_t *row, const int64_t *all, int size, const double *below,
                  double *p) {
    double total = 0, left = 0;
    for (int w = 0; w < V; w++)
        total += (double)row[w];
    for (int w = 0; w < V; w++) {
        p[w] = total > 0 ? ((double)row[w] - discount(all, size, row[w])) / total : 0;
        left += p[w];
    }
    for (int w = 0; w < V; w++)
        p[w] += (1 - left) * below[w];
}

static void test_definition(void **state) {
    (void)state;
    struct kneser_ney *m;
    assert_int_equal(kneser_ney_train(&m, text, N, V, NULL), TRIL_OK);
    /* The text gives the 3-grams estimated discounts, and the tokens the fixed ones. */
    assert_true(discount(c3[0][0], V * V * V, 1) != 0.5 && discount(c1, V, 1) == 0.5);
    double uniform[V], p1[V], p2[V], p3[V], loss = 0, got;
    for (int w = 0; w < V; w++)
        uniform[w] = 1.0 / V;
    level(c1, c1, V, uniform, p1);
    int unseen = 0;
    for (uint32_t u = 0; u < V; u++) {
        for (uint32_t v = 0; v < V; v++) {
            const uint32_t context[3] = {0, u, v};
            double sums[3] = {0, 0, 0}, none = 0;
            level(c2[v], c2[0], V * V, p1, p2);
            level(c3[u][v], c3[0][0], V * V * V, p2, p3);
            for (uint32_t w = 0; w < V; w++) {
                const double q[3] = {kneser_ney_probability(m, NULL, 0, w),
                                     kneser_ney_probability(m, &v, 1, w),
                                     kneser_ney_probability(m, context, 3, w)};
                assert_true(fabs(q[0] - p1[w]) < 1e-14);
                assert_true(fabs(q[1] - p2[w]) < 1e-14);
                assert_true(fabs(q[2] - p3[w]) < 1e-14);
                assert_true(q[0] > 0 && q[1] > 0 && q[2] > 0);
                for (int k = 0; k < 3; k++)
                    sums[k] += q[k];
                none += (double)c3[u][v][w];
            }
            unseen += none == 0;
            for (int k = 0; k < 3; k++)
                assert_true(fabs(sums[k] - 1) < 1e-14);
        }
    }
    assert_true(unseen > 0 && unseen < V * V / 2); /* both kinds of context were compared */

    /* The loss is the mean over all tokens but the first. */
    for (int i = 1; i < N; i++)
        loss -= log(kneser_ney_probability(m, text, i, text[i])) / (N - 1);
    assert_int_equal(kneser_ney_loss(m, text, N, &got, NULL), TRIL_OK);
    assert_true(fabs(got - loss) < 1e-12);
    kneser_ney_free(m);
}

/* Texts whose entropy is known: independent uniform tokens cannot be predicted, a cycle can. */
static void test_known_entropy(void **state) {
    (void)state;
    enum { COUNT = 200000, VOCAB = 50 };
    const struct random_key key = {.seed = 6, .op = RANDOM_TEST};
    uint32_t *tokens = malloc(COUNT * sizeof *tokens);
    struct kneser_ney *m;
    double loss;
    assert_non_null(tokens);
    for (uint64_t i = 0; i < COUNT; i++)
        tokens[i] = (uint32_t)random_below(&key, i, VOCAB);
    assert_int_equal(kneser_ney_train(&m, tokens, COUNT / 2, VOCAB, NULL), TRIL_OK);
    assert_int_equal(kneser_ney_loss(m, tokens + COUNT / 2, COUNT / 2, &loss, NULL), TRIL_OK);
    assert_true(loss > log(VOCAB) - 0.001 && loss < log(VOCAB) + 0.1);
    kneser_ney_free(m);
    for (int i = 0; i < COUNT; i++)
        tokens[i] = (uint32_t)(i % VOCAB);
    assert_int_equal(kneser_ney_train(&m, tokens, COUNT, VOCAB, NULL), TRIL_OK);
    assert_int_equal(kneser_ney_loss(m, tokens, COUNT, &loss, NULL), TRIL_OK);
    assert_true(loss < 0.01);
    kneser_ney_free(m);
    free(tokens);
}

static void test_edges(void **state) {
    (void)state;
    const uint32_t few[] = {3, 1, 4};
    struct kneser_ney *m;
    double loss = -1;
    for (int64_t n = 0; n <= 3; n++) {
        assert_int_equal(kneser_ney_train(&m, few, n, 5, NULL), TRIL_OK);
        double sum = 0;
        for (uint32_t w = 0; w < 5; w++)
            sum += kneser_ney_probability(m, few, 2, w);
        assert_true(fabs(sum - 1) < 1e-14);
        assert_int_equal(kneser_ney_loss(m, few, 3, &loss, NULL), TRIL_OK);
        assert_true(n > 2 || fabs(loss - log(5)) < 1e-14); /* nothing counted: uniform */
        assert_int_equal(kneser_ney_loss(m, few, 1, &loss, NULL), TRIL_ERR_ARGUMENT);
        kneser_ney_free(m);
    }
    struct tril_error err;
    assert_int_equal(kneser_ney_train(&m, few, 3, 4, &err), TRIL_ERR_ARGUMENT);
    assert_string_equal(err.message, "token 4 is outside the vocabulary of 4");
    assert_null(m);
    assert_int_equal(kneser_ney_train(&m, few, 0, 0, NULL), TRIL_ERR_ARGUMENT);
    assert_int_equal(kneser_ney_train(&m, few, 2, 4, NULL), TRIL_OK);
    assert_int_equal(kneser_ney_loss(m, few, 3, &loss, &err), TRIL_ERR_ARGUMENT);
    kneser_ney_free(m);
    kneser_ney_free(NULL);
}

int main(void) {
    text_make();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition),
        cmocka_unit_test(test_known_entropy),
        cmocka_unit_test(test_edges),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
