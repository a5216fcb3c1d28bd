// ctest: timeout=120
/* `tril attention` under every implementation against PyTorch's results. */
#include "api/attention_golden.h"

static void test_goldens(void **state) {
    static const char *const impls[] = {"flash", "fused", "materialised", "reference", NULL};
    (void)state;
    check_goldens(TEST_TRIL, impls, "");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_goldens)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
