// ctest: timeout=120
/* The benchmark over the registry: a few operations, briefly; its counts are right. */
#include "support/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "lab/bench_ops.h"

static int results;

static void collect(void *arg, const struct bench_op_result *r) {
    (void)arg;
    results++;
    assert_true(r->calls >= 3 && r->seconds > 0 && r->best > 0 && r->best <= r->seconds);
    assert_true(r->bytes > 0);
    printf("%-24s %-5s %-32s %9.3f us %7.2f GB/s %8.2f GFLOP/s%s\n", r->op, r->dtype, r->label,
           r->seconds * 1e6, r->bytes / r->seconds * 1e-9, r->flops / r->seconds * 1e-9,
           r->overridden ? "" : " (reference)");
    if (strcmp(r->op, "sum_squares") == 0)
        assert_true(r->bytes == 8388608.0 * 4 + 16 && r->flops == 0);
}

static void test_bench(void **state) {
    (void)state;
    /* By hand: every operation, longer. */
    const char *seconds = getenv("TRIL_BENCH_SECONDS"), *filter = getenv("TRIL_BENCH_OP");
    struct tril_error err = {0};
    if (seconds) {
        if (bench_ops(backend_cpu(), filter, atof(seconds), false, collect, NULL, &err) != TRIL_OK)
            fail_msg("%s", err.message);
        return;
    }
    static const char *const some[] = {"rmsnorm_", "sum_squares", "rope_forward", "clip_factor"};
    for (int i = 0; i < 4; i++)
        if (bench_ops(backend_cpu(), some[i], 0.01, true, collect, NULL, &err) != TRIL_OK)
            fail_msg("%s", err.message);
    assert_int_equal(results, 4 + 1 + 2 + 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_bench)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
