/* One shard: the ids of one text file, in a file that is mapped. docs/tokenizer.md describes it.
 *
 *   header (80 bytes) | ids, u16 or u32, padded to 8 bytes | documents: u64 first token of each */
#ifndef TEXT_SHARD_FILE_H
#define TEXT_SHARD_FILE_H

#include "base/file.h"
#include "text/shard.h"

#define SHARD_MAGIC "trilshd1"

struct shard_header {
    char magic[8];
    uint32_t id_bytes;   /* 2 or 4 */
    uint32_t vocab_size; /* every id is below it */
    uint64_t tokens, documents;
    uint64_t text_bytes;     /* of the file it was made from */
    uint64_t tokenizer_hash; /* tokenizer_hash() */
    uint64_t content_hash;   /* of the text's bytes */
    uint64_t marker_hash;    /* of the marker, 0 for none */
    uint64_t ids_hash;       /* of the ids and documents as they lie in the file */
    uint64_t header_hash;    /* of the 72 bytes before */
};

struct shard {
    struct file_map map;
    const struct shard_header *header;
    const void *ids;
    const uint64_t *documents;
};

/* Maps and checks: sizes against the file, hashes of header and (check_ids) ids, ids against the
 * vocabulary. ERR_FORMAT says what is wrong. */
tril_status shard_open(struct shard *s, const char *path, bool check_ids, struct tril_error *err);
void shard_close(struct shard *s);
/* Ids [start, start + n) as int32. */
void shard_read(const struct shard *s, uint64_t start, size_t n, int32_t *out);
/* Tokenises a text file into a shard file, atomically. marker as in struct dataset_options. */
tril_status shard_write(const char *path, const struct file_map *text, const char *name,
                        const struct tokenizer *t, const char *marker, uint64_t content_hash,
                        bool quiet, struct tril_error *err);
uint64_t shard_marker_hash(const char *marker);

#endif
