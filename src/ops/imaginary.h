/* Memory that is not there: predicting what a run takes by the run itself.
 *
 * On an imaginary backend alloc gives addresses that nobody may touch, transfers do nothing, and an
 * operation ends where it asks for scratch: of every call only the request is noted
 * (op_context.planned). So the model's own passes say what they need, at any size and without the
 * device. */
#ifndef OPS_IMAGINARY_H
#define OPS_IMAGINARY_H

#include "ops/ops.h"

/* Gives a copy of a backend's table imaginary memory. Its operations must launch nothing while
 * ctx->measuring. */
void backend_imagine(struct backend *b);
/* A context on it, in which everything is planned; `stream`: what the operations' host code reads.
 */
void op_context_imagine(struct op_context *ctx, const struct backend *imaginary, void *stream);

#endif
