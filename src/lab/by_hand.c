/* Attention by hand: softmax(Q K^T / sqrt(d) + M) V with its matrix, in plain C, beside the fused
 * operation, on the papers' case B=4, T=8, V=40, D=10. */
#include <math.h>
#include <stdlib.h>

#include "base/random.h"
#include "lab/attend.h"

enum { B = 4, T = 8, V = 40, D = 10, N = B * T };

struct by_hand {
    struct attend a;
    float scores[B][T][T], o[N * D];
    double exact[N * D]; /* the same in double */
};

/* The textbook, line by line: scores, mask, softmax, product. */
static tril_status manual(void *arg, struct tril_error *err) {
    struct by_hand *h = arg;
    const float *q = h->a.q, *k = h->a.k, *v = h->a.v;
    const float scale = 1 / sqrtf(D);
    (void)err;
    for (int b = 0; b < B; b++) {
        const float *qb = q + b * T * D, *kb = k + b * T * D, *vb = v + b * T * D;
        for (int i = 0; i < T; i++)
            for (int j = 0; j < T; j++) {
                float dot = 0;
                for (int c = 0; c < D; c++)
                    dot += qb[i * D + c] * kb[j * D + c];
                h->scores[b][i][j] = dot * scale + (j <= i ? 0 : -INFINITY);
            }
        for (int i = 0; i < T; i++) {
            float *row = h->scores[b][i], most = -INFINITY, sum = 0;
            for (int j = 0; j < T; j++)
                most = row[j] > most ? row[j] : most;
            for (int j = 0; j < T; j++)
                sum += row[j] = expf(row[j] - most);
            for (int j = 0; j < T; j++)
                row[j] /= sum;
        }
        for (int i = 0; i < T; i++)
            for (int c = 0; c < D; c++) {
                float sum = 0;
                for (int j = 0; j < T; j++)
                    sum += h->scores[b][i][j] * vb[j * D + c];
                h->o[(b * T + i) * D + c] = sum;
            }
    }
    return TRIL_OK;
}

/* In double, for the distance of both from the truth. */
static void exact(struct by_hand *h) {
    const float *q = h->a.q, *k = h->a.k, *v = h->a.v;
    for (int b = 0; b < B; b++)
        for (int i = 0; i < T; i++) {
            double e[T], sum = 0;
            for (int j = 0; j <= i; j++) {
                double dot = 0;
                for (int c = 0; c < D; c++)
                    dot += (double)q[(b * T + i) * D + c] * (double)k[(b * T + j) * D + c];
                sum += e[j] = exp(dot / sqrt(D));
            }
            for (int c = 0; c < D; c++) {
                double o = 0;
                for (int j = 0; j <= i; j++)
                    o += e[j] / sum * (double)v[(b * T + j) * D + c];
                h->exact[(b * T + i) * D + c] = o;
            }
        }
}

/* Tokens of a vocabulary of 40, embedded and projected: q, k and v as a first layer has them (N(0,
 * 1) embeddings, weights of variance 1 / 3D: the usual framework's defaults). */
static tril_status embed(struct by_hand *h, struct tril_error *err) {
    struct random_key key = {.seed = 11, .op = RANDOM_TEST};
    float *m = malloc((V * D + 3 * D * D) * sizeof *m);
    float *const out[3] = {h->a.q, h->a.k, h->a.v};
    if (!m)
        return lab_no_memory(err);
    lab_normal(m, V * D + 3 * D * D, 12);
    for (int n = 0; n < N; n++) {
        const float *x = m + random_below(&key, (uint64_t)n, V) * D;
        for (int w = 0; w < 3; w++)
            for (int o = 0; o < D; o++) {
                const float *row = m + V * D + (w * D + o) * D;
                double sum = 0;
                for (int i = 0; i < D; i++)
                    sum += (double)x[i] * (double)row[i];
                out[w][n * D + o] = (float)(sum / sqrt(3.0 * D));
            }
    }
    free(m);
    return TRIL_OK;
}

static double from_exact(const struct by_hand *h, const float *o) {
    double most = 0;
    for (int i = 0; i < N * D; i++)
        most = fmax(most, fabs((double)o[i] - h->exact[i]));
    return most;
}

static void add(struct table *t, const char *name, const struct lab_times *x, int64_t n,
                double total, const char *published, double difference) {
    table_add_text(t, name);
    table_add_text(t, published);
    table_add_number(t, total, 3);
    table_add_int(t, n);
    table_add_number(t, x->cold * 1e6, 2);
    table_add_number(t, x->median * 1e6, 3);
    table_add_number(t, x->mean * 1e6, 3);
    table_add_number(t, x->spread * 1e6, 3);
    table_add_number(t, difference, -1);
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"version", "published s", "here s",
                                          "calls",   "cold us",     "median us",
                                          "mean us", "spread us",   "from exact"};
    static const char *const names[] = {"by hand", "optimised (flash)", "optimised (fused rows)"};
    int64_t runs = lab_choose(l, 5000, 50000);
    struct lab_timing how = {.warm = 50, .runs = runs};
    struct lab_times x[3];
    double total[3], distance[3], difference;
    struct by_hand *h = calloc(1, sizeof *h);
    struct table *t = NULL;
    tril_status st = TRIL_OK;
    if (!h)
        return lab_no_memory(err);
    TRY(attend_create(&h->a, l->ctx, B, T, 1, D, DT_F32, false, 1, err));
    TRY(embed(h, err));
    exact(h);
    TRY(table_create(&t, columns, 9, err));
    TRY(lab_time(&how, manual, h, &x[0], err));
    distance[0] = from_exact(h, h->o);
    TRY(lab_time(&how, attend_forward, &h->a, &x[1], err));
    distance[1] = from_exact(h, h->a.o);
    difference = lab_difference(h->o, h->a.o, N * D);
    double mean = 0;
    for (int i = 0; i < N * D; i++)
        mean += fabs((double)h->o[i] - (double)((float *)h->a.o)[i]) / (N * D);
    h->a.params.implementation = ATTENTION_FUSED;
    TRY(lab_time(&how, attend_forward, &h->a, &x[2], err));
    distance[2] = from_exact(h, h->a.o);
    for (int i = 0; i < 3; i++) {
        total[i] = x[i].mean * 50000;
        add(t, names[i], &x[i], runs, total[i],
            i == 0   ? "7.0"
            : i == 1 ? "6.5"
                     : NULL,
            distance[i]);
    }
    st = lab_table(l, "times", "B=4, T=8, V=40, D=10; seconds are those of 50,000 warm calls", t,
                   err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const char *const labels[] = {"by hand",     "by hand, cold", "flash",
                                  "flash, cold", "fused rows",    "fused rows, cold"};
    const double us[] = {x[0].median * 1e6, x[0].cold * 1e6,   x[1].median * 1e6,
                         x[1].cold * 1e6,   x[2].median * 1e6, x[2].cold * 1e6};
    const struct bar_plot plot = {.title = "One call",
                                  .subtitle = "the median of warm calls, and the first, cold one",
                                  .x_label = "microseconds",
                                  .names = labels,
                                  .values = us,
                                  .count = 6,
                                  .decimals = 1,
                                  .marked = -1};
    TRY(lab_bars(l, "calls", &plot, err));
    lab_claim(l, total[1] < total[0] || total[2] < total[0], "optimised over manual, 50,000 calls",
              "7.0 s against 6.5 s (1.08x)", "%.3f s against %.3f s (%.2fx), fused rows %.3f s",
              total[0], total[1], total[0] / total[1], total[2]);
    lab_claim(l, mean < 1e-7, "difference of the two", "1e-8 to 1e-9",
              "%.1e on average, %.1e at most (fp32)", mean, difference);
    lab_value(l, "mean_difference", mean);
    lab_value(l, "difference", difference);
    lab_value(l, "manual_from_exact", distance[0]);
    lab_value(l, "flash_from_exact", distance[1]);
    lab_value(l, "manual_seconds", total[0]);
    lab_value(l, "flash_seconds", total[1]);
    lab_value(l, "fused_seconds", total[2]);
    lab_value(l, "cold_over_warm", x[1].cold / x[1].median);
    lab_say(
        l,
        "On a case this small (%d x %d scores) a call takes %.2f us by hand, %.2f us through the "
        "flash operation, which also checks its arguments and lays out tiles, and %.2f us through "
        "the row-wise one. %s The published times are 140 and 130 us a call.",
        N, T, x[0].median * 1e6, x[1].median * 1e6, x[2].median * 1e6,
        total[1] < total[0] ? "The optimised version is faster."
                            : "Here the plain loops win; from some hundred tokens on they do "
                              "not (leak, block-time).");
    lab_say(
        l,
        "The first call takes %.0f (by hand) and %.0f (flash) times a warm one. The two results "
        "differ by %.1e, and from the same formula in double by %.1e and %.1e: fp32 rounding.",
        x[0].cold / x[0].median, x[1].cold / x[1].median, difference, distance[0], distance[1]);
done:
    table_free(t);
    attend_free(&h->a);
    free(h);
    return st;
}

const struct lab_experiment lab_by_hand = {
    {"by-hand", "attention by hand against optimised, 50,000 calls", "A4, E1", 1, 3, false, false},
    "Attention by hand and optimised",
    run};
