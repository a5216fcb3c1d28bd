/* Sessions: a cache of one slot, a workspace for a chunk, the tokens held. */
#include "infer/session.h"

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
};

tril_status session_create(struct session **out, struct model *m, int64_t capacity, int64_t prefill,
                           struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct session *s = calloc(1, sizeof *s);
    *out = NULL;
    if (!s)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a session");
    s->model = m;
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
    TRY(kv_cache_create(&s->cache, m, 1, s->capacity, m->dtype, err));
    TRY(workspace_create(&s->workspace, m, &options, err));
    *out = s;
done:
    if (st != TRIL_OK)
        session_free(s);
    return st;
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

/* Computes the next n tokens through the cache; logits of the last one if `last`. */
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
    tril_status st = model_forward(s->model, s->workspace, &b, last ? s->logits : NULL, err);
    if (st == TRIL_OK) {
        memmove(s->tokens + s->count, tokens, (size_t)n * sizeof *tokens);
        s->count += n;
    }
    return st;
}

tril_status session_sync(struct session *s, const int32_t *tokens, int64_t n, int64_t *reused,
                         struct tril_error *err) {
    int64_t common = 0;
    if (n < 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a session needs at least one token to start from");
    if (n > s->capacity)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%lld tokens do not fit into the context of %lld: shorten the text",
                         (long long)n, (long long)s->capacity);
    while (common < s->count && common < n && s->tokens[common] == tokens[common])
        common++;
    if (common == n) /* the last token's logits are always computed */
        common = n - 1;
    s->count = common = kv_cache_rewind(s->cache, 0, common);
    if (reused)
        *reused = common;
    while (s->count < n) {
        int64_t rest = n - s->count, take = rest < s->chunk ? rest : s->chunk;
        tril_status st = append(s, tokens + s->count, take, take == rest, err);
        if (st != TRIL_OK)
            return st;
    }
    return TRIL_OK;
}

tril_status session_step(struct session *s, int32_t token, struct tril_error *err) {
    if (s->count >= s->capacity)
        return error_set(err, TRIL_ERR_ARGUMENT, "the context of %lld tokens is full",
                         (long long)s->capacity);
    return append(s, &token, 1, true, err);
}

const float *session_logits(const struct session *s) {
    return s->logits;
}

const int32_t *session_tokens(const struct session *s, int64_t *n) {
    *n = s->count;
    return s->tokens;
}

int64_t session_capacity(const struct session *s) {
    return s->capacity;
}

int64_t session_vocab(const struct session *s) {
    return s->model->config.vocab;
}
