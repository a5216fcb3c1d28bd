/* Attention with the relative positions of Transformer-XL, forward (contract: ops.h).
 *
 * A block takes 64 rows of a sequence, a head and 64 columns of the output, and goes through the
 * keys that its rows see, 64 at a time, with an online softmax in fp32. Shared memory: three slices
 * and two blocks of distances, 61 KB; the weights lie in the block that is done with, the values in
 * the slices. 6 d FLOPs for a pair of a row and a key at d = 64 (recomputing scores for every 64
 * columns beyond); memory: q, o once, k, v, r once for every tile of rows, from L2. */
#include "cuda/relative_attention.cuh"

template <typename T>
struct relative_forward_call {
    relative_inputs<T> in;
    heads3<T> o;
    float *lse;
};

template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 1)
    relative_forward_kernel(relative_forward_call<T> c) {
    CUDA_SHARED(float, slices);
    __shared__ float content[TILE], place[TILE];
    const relative_shape &s = c.in.shape;
    const int h = blockIdx.y, kv_head = h / (s.heads / s.kv_heads), e0 = blockIdx.z * TILE;
    const int t = threadIdx.x, d = s.d;
    float *high = slices + 3 * SLICE_FLOATS, *low = high + TILE_FLOATS;
    const relative_space space = {slices, slices + SLICE_FLOATS, slices + 2 * SLICE_FLOATS, content,
                                  place};
    int sequence, i0;
    if (blockIdx.x == 0 && e0 == 0) {
        clear_outside(c.o, s.q_offsets, s.sequences, s.rows, h, d);
        for (int n = t; n < s.rows && c.lse; n += TILE_THREADS)
            if (n < s.q_offsets[0] || n >= s.q_offsets[s.sequences])
                c.lse[(int64_t)h * s.rows + n] = -INFINITY;
    }
    auto length = [&](int x) { return s.q_offsets[x + 1] - s.q_offsets[x]; };
    if (!tile_find(s.sequences, TILE, blockIdx.x, length, &sequence, &i0))
        return;
    const relative_place p = relative_place_of(s, sequence);
    const int p0 = p.past + i0, last = min(p0 + TILE, p.past + p.own);
    float scores[4][4], o[4][4], most[4], sum[4];
    tile_clear(o);
#pragma unroll
    for (int r = 0; r < 4; r++) {
        most[r] = -INFINITY;
        sum[r] = 0.0f;
    }
    int j0 = relative_first(s, p0) / TILE * TILE;
    relative_products(c.in, p, space, h, i0, false, 0, p0 - j0, scores, high);
    for (; j0 < last; j0 += TILE) {
        relative_products(c.in, p, space, h, i0, true, j0, p0 - j0 - TILE, scores, low);
        load_tile<T>(
            slices, [&](int x) { return relative_key(p, c.in.v, c.in.past_v, j0 + x, kv_head); },
            TILE, e0, d, s.wide, tile_same());
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int i = t / 16 * 4 + r;
            float row = -INFINITY, part = 0.0f;
#pragma unroll
            for (int x = 0; x < 4; x++) {
                const int y = t % 16 * 4 + x;
                scores[r][x] =
                    relative_seen(s, p, i0 + i, j0 + y)
                        ? (scores[r][x] + content[y] + *relative_at(high, low, i, y)) * s.scale
                        : -INFINITY;
                row = fmaxf(row, scores[r][x]);
            }
            row = fmaxf(tile_row_max(row), most[r]);
            const float by = row == most[r] ? 1.0f : expf(most[r] - row);
#pragma unroll
            for (int x = 0; x < 4; x++) {
                scores[r][x] = row == -INFINITY ? 0.0f : expf(scores[r][x] - row);
                part += scores[r][x];
                o[r][x] *= by;
            }
            sum[r] = sum[r] * by + tile_row_sum(part);
            most[r] = row;
        }
        __syncthreads(); /* everybody has read `high` */
        tile_keep_transposed(high, scores);
        __syncthreads();
        tile_product<TILE>(o, high, slices);
        __syncthreads();
        float *done = high;
        high = low;
        low = done;
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const int i = i0 + t / 16 * 4 + r;
        if (i >= p.own)
            continue;
        float v[4] = {o[r][0] / sum[r], o[r][1] / sum[r], o[r][2] / sum[r], o[r][3] / sum[r]};
        store_four(c.o.at(p.begin + i, h), v, e0 + t % 16 * 4, d, s.wide);
        if (c.lse && e0 == 0 && t % 16 == 0)
            c.lse[(int64_t)h * s.rows + p.begin + i] = most[r] + logf(sum[r]);
    }
}

OP_FN(relative_attention_forward) {
    relative_shape s = relative_shape_of(args, params);
    for (int i = RELATIVE_Q; i <= RELATIVE_O; i++)
        if (args[i].rank == 3 && args[i].data)
            s.wide = s.wide && rows_packable(args[i], 4);
    void *nothing;
    CUDA_TRY(cuda_scratch(ctx, "relative_attention_forward", 0, &nothing, err));
    const int tiles = s.rows / TILE + (s.sequences > 1 ? s.sequences : 1);
    FOR_DTYPE(args[RELATIVE_Q].dtype, T, {
        relative_forward_call<T> c = {relative_inputs_of<T>(s, args),
                                      heads3_of<T>(args[RELATIVE_O]),
                                      (float *)args[RELATIVE_LSE].data};
        return cuda_launch(ctx, "relative_attention_forward", err, relative_forward_kernel<T>,
                           dim3((unsigned)tiles, (unsigned)s.heads, cuda_blocks(s.d, TILE)),
                           dim3(TILE_THREADS),
                           (size_t)(3 * SLICE_FLOATS + 2 * TILE_FLOATS) * sizeof(float), c);
    });
}
