/* What the reference and every backend share of linear attention: the arguments unpacked and
 * checked once. */
#ifndef OPS_LINEAR_ATTENTION_H
#define OPS_LINEAR_ATTENTION_H

#include "ops/ops.h"

/* A forward or backward call. Optional tensors have data NULL. */
struct linear_attention_call {
    struct tensor q, k, v, state, o, next;
    struct tensor dout, dnext, dq, dk, dv, dstate; /* backward only */
    const int32_t *q_offsets;
    int64_t sequences, rows, heads, kv_heads, width; /* S, N, H, K, d */
    int64_t longest;                                 /* sequence */
    bool causal;
};

/* Unpacks `args` (host memory) in the order of the operation's description and checks what the
 * shapes alone do not tell: H a multiple of K, d at most 256, offsets ascending within the rows. */
tril_status linear_attention_unpack_forward(struct linear_attention_call *c,
                                            const struct tensor *args, const void *params,
                                            struct tril_error *err);
tril_status linear_attention_unpack_backward(struct linear_attention_call *c,
                                             const struct tensor *args, const void *params,
                                             struct tril_error *err);

#endif
