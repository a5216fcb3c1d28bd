/* Files: whole reads with a limit, read-only maps, atomic writes, directories. Every message names
 * the path. Writes are crash-safe: temporary name, fsync, rename, fsync of the folder. */
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* Reads a whole regular file (an empty one too) into a NUL-terminated buffer (free() it). Refuses
 * anything else, and files over `limit` bytes. */
tril_status file_read(const char *path, size_t limit, char **data, size_t *size,
                      struct tril_error *err);
/* Reads all of a stream (standard input) up to `limit` bytes. */
tril_status file_read_stream(int fd, const char *name, size_t limit, char **data, size_t *size,
                             struct tril_error *err);

struct file_map {
    const unsigned char *data; /* NULL for an empty file */
    size_t size;
    int64_t mtime_ns;
};
tril_status file_map_open(struct file_map *m, const char *path, struct tril_error *err);
void file_map_close(struct file_map *m);

/* An atomic write: file_writer_open gives a stream on "path.tmp-PID"; file_writer_commit flushes,
 * fsyncs, renames it over `path` and fsyncs the folder; file_writer_abort removes it. A full disk
 * is reported by write or commit, and `path` keeps its old content (and its permissions). A device
 * or a pipe ("/dev/null") is written in place. */
struct file_writer;
tril_status file_writer_open(struct file_writer **out, const char *path, struct tril_error *err);
tril_status file_writer_write(struct file_writer *w, const void *data, size_t size,
                              struct tril_error *err);
/* Overwrites bytes written before, at `offset` (a header whose counts are known at the end). */
tril_status file_writer_patch(struct file_writer *w, size_t offset, const void *data, size_t size,
                              struct tril_error *err);
tril_status file_writer_commit(struct file_writer *w, struct tril_error *err); /* frees w always */
void file_writer_abort(struct file_writer *w);                                 /* NULL is fine */
/* The three in one. */
tril_status file_write_atomic(const char *path, const void *data, size_t size,
                              struct tril_error *err);

bool path_exists(const char *path);
bool path_is_dir(const char *path);
bool path_same(const char *a, const char *b); /* both exist and are one file, by whatever names */
/* dir + "/" + name, malloc'ed; NULL only when out of memory. */
char *path_join(const char *dir, const char *name);
tril_status dir_make(const char *path, struct tril_error *err); /* with parents; existing is fine */
/* One holder at a time: a second is refused (ERR_IO). *lock is for dir_unlock; the end of the
 * process unlocks too. Where the file system has no locks, nothing is locked (-1). */
tril_status dir_lock(const char *path, int *lock, struct tril_error *err);
void dir_unlock(int lock);
tril_status dir_sync(const char *path, struct tril_error *err);
/* Removes a directory and the regular files in it (and one level below); refuses symlinks. */
tril_status dir_remove(const char *path, struct tril_error *err);
/* Names in a directory (without . and ..), sorted by bytes; free with dir_list_free. */
tril_status dir_list(const char *path, char ***names, size_t *count, struct tril_error *err);
void dir_list_free(char **names, size_t count);

#endif
