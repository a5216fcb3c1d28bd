#include "text/shard_file.h"

#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "text/tokenizer_impl.h"

#define HASHED_SIZE ((size_t)1 << 30) /* up to here a whole file is hashed when it is opened */
#define HEADER_HASHED offsetof(struct shard_header, header_hash)
#define HASH_BLOCK ((size_t)1 << 16)

_Static_assert(sizeof(struct shard_header) == 96, "the header has no padding");

/* A hash that can be fed in pieces: blocks of 64 KB, each hashed with the hash before it as seed.
 */
struct block_hash {
    uint64_t hash;
    size_t used;
    unsigned char block[HASH_BLOCK];
};

static void block_hash_add(struct block_hash *b, const void *data, size_t size) {
    const unsigned char *p = data;
    while (size) {
        size_t n = HASH_BLOCK - b->used < size ? HASH_BLOCK - b->used : size;
        memcpy(b->block + b->used, p, n);
        b->used += n;
        p += n;
        size -= n;
        if (b->used == HASH_BLOCK) {
            b->hash = hash_bytes(b->block, HASH_BLOCK, b->hash);
            b->used = 0;
        }
    }
}

static uint64_t block_hash_end(struct block_hash *b) {
    return b->used ? hash_bytes(b->block, b->used, b->hash) : b->hash;
}

static uint64_t data_hash(const unsigned char *p, size_t size) {
    uint64_t h = 0;
    for (size_t i = 0; i < size; i += HASH_BLOCK)
        h = hash_bytes(p + i, size - i < HASH_BLOCK ? size - i : HASH_BLOCK, h);
    return h;
}

static tril_status damaged(const char *name, const char *what, struct tril_error *err) {
    return error_set(err, TRIL_ERR_FORMAT, "%s: the token shard is damaged: %s", name, what);
}

static size_t table_offset(const struct shard_header *h) {
    return SHARD_DATA_OFFSET + (size_t)(h->token_count * h->token_bytes + 7) / 8 * 8;
}

static bool ids_in_range(const struct shard *s) {
    const uint16_t *narrow = s->tokens;
    const uint32_t *wide = s->tokens;
    uint32_t most = 0;
    if (s->header.token_bytes == 2)
        for (uint64_t i = 0; i < s->header.token_count; i++)
            most = narrow[i] > most ? narrow[i] : most;
    else
        for (uint64_t i = 0; i < s->header.token_count; i++)
            most = wide[i] > most ? wide[i] : most;
    return most < s->header.vocab_size;
}

tril_status shard_check(struct shard *s, const unsigned char *data, size_t size, const char *name,
                        struct tril_error *err) {
    struct shard_header *h = &s->header;
    if (size < SHARD_DATA_OFFSET || memcmp(data, SHARD_MAGIC, 8) != 0)
        return error_set(err, TRIL_ERR_FORMAT, "%s is not a token shard of tril", name);
    memcpy(h, data, sizeof *h);
    if (h->version != SHARD_VERSION)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "%s: token shard of version %u; this tril reads version %u", name,
                         h->version, SHARD_VERSION);
    if (hash_bytes(data, HEADER_HASHED, 0) != h->header_hash)
        return damaged(name, "its header does not have the hash that it states", err);
    /* From here on only a forger's header is wrong; it is not trusted all the same. */
    if ((h->token_bytes != 2 && h->token_bytes != 4) || h->vocab_size == 0 ||
        h->vocab_size > UINT32_MAX || (h->token_bytes == 2 && h->vocab_size > 65536))
        return damaged(name, "token size and vocabulary do not fit", err);
    if (h->token_count > size / h->token_bytes || h->document_count > size / sizeof *s->documents ||
        table_offset(h) > size ||
        (size - table_offset(h)) / sizeof *s->documents != h->document_count + 1 ||
        (size - table_offset(h)) % sizeof *s->documents != 0)
        return damaged(name, "it is shorter or longer than its header says", err);
    s->tokens = data + SHARD_DATA_OFFSET;
    s->documents = (const struct shard_document *)(const void *)(data + table_offset(h));
    const struct shard_document *d = s->documents, *last = d + h->document_count;
    if (last->token != h->token_count || last->byte != h->text_bytes ||
        (h->token_count && (h->document_count == 0 || d->token != 0 || d->byte != 0)))
        return damaged(name, "the table of documents does not cover the tokens", err);
    for (uint64_t i = 0; i < h->document_count; i++)
        if (d[i].token >= d[i + 1].token || d[i].byte > d[i + 1].byte)
            return damaged(name, "the table of documents is not in order", err);
    if (size <= HASHED_SIZE) {
        if (data_hash(data + SHARD_DATA_OFFSET, size - SHARD_DATA_OFFSET) != h->data_hash)
            return damaged(name, "its tokens do not have the hash that it states", err);
        if (!ids_in_range(s))
            return damaged(name, "it has ids outside its vocabulary", err);
    }
    return TRIL_OK;
}

tril_status shard_open(struct shard *s, const char *path, struct tril_error *err) {
    memset(s, 0, sizeof *s);
    tril_status st = file_map_open(&s->map, path, err);
    if (st != TRIL_OK)
        return st;
    st = shard_check(s, s->map.data, s->map.size, path, err);
    if (st != TRIL_OK)
        shard_close(s);
    return st;
}

void shard_close(struct shard *s) {
    file_map_close(&s->map);
    memset(s, 0, sizeof *s);
}

struct shard_writer {
    struct file_writer *file;
    struct shard_header header;
    struct shard_document *documents;
    size_t document_capacity;
    uint16_t *token_sizes; /* [vocab_size] decoded bytes of each token; special ones 0 */
    struct block_hash hash;
    uint16_t narrow[16384];
};

tril_status shard_writer_open(struct shard_writer **out, const char *path,
                              const struct tokenizer *t, struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct shard_writer *w = *out = calloc(1, sizeof *w);
    uint32_t vocab = tokenizer_vocab_size(t);
    if (!w || !(w->token_sizes = calloc(vocab, sizeof *w->token_sizes))) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path);
        goto done;
    }
    for (uint32_t i = 0; i < vocab; i++) {
        size_t size;
        tokenizer_token_bytes(t, i, &size);
        w->token_sizes[i] = (uint16_t)(tokenizer_is_special(t, i) ? 0
                                       : size > 65535             ? 65535
                                                                  : size);
    }
    memcpy(w->header.magic, SHARD_MAGIC, 8);
    w->header.version = SHARD_VERSION;
    w->header.token_bytes = vocab <= 65536 ? 2 : 4;
    w->header.vocab_size = vocab;
    w->header.tokenizer_hash = tokenizer_hash(t);
    TRY(file_writer_open(&w->file, path, err));
    static const unsigned char zeros[SHARD_DATA_OFFSET];
    TRY(file_writer_write(w->file, zeros, sizeof zeros, err));
done:
    if (st != TRIL_OK) {
        shard_writer_abort(w);
        *out = NULL;
    }
    return st;
}

tril_status shard_writer_document(struct shard_writer *w, struct tril_error *err) {
    struct shard_header *h = &w->header;
    if (h->document_count && w->documents[h->document_count - 1].token == h->token_count)
        return TRIL_OK; /* the one before has no tokens */
    if (h->document_count + 1 >= w->document_capacity) {
        size_t capacity = w->document_capacity * 2 + 64;
        struct shard_document *documents = realloc(w->documents, capacity * sizeof *documents);
        if (!documents)
            return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a table of documents");
        w->documents = documents;
        w->document_capacity = capacity;
    }
    w->documents[h->document_count++] = (struct shard_document){h->token_count, h->text_bytes};
    return TRIL_OK;
}

uint64_t shard_writer_count(const struct shard_writer *w) {
    return w->header.token_count;
}

static tril_status put(struct shard_writer *w, const void *data, size_t size,
                       struct tril_error *err) {
    block_hash_add(&w->hash, data, size);
    return file_writer_write(w->file, data, size, err);
}

tril_status shard_writer_tokens(struct shard_writer *w, const uint32_t *ids, size_t n,
                                struct tril_error *err) {
    const size_t step = sizeof w->narrow / sizeof *w->narrow;
    tril_status st = TRIL_OK;
    for (size_t i = 0; i < n && st == TRIL_OK; i += step) {
        size_t m = n - i < step ? n - i : step;
        for (size_t k = 0; k < m; k++)
            w->header.text_bytes += w->token_sizes[ids[i + k]];
        if (w->header.token_bytes == 2) {
            for (size_t k = 0; k < m; k++)
                w->narrow[k] = (uint16_t)ids[i + k];
            st = put(w, w->narrow, m * sizeof *w->narrow, err);
        } else {
            st = put(w, ids + i, m * sizeof *ids, err);
        }
        w->header.token_count += m;
    }
    return st;
}

tril_status shard_writer_commit(struct shard_writer *w, uint64_t marker_hash, uint64_t stamp,
                                uint64_t content_hash, struct tril_error *err) {
    struct shard_header *h = &w->header;
    static const unsigned char zeros[8];
    tril_status st;
    size_t tail = (size_t)(h->token_count * h->token_bytes) % 8;
    h->marker_hash = marker_hash;
    h->stamp = stamp;
    h->content_hash = content_hash;
    if (h->document_count && w->documents[h->document_count - 1].token == h->token_count)
        h->document_count--; /* a last document without tokens */
    const struct shard_document end = {h->token_count, h->text_bytes};
    if (tail)
        TRY(put(w, zeros, 8 - tail, err));
    TRY(put(w, w->documents, (size_t)h->document_count * sizeof *w->documents, err));
    TRY(put(w, &end, sizeof end, err));
    h->data_hash = block_hash_end(&w->hash);
    h->header_hash = hash_bytes(h, HEADER_HASHED, 0);
    TRY(file_writer_patch(w->file, 0, h, sizeof *h, err));
    st = file_writer_commit(w->file, err);
    w->file = NULL;
done:
    shard_writer_abort(w);
    return st;
}

void shard_writer_abort(struct shard_writer *w) {
    if (!w)
        return;
    file_writer_abort(w->file);
    free(w->documents);
    free(w->token_sizes);
    free(w);
}
