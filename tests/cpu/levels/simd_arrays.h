/* The functions of cpu/kernels/simd.h over arrays, compiled once per level (simd_arrays.c), so that
 * test_simd.c can call every level from one program. */
#ifndef TESTS_CPU_SIMD_ARRAYS_H
#define TESTS_CPU_SIMD_ARRAYS_H

#include <stdint.h>

struct simd_arrays {
    int width;
    /* y[i] = f(x[i]) for i < n, any n: whole vectors, then a partial one. */
    void (*exp)(const float *x, float *y, int64_t n);
    void (*exp2)(const float *x, float *y, int64_t n);
    void (*sigmoid)(const float *x, float *y, int64_t n);
    void (*tanh)(const float *x, float *y, int64_t n);
    void (*erf)(const float *x, float *y, int64_t n);
    void (*normal_cdf)(const float *x, float *y, int64_t n);
    void (*sqrt)(const float *x, float *y, int64_t n);
    void (*round_bf16)(const float *x, float *y, int64_t n);
    void (*from_bf16)(const uint16_t *x, float *y, int64_t n);
    void (*to_bf16)(const float *x, uint16_t *y, int64_t n);
    void (*from_f16)(const uint16_t *x, float *y, int64_t n);
    void (*to_f16)(const float *x, uint16_t *y, int64_t n);
    /* z[i] = f(x[i], y[i]) over exactly `width` lanes. */
    void (*max)(const float *x, const float *y, float *z);
    void (*min)(const float *x, const float *y, float *z);
    void (*copysign)(const float *x, const float *y, float *z);
    float (*sum)(const float *x);
    float (*max_lanes)(const float *x);
};

extern const struct simd_arrays simd_arrays_generic, simd_arrays_avx2, simd_arrays_avx512,
    simd_arrays_amx, simd_arrays_emu512;

#endif
