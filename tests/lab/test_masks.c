// ctest: timeout=180
/* The lab's first experiments: their claims hold in numbers. */
#include "lab/lab_support.h"

static void test_averaging(void **state) {
    (void)state;
    json_t *r = lab_result("averaging");
    /* fp32 weights: each of up to 128 is rounded once, relative to itself: eps/2 in all. */
    assert_between(r, "row_sum_error", 0, 6.1e-8);
    assert_between(r, "average_difference", 0, 1e-6); /* fp32 sums of 64 numbers of size 3 */
    assert_true(lab_number(r, "softmax_largest") > 1.5 * lab_number(r, "linear_largest"));
    assert_true(lab_number(r, "softmax_effective") < lab_number(r, "linear_effective"));
    json_decref(r);
}

static void test_leak(void **state) {
    (void)state;
    json_t *r = lab_result("leak");
    assert_between(r, "leak_zero", 0.05, 1);
    assert_between(r, "leak_infinite", 0, 0);
    assert_between(r, "leak_finite", 0, 1e-300);
    assert_between(r, "row_error", 0, 1e-13); /* 64 sums in double */
    assert_between(r, "mask_difference", 0, 1e-6);
    assert_between(r, "prefix_difference", 0, 1e-5); /* fp32, other tiles */
    assert_true(lab_number(r, "prefix_speedup") > 2);
    json_decref(r);
}

static void test_report(void **state) {
    (void)state;
    struct tril_error err = {0};
    int count = 0;
    char path[512];
    static char page[1 << 21];
    assert_int_equal(tril_lab_report(test_dir(), &count, &err), TRIL_OK);
    assert_int_equal(count, 2);
    snprintf(path, sizeof path, "%s/report.html", test_dir());
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    size_t n = fread(page, 1, sizeof page - 1, f);
    fclose(f);
    page[n] = 0;
    assert_non_null(strstr(page, "id='averaging'"));
    assert_non_null(strstr(page, "id='leak'"));
    assert_non_null(strstr(page, "<svg"));
    assert_null(strstr(page, "<script"));
    assert_null(strstr(page, "src=")); /* nothing is fetched */
}

static void test_refusals(void **state) {
    (void)state;
    struct tril_error err = {0};
    struct tril_lab_options o = {.name = "nothing", .out = test_dir()};
    int count;
    assert_int_equal(tril_lab_run(&o, NULL, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "nothing"));
    assert_int_equal(tril_lab_report(test_path("empty"), &count, &err), TRIL_ERR_ARGUMENT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_averaging),
        cmocka_unit_test(test_leak),
        cmocka_unit_test(test_report),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
