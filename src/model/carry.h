/* What rows of a batch carry from one call to the next, for layers that recall earlier segments
 * without a cache: in training, and in evaluation by segments. A recurrent layer keeps its inputs
 * of the last `keep` tokens, a memory layer their keys and values; none of it has gradients.
 *
 * For every slot (a row of the batch) there is a ring in each such layer, of as many rows as it
 * keeps and one segment more: a call writes its own tokens behind what is kept, reads what was kept
 * before, and when all is done (the backward pass too) the tokens become past. A call that fails
 * leaves the past as it was. */
#ifndef MODEL_CARRY_H
#define MODEL_CARRY_H

#include "model/model.h"

/* Row (first + e) mod rows of a slot holds entry e, 0 the oldest. */
struct carry_ring {
    int64_t keep, rows;      /* 0: no layer has one */
    int32_t *first, *length; /* host, [slots] */
    int64_t *dropped;        /* host, [slots]: tokens before entry 0 */
};

struct carry {
    struct op_context *ctx;
    int64_t slots, layers, segment;
    enum dtype wide, act;
    int64_t dim, kv_heads, head_dim;
    struct carry_ring states, keys;
    struct carry_layer {
        void *x;     /* [slots * states.rows, D] wide, or NULL */
        void *k, *v; /* [slots * keys.rows, K, d] act, or NULL */
    } * layer;       /* [layers] */
    bool *busy;      /* host, [slots] */
    void *memory;
    int64_t bytes;
};

/* Whether a configuration has layers that carry anything; the tokens that a call gives each slot (a
 * segment), or 0. */
int64_t carry_segment(const struct model_config *c);
/* Bytes that carry_create takes in the backend's memory. */
int64_t carry_bytes(const struct model_config *c, int64_t slots, enum dtype act);
/* Empty. ERR_ARGUMENT for a model without such layers. */
tril_status carry_create(struct carry **out, const struct model *m, int64_t slots,
                         struct tril_error *err);
void carry_free(struct carry *c); /* NULL is fine */
/* Forgets a slot's past, or with -1 that of all. */
void carry_reset(struct carry *c, int64_t slot);

/* All of it, into one safetensors file and back (into one that was made alike). */
tril_status carry_write(const struct carry *c, const char *path, struct tril_error *err);
tril_status carry_read(struct carry *c, const char *path, struct tril_error *err);

#endif
