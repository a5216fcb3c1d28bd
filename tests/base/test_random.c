/* Philox against its published answers; moments and independence of what is drawn from it. */
#include "base/random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/support.h"

static void check_answer(const uint32_t v[10]) {
    uint32_t out[4];
    philox4x32(v, v + 4, out);
    assert_memory_equal(out, v + 6, sizeof out);
}

/* From the authors' kat_vectors (Random123): counter, key, answer. */
static void test_known_answers(void **state) {
    (void)state;
    static const uint32_t answers[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d,
         0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1},
    };
    for (int i = 0; i < 3; i++)
        check_answer(answers[i]);
}

static void test_known_answers_file(void **state) {
    (void)state;
    FILE *f = fopen(TEST_SHARED_DIR "/misc/philox_kat_vectors", "r");
    if (!f) {
        print_message("skipped: no " TEST_SHARED_DIR "/misc/philox_kat_vectors\n");
        skip();
    }
    char line[512];
    int found = 0;
    while (fgets(line, sizeof line, f)) {
        uint32_t v[10];
        char *s = line;
        if (strncmp(line, "philox4x32 10 ", 14) != 0)
            continue;
        s += 14;
        for (int i = 0; i < 10; i++)
            v[i] = (uint32_t)strtoul(s, &s, 16);
        check_answer(v);
        found++;
    }
    fclose(f);
    assert_true(found >= 3);
}

/* The layout of counter and key is a promise: masks must be the same on every backend. */
static void test_layout(void **state) {
    (void)state;
    struct random_key key = {
        .seed = 0x1122334455667788u, .step = 0x99aabbccddeeff00u, .layer = 5, .op = RANDOM_SAMPLE};
    const uint64_t block = 0x0123456789abcdefu;
    const uint32_t counter[4] = {0x89abcdef, 0x01234567, 0xddeeff00,
                                 0x99aabbcc ^ RANDOM_SAMPLE << 16};
    const uint32_t words[2] = {0x55667788u ^ 5 * 0x9E3779B9u, 0x11223344 ^ RANDOM_SAMPLE};
    uint32_t want[4], got[4];
    philox4x32(counter, words, want);
    random_block(&key, block, got);
    assert_memory_equal(got, want, sizeof got);
    for (unsigned i = 0; i < 4; i++) {
        assert_int_equal(random_u32(&key, 4 * 1000 + i), (random_block(&key, 1000, got), got[i]));
        assert_true(random_uniform(&key, i) == (float)(random_u32(&key, i) >> 8) / 16777216.0f);
    }
}

static void test_moments(void **state) {
    (void)state;
    enum { N = 200000 };
    const struct random_key key = {.seed = 1, .op = RANDOM_TEST};
    double u1 = 0, u2 = 0, n1 = 0, n2 = 0, n3 = 0, n4 = 0, adjacent = 0, before = 0;
    for (uint64_t i = 0; i < N; i++) {
        double u = (double)random_uniform(&key, i), z = (double)random_normal(&key, i);
        assert_true(u >= 0 && u < 1 && isfinite(z));
        u1 += u / N;
        u2 += (u - 0.5) * (u - 0.5) / N;
        n1 += z / N;
        n2 += z * z / N;
        n3 += z * z * z / N;
        n4 += z * z * z * z / N;
        adjacent += z * before / N;
        before = z;
    }
    /* Each bound is five standard deviations of that mean: sqrt(variance / N). */
    double s = 5 / sqrt((double)N);
    assert_true(fabs(u1 - 0.5) < s * sqrt(1.0 / 12));
    assert_true(fabs(u2 - 1.0 / 12) < s * sqrt(1.0 / 180));
    assert_true(fabs(n1) < s && fabs(n2 - 1) < s * sqrt(2.0) && fabs(adjacent) < s);
    assert_true(fabs(n3) < s * sqrt(15.0) && fabs(n4 - 3) < s * sqrt(96.0));
}

static void test_below(void **state) {
    (void)state;
    enum { N = 60000 };
    const struct random_key key = {.seed = 2, .op = RANDOM_TEST};
    int counts[6] = {0};
    for (uint64_t i = 0; i < N; i++)
        counts[random_below(&key, i, 6)]++;
    for (int i = 0; i < 6; i++) /* five standard deviations of a binomial */
        assert_true(fabs(counts[i] - N / 6.0) < 5 * sqrt(N * (1.0 / 6) * (5.0 / 6)));
    assert_int_equal(random_below(&key, 3, 1), 0);
    /* Above 2^63 a good part of the tries is rejected: the result still stays below n. */
    const uint64_t n = (1ull << 63) + 1;
    int high = 0;
    for (uint64_t i = 0; i < 2000; i++) {
        uint64_t x = random_below(&key, i, n);
        assert_true(x < n);
        high += x >= n / 2;
    }
    assert_true(abs(high - 1000) < 5 * sqrt(2000) / 2);
}

static void test_streams_differ(void **state) {
    (void)state;
    const struct random_key base = {.seed = 7, .step = 3, .layer = 2, .op = RANDOM_INIT};
    struct random_key others[4] = {base, base, base, base};
    others[0].seed++;
    others[1].step++;
    others[2].layer++;
    others[3].op++;
    for (int k = 0; k < 4; k++) {
        int same = 0;
        for (uint64_t i = 0; i < 1000; i++)
            same += random_u32(&base, i) == random_u32(&others[k], i);
        assert_true(same <= 1);
    }
}

static void test_normal_fill(void **state) {
    (void)state;
    const struct random_key key = {1234, 5, 6, RANDOM_TEST};
    float out[32];
    for (uint64_t first = 0; first < 9; first++)
        for (int64_t n = 0; n < 20; n++) {
            random_normal_fill(&key, first, n, out);
            for (int64_t i = 0; i < n; i++)
                assert_true(out[i] == random_normal(&key, first + (uint64_t)i));
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_answers), cmocka_unit_test(test_known_answers_file),
        cmocka_unit_test(test_layout),        cmocka_unit_test(test_moments),
        cmocka_unit_test(test_below),         cmocka_unit_test(test_streams_differ),
        cmocka_unit_test(test_normal_fill),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
