/* The sum of a row's exponentials in one reading: a running maximum beside it. exp is __expf, whose
 * relative error, about 2^-22 + |x| 2^-24, stays below what the rounding of x costs. */
#ifndef CUDA_SOFTMAX_CUH
#define CUDA_SOFTMAX_CUH

#include "cuda/device.cuh"

/* Running maximum m and sum s of exp(x - m); m = -inf: nothing seen but -inf. */
struct running {
    float m, s;
};
__device__ __forceinline__ struct running merge(struct running a, struct running b) {
    float m = fmaxf(a.m, b.m);
    if (m == -INFINITY)
        return {m, a.s + b.s};
    return {m, a.s * __expf(a.m - m) + b.s * __expf(b.m - m)};
}
template <int count>
__device__ __forceinline__ struct running include(struct running r, const float (&x)[count]) {
    float m = r.m, s;
#pragma unroll
    for (int k = 0; k < count; k++)
        m = fmaxf(m, x[k]);
    /* Every x -inf, or NaN (which fmaxf passes over): the sum shows NaN. */
    float at = m == -INFINITY ? 0.0f : m;
    s = r.s * __expf(r.m - at);
#pragma unroll
    for (int k = 0; k < count; k++)
        s += __expf(x[k] - at);
    return {m, s};
}
/* Over a warp; the order is the same every time, lane 0 has the result. */
__device__ __forceinline__ struct running warp_merge(struct running r) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        r = merge(r, {__shfl_xor_sync(0xffffffffu, r.m, d), __shfl_xor_sync(0xffffffffu, r.s, d)});
    return r;
}

#endif
