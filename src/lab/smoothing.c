/* Over-smoothing: attention averages, so tokens grow alike with depth. What residuals, MLPs and
 * dropout do about it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/progress.h"
#include "lab/learner.h"
#include "lab/mini.h"

enum { WAYS = 6, DEEP = 12 };

static const char *const names[WAYS] = {
    "untrained", "untrained, no residual", "untrained, attention alone",
    "trained",   "trained, dropout 0.1",   "trained, dropout 0.3"};

static void batch_of(struct mini *m, const int32_t *ids, int64_t count, uint64_t seed,
                     int64_t step) {
    struct random_key key = {.seed = seed, .step = (uint64_t)step, .op = RANDOM_SHUFFLE};
    int64_t T = m->c.seq;
    for (int64_t b = 0; b < m->c.batch; b++) {
        const int32_t *at = ids + random_below(&key, (uint64_t)b, (uint64_t)(count - T));
        memcpy(m->ids + b * T, at, (size_t)T * sizeof *at);
        memcpy(m->targets + b * T, at + 1, (size_t)T * sizeof *at);
    }
}

static tril_status run(struct lab *l, struct tril_error *err) {
    const char *columns[WAYS + 1] = {"layer"};
    int64_t steps = lab_choose(l, 60, 400), depth = lab_choose(l, 6, DEEP);
    struct mini_config base = {.layers = depth,
                               .dim = lab_choose(l, 64, 128),
                               .heads = 4,
                               .seq = lab_choose(l, 32, 64),
                               .batch = 8,
                               .activation = ACT_GELU_TANH};
    struct corpus text = {0};
    struct table *t = NULL;
    struct mini *m = NULL;
    struct progress progress;
    double alike[WAYS][DEEP + 1], x[DEEP + 1], valid[WAYS], loss;
    int64_t finished = 0;
    tril_status st = TRIL_OK;
    progress_start(&progress, "smoothing", 3 * steps);
    TRY(corpus_open(&text, l, lab_choose(l, 400, 1024), lab_choose(l, 1 << 19, 8 << 20), err));
    base.vocab = text.vocab;
    for (int w = 0; w < WAYS; w++) {
        struct mini_config c = base;
        columns[w + 1] = names[w];
        c.no_residual = w == 1 || w == 2;
        c.no_mlp = w == 2;
        c.dropout = w == 4 ? 0.1f : w == 5 ? 0.3f : 0;
        TRY(mini_create(&m, &c, l->ctx, 1, err));
        for (int64_t step = 0; w >= 3 && step < steps; step++) {
            double warm = fmin(1, (double)(step + 1) / (0.05 * (double)steps));
            batch_of(m, text.train, text.train_count, 1, step);
            TRY(mini_forward(m, true, (uint64_t)step, &loss, err));
            TRY(mini_backward(m, true, (uint64_t)step, err));
            TRY(mini_update(m, step + 1, 1.5e-3 * warm, err));
            progress_update(&progress, ++finished, NULL);
        }
        memset(alike[w], 0, sizeof alike[w]);
        valid[w] = 0;
        for (int k = 0; k < 8; k++) {
            batch_of(m, text.valid, text.valid_count, 2, k);
            TRY(mini_forward(m, false, 0, &loss, err));
            valid[w] += loss / 8;
            for (int64_t i = 0; i <= depth; i++)
                alike[w][i] += mini_similarity(m, i) / 8;
        }
        mini_free(m);
        m = NULL;
    }
    TRY(table_create(&t, columns, WAYS + 1, err));
    for (int64_t i = 0; i <= depth; i++) {
        x[i] = (double)i;
        table_add_int(t, i);
        for (int w = 0; w < WAYS; w++)
            table_add_number(t, alike[w][i], 4);
    }
    st = lab_table(l, "similarity", "Mean cosine between the tokens of a sequence, by depth", t,
                   err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[WAYS];
    for (int w = 0; w < WAYS; w++)
        curves[w] = (struct curve){
            .label = names[w], .x = x, .y = alike[w], .n = depth + 1, .style = CURVE_DOTTED_LINE};
    const struct curve_plot plot = {.title = "How alike the tokens are",
                                    .x_label = "layer",
                                    .y_label = "mean cosine",
                                    .curves = curves,
                                    .curve_count = WAYS};
    TRY(lab_curves(l, "similarity", &plot, err));
    double plain = alike[0][depth], bare = alike[1][depth], alone = alike[2][depth];
    double none = alike[3][depth], some = alike[4][depth], much = alike[5][depth];
    lab_claim(l, 1 - alone < (1 - plain) / 4, "attention alone makes tokens alike",
              "over-smoothing", "cosine %.3f after %lld layers, %.3f with residuals and MLPs",
              alone, (long long)depth, plain);
    lab_claim(l, much < none && some < none + 0.02, "dropout against smoothing", "reduces it",
              "%.3f without, %.3f at 0.1, %.3f at 0.3", none, some, much);
    lab_value(l, "plain", plain);
    lab_value(l, "no_residual", bare);
    lab_value(l, "attention_alone", alone);
    lab_value(l, "trained", none);
    lab_value(l, "dropout_small", some);
    lab_value(l, "dropout_large", much);
    lab_value(l, "first_layer", alike[0][0]);
    lab_say(
        l,
        "Untrained, %lld layers with residuals leave tokens with a mean cosine of %.3f (%.3f at "
        "the input); without residuals %.3f; attention alone, without MLPs either, %.3f: nothing "
        "but averages of averages.",
        (long long)depth, plain, alike[0][0], bare, alone);
    lab_say(l,
            "Trained on %s for %lld steps the last layer's tokens have %.3f; with dropout of 0.1 "
            "%.3f, of 0.3 %.3f (validation losses %.3f, %.3f, %.3f). %s",
            text.name, (long long)steps, none, some, much, valid[3], valid[4], valid[5],
            much < none ? "Dropout makes them less alike here."
                        : "Dropout does not make them less alike here: what it is said to do for "
                          "deep models does not show at this size.");
done:
    progress_end(&progress);
    mini_free(m);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_smoothing = {
    {"smoothing", "tokens growing alike with depth; residuals, MLPs and dropout against it", "M7",
     10, 120, true, false},
    "Over-smoothing",
    run};
