/* Attention of whole sequences, in the backend's memory: what the experiments call again and again.
 */
#ifndef LAB_ATTEND_H
#define LAB_ATTEND_H

#include "lab/lab.h"

/* B sequences of T tokens, H heads of width d, all dense [B T, H, d]. */
struct attend {
    struct op_context *ctx;
    int64_t B, T, H, d;
    enum dtype dtype; /* fp32 or bf16; on a device fp16 too */
    void *q, *k, *v, *o;
    void *dout, *dq, *dk, *dv; /* with backward */
    float *lse;                /* [H, B T] */
    int64_t row; /* elements from a token's q, k, v to the next token's; H d unless changed */
    int32_t *offsets, *start, *length; /* one allocation */
    struct attention_params params;    /* causal flash, scale 1/sqrt(d) */
    struct tensor bias;                /* absent */
};

/* Lengths, lse and parameters alone: q, k, v and o are the caller's to set. */
tril_status attend_describe(struct attend *a, struct op_context *ctx, int64_t B, int64_t T,
                            int64_t H, int64_t d, enum dtype dtype, struct tril_error *err);
/* Allocates and fills q, k, v (and dout) with normal numbers of `seed`. */
tril_status attend_create(struct attend *a, struct op_context *ctx, int64_t B, int64_t T, int64_t H,
                          int64_t d, enum dtype dtype, bool backward, uint64_t seed,
                          struct tril_error *err);
void attend_free(struct attend *a);
/* lab_work; arg is the struct attend. */
tril_status attend_forward(void *arg, struct tril_error *err);
tril_status attend_backward(void *arg, struct tril_error *err);

/* The textbook on [B, H, T, T] matrices: all scores of a batch in memory at once, products by the
 * backend's matrix multiplication, mask and softmax in passes of their own: what "standard
 * attention" means in the tables. fp32. On a device it is the device's own, in any dtype
 * (ATTENTION_MATERIALISED: products by the library, softmax by a kernel). */
struct standard {
    const struct attend *a;
    float *scores;       /* [B, H, T, T]: scores, then probabilities */
    float *q, *kv, *out; /* one head, dense */
};
tril_status standard_create(struct standard *s, const struct attend *a, struct tril_error *err);
void standard_free(struct standard *s);
tril_status standard_forward(void *arg, struct tril_error *err);
/* dq, dk, dv from the kept probabilities (another [T, T] per head in work). */
tril_status standard_backward(void *arg, struct tril_error *err);

#endif
