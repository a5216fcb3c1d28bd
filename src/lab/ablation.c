/* Ablation: small transformers trained alike, each without one part; and how the gradient travels
 * through depth, with residuals and without. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/progress.h"
#include "lab/learner.h"
#include "lab/mini.h"

enum { VARIANTS = 8, DEEP = 16 };

static const char *const names[VARIANTS] = {"everything", "no MLP",   "no residual", "no norm",
                                            "no Q",       "no scale", "untied",      "ReLU"};

static struct mini_config variant(int i, const struct mini_config *base) {
    struct mini_config c = *base;
    c.no_mlp = i == 1;
    c.no_residual = i == 2;
    c.no_norm = i == 3;
    c.no_q = i == 4;
    c.no_scale = i == 5;
    c.untied = i == 6;
    c.activation = i == 7 ? ACT_RELU : ACT_GELU_TANH;
    return c;
}

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

struct trial {
    double parameters, first, train, valid, gradient_first, gradient_last;
    bool diverged;
};

static tril_status train(struct lab *l, const struct mini_config *c, const struct corpus *text,
                         int64_t steps, struct progress *progress, int64_t *done_steps,
                         struct trial *out, struct tril_error *err) {
    struct mini *m = NULL;
    double loss;
    int64_t tail = steps / 10, checks = 20;
    tril_status st = TRIL_OK;
    *out = (struct trial){0};
    TRY(mini_create(&m, c, l->ctx, 1, err));
    out->parameters = mini_parameters(m);
    for (int64_t step = 0; step < steps; step++) {
        double warm = fmin(1, (double)(step + 1) / (0.05 * (double)steps));
        double rate = 2e-3 * warm * (0.55 + 0.45 * cos(M_PI * (double)step / (double)steps));
        batch_of(m, text->train, text->train_count, 1, step);
        TRY(mini_forward(m, true, (uint64_t)step, &loss, err));
        if (!isfinite(loss)) {
            out->diverged = true;
            out->train = out->valid = NAN;
            goto done;
        }
        if (step == 0)
            out->first = loss;
        TRY(mini_backward(m, true, (uint64_t)step, err));
        if (step == 0) {
            out->gradient_first = m->gradient_norm[0];
            out->gradient_last = m->gradient_norm[c->layers];
        }
        TRY(mini_update(m, step + 1, rate, err));
        out->train += step >= steps - tail ? loss / (double)tail : 0;
        progress_update(progress, ++*done_steps, NULL);
    }
    for (int64_t k = 0; k < checks; k++) {
        batch_of(m, text->valid, text->valid_count, 2, k);
        TRY(mini_forward(m, false, 0, &loss, err));
        out->valid += loss / (double)checks;
    }
done:
    mini_free(m);
    return st;
}

/* Norms of the gradient of each layer's input over that of the last output, at the start. */
static tril_status gradients(struct lab *l, const struct mini_config *base,
                             const struct corpus *text, bool no_residual, bool no_norm,
                             double *ratio, struct tril_error *err) {
    struct mini_config c = *base;
    struct mini *m = NULL;
    double loss;
    tril_status st = TRIL_OK;
    c.layers = DEEP;
    c.no_residual = no_residual;
    c.no_norm = no_norm;
    TRY(mini_create(&m, &c, l->ctx, 1, err));
    batch_of(m, text->train, text->train_count, 1, 0);
    TRY(mini_forward(m, false, 0, &loss, err));
    TRY(mini_backward(m, false, 0, err));
    for (int i = 0; i <= DEEP; i++)
        ratio[i] = m->gradient_norm[i] / m->gradient_norm[DEEP];
done:
    mini_free(m);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"model",
                                          "parameters",
                                          "first loss",
                                          "train loss",
                                          "valid loss",
                                          "beside everything",
                                          "gradient at the first / last layer"};
    static const char *const depth_columns[] = {"layer", "residuals and norms", "residuals alone",
                                                "norms alone", "neither"};
    int64_t steps = lab_choose(l, 150, 500);
    struct mini_config base = {.layers = lab_choose(l, 3, 4),
                               .dim = lab_choose(l, 64, 128),
                               .heads = 4,
                               .seq = lab_choose(l, 32, 64),
                               .batch = lab_choose(l, 8, 16),
                               .activation = ACT_GELU_TANH};
    struct corpus text = {0};
    struct trial out[VARIANTS];
    struct table *t = NULL;
    struct progress progress;
    double ratio[4][DEEP + 1], x[DEEP + 1], valid[VARIANTS];
    int64_t done_steps = 0;
    tril_status st = TRIL_OK;
    progress_start(&progress, "ablation", steps * VARIANTS);
    TRY(corpus_open(&text, l, lab_choose(l, 400, 1024), lab_choose(l, 1 << 19, 8 << 20), err));
    base.vocab = text.vocab;
    TRY(table_create(&t, columns, 7, err));
    for (int i = 0; i < VARIANTS; i++) {
        struct mini_config c = variant(i, &base);
        TRY(train(l, &c, &text, steps, &progress, &done_steps, &out[i], err));
        valid[i] = out[i].valid;
        table_add_text(t, names[i]);
        table_add_number(t, out[i].parameters, 0);
        table_add_number(t, out[i].first, 3);
        table_add_number(t, out[i].train, 4);
        table_add_number(t, out[i].valid, 4);
        table_add_number(t, out[i].valid - out[0].valid, 4);
        table_add_number(t, out[i].gradient_first / out[i].gradient_last, 4);
    }
    char title[160];
    snprintf(title, sizeof title, "Trained alike on %s: %lld layers, D = %lld, %lld steps",
             text.name, (long long)base.layers, (long long)base.dim, (long long)steps);
    st = lab_table(l, "ablation", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    for (int k = 0; k < 4; k++)
        TRY(gradients(l, &base, &text, k >= 2, k % 2 == 1, ratio[k], err));
    TRY(table_create(&t, depth_columns, 5, err));
    for (int i = 0; i <= DEEP; i++) {
        x[i] = i;
        table_add_int(t, i);
        for (int k = 0; k < 4; k++)
            table_add_number(t, ratio[k][i], -1);
    }
    st = lab_table(l, "gradients",
                   "16 layers, untrained: the gradient of a layer's input over the last output's",
                   t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[4];
    for (int k = 0; k < 4; k++)
        curves[k] = (struct curve){.label = depth_columns[k + 1],
                                   .x = x,
                                   .y = ratio[k],
                                   .n = DEEP + 1,
                                   .style = CURVE_DOTTED_LINE};
    const struct curve_plot plot = {.title = "How the gradient travels back",
                                    .x_label = "layer",
                                    .y_label = "norm over that at the last layer",
                                    .curves = curves,
                                    .curve_count = 4,
                                    .y_log = true};
    TRY(lab_curves(l, "gradients", &plot, err));
    const struct bar_plot second = {.title = "Without one part",
                                    .subtitle = "models trained alike",
                                    .x_label = "validation loss, nats per token",
                                    .names = names,
                                    .values = valid,
                                    .count = VARIANTS,
                                    .decimals = 3};
    TRY(lab_bars(l, "ablation", &second, err));
    int worst = 1;
    for (int i = 2; i < 6; i++)
        worst = !(valid[i] <= valid[worst]) ? i : worst;
    lab_claim(l, ratio[1][0] > 0.3 && ratio[1][0] < 3, "residuals keep the gradient near 1",
              "near 1", "%.2f at the first of 16 layers, %.2g without residuals", ratio[1][0],
              ratio[3][0]);
    lab_claim(l, worst == 2, "what hurts most to leave out", "the residual", "%s (%+.3f nats)",
              names[worst], valid[worst] - valid[0]);
    lab_claim(l, valid[1] > valid[0], "the MLP", "needed", "%+.3f nats without",
              valid[1] - valid[0]);
    lab_claim(l, fabs(valid[7] - valid[0]) < 0.1, "GELU against ReLU", "GELU slightly better",
              "ReLU %+.4f nats", valid[7] - valid[0]);
    lab_value(l, "gradient_both", ratio[0][0]);
    lab_value(l, "gradient_residual", ratio[1][0]);
    lab_value(l, "gradient_norm", ratio[2][0]);
    lab_value(l, "gradient_neither", ratio[3][0]);
    static const char *const keys[VARIANTS] = {"everything", "no_mlp",   "no_residual", "no_norm",
                                               "no_q",       "no_scale", "untied",      "relu"};
    for (int i = 0; i < VARIANTS; i++)
        lab_value(l, keys[i], valid[i]);
    lab_value(l, "first_loss", out[0].first);
    lab_say(
        l,
        "After %lld steps alike the full model has %.3f nats of validation loss. Leaving out one "
        "part changes it by %+.3f (MLP), %+.3f (residual), %+.3f (norm), %+.3f (Q: the "
        "normalised input asks for itself), %+.3f (1/sqrt d), %+.3f (own head instead of a tied "
        "one), %+.3f (ReLU for GELU).",
        (long long)steps, valid[0], valid[1] - valid[0], valid[2] - valid[0], valid[3] - valid[0],
        valid[4] - valid[0], valid[5] - valid[0], valid[6] - valid[0], valid[7] - valid[0]);
    lab_say(
        l,
        "In an untrained model of 16 layers without norms the gradient at the first layer is %.2f "
        "times that at the last with residuals and %.2g times without. Norms alone also carry it "
        "(%.2g at layer 1: what is divided by its own size cannot fade). With both it is %.2f at "
        "layer 1 and %.0f at the embeddings themselves, because the first norm divides by their "
        "small size.",
        ratio[1][0], ratio[3][0], ratio[2][1], ratio[0][1], ratio[0][0]);
done:
    progress_end(&progress);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_ablation = {
    {"ablation", "without MLP, residual, norm, Q, scale, tying; gradients by depth; GELU and ReLU",
     "M7", 8, 240, true, false},
    "Leaving parts out",
    run};
