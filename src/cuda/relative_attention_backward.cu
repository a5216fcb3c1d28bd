/* Attention with the relative positions of Transformer-XL, backward (contract: ops.h). With P =
 * exp(scores - lse) and ds = scale P (do.v - do.o), four kernels of 64 columns of results a block:
 *
 *   queries    64 rows: dq = ds (k + r), the parts apart so that their sums over the rows, of which
 *              every tile leaves its own, make du and dw; ds takes the place of the distances'
 *              products it was made with, and is complete when its block is
 *   biases     du, dw: the tiles' sums in order
 *   keys       64 keys, past and own: dk = ds^T (q + u), dv = P^T do over the rows that see them
 *   distances  64 distances: dr = ds^T (q + w) along the diagonals, over all sequences
 *
 * Scores are recomputed by each, 34 d FLOPs for a pair in all (16 d are useful), fp32; nothing is
 * added to memory by two blocks, so the same bits every time. 70 KB of shared memory. */
#include "cuda/relative_attention.cuh"

template <typename T>
struct relative_backward_call {
    relative_inputs<T> in;
    heads3<const T> o, dout;
    const float *lse;
    heads3<T> dq, dk, dv, dpast_k, dpast_v, dr;
    float *delta; /* [H, N] */
    float *sums;  /* [tiles, 2, H, d]: du, dw of every tile of rows */
    int tiles;
};
/* Two tiles (or slices of what they are made of), then two blocks of distances. */
static const size_t SHARED = (size_t)(4 * TILE_FLOATS) * sizeof(float);

/* acc = 64 rows of a times 64 rows of b, over d channels. Ends with a barrier. */
template <typename T, typename A, typename B>
__device__ __forceinline__ void rows_product(float (&acc)[4][4], float *left, float *right, A a,
                                             B b, int d, bool wide) {
    tile_clear(acc);
    for (int first = 0; first < d; first += SLICE) {
        load_slice<T>(left, a, first, d, wide, tile_same());
        load_slice<T>(right, b, first, d, wide, tile_same());
        __syncthreads();
        tile_product<SLICE>(acc, left, right);
        __syncthreads();
    }
}

template <typename T>
__global__ void __launch_bounds__(TILE_THREADS) relative_delta_kernel(relative_backward_call<T> c) {
    const relative_shape &s = c.in.shape;
    const int64_t row = (int64_t)blockIdx.x * (TILE_THREADS / 32) + threadIdx.x / 32;
    if (row >= (int64_t)s.rows * s.heads)
        return;
    const int64_t n = row / s.heads;
    const int h = (int)(row % s.heads);
    float sum = 0.0f;
    for (int e = threadIdx.x % 32; e < s.d; e += 32)
        sum += to_float(c.dout.at(n, h)[e]) * to_float(c.o.at(n, h)[e]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        c.delta[(int64_t)h * s.rows + n] = sum;
}

/* Sum of a tile's columns over its rows: `at` [16][TILE_LD] in shared memory; thread t < 64 returns
 * column t's. Between barriers. */
__device__ __forceinline__ float column_sum(const float (&acc)[4][4], float *at) {
    const int t = threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int x = 0; x < 4; x++)
        at[t / 16 * TILE_LD + t % 16 * 4 + x] = (acc[0][x] + acc[1][x]) + (acc[2][x] + acc[3][x]);
    __syncthreads();
    float sum = 0.0f;
    for (int y = 0; y < 16 && t < TILE; y++)
        sum += at[y * TILE_LD + t];
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    relative_queries_kernel(relative_backward_call<T> c) {
    CUDA_SHARED(float, slices);
    __shared__ float content[TILE], place[TILE];
    const relative_shape &s = c.in.shape;
    const int h = blockIdx.y, kv_head = h / (s.heads / s.kv_heads), e0 = blockIdx.z * TILE;
    const int t = threadIdx.x, d = s.d;
    float *high = slices + 2 * TILE_FLOATS, *low = high + TILE_FLOATS;
    float *left = slices, *right = slices + TILE_FLOATS;
    const relative_space space = {slices, slices + SLICE_FLOATS, slices + 2 * SLICE_FLOATS, content,
                                  place};
    float *sums = c.sums + ((int64_t)blockIdx.x * 2 * s.heads + h) * d + e0;
    int sequence, i0;
    if (blockIdx.x == 0 && e0 == 0)
        clear_outside(c.dq, s.q_offsets, s.sequences, s.rows, h, d);
    auto length = [&](int x) { return s.q_offsets[x + 1] - s.q_offsets[x]; };
    if (!tile_find(s.sequences, TILE, blockIdx.x, length, &sequence, &i0)) {
        if (t < TILE && e0 + t < d)
            sums[t] = sums[(int64_t)s.heads * d + t] = 0.0f;
        return;
    }
    const relative_place p = relative_place_of(s, sequence);
    const int p0 = p.past + i0, last = min(p0 + TILE, p.past + p.own);
    const int64_t row0 = (int64_t)h * s.rows + p.begin + i0;
    auto distances = [&](int t0) {
        return [&c, t0, h](int i) {
            return t0 + i >= 0 && t0 + i < c.in.shape.distances ? c.in.r.at(t0 + i, h) : NULL;
        };
    };
    float by_content[4][4], by_place[4][4], scores[4][4], dp[4][4];
    tile_clear(by_content);
    tile_clear(by_place);
    int j0 = relative_first(s, p0) / TILE * TILE;
    relative_products(c.in, p, space, h, i0, false, 0, p0 - j0, scores, high);
    /* What no earlier tile has filled: distances of keys before the first. */
    for (int x = t; x < TILE * TILE; x += TILE_THREADS)
        if (x / TILE > x % TILE)
            high[x / TILE * TILE_LD + x % TILE] = 0.0f;
    for (; j0 < last; j0 += TILE) {
        relative_products(c.in, p, space, h, i0, true, j0, p0 - j0 - TILE, scores, low);
        rows_product<T>(
            dp, slices, slices + SLICE_FLOATS,
            [&](int i) { return i0 + i < p.own ? c.dout.at(p.begin + i0 + i, h) : NULL; },
            [&](int i) { return relative_key(p, c.in.v, c.in.past_v, j0 + i, kv_head); }, d,
            s.wide);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int i = t / 16 * 4 + r;
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const int y = t % 16 * 4 + x;
                float *at = relative_at(high, low, i, y);
                float ds = 0.0f;
                if (relative_seen(s, p, i0 + i, j0 + y))
                    ds = expf((scores[r][x] + content[y] + *at) * s.scale - c.lse[row0 + i]) *
                         (dp[r][x] - c.delta[row0 + i]) * s.scale;
                *at = scores[r][x] = ds;
            }
        }
        tile_keep_transposed(left, scores);
        load_tile<T>(
            right, [&](int x) { return relative_key(p, c.in.k, c.in.past_k, j0 + x, kv_head); },
            TILE, e0, d, s.wide, tile_same());
        __syncthreads();
        tile_product<TILE>(by_content, left, right);
        __syncthreads();
        load_tile<T>(right, distances(p0 - j0), TILE, e0, d, s.wide, tile_same());
        __syncthreads();
        tile_product<TILE>(by_place, high, right); /* this block is complete */
        __syncthreads();
        float *done = high;
        high = low;
        low = done;
    }
    for (int x = t; x < TILE * TILE; x += TILE_THREADS) /* of keys after the last */
        if (x / TILE <= x % TILE)
            high[x / TILE * TILE_LD + x % TILE] = 0.0f;
    load_tile<T>(right, distances(p0 - j0), TILE, e0, d, s.wide, tile_same());
    __syncthreads();
    tile_product<TILE>(by_place, high, right);
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = i0 + t / 16 * 4 + r;
        float v[4];
#pragma unroll
        for (int x = 0; x < 4; x++)
            v[x] = by_content[r][x] + by_place[r][x];
        if (i < p.own)
            store_four(c.dq.at(p.begin + i, h), v, e0 + t % 16 * 4, d, s.wide);
    }
    const float du = column_sum(by_content, slices), dw = column_sum(by_place, slices);
    if (t < TILE && e0 + t < d) {
        sums[t] = du;
        sums[(int64_t)s.heads * d + t] = dw;
    }
}

__global__ void __launch_bounds__(TILE_THREADS)
    relative_biases_kernel(const float *sums, int tiles, int size, float *du, float *dw) {
    const int x = (int)(blockIdx.x * TILE_THREADS + threadIdx.x);
    if (x >= 2 * size)
        return;
    float sum = 0.0f;
    for (int tile = 0; tile < tiles; tile++)
        sum += sums[(int64_t)tile * 2 * size + x];
    float *out = x < size ? du + x : dw + (x - size);
    *out += sum;
}

template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    relative_keys_kernel(relative_backward_call<T> c) {
    CUDA_SHARED(float, slices);
    __shared__ float content[TILE], place[TILE];
    const relative_shape &s = c.in.shape;
    const int kv_head = blockIdx.y, group = s.heads / s.kv_heads, e0 = blockIdx.z * TILE;
    const int t = threadIdx.x, d = s.d;
    float *high = slices + 2 * TILE_FLOATS, *low = high + TILE_FLOATS;
    float *left = slices, *right = slices + TILE_FLOATS;
    const relative_space space = {slices, slices + SLICE_FLOATS, slices + 2 * SLICE_FLOATS, content,
                                  place};
    int sequence, j0;
    if (blockIdx.x == 0 && e0 == 0) {
        clear_outside(c.dk, s.q_offsets, s.sequences, s.rows, kv_head, d);
        clear_outside(c.dv, s.q_offsets, s.sequences, s.rows, kv_head, d);
    }
    auto length = [&](int x) {
        return s.q_offsets[x + 1] - s.q_offsets[x] + (s.past_length ? s.past_length[x] : 0);
    };
    if (!tile_find(s.sequences, TILE, blockIdx.x, length, &sequence, &j0))
        return;
    const relative_place p = relative_place_of(s, sequence);
    float scores[4][4], dp[4][4], dk[4][4], dv[4][4];
    tile_clear(dk);
    tile_clear(dv);
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
        auto column = [&](float x, int, int e) { return x + s.u[(int64_t)h * d + e]; };
        for (int i0 = max(j0 - p.past, 0) / TILE * TILE;
             i0 < p.own && relative_first(s, p.past + i0) < j0 + TILE; i0 += TILE) {
            const int64_t row0 = (int64_t)h * s.rows + p.begin + i0;
            const int from = p.past + i0 - j0; /* distance of the first row to the first key */
            auto gradient = [&](int i) {
                return i0 + i < p.own ? c.dout.at(p.begin + i0 + i, h) : NULL;
            };
            if (from > 0) /* or nobody looks at `low` */
                relative_products(c.in, p, space, h, i0, false, 0, from - TILE, scores, low);
            relative_products(c.in, p, space, h, i0, true, j0, from, scores, high);
            rows_product<T>(
                dp, slices, slices + SLICE_FLOATS, gradient,
                [&](int i) { return relative_key(p, c.in.v, c.in.past_v, j0 + i, kv_head); }, d,
                s.wide);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int i = t / 16 * 4 + r;
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int y = t % 16 * 4 + x;
                    float w = 0.0f, ds = 0.0f;
                    if (relative_seen(s, p, i0 + i, j0 + y)) {
                        w = expf((scores[r][x] + content[y] + *relative_at(high, low, i, y)) *
                                     s.scale -
                                 c.lse[row0 + i]);
                        ds = w * (dp[r][x] - c.delta[row0 + i]) * s.scale;
                    }
                    scores[r][x] = w;
                    dp[r][x] = ds;
                }
            }
            tile_keep(left, scores);
            load_tile<T>(right, gradient, TILE, e0, d, s.wide, tile_same());
            __syncthreads();
            tile_product<TILE>(dv, left, right);
            __syncthreads();
            tile_keep(left, dp);
            load_tile<T>(
                right,
                [&](int i) { return i0 + i < p.own ? c.in.q.at(p.begin + i0 + i, h) : NULL; }, TILE,
                e0, d, s.wide, column);
            __syncthreads();
            tile_product<TILE>(dk, left, right);
            __syncthreads();
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int j = j0 + t / 16 * 4 + r, e = e0 + t % 16 * 4;
        T *k = j < p.past && !c.dpast_k.data ? NULL : relative_key(p, c.dk, c.dpast_k, j, kv_head);
        T *v = j < p.past && !c.dpast_v.data ? NULL : relative_key(p, c.dv, c.dpast_v, j, kv_head);
        if (k)
            store_four(k, dk[r], e, d, s.wide);
        if (v)
            store_four(v, dv[r], e, d, s.wide);
    }
}

template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 2)
    relative_distances_kernel(relative_backward_call<T> c) {
    CUDA_SHARED(float, slices);
    __shared__ float content[TILE], place[TILE];
    const relative_shape &s = c.in.shape;
    const int h = blockIdx.y, kv_head = h / (s.heads / s.kv_heads), e0 = blockIdx.z * TILE;
    const int t = threadIdx.x, d = s.d, t0 = (int)blockIdx.x * TILE;
    float *high = slices + 2 * TILE_FLOATS, *low = high + TILE_FLOATS;
    float *left = slices, *right = slices + TILE_FLOATS;
    (void)place;
    float dr[4][4], scores[4][4], part[4][4];
    tile_clear(dr);
    for (int sequence = 0; sequence < s.sequences; sequence++) {
        const relative_place p = relative_place_of(s, sequence);
        for (int i0 = 0; i0 < p.own; i0 += TILE) {
            const int most = p.past + min(i0 + TILE, p.own) - 1; /* the tile's last position */
            if (t0 > most || (s.segment && t0 >= s.segment + s.memory))
                continue;
            const int64_t row0 = (int64_t)h * s.rows + p.begin + i0;
            const int from = p.past + i0 - t0; /* key of row i0 at distance t0 */
            auto query = [&](int i) {
                return i0 + i < p.own ? c.in.q.at(p.begin + i0 + i, h) : NULL;
            };
            auto gradient = [&](int i) {
                return i0 + i < p.own ? c.dout.at(p.begin + i0 + i, h) : NULL;
            };
            /* q.k + u.k of keys from + 0..63 and those before, read along the diagonals. */
#pragma unroll 1
            for (int block = 0; block < 2; block++) {
                const int j = from - block * TILE;
                rows_product<T>(
                    part, slices, slices + SLICE_FLOATS, query,
                    [&](int i) { return relative_key(p, c.in.k, c.in.past_k, j + i, kv_head); }, d,
                    s.wide);
                if (t < TILE) {
                    const T *k = relative_key(p, c.in.k, c.in.past_k, j + t, kv_head);
                    float sum = 0.0f;
                    for (int e = 0; e < d && k; e++)
                        sum += s.u[(int64_t)h * d + e] * to_float(k[e]);
                    content[t] = sum;
                }
                __syncthreads();
#pragma unroll
                for (int r = 0; r < 4; r++)
#pragma unroll
                    for (int x = 0; x < 4; x++)
                        part[r][x] += content[t % 16 * 4 + x];
                tile_keep_transposed(block ? low : high, part);
                __syncthreads();
            }
            rows_product<T>(
                scores, slices, slices + SLICE_FLOATS, query,
                [&](int i) { return t0 + i < s.distances ? c.in.r.at(t0 + i, h) : NULL; }, d,
                s.wide);
            if (t < TILE) {
                float sum = 0.0f;
                for (int e = 0; e < d && t0 + t < s.distances; e++)
                    sum += s.w[(int64_t)h * d + e] * to_float(c.in.r.at(t0 + t, h)[e]);
                place[t] = sum;
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int i = t / 16 * 4 + r;
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    const int y = t % 16 * 4 + x;
                    scores[r][x] =
                        relative_seen(s, p, i0 + i, from + i - y)
                            ? expf((scores[r][x] + place[y] + *relative_at(high, low, i, y)) *
                                       s.scale -
                                   c.lse[row0 + i]) *
                                  s.scale
                            : 0.0f;
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int block = 0; block < 2; block++) { /* do.v of the same keys */
                const int j = from - block * TILE;
                rows_product<T>(
                    part, slices, slices + SLICE_FLOATS, gradient,
                    [&](int i) { return relative_key(p, c.in.v, c.in.past_v, j + i, kv_head); }, d,
                    s.wide);
                tile_keep_transposed(block ? low : high, part);
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int i = t / 16 * 4 + r;
#pragma unroll
                for (int x = 0; x < 4; x++)
                    if (i0 + i < p.own)
                        scores[r][x] *=
                            *relative_at(high, low, i, t % 16 * 4 + x) - c.delta[row0 + i];
            }
            tile_keep(left, scores);
            load_tile<T>(right, query, TILE, e0, d, s.wide,
                         [&](float x, int, int e) { return x + s.w[(int64_t)h * d + e]; });
            __syncthreads();
            tile_product<TILE>(dr, left, right);
            __syncthreads();
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = t0 + t / 16 * 4 + r;
        if (i < s.distances)
            store_four(c.dr.at(i, h), dr[r], e0 + t % 16 * 4, d, s.wide);
    }
}

/* Rows of a past that belong to no sequence: a warp for a row and key/value head. */
template <typename T>
__global__ void __launch_bounds__(TILE_THREADS)
    relative_clear_kernel(relative_shape s, heads3<T> x) {
    const int64_t row = (int64_t)blockIdx.x * (TILE_THREADS / 32) + threadIdx.x / 32;
    if (row >= (int64_t)s.past_rows * s.kv_heads)
        return;
    const int n = (int)(row / s.kv_heads), lane = threadIdx.x % 32;
    for (int i = 0; i < s.sequences; i++)
        if (n >= s.past_start[i] && n < s.past_start[i] + s.past_length[i])
            return;
    for (int e = lane; e < s.d; e += 32)
        x.at(n, (int)(row % s.kv_heads))[e] = from_float<T>(0.0f);
}

template <typename T>
static tril_status relative_backward(struct op_context *ctx, const relative_backward_call<T> &c,
                                     float *du, float *dw, struct tril_error *err) {
    static const char name[] = "relative_attention_backward";
    const relative_shape &s = c.in.shape;
    const unsigned blocks = cuda_blocks(s.d, TILE), heads = (unsigned)s.heads;
    const dim3 threads(TILE_THREADS);
    const int key_tiles = (s.rows + s.past_rows) / TILE + (s.sequences > 1 ? s.sequences : 1);
    const unsigned clears = cuda_blocks((int64_t)s.past_rows * s.kv_heads, TILE_THREADS / 32);
    CUDA_TRY(cuda_launch(ctx, name, err, relative_delta_kernel<T>,
                         dim3(cuda_blocks((int64_t)s.rows * s.heads, TILE_THREADS / 32)), threads,
                         0, c));
    CUDA_TRY(cuda_launch(ctx, name, err, relative_queries_kernel<T>,
                         dim3((unsigned)c.tiles, heads, blocks), threads, SHARED, c));
    CUDA_TRY(cuda_launch(ctx, name, err, relative_biases_kernel,
                         dim3(cuda_blocks((int64_t)2 * s.heads * s.d, TILE_THREADS)), threads, 0,
                         (const float *)c.sums, c.tiles, s.heads * s.d, du, dw));
    CUDA_TRY(cuda_launch(ctx, name, err, relative_keys_kernel<T>,
                         dim3((unsigned)key_tiles, (unsigned)s.kv_heads, blocks), threads, SHARED,
                         c));
    if (c.dpast_k.data)
        CUDA_TRY(cuda_launch(ctx, name, err, relative_clear_kernel<T>, dim3(clears), threads, 0, s,
                             c.dpast_k));
    if (c.dpast_v.data)
        CUDA_TRY(cuda_launch(ctx, name, err, relative_clear_kernel<T>, dim3(clears), threads, 0, s,
                             c.dpast_v));
    return cuda_launch(ctx, name, err, relative_distances_kernel<T>,
                       dim3(cuda_blocks(s.distances, TILE), heads, blocks), threads, SHARED, c);
}

OP_FN(relative_attention_backward) {
    relative_shape s = relative_shape_of(args, params);
    for (int i = RELATIVE_Q; i <= RELATIVE_DR; i++)
        if (args[i].rank == 3 && args[i].data)
            s.wide = s.wide && rows_packable(args[i], 4);
    const int tiles = s.rows / TILE + (s.sequences > 1 ? s.sequences : 1);
    const int64_t each = (int64_t)s.heads * s.rows;
    float *memory;
    CUDA_TRY(cuda_scratch(ctx, "relative_attention_backward",
                          (each + (int64_t)tiles * 2 * s.heads * s.d) * 4, &memory, err));
    FOR_DTYPE(args[RELATIVE_Q].dtype, T, {
        relative_backward_call<T> c = {relative_inputs_of<T>(s, args),
                                       heads3_of<const T>(args[RELATIVE_O]),
                                       heads3_of<const T>(args[RELATIVE_DO]),
                                       (const float *)args[RELATIVE_LSE].data,
                                       heads3_of<T>(args[RELATIVE_DQ]),
                                       heads3_of<T>(args[RELATIVE_DK]),
                                       heads3_of<T>(args[RELATIVE_DV]),
                                       heads3_of<T>(args[RELATIVE_DPAST_K]),
                                       heads3_of<T>(args[RELATIVE_DPAST_V]),
                                       heads3_of<T>(args[RELATIVE_DR]),
                                       memory,
                                       memory + each,
                                       tiles};
        return relative_backward<T>(ctx, c, (float *)args[RELATIVE_DU].data,
                                    (float *)args[RELATIVE_DW].data, err);
    });
}
