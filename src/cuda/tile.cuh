/* Tiles of 64 rows: products of two of them in shared memory by the block's 256 threads, each with
 * 4 x 4 sums in registers, and loading them from rows of any strides.
 *
 * A tile in shared memory is [k][64], rows TILE_LD floats apart: that keeps float4 aligned, and a
 * column's 32 neighbours fall into different banks. Thread t has rows 4 (t / 16) + 0..3 and columns
 * 4 (t % 16) + 0..3 of a product: a step of k costs 2 loads of 16 bytes for 16 multiplications. */
#ifndef CUDA_TILE_CUH
#define CUDA_TILE_CUH

#include "cuda/device.cuh"

static const int TILE = 64;
static const int TILE_LD = 68;
static const int SLICE = 32; /* channels at a time */
static const int TILE_THREADS = 256;
static const int TILE_FLOATS = TILE * TILE_LD;
static const int SLICE_FLOATS = SLICE * TILE_LD;

/* acc[r][c] += sum over k of a[k][row r] b[k][column c] */
template <int depth>
__device__ __forceinline__ void tile_product(float (&acc)[4][4], const float *a, const float *b) {
    const float *x = a + threadIdx.x / 16 * 4, *y = b + threadIdx.x % 16 * 4;
#pragma unroll 8
    for (int k = 0; k < depth; k++) {
        float4 u = *(const float4 *)(x + k * TILE_LD), v = *(const float4 *)(y + k * TILE_LD);
        const float left[4] = {u.x, u.y, u.z, u.w}, right[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int r = 0; r < 4; r++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                acc[r][c] += left[r] * right[c];
    }
}
__device__ __forceinline__ void tile_clear(float (&acc)[4][4]) {
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            acc[r][c] = 0.0f;
}
/* A product into shared memory: as it is, [row][column], or transposed. */
__device__ __forceinline__ void tile_keep(float *out, const float (&acc)[4][4]) {
    float *at = out + threadIdx.x / 16 * 4 * TILE_LD + threadIdx.x % 16 * 4;
#pragma unroll
    for (int r = 0; r < 4; r++)
        *(float4 *)(at + r * TILE_LD) = make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}
__device__ __forceinline__ void tile_keep_transposed(float *out, const float (&acc)[4][4]) {
    float *at = out + threadIdx.x % 16 * 4 * TILE_LD + threadIdx.x / 16 * 4;
#pragma unroll
    for (int c = 0; c < 4; c++)
        *(float4 *)(at + c * TILE_LD) = make_float4(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);
}
/* Sum over a row's columns, in all of the 16 threads that have them. */
__device__ __forceinline__ float tile_row_sum(float x) {
#pragma unroll
    for (int d = 8; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
__device__ __forceinline__ float tile_row_max(float x) {
#pragma unroll
    for (int d = 8; d > 0; d /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

/* Channels c .. c + 3 of a row (NULL: zeros), those from d on as 0. `wide`: d and the row's address
 * are multiples of four elements. */
template <typename T>
__device__ __forceinline__ void load_four(float (&v)[4], const T *row, int c, int d, bool wide) {
    if (wide && row && c < d) {
        load_packed<T, 4>(row + c, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        v[i] = row && c + i < d ? to_float(row[c + i]) : 0.0f;
}
template <typename T>
__device__ __forceinline__ void store_four(T *row, const float (&v)[4], int c, int d, bool wide) {
    if (wide && c < d) {
        store_packed<T, 4>(row + c, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (c + i < d)
            row[c + i] = from_float<T>(v[i]);
}

struct tile_same {
    __device__ __forceinline__ float operator()(float x, int, int) const {
        return x;
    }
};

/* Channels [first, first + SLICE) of 64 rows, transposed: out[channel][row]; row(i) is a pointer or
 * NULL. map(x, i, channel) applies to what is there, not to the zeros beyond. */
template <typename T, typename R, typename M>
__device__ __forceinline__ void load_slice(float *out, R row, int first, int d, bool wide, M map) {
    int i = threadIdx.x % TILE, at = threadIdx.x / TILE * 8;
    const T *p = row(i);
#pragma unroll
    for (int part = 0; part < 8; part += 4) {
        float v[4];
        load_four(v, p, first + at + part, d, wide);
#pragma unroll
        for (int c = 0; c < 4; c++)
            out[(at + part + c) * TILE_LD + i] =
                p && first + at + part + c < d ? map(v[c], i, first + at + part + c) : 0.0f;
    }
}
/* Columns [first, first + 64) of `count` rows as they are: out[row][column]. */
template <typename T, typename R, typename M>
__device__ __forceinline__ void load_tile(float *out, R row, int count, int first, int d, bool wide,
                                          M map) {
    int c = threadIdx.x % 16 * 4;
    for (int i = threadIdx.x / 16; i < count; i += TILE_THREADS / 16) {
        const T *p = row(i);
        float v[4];
        load_four(v, p, first + c, d, wide);
#pragma unroll
        for (int e = 0; e < 4; e++)
            v[e] = p && first + c + e < d ? map(v[e], i, first + c + e) : 0.0f;
        *(float4 *)(out + i * TILE_LD + c) = make_float4(v[0], v[1], v[2], v[3]);
    }
}

/* ------------------------------------------------------------------ tiles of packed sequences
 *
 * Sequence s is cut into tiles of `size` of its length(s) items; tiles are counted over all
 * sequences. The lengths lie on the GPU, so a grid has as many blocks as there can be tiles and
 * each looks for its own. Whole warps call these. */

__device__ __forceinline__ int warp_scan(int x) { /* inclusive */
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, x, d);
        x += lane >= d ? other : 0;
    }
    return x;
}
/* Tile `index`: its sequence and first item. False: there are fewer tiles. */
template <typename F>
__device__ __forceinline__ bool tile_find(int sequences, int size, int index, F length,
                                          int *sequence, int *first) {
    for (int base = 0; base < sequences; base += 32) {
        int s = base + threadIdx.x % 32;
        int tiles = s < sequences ? (length(s) + size - 1) / size : 0, sum = warp_scan(tiles);
        unsigned here = __ballot_sync(0xffffffffu, index < sum);
        if (here) {
            int lane = __ffs((int)here) - 1;
            *sequence = base + lane;
            *first = (index - __shfl_sync(0xffffffffu, sum - tiles, lane)) * size;
            return true;
        }
        index -= __shfl_sync(0xffffffffu, sum, 31);
    }
    return false;
}
/* Tiles of the sequences before s. */
template <typename F>
__device__ __forceinline__ int tile_before(int s, int size, F length) {
    int sum = 0;
    for (int base = 0; base < s; base += 32) {
        int at = base + threadIdx.x % 32;
        int all = warp_scan(at < s ? (length(at) + size - 1) / size : 0);
        sum += __shfl_sync(0xffffffffu, all, 31);
    }
    return sum;
}

/* Integers above 0 in the order of numbers (0 and -0 the same), to search by bits. */
__device__ __forceinline__ unsigned float_order(float x) {
    unsigned u = __float_as_uint(x == 0.0f ? 0.0f : x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* An [N, H, d] tensor as kernels see it. */
template <typename T>
struct heads3 {
    T *data;
    int64_t outer, inner;
    __device__ __forceinline__ T *at(int64_t n, int h) const {
        return data + n * outer + h * inner;
    }
};
template <typename T>
static inline heads3<T> heads3_of(const struct tensor &t) {
    return {(T *)t.data, t.stride[0], t.stride[1]};
}

/* Rows of no sequence, [0, q_offsets[0]) and [q_offsets[S], N), of head h of x become zeros: the
 * block's threads share them. */
template <typename T>
__device__ __forceinline__ void clear_outside(const heads3<T> &x, const int32_t *q_offsets,
                                              int sequences, int rows, int h, int d) {
    int begin = q_offsets[0], end = q_offsets[sequences];
    for (int64_t i = threadIdx.x; i < (int64_t)begin * d; i += blockDim.x)
        x.at(i / d, h)[i % d] = from_float<T>(0.0f);
    for (int64_t i = threadIdx.x; i < (int64_t)(rows - end) * d; i += blockDim.x)
        x.at(end + i / d, h)[i % d] = from_float<T>(0.0f);
}

#endif
