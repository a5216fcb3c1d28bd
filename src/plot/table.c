/* Cells lie one after the other; a row is complete when it has a cell for every column. */
#include "plot/table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "plot/svg.h"

enum cell_kind { CELL_EMPTY, CELL_TEXT, CELL_INT, CELL_NUMBER };

struct cell {
    enum cell_kind kind;
    int decimals;
    union {
        char *text;
        int64_t whole;
        double number;
    };
};

struct table {
    char **columns;
    int column_count;
    struct cell *cells;
    int64_t used, room;
    bool out_of_memory;
};

tril_status table_create(struct table **out, const char *const *columns, int count,
                         struct tril_error *err) {
    struct table *t = calloc(1, sizeof *t);
    bool good = t && (t->columns = calloc((size_t)count + 1, sizeof *t->columns));
    for (int i = 0; good && i < count; i++) {
        good = (t->columns[i] = strdup(columns[i])) != NULL;
        t->column_count++;
    }
    *out = t;
    if (good)
        return TRIL_OK;
    table_free(t);
    *out = NULL;
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a table");
}

void table_free(struct table *t) {
    if (!t)
        return;
    for (int i = 0; i < t->column_count; i++)
        free(t->columns[i]);
    for (int64_t i = 0; i < t->used; i++)
        if (t->cells[i].kind == CELL_TEXT)
            free(t->cells[i].text);
    free(t->columns);
    free(t->cells);
    free(t);
}

static void cell_add(struct table *t, struct cell cell) {
    if (t->used == t->room) {
        int64_t room = t->room ? 2 * t->room : 64;
        struct cell *grown = reallocarray(t->cells, (size_t)room, sizeof *grown);
        if (!grown) {
            t->out_of_memory = true;
            if (cell.kind == CELL_TEXT)
                free(cell.text);
            return;
        }
        t->cells = grown;
        t->room = room;
    }
    t->cells[t->used++] = cell;
}

void table_add_text(struct table *t, const char *text) {
    char *copy = text ? strdup(text) : NULL;
    if (text && !copy)
        t->out_of_memory = true;
    cell_add(t, (struct cell){.kind = copy ? CELL_TEXT : CELL_EMPTY, .text = copy});
}

void table_add_int(struct table *t, int64_t value) {
    cell_add(t, (struct cell){.kind = CELL_INT, .whole = value});
}

void table_add_number(struct table *t, double value, int decimals) {
    enum cell_kind kind = isfinite(value) ? CELL_NUMBER : CELL_EMPTY;
    cell_add(t, (struct cell){.kind = kind, .decimals = decimals, .number = value});
}

int64_t table_rows(const struct table *t) {
    return t->column_count ? t->used / t->column_count : 0;
}

static tril_status table_check(const struct table *t, struct tril_error *err) {
    return t->out_of_memory ? error_set(err, TRIL_ERR_MEMORY, "not enough memory for a table")
                            : TRIL_OK;
}

/* The cell as text: in `buf`, or the cell's own. */
static const char *cell_text(const struct cell *c, bool full, char *buf, size_t size) {
    buf[0] = '\0';
    if (c->kind == CELL_TEXT)
        return c->text;
    if (c->kind == CELL_INT)
        snprintf(buf, size, "%lld", (long long)c->whole);
    else if (c->kind == CELL_NUMBER)
        number_write(buf, size, c->number, full ? NUMBER_EXACT : c->decimals);
    return buf;
}

#define CELL_BUFFER 352 /* the longest double with 30 decimals */

tril_status table_print(const struct table *t, FILE *stream, struct tril_error *err) {
    char buf[CELL_BUFFER];
    int *widths = NULL;
    tril_status st;
    TRY(table_check(t, err));
    if (!(widths = calloc((size_t)t->column_count + 1, sizeof *widths))) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to print a table");
        goto done;
    }
    int64_t rows = table_rows(t);
    for (int64_t row = -1; row < rows; row++) {
        for (int i = 0; i < t->column_count; i++) {
            const struct cell *c = row < 0 ? NULL : &t->cells[row * t->column_count + i];
            int n = utf8_width(c ? cell_text(c, false, buf, sizeof buf) : t->columns[i]);
            widths[i] = n > widths[i] ? n : widths[i];
        }
    }
    for (int64_t row = -1; row < rows; row++) {
        for (int i = 0; i < t->column_count; i++) {
            /* A heading stands over its column's first cell, to the same side. */
            const struct cell *c =
                rows ? &t->cells[(row < 0 ? 0 : row) * t->column_count + i] : NULL;
            bool right = c && (c->kind == CELL_INT || c->kind == CELL_NUMBER);
            const char *text = row < 0 ? t->columns[i] : cell_text(c, false, buf, sizeof buf);
            int pad = widths[i] - utf8_width(text);
            bool last = i + 1 == t->column_count;
            fprintf(stream, "%*s%s%*s%s", right ? pad : 0, "", text, right || last ? 0 : pad, "",
                    last ? "\n" : "  ");
        }
    }
    if (ferror(stream))
        st = error_set_errno(err, "cannot print a table");
done:
    free(widths);
    return st;
}

static void csv_field(FILE *stream, const char *text, bool last) {
    bool quote = text[strcspn(text, ",\"\r\n")] != '\0';
    if (quote)
        fputc('"', stream);
    for (const char *s = text; *s; s++) {
        if (*s == '"')
            fputc('"', stream);
        fputc(*s, stream);
    }
    if (quote)
        fputc('"', stream);
    fputs(last ? "\r\n" : ",", stream);
}

tril_status table_write_csv(const struct table *t, const char *path, struct tril_error *err) {
    char buf[CELL_BUFFER], *text = NULL;
    size_t size = 0;
    tril_status st;
    TRY(table_check(t, err));
    FILE *stream = open_memstream(&text, &size);
    bool good = stream != NULL;
    if (good) {
        for (int i = 0; i < t->column_count; i++)
            csv_field(stream, t->columns[i], i + 1 == t->column_count);
        for (int64_t i = 0; i < table_rows(t) * t->column_count; i++)
            csv_field(stream, cell_text(&t->cells[i], true, buf, sizeof buf),
                      (i + 1) % t->column_count == 0);
        good = !ferror(stream);
        good = fclose(stream) == 0 && good;
    }
    st = good ? file_write_atomic(path, text, size, err)
              : error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path);
done:
    free(text);
    return st;
}

static json_t *cell_json(const struct cell *c) {
    switch (c->kind) {
    case CELL_TEXT:
        return json_string(c->text);
    case CELL_INT:
        return json_integer(c->whole);
    case CELL_NUMBER:
        return json_real(c->number);
    case CELL_EMPTY:
        break;
    }
    return json_null();
}

tril_status table_to_json(const struct table *t, json_t **out, struct tril_error *err) {
    *out = NULL;
    tril_status st = table_check(t, err);
    if (st != TRIL_OK)
        return st;
    json_t *rows = json_array();
    bool good = rows != NULL;
    for (int64_t row = 0; good && row < table_rows(t); row++) {
        json_t *object = json_object();
        good = json_array_append_new(rows, object) == 0;
        for (int i = 0; good && i < t->column_count; i++)
            good = json_object_set_new(object, t->columns[i],
                                       cell_json(&t->cells[row * t->column_count + i])) == 0;
    }
    if (good) {
        *out = rows;
        return TRIL_OK;
    }
    json_decref(rows);
    return error_set(err, TRIL_ERR_ARGUMENT, "a table holds text that is not UTF-8");
}

tril_status table_write_json(const struct table *t, const char *path, struct tril_error *err) {
    json_t *root;
    tril_status st = table_to_json(t, &root, err);
    if (st == TRIL_OK)
        st = json_write(root, path, err);
    json_decref(root);
    return st;
}
