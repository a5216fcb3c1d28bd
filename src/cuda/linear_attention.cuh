/* What linear attention's forward and backward share: their arguments as kernels see them, the
 * states of chunks in scratch memory, and the scan over them.
 *
 * A sequence is cut into chunks of 64 rows (TILE); chunk sums are computed all at once, scanned in
 * order (one thread for an element of the state), and then every chunk's outputs all at once from
 * the state before it and the products within it. A state in scratch is [d+1][d4] fp32, row d the
 * normaliser, d4 = d rounded up to 4. */
#ifndef CUDA_LINEAR_ATTENTION_CUH
#define CUDA_LINEAR_ATTENTION_CUH

#include "cuda/tile.cuh"

/* Sequences up to so many rows go through the recurrence (forward). */
static const int FEW_ROWS = 8;

struct linear_shape {
    const int32_t *q_offsets;
    int sequences, rows, heads, kv_heads, d, d4;
    int few; /* sequences of at most so many rows are none of the chunks' */
    bool causal, wide;
};

static inline struct linear_shape linear_shape_of(const struct tensor &q, const struct tensor &k,
                                                  const struct tensor &offsets, int few,
                                                  const void *params) {
    struct linear_shape s;
    s.q_offsets = (const int32_t *)offsets.data;
    s.sequences = (int)offsets.shape[0] - 1;
    s.rows = (int)q.shape[0];
    s.heads = (int)q.shape[1];
    s.kv_heads = (int)k.shape[1];
    s.d = (int)q.shape[2];
    s.d4 = (s.d + 3) / 4 * 4;
    s.few = few;
    s.causal = ((const struct linear_attention_params *)params)->causal;
    s.wide = true;
    return s;
}
/* The most chunks that there can be: every sequence has one that is not full. */
static inline int64_t linear_chunks(const struct linear_shape &s) {
    int64_t partial = s.rows / (s.few + 1);
    return s.rows / TILE + (partial < s.sequences ? partial : s.sequences);
}
static inline int64_t linear_state_floats(const struct linear_shape &s) {
    return (int64_t)(s.d + 1) * s.d4;
}

/* Rows of a sequence that are cut into chunks. */
__device__ __forceinline__ int linear_length(const linear_shape &s, int sequence) {
    int n = s.q_offsets[sequence + 1] - s.q_offsets[sequence];
    return n > s.few ? n : 0;
}

/* A chunk: rows begin .. begin + rows - 1 of the batch; its state's index, and the one it reads. */
struct linear_chunk {
    int begin, rows, state;
};
__device__ __forceinline__ bool linear_chunk_find(const linear_shape &s, int index,
                                                  linear_chunk *out) {
    int sequence, first;
    auto length = [&](int x) { return linear_length(s, x); };
    if (!tile_find(s.sequences, TILE, index, length, &sequence, &first))
        return false;
    out->begin = s.q_offsets[sequence] + first;
    out->rows = min(TILE, s.q_offsets[sequence + 1] - out->begin);
    out->state = s.causal ? index : index - first / TILE;
    return true;
}

/* phi(x) = elu(x) + 1 and its derivative. */
__device__ __forceinline__ float feature(float x) {
    return x > 0.0f ? x + 1.0f : expf(x);
}
__device__ __forceinline__ float feature_slope(float x) {
    return x > 0.0f ? 1.0f : expf(x);
}
struct map_feature {
    __device__ __forceinline__ float operator()(float x, int, int) const {
        return feature(x);
    }
};

/* Chunk sums to what precedes each chunk (backwards: follows), in order; begins with `initial`
 * ([S, K, d, d+1] or NULL: zeros), leaves the whole in `whole` (or NULL; it may be `initial`). Not
 * causal: the whole is left at the sequence's first chunk. */
tril_status linear_scan(struct op_context *ctx, const char *name, const struct linear_shape &shape,
                        float *states, const float *initial, float *whole, bool backwards,
                        struct tril_error *err);

/* states[chunk][K] = sum over the chunk's rows of phi(k) (v, 1)^T; or for queries, over the rows
 * and the group's heads, of phi(q) (do / den, gd)^T. */
template <typename T>
struct linear_sums_call {
    linear_shape shape;
    heads3<const T> x, y;         /* k, v; q, do */
    const float *inverse, *extra; /* [H, N]; NULL: for keys */
    float *states;
};
template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 3) linear_sums_kernel(linear_sums_call<T> c) {
    __shared__ __align__(16) float x[TILE_FLOATS], y[TILE_FLOATS];
    const linear_shape &s = c.shape;
    linear_chunk chunk;
    if (!linear_chunk_find(s, blockIdx.x, &chunk))
        return;
    const int kv_head = blockIdx.y, blocks = (s.d + TILE - 1) / TILE;
    const int i0 = (int)blockIdx.z / blocks * TILE, e0 = (int)blockIdx.z % blocks * TILE;
    const int group = c.inverse ? s.heads / s.kv_heads : 1, t = threadIdx.x;
    float acc[4][4], normaliser = 0.0f;
    tile_clear(acc);
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
        const int64_t at = (int64_t)h * s.rows + chunk.begin;
        load_tile<T>(
            x, [&](int i) { return i < chunk.rows ? c.x.at(chunk.begin + i, h) : NULL; }, TILE, i0,
            s.d, s.wide, map_feature());
        load_tile<T>(
            y, [&](int i) { return i < chunk.rows ? c.y.at(chunk.begin + i, h) : NULL; }, TILE, e0,
            s.d, s.wide,
            [&](float v, int i, int) { return c.inverse ? v * c.inverse[at + i] : v; });
        __syncthreads();
        tile_product<TILE>(acc, x, y);
        if (e0 == 0 && t < TILE)
            for (int i = 0; i < chunk.rows; i++)
                normaliser += x[i * TILE_LD + t] * (c.inverse ? c.extra[at + i] : 1.0f);
        __syncthreads();
    }
    float *out = c.states + ((int64_t)blockIdx.x * s.kv_heads + kv_head) * (s.d + 1) * s.d4;
    for (int r = 0; r < 4; r++) {
        int i = i0 + t / 16 * 4 + r;
        if (i < s.d)
            store_four(out + (int64_t)i * s.d4, acc[r], e0 + t % 16 * 4, s.d4, true);
    }
    if (e0 == 0 && t < TILE && i0 + t < s.d4)
        out[(int64_t)s.d * s.d4 + i0 + t] = i0 + t < s.d ? normaliser : 0.0f;
}

#endif
