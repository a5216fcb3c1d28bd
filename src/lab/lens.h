/* A backend in front of the backend: it counts what every operation really does while a model runs
 * (calls, useful FLOPs, seconds), and can answer the model's attention with another implementation,
 * another visibility rule, or linear attention, forward and backward. So experiments measure whole
 * models without a second model. */
#ifndef LAB_LENS_H
#define LAB_LENS_H

#include "ops/ops.h"
#include "ops/visible.h"

struct lens {
    struct backend shim; /* first: op_context.backend points here */
    const struct backend *inner;
    struct op_context ctx;                     /* what the model is given */
    double flops[OP_COUNT], seconds[OP_COUNT]; /* on a device: not attention's FLOPs; as launched */
    int64_t calls[OP_COUNT];

    bool other; /* answer with this implementation */
    enum attention_implementation implementation;
    const struct visible_set *rules; /* answer under these rules; NULL: the model's own */
    bool linear;                     /* answer with linear attention (no cache) */
    bool unfused; /* linear layers without activation and residual; those in passes of their own */
    void *space;  /* for that */
    int64_t space_bytes;
    bool standard; /* answer with the textbook's [H, T, T] matrices (one sequence, no cache) */
};

/* `ctx` gives the backend in front of which the lens stands. The lens must not move. */
tril_status lens_open(struct lens *lens, const struct op_context *ctx, struct tril_error *err);
void lens_close(struct lens *lens);
void lens_reset(struct lens *lens); /* the counts */
double lens_flops(const struct lens *lens);

#endif
