/* The gate between two outputs of attention (contracts: ops.h; formulas: src/ops/gate.c).
 *
 * Forward a thread moves 16 bytes of each of a, b and y (3 passes), backward of dy, a, b, da and db
 * (5). dgate: blocks of a head sum their share of the tokens, a warp for a head adds the blocks. */
#include "cuda/device.cuh"

extern "C" {
#include "ops/host_fallback.h"
}

static const int THREADS = 256, MOST_PARTS = 64;

/* The share of b where its row is there. */
__device__ __forceinline__ float share(float gate, float lse) {
    return lse == -INFINITY ? 0.0f : 1.0f / (1.0f + expf(-gate));
}

template <typename T, int count>
__global__ void gate_forward_kernel(rows<const T> a, rows<const T> b, const float *lse,
                                    const float *gate, rows<T> y, int64_t N, int H, int64_t width) {
    int64_t n = (int64_t)blockIdx.x * blockDim.z + threadIdx.z;
    if (n >= N)
        return;
    for (int h = (int)threadIdx.y; h < H; h += (int)blockDim.y) {
        float g = share(gate[h], lse[h * N + n]);
        const T *pa = a.data + n * a.outer + h * a.inner;
        const T *pb = b.data + n * b.outer + h * b.inner;
        T *py = y.data + n * y.outer + h * y.inner;
        for (int64_t i = (int64_t)threadIdx.x * count; i < width;
             i += (int64_t)blockDim.x * count) {
            float u[count], v[count];
            load_packed<T, count>(pa + i, u);
            load_packed<T, count>(pb + i, v);
#pragma unroll
            for (int k = 0; k < count; k++)
                u[k] = (1.0f - g) * u[k] + (g > 0.0f ? g * v[k] : 0.0f);
            store_packed<T, count>(py + i, u);
        }
    }
}

OP_FN(gate_forward) {
    enum { A, B, LSE, GATE, Y };
    const struct tensor &a = args[A], &b = args[B], &y = args[Y];
    int64_t N = a.shape[0], H = a.shape[1], width = a.shape[2];
    if (b.dtype != a.dtype || y.dtype != a.dtype)
        return op_host_fallback(ctx, op_info_get(OP_GATE_FORWARD), args, params, err);
    FOR_DTYPE(a.dtype, T, {
        const int most = 16 / sizeof(T);
        bool packs = rows_packable(a, most) && rows_packable(b, most) && rows_packable(y, most);
        unsigned grid;
        dim3 block = heads_block(N, H, packs ? width / most : width, &grid);
        return cuda_launch(ctx, "gate_forward", err,
                           packs ? gate_forward_kernel<T, most> : gate_forward_kernel<T, 1>,
                           dim3(grid), block, 0, rows_of<const T>(a), rows_of<const T>(b),
                           (const float *)args[LSE].data, (const float *)args[GATE].data,
                           rows_of<T>(y), N, (int)H, width);
    });
}

/* ------------------------------------------------------------------ backward */

/* Block (p, h): tokens p * across ... of head h in strides; `lanes` threads across a row. */
template <typename T, int count>
__global__ void gate_backward_kernel(rows<const T> dy, rows<const T> a, rows<const T> b,
                                     const float *lse, const float *gate, rows<T> da, rows<T> db,
                                     int64_t N, int64_t width, int lanes, float *part) {
    __shared__ float space[32];
    int h = (int)blockIdx.y, across = THREADS / lanes;
    float sum = 0.0f;
    for (int64_t n = (int64_t)blockIdx.x * across + (int)threadIdx.x / lanes; n < N;
         n += (int64_t)gridDim.x * across) {
        float g = share(gate[h], lse[h * N + n]);
        const T *py = dy.data + n * dy.outer + h * dy.inner;
        const T *pa = a.data + n * a.outer + h * a.inner;
        const T *pb = b.data + n * b.outer + h * b.inner;
        T *oa = da.data + n * da.outer + h * da.inner;
        T *ob = db.data + n * db.outer + h * db.inner;
        for (int64_t i = (int64_t)((int)threadIdx.x % lanes) * count; i < width;
             i += (int64_t)lanes * count) {
            float x[count], u[count], v[count];
            load_packed<T, count>(py + i, x);
            load_packed<T, count>(pa + i, u);
            load_packed<T, count>(pb + i, v);
#pragma unroll
            for (int k = 0; k < count; k++) {
                if (g > 0.0f)
                    sum += g * (1.0f - g) * x[k] * (v[k] - u[k]);
                u[k] = (1.0f - g) * x[k];
                v[k] = g * x[k];
            }
            store_packed<T, count>(oa + i, u);
            store_packed<T, count>(ob + i, v);
        }
    }
    sum = block_sum(sum, space);
    if (threadIdx.x == 0)
        part[h * (int)gridDim.x + (int)blockIdx.x] = sum;
}

__global__ void gate_sum_kernel(const float *part, int parts, float *dgate) {
    float sum = 0.0f;
    for (int i = (int)threadIdx.x; i < parts; i += 32)
        sum += part[(int)blockIdx.x * parts + i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0)
        dgate[blockIdx.x] += sum;
}

OP_FN(gate_backward) {
    enum { DY, A, B, LSE, GATE, DA, DB, DGATE };
    int64_t N = args[A].shape[0], H = args[A].shape[1], width = args[A].shape[2];
    enum dtype dtype = args[A].dtype;
    for (int i = 0; i < DGATE; i++)
        if (i != LSE && i != GATE && args[i].dtype != dtype)
            return op_host_fallback(ctx, op_info_get(OP_GATE_BACKWARD), args, params, err);
    if (N == 0)
        return TRIL_OK;
    FOR_DTYPE(dtype, T, {
        const int most = 16 / sizeof(T);
        bool packs = true;
        for (int i = 0; i < DGATE; i++)
            packs &= i == LSE || i == GATE || rows_packable(args[i], most);
        int lanes = 1;
        while (lanes < THREADS && lanes * (packs ? most : 1) < width)
            lanes *= 2;
        int64_t parts = cuda_blocks(N, THREADS / lanes);
        if (parts > MOST_PARTS)
            parts = MOST_PARTS;
        float *part;
        CUDA_TRY(cuda_scratch(ctx, "gate_backward", H * parts * (int64_t)sizeof *part, &part, err));
        CUDA_TRY(cuda_launch(ctx, "gate_backward", err,
                             packs ? gate_backward_kernel<T, most> : gate_backward_kernel<T, 1>,
                             dim3((unsigned)parts, (unsigned)H), dim3(THREADS), 0,
                             rows_of<const T>(args[DY]), rows_of<const T>(args[A]),
                             rows_of<const T>(args[B]), (const float *)args[LSE].data,
                             (const float *)args[GATE].data, rows_of<T>(args[DA]),
                             rows_of<T>(args[DB]), N, width, lanes, part));
        return cuda_launch(ctx, "gate_backward", err, gate_sum_kernel, dim3((unsigned)H), dim3(32),
                           0, part, (int)parts, (float *)args[DGATE].data);
    });
}
