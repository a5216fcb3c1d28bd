/* Curves from a table, as SVG: what the benchmarks and experiments write as CSV. */
#ifndef TRIL_PLOT_H
#define TRIL_PLOT_H

#include <stdbool.h>

#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

struct tril_plot_options {
    const char *data; /* CSV: a line of column names, then numbers; empty cells are gaps */
    const char *out;  /* SVG */
    const char *x;    /* the column that goes to the right; NULL: the first */
    const char *title, *x_label, *y_label; /* NULL: none; the column's name; none */
    bool x_log, y_log;
};

/* One dotted line for each of the other columns (at most 16). */
tril_status tril_plot(const struct tril_plot_options *options, struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
