/* Writing, mapping and checking shards. */
#include "text/shard_file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/progress.h"
#include "text/tokenizer_impl.h"

_Static_assert(sizeof(struct shard_header) == 80, "the header has no padding");

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to tokenise a text");
}

uint64_t shard_marker_hash(const char *marker) {
    return marker ? hash_bytes(marker, strlen(marker), 1) | 1 : 0;
}

static uint64_t header_hash(const struct shard_header *h) {
    return hash_bytes(h, offsetof(struct shard_header, header_hash), 2);
}

static uint64_t ids_hash(const void *ids, size_t id_bytes, const uint64_t *documents, size_t n) {
    return hash_bytes(documents, n * sizeof *documents, hash_bytes(ids, id_bytes, 3));
}

/* ------------------------------------------------------------------ reading */

static tril_status check(struct shard *s, const char *path, bool check_ids,
                         struct tril_error *err) {
    const struct shard_header *h = (const struct shard_header *)s->map.data;
    size_t id_bytes, document_bytes, size;
    if (s->map.size < sizeof *h || memcmp(h->magic, SHARD_MAGIC, 8) != 0)
        return error_set(err, TRIL_ERR_FORMAT, "%s: this is no token shard", path);
    if (h->header_hash != header_hash(h) || (h->id_bytes != 2 && h->id_bytes != 4) ||
        h->vocab_size == 0)
        return error_set(err, TRIL_ERR_FORMAT, "%s: the token shard's header is damaged", path);
    if (!size_mul(h->tokens, h->id_bytes, &id_bytes) || id_bytes > s->map.size ||
        !size_mul(h->documents, 8, &document_bytes) || document_bytes > s->map.size ||
        (size = sizeof *h + (id_bytes + 7) / 8 * 8 + document_bytes) != s->map.size)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: the token shard is cut short or longer than its header says", path);
    s->header = h;
    s->ids = s->map.data + sizeof *h;
    s->documents = (const uint64_t *)(s->map.data + sizeof *h + (id_bytes + 7) / 8 * 8);
    for (uint64_t i = 0; i < h->documents; i++)
        if (s->documents[i] >= h->tokens || (i > 0 && s->documents[i] <= s->documents[i - 1]))
            return error_set(err, TRIL_ERR_FORMAT, "%s: the token shard's documents are damaged",
                             path);
    if (!check_ids)
        return TRIL_OK;
    if (h->ids_hash != ids_hash(s->ids, id_bytes, s->documents, h->documents))
        return error_set(err, TRIL_ERR_FORMAT, "%s: the token shard's ids are damaged", path);
    uint32_t greatest = 0;
    for (uint64_t i = 0; i < h->tokens; i++) {
        uint32_t id =
            h->id_bytes == 2 ? ((const uint16_t *)s->ids)[i] : ((const uint32_t *)s->ids)[i];
        greatest = id > greatest ? id : greatest;
    }
    if (greatest >= h->vocab_size)
        return error_set(err, TRIL_ERR_FORMAT, "%s: the token shard's ids go beyond its vocabulary",
                         path);
    return TRIL_OK;
}

tril_status shard_open(struct shard *s, const char *path, bool check_ids, struct tril_error *err) {
    *s = (struct shard){0};
    tril_status st = file_map_open(&s->map, path, err);
    if (st == TRIL_OK)
        st = check(s, path, check_ids, err);
    if (st != TRIL_OK)
        shard_close(s);
    return st;
}

void shard_close(struct shard *s) {
    file_map_close(&s->map);
    *s = (struct shard){0};
}

void shard_read(const struct shard *s, uint64_t start, size_t n, int32_t *out) {
    if (s->header->id_bytes == 2) {
        const uint16_t *p = (const uint16_t *)s->ids + start;
        for (size_t i = 0; i < n; i++)
            out[i] = p[i];
    } else {
        memcpy(out, (const uint32_t *)s->ids + start, n * sizeof *out);
    }
}

/* ------------------------------------------------------------------ writing */

/* The growing ids of a text and the documents in them. */
struct build {
    const struct tokenizer *t;
    int64_t eos;
    uint32_t *ids;
    size_t count, capacity;
    uint64_t *documents;
    size_t document_count, document_capacity;
    bool open; /* a document has begun */
};

static bool begin_document(struct build *b) {
    if (b->document_count == b->document_capacity) {
        size_t capacity = b->document_capacity ? 2 * b->document_capacity : 64;
        uint64_t *grown = realloc(b->documents, capacity * sizeof *grown);
        if (!grown)
            return false;
        b->documents = grown;
        b->document_capacity = capacity;
    }
    b->documents[b->document_count++] = b->count;
    b->open = true;
    return true;
}

/* Appends ids; an end-of-text token ends a document, the id after it begins one. */
static bool append(struct build *b, const uint32_t *ids, size_t n) {
    if (b->count + n > b->capacity) {
        size_t capacity = b->capacity + b->capacity / 2 + n + 1024;
        uint32_t *grown = realloc(b->ids, capacity * sizeof *grown);
        if (!grown)
            return false;
        b->ids = grown;
        b->capacity = capacity;
    }
    for (size_t i = 0; i < n; i++) {
        if (!b->open && !begin_document(b))
            return false;
        b->ids[b->count++] = ids[i];
        if ((int64_t)ids[i] == b->eos)
            b->open = false;
    }
    return true;
}

static tril_status encode_piece(struct build *b, const char *text, size_t size, bool special,
                                struct tril_error *err) {
    uint32_t *ids;
    size_t n;
    tril_status st = tokenizer_encode_parallel(b->t, text, size, special, &ids, &n, err);
    if (st == TRIL_OK && !append(b, ids, n))
        st = no_memory(err);
    if (st == TRIL_OK)
        free(ids);
    return st;
}

/* A stretch of text in pieces that give the ids of the whole, so that memory stays bounded. */
static tril_status encode_text(struct build *b, const char *text, size_t size, bool special,
                               struct progress *progress, const char *origin,
                               struct tril_error *err) {
    enum { PIECE = 32 << 20 };
    tril_status st = TRIL_OK;
    for (size_t at = 0; at < size && st == TRIL_OK;) {
        size_t end =
            size - at <= PIECE ? size : tokenizer_safe_cut(b->t, text, size, at + PIECE, special);
        st = encode_piece(b, text + at, end - at, special, err);
        at = end;
        if (progress)
            progress_update(progress, (int64_t)(text + at - origin), NULL);
    }
    return st;
}

/* The next line that equals the marker at or after `from`: its begin and end (with its newline). */
static bool find_marker(const char *text, size_t size, size_t from, const char *marker,
                        size_t *begin, size_t *end) {
    size_t n = strlen(marker);
    while (from + n <= size) {
        const char *hit = memmem(text + from, size - from, marker, n);
        if (!hit)
            return false;
        size_t at = (size_t)(hit - text), after = at + n;
        bool ends = after == size || text[after] == '\n' ||
                    (text[after] == '\r' && after + 1 < size && text[after + 1] == '\n');
        if ((at == 0 || text[at - 1] == '\n') && ends) {
            while (after < size && text[after] != '\n')
                after++;
            *begin = at;
            *end = after < size ? after + 1 : after;
            return true;
        }
        from = at + 1;
    }
    return false;
}

static tril_status encode_all(struct build *b, const char *text, size_t size, const char *marker,
                              struct progress *progress, struct tril_error *err) {
    uint32_t eos = (uint32_t)b->eos;
    size_t at = 0, begin, end;
    tril_status st = TRIL_OK;
    if (!marker || !*marker)
        return encode_text(b, text, size, !marker, progress, text, err);
    while (find_marker(text, size, at, marker, &begin, &end)) {
        TRY(encode_text(b, text + at, begin - at, false, progress, text, err));
        if (b->eos >= 0 && b->open && !append(b, &eos, 1))
            return no_memory(err);
        b->open = false;
        at = end;
    }
    TRY(encode_text(b, text + at, size - at, false, progress, text, err));
done:
    return st;
}

static tril_status write_file(const char *path, struct build *b, struct shard_header *h,
                              struct tril_error *err) {
    struct file_writer *w = NULL;
    static const char zeros[8] = {0};
    size_t id_bytes = b->count * h->id_bytes;
    tril_status st = TRIL_OK;
    if (h->id_bytes == 2) /* in place: 16-bit ids never overtake the 32-bit ones being read */
        for (size_t i = 0; i < b->count; i++) {
            uint16_t narrow = (uint16_t)b->ids[i];
            memcpy((char *)b->ids + 2 * i, &narrow, 2);
        }
    h->ids_hash = ids_hash(b->ids, id_bytes, b->documents, b->document_count);
    h->header_hash = header_hash(h);
    TRY(file_writer_open(&w, path, err));
    TRY(file_writer_write(w, h, sizeof *h, err));
    TRY(file_writer_write(w, b->ids, id_bytes, err));
    TRY(file_writer_write(w, zeros, (8 - id_bytes % 8) % 8, err));
    TRY(file_writer_write(w, b->documents, b->document_count * 8, err));
    st = file_writer_commit(w, err);
    w = NULL;
done:
    file_writer_abort(w);
    return st;
}

tril_status shard_write(const char *path, const struct file_map *text, const char *name,
                        const struct tokenizer *t, const char *marker, uint64_t content_hash,
                        bool quiet, struct tril_error *err) {
    struct build b = {.t = t, .eos = tokenizer_eos(t)};
    struct progress progress;
    char what[96];
    const char *slash = strrchr(name, '/');
    tril_status st = TRIL_OK;
    snprintf(what, sizeof what, "tokenising %.60s", slash ? slash + 1 : name);
    progress_start(&progress, what, (int64_t)text->size);
    TRY(encode_all(&b, (const char *)text->data, text->size, marker, quiet ? NULL : &progress,
                   err));
    struct shard_header h = {.id_bytes = tokenizer_vocab_size(t) <= 65536 ? 2 : 4,
                             .vocab_size = tokenizer_vocab_size(t),
                             .tokens = b.count,
                             .documents = b.document_count,
                             .text_bytes = text->size,
                             .tokenizer_hash = tokenizer_hash(t),
                             .content_hash = content_hash,
                             .marker_hash = shard_marker_hash(marker)};
    memcpy(h.magic, SHARD_MAGIC, 8);
    TRY(write_file(path, &b, &h, err));
done:
    progress_end(&progress);
    free(b.ids);
    free(b.documents);
    return st;
}
