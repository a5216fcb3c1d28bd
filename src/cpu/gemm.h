/* The driver of the CPU's matrix products: blocking, threads, scratch. See kernels/gemm.h. */
#ifndef CPU_GEMM_H
#define CPU_GEMM_H

#include "cpu/kernels/gemm.h"

struct gemm {
    struct gemm_operand a, b; /* b.data may be NULL where panels are given */
    const void *panels;       /* all of B packed before, or NULL: packed as it is used */
    enum dtype panel_type;
    struct gemm_output out; /* [a.rows, b.rows] */
    float *row_sums;        /* += sum over k of A [a.rows], if present; A must be transposed */
};

/* out = epilogue(A B^T). Uses op_scratch: what lay there is gone. The bits of an output depend on
 * its row of A, its row of B and k alone. Fails only when out of memory. */
tril_status gemm_run(const struct gemm_kernels *kernels, struct op_context *ctx,
                     const struct gemm *g, struct tril_error *err);

/* Bytes of all panels of an operand, and packing them on all threads. */
int64_t gemm_panels_bytes(int64_t rows, int64_t k, enum dtype type);
void gemm_panels_pack(const struct gemm_kernels *kernels, const struct gemm_operand *b,
                      enum dtype type, void *out);

#endif
