/* Matrix products by oneDNN: the one door to that library (versions 2 and 3). */
#ifndef CPU_ONEDNN_H
#define CPU_ONEDNN_H

#include "cpu/kernels/gemm.h"

/* c[a.rows, b.rows] = A B^T, or += (fp32, rows ldc elements apart). false, and c untouched, where
 * oneDNN is not built in, has no such product on this processor (bf16 needs AVX-512) or fails: the
 * caller then multiplies by itself. fp32 operands, or bf16 both; sums in fp32. Never faster
 * instructions than the active level's. Deterministic for a given number of threads. */
bool onednn_gemm(const struct gemm_operand *a, const struct gemm_operand *b, float *c, int64_t ldc,
                 bool accumulate);

#endif
