/* Matrix products by cuBLASLt, which is loaded when a context opens (dlopen: tril neither needs nor
 * maps it otherwise). */
#ifndef CUDA_BLAS_H
#define CUDA_BLAS_H

#include "cuda/launch.cuh"

/* Bytes of a context's workspace: what NVIDIA advises for Hopper; enough for split sums elsewhere.
 */
static const int64_t BLAS_WORKSPACE = (int64_t)32 << 20;

/* Loads cuBLASLt and makes the context's handle and workspace; ERR_UNSUPPORTED with a sentence
 * where the library is missing. */
tril_status blas_open(struct cuda_state *c, struct tril_error *err);
void blas_close(struct cuda_state *c);

/* A matrix in cuBLASLt's order: element (i, j) at data[i + j ld]. */
struct blas_matrix {
    const void *data;
    enum dtype type;
    int64_t ld;
};
enum blas_finish {
    BLAS_PLAIN,
    BLAS_BIAS,
    BLAS_GELU,
    BLAS_GELU_BIAS,
    BLAS_GELU_AUX,
    BLAS_GELU_AUX_BIAS
};
/* d [m, n] = finish(op(a) op(b) + beta c + bias): op(a) [m, k], op(b) [k, n]; sums in fp32. */
struct blas_product {
    int64_t m, n, k;
    bool transpose_a, transpose_b;
    struct blas_matrix a, b, d;
    struct blas_matrix c; /* data NULL: beta is 0; else beta is 1; c and d have one type */
    enum blas_finish finish;
    const void *bias; /* [m], of d's type */
    void *aux;        /* [m, n] of d's type, leading dimension aux_ld: what GELU is taken of */
    int64_t aux_ld;
};
/* Queues the product on the context's stream. *done is false, and nothing was queued, where
 * cuBLASLt has no algorithm for it (dtypes, alignment, a finish that it does not fuse). The search
 * for an algorithm is made once for every shape; later calls allocate nothing and can be captured.
 * Split sums are reduced in fp32 from the workspace, in a fixed order. */
tril_status blas_multiply(struct op_context *ctx, const struct blas_product *p, bool *done,
                          struct tril_error *err);

#endif
