/* Ablations: parts of a model switched off, for inference. Nothing is trained or copied: the
 * forward pass goes past the part, and everything else stays as it is.
 *
 *   mlp        x + ffn(norm(x)) becomes x
 *   attention  x + attention(norm(x)) becomes x
 *   layer      both
 *   head:L.H   the head's output is 0 before the projection
 *   residual   x + f(norm(x)) becomes f(norm(x))
 *   norm       norm(x) becomes x; without a layer the final norm too
 *   q          every query becomes the vector of ones: what is seen depends on the keys alone
 *   scale      the scores are not divided by sqrt(d) (or whatever else the layer's scale is)
 *   position   no learned positions, no rotation, no ALiBi
 *
 * A list is separated by commas or blanks; ":3" behind a name means layer 3 alone (from 0), ":2-5"
 * layers 2 to 5: "mlp,head:3.5,norm:final". */
#ifndef MODEL_ABLATE_H
#define MODEL_ABLATE_H

#include <stdbool.h>

#include "model/model.h"

enum ablated_part {
    OFF_MLP = 1,
    OFF_ATTENTION = 2,
    OFF_RESIDUAL = 4,
    OFF_NORM = 8,
    OFF_Q = 16,
    OFF_SCALE = 32,
    OFF_POSITION = 64
};

struct ablation {
    unsigned *off; /* [L + 1] parts of each layer; [0]: the embeddings and the final norm */
    bool *heads;   /* [L H] heads that are off */
    bool any_head; /* */
    void *ones;    /* a query [H d] in the compute dtype */
};

/* Switches off what `list` names, in place of what was off before (NULL or "": nothing is). Calls
 * with gradients are refused from then on. ERR_ARGUMENT names what it does not know. */
tril_status model_ablate(struct model *m, const char *list, struct tril_error *err);
void ablation_free(struct ablation *a); /* NULL is fine */

/* Whether a part of a layer is off; layer -1: the embeddings and the final norm. */
static inline bool ablated(const struct model *m, int layer, unsigned part) {
    return m->ablation && (m->ablation->off[layer + 1] & part);
}

/* Zeroes the channels of the heads that are off in heads [N, H d]. */
tril_status ablate_heads(const struct model *m, int layer, struct tensor heads,
                         struct tril_error *err);
/* Writes the vector of ones into every row of q [N, H, d]. */
tril_status ablate_q(const struct model *m, struct tensor q, struct tril_error *err);

#endif
