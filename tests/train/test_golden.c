// ctest: timeout=120 levels
/* Ten optimiser steps against PyTorch's on the reference and the CPU: steps.h. */
#include "cpu/cpu.h"
#include "steps.h"

static void test_ten_steps(void **state) {
    (void)state;
    static const char *const names[] = {"gpt2-tiny", "llama-tiny"};
    for (int i = 0; i < 2; i++) {
        ten_steps(names[i], backend_reference(), DT_F32);
        ten_steps(names[i], backend_cpu(), DT_F32);
        ten_steps(names[i], backend_cpu(), DT_BF16);
    }
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ten_steps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
