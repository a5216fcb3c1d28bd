/* Flash attention for Hopper (compute capability 9.0): what attention.cu hands over when the call
 * is one that these kernels take. docs/cuda.md, "Hopper attention". */
#ifndef CUDA_ATTENTION_HOPPER_H
#define CUDA_ATTENTION_HOPPER_H

#ifdef __cplusplus
extern "C" {
#endif

#include "ops/ops.h"

/* Whether the kernels take the call: a Hopper GPU and code for it; all of q, k, v, o (and the
 * gradients) bf16, or all fp16, with 16-byte aligned heads of 64 or 128 channels; scale above 0;
 * no pages, slopes, bias, sink, softcap, dropout or i8; and one visibility rule for all heads that
 * is causal, full, or a window. `args` in the order of the operation. Not for few rows (params
 * max_q of 1 to 16): those want the keys split over the GPU. */
bool attention_hopper_takes_forward(const struct op_context *ctx, const struct tensor *args,
                                    const struct attention_params *p);
bool attention_hopper_takes_backward(const struct op_context *ctx, const struct tensor *args,
                                     const struct attention_params *p);

/* The operations, for calls that are taken. They ask for their scratch first. */
tril_status attention_hopper_forward(struct op_context *ctx, const struct tensor *args,
                                     const struct attention_params *p, struct tril_error *err);
tril_status attention_hopper_backward(struct op_context *ctx, const struct tensor *args,
                                      const struct attention_params *p, struct tril_error *err);

#ifdef __cplusplus
}
#endif

#endif
