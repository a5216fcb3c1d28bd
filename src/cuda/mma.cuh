/* Tensor cores and asynchronous copies of sm_80 and newer: ldmatrix, mma.sync m16n8k16 with bf16 or
 * fp16 factors and fp32 sums, cp.async (PTX ISA, "Matrix fragments for mma.m16n8k16").
 *
 * Fragments of lane l, with g = l / 4 and t = l % 4; a register holds two neighbouring elements:
 *   A [16, 16]: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8)
 *   B [16, 8]:  b0 (2t, g), b1 (2t + 8, g), pairs along k
 *   C [16, 8]:  c0, c1 (g, 2t), c2, c3 (g + 8, 2t)
 * So two neighbouring C fragments, rounded, are an A fragment. */
#ifndef CUDA_MMA_CUH
#define CUDA_MMA_CUH

#include "cuda/device.cuh"

#ifdef TRIL_CUDA_EMULATED
#include <mma_emulated.h>
#else

/* Four 8 x 8 matrices: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned) in
 * shared memory; register i gets of matrix i the elements (l / 4, 2 (l % 4)) and its neighbour;
 * `trans`: of the transposed matrix. */
__device__ __forceinline__ void mma_load(uint32_t (&r)[4], const void *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void mma_load_trans(uint32_t (&r)[4], const void *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
/* c += A B; T says what the registers hold. */
template <typename T>
__device__ __forceinline__ void mma_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);
#define MMA_PRODUCT(T, name)                                                                       \
    template <>                                                                                    \
    __device__ __forceinline__ void mma_product<T>(float(&c)[4], const uint32_t(&a)[4],            \
                                                   uint32_t b0, uint32_t b1) {                     \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                        \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
    }
MMA_PRODUCT(__nv_bfloat16, "bf16")
MMA_PRODUCT(__half, "f16")
#undef MMA_PRODUCT

/* 2^x, about 2 units in the last place; results below 2^-126 are 0. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 bytes from global to shared memory (both aligned), or zeros; there after wait_copies and, for
 * other threads, a barrier. */
__device__ __forceinline__ void copy_async(void *shared, const void *global, bool zeros) {
    unsigned at = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global),
                 "r"(zeros ? 0 : 16)
                 : "memory");
}
/* Ends a group of copies; wait_copies<n>: until at most n of the thread's last groups are open. */
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int open>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

#endif

/* Two values rounded to T in a register, the first in the lower half. */
template <typename T>
__device__ __forceinline__ uint32_t mma_pair(float x, float y);
template <>
__device__ __forceinline__ uint32_t mma_pair<__nv_bfloat16>(float x, float y) {
    __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    uint32_t r;
    memcpy(&r, &v, 4);
    return r;
}
template <>
__device__ __forceinline__ uint32_t mma_pair<__half>(float x, float y) {
    __half2 v = __floats2half2_rn(x, y);
    uint32_t r;
    memcpy(&r, &v, 4);
    return r;
}

#endif
