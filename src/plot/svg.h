/* A small SVG writer: text collected in memory, written atomically at the end; and how numbers are
 * spelt in pictures and tables, whatever the locale. */
#ifndef PLOT_SVG_H
#define PLOT_SVG_H

#include <stdbool.h>
#include <stdio.h>

#include "base/error.h"

struct svg {
    FILE *out; /* for fprintf; numbers through svg_at or as integers */
    char *text;
    size_t size;
};

/* Begins a picture on a white card, `width` x `height` pixels. */
tril_status svg_begin(struct svg *s, int width, int height, struct tril_error *err);
/* Ends it and writes it to `path`. svg_end frees s in every case. */
tril_status svg_end(struct svg *s, const char *path, struct tril_error *err);

enum svg_anchor { SVG_START, SVG_MIDDLE, SVG_END };
/* Text at (x, y) of its base line, escaped; `attributes` are raw ("font-weight='600'"), or "". */
void svg_label(struct svg *s, double x, double y, enum svg_anchor anchor, int size,
               const char *colour, const char *attributes, const char *text);
/* "x,y" with one decimal, preceded by `before`. */
void svg_at(struct svg *s, const char *before, double x, double y);
/* Escaped for XML; control characters and bytes that are not UTF-8 become U+FFFD. */
void svg_escape(struct svg *s, const char *text);

/* The characters of a UTF-8 text (what a fixed-width column needs, accents and wide ones apart). */
int utf8_width(const char *text);

#define NUMBER_SHORT (-1) /* up to six significant digits */
#define NUMBER_EXACT (-2) /* as many as give the number back */
/* Writes x with so many decimals (0 to 30), or one of the above; always with a point. */
void number_write(char *buf, size_t size, double x, int decimals);

/* Converts a picture with rsvg-convert, twice as large, where that program is installed; *made
 * tells whether it was. Its absence is no error. */
tril_status plot_svg_to_png(const char *svg_path, const char *png_path, bool *made,
                            struct tril_error *err);

#define PLOT_INK "#1f2937"   /* titles */
#define PLOT_FADED "#6b7280" /* labels */
#define PLOT_GRID "#e5e7eb"
#define PLOT_TEXT_WIDTH 6.8  /* of a character at 12 pixels, generously */
#define PLOT_EMPTY "#e5e7eb" /* a cell without a value */

#endif
