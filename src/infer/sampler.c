/* A sampler: one row of the operation's arguments in one block of the backend's memory, and what
 * the host must know of it. */
#include "infer/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What the operation leaves, read in one go. */
struct drawn {
    int32_t token, status;
    float log_probability;
};
/* The row in the backend's memory, [words] of seen after it. */
struct sampler_row {
    int64_t seed, index;
    float options[SAMPLE_OPTIONS];
    int32_t top_k;
    struct drawn drawn;
};

struct sampler {
    struct op_context *ctx;
    struct sample_rows rows;
    struct sampler_row *row; /* the backend's */
    int64_t vocab, words;
    int32_t *seen; /* host, [words]; NULL without a penalty */
    bool stale;    /* the backend's lacks a token */
};

struct sampler_options sampler_defaults(void) {
    return (struct sampler_options){
        .temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .repetition_penalty = 1};
}

static tril_status check(const char *name, double value, double min, double max,
                         struct tril_error *err) {
    if (value >= min && value <= max)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT, "%s must be from %g to %g, not %g", name, min, max,
                     value);
}

/* Views of the row's parts. */
static void view(struct sampler *s, const struct sampler_options *o) {
    struct sampler_row *row = s->row;
    s->rows = (struct sample_rows){
        .options = tensor_2d(row->options, DT_F32, 1, SAMPLE_OPTIONS),
        .top_k = tensor_1d(&row->top_k, DT_I32, 1),
        .seed = tensor_1d(&row->seed, DT_I64, 1),
        .index = tensor_1d(&row->index, DT_I64, 1),
        .seen = s->seen ? tensor_2d(row + 1, DT_I32, 1, s->words) : tensor_none(),
        .token = tensor_1d(&row->drawn.token, DT_I32, 1),
        .status = tensor_1d(&row->drawn.status, DT_I32, 1),
        .log_probability =
            o->log_probability ? tensor_1d(&row->drawn.log_probability, DT_F32, 1) : tensor_none(),
        .params = {.greedy = o->temperature <= 0},
    };
}

tril_status sampler_create(struct sampler **out, struct op_context *ctx,
                           const struct sampler_options *o, int64_t vocab, struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct sampler *s = NULL;
    const struct sampler_row row = {
        .seed = (int64_t)o->seed,
        .options = {[SAMPLE_TEMPERATURE] = (float)o->temperature,
                    [SAMPLE_TOP_P] = (float)o->top_p,
                    [SAMPLE_MIN_P] = (float)o->min_p,
                    [SAMPLE_PENALTY] = (float)o->repetition_penalty},
        .top_k = (int32_t)(o->top_k < vocab ? o->top_k : 0),
        .drawn = {.log_probability = NAN},
    };
    *out = NULL;
    TRY(check("temperature", o->temperature, 0, 100, err));
    TRY(check("top_k", (double)o->top_k, 0, 1e9, err));
    TRY(check("top_p", o->top_p, 0, 1, err));
    TRY(check("min_p", o->min_p, 0, 1, err));
    TRY(check("repetition_penalty", o->repetition_penalty, 0.01, 100, err));
    s = calloc(1, sizeof *s);
    if (s && o->repetition_penalty != 1) {
        s->words = (vocab + 31) / 32;
        s->seen = calloc((size_t)s->words, sizeof *s->seen);
    }
    if (!s || (s->words && !s->seen)) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the sampler");
        goto done;
    }
    s->ctx = ctx;
    s->vocab = vocab;
    s->stale = s->seen != NULL;
    TRY(ctx->backend->alloc((void **)&s->row, (int64_t)sizeof row + 4 * s->words, false,
                            "the sampler", err));
    TRY(ctx->backend->upload(ctx, s->row, &row, sizeof row, err));
    view(s, o);
    *out = s;
    s = NULL;
done:
    sampler_free(s);
    return st;
}

void sampler_free(struct sampler *s) {
    if (!s)
        return;
    s->ctx->backend->release(s->row);
    free(s->seen);
    free(s);
}

void sampler_accept(struct sampler *s, int32_t token) {
    if (!s->seen || token < 0 || token >= s->vocab || sample_seen(s->seen, token))
        return;
    sample_mark(s->seen, token);
    s->stale = true;
}

tril_status sampler_rows(struct sampler *s, const struct sample_rows **out,
                         struct tril_error *err) {
    tril_status st = TRIL_OK;
    *out = &s->rows;
    if (s->stale)
        st = s->ctx->backend->upload(s->ctx, s->rows.seen.data, s->seen, 4 * s->words, err);
    s->stale = s->stale && st != TRIL_OK;
    return st;
}

tril_status sampler_draw(struct sampler *s, struct tensor logits, struct tril_error *err) {
    const struct sample_rows *rows;
    tril_status st = sampler_rows(s, &rows, err);
    return st == TRIL_OK ? sample(s->ctx, logits, rows, err) : st;
}

tril_status sampler_read(struct sampler *s, int32_t *token, double *log_probability,
                         struct tril_error *err) {
    struct drawn drawn;
    tril_status st = s->ctx->backend->download(s->ctx, &drawn, &s->row->drawn, sizeof drawn, err);
    if (st == TRIL_OK && drawn.status)
        st = error_set(err, TRIL_ERR_NUMERIC,
                       "the model's logits are not finite: its weights are damaged, or overflow "
                       "in this dtype");
    if (st != TRIL_OK)
        return st;
    *token = drawn.token;
    if (s->seen)
        sample_mark(s->seen, drawn.token); /* as the operation did */
    if (log_probability)
        *log_probability = (double)drawn.log_probability;
    return TRIL_OK;
}
