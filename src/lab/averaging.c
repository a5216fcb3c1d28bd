/* Averaging the past: y_i = sum_j w_ij x_j over j <= i, with uniform weights, with softmax weights
 * and with linearly normalised ones; how much sharper and sparser softmax is. */
#include <math.h>
#include <stdlib.h>

#include "lab/attend.h"

/* Linear normalisation needs positive scores: elu(s) + 1, linear attention's. */
static double positive(double s) {
    return s > 0 ? s + 1 : exp(s);
}

enum weights { UNIFORM, SOFTMAX, LINEAR };
static const char *const weight_names[] = {"uniform", "softmax", "linear"};

/* w [T, T] of scores [T, T]. */
static void weigh(enum weights kind, const float *scores, double spread, int64_t T, float *w) {
    for (int64_t i = 0; i < T; i++) {
        double most = -INFINITY, total = 0;
        for (int64_t j = 0; j <= i; j++)
            most = fmax(most, spread * (double)scores[i * T + j]);
        for (int64_t j = 0; j < T; j++) {
            double s = spread * (double)scores[i * T + j];
            double x = kind == UNIFORM ? 1 : kind == SOFTMAX ? exp(s - most) : positive(s);
            w[i * T + j] = j <= i ? (float)x : 0;
            total += j <= i ? x : 0;
        }
        for (int64_t j = 0; j <= i; j++)
            w[i * T + j] = (float)((double)w[i * T + j] / total);
    }
}

/* Over the rows that see at least 8 keys: the largest weight, the effective number of keys e^H as
 * a share of those seen, and the share of weights below a tenth of the uniform one. */
struct shape {
    double largest, effective, small, row_sum_error;
};
static struct shape shape_of(const float *w, int64_t T) {
    struct shape s = {0};
    double rows = 0;
    for (int64_t i = 0; i < T; i++) {
        double largest = 0, entropy = 0, small = 0, total = 0, n = (double)(i + 1);
        for (int64_t j = 0; j <= i; j++) {
            double p = (double)w[i * T + j];
            largest = fmax(largest, p);
            entropy -= p > 0 ? p * log(p) : 0;
            small += p < 0.1 / n;
            total += p;
        }
        s.row_sum_error = fmax(s.row_sum_error, fabs(total - 1));
        if (i < 7)
            continue;
        s.largest += largest;
        s.effective += exp(entropy) / n;
        s.small += small / n;
        rows++;
    }
    s.largest /= rows;
    s.effective /= rows;
    s.small /= rows;
    return s;
}

/* The uniform average three ways: a loop over the past, W x, and attention with queries of zero,
 * whose scores are all alike. */
static tril_status same_average(struct lab *l, double *difference, struct tril_error *err) {
    struct attend a;
    int64_t T = 64, D = 32;
    double most = 0;
    tril_status st = TRIL_OK;
    TRY(attend_create(&a, l->ctx, 1, T, 1, D, DT_F32, false, 3, err));
    for (int64_t i = 0; i < T * D; i++)
        ((float *)a.q)[i] = 0;
    st = attend_forward(&a, err);
    const float *x = a.v, *o = a.o;
    for (int64_t c = 0; c < D && st == TRIL_OK; c++) {
        double running = 0;
        for (int64_t i = 0; i < T; i++) {
            double product = 0;
            running += (double)x[i * D + c];
            for (int64_t j = 0; j <= i; j++)
                product += 1.0 / (double)(i + 1) * (double)x[j * D + c];
            most = fmax(most, fabs(running / (double)(i + 1) - product));
            most = fmax(most, fabs((double)o[i * D + c] - product));
        }
    }
    *difference = most;
    attend_free(&a);
done:
    return st;
}

static void add_rows(struct table *t, const char *name, const float *w, int64_t T) {
    for (int64_t i = 0; i < 3; i++) {
        table_add_text(t, name);
        table_add_int(t, i + 1);
        for (int64_t j = 0; j < 3; j++)
            table_add_number(t, j <= i ? (double)w[i * T + j] : NAN, 4);
    }
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const rows[] = {"weights", "row", "x1", "x2", "x3"};
    static const char *const shapes[] = {"weights", "spread of scores", "largest weight",
                                         "effective keys / seen", "weights below a tenth of 1/n"};
    static const double spreads[] = {0.5, 1, 2, 4, 8};
    enum { SPREADS = 5 };
    int64_t T = lab_choose(l, 128, 512);
    struct table *first = NULL, *t = NULL;
    struct shape s[3][SPREADS];
    double difference = 0, effective[3][SPREADS], sums = 0;
    float *scores = malloc(2 * (size_t)(T * T) * sizeof *scores), *w = scores + T * T;
    tril_status st = TRIL_OK;
    if (!scores)
        return lab_no_memory(err);
    lab_normal(scores, T * T, 1);
    TRY(table_create(&first, rows, 5, err));
    TRY(table_create(&t, shapes, 5, err));
    for (int kind = 0; kind < 3; kind++) {
        weigh((enum weights)kind, scores, 2, T, w);
        add_rows(first, weight_names[kind], w, T);
        struct heat_map h = {.title = weight_names[kind],
                             .subtitle = "each row sums to 1; scores of spread 2",
                             .x_label = "key j",
                             .y_label = "query i",
                             .values = w,
                             .rows = 16,
                             .cols = 16,
                             .low = 0,
                             .high = 1};
        float part[256];
        for (int i = 0; i < 256; i++)
            part[i] = i % 16 <= i / 16 ? w[i / 16 * T + i % 16] : NAN;
        h.values = part;
        TRY(lab_heat(l, weight_names[kind], &h, err));
        for (int i = 0; i < SPREADS; i++) {
            weigh((enum weights)kind, scores, spreads[i], T, w);
            s[kind][i] = shape_of(w, T);
            effective[kind][i] = s[kind][i].effective;
            sums = fmax(sums, s[kind][i].row_sum_error);
            table_add_text(t, weight_names[kind]);
            table_add_number(t, kind == UNIFORM ? NAN : spreads[i], -1);
            table_add_number(t, s[kind][i].largest, 4);
            table_add_number(t, s[kind][i].effective, 4);
            table_add_number(t, s[kind][i].small, 4);
            if (kind == UNIFORM)
                break;
        }
    }
    st = lab_table(l, "rows", "The first rows of the weights (scores of spread 2)", first, err);
    first = NULL;
    if (st != TRIL_OK)
        goto done;
    st = lab_table(l, "sharpness", "How sharp and how sparse, over all rows", t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    TRY(same_average(l, &difference, err));
    const struct curve curves[] = {
        {.label = "softmax",
         .x = spreads,
         .y = effective[SOFTMAX],
         .n = SPREADS,
         .style = CURVE_DOTTED_LINE},
        {.label = "linear normalisation",
         .x = spreads,
         .y = effective[LINEAR],
         .n = SPREADS,
         .style = CURVE_DOTTED_LINE},
        {.label = "uniform", .y = &s[UNIFORM][0].effective, .n = 1, .style = CURVE_LEVEL}};
    const struct curve_plot plot = {.title = "How many of the keys matter",
                                    .subtitle = "e^entropy / keys seen, mean over rows",
                                    .x_label = "spread of the scores",
                                    .y_label = "share of the keys",
                                    .curves = curves,
                                    .curve_count = 3,
                                    .x_log = true,
                                    .y_from_zero = true};
    TRY(lab_curves(l, "effective", &plot, err));
    weigh(UNIFORM, scores, 1, T, w);
    bool thirds = fabs((double)w[0] - 1) < 1e-6 && fabs((double)w[T] - 0.5) < 1e-6 &&
                  fabs((double)w[2 * T + 2] - 1.0 / 3) < 1e-6;
    lab_claim(l, thirds, "uniform rows", "[1], [.5, .5], [.33, .33, .33]",
              "[%.2g], [%.2g, %.2g], [%.2g, %.2g, %.2g]", (double)w[0], (double)w[T],
              (double)w[T + 1], (double)w[2 * T], (double)w[2 * T + 1], (double)w[2 * T + 2]);
    double times = s[SOFTMAX][2].largest / s[LINEAR][2].largest;
    lab_claim(l, times > 1, "softmax is sharper than linear normalisation", "much sharper",
              "largest weight %.1f times as large at spread 2", times);
    lab_claim(l, s[SOFTMAX][2].small > s[LINEAR][2].small, "and sparser", "much sparser",
              "%.0f%% against %.0f%% of the weights below a tenth of uniform",
              100 * s[SOFTMAX][2].small, 100 * s[LINEAR][2].small);
    lab_value(l, "row_sum_error", sums);
    lab_value(l, "average_difference", difference);
    lab_value(l, "softmax_largest", s[SOFTMAX][2].largest);
    lab_value(l, "linear_largest", s[LINEAR][2].largest);
    lab_value(l, "softmax_effective", s[SOFTMAX][2].effective);
    lab_value(l, "linear_effective", s[LINEAR][2].effective);
    lab_say(l,
            "The average of the past computed by a loop, as a product with a triangular matrix and "
            "as attention whose queries are zero agrees to %.1e. Rows sum to 1 within %.1e.",
            difference, sums);
    lab_say(l,
            "With scores of spread 2, softmax spreads its weight over %.0f%% of the keys it sees "
            "(e^entropy), linear normalisation over %.0f%%; at spread 8 over %.1f%% and %.0f%%. At "
            "spread 0.5 the two are close (%.0f%% and %.0f%%): softmax is sharp because it is "
            "given spread scores, and only then.",
            100 * effective[SOFTMAX][2], 100 * effective[LINEAR][2], 100 * effective[SOFTMAX][4],
            100 * effective[LINEAR][4], 100 * effective[SOFTMAX][0], 100 * effective[LINEAR][0]);
done:
    table_free(first);
    table_free(t);
    free(scores);
    return st;
}

const struct lab_experiment lab_averaging = {
    {"averaging", "the past averaged: uniform, softmax and linear weights", "A1", 1, 2, false,
     false},
    "Averaging the past",
    run};
