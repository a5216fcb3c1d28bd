/* Probes: that expansion makes data linearly separable, that the MLP acts on each token by itself,
 * and what each layer of a trained model knows (linear probes). */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lab/learner.h"

/* ------------------------------------------------------------------ least squares */

/* Solves (A + ridge I) W = B in place by Cholesky: a [n, n], b [n, k]. false: not definite. */
static bool solve(double *a, double *b, int64_t n, int64_t k, double ridge) {
    for (int64_t i = 0; i < n; i++)
        a[i * n + i] += ridge;
    for (int64_t j = 0; j < n; j++) {
        for (int64_t p = 0; p < j; p++)
            for (int64_t i = j; i < n; i++)
                a[i * n + j] -= a[i * n + p] * a[j * n + p];
        if (!(a[j * n + j] > 0))
            return false;
        double root = sqrt(a[j * n + j]);
        for (int64_t i = j; i < n; i++)
            a[i * n + j] /= root;
    }
    for (int64_t c = 0; c < k; c++) {
        for (int64_t i = 0; i < n; i++) {
            for (int64_t p = 0; p < i; p++)
                b[i * k + c] -= a[i * n + p] * b[p * k + c];
            b[i * k + c] /= a[i * n + i];
        }
        for (int64_t i = n - 1; i >= 0; i--) {
            for (int64_t p = i + 1; p < n; p++)
                b[i * k + c] -= a[p * n + i] * b[p * k + c];
            b[i * k + c] /= a[i * n + i];
        }
    }
    return true;
}

/* A linear classifier by ridge regression on one-hot targets, fitted on the first half of the rows
 * of x [n, d] (a column of ones is added) and tested on the other; labels in [0, classes). */
static tril_status probe(const float *x, const int32_t *label, int64_t n, int64_t d,
                         int64_t classes, double *accuracy, struct tril_error *err) {
    int64_t w = d + 1, half = n / 2, right = 0;
    double *a = calloc((size_t)(w * (w + classes)), sizeof *a), *b = a + w * w;
    double *row = malloc((size_t)(w + classes) * sizeof *row), *score = row + w;
    if (!a || !row) {
        free(a);
        free(row);
        return lab_no_memory(err);
    }
    row[d] = 1;
    for (int64_t i = 0; i < half; i++) {
        for (int64_t c = 0; c < d; c++)
            row[c] = (double)x[i * d + c];
        for (int64_t p = 0; p < w; p++) {
            for (int64_t c = 0; c <= p; c++)
                a[p * w + c] += row[p] * row[c];
            b[p * classes + label[i]] += row[p];
        }
    }
    double trace = 0;
    for (int64_t p = 0; p < w; p++)
        trace += a[p * w + p];
    bool fine = solve(a, b, w, classes, 1e-4 * trace / (double)w + 1e-9);
    for (int64_t i = half; fine && i < n; i++) {
        int64_t best = 0;
        memset(score, 0, (size_t)classes * sizeof *score);
        for (int64_t p = 0; p < w; p++) {
            double v = p < d ? (double)x[i * d + p] : 1;
            for (int64_t c = 0; c < classes; c++)
                score[c] += v * b[p * classes + c];
        }
        for (int64_t c = 1; c < classes; c++)
            best = score[c] > score[best] ? c : best;
        right += best == label[i];
    }
    *accuracy = fine ? (double)right / (double)(n - half) : NAN;
    free(a);
    free(row);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ expansion */

/* Two rings around each other, and an exclusive or: no line divides them. */
static void make_points(bool rings, int64_t n, float *x, int32_t *label) {
    struct random_key key = {.seed = 21 + rings, .op = RANDOM_TEST};
    for (int64_t i = 0; i < n; i++) {
        double u = (double)random_uniform(&key, (uint64_t)(4 * i));
        double r = (double)random_uniform(&key, (uint64_t)(4 * i + 1));
        if (rings) {
            label[i] = random_u32(&key, (uint64_t)(4 * i + 2)) & 1;
            double radius = (label[i] ? 1.6 : 0.6) + 0.4 * r;
            x[2 * i] = (float)(radius * cos(2 * M_PI * u));
            x[2 * i + 1] = (float)(radius * sin(2 * M_PI * u));
        } else {
            x[2 * i] = (float)(2 * u - 1);
            x[2 * i + 1] = (float)(2 * r - 1);
            label[i] = (x[2 * i] > 0) != (x[2 * i + 1] > 0);
        }
    }
}

/* relu(x W + b) with random W [2, width]. */
static void expand(const float *x, int64_t n, int64_t width, float *out) {
    float *w = malloc((size_t)(3 * width) * sizeof *w);
    if (!w)
        return;
    lab_normal(w, 3 * width, 31);
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < width; c++) {
            float y = x[2 * i] * w[3 * c] + x[2 * i + 1] * w[3 * c + 1] + w[3 * c + 2];
            out[i * width + c] = y > 0 ? y : 0;
        }
    free(w);
}

static tril_status expansion(struct lab *l, double best[2], double plain[2],
                             struct tril_error *err) {
    static const char *const columns[] = {"data", "as it is", "x 4", "x 16", "x 64"};
    static const char *const what[] = {"exclusive or", "two rings"};
    enum { N = 2000, MOST = 128 };
    float *x = malloc(N * (2 + MOST) * sizeof *x), *wide = x + N * 2;
    int32_t *label = malloc(N * sizeof *label);
    struct table *t = NULL;
    double accuracy;
    tril_status st = TRIL_OK;
    if (!x || !label) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(table_create(&t, columns, 5, err));
    for (int k = 0; k < 2; k++) {
        make_points(k, N, x, label);
        table_add_text(t, what[k]);
        TRY(probe(x, label, N, 2, 2, &plain[k], err));
        table_add_number(t, 100 * plain[k], 1);
        for (int64_t width = 8; width <= MOST; width *= 4) {
            expand(x, N, width, wide);
            TRY(probe(wide, label, N, width, 2, &accuracy, err));
            table_add_number(t, 100 * accuracy, 1);
            best[k] = accuracy;
        }
    }
    st = lab_table(l, "expansion",
                   "% that a linear classifier gets right, before and after relu(xW + b)", t, err);
    t = NULL;
done:
    table_free(t);
    free(x);
    free(label);
    return st;
}

/* ------------------------------------------------------------------ layers */

enum { MOST_LAYERS = 9, TASKS = 4, CLASSES = 20 };

struct states {
    int64_t N, D, layers;
    float *x[MOST_LAYERS]; /* the residual stream into each layer and out of the last */
    struct op_context *ctx;
    tril_status st;
};

static void keep(void *arg, int layer, const char *name, const struct tensor *t) {
    struct states *s = arg;
    int64_t at = layer < 0 ? 0 : strcmp(name, "x after ffn") == 0 ? layer + 1 : -1;
    if ((layer < 0 && strcmp(name, "x") != 0) || at < 0 || at > s->layers)
        return;
    struct tril_error err;
    tril_status st = s->ctx->backend->download(s->ctx, s->x[at], t->data, tensor_bytes(t), &err);
    if (st != TRIL_OK)
        s->st = st;
}

/* Whether the MLP sees one token at a time: the others' outputs are the same bits when one token's
 * input changes. Measured on the operations of a block. */
static tril_status per_token(struct lab *l, double *others, double *own, struct tril_error *err) {
    enum { N = 16, D = 32 };
    float *m = calloc(N * D * 2 + N * 4 * D * 2 + 8 * D * D, sizeof *m), *x = m, *y = x + N * D,
          *h = y + N * D, *up = h + 2 * N * 4 * D, *down = up + 4 * D * D;
    float first[N * D];
    struct weight a = {.value = tensor_2d(up, DT_F32, 4 * D, D)},
                  b = {.value = tensor_2d(down, DT_F32, D, 4 * D)};
    struct tensor none = tensor_none();
    const struct backend *backend = l->ctx->backend;
    tril_status st = TRIL_OK;
    if (!m)
        return lab_no_memory(err);
    lab_normal(x, N * D, 41);
    lab_normal(up, 8 * D * D, 42);
    TRY(backend->weight_prepare(l->ctx, &a, WEIGHT_FORWARD, err));
    TRY(backend->weight_prepare(l->ctx, &b, WEIGHT_FORWARD, err));
    *others = *own = 0;
    for (int pass = 0; pass < 2; pass++) {
        TRY(linear_forward(l->ctx, tensor_2d(x, DT_F32, N, D), &a, none, none,
                           tensor_2d(h, DT_F32, N, 4 * D), none, ACT_GELU_TANH, err));
        TRY(linear_forward(l->ctx, tensor_2d(h, DT_F32, N, 4 * D), &b, none, none,
                           tensor_2d(y, DT_F32, N, D), none, ACT_NONE, err));
        if (pass == 0) {
            memcpy(first, y, sizeof first);
            for (int c = 0; c < D; c++)
                x[7 * D + c] += 1;
        }
    }
    for (int n = 0; n < N; n++) {
        double d = lab_difference(first + n * D, y + n * D, D);
        if (n == 7)
            *own = d;
        else
            *others = fmax(*others, d);
    }
done:
    backend->weight_release(&a);
    backend->weight_release(&b);
    free(m);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"state", "this token %", "the token before %",
                                          "two before %", "the next token %"};
    static const char *const tasks[TASKS] = {"this token", "the token before", "two before",
                                             "the next token"};
    static const int offsets_of[TASKS] = {0, -1, -2, 1};
    int64_t T = lab_choose(l, 32, 64), B = lab_choose(l, 96, 128), layers = lab_choose(l, 3, 6);
    int64_t dim = lab_choose(l, 64, 128), N = B * T;
    double best[2], plain[2], others = NAN, own = NAN, know[TASKS][MOST_LAYERS], x[MOST_LAYERS],
                              chance = 0;
    struct corpus text = {0};
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct learned out = {0};
    struct states s = {.N = N, .D = dim, .layers = layers, .ctx = l->ctx};
    struct table *t = NULL;
    int32_t *ids = NULL, *label, *offsets, *class_of = NULL;
    int64_t *seen = NULL;
    float *rows = NULL;
    double loss;
    int64_t count;
    char what[40];
    tril_status st = TRIL_OK;
    TRY(expansion(l, best, plain, err));
    TRY(per_token(l, &others, &own, err));
    TRY(corpus_open(&text, l, lab_choose(l, 400, 1024), lab_choose(l, 1 << 19, 8 << 20), err));
    struct model_config c = learner_config(false, layers, dim, 4, text.vocab, T);
    struct learning how = {.config = &c,
                           .seq = T,
                           .batch = 16,
                           .steps = lab_choose(l, 250, 800),
                           .lr = 3e-3,
                           .weight_decay = 0.1,
                           .seed = 1,
                           .what = "probes: training"};
    TRY(learn(l->ctx, &how, &text, &m, &out, err));
    ids = malloc((size_t)(2 * N + B + 1) * sizeof *ids);
    class_of = malloc((size_t)text.vocab * sizeof *class_of);
    seen = calloc((size_t)text.vocab, sizeof *seen);
    rows = malloc((size_t)(N * dim) * sizeof *rows);
    if (!ids || !class_of || !seen || !rows || text.valid_count < N + 4) {
        st = text.valid_count < N + 4
                 ? error_set(err, TRIL_ERR_ARGUMENT, "probes need a validation text of %lld tokens",
                             (long long)(N + 4))
                 : lab_no_memory(err);
        goto done;
    }
    label = ids + N;
    offsets = label + N;
    for (int64_t b = 0; b <= B; b++)
        offsets[b] = (int32_t)(b * T);
    memcpy(ids, text.valid + 2, (size_t)N * sizeof *ids);
    for (int64_t i = 0; i <= layers; i++) {
        s.x[i] = malloc((size_t)(N * dim) * sizeof(float));
        if (!s.x[i]) {
            st = lab_no_memory(err);
            goto done;
        }
        x[i] = (double)i;
    }
    struct workspace_options wo = {.max_tokens = N, .max_sequences = B};
    TRY(workspace_create(&w, m, &wo, err));
    workspace_set_hook(w, keep, &s);
    struct batch b = {.tokens = N, .sequences = B, .ids = ids, .targets = ids, .offsets = offsets};
    TRY(model_loss(m, w, &b, &loss, &count, NULL, err));
    if (s.st != TRIL_OK) {
        st = s.st;
        goto done;
    }
    /* The twenty most frequent tokens are the classes; other rows are left out. */
    for (int64_t i = 0; i < N; i++)
        seen[ids[i]]++;
    memset(class_of, 0xff, (size_t)text.vocab * sizeof *class_of);
    for (int k = 0; k < CLASSES; k++) {
        int64_t most = 0;
        for (int64_t v = 1; v < text.vocab; v++)
            most = seen[v] > seen[most] ? v : most;
        class_of[most] = k;
        seen[most] = -1;
    }
    TRY(table_create(&t, columns, 5, err));
    for (int64_t i = 0; i <= layers; i++) {
        snprintf(what, sizeof what, i == 0 ? "embeddings" : "after layer %lld", (long long)i);
        table_add_text(t, what);
        for (int k = 0; k < TASKS; k++) {
            int64_t n = 0, frequent[CLASSES] = {0}, most = 0;
            for (int64_t r = 0; r < N; r++) {
                int64_t at = r % T + offsets_of[k];
                int32_t v = text.valid[2 + r + offsets_of[k]];
                if (at < 0 || class_of[v] < 0)
                    continue;
                memcpy(rows + n * dim, s.x[i] + r * dim, (size_t)dim * sizeof *rows);
                frequent[class_of[v]]++;
                label[n++] = class_of[v];
            }
            TRY(probe(rows, label, n, dim, CLASSES, &know[k][i], err));
            know[k][i] *= 100;
            table_add_number(t, know[k][i], 1);
            for (int v = 0; v < CLASSES; v++)
                most = frequent[v] > most ? frequent[v] : most;
            chance = 100.0 * (double)most / (double)(n ? n : 1);
        }
    }
    st = lab_table(l, "layers", "Linear probes for the 20 most frequent tokens, by layer", t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[TASKS];
    for (int k = 0; k < TASKS; k++)
        curves[k] = (struct curve){
            .label = tasks[k], .x = x, .y = know[k], .n = layers + 1, .style = CURVE_DOTTED_LINE};
    const struct curve_plot plot = {.title = "What each layer knows",
                                    .subtitle = "a linear classifier on the residual stream",
                                    .x_label = "layer",
                                    .y_label = "% right",
                                    .curves = curves,
                                    .curve_count = TASKS,
                                    .y_from_zero = true};
    TRY(lab_curves(l, "layers", &plot, err));
    double next = know[3][layers] - know[3][0], before = 0;
    for (int64_t i = 1; i <= layers; i++)
        before = fmax(before, know[1][i]);
    lab_claim(l, best[0] > 0.9 && best[1] > 0.9 && plain[0] < 0.75 && plain[1] < 0.75,
              "expansion makes data linearly separable", "D to 4D separates",
              "%.0f%% to %.0f%% (xor), %.0f%% to %.0f%% (rings)", 100 * plain[0], 100 * best[0],
              100 * plain[1], 100 * best[1]);
    lab_claim(l, others == 0 && own > 0, "the MLP acts per token", "each token by itself",
              "the other tokens change by %.0g", others);
    lab_claim(l, next > 5, "later layers know what comes next", "yes",
              "%.0f%% at the embeddings, %.0f%% after the last layer", know[3][0], know[3][layers]);
    lab_value(l, "xor_plain", plain[0]);
    lab_value(l, "xor_wide", best[0]);
    lab_value(l, "rings_plain", plain[1]);
    lab_value(l, "rings_wide", best[1]);
    lab_value(l, "other_tokens", others);
    lab_value(l, "own_token", own);
    lab_value(l, "this_first", know[0][0]);
    lab_value(l, "this_last", know[0][layers]);
    lab_value(l, "before_first", know[1][0]);
    lab_value(l, "before_best", before);
    lab_value(l, "next_first", know[3][0]);
    lab_value(l, "next_last", know[3][layers]);
    lab_value(l, "chance", chance);
    lab_say(
        l,
        "A linear classifier gets %.0f%% of an exclusive or and %.0f%% of two rings right; after "
        "a random expansion to 64 times the width and a ReLU %.0f%% and %.0f%%. Changing one "
        "token's input changes the other tokens' MLP outputs by %.0g (its own by %.2g).",
        100 * plain[0], 100 * plain[1], 100 * best[0], 100 * best[1], others, own);
    lab_say(l,
            "In a model trained on %s, the token itself can be read off %.0f%% of the time at the "
            "embeddings and %.0f%% after the last layer; the token before it %.0f%% and, after "
            "attention has moved it, up to %.0f%%; the next token %.0f%% and %.0f%%. Always naming "
            "the most frequent token would be right %.0f%% of the time.",
            text.name, know[0][0], know[0][layers], know[1][0], before, know[3][0], know[3][layers],
            chance);
done:
    for (int64_t i = 0; i <= layers; i++)
        free(s.x[i]);
    free(ids);
    free(class_of);
    free(seen);
    free(rows);
    free(out.losses);
    workspace_free(w);
    model_free(m);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_probes = {
    {"probes", "expansion separates; the MLP acts per token; what each layer knows", "M7", 10, 90,
     true, false},
    "Probes",
    run};
