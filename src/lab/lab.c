/* The lab's frame: finding an experiment, collecting what it tells, writing it down. */
#include "lab/lab.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/file.h"
#include "base/progress.h"
#include "base/system.h"

static const struct lab_experiment *const experiments[] = {
#define EXPERIMENT(name) &lab_##name,
#include "lab/experiments.inc"
#undef EXPERIMENT
};

const struct lab_experiment *lab_at(int index) {
    int count = (int)(sizeof experiments / sizeof *experiments);
    return index >= 0 && index < count ? experiments[index] : NULL;
}

const struct lab_experiment *lab_find(const char *name) {
    const struct lab_experiment *e;
    for (int i = 0; (e = lab_at(i)) != NULL; i++)
        if (strcmp(e->about.name, name) == 0)
            return e;
    return NULL;
}

tril_status lab_no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the experiment");
}

/* ------------------------------------------------------------------ telling */

static void append(struct lab *l, const char *list, json_t *item) {
    if (!item || json_array_append_new(json_object_get(l->result, list), item) != 0)
        l->failed = true;
}

void lab_claim(struct lab *l, bool holds, const char *claim, const char *published,
               const char *format, ...) {
    char here[256];
    va_list list;
    va_start(list, format);
    vsnprintf(here, sizeof here, format, list);
    va_end(list);
    append(l, "claims",
           json_pack("{s:s, s:s, s:s, s:b}", "claim", claim, "published", published, "here", here,
                     "holds", holds));
}

void lab_value(struct lab *l, const char *name, double value) {
    json_t *number = json_real(value); /* NULL if not finite: then null */
    if (json_object_set_new(json_object_get(l->result, "values"), name,
                            number ? number : json_null()) != 0)
        l->failed = true;
}

void lab_say(struct lab *l, const char *format, ...) {
    char *text = NULL;
    va_list list;
    va_start(list, format);
    int n = vasprintf(&text, format, list);
    va_end(list);
    append(l, "findings", n >= 0 ? json_string(text) : NULL);
    if (n >= 0)
        free(text);
}

static char *named(const struct lab *l, const char *name, const char *ending) {
    char *file = NULL, *path = NULL;
    if (asprintf(&file, "%s.%s", name, ending) < 0)
        return NULL;
    path = path_join(l->dir, file);
    free(file);
    return path;
}

tril_status lab_table(struct lab *l, const char *name, const char *title, struct table *t,
                      struct tril_error *err) {
    char *csv = named(l, name, "csv"), *json = named(l, name, "json");
    json_t *rows = NULL;
    tril_status st = TRIL_OK;
    if (!csv || !json) {
        st = lab_no_memory(err);
        goto done;
    }
    if (l->print) {
        fprintf(l->print, "\n%s\n\n", title);
        TRY(table_print(t, l->print, err));
        fflush(l->print);
    }
    TRY(table_write_csv(t, csv, err));
    TRY(table_write_json(t, json, err));
    TRY(table_to_json(t, &rows, err));
    append(l, "tables", json_pack("{s:s, s:s, s:o}", "name", name, "title", title, "rows", rows));
done:
    table_free(t);
    free(csv);
    free(json);
    return st;
}

static tril_status plotted(struct lab *l, const char *name, const char *title, const char *svg,
                           struct tril_error *err) {
    char *png = named(l, name, "png");
    bool made = false;
    tril_status st = png ? plot_svg_to_png(svg, png, &made, err) : lab_no_memory(err);
    free(png);
    append(l, "plots",
           json_pack("{s:s, s:s, s:b}", "name", name, "title", title ? title : name, "png", made));
    return st;
}

tril_status lab_curves(struct lab *l, const char *name, const struct curve_plot *p,
                       struct tril_error *err) {
    char *svg = named(l, name, "svg");
    tril_status st = svg ? curve_plot_write(p, svg, err) : lab_no_memory(err);
    if (st == TRIL_OK)
        st = plotted(l, name, p->title, svg, err);
    free(svg);
    return st;
}

tril_status lab_bars(struct lab *l, const char *name, const struct bar_plot *p,
                     struct tril_error *err) {
    char *svg = named(l, name, "svg");
    tril_status st = svg ? bar_plot_write(p, svg, err) : lab_no_memory(err);
    if (st == TRIL_OK)
        st = plotted(l, name, p->title, svg, err);
    free(svg);
    return st;
}

tril_status lab_heat(struct lab *l, const char *name, const struct heat_map *h,
                     struct tril_error *err) {
    char *svg = named(l, name, "svg");
    tril_status st = svg ? heat_map_write(h, svg, err) : lab_no_memory(err);
    if (st == TRIL_OK)
        st = plotted(l, name, h->title, svg, err);
    free(svg);
    return st;
}

/* ------------------------------------------------------------------ a run */

static const char *size_name(enum tril_lab_size size) {
    return size == TRIL_LAB_QUICK ? "quick" : size == TRIL_LAB_FULL ? "full" : "papers";
}

/* The published beside the measured, as a table. */
static tril_status print_claims(const struct lab *l, struct tril_error *err) {
    const char *const columns[] = {"claim", "published", "here", "agrees"};
    json_t *claims = json_object_get(l->result, "claims"), *c;
    struct table *t = NULL;
    size_t i;
    tril_status st = TRIL_OK;
    if (!l->print || json_array_size(claims) == 0)
        return TRIL_OK;
    TRY(table_create(&t, columns, 4, err));
    json_array_foreach(claims, i, c) {
        table_add_text(t, json_string_value(json_object_get(c, "claim")));
        table_add_text(t, json_string_value(json_object_get(c, "published")));
        table_add_text(t, json_string_value(json_object_get(c, "here")));
        table_add_text(t, json_is_true(json_object_get(c, "holds")) ? "yes" : "NO");
    }
    fprintf(l->print, "\nPublished, and here\n\n");
    TRY(table_print(t, l->print, err));
done:
    table_free(t);
    return st;
}

/* A paragraph in lines of at most 100 characters. */
static void print_wrapped(FILE *f, const char *text) {
    int column = 0;
    fputc('\n', f);
    for (const char *p = text; *p;) {
        size_t n = strcspn(p, " ");
        if (column && column + (int)n + 1 > 100) {
            fputc('\n', f);
            column = 0;
        } else if (column) {
            fputc(' ', f);
            column++;
        }
        fwrite(p, 1, n, f);
        column += (int)n;
        p += n + strspn(p + n, " ");
    }
    fputc('\n', f);
}

static tril_status begin(struct lab *l, const struct lab_experiment *e,
                         const struct tril_lab_options *o, struct tril_error *err) {
    double load[1] = {0}, peak = l->env->peak_flops ? l->env->peak_flops(l->ctx, DT_F32) : 0;
    char when[32] = "", time_text[32];
    time_t now = time(NULL);
    struct tm tm;
    tril_status st = TRIL_OK;
    if (getloadavg(load, 1) != 1)
        load[0] = -1;
    if (gmtime_r(&now, &tm))
        strftime(when, sizeof when, "%Y-%m-%d %H:%M UTC", &tm);
    l->dir = path_join(o->out ? o->out : "lab", e->about.name);
    if (!l->dir)
        return lab_no_memory(err);
    TRY(dir_make(l->dir, err));
    l->result = json_pack(
        "{s:s, s:s, s:s, s:s, s:s, s:{s:s, s:s, s:i, s:f, s:f}, s:[], s:[], s:[], s:{}, s:[]}",
        "name", e->about.name, "title", e->title, "rows", e->about.rows, "size", size_name(l->size),
        "when", when, "machine", "processor", cpu_model_name(), "isa", l->env->isa, "threads",
        l->env->threads, "peak_flops", peak, "load", load[0], "tables", "claims", "findings",
        "values", "plots");
    if (!l->result)
        return lab_no_memory(err);
    if (l->print) {
        fprintf(l->print, "%s (%s, %s)\n%s, %s, %d threads, %.3f TFLOP/s in fp32; load %.1f\n",
                e->title, e->about.name, size_name(l->size), cpu_model_name(), l->env->isa,
                l->env->threads, peak * 1e-12, load[0]);
        fflush(l->print);
    }
    if (l->size != TRIL_LAB_QUICK) {
        /* The list's times are those of a machine with 0.2 TFLOP/s. */
        double slower = peak > 0 ? 0.2e12 / peak : 1;
        fprintf(stderr, "%s --%s takes about %s on this machine%s\n", e->about.name,
                size_name(l->size), format_duration(e->about.full_seconds * slower, time_text),
                l->size == TRIL_LAB_PAPERS ? ", if it has sizes of its own for --papers far longer"
                                           : "");
    }
done:
    return st;
}

tril_status lab_run(const struct lab_environment *env, const struct tril_lab_options *o,
                    char **json, struct tril_error *err) {
    const struct lab_experiment *e = o->name ? lab_find(o->name) : NULL;
    struct lab l = {.env = env,
                    .ctx = env->ctx,
                    .device = env->ctx->backend->device,
                    .size = o->size,
                    .data = o->data,
                    .data_count = o->data_count,
                    .print = o->print};
    char *path = NULL, *text = NULL;
    json_t *finding;
    size_t i;
    tril_status st = TRIL_OK;
    if (!e)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "there is no experiment '%.60s'; tril lab list names them all",
                         o->name ? o->name : "");
    if (l.device && !e->about.device)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the experiment %s looks into tensors on the CPU; run it without --device",
                         e->about.name);
    TRY(begin(&l, e, o, err));
    double begun = clock_seconds();
    TRY(e->run(&l, err));
    if (json_object_set_new(l.result, "seconds", json_real(clock_seconds() - begun)) != 0)
        l.failed = true;
    TRY(print_claims(&l, err));
    if (l.print)
        json_array_foreach(json_object_get(l.result, "findings"), i, finding)
            print_wrapped(l.print, json_string_value(finding));
    path = path_join(l.dir, "result.json");
    text = json_dumps(l.result, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    if (!path || !text || l.failed) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(file_write_atomic(path, text, strlen(text), err));
    if (l.print)
        fprintf(l.print, "\n%s\n", l.dir);
    if (json) {
        *json = text;
        text = NULL;
    }
done:
    json_decref(l.result);
    free(l.dir);
    free(path);
    free(text);
    return st;
}
