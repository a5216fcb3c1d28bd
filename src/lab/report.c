/* All results in a folder as one HTML page (no scripts, no network, light and dark) and as one
 * Markdown file with links to the plots. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "lab/lab.h"

enum { RESULT_LIMIT = 64 << 20 };

static const char style[] =
    "<style>\n"
    ":root{color-scheme:light dark;--ink:#1f2937;--paper:#fff;--line:#d1d5db;--faint:#6b7280;"
    "--bad:#b45309}\n"
    "@media(prefers-color-scheme:dark){:root{--ink:#e5e7eb;--paper:#111827;--line:#374151;"
    "--faint:#9ca3af;--bad:#fbbf24}}\n"
    "body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);"
    "max-width:62rem;margin:0 auto;padding:1rem}\n"
    "h2{border-top:1px solid var(--line);padding-top:1.5rem;margin-top:2.5rem}\n"
    ".scroll{overflow-x:auto}table{border-collapse:separate;border-spacing:0;font-variant-numeric:"
    "tabular-nums;"
    "font-size:.9rem;margin:.5rem 0}\n"
    "th,td{border-bottom:1px solid var(--line);padding:.2rem .7rem;text-align:left}"
    "td.n{text-align:right}\n"
    ".faint{color:var(--faint);font-size:.9rem}.no{color:var(--bad);font-weight:600}\n"
    "figure{margin:1rem 0}figure svg{max-width:100%;height:auto;border-radius:.4rem}"
    "nav a{margin-right:1rem;white-space:nowrap}a{color:inherit}\n"
    /* A scrolled table keeps its first column; words of claims stay in lines worth reading. */
    "th:first-child,td:first-child{position:sticky;left:0;background:var(--paper)}"
    ".claims td:nth-child(3){min-width:11rem}\n"
    "@media(max-width:40rem){body{padding:.7rem}th,td{padding:.2rem .45rem}"
    "th:first-child,td:first-child{max-width:8rem}}\n"
    "</style>\n";

static void escaped(FILE *f, const char *text) {
    struct svg s = {.out = f};
    svg_escape(&s, text ? text : "");
}

static const char *text_of(const json_t *o, const char *key) {
    const char *s = json_string_value(json_object_get(o, key));
    return s ? s : "";
}

static void write_cell(FILE *f, const json_t *v) {
    char number[40];
    if (json_is_string(v)) {
        fputs("<td>", f);
        escaped(f, json_string_value(v));
    } else {
        fputs("<td class=n>", f);
        if (json_is_integer(v))
            fprintf(f, "%lld", (long long)json_integer_value(v));
        else if (json_is_real(v)) {
            number_write(number, sizeof number, json_real_value(v), NUMBER_SHORT);
            fputs(number, f);
        }
    }
    fputs("</td>", f);
}

static void write_rows(FILE *f, json_t *rows) {
    const char *key;
    json_t *row, *value;
    size_t i;
    fputs("<div class=scroll><table><tr>", f);
    json_object_foreach(json_array_get(rows, 0), key, value) {
        fputs("<th>", f);
        escaped(f, key);
        fputs("</th>", f);
    }
    fputs("</tr>\n", f);
    json_array_foreach(rows, i, row) {
        fputs("<tr>", f);
        json_object_foreach(row, key, value) write_cell(f, value);
        fputs("</tr>\n", f);
    }
    fputs("</table></div>\n", f);
}

static void write_claims(FILE *f, json_t *claims) {
    json_t *c;
    size_t i;
    if (json_array_size(claims) == 0)
        return;
    fputs("<div class=scroll><table class=claims><tr><th>claim</th><th>published</th><th>here</th>"
          "<th>agrees</th></tr>\n",
          f);
    json_array_foreach(claims, i, c) {
        static const char *const keys[] = {"claim", "published", "here"};
        fputs("<tr>", f);
        for (int k = 0; k < 3; k++) {
            fputs("<td>", f);
            escaped(f, text_of(c, keys[k]));
            fputs("</td>", f);
        }
        fputs(json_is_true(json_object_get(c, "holds")) ? "<td>yes</td></tr>\n"
                                                        : "<td class=no>no</td></tr>\n",
              f);
    }
    fputs("</table></div>\n", f);
}

/* The pictures themselves, inside the page. */
static tril_status write_plots(FILE *f, const char *dir, json_t *plots, struct tril_error *err) {
    json_t *p;
    size_t i, size;
    tril_status st = TRIL_OK;
    json_array_foreach(plots, i, p) {
        char *name = NULL, *path = NULL, *svg = NULL;
        if (asprintf(&name, "%s.svg", text_of(p, "name")) >= 0)
            path = path_join(dir, name);
        st = path ? file_read(path, RESULT_LIMIT, &svg, &size, err) : lab_no_memory(err);
        if (st == TRIL_OK) {
            const char *start = strstr(svg, "<svg");
            fputs("<figure>", f);
            fputs(start ? start : "", f);
            fputs("</figure>\n", f);
        }
        free(svg);
        free(path);
        free(name);
        if (st != TRIL_OK)
            return st;
    }
    return st;
}

static tril_status write_result(FILE *f, const char *dir, const json_t *r, struct tril_error *err) {
    const json_t *m = json_object_get(r, "machine");
    json_t *item;
    size_t i;
    fprintf(f, "<h2 id='%s'>", text_of(r, "name"));
    escaped(f, text_of(r, "title"));
    fprintf(f, "</h2>\n<p class=faint>tril lab run %s --%s &middot; rows ", text_of(r, "name"),
            text_of(r, "size"));
    escaped(f, text_of(r, "rows"));
    fputs(" &middot; ", f);
    escaped(f, text_of(m, "processor"));
    fprintf(f,
            ", %s, %d threads, %.3f TFLOP/s in fp32, load %.1f at the start &middot; %s "
            "&middot; %.0f s</p>\n",
            text_of(m, "isa"), (int)json_integer_value(json_object_get(m, "threads")),
            json_real_value(json_object_get(m, "peak_flops")) * 1e-12,
            json_real_value(json_object_get(m, "load")), text_of(r, "when"),
            json_real_value(json_object_get(r, "seconds")));
    json_array_foreach(json_object_get(r, "findings"), i, item) {
        fputs("<p>", f);
        escaped(f, json_string_value(item));
        fputs("</p>\n", f);
    }
    write_claims(f, json_object_get(r, "claims"));
    json_array_foreach(json_object_get(r, "tables"), i, item) {
        fputs("<h3>", f);
        escaped(f, text_of(item, "title"));
        fputs("</h3>\n", f);
        write_rows(f, json_object_get(item, "rows"));
    }
    return write_plots(f, dir, json_object_get(r, "plots"), err);
}

/* ------------------------------------------------------------------ Markdown */

enum { MARKDOWN_ROWS = 40 }; /* longer tables stay in their files */

/* A cell: no bars, no line ends. */
static void markdown_text(FILE *f, const char *text) {
    for (; *text; text++)
        if (*text == '|')
            fputs("\\|", f);
        else
            fputc(*text == '\n' ? ' ' : *text, f);
}

static void markdown_cell(FILE *f, const json_t *v) {
    double x = json_number_value(v);
    fputc(' ', f);
    if (json_is_string(v))
        markdown_text(f, json_string_value(v));
    else if (json_is_number(v) && fabs(x) >= 1e4 && fabs(x) < 1e15)
        fprintf(f, "%.0f", x);
    else if (json_is_number(v))
        fprintf(f, "%.5g", x);
    fputs(" |", f);
}

static void markdown_table(FILE *f, const json_t *table, const char *name) {
    json_t *rows = json_object_get(table, "rows"), *row, *value;
    const char *key;
    size_t i;
    fprintf(f, "%s", text_of(table, "title"));
    if (json_array_size(rows) > MARKDOWN_ROWS) {
        fprintf(f, ": %d rows, in %s/%s.csv.\n\n", (int)json_array_size(rows), name,
                text_of(table, "name"));
        return;
    }
    fputs(":\n\n|", f);
    json_object_foreach(json_array_get(rows, 0), key, value) {
        fputc(' ', f);
        markdown_text(f, key);
        fputs(" |", f);
    }
    fputs("\n|", f);
    json_object_foreach(json_array_get(rows, 0), key, value)
        fputs(json_is_number(value) ? "---:|" : "---|", f);
    json_array_foreach(rows, i, row) {
        fputs("\n|", f);
        json_object_foreach(row, key, value) markdown_cell(f, value);
    }
    fputs("\n\n", f);
}

static void markdown_result(FILE *f, const json_t *r) {
    const json_t *m = json_object_get(r, "machine");
    json_t *item, *claims = json_object_get(r, "claims");
    size_t i;
    fprintf(f,
            "## %s\n\n`tril lab run %s --%s` (rows %s; %s, %d threads, %.3f TFLOP/s in fp32, load "
            "%.1f at the start; %.0f s)\n\n",
            text_of(r, "title"), text_of(r, "name"), text_of(r, "size"), text_of(r, "rows"),
            text_of(m, "isa"), (int)json_integer_value(json_object_get(m, "threads")),
            json_real_value(json_object_get(m, "peak_flops")) * 1e-12,
            json_real_value(json_object_get(m, "load")),
            json_real_value(json_object_get(r, "seconds")));
    json_array_foreach(json_object_get(r, "findings"), i, item)
        fprintf(f, "%s\n\n", json_string_value(item));
    if (json_array_size(claims)) {
        fputs("| claim | published | here | agrees |\n|---|---|---|---|\n", f);
        json_array_foreach(claims, i, item) {
            fputs("|", f);
            markdown_cell(f, json_object_get(item, "claim"));
            markdown_cell(f, json_object_get(item, "published"));
            markdown_cell(f, json_object_get(item, "here"));
            fputs(json_is_true(json_object_get(item, "holds")) ? " yes |\n" : " **no** |\n", f);
        }
        fputc('\n', f);
    }
    json_array_foreach(json_object_get(r, "tables"), i, item)
        markdown_table(f, item, text_of(r, "name"));
    json_array_foreach(json_object_get(r, "plots"), i, item)
        fprintf(f, "![%s](%s/%s.svg)\n\n", text_of(item, "title"), text_of(r, "name"),
                text_of(item, "name"));
}

/* ------------------------------------------------------------------ */

/* The result in OUT/NAME, or *r NULL where there is none. */
static tril_status read_result(const char *out, const char *name, char **dir, json_t **r,
                               struct tril_error *err) {
    char *path = NULL;
    tril_status st = TRIL_OK;
    *r = NULL;
    *dir = path_join(out, name);
    path = *dir ? path_join(*dir, "result.json") : NULL;
    if (!path)
        return lab_no_memory(err);
    if (!path_exists(path))
        goto done;
    TRY(json_read(r, path, RESULT_LIMIT, err));
done:
    free(path);
    return st;
}

tril_status lab_report(const char *out, int *count, struct tril_error *err) {
    const struct lab_experiment *e;
    char *page = NULL, *path = path_join(out, "report.html");
    char *text = NULL, *text_path = path_join(out, "report.md");
    size_t size = 0, text_size = 0;
    FILE *f = open_memstream(&page, &size), *markdown = open_memstream(&text, &text_size);
    tril_status st = TRIL_OK;
    *count = 0;
    if (!f || !markdown || !path || !text_path) {
        st = lab_no_memory(err);
        goto done;
    }
    fprintf(f,
            "<!doctype html>\n<html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width,initial-scale=1'>\n"
            "<title>tril lab</title>\n%s<h1>The lab</h1>\n<p>The papers' experiments as measured "
            "here. Where a figure differs from the published one, the table says no.</p>\n<nav>",
            style);
    for (int pass = 0; pass < 2; pass++) { /* the contents, then the results */
        for (int i = 0; (e = lab_at(i)) != NULL; i++) {
            char *dir = NULL;
            json_t *r = NULL;
            st = read_result(out, e->about.name, &dir, &r, err);
            if (st == TRIL_OK && r && pass == 0) {
                fprintf(f, "<a href='#%s'>%s</a> ", e->about.name, e->about.name);
                (*count)++;
            } else if (st == TRIL_OK && r) {
                st = write_result(f, dir, r, err);
                markdown_result(markdown, r);
            }
            json_decref(r);
            free(dir);
            if (st != TRIL_OK)
                goto done;
        }
        fputs(pass == 0 ? "</nav>\n" : "</html>\n", f);
    }
    if (*count == 0) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s holds no results: run experiments first, with tril lab run NAME --out "
                       "%s",
                       out, out);
        goto done;
    }
    if (fflush(f) != 0 || fflush(markdown) != 0) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(file_write_atomic(path, page, size, err));
    TRY(file_write_atomic(text_path, text, text_size, err));
done:
    if (f)
        fclose(f);
    if (markdown)
        fclose(markdown);
    free(page);
    free(path);
    free(text);
    free(text_path);
    return st;
}
