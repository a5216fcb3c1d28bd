/* Passkey: a value hidden somewhere in noise must be named at the end. Which attention still sees
 * it, by distance; and at lengths that training did not have. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lab/learner.h"

/* Tokens: 0 asks, 1 .. 16 are values, the rest is noise. A sequence ends with the question. */
enum { VALUES = 16, NOISE = 47, VOCAB = 1 + VALUES + NOISE, KINDS = 6, BUCKETS = 8 };

struct task {
    int64_t T, batch;
    uint64_t seed;
};

/* One sequence of T tokens with the value `distance` before the question. */
static void hide(const struct random_key *key, uint64_t at, int64_t T, int64_t distance,
                 int32_t *ids, int32_t *value) {
    for (int64_t i = 0; i < T; i++)
        ids[i] = 1 + VALUES + (int32_t)random_below(key, at * 65536 + (uint64_t)i, NOISE);
    *value = 1 + (int32_t)random_below(key, at * 65536 + 65000, VALUES);
    ids[T - 1 - distance] = *value;
    ids[T - 1] = 0;
}

static void fill(void *arg, int64_t step, int32_t *inputs, int32_t *targets) {
    const struct task *k = arg;
    struct random_key key = {.seed = k->seed, .step = (uint64_t)step, .op = RANDOM_TEST};
    for (int64_t b = 0; b < k->batch; b++) {
        int32_t value;
        /* Near ones more often, so that short windows have something to learn from. */
        double u = (double)random_uniform(&key, (uint64_t)b * 65536 + 65001);
        int64_t distance = (int64_t)floor(exp(u * log((double)k->T)));
        distance = distance > k->T - 1 ? k->T - 1 : distance;
        hide(&key, (uint64_t)b, k->T, distance, inputs + b * k->T, &value);
        for (int64_t i = 0; i < k->T; i++)
            targets[b * k->T + i] = i == k->T - 1 ? value : -1;
    }
}

/* Accuracy over `n` sequences with the value at `distance`. */
static tril_status accuracy(struct model *m, int64_t T, int64_t distance, int64_t n, double *out,
                            struct tril_error *err) {
    struct workspace_options wo = {.max_tokens = n * T, .max_sequences = n, .max_rows = n};
    struct random_key key = {.seed = 99, .step = (uint64_t)distance, .op = RANDOM_TEST};
    struct workspace *w = NULL;
    int32_t *ids = malloc((size_t)(n * (T + 3) + 1) * sizeof *ids);
    int32_t *value = ids + n * T, *rows = value + n, *offsets = rows + n;
    float *logits = malloc((size_t)(n * VOCAB) * sizeof *logits);
    int64_t right = 0;
    tril_status st = TRIL_OK;
    if (!ids || !logits) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(workspace_create(&w, m, &wo, err));
    offsets[0] = 0;
    for (int64_t k = 0; k < n; k++) {
        hide(&key, (uint64_t)k, T, distance, ids + k * T, &value[k]);
        offsets[k + 1] = (int32_t)((k + 1) * T);
        rows[k] = offsets[k + 1] - 1;
    }
    struct batch b = {.tokens = n * T,
                      .sequences = n,
                      .ids = ids,
                      .offsets = offsets,
                      .rows = rows,
                      .row_count = n};
    TRY(model_forward(m, w, &b, logits, err));
    for (int64_t k = 0; k < n; k++) {
        int best = 1;
        for (int v = 1; v <= VALUES; v++)
            best = logits[k * VOCAB + v] > logits[k * VOCAB + best] ? v : best;
        right += best == value[k];
    }
    *out = (double)right / (double)n;
done:
    workspace_free(w);
    free(logits);
    free(ids);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    int64_t T = lab_choose(l, 64, 128), W = T / 8, layers = 2, n = lab_choose(l, 40, 100);
    char mixers[KINDS][64], title[160], names[BUCKETS + 4][24], what[64];
    static const char *const kinds[KINDS] = {"full, RoPE",       "full, ALiBi", "window",
                                             "window and sinks", "linear",      "window / full"};
    const char *columns[BUCKETS + 4];
    double x[BUCKETS], y[KINDS][BUCKETS], beyond[KINDS], mean[KINDS] = {0}, far[KINDS];
    struct task task = {.T = T, .batch = lab_choose(l, 12, 24), .seed = 1};
    struct model *m = NULL, *longer = NULL;
    struct learned out = {0};
    struct table *t = NULL;
    tril_status st = TRIL_OK;
    for (int i = 0; i < KINDS; i++)
        snprintf(mixers[i], 64, "causal");
    snprintf(mixers[2], 64, "window:%lld", (long long)W);
    snprintf(mixers[3], 64, "window:%lld+sinks:4", (long long)W);
    snprintf(mixers[4], 64, "linear");
    snprintf(mixers[5], 64, "window:%lld/causal", (long long)W);
    columns[0] = "attention";
    columns[1] = "mixers";
    for (int i = 0; i < BUCKETS; i++) {
        x[i] = (double)(1 + (T - 2) * i / (BUCKETS - 1));
        snprintf(names[i], sizeof names[i], "at %.0f", x[i]);
        columns[2 + i] = names[i];
    }
    columns[BUCKETS + 2] = "final loss";
    columns[BUCKETS + 3] = "twice the length";
    TRY(table_create(&t, columns, BUCKETS + 4, err));
    for (int i = 0; i < KINDS; i++) {
        struct model_config c = learner_config(false, layers, 64, 4, VOCAB, 2 * T);
        struct learning how = {.config = &c,
                               .seq = T,
                               .batch = task.batch,
                               .steps = lab_choose(l, 320, 600),
                               .lr = 3e-3,
                               .seed = 1,
                               .what = what,
                               .batch_fill = fill,
                               .arg = &task};
        if (i == 1) {
            c.position = POSITION_ALIBI;
            c.rope_dim = 0;
        }
        TRY(model_config_parse_mixers(&c, mixers[i], err));
        snprintf(what, sizeof what, "passkey: %s", kinds[i]);
        TRY(learn(l->ctx, &how, NULL, &m, &out, err));
        table_add_text(t, kinds[i]);
        table_add_text(t, mixers[i]);
        for (int k = 0; k < BUCKETS; k++) {
            TRY(accuracy(m, T, (int64_t)x[k], n, &y[i][k], err));
            y[i][k] *= 100;
            mean[i] += y[i][k] / BUCKETS;
            table_add_number(t, y[i][k], 0);
        }
        far[i] = y[i][BUCKETS - 1];
        TRY(accuracy(m, 2 * T, 2 * T - 2, n, &beyond[i], err));
        beyond[i] *= 100;
        table_add_number(t, out.train_loss, 3);
        table_add_number(t, beyond[i], 0);
        model_free(m);
        m = NULL;
        free(out.losses);
        out.losses = NULL;
    }
    snprintf(
        title, sizeof title,
        "%% of values named, by distance; %lld layers, T = %lld, windows of %lld, chance %.0f%%",
        (long long)layers, (long long)T, (long long)W, 100.0 / VALUES);
    st = lab_table(l, "passkey", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[KINDS];
    for (int i = 0; i < KINDS; i++)
        curves[i] = (struct curve){
            .label = kinds[i], .x = x, .y = y[i], .n = BUCKETS, .style = CURVE_DOTTED_LINE};
    const struct curve_plot plot = {.title = "A value named again, by its distance",
                                    .x_label = "tokens back",
                                    .y_label = "% right",
                                    .curves = curves,
                                    .curve_count = KINDS,
                                    .y_from_zero = true};
    TRY(lab_curves(l, "passkey", &plot, err));
    lab_claim(l, mean[0] > 95, "full attention finds it anywhere", "any distance",
              "%.0f%% on average, %.0f%% at the farthest", mean[0], far[0]);
    lab_claim(l, far[2] < 30, "a window does not reach farther than layers x width", "forgets",
              "%.0f%% at distance %.0f with %lld layers of window %lld", far[2], x[BUCKETS - 1],
              (long long)layers, (long long)W);
    lab_claim(l, far[5] > 95, "a hybrid does", "works", "%.0f%% at the farthest", far[5]);
    lab_value(l, "full_mean", mean[0]);
    lab_value(l, "alibi_mean", mean[1]);
    lab_value(l, "full_far", far[0]);
    lab_value(l, "window_near", y[2][0]);
    lab_value(l, "window_far", far[2]);
    lab_value(l, "hybrid_far", far[5]);
    lab_value(l, "linear_mean", mean[4]);
    lab_value(l, "chance", 100.0 / VALUES);
    lab_say(
        l,
        "Full attention names %.0f%% of the values whatever their distance (RoPE; ALiBi %.0f%%, "
        "at the farthest %.0f%%). Two layers of window %lld reach %lld tokens back at most; they "
        "name %.0f%% at distance 1 and %.0f%% at %.0f. Four sinks help where the value is one of "
        "the first four tokens (%.0f%%), not elsewhere (%.0f%% at %.0f). One window layer under "
        "one full layer names %.0f%% at the farthest. Linear attention, which holds everything "
        "in a state of fixed size, names %.0f%% on average.",
        mean[0], mean[1], far[1], (long long)W, (long long)(2 * W - 2), y[2][0], far[2],
        x[BUCKETS - 1], far[3], y[3][BUCKETS - 2], x[BUCKETS - 2], far[5], mean[4]);
    lab_say(
        l,
        "At twice the training length, with the value at the very beginning: RoPE %.0f%%, ALiBi "
        "%.0f%%, linear %.0f%%.",
        beyond[0], beyond[1], beyond[4]);
done:
    free(out.losses);
    model_free(m);
    model_free(longer);
    table_free(t);
    return st;
}

const struct lab_experiment lab_passkey = {
    {"passkey", "a hidden value named again, by distance and kind of attention", "A10, A13, A14",
     25, 150, false, false},
    "Passkey retrieval",
    run};
