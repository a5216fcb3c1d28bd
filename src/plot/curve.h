/* Line plots as SVG: several labelled series over linear or logarithmic axes, on a white card that
 * reads well on light and dark pages.
 *
 *   const struct curve curves[] = {
 *       {.label = "training loss", .x = step, .y = loss, .n = n, .style = CURVE_FAINT},
 *       {.label = "validation loss", .x = at, .y = valid, .n = m, .style = CURVE_DOTTED_LINE},
 *       {.label = "Kneser-Ney 3-gram", .y = &baseline, .n = 1, .style = CURVE_LEVEL}};
 *   const struct curve_plot plot = {
 *       .title = "Loss", .x_label = "step", .y_label = "nats per token",
 *       .curves = curves, .curve_count = 3};
 *   TRY(curve_plot_write(&plot, "loss.svg", err));
 */
#ifndef PLOT_CURVE_H
#define PLOT_CURVE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "plot/svg.h" /* plot_svg_to_png */

enum curve_style {
    CURVE_LINE,
    CURVE_FAINT,       /* thin and pale: raw values beneath their smoothed line */
    CURVE_DOTTED_LINE, /* a line with a dot at every point: few, measured values */
    CURVE_DOTS,
    CURVE_DASHED,
    CURVE_LEVEL /* a dashed horizontal line at y[0]; x is not used */
};

struct curve {
    const char *label; /* in the legend; NULL: not there, and coloured as the curve before */
    const double *x, *y;
    int64_t n; /* points; those that are not finite (or not positive on a logarithmic axis) are
                  left out, and interrupt the line */
    enum curve_style style;
};

struct curve_plot {
    const char *title, *subtitle, *x_label, *y_label; /* each may be NULL */
    const struct curve *curves;
    int curve_count;
    bool x_log, y_log;
    bool y_from_zero;  /* a linear y axis starts at 0 */
    int width, height; /* pixels; 0: 800 x 450 */
};

tril_status curve_plot_write(const struct curve_plot *p, const char *path, struct tril_error *err);

/* Exponential moving average with bias correction: out[i] is the mean of x[0..i] weighted by
 * keep^(i - j). Values that are not finite are passed over. out may be x. */
void curve_smooth(const double *x, int64_t n, double keep, double *out);

#endif
