/* Linear attention, forward (contract: ops.h; formulas: src/ops/linear_attention.c).
 *
 * Many rows: sums of chunks, a scan over them, outputs (linear_attention.cuh). A block of the
 * outputs takes a chunk, a query head and 64 columns: slices of 32 channels of phi(q) and phi(k)
 * give the chunk's weights, the same slice of phi(q) with the state before the chunk gives what
 * precedes; then the weights, masked, multiply v. Work: 2 d (2 * 64 + 2 d) FLOPs a row and head,
 * in fp32; bytes: q, k, v, o once and d^2 / 4 bytes of states a row.
 *
 * Few rows (up to FEW_ROWS in a sequence: decoding): the recurrence, a block for a sequence, a
 * key/value head and 64 columns, its state in shared memory: read once, written once.
 * Which way a sequence goes depends on its own length only, so its bits do not depend on others. */
#include "cuda/linear_attention.cuh"

/* ------------------------------------------------------------------ the scan */

static const int SCAN_THREADS = 256;

__global__ void __launch_bounds__(SCAN_THREADS)
    linear_scan_kernel(linear_shape s, float *states, const float *initial, float *whole,
                       bool backwards, int blocks) {
    const int sequence = (int)(blockIdx.x / blocks / s.kv_heads);
    const int kv_head = (int)(blockIdx.x / blocks % s.kv_heads);
    const int length = linear_length(s, sequence), chunks = (length + TILE - 1) / TILE;
    const int before = tile_before(sequence, TILE, [&](int x) { return linear_length(s, x); });
    const int e = (int)(blockIdx.x % blocks) * SCAN_THREADS + threadIdx.x, width = s.d + 1;
    /* Of no rows: the recurrence leaves the state, where there is one. */
    if (e >= s.d * width || (length == 0 && s.few > 0))
        return;
    const int64_t size = (int64_t)width * s.d4;
    const int64_t kept = ((int64_t)sequence * s.kv_heads + kv_head) * s.d * width + e;
    const int i = e / width, column = e % width;
    float *at = states + ((int64_t)before * s.kv_heads + kv_head) * size +
                (column < s.d ? (int64_t)i * s.d4 + column : (int64_t)s.d * s.d4 + i);
    const int64_t step = (backwards ? -1 : 1) * size * s.kv_heads;
    float sum = initial ? initial[kept] : 0.0f;
    float *p = backwards && chunks ? at + (int64_t)(chunks - 1) * size * s.kv_heads : at;
    for (int done = 0; done < chunks; done += 8) {
        float v[8]; /* eight loads under way */
#pragma unroll
        for (int x = 0; x < 8; x++)
            v[x] = done + x < chunks ? p[x * step] : 0.0f;
#pragma unroll
        for (int x = 0; x < 8; x++)
            if (done + x < chunks) {
                if (s.causal)
                    p[x * step] = sum;
                sum += v[x];
            }
        p += 8 * step;
    }
    if (!s.causal && chunks)
        *at = sum;
    if (whole)
        whole[kept] = sum;
}

tril_status linear_scan(struct op_context *ctx, const char *name, const struct linear_shape &shape,
                        float *states, const float *initial, float *whole, bool backwards,
                        struct tril_error *err) {
    unsigned blocks = cuda_blocks((int64_t)shape.d * (shape.d + 1), SCAN_THREADS);
    return cuda_launch(ctx, name, err, linear_scan_kernel,
                       dim3(blocks * (unsigned)shape.kv_heads * (unsigned)shape.sequences),
                       dim3(SCAN_THREADS), 0, shape, states, initial, whole, backwards,
                       (int)blocks);
}

/* ------------------------------------------------------------------ outputs of chunks */

template <typename T>
struct linear_forward_call {
    linear_shape shape;
    heads3<const T> q, k, v;
    heads3<T> o;
    const float *states;
};

template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 2) linear_outputs_kernel(linear_forward_call<T> c) {
    __shared__ __align__(16) float slices[3 * SLICE_FLOATS], weights[TILE_FLOATS], den[TILE];
    float *a = slices, *b = a + SLICE_FLOATS, *m = b + SLICE_FLOATS;
    const linear_shape &s = c.shape;
    linear_chunk chunk;
    if (!linear_chunk_find(s, blockIdx.x, &chunk))
        return;
    const int h = blockIdx.y, kv_head = h / (s.heads / s.kv_heads), e0 = blockIdx.z * TILE;
    const int t = threadIdx.x, d = s.d;
    const float *state = c.states + ((int64_t)chunk.state * s.kv_heads + kv_head) * (d + 1) * s.d4;
    const float *z = state + (int64_t)d * s.d4;
    auto key = [&](int i) { return i < chunk.rows ? c.k.at(chunk.begin + i, kv_head) : NULL; };
    float p[4][4], o[4][4], sum = 0.0f;
    tile_clear(p);
    tile_clear(o);
    for (int first = 0; first < d; first += SLICE) {
        load_slice<T>(
            a, [&](int i) { return i < chunk.rows ? c.q.at(chunk.begin + i, h) : NULL; }, first, d,
            s.wide, map_feature());
        if (s.causal)
            load_slice<T>(b, key, first, d, s.wide, map_feature());
        load_tile<float>(
            m, [&](int i) { return first + i < d ? state + (int64_t)(first + i) * s.d4 : NULL; },
            SLICE, e0, d, true, tile_same());
        __syncthreads();
        if (s.causal)
            tile_product<SLICE>(p, a, b);
        tile_product<SLICE>(o, a, m);
        for (int x = t % 4 * 8; x < t % 4 * 8 + 8 && first + x < d; x++)
            sum += a[x * TILE_LD + t / 4] * z[first + x];
        __syncthreads();
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (t % 4 == 0)
        den[t / 4] = sum;
    __syncthreads();
    if (s.causal) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float row = 0.0f;
#pragma unroll
            for (int x = 0; x < 4; x++) {
                p[r][x] = t % 16 * 4 + x <= t / 16 * 4 + r ? p[r][x] : 0.0f;
                row += p[r][x];
            }
            row = tile_row_sum(row);
            if (t % 16 == 0)
                den[t / 16 * 4 + r] += row;
        }
        tile_keep_transposed(weights, p);
        load_tile<T>(
            slices, [&](int i) { return i < chunk.rows ? c.v.at(chunk.begin + i, kv_head) : NULL; },
            TILE, e0, d, s.wide, tile_same());
        __syncthreads();
        tile_product<TILE>(o, weights, slices);
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int i = t / 16 * 4 + r;
        float by = den[i] == 0.0f ? 0.0f : 1.0f / den[i];
        float v[4] = {o[r][0] * by, o[r][1] * by, o[r][2] * by, o[r][3] * by};
        if (i < chunk.rows)
            store_four(c.o.at(chunk.begin + i, h), v, e0 + t % 16 * 4, d, s.wide);
    }
}

/* ------------------------------------------------------------------ the recurrence */

/* `state`, `next` may be one; z of the state: `kept` [S, K, d] takes its next value where blocks of
 * other columns may still read it. */
template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 4)
    linear_recurrence_kernel(linear_forward_call<T> c, const float *before, float *next,
                             float *kept) {
    const int LD = TILE + 1; /* column TILE: z */
    CUDA_SHARED(float, state);
    const linear_shape &s = c.shape;
    const int d = s.d, t = threadIdx.x, lane = t % 32, warp = t / 32, e0 = blockIdx.y * TILE;
    float *f = state + d * LD, *v = f + d, *part = v + LD; /* part [8][LD] */
    const int sequence = (int)blockIdx.x / s.kv_heads, kv_head = (int)blockIdx.x % s.kv_heads;
    const int group = s.heads / s.kv_heads;
    for (int h = kv_head * group; h < (kv_head + 1) * group && e0 == 0; h++)
        if (sequence == 0)
            clear_outside(c.o, s.q_offsets, s.sequences, s.rows, h, d);
    if (sequence >= s.sequences || s.q_offsets[sequence + 1] - s.q_offsets[sequence] > s.few)
        return;
    const int begin = s.q_offsets[sequence], end = s.q_offsets[sequence + 1];
    const int64_t at = ((int64_t)sequence * s.kv_heads + kv_head) * d * (d + 1);
    for (int x = t; x < d * LD; x += TILE_THREADS) {
        int i = x / LD, e = x % LD, column = e == TILE ? d : e0 + e;
        state[x] = before && (e == TILE || column < d) ? before[at + i * (d + 1) + column] : 0.0f;
    }
    for (int pass = s.causal; pass < 2; pass++) /* not causal: all keys, then the outputs */
        for (int n = begin; n < end; n++) {
            if (pass == 0 || s.causal) {
                __syncthreads();
                for (int i = t; i < d; i += TILE_THREADS)
                    f[i] = feature(to_float(c.k.at(n, kv_head)[i]));
                for (int e = t; e < LD; e += TILE_THREADS)
                    v[e] = e == TILE    ? 1.0f
                           : e0 + e < d ? to_float(c.v.at(n, kv_head)[e0 + e])
                                        : 0.0f;
                __syncthreads();
                for (int x = t; x < d * LD; x += TILE_THREADS)
                    state[x] += f[x / LD] * v[x % LD];
            }
            for (int h = kv_head * group; h < (kv_head + 1) * group && pass == 1; h++) {
                __syncthreads();
                for (int i = t; i < d; i += TILE_THREADS)
                    f[i] = feature(to_float(c.q.at(n, h)[i]));
                __syncthreads();
                for (int e = lane; e < LD; e += 32) {
                    float sum = 0.0f;
                    for (int i = warp; i < d; i += 8)
                        sum += f[i] * state[i * LD + e];
                    part[warp * LD + e] = sum;
                }
                __syncthreads();
                for (int e = t; e < LD; e += TILE_THREADS) {
                    float sum = 0.0f;
                    for (int w = 0; w < 8; w++)
                        sum += part[w * LD + e];
                    v[e] = sum;
                }
                __syncthreads();
                if (t < TILE && e0 + t < d)
                    c.o.at(n, h)[e0 + t] = from_float<T>(v[TILE] == 0.0f ? 0.0f : v[t] / v[TILE]);
            }
        }
    __syncthreads();
    for (int x = t; x < d * LD && next; x += TILE_THREADS) {
        int i = x / LD, e = x % LD;
        if (e < TILE && e0 + e < d)
            next[at + i * (d + 1) + e0 + e] = state[x];
        else if (e == TILE && e0 == 0 && !kept)
            next[at + i * (d + 1) + d] = state[x];
        else if (e == TILE && e0 == 0)
            kept[((int64_t)sequence * s.kv_heads + kv_head) * d + i] = state[x];
    }
}

__global__ void linear_normaliser_kernel(linear_shape s, const float *kept, float *next) {
    int64_t x = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (x >= (int64_t)s.sequences * s.kv_heads * s.d)
        return;
    int sequence = (int)(x / s.d / s.kv_heads);
    if (s.q_offsets[sequence + 1] - s.q_offsets[sequence] <= s.few)
        next[x * (s.d + 1) + s.d] = kept[x];
}

/* ------------------------------------------------------------------ the call */

template <typename T>
static tril_status linear_forward(struct op_context *ctx, const linear_forward_call<T> &c,
                                  float *states, const float *state, float *next, float *kept,
                                  struct tril_error *err) {
    static const char name[] = "linear_attention_forward";
    const linear_shape &s = c.shape;
    const unsigned blocks = cuda_blocks(s.d, TILE), chunks = (unsigned)linear_chunks(s);
    if (chunks > 0) {
        linear_sums_call<T> sums = {s, c.k, c.v, NULL, NULL, states};
        CUDA_TRY(cuda_launch(ctx, name, err, linear_sums_kernel<T>,
                             dim3(chunks, (unsigned)s.kv_heads, blocks * blocks),
                             dim3(TILE_THREADS), 0, sums));
        CUDA_TRY(linear_scan(ctx, name, s, states, state, next, false, err));
        CUDA_TRY(cuda_launch(ctx, name, err, linear_outputs_kernel<T>,
                             dim3(chunks, (unsigned)s.heads, blocks), dim3(TILE_THREADS), 0, c));
    }
    /* A sequence's state is read by the scan or by the recurrence, never by both. */
    size_t shared = (size_t)(s.d * (TILE + 1) + s.d + 9 * (TILE + 1)) * 4;
    unsigned sequences = s.sequences > 0 ? (unsigned)s.sequences : 1;
    CUDA_TRY(cuda_launch(ctx, name, err, linear_recurrence_kernel<T>,
                         dim3(sequences * (unsigned)s.kv_heads, blocks), dim3(TILE_THREADS), shared,
                         c, state, next, kept));
    if (kept)
        return cuda_launch(ctx, name, err, linear_normaliser_kernel,
                           dim3(cuda_blocks((int64_t)s.sequences * s.kv_heads * s.d, TILE_THREADS)),
                           dim3(TILE_THREADS), 0, s, kept, next);
    return TRIL_OK;
}

OP_FN(linear_attention_forward) {
    enum { Q, K, V, OFFSETS, STATE, O, NEXT };
    linear_shape s = linear_shape_of(args[Q], args[K], args[OFFSETS], FEW_ROWS, params);
    s.wide = rows_packable(args[Q], 4) && rows_packable(args[K], 4) && rows_packable(args[V], 4) &&
             rows_packable(args[O], 4);
    float *states, *next = (float *)args[NEXT].data, *kept = NULL;
    int64_t floats = linear_chunks(s) * s.kv_heads * linear_state_floats(s);
    bool apart = s.d > TILE && next; /* several blocks read the normaliser */
    int64_t more = apart ? (int64_t)s.sequences * s.kv_heads * s.d : 0;
    CUDA_TRY(cuda_scratch(ctx, "linear_attention_forward", (floats + more) * 4, &states, err));
    if (apart)
        kept = states + floats;
    FOR_DTYPE(args[Q].dtype, T, {
        linear_forward_call<T> c = {s,
                                    heads3_of<const T>(args[Q]),
                                    heads3_of<const T>(args[K]),
                                    heads3_of<const T>(args[V]),
                                    heads3_of<T>(args[O]),
                                    states};
        return linear_forward<T>(ctx, c, states, (const float *)args[STATE].data, next, kept, err);
    });
}
