/* Moving rows by index, converting on the way (contracts: ops.h; formulas: src/ops/cache.c).
 *
 * One kernel for cache_store, gather_rows and scatter_rows: a thread moves 16 bytes of the wider
 * dtype, so that what moves is read and written once. Storing into 8 bits takes a warp for a row's
 * head, which it reads twice (the second time from the first-level cache): for the largest value,
 * and to divide by it. */
#include "cuda/device.cuh"

/* Row index[n] of the one is row n of the other: y's row (`into`) or x's. */
template <typename X, typename Y, int count>
__global__ void move_rows_kernel(rows<const X> x, const int32_t *index, rows<Y> y, int64_t N, int H,
                                 int64_t width, bool into) {
    int64_t n = (int64_t)blockIdx.x * blockDim.z + threadIdx.z;
    if (n >= N)
        return;
    int64_t there = index[n];
    for (int h = (int)threadIdx.y; h < H; h += (int)blockDim.y) {
        const X *from = x.data + (into ? n : there) * x.outer + h * x.inner;
        Y *to = y.data + (into ? there : n) * y.outer + h * y.inner;
        for (int64_t i = (int64_t)threadIdx.x * count; i < width;
             i += (int64_t)blockDim.x * count) {
            float v[count];
            load_packed<X, count>(from + i, v);
            store_packed<Y, count>(to + i, v);
        }
    }
}

static tril_status move_rows(struct op_context *ctx, const char *name, const struct tensor &x,
                             const struct tensor &index, const struct tensor &y, bool into,
                             struct tril_error *err) {
    int64_t N = index.shape[0], H = x.rank == 3 ? x.shape[1] : 1, width = row_width(x);
    FOR_DTYPE(x.dtype, X, {
        FOR_DTYPE(y.dtype, Y, {
            const int most = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
            bool packs = rows_packable(x, most) && rows_packable(y, most);
            unsigned grid;
            dim3 block = heads_block(N, H, packs ? width / most : width, &grid);
            return cuda_launch(ctx, name, err,
                               packs ? move_rows_kernel<X, Y, most> : move_rows_kernel<X, Y, 1>,
                               dim3(grid), block, 0, rows_of<const X>(x),
                               (const int32_t *)index.data, rows_of<Y>(y), N, (int)H, width, into);
        });
    });
}

OP_FN(gather_rows) {
    enum { X, ROWS, Y };
    (void)params;
    return move_rows(ctx, "gather_rows", args[X], args[ROWS], args[Y], false, err);
}

OP_FN(scatter_rows) {
    enum { X, ROWS, Y };
    (void)params;
    return move_rows(ctx, "scatter_rows", args[X], args[ROWS], args[Y], true, err);
}

/* ------------------------------------------------------------------ 8 bits */

static const int WARPS = 8;

/* As the reference: in fp32, NaN before infinity. */
template <typename X, int count>
__global__ void quantise_kernel(rows<const X> x, const int32_t *index, int8_t *cache, float *scale,
                                int64_t N, int K, int64_t width) {
    int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.y;
    if (item >= N * K)
        return;
    int64_t n = item / K, k = item % K, row = index[n] * (int64_t)K + k;
    const X *from = x.data + n * x.outer + k * x.inner;
    int8_t *to = cache + row * width;
    float most = 0.0f;
    bool nan = false;
    for (int64_t i = (int64_t)threadIdx.x * count; i < width; i += 32 * count) {
        float v[count];
        load_packed<X, count>(from + i, v);
#pragma unroll
        for (int j = 0; j < count; j++) {
            most = fmaxf(most, fabsf(v[j]));
            nan |= v[j] != v[j];
        }
    }
    most = warp_max(most);
    if (__any_sync(0xffffffffu, nan))
        most = NAN;
    float inverse = most > 0.0f && most < INFINITY ? 127.0f / most : 0.0f;
    if (threadIdx.x == 0)
        scale[row] = most / 127.0f;
    for (int64_t i = (int64_t)threadIdx.x * count; i < width; i += 32 * count) {
        float v[count];
        packed<int8_t, count> out;
        load_packed<X, count>(from + i, v);
#pragma unroll
        for (int j = 0; j < count; j++)
            out.at[j] = (int8_t)(inverse > 0.0f ? rintf(v[j] * inverse) : 0.0f);
        *(packed<int8_t, count> *)(to + i) = out;
    }
}

OP_FN(cache_store) {
    enum { X, ROWS, CACHE, SCALE };
    (void)params;
    if (args[CACHE].dtype != DT_I8)
        return move_rows(ctx, "cache_store", args[X], args[ROWS], args[CACHE], true, err);
    int64_t N = args[X].shape[0], K = args[X].shape[1], width = args[X].shape[2];
    FOR_DTYPE(args[X].dtype, T, {
        bool packs = rows_packable(args[X], 4) && rows_packable(args[CACHE], 4);
        return cuda_launch(ctx, "cache_store", err,
                           packs ? quantise_kernel<T, 4> : quantise_kernel<T, 1>,
                           dim3(cuda_blocks(N * K, WARPS)), dim3(32, WARPS), 0,
                           rows_of<const T>(args[X]), (const int32_t *)args[ROWS].data,
                           (int8_t *)args[CACHE].data, (float *)args[SCALE].data, N, (int)K, width);
    });
}
