/* Ticks: Heckbert's "nice numbers" (Graphics Gems, 1990) for linear axes. */
#include "plot/axis.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "plot/svg.h"

bool axis_takes(double value, bool log) {
    return fabs(value) < 1e290 && (!log || value > 1e-290); /* false for NaN, too */
}

double axis_place(const struct axis *a, double value) {
    if (a->log)
        return (log10(value) - log10(a->low)) / (log10(a->high) - log10(a->low));
    return (value - a->low) / (a->high - a->low);
}

/* The smallest of 1, 2, 5, 10 times a power of ten that is at least x (but for rounding). */
static double nice_step(double x) {
    double power = pow(10, floor(log10(x))), unit = x / power;
    return power * (unit < 1.001 ? 1 : unit < 2.001 ? 2 : unit < 5.001 ? 5 : 10);
}

/* "0.25", "12k", "1.5M", "1e-5": `unit` is the finest difference that must show. */
static void label_write(char label[16], double value, double largest, double unit) {
    static const struct {
        double size;
        const char *name;
    } scales[] = {{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}};
    double scale = 1;
    const char *name = "";
    char number[32];
    for (int i = 3; i >= 0 && largest >= 1e4; i--)
        if (largest >= scales[i].size && unit < 1e15)
            scale = scales[i].size, name = scales[i].name;
    if (value == 0) {
        snprintf(label, 16, "0");
    } else if (unit >= 1e15 || largest < 1e-3) {
        int digits = (int)(floor(log10(fabs(value)) + 1e-9) - floor(log10(unit) + 1e-9));
        snprintf(label, 16, "%.*e", digits < 0 ? 0 : digits > 6 ? 6 : digits, value);
        char *e = strchr(label, 'e');
        while (e && e[2] == '0' && e[3]) /* 1e-05 to 1e-5 */
            memmove(e + 2, e + 3, strlen(e + 2));
    } else {
        int decimals = (int)-floor(log10(unit / scale) + 1e-9);
        number_write(number, sizeof number, value / scale, decimals < 0 ? 0 : decimals);
        snprintf(label, 16, "%.13s%s", number, name);
    }
}

static void tick_add(struct axis *a, double value, double largest, double unit) {
    double slack = 1e-9;
    double place = axis_place(a, value);
    if (a->count == AXIS_TICKS || place < -slack || place > 1 + slack)
        return;
    a->ticks[a->count] = value;
    label_write(a->labels[a->count++], value, largest, unit);
}

static void ticks_linear(struct axis *a, int wanted, bool round) {
    double step = nice_step((a->high - a->low) / wanted);
    double first = floor(a->low / step + 1e-6), last = ceil(a->high / step - 1e-6);
    if (round && (!a->log || first > 0)) {
        a->low = first * step;
        a->high = last * step;
    }
    double largest = fmax(fabs(a->low), fabs(a->high));
    for (double i = first; i <= last; i++)
        tick_add(a, i * step, largest, step);
    if (a->count < 2) { /* the step stepped over the range */
        a->count = 0;
        ticks_linear(a, 2 * wanted, round);
    }
}

static void ticks_log(struct axis *a, int wanted, bool round) {
    static const double between[] = {1, 2, 5};
    int first = (int)floor(log10(a->low)), last = (int)ceil(log10(a->high));
    double decades = log10(a->high / a->low);
    int per_decade = decades < 1.5 || decades * 3 <= wanted ? 3 : 1, every = 1;
    while (decades / every > wanted)
        every++;
    if (round) { /* to the nearest ticks outside */
        double low = 0, high = 0;
        for (int e = first - 1; e <= last + 1; e++) {
            for (int i = 0; i < per_decade; i++) {
                double v = between[i] * pow(10, e);
                if (v <= a->low * (1 + 1e-9))
                    low = v;
                if (high == 0 && v >= a->high * (1 - 1e-9))
                    high = v;
            }
        }
        a->low = low;
        a->high = high;
    }
    for (int e = first - 1; e <= last + 1; e++)
        for (int i = 0; i < per_decade; i++)
            if (e % every == 0) {
                double v = between[i] * pow(10, e);
                tick_add(a, v, v, v);
            }
}

void axis_fit(struct axis *a, double min, double max, bool log, int wanted, bool round) {
    if (min > max) {
        min = log ? 1 : 0;
        max = log ? 10 : 1;
    }
    /* One value, or nearly: room on both sides of it. */
    if (log && max < min * 1.0001) {
        min /= 2;
        max *= 2;
    } else if (!log && max - min <= 1e-9 * fmax(fabs(min), fabs(max))) {
        double room = max == 0 ? 1 : fabs(max) / 2;
        min -= room;
        max += room;
    }
    *a = (struct axis){.low = min, .high = max, .log = log};
    if (wanted < 2)
        wanted = 2;
    /* Within one decade, powers of ten say too little: linear ticks, at logarithmic places. */
    if (log && max / min > 8)
        ticks_log(a, wanted, round);
    else
        ticks_linear(a, wanted, round);
}
