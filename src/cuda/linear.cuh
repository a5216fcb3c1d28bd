/* The product behind linear layers, for others that need one: linear.cu. */
#ifndef CUDA_LINEAR_CUH
#define CUDA_LINEAR_CUH

#include "cuda/launch.cuh"

/* A factor: element (r, k) at data[r * row + k * inner]; one of the strides is 1. */
struct operand {
    const void *data;
    enum dtype type;
    int64_t row, inner;
};

/* y [R, C] = a b^T, a [R, K], b [C, K], or with `add` (y fp32) y += a b^T. y has the factors' dtype
 * or is fp32; its rows are `row` elements apart. Asks for no scratch. */
tril_status linear_product(struct op_context *ctx, const char *name, const struct operand *a,
                           const struct operand *b, int64_t R, int64_t C, int64_t K, void *y,
                           enum dtype type, int64_t row, bool add, struct tril_error *err);

#endif
