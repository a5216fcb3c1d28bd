/* A small transformer whose every part can be left out, forward and backward over the operations:
 * what the ablations train. (The model of src/model has no switch for its residuals, because no
 * family of models is without them.) fp32, learned positions, pre-norm, causal.
 *
 *   x -> [norm] -> q k v -> attention -> W_O -> [+ x] -> [norm] -> 4D -> GELU -> D -> [+] */
#ifndef LAB_MINI_H
#define LAB_MINI_H

#include "lab/lab.h"

struct mini_config {
    int64_t layers, dim, heads, vocab, seq, batch;
    bool no_mlp, no_residual, no_norm, no_q, no_scale, untied;
    enum activation activation;
    float dropout; /* of what each branch gives, in training */
};

enum { MINI_PARTS = 4, MINI_MOST_LAYERS = 32 }; /* qkv, out, up, down */

struct mini_layer {
    struct weight w[MINI_PARTS];
    float *dw[MINI_PARTS], *gain[2], *dgain[2];
    float *x, *mid;                     /* inputs of the halves [N, D] */
    float *norm[2], *mean[2], *rstd[2]; /* of the halves */
    float *qkv, *lse, *heads, *branch, *pre, *hidden;
};

struct mini {
    struct mini_config c;
    struct op_context *ctx;
    struct mini_layer layer[MINI_MOST_LAYERS];
    struct weight head; /* the embedding, or a matrix of its own */
    float *embedding, *position, *dembedding, *dposition, *dhead;
    float *parameters, *gradients, *mean, *square; /* one arena each */
    int64_t count;                                 /* of parameters, padding included */
    float *zero;                                   /* a norm's bias [D] */
    float *x, *final, *final_gain, *dfinal_gain, *final_mean, *final_rstd;
    float *logits, *maximum, *sum, *target, *row_loss;
    float *dx, *dy, *dn, *dqkv, *dheads, *dhidden;
    double *total;
    float *hyper;
    int32_t *ids, *targets, *positions, *offsets, *start, *length;
    /* Norms of the gradient of each layer's input, and of the last layer's output, after a
     * backward. */
    double gradient_norm[MINI_MOST_LAYERS + 1];
    void **blocks;
    int block_count;
};

tril_status mini_create(struct mini **out, const struct mini_config *c, struct op_context *ctx,
                        uint64_t seed, struct tril_error *err);
void mini_free(struct mini *m);
/* The mean loss of m->ids and m->targets [batch, seq]; with `train` dropout of `step`. */
tril_status mini_forward(struct mini *m, bool train, uint64_t step, double *loss,
                         struct tril_error *err);
/* Gradients of the mean loss, after a forward with the same `train` and `step`. */
tril_status mini_backward(struct mini *m, bool train, uint64_t step, struct tril_error *err);
/* AdamW with clipping at 1; t = 1, 2, ... */
tril_status mini_update(struct mini *m, int64_t t, double lr, struct tril_error *err);
/* Mean cosine between the tokens of a sequence, of layer l's input (l = layers: the last output):
 * 1 when all tokens have become alike. */
double mini_similarity(const struct mini *m, int64_t l);
/* Parameters that are used. */
double mini_parameters(const struct mini *m);

#endif
