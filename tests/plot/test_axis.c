/* Ticks: nice, inside the range, distinct, for ranges of every size. */
#include "plot/axis.h"

#include <math.h>
#include <string.h>

#include "support/support.h"

static void check(double min, double max, bool log, int wanted) {
    for (int round = 0; round < 2; round++) {
        struct axis a;
        axis_fit(&a, min, max, log, wanted, round);
        assert_true(a.low < a.high && a.count >= 1 && a.count <= AXIS_TICKS);
        assert_true(!(min <= max) || (a.low <= min * (1 + 1e-9) + 1e-300 || a.low <= min));
        assert_true(!(min <= max) || a.high >= max - fabs(max) * 1e-9);
        for (int i = 0; i < a.count; i++) {
            double place = axis_place(&a, a.ticks[i]);
            assert_true(place > -1e-6 && place < 1 + 1e-6);
            assert_true(strlen(a.labels[i]) > 0);
            if (i > 0) {
                assert_true(a.ticks[i] > a.ticks[i - 1]);
                assert_string_not_equal(a.labels[i], a.labels[i - 1]);
            }
        }
    }
}

static void test_ranges(void **state) {
    (void)state;
    for (int wanted = 2; wanted < 12; wanted++) {
        for (double size = 1e-12; size < 1e15; size *= 3.7) {
            check(0, size, false, wanted);
            check(-size, size, false, wanted);
            check(size, 1.3 * size, false, wanted);
            for (double ratio = 1; ratio < 1e12; ratio *= 2.9)
                check(size, ratio * size, true, wanted);
        }
        check(1, -1, false, wanted); /* nothing to show */
        check(1, -1, true, wanted);
        check(0, 0, false, wanted);
        check(-5, -5, false, wanted);
        check(-1e289, 1e289, false, wanted);
    }
}

static void expect(double min, double max, bool log, int wanted, const char *labels) {
    struct axis a;
    char text[256] = "";
    axis_fit(&a, min, max, log, wanted, true);
    for (int i = 0; i < a.count; i++) {
        strcat(text, i ? " " : "");
        strcat(text, a.labels[i]);
    }
    assert_string_equal(text, labels);
}

static void test_labels(void **state) {
    (void)state;
    expect(0, 1, false, 5, "0 0.2 0.4 0.6 0.8 1.0");
    expect(2.3, 9.4, false, 5, "2 4 6 8 10");
    expect(0, 5000, false, 5, "0 1000 2000 3000 4000 5000");
    expect(0, 48000, false, 5, "0 10k 20k 30k 40k 50k");
    expect(0, 2.1e6, false, 5, "0 0.5M 1.0M 1.5M 2.0M 2.5M");
    expect(-0.02, 0.03, false, 5, "-0.02 -0.01 0 0.01 0.02 0.03");
    expect(0, 3e-5, false, 3, "0 1e-5 2e-5 3e-5");
    expect(1, 100, true, 8, "1 2 5 10 20 50 100");
    expect(3, 2e6, true, 8, "1 10 100 1000 10k 100k 1M 10M");
    expect(1e-5, 1e-1, true, 6, "1e-5 1e-4 0.001 0.01 0.1");
}

static void test_takes(void **state) {
    (void)state;
    assert_true(axis_takes(0, false) && axis_takes(-5, false) && axis_takes(5, true));
    assert_false(axis_takes(NAN, false) || axis_takes(INFINITY, false) || axis_takes(NAN, true));
    assert_false(axis_takes(0, true) || axis_takes(-1, true) || axis_takes(INFINITY, true));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_labels),
        cmocka_unit_test(test_takes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
