// ctest: timeout=900
/* The lab's experiments on what goes on inside: ablations, smoothing, probes, retrieval, streams.
 */
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

static void test_passkey(void **state) {
    (void)state;
    json_t *r = lab_result("passkey");
    assert_true(lab_number(r, "full_mean") > 90);
    assert_true(lab_number(r, "full_far") > 90);
    assert_true(lab_number(r, "window_near") > 90);
    assert_true(lab_number(r, "window_far") < 40); /* out of reach: chance is 6 */
    json_decref(r);
}

static void test_streaming(void **state) {
    (void)state;
    json_t *r = lab_result("streaming");
    assert_true(lab_number(r, "dense_change") > lab_number(r, "window_change") + 0.1);
    assert_true(lab_number(r, "sinks_change") < lab_number(r, "dense_change"));
    json_decref(r);
}

static void test_longest_context(void **state) {
    (void)state;
    json_t *r = lab_result("longest-context");
    /* Lengths reached depend on the time that the machine gives; what memory allows does not. */
    assert_between(r, "standard_allowed", 1024, 4096);
    assert_true(lab_number(r, "flash_allowed") >= 32768);
    assert_true(lab_number(r, "hybrid_allowed") > 1e8);
    assert_true(lab_number(r, "hybrid_longest") >= 4096);
#ifndef __SANITIZE_ADDRESS__
    assert_true(lab_number(r, "hybrid_mb") < 100 && lab_number(r, "sparse_mb") < 100);
#endif
    json_decref(r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ablation),  cmocka_unit_test(test_smoothing),
        cmocka_unit_test(test_probes),    cmocka_unit_test(test_passkey),
        cmocka_unit_test(test_streaming), cmocka_unit_test(test_longest_context),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
