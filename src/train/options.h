/* Training options as JSON: written into every checkpoint, read back by --resume. */
#ifndef TRAIN_OPTIONS_H
#define TRAIN_OPTIONS_H

#include <jansson.h>

#include "base/error.h"
#include "tril/train.h"

struct tril_train_options train_options_defaults(void);
/* A new object with every field (strings that are NULL are left out); NULL when out of memory. */
json_t *train_options_to_json(const struct tril_train_options *o);
/* Fields that are absent keep the defaults. Strings and lists point into `json`, except the array
 * of data paths, which is malloc'ed: *paths, to be freed by the caller. */
tril_status train_options_from_json(struct tril_train_options *o, const json_t *json,
                                    const char ***paths, const char *where, struct tril_error *err);
/* A resumed run must see the same data in the same order with the same arithmetic: names the first
 * option in which `now` differs from `saved`. */
tril_status train_options_check_resume(const json_t *saved, const json_t *now, const char *where,
                                       struct tril_error *err);
/* Ranges and contradictions; names the option. */
tril_status train_options_check(const struct tril_train_options *o, struct tril_error *err);

/* "none", "optimizer", "activations" or "all". */
tril_status train_offload_parse(const char *name, bool *moments, bool *activations,
                                struct tril_error *err);

#endif
