/* Vectors of 32-bit units - an fp32 element, or a pair of bf16 elements - moved about: loads that
 * stop at a byte, transposes, pairs of rows. What packings of matrix operands are made of. */
#ifndef CPU_KERNELS_UNITS_H
#define CPU_KERNELS_UNITS_H

#include "cpu/kernels/simd.h"

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

SIMD vu vu_load(const void *p) {
    return (vu) * (const vi_memory *)p;
}
SIMD void vu_store(void *p, vu a) {
    *(vi_memory *)p = (vi_memory)a;
}
/* The first n bytes at p (at most a vector), then zeros. */
SIMD vu vu_load_bytes(const void *p, int64_t n) {
    if (n >= 4 * VF_WIDTH)
        return vu_load(p);
    uint32_t part[VF_WIDTH] = {0};
    memcpy(part, p, (size_t)n);
    return vu_load(part);
}

/* One step of a transpose: of a and b, the s x s blocks off the diagonal change places. */
#if VF_WIDTH == 16
#define VU_LO8(a, b)                                                                               \
    __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define VU_HI8(a, b)                                                                               \
    __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define VU_LO4(a, b)                                                                               \
    __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
#define VU_HI4(a, b)                                                                               \
    __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define VU_LO2(a, b)                                                                               \
    __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define VU_HI2(a, b)                                                                               \
    __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define VU_LO1(a, b)                                                                               \
    __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
#define VU_HI1(a, b)                                                                               \
    __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#elif VF_WIDTH == 8
#define VU_LO4(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define VU_HI4(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define VU_LO2(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define VU_HI2(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define VU_LO1(a, b) __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define VU_HI1(a, b) __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15)
#else
#define VU_LO2(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define VU_HI2(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#define VU_LO1(a, b) __builtin_shufflevector(a, b, 0, 4, 2, 6)
#define VU_HI1(a, b) __builtin_shufflevector(a, b, 1, 5, 3, 7)
#endif

#define VU_TRANSPOSE_STEP(r, s)                                                                    \
    UNROLL for (int i_ = 0; i_ < VF_WIDTH; i_++) {                                                 \
        if ((i_ & (s)) == 0) {                                                                     \
            vu a_ = r[i_], b_ = r[i_ + (s)];                                                       \
            r[i_] = VU_LO##s(a_, b_);                                                              \
            r[i_ + (s)] = VU_HI##s(a_, b_);                                                        \
        }                                                                                          \
    }

SIMD void vu_transpose(vu r[VF_WIDTH]) {
#if VF_WIDTH >= 16
    VU_TRANSPOSE_STEP(r, 8)
#endif
#if VF_WIDTH >= 8
    VU_TRANSPOSE_STEP(r, 4)
#endif
    VU_TRANSPOSE_STEP(r, 2)
    VU_TRANSPOSE_STEP(r, 1)
}

/* Units of VF_WIDTH bf16 columns of two rows of memory: low halves from p, high halves from q. */
SIMD vu vu_pair(const uint16_t *p, const uint16_t *q, int n) {
    vu low = p ? (vu)vf_load_bf16_n(p, n) >> 16 : (vu)vf_zero();
    vu high = q ? (vu)vf_load_bf16_n(q, n) : (vu)vf_zero();
    return low | high;
}

#endif
