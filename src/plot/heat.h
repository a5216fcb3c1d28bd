/* Heat maps as SVG: a matrix of values in colour, with a colour bar; attention patterns, masks,
 * grids of measurements. */
#ifndef PLOT_HEAT_H
#define PLOT_HEAT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "plot/svg.h" /* plot_svg_to_png */

struct heat_map {
    const char *title, *subtitle, *x_label, *y_label; /* each may be NULL */
    const float *values;                              /* [rows, cols]; row 0 on top */
    int64_t rows, cols;                               /* both at least 1 */
    const char *const *row_names, *const *col_names;  /* instead of numbers, where they fit; NULL */
    double low, high; /* the ends of the colour scale; both 0: those of the values */
    bool diverging;   /* two colours around 0 (the scale is then symmetric) */
    bool show_values; /* print the numbers into the cells, where they fit */
    bool bare;        /* the cells alone: no names or numbers along the sides, no colour bar */
};

/* A cell that is not finite is grey. More than 256 rows or columns are drawn as means of square
 * blocks of cells, and the picture says so. */
tril_status heat_map_write(const struct heat_map *h, const char *path, struct tril_error *err);

/* Several maps on one picture, in rows of `columns`. */
struct heat_grid {
    const char *title, *subtitle; /* each may be NULL */
    const struct heat_map *maps;
    int count, columns;
    double side; /* pixels of a map's longer side */
};
tril_status heat_grid_write(const struct heat_grid *g, const char *path, struct tril_error *err);

#endif
