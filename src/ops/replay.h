/* Recording a sequence of operations once and replaying it: a decoding step or a training step is
 * hundreds of launches, which a GPU can be given as one (a CUDA graph).
 *
 * The body may launch operations and fill with zeros; it must not upload, download or wait. What
 * changes between two runs of one key lies in the backend's memory, written before the call;
 * everything on the host that a launch depends on (sizes, addresses, parameters) goes into the key.
 * A body that cannot be recorded (an operation without a kernel) simply runs every time, as it does
 * on a backend without graphs. */
#ifndef OPS_REPLAY_H
#define OPS_REPLAY_H

#include "ops/ops.h"

enum { REPLAY_MOST = 8 }; /* keys remembered; the one unused for longest makes room */

struct op_replay { /* zero-initialise */
    struct replay_entry {
        uint64_t key, used;
        void *graph;         /* the backend's, or NULL: not recorded yet */
        const void *scratch; /* the context's, while it was recorded */
        bool plain;          /* cannot be recorded */
    } entry[REPLAY_MOST];
    uint64_t clock;
};

typedef tril_status op_body(void *arg, struct tril_error *err);

/* Runs the body: directly the first time that `key` comes, recorded the second time, replayed from
 * then on. */
tril_status op_replay_run(struct op_context *ctx, struct op_replay *r, uint64_t key, op_body *body,
                          void *arg, struct tril_error *err);
void op_replay_free(struct op_context *ctx, struct op_replay *r);

/* Folds bytes into a key (FNV-1a); begin with OP_REPLAY_KEY. */
#define OP_REPLAY_KEY 0xcbf29ce484222325u
uint64_t op_replay_key(uint64_t key, const void *data, size_t bytes);

#endif
