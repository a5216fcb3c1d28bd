/* Activations, plain and gated (contracts: ops.h; formulas: src/ops/activation.c).
 *
 * Bound by memory: every argument passes once, 16 bytes a thread where the addresses allow it, and
 * nothing is kept between. Bytes for an output element in a dtype of b bytes: activation 2b forward
 * and 3b backward, gated 3b and 5b. The activation is chosen once for a thread's elements. */
#include "cuda/activate.cuh"
#include "cuda/device.cuh"

static const int THREADS = 256;

/* v = act(x); the loop within the choice. */
template <int count>
__device__ __forceinline__ void activate_all(enum activation a, const float (&x)[count],
                                             float (&v)[count]) {
#define EACH(A)                                                                                    \
    _Pragma("unroll") for (int k = 0; k < count; k++) v[k] = activate(A, x[k]);                    \
    break
    switch (a) {
    case ACT_RELU:
        EACH(ACT_RELU);
    case ACT_GELU_ERF:
        EACH(ACT_GELU_ERF);
    case ACT_GELU_TANH:
        EACH(ACT_GELU_TANH);
    case ACT_SILU:
        EACH(ACT_SILU);
    default:
        EACH(ACT_NONE);
    }
#undef EACH
}
/* v = act(x), slope = act'(x). */
template <int count>
__device__ __forceinline__ void slopes_all(enum activation a, const float (&x)[count],
                                           float (&v)[count], float (&slope)[count]) {
#define EACH(A)                                                                                    \
    _Pragma("unroll") for (int k = 0; k < count; k++) slope[k] = activate_slope(A, x[k], &v[k]);   \
    break
    switch (a) {
    case ACT_RELU:
        EACH(ACT_RELU);
    case ACT_GELU_ERF:
        EACH(ACT_GELU_ERF);
    case ACT_GELU_TANH:
        EACH(ACT_GELU_TANH);
    case ACT_SILU:
        EACH(ACT_SILU);
    default:
        EACH(ACT_NONE);
    }
#undef EACH
}

/* ------------------------------------------------------------------ plain */

/* y = act(x), or with dy: y = dy act'(x), over n elements. */
template <typename T, int count, bool backward>
__global__ void activation_kernel(const T *dy, const T *x, T *y, int64_t n, enum activation a) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * count;
    float v[count], w[count], d[count];
    if (i + count <= n) {
        load_packed<T, count>(x + i, v);
        if (!backward) {
            activate_all<count>(a, v, w);
        } else {
            float slope[count];
            load_packed<T, count>(dy + i, d);
            slopes_all<count>(a, v, w, slope);
#pragma unroll
            for (int k = 0; k < count; k++)
                w[k] = d[k] * slope[k];
        }
        store_packed<T, count>(y + i, w);
        return;
    }
    for (; i < n; i++) { /* fewer than `count`, for one thread */
        float one, slope = backward ? activate_slope(a, to_float(x[i]), &one) : 0.0f;
        y[i] = from_float<T>(backward ? to_float(dy[i]) * slope : activate(a, to_float(x[i])));
    }
}

template <typename T, bool backward>
static tril_status activation_launch(struct op_context *ctx, const char *name,
                                     const struct tensor *dy, const struct tensor *x,
                                     const struct tensor *y, const void *params,
                                     struct tril_error *err) {
    const int most = 16 / sizeof(T);
    enum activation a = ((const struct activation_params *)params)->activation;
    const T *px = (const T *)x->data, *pd = backward ? (const T *)dy->data : px;
    T *py = (T *)y->data;
    int64_t n = tensor_count(x);
    bool packs = ((uintptr_t)px | (uintptr_t)pd | (uintptr_t)py) % 16 == 0;
    return cuda_launch(
        ctx, name, err,
        packs ? activation_kernel<T, most, backward> : activation_kernel<T, 1, backward>,
        dim3(cuda_blocks(n, (packs ? most : 1) * THREADS)), dim3(THREADS), 0, pd, px, py, n, a);
}

OP_FN(activation_forward) {
    enum { X, Y };
    FOR_DTYPE(args[X].dtype, T, {
        return (activation_launch<T, false>(ctx, "activation_forward", NULL, &args[X], &args[Y],
                                            params, err));
    });
}

OP_FN(activation_backward) {
    enum { DY, X, DX };
    FOR_DTYPE(args[X].dtype, T, {
        return (activation_launch<T, true>(ctx, "activation_backward", &args[DY], &args[X],
                                           &args[DX], params, err));
    });
}

/* ------------------------------------------------------------------ gated
 *
 * Block (n, c): packs c * blockDim.x ... of row n, gate and up together. */

template <typename T, int count>
__global__ void gated_forward_kernel(const T *x, T *y, int64_t F, enum activation a) {
    int64_t n = blockIdx.x, f = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * count;
    if (f >= F)
        return;
    float gate[count], up[count];
    load_packed<T, count>(x + n * 2 * F + f, gate);
    load_packed<T, count>(x + n * 2 * F + F + f, up);
    activate_all<count>(a, gate, gate);
#pragma unroll
    for (int k = 0; k < count; k++)
        up[k] *= gate[k];
    store_packed<T, count>(y + n * F + f, up);
}

template <typename T, int count>
__global__ void gated_backward_kernel(const T *dy, const T *x, T *dx, int64_t F,
                                      enum activation a) {
    int64_t n = blockIdx.x, f = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * count;
    if (f >= F)
        return;
    float gate[count], up[count], d[count], slope[count];
    load_packed<T, count>(x + n * 2 * F + f, gate);
    load_packed<T, count>(x + n * 2 * F + F + f, up);
    load_packed<T, count>(dy + n * F + f, d);
    slopes_all<count>(a, gate, gate, slope);
#pragma unroll
    for (int k = 0; k < count; k++) {
        slope[k] *= d[k] * up[k];
        gate[k] *= d[k];
    }
    store_packed<T, count>(dx + n * 2 * F + f, slope);
    store_packed<T, count>(dx + n * 2 * F + F + f, gate);
}

/* Blocks and threads for rows of `packs` packs. */
static dim3 gated_grid(int64_t rows, int64_t packs, dim3 *block) {
    unsigned chunks = cuda_blocks(packs, THREADS);
    *block = dim3(cuda_blocks(cuda_blocks(packs, chunks ? chunks : 1), 32) * 32);
    return dim3((unsigned)rows, chunks);
}

OP_FN(gated_forward) {
    enum { X, Y };
    enum activation a = ((const struct activation_params *)params)->activation;
    int64_t N = args[Y].shape[0], F = args[Y].shape[1];
    FOR_DTYPE(args[X].dtype, T, {
        const int most = 16 / sizeof(T);
        const T *x = (const T *)args[X].data;
        T *y = (T *)args[Y].data;
        bool packs = ((uintptr_t)x | (uintptr_t)y) % 16 == 0 && F % most == 0;
        dim3 block, grid = gated_grid(N, packs ? F / most : F, &block);
        return cuda_launch(ctx, "gated_forward", err,
                           packs ? gated_forward_kernel<T, most> : gated_forward_kernel<T, 1>, grid,
                           block, 0, x, y, F, a);
    });
}

OP_FN(gated_backward) {
    enum { DY, X, DX };
    enum activation a = ((const struct activation_params *)params)->activation;
    int64_t N = args[DY].shape[0], F = args[DY].shape[1];
    FOR_DTYPE(args[X].dtype, T, {
        const int most = 16 / sizeof(T);
        const T *dy = (const T *)args[DY].data, *x = (const T *)args[X].data;
        T *dx = (T *)args[DX].data;
        bool packs = ((uintptr_t)dy | (uintptr_t)x | (uintptr_t)dx) % 16 == 0 && F % most == 0;
        dim3 block, grid = gated_grid(N, packs ? F / most : F, &block);
        return cuda_launch(ctx, "gated_backward", err,
                           packs ? gated_backward_kernel<T, most> : gated_backward_kernel<T, 1>,
                           grid, block, 0, dy, x, dx, F, a);
    });
}
