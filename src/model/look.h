/* A look at the attention of one forward pass: mask, scaled QK^T and softmax of any layer and head.
 *
 * During the pass (whatever kernels it runs through) a hook keeps q, k and the log-sum-exp of each
 * layer: O(L T D) memory, where the matrices would take O(L H T^2). A matrix is computed when it is
 * asked for, as flash attention's backward pass does it:
 *
 *   scores_ij  = scale q_i.k_j                       of all pairs, masked ones too
 *   added_ij   = softcap(scores_ij) - slope |p_i - j| + bias_ij,      or of relative positions
 *                scores_ij + scale (q_i + w).r_(i-j), q with u added beforehand (Dai et al. 2019)
 *   mask_ij    = 1 where i sees j
 *   weights_ij = exp(added_ij - lse_i) where mask_ij, else 0       (attention_probabilities)
 *
 * A row of weights adds up to 1, or with a learned sink to 1 - exp(sink - lse_i). Everything here
 * lies in host memory; one sequence a pass. */
#ifndef MODEL_LOOK_H
#define MODEL_LOOK_H

#include "model/model.h"
#include "ops/visible.h"

struct look_layer {
    /* The layer has softmax attention over the text's keys, and it was run: not linear attention,
     * not recurrence with its relative positions; of an external memory the part that is no memory.
     */
    bool seen;
    int64_t rows, keys, heads, kv_heads, width; /* T, M, H, K, d */
    enum dtype dtype;                           /* of q and k */
    char *q, *k;                                /* [H, T, d], [K, M, d] */
    float *lse;                                 /* [H, T] */
    float *slopes, *sink;                       /* [H], or NULL */
    float *bias;                                /* [1 or H, T, M], or NULL */
    float *position_q, *position_r;             /* q + w [H, T, d] and r [H, R, d], or NULL */
    int64_t distances;                          /* R */
    int64_t segment, memory;                    /* with them: what is seen; 0: all before */
    int64_t bias_heads;
    float scale, softcap;
    bool causal;                /* without rules */
    struct visible_rule *rules; /* or NULL; lists and blocks in them are the model's */
    int32_t rule_count;
    uint8_t *head_rule; /* [H], or NULL */
};

struct look {
    struct op_context *ctx; /* borrowed */
    int64_t layers;
    struct look_layer *layer; /* [layers] */
};

tril_status look_create(struct look **out, const struct model *m, struct tril_error *err);
void look_free(struct look *k); /* NULL is fine */
/* The hook for workspace_watch_attention; arg is the struct look. A later pass replaces what an
 * earlier one left. */
attention_hook look_hook;

relative_hook look_relative_hook; /* for workspace_watch_relative, with the same arg */

/* One head, opened: what its matrices are computed from, in the backend's memory and as floats. */
struct look_head;
tril_status look_head_open(struct look_head **out, const struct look *k, int layer, int64_t head,
                           struct tril_error *err);
void look_head_close(struct look_head *h); /* NULL is fine */
/* Rows [row, row + rows) of the matrices, [rows, M]. */
void look_head_scores(const struct look_head *h, int64_t row, int64_t rows, float *scores);
/* scores -> added, in place. */
void look_head_added(const struct look_head *h, int64_t row, int64_t rows, float *scores);
void look_head_mask(const struct look_head *h, int64_t row, int64_t rows, uint8_t *mask);
tril_status look_head_weights(struct look_head *h, int64_t row, int64_t rows, float *weights,
                              struct tril_error *err);
/* q [T, d] and k [M, d] of the head, as floats. */
const float *look_head_q(const struct look_head *h);
const float *look_head_k(const struct look_head *h);

/* What a head does, as means over its rows that see anything. Entropy in nats, of the row as it is
 * (what a sink takes apart); distance |p_i - j| in tokens, weighted; shares of the row's weight. */
struct look_summary {
    double entropy, distance;
    double first, previous, self; /* on key 0, on the key before, on the query's own */
    double sink;                  /* taken by a learned sink: 1 - the row's sum */
    double largest;               /* the row's largest weight */
    double uniform;               /* the entropy of even weights on all that the row sees */
};
/* Also fills thumb [size, size] (NULL: not) with the largest weight in each cell of a size x size
 * grid over the matrix; size must not be above T or M. */
tril_status look_summarise(const struct look *k, int layer, int64_t head,
                           struct look_summary *summary, float *thumb, int64_t size,
                           struct tril_error *err);

#endif
