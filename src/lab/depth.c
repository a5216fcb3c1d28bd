/* Depth: models of 2, 4, 8 and 12 layers that read the same tokens: perplexity, time per step with
 * a straight line through it, memory. */
#include <math.h>
#include <stdlib.h>

#include "base/progress.h"
#include "lab/learner.h"

enum { DEPTHS = 4 };
static const double published_perplexity[] = {38.5, 29.4, 21.7, 18.9};
static const double published_ms[] = {1.2, 2.3, 4.8, 7.5};

struct regime {
    int64_t depths[DEPTHS], count, dim, heads, vocab, seq, batch, steps, bytes;
    double lr;
};

static struct regime regime_of(enum tril_lab_size size) {
    if (size == TRIL_LAB_QUICK)
        return (struct regime){{1, 2, 4, 0}, 3, 64, 4, 512, 64, 4, 120, 1 << 18, 3e-3};
    if (size == TRIL_LAB_FULL)
        return (struct regime){{2, 4, 8, 12}, 4, 128, 4, 1024, 128, 6, 3000, 0, 3e-3};
    /* 20 epochs of 50 to 200 million tokens: give that much text. */
    return (struct regime){{2, 4, 8, 12}, 4, 512, 8, 32000, 512, 32, 0, 0, 3e-4};
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"L",
                                          "parameters",
                                          "published perplexity",
                                          "perplexity",
                                          "loss",
                                          "train loss",
                                          "published ms a step",
                                          "ms a step, in turns",
                                          "median while training",
                                          "peak MB",
                                          "activations MB"};
    struct regime g = regime_of(l->size);
    struct model_config c[DEPTHS];
    struct learned out[DEPTHS] = {{0}};
    double depth[DEPTHS], ms[DEPTHS], perplexity[DEPTHS], memory[DEPTHS], line[DEPTHS];
    double activations[DEPTHS];
    double *at = NULL, *smooth[DEPTHS] = {0};
    struct corpus text = {0};
    struct table *t = NULL;
    char what[40], title[200], labels[DEPTHS][24], time_text[32];
    tril_status st = TRIL_OK;
    TRY(corpus_open(&text, l, g.vocab, g.bytes, err));
    if (g.steps == 0)
        g.steps = (int64_t)ceil(20 * (double)text.train_count / (double)(g.batch * g.seq));
    TRY(table_create(&t, columns, 11, err));
    for (int64_t i = 0; i < g.count; i++)
        c[i] = learner_config(false, g.depths[i], g.dim, g.heads, text.vocab, g.seq);
    TRY(learner_time(l->ctx, c, g.count, g.seq, g.batch, lab_choose(l, 15, 20), ms, err));
    double expected = 0;
    for (int64_t i = 0; i < g.count; i++)
        expected += ms[i] * 1e-3 * (double)g.steps;
    if (l->size != TRIL_LAB_QUICK)
        fprintf(stderr,
                "depth: %lld steps for each depth; %s from here if the machine stays free\n",
                (long long)g.steps, format_duration(expected, time_text));
    at = malloc((size_t)g.steps * sizeof *at);
    if (!at) {
        st = lab_no_memory(err);
        goto done;
    }
    for (int64_t i = 0; i < g.steps; i++)
        at[i] = (double)((i + 1) * g.batch * g.seq);
    for (int64_t i = 0; i < g.count; i++) {
        struct learning how = {.config = &c[i],
                               .seq = g.seq,
                               .batch = g.batch,
                               .steps = g.steps,
                               .lr = g.lr,
                               .weight_decay = 0.1,
                               .seed = 1,
                               .what = what};
        struct model *m = NULL;
        snprintf(what, sizeof what, "depth %lld", (long long)g.depths[i]);
        TRY(learn(l->ctx, &how, &text, &m, &out[i], err));
        model_free(m);
        depth[i] = (double)g.depths[i];
        perplexity[i] = exp(out[i].valid_loss);
        if (l->size != TRIL_LAB_QUICK)
            fprintf(stderr, "depth: %lld layers reach perplexity %.2f after %s\n",
                    (long long)g.depths[i], perplexity[i],
                    format_duration(out[i].seconds, time_text));
        memory[i] = out[i].peak_bytes / 1e6;
        activations[i] = out[i].workspace_bytes;
        smooth[i] = out[i].losses;
        curve_smooth(smooth[i], g.steps, 0.98, smooth[i]);
        snprintf(labels[i], sizeof labels[i], "%lld layers", (long long)g.depths[i]);
        bool theirs = g.count == DEPTHS;
        table_add_int(t, g.depths[i]);
        table_add_number(t, out[i].parameters, 0);
        table_add_number(t, theirs ? published_perplexity[i] : NAN, 1);
        table_add_number(t, perplexity[i], 2);
        table_add_number(t, out[i].valid_loss, 4);
        table_add_number(t, out[i].train_loss, 4);
        table_add_number(t, theirs ? published_ms[i] : NAN, 1);
        table_add_number(t, ms[i], 1);
        table_add_number(t, out[i].step_ms, 1);
        table_add_number(t, memory[i], 1);
        table_add_number(t, out[i].workspace_bytes / 1e6, 1);
    }
    snprintf(title, sizeof title,
             "D = %lld, H = %lld, V = %lld, %lld steps of %lld x %lld tokens of %s, fp32",
             (long long)g.dim, (long long)g.heads, (long long)text.vocab, (long long)g.steps,
             (long long)g.batch, (long long)g.seq, text.name);
    st = lab_table(l, "depth", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    int last = (int)g.count - 1;
    struct lab_line fit = lab_fit(depth, ms, g.count), grows = lab_fit(depth, memory, g.count);
    bool falls = true;
    for (int i = 1; i <= last; i++)
        falls = falls && perplexity[i] < perplexity[i - 1];
    for (int i = 0; i <= last; i++)
        line[i] = fit.a + fit.b * depth[i];
    const struct curve p[] = {
        {.label = "here", .x = depth, .y = perplexity, .n = g.count, .style = CURVE_DOTTED_LINE},
        {.label = "published (other text, far more of it)",
         .x = depth,
         .y = published_perplexity,
         .n = g.count == DEPTHS ? g.count : 0,
         .style = CURVE_DASHED}};
    const struct curve_plot first = {.title = "Perplexity by depth",
                                     .x_label = "layers",
                                     .y_label = "validation perplexity",
                                     .curves = p,
                                     .curve_count = g.count == DEPTHS ? 2 : 1};
    TRY(lab_curves(l, "perplexity", &first, err));
    const struct curve s[] = {
        {.label = "fastest step", .x = depth, .y = ms, .n = g.count, .style = CURVE_DOTS},
        {.label = "line", .x = depth, .y = line, .n = g.count, .style = CURVE_DASHED}};
    const struct curve_plot second = {.title = "Time per step by depth",
                                      .x_label = "layers",
                                      .y_label = "ms",
                                      .curves = s,
                                      .curve_count = 2,
                                      .y_from_zero = true};
    TRY(lab_curves(l, "time", &second, err));
    struct curve runs[DEPTHS];
    for (int i = 0; i <= last; i++)
        runs[i] = (struct curve){
            .label = labels[i], .x = at, .y = smooth[i], .n = g.steps, .style = CURVE_LINE};
    const struct curve_plot third = {.title = "Training loss (smoothed)",
                                     .x_label = "tokens",
                                     .y_label = "nats per token",
                                     .curves = runs,
                                     .curve_count = (int)g.count};
    TRY(lab_curves(l, "loss", &third, err));
    lab_claim(l, falls, "perplexity falls with depth", "38.5, 29.4, 21.7, 18.9",
              "%.2f at %lld layers to %.2f at %lld%s", perplexity[0], (long long)g.depths[0],
              perplexity[last], (long long)g.depths[last], falls ? "" : ", not at every step");
    lab_claim(l, fit.r2 > 0.95, "time per step grows linearly", "1.2, 2.3, 4.8, 7.5 ms",
              "%.1f + %.2f L ms, r^2 = %.4f", fit.a, fit.b, fit.r2);
    lab_claim(l, grows.r2 > 0.95, "memory is O(L T D)", "linear in L",
              "%.0f + %.1f L MB, r^2 = %.4f", grows.a, grows.b, grows.r2);
    lab_value(l, "time_r2", fit.r2);
    lab_value(l, "memory_r2", grows.r2);
    lab_value(l, "activations_r2", lab_fit(depth, activations, g.count).r2);
    lab_value(l, "falls", falls);
    lab_value(l, "perplexity_first", perplexity[0]);
    lab_value(l, "perplexity_last", perplexity[last]);
    lab_value(l, "vocab", (double)text.vocab);
    double bits[2] = {out[0].valid_loss / M_LN2 / text.bytes_per_token,
                      out[last].valid_loss / M_LN2 / text.bytes_per_token};
    lab_say(
        l,
        "Each depth read the same %.2f million tokens of %s. Validation perplexity %s from %.2f "
        "(%lld layers) to %.2f (%lld layers): %.3f to %.3f bits per byte. The published figures "
        "are of 20 epochs over 50 to 200 million tokens of another text and another "
        "vocabulary, so only the direction can be compared (--papers is that regime).",
        out[0].tokens / 1e6, text.name, falls ? "falls at every step" : "goes", perplexity[0],
        (long long)g.depths[0], perplexity[last], (long long)g.depths[last], bits[0], bits[1]);
    lab_say(l,
            "A step (the fastest of several, the depths taking turns) takes %.1f ms and %.2f ms "
            "more for each layer (r^2 %.4f); the part that does "
            "not depend on depth is the embedding, the head and the optimiser's share of them. "
            "Memory grows by %.1f MB a layer, of which %.1f MB are activations.",
            fit.a, fit.b, fit.r2, grows.b,
            (out[last].workspace_bytes - out[0].workspace_bytes) / 1e6 / (depth[last] - depth[0]));
done:
    for (int i = 0; i < DEPTHS; i++)
        free(out[i].losses);
    free(at);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_depth = {
    {"depth", "perplexity, time per step and memory of 2, 4, 8, 12 layers", "E11, T10", 10, 1000,
     true, false},
    "Depth",
    run};
