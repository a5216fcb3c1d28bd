/* From public descriptions of a model to the rooms' own. */
#ifndef API_SOURCE_H
#define API_SOURCE_H

#include "model/model.h"
#include "tril/inspect.h"

/* The configuration that a source names, overridden and checked. */
tril_status source_config(const struct tril_model_source *s, struct model_config *c,
                          struct tril_error *err);
/* The public description of a configuration. */
void model_info_fill(struct tril_model_info *info, const struct model_config *c);
/* "none" (NULL), "selective", "full". */
tril_status recompute_parse(enum recompute *out, const char *name, struct tril_error *err);
/* "fp32", "bf16", "q8" (8-bit integers with a scale for each row and head); NULL: `usual`. */
tril_status cache_dtype_parse(enum dtype *out, const char *name, enum dtype usual,
                              struct tril_error *err);

#endif
