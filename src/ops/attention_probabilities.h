/* What the reference and every backend share of attention_probabilities. */
#ifndef OPS_ATTENTION_PROBABILITIES_H
#define OPS_ATTENTION_PROBABILITIES_H

#include "ops/attention.h"

/* Arguments of OP_ATTENTION_PROBABILITIES. */
enum {
    P_Q,
    P_K,
    P_OFFSETS,
    P_START,
    P_LENGTH,
    P_PAGES,
    P_SLOPES,
    P_BIAS,
    P_K_SCALE,
    P_ROWS,
    P_LSE,
    P_P,
    P_ARGS
};

struct probabilities_call {
    struct attention_call c; /* with lse */
    const int32_t *rows;     /* [count] */
    int64_t count, columns;  /* R, C */
    struct tensor p;
};

/* Unpacks and checks as attention_unpack_forward does, and the rows and the size of p. */
tril_status attention_unpack_probabilities(struct probabilities_call *c, const struct tensor *args,
                                           const struct attention_params *p,
                                           struct tril_error *err);

#endif
