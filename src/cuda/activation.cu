/* Activations, plain and gated (contracts: ops.h; formulas: src/ops/activation.c).
 *
 * Bound by memory: every thread moves 16 bytes at a time where the addresses allow it, and computes
 * in fp32. */
#include "cuda/activate.cuh"
#include "cuda/device.cuh"

static const int THREADS = 256;

template <typename T, int count>
__global__ void activation_forward_kernel(const T *x, T *y, int64_t n, enum activation a) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * count;
    if (i >= n)
        return;
    float v[count];
    load_packed<T, count>(x + i, v);
#pragma unroll
    for (int k = 0; k < count; k++)
        v[k] = activate(a, v[k]);
    store_packed<T, count>(y + i, v);
}

OP_FN(activation_forward) {
    enum { X, Y };
    const struct activation_params *p = (const struct activation_params *)params;
    int64_t n = tensor_count(&args[X]);
    FOR_DTYPE(args[X].dtype, T, {
        const int most = 16 / sizeof(T);
        const T *x = (const T *)args[X].data;
        T *y = (T *)args[Y].data;
        if (n % most == 0 && (uintptr_t)x % 16 == 0 && (uintptr_t)y % 16 == 0)
            return cuda_launch(ctx, "activation_forward", err, activation_forward_kernel<T, most>,
                               dim3(cuda_blocks(n, most * THREADS)), dim3(THREADS), 0, x, y, n,
                               p->activation);
        return cuda_launch(ctx, "activation_forward", err, activation_forward_kernel<T, 1>,
                           dim3(cuda_blocks(n, THREADS)), dim3(THREADS), 0, x, y, n, p->activation);
    });
}
