/* A transformer block by itself, forward, from the operations: what the tables time and weigh.
 *
 *   x -> norm -> q k v -> attention -> W_O -> + -> norm -> 4D -> GELU -> D -> + */
#ifndef LAB_LAYER_H
#define LAB_LAYER_H

#include "lab/attend.h"

enum layer_attention { LAYER_STANDARD, LAYER_FUSED, LAYER_FLASH, LAYER_ATTENTIONS };
/* "standard" ([B, H, T, T] in memory), "fused" (a row of scores at a time), "flash". */
extern const char *const layer_attention_names[];

struct layer {
    struct op_context *ctx;
    int64_t B, T, D, H;
    enum dtype dtype; /* of weights and activations, fp32 or bf16; on a device fp16 too */
    void *half;       /* fp16: the input and output of layer_mha [2, N, D], cast on the way */
    struct weight qkv, out, up, down;
    float *gain, *bias; /* ones, zeros: [4D] */
    float *x, *y;       /* [N, D] fp32 */
    void *norm, *fused, *heads, *hidden;
    struct attend attend; /* borrows fused and heads */
    struct standard standard;
    enum layer_attention attention;
};

/* `mlp`: with the second half of the block. On the CPU fp16 is storage: weights are converted once,
 * inputs and outputs at every call, and the arithmetic is fp32. */
tril_status layer_create(struct layer *b, struct op_context *ctx, int64_t B, int64_t T, int64_t D,
                         int64_t H, enum dtype dtype, enum layer_attention attention, bool mlp,
                         struct tril_error *err);
void layer_free(struct layer *b);
/* lab_work: multi-head attention alone (projections and attention; no norm, no residual) of
 * whatever `norm` holds, and the whole block of x into y. */
tril_status layer_attention(void *arg, struct tril_error *err); /* of the last q, k, v */
tril_status layer_mha(void *arg, struct tril_error *err);
tril_status layer_forward_once(void *arg, struct tril_error *err);

#endif
