/* Conversion between float dtypes, and scaled addition (contracts: ops.h; formulas:
 * src/ops/cast.c).
 *
 * Bound by memory: a thread moves 16 bytes of the wider dtype where both addresses allow it. */
#include "cuda/device.cuh"

static const int THREADS = 256;

/* y[i] = x[i], or with `add` y[i] += alpha x[i]; `count` neighbours a thread. */
template <typename X, typename Y, int count, bool add>
__global__ void cast_kernel(const X *x, Y *y, int64_t n, float alpha) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * count;
    if (i + count <= n) {
        float v[count], w[count];
        load_packed<X, count>(x + i, v);
        if (add) {
            load_packed<Y, count>(y + i, w);
#pragma unroll
            for (int k = 0; k < count; k++)
                v[k] = w[k] + alpha * v[k];
        }
        store_packed<Y, count>(y + i, v);
        return;
    }
    for (; i < n; i++)
        y[i] = from_float<Y>(add ? to_float(y[i]) + alpha * to_float(x[i]) : to_float(x[i]));
}

template <typename X, typename Y, bool add>
static tril_status cast_launch(struct op_context *ctx, const char *name, const struct tensor *args,
                               float alpha, struct tril_error *err) {
    const int most = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
    const X *x = (const X *)args[0].data;
    Y *y = (Y *)args[1].data;
    int64_t n = tensor_count(&args[0]);
    if ((uintptr_t)x % (most * sizeof(X)) == 0 && (uintptr_t)y % (most * sizeof(Y)) == 0)
        return cuda_launch(ctx, name, err, cast_kernel<X, Y, most, add>,
                           dim3(cuda_blocks(n, most * THREADS)), dim3(THREADS), 0, x, y, n, alpha);
    return cuda_launch(ctx, name, err, cast_kernel<X, Y, 1, add>, dim3(cuda_blocks(n, THREADS)),
                       dim3(THREADS), 0, x, y, n, alpha);
}

OP_FN(cast) {
    (void)params;
    FOR_DTYPE(args[0].dtype, X, {
        FOR_DTYPE(args[1].dtype, Y,
                  { return (cast_launch<X, Y, false>(ctx, "cast", args, 1.0f, err)); });
    });
}

OP_FN(accumulate) {
    float alpha = ((const struct accumulate_params *)params)->alpha;
    FOR_DTYPE(args[0].dtype, X,
              { return (cast_launch<X, float, true>(ctx, "accumulate", args, alpha, err)); });
}
