/* Trained short, tested long: what positions a model can use that it has never seen. The same
 * tokens are predicted with once, twice, four times the past that training had. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/progress.h"
#include "lab/learner.h"

enum { LENGTHS = 4, VARIANTS = 8 };

struct variant {
    const char *name;
    enum position_kind position;
    enum rope_scaling_kind scaling;
    double loss[LENGTHS];
};

/* As a user would: the scaling's factor is the ratio of the lengths. */
static struct model_config scaled(const struct model_config *base, const struct variant *v,
                                  int64_t trained, int64_t length) {
    struct model_config c = *base;
    double factor = (double)length / (double)trained;
    c.context = length;
    if (v->scaling != ROPE_PLAIN && factor > 1) {
        c.rope_scaling = v->scaling;
        c.rope_factor = (float)factor;
        c.rope_original_context = trained;
        if (v->scaling == ROPE_YARN)
            c.rope_attention_factor = (float)model_yarn_scale(factor, 1);
    }
    return c;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"position", "at test", "1x", "2x", "4x", "8x", "4x - 1x"};
    struct variant v[VARIANTS] = {{"learned", POSITION_LEARNED, ROPE_PLAIN, {0}},
                                  {"none", POSITION_NONE, ROPE_PLAIN, {0}},
                                  {"ALiBi", POSITION_ALIBI, ROPE_PLAIN, {0}},
                                  {"RoPE", POSITION_ROPE, ROPE_PLAIN, {0}},
                                  {"RoPE, linear", POSITION_ROPE, ROPE_LINEAR, {0}},
                                  {"RoPE, NTK-aware", POSITION_ROPE, ROPE_NTK, {0}},
                                  {"RoPE, dynamic NTK", POSITION_ROPE, ROPE_DYNAMIC, {0}},
                                  {"RoPE, YaRN", POSITION_ROPE, ROPE_YARN, {0}}};
    static const char *const scalings[] = {"as trained", "linear", "NTK", "dynamic", "YaRN"};
    int64_t T = lab_choose(l, 64, 128), dim = lab_choose(l, 64, 128), layers = lab_choose(l, 2, 4);
    int64_t steps = lab_choose(l, 300, 800), lengths = lab_choose(l, 3, 4);
    int64_t most = T << (lengths - 1), windows = lab_choose(l, 60, 150);
    struct corpus text = {0};
    struct model *m = NULL, *longer = NULL;
    struct learned out = {0};
    struct table *t = NULL;
    double x[LENGTHS];
    char what[40];
    tril_status st = TRIL_OK;
    TRY(corpus_open(&text, l, lab_choose(l, 400, 1024), lab_choose(l, 1 << 19, 8 << 20), err));
    TRY(table_create(&t, columns, 7, err));
    for (int i = 0; i < LENGTHS; i++)
        x[i] = (double)(T << i);
    struct model_config base = {0};
    for (int i = 0; i < VARIANTS; i++) {
        if (i <= 3) { /* the scalings share RoPE's model */
            base = learner_config(false, layers, dim, 4, text.vocab, most);
            base.position = v[i].position;
            base.rope_dim = v[i].position == POSITION_ROPE ? base.head_dim : 0;
            snprintf(what, sizeof what, "extrapolation: %s", v[i].name);
            struct learning how = {.config = &base,
                                   .seq = T,
                                   .batch = 16,
                                   .steps = steps,
                                   .lr = 3e-3,
                                   .weight_decay = 0.1,
                                   .seed = 1,
                                   .what = what};
            model_free(m);
            free(out.losses);
            TRY(learn(l->ctx, &how, &text, &m, &out, err));
        }
        table_add_text(t, v[i].position == POSITION_ROPE ? "RoPE" : v[i].name);
        table_add_text(t, scalings[v[i].scaling]);
        for (int k = 0; k < LENGTHS; k++) {
            v[i].loss[k] = NAN;
            if (k < lengths) {
                struct model_config c = scaled(&base, &v[i], T, T << k);
                TRY(learner_copy(m, &c, l->ctx, &longer, err));
                TRY(corpus_tail_loss(longer, text.valid, text.valid_count, T << k, most, T / 2,
                                     T / 2, windows, &v[i].loss[k], err));
                model_free(longer);
                longer = NULL;
            }
            table_add_number(t, v[i].loss[k], 4);
        }
        table_add_number(t, v[i].loss[2] - v[i].loss[0], 4);
    }
    char title[160];
    snprintf(title, sizeof title,
             "Loss of the same tokens of %s; trained on %lld tokens, tested on multiples",
             text.name, (long long)T);
    st = lab_table(l, "extrapolation", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[VARIANTS];
    for (int i = 0; i < VARIANTS; i++)
        curves[i] = (struct curve){
            .label = v[i].name, .x = x, .y = v[i].loss, .n = lengths, .style = CURVE_DOTTED_LINE};
    const struct curve_plot plot = {.title = "Trained short, tested long",
                                    .x_label = "tokens of past",
                                    .y_label = "nats per token",
                                    .curves = curves,
                                    .curve_count = VARIANTS,
                                    .x_log = true};
    TRY(lab_curves(l, "extrapolation", &plot, err));
    double change[VARIANTS];
    for (int i = 0; i < VARIANTS; i++)
        change[i] = v[i].loss[2] - v[i].loss[0];
    lab_claim(l, change[2] < 0.02, "ALiBi extrapolates to 4x its training length", "without loss",
              "%+.3f nats", change[2]);
    lab_claim(l, change[3] > 0.02, "RoPE unscaled does not", "fails", "%+.3f nats", change[3]);
    lab_claim(l, change[7] < 0.02 || change[7] < change[3] / 4, "YaRN does, after its scaling",
              "works", "%+.3f nats without further training", change[7]);
    lab_claim(l, change[0] > 0.02, "learned positions do not", "fails", "%+.3f nats", change[0]);
    static const char *const keys[VARIANTS] = {"learned", "none", "alibi",   "rope",
                                               "linear",  "ntk",  "dynamic", "yarn"};
    for (int i = 0; i < VARIANTS; i++) {
        lab_value(l, keys[i], change[i]);
        snprintf(what, sizeof what, "%s_trained", keys[i]);
        lab_value(l, what, v[i].loss[0]);
    }
    int best = 4;
    for (int i = 5; i < VARIANTS; i++)
        best = change[i] < change[best] ? i : best;
    lab_say(
        l,
        "At four times the training length (%lld tokens) the loss of the same tokens changes by "
        "%+.3f with learned positions, %+.3f without any, %+.3f with ALiBi and %+.3f with RoPE "
        "as trained. Scaling RoPE at test time gives %+.3f (linear), %+.3f (NTK-aware), %+.3f "
        "(dynamic NTK), %+.3f (YaRN), without a step of further training; the best of them is "
        "%s.",
        (long long)(T << 2), change[0], change[1], change[2], change[3], change[4], change[5],
        change[6], change[7], v[best].name);
    lab_say(l,
            "Negative numbers mean that a model uses the longer past. At the trained length the "
            "losses are %.3f (learned), %.3f (none), %.3f (ALiBi), %.3f (RoPE).",
            v[0].loss[0], v[1].loss[0], v[2].loss[0], v[3].loss[0]);
done:
    free(out.losses);
    model_free(m);
    model_free(longer);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_extrapolation = {
    {"extrapolation", "trained short, tested long: learned, none, ALiBi, RoPE and its scalings",
     "A9", 20, 240, true, false},
    "Trained short, tested long",
    run};
