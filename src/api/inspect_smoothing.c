/* tril/inspect.h: over-smoothing: how alike the tokens become from layer to layer. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/inspect_pass.h"
#include "plot/curve.h"
#include "plot/table.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to compare the tokens");
}

/* The residual stream's figures at each depth: 0 the embeddings, l + 1 after layer l. */
struct recorder {
    struct inspected *s;
    struct tril_smoothing_row *rows; /* [L + 1] */
    bool *seen;                      /* [L + 1], in this pass */
    double *scaled;                  /* [D]: the sum of the tokens' directions */
    double *sum;                     /* [D]: of the tokens themselves */
    float *host;                     /* [T, D] */
    bool failed;
};

/* x [n, D] -> mean cosine of pairs of tokens, what is left when their mean is taken away (the share
 * of the norm: 0 when all are the same), root mean square of a token's norm. */
static void figures(struct recorder *r, const float *x, int64_t n, int64_t D,
                    struct tril_smoothing_row *out) {
    double all = 0, mean = 0, pairs = 0;
    int64_t counted = 0;
    memset(r->scaled, 0, (size_t)D * sizeof *r->scaled);
    memset(r->sum, 0, (size_t)D * sizeof *r->sum);
    for (int64_t i = 0; i < n; i++) {
        const float *row = x + i * D;
        double norm = 0;
        for (int64_t c = 0; c < D; c++)
            norm += (double)row[c] * (double)row[c];
        all += norm;
        norm = sqrt(norm);
        counted += norm > 0;
        for (int64_t c = 0; c < D; c++) {
            r->sum[c] += (double)row[c];
            r->scaled[c] += norm > 0 ? (double)row[c] / norm : 0;
        }
    }
    for (int64_t c = 0; c < D; c++) {
        mean += r->sum[c] * r->sum[c];
        pairs += r->scaled[c] * r->scaled[c];
    }
    /* |sum of directions|^2 counts each pair twice, and each token with itself once. */
    out->similarity =
        counted > 1 ? (pairs - (double)counted) / ((double)counted * (double)(counted - 1)) : 1;
    out->residual = all > 0 ? sqrt(fmax(0, 1 - mean / (double)n / all)) : 0;
    out->norm = sqrt(all / (double)n);
}

/* What comes last of a layer is its output. */
static void record(void *arg, int layer, const char *name, const struct tensor *t) {
    struct recorder *r = arg;
    if (strcmp(name, layer < 0 ? "x" : "x after ffn") != 0 &&
        (layer < 0 || strcmp(name, "x after attention") != 0))
        return;
    struct tril_error err;
    struct op_context *ctx = &r->s->ctx;
    if (t->dtype != DT_F32 || t->shape[0] != r->s->tokens ||
        ctx->backend->download(ctx, r->host, t->data, tensor_bytes(t), &err) != TRIL_OK) {
        r->failed = true;
        return;
    }
    figures(r, r->host, t->shape[0], t->shape[1], &r->rows[layer + 1]);
    r->seen[layer + 1] = true;
}

/* Entropy of the layers' attention, as means over heads. */
static tril_status entropies(const struct inspected *s, struct tril_smoothing_row *rows,
                             struct tril_error *err) {
    tril_status st = TRIL_OK;
    for (int64_t l = 0; l < s->look->layers; l++) {
        const int64_t H = s->look->layer[l].heads;
        rows[l + 1].entropy = rows[l + 1].uniform = NAN;
        if (!s->look->layer[l].seen)
            continue;
        rows[l + 1].entropy = rows[l + 1].uniform = 0;
        for (int64_t h = 0; h < H; h++) {
            struct look_summary x;
            TRY(look_summarise(s->look, (int)l, h, &x, NULL, 0, err));
            rows[l + 1].entropy += x.entropy / (double)H;
            rows[l + 1].uniform += x.uniform / (double)H;
        }
    }
done:
    return st;
}

/* One pass over tokens [at, at + n): fills rows. */
static tril_status pass(struct recorder *r, const int32_t *ids, int64_t n, double *loss,
                        int64_t *targets_counted, struct tril_error *err) {
    struct inspected *s = r->s;
    const int64_t L = s->m->config.layers;
    int32_t *targets = malloc((size_t)n * sizeof *targets);
    tril_status st = TRIL_OK;
    double sum = 0;
    int64_t count = 0;
    if (!targets)
        return no_memory(err);
    s->tokens = n;
    for (int64_t i = 0; i < n; i++)
        targets[i] = i + 1 < n ? ids[i + 1] : -1;
    const int32_t offsets[2] = {0, (int32_t)n};
    const struct batch b = {
        .tokens = n, .sequences = 1, .ids = ids, .offsets = offsets, .targets = targets};
    memset(r->seen, 0, (size_t)(L + 1) * sizeof *r->seen);
    TRY(model_loss(s->m, s->w, &b, &sum, &count, NULL, err));
    if (r->failed || !r->seen[0]) {
        st = error_set(err, TRIL_ERR_UNSUPPORTED, "this model does not show its residual stream");
        goto done;
    }
    for (int64_t l = 1; l <= L; l++)
        if (!r->seen[l]) { /* switched off: as before */
            r->rows[l] = r->rows[l - 1];
            r->rows[l].entropy = r->rows[l].uniform = NAN;
        }
    TRY(entropies(s, r->rows, err));
    *loss += sum;
    *targets_counted += count;
done:
    free(targets);
    return st;
}

static void add_rows(struct tril_smoothing_row *to, const struct tril_smoothing_row *from,
                     int64_t count, double weight) {
    for (int64_t i = 0; i < count; i++) {
        to[i].similarity += weight * from[i].similarity;
        to[i].residual += weight * from[i].residual;
        to[i].norm += weight * from[i].norm;
        to[i].entropy += weight * from[i].entropy;
        to[i].uniform += weight * from[i].uniform;
    }
}

static tril_status write_picture(const struct tril_smoothing *out, const char *ablate,
                                 const char *path, struct tril_error *err) {
    char subtitle[160];
    snprintf(subtitle, sizeof subtitle, "0: the embeddings; l: after layer l%s%s",
             ablate && *ablate ? "; without " : "", ablate ? ablate : "");
    const int64_t n = out->count;
    double *x = calloc((size_t)n * 4, sizeof *x);
    tril_status st;
    if (!x)
        return no_memory(err);
    double *similarity = x + n, *residual = similarity + n, *evenness = residual + n;
    for (int64_t i = 0; i < n; i++) {
        x[i] = (double)i;
        similarity[i] = out->rows[i].similarity;
        residual[i] = out->rows[i].residual;
        evenness[i] = i ? out->rows[i].entropy / out->rows[i].uniform : NAN;
    }
    const struct curve curves[] = {
        {"similarity of tokens", x, similarity, n, CURVE_DOTTED_LINE},
        {"what is left without their mean", x, residual, n, CURVE_DOTTED_LINE},
        {"attention's entropy / even", x, evenness, n, CURVE_DOTTED_LINE}};
    const struct curve_plot plot = {.title = "Tokens by depth",
                                    .subtitle = subtitle,
                                    .x_label = "depth",
                                    .curves = curves,
                                    .curve_count = 3,
                                    .y_from_zero = true};
    st = curve_plot_write(&plot, path, err);
    free(x);
    return st;
}

static tril_status write_table(const struct tril_smoothing *out, const char *path,
                               struct tril_error *err) {
    static const char *const columns[] = {"depth", "similarity", "residual",
                                          "norm",  "entropy",    "uniform"};
    struct table *t = NULL;
    tril_status st = table_create(&t, columns, 6, err);
    for (int64_t i = 0; st == TRIL_OK && i < out->count; i++) {
        const struct tril_smoothing_row *r = &out->rows[i];
        table_add_int(t, i);
        table_add_number(t, r->similarity, 4);
        table_add_number(t, r->residual, 4);
        table_add_number(t, r->norm, 4);
        table_add_number(t, r->entropy, 4);
        table_add_number(t, r->uniform, 4);
    }
    if (st == TRIL_OK)
        st = table_write_csv(t, path, err);
    table_free(t);
    return st;
}

tril_status tril_smoothing(const struct tril_look_options *o, int64_t windows, const char *csv_path,
                           struct tril_smoothing *out, struct tril_error *err) {
    struct inspected s = {0};
    struct recorder r = {.s = &s};
    struct tril_look_options all = *o;
    int32_t *ids = NULL;
    int64_t total = 0;
    tril_status st;
    *out = (struct tril_smoothing){0};
    all.seq = 0; /* seq is a window's length here */
    TRY(inspected_open_any(&s, &all, err));
    const int64_t L = s.m->config.layers, D = s.m->config.dim, context = s.m->config.context;
    int64_t seq = o->seq > 0 ? o->seq : context < 512 ? context : 512;
    if (seq > context) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "--seq %lld is longer than the model's context of %lld", (long long)seq,
                       (long long)context);
        goto done;
    }
    ids = s.ids;
    total = s.tokens;
    s.ids = NULL;
    seq = seq < total ? seq : total;
    if (seq < 2) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "give at least two tokens: one is like itself");
        goto done;
    }
    const int64_t count = total / seq < windows ? total / seq : windows;
    r.rows = calloc((size_t)L + 1, sizeof *r.rows);
    r.seen = calloc((size_t)L + 1, sizeof *r.seen);
    r.scaled = calloc((size_t)D, sizeof *r.scaled);
    r.sum = calloc((size_t)D, sizeof *r.sum);
    r.host = malloc((size_t)(seq * D) * sizeof *r.host);
    out->rows = calloc((size_t)L + 1, sizeof *out->rows);
    if (!r.rows || !r.seen || !r.scaled || !r.sum || !r.host || !out->rows)
        TRY(no_memory(err));
    const struct workspace_options options = {.max_tokens = seq, .max_sequences = 1};
    TRY(workspace_create(&s.w, s.m, &options, err));
    TRY(workspace_watch_attention(s.w, look_hook, s.look, err));
    workspace_watch_relative(s.w, look_relative_hook);
    workspace_set_hook(s.w, record, &r);
    int64_t targets = 0;
    for (int64_t k = 0; k < count; k++) {
        TRY(pass(&r, ids + k * seq, seq, &out->loss, &targets, err));
        add_rows(out->rows, r.rows, L + 1, 1.0 / (double)count);
    }
    out->rows[0].entropy = out->rows[0].uniform = NAN;
    out->count = L + 1;
    out->tokens = seq;
    out->windows = count;
    out->loss /= (double)targets;
    if (csv_path)
        TRY(write_table(out, csv_path, err));
    if (o->svg)
        TRY(write_picture(out, o->ablate, o->svg, err));
done:
    free(ids);
    free(r.rows);
    free(r.seen);
    free(r.scaled);
    free(r.sum);
    free(r.host);
    s.tokens = 0;
    inspected_close(&s);
    if (st != TRIL_OK)
        tril_smoothing_free(out);
    return st;
}

void tril_smoothing_free(struct tril_smoothing *s) {
    free(s->rows);
    *s = (struct tril_smoothing){0};
}
