/* The optimiser: global-norm clipping and AdamW over a model's arenas. */
#ifndef TRAIN_OPTIMISER_H
#define TRAIN_OPTIMISER_H

#include <stdbool.h>
#include <stdint.h>

#include "model/model.h"
#include "ops/replay.h"

/* Dynamic loss scaling (Micikevicius et al. 2018), for gradients in fp16: the caller multiplies its
 * losses by `value`. Where it is on, the value is halved when a gradient is not finite (that update
 * is skipped), and doubled after 2000 good updates. */
struct loss_scaling {
    bool on;
    double value;    /* 1 while it is off */
    int64_t good;    /* updates since the value was changed */
    int64_t skipped; /* updates that were not made */
};
#define LOSS_SCALING_BEGIN ((struct loss_scaling){.on = true, .value = 65536})

struct optimiser {
    struct model *model;  /* borrowed; a training model */
    float *mean, *square; /* [table.elements] fp32: AdamW's moments, in the backend's memory, */
    bool offloaded;       /* or in the host's */
    float *hyper;         /* fp32 [HYPER_COUNT] */
    double *total;        /* f64 [1] */
    struct adamw_params adamw;
    float clip; /* 0: none */
    struct op_replay replay;
    struct loss_scaling scaling;
};

tril_status optimiser_create(struct optimiser *o, struct model *m,
                             const struct adamw_params *params, float clip, struct tril_error *err);
/* The same with the moments in the host's memory (devices only), where adamw reads and writes them
 * over the bus: the same bits. */
tril_status optimiser_create_offloaded(struct optimiser *o, struct model *m,
                                       const struct adamw_params *params, float clip,
                                       struct tril_error *err);
void optimiser_free(struct optimiser *o);

/* One update from the model's gradients, then packings are refreshed. The gradients stay: the next
 * step's first call overwrites them. t = 1, 2, ... counts updates. *grad_norm is the norm before
 * clipping. If it is not finite nothing is
 * updated and *applied is false. */
tril_status optimiser_step(struct optimiser *o, int64_t t, double lr, double *grad_norm,
                           bool *applied, struct tril_error *err);

#endif
