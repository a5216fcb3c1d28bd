/* The tensor table: one declarative row per parameter, from which allocation, initialisation,
 * loading, saving, gradients, the optimiser, counting and the tests are all generated. */
#ifndef MODEL_TABLE_H
#define MODEL_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "model/config.h"

enum param_role {
    PARAM_TOKEN_EMBEDDING,
    PARAM_POSITION_EMBEDDING,
    PARAM_NORM1_GAIN,
    PARAM_NORM1_BIAS,
    PARAM_QKV,
    PARAM_QKV_BIAS, /* rows: H*d of q, then K*d of k, then K*d of v */
    PARAM_Q_NORM,
    PARAM_K_NORM,
    PARAM_SINKS,    /* a logit per head */
    PARAM_RELATIVE, /* recurrence: [H d, D], the projection of the positions */
    PARAM_CONTENT_BIAS,
    PARAM_POSITION_BIAS, /* and its u and w, [H d] */
    PARAM_MEMORY_GATE,   /* a logit per head */
    PARAM_ATTENTION_OUT,
    PARAM_ATTENTION_OUT_BIAS,
    PARAM_NORM2_GAIN,
    PARAM_NORM2_BIAS,
    PARAM_FFN_UP,
    PARAM_FFN_UP_BIAS, /* gated: rows F of the gate, then F of up */
    PARAM_FFN_DOWN,
    PARAM_FFN_DOWN_BIAS,
    PARAM_FINAL_NORM_GAIN,
    PARAM_FINAL_NORM_BIAS,
    PARAM_HEAD, /* absent when tied */
    PARAM_ROLE_COUNT
};

enum param_init { INIT_NORMAL, INIT_ZERO, INIT_ONE };

/* A named tensor of the checkpoint that holds some rows of the logical one. */
struct param_part {
    char name[96];
    int64_t row_begin, row_count; /* of the logical tensor's first dimension */
    bool transposed;              /* stored [I, O] (GPT-2's Conv1D) */
};

struct param_row {
    enum param_role role;
    int layer; /* -1: not in a block */
    int rank;
    int64_t shape[2]; /* logical: [O, I], [V, D], or [n] */
    bool matrix;      /* a linear layer's weight (or embedding): stored in the compute dtype;
                         vectors stay fp32 */
    bool linear;      /* goes through linear_* (gets packings) */
    bool decay;       /* weight decay applies */
    enum param_init init;
    float init_std;
    int part_count;
    struct param_part parts[3];
    int64_t offset; /* in elements, within an arena of all parameters: decayed rows first */
};

struct param_table {
    struct param_row *rows;
    int count;
    int64_t elements;                /* all, each padded to 16 elements */
    int64_t decay_elements;          /* the first so many are decayed */
    int (*row_of)[PARAM_ROLE_COUNT]; /* [layers + 1]: the row of each role, or -1; entry 0: of those
                                      * outside blocks, entry l + 1: of layer l */
    int64_t layers;
};

/* Names follow model_config_type(): GPT-2's, Llama's, or (for "tril") Llama's with additions. */
tril_status param_table_create(struct param_table *t, const struct model_config *c,
                               struct tril_error *err);
void param_table_free(struct param_table *t);
/* The row, or NULL when the configuration has none. */
const struct param_row *param_find(const struct param_table *t, enum param_role role, int layer);
/* "attention", "ffn", "norm", "embedding", "head": for counting by part. */
const char *param_part_of_model(const struct param_row *r);

#endif
