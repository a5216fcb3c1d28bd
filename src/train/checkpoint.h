/* Resumable checkpoints: OUT/checkpoints/step-N/, complete Hugging Face directories with the
 * optimiser's state and the trainer's beside the model. A directory is filled under a temporary
 * name and renamed, so a name that exists is whole, and a kill at any moment costs nothing that was
 * saved before. */
#ifndef TRAIN_CHECKPOINT_H
#define TRAIN_CHECKPOINT_H

#include <jansson.h>
#include <stdint.h>

#include "model/model.h"
#include "text/shard.h"
#include "text/tokenizer.h"
#include "train/optimiser.h"

/* What a resumed run needs beside the arenas. */
struct train_state {
    int64_t step;   /* updates done */
    int64_t tokens; /* tokens trained on */
    struct loader_position position;
    uint64_t dataset_hash;
    double seconds; /* of training so far, over all runs */
    double best_valid_loss;
    int64_t best_step;           /* 0: none yet */
    struct loss_scaling scaling; /* with fp16 */
};

/* Writes OUT/checkpoints/step-N, then removes old ones: the last `keep` and the best one stay.
 * carry: what the rows of a batch carry to the next step, or NULL. */
tril_status checkpoint_write(const char *out, struct model *m, const struct optimiser *o,
                             const struct tokenizer *tokenizer, const struct train_state *state,
                             const json_t *options, const struct carry *carry, enum dtype saved,
                             int64_t keep, struct tril_error *err);

/* Moves checkpoints of an earlier run in OUT to OUT/checkpoints.N, the first N that is free. *said:
 * a sentence about it (malloc'ed), or NULL where there were none. */
tril_status checkpoint_set_aside(const char *out, char **said, struct tril_error *err);

/* The newest complete checkpoint's directory (malloc'ed), or NULL with TRIL_OK if there is none. */
tril_status checkpoint_latest(const char *out, char **dir, struct tril_error *err);
/* Reads trainer_state.json: *options is a new reference. */
tril_status checkpoint_read_state(const char *dir, struct train_state *state, json_t **options,
                                  struct tril_error *err);
/* Fills the optimiser's moments, and the masters where model.safetensors holds rounded ones. */
tril_status checkpoint_read_arenas(const char *dir, struct model *m, struct optimiser *o,
                                   struct tril_error *err);

/* Fills a carry from a checkpoint that has one. */
tril_status checkpoint_read_carry(const char *dir, struct carry *carry, struct tril_error *err);

/* The finished model: model, tokenizer and config in OUT itself, each file replaced atomically. */
tril_status checkpoint_write_final(const char *out, struct model *m,
                                   const struct tokenizer *tokenizer, enum dtype saved,
                                   struct tril_error *err);

#endif
