// ctest: timeout=900
/* The lab's timing and memory experiments: results agree between implementations, and memory grows
 * as it must. Times themselves are not asserted: other work shares the machine. */
#include "lab/lab_support.h"

#include "lab/lab.h"

static void test_by_hand(void **state) {
    (void)state;
    json_t *r = lab_result("by-hand");
    /* Sums of 10 products and 8 weights of numbers of size 2, in fp32: 20 roundings of 6e-8. */
    assert_between(r, "difference", 0, 2.4e-6);
    assert_between(r, "mean_difference", 0, 1e-7);
    assert_between(r, "manual_from_exact", 0, 2.4e-6);
    assert_between(r, "flash_from_exact", 0, 2.4e-6);
    json_decref(r);
}

static void test_mha_grid(void **state) {
    (void)state;
    json_t *r = lab_result("mha-grid"), *t = json_array_get(json_object_get(r, "tables"), 0);
    assert_between(r, "cells", 36, 36);
    assert_int_equal(json_array_size(json_object_get(t, "rows")), 36);
    json_decref(r);
}

static void test_block_time(void **state) {
    (void)state;
    json_t *r = lab_result("block-time");
    /* fp32 outputs of size 4, sums of up to 1536 products: a hundred roundings of 2.4e-7. */
    assert_between(r, "difference", 0, 2.4e-5);
    json_decref(r);
}

static void test_block_memory(void **state) {
    (void)state;
    json_t *r = lab_result("block-memory");
#ifndef __SANITIZE_ADDRESS__
    /* Between rows (1) and squares (2); the quick lengths are short, so neither is pure. */
    assert_true(lab_number(r, "standard_growth") > lab_number(r, "flash_growth") + 0.3);
    assert_true(lab_number(r, "saved") > 0);
    assert_between(r, "flash_growth", 0.3, 1.4);
#endif
    json_decref(r);
}

static void test_fusion(void **state) {
    (void)state;
    json_t *r = lab_result("fusion");
    /* Scores are sums of 64 products, weights err by twice a score's rounding, values are below 5:
     * 2 * 64 * 6e-8 * 5. */
    assert_between(r, "difference", 0, 3.9e-5);
    assert_true(lab_number(r, "manual_seconds") > 0 && lab_number(r, "flash_seconds") > 0);
    json_decref(r);
}

static void test_inference(void **state) {
    (void)state;
    json_t *r = lab_result("inference");
    assert_between(r, "flops_saved", 0.97, 0.9999); /* 256 tokens, and scores of one row of them */
    /* Two layers of sums of 64 to 256 in fp32, logits of size 4. */
    assert_between(r, "difference_flash", 0, 1e-4);
    assert_between(r, "difference_cache", 0, 1e-4);
    assert_true(lab_number(r, "gain") > 2); /* of two hundred times less work */
    json_decref(r);
}

static void test_training(void **state) {
    (void)state;
    json_t *r = lab_result("training");
    /* Means over 512 tokens of losses near ln 256, three layers and four updates in fp32. */
    assert_between(r, "loss_difference", 0, 1e-5);
    assert_between(r, "loss_bf16_difference", 1e-9, 0.02); /* it is bf16, and it learns the same */
    assert_between(r, "activations_saved", 0.5, 0.95);
#ifndef __SANITIZE_ADDRESS__
    assert_true(lab_number(r, "memory_saved") > 0.2);
#endif
    json_decref(r);
}

static tril_status count(void *arg, struct tril_error *err) {
    (void)err;
    ++*(int *)arg;
    return TRIL_OK;
}

static void test_measuring(void **state) {
    (void)state;
    double x[] = {1, 2, 3, 4}, y[] = {5, 7, 9, 11}, z[] = {1, -1, 1, -1};
    struct lab_line line = lab_fit(x, y, 4);
    assert_true(fabs(line.a - 3) < 1e-12 && fabs(line.b - 2) < 1e-12 && line.r2 > 1 - 1e-12);
    assert_true(lab_fit(x, z, 4).r2 < 0.3);
    struct tril_error err = {0};
    struct lab_timing how = {.warm = 5, .runs = 20};
    struct lab_times t;
    int calls = 0;
    assert_int_equal(lab_time(&how, count, &calls, &t, &err), TRIL_OK);
    assert_int_equal(calls, 25); /* the cold call is the first of the warm-ups */
    assert_int_equal(t.runs + t.dropped, 20);
    assert_true(t.fastest <= t.median && t.runs >= 10);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_measuring),    cmocka_unit_test(test_by_hand),
        cmocka_unit_test(test_mha_grid),     cmocka_unit_test(test_block_time),
        cmocka_unit_test(test_block_memory), cmocka_unit_test(test_fusion),
        cmocka_unit_test(test_inference),    cmocka_unit_test(test_training),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
