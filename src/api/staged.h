/* Attention of a device on tensors in host memory: a backend whose attention operations copy their
 * arguments to the device, run there, and copy the results back. tril/attention.h is written over
 * operations on the caller's memory; through this backend it runs on a device unchanged. */
#ifndef API_STAGED_H
#define API_STAGED_H

#include "ops/ops.h"

struct staged {
    struct backend shim;      /* first: op_context.backend points here */
    struct op_context device; /* where the operations run */
};

/* Opens *ctx, whose tensors and scratch are the host's, over the device `name` (device_open). Gaps
 * between the rows of what is written stay as they are. `s` must not move, and must be zero where
 * staged_close may come without this. */
tril_status staged_open(struct staged *s, struct op_context *ctx, const char *name,
                        struct tril_error *err);
/* After op_context_free(ctx). */
void staged_close(struct staged *s);

#endif
