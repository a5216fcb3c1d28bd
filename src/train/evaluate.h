/* Evaluation on a data set's split: the mean loss over windows in order. */
#ifndef TRAIN_EVALUATE_H
#define TRAIN_EVALUATE_H

#include <stdint.h>

#include "model/model.h"
#include "text/shard.h"

struct evaluation {
    double loss_sum; /* nats */
    int64_t tokens;
};

/* Windows of `seq` tokens of a split, one after another (each token but a window's first context is
 * predicted once), `batch` rows a call, until max_tokens are scored (0: the whole split, the last
 * incomplete window left out). The workspace must hold batch * seq tokens. */
tril_status evaluate_split(struct model *m, struct workspace *w, const struct dataset *d,
                           enum dataset_split split, int batch, int seq, int64_t max_tokens,
                           struct evaluation *out, struct tril_error *err);

/* A token sequence of any length, in windows of `seq` tokens that start every `stride` tokens
 * (1 <= stride <= seq); each token but the first is scored once, with at least seq - stride tokens
 * before it where there are so many. `batch` windows a call; the workspace must hold batch * seq
 * tokens. token_loss fp32 [n] (optional) receives each token's loss, 0 for the first. */
tril_status evaluate_tokens(struct model *m, struct workspace *w, const int32_t *ids, int64_t n,
                            int64_t seq, int64_t stride, int64_t batch, float *token_loss,
                            struct evaluation *out, struct tril_error *err);

#endif
