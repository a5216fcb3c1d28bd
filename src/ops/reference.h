/* What the scalar references share: reading and writing any dtype as double, rows of strided
 * tensors, and small pieces of the test cases. References are for reading and for checking: they
 * are plain loops in the order of the formula, one thread, sums in double. */
#ifndef OPS_REFERENCE_H
#define OPS_REFERENCE_H

#include <string.h>

#include "ops/describe.h"

/* Element at `offset` (in elements) as a double, whatever float dtype the tensor has. */
static inline double ref_at(const struct tensor *t, int64_t offset) {
    switch (t->dtype) {
    case DT_F32:
        return ((const float *)t->data)[offset];
    case DT_BF16:
        return bf16_to_f32(((const uint16_t *)t->data)[offset]);
    case DT_F16:
        return f16_to_f32(((const uint16_t *)t->data)[offset]);
    case DT_F64:
        return ((const double *)t->data)[offset];
    case DT_I8: /* quantised: times a scale that stands elsewhere */
        return ((const int8_t *)t->data)[offset];
    default:
        return 0;
    }
}

static inline void ref_put(const struct tensor *t, int64_t offset, double value) {
    switch (t->dtype) {
    case DT_F32:
        ((float *)t->data)[offset] = (float)value;
        break;
    case DT_BF16:
        ((uint16_t *)t->data)[offset] = f32_to_bf16((float)value);
        break;
    case DT_F16:
        ((uint16_t *)t->data)[offset] = f32_to_f16((float)value);
        break;
    case DT_F64:
        ((double *)t->data)[offset] = value;
        break;
    case DT_I8:
        ((int8_t *)t->data)[offset] = (int8_t)value;
        break;
    default:
        break;
    }
}

static inline void ref_add(const struct tensor *t, int64_t offset, double value) {
    ref_put(t, offset, ref_at(t, offset) + value);
}

static inline int64_t ref_int(const struct tensor *t, int64_t i) {
    return t->dtype == DT_I64 ? ((const int64_t *)t->data)[i] : ((const int32_t *)t->data)[i];
}

/* An integer argument that must lie in [0, limit); otherwise the message names op, argument, place.
 */
tril_status ref_index(const char *op, const char *arg, const struct tensor *t, int64_t i,
                      int64_t limit, int64_t *out, struct tril_error *err);

static inline int64_t ref_offset2(const struct tensor *t, int64_t i, int64_t j) {
    return i * t->stride[0] + j * t->stride[1];
}
static inline int64_t ref_offset3(const struct tensor *t, int64_t i, int64_t j, int64_t k) {
    return i * t->stride[0] + j * t->stride[1] + k * t->stride[2];
}
static inline double ref_at2(const struct tensor *t, int64_t i, int64_t j) {
    return ref_at(t, ref_offset2(t, i, j));
}
static inline double ref_at3(const struct tensor *t, int64_t i, int64_t j, int64_t k) {
    return ref_at(t, ref_offset3(t, i, j, k));
}

/* Zeros in rows [begin, end) of a tensor of rank 3. */
static inline void ref_zero_rows(const struct tensor *t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
        for (int64_t j = 0; j < t->shape[1]; j++)
            for (int64_t k = 0; k < t->shape[2]; k++)
                ref_put(t, ref_offset3(t, i, j, k), 0);
}

/* A tensor of rank 2 or 3 as rows of its last dimension: how many, and where row r begins. */
static inline int64_t ref_row_count(const struct tensor *t) {
    return t->rank == 3 ? t->shape[0] * t->shape[1] : t->shape[0];
}
static inline int64_t ref_row(const struct tensor *t, int64_t r) {
    if (t->rank == 3)
        return r / t->shape[1] * t->stride[0] + r % t->shape[1] * t->stride[1];
    return r * t->stride[0];
}
static inline int64_t ref_width(const struct tensor *t) {
    return t->shape[t->rank - 1];
}

double ref_activation(enum activation a, double x);       /* act(x) */
double ref_activation_slope(enum activation a, double x); /* act'(x) */

/* ------------------------------------------------------------------ test cases */

/* Takes one digit off a mixed-radix index: cases are written as nested choices. */
static inline int case_pick(int *index, int radix) {
    int digit = *index % radix;
    *index /= radix;
    return digit;
}

static inline void case_params(struct op_case *c, const void *params, size_t size) {
    memcpy(c->params, params, size < sizeof c->params ? size : sizeof c->params);
}

static inline unsigned char case_dtype(enum dtype t) {
    return (unsigned char)(t + 1);
}

#endif
