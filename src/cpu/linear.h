/* Linear layers on the CPU: what a level's kernels/linear.c passes on to cpu/linear.c. */
#ifndef CPU_LINEAR_H
#define CPU_LINEAR_H

#include "cpu/kernels/gemm.h"

/* The operations of ops.h with a level's kernels. */
tril_status linear_forward_with(const struct gemm_kernels *kernels, struct op_context *ctx,
                                const struct tensor *args, const void *params,
                                struct tril_error *err);
tril_status linear_backward_input_with(const struct gemm_kernels *kernels, struct op_context *ctx,
                                       const struct tensor *args, const void *params,
                                       struct tril_error *err);
tril_status linear_backward_weight_with(const struct gemm_kernels *kernels, struct op_context *ctx,
                                        const struct tensor *args, const void *params,
                                        struct tril_error *err);

/* The backend's functions of a weight. */
tril_status linear_weight_prepare(const struct gemm_kernels *kernels, struct weight *w,
                                  unsigned uses, struct tril_error *err);
tril_status linear_weight_refresh(const struct gemm_kernels *kernels, struct weight *w);
void linear_weight_release(struct weight *w);
int64_t linear_weight_bytes(int64_t outputs, int64_t inputs, enum dtype t, unsigned uses);

/* Who multiplies. The environment's TRIL_GEMM says it by name, for comparisons; a test may change
 * it (between operations). */
enum linear_engine {
    LINEAR_OWN,    /* "own": tril's kernels, the default */
    LINEAR_FMA,    /* "fma": tril's kernels without AMX tiles */
    LINEAR_ONEDNN, /* "onednn": that library, where it is built in and has the product */
};
enum linear_engine linear_engine_get(void);
void linear_engine_set(enum linear_engine e);

#endif
