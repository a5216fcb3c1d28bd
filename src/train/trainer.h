/* The trainer: data, tokenizer, model, optimiser and checkpoints put together. */
#ifndef TRAIN_TRAINER_H
#define TRAIN_TRAINER_H

#include "model/model.h"
#include "text/tokenizer.h"
#include "tril/train.h"

/* What the caller supplies: rooms that the trainer does not know. */
struct train_environment {
    struct op_context *ctx;
    enum dtype dtype;  /* of the arithmetic */
    double peak_flops; /* measured, for MFU; 0: unknown */
    /* Writes a sample of the model at this step (NULL: none are written). */
    tril_status (*sample)(void *arg, struct model *m, const struct tokenizer *t, int64_t step,
                          struct tril_error *err);
    void *arg;
};

tril_status trainer_run(const struct tril_train_options *options,
                        const struct train_environment *environment,
                        struct tril_train_result *result, struct tril_error *err);

#endif
