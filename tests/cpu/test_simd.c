// ctest: timeout=120 levels
/* simd.h against libm in double and against base/dtype.h. A fraction of all floats is tried (every
 * STRIDE-th bit pattern); TRIL_TEST_EXHAUSTIVE=1 tries every one. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "base/random.h"
#include "cpu/cpu.h"
#include "cpu/levels/simd_arrays.h"
#include "support/support.h"

static const struct simd_arrays *s;

static float from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static uint32_t to_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* The distance between floats around |x|, at least that of the smallest normal one. */
static double ulp(double x) {
    int e;
    frexp(x, &e);
    return ldexp(1, (e < -125 ? -125 : e) - 24);
}

static double exp2_exact(double x) {
    return exp2(x);
}
static double sigmoid_exact(double x) {
    return 1 / (1 + exp(-x));
}
static double cdf_exact(double x) {
    return 0.5 * erfc(-x * 0.70710678118654752440);
}

struct accuracy {
    const char *name;
    void (*const *f)(const float *, float *, int64_t);
    double (*exact)(double);
    double bound;    /* ulp; 0: `relative` counts */
    double relative; /* relative error allowed for x above `low` */
    float low;       /* below, only `tiny` */
    double tiny;     /* absolute error allowed in any case */
};

/* Largest error over every `stride`-th pattern; NaN must give NaN. */
static void check_accuracy(const struct accuracy *a) {
    enum { BLOCK = 4099 }; /* odd: the last vector is partial */
    static float x[BLOCK], y[BLOCK];
    uint64_t stride = getenv("TRIL_TEST_EXHAUSTIVE") ? 1 : 997;
    double worst = 0;
    float where = 0;
    for (uint64_t bits = 0; bits < 1ull << 32; bits += stride * BLOCK) {
        for (int i = 0; i < BLOCK; i++)
            x[i] = from_bits((uint32_t)(bits + stride * (uint64_t)i));
        (*a->f)(x, y, BLOCK);
        for (int i = 0; i < BLOCK; i++) {
            if (isnan(x[i])) {
                assert_true(isnan(y[i]));
                continue;
            }
            double exact = a->exact(x[i]);
            if ((float)exact == y[i] || fabs(y[i] - exact) <= a->tiny)
                continue;
            if (isinf(y[i]) || isnan(y[i]))
                fail_msg("%s(%a) gave %a, exactly %a", a->name, x[i], y[i], exact);
            double error = fabs(y[i] - exact);
            error = a->bound > 0     ? error / ulp(exact) / a->bound
                    : x[i] >= a->low ? error / exact / a->relative
                                     : INFINITY;
            if (error > worst) {
                worst = error;
                where = x[i];
            }
        }
    }
    double bound = a->bound > 0 ? a->bound : a->relative;
    printf("%-11s worst error %.3g %s at %a (bound %.3g)\n", a->name, worst * bound,
           a->bound > 0 ? "ulp" : "relative", where, bound);
    assert_true(worst <= 1);
}

static void test_functions(void **state) {
    (void)state;
    /* Worst over all floats with (without) fused multiply-add: exp 0.91 (1.18), exp2 0.95 (1.23),
     * sigmoid 2.5 (2.7), tanh 1.4, erf 1.3. The argument of exp in normal_cdf is as large as 36 and
     * carries a few roundings, 2^-24 each: relative errors of 1e-5 in the tail. */
    const struct accuracy list[] = {
        {"exp", &s->exp, exp, 1.3, 0, 0, 0x1p-125},
        {"exp2", &s->exp2, exp2_exact, 1.3, 0, 0, 0x1p-125},
        {"sigmoid", &s->sigmoid, sigmoid_exact, 3.0, 0, 0, 0x1p-125},
        {"tanh", &s->tanh, tanh, 2.0, 0, 0, 0},
        {"erf", &s->erf, erf, 2.0, 0, 0, 0},
        {"normal_cdf", &s->normal_cdf, cdf_exact, 0, 1e-5, -8.0f, 1e-15},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++)
        check_accuracy(&list[i]);
}

static void test_specials(void **state) {
    (void)state;
    const float in[] = {-INFINITY, INFINITY, 0.0f, -0.0f, -1000.0f, 1000.0f, 88.7228f, 88.73f};
    enum { N = sizeof in / sizeof in[0] };
    float out[N];
    s->exp(in, out, N);
    const float e[] = {0, INFINITY, 1, 1, 0, INFINITY, 0, INFINITY};
    for (int i = 0; i < N; i++) {
        if (i != 6)
            assert_true(out[i] == e[i]);
    }
    assert_true(isfinite(out[6]) && out[6] > 3.4e38f);
    s->exp2(in, out, N);
    const float e2[] = {0, INFINITY, 1, 1, 0, INFINITY};
    for (int i = 0; i < 6; i++)
        assert_true(out[i] == e2[i]);
    const float big2[] = {128.0f, 127.99999f, -125.0f};
    s->exp2(big2, out, 3);
    assert_true(isinf(out[0]) && isfinite(out[1]) && out[2] == 0x1p-125f);
    s->tanh(in, out, N);
    const float t[] = {-1, 1, 0, 0, -1, 1, 1, 1};
    for (int i = 0; i < N; i++)
        assert_true(out[i] == t[i]);
    s->erf(in, out, N);
    for (int i = 0; i < N; i++)
        assert_true(out[i] == t[i]);
    s->sigmoid(in, out, N);
    const float g[] = {0, 1, 0.5f, 0.5f, 0, 1, 1, 1};
    for (int i = 0; i < N; i++)
        assert_true(out[i] == g[i]);
    float roots[3] = {0, 4, INFINITY};
    s->sqrt(roots, out, 3);
    assert_true(out[0] == 0 && out[1] == 2 && isinf(out[2]));
    for (int i = 0; i < 100000; i += 7) { /* correctly rounded: as the scalar instruction */
        float x = (float)i * 0.37f, y;
        s->sqrt(&x, &y, 1);
        assert_true(y == sqrtf(x));
    }
}

/* Every pattern must convert as base/dtype.h does, bit for bit. */
static void test_from_16_bits(void **state) {
    (void)state;
    enum { N = 65536 };
    uint16_t *x = malloc(N * sizeof *x);
    float *y = malloc(N * sizeof *y);
    assert_true(x && y);
    for (int i = 0; i < N; i++)
        x[i] = (uint16_t)i;
    s->from_bf16(x, y, N - 1);
    for (int i = 0; i < N - 1; i++)
        assert_int_equal(to_bits(y[i]), to_bits(bf16_to_f32(x[i])));
    s->from_f16(x, y, N - 1);
    for (int i = 0; i < N - 1; i++)
        assert_int_equal(to_bits(y[i]), to_bits(f16_to_f32(x[i])));
    free(x);
    free(y);
}

static void check_to_16_bits(const float *x, int n) {
    uint16_t y[64];
    float z[64];
    s->to_bf16(x, y, n);
    s->round_bf16(x, z, n);
    for (int i = 0; i < n; i++) {
        assert_int_equal(y[i], f32_to_bf16(x[i]));
        assert_int_equal(to_bits(z[i]), (uint32_t)y[i] << 16);
    }
    s->to_f16(x, y, n);
    for (int i = 0; i < n; i++)
        assert_int_equal(y[i], f32_to_f16(x[i]));
}

static void test_to_16_bits(void **state) {
    (void)state;
    float x[64];
    int n = 0;
    /* Around every 16-bit value and half-way between (for bf16): the cases of rounding. */
    for (uint32_t high = 0; high < 65536; high++) {
        const uint32_t low[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
        for (int k = 0; k < 6; k++) {
            x[n++] = from_bits(high << 16 | low[k]);
            if (n == 61) {
                check_to_16_bits(x, n);
                n = 0;
            }
        }
    }
    check_to_16_bits(x, n);
    struct random_key key = {.seed = 1, .op = RANDOM_TEST};
    for (int i = 0; i < 20000; i++) {
        for (int k = 0; k < 61; k++)
            x[k] = from_bits(random_u32(&key, (uint64_t)i * 61 + (uint64_t)k));
        check_to_16_bits(x, 61);
    }
    /* The exponents of fp16, where random floats seldom fall. */
    for (int i = 0; i < 20000; i++) {
        for (int k = 0; k < 61; k++) {
            uint32_t bits = random_u32(&key, 10000000 + (uint64_t)i * 61 + (uint64_t)k);
            x[k] = from_bits((bits & 0x80ffffffu) +
                             ((100 + (bits >> 24 & 63) % 48) << 23 & 0x7f800000u));
        }
        check_to_16_bits(x, 61);
    }
}

/* A partial vector reads and writes its lanes and nothing else. */
static void test_partial(void **state) {
    (void)state;
    for (int n = 0; n <= 40; n++) {
        float *x = malloc((size_t)n * sizeof *x + 1), y[48]; /* exact size: ASan sees an overrun */
        uint16_t *h = malloc((size_t)n * sizeof *h + 1), out[48];
        assert_true(x && h);
        for (int i = 0; i < n; i++) {
            x[i] = (float)i - 3.5f;
            h[i] = f32_to_bf16((float)i);
        }
        for (int i = 0; i < 48; i++) {
            y[i] = -99;
            out[i] = 0xdead;
        }
        s->erf(x, y, n);
        s->to_bf16(x, out, n);
        for (int i = 0; i < 48; i++) {
            assert_true(i < n ? fabs(y[i] - erf(x[i])) < 1e-6 : y[i] == -99);
            assert_int_equal(out[i], i < n ? f32_to_bf16(x[i]) : 0xdead);
        }
        for (int i = 0; i < 48; i++)
            y[i] = -99;
        s->from_bf16(h, y, n);
        for (int i = 0; i < 48; i++)
            assert_true(y[i] == (i < n ? (float)i : -99));
        free(x);
        free(h);
    }
}

static void test_lanes(void **state) {
    (void)state;
    float x[16], y[16], z[16];
    for (int i = 0; i < 16; i++) {
        x[i] = (float)((i * 7) % 16) - 8;
        y[i] = (float)((i * 5) % 16) - 8;
    }
    s->max(x, y, z);
    for (int i = 0; i < s->width; i++)
        assert_true(z[i] == fmaxf(x[i], y[i]));
    s->min(x, y, z);
    for (int i = 0; i < s->width; i++)
        assert_true(z[i] == fminf(x[i], y[i]));
    s->copysign(x, y, z);
    for (int i = 0; i < s->width; i++)
        assert_true(to_bits(z[i]) == to_bits(copysignf(x[i], y[i])));
    float sum = 0, largest = -INFINITY;
    for (int i = 0; i < s->width; i++) {
        sum += x[i];
        largest = fmaxf(largest, x[i]);
    }
    assert_true(s->sum(x) == sum); /* small integers: exact in any order */
    assert_true(s->max_lanes(x) == largest);
    for (int k = 0; k < s->width; k++) { /* whichever lane holds it */
        for (int i = 0; i < 16; i++)
            x[i] = i == k ? 1.0f : -(float)i;
        assert_true(s->max_lanes(x) == 1.0f);
    }
    /* NaN: the second argument wins. */
    for (int i = 0; i < 16; i++) {
        x[i] = NAN;
        y[i] = 1;
    }
    s->max(x, y, z);
    assert_true(z[0] == 1);
    s->max(y, x, z);
    assert_true(isnan(z[0]));
    s->min(x, y, z);
    assert_true(z[0] == 1);
    s->min(y, x, z);
    assert_true(isnan(z[0]));
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct simd_arrays *const levels[CPU_LEVEL_COUNT] = {
        [CPU_GENERIC] = &simd_arrays_generic,
#ifdef TRIL_X86
        [CPU_AVX2] = &simd_arrays_avx2,       [CPU_AVX512] = &simd_arrays_avx512,
        [CPU_AMX] = &simd_arrays_amx,
#endif
#ifdef TRIL_EMULATE_512
        [CPU_EMU512] = &simd_arrays_emu512,
#endif
    };
    s = levels[cpu_level_active()];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_functions),    cmocka_unit_test(test_specials),
        cmocka_unit_test(test_from_16_bits), cmocka_unit_test(test_to_16_bits),
        cmocka_unit_test(test_partial),      cmocka_unit_test(test_lanes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
