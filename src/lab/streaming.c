/* Streaming: text far longer than anything the model was trained on, with the whole past, with a
 * window of it, and with a window and attention sinks (Xiao et al. 2023). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lab/learner.h"
#include "lab/lens.h"

enum { WAYS = 4, POINTS = 64 };

/* Losses of one long sequence by position, in one pass under the lens's rule; added to `sum`. */
static tril_status stream(struct model *m, const int32_t *ids, int64_t n, double *sum,
                          struct tril_error *err) {
    struct workspace_options wo = {.max_tokens = n, .max_sequences = 1};
    struct workspace *w = NULL;
    float *row = malloc((size_t)n * sizeof *row);
    int32_t offsets[2] = {0, (int32_t)n};
    double loss;
    int64_t count;
    tril_status st = TRIL_OK;
    if (!row)
        return lab_no_memory(err);
    TRY(workspace_create(&w, m, &wo, err));
    struct batch b = {
        .tokens = n, .sequences = 1, .ids = ids, .targets = ids + 1, .offsets = offsets};
    TRY(model_loss(m, w, &b, &loss, &count, row, err));
    for (int64_t i = 0; i < n; i++)
        sum[i] += (double)row[i];
done:
    workspace_free(w);
    free(row);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {
        "past",       "rule",   "within training",      "just beyond",
        "at the end", "change", "perplexity at the end"};
    static const char *const names[WAYS] = {"all of it", "a window", "window and 4 sinks",
                                            "window and 1 sink"};
    int64_t T = lab_choose(l, 64, 128), n = T * lab_choose(l, 8, 32);
    int64_t texts, layers = lab_choose(l, 2, 4), dim = lab_choose(l, 64, 128);
    char rules[WAYS][48], title[160];
    struct visible_set set[WAYS];
    struct corpus text = {0};
    struct lens lens;
    struct model *m = NULL, *longer = NULL;
    struct learned out = {0};
    struct table *t = NULL;
    double *sum = NULL, x[POINTS], y[WAYS][POINTS], first[WAYS], beyond[WAYS], end[WAYS];
    bool open = false;
    tril_status st = TRIL_OK;
    memset(set, 0, sizeof set);
    snprintf(rules[0], sizeof rules[0], "causal");
    snprintf(rules[1], sizeof rules[1], "window:%lld", (long long)T);
    snprintf(rules[2], sizeof rules[2], "window:%lld+sinks:4", (long long)(T - 4));
    snprintf(rules[3], sizeof rules[3], "window:%lld+sinks:1", (long long)(T - 1));
    TRY(corpus_open(&text, l, lab_choose(l, 400, 1024), lab_choose(l, 1 << 19, 8 << 20), err));
    TRY(lens_open(&lens, l->ctx, err));
    open = true;
    struct model_config c = learner_config(false, layers, dim, 4, text.vocab, T);
    struct learning how = {.config = &c,
                           .seq = T,
                           .batch = lab_choose(l, 16, 12),
                           .steps = lab_choose(l, 250, 800),
                           .lr = 3e-3,
                           .weight_decay = 0.1,
                           .seed = 1,
                           .what = "streaming: training"};
    TRY(learn(&lens.ctx, &how, &text, &m, &out, err));
    c.context = n;
    TRY(learner_copy(m, &c, &lens.ctx, &longer, err));
    texts = (text.valid_count - 1) / n;
    texts = texts > lab_choose(l, 4, 12) ? lab_choose(l, 4, 12) : texts;
    sum = malloc((size_t)n * sizeof *sum);
    if (!sum || texts < 1) {
        st = sum ? error_set(err, TRIL_ERR_ARGUMENT,
                             "streaming needs a validation text of %lld tokens; give more data",
                             (long long)n)
                 : lab_no_memory(err);
        goto done;
    }
    TRY(table_create(&t, columns, 7, err));
    for (int k = 0; k < WAYS; k++) {
        TRY(visible_parse(rules[k], &set[k], err));
        TRY(visible_set_heads(&set[k], c.heads, err));
        lens.rules = &set[k];
        memset(sum, 0, (size_t)n * sizeof *sum);
        for (int64_t s = 0; s < texts; s++)
            TRY(stream(longer, text.valid + s * n, n, sum, err));
        int64_t step = n / POINTS;
        for (int p = 0; p < POINTS; p++) {
            y[k][p] = 0;
            x[p] = (double)((p + 1) * step);
            for (int64_t i = p * step; i < (p + 1) * step; i++)
                y[k][p] += sum[i] / (double)(texts * step);
        }
        first[k] = beyond[k] = end[k] = 0;
        for (int64_t i = 0; i < T / 2; i++) { /* equal numbers of targets */
            first[k] += sum[T / 2 + i] / (double)(texts * (T / 2));
            beyond[k] += sum[3 * T / 2 + i] / (double)(texts * (T / 2));
        }
        for (int64_t i = n / 2; i < n; i++)
            end[k] += sum[i] / (double)(texts * (n / 2));
        table_add_text(t, names[k]);
        table_add_text(t, rules[k]);
        table_add_number(t, first[k], 4);
        table_add_number(t, beyond[k], 4);
        table_add_number(t, end[k], 4);
        table_add_number(t, end[k] - first[k], 4);
        table_add_number(t, exp(end[k]), 2);
    }
    lens.rules = NULL;
    snprintf(title, sizeof title,
             "Loss along %lld tokens of %s; trained on %lld with RoPE (at the end: second half)",
             (long long)n, text.name, (long long)T);
    st = lab_table(l, "streaming", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[WAYS];
    for (int k = 0; k < WAYS; k++)
        curves[k] =
            (struct curve){.label = names[k], .x = x, .y = y[k], .n = POINTS, .style = CURVE_LINE};
    const struct curve_plot plot = {.title = "Far beyond the context",
                                    .x_label = "tokens read",
                                    .y_label = "nats per token",
                                    .curves = curves,
                                    .curve_count = WAYS};
    TRY(lab_curves(l, "streaming", &plot, err));
    double change[WAYS];
    for (int k = 0; k < WAYS; k++)
        change[k] = end[k] - first[k];
    lab_claim(l, change[0] > 0.1, "the whole past, beyond training", "fails", "%+.3f nats",
              change[0]);
    lab_claim(l, change[2] < change[0] / 2 && change[2] < 0.2, "a window with sinks", "stable",
              "%+.3f nats", change[2]);
    lab_claim(l, end[1] > end[2] + 0.05, "a window without sinks", "collapses",
              "%+.3f nats; %.3f nats %s than with sinks", change[1], fabs(end[1] - end[2]),
              end[1] > end[2] ? "worse" : "better");
    lab_value(l, "dense_change", change[0]);
    lab_value(l, "window_change", change[1]);
    lab_value(l, "sinks_change", change[2]);
    lab_value(l, "dense_end", end[0]);
    lab_value(l, "window_end", end[1]);
    lab_value(l, "sinks_end", end[2]);
    lab_say(l,
            "Read %lld times as far as it was trained, the model's loss changes by %+.3f nats when "
            "it attends to everything, by %+.3f with a window as long as its training, by %+.3f "
            "with a window and four sinks, by %+.3f with one. %s",
            (long long)(n / T), change[0], change[1], change[2], change[3],
            end[1] > end[2] + 0.05
                ? "Without the first tokens the window loses what heads had learnt to rest on."
                : "The published collapse without sinks is of large models whose heads rest on the "
                  "first token; a model this small and this briefly trained has not learnt to, and "
                  "the plain window streams as well.");
done:
    for (int k = 0; k < WAYS; k++)
        visible_set_free(&set[k]);
    free(sum);
    free(out.losses);
    model_free(m);
    model_free(longer);
    if (open)
        lens_close(&lens);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_streaming = {
    {"streaming", "far beyond the context: all of the past, a window, a window and sinks", "A12",
     10, 120, true, false},
    "Streaming without end",
    run};
