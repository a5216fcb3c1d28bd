// ctest: timeout=900 threads=1
/* The lab's experiments that train models alike: exact implementations agree, positions behave at
 * lengths they were not trained on. */
#include "lab/lab_support.h"

static void test_quality(void **state) {
    (void)state;
    json_t *r = lab_result("quality");
    double full = lab_number(r, "perplexity");
    /* fp32 against double, averaged over thousands of tokens. */
    assert_between(r, "exact_difference", 0, 1e-5 * full);
    assert_true(full < lab_number(r, "vocab") / 10); /* it has learnt something */
    static const char *const kinds[] = {"window", "dilated", "fixed", "strided", "linear"};
    for (int i = 0; i < 5; i++) /* all of them learn, and each is another model */
        assert_true(lab_number(r, kinds[i]) < 3 * full && lab_number(r, kinds[i]) != full);
    json_decref(r);
}

static void test_extrapolation(void **state) {
    (void)state;
    json_t *r = lab_result("extrapolation");
    assert_between(r, "rope_trained", 0.5, 2.5); /* nats: learnt (ln V is 6) */
    assert_between(r, "alibi", -1, 0.05);
    assert_true(lab_number(r, "rope") > 0.05);
    assert_true(lab_number(r, "learned") > 0.05);
    assert_true(lab_number(r, "yarn") < lab_number(r, "rope") / 2);
    json_decref(r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quality),
        cmocka_unit_test(test_extrapolation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
