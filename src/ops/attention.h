/* What the reference and every backend share of the attention operation: the arguments unpacked and
 * checked once, and the rule which key a query sees. */
#ifndef OPS_ATTENTION_H
#define OPS_ATTENTION_H

#include "ops/attention_checks.h"
#include "ops/ops.h"
#include "ops/visible.h"

/* Arguments of OP_ATTENTION_FORWARD and OP_ATTENTION_BACKWARD. */
enum {
    F_Q,
    F_K,
    F_V,
    F_OFFSETS,
    F_START,
    F_LENGTH,
    F_PAGES,
    F_SLOPES,
    F_BIAS,
    F_SINK,
    F_K_SCALE,
    F_V_SCALE,
    F_STEP,
    F_O,
    F_LSE,
    F_ARGS
};
enum {
    B_Q,
    B_K,
    B_V,
    B_OFFSETS,
    B_START,
    B_LENGTH,
    B_SLOPES,
    B_BIAS,
    B_SINK,
    B_STEP,
    B_O,
    B_LSE,
    B_DO,
    B_DQ,
    B_DK,
    B_DV,
    B_DBIAS,
    B_DSINK,
    B_ARGS
};

/* A forward or backward call. Optional tensors have data NULL. */
struct attention_call {
    struct tensor q, k, v, o, lse, slopes, bias, sink;
    struct tensor k_scale, v_scale;               /* forward only */
    struct tensor dout, dq, dk, dv, dbias, dsink; /* backward only */
    const int32_t *q_offsets, *kv_start, *kv_length, *pages;
    int64_t sequences, page_columns; /* S, P */
    int64_t rows, keys;              /* N, M */
    int64_t heads, kv_heads, width;  /* H, K, d */
    int64_t longest_q, longest_kv;   /* over the sequences */
    const struct attention_params *params;
    struct random_key key; /* params->key with *step put in */
    bool plain;            /* all heads are causal, or all full: attention_visible says all */
};

/* Unpacks `args` (host memory) in the order of the operation's description and checks what the
 * shapes alone do not tell: offsets ascending, key ranges inside k, pages inside k (but for those
 * that nobody sees), parameters and rules in range; backward: key ranges disjoint and ascending.
 * ERR_ARGUMENT otherwise. Reads integer arguments only. */
tril_status attention_unpack_forward(struct attention_call *c, const struct tensor *args,
                                     const struct attention_params *p, struct tril_error *err);
tril_status attention_unpack_backward(struct attention_call *c, const struct tensor *args,
                                      const struct attention_params *p, struct tril_error *err);

/* What can be checked of a call where its integer arguments cannot be read (they are on a device):
 * shapes, parameters and the rules' numbers; the rest is the caller's promise. Takes the tensors,
 * `pages` and `params` of `c`, sets its sizes, key and `plain`. */
tril_status attention_check_unread(struct attention_call *c, const char *name,
                                   struct tril_error *err);

/* Row of k and v that holds key j of sequence s. */
static inline int64_t attention_key_row(const struct attention_call *c, int64_t s, int64_t j) {
    if (!c->pages)
        return c->kv_start[s] + j;
    int64_t size = c->params->page_size;
    return c->pages[s * c->page_columns + j / size] * size + j % size;
}

/* Rows of sequence s, and the position of its row 0. */
static inline int64_t attention_own(const struct attention_call *c, int64_t s) {
    return c->q_offsets[s + 1] - c->q_offsets[s];
}
static inline int64_t attention_position(const struct attention_call *c, int64_t s) {
    return c->kv_length[s] - attention_own(c, s);
}

/* The visibility rule of head h. */
static inline const struct visible_rule *attention_rule(const struct attention_call *c, int64_t h) {
    const struct attention_params *p = c->params;
    if (!p->rules)
        return p->causal ? &visible_causal : &visible_full;
    return &p->rules[p->head_rule ? p->head_rule[h] : 0];
}

/* Keys [0, result) that query i of sequence s (i counted within the sequence) may see: all of them
 * where the call is plain. */
static inline int64_t attention_visible(const struct attention_call *c, int64_t s, int64_t i,
                                        int64_t h) {
    int64_t length = c->kv_length[s];
    if (!attention_rule(c, h)->causal)
        return length;
    int64_t seen = attention_position(c, s) + i + 1;
    return seen < 0 ? 0 : seen;
}

/* visible_any over the rules of heads [h0, h1), rows [i0, i1) of sequence s. */
bool attention_any(const struct attention_call *c, int64_t s, int64_t h0, int64_t h1, int64_t i0,
                   int64_t i1, int64_t j0, int64_t j1);

/* The definition, in double: the score of query i and key j of sequence s and head h, and whether
 * it counts. */
double attention_score(const struct attention_call *c, int64_t s, int64_t i, int64_t j, int64_t h);
bool attention_sees(const struct attention_call *c, int64_t s, int64_t i, int64_t j, int64_t h);

/* Element of the dropout stream for head h, row n of q, key j of the row's sequence. */
static inline uint64_t attention_dropout_element(const struct attention_call *c, int64_t h,
                                                 int64_t n, int64_t j) {
    return ((uint64_t)(h * c->rows + n) << 32) + (uint64_t)j;
}

/* Visible (query, key, head) triples of a call: useful FLOPs are 4 d forward, 10 d backward times
 * this. */
double attention_pairs(const struct attention_call *c);
/* At most so many, without counting: as if no rule had parts. */
double attention_most_pairs(const struct attention_call *c);

#endif
