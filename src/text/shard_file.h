/* The shard file: a header, the tokens, a table of documents. All numbers little-endian.
 *
 *   offset 0     header, 4096 bytes (struct shard_header, then zeros)
 *   4096         token_count ids of token_bytes (2 or 4) each
 *   8-aligned    document_count + 1 rows {first token, bytes before it}, both 64-bit; the last row
 * is {token_count, text_bytes}
 *
 * so that numpy.memmap(path, '<u2', offset=4096, shape=token_count) reads it. */
#ifndef TEXT_SHARD_FILE_H
#define TEXT_SHARD_FILE_H

#include "base/file.h"
#include "text/tokenizer.h"

#define SHARD_MAGIC "TRILSHRD"
#define SHARD_VERSION 1u
#define SHARD_DATA_OFFSET 4096u

struct shard_header {
    char magic[8];
    uint32_t version;
    uint32_t token_bytes; /* 2 or 4 */
    uint64_t vocab_size;  /* ids are below this */
    uint64_t token_count;
    uint64_t document_count; /* at least 1 where there are tokens */
    uint64_t text_bytes;     /* decoded, without special tokens */
    uint64_t tokenizer_hash;
    uint64_t marker_hash;  /* how documents were separated */
    uint64_t stamp;        /* hash of the sources' sizes and times of change */
    uint64_t content_hash; /* hash of the sources' bytes */
    uint64_t data_hash;    /* hash of all that follows the header's 4096 bytes */
    uint64_t header_hash;  /* hash of all fields above */
};

struct shard_document {
    uint64_t token, byte; /* where it begins: token, and decoded bytes before it */
};

struct shard {
    struct shard_header header;
    const void *tokens;                     /* uint16_t or uint32_t [token_count] */
    const struct shard_document *documents; /* [document_count + 1] */
    struct file_map map;
};

/* Checks `size` bytes as a shard: header, sizes, table, hashes; ids are checked where the file is
 * small enough to be hashed (up to 1 GB; above, shard_token keeps them below vocab_size). `name` is
 * used in messages. `data` stays borrowed. */
tril_status shard_check(struct shard *s, const unsigned char *data, size_t size, const char *name,
                        struct tril_error *err);
/* Maps and checks a file. */
tril_status shard_open(struct shard *s, const char *path, struct tril_error *err);
void shard_close(struct shard *s);

/* Token i; never vocab_size or above, even in a damaged file. */
static inline uint32_t shard_token(const struct shard *s, uint64_t i) {
    uint32_t id = s->header.token_bytes == 2 ? ((const uint16_t *)s->tokens)[i]
                                             : ((const uint32_t *)s->tokens)[i];
    return id < s->header.vocab_size ? id : 0;
}

/* Writing one: begin, tokens and documents as they come, commit (which frees the writer always). */
struct shard_writer;
tril_status shard_writer_open(struct shard_writer **out, const char *path,
                              const struct tokenizer *t, struct tril_error *err);
/* The next token begins a document. */
tril_status shard_writer_document(struct shard_writer *w, struct tril_error *err);
tril_status shard_writer_tokens(struct shard_writer *w, const uint32_t *ids, size_t n,
                                struct tril_error *err);
uint64_t shard_writer_count(const struct shard_writer *w); /* tokens so far */
tril_status shard_writer_commit(struct shard_writer *w, uint64_t marker_hash, uint64_t stamp,
                                uint64_t content_hash, struct tril_error *err);
void shard_writer_abort(struct shard_writer *w); /* NULL is fine */

#endif
