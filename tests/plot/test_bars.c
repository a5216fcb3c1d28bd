/* Bars: well-formed, one mark a row inside the frame, in the order of the values; nothing for what
 * is not finite; a zero only where the bars need one. */
#include "plot/bars.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "support/support.h"
#include "xml.h"

static struct tril_error err;

static char *draw(const struct bar_plot *p) {
    char *text;
    size_t size;
    const char *path = test_path("bars.svg");
    assert_int_equal(bar_plot_write(p, path, &err), TRIL_OK);
    assert_int_equal(file_read(path, 10000000, &text, &size, NULL), TRIL_OK);
    check_xml(text);
    return text;
}

/* Where the marks end, in the order drawn; returns how many. */
static int marks(const char *text, double x[], double begin[]) {
    int n = 0;
    for (const char *s = text; (s = strstr(s, "<path d='M")); s++) {
        double x0, y0, x1, y1;
        const char *stroke = strstr(s, "stroke="), *end = strstr(s, "/>");
        if (sscanf(s, "<path d='M%lf,%lfL%lf,%lf", &x0, &y0, &x1, &y1) == 4 && stroke &&
            stroke < end) {
            begin[n] = x0;
            x[n++] = x1;
        }
    }
    return n;
}

static void test_bars(void **state) {
    (void)state;
    const char *names[] = {"a <b> & c", "", "\xff\x01 bytes", "d"};
    const double values[] = {3, 1, NAN, -2};
    struct bar_plot p = {
        .title = "T", .names = names, .values = values, .count = 4, .decimals = 1, .marked = 1};
    double x[8], begin[8];
    char *text = draw(&p);
    assert_int_equal(marks(text, x, begin), 3);
    assert_true(x[0] > x[1] && x[1] > begin[1] && x[2] < begin[2]); /* -2 goes to the left */
    assert_true(begin[0] == begin[1] && begin[1] == begin[2]);      /* all from zero */
    for (int i = 0; i < 3; i++)
        assert_true(x[i] > 0 && x[i] < 800);
    assert_non_null(strstr(text, "3.0"));
    assert_non_null(strstr(text, "#ea580c"));
    free(text);
}

static void test_dots(void **state) {
    (void)state;
    const char *names[] = {"one", "two", "three"};
    const double values[] = {58.2, 58.9, 60.1};
    struct bar_plot p = {.names = names, .values = values, .count = 3, .decimals = 1, .marked = -1};
    double x[8], begin[8];
    char *text = draw(&p);
    assert_int_equal(marks(text, x, begin), 3);
    assert_true(x[0] < x[1] && x[1] < x[2]);
    assert_true(begin[0] == x[0]);    /* a dot */
    assert_true(x[2] - x[0] > 200);   /* differences can be seen */
    assert_null(strstr(text, ">0<")); /* and no zero is pretended */
    free(text);
    const double same[] = {5, 5, 5}, none[] = {NAN, INFINITY, NAN};
    p.values = same;
    free(draw(&p));
    p.values = none;
    free(draw(&p));
    p.count = 0;
    assert_int_equal(bar_plot_write(&p, test_path("bars.svg"), &err), TRIL_ERR_ARGUMENT);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_bars), cmocka_unit_test(test_dots)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
