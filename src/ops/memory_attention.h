/* What the reference and every backend share of attention over an external memory. */
#ifndef OPS_MEMORY_ATTENTION_H
#define OPS_MEMORY_ATTENTION_H

#include "ops/ops.h"

/* A forward call. */
struct memory_attention_call {
    struct tensor q, k, v, o, index, weight, lse;
    const int32_t *q_offsets, *kv_start, *kv_first, *kv_length, *kv_position;
    int64_t sequences, rows, heads, kv_heads, width, top; /* S, N, H, K, d, T */
    struct memory_attention_params params;
};

/* Unpacks `args` (host memory) and checks heads, offsets, and that every ring lies inside k. */
tril_status memory_attention_unpack(struct memory_attention_call *c, const struct tensor *args,
                                    const void *params, struct tril_error *err);

/* A backward call. */
struct memory_attention_gradient {
    struct tensor k, v, index, weight, o, dout, dq;
    int64_t rows, heads, kv_heads, width, top;
    float scale;
};
/* Checks the indices too: each a row of k, or -1. */
tril_status memory_attention_unpack_backward(struct memory_attention_gradient *c,
                                             const struct tensor *args, const void *params,
                                             struct tril_error *err);

/* Entries [*begin, *end) that row i of sequence s sees. */
static inline void memory_seen(const struct memory_attention_call *c, int64_t s, int64_t i,
                               int64_t *begin, int64_t *end) {
    int64_t length = c->kv_length[s], own = c->q_offsets[s + 1] - c->q_offsets[s];
    *begin = 0;
    *end = length;
    if (c->params.segment) {
        int64_t p = length - own + i;
        *end = p - (c->kv_position[s] + p) % c->params.segment;
        *end = *end > 0 ? *end : 0;
    }
    if (c->params.capacity && *end > c->params.capacity)
        *begin = *end - c->params.capacity;
}

/* Row of k and v that holds entry e of sequence s. */
static inline int64_t memory_row(const struct memory_attention_call *c, int64_t s, int64_t e) {
    return c->kv_start[s] + (c->kv_first[s] + e) % c->params.ring;
}

#endif
