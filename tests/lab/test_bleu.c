/* BLEU against its definition by hand and against what sacreBLEU 2.6 prints for the same words. */
#include "lab/bleu.h"

#include <math.h>
#include <string.h>

#include "support/support.h"

static struct tril_error err;

static void add(struct bleu *b, const char *candidate, const char *reference) {
    if (bleu_add(b, candidate, strlen(candidate), reference, strlen(reference), &err) != TRIL_OK)
        fail_msg("%s", err.message);
}

/* The same few operations in double. */
#define assert_score(b, smoothing, wanted)                                                         \
    assert_true(fabs(bleu_score(b, smoothing) - (wanted)) <= 1e-12 * (wanted))

static void assert_counts(const struct bleu *b, const int64_t *match, const int64_t *total) {
    for (int k = 0; k < BLEU_ORDER; k++) {
        assert_int_equal(b->match[k], match[k]);
        assert_int_equal(b->total[k], total[k]);
    }
}

static void test_by_hand(void **state) {
    (void)state;
    struct bleu b = {0};
    add(&b, "the cat sat on the mat.", "the cat is on the mat.");
    assert_counts(&b, (int64_t[]){6, 4, 2, 1}, (int64_t[]){7, 6, 5, 4});
    double p = 6.0 / 7 * 4 / 6 * 2 / 5 * 1 / 4;
    assert_score(&b, BLEU_PLAIN, 100 * sqrt(sqrt(p)));
    assert_score(&b, BLEU_EXPONENTIAL, 48.892302243490086);
    /* Seven words of one kind, of which the reference has two (Papineni's example). */
    b = (struct bleu){0};
    add(&b, "the the the the the the the", "the cat is on the mat");
    assert_counts(&b, (int64_t[]){2, 0, 0, 0}, (int64_t[]){7, 6, 5, 4});
    assert_true(bleu_score(&b, BLEU_PLAIN) == 0);
    p = 2.0 / 7 * (0.5 / 6) * (0.25 / 5) * (0.125 / 4);
    assert_score(&b, BLEU_EXPONENTIAL, 100 * sqrt(sqrt(p)));
    assert_score(&b, BLEU_EXPONENTIAL, 7.809849842300637);
}

static void test_corpus(void **state) {
    (void)state;
    struct bleu b = {0};
    add(&b, "the cat sat on the mat", "the cat sat on a mat");
    add(&b, "a quick brown fox jumps over it", "the quick brown fox jumps over the lazy dog");
    assert_counts(&b, (int64_t[]){10, 7, 5, 3}, (int64_t[]){13, 11, 9, 7});
    assert_score(&b, BLEU_PLAIN, 50.09722181540699); /* brevity exp(1 - 15/13) */
    b = (struct bleu){0};
    add(&b, "on the mat a cat sat down", "the mat on which a cat sat down , down , down");
    assert_score(&b, BLEU_PLAIN, 24.875214880684553);
    b = (struct bleu){0}; /* no candidate has four words */
    add(&b, "the cat", "the cat sat");
    add(&b, "he said", "she said so");
    assert_counts(&b, (int64_t[]){3, 1, 0, 0}, (int64_t[]){4, 2, 0, 0});
    assert_true(bleu_score(&b, BLEU_EXPONENTIAL) == 0);
    b = (struct bleu){0};
    assert_true(bleu_score(&b, BLEU_EXPONENTIAL) == 0);
    add(&b, "", "the cat");
    add(&b, " \n\t", "");
    assert_int_equal(b.candidate, 0);
    assert_int_equal(b.reference, 2);
    assert_true(bleu_score(&b, BLEU_PLAIN) == 0);
}

static void test_words(void **state) {
    (void)state;
    struct bleu b = {0};
    const char *text = "\"V\xc3\xad d\xe1\xbb\xa5, 1911's\" \xe2\x80\x94 yes?";
    add(&b, text, text); /* " Ví dụ , 1911 ' s " -- yes ? */
    assert_int_equal(b.candidate, 11);
    assert_score(&b, BLEU_PLAIN, 100.0);
    b = (struct bleu){0};
    add(&b, "The Cat", "the cat"); /* case counts */
    assert_int_equal(b.match[0], 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_by_hand),
        cmocka_unit_test(test_corpus),
        cmocka_unit_test(test_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
