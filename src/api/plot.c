/* tril/plot.h: a CSV of numbers into columns, and those into curves. */
#include "tril/plot.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "plot/curve.h"

enum { MOST_COLUMNS = 17, CSV_LIMIT = 16 << 20 };

/* The next cell of a line: *at moves behind it; quotes around it are taken off. */
static char *cell_next(char **at) {
    char *cell = *at, *end = cell;
    if (*cell == '"') {
        cell++;
        for (end = cell; *end && *end != '"';)
            end++;
        if (*end)
            *end++ = 0;
    }
    end += strcspn(end, ",");
    *at = *end ? end + 1 : NULL;
    *end = 0;
    return cell;
}

static char *line_next(char **at) {
    char *line = *at;
    if (!line || !*line)
        return NULL;
    size_t n = strcspn(line, "\r\n");
    *at = line + n + strspn(line + n, "\r\n");
    line[n] = 0;
    return line;
}

tril_status tril_plot(const struct tril_plot_options *o, struct tril_error *err) {
    struct curve curves[MOST_COLUMNS];
    char *names[MOST_COLUMNS], *text = NULL, *at, *line;
    double *values = NULL;
    size_t size;
    int columns = 0, x = 0, count = 0;
    tril_status st = TRIL_OK;
    TRY(file_read(o->data, CSV_LIMIT, &text, &size, err));
    at = text;
    line = line_next(&at);
    for (char *cell = line; cell && columns < MOST_COLUMNS;)
        names[columns++] = cell_next(&cell);
    if (columns < 2) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s: a plot needs a line of two or more column names",
                       o->data);
        goto done;
    }
    while (o->x && x < columns && strcmp(names[x], o->x) != 0)
        x++;
    if (x == columns) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "%s has no column '%.40s'", o->data, o->x);
        goto done;
    }
    size_t most = 0, n = 0;
    for (const char *p = at; *p; p++)
        most += *p == '\n' || *p == '\r';
    most++;
    values = malloc((size_t)columns * most * sizeof *values);
    if (!values) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to plot %s", o->data);
        goto done;
    }
    while ((line = line_next(&at)) != NULL && n < most) {
        for (int c = 0; c < columns; c++) {
            char *cell = line ? cell_next(&line) : "", *end;
            double v = strtod(cell, &end);
            values[(size_t)c * most + n] = end == cell ? NAN : v;
            if (*cell && *end) {
                st = error_set(err, TRIL_ERR_FORMAT, "%s, row %zu: '%.40s' is not a number",
                               o->data, n + 1, cell);
                goto done;
            }
        }
        n++;
    }
    for (int c = 0; c < columns; c++)
        if (c != x)
            curves[count++] = (struct curve){.label = names[c],
                                             .x = values + (size_t)x * most,
                                             .y = values + (size_t)c * most,
                                             .n = (int64_t)n,
                                             .style = CURVE_DOTTED_LINE};
    const struct curve_plot plot = {.title = o->title,
                                    .x_label = o->x_label ? o->x_label : names[x],
                                    .y_label = o->y_label,
                                    .curves = curves,
                                    .curve_count = count,
                                    .x_log = o->x_log,
                                    .y_log = o->y_log};
    st = curve_plot_write(&plot, o->out, err);
done:
    free(values);
    free(text);
    return st;
}
