/* Linear attention, backward (contract: ops.h; formulas: src/ops/linear_attention.c).
 *
 * Two scans over chunks (linear_attention.cuh): S, of phi(k) (v, 1)^T, forward in time, from which
 * a first kernel gets denominators and dq; and R, of phi(q) (do / den, gd)^T with gd = -do.o / den,
 * backward in time, from which another gets dk and dv. Within a chunk both recompute its products
 * of 64 x 64: weights phi(q).phi(k) and gradients do.v. Blocks take 64 columns of the result and
 * go through all channels in slices of 32. Everything is summed in a fixed order. Work: 2 d (7 * 64
 * + 5 d) FLOPs a row and head at d = 64, fp32. */
#include "cuda/linear_attention.cuh"

template <typename T>
struct linear_backward_call {
    linear_shape shape;
    heads3<const T> q, k, v, o, dout;
    heads3<T> dq, dk, dv;
    float *before, *after;  /* states S and R */
    float *inverse, *extra; /* [H, N]: 1 / den, -do.o / den */
};

/* dq = slope (tril(do v^T - do.o) phi(k) + do S^T - do.o z) / den */
template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 2)
    linear_queries_kernel(linear_backward_call<T> c) {
    __shared__ __align__(16) float slices[5 * SLICE_FLOATS], den[TILE], delta[TILE];
    float *a = slices, *b = a + SLICE_FLOATS, *a2 = b + SLICE_FLOATS, *b2 = a2 + SLICE_FLOATS;
    float *m = b2 + SLICE_FLOATS;
    const linear_shape &s = c.shape;
    linear_chunk chunk;
    const int h = blockIdx.y, kv_head = h / (s.heads / s.kv_heads), e0 = blockIdx.z * TILE;
    const int t = threadIdx.x, d = s.d;
    if (blockIdx.x == 0 && e0 == 0)
        clear_outside(c.dq, s.q_offsets, s.sequences, s.rows, h, d);
    if (!linear_chunk_find(s, blockIdx.x, &chunk))
        return;
    const float *state = c.before + ((int64_t)chunk.state * s.kv_heads + kv_head) * (d + 1) * s.d4;
    const float *z = state + (int64_t)d * s.d4;
    auto key = [&](int i) { return i < chunk.rows ? c.k.at(chunk.begin + i, kv_head) : NULL; };
    auto value = [&](int i) { return i < chunk.rows ? c.v.at(chunk.begin + i, kv_head) : NULL; };
    auto query = [&](int i) { return i < chunk.rows ? c.q.at(chunk.begin + i, h) : NULL; };
    auto gradient = [&](int i) { return i < chunk.rows ? c.dout.at(chunk.begin + i, h) : NULL; };
    auto column = [&](int i) { return e0 + i < d ? state + (int64_t)(e0 + i) * s.d4 : NULL; };
    float p[4][4], g[4][4], dq[4][4], sum = 0.0f, dot = 0.0f;
    tile_clear(p);
    tile_clear(g);
    tile_clear(dq);
    for (int first = 0; first < d; first += SLICE) {
        load_slice<T>(a, query, first, d, s.wide, map_feature());
        load_slice<T>(a2, gradient, first, d, s.wide, tile_same());
        load_slice<float>(m, column, first, d, true, tile_same());
        if (s.causal) {
            load_slice<T>(b, key, first, d, s.wide, map_feature());
            load_slice<T>(b2, value, first, d, s.wide, tile_same());
        }
        __syncthreads();
        if (s.causal) {
            tile_product<SLICE>(p, a, b);
            tile_product<SLICE>(g, a2, b2);
        }
        tile_product<SLICE>(dq, a2, m);
        const int row = t / 4;
        for (int x = t % 4 * 8; x < t % 4 * 8 + 8 && first + x < d && row < chunk.rows; x++) {
            sum += a[x * TILE_LD + row] * z[first + x];
            dot += a2[x * TILE_LD + row] * to_float(c.o.at(chunk.begin + row, h)[first + x]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int x = 1; x < 4; x *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, x);
        dot += __shfl_xor_sync(0xffffffffu, dot, x);
    }
    if (t % 4 == 0) {
        den[t / 4] = sum;
        delta[t / 4] = dot;
    }
    __syncthreads();
    if (s.causal) {
        float *weights = slices, *keys = slices + TILE_FLOATS;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float row = 0.0f;
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const bool seen = t % 16 * 4 + x <= t / 16 * 4 + r;
                row += seen ? p[r][x] : 0.0f;
                g[r][x] = seen ? g[r][x] - delta[t / 16 * 4 + r] : 0.0f;
            }
            row = tile_row_sum(row);
            if (t % 16 == 0)
                den[t / 16 * 4 + r] += row;
        }
        tile_keep_transposed(weights, g);
        load_tile<T>(keys, key, TILE, e0, d, s.wide, map_feature());
        __syncthreads();
        tile_product<TILE>(dq, weights, keys);
    }
    if (e0 == 0 && t < chunk.rows) {
        float by = den[t] == 0.0f ? 0.0f : 1.0f / den[t];
        c.inverse[(int64_t)h * s.rows + chunk.begin + t] = by;
        c.extra[(int64_t)h * s.rows + chunk.begin + t] = -delta[t] * by;
    }
    const int e = e0 + t % 16 * 4;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = t / 16 * 4 + r;
        if (i >= chunk.rows)
            continue;
        float by = den[i] == 0.0f ? 0.0f : 1.0f / den[i], q[4];
        load_four(q, query(i), e, d, s.wide);
#pragma unroll
        for (int x = 0; x < 4; x++)
            dq[r][x] =
                (dq[r][x] - delta[i] * (e + x < d ? z[e + x] : 0.0f)) * by * feature_slope(q[x]);
        store_four(c.dq.at(chunk.begin + i, h), dq[r], e, d, s.wide);
    }
}

/* Keys: dk = slope (tril^T phi(q) + (v, 1) R^T), or, as another block, dv = weights^T do / den +
 * phi(k) R. They share no product. */
template <typename T, bool keys>
__device__ __forceinline__ void linear_keys(const linear_backward_call<T> &c, float *memory,
                                            int e0) {
    float *a = memory, *b = a + SLICE_FLOATS, *left = memory, *right = memory + TILE_FLOATS;
    const linear_shape &s = c.shape;
    linear_chunk chunk;
    const int kv_head = blockIdx.y, group = s.heads / s.kv_heads, t = threadIdx.x, d = s.d;
    const heads3<T> &out = keys ? c.dk : c.dv;
    if (blockIdx.x == 0 && e0 == 0)
        clear_outside(out, s.q_offsets, s.sequences, s.rows, kv_head, d);
    if (!linear_chunk_find(s, blockIdx.x, &chunk))
        return;
    const float *state = c.after + ((int64_t)chunk.state * s.kv_heads + kv_head) * (d + 1) * s.d4;
    auto key = [&](int i) { return i < chunk.rows ? c.k.at(chunk.begin + i, kv_head) : NULL; };
    auto value = [&](int i) { return i < chunk.rows ? c.v.at(chunk.begin + i, kv_head) : NULL; };
    auto column = [&](int i) { return e0 + i < d ? state + (int64_t)(e0 + i) * s.d4 : NULL; };
    float sum[4][4];
    tile_clear(sum);
    for (int h = kv_head * group; h < (kv_head + 1) * group && s.causal; h++) {
        const float *inverse = c.inverse + (int64_t)h * s.rows + chunk.begin;
        const float *extra = c.extra + (int64_t)h * s.rows + chunk.begin;
        auto query = [&](int i) { return i < chunk.rows ? c.q.at(chunk.begin + i, h) : NULL; };
        auto gradient = [&](int i) {
            return i < chunk.rows ? c.dout.at(chunk.begin + i, h) : NULL;
        };
        auto scaled = [&](float x, int i, int) { return x * inverse[i]; };
        float p[4][4];
        tile_clear(p);
        for (int first = 0; first < d; first += SLICE) {
            if (keys) {
                load_slice<T>(a, gradient, first, d, s.wide, scaled);
                load_slice<T>(b, value, first, d, s.wide, tile_same());
            } else {
                load_slice<T>(a, query, first, d, s.wide, map_feature());
                load_slice<T>(b, key, first, d, s.wide, map_feature());
            }
            __syncthreads();
            tile_product<SLICE>(p, a, b);
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int i = t / 16 * 4 + r;
            const float more = keys && i < chunk.rows ? extra[i] : 0.0f;
#pragma unroll
            for (int x = 0; x < 4; x++)
                p[r][x] = t % 16 * 4 + x <= i ? p[r][x] + more : 0.0f;
        }
        tile_keep(left, p);
        if (keys)
            load_tile<T>(right, query, TILE, e0, d, s.wide, map_feature());
        else
            load_tile<T>(right, gradient, TILE, e0, d, s.wide, scaled);
        __syncthreads();
        tile_product<TILE>(sum, left, right);
        __syncthreads();
    }
    for (int first = 0; first < d; first += SLICE) {
        if (keys) {
            load_slice<T>(a, value, first, d, s.wide, tile_same());
            load_slice<float>(b, column, first, d, true, tile_same());
        } else {
            load_slice<T>(a, key, first, d, s.wide, map_feature());
            load_tile<float>(
                b,
                [&](int i) { return first + i < d ? state + (int64_t)(first + i) * s.d4 : NULL; },
                SLICE, e0, d, true, tile_same());
        }
        __syncthreads();
        tile_product<SLICE>(sum, a, b);
        __syncthreads();
    }
    const int e = e0 + t % 16 * 4;
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = t / 16 * 4 + r;
        if (i >= chunk.rows)
            continue;
        float k[4];
        load_four(k, keys ? key(i) : NULL, e, d, s.wide);
#pragma unroll
        for (int x = 0; x < 4 && keys; x++)
            sum[r][x] = (sum[r][x] + (e + x < d ? state[(int64_t)d * s.d4 + e + x] : 0.0f)) *
                        feature_slope(k[x]);
        store_four(out.at(chunk.begin + i, kv_head), sum[r], e, d, s.wide);
    }
}
template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 2) linear_keys_kernel(linear_backward_call<T> c) {
    __shared__ __align__(16) float memory[2 * TILE_FLOATS];
    if (blockIdx.z % 2)
        linear_keys<T, true>(c, memory, (int)blockIdx.z / 2 * TILE);
    else
        linear_keys<T, false>(c, memory, (int)blockIdx.z / 2 * TILE);
}

template <typename T>
static tril_status linear_backward(struct op_context *ctx, const linear_backward_call<T> &c,
                                   const float *state, const float *dnext, float *dstate,
                                   struct tril_error *err) {
    static const char name[] = "linear_attention_backward";
    const linear_shape &s = c.shape;
    const unsigned blocks = cuda_blocks(s.d, TILE), chunks = (unsigned)linear_chunks(s);
    const dim3 threads(TILE_THREADS), all(chunks, (unsigned)s.kv_heads, blocks * blocks);
    const unsigned some = chunks > 0 ? chunks : 1; /* rows of no sequence are cleared */
    linear_sums_call<T> keys = {s, c.k, c.v, NULL, NULL, c.before};
    linear_sums_call<T> queries = {s, c.q, c.dout, c.inverse, c.extra, c.after};
    CUDA_TRY(cuda_launch(ctx, name, err, linear_sums_kernel<T>, all, threads, 0, keys));
    CUDA_TRY(linear_scan(ctx, name, s, c.before, state, NULL, false, err));
    CUDA_TRY(cuda_launch(ctx, name, err, linear_queries_kernel<T>,
                         dim3(some, (unsigned)s.heads, blocks), threads, 0, c));
    CUDA_TRY(cuda_launch(ctx, name, err, linear_sums_kernel<T>, all, threads, 0, queries));
    CUDA_TRY(linear_scan(ctx, name, s, c.after, dnext, dstate, true, err));
    return cuda_launch(ctx, name, err, linear_keys_kernel<T>,
                       dim3(some, (unsigned)s.kv_heads, 2 * blocks), threads, 0, c);
}

OP_FN(linear_attention_backward) {
    enum { Q, K, V, OFFSETS, STATE, O, DO, DNEXT, DQ, DK, DV, DSTATE, ALL };
    linear_shape s = linear_shape_of(args[Q], args[K], args[OFFSETS], 0, params);
    for (int i = 0; i < ALL; i++)
        if (i != OFFSETS && i != STATE && i != DNEXT && i != DSTATE)
            s.wide = s.wide && rows_packable(args[i], 4);
    const int64_t states = linear_chunks(s) * s.kv_heads * linear_state_floats(s);
    const int64_t each = (int64_t)s.heads * s.rows;
    float *memory;
    CUDA_TRY(
        cuda_scratch(ctx, "linear_attention_backward", (2 * states + 2 * each) * 4, &memory, err));
    FOR_DTYPE(args[Q].dtype, T, {
        linear_backward_call<T> c = {s,
                                     heads3_of<const T>(args[Q]),
                                     heads3_of<const T>(args[K]),
                                     heads3_of<const T>(args[V]),
                                     heads3_of<const T>(args[O]),
                                     heads3_of<const T>(args[DO]),
                                     heads3_of<T>(args[DQ]),
                                     heads3_of<T>(args[DK]),
                                     heads3_of<T>(args[DV]),
                                     memory,
                                     memory + states,
                                     memory + 2 * states,
                                     memory + 2 * states + each};
        return linear_backward<T>(ctx, c, (const float *)args[STATE].data,
                                  (const float *)args[DNEXT].data, (float *)args[DSTATE].data, err);
    });
}
