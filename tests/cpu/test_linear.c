// ctest: timeout=120 levels
/* Linear layers beyond the registry's cases (test_registry.c compares every epilogue and dtype with
 * the references): a row's bits do not depend on the rows beside it, on packing, on threads or on
 * how k is blocked; large products; static and refreshed weights; every engine; AMX's rules. */
#include "support/support.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/random.h"
#include "base/threads.h"
#include "cpu/cpu.h"
#include "cpu/linear.h"

/* The emulation of tiles, as kernels see it. */
#pragma GCC diagnostic ignored "-Wpsabi"
#define TRIL_LEVEL_EMU512
#define TRIL_LEVEL emu512
#include "cpu/kernels/amx.h"

static struct op_context context;

static void *buffer(int64_t elements, enum dtype t, uint64_t seed) {
    struct random_key key = {.seed = seed, .op = RANDOM_TEST};
    void *p = malloc((size_t)elements * dtype_size(t) + 1);
    assert_non_null(p);
    for (int64_t i = 0; i < elements; i++) {
        float x = 2 * random_uniform(&key, (uint64_t)i) - 1;
        if (t == DT_F32)
            ((float *)p)[i] = x;
        else
            ((uint16_t *)p)[i] = t == DT_BF16 ? f32_to_bf16(x) : f32_to_f16(x);
    }
    return p;
}

static float at(const void *p, enum dtype t, int64_t i) {
    if (t == DT_F32)
        return ((const float *)p)[i];
    return t == DT_BF16 ? bf16_to_f32(((const uint16_t *)p)[i])
                        : f16_to_f32(((const uint16_t *)p)[i]);
}

static void ok(tril_status st, const struct tril_error *err) {
    if (st != TRIL_OK)
        fail_msg("%s", err->message);
}

static void forward(struct tensor x, const struct weight *w, float *bias, struct tensor y) {
    struct tril_error err = {0};
    ok(linear_forward(&context, x, w, tensor_1d(bias, DT_F32, w->value.shape[0]), tensor_none(), y,
                      tensor_none(), ACT_GELU_TANH, &err),
       &err);
}

static void prepare(struct weight *w, unsigned uses) {
    struct tril_error err = {0};
    ok(context.backend->weight_prepare(&context, w, uses, &err), &err);
}

/* ------------------------------------------------------------------ batch independence */

/* Every way of computing the same rows, against rows computed one at a time from a static weight.
 */
static void check_rows(enum dtype xt, enum dtype wt, int64_t I, int64_t O) {
    enum { ROWS = 300 };
    static const int64_t counts[] = {2, 3, 5, 7, 13, 17, 33, 64, ROWS};
    void *x = buffer(ROWS * I, xt, 1), *values = buffer(O * I, wt, 2);
    float *bias = buffer(O, DT_F32, 3), *alone = malloc(ROWS * (size_t)O * 4);
    float *y = malloc(ROWS * (size_t)O * 4);
    assert_true(alone && y);
    struct weight fixed = {.value = tensor_2d(values, wt, O, I)}, trained = fixed;
    prepare(&fixed, WEIGHT_FORWARD | WEIGHT_STATIC);
    prepare(&trained, WEIGHT_FORWARD | WEIGHT_BACKWARD);
    struct tensor all = tensor_2d(x, xt, ROWS, I);
    for (int64_t r = 0; r < ROWS; r++)
        forward(tensor_rows(all, r, 1), &fixed, bias, tensor_2d(alone + r * O, DT_F32, 1, O));
    for (int threads = 1; threads <= 2; threads++) {
        threads_set(threads);
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
            int64_t n = counts[c], first = (int64_t)c < 8 ? 11 * (int64_t)c : 0;
            for (int packed = 0; packed < 2; packed++) {
                memset(y, 0xee, ROWS * (size_t)O * 4);
                forward(tensor_rows(all, first, n), packed ? &fixed : &trained, bias,
                        tensor_2d(y, DT_F32, n, O));
                for (int64_t i = 0; i < n * O; i++)
                    if (memcmp(y + i, alone + first * O + i, 4) != 0)
                        fail_msg(
                            "%s x %s, I = %lld, O = %lld, %d threads, %s: row %lld of %lld has "
                            "%.9g at %lld and alone %.9g",
                            dtype_name(xt), dtype_name(wt), (long long)I, (long long)O, threads,
                            packed ? "packed" : "not packed", (long long)(i / O), (long long)n,
                            (double)y[i], (long long)(i % O), (double)alone[first * O + i]);
            }
        }
    }
    threads_set(0);
    context.backend->weight_release(&fixed);
    context.backend->weight_release(&trained);
    free(x);
    free(values);
    free(bias);
    free(alone);
    free(y);
}

static void test_rows_alone(void **state) {
    (void)state;
    static const enum linear_engine engines[] = {LINEAR_OWN, LINEAR_FMA};
    for (int e = 0; e < 2; e++) {
        linear_engine_set(engines[e]);
        check_rows(DT_F32, DT_F32, 100, 70);
        check_rows(DT_BF16, DT_BF16, 100, 70);
        check_rows(DT_BF16, DT_BF16, 801, 131);
        check_rows(DT_F32, DT_BF16, 33, 50);
        check_rows(DT_BF16, DT_F32, 64, 16);
        check_rows(DT_F32, DT_F16, 35, 20);
        check_rows(DT_F32, DT_F32, 2500, 40); /* k in several blocks where it is not packed */
        check_rows(DT_BF16, DT_BF16, 6500, 20);
    }
    linear_engine_set(LINEAR_OWN);
}

/* ------------------------------------------------------------------ large products */

/* |y - exact| <= (k + 4) eps sum |x w| (any order of fp32 sums), + rounding of the result. */
static void check_value(const char *what, float y, double exact, double magnitude, int64_t k,
                        enum dtype t) {
    double bound = ((double)k + 4) * 0x1p-24 * magnitude + 0x1p-126;
    bound += fabs(exact) * (t == DT_BF16 ? 0x1.01p-8 : 0x1p-24);
    if (!(fabs(y - exact) <= bound))
        fail_msg("%s: %.9g instead of %.9g, further off than %.3g", what, (double)y, exact, bound);
}

/* All three products at N, I, O; `samples` entries of each against double. */
static void check_products(enum dtype t, int64_t N, int64_t I, int64_t O) {
    char what[160];
    struct tril_error err = {0};
    void *x = buffer(N * I, t, 4), *dy = buffer(N * O, t, 5), *values = buffer(O * I, t, 6);
    void *y = malloc((size_t)(N * O) * 4), *dx = malloc((size_t)(N * I) * 4);
    float *dw = buffer(O * I, DT_F32, 7), *db = buffer(O, DT_F32, 8);
    float *dw0 = buffer(O * I, DT_F32, 7), *db0 = buffer(O, DT_F32, 8);
    struct weight w = {.value = tensor_2d(values, t, O, I)};
    struct tensor X = tensor_2d(x, t, N, I), DY = tensor_2d(dy, t, N, O);
    prepare(&w, WEIGHT_FORWARD | WEIGHT_BACKWARD);
    ok(linear_forward(&context, X, &w, tensor_none(), tensor_none(), tensor_2d(y, t, N, O),
                      tensor_none(), ACT_NONE, &err),
       &err);
    ok(linear_backward_input(&context, DY, &w, tensor_2d(dx, t, N, I), &err), &err);
    ok(linear_backward_weight(&context, DY, X, tensor_2d(dw, DT_F32, O, I),
                              tensor_1d(db, DT_F32, O), false, &err),
       &err);
    for (int64_t s = 0; s < 400; s++) {
        /* the corners, then anywhere */
        int64_t n = s < 8 ? (s & 1 ? N - 1 : 0) : s * 7919 % N;
        int64_t i = s < 8 ? (s & 2 ? I - 1 : 0) : s * 104729 % I;
        int64_t o = s < 8 ? (s & 4 ? O - 1 : 0) : s * 1299709 % O;
        double sum = 0, size = 0;
        for (int64_t k = 0; k < I; k++) {
            double p = (double)at(x, t, n * I + k) * at(values, t, o * I + k);
            sum += p, size += fabs(p);
        }
        snprintf(what, sizeof what, "%s forward %lldx%lldx%lld at %lld, %lld", dtype_name(t),
                 (long long)N, (long long)I, (long long)O, (long long)n, (long long)o);
        check_value(what, at(y, t, n * O + o), sum, size, I, t);
        sum = size = 0;
        for (int64_t k = 0; k < O; k++) {
            double p = (double)at(dy, t, n * O + k) * at(values, t, k * I + i);
            sum += p, size += fabs(p);
        }
        snprintf(what, sizeof what, "%s dx %lldx%lldx%lld at %lld, %lld", dtype_name(t),
                 (long long)N, (long long)I, (long long)O, (long long)n, (long long)i);
        check_value(what, at(dx, t, n * I + i), sum, size, O, t);
        sum = dw0[o * I + i], size = fabs(sum);
        double total = db0[o], total_size = fabs(total);
        for (int64_t k = 0; k < N; k++) {
            double g = at(dy, t, k * O + o), p = g * at(x, t, k * I + i);
            sum += p, size += fabs(p), total += g, total_size += fabs(g);
        }
        snprintf(what, sizeof what, "%s dw %lldx%lldx%lld at %lld, %lld", dtype_name(t),
                 (long long)N, (long long)I, (long long)O, (long long)o, (long long)i);
        check_value(what, dw[o * I + i], sum, size, N + 1, DT_F32);
        check_value("db", db[o], total, total_size, N + 1, DT_F32);
    }
    context.backend->weight_release(&w);
    void *all[] = {x, dy, values, y, dx, dw, db, dw0, db0};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

static void test_large(void **state) {
    (void)state;
    static const enum linear_engine engines[] = {LINEAR_OWN, LINEAR_FMA, LINEAR_ONEDNN};
    for (int e = 0; e < 3; e++) {
        linear_engine_set(engines[e]);
        for (int t = 0; t < 2; t++) {
            enum dtype type = t ? DT_BF16 : DT_F32;
            check_products(type, 257, 300, 270);
            check_products(type, 33, 2100, 40); /* k in two blocks: forward, */
            check_products(type, 40, 50, 6200); /* dx, */
            check_products(type, 6500, 33, 17); /* dw */
        }
    }
    linear_engine_set(LINEAR_OWN);
}

/* ------------------------------------------------------------------ weights */

/* A static weight serves after its values are gone, in both directions if announced. */
static void test_static(void **state) {
    (void)state;
    enum { N = 9, I = 45, O = 37 };
    for (int t = 0; t < 3; t++) {
        enum dtype wt = t == 0 ? DT_F32 : t == 1 ? DT_BF16 : DT_F16;
        struct tril_error err = {0};
        float *x = buffer(N * I, DT_F32, 1), *dy = buffer(N * O, DT_F32, 2);
        void *values = buffer(O * I, wt, 3);
        float y[2][N * O], dx[2][N * I];
        struct weight w[2] = {{.value = tensor_2d(values, wt, O, I)},
                              {.value = tensor_2d(values, wt, O, I)}};
        prepare(&w[0], WEIGHT_FORWARD | WEIGHT_BACKWARD);
        prepare(&w[1], WEIGHT_FORWARD | WEIGHT_BACKWARD | WEIGHT_STATIC);
        for (int i = 0; i < 2; i++) {
            if (i == 1) {
                memset(values, 0xff, O * I * dtype_size(wt)); /* NaN, should anyone look */
                w[1].value.data = NULL;
            }
            ok(linear_forward(&context, tensor_2d(x, DT_F32, N, I), &w[i], tensor_none(),
                              tensor_none(), tensor_2d(y[i], DT_F32, N, O), tensor_none(), ACT_NONE,
                              &err),
               &err);
            ok(linear_backward_input(&context, tensor_2d(dy, DT_F32, N, O), &w[i],
                                     tensor_2d(dx[i], DT_F32, N, I), &err),
               &err);
        }
        assert_memory_equal(y[0], y[1], sizeof y[0]);
        assert_memory_equal(dx[0], dx[1], sizeof dx[0]);
        for (int i = 0; i < 2; i++)
            context.backend->weight_release(&w[i]);
        /* Not announced: a clear refusal, no crash. */
        struct weight forward_only = {.value = tensor_2d(values, wt, O, I)};
        prepare(&forward_only, WEIGHT_FORWARD | WEIGHT_STATIC);
        forward_only.value.data = NULL;
        assert_int_not_equal(linear_backward_input(&context, tensor_2d(dy, DT_F32, N, O),
                                                   &forward_only, tensor_2d(dx[0], DT_F32, N, I),
                                                   &err),
                             TRIL_OK);
        assert_non_null(strstr(err.message, "static weight"));
        context.backend->weight_release(&forward_only);
        free(x);
        free(dy);
        free(values);
    }
}

static void test_refresh(void **state) {
    (void)state;
    enum { N = 3, I = 20, O = 18 };
    struct tril_error err = {0};
    uint16_t *x = buffer(N * I, DT_BF16, 1), *values = buffer(O * I, DT_BF16, 2);
    float before[N * O], after[N * O], fresh[N * O];
    struct weight w = {.value = tensor_2d(values, DT_BF16, O, I)}, other = w;
    struct tensor X = tensor_2d(x, DT_BF16, N, I);
    prepare(&w, WEIGHT_FORWARD); /* packed, though it will change */
    assert_true(context.backend->weight_bytes(O, I, DT_BF16, WEIGHT_FORWARD) >= O * I * 2);
    assert_int_equal(context.backend->weight_bytes(O, I, DT_BF16, WEIGHT_FORWARD | WEIGHT_BACKWARD),
                     0);
    float *bias = buffer(O, DT_F32, 3);
    forward(X, &w, bias, tensor_2d(before, DT_F32, N, O));
    for (int i = 0; i < O * I; i += 3)
        values[i] = f32_to_bf16(0.25f * (float)(i % 7));
    ok(context.backend->weight_refresh(&context, &w, &err), &err);
    forward(X, &w, bias, tensor_2d(after, DT_F32, N, O));
    prepare(&other, WEIGHT_FORWARD | WEIGHT_BACKWARD);
    forward(X, &other, bias, tensor_2d(fresh, DT_F32, N, O));
    assert_memory_equal(after, fresh, sizeof after);
    assert_memory_not_equal(after, before, sizeof after);
    context.backend->weight_release(&w);
    context.backend->weight_release(&w); /* twice is fine */
    context.backend->weight_release(&other);
    free(bias);
    free(x);
    free(values);
}

/* ------------------------------------------------------------------ AMX's rules */

/* Whether `misuse` dies, as it would by the processor's fault. */
static bool dies(void (*misuse)(void)) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGILL, SIG_DFL); /* cmocka catches it */
        signal(SIGTRAP, SIG_DFL);
        fclose(stderr);
        misuse();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status);
}

static char tile[1024];
static void unconfigured(void) {
    AMX_LOAD(0, tile, 64);
}
static void released(void) {
    amx_begin();
    amx_end();
    AMX_ZERO(0);
}
static void bad_rows(void) {
    struct amx_config c = amx_full_tiles();
    c.rows[2] = 17;
    amx_configure(&c);
}
static void bad_bytes(void) {
    struct amx_config c = amx_full_tiles();
    c.bytes[2] = 68;
    amx_configure(&c);
}
static void reserved_byte(void) {
    struct amx_config c = amx_full_tiles();
    c.reserved[3] = 1;
    amx_configure(&c);
}
static void ninth_tile(void) {
    struct amx_config c = amx_full_tiles();
    c.rows[8] = 16;
    c.bytes[8] = 64;
    amx_configure(&c);
}
static void left_out(void) {
    struct amx_config c = amx_full_tiles();
    c.rows[5] = 0;
    c.bytes[5] = 0;
    amx_configure(&c);
    AMX_LOAD(5, tile, 64);
}
static void misfit(void) {
    struct amx_config c = amx_full_tiles();
    c.rows[1] = 8; /* B has 8 pairs, A 16 */
    amx_configure(&c);
    AMX_DOT_BF16(0, 2, 1);
}
static void same_tile(void) {
    amx_begin();
    AMX_DOT_BF16(0, 1, 1);
}
static void proper(void) {
    amx_begin();
    AMX_ZERO(0);
    AMX_LOAD(1, tile, 64);
    AMX_LOAD(2, tile, 64);
    AMX_DOT_BF16(0, 1, 2);
    AMX_STORE(0, tile, 64);
    amx_end();
}

static void test_amx_rules(void **state) {
    (void)state;
    void (*const misuses[])(void) = {unconfigured,  released,   bad_rows, bad_bytes, left_out,
                                     reserved_byte, ninth_tile, misfit,   same_tile};
    for (size_t i = 0; i < sizeof misuses / sizeof *misuses; i++)
        if (!dies(misuses[i]))
            fail_msg("misuse %zu of tiles went unnoticed", i);
    assert_false(dies(proper));
    /* A tile's product, by hand: ones and a configuration with fewer rows. */
    uint16_t a[16][32], b[16][32];
    float c[16][16];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 32; j++) {
            a[i][j] = f32_to_bf16((float)(i - j));
            b[i][j] = f32_to_bf16((float)(i + j % 2)); /* [pair][n][2] */
        }
    struct amx_config small = amx_full_tiles();
    small.rows[0] = small.rows[1] = 5;
    amx_configure(&small);
    for (int i = 0; i < 256; i++)
        (&c[0][0])[i] = 7;
    AMX_LOAD(0, c, 64);
    AMX_LOAD(1, a, 64);
    AMX_LOAD(2, b, 64);
    AMX_DOT_BF16(0, 1, 2);
    AMX_STORE(0, c, 64);
    amx_end();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum = 7;
            for (int k = 0; k < 32 && m < 5; k++)
                sum += (float)(m - k) * (float)(k / 2 + k % 2);
            assert_true(c[m][n] == sum);
        }
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    struct tril_error err = {0};
    if (op_context_init(&context, backend_cpu(), &err) != TRIL_OK)
        return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_rows_alone),
                                       cmocka_unit_test(test_large), cmocka_unit_test(test_static),
                                       cmocka_unit_test(test_refresh),
                                       cmocka_unit_test(test_amx_rules)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
