/* What the reference and every backend share of retrieval by blocks. */
#ifndef OPS_RETRIEVE_H
#define OPS_RETRIEVE_H

#include "ops/ops.h"

/* A call of retrieve. */
struct retrieve_call {
    struct tensor q, k, v, low, high, o, lse, blocks;
    const int32_t *kv_start, *kv_length;
    int64_t rows, heads, kv_heads, width, most; /* N, H, K, d, T */
    struct retrieve_params params;
};
tril_status retrieve_unpack(struct retrieve_call *c, const struct tensor *args, const void *params,
                            struct tril_error *err);

/* A call of block_bounds. */
struct bounds_call {
    struct tensor k, low, high;
    const int32_t *kv_start, *kv_from, *kv_length;
    int64_t sequences, kv_heads, width, block;
};
tril_status bounds_unpack(struct bounds_call *c, const struct tensor *args, const void *params,
                          struct tril_error *err);

/* Blocks that `length` keys fill, the last perhaps in part. */
static inline int64_t retrieve_blocks(int64_t length, int64_t block) {
    return (length + block - 1) / block;
}
/* Whether block b of `all` is seen whatever its bound. */
static inline bool retrieve_always(const struct retrieve_params *p, int64_t b, int64_t all) {
    return b < p->first || b >= all - p->last;
}

#endif
