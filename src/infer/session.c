/* Sessions: a cache of one slot, a workspace for a chunk, the tokens held. */
#include "infer/session.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct session {
    struct model *model;
    struct kv_cache *cache;
    struct workspace *workspace;
    int64_t capacity, chunk;
    int32_t *tokens;
    int64_t count;
    float *logits;
    struct sampler *sampler;      /* the caller's; NULL: logits */
    struct session_stream stream; /* window 0: none */
};

static tril_status create(struct session **out, struct model *m, int64_t capacity, int64_t prefill,
                          enum dtype cache, const struct session_stream *stream,
                          const struct kv_retrieve *retrieve, struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct session *s = calloc(1, sizeof *s);
    *out = NULL;
    if (!s)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a session");
    s->model = m;
    if (stream)
        s->stream = *stream;
    s->capacity = capacity > 0 && capacity < m->config.context ? capacity : m->config.context;
    s->chunk = prefill > 0 ? prefill : 512;
    if (s->chunk > s->capacity)
        s->chunk = s->capacity;
    struct workspace_options options = {.max_tokens = s->chunk, .max_sequences = 1, .max_rows = 1};
    s->tokens = malloc((size_t)s->capacity * sizeof *s->tokens);
    s->logits = malloc((size_t)m->config.vocab * sizeof *s->logits);
    if (!s->tokens || !s->logits) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for a session");
        goto done;
    }
    if (stream)
        TRY(kv_cache_create_stream(&s->cache, m, 1, s->capacity, cache, err));
    else if (retrieve)
        TRY(kv_cache_create_retrieve(&s->cache, m, 1, s->capacity, cache, retrieve, err));
    else
        TRY(kv_cache_create(&s->cache, m, 1, s->capacity, s->chunk, cache, err));
    TRY(workspace_create(&s->workspace, m, &options, err));
    *out = s;
done:
    if (st != TRIL_OK)
        session_free(s);
    return st;
}

tril_status session_create(struct session **out, struct model *m, int64_t capacity, int64_t prefill,
                           struct tril_error *err) {
    return create(out, m, capacity, prefill, m->dtype, NULL, NULL, err);
}

tril_status session_create_as(struct session **out, struct model *m, int64_t capacity,
                              int64_t prefill, enum dtype cache, struct tril_error *err) {
    return create(out, m, capacity, prefill, cache, NULL, NULL, err);
}

tril_status session_create_retrieve(struct session **out, struct model *m, int64_t capacity,
                                    int64_t prefill, const struct kv_retrieve *r,
                                    struct tril_error *err) {
    return create(out, m, capacity, prefill, m->dtype, NULL, r, err);
}

double session_found(const struct session *s) {
    return s->cache->found > 0 ? s->cache->found_sum / s->cache->found : (double)NAN;
}

tril_status session_create_stream(struct session **out, struct model *m,
                                  const struct session_stream *stream, int64_t prefill,
                                  struct tril_error *err) {
    struct session_stream s = *stream;
    int64_t segment = 0, reach = 0;
    *out = NULL;
    for (int64_t l = 0; l < m->config.layers; l++) {
        const struct mixer_config *mixer = model_mixer(&m->config, l);
        if (mixer_recalls(mixer)) {
            segment = mixer->segment;
            reach = mixer->keep + segment > reach ? mixer->keep + segment : reach;
        }
    }
    if (s.stride == 0)
        s.stride = segment > 0 ? segment : (s.window + 15) / 16;
    if (s.window < 1 || s.sinks < 0 || s.stride < 1 || s.stride > s.window ||
        s.window > m->config.context - s.sinks)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a stream with a window of %lld, %lld sinks and a stride of %lld is not "
                         "possible: window and sinks fill at most the model's context of %lld, the "
                         "stride at most the window",
                         (long long)s.window, (long long)s.sinks, (long long)s.stride,
                         (long long)m->config.context);
    if (segment > 0 &&
        (s.sinks > 0 || s.stride % segment || s.window < reach + s.stride || s.window % segment))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the model's layers recall earlier segments: a stream of it needs --sinks "
                         "0, whole segments of %lld tokens as window and stride, and a window of "
                         "at least %lld",
                         (long long)segment,
                         (long long)((reach + s.stride + segment - 1) / segment * segment));
    return create(out, m, s.sinks + s.window, prefill, m->dtype, &s, NULL, err);
}

void session_free(struct session *s) {
    if (!s)
        return;
    workspace_free(s->workspace);
    kv_cache_free(s->cache);
    free(s->tokens);
    free(s->logits);
    free(s);
}

void session_set_sampler(struct session *s, struct sampler *sampler) {
    s->sampler = sampler;
}

struct op_context *session_context(const struct session *s) {
    return s->model->ctx;
}

/* Computes the next n tokens through the cache; if `last`, the logits of the last one, or a draw
 * from them. */
static tril_status append(struct session *s, const int32_t *tokens, int64_t n, bool last,
                          struct tril_error *err) {
    int32_t offsets[2] = {0, (int32_t)n}, slot = 0, row = (int32_t)(n - 1);
    struct batch b = {.tokens = n,
                      .sequences = 1,
                      .ids = tokens,
                      .offsets = offsets,
                      .cache = s->cache,
                      .slots = &slot,
                      .rows = &row,
                      .row_count = last ? 1 : 0};
    const struct sample_rows *draw = NULL;
    tril_status st = TRIL_OK;
    if (last && s->sampler)
        TRY(sampler_rows(s->sampler, &draw, err));
    if (draw)
        TRY(model_draw(s->model, s->workspace, &b, draw, err));
    else
        TRY(model_forward(s->model, s->workspace, &b, last ? s->logits : NULL, err));
    memmove(s->tokens + s->count, tokens, (size_t)n * sizeof *tokens);
    s->count += n;
done:
    return st;
}

/* Room for a token at least: the oldest of a full stream leave. */
static tril_status make_room(struct session *s, struct tril_error *err) {
    const struct session_stream *t = &s->stream;
    if (t->window == 0 || s->count < s->capacity)
        return TRIL_OK;
    tril_status st = kv_cache_evict(s->cache, s->model, 0, t->sinks, t->stride, err);
    if (st == TRIL_OK) {
        s->count -= t->stride;
        memmove(s->tokens + t->sinks, s->tokens + t->sinks + t->stride,
                (size_t)(s->count - t->sinks) * sizeof *s->tokens);
    }
    return st;
}

/* The next n tokens in chunks, which end where tokens leave. */
static tril_status append_all(struct session *s, const int32_t *tokens, int64_t n,
                              struct tril_error *err) {
    while (n > 0) {
        tril_status st = make_room(s, err);
        int64_t take = n < s->chunk ? n : s->chunk, room = s->capacity - s->count;
        take = take < room ? take : room;
        if (st == TRIL_OK)
            st = append(s, tokens, take, take == n, err);
        if (st != TRIL_OK)
            return st;
        tokens += take;
        n -= take;
    }
    return TRIL_OK;
}

tril_status session_sync(struct session *s, const int32_t *tokens, int64_t n, int64_t *reused,
                         struct tril_error *err) {
    int64_t common = 0;
    if (n < 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a session needs at least one token to start from");
    if (n > s->capacity && s->stream.window == 0)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%lld tokens do not fit into the context of %lld: shorten the text",
                         (long long)n, (long long)s->capacity);
    while (s->stream.window == 0 && common < s->count && common < n &&
           s->tokens[common] == tokens[common])
        common++;
    if (common == n) /* the last token's logits are always computed */
        common = n - 1;
    s->count = common = kv_cache_rewind(s->cache, 0, common);
    if (reused)
        *reused = common;
    return append_all(s, tokens + s->count, n - s->count, err);
}

tril_status session_step(struct session *s, int32_t token, struct tril_error *err) {
    if (s->stream.window == 0 && s->count >= s->capacity)
        return error_set(err, TRIL_ERR_ARGUMENT, "the context of %lld tokens is full",
                         (long long)s->capacity);
    return append_all(s, &token, 1, err);
}

const float *session_logits(const struct session *s) {
    return s->logits;
}

const int32_t *session_tokens(const struct session *s, int64_t *n) {
    *n = s->count;
    return s->tokens;
}

int64_t session_capacity(const struct session *s) {
    return s->stream.window ? INT64_MAX : s->capacity;
}

int64_t session_vocab(const struct session *s) {
    return s->model->config.vocab;
}
