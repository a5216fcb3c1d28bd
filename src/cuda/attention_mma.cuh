/* Tiles of 16-bit elements in shared memory and their products on tensor cores (mma.cuh): what
 * attention_mma*.cu are made of.
 *
 * Rows of shared tiles are 8 elements longer than DP wide: 16 bytes more than a multiple of 32, so
 * that the 8 rows an ldmatrix reads lie in different banks. Only the first 16 ceil(d / 16) columns
 * are written and read; those from d on are zeros. */
#ifndef CUDA_ATTENTION_MMA_CUH
#define CUDA_ATTENTION_MMA_CUH

#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

static const int MMA_THREADS = 128, MMA_WARPS = 4;

/* Whether rows can be copied 16 bytes at a time. */
static inline bool mma_aligned(const heads_view &x, int width) {
    return width % 8 == 0 && (uintptr_t)x.data % 16 == 0 && x.row % 8 == 0 && x.head % 8 == 0;
}

/* ROWS rows of d columns, by the block: row r from element at(r) of x on (-1: zeros). Copies are
 * asynchronous where `aligned`. */
template <typename T, int ROWS, int DP, typename F>
__device__ __forceinline__ void mma_tile(T *to, const char *x, int width, bool aligned, F at) {
    const int CHUNKS = DP / 8, LD = DP + 8;
    int used = (width + 15) / 16 * 2;
    for (int e = (int)threadIdx.x; e < ROWS * CHUNKS; e += MMA_THREADS) {
        int r = e / CHUNKS, c = e % CHUNKS;
        if (c >= used)
            continue;
        int64_t from = at(r);
        const T *row = (const T *)x + from + c * 8;
        T *place = to + r * LD + c * 8;
        bool zeros = from < 0 || c * 8 >= width;
        if (aligned) {
            copy_async(place, zeros ? (const T *)x : row, zeros);
        } else {
            packed<T, 8> v;
#pragma unroll
            for (int k = 0; k < 8; k++)
                v.at[k] = !zeros && c * 8 + k < width ? row[k] : from_float<T>(0.0f);
            *(packed<T, 8> *)place = v;
        }
    }
}

/* s[m][n] = the warp's rows 16 m of A times rows 8 n of B, over `steps` 16 columns. */
template <typename T, int MT, int NT, int DP>
__device__ __forceinline__ void mma_scores(float (&s)[MT][NT][4], const T *A, const T *B,
                                           int steps) {
    const int LD = DP + 8;
    int lane = threadIdx.x % 32;
    const T *x = A + lane % 16 * LD + lane / 16 * 8;
    const T *y = B + (lane / 16 * 8 + lane % 8) * LD + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                s[m][n][k] = 0.0f;
#pragma unroll 2
    for (int k = 0; k < steps; k++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            mma_load(a[m], x + m * 16 * LD + k * 16);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t b[4];
            mma_load(b, y + n * 8 * LD + k * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_product<T>(s[m][n], a[m], b[0], b[1]);
                mma_product<T>(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
/* sum[m][c] += P (from scores' fragments, rounded to T) times columns 16 (first + c) of B's rows;
 * columns from 16 `steps` on are left alone. */
template <typename T, int MT, int NT, int DP, int CT>
__device__ __forceinline__ void mma_weighted(float (&sum)[MT][CT][4], const float (&p)[MT][NT][4],
                                             const T *B, int first, int steps) {
    const int LD = DP + 8;
    int lane = threadIdx.x % 32;
    const T *y = B + (lane / 8 % 2 * 8 + lane % 8) * LD + lane / 16 * 8 + first * 16;
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                a[m][2 * half] = mma_pair<T>(p[m][2 * k + half][0], p[m][2 * k + half][1]);
                a[m][2 * half + 1] = mma_pair<T>(p[m][2 * k + half][2], p[m][2 * k + half][3]);
            }
#pragma unroll
        for (int c = 0; c < CT / 2; c++) {
            if (first + c >= steps)
                break;
            uint32_t b[4];
            mma_load_trans(b, y + k * 16 * LD + c * 16);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma_product<T>(sum[m][2 * c], a[m], b[0], b[1]);
                mma_product<T>(sum[m][2 * c + 1], a[m], b[2], b[3]);
            }
        }
    }
}
/* Two neighbouring columns of a row. */
template <typename T>
__device__ __forceinline__ void mma_store(T *row, int t, int width, bool pairs, float x, float y) {
    if (pairs && t + 1 < width) {
        *(uint32_t *)(row + t) = mma_pair<T>(x, y);
    } else {
        if (t < width)
            row[t] = from_float<T>(x);
        if (t + 1 < width)
            row[t + 1] = from_float<T>(y);
    }
}
/* Dropout's factors of a fragment of scores with rows n0 (elements 0, 1) and n1 (2, 3), columns j
 * and j + 1 with j = j8 + 2 (lane % 4): neighbouring lanes draw one row's four numbers each. */
__device__ __forceinline__ void mma_dropout(const attention_view &a, const struct random_key &key,
                                            int h0, int n0, int h1, int n1, int j8,
                                            float (&out)[4]) {
    int t = threadIdx.x % 4;
    bool odd = t % 2;
    float w[4];
    dropout_four(a, key, odd ? h1 : h0, odd ? n1 : n0, j8 + t / 2 * 4, w);
    float x = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[2], 1);
    float y = __shfl_xor_sync(0xffffffffu, odd ? w[1] : w[3], 1);
    out[0] = odd ? x : w[0];
    out[1] = odd ? y : w[1];
    out[2] = odd ? w[2] : x;
    out[3] = odd ? w[3] : y;
}

#endif
