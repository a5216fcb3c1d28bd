/* What the reference and every backend share of the attention operation: the arguments unpacked and
 * checked once, and the rule which key a query sees. */
#ifndef OPS_ATTENTION_H
#define OPS_ATTENTION_H

#include "ops/ops.h"

/* A forward or backward call. Optional tensors have data NULL. */
struct attention_call {
    struct tensor q, k, v, o, lse, slopes;
    struct tensor dout, dq, dk, dv; /* backward only */
    const int32_t *q_offsets, *kv_start, *kv_length, *pages;
    int64_t sequences, page_columns; /* S, P */
    int64_t rows, keys;              /* N, M */
    int64_t heads, kv_heads, width;  /* H, K, d */
    int64_t longest_q, longest_kv;   /* over the sequences */
    const struct attention_params *params;
    struct random_key key; /* params->key with *step put in */
};

/* Unpacks `args` (host memory) in the order of the operation's description and checks what the
 * shapes alone do not tell: offsets ascending, key ranges inside k, pages inside k, parameters in
 * range; backward: key ranges disjoint and ascending. ERR_ARGUMENT otherwise. */
tril_status attention_unpack_forward(struct attention_call *c, const struct tensor *args,
                                     const struct attention_params *p, struct tril_error *err);
tril_status attention_unpack_backward(struct attention_call *c, const struct tensor *args,
                                      const struct attention_params *p, struct tril_error *err);

/* Row of k and v that holds key j of sequence s. */
static inline int64_t attention_key_row(const struct attention_call *c, int64_t s, int64_t j) {
    if (!c->pages)
        return c->kv_start[s] + j;
    int64_t size = c->params->page_size;
    return c->pages[s * c->page_columns + j / size] * size + j % size;
}

/* Keys [0, result) that query i of sequence s (i counted within the sequence) sees. */
static inline int64_t attention_visible(const struct attention_call *c, int64_t s, int64_t i) {
    int64_t length = c->kv_length[s];
    if (!c->params->causal)
        return length;
    int64_t seen = length - (c->q_offsets[s + 1] - c->q_offsets[s]) + i + 1;
    return seen < 0 ? 0 : seen;
}

/* Element of the dropout stream for head h, row n of q, key j of the row's sequence. */
static inline uint64_t attention_dropout_element(const struct attention_call *c, int64_t h,
                                                 int64_t n, int64_t j) {
    return ((uint64_t)(h * c->rows + n) << 32) + (uint64_t)j;
}

/* Visible (query, key, head) triples of a call: useful FLOPs are 4 d forward, 10 d backward times
 * this. */
double attention_pairs(const struct attention_call *c);

#endif
