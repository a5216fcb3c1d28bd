/* Backends by name: the one place that knows which were built. */
#ifndef API_DEVICE_H
#define API_DEVICE_H

#include "ops/ops.h"

/* "cpu" (NULL means it), "cuda" or "reference". Free with op_context_free. */
tril_status device_open(struct op_context *ctx, const char *name, struct tril_error *err);

#endif
