/* Quality: one trained model under each exact implementation of attention; and models trained alike
 * with sparse and linear attention. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lab/learner.h"
#include "lab/lens.h"

enum { KINDS = 6, EXACT = 4 };

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const exact_columns[] = {"implementation", "loss", "perplexity",
                                                "beside flash"};
    static const char *const columns[] = {"attention",  "mixer",         "train loss", "valid loss",
                                          "perplexity", "beside full %", "ms a step"};
    static const char *const exact_names[EXACT] = {"flash", "fused", "materialised", "reference"};
    int64_t T = lab_choose(l, 64, 256), dim = lab_choose(l, 64, 128), layers = lab_choose(l, 2, 4);
    int64_t W = T / 8;
    char mixers[KINDS][64];
    static const char *const names[KINDS] = {"full",  "window",  "dilated",
                                             "fixed", "strided", "linear"};
    struct corpus text = {0};
    struct lens lens;
    struct model *m = NULL;
    struct learned out[KINDS] = {{0}};
    struct table *t = NULL;
    double perplexity[EXACT], loss, ms[KINDS], quality[KINDS];
    bool open = false;
    char what[40];
    tril_status st = TRIL_OK;
    snprintf(mixers[0], 64, "causal");
    snprintf(mixers[1], 64, "window:%lld", (long long)W);
    snprintf(mixers[2], 64, "dilated:%lld,2", (long long)W);
    snprintf(mixers[3], 64, "fixed:%lld,%lld", (long long)W, (long long)(W / 4));
    snprintf(mixers[4], 64, "strided:%lld", (long long)W);
    snprintf(mixers[5], 64, "linear");
    TRY(corpus_open(&text, l, lab_choose(l, 400, 1024), lab_choose(l, 1 << 19, 8 << 20), err));
    TRY(lens_open(&lens, l->ctx, err));
    open = true;
    struct model_config configs[KINDS];
    for (int i = 0; i < KINDS; i++) {
        configs[i] = learner_config(false, layers, dim, 4, text.vocab, T);
        TRY(model_config_parse_mixers(&configs[i], mixers[i], err));
    }
    TRY(learner_time(l->ctx, configs, KINDS, T, 8, lab_choose(l, 5, 8), ms, err));
    for (int i = 0; i < KINDS; i++) {
        struct learning how = {.config = &configs[i],
                               .seq = T,
                               .batch = 8,
                               .steps = lab_choose(l, 200, 600),
                               .lr = 3e-3,
                               .weight_decay = 0.1,
                               .seed = 1,
                               .what = what};
        snprintf(what, sizeof what, "quality: %s", names[i]);
        TRY(learn(&lens.ctx, &how, &text, &m, &out[i], err));
        quality[i] = exp(out[i].valid_loss);
        if (i == 0) {
            TRY(table_create(&t, exact_columns, 4, err));
            for (int k = 0; k < EXACT; k++) {
                lens.other = true;
                lens.implementation = k == 3 ? ATTENTION_FLASH : (enum attention_implementation)k;
                lens.ctx.reference = k == 3; /* every operation, in double */
                TRY(corpus_loss(m, text.valid, text.valid_count, T, k == 3 ? 4 * T : 40000, &loss,
                                err));
                if (k == 3) { /* it is slow: compared over fewer tokens */
                    double flash;
                    lens.ctx.reference = false;
                    TRY(corpus_loss(m, text.valid, text.valid_count, T, 4 * T, &flash, err));
                    loss += log(perplexity[0]) - flash;
                }
                perplexity[k] = exp(loss);
                table_add_text(t, exact_names[k]);
                table_add_number(t, loss, 8);
                table_add_number(t, perplexity[k], 6);
                table_add_number(t, perplexity[k] / perplexity[0] - 1, -1);
            }
            lens.other = false;
            lens.ctx.reference = false;
            st = lab_table(l, "exact", "One model, evaluated under each exact implementation", t,
                           err);
            t = NULL;
            if (st != TRIL_OK)
                goto done;
        }
        model_free(m);
        m = NULL;
    }
    TRY(table_create(&t, columns, 7, err));
    for (int i = 0; i < KINDS; i++) {
        table_add_text(t, names[i]);
        table_add_text(t, mixers[i]);
        table_add_number(t, out[i].train_loss, 4);
        table_add_number(t, out[i].valid_loss, 4);
        table_add_number(t, quality[i], 3);
        table_add_number(t, 100 * (quality[i] / quality[0] - 1), 2);
        table_add_number(t, ms[i], 2);
    }
    char title[160];
    snprintf(title, sizeof title, "Models trained alike on %s: %lld layers, D = %lld, T = %lld",
             text.name, (long long)layers, (long long)dim, (long long)T);
    st = lab_table(l, "quality", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const struct bar_plot plot = {.title = "Trained alike",
                                  .subtitle = "by what the layers see",
                                  .x_label = "validation perplexity",
                                  .names = names,
                                  .values = quality,
                                  .count = KINDS,
                                  .decimals = 2};
    TRY(lab_bars(l, "quality", &plot, err));
    double worst = 0, sparse = -INFINITY, kindest = INFINITY;
    for (int k = 1; k < EXACT; k++)
        worst = fmax(worst, fabs(perplexity[k] - perplexity[0]));
    for (int i = 1; i < 5; i++) {
        sparse = fmax(sparse, quality[i] / quality[0] - 1);
        kindest = fmin(kindest, quality[i] / quality[0] - 1);
    }
    double linear = quality[5] / quality[0] - 1;
    lab_claim(l, worst / perplexity[0] < 1e-3, "flash changes perplexity by", "< 0.1%",
              "%.1e of %.3f", worst, perplexity[0]);
    lab_claim(l, worst < 1e-5 * fmax(1, perplexity[0]), "exact", "exact",
              "equal to %.1e (relative)", worst / perplexity[0]);
    lab_claim(l, kindest > 0 && sparse < 0.15, "sparse", "slightly lower",
              "perplexity %+.1f%% to %+.1f%%", 100 * kindest, 100 * sparse);
    lab_claim(l, linear > sparse && linear > 0.02, "linear", "clearly lower", "perplexity %+.1f%%",
              100 * linear);
    lab_value(l, "exact_difference", worst);
    lab_value(l, "perplexity", perplexity[0]);
    lab_value(l, "vocab", (double)text.vocab);
    for (int i = 0; i < KINDS; i++)
        lab_value(l, names[i], quality[i]);
    lab_say(l,
            "One trained model has perplexity %.6f under flash; fused, materialised and the scalar "
            "reference in double are within %.1e of it. Which implementation computes exact "
            "attention does not change what a model knows.",
            perplexity[0], worst);
    lab_say(l,
            "Trained alike for the same steps, sparse attention changes perplexity by %+.1f%% to "
            "%+.1f%% and linear attention by %+.1f%% against full attention's %.2f. %s",
            100 * kindest, 100 * sparse, 100 * linear, quality[0],
            kindest < 0 ? "Where a sparse pattern does better than full attention, this text's "
                          "useful past is short, and seeing less is an easier problem for a small "
                          "model and few steps."
                        : "Seeing less costs something, everywhere.");
done:
    for (int i = 0; i < KINDS; i++)
        free(out[i].losses);
    model_free(m);
    if (open)
        lens_close(&lens);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_quality = {
    {"quality", "one model under each exact implementation; trained alike: sparse, linear",
     "E7, E12", 20, 300, true},
    "Quality",
    run};
