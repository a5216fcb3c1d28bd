/* What the reference and every backend share of relative attention: the arguments unpacked and
 * checked once, and what a row sees. */
#ifndef OPS_RELATIVE_ATTENTION_H
#define OPS_RELATIVE_ATTENTION_H

#include "ops/ops.h"

/* A forward or backward call. Optional tensors have data NULL. */
struct relative_attention_call {
    struct tensor q, k, v, past_k, past_v, u, w, r, o, lse;
    struct tensor dout, dq, dk, dv, dpast_k, dpast_v, du, dw, dr; /* backward only */
    const int32_t *q_offsets, *past_start, *past_length;
    int64_t sequences, rows, heads, kv_heads, width, distances; /* S, N, H, K, d, M */
    int64_t longest_q, longest;                                 /* own rows; with the past */
    struct relative_attention_params params;
};

/* Unpacks `args` (host memory) in the order of the operation's description and checks what the
 * shapes alone do not tell: heads, offsets, past rows inside past_k (backward: ascending and
 * disjoint), a row of r for every distance. ERR_ARGUMENT otherwise. */
tril_status relative_attention_unpack_forward(struct relative_attention_call *c,
                                              const struct tensor *args, const void *params,
                                              struct tril_error *err);
tril_status relative_attention_unpack_backward(struct relative_attention_call *c,
                                               const struct tensor *args, const void *params,
                                               struct tril_error *err);

/* Own rows and past keys of sequence s. */
static inline int64_t relative_own(const struct relative_attention_call *c, int64_t s) {
    return c->q_offsets[s + 1] - c->q_offsets[s];
}
static inline int64_t relative_past(const struct relative_attention_call *c, int64_t s) {
    return c->past_k.data ? c->past_length[s] : 0;
}
/* The first key that the row at position p sees; the last is p itself. */
static inline int64_t relative_first(const struct relative_attention_call *c, int64_t p) {
    if (!c->params.segment)
        return 0;
    int64_t first = p - p % c->params.segment - c->params.memory;
    return first > 0 ? first : 0;
}

#endif
