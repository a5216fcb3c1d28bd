/* Values of named things, one row each, as SVG: bars from zero where the values share an order of
 * magnitude with it, otherwise dots on an axis of their own range, which does not pretend to a
 * zero. */
#ifndef PLOT_BARS_H
#define PLOT_BARS_H

#include <stdbool.h>

#include "base/error.h"
#include "plot/svg.h" /* plot_svg_to_png */

struct bar_plot {
    const char *title, *subtitle, *x_label; /* each may be NULL */
    const char *const *names;               /* [count] */
    const double *values;                   /* [count]; not finite: no mark */
    int count;
    int decimals; /* of the values beside the marks; NUMBER_SHORT: as short as it goes */
    int marked;   /* the row to compare the others with, in another colour; -1: none */
};

/* ERR_ARGUMENT without a row or with more than 64. */
tril_status bar_plot_write(const struct bar_plot *p, const char *path, struct tril_error *err);

#endif
