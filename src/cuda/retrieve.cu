/* Decoding over a part of a long cache (contracts: retrieve, block_bounds in ops.h).
 *
 * Four steps, their grids from shapes only: a warp for a block of keys bounds its scores (reads low
 * and high once: 8 K d bytes a block); a warp for a row and key/value head chooses the `top` blocks
 * by a search over the bits of the bounds (integers of the same order: exact, ties to the earlier
 * block); blocks of 128 threads attend to a share of the chosen keys each, 8 lanes to a key with an
 * online softmax of their own; and a warp adds up a row's shares in order. Bound by memory: the
 * chosen keys and values once for each query head, those of a group from L2. */
#include "cuda/tile.cuh"

static const int THREADS = 128;
static const int LANES = 8;             /* of a key */
static const int AT_ONCE = 128 / LANES; /* keys that a block looks at together */

struct retrieve_shape {
    const int32_t *start, *length;
    const float *low, *high;
    int32_t *blocks;
    int rows, heads, kv_heads, d, most, all; /* all: rows of low */
    int shares;                              /* blocks that share a row's keys */
    struct retrieve_params params;
};

template <typename T>
struct retrieve_call {
    retrieve_shape shape;
    heads3<const T> q, k, v;
    heads3<T> o;
    float *lse;
    unsigned *bounds; /* [N, K, all]: by float_order; 0: does not compete */
    int *count;       /* [N, K] */
    float *parts;     /* [shares, N, H, d + 2]: maximum, sum, output */
};

__device__ __forceinline__ int blocks_of(const retrieve_shape &s, int n) {
    return (int)((s.length[n] + s.params.block - 1) / s.params.block);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) retrieve_bounds_kernel(retrieve_call<T> c) {
    const retrieve_shape &s = c.shape;
    const int n = (int)blockIdx.x / s.kv_heads, kv_head = (int)blockIdx.x % s.kv_heads;
    const int lane = threadIdx.x % 32, group = s.heads / s.kv_heads, all = blocks_of(s, n);
    const int64_t first = s.start[n] / s.params.block;
    unsigned *out = c.bounds + (int64_t)blockIdx.x * s.all;
    for (int b = (int)blockIdx.y * (THREADS / 32) + threadIdx.x / 32; b < all;
         b += (int)gridDim.y * (THREADS / 32)) {
        if (b < s.params.first || b >= all - s.params.last) {
            if (lane == 0)
                out[b] = 0;
            continue;
        }
        const float *low = s.low + ((first + b) * s.kv_heads + kv_head) * s.d;
        const float *high = s.high + ((first + b) * s.kv_heads + kv_head) * s.d;
        float most = -INFINITY;
        for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
            float sum = 0.0f;
            for (int e = lane; e < s.d; e += 32) {
                const float q = to_float(c.q.at(n, h)[e]);
                sum += fmaxf(q * low[e], q * high[e]);
            }
            most = fmaxf(most, warp_sum(sum));
        }
        if (lane == 0)
            out[b] = float_order(most);
    }
}

/* A warp: which blocks are seen, ascending. */
template <typename T>
__global__ void __launch_bounds__(32) retrieve_choose_kernel(retrieve_call<T> c) {
    const retrieve_shape &s = c.shape;
    const int n = (int)blockIdx.x / s.kv_heads, lane = threadIdx.x, all = blocks_of(s, n);
    const unsigned *bounds = c.bounds + (int64_t)blockIdx.x * s.all;
    int32_t *out = s.blocks + (int64_t)blockIdx.x * s.most;
    unsigned worst = 0;
    const int top = (int)s.params.top;
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned trial = worst | 1u << bit;
        int reach = 0;
        for (int b = lane; b < all; b += 32)
            reach += bounds[b] >= trial;
#pragma unroll
        for (int x = 16; x > 0; x /= 2)
            reach += __shfl_xor_sync(0xffffffffu, reach, x);
        if (reach >= top)
            worst = trial;
        if (reach == top)
            break;
    }
    int above = 0;
    for (int b = lane; b < all; b += 32)
        above += bounds[b] > worst;
#pragma unroll
    for (int x = 16; x > 0; x /= 2)
        above += __shfl_xor_sync(0xffffffffu, above, x);
    int equal = worst ? max(top - above, 0) : 0, count = 0;
    for (int base = 0; base < all; base += 32) {
        const int b = base + lane;
        const bool always = b < s.params.first || b >= all - s.params.last;
        const unsigned u = b < all && !always ? bounds[b] : 0, before = (1u << lane) - 1;
        const unsigned same = __ballot_sync(0xffffffffu, u && u == worst);
        const bool seen = b < all && (always || (top > 0 && u > worst) ||
                                      (u && u == worst && __popc(same & before) < equal));
        const unsigned here = __ballot_sync(0xffffffffu, seen);
        if (seen)
            out[count + __popc(here & before)] = b;
        equal -= min(equal, __popc(same));
        count += __popc(here);
    }
    for (int x = count + lane; x < s.most; x += 32)
        out[x] = -1;
    if (lane == 0)
        c.count[blockIdx.x] = count;
}

/* A share of a row and head's keys; `width`: channels of a lane. */
template <typename T, int width>
__global__ void __launch_bounds__(THREADS) retrieve_attend_kernel(retrieve_call<T> c) {
    __shared__ float maximum[AT_ONCE], total[AT_ONCE], out[AT_ONCE][LANES * width];
    const retrieve_shape &s = c.shape;
    const int n = (int)blockIdx.x / s.heads, h = (int)blockIdx.x % s.heads, t = threadIdx.x;
    const int kv_head = h / (s.heads / s.kv_heads), lane = t % LANES, slot = t / LANES, d = s.d;
    const int32_t *blocks = s.blocks + ((int64_t)n * s.kv_heads + kv_head) * s.most;
    const int64_t block = s.params.block, keys = c.count[n * s.kv_heads + kv_head] * block;
    const int64_t share = (keys + s.shares - 1) / s.shares, from = blockIdx.y * share;
    const int64_t to = from + share < keys ? from + share : keys;
    float q[width], acc[width], most = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < width; i++) {
        q[i] = i * LANES + lane < d ? to_float(c.q.at(n, h)[i * LANES + lane]) : 0.0f;
        acc[i] = 0.0f;
    }
    for (int64_t base = from; base < to; base += AT_ONCE) { /* whole warps go round together */
        const int64_t x = base + slot;
        const int64_t j = x < to ? blocks[x / block] * block + x % block : s.length[n];
        const bool there = j < s.length[n];
        const T *k = c.k.at(s.start[n] + (there ? j : 0), kv_head);
        const T *v = c.v.at(s.start[n] + (there ? j : 0), kv_head);
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < width; i++)
            if (there && i * LANES + lane < d)
                score += q[i] * to_float(k[i * LANES + lane]);
#pragma unroll
        for (int x2 = LANES / 2; x2 > 0; x2 /= 2)
            score += __shfl_xor_sync(0xffffffffu, score, x2);
        if (!there)
            continue;
        score *= s.params.scale;
        const float next = fmaxf(most, score), old = most == next ? 1.0f : expf(most - next);
        const float e = expf(score - next);
        sum = sum * old + e;
        most = next;
#pragma unroll
        for (int i = 0; i < width; i++)
            acc[i] =
                acc[i] * old + (i * LANES + lane < d ? e * to_float(v[i * LANES + lane]) : 0.0f);
    }
    if (lane == 0) {
        maximum[slot] = most;
        total[slot] = sum;
    }
#pragma unroll
    for (int i = 0; i < width; i++)
        out[slot][i * LANES + lane] = acc[i];
    __syncthreads();
    float *part = c.parts + ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * (d + 2);
    most = -INFINITY;
    sum = 0.0f;
    for (int x = 0; x < AT_ONCE; x++)
        most = fmaxf(most, maximum[x]);
    for (int x = 0; x < AT_ONCE; x++)
        sum += maximum[x] == -INFINITY ? 0.0f : total[x] * expf(maximum[x] - most);
    for (int e = t; e < d; e += THREADS) {
        float y = 0.0f;
        for (int x = 0; x < AT_ONCE; x++)
            y += maximum[x] == -INFINITY ? 0.0f : out[x][e] * expf(maximum[x] - most);
        part[2 + e] = y;
    }
    if (t == 0) {
        part[0] = most;
        part[1] = sum;
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) retrieve_join_kernel(retrieve_call<T> c) {
    const retrieve_shape &s = c.shape;
    const int n = (int)blockIdx.x / s.heads, h = (int)blockIdx.x % s.heads, d = s.d;
    const float *part = c.parts + (int64_t)blockIdx.x * (d + 2);
    const int64_t step = (int64_t)gridDim.x * (d + 2);
    float most = -INFINITY, sum = 0.0f;
    for (int x = 0; x < s.shares; x++)
        most = fmaxf(most, part[x * step]);
    for (int x = 0; x < s.shares; x++)
        sum +=
            part[x * step] == -INFINITY ? 0.0f : part[x * step + 1] * expf(part[x * step] - most);
    for (int e = threadIdx.x; e < d; e += THREADS) {
        float y = 0.0f;
        for (int x = 0; x < s.shares; x++)
            y += part[x * step] == -INFINITY ? 0.0f
                                             : part[x * step + 2 + e] * expf(part[x * step] - most);
        c.o.at(n, h)[e] = from_float<T>(sum > 0.0f ? y / sum : 0.0f);
    }
    if (threadIdx.x == 0 && c.lse)
        c.lse[(int64_t)h * s.rows + n] = sum > 0.0f ? most + logf(sum) : -INFINITY;
}

template <typename T>
static tril_status retrieve_run(struct op_context *ctx, const retrieve_call<T> &c,
                                struct tril_error *err) {
    static const char name[] = "retrieve";
    const retrieve_shape &s = c.shape;
    const unsigned pairs = (unsigned)(s.rows * s.kv_heads), heads = (unsigned)(s.rows * s.heads);
    const unsigned wide = cuda_blocks(s.all, 4 * (THREADS / 32));
    CUDA_TRY(cuda_launch(ctx, name, err, retrieve_bounds_kernel<T>,
                         dim3(pairs, wide < 1024 ? wide : 1024), dim3(THREADS), 0, c));
    CUDA_TRY(cuda_launch(ctx, name, err, retrieve_choose_kernel<T>, dim3(pairs), dim3(32), 0, c));
    const dim3 grid(heads, (unsigned)s.shares);
    if (s.d <= 64)
        CUDA_TRY(
            cuda_launch(ctx, name, err, retrieve_attend_kernel<T, 8>, grid, dim3(THREADS), 0, c));
    else if (s.d <= 128)
        CUDA_TRY(
            cuda_launch(ctx, name, err, retrieve_attend_kernel<T, 16>, grid, dim3(THREADS), 0, c));
    else
        CUDA_TRY(
            cuda_launch(ctx, name, err, retrieve_attend_kernel<T, 32>, grid, dim3(THREADS), 0, c));
    return cuda_launch(ctx, name, err, retrieve_join_kernel<T>, dim3(heads), dim3(THREADS), 0, c);
}

OP_FN(retrieve) {
    static const char name[] = "retrieve";
    enum { Q, K, V, START, LENGTH, LOW, HIGH, O, LSE, BLOCKS };
    retrieve_shape s;
    s.start = (const int32_t *)args[START].data;
    s.length = (const int32_t *)args[LENGTH].data;
    s.low = (const float *)args[LOW].data;
    s.high = (const float *)args[HIGH].data;
    s.blocks = (int32_t *)args[BLOCKS].data;
    s.rows = (int)args[Q].shape[0];
    s.heads = (int)args[Q].shape[1];
    s.kv_heads = (int)args[K].shape[1];
    s.d = (int)args[Q].shape[2];
    s.most = (int)args[BLOCKS].shape[2];
    s.all = (int)args[LOW].shape[0];
    s.params = *(const struct retrieve_params *)params;
    const struct retrieve_params &p = s.params;
    if (!(p.scale > 0) || p.block < 1 || p.first < 0 || p.last < 1 || p.top < 0 ||
        p.first + p.last + p.top > s.most)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the scale %g must be above 0, blocks of %lld keys hold at least one, "
                         "the last of them is always seen, and argument blocks has room for all "
                         "that is seen (%d)",
                         name, (double)p.scale, (long long)p.block, s.most);
    const int64_t heads = (int64_t)s.rows * s.heads, pairs = (int64_t)s.rows * s.kv_heads;
    const int64_t keys = s.most * p.block, wanted = 8 * cuda_state_of(ctx)->processors;
    int64_t shares = (keys + 4 * AT_ONCE - 1) / (4 * AT_ONCE); /* 4 keys a slot at least */
    if (heads > 0 && shares * heads > wanted)
        shares = (wanted + heads - 1) / heads;
    s.shares = (int)shares;
    unsigned *memory;
    CUDA_TRY(cuda_scratch(ctx, name, 4 * (pairs * (s.all + 1) + shares * heads * (s.d + 2)),
                          &memory, err));
    FOR_DTYPE(args[Q].dtype, T, {
        retrieve_call<T> c = {s,
                              heads3_of<const T>(args[Q]),
                              heads3_of<const T>(args[K]),
                              heads3_of<const T>(args[V]),
                              heads3_of<T>(args[O]),
                              (float *)args[LSE].data,
                              memory,
                              (int *)(memory + pairs * s.all),
                              (float *)(memory + pairs * (s.all + 1))};
        return retrieve_run<T>(ctx, c, err);
    });
}

/* ------------------------------------------------------------------ bounds of blocks of keys
 *
 * A block of threads takes every gridDim.y-th of a sequence's blocks that hold a new key. */

template <typename T>
__global__ void __launch_bounds__(THREADS, 8)
    block_bounds_kernel(heads3<const T> k, const int32_t *start, const int32_t *from,
                        const int32_t *length, float *low, float *high, int kv_heads, int d,
                        int64_t block) {
    const int64_t begin = start[blockIdx.x], end = length[blockIdx.x], fresh = from[blockIdx.x];
    for (int64_t b = fresh / block + blockIdx.y; fresh < end && b * block < end; b += gridDim.y)
        for (int x = threadIdx.x; x < kv_heads * d; x += THREADS) {
            float least = INFINITY, most = -INFINITY;
            for (int64_t j = b * block; j < (b + 1) * block && j < end; j++) {
                const float v = to_float(k.at(begin + j, x / d)[x % d]);
                least = fminf(least, v);
                most = fmaxf(most, v);
            }
            low[(begin / block + b) * kv_heads * d + x] = least;
            high[(begin / block + b) * kv_heads * d + x] = most;
        }
}

OP_FN(block_bounds) {
    enum { K, START, FROM, LENGTH, LOW, HIGH };
    const int64_t block = ((const struct retrieve_params *)params)->block;
    if (block < 1)
        return error_set(err, TRIL_ERR_ARGUMENT, "block_bounds: a block needs at least one key");
    const int64_t all = args[LOW].shape[0];
    FOR_DTYPE(args[K].dtype, T, {
        return cuda_launch(ctx, "block_bounds", err, block_bounds_kernel<T>,
                           dim3((unsigned)args[START].shape[0], (unsigned)(all < 256 ? all : 256)),
                           dim3(THREADS), 0, heads3_of<const T>(args[K]),
                           (const int32_t *)args[START].data, (const int32_t *)args[FROM].data,
                           (const int32_t *)args[LENGTH].data, (float *)args[LOW].data,
                           (float *)args[HIGH].data, (int)args[K].shape[1], (int)args[K].shape[2],
                           block);
    });
}
