/* Cells of one colour are one path in units of cells (64 paths at most), so that large matrices
 * make small files. */
#include "plot/heat.h"

#include <math.h>
#include <stdlib.h>

#include "plot/axis.h"

enum { LEVELS = 64, SIDE_MAX = 256, BAR_WIDTH = 14 };

/* Anchors of the colour scales, dark where values are large: white to blue to navy; and red
 * through white to blue. */
static const unsigned char sequential[][3] = {{247, 250, 255}, {198, 219, 247}, {120, 174, 238},
                                              {52, 120, 216},  {23, 72, 160},   {12, 32, 84}};
static const unsigned char diverging[][3] = {{127, 20, 30},   {206, 72, 64},   {244, 170, 146},
                                             {248, 248, 248}, {150, 190, 236}, {52, 120, 216},
                                             {16, 52, 128}};

static void level_colour(bool two_sided, int level, int rgb[3]) {
    const unsigned char(*anchors)[3] = two_sided ? diverging : sequential;
    int count = two_sided ? 7 : 6;
    double place = (double)level / (LEVELS - 1) * (count - 1);
    int at = place >= count - 1 ? count - 2 : (int)place;
    for (int k = 0; k < 3; k++)
        rgb[k] = (int)lround(anchors[at][k] + (place - at) * (anchors[at + 1][k] - anchors[at][k]));
}

/* The matrix as it is drawn: reduced to at most SIDE_MAX x SIDE_MAX, as levels (-1: not finite). */
struct cells {
    int rows, cols, block;
    double low, high;
    double *values;
    signed char *levels;
};

static tril_status cells_make(struct cells *c, const struct heat_map *h, struct tril_error *err) {
    int64_t longer = h->rows > h->cols ? h->rows : h->cols;
    *c = (struct cells){.block = (int)((longer + SIDE_MAX - 1) / SIDE_MAX)};
    c->rows = (int)((h->rows + c->block - 1) / c->block);
    c->cols = (int)((h->cols + c->block - 1) / c->block);
    size_t count = (size_t)c->rows * (size_t)c->cols;
    c->values = calloc(count, sizeof *c->values);
    c->levels = calloc(count, 1);
    if (!c->values || !c->levels)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a heat map");
    c->low = INFINITY;
    c->high = -INFINITY;
    for (size_t i = 0; i < count; i++) {
        int64_t row = (int64_t)i / c->cols * c->block, col = (int64_t)i % c->cols * c->block;
        double sum = 0;
        int64_t n = 0;
        for (int64_t r = row; r < row + c->block && r < h->rows; r++)
            for (int64_t k = col; k < col + c->block && k < h->cols; k++)
                if (isfinite(h->values[r * h->cols + k]))
                    sum += (double)h->values[r * h->cols + k], n++;
        c->values[i] = n ? sum / (double)n : NAN;
        if (n) {
            c->low = fmin(c->low, c->values[i]);
            c->high = fmax(c->high, c->values[i]);
        }
    }
    if (h->low != 0 || h->high != 0) {
        c->low = h->low;
        c->high = h->high;
    }
    if (!(c->low < c->high)) { /* one value, or none */
        double value = isfinite(c->low) && c->low == c->high ? c->low : 0;
        c->low = value > 0 ? 0 : value - 1;
        c->high = value > 0 ? value : value + 1;
    }
    if (h->diverging) {
        c->high = fmax(fabs(c->low), fabs(c->high));
        c->low = -c->high;
    }
    for (size_t i = 0; i < count; i++) {
        double place = (c->values[i] - c->low) / (c->high - c->low);
        place = place < 0 ? 0 : place > 1 ? 1 : place;
        c->levels[i] = (signed char)(isfinite(c->values[i]) ? lround(place * (LEVELS - 1)) : -1);
    }
    return TRIL_OK;
}

static void cells_draw(struct svg *s, const struct heat_map *h, const struct cells *c, double left,
                       double top, double size) {
    svg_at(s, "<g shape-rendering='crispEdges' transform='translate(", left, top);
    fprintf(s->out, ") scale(%ld.%03ld)'>\n", lround(size * 1000) / 1000,
            lround(size * 1000) % 1000);
    for (int level = -1; level < LEVELS; level++) {
        int rgb[3];
        bool open = false;
        for (int row = 0; row < c->rows; row++) {
            const signed char *levels = c->levels + (size_t)row * (size_t)c->cols;
            for (int col = 0, end; col < c->cols; col = end) {
                for (end = col + 1; end < c->cols && levels[end] == levels[col];)
                    end++;
                if (levels[col] != level)
                    continue;
                level_colour(h->diverging, level, rgb);
                if (!open && level < 0)
                    fputs("<path fill='" PLOT_EMPTY "' d='", s->out);
                else if (!open)
                    fprintf(s->out, "<path fill='#%02x%02x%02x' d='", (unsigned)rgb[0],
                            (unsigned)rgb[1], (unsigned)rgb[2]);
                open = true;
                fprintf(s->out, "M%d %dh%dv1h-%dz", col, row, end - col, end - col);
            }
        }
        if (open)
            fputs("'/>\n", s->out);
    }
    fputs("</g>\n", s->out);
}

static void values_draw(struct svg *s, const struct heat_map *h, const struct cells *c, double left,
                        double top, double size) {
    for (int i = 0; i < c->rows * c->cols; i++) {
        char text[32];
        int rgb[3];
        if (c->levels[i] < 0)
            continue;
        number_write(text, sizeof text, c->values[i], 2);
        level_colour(h->diverging, c->levels[i], rgb);
        bool dark = 299 * rgb[0] + 587 * rgb[1] + 114 * rgb[2] < 140000;
        svg_label(s, left + (i % c->cols + 0.5) * size, top + (i / c->cols + 0.5) * size + 4,
                  SVG_MIDDLE, size < 34 ? 9 : 11, dark ? "#ffffff" : PLOT_INK, "", text);
    }
}

/* Names or numbers along a side of `count` rows or columns, `block` of them in a cell: every one
 * where there is room, else every 2nd, 5th, 10th, ... */
static void side_draw(struct svg *s, const char *const *names, int64_t count, int block,
                      double left, double top, double size, bool vertical) {
    static const int steps[] = {1, 2, 5};
    double room = names ? 14 : vertical ? 24 : 34;
    int64_t every = 1;
    for (int64_t power = 1, i = 0; (double)every * size / block < room; power *= ++i % 3 ? 1 : 10)
        every = steps[i % 3] * power;
    for (int64_t i = 0; i < count; i += every) {
        char number[24];
        snprintf(number, sizeof number, "%lld", (long long)i);
        double middle = ((double)i + 0.5) / block * size;
        if (vertical) {
            svg_label(s, left - 6, top + middle + 4, SVG_END, 11, PLOT_FADED, "",
                      names ? names[i] : number);
        } else if (names) { /* slanted: they are longer than a cell is wide */
            svg_at(s, "<g transform='translate(", left + middle, top + 12);
            fputs(") rotate(-45)'>", s->out);
            svg_label(s, 0, 0, SVG_END, 11, PLOT_FADED, "", names[i]);
            fputs("</g>\n", s->out);
        } else {
            svg_label(s, left + middle, top + 16, SVG_MIDDLE, 11, PLOT_FADED, "", number);
        }
    }
}

static void bar_draw(struct svg *s, const struct heat_map *h, const struct cells *c, double left,
                     double top, double height) {
    struct axis a;
    for (int level = 0; level < LEVELS; level++) {
        int rgb[3];
        level_colour(h->diverging, level, rgb);
        double y = top + height * (LEVELS - 1 - level) / LEVELS;
        svg_at(s, "<path shape-rendering='crispEdges' d='M", left, y);
        svg_at(s, "L", left + BAR_WIDTH, y);
        svg_at(s, "L", left + BAR_WIDTH, y + height / LEVELS + 0.5);
        svg_at(s, "L", left, y + height / LEVELS + 0.5);
        fprintf(s->out, "z' fill='#%02x%02x%02x'/>\n", (unsigned)rgb[0], (unsigned)rgb[1],
                (unsigned)rgb[2]);
    }
    axis_fit(&a, c->low, c->high, false, (int)(height / 50), false);
    for (int i = 0; i < a.count; i++)
        svg_label(s, left + BAR_WIDTH + 6, top + height * (1 - axis_place(&a, a.ticks[i])) + 4,
                  SVG_START, 11, PLOT_FADED, "", a.labels[i]);
}

static int longest_name(const char *const *names, int64_t count, int otherwise) {
    int longest = otherwise;
    for (int64_t i = 0; names && i < count; i++) {
        int n = utf8_width(names[i]);
        longest = n > longest ? n : longest;
    }
    return longest > 24 ? 24 : longest;
}

/* ------------------------------------------------------------------ one map on a picture */

/* A map, reduced to cells and measured: where its parts stand inside the room it takes. */
struct panel {
    const struct heat_map *h;
    struct cells c;
    char note[96];
    double size;                    /* of a cell */
    double left, top, below;        /* around the cells */
    double width, height;           /* of the cells */
    double full_width, full_height; /* of all */
};

/* Cells are square: as large as `side` pixels allow, at most 48. */
static tril_status panel_measure(struct panel *p, const struct heat_map *h, double side,
                                 struct tril_error *err) {
    *p = (struct panel){.h = h};
    tril_status st = cells_make(&p->c, h, err);
    if (st != TRIL_OK)
        return st;
    const struct cells *c = &p->c;
    double fits = side / (c->rows > c->cols ? c->rows : c->cols);
    p->size = fmin(48, fits >= 2 ? floor(fits) : side < 420 ? fits : 2);
    if (c->block > 1)
        snprintf(p->note, sizeof p->note, "each cell is the mean of %d \u00d7 %d", c->block,
                 c->block);
    p->top = (h->title ? 22 : 0) + (h->subtitle ? 18 : 0) + (p->note[0] ? 18 : 0) +
             (h->y_label ? 20 : 0);
    p->left = h->bare ? 0 : 6.4 * longest_name(h->row_names, h->rows, 4);
    p->below = h->bare ? 0 : h->col_names ? 20 + 4.6 * longest_name(h->col_names, h->cols, 3) : 24;
    p->width = c->cols * p->size;
    p->height = c->rows * p->size;
    p->full_width = p->left + p->width + (h->bare ? 0 : 28 + BAR_WIDTH + 36);
    p->full_height =
        p->top + (h->bare ? p->height : fmax(p->height, 80)) + p->below + (h->x_label ? 16 : 0);
    return TRIL_OK;
}

/* At (x, y); `size` of its title's letters. */
static void panel_draw(struct svg *s, const struct panel *p, double x, double y, int size) {
    const struct heat_map *h = p->h;
    const double left = x + p->left, top = y + p->top;
    double line = y;
    if (h->title)
        svg_label(s, h->bare ? left : x, (line += 22) - 8, SVG_START, size, PLOT_INK,
                  "font-weight='600'", h->title);
    if (h->subtitle)
        svg_label(s, x, (line += 18) - 8, SVG_START, 12, PLOT_FADED, "", h->subtitle);
    if (p->note[0])
        svg_label(s, x, (line += 18) - 8, SVG_START, 12, PLOT_FADED, "", p->note);
    if (h->y_label)
        svg_label(s, left, (line += 20) - 8, SVG_START, 12, PLOT_INK, "", h->y_label);
    cells_draw(s, h, &p->c, left, top, p->size);
    if (h->show_values && p->size >= 26 && p->c.block == 1)
        values_draw(s, h, &p->c, left, top, p->size);
    if (h->x_label)
        svg_label(s, left + p->width / 2, top + p->height + p->below + 12, SVG_MIDDLE, 12, PLOT_INK,
                  "", h->x_label);
    if (h->bare)
        return;
    side_draw(s, h->row_names, h->rows, p->c.block, left, top, p->size, true);
    side_draw(s, h->col_names, h->cols, p->c.block, left, top + p->height, p->size, false);
    bar_draw(s, h, &p->c, left + p->width + 28, top, fmax(p->height, 80));
}

static void panel_free(struct panel *p) {
    free(p->c.values);
    free(p->c.levels);
}

static tril_status check_size(const struct heat_map *h, const char *path, struct tril_error *err) {
    if (h->rows < 1 || h->cols < 1)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: a heat map needs a row and a column", path);
    return TRIL_OK;
}

tril_status heat_map_write(const struct heat_map *h, const char *path, struct tril_error *err) {
    struct panel p = {0};
    struct svg s;
    tril_status st;
    TRY(check_size(h, path, err));
    TRY(panel_measure(&p, h, 420, err));
    double title = h->title ? utf8_width(h->title) * 9.5 : 0;
    double subtitle = h->subtitle ? utf8_width(h->subtitle) * 6.8 : 0;
    double width = fmax(fmax(p.full_width + 24, 232), fmax(title, subtitle));
    TRY(svg_begin(&s, (int)width + 48, (int)p.full_height + 28, err));
    panel_draw(&s, &p, 24, 20, 17);
    st = svg_end(&s, path, err);
done:
    panel_free(&p);
    return st;
}

tril_status heat_grid_write(const struct heat_grid *g, const char *path, struct tril_error *err) {
    struct panel *p = calloc((size_t)g->count + 1, sizeof *p);
    struct svg s;
    double wide = 0, high = 0;
    tril_status st = TRIL_OK;
    if (!p)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for %d heat maps", g->count);
    for (int i = 0; i < g->count; i++) {
        TRY(check_size(&g->maps[i], path, err));
        TRY(panel_measure(&p[i], &g->maps[i], g->side, err));
        wide = fmax(wide, p[i].full_width);
        high = fmax(high, p[i].full_height);
    }
    const int columns = g->columns < 1 ? 1 : g->columns;
    const double gap = g->count && g->maps[0].bare ? 8 : 28;
    const double above = 20 + (g->title ? 26 : 0) + (g->subtitle ? 20 : 0);
    const int lines = (g->count + columns - 1) / columns;
    double title = g->title ? utf8_width(g->title) * 9.5 : 0;
    double subtitle = g->subtitle ? utf8_width(g->subtitle) * 6.8 : 0;
    double width = fmax(columns * (wide + gap) - gap, fmax(title, subtitle));
    TRY(svg_begin(&s, (int)width + 48, (int)(above + lines * (high + gap) - gap) + 24, err));
    if (g->title)
        svg_label(&s, 24, 36, SVG_START, 17, PLOT_INK, "font-weight='600'", g->title);
    if (g->subtitle)
        svg_label(&s, 24, g->title ? 58 : 34, SVG_START, 12, PLOT_FADED, "", g->subtitle);
    for (int i = 0; i < g->count; i++)
        panel_draw(&s, &p[i], 24 + i % columns * (wide + gap), above + i / columns * (high + gap),
                   g->maps[0].bare ? 11 : 14);
    st = svg_end(&s, path, err);
done:
    for (int i = 0; i < g->count; i++)
        panel_free(&p[i]);
    free(p);
    return st;
}
