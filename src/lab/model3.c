/* Model 3: token and position embedding, one norm, one head without biases, no FFN, no final norm,
 * tied unembedding. Untrained its loss is ln V and its attention nearly uniform; one head and many
 * have the same parameters. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lab/learner.h"
#include "lab/lens.h"

/* Entropies of the softmax rows over ln n, of every attention of a pass. */
struct entropy {
    struct op_context *ctx;
    double sum, largest;
    int64_t rows;
    int64_t T;
};

static tril_status watch(void *arg, int layer, const struct attention_inputs *in, struct tensor lse,
                         const struct attention_params *params, struct tril_error *err) {
    struct entropy *e = arg;
    int64_t N = in->q.shape[0], H = in->q.shape[1], T = e->T;
    int32_t *rows = malloc((size_t)N * sizeof *rows);
    float *p = malloc((size_t)(N * H * T) * sizeof *p);
    tril_status st = TRIL_OK;
    (void)layer;
    if (!rows || !p) {
        st = lab_no_memory(err);
        goto done;
    }
    for (int64_t i = 0; i < N; i++)
        rows[i] = (int32_t)i;
    TRY(attention_probabilities(e->ctx, in, tensor_1d(rows, DT_I32, N), lse,
                                tensor_3d(p, DT_F32, N, H, T), params, err));
    for (int64_t i = 0; i < N * H; i++) {
        int64_t seen = i / H % T + 1;
        double h = 0;
        for (int64_t j = 0; j < T; j++)
            if (p[i * T + j] > 0) {
                h -= (double)p[i * T + j] * log((double)p[i * T + j]);
                e->largest = fmax(e->largest, seen > 1 ? (double)p[i * T + j] * (double)seen : 1);
            }
        if (seen > 1) {
            e->sum += h / log((double)seen);
            e->rows++;
        }
    }
done:
    free(rows);
    free(p);
    return st;
}

struct untrained {
    double loss, entropy, largest, parameters, table_rows, milliseconds;
};

static tril_status look(struct lab *l, const struct model_config *c, int64_t B, int64_t T,
                        uint64_t seed, struct untrained *out, struct tril_error *err) {
    struct model_options mo = {.dtype = DT_F32};
    struct workspace_options wo = {.max_tokens = B * T, .max_sequences = B};
    struct entropy e = {.ctx = l->ctx, .T = T};
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct model_counts counts;
    int32_t *ids = malloc((size_t)(2 * B * T + B + 1) * sizeof *ids);
    struct random_key key = {.seed = seed, .op = RANDOM_TEST};
    double loss;
    int64_t count;
    tril_status st = TRIL_OK;
    if (!ids)
        return lab_no_memory(err);
    int32_t *targets = ids + B * T, *offsets = targets + B * T;
    for (int64_t i = 0; i < 2 * B * T; i++)
        ids[i] = (int32_t)random_below(&key, (uint64_t)i, (uint64_t)c->vocab);
    for (int64_t b = 0; b <= B; b++)
        offsets[b] = (int32_t)(b * T);
    TRY(model_create(&m, c, &mo, l->ctx, err));
    TRY(model_init(m, seed, err));
    TRY(workspace_create(&w, m, &wo, err));
    TRY(workspace_watch_attention(w, watch, &e, err));
    struct batch b = {
        .tokens = B * T, .sequences = B, .ids = ids, .targets = targets, .offsets = offsets};
    TRY(model_loss(m, w, &b, &loss, &count, NULL, err));
    model_count(c, T, &counts);
    *out = (struct untrained){.loss = loss / (double)count,
                              .entropy = e.sum / (double)e.rows,
                              .largest = e.largest,
                              .parameters = counts.total,
                              .table_rows = counts.head};
done:
    workspace_free(w);
    model_free(m);
    free(ids);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"heads",
                                          "tied",
                                          "parameters",
                                          "loss",
                                          "ln V",
                                          "attention entropy / ln n",
                                          "largest weight x n"};
    static const char *const trained_columns[] = {
        "heads", "parameters", "steps", "first loss", "train loss", "valid loss", "ms a step"};
    struct model_config c;
    struct untrained x[3];
    struct learned y[2] = {{0}};
    struct corpus text = {0};
    struct table *t = NULL;
    double *step = NULL;
    int64_t steps = lab_choose(l, 200, 1500);
    tril_status st = TRIL_OK;
    TRY(model_config_preset(&c, "model3", err));
    TRY(table_create(&t, columns, 7, err));
    for (int i = 0; i < 3; i++) { /* one head, eight, one untied */
        c.heads = c.kv_heads = i == 1 ? 8 : 1;
        c.head_dim = c.dim / c.heads;
        c.tied = i < 2;
        TRY(look(l, &c, 5, 8, 1, &x[i], err));
        table_add_int(t, c.heads);
        table_add_text(t, c.tied ? "yes" : "no");
        table_add_number(t, x[i].parameters, 0);
        table_add_number(t, x[i].loss, 4);
        table_add_number(t, log((double)c.vocab), 4);
        table_add_number(t, x[i].entropy, 5);
        table_add_number(t, x[i].largest, 3);
    }
    st = lab_table(l, "untrained", "Model 3 with random weights: B = 5, T = 8, D = 64, V = 50257",
                   t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    TRY(corpus_open(&text, l, 512, lab_choose(l, 1 << 18, 4 << 20), err));
    TRY(table_create(&t, trained_columns, 7, err));
    step = malloc((size_t)steps * sizeof *step);
    if (!step) {
        st = lab_no_memory(err);
        goto done;
    }
    for (int many = 0; many < 2; many++) {
        struct model *m = NULL;
        struct learning how = {.config = &c,
                               .seq = 32,
                               .batch = 16,
                               .steps = steps,
                               .lr = 3e-3,
                               .seed = 1,
                               .what = many ? "eight heads" : "one head"};
        TRY(model_config_preset(&c, "model3", err));
        c.vocab = text.vocab;
        c.bos_id = c.eos_id = -1;
        c.context = 32;
        c.heads = c.kv_heads = many ? 8 : 1;
        c.head_dim = c.dim / c.heads;
        TRY(learn(l->ctx, &how, &text, &m, &y[many], err));
        model_free(m);
        table_add_int(t, c.heads);
        table_add_number(t, y[many].parameters, 0);
        table_add_int(t, steps);
        table_add_number(t, y[many].losses[0], 4);
        table_add_number(t, y[many].train_loss, 4);
        table_add_number(t, y[many].valid_loss, 4);
        table_add_number(t, y[many].step_ms, 2);
        curve_smooth(y[many].losses, steps, 0.9, y[many].losses);
    }
    for (int64_t i = 0; i < steps; i++)
        step[i] = (double)(i + 1);
    st = lab_table(l, "trained", "The same shape trained on text: one head and eight", t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const struct curve curves[] = {
        {.label = "one head", .x = step, .y = y[0].losses, .n = steps, .style = CURVE_LINE},
        {.label = "eight heads", .x = step, .y = y[1].losses, .n = steps, .style = CURVE_LINE}};
    const struct curve_plot plot = {.title = "Model 3 learns",
                                    .x_label = "step",
                                    .y_label = "nats per token",
                                    .curves = curves,
                                    .curve_count = 2};
    TRY(lab_curves(l, "loss", &plot, err));
    double lnv = log(50257), off = fabs(x[0].loss - lnv);
    lab_claim(l, off < 0.1, "loss with random weights", "ln V = 10.82", "%.3f", x[0].loss);
    lab_claim(l, x[0].entropy > 0.99, "attention is nearly uniform", "nearly uniform",
              "entropy %.2f%% of the uniform one's, no weight above %.2f / n", 100 * x[0].entropy,
              x[0].largest);
    lab_claim(l, x[0].parameters == x[1].parameters, "one head and many", "equal parameters",
              "%.0f and %.0f", x[0].parameters, x[1].parameters);
    lab_claim(l, y[1].valid_loss < y[0].valid_loss, "many heads learn more", "richer",
              "%.3f against %.3f nats after %lld steps", y[1].valid_loss, y[0].valid_loss,
              (long long)steps);
    lab_value(l, "loss_minus_ln_v", x[0].loss - lnv);
    lab_value(l, "entropy", x[0].entropy);
    lab_value(l, "parameters_one", x[0].parameters);
    lab_value(l, "parameters_many", x[1].parameters);
    lab_value(l, "parameters_untied", x[2].parameters);
    lab_value(l, "valid_one", y[0].valid_loss);
    lab_value(l, "valid_many", y[1].valid_loss);
    lab_value(l, "first_loss", y[0].losses[0]);
    lab_say(l,
            "With random weights the loss is %.3f where ln V is %.3f, and attention's entropy is "
            "%.2f%% of the uniform one's: scores are so small that every past token weighs alike "
            "(averaging the past, again). Tying saves %.0f of %.0f parameters.",
            x[0].loss, lnv, 100 * x[0].entropy, x[2].parameters - x[0].parameters, x[2].parameters);
    lab_say(l,
            "One head and eight have %.0f parameters each. After %lld steps on %s one head reaches "
            "%.3f and eight %.3f nats per token (validation); a step takes %.2f and %.2f ms.",
            x[0].parameters, (long long)steps, text.name, y[0].valid_loss, y[1].valid_loss,
            y[0].step_ms, y[1].step_ms);
done:
    free(step);
    free(y[0].losses);
    free(y[1].losses);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_model3 = {
    {"model3", "one head, no FFN: loss ln V, near-uniform attention, one head against many", "M1",
     6, 60, true, false},
    "Model 3",
    run};
