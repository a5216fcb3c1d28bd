/* tril/inspect.h: how the weights of a checkpoint are distributed. */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"
#include "formats/safetensors.h"
#include "plot/svg.h"
#include "plot/table.h"
#include "tril/inspect.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to look at the weights");
}

/* ------------------------------------------------------------------ figures of one tensor */

enum { PIECES = 8, ITERATIONS = 60 };

/* One step of the power iteration: z = W^T W x, in PIECES blocks of rows whose sums are added in
 * order, so that threads change nothing. */
struct step {
    const float *w;
    int64_t rows, cols;
    const float *x; /* [cols] */
    float *z;       /* [PIECES, cols] */
};

static void step_piece(void *arg, int64_t begin, int64_t end, int worker) {
    const struct step *s = arg;
    (void)worker;
    for (int64_t p = begin; p < end; p++) {
        float *restrict z = s->z + p * s->cols;
        memset(z, 0, (size_t)s->cols * sizeof *z);
        for (int64_t r = s->rows * p / PIECES; r < s->rows * (p + 1) / PIECES; r++) {
            const float *restrict w = s->w + r * s->cols;
            float part[8] = {0}, y = 0;
            int64_t c = 0;
            for (; c + 8 <= s->cols; c += 8)
                for (int k = 0; k < 8; k++)
                    part[k] += w[c + k] * s->x[c + k];
            for (; c < s->cols; c++)
                y += w[c] * s->x[c];
            for (int k = 0; k < 8; k++)
                y += part[k];
            for (c = 0; c < s->cols; c++)
                z[c] += y * w[c];
        }
    }
}

/* The largest singular value: the root of |W^T W x| where x, of length 1, has settled. */
static tril_status spectral(const float *w, int64_t rows, int64_t cols, double *out,
                            struct tril_error *err) {
    float *x = NULL, *z = NULL;
    double before = 0, now = 0;
    tril_status st;
    TRY(mem_alloc((void **)&x, (size_t)cols * sizeof *x, "a singular vector", err));
    TRY(mem_alloc((void **)&z, (size_t)(PIECES * cols) * sizeof *z, "a singular vector", err));
    for (int64_t c = 0; c < cols; c++) /* any start will do that no matrix is orthogonal to */
        x[c] = (float)((c * 2654435761u >> 7 & 1023) + 1) / 1024;
    for (int k = 0; k < ITERATIONS && (k < 4 || fabs(now - before) > 1e-5 * now); k++) {
        struct step s = {w, rows, cols, x, z};
        double length = 0;
        for (int64_t c = 0; c < cols; c++)
            length += (double)x[c] * (double)x[c];
        length = sqrt(length);
        for (int64_t c = 0; c < cols && length > 0; c++)
            x[c] = (float)((double)x[c] / length);
        parallel_for(PIECES, 1, step_piece, &s);
        before = now;
        now = 0;
        for (int64_t c = 0; c < cols; c++) {
            double sum = 0;
            for (int p = 0; p < PIECES; p++)
                sum += (double)z[p * cols + c];
            x[c] = (float)sum;
            now += sum * sum;
        }
        now = sqrt(sqrt(now));
    }
    *out = now;
done:
    mem_free(x);
    mem_free(z);
    return st;
}

static tril_status figures(const float *w, int64_t n, struct tril_weight_row *r,
                           struct tril_error *err) {
    double sum = 0, square = 0, fourth = 0;
    int64_t near = 0;
    r->min = INFINITY;
    r->max = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)w[i];
        r->min = fmin(r->min, (double)w[i]);
        r->max = fmax(r->max, (double)w[i]);
    }
    r->mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) {
        double x = (double)w[i] - r->mean;
        square += x * x;
        fourth += x * x * x * x;
    }
    r->std = sqrt(square / (double)n);
    r->kurtosis = square > 0 ? fourth * (double)n / (square * square) : NAN;
    for (int64_t i = 0; i < n; i++)
        near += fabs((double)w[i]) < r->std / 10;
    r->near_zero = (double)near / (double)n;
    r->spectral = r->stable_rank = NAN;
    if (r->rows < 2 || r->cols < 2)
        return TRIL_OK;
    tril_status st = spectral(w, r->rows, r->cols, &r->spectral, err);
    double all = square + (double)n * r->mean * r->mean;
    if (r->spectral > 0)
        r->stable_rank = all / (r->spectral * r->spectral);
    return st;
}

static void histogram(const float *w, int64_t n, struct tril_weight_row *r) {
    const double scale = r->reach > 0 ? TRIL_WEIGHT_BINS / (2 * r->reach) : 0;
    for (int64_t i = 0; i < n; i++) {
        double at = floor(((double)w[i] + r->reach) * scale);
        r->bins[at < 0 ? 0 : at >= TRIL_WEIGHT_BINS ? TRIL_WEIGHT_BINS - 1 : (int)at]++;
    }
}

/* ------------------------------------------------------------------ the checkpoint */

/* The name without its layer's number, which goes to *layer: "h.3.attn" -> "h..attn". */
static void role_of(const char *name, char *role, size_t size, int *layer) {
    *layer = -1;
    size_t n = 0;
    for (const char *p = name; *p && n + 1 < size;) {
        if (*layer < 0 && p > name && p[-1] == '.' && isdigit((unsigned char)*p)) {
            char *end;
            long number = strtol(p, &end, 10);
            if (*end == '.' && number < 1000000) {
                *layer = (int)number;
                p = end;
                continue;
            }
        }
        role[n++] = *p++;
    }
    role[n] = '\0';
}

static int by_layer(const void *a, const void *b) {
    const struct tril_weight_row *x = a, *y = b;
    return x->layer != y->layer ? (x->layer > y->layer) - (x->layer < y->layer)
                                : strcmp(x->name, y->name);
}

static bool same_role(const struct tril_weight_row *a, const struct tril_weight_row *b) {
    char x[128], y[128];
    int layer;
    role_of(a->name, x, sizeof x, &layer);
    role_of(b->name, y, sizeof y, &layer);
    return strcmp(x, y) == 0;
}

/* The whole tensor as floats: [n], to be freed with mem_free. */
static tril_status tensor_floats(const struct st_tensor *t, int64_t n, float **out,
                                 struct tril_error *err) {
    enum { CHUNK = 1 << 14 };
    double aligned[CHUNK]; /* of the widest dtype: the map's bytes lie anywhere */
    const size_t size = dtype_size(t->dtype);
    tril_status st = mem_alloc((void **)out, (size_t)n * sizeof **out, "a tensor", err);
    for (int64_t at = 0; st == TRIL_OK && at < n; at += CHUNK) {
        size_t count = (size_t)(n - at < CHUNK ? n - at : CHUNK);
        memcpy(aligned, (const char *)t->data + (size_t)at * size, count * size);
        dtype_convert(*out + at, DT_F32, aligned, t->dtype, count);
    }
    return st;
}

/* Runs figures (again false) or the histogram over every row. */
static tril_status rows_visit(const struct safetensors *s, struct tril_weights *w, bool again,
                              struct tril_error *err) {
    tril_status st = TRIL_OK;
    for (int64_t i = 0; i < w->count; i++) {
        struct tril_weight_row *r = &w->rows[i];
        const struct st_tensor *t = safetensors_find(s, r->name);
        const int64_t n = r->rows * r->cols;
        float *values = NULL;
        st = tensor_floats(t, n, &values, err);
        if (st == TRIL_OK && again)
            histogram(values, n, r);
        else if (st == TRIL_OK)
            st = figures(values, n, r, err);
        mem_free(values);
        safetensors_forget(s, t);
        if (st != TRIL_OK)
            break;
    }
    return st;
}

/* ------------------------------------------------------------------ table and picture */

static tril_status write_csv(const struct tril_weights *w, const char *path,
                             struct tril_error *err) {
    static const char *const columns[] = {"name",     "layer",     "rows",     "cols",
                                          "mean",     "std",       "min",      "max",
                                          "kurtosis", "near_zero", "spectral", "stable_rank"};
    struct table *t = NULL;
    tril_status st = table_create(&t, columns, 12, err);
    for (int64_t i = 0; st == TRIL_OK && i < w->count; i++) {
        const struct tril_weight_row *r = &w->rows[i];
        table_add_text(t, r->name);
        table_add_int(t, r->layer);
        table_add_int(t, r->rows);
        table_add_int(t, r->cols);
        const double values[] = {r->mean,     r->std,       r->min,      r->max,
                                 r->kurtosis, r->near_zero, r->spectral, r->stable_rank};
        for (int k = 0; k < 8; k++)
            table_add_number(t, values[k], -1);
    }
    if (st == TRIL_OK)
        st = table_write_csv(t, path, err);
    table_free(t);
    return st;
}

enum { PANEL_W = 92, PANEL_H = 46, GAP = 10, NAMES_W = 150, MOST_COLUMNS = 12 };

/* The filled outline of one histogram, its highest bin PANEL_H tall. */
static void panel_draw(struct svg *s, const struct tril_weight_row *r, double x, double y) {
    int64_t most = 1;
    for (int b = 0; b < TRIL_WEIGHT_BINS; b++)
        most = r->bins[b] > most ? r->bins[b] : most;
    svg_at(s, "<path fill='#3478d8' fill-opacity='0.85' d='M", x, y + PANEL_H);
    for (int b = 0; b < TRIL_WEIGHT_BINS; b++) {
        double top = y + PANEL_H * (1 - (double)r->bins[b] / (double)most);
        svg_at(s, "L", x + (double)PANEL_W * b / TRIL_WEIGHT_BINS, top);
        svg_at(s, "L", x + (double)PANEL_W * (b + 1) / TRIL_WEIGHT_BINS, top);
    }
    svg_at(s, "L", x + PANEL_W, y + PANEL_H);
    fputs("z'/>\n", s->out);
    svg_at(s, "<path stroke='" PLOT_GRID "' d='M", x, y + PANEL_H + 0.5);
    svg_at(s, "L", x + PANEL_W, y + PANEL_H + 0.5);
    fputs("'/>\n", s->out);
}

/* The last two words of a role: "self_attn.q_proj.weight" -> "self_attn.q_proj". */
static void short_name(const struct tril_weight_row *r, char *out, size_t size) {
    char role[128];
    int layer;
    role_of(r->name, role, sizeof role, &layer);
    char *end = role + strlen(role), *from = end;
    if (end - role > 7 && strcmp(end - 7, ".weight") == 0)
        *(end -= 7) = '\0';
    from = end;
    for (int dots = 0; from > role; from--)
        if (from[-1] == '.' && (++dots == 2 || from[0] == '.'))
            break;
    while (*from == '.')
        from++;
    snprintf(out, size, "%.22s", from);
}

static tril_status write_svg(const struct tril_weights *w, const char *path,
                             struct tril_error *err) {
    struct svg s;
    int layers = 0, lines = 0;
    tril_status st;
    bool *done_row = calloc((size_t)w->count + 1, sizeof *done_row);
    if (!done_row)
        return no_memory(err);
    for (int64_t i = 0; i < w->count; i++) {
        const struct tril_weight_row *r = &w->rows[i];
        layers = r->layer >= layers ? r->layer + 1 : layers;
        bool first = r->rows > 1;
        for (int64_t k = 0; k < i && first; k++)
            first = !same_role(r, &w->rows[k]);
        lines += first;
    }
    const int every = (layers + MOST_COLUMNS - 1) / MOST_COLUMNS > 1
                          ? (layers + MOST_COLUMNS - 1) / MOST_COLUMNS
                          : 1;
    const int columns = layers ? (layers + every - 1) / every : 1;
    TRY(svg_begin(&s, 24 + NAMES_W + columns * (PANEL_W + GAP) + 14,
                  86 + lines * (PANEL_H + 26) + 10, err));
    svg_label(&s, 24, 38, SVG_START, 17, PLOT_INK, "font-weight='600'", "Weights, layer by layer");
    svg_label(&s, 24, 58, SVG_START, 12, PLOT_FADED, "",
              "one scale for each row: ± four standard deviations of its widest layer");
    for (int l = 0; l < layers; l += every) {
        char text[24];
        snprintf(text, sizeof text, "%s%d", l ? "" : "layer ", l);
        svg_label(&s, 24 + NAMES_W + l / every * (PANEL_W + GAP) + PANEL_W / 2.0, 80, SVG_MIDDLE,
                  11, PLOT_FADED, "", text);
    }
    double y = 90;
    for (int64_t i = 0; i < w->count; i++) {
        const struct tril_weight_row *r = &w->rows[i];
        char name[32], reach[48], number[24];
        if (r->rows < 2 || done_row[i])
            continue;
        short_name(r, name, sizeof name);
        number_write(number, sizeof number, r->reach, r->reach < 1 ? 3 : 2);
        snprintf(reach, sizeof reach, "± %s", number);
        svg_label(&s, 24, y + 20, SVG_START, 12, PLOT_INK, "", name);
        svg_label(&s, 24, y + 37, SVG_START, 11, PLOT_FADED, "", reach);
        for (int64_t k = i; k < w->count; k++) {
            const struct tril_weight_row *q = &w->rows[k];
            if (!same_role(r, q))
                continue;
            done_row[k] = true;
            int column = q->layer < 0 ? 0 : q->layer;
            if (column % every)
                continue;
            double x = 24 + NAMES_W + column / every * (PANEL_W + GAP);
            panel_draw(&s, q, x, y);
            snprintf(reach, sizeof reach, "κ ");
            number_write(number, sizeof number, q->kurtosis, q->kurtosis < 100 ? 1 : 0);
            strcat(reach, number);
            svg_label(&s, x + PANEL_W, y + PANEL_H + 14, SVG_END, 10, PLOT_FADED, "", reach);
        }
        y += PANEL_H + 26;
    }
    st = svg_end(&s, path, err);
done:
    free(done_row);
    return st;
}

tril_status tril_inspect_weights(const char *model, const char *csv, const char *svg,
                                 struct tril_weights *out, struct tril_error *err) {
    struct safetensors *s = NULL;
    tril_status st;
    *out = (struct tril_weights){0};
    if (!model)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "weights are read from a checkpoint: name it with --model DIR");
    TRY(safetensors_open(&s, model, err));
    out->rows = calloc(safetensors_count(s) + 1, sizeof *out->rows);
    if (!out->rows)
        TRY(no_memory(err));
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        struct tril_weight_row *r = &out->rows[out->count];
        char role[128];
        if (t->rank < 1 || t->bytes == 0 || strlen(t->name) >= sizeof r->name ||
            (t->dtype != DT_F32 && t->dtype != DT_BF16 && t->dtype != DT_F16 && t->dtype != DT_F64))
            continue; /* masks and counters that some checkpoints carry */
        strcpy(r->name, t->name);
        role_of(t->name, role, sizeof role, &r->layer);
        r->rows = t->rank > 1 ? t->shape[0] : 1;
        r->cols = (int64_t)(t->bytes / dtype_size(t->dtype)) / r->rows;
        snprintf(r->dtype, sizeof r->dtype, "%s", dtype_name(t->dtype));
        out->count++;
    }
    qsort(out->rows, (size_t)out->count, sizeof *out->rows, by_layer);
    TRY(rows_visit(s, out, false, err));
    for (int64_t i = 0; i < out->count; i++)
        for (int64_t k = 0; k < out->count; k++)
            if (k == i || same_role(&out->rows[i], &out->rows[k]))
                out->rows[i].reach = fmax(out->rows[i].reach, 4 * out->rows[k].std);
    TRY(rows_visit(s, out, true, err));
    if (csv)
        TRY(write_csv(out, csv, err));
    if (svg)
        TRY(write_svg(out, svg, err));
done:
    safetensors_close(s);
    if (st != TRIL_OK)
        tril_weights_free(out);
    return st;
}

void tril_weights_free(struct tril_weights *w) {
    free(w->rows);
    *w = (struct tril_weights){0};
}
