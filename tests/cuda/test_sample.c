// ctest: timeout=300
/* Drawing tokens on the (emulated) GPU: several parts of a row, lists that overflow, every option.
 */
#include "ops/sampling.h"

#include "cuda/cuda.h"

static struct op_context context;

static void test_as_reference(void **state) {
    static const int sizes[] = {1, 31, 300, 4099, 9000};
    (void)state;
    for (int i = 0; i < 5; i++)
        sampling_compare(&context, sizes[i] > 1000 ? 6 : 12, sizes[i], false);
    sampling_compare(&context, 5, 4099, true);
}

static void test_alone(void **state) {
    (void)state;
    sampling_alone(&context, 10, 5000);
}

static void test_frequencies(void **state) {
    (void)state;
    sampling_frequencies(&context, 400, 2.5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_as_reference),
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_frequencies),
    };
    if (op_context_init(&context, backend_cuda(), NULL) != TRIL_OK)
        return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
