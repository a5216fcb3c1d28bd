/* What the forward and the backward of Hopper's attention share: which keys a tile of rows sees,
 * finding a tile's sequence, loading tiles, and writing accumulators. */
#ifndef CUDA_ATTENTION_HOPPER_CUH
#define CUDA_ATTENTION_HOPPER_CUH

#include "cuda/attention_hopper.h"
#include "cuda/hopper.cuh"

extern "C" {
#include "ops/attention.h"
}

/* Numbers of a call as kernels need them; pointers into device memory. */
struct attention_shape {
    const int32_t *q_offsets, *kv_start, *kv_length;
    int sequences, heads, kv_heads;
    int rows, keys;    /* N, M */
    int left, right;   /* row at position p sees keys p - left .. p + right */
    float scale;       /* of the scores */
    float scale_log2e; /* times log2(e): exponentials are powers of 2 */
};
struct sequence_span {
    int row, rows; /* of q */
    int key, keys; /* of k and v */
};

static const int REACH_ALL = 1 << 30;

/* Keys [first, end) that the row at position p sees. */
__device__ __forceinline__ int visible_first(const attention_shape &a, int p) {
    return p - a.left;
}
__device__ __forceinline__ int visible_end(const attention_shape &a, int p, int keys) {
    int end = p + a.right + 1;
    return end < keys ? end : keys;
}

/* Sequences own slots of `size` rows: those of sequence s begin at offsets[s] / size + s, which
 * leaves enough for its rows whatever lies before; some stay empty. The sequence of a slot, and in
 * *first its first slot. */
__device__ __forceinline__ int slot_sequence(const int32_t *offsets, int sequences, int size,
                                             int slot, int *first) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (offsets[middle] / size + middle <= slot)
            low = middle;
        else
            high = middle - 1;
    }
    *first = offsets[low] / size + low;
    return low;
}
static inline int slot_count(int64_t rows, int64_t sequences, int size) {
    return (int)(rows / size + sequences);
}
__device__ __forceinline__ sequence_span sequence_of(const attention_shape &a, int s) {
    sequence_span at;
    at.row = a.q_offsets[s];
    at.rows = a.q_offsets[s + 1] - at.row;
    at.key = a.kv_start[s];
    at.keys = a.kv_length[s];
    return at;
}

/* One thread: a tile of `rows` rows of `width` channels from row `row` of head `head`. */
template <int width, int rows>
__device__ __forceinline__ void tile_load(char *to, const CUtensorMap *map, uint64_t *full,
                                          int head, int row) {
#pragma unroll
    for (int c = 0; c < width; c += 64)
        copy_tensor(to + c * rows * 2, map, full, c, head, row);
}
/* A whole warp: zeros in rows [from, rows) of a tile, whatever lies there (0 times NaN is NaN),
 * visible to products after a barrier. */
template <int width, int rows>
__device__ __forceinline__ void tile_clear(char *tile, int from, int lane) {
    for (int c = 0; c < width; c += 64)
        for (int i = from * 8 + lane; i < rows * 8; i += 32)
            *(uint4 *)(tile + c * rows * 2 + i * 16) = make_uint4(0, 0, 0, 0);
    fence_stores();
    __syncwarp();
}

/* Scores [64 rows of a warpgroup, 2 `count` / 4 ... columns] become products' left factor. */
template <typename T, int count>
__device__ __forceinline__ void to_factor(const float (&s)[count], uint32_t (&p)[count / 8][4]) {
#pragma unroll
    for (int t = 0; t < count / 8; t++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            p[t][r] = pack_pair<T>(s[8 * t + 2 * r], s[8 * t + 2 * r + 1]);
}

/* Sum and maximum over the four lanes that share a row. */
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/* Writes a thread's two rows of accumulators [64, 2 count / 4 ...], each times `scale` of its row,
 * to `out` + row * stride where the row (from `row` on, and 8 below) is less than `rows`. The four
 * lanes of a row trade their pairs so that each writes 16 bytes. */
template <typename T, int count>
__device__ __forceinline__ void write_rows(const float (&d)[count], const float (&scale)[2], T *out,
                                           int64_t stride, int row, int rows) {
    int lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int u = 0; u < count / 16; u++) { /* 32 columns */
            uint32_t w[4];
#pragma unroll
            for (int c = 0; c < 4; c++)
                w[c] = pack_pair<T>(d[16 * u + 4 * c + 2 * r] * scale[r],
                                    d[16 * u + 4 * c + 2 * r + 1] * scale[r]);
            bool odd = lane & 1, upper = lane & 2;
            uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
            uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
            w[0] = odd ? x : w[0];
            w[1] = odd ? w[1] : x;
            w[2] = odd ? y : w[2];
            w[3] = odd ? w[3] : y;
            x = __shfl_xor_sync(0xffffffffu, upper ? w[0] : w[2], 2);
            y = __shfl_xor_sync(0xffffffffu, upper ? w[1] : w[3], 2);
            w[0] = upper ? x : w[0];
            w[2] = upper ? w[2] : x;
            w[1] = upper ? y : w[1];
            w[3] = upper ? w[3] : y;
            if (row + 8 * r < rows)
                *(uint4 *)(out + (row + 8 * r) * stride + 32 * u + 8 * lane) =
                    make_uint4(w[0], w[1], w[2], w[3]);
        }
}

/* The shape of a call whose arguments begin in the forward's order up to kv_length. */
static inline attention_shape attention_shape_of(const struct tensor *args,
                                                 const struct attention_params *p) {
    attention_shape a;
    a.q_offsets = (const int32_t *)args[F_OFFSETS].data;
    a.kv_start = (const int32_t *)args[F_START].data;
    a.kv_length = (const int32_t *)args[F_LENGTH].data;
    a.sequences = (int)args[F_START].shape[0];
    a.heads = (int)args[F_Q].shape[1];
    a.kv_heads = (int)args[F_K].shape[1];
    a.rows = (int)args[F_Q].shape[0];
    a.keys = (int)args[F_K].shape[0];
    a.left = a.right = REACH_ALL;
    bool causal = p->rules ? p->rules[0].causal : p->causal;
    if (p->rules && p->rules[0].parts == 1) {
        int64_t reach = p->rules[0].part[0].a - 1;
        a.left = a.right = (int)(reach < REACH_ALL ? reach : REACH_ALL);
    }
    if (causal)
        a.right = 0;
    a.scale = p->scale;
    a.scale_log2e = p->scale * 1.44269504088896341f;
    return a;
}

/* What both directions ask of a call; `count` tensors (in `which`) hold heads of channels. */
bool attention_hopper_takes(const struct op_context *ctx, const struct tensor *args,
                            const struct attention_params *p, const int *which, int count);
tril_status attention_hopper_no_map(const char *name, struct tril_error *err);

#endif
