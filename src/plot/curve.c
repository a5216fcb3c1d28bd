/* The picture, from top to bottom: title, subtitle, legend (as many rows as it needs), the frame
 * with its grid, tick labels, the name of the x axis. */
#include "plot/curve.h"

#include <math.h>
#include <string.h>

#include "plot/axis.h"

static const char *const palette[] = {"#2563eb", "#ea580c", "#059669", "#9333ea",
                                      "#dc2626", "#0891b2", "#a16207", "#db2777"};
enum { PALETTE = sizeof palette / sizeof *palette };

struct frame { /* the inside of the axes, in pixels */
    double left, top, right, bottom;
    struct axis x, y;
};

#define LEGEND_ROW 20
#define SWATCH 30 /* a legend's line sample and the gap after it */

static double frame_x(const struct frame *f, double x) {
    return f->left + axis_place(&f->x, x) * (f->right - f->left);
}

static double frame_y(const struct frame *f, double y) {
    return f->bottom - axis_place(&f->y, y) * (f->bottom - f->top);
}

static bool point_shown(const struct curve_plot *p, const struct curve *c, int64_t i) {
    return axis_takes(c->y[i], p->y_log) &&
           (c->style == CURVE_LEVEL || axis_takes(c->x[i], p->x_log));
}

static int64_t curve_points(const struct curve *c) {
    return c->style == CURVE_LEVEL && c->n > 1 ? 1 : c->n;
}

/* Legend: places each entry, and draws if `s` is given; returns the rows taken. */
static int legend(const struct curve_plot *p, double left, double right, double top,
                  struct svg *s) {
    double x = left;
    int rows = 0, colour = -1;
    for (int i = 0; i < p->curve_count; i++) {
        const struct curve *c = &p->curves[i];
        if (!c->label)
            continue;
        double width = SWATCH + utf8_width(c->label) * PLOT_TEXT_WIDTH;
        colour++;
        if (rows == 0 || x + width > right) {
            x = left;
            rows++;
        }
        double y = top + (rows - 1) * LEGEND_ROW + LEGEND_ROW / 2.0;
        if (s && c->style == CURVE_DOTS) {
            svg_at(s, "<path d='M", x + 11, y);
            fprintf(s->out, "h0' stroke='%s' stroke-width='7' stroke-linecap='round'/>\n",
                    palette[colour % PALETTE]);
        } else if (s) {
            svg_at(s, "<path d='M", x, y);
            fprintf(s->out, "h22' stroke='%s' stroke-width='%s' stroke-opacity='%s'%s/>\n",
                    palette[colour % PALETTE], c->style == CURVE_FAINT ? "1.5" : "2.5",
                    c->style == CURVE_FAINT ? "0.5" : "1",
                    c->style >= CURVE_DASHED ? " stroke-dasharray='6,4'" : "");
        }
        if (s)
            svg_label(s, x + SWATCH, y + 4, SVG_START, 12, PLOT_INK, "", c->label);
        x += width + 18;
    }
    return rows;
}

/* The range of all points that can be shown. */
static void ranges(const struct curve_plot *p, double x[2], double y[2]) {
    x[0] = y[0] = INFINITY;
    x[1] = y[1] = -INFINITY;
    for (int i = 0; i < p->curve_count; i++) {
        const struct curve *c = &p->curves[i];
        for (int64_t j = 0; j < curve_points(c); j++) {
            if (!point_shown(p, c, j))
                continue;
            y[0] = fmin(y[0], c->y[j]);
            y[1] = fmax(y[1], c->y[j]);
            if (c->style == CURVE_LEVEL)
                continue;
            x[0] = fmin(x[0], c->x[j]);
            x[1] = fmax(x[1], c->x[j]);
        }
    }
    if (p->y_from_zero && !p->y_log && y[0] > 0)
        y[0] = 0;
    if (!p->x_log && x[0] > 0 && x[0] < 0.05 * x[1])
        x[0] = 0; /* steps counted from 1 */
}

static void axes_draw(struct svg *s, const struct curve_plot *p, const struct frame *f) {
    fputs("<g stroke='" PLOT_GRID "' stroke-width='1'>\n", s->out);
    for (int i = 0; i < f->y.count; i++) {
        svg_at(s, "<path d='M", f->left, frame_y(f, f->y.ticks[i]));
        svg_at(s, "L", f->right, frame_y(f, f->y.ticks[i]));
        fputs("'/>\n", s->out);
    }
    for (int i = 0; i < f->x.count; i++) {
        svg_at(s, "<path d='M", frame_x(f, f->x.ticks[i]), f->top);
        svg_at(s, "L", frame_x(f, f->x.ticks[i]), f->bottom);
        fputs("'/>\n", s->out);
    }
    fputs("</g>\n", s->out);
    svg_at(s, "<path d='M", f->left, f->bottom);
    svg_at(s, "L", f->right, f->bottom);
    fputs("' stroke='#9ca3af'/>\n", s->out);
    for (int i = 0; i < f->y.count; i++)
        svg_label(s, f->left - 8, frame_y(f, f->y.ticks[i]) + 4, SVG_END, 12, PLOT_FADED, "",
                  f->y.labels[i]);
    for (int i = 0; i < f->x.count; i++)
        svg_label(s, frame_x(f, f->x.ticks[i]), f->bottom + 18, SVG_MIDDLE, 12, PLOT_FADED, "",
                  f->x.labels[i]);
    if (p->x_label)
        svg_label(s, (f->left + f->right) / 2, f->bottom + 38, SVG_MIDDLE, 12, PLOT_INK, "",
                  p->x_label);
}

/* Draws a line of many points as what shows of it: per column of pixels its first, lowest, highest
 * and last point. Needs x in rising order. */
static void line_draw(struct svg *s, const struct curve_plot *p, const struct frame *f,
                      const struct curve *c, bool thin_out) {
    bool drawing = false;
    for (int64_t i = 0; i < c->n;) {
        if (!point_shown(p, c, i)) {
            drawing = false;
            i++;
            continue;
        }
        int64_t end = i + 1, low = i, high = i, last;
        double column = floor(frame_x(f, c->x[i]));
        while (thin_out && end < c->n && point_shown(p, c, end) &&
               floor(frame_x(f, c->x[end])) == column) {
            low = c->y[end] < c->y[low] ? end : low;
            high = c->y[end] > c->y[high] ? end : high;
            end++;
        }
        last = end - 1;
        const int64_t shown[4] = {i, low < high ? low : high, low < high ? high : low, last};
        for (int k = 0; k < 4; k++) {
            if (k > 0 && shown[k] == shown[k - 1])
                continue;
            svg_at(s, drawing ? "L" : "M", frame_x(f, c->x[shown[k]]), frame_y(f, c->y[shown[k]]));
            if (!drawing)
                fputs("h0", s->out); /* so that a lone point shows, too */
            drawing = true;
        }
        i = end;
    }
}

static bool rising(const struct curve *c) {
    for (int64_t i = 1; i < c->n; i++)
        if (!(c->x[i] >= c->x[i - 1]))
            return false;
    return true;
}

static void curve_draw(struct svg *s, const struct curve_plot *p, const struct frame *f,
                       const struct curve *c, const char *colour) {
    bool any = false;
    for (int64_t i = 0; i < curve_points(c) && !any; i++)
        any = point_shown(p, c, i);
    if (!any)
        return;
    if (c->style == CURVE_LEVEL) {
        svg_at(s, "<path d='M", f->left, frame_y(f, c->y[0]));
        svg_at(s, "L", f->right, frame_y(f, c->y[0]));
        fprintf(s->out, "' stroke='%s' stroke-width='1.8' stroke-dasharray='6,4'/>\n", colour);
        return;
    }
    if (c->style != CURVE_DOTS) {
        fputs("<path fill='none' d='", s->out);
        line_draw(s, p, f, c, (double)c->n > 2 * (f->right - f->left) && rising(c));
        fprintf(s->out,
                "' stroke='%s' stroke-width='%s' stroke-opacity='%s' stroke-linejoin='round' "
                "stroke-linecap='round'%s/>\n",
                colour, c->style == CURVE_FAINT ? "1" : "2", c->style == CURVE_FAINT ? "0.35" : "1",
                c->style == CURVE_DASHED ? " stroke-dasharray='7,6'" : "");
    }
    if (c->style == CURVE_DOTS || c->style == CURVE_DOTTED_LINE) {
        /* Lines of no length with round ends are dots, and much shorter than circles. */
        fputs("<path d='", s->out);
        for (int64_t i = 0; i < c->n; i++) {
            if (!point_shown(p, c, i))
                continue;
            svg_at(s, "M", frame_x(f, c->x[i]), frame_y(f, c->y[i]));
            fputs("h0", s->out);
        }
        fprintf(s->out, "' stroke='%s' stroke-width='6' stroke-linecap='round'/>\n", colour);
    }
}

tril_status curve_plot_write(const struct curve_plot *p, const char *path, struct tril_error *err) {
    struct svg s;
    struct frame f = {0};
    double x[2], y[2];
    int width = p->width > 0 ? p->width : 800, height = p->height > 0 ? p->height : 450;
    tril_status st = svg_begin(&s, width, height, err);
    if (st != TRIL_OK)
        return st;

    ranges(p, x, y);
    f.right = width - 28;
    f.bottom = height - (p->x_label ? 54 : 34);
    f.top = 18 + (p->title ? 22 : 0) + (p->subtitle ? 18 : 0);
    f.top += legend(p, 24, f.right, f.top, NULL) * LEGEND_ROW + (p->y_label ? 30 : 10);
    if (f.bottom < f.top + 40)
        f.bottom = f.top + 40;
    axis_fit(&f.y, y[0], y[1], p->y_log, (int)((f.bottom - f.top) / 50), true);
    double longest = 0;
    for (int i = 0; i < f.y.count; i++)
        longest = fmax(longest, utf8_width(f.y.labels[i]));
    f.left = 24 + longest * PLOT_TEXT_WIDTH + 8;
    axis_fit(&f.x, x[0], x[1], p->x_log, (int)((f.right - f.left) / 90), false);

    double top = 18;
    if (p->title)
        svg_label(&s, 24, (top += 22) - 8, SVG_START, 17, PLOT_INK, "font-weight='600'", p->title);
    if (p->subtitle)
        svg_label(&s, 24, (top += 18) - 8, SVG_START, 12, PLOT_FADED, "", p->subtitle);
    legend(p, 24, f.right, top, &s);
    if (p->y_label)
        svg_label(&s, 24, f.top - 15, SVG_START, 12, PLOT_FADED, "", p->y_label);
    axes_draw(&s, p, &f);

    int colour = -1;
    for (int i = 0; i < p->curve_count; i++) {
        colour += p->curves[i].label != NULL;
        curve_draw(&s, p, &f, &p->curves[i], palette[(colour < 0 ? 0 : colour) % PALETTE]);
    }
    return svg_end(&s, path, err);
}

void curve_smooth(const double *x, int64_t n, double keep, double *out) {
    double sum = 0, weight = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isfinite(x[i])) {
            sum = keep * sum + x[i];
            weight = keep * weight + 1;
        }
        out[i] = weight > 0 ? sum / weight : NAN;
    }
}
