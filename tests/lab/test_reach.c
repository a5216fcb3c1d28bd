// ctest: timeout=900 threads=1
/* The lab's experiments on how far back is seen: retrieval by distance, streams, the longest
 * context. */
#include "lab/lab_support.h"

static void test_passkey(void **state) {
    (void)state;
    json_t *r = lab_result("passkey");
    assert_true(lab_number(r, "full_mean") > 90);
    assert_true(lab_number(r, "full_far") > 90);
    assert_true(lab_number(r, "hybrid_far") > 90);
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
    assert_true(lab_number(r, "recurrence_allowed") > 1e8);
    assert_true(lab_number(r, "memory_allowed") > 1e8);
#ifndef __SANITIZE_ADDRESS__
    assert_true(lab_number(r, "hybrid_mb") < 100 && lab_number(r, "sparse_mb") < 100);
    assert_true(lab_number(r, "recurrence_mb") < 100 && lab_number(r, "memory_mb") < 100);
#endif
    json_decref(r);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_passkey),
        cmocka_unit_test(test_streaming),
        cmocka_unit_test(test_longest_context),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
