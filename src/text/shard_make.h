/* Text files into one shard file, on all threads. */
#ifndef TEXT_SHARD_MAKE_H
#define TEXT_SHARD_MAKE_H

#include "base/progress.h"
#include "text/shard_file.h"

/* What a shard is made of, and how. */
struct shard_source {
    const char *const *paths;
    size_t count;
    const struct tokenizer *tokenizer;
    const char *marker; /* as in dataset_options */
};

/* Hashes of the sources: sizes and times of change; contents; the marker and how it is used. */
tril_status shard_stamp(const struct shard_source *s, uint64_t *stamp, struct tril_error *err);
tril_status shard_content(const struct shard_source *s, uint64_t *content, struct tril_error *err);
uint64_t shard_marker(const struct shard_source *s);

/* Tokenises the sources into `path`, atomically. Refuses files that are no text. `progress` may be
 * NULL; *done counts bytes over several calls. */
tril_status shard_make(const struct shard_source *s, const char *path, struct progress *progress,
                       int64_t *done, struct tril_error *err);

#endif
