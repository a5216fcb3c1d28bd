/* A tensor: a typed, strided view of memory that somebody else owns (an arena of a backend). */
#ifndef OPS_TENSOR_H
#define OPS_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"

#define TENSOR_MAX_RANK 4

struct tensor {
    void *data; /* NULL: absent (optional arguments) */
    enum dtype dtype;
    int rank;
    int64_t shape[TENSOR_MAX_RANK];
    int64_t stride[TENSOR_MAX_RANK]; /* in elements; the last is always 1 */
};

/* Dense row-major views. */
static inline struct tensor tensor_1d(void *data, enum dtype t, int64_t a) {
    return (struct tensor){data, t, 1, {a, 1, 1, 1}, {1, 1, 1, 1}};
}
static inline struct tensor tensor_2d(void *data, enum dtype t, int64_t a, int64_t b) {
    return (struct tensor){data, t, 2, {a, b, 1, 1}, {b, 1, 1, 1}};
}
static inline struct tensor tensor_3d(void *data, enum dtype t, int64_t a, int64_t b, int64_t c) {
    return (struct tensor){data, t, 3, {a, b, c, 1}, {b * c, c, 1, 1}};
}
static inline struct tensor tensor_4d(void *data, enum dtype t, int64_t a, int64_t b, int64_t c,
                                      int64_t d) {
    return (struct tensor){data, t, 4, {a, b, c, d}, {b * c * d, c * d, d, 1}};
}
static inline struct tensor tensor_none(void) {
    return (struct tensor){0};
}

static inline int64_t tensor_count(const struct tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->rank; i++)
        n *= t->shape[i];
    return t->data ? n : 0;
}
static inline int64_t tensor_bytes(const struct tensor *t) {
    return tensor_count(t) * (int64_t)dtype_size(t->dtype);
}
bool tensor_is_dense(const struct tensor *t);
/* Rows [begin, begin + count) of the first dimension. */
struct tensor tensor_rows(struct tensor t, int64_t begin, int64_t count);
/* Columns [begin, begin + count) of the last dimension (a strided view). */
struct tensor tensor_columns(struct tensor t, int64_t begin, int64_t count);
/* [N, H*d] (possibly strided rows) seen as [N, H, d]. */
struct tensor tensor_heads(struct tensor t, int64_t heads);

#endif
