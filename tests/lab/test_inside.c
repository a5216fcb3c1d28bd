// ctest: timeout=900 threads=1
/* The lab's experiments on what goes on inside: ablations, smoothing, probes. */
#include "lab/lab_support.h"

static void test_ablation(void **state) {
    (void)state;
    json_t *r = lab_result("ablation");
    double all = lab_number(r, "everything");
    assert_true(all < lab_number(r, "first_loss") - 2); /* it learns */
    assert_true(lab_number(r, "no_residual") > all + 0.3);
    assert_true(lab_number(r, "no_mlp") > all);
    assert_between(r, "gradient_residual", 0.3, 3);
    assert_between(r, "gradient_neither", 0, 1e-2);
    json_decref(r);
}

static void test_smoothing(void **state) {
    (void)state;
    json_t *r = lab_result("smoothing");
    assert_true(lab_number(r, "attention_alone") > 0.95);
    assert_true(lab_number(r, "plain") < lab_number(r, "attention_alone") - 0.05);
    assert_true(lab_number(r, "trained") < lab_number(r, "plain"));
    assert_between(r, "first_layer", -0.1, 0.3);
    json_decref(r);
}

static void test_probes(void **state) {
    (void)state;
    json_t *r = lab_result("probes");
    assert_between(r, "xor_plain", 0.3, 0.7);
    assert_between(r, "rings_plain", 0.3, 0.7);
    assert_true(lab_number(r, "xor_wide") > 0.95 && lab_number(r, "rings_wide") > 0.95);
    assert_between(r, "other_tokens", 0, 0);
    assert_true(lab_number(r, "own_token") > 0);
    assert_true(lab_number(r, "this_first") > 95); /* the embedding is the token */
    assert_true(lab_number(r, "before_best") > lab_number(r, "before_first") + 5);
    assert_true(lab_number(r, "next_last") > lab_number(r, "chance"));
    json_decref(r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ablation),
        cmocka_unit_test(test_smoothing),
        cmocka_unit_test(test_probes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
