/* Products of tiles in shared memory by 16 x 16 threads in fp32: what attention_fma*.cu is made of.
 *
 * Thread (ty, tx) owns rows ty TM + a and columns tx + 16 b of a product of scores, and columns
 * 4 tx + 64 c .. + 3 of one with d columns. Rows of shared tiles are 4 floats longer than wide, so
 * that float4 reads of 8 neighbouring threads touch different banks. */
#ifndef CUDA_ATTENTION_FMA_CUH
#define CUDA_ATTENTION_FMA_CUH

#include "cuda/attention.cuh"

static const int FMA_THREADS = 256;

/* rows x DM floats; row r comes from row index[r] of x (-1: zeros), times scale[index[r]][head]. */
template <int ROWS, int DM>
__device__ __forceinline__ void fma_load(float *to, const heads_view &x, int head, const int *index,
                                         int width, const float *scale, int scale_heads) {
    for (int e = (int)threadIdx.x; e < ROWS * DM; e += FMA_THREADS) {
        int r = e / DM, t = e % DM;
        float value = 0.0f;
        if (t < width && index[r] >= 0) {
            value = load_any(x.data, x.dtype, index[r] * x.row + head * x.head + t);
            if (scale)
                value *= scale[(int64_t)index[r] * scale_heads + head];
        }
        to[r * (DM + 4) + t] = value;
    }
}
__device__ __forceinline__ float fma_dot4(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}
/* out[a][b] = row (ty TM + a) of A . row (tx + 16 b) of B, over the first `width` columns. */
template <int TM, int TN, int DM>
__device__ __forceinline__ void fma_scores(float (&out)[TM][TN], const float *A, const float *B,
                                           int width) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int a = 0; a < TM; a++)
#pragma unroll
        for (int b = 0; b < TN; b++)
            out[a][b] = 0.0f;
#pragma unroll 2
    for (int t = 0; t < width; t += 4) {
        float4 x[TM], y[TN];
#pragma unroll
        for (int a = 0; a < TM; a++)
            x[a] = *(const float4 *)(A + (ty * TM + a) * (DM + 4) + t);
#pragma unroll
        for (int b = 0; b < TN; b++)
            y[b] = *(const float4 *)(B + (tx + 16 * b) * (DM + 4) + t);
#pragma unroll
        for (int a = 0; a < TM; a++)
#pragma unroll
            for (int b = 0; b < TN; b++)
                out[a][b] = fma_dot4(x[a], y[b], out[a][b]);
    }
}
/* sum[a][c] += P[ty TM + a][:] . B[:][4 tx + 64 (c / 4) + c % 4]; P's rows have BN (+ 4) floats. */
template <int TM, int BN, int DM>
__device__ __forceinline__ void fma_product(float (&sum)[TM][DM / 16], const float *P,
                                            const float *B) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll 1
    for (int j = 0; j < BN; j += 4) {
        float p[TM][4];
#pragma unroll
        for (int a = 0; a < TM; a++)
            *(float4 *)p[a] = *(const float4 *)(P + (ty * TM + a) * (BN + 4) + j);
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int c = 0; c < DM / 64; c++) {
                float4 y = *(const float4 *)(B + (j + k) * (DM + 4) + 4 * tx + 64 * c);
#pragma unroll
                for (int a = 0; a < TM; a++) {
                    sum[a][4 * c] = fmaf(p[a][k], y.x, sum[a][4 * c]);
                    sum[a][4 * c + 1] = fmaf(p[a][k], y.y, sum[a][4 * c + 1]);
                    sum[a][4 * c + 2] = fmaf(p[a][k], y.z, sum[a][4 * c + 2]);
                    sum[a][4 * c + 3] = fmaf(p[a][k], y.w, sum[a][4 * c + 3]);
                }
            }
    }
}
template <int TM, int DM>
__device__ __forceinline__ void fma_store(const heads_view &x, int64_t row, int head, int width,
                                          const float (&sum)[DM / 16], float factor) {
    int tx = threadIdx.x % 16;
#pragma unroll
    for (int c = 0; c < DM / 16; c++) {
        int t = 4 * tx + 64 * (c / 4) + c % 4;
        if (t < width)
            store_any(x.data, x.dtype, row * x.row + head * x.head + t, sum[c] * factor);
    }
}

#endif
