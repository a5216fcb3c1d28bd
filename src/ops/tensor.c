/* Views of tensors: arithmetic on shapes and strides; no memory is touched. */
#include "ops/tensor.h"

bool tensor_is_dense(const struct tensor *t) {
    int64_t expected = 1;
    for (int i = 0; i < t->rank; i++)
        if (t->shape[i] == 0)
            return true;
    for (int i = t->rank - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->stride[i] != expected)
            return false;
        expected *= t->shape[i];
    }
    return true;
}

/* Moves the start of a view; an absent or empty tensor keeps its NULL. */
static void advance(struct tensor *t, int64_t elements) {
    if (t->data)
        t->data = (char *)t->data + elements * (int64_t)dtype_size(t->dtype);
}

struct tensor tensor_rows(struct tensor t, int64_t begin, int64_t count) {
    advance(&t, begin * t.stride[0]);
    t.shape[0] = count;
    return t;
}

struct tensor tensor_columns(struct tensor t, int64_t begin, int64_t count) {
    int last = t.rank - 1;
    advance(&t, begin * t.stride[last]);
    t.shape[last] = count;
    return t;
}

struct tensor tensor_heads(struct tensor t, int64_t heads) {
    int64_t width = t.shape[1] / heads;
    t.rank = 3;
    t.shape[1] = heads;
    t.shape[2] = width;
    t.stride[1] = width;
    t.stride[2] = 1;
    return t;
}
