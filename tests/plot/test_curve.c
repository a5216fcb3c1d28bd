/* Pictures: well-formed XML whatever the labels are, points where they belong and inside the frame,
 * values that are not finite left out, empty plots, large inputs kept small. */
#include "plot/curve.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "plot/heat.h"
#include "support/support.h"
#include "xml.h"

static char *draw(const struct curve_plot *p) {
    char *text;
    size_t size;
    const char *path = test_path("plot.svg");
    assert_int_equal(curve_plot_write(p, path, NULL), TRIL_OK);
    assert_int_equal(file_read(path, 10000000, &text, &size, NULL), TRIL_OK);
    assert_int_equal(strlen(text), size);
    check_xml(text);
    return text;
}

struct box {
    double x0, y0, x1, y1;
    int points;
};

/* The points "M x,y" and "L x,y" between `from` and `to`. */
static struct box points_between(const char *from, const char *to) {
    struct box b = {INFINITY, INFINITY, -INFINITY, -INFINITY, 0};
    for (; from < to; from++) {
        if (*from == 'M' || *from == 'L') {
            char *end;
            double x = strtod(from + 1, &end), y;
            assert_true(*end == ',');
            y = strtod(end + 1, NULL);
            b.x0 = fmin(b.x0, x);
            b.x1 = fmax(b.x1, x);
            b.y0 = fmin(b.y0, y);
            b.y1 = fmax(b.y1, y);
            b.points++;
        }
    }
    return b;
}

/* The frame is what the grid spans: the first group. */
static struct box frame_of(const char *text) {
    const char *from = strstr(text, "<g stroke");
    assert_non_null(from);
    return points_between(from, strstr(from, "</g>"));
}

static struct box line_of(const char *text) {
    const char *from = strstr(text, "<path fill='none'");
    assert_non_null(from);
    return points_between(from, strchr(from, '>'));
}

static void assert_inside(struct box in, struct box out) {
    assert_true(in.x0 >= out.x0 - 0.11 &&
                in.x1 <= out.x1 + 0.11); /* coordinates have one decimal */
    assert_true(in.y0 >= out.y0 - 0.11 && in.y1 <= out.y1 + 0.11);
}

static void test_places(void **state) {
    (void)state;
    const double x[] = {0, 5, 10}, y[] = {0, 10, 5};
    const struct curve c = {.label = "a", .x = x, .y = y, .n = 3};
    const struct curve_plot p = {.curves = &c, .curve_count = 1, .y_label = "y", .title = "t"};
    char *text = draw(&p);
    struct box frame = frame_of(text), line = line_of(text);
    assert_int_equal(line.points, 3);
    assert_true(fabs(line.x0 - frame.x0) < 0.11 && fabs(line.x1 - frame.x1) < 0.11);
    assert_true(fabs(line.y0 - frame.y0) < 0.11 && fabs(line.y1 - frame.y1) < 0.11);
    double middle_x, middle_y;
    assert_int_equal(
        sscanf(strchr(strstr(text, "<path fill='none'"), 'L'), "L%lf,%lf", &middle_x, &middle_y),
        2);
    assert_true(fabs(middle_x - (frame.x0 + frame.x1) / 2) < 0.11);
    assert_true(fabs(middle_y - frame.y0) < 0.11); /* y points upwards */
    free(text);
}

static void test_logarithmic(void **state) {
    (void)state;
    const double x[] = {1, 10, 100, 0, -5}, y[] = {1e-3, 1, 1e3, 7, 7};
    const struct curve c = {.label = "a", .x = x, .y = y, .n = 5};
    const struct curve_plot p = {.curves = &c, .curve_count = 1, .x_log = true, .y_log = true};
    char *text = draw(&p);
    struct box frame = frame_of(text), line = line_of(text);
    assert_int_equal(line.points, 3); /* those not positive are left out */
    assert_inside(line, frame);
    double middle_x, middle_y;
    assert_int_equal(
        sscanf(strchr(strstr(text, "<path fill='none'"), 'L'), "L%lf,%lf", &middle_x, &middle_y),
        2);
    assert_true(fabs(middle_x - (frame.x0 + frame.x1) / 2) < 0.11);
    assert_true(fabs(middle_y - (frame.y0 + frame.y1) / 2) < 0.11);
    free(text);
}

static void test_not_finite(void **state) {
    (void)state;
    const double x[] = {0, 1, 2, 3, 4, NAN}, y[] = {1, 2, NAN, INFINITY, 3, 1};
    const struct curve c = {.label = "a", .x = x, .y = y, .n = 6, .style = CURVE_DOTTED_LINE};
    const struct curve_plot p = {.curves = &c, .curve_count = 1};
    char *text = draw(&p);
    assert_int_equal(line_of(text).points, 3);
    const char *line = strstr(text, "<path fill='none'");
    int starts = 0;
    for (const char *s = line; *s != '>'; s++)
        starts += *s == 'M';
    assert_int_equal(starts, 2); /* the gap is a gap */
    assert_null(strstr(text, "nan"));
    assert_null(strstr(text, "inf"));
    free(text);
}

static void test_empty(void **state) {
    (void)state;
    const double bad[] = {NAN, NAN};
    const struct curve curves[] = {
        {.label = "none", .n = 0},
        {.label = "not finite", .x = bad, .y = bad, .n = 2, .style = CURVE_DOTS},
        {.label = "no level", .y = bad, .n = 1, .style = CURVE_LEVEL}};
    for (int log = 0; log < 2; log++) {
        const struct curve_plot p = {
            .curves = curves, .curve_count = 3, .x_log = log, .y_log = log};
        char *text = draw(&p);
        assert_null(strstr(text, "nan"));
        assert_non_null(strstr(text, "not finite"));
        free(text);
    }
    free(draw(&(struct curve_plot){.title = "nothing at all"}));
    const double one = 4;
    const struct curve level = {.label = "level", .y = &one, .n = 1, .style = CURVE_LEVEL};
    free(draw(&(struct curve_plot){.curves = &level, .curve_count = 1, .width = 60, .height = 40}));
}

static void test_labels_are_escaped(void **state) {
    (void)state;
    const double x[] = {1, 2};
    const struct curve c = {
        .label = "<a> & 'b' \x01 \xff\xc3 \xed\xa0\x80 \xef\xbf\xbe", .x = x, .y = x, .n = 2};
    const struct curve_plot p = {.title = "]]>",
                                 .subtitle = "\xe2\x82\xac",
                                 .x_label = "</svg>",
                                 .curves = &c,
                                 .curve_count = 1};
    char *text = draw(&p);
    assert_non_null(strstr(text, "&lt;a&gt; &amp; 'b' \xef\xbf\xbd \xef\xbf\xbd\xef\xbf\xbd "));
    assert_non_null(strstr(text, "\xe2\x82\xac"));
    free(text);
}

static void test_many_points(void **state) {
    (void)state;
    enum { N = 300000 };
    double *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y);
    assert_true(x && y);
    for (int i = 0; i < N; i++) {
        x[i] = i;
        y[i] = i % 2 ? 1 : -1;
    }
    y[12345] = 50; /* a single spike must show */
    const struct curve c = {.label = "a", .x = x, .y = y, .n = N};
    const struct curve_plot p = {.curves = &c, .curve_count = 1};
    char *text = draw(&p);
    assert_true(strlen(text) < 100000);
    struct box frame = frame_of(text), line = line_of(text);
    assert_inside(line, frame);
    assert_true(line.y0 < (frame.y0 + frame.y1) / 2);
    free(text);
    x[N - 1] = 0; /* not in order: everything is drawn */
    text = draw(&p);
    assert_int_equal(line_of(text).points, N);
    free(text);
    free(x);
    free(y);
}

static void test_smooth(void **state) {
    (void)state;
    double x[] = {4, 4, NAN, 4, 0};
    curve_smooth(x, 5, 0.5, x);
    for (int i = 0; i < 4; i++)
        assert_true(x[i] == 4);
    /* weights 1, 1/2, 1/4, 1/8 of 0, 4, 4, 4 */
    assert_true(fabs(x[4] - 4 * 0.875 / 1.875) < 1e-12);
}

static void test_heat(void **state) {
    (void)state;
    enum { N = 300 };
    static float v[N * N];
    static const char *names[3] = {"<s>", "a&b", "\xff"};
    char *text;
    size_t size;
    static const float triangle[9] = {1, NAN, NAN, 0.5f, 0.5f, NAN, 0.3f, 0.3f, 0.3f};
    for (int i = 0; i < N * N; i++)
        v[i] = i % N <= i / N ? (float)(i % 7) : NAN;
    const struct heat_map maps[] = {
        {.title = "small",
         .values = triangle,
         .rows = 3,
         .cols = 3,
         .row_names = names,
         .col_names = names,
         .show_values = true,
         .x_label = "x",
         .y_label = "y"},
        {.title = "large", .values = v, .rows = N, .cols = N, .diverging = true},
        {.values = v, .rows = 1, .cols = N, .low = 0, .high = 1},
        {.values = v, .rows = N, .cols = 1},
        {.values = v + 1, .rows = 1, .cols = 1}, /* nothing but NaN */
    };
    for (size_t i = 0; i < sizeof maps / sizeof *maps; i++) {
        assert_int_equal(heat_map_write(&maps[i], test_path("heat.svg"), NULL), TRIL_OK);
        assert_int_equal(file_read(test_path("heat.svg"), 10000000, &text, &size, NULL), TRIL_OK);
        check_xml(text);
        assert_null(strstr(text, "nan"));
        assert_true(size < 600000);
        if (i == 0) /* the three masked cells */
            assert_non_null(
                strstr(text, "<path fill='" PLOT_EMPTY "' d='M1 0h2v1h-2zM2 1h1v1h-1z'"));
        free(text);
    }
    struct heat_map none = {.values = v};
    assert_int_equal(heat_map_write(&none, test_path("heat.svg"), NULL), TRIL_ERR_ARGUMENT);
}

static void test_png(void **state) {
    (void)state;
    bool made = true;
    struct tril_error err;
    free(draw(&(struct curve_plot){.title = "to PNG"}));
    char *saved = strdup(getenv("PATH"));
    setenv("PATH", "/nowhere", 1);
    assert_int_equal(plot_svg_to_png(test_path("plot.svg"), test_path("p.png"), &made, NULL),
                     TRIL_OK);
    assert_false(made);
    setenv("PATH", saved, 1);
    free(saved);
    assert_int_equal(plot_svg_to_png(test_path("plot.svg"), test_path("p.png"), &made, &err),
                     TRIL_OK);
    if (!made) {
        print_message("skipped: rsvg-convert is not installed\n");
        skip();
    }
    char *data;
    size_t size;
    assert_int_equal(file_read(test_path("p.png"), 1 << 20, &data, &size, NULL), TRIL_OK);
    assert_true(size > 100);
    assert_memory_equal(data, "\x89PNG", 4);
    free(data);
    assert_int_equal(plot_svg_to_png(test_path("absent"), test_path("p.png"), &made, &err),
                     TRIL_ERR_IO);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_places),
        cmocka_unit_test(test_logarithmic),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_empty),
        cmocka_unit_test(test_labels_are_escaped),
        cmocka_unit_test(test_many_points),
        cmocka_unit_test(test_smooth),
        cmocka_unit_test(test_heat),
        cmocka_unit_test(test_png),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
