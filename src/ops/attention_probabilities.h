/* What the reference and every backend share of attention_probabilities. */
#ifndef OPS_ATTENTION_PROBABILITIES_H
#define OPS_ATTENTION_PROBABILITIES_H

#include "ops/attention.h"

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
