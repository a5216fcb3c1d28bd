/* Tables: rows of text and numbers, printed in columns for people, written as CSV or JSON for
 * programs. Every experiment and benchmark fills one.
 *
 *   struct table *t;
 *   const char *columns[] = {"layers", "perplexity", "note"};
 *   TRY(table_create(&t, columns, 3, err));
 *   table_add_int(t, 2), table_add_number(t, 38.5, 1), table_add_text(t, "dense");
 *   TRY(table_write_csv(t, "depth.csv", err));
 *
 * Cells are appended row by row. Running out of memory while appending is remembered, and reported
 * by whatever prints or writes. */
#ifndef PLOT_TABLE_H
#define PLOT_TABLE_H

#include <jansson.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"

struct table;

/* `columns` are the names of the columns (copied). table_free(NULL) is fine. */
tril_status table_create(struct table **out, const char *const *columns, int count,
                         struct tril_error *err);
void table_free(struct table *t);

void table_add_text(struct table *t, const char *text); /* copied; NULL is an empty cell */
void table_add_int(struct table *t, int64_t value);
/* Printed with `decimals` digits after the point (negative: as few as it needs, up to six
 * significant ones); written in full. What is not finite is an empty cell. */
void table_add_number(struct table *t, double value, int decimals);

int64_t table_rows(const struct table *t); /* complete ones */

/* For people: numbers to the right, text to the left, two blanks between. */
tril_status table_print(const struct table *t, FILE *stream, struct tril_error *err);
/* RFC 4180: a header line, quotes where they are needed. */
tril_status table_write_csv(const struct table *t, const char *path, struct tril_error *err);
/* An array with one object per row; empty cells are null. The caller owns *out. */
tril_status table_to_json(const struct table *t, json_t **out, struct tril_error *err);
tril_status table_write_json(const struct table *t, const char *path, struct tril_error *err);

#endif
