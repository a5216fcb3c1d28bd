/* What kernels share: elements of any dtype as fp32, rows of strided tensors, sums over a warp and
 * a block in a fixed order, and Philox. */
#ifndef CUDA_DEVICE_CUH
#define CUDA_DEVICE_CUH

#include "cuda/launch.cuh"

/* ------------------------------------------------------------------ elements */

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

/* `count` (a power of two, at most 16 bytes' worth) neighbouring elements; `p` aligned to them. */
template <typename T, int count>
struct alignas(sizeof(T) * count) packed {
    T at[count];
};
template <typename T, int count>
__device__ __forceinline__ void load_packed(const T *p, float (&out)[count]) {
    packed<T, count> v = *(const packed<T, count> *)p;
#pragma unroll
    for (int i = 0; i < count; i++)
        out[i] = to_float(v.at[i]);
}
template <typename T, int count>
__device__ __forceinline__ void store_packed(T *p, const float (&in)[count]) {
    packed<T, count> v;
#pragma unroll
    for (int i = 0; i < count; i++)
        v.at[i] = from_float<T>(in[i]);
    *(packed<T, count> *)p = v;
}

/* `count` neighbouring floats, 16-byte aligned unless it is 1: tables read beside wide packs. */
template <int count>
__device__ __forceinline__ void load_floats(const float *p, float (&out)[count]) {
    const int step = count < 4 ? count : 4;
#pragma unroll
    for (int i = 0; i < count; i += step) {
        float v[step];
        load_packed<float, step>(p + i, v);
#pragma unroll
        for (int k = 0; k < step; k++)
            out[i + k] = v[k];
    }
}

/* Calls f(T{}) with the C++ type of a dtype: FOR_DTYPE(x.dtype, T, { kernel<T> ... }). */
#define FOR_DTYPE(dtype, T, ...)                                                                   \
    do {                                                                                           \
        if ((dtype) == DT_F32) {                                                                   \
            using T = float;                                                                       \
            __VA_ARGS__                                                                            \
        } else if ((dtype) == DT_BF16) {                                                           \
            using T = __nv_bfloat16;                                                               \
            __VA_ARGS__                                                                            \
        } else {                                                                                   \
            using T = __half;                                                                      \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    } while (0)

/* ------------------------------------------------------------------ rows
 *
 * A kernel's view of a tensor [N, D] or [N, H, D] whose last dimension is dense: row r begins at
 * (r / heads) * outer + (r % heads) * inner. */
template <typename T>
struct rows {
    T *data;
    int64_t outer, inner;
    int heads;
    __device__ __forceinline__ T *row(int64_t r) const {
        return heads == 1 ? data + r * outer : data + r / heads * outer + r % heads * inner;
    }
};
template <typename T>
static inline rows<T> rows_of(const struct tensor &t) {
    rows<T> r;
    r.data = (T *)t.data;
    r.outer = t.stride[0];
    r.inner = t.rank == 3 ? t.stride[1] : 0;
    r.heads = t.rank == 3 ? (int)t.shape[1] : 1;
    return r;
}
static inline int64_t row_count(const struct tensor &t) {
    return t.rank == 3 ? t.shape[0] * t.shape[1] : t.shape[0];
}
static inline int64_t row_width(const struct tensor &t) {
    return t.shape[t.rank - 1];
}
/* Whether every row begins at a multiple of `count` elements of an aligned address and is a
 * multiple of it wide, so that packed<T, count> serves. */
static inline bool rows_packable(const struct tensor &t, int count) {
    uintptr_t bytes = (uintptr_t)count * dtype_size(t.dtype);
    return (uintptr_t)t.data % bytes == 0 && row_width(t) % count == 0 &&
           t.stride[0] % count == 0 && (t.rank < 3 || t.stride[1] % count == 0);
}

/* Threads for [N, H, packs] and the grid's x: a block's z counts tokens, its y heads and its x
 * packs of a row, the last two in strides where there are more. */
static inline dim3 heads_block(int64_t N, int64_t H, int64_t packs, unsigned *grid) {
    const unsigned most = 256;
    unsigned x = packs < most ? (unsigned)(packs > 1 ? packs : 1) : most;
    unsigned y = H < most / x ? (unsigned)(H > 1 ? H : 1) : most / x;
    unsigned z = most / (x * y) < 64 ? most / (x * y) : 64;
    *grid = cuda_blocks(N, z);
    return dim3(x, y, z);
}

/* ------------------------------------------------------------------ sums
 *
 * Of a warp, of a block: every thread gets the result, and the order is the same every time. */
template <typename V>
__device__ __forceinline__ V warp_sum(V x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}
/* blockDim.x a multiple of 32, up to 1024; `space`: 32 floats of shared memory, free again after
 * the next __syncthreads. */
template <typename V, typename F>
__device__ __forceinline__ V block_reduce(V x, V *space, V none, F reduce) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = reduce(x);
    __syncthreads();
    if (lane == 0)
        space[warp] = x;
    __syncthreads();
    return reduce(lane < warps ? space[lane] : none);
}
__device__ __forceinline__ float block_sum(float x, float *space) {
    return block_reduce(x, space, 0.0f, [](float v) { return warp_sum(v); });
}
__device__ __forceinline__ double block_sum(double x, double *space) {
    return block_reduce(x, space, 0.0, [](double v) { return warp_sum(v); });
}
__device__ __forceinline__ float block_max(float x, float *space) {
    return block_reduce(x, space, -INFINITY, [](float v) { return warp_max(v); });
}

/* ------------------------------------------------------------------ randomness: base/random.c */

__device__ __forceinline__ void philox_block(const struct random_key &key, uint64_t block,
                                             uint32_t out[4]) {
    uint32_t c[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)key.step,
                     (uint32_t)(key.step >> 32) ^ key.op << 16};
    uint32_t k0 = (uint32_t)key.seed ^ key.layer * 0x9E3779B9u;
    uint32_t k1 = (uint32_t)(key.seed >> 32) ^ key.op;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t hi0 = __umulhi(0xD2511F53u, c[0]), lo0 = 0xD2511F53u * c[0];
        uint32_t hi1 = __umulhi(0xCD9E8D57u, c[2]), lo1 = 0xCD9E8D57u * c[2];
        uint32_t n0 = hi1 ^ c[1] ^ k0, n2 = hi0 ^ c[3] ^ k1;
        c[0] = n0;
        c[1] = lo1;
        c[2] = n2;
        c[3] = lo0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = c[i];
}
/* Uniform in [0, 1) of a number drawn, as random_uniform. */
__device__ __forceinline__ float philox_uniform(uint32_t x) {
    return (float)(x >> 8) * 0x1p-24f;
}

#endif
