/* safetensors: reading by memory map, writing atomically, single files and sharded models.
 *
 *   u64 header length | JSON header {name: {dtype, shape, data_offsets}} | data
 *
 * Every rule of docs/formats.md is checked before anything is used. */
#ifndef FORMATS_SAFETENSORS_H
#define FORMATS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/error.h"

#define ST_MAX_RANK 8

struct st_tensor {
    const char *name;
    enum dtype dtype;
    int rank;
    int64_t shape[ST_MAX_RANK];
    const void *data; /* in the map: may be unaligned */
    size_t bytes;
    const char *file; /* which file it lies in */
};

struct safetensors; /* one file, or all shards of an index */

/* Opens FILE.safetensors, or a directory: model.safetensors, else model.safetensors.index.json with
 * its shards (names must stay inside the directory). */
tril_status safetensors_open(struct safetensors **out, const char *path, struct tril_error *err);
void safetensors_close(struct safetensors *s); /* NULL is fine */
size_t safetensors_count(const struct safetensors *s);
const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i); /* by name order */
const struct st_tensor *safetensors_find(const struct safetensors *s,
                                         const char *name); /* or NULL */
/* Value of a string in __metadata__, or NULL. */
const char *safetensors_metadata(const struct safetensors *s, const char *key);
/* Tells the kernel that a tensor's pages are no longer needed. */
void safetensors_forget(const struct safetensors *s, const struct st_tensor *t);

/* Writing: declare every tensor, then give their data in the order declared, in pieces of any size.
 * The file appears under its name only on finish. */
struct st_writer;
struct st_declare {
    const char *name;
    enum dtype dtype;
    int rank;
    int64_t shape[ST_MAX_RANK];
};
/* metadata: `pairs` key/value strings, 2 * pairs pointers; may be NULL. */
tril_status st_writer_open(struct st_writer **out, const char *path,
                           const struct st_declare *tensors, size_t count,
                           const char *const *metadata, size_t pairs, struct tril_error *err);
tril_status st_writer_write(struct st_writer *w, const void *data, size_t bytes,
                            struct tril_error *err);
tril_status st_writer_finish(struct st_writer *w, struct tril_error *err); /* frees w always */
void st_writer_abort(struct st_writer *w);                                 /* NULL is fine */

#endif
