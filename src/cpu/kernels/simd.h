/* Vectors of floats for kernels that are written once and compiled per level (level.h).
 *
 *   vf   VF_WIDTH floats         vi, vu   as many int32_t, uint32_t
 *
 * All three are GCC vector types, so + - * / & | ^ ~ << >> and the comparisons work on them, and a
 * cast between them reinterprets the bits. A comparison gives a vi mask: -1 where true, 0
 * elsewhere. The functions here are what operators cannot say; intrinsics appear only where both
 * compilers would do badly without, beside a plain version that serves generic processors and the
 * emulation of 16 lanes in tests (as two halves of 8). A kernel that includes this file should need
 * no #if.
 *
 *   constants     vf_set vi_set vf_zero vi_iota
 *   memory        vf_load vf_store (fp32, any alignment), _n (only the first n lanes),
 *                 vf_load_bf16 vf_store_bf16 vf_load_f16 vf_store_f16 and their _n,
 *                 vf_load_as vf_store_as (dtype as an argument: a constant after inlining)
 *   arithmetic    vf_fma vf_max vf_min vf_abs vf_sqrt vf_copysign vf_round_bf16
 *   lanes         vf_less vf_is_nan vi_first (masks) vf_select
 *   conversion    vf_from_vi vi_from_vf (truncates)
 *   reduction     vf_sum vf_max_lanes (a fixed tree: halves, quarters, ...)
 *   doubles       vd (VF_WIDTH / 2 of them) vd_load_f32
 *   functions     vf_exp vf_exp2 vf_tanh vf_erf vf_normal_cdf vf_sigmoid
 *
 * The loop over n elements is written with one body for full and partial vectors: an inlined
 * function of a lane count, called with the constant VF_WIDTH (then _n is a plain load) and once
 * with what remains:
 *
 *   int64_t i = 0;
 *   for (; i + VF_WIDTH <= n; i += VF_WIDTH)
 *       body(p + i, VF_WIDTH);
 *   if (i < n)
 *       body(p + i, (int)(n - i));
 *
 * Errors in ulp below are those that tests/cpu/test_simd.c measures. */
#ifndef CPU_KERNELS_SIMD_H
#define CPU_KERNELS_SIMD_H

#include <math.h>
#include <string.h>

#include "base/dtype.h"
#include "cpu/kernels/level.h"

#if SIMD_AVX2 || SIMD_EMULATED
#include <immintrin.h>
#endif

#define SIMD static inline __attribute__((always_inline, unused))

#if SIMD_AVX512 || SIMD_EMULATED
#define VF_WIDTH 16
#define VF_LANES(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#elif SIMD_AVX2
#define VF_WIDTH 8
#define VF_LANES(x) x, x, x, x, x, x, x, x
#else
#define VF_WIDTH 4
#define VF_LANES(x) x, x, x, x
#endif

typedef float vf __attribute__((vector_size(4 * VF_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * VF_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * VF_WIDTH)));
typedef uint16_t vh __attribute__((vector_size(2 * VF_WIDTH))); /* 16-bit storage of a vf */
/* The same in memory at any address, aliasing anything. */
typedef float vf_memory __attribute__((vector_size(4 * VF_WIDTH), aligned(1), may_alias));
typedef int32_t vi_memory __attribute__((vector_size(4 * VF_WIDTH), aligned(1), may_alias));
typedef uint16_t vh_memory __attribute__((vector_size(2 * VF_WIDTH), aligned(1), may_alias));

#if SIMD_EMULATED
/* 16 lanes as two halves of 8, for what the compiler would take apart lane by lane. */
union simd_halves {
    vf f;
    vi i;
    vu u;
    vh h;
    __m256 half[2];
    __m256i whole[2];
    __m128i quarter[2];
};
#define SIMD_HALVES(call)                                                                          \
    for (int k = 0; k < 2; k++)                                                                    \
    r.half[k] = (call)
#endif

/* ---------------------------------------------------------------- constants */

SIMD vf vf_set(float x) {
    return (vf){VF_LANES(x)};
}
SIMD vi vi_set(int32_t x) {
    return (vi){VF_LANES(x)};
}
SIMD vf vf_zero(void) {
    return vf_set(0.0f);
}
/* 0, 1, 2, ... */
SIMD vi vi_iota(void) {
#if VF_WIDTH == 16
    return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif VF_WIDTH == 8
    return (vi){0, 1, 2, 3, 4, 5, 6, 7};
#else
    return (vi){0, 1, 2, 3};
#endif
}
/* Mask of the first n lanes, 0 <= n <= VF_WIDTH. */
SIMD vi vi_first(int n) {
#if SIMD_EMULATED
    union simd_halves r = {.i = vi_iota()};
    SIMD_HALVES((__m256)_mm256_cmpgt_epi32(_mm256_set1_epi32(n), r.whole[k]));
    return r.i;
#else
    return vi_iota() < vi_set(n);
#endif
}

/* ---------------------------------------------------------------- arithmetic */

/* a * b + c, fused where the level has it. */
SIMD vf vf_fma(vf a, vf b, vf c) {
#if SIMD_AVX512
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SIMD_AVX2
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif SIMD_EMULATED
    union simd_halves x = {.f = a}, y = {.f = b}, r = {.f = c};
    SIMD_HALVES(_mm256_fmadd_ps(x.half[k], y.half[k], r.half[k]));
    return r.f;
#else
    return a * b + c;
#endif
}

/* Lane by lane: mask (a comparison's) ? a : b. */
SIMD vf vf_select(vi mask, vf a, vf b) {
#if SIMD_AVX2 && !SIMD_AVX512
    return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (vf)(((vi)a & mask) | ((vi)b & ~mask));
#endif
}

/* a < b, in every lane: the operator, which the emulation would take apart. */
SIMD vi vf_less(vf a, vf b) {
#if SIMD_EMULATED
    union simd_halves x = {.f = a}, r = {.f = b};
    SIMD_HALVES(_mm256_cmp_ps(x.half[k], r.half[k], _CMP_LT_OQ));
    return r.i;
#else
    return a < b;
#endif
}
/* Lanes that are NaN. */
SIMD vi vf_is_nan(vf a) {
#if SIMD_EMULATED
    union simd_halves r = {.f = a};
    SIMD_HALVES(_mm256_cmp_ps(r.half[k], r.half[k], _CMP_UNORD_Q));
    return r.i;
#else
    return a != a;
#endif
}

/* a > b ? a : b and a < b ? a : b, so that the second wins when either is NaN: vf_max(x, y) drops a
 * NaN in x and passes one in y. */
SIMD vf vf_max(vf a, vf b) {
#if SIMD_AVX512
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif SIMD_AVX2
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif SIMD_EMULATED
    union simd_halves x = {.f = a}, r = {.f = b};
    SIMD_HALVES(_mm256_max_ps(x.half[k], r.half[k]));
    return r.f;
#else
    return vf_select(a > b, a, b);
#endif
}
SIMD vf vf_min(vf a, vf b) {
#if SIMD_AVX512
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif SIMD_AVX2
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif SIMD_EMULATED
    union simd_halves x = {.f = a}, r = {.f = b};
    SIMD_HALVES(_mm256_min_ps(x.half[k], r.half[k]));
    return r.f;
#else
    return vf_select(a < b, a, b);
#endif
}

SIMD vf vf_abs(vf a) {
    return (vf)((vi)a & vi_set(0x7fffffff));
}
/* |a| with the sign of b. */
SIMD vf vf_copysign(vf a, vf b) {
    return (vf)(((vi)a & vi_set(0x7fffffff)) | ((vi)b & vi_set((int32_t)0x80000000u)));
}
SIMD vf vf_from_vi(vi a) {
    return __builtin_convertvector(a, vf);
}
SIMD vi vi_from_vf(vf a) {
    return __builtin_convertvector(a, vi);
}
SIMD vf vf_sqrt(vf a) {
#if SIMD_AVX512
    return (vf)_mm512_sqrt_ps((__m512)a);
#elif SIMD_AVX2
    return (vf)_mm256_sqrt_ps((__m256)a);
#elif SIMD_EMULATED
    union simd_halves r = {.f = a};
    SIMD_HALVES(_mm256_sqrt_ps(r.half[k]));
    return r.f;
#else
    for (int i = 0; i < VF_WIDTH; i++)
        a[i] = sqrtf(a[i]);
    return a;
#endif
}

/* ---------------------------------------------------------------- memory, fp32 */

SIMD vf vf_load(const float *p) {
    return (vf) * (const vf_memory *)p;
}
SIMD void vf_store(float *p, vf a) {
    *(vf_memory *)p = (vf_memory)a;
}
/* The first n lanes (0 <= n <= VF_WIDTH); nothing beyond p[n - 1] is touched. Other lanes: 0. */
SIMD vf vf_load_n(const float *p, int n) {
    if (n == VF_WIDTH)
        return vf_load(p);
#if SIMD_AVX512
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif SIMD_AVX2
    return (vf)_mm256_maskload_ps(p, (__m256i)vi_first(n));
#else
    vf a = vf_zero();
    for (int i = 0; i < n; i++)
        a[i] = p[i];
    return a;
#endif
}
SIMD void vf_store_n(float *p, vf a, int n) {
    if (n == VF_WIDTH) {
        vf_store(p, a);
        return;
    }
#if SIMD_AVX512
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)a);
#elif SIMD_AVX2
    _mm256_maskstore_ps(p, (__m256i)vi_first(n), (__m256)a);
#else
    for (int i = 0; i < n; i++)
        p[i] = a[i];
#endif
}
SIMD vi vi_load(const int32_t *p) {
    return (vi) * (const vi_memory *)p;
}
SIMD void vi_store(int32_t *p, vi a) {
    *(vi_memory *)p = (vi_memory)a;
}

/* ---------------------------------------------------------------- memory, 16 bits */

SIMD vh vh_load_n(const uint16_t *p, int n) {
    if (n == VF_WIDTH)
        return (vh) * (const vh_memory *)p;
#if SIMD_AVX512
    return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
    vh a = {0};
    for (int i = 0; i < n; i++)
        a[i] = p[i];
    return a;
#endif
}
SIMD void vh_store_n(uint16_t *p, vh a, int n) {
    if (n == VF_WIDTH) {
        *(vh_memory *)p = (vh_memory)a;
        return;
    }
#if SIMD_AVX512
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)a);
#else
    for (int i = 0; i < n; i++)
        p[i] = a[i];
#endif
}

SIMD vf vf_from_bf16(vh a) {
#if SIMD_AVX512
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)a), 16);
#elif SIMD_AVX2
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)a), 16);
#elif SIMD_EMULATED
    union simd_halves x = {.h = a}, r;
    SIMD_HALVES((__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x.quarter[k]), 16));
    return r.f;
#else
    return (vf)(__builtin_convertvector(a, vu) << 16);
#endif
}
/* The bf16 patterns in the upper halves (lower halves: rubbish): nearest, ties to even; NaN made
 * quiet. The same bits as f32_to_bf16 (AVX512_BF16's instruction would flush subnormals). */
SIMD vu vu_round_bf16(vf a) {
    vu bits = (vu)a;
    vu rounded = bits + ((bits >> 16) & (vu)vi_set(1)) + (vu)vi_set(0x7fff);
    vu quiet = bits | (vu)vi_set(0x400000);
    return (vu)vf_select(vf_is_nan(a), (vf)quiet, (vf)rounded);
}
SIMD vh vh_from_vf_bf16(vf a) {
    vu bits = vu_round_bf16(a) >> 16;
#if SIMD_AVX512
    return (vh)_mm512_cvtepi32_epi16((__m512i)bits);
#elif SIMD_AVX2
    __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
    return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(bits, vh);
#endif
}
/* a rounded to bf16, as fp32. */
SIMD vf vf_round_bf16(vf a) {
    return (vf)(vu_round_bf16(a) & (vu)vi_set((int32_t)0xffff0000u));
}

SIMD vf vf_from_f16(vh a) {
#if SIMD_AVX512
    return (vf)_mm512_cvtph_ps((__m256i)a);
#elif SIMD_AVX2
    return (vf)_mm256_cvtph_ps((__m128i)a);
#elif SIMD_EMULATED
    union simd_halves x = {.h = a}, r;
    SIMD_HALVES(_mm256_cvtph_ps(x.quarter[k]));
    return r.f;
#else
    vf r = vf_zero();
    for (int i = 0; i < VF_WIDTH; i++)
        r[i] = f16_to_f32(a[i]);
    return r;
#endif
}
SIMD vh vh_from_vf_f16(vf a) {
#if SIMD_AVX512
    return (vh)_mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif SIMD_AVX2
    return (vh)_mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT);
#elif SIMD_EMULATED
    union simd_halves x = {.f = a}, r;
    for (int k = 0; k < 2; k++)
        r.quarter[k] = _mm256_cvtps_ph(x.half[k], _MM_FROUND_TO_NEAREST_INT);
    return r.h;
#else
    vh r = {0};
    for (int i = 0; i < VF_WIDTH; i++)
        r[i] = f32_to_f16(a[i]);
    return r;
#endif
}

SIMD vf vf_load_bf16_n(const uint16_t *p, int n) {
    return vf_from_bf16(vh_load_n(p, n));
}
SIMD void vf_store_bf16_n(uint16_t *p, vf a, int n) {
    vh_store_n(p, vh_from_vf_bf16(a), n);
}
SIMD vf vf_load_bf16(const uint16_t *p) {
    return vf_load_bf16_n(p, VF_WIDTH);
}
SIMD void vf_store_bf16(uint16_t *p, vf a) {
    vf_store_bf16_n(p, a, VF_WIDTH);
}
SIMD vf vf_load_f16_n(const uint16_t *p, int n) {
    return vf_from_f16(vh_load_n(p, n));
}
SIMD void vf_store_f16_n(uint16_t *p, vf a, int n) {
    vh_store_n(p, vh_from_vf_f16(a), n);
}
SIMD vf vf_load_f16(const uint16_t *p) {
    return vf_load_f16_n(p, VF_WIDTH);
}
SIMD void vf_store_f16(uint16_t *p, vf a) {
    vf_store_f16_n(p, a, VF_WIDTH);
}

/* n elements of dtype t (F32, BF16 or F16) from element `at` of p on. Callers are specialised: t
 * must be a constant once they are inlined. */
SIMD vf vf_load_as(const void *p, enum dtype t, int64_t at, int n) {
    if (t == DT_F32)
        return vf_load_n((const float *)p + at, n);
    if (t == DT_BF16)
        return vf_load_bf16_n((const uint16_t *)p + at, n);
    return vf_load_f16_n((const uint16_t *)p + at, n);
}
SIMD void vf_store_as(void *p, enum dtype t, int64_t at, vf a, int n) {
    if (t == DT_F32)
        vf_store_n((float *)p + at, a, n);
    else if (t == DT_BF16)
        vf_store_bf16_n((uint16_t *)p + at, a, n);
    else
        vf_store_f16_n((uint16_t *)p + at, a, n);
}

/* ---------------------------------------------------------------- reductions */

typedef float vf4 __attribute__((vector_size(16)));
typedef float vf8 __attribute__((vector_size(32)));

/* Lanes added in halves: (i, i + 8), (i, i + 4), (i, i + 2), (0, 1). */
SIMD float vf_sum(vf a) {
#if VF_WIDTH == 16
    vf8 b = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
#elif VF_WIDTH == 8
    vf8 b = a;
#endif
#if VF_WIDTH >= 8
    vf4 c = __builtin_shufflevector(b, b, 0, 1, 2, 3) + __builtin_shufflevector(b, b, 4, 5, 6, 7);
#else
    vf4 c = a;
#endif
    c += __builtin_shufflevector(c, c, 2, 3, 0, 1);
    return c[0] + c[1];
}
/* The largest lane; a must not hold NaN. */
SIMD float vf_max_lanes(vf a) {
#if VF_WIDTH == 16
    a = vf_max(a,
               __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    a = vf_max(a,
               __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15));
#elif VF_WIDTH == 8
    a = vf_max(a, __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3));
#endif
    float b = a[0] > a[2] ? a[0] : a[2], c = a[1] > a[3] ? a[1] : a[3];
    return b > c ? b : c;
}

/* ---------------------------------------------------------------- doubles */

typedef double vd __attribute__((vector_size(4 * VF_WIDTH))); /* VF_WIDTH / 2 doubles */

/* VF_WIDTH / 2 floats as doubles. */
SIMD vd vd_load_f32(const float *p) {
#if SIMD_AVX512
    return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif SIMD_AVX2
    return (vd)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    vd a = {0};
    for (int i = 0; i < VF_WIDTH / 2; i++)
        a[i] = (double)p[i];
    return a;
#endif
}

/* ---------------------------------------------------------------- functions */

/* Polynomials are near-minimax fits (Lawson's iteration on Chebyshev nodes) of what is said. */

/* Shared end of exp and exp2: 2^n * p for |n| up to 128, where `p2` = 2 p and n = shifted - magic.
 * A float plus 1.5 * 2^23 holds its nearest integer in its low bits. n <= -126 gives 0 (the scale
 * 2^(n-1) has no normal float), 2^128 overflows to infinity by itself; NaN in p2 passes. */
#define SIMD_ROUND 0x1.8p23f
SIMD vf vf_scale(vf p2, vf shifted) {
    vi exponent = (vi)shifted - vi_set(0x4b400000 - 126);
    return p2 * (vf)(exponent << 23);
}

/* e^x. 0.91 ulp (1.2 without fused multiply-add) where e^x >= 2^-125; below, 0 (-infinity
 * included); infinity from 88.7229 up; NaN passes. e^x = 2^n e^r, |r| <= ln(2)/2: e^r = 1 + r + r^2
 * q(r), q of degree 4 (3e-9). */
SIMD vf vf_exp(vf x) {
    x = vf_min(vf_set(89.0f), vf_max(vf_set(-87.6f), x));
    vf shifted = vf_fma(x, vf_set(0x1.715476p0f), vf_set(SIMD_ROUND));
    vf n = shifted - vf_set(SIMD_ROUND);
    vf r = vf_fma(n, vf_set(-0.693359375f), x); /* exact: ln 2 in two parts, the first of 10 bits */
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf q = vf_set(2 * 1.381446491e-3f);
    q = vf_fma(q, r, vf_set(2 * 8.368780836e-3f));
    q = vf_fma(q, r, vf_set(2 * 4.166839272e-2f));
    q = vf_fma(q, r, vf_set(2 * 1.666651964e-1f));
    q = vf_fma(q, r, vf_set(2 * 4.999999404e-1f));
    q = vf_fma(q, r, vf_set(2.0f));
    return vf_scale(vf_fma(q, r, vf_set(2.0f)), shifted);
}

/* 2^x. 0.95 ulp (1.25 without fusing) where x >= -125; below -125.5, 0; infinity from 128 up; NaN
 * passes. 2^r = 1 + r q(r), |r| <= 1/2, q of degree 5 (2e-9). */
SIMD vf vf_exp2(vf x) {
    x = vf_min(vf_set(128.5f), vf_max(vf_set(-126.0f), x));
    vf shifted = x + vf_set(SIMD_ROUND);
    vf r = x - (shifted - vf_set(SIMD_ROUND));
    vf q = vf_set(2 * 1.535325719e-4f);
    q = vf_fma(q, r, vf_set(2 * 1.339900424e-3f));
    q = vf_fma(q, r, vf_set(2 * 9.618438780e-3f));
    q = vf_fma(q, r, vf_set(2 * 5.550331995e-2f));
    q = vf_fma(q, r, vf_set(2 * 2.402264774e-1f));
    q = vf_fma(q, r, vf_set(2 * 6.931471825e-1f));
    return vf_scale(vf_fma(q, r, vf_set(2.0f)), shifted);
}

/* 1 / (1 + e^-x). 3 ulp where it is a normal float; 0 below -87. NaN passes. */
SIMD vf vf_sigmoid(vf x) {
    return vf_set(1.0f) / (vf_set(1.0f) + vf_exp(-x));
}

/* tanh x, 1.5 ulp. x + x z p(z), z = x^2, p of degree 4 (4e-9) below 0.625; then 1 - 2/(e^2x + 1).
 */
SIMD vf vf_tanh(vf x) {
    vf a = vf_abs(x), z = x * x;
    vf p = vf_set(-5.704978481e-03f);
    p = vf_fma(p, z, vf_set(2.063907869e-02f));
    p = vf_fma(p, z, vf_set(-5.373971164e-02f));
    p = vf_fma(p, z, vf_set(1.333144158e-01f));
    p = vf_fma(p, z, vf_set(-3.333328068e-01f));
    vf small = vf_fma(p * z, x, x);
    vf large = vf_set(1.0f) - vf_set(2.0f) / (vf_exp(a + a) + vf_set(1.0f));
    return vf_select(vf_less(a, vf_set(0.625f)), small, vf_copysign(large, x));
}

/* log erfc(t), t in [0.9, 6]: degree 9; e to it has a relative error of 1.3e-7 at most, less where
 * erfc is large. */
SIMD vf vf_log_erfc(vf t) {
    vf p = vf_set(-8.560991205e-08f);
    p = vf_fma(p, t, vf_set(3.411820671e-06f));
    p = vf_fma(p, t, vf_set(-6.165003288e-05f));
    p = vf_fma(p, t, vf_set(6.722190883e-04f));
    p = vf_fma(p, t, vf_set(-4.977544770e-03f));
    p = vf_fma(p, t, vf_set(2.680188976e-02f));
    p = vf_fma(p, t, vf_set(-1.104630753e-01f));
    p = vf_fma(p, t, vf_set(-6.316389441e-01f));
    p = vf_fma(p, t, vf_set(-1.130248308e+00f));
    return vf_fma(p, t, vf_set(3.065676719e-04f));
}
/* erf x for |x| <= 0.92: x + x p(x^2), p of degree 5 (2e-8). */
SIMD vf vf_erf_small(vf x) {
    vf z = x * x;
    vf p = vf_set(-5.999404239e-04f);
    p = vf_fma(p, z, vf_set(4.994830117e-03f));
    p = vf_fma(p, z, vf_set(-2.676771954e-02f));
    p = vf_fma(p, z, vf_set(1.128184572e-01f));
    p = vf_fma(p, z, vf_set(-3.761249781e-01f));
    p = vf_fma(p, z, vf_set(1.283791512e-01f));
    return vf_fma(p, x, x);
}

/* erf x, 1.5 ulp; NaN passes. */
SIMD vf vf_erf(vf x) {
    vf a = vf_abs(x);
    vf large = vf_set(1.0f) - vf_exp(vf_log_erfc(vf_min(vf_set(6.0f), a)));
    return vf_select(vf_less(a, vf_set(0.91f)), vf_erf_small(x), vf_copysign(large, x));
}

/* The normal distribution's cumulative probability of x, (1 + erf(x / sqrt 2)) / 2, with a small
 * relative error in the lower tail too: 1e-5 down to x = -8; constant (2e-17) from -8.5 down. */
SIMD vf vf_normal_cdf(vf x) {
    vf t = x * vf_set(0.70710678118654752f), a = vf_abs(t), half = vf_set(0.5f);
    vf tail = half * vf_exp(vf_log_erfc(vf_min(vf_set(6.0f), a)));
    vf far = vf_select(vf_less(t, vf_zero()), tail, vf_set(1.0f) - tail);
    return vf_select(vf_less(a, vf_set(0.91f)), vf_fma(half, vf_erf_small(t), half), far);
}

#endif
