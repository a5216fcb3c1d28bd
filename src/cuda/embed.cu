/* Token and position embedding (contracts: ops.h; formulas: src/ops/embed.c).
 *
 * Forward reads the named rows and writes x, once. Backward must add the rows of dx that name the
 * same row of a table in the order of n, without floating-point atomics. The names of both tables
 * become keys (a position p is V + p) of items: n, and N + n. Integers find the order:
 *
 *   count    of every key, by atomics; what an item's own addition found is its slot, in any order
 *   begin    of every key's group: the item of slot 0 takes as many places as its key counts
 *   place    items at begin + slot
 *   rank     of an item: how many of its group are smaller; so the groups are sorted
 *   sum      a warp for a group and 128 columns: it adds the group's rows of dx, ROWS in flight, to
 *            the table's row
 *
 * Where groups lie depends on the race, what they hold does not. Bytes: dx once for each table, and
 * 8 D for every row that is named; the integers are 40 bytes an item and 4 (V + C). rank takes the
 * sum of the groups' squares: 4% of the items having one key (a text's most frequent word) costs N
 * / 25 steps an item, all of them having the same one N. */
#include "cuda/device.cuh"

static const int THREADS = 256;

/* ------------------------------------------------------------------ forward */

template <typename W, int count>
__global__ void embed_forward_kernel(const int32_t *tokens, const int32_t *positions, const W *wte,
                                     const W *wpe, float *x, int64_t N, int64_t D) {
    int64_t n = (int64_t)blockIdx.x * blockDim.z + threadIdx.z;
    if (n >= N)
        return;
    const W *token = wte + tokens[n] * D, *position = wpe ? wpe + positions[n] * D : NULL;
    for (int64_t i = (int64_t)threadIdx.x * count; i < D; i += (int64_t)blockDim.x * count) {
        float v[count], w[count];
        load_packed<W, count>(token + i, v);
        if (position) {
            load_packed<W, count>(position + i, w);
#pragma unroll
            for (int k = 0; k < count; k++)
                v[k] += w[k];
        }
        store_packed<float, count>(x + n * D + i, v);
    }
}

/* wte and wpe of different dtypes: one after the other, the second onto the first. */
template <typename W, int count>
__global__ void embed_add_kernel(const int32_t *positions, const W *wpe, float *x, int64_t N,
                                 int64_t D) {
    int64_t n = (int64_t)blockIdx.x * blockDim.z + threadIdx.z;
    if (n >= N)
        return;
    const W *position = wpe + positions[n] * D;
    for (int64_t i = (int64_t)threadIdx.x * count; i < D; i += (int64_t)blockDim.x * count) {
        float v[count], w[count];
        load_packed<float, count>(x + n * D + i, v);
        load_packed<W, count>(position + i, w);
#pragma unroll
        for (int k = 0; k < count; k++)
            v[k] += w[k];
        store_packed<float, count>(x + n * D + i, v);
    }
}

OP_FN(embed_forward) {
    enum { TOKENS, POSITIONS, WTE, WPE, X };
    (void)params;
    int64_t N = args[X].shape[0], D = args[X].shape[1];
    const int32_t *tokens = (const int32_t *)args[TOKENS].data;
    const int32_t *positions = (const int32_t *)args[POSITIONS].data;
    float *x = (float *)args[X].data;
    bool two = args[WPE].data != NULL, alike = !two || args[WPE].dtype == args[WTE].dtype;
    bool packs = rows_packable(args[X], 4) && rows_packable(args[WTE], 4) &&
                 (!two || rows_packable(args[WPE], 4));
    unsigned grid;
    dim3 block = heads_block(N, 1, packs ? D / 4 : D, &grid);
    FOR_DTYPE(args[WTE].dtype, W, {
        CUDA_TRY(cuda_launch(ctx, "embed_forward", err,
                             packs ? embed_forward_kernel<W, 4> : embed_forward_kernel<W, 1>,
                             dim3(grid), block, 0, tokens, positions, (const W *)args[WTE].data,
                             alike ? (const W *)args[WPE].data : NULL, x, N, D));
    });
    if (alike)
        return TRIL_OK;
    FOR_DTYPE(args[WPE].dtype, W, {
        return cuda_launch(ctx, "embed_forward", err,
                           packs ? embed_add_kernel<W, 4> : embed_add_kernel<W, 1>, dim3(grid),
                           block, 0, positions, (const W *)args[WPE].data, x, N, D);
    });
}

/* ------------------------------------------------------------------ backward */

struct groups {
    const int32_t *tokens, *positions; /* positions NULL: items are tokens only */
    int N, items, V;
    int32_t *count, *begin;         /* of keys */
    int32_t *next;                  /* places taken */
    int32_t *slot, *placed, *order; /* of items: see above; order: sorted within groups */
};
__device__ __forceinline__ int key_of(const struct groups &g, int item) {
    return item < g.N ? g.tokens[item] : g.V + g.positions[item - g.N];
}
__device__ __forceinline__ int item_of_thread() {
    return (int)(blockIdx.x * blockDim.x + threadIdx.x);
}

__global__ void embed_count_kernel(struct groups g) {
    int item = item_of_thread();
    if (item < g.items)
        g.slot[item] = atomicAdd(&g.count[key_of(g, item)], 1);
}
__global__ void embed_begin_kernel(struct groups g) {
    int item = item_of_thread();
    if (item < g.items && g.slot[item] == 0) {
        int key = key_of(g, item);
        g.begin[key] = atomicAdd(g.next, g.count[key]);
    }
}
__global__ void embed_place_kernel(struct groups g) {
    int item = item_of_thread();
    if (item < g.items)
        g.placed[g.begin[key_of(g, item)] + g.slot[item]] = item;
}
__global__ void embed_rank_kernel(struct groups g) {
    int at = item_of_thread();
    if (at >= g.items)
        return;
    int item = g.placed[at], key = key_of(g, item), begin = g.begin[key], rank = 0;
    for (int i = begin; i < begin + g.count[key]; i++)
        rank += g.placed[i] < item;
    g.order[begin + rank] = item;
}

static const int WARPS = 4;

/* Warp (p, c): the group that begins at place p, columns c * 32 * count + ... */
template <int count>
__global__ void embed_sum_kernel(struct groups g, const float *dx, float *dwte, float *dwpe,
                                 int64_t D) {
    const int ROWS = 8;
    int at = (int)(blockIdx.x * WARPS + threadIdx.y);
    int64_t column = ((int64_t)blockIdx.y * 32 + threadIdx.x) * count;
    if (at >= g.items || column >= D)
        return;
    int item = g.order[at], key = key_of(g, item);
    if (g.begin[key] != at)
        return;
    int rows = g.count[key];
    float *to = (key < g.V ? dwte + key * D : dwpe + (key - g.V) * D) + column;
    float sum[count];
    load_packed<float, count>(to, sum);
    for (int r = 0; r < rows; r += ROWS) {
        float v[ROWS][count];
#pragma unroll
        for (int k = 0; k < ROWS; k++)
            if (r + k < rows) {
                int n = g.order[at + r + k];
                load_packed<float, count>(dx + (int64_t)(n < g.N ? n : n - g.N) * D + column, v[k]);
            }
#pragma unroll
        for (int k = 0; k < ROWS; k++)
            if (r + k < rows)
#pragma unroll
                for (int j = 0; j < count; j++)
                    sum[j] += v[k][j];
    }
    store_packed<float, count>(to, sum);
}

OP_FN(embed_backward) {
    enum { TOKENS, POSITIONS, DX, DWTE, DWPE };
    static const char name[] = "embed_backward";
    (void)params;
    int64_t N = args[DX].shape[0], D = args[DX].shape[1], V = args[DWTE].shape[0];
    bool two = args[DWPE].data != NULL;
    int64_t items = two ? 2 * N : N, keys = V + (two ? args[DWPE].shape[0] : 0);
    if (N == 0)
        return TRIL_OK;
    if (items > INT32_MAX - THREADS || keys > INT32_MAX)
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "embed_backward: %lld tokens in one call are too many; use a smaller batch",
            (long long)N);
    struct groups g = {(const int32_t *)args[TOKENS].data,
                       (const int32_t *)args[POSITIONS].data,
                       (int)N,
                       (int)items,
                       (int)V,
                       NULL,
                       NULL,
                       NULL,
                       NULL,
                       NULL,
                       NULL};
    CUDA_TRY(cuda_scratch(ctx, name, (1 + 2 * keys + 3 * items) * (int64_t)sizeof(int32_t), &g.next,
                          err));
    g.count = g.next + 1; /* zeroed together */
    g.begin = g.count + keys;
    g.slot = g.begin + keys;
    g.placed = g.slot + items;
    g.order = g.placed + items;
    CUDA_TRY(cuda_check(cudaMemsetAsync(g.next, 0, (size_t)(1 + keys) * sizeof(int32_t),
                                        cuda_state_of(ctx)->stream),
                        name, err));
    void (*const kernels[])(struct groups) = {embed_count_kernel, embed_begin_kernel,
                                              embed_place_kernel, embed_rank_kernel};
    for (int k = 0; k < 4; k++)
        CUDA_TRY(cuda_launch(ctx, name, err, kernels[k], dim3(cuda_blocks(items, THREADS)),
                             dim3(THREADS), 0, g));
    const float *dx = (const float *)args[DX].data;
    float *dwte = (float *)args[DWTE].data, *dwpe = (float *)args[DWPE].data;
    bool packs = ((uintptr_t)dx | (uintptr_t)dwte | (uintptr_t)dwpe) % 16 == 0 && D % 4 == 0;
    return cuda_launch(ctx, name, err, packs ? embed_sum_kernel<4> : embed_sum_kernel<1>,
                       dim3(cuda_blocks(items, WARPS), cuda_blocks(D, packs ? 128 : 32)),
                       dim3(32, WARPS), 0, g, dx, dwte, dwpe, D);
}
