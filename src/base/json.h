/* JSON, read strictly, through Jansson: UTF-8 only, duplicate keys refused, depth limited to 64,
 * trailing garbage refused, files size-limited. Getters that check type and range and name the
 * field in their message, so that every loader refuses in the same words. */
#ifndef BASE_JSON_H
#define BASE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define JSON_DEPTH_LIMIT 64

/* Parses `size` bytes; `name` (a path) is named in errors with line and column. A text with an
 * integer beyond 64 bits (Hugging Face's model_max_length) is read with all integers as reals:
 * take them through json_get_int. The caller owns *out (json_decref). */
tril_status json_parse(json_t **out, const char *text, size_t size, const char *name,
                       struct tril_error *err);
tril_status json_read(json_t **out, const char *path, size_t limit, struct tril_error *err);
/* Writes pretty-printed (indent 2, keys in insertion order) atomically. */
tril_status json_write(const json_t *root, const char *path, struct tril_error *err);

/* Whole reals (3.0) are integers too. Optional fields: absent or null leaves *out alone and is
 * fine; a wrong type or a value outside [min, max] is ERR_FORMAT. `where` is the file's name. */
tril_status json_get_int(const json_t *obj, const char *key, int64_t min, int64_t max, int64_t *out,
                         const char *where, struct tril_error *err);
tril_status json_get_double(const json_t *obj, const char *key, double min, double max, double *out,
                            const char *where, struct tril_error *err);
tril_status json_get_bool(const json_t *obj, const char *key, bool *out, const char *where,
                          struct tril_error *err);
/* Borrowed from obj; lives as long as it. Text with a NUL inside is refused. */
tril_status json_get_string(const json_t *obj, const char *key, const char **out, const char *where,
                            struct tril_error *err);

#endif
