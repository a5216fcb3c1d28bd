/* The norm of the gradient, clipping, AdamW (contracts: ops.h; formulas: src/ops/optimiser.c).
 *
 * sum_squares: blocks of SUM_THREADS threads, as many as the length asks for and at most MOST_SUMS;
 * a thread sums every so-manieth float4 in fp32, threads and blocks are summed in double, in an
 * order that depends on the length only. Nothing is atomic. adamw moves 28 bytes an element (30
 * with a copy), 16 at a time; what changes from step to step is read from the GPU's memory, so
 * that a captured step can be replayed. */
#include "cuda/device.cuh"

static const int SUM_THREADS = 512, MOST_SUMS = 1024, THREADS = 256;

/* ------------------------------------------------------------------ sum_squares */

template <int count>
__global__ void sum_squares_kernel(const float *x, int64_t n, double *part) {
    __shared__ double space[32];
    int64_t stride = (int64_t)gridDim.x * SUM_THREADS * count;
    int64_t i = ((int64_t)blockIdx.x * SUM_THREADS + threadIdx.x) * count;
    float sum[count] = {};
    for (; i + count <= n; i += stride) {
        float v[count];
        load_packed<float, count>(x + i, v);
#pragma unroll
        for (int k = 0; k < count; k++)
            sum[k] += v[k] * v[k];
    }
    for (; i < n; i++) /* fewer than `count` remain, for one thread */
        sum[0] += x[i] * x[i];
    double all = 0;
#pragma unroll
    for (int k = 0; k < count; k++)
        all += sum[k];
    all = block_sum(all, space);
    if (threadIdx.x == 0)
        part[blockIdx.x] = all;
}

/* total += the parts, by one block. */
__global__ void sum_parts_kernel(const double *part, int parts, double *total) {
    __shared__ double space[32];
    double sum = 0;
    for (int i = (int)threadIdx.x; i < parts; i += SUM_THREADS)
        sum += part[i];
    sum = block_sum(sum, space);
    if (threadIdx.x == 0)
        *total += sum;
}

OP_FN(sum_squares) {
    enum { X, TOTAL };
    (void)params;
    const float *x = (const float *)args[X].data;
    int64_t n = tensor_count(&args[X]);
    if (n == 0)
        return TRIL_OK;
    int64_t wanted = (n + SUM_THREADS * 4 - 1) / (SUM_THREADS * 4);
    int parts = (int)(wanted < MOST_SUMS ? wanted : MOST_SUMS);
    double *part;
    CUDA_TRY(cuda_scratch(ctx, "sum_squares", parts * (int64_t)sizeof *part, &part, err));
    if ((uintptr_t)x % 16 == 0)
        CUDA_TRY(cuda_launch(ctx, "sum_squares", err, sum_squares_kernel<4>, dim3(parts),
                             dim3(SUM_THREADS), 0, x, n, part));
    else
        CUDA_TRY(cuda_launch(ctx, "sum_squares", err, sum_squares_kernel<1>, dim3(parts),
                             dim3(SUM_THREADS), 0, x, n, part));
    return cuda_launch(ctx, "sum_squares", err, sum_parts_kernel, dim3(1), dim3(SUM_THREADS), 0,
                       part, parts, (double *)args[TOTAL].data);
}

/* ------------------------------------------------------------------ clip_factor */

__global__ void clip_factor_kernel(const double *total, float *hyper, struct clip_params p) {
    double norm = sqrt(*total) * p.unscale, scale = p.unscale;
    if (p.limit > 0 && p.limit < norm + 1e-6)
        scale *= p.limit / (norm + 1e-6);
    hyper[HYPER_GRAD_NORM] = (float)norm;
    hyper[HYPER_GRAD_SCALE] = (float)scale;
    hyper[HYPER_FOUND_INF] = norm < INFINITY ? 0.0f : 1.0f; /* NaN too */
}

OP_FN(clip_factor) {
    enum { TOTAL, HYPER };
    return cuda_launch(ctx, "clip_factor", err, clip_factor_kernel, dim3(1), dim3(1), 0,
                       (const double *)args[TOTAL].data, (float *)args[HYPER].data,
                       *(const struct clip_params *)params);
}

/* ------------------------------------------------------------------ adamw */

struct adamw_step {
    float beta1, rest1, beta2, rest2, eps, decay; /* rest: 1 - beta */
};

template <typename C, int count>
__device__ __forceinline__ void adamw_at(int64_t i, const struct adamw_step &o, const float *hyper,
                                         float *p, const float *g, float *m, float *v, C *copy) {
    float pi[count], gi[count], mi[count], vi[count];
    load_packed<float, count>(p + i, pi);
    load_packed<float, count>(g + i, gi);
    load_packed<float, count>(m + i, mi);
    load_packed<float, count>(v + i, vi);
    float lr = hyper[HYPER_LR], scale = hyper[HYPER_GRAD_SCALE];
    float c1 = hyper[HYPER_CORRECTION1], c2 = hyper[HYPER_CORRECTION2];
#pragma unroll
    for (int k = 0; k < count; k++) {
        float gk = gi[k] * scale;
        mi[k] = o.beta1 * mi[k] + o.rest1 * gk;
        vi[k] = o.beta2 * vi[k] + o.rest2 * gk * gk;
        pi[k] -= lr * (mi[k] * c1 / (sqrtf(vi[k] * c2) + o.eps) + o.decay * pi[k]);
    }
    store_packed<float, count>(m + i, mi);
    store_packed<float, count>(v + i, vi);
    store_packed<float, count>(p + i, pi);
    if (copy)
        store_packed<C, count>(copy + i, pi);
}

template <typename C, int count>
__global__ void adamw_kernel(float *p, const float *g, float *m, float *v, C *copy,
                             const float *hyper, int64_t n, struct adamw_step o) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * count;
    if (hyper[HYPER_FOUND_INF] != 0.0f)
        return;
    if (i + count <= n)
        adamw_at<C, count>(i, o, hyper, p, g, m, v, copy);
    else
        for (; i < n; i++)
            adamw_at<C, 1>(i, o, hyper, p, g, m, v, copy);
}

OP_FN(adamw) {
    enum { P, G, M, V, COPY, HYPER };
    const struct adamw_params *q = (const struct adamw_params *)params;
    struct adamw_step o = {q->beta1, (float)(1 - (double)q->beta1),
                           q->beta2, (float)(1 - (double)q->beta2),
                           q->eps,   q->decay};
    int64_t n = tensor_count(&args[P]);
    uintptr_t all = (uintptr_t)args[P].data | (uintptr_t)args[G].data | (uintptr_t)args[M].data |
                    (uintptr_t)args[V].data | (uintptr_t)args[COPY].data * 2;
    FOR_DTYPE(args[COPY].data ? args[COPY].dtype : DT_F16, C, {
        const int count = 4;
        float *p = (float *)args[P].data, *m = (float *)args[M].data, *v = (float *)args[V].data;
        const float *g = (const float *)args[G].data, *hyper = (const float *)args[HYPER].data;
        C *copy = (C *)args[COPY].data;
        if (all % 16 == 0)
            return cuda_launch(ctx, "adamw", err, adamw_kernel<C, count>,
                               dim3(cuda_blocks(n, count * THREADS)), dim3(THREADS), 0, p, g, m, v,
                               copy, hyper, n, o);
        return cuda_launch(ctx, "adamw", err, adamw_kernel<C, 1>, dim3(cuda_blocks(n, THREADS)),
                           dim3(THREADS), 0, p, g, m, v, copy, hyper, n, o);
    });
}
