/* An axis: its range, where its ticks stand, and what they say. Linear steps are 1, 2 or 5 times a
 * power of ten; logarithmic ticks are powers of ten, with 2 and 5 between where there is room. */
#ifndef PLOT_AXIS_H
#define PLOT_AXIS_H

#include <stdbool.h>

enum { AXIS_TICKS = 24 };

struct axis {
    double low, high; /* low < high; both positive if log */
    bool log;
    int count;
    double ticks[AXIS_TICKS];
    char labels[AXIS_TICKS][16];
};

/* Whether a value can be placed: finite, of sane size, and positive on a logarithmic axis. */
bool axis_takes(double value, bool log);
/* Fits an axis to [min, max] (values that it takes; an empty range, min > max, is fine) with about
 * `wanted` ticks. `round` widens the range to whole ticks. */
void axis_fit(struct axis *a, double min, double max, bool log, int wanted, bool round);
/* Where a value lies: 0 at low, 1 at high. */
double axis_place(const struct axis *a, double value);

#endif
