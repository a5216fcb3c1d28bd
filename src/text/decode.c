/* Decoding: the bytes of the tokens one after another; and as they come, cut between characters. */
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "text/tokenizer_impl.h"

static tril_status token_of(const struct tokenizer *t, uint32_t id, bool skip_special,
                            const unsigned char **bytes, size_t *size, struct tril_error *err) {
    *bytes = tokenizer_token_bytes(t, id, size);
    if (!*bytes)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%u is no token id of this tokenizer, whose ids end at %u", id,
                         t->vocab_size - 1);
    if (skip_special && t->flags[id] & TOKEN_SPECIAL)
        *size = 0;
    return TRIL_OK;
}

tril_status tokenizer_decode(const struct tokenizer *t, const uint32_t *ids, size_t n,
                             bool skip_special, char **text, size_t *size, struct tril_error *err) {
    const unsigned char *bytes;
    size_t total = 1, part;
    *text = NULL;
    *size = 0;
    for (size_t i = 0; i < n; i++) {
        tril_status st = token_of(t, ids[i], skip_special, &bytes, &part, err);
        if (st != TRIL_OK)
            return st;
        if (!size_add(total, part, &total))
            return error_set(err, TRIL_ERR_MEMORY, "the text of %zu ids is too long", n);
    }
    char *p = *text = malloc(total);
    if (!p)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the text of %zu ids", n);
    for (size_t i = 0; i < n; i++) {
        token_of(t, ids[i], skip_special, &bytes, &part, NULL);
        memcpy(p, bytes, part);
        p += part;
    }
    *p = '\0';
    *size = total - 1;
    return TRIL_OK;
}

void tokenizer_stream_begin(struct tokenizer_stream *s, const struct tokenizer *t,
                            bool skip_special) {
    memset(s, 0, sizeof *s);
    s->tokenizer = t;
    s->skip_special = skip_special;
}

tril_status tokenizer_stream_next(struct tokenizer_stream *s, uint32_t id, const char **text,
                                  size_t *size, struct tril_error *err) {
    const unsigned char *bytes;
    size_t part;
    *text = "";
    *size = 0;
    tril_status st = token_of(s->tokenizer, id, s->skip_special, &bytes, &part, err);
    if (st != TRIL_OK)
        return st;
    if (part + 8 > s->capacity) {
        char *buffer = realloc(s->buffer, 2 * part + 64);
        if (!buffer)
            return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a token's text");
        s->buffer = buffer;
        s->capacity = 2 * part + 64;
    }
    memcpy(s->buffer, s->pending, s->pending_size);
    memcpy(s->buffer + s->pending_size, bytes, part);
    size_t have = s->pending_size + part;
    s->pending_size = utf8_incomplete_tail((const unsigned char *)s->buffer, have);
    have -= s->pending_size;
    memcpy(s->pending, s->buffer + have, s->pending_size);
    s->buffer[have] = '\0';
    *text = s->buffer;
    *size = have;
    return TRIL_OK;
}

void tokenizer_stream_end(struct tokenizer_stream *s, const char **text, size_t *size) {
    *text = "";
    *size = s->pending_size;
    if (s->pending_size) {
        memcpy(s->buffer, s->pending, s->pending_size);
        s->buffer[s->pending_size] = '\0';
        *text = s->buffer;
    }
    s->pending_size = 0;
}

void tokenizer_stream_free(struct tokenizer_stream *s) {
    free(s->buffer);
    s->buffer = NULL;
    s->capacity = 0;
}
