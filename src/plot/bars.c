/* From top to bottom: title, subtitle, one row per name, the axis, its name. */
#include "plot/bars.h"

#include <math.h>

#include "plot/axis.h"

enum { WIDTH = 800, ROW = 26, MOST_ROWS = 64, VALUE_SPACE = 76 };

#define BAR "#2563eb"
#define MARKED "#ea580c"

struct frame {
    double left, right, top, bottom;
    struct axis x;
    bool bars;
};

static double place(const struct frame *f, double x) {
    return f->left + axis_place(&f->x, x) * (f->right - f->left);
}

/* Bars where the smallest value is at least a quarter of the largest away from looking alike. */
static void fit(const struct bar_plot *p, struct frame *f) {
    double low = INFINITY, high = -INFINITY;
    int longest = 0;
    for (int i = 0; i < p->count; i++) {
        int n = utf8_width(p->names[i]);
        longest = n > longest ? n : longest;
        if (!axis_takes(p->values[i], false))
            continue;
        low = fmin(low, p->values[i]);
        high = fmax(high, p->values[i]);
    }
    f->bars = !(low > 0.25 * high);
    if (f->bars) {
        low = fmin(low, 0);
        high = fmax(high, 0);
    }
    axis_fit(&f->x, low, high, false, 6, true);
    double names = longest * PLOT_TEXT_WIDTH;
    f->left = 28 + (names > 320 ? 320 : names);
    f->right = WIDTH - 24 - (f->bars ? VALUE_SPACE : VALUE_SPACE / 2.0);
}

static void axis_draw(struct svg *s, const struct bar_plot *p, const struct frame *f) {
    fputs("<g stroke='" PLOT_GRID "' stroke-width='1'>\n", s->out);
    for (int i = 0; i < f->x.count; i++) {
        svg_at(s, "<path d='M", place(f, f->x.ticks[i]), f->top);
        svg_at(s, "L", place(f, f->x.ticks[i]), f->bottom);
        fputs("'/>\n", s->out);
    }
    fputs("</g>\n", s->out);
    for (int i = 0; i < f->x.count; i++)
        svg_label(s, place(f, f->x.ticks[i]), f->bottom + 18, SVG_MIDDLE, 12, PLOT_FADED, "",
                  f->x.labels[i]);
    if (p->x_label)
        svg_label(s, (f->left + f->right) / 2, f->bottom + 38, SVG_MIDDLE, 12, PLOT_INK, "",
                  p->x_label);
}

static void row_draw(struct svg *s, const struct bar_plot *p, const struct frame *f, int i) {
    const double y = f->top + (i + 0.5) * ROW, value = p->values[i];
    const char *colour = i == p->marked ? MARKED : BAR;
    char text[48];
    svg_label(s, f->left - 10, y + 4, SVG_END, 12, PLOT_INK, "", p->names[i]);
    if (!axis_takes(value, false))
        return;
    const double x = place(f, value), zero = f->bars ? place(f, 0) : f->left;
    svg_at(s, "<path d='M", f->bars ? zero : x, y);
    svg_at(s, "L", x, y);
    fprintf(s->out, "' stroke='%s' stroke-width='%d' stroke-linecap='%s'/>\n", colour,
            f->bars ? 14 : 9, f->bars ? "butt" : "round");
    number_write(text, sizeof text, value, p->decimals);
    bool left = value < 0;
    svg_label(s, x + (left ? -10 : 10), y + 4, left ? SVG_END : SVG_START, 12, PLOT_FADED, "",
              text);
}

tril_status bar_plot_write(const struct bar_plot *p, const char *path, struct tril_error *err) {
    struct svg s;
    struct frame f = {0};
    if (p->count < 1 || p->count > MOST_ROWS)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: a plot of %d rows; it takes from 1 to %d",
                         path, p->count, MOST_ROWS);
    fit(p, &f);
    f.top = 24 + (p->title ? 26 : 0) + (p->subtitle ? 18 : 0);
    f.bottom = f.top + p->count * ROW + 6;
    tril_status st = svg_begin(&s, WIDTH, (int)f.bottom + (p->x_label ? 54 : 32), err);
    if (st != TRIL_OK)
        return st;
    if (p->title)
        svg_label(&s, 24, 34, SVG_START, 16, PLOT_INK, "font-weight='600'", p->title);
    if (p->subtitle)
        svg_label(&s, 24, 54, SVG_START, 12, PLOT_FADED, "", p->subtitle);
    axis_draw(&s, p, &f);
    for (int i = 0; i < p->count; i++)
        row_draw(&s, p, &f, i);
    return svg_end(&s, path, err);
}
