/* The optimiser: global-norm clipping and AdamW over a model's arenas. */
#ifndef TRAIN_OPTIMISER_H
#define TRAIN_OPTIMISER_H

#include <stdbool.h>
#include <stdint.h>

#include "model/model.h"
#include "ops/replay.h"

struct optimiser {
    struct model *model;  /* borrowed; a training model */
    float *mean, *square; /* [table.elements] fp32: AdamW's moments, in the backend's memory */
    float *hyper;         /* fp32 [HYPER_COUNT] */
    double *total;        /* f64 [1] */
    struct adamw_params adamw;
    float clip; /* 0: none */
    struct op_replay replay;
};

tril_status optimiser_create(struct optimiser *o, struct model *m,
                             const struct adamw_params *params, float clip, struct tril_error *err);
void optimiser_free(struct optimiser *o);

/* One update from the model's gradients, then packings are refreshed. The gradients stay: the next
 * step's first call overwrites them. t = 1, 2, ... counts updates. *grad_norm is the norm before
 * clipping. If it is not finite nothing is
 * updated and *applied is false. */
tril_status optimiser_step(struct optimiser *o, int64_t t, double lr, double *grad_norm,
                           bool *applied, struct tril_error *err);

#endif
