// ctest: timeout=120 levels
/* Drawing tokens on the CPU, at every level. */
#include "ops/sampling.h"

#include "cpu/cpu.h"

static struct op_context context;

static void test_as_reference(void **state) {
    static const int sizes[] = {1, 2, 31, 300, 4099, 20000};
    (void)state;
    for (int i = 0; i < 6; i++)
        sampling_compare(&context, sizes[i] > 5000 ? 20 : 60, sizes[i], false);
    sampling_compare(&context, 20, 4099, true);
}

static void test_alone(void **state) {
    (void)state;
    sampling_alone(&context, 24, 5000);
}

static void test_frequencies(void **state) {
    (void)state;
    sampling_frequencies(&context, 100000, 0.85);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_as_reference),
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_frequencies),
    };
    if (op_context_init(&context, backend_cpu(), NULL) != TRIL_OK)
        return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
