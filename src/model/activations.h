/* The activation table: one row per buffer of a forward and backward pass: name, shape in symbols,
 * dtype, what becomes of it between the passes, and when it is alive. From it come the layout of a
 * workspace's single arena, the memory plan, and what each recomputation mode keeps.
 *
 *   kind          inference     none          selective     full recomputation
 *   INPUT         1             L + 1         L + 1         L + 1 instances
 *   SAVED         shared        L             L             1
 *   RECOMPUTABLE  shared        L             shared        1
 *   SCRATCH       shared        shared        shared        shared
 *
 * With offloading (offload.c) the L + 1 are 3 and the L are 2, which the layers take in turn; the
 * others wait in the host's memory.
 *
 * "shared": one buffer for all layers, whose memory also serves others that are not alive at the
 * same time (phases). Symbols of shapes: N tokens, n rows of a chunk of the head, R rows whose
 * logits are wanted, D width, H heads, K key/value heads, Q = (H + 2K) d outputs of the fused QKV,
 * S sequences, M = K d (d + 1) sums of linear attention, E = (H + K) d, A = H d, F hidden width, U
 * = F or 2F outputs of the FFN's first matrix, V vocabulary, I the call's integers, R distances of
 * a recurrent layer, P rows that a batch carries in,
 * G = K d, B = H times the keys that a memory layer finds. */
#ifndef MODEL_ACTIVATIONS_H
#define MODEL_ACTIVATIONS_H

#include "model/model.h"

enum activation_id {
    A_X,              /* a layer's input: the residual stream */
    A_MEAN1,          /* statistics of the first norm */
    A_RSTD1,          /* */
    A_NORM1,          /* output of the first norm */
    A_QKV,            /* q | k | v of each token; after RoPE, unless there is a qk-norm */
    A_QK,             /* with qk-norm: q | k normalised and rotated (A_QKV then keeps them raw) */
    A_Q_RSTD,         /* statistics of the qk-norm */
    A_K_RSTD,         /* */
    A_ATTENTION,      /* heads' outputs, concatenated */
    A_LSE,            /* log-sum-exp of the scores */
    A_BRANCH,         /* a branch's output before its dropout */
    A_MID,            /* the residual stream between attention and FFN */
    A_MEAN2,          /* statistics of the second norm */
    A_RSTD2,          /* */
    A_NORM2,          /* output of the second norm */
    A_PRE,            /* FFN before its activation (gated: gate | up) */
    A_HIDDEN,         /* FFN after its activation */
    A_ROWS_X,         /* wanted rows of the residual stream */
    A_ROWS_HEADS,     /* wanted rows of A_ATTENTION in the last layer */
    A_FINAL,          /* input of the head, a chunk of rows */
    A_FINAL_MEAN,     /* statistics of the final norm */
    A_FINAL_RSTD,     /* */
    A_LOGITS,         /* a chunk of rows; fp32 for inference, else the compute dtype: their gradient
                         takes their place */
    A_MAXIMUM,        /* of a row's logits */
    A_SUM,            /* of exp(logit - maximum) */
    A_TARGET,         /* the target's logit */
    A_DFINAL,         /* gradient of A_FINAL */
    A_DX,             /* gradient of the residual stream */
    A_DY,             /* the same in the compute dtype, after the branch's dropout */
    A_DNORM,          /* gradient of a norm's output */
    A_DHIDDEN,        /* gradient of A_HIDDEN; MLP: of A_PRE too */
    A_DPRE,           /* gated: gradient of A_PRE */
    A_DQKV,           /* gradient of A_QKV */
    A_DATTENTION,     /* gradient of A_ATTENTION */
    A_DSINKS,         /* gradient of the learned sinks, of one call */
    A_SUMS,           /* linear attention: sums of sequences whose cache slots do not adjoin */
    A_R,              /* recurrence: the projected positions, a row per distance */
    A_DR,             /* their gradient */
    A_PAST_X,         /* what the recurrence carries in: a layer's earlier inputs */
    A_PAST_MEAN,      /* statistics of their norm */
    A_PAST_RSTD,      /* */
    A_PAST_NORM,      /* their norm */
    A_PAST_QKV,       /* their keys and values (and queries that nobody reads) */
    A_DPAST_QKV,      /* gradients; that of A_PAST_X goes nowhere */
    A_DPAST_NORM,     /* */
    A_DPAST_X,        /* */
    A_LOCAL,          /* memory: heads' outputs within the segment, before the gate */
    A_RECALLED,       /* heads' outputs over the memory */
    A_RECALL_LSE,     /* log-sum-exp of the scores found */
    A_RECALL_ROWS,    /* which keys were found */
    A_RECALL_WEIGHTS, /* and their weights */
    A_RECALL_KEYS,    /* without cache and carry: the call's keys before their rotation */
    A_DLOCAL,         /* gradients of A_LOCAL and A_RECALLED */
    A_DRECALLED,      /* */
    A_INPUTS,         /* what the caller gave: ids, positions, offsets, ... */
    A_ROW_LOSS,       /* loss of each token */
    A_TOTAL,          /* sum of losses, their number */
    A_COUNT
};

enum activation_kind { KIND_INPUT, KIND_SAVED, KIND_RECOMPUTABLE, KIND_SCRATCH };

struct activation_layout {
    bool present[A_COUNT];
    struct tensor shape[A_COUNT];       /* data NULL; at the largest N */
    int variable[A_COUNT];              /* dimension that is N, n or R: 0 or 1; -1: fixed */
    int64_t offset[A_COUNT];            /* of the first instance, in bytes */
    int64_t stride[A_COUNT];            /* between instances; 0: there is one */
    int64_t inputs, groups;             /* instances of A_X, and of the group of all others that a
                                           layer keeps; layer l has number l modulo that */
    int64_t group_offset, group;        /* of the first group; bytes of one */
    int64_t leaving;                    /* layers that leave for the host's memory: the first so
                                           many; each takes input + group bytes there */
    int64_t input;                      /* bytes of one instance of A_X */
    int64_t head_rows;                  /* n: rows of one chunk of the head */
    int64_t bytes;                      /* of the arena */
    int64_t kept, shared, logits, rest; /* parts of bytes: kept from forward to backward; shared
                                           scratch without the logits; the chunk of logits;
                                           inputs and losses */
};

/* Lays out a workspace; allocates nothing. Refuses sizes that overflow. */
tril_status activation_layout_make(struct activation_layout *out, const struct model_config *c,
                                   enum dtype dtype, const struct workspace_options *o,
                                   struct tril_error *err);
const char *activation_name(enum activation_id id);
const char *activation_shape(enum activation_id id); /* "N D" */

#endif
