// ctest: timeout=60 levels
/* What the registry's random cases of attention over a memory do not reach: equal scores, long
 * memories against a plain search, rings that have gone round. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cpu/cpu.h"
#include "support/support.h"

static struct tril_error err;
static struct op_context cpu, plain;

enum { N = 9, H = 4, K = 2, D = 8, M = 700, TOP = 32 };

struct result {
    float o[N * H * D], weight[N * H * TOP], lse[H * N];
    int32_t index[N * H * TOP];
};

/* Small whole numbers: every score is exact in fp32, and most are equal to many others. */
static float number(int seed, int i, int range) {
    struct random_key key = {.seed = (uint64_t)seed, .op = RANDOM_TEST};
    return (float)((int)random_below(&key, (uint64_t)i, (uint64_t)(2 * range + 1)) - range);
}

static void run(struct op_context *ctx, const float *q, const float *k, const float *v,
                int32_t first, int32_t length, int32_t position, struct memory_attention_params p,
                struct result *r) {
    int32_t offsets[2] = {0, N}, start = 0;
    struct memory_attention_inputs in = {.q = tensor_3d((void *)(uintptr_t)q, DT_F32, N, H, D),
                                         .k = tensor_3d((void *)(uintptr_t)k, DT_F32, M, K, D),
                                         .v = tensor_3d((void *)(uintptr_t)v, DT_F32, M, K, D),
                                         .q_offsets = tensor_1d(offsets, DT_I32, 2),
                                         .kv_start = tensor_1d(&start, DT_I32, 1),
                                         .kv_first = tensor_1d(&first, DT_I32, 1),
                                         .kv_length = tensor_1d(&length, DT_I32, 1),
                                         .kv_position = tensor_1d(&position, DT_I32, 1)};
    if (memory_attention_forward(ctx, &in, tensor_3d(r->o, DT_F32, N, H, D),
                                 tensor_3d(r->index, DT_I32, N, H, TOP),
                                 tensor_3d(r->weight, DT_F32, N, H, TOP),
                                 tensor_2d(r->lse, DT_F32, H, N), p, &err) != TRIL_OK)
        fail_msg("%s", err.message);
}

/* With ties everywhere the same keys are found as by the reference: the older ones. */
static void test_ties(void **state) {
    (void)state;
    static float q[N * H * D], k[M * K * D], v[M * K * D];
    static struct result a, b, again;
    for (int seed = 0; seed < 12; seed++) {
        for (int i = 0; i < N * H * D; i++)
            q[i] = number(seed, i, 2);
        for (int i = 0; i < M * K * D; i++) {
            k[i] = number(seed + 100, i, 1);
            v[i] = number(seed + 200, i, 9);
        }
        const struct memory_attention_params p = {
            .scale = 0.25f, .segment = seed % 3 ? 4 : 0, .capacity = seed % 2 ? 0 : 300, .ring = M};
        const int32_t first = seed * 61 % M, length = M - seed;
        run(&plain, q, k, v, first, length, seed, p, &a);
        run(&cpu, q, k, v, first, length, seed, p, &b);
        assert_memory_equal(a.index, b.index, sizeof a.index);
        for (int i = 0; i < N * H * D; i++) /* 32 weights of values up to 9: 32 * 9 * 2^-23 */
            assert_true(fabsf(a.o[i] - b.o[i]) <= 4e-5f);
        for (int t = 0; t < 20; t++) {
            run(&cpu, q, k, v, first, length, seed, p, &again);
            assert_memory_equal(&again, &b, sizeof b);
        }
        for (int64_t row = 0; row < N * H; row++) { /* oldest first, none twice */
            int64_t before = -1;
            for (int t = 0; t < TOP && b.index[row * TOP + t] >= 0; t++) {
                int64_t entry = (b.index[row * TOP + t] - first + M) % M;
                assert_true(entry > before);
                before = entry;
            }
        }
    }
}

/* A ring that has gone round is the same memory as one that has not. */
static void test_rings(void **state) {
    (void)state;
    static float q[N * H * D], k[M * K * D], v[M * K * D], rolled_k[M * K * D], rolled_v[M * K * D];
    static struct result a, b;
    for (int i = 0; i < N * H * D; i++)
        q[i] = number(1, i, 1000) / 500;
    for (int i = 0; i < M * K * D; i++) {
        k[i] = number(2, i, 1000) / 500;
        v[i] = number(3, i, 1000) / 500;
    }
    const struct memory_attention_params p = {.scale = 0.5f, .segment = 5, .ring = M};
    run(&cpu, q, k, v, 0, M, 3, p, &a);
    for (int32_t first = 1; first < M; first += 113) {
        for (int e = 0; e < M; e++) {
            int row = (first + e) % M * K * D;
            memcpy(rolled_k + row, k + e * K * D, K * D * sizeof *k);
            memcpy(rolled_v + row, v + e * K * D, K * D * sizeof *v);
        }
        run(&cpu, q, rolled_k, rolled_v, first, M, 3, p, &b);
        assert_memory_equal(a.o, b.o, sizeof a.o);
        assert_memory_equal(a.weight, b.weight, sizeof a.weight);
        for (int i = 0; i < N * H * TOP; i++)
            assert_int_equal(b.index[i], a.index[i] < 0 ? -1 : (a.index[i] + first) % M);
    }
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    if (op_context_init(&cpu, backend_cpu(), NULL) != TRIL_OK ||
        op_context_init(&plain, backend_reference(), NULL) != TRIL_OK)
        return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ties), cmocka_unit_test(test_rings)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&cpu);
    op_context_free(&plain);
    return failed;
}
