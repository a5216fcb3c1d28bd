/* The live line, the log, and the points of the loss curve. */
#include "train/report.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/progress.h"
#include "base/system.h"
#include "plot/curve.h"

static tril_status add_point(struct series *s, double step, double value, struct tril_error *err) {
    if ((s->count & (s->count - 1)) == 0) { /* full at powers of two */
        size_t bytes = (size_t)(s->count ? 2 * s->count : 1) * sizeof(double);
        double *steps = realloc(s->step, bytes);
        s->step = steps ? steps : s->step;
        double *values = realloc(s->value, bytes);
        s->value = values ? values : s->value;
        if (!steps || !values)
            return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the loss curve");
    }
    s->step[s->count] = step;
    s->value[s->count++] = value;
    return TRIL_OK;
}

/* Feeds one old log line to the curve; returns its step, or -1 if it is no whole line of ours. */
static int64_t read_line(struct report *r, const char *line, size_t length,
                         struct tril_error *err) {
    struct tril_error ignored;
    json_t *o = NULL;
    int64_t step = -1;
    if (json_parse(&o, line, length, "log", &ignored) != TRIL_OK)
        return -1;
    const json_t *s = json_object_get(o, "step"), *loss = json_object_get(o, "loss"),
                 *valid = json_object_get(o, "valid_loss");
    if (json_is_integer(s) && json_is_number(loss)) {
        step = json_integer_value(s);
        if (step <= r->first_step) {
            add_point(&r->train, (double)step, json_number_value(loss), err);
            if (json_is_number(valid)) {
                r->last_valid = json_number_value(valid);
                add_point(&r->valid, (double)step, r->last_valid, err);
            }
        }
    }
    json_decref(o);
    return step;
}

/* Rewrites the log without what lies after first_step. */
static tril_status trim_log(struct report *r, struct tril_error *err) {
    char *text = NULL;
    size_t size = 0, kept = 0;
    tril_status st = TRIL_OK;
    if (!path_exists(r->log_path))
        return TRIL_OK;
    TRY(file_read(r->log_path, (size_t)1 << 30, &text, &size, err));
    for (size_t begin = 0; begin < size;) {
        char *end = memchr(text + begin, '\n', size - begin);
        if (!end)
            break;
        size_t length = (size_t)(end - text) + 1 - begin;
        int64_t step = read_line(r, text + begin, length - 1, err);
        if (step >= 0 && step <= r->first_step) {
            memmove(text + kept, text + begin, length);
            kept += length;
        }
        begin += length;
    }
    TRY(file_write_atomic(r->log_path, text, kept, err));
done:
    free(text);
    return st;
}

tril_status report_open(struct report *r, const char *log_path, int64_t step, bool quiet,
                        struct tril_error *err) {
    tril_status st = TRIL_OK;
    *r = (struct report){.quiet = quiet,
                         .terminal = stream_is_terminal(STDERR_FILENO),
                         .started = clock_seconds(),
                         .last_valid = NAN,
                         .first_step = step};
    r->log_path = strdup(log_path);
    if (!r->log_path)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the log");
    if (step > 0)
        TRY(trim_log(r, err));
    r->log = fopen(log_path, step > 0 ? "a" : "w");
    if (!r->log)
        st = error_set_errno(err, "cannot write the log %s", log_path);
done:
    if (st != TRIL_OK)
        report_close(r);
    return st;
}

static void close_line(struct report *r) {
    if (r->line_open)
        fputc('\n', stderr);
    r->line_open = false;
}

void report_close(struct report *r) {
    close_line(r);
    if (r->log)
        fclose(r->log);
    free(r->log_path);
    free(r->train.step);
    free(r->train.value);
    free(r->valid.step);
    free(r->valid.value);
    *r = (struct report){0};
}

void report_note(struct report *r, const char *format, ...) {
    va_list args;
    if (r->quiet)
        return;
    close_line(r);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

static void set_number(json_t *o, const char *key, double value) {
    if (isfinite(value))
        json_object_set_new(o, key, json_real(value));
}

static tril_status write_log(struct report *r, const struct step_report *s,
                             struct tril_error *err) {
    json_t *o = json_object();
    char *text = NULL;
    tril_status st = TRIL_OK;
    if (o) {
        json_object_set_new(o, "step", json_integer(s->step));
        set_number(o, "loss", s->loss);
        set_number(o, "valid_loss", s->valid_loss);
        set_number(o, "lr", s->lr);
        set_number(o, "grad_norm", s->grad_norm);
        set_number(o, "tokens_per_s", s->tokens_per_second);
        set_number(o, "mfu", s->mfu);
        json_object_set_new(o, "tokens", json_integer(s->tokens));
        set_number(o, "epoch", s->epoch);
        set_number(o, "elapsed_s", s->elapsed);
        json_object_set_new(o, "peak_rss_bytes", json_integer((json_int_t)memory_peak_rss()));
        if (s->device_peak > 0)
            json_object_set_new(o, "peak_device_bytes", json_integer(s->device_peak));
        if (s->pinned_peak > 0)
            json_object_set_new(o, "peak_pinned_bytes", json_integer(s->pinned_peak));
        text = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(9));
    }
    if (!text)
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for a line of the log");
    else if (fprintf(r->log, "%s\n", text) < 0 || fflush(r->log) != 0)
        st = error_set_errno(err, "cannot write the log %s", r->log_path);
    free(text);
    json_decref(o);
    return st;
}

static void draw_line(struct report *r, const struct step_report *s) {
    char left[32], memory[32], valid[32] = "", mfu[32] = "";
    double now = clock_seconds();
    bool last = s->step == s->steps;
    int64_t done = s->step - r->first_step;
    if (now - r->last_line < (r->terminal ? 0.1 : 5) && !last && !isfinite(s->valid_loss) &&
        done > 1)
        return;
    r->last_line = now;
    if (isfinite(r->last_valid))
        snprintf(valid, sizeof valid, "  valid %.3f", r->last_valid);
    if (isfinite(s->mfu))
        snprintf(mfu, sizeof mfu, "  MFU %.0f%%", 100 * s->mfu);
    double rest = (now - r->started) / (double)(done > 0 ? done : 1) * (double)(s->steps - s->step);
    fprintf(stderr, "%sstep %lld/%lld  loss %.3f%s  lr %.1e  grad %.2f  %.0f tok/s%s  %s%s%s%s",
            r->terminal ? "\r\033[K" : "", (long long)s->step, (long long)s->steps, s->loss, valid,
            s->lr, s->grad_norm, s->tokens_per_second, mfu,
            format_bytes(s->device_peak > 0 ? (double)s->device_peak : (double)memory_peak_rss(),
                         memory),
            last ? "" : "  ", last ? "" : format_duration(rest, left), last ? "" : " left");
    if (r->terminal)
        r->line_open = true;
    else
        fputc('\n', stderr);
    fflush(stderr);
}

tril_status report_step(struct report *r, const struct step_report *s, struct tril_error *err) {
    tril_status st = TRIL_OK;
    TRY(add_point(&r->train, (double)s->step, s->loss, err));
    if (isfinite(s->valid_loss)) {
        r->last_valid = s->valid_loss;
        TRY(add_point(&r->valid, (double)s->step, s->valid_loss, err));
    }
    TRY(write_log(r, s, err));
    if (!r->quiet)
        draw_line(r, s);
done:
    return st;
}

tril_status report_draw(const struct report *r, const char *out, struct tril_error *err) {
    const struct series *t = &r->train, *v = &r->valid;
    char *svg = path_join(out, "loss.svg"), *png = path_join(out, "loss.png");
    double *smooth = malloc((size_t)(t->count + 1) * sizeof *smooth);
    bool made;
    tril_status st = TRIL_OK;
    if (!svg || !png || !smooth) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the loss curve");
        goto done;
    }
    if (t->count == 0)
        goto done;
    curve_smooth(t->value, t->count, 0.95, smooth);
    const struct curve curves[] = {
        {.label = "training loss",
         .x = t->step,
         .y = t->value,
         .n = t->count,
         .style = CURVE_FAINT},
        {.label = NULL, .x = t->step, .y = smooth, .n = t->count, .style = CURVE_LINE},
        {.label = "validation loss",
         .x = v->step,
         .y = v->value,
         .n = v->count,
         .style = CURVE_DOTTED_LINE}};
    const struct curve_plot plot = {.title = "Loss",
                                    .x_label = "step",
                                    .y_label = "nats per token",
                                    .curves = curves,
                                    .curve_count = v->count ? 3 : 2};
    TRY(curve_plot_write(&plot, svg, err));
    TRY(plot_svg_to_png(svg, png, &made, err));
done:
    free(smooth);
    free(svg);
    free(png);
    return st;
}
