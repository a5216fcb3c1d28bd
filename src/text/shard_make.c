#include "text/shard_make.h"

#include <stdlib.h>
#include <string.h>

#include "base/threads.h"
#include "text/files.h"
#include "text/tokenizer_impl.h"

#define PIECE ((size_t)1 << 19) /* bytes that one thread encodes at a time */
#define PIECES_AT_ONCE 128

/* A stretch of text that is encoded alone. */
struct piece {
    const unsigned char *text;
    size_t size;
    bool document; /* it begins one */
    uint32_t *ids;
    size_t n;
    tril_status st;
    struct tril_error err;
};

struct maker {
    const struct shard_source *source;
    struct shard_writer *writer;
    int64_t eos;
    bool special; /* special tokens' strings in the text are those tokens */
    bool ended;   /* the last token written was the end-of-text token */
    size_t count;
    struct piece pieces[PIECES_AT_ONCE];
};

static void encode_pieces(void *arg, int64_t begin, int64_t end, int worker) {
    struct maker *m = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        struct piece *p = &m->pieces[i];
        p->st = tokenizer_encode(m->source->tokenizer, (const char *)p->text, p->size, m->special,
                                 &p->ids, &p->n, &p->err);
    }
}

/* Writes ids; after an end-of-text token among them a document begins. */
static tril_status write_ids(struct maker *m, const uint32_t *ids, size_t n,
                             struct tril_error *err) {
    tril_status st = TRIL_OK;
    size_t from = 0;
    for (size_t i = 0; m->eos >= 0 && i < n && st == TRIL_OK; i++) {
        if (ids[i] != (uint32_t)m->eos)
            continue;
        st = shard_writer_tokens(m->writer, ids + from, i + 1 - from, err);
        if (st == TRIL_OK)
            st = shard_writer_document(m->writer, err);
        from = i + 1;
    }
    if (st == TRIL_OK)
        st = shard_writer_tokens(m->writer, ids + from, n - from, err);
    if (n)
        m->ended = m->eos >= 0 && ids[n - 1] == (uint32_t)m->eos;
    return st;
}

/* Encodes and writes the pieces gathered so far. */
static tril_status flush(struct maker *m, struct tril_error *err) {
    tril_status st = TRIL_OK;
    parallel_for((int64_t)m->count, 1, encode_pieces, m);
    for (size_t i = 0; i < m->count; i++) {
        struct piece *p = &m->pieces[i];
        if (st == TRIL_OK && p->st != TRIL_OK) {
            st = p->st;
            if (err)
                *err = p->err;
        }
        if (st == TRIL_OK &&
            p->document) { /* the token goes between documents, not behind the last */
            uint32_t eos = (uint32_t)m->eos;
            if (m->eos >= 0 && !m->ended && shard_writer_count(m->writer))
                st = write_ids(m, &eos, 1, err);
            if (st == TRIL_OK)
                st = shard_writer_document(m->writer, err);
        }
        if (st == TRIL_OK)
            st = write_ids(m, p->ids, p->n, err);
        free(p->ids);
        p->ids = NULL;
    }
    m->count = 0;
    return st;
}

/* A document, or with markers of the first kind a whole file, in pieces. */
static tril_status add_text(struct maker *m, const unsigned char *text, size_t size,
                            struct tril_error *err) {
    const struct tokenizer *t = m->source->tokenizer;
    tril_status st = TRIL_OK;
    for (size_t at = 0; at < size && st == TRIL_OK;) {
        size_t n = size - at;
        if (n > PIECE)
            n = tokenizer_safe_cut(t, text + at, n, PIECE, m->special);
        m->pieces[m->count++] = (struct piece){.text = text + at, .size = n, .document = at == 0};
        at += n;
        if (m->count == PIECES_AT_ONCE)
            st = flush(m, err);
    }
    return st;
}

/* Documents between lines that equal the marker. */
static tril_status add_marked(struct maker *m, const unsigned char *text, size_t size,
                              const char *marker, struct tril_error *err) {
    size_t length = strlen(marker), from = 0;
    tril_status st = TRIL_OK;
    for (size_t at = 0; at < size && st == TRIL_OK;) {
        const unsigned char *eol = memchr(text + at, '\n', size - at);
        size_t end = eol ? (size_t)(eol - text) : size, next = eol ? end + 1 : size;
        if (end > at && text[end - 1] == '\r')
            end--;
        if (end - at == length && memcmp(text + at, marker, length) == 0) {
            st = add_text(m, text + from, at - from, err);
            from = next;
        }
        at = next;
    }
    return st == TRIL_OK ? add_text(m, text + from, size - from, err) : st;
}

uint64_t shard_marker(const struct shard_source *s) {
    int64_t eos = tokenizer_eos(s->tokenizer);
    return s->marker ? hash_bytes(s->marker, strlen(s->marker), 11) : 12 + (uint64_t)eos;
}

tril_status shard_stamp(const struct shard_source *s, uint64_t *stamp, struct tril_error *err) {
    *stamp = 21;
    for (size_t i = 0; i < s->count; i++) {
        struct file_map map;
        tril_status st = file_map_open(&map, s->paths[i], err);
        if (st != TRIL_OK)
            return st;
        uint64_t what[2] = {map.size, (uint64_t)map.mtime_ns};
        *stamp = hash_bytes(what, sizeof what, *stamp);
        file_map_close(&map);
    }
    return TRIL_OK;
}

tril_status shard_content(const struct shard_source *s, uint64_t *content, struct tril_error *err) {
    *content = 22;
    for (size_t i = 0; i < s->count; i++) {
        struct file_map map;
        tril_status st = file_map_open(&map, s->paths[i], err);
        if (st != TRIL_OK)
            return st;
        *content = hash_bytes(map.data, map.size, *content);
        file_map_close(&map);
    }
    return TRIL_OK;
}

tril_status shard_make(const struct shard_source *s, const char *path, struct progress *progress,
                       int64_t *done, struct tril_error *err) {
    tril_status st;
    uint64_t stamp, content;
    struct file_map map = {0};
    struct maker *m = calloc(1, sizeof *m);
    if (!m)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to tokenise text");
    m->source = s;
    m->eos = tokenizer_eos(s->tokenizer);
    m->special = s->marker == NULL;
    TRY(shard_stamp(s, &stamp, err));
    TRY(shard_content(s, &content, err));
    TRY(shard_writer_open(&m->writer, path, s->tokenizer, err));
    for (size_t i = 0; i < s->count; i++) {
        TRY(file_map_open(&map, s->paths[i], err));
        TRY(text_check(s->paths[i], map.data, map.size, err));
        TRY(s->marker && *s->marker ? add_marked(m, map.data, map.size, s->marker, err)
                                    : add_text(m, map.data, map.size, err));
        TRY(flush(m, err));
        *done += (int64_t)map.size;
        if (progress)
            progress_update(progress, *done, NULL);
        file_map_close(&map);
    }
    st = shard_writer_commit(m->writer, shard_marker(s), stamp, content, err);
    m->writer = NULL;
done:
    file_map_close(&map);
    for (size_t i = 0; i < m->count; i++)
        free(m->pieces[i].ids);
    shard_writer_abort(m->writer);
    free(m);
    return st;
}
