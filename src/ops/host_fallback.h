/* Running an operation's reference for a backend whose memory is not the host's. */
#ifndef OPS_HOST_FALLBACK_H
#define OPS_HOST_FALLBACK_H

#include "ops/ops.h"

/* Downloads the arguments (memory that they share once), runs the reference, uploads what it wrote.
 * Waits for the backend; meant for what has no kernel, and for checking kernels. */
tril_status op_host_fallback(struct op_context *ctx, const struct op_info *info,
                             const struct tensor *args, const void *params, struct tril_error *err);

#endif
