/* Cross-entropy, in phases (contracts: ops.h; formulas: src/ops/cross_entropy.c).
 *
 * Forward and backward: a block for a row, which it reads once, 16 bytes a thread at a time; rows
 * of an odd vocabulary begin anywhere, so the first and last elements of a row are taken singly.
 * Forward keeps a running maximum and sum in every thread and rescales the sum once for every 16
 * bytes; threads are merged in a fixed order. Backward may write where it reads. */
#include "cuda/softmax.cuh"

/* A row as [0, head) single, [head, tail) in packs, [tail, V) single. */
struct pieces {
    int64_t head, tail;
};
template <int count, typename T>
__device__ __forceinline__ struct pieces pieces_of(const T *row, int64_t V) {
    const int bytes = count * (int)sizeof(T);
    int64_t head = (bytes - (int)((uintptr_t)row % bytes)) % bytes / (int)sizeof(T);
    head = head < V ? head : V;
    return {head, head + (V - head) / count * count};
}

/* ------------------------------------------------------------------ forward */

template <typename T>
__global__ void cross_entropy_forward_kernel(const T *logits, const int32_t *targets, int64_t V,
                                             float *maximum, float *sum, float *target) {
    __shared__ float space_m[32], space_s[32];
    const int count = 16 / sizeof(T);
    int64_t n = blockIdx.x;
    const T *row = logits + n * V;
    struct pieces at = pieces_of<count>(row, V);
    struct running r = {-INFINITY, 0.0f};
    float v[count], one[1];
    for (int64_t i = at.head + (int64_t)threadIdx.x * count; i < at.tail;
         i += (int64_t)blockDim.x * count) {
        load_packed<T, count>(row + i, v);
        r = include(r, v);
    }
    int64_t singles = at.head + (V - at.tail);
    for (int64_t i = threadIdx.x; i < singles; i += blockDim.x) {
        one[0] = to_float(row[i < at.head ? i : at.tail + (i - at.head)]);
        r = include(r, one);
    }
    r = warp_merge(r);
    if (threadIdx.x % 32 == 0) {
        space_m[threadIdx.x / 32] = r.m;
        space_s[threadIdx.x / 32] = r.s;
    }
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    for (int w = 1; w < (int)blockDim.x / 32; w++)
        r = merge(r, {space_m[w], space_s[w]});
    int32_t t = targets[n];
    maximum[n] = r.m;
    sum[n] = r.s;
    target[n] = t < 0 ? 0.0f : to_float(row[t]);
}

/* Threads for a row of V elements: enough for two packs each. */
static unsigned row_threads(int64_t V, int count) {
    int64_t wanted = (V / count / 2 + 31) / 32 * 32;
    return (unsigned)(wanted < 64 ? 64 : wanted > 512 ? 512 : wanted);
}

OP_FN(cross_entropy_forward) {
    enum { LOGITS, TARGETS, MAXIMUM, SUM, TARGET };
    (void)params;
    int64_t N = args[LOGITS].shape[0], V = args[LOGITS].shape[1];
    FOR_DTYPE(args[LOGITS].dtype, T, {
        return cuda_launch(ctx, "cross_entropy_forward", err, cross_entropy_forward_kernel<T>,
                           dim3((unsigned)N), dim3(row_threads(V, 16 / sizeof(T))), 0,
                           (const T *)args[LOGITS].data, (const int32_t *)args[TARGETS].data, V,
                           (float *)args[MAXIMUM].data, (float *)args[SUM].data,
                           (float *)args[TARGET].data);
    });
}

/* ------------------------------------------------------------------ loss */

static const int LOSS_THREADS = 512, LOSS_ROWS = 4 * LOSS_THREADS;

/* part[block] = sum of the block's rows' losses; their count after all the sums. */
__global__ void cross_entropy_loss_kernel(const int32_t *targets, const float *maximum,
                                          const float *sum, const float *target, float *row_loss,
                                          int64_t N, double *part) {
    __shared__ double space[32];
    double total = 0, counted = 0;
    for (int k = 0; k < LOSS_ROWS / LOSS_THREADS; k++) {
        int64_t n = (int64_t)blockIdx.x * LOSS_ROWS + k * LOSS_THREADS + threadIdx.x;
        if (n >= N)
            break;
        float loss = 0;
        if (targets[n] >= 0) {
            loss = logf(sum[n]) + (maximum[n] - target[n]);
            counted++;
        }
        row_loss[n] = loss;
        total += loss;
    }
    total = block_sum(total, space);
    counted = block_sum(counted, space);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = total;
        part[gridDim.x + blockIdx.x] = counted;
    }
}

/* total += the parts, by one warp. */
__global__ void cross_entropy_total_kernel(const double *part, int parts, double *total) {
    for (int which = 0; which < 2; which++) {
        double sum = 0;
        for (int i = (int)threadIdx.x; i < parts; i += 32)
            sum += part[which * parts + i];
        sum = warp_sum(sum);
        if (threadIdx.x == 0)
            total[which] += sum;
    }
}

OP_FN(cross_entropy_loss) {
    enum { TARGETS, MAXIMUM, SUM, TARGET, ROW_LOSS, TOTAL };
    (void)params;
    int64_t N = args[ROW_LOSS].shape[0];
    int parts = (int)cuda_blocks(N, LOSS_ROWS);
    if (N == 0)
        return TRIL_OK;
    double *part;
    CUDA_TRY(
        cuda_scratch(ctx, "cross_entropy_loss", 2 * parts * (int64_t)sizeof *part, &part, err));
    CUDA_TRY(cuda_launch(ctx, "cross_entropy_loss", err, cross_entropy_loss_kernel, dim3(parts),
                         dim3(LOSS_THREADS), 0, (const int32_t *)args[TARGETS].data,
                         (const float *)args[MAXIMUM].data, (const float *)args[SUM].data,
                         (const float *)args[TARGET].data, (float *)args[ROW_LOSS].data, N, part));
    return cuda_launch(ctx, "cross_entropy_loss", err, cross_entropy_total_kernel, dim3(1),
                       dim3(32), 0, part, parts, (double *)args[TOTAL].data);
}

/* ------------------------------------------------------------------ backward */

/* In packs only where logits and dlogits (which may be the same memory) are misaligned alike. */
template <typename T, typename D>
__global__ void cross_entropy_backward_kernel(const T *logits, const int32_t *targets,
                                              const float *maximum, const float *sum, D *dlogits,
                                              int64_t V, float scale) {
    const int count = 16 / (sizeof(T) > sizeof(D) ? sizeof(T) : sizeof(D));
    int64_t n = blockIdx.x;
    const T *row = logits + n * V;
    D *out = dlogits + n * V;
    int32_t t = targets[n];
    float m = maximum[n], factor = t < 0 ? 0.0f : scale / sum[n];
    struct pieces at = pieces_of<count>(row, V);
    struct pieces there = pieces_of<count>(out, V);
    if (at.head != there.head)
        at = {V, V};
    float v[count];
    for (int64_t i = at.head + (int64_t)threadIdx.x * count; i < at.tail;
         i += (int64_t)blockDim.x * count) {
        load_packed<T, count>(row + i, v);
#pragma unroll
        for (int k = 0; k < count; k++)
            v[k] = t < 0 ? 0.0f : factor * __expf(v[k] - m) - (i + k == t ? scale : 0.0f);
        store_packed<D, count>(out + i, v);
    }
    int64_t singles = at.head + (V - at.tail);
    for (int64_t s = threadIdx.x; s < singles; s += blockDim.x) {
        int64_t i = s < at.head ? s : at.tail + (s - at.head);
        float x = to_float(row[i]);
        out[i] = from_float<D>(t < 0 ? 0.0f : factor * __expf(x - m) - (i == t ? scale : 0.0f));
    }
}

OP_FN(cross_entropy_backward) {
    enum { LOGITS, TARGETS, MAXIMUM, SUM, DLOGITS };
    const struct cross_entropy_params *p = (const struct cross_entropy_params *)params;
    int64_t N = args[LOGITS].shape[0], V = args[LOGITS].shape[1];
    FOR_DTYPE(args[LOGITS].dtype, T, {
        FOR_DTYPE(args[DLOGITS].dtype, D, {
            return cuda_launch(ctx, "cross_entropy_backward", err,
                               cross_entropy_backward_kernel<T, D>, dim3((unsigned)N),
                               dim3(row_threads(V, 16 / sizeof(T))), 0,
                               (const T *)args[LOGITS].data, (const int32_t *)args[TARGETS].data,
                               (const float *)args[MAXIMUM].data, (const float *)args[SUM].data,
                               (D *)args[DLOGITS].data, V, p->scale);
        });
    });
}
