// ctest: timeout=120 levels
/* Whole models against PyTorch's results on the reference and the CPU: golden.h. */
#include "cpu/cpu.h"
#include "golden.h"

static const char *const names[] = {
    "gpt2-tiny",       "gpt2-scaled",  "llama-tiny",   "llama-gqa-untied", "mistral-tiny",
    "qwen2-tiny",      "qwen3-tiny",   "model3-tiny",  "alibi-tiny",       "mixed-tiny",
    "mistral-window",  "qwen3-window", "smollm3-tiny", "mixers-tiny",      "alibi-hybrid",
    "recurrence-tiny", "memory-tiny"};
#define MODELS ((int)(sizeof names / sizeof *names))

static void run(const struct backend *backend, enum dtype t, enum recompute recompute) {
    for (int i = 0; i < MODELS; i++) {
        struct golden g;
        golden_open(&g, names[i]);
        struct sensitivity p = measure(&g);
        check(&g, &p, backend, t, recompute);
        safetensors_close(g.file);
    }
}

static void test_double(void **state) {
    (void)state;
    run(backend_reference(), DT_F64, RECOMPUTE_NONE);
}

static void test_reference(void **state) {
    (void)state;
    run(backend_reference(), DT_F32, RECOMPUTE_NONE);
}

static void test_cpu(void **state) {
    (void)state;
    run(backend_cpu(), DT_F32, RECOMPUTE_NONE);
}

static void test_cpu_recompute(void **state) {
    (void)state;
    run(backend_cpu(), DT_F32, RECOMPUTE_FULL);
}

static void test_bf16(void **state) {
    (void)state;
    run(backend_reference(), DT_BF16, RECOMPUTE_NONE);
    run(backend_cpu(), DT_BF16, RECOMPUTE_NONE);
}

/* The test can fail: parameters off by 3 parts in 100,000 are noticed. */
static void test_notices(void **state) {
    (void)state;
    for (int i = 0; i < MODELS; i++)
        check_notices(names[i], backend_reference());
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_double), cmocka_unit_test(test_reference),
        cmocka_unit_test(test_cpu),    cmocka_unit_test(test_cpu_recompute),
        cmocka_unit_test(test_bf16),   cmocka_unit_test(test_notices),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
