/* Attention over an external memory by exact search (contract: memory_attention in ops.h).
 *
 * Search: a block takes up to `tile` query rows (of one sequence and key/value head; the group's
 * heads are rows too) and a share of the memory's entries, oldest first, 64 at a time: a product
 * gives 64 x 64 scores in fp32, and every row appends those above its threshold to a list in shared
 * memory; a list that is full is cut to the best `top`, whose worst score is the new threshold. An
 * entry that only equals the threshold is younger than all that hold it and loses: the rule for
 * ties costs nothing, and lists stay in order of age. Few rows share the memory among several
 * blocks; their lists follow each other by age, so that a last cut finds the same keys as one block
 * would have: the second kernel, which also does the softmax and the output, a block for a row and
 * head. A score's bits depend on its row and key only.
 * Work: 2 d FLOPs for every row, head and entry; bytes: the entries once for every tile, from L2.
 */
#include "cuda/tile.cuh"

struct memory_shape {
    const int32_t *q_offsets, *start, *first, *length, *position;
    int sequences, rows, heads, kv_heads, d, top;
    int tile, room;      /* rows of a block; list entries of a row */
    int shares, entries; /* blocks that share a tile's memory; entries of each */
    struct memory_attention_params params;
    bool wide;
};
struct found_key {
    float score;
    int entry;
};
template <typename T>
struct memory_call {
    memory_shape shape;
    heads3<const T> q, k, v;
    heads3<T> o;
    int32_t *index;
    float *weight, *lse;
    found_key *found; /* [shares, N, H, top] */
    int *count;       /* [shares, N, H] */
};

/* Entries [*begin, *end) that row i of sequence s sees. */
__device__ __forceinline__ void memory_seen(const memory_shape &s, int sequence, int i, int *begin,
                                            int *end) {
    int length = s.length[sequence], own = s.q_offsets[sequence + 1] - s.q_offsets[sequence];
    int64_t last = length;
    if (s.params.segment) {
        int64_t p = (int64_t)length - own + i;
        last = p - (s.position[sequence] + p) % s.params.segment;
        last = last > 0 ? last : 0;
    }
    *end = (int)last;
    *begin = s.params.capacity && last > s.params.capacity ? (int)(last - s.params.capacity) : 0;
}

/* A warp cuts a list of n > top keys, in order of age, to the best `top`, of equal scores the
 * older, still by age. Returns the worst score kept. */
__device__ __forceinline__ float cut_list(found_key *list, int n, int top) {
    const int lane = threadIdx.x % 32;
    unsigned worst = 0; /* the largest number that at least `top` scores reach */
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned trial = worst | 1u << bit;
        int reach = 0;
        for (int x = 0; x < n; x += 32)
            reach += __popc(__ballot_sync(
                0xffffffffu, x + lane < n && float_order(list[x + lane].score) >= trial));
        if (reach >= top)
            worst = trial;
        if (reach == top)
            break;
    }
    int above = 0; /* scores that pass whatever their age */
    for (int x = 0; x < n; x += 32)
        above += __popc(
            __ballot_sync(0xffffffffu, x + lane < n && float_order(list[x + lane].score) > worst));
    int equal = top - above, kept = 0;
    float least = INFINITY;
    for (int x = 0; x < n; x += 32) {
        found_key key = {0.0f, 0};
        if (x + lane < n)
            key = list[x + lane];
        const unsigned u = float_order(key.score), before = (1u << lane) - 1;
        const unsigned same = __ballot_sync(0xffffffffu, x + lane < n && u == worst);
        const bool keep =
            x + lane < n && (u > worst || (u == worst && __popc(same & before) < equal));
        const unsigned kept_here = __ballot_sync(0xffffffffu, keep);
        __syncwarp(); /* (a ballot does not order memory) */
        if (keep) {
            list[kept + __popc(kept_here & before)] = key; /* never beyond what was read */
            least = fminf(least, key.score);
        }
        equal -= min(equal, __popc(same));
        kept += __popc(kept_here);
        __syncwarp();
    }
    return -warp_max(-least);
}

/* Shared memory beside the lists: asked for, and declared (to the next 1024). */
static const int SEARCH_BYTES = (2 * SLICE_FLOATS + TILE_FLOATS) * 4, SEARCH_DECLARED = 2048;

template <typename T>
__global__ void __launch_bounds__(TILE_THREADS, 2) memory_search_kernel(memory_call<T> c) {
    CUDA_SHARED(float, shared);
    const memory_shape &s = c.shape;
    float *q = shared, *k = q + SLICE_FLOATS, *scores = k + SLICE_FLOATS; /* scores [row][key] */
    found_key *lists = (found_key *)(scores + TILE_FLOATS);               /* [tile][room] */
    __shared__ int begin[TILE], end[TILE], count[TILE], reach[2];
    __shared__ float threshold[TILE];
    const int kv_head = blockIdx.y, share = blockIdx.z, group = s.heads / s.kv_heads;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, d = s.d;
    int sequence, first;
    auto length = [&](int x) { return (s.q_offsets[x + 1] - s.q_offsets[x]) * group; };
    if (!tile_find(s.sequences, s.tile, blockIdx.x, length, &sequence, &first))
        return;
    const int rows = min(s.tile, length(sequence) - first), row0 = s.q_offsets[sequence];
    auto row = [&](int x) { return row0 + (first + x) / group; };
    auto head = [&](int x) { return kv_head * group + (first + x) % group; };
    if (t < TILE) {
        begin[t] = end[t] = count[t] = 0;
        threshold[t] = -INFINITY;
        if (t < rows)
            memory_seen(s, sequence, (first + t) / group, &begin[t], &end[t]);
    }
    __syncthreads();
    if (t == 0) {
        reach[0] = 0x7fffffff;
        reach[1] = 0;
        for (int x = 0; x < rows; x++)
            if (begin[x] < end[x]) {
                reach[0] = min(reach[0], begin[x]);
                reach[1] = max(reach[1], end[x]);
            }
    }
    __syncthreads();
    /* Shares are counted from entry 0, so that what a share holds depends on nothing else. */
    const int from = max(reach[0], share * s.entries);
    const int to = min((int64_t)reach[1], (int64_t)(share + 1) * s.entries);
    const int64_t start = s.start[sequence], turn = s.first[sequence], ring = s.params.ring;
    for (int e0 = from; e0 < to; e0 += TILE) {
        float acc[4][4];
        tile_clear(acc);
        for (int part = 0; part < d; part += SLICE) {
            load_slice<T>(
                q, [&](int i) { return i < rows ? c.q.at(row(i), head(i)) : NULL; }, part, d,
                s.wide, tile_same());
            load_slice<T>(
                k,
                [&](int i) {
                    return e0 + i < to ? c.k.at(start + (turn + e0 + i) % ring, kv_head) : NULL;
                },
                part, d, s.wide, tile_same());
            __syncthreads();
            tile_product<SLICE>(acc, q, k);
            __syncthreads();
        }
        tile_keep(scores, acc);
        __syncthreads();
        for (int x = warp; x < rows; x += 8) {
            found_key *list = lists + x * s.room;
            int n = count[x];
            float least = threshold[x];
            if (n + TILE > s.room) { /* room >= top + TILE: more than `top` are there */
                least = cut_list(list, n, s.top);
                n = s.top;
            }
            for (int half = 0; half < TILE; half += 32) {
                const int e = e0 + half + lane;
                const float score = scores[x * TILE_LD + half + lane] * s.params.scale;
                const bool take = e >= begin[x] && e < end[x] && e < to && score > least;
                const unsigned taken = __ballot_sync(0xffffffffu, take);
                if (take)
                    list[n + __popc(taken & ((1u << lane) - 1))] = {score, e};
                n += __popc(taken);
            }
            __syncwarp();
            if (lane == 0) {
                count[x] = n;
                threshold[x] = least;
            }
        }
        __syncthreads();
    }
    for (int x = warp; x < rows; x += 8) {
        found_key *list = lists + x * s.room;
        int n = count[x];
        if (n > s.top) {
            cut_list(list, n, s.top);
            n = s.top;
        }
        const int64_t at = ((int64_t)share * s.rows + row(x)) * s.heads + head(x);
        for (int e = lane; e < n; e += 32)
            c.found[at * s.top + e] = list[e];
        if (lane == 0)
            c.count[at] = n;
    }
}

static const int FINISH_THREADS = 128;

/* The lists of all shares, by age, to one; softmax; output. */
template <typename T>
__global__ void __launch_bounds__(FINISH_THREADS) memory_finish_kernel(memory_call<T> c) {
    CUDA_SHARED(found_key, list);
    __shared__ float space[32], parts[4][256];
    __shared__ int kept;
    const memory_shape &s = c.shape;
    const int n = blockIdx.x, h = blockIdx.y, t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int kv_head = h / (s.heads / s.kv_heads), d = s.d;
    const int64_t row = (int64_t)n * s.heads + h, shared_rows = (int64_t)s.rows * s.heads;
    int sequence = -1, count = 0; /* of a row of no sequence: nothing is found */
    for (int x = lane; x < s.sequences; x += 32)
        if (n >= s.q_offsets[x] && n < s.q_offsets[x + 1])
            sequence = x;
#pragma unroll
    for (int x = 16; x > 0; x /= 2)
        sequence = max(sequence, __shfl_xor_sync(0xffffffffu, sequence, x));
    for (int share = 0; share < s.shares && sequence >= 0; share++) {
        const int more = c.count[share * shared_rows + row];
        for (int x = t; x < more; x += FINISH_THREADS)
            list[count + x] = c.found[(share * shared_rows + row) * s.top + x];
        count += more;
    }
    __syncthreads();
    if (count > s.top && warp == 0)
        cut_list(list, count, s.top);
    count = min(count, s.top);
    if (t == 0)
        kept = count;
    __syncthreads();
    count = kept;
    float most = -INFINITY, sum = 0.0f;
    for (int x = t; x < count; x += FINISH_THREADS)
        most = fmaxf(most, list[x].score);
    most = block_max(most, space);
    for (int x = t; x < count; x += FINISH_THREADS) {
        list[x].score = expf(list[x].score - most);
        sum += list[x].score;
    }
    __syncthreads();
    sum = block_sum(sum, space);
    for (int x = t; x < s.top; x += FINISH_THREADS) {
        int at = -1;
        if (x < count) {
            at = (int)(s.start[sequence] +
                       ((int64_t)s.first[sequence] + list[x].entry) % s.params.ring);
            list[x].entry = at;
            list[x].score /= sum;
        }
        c.index[row * s.top + x] = at;
        c.weight[row * s.top + x] = x < count ? list[x].score : 0.0f;
    }
    __syncthreads();
    float out[8] = {0}; /* a warp's share of the keys; channels lane, lane + 32, ... */
    for (int x = warp; x < count; x += FINISH_THREADS / 32) {
        const T *v = c.v.at(list[x].entry, kv_head);
        const float w = list[x].score;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i * 32 + lane < d)
                out[i] += w * to_float(v[i * 32 + lane]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        parts[warp][i * 32 + lane] = out[i];
    __syncthreads();
    for (int e = t; e < d; e += FINISH_THREADS)
        c.o.at(n, h)[e] = from_float<T>(((parts[0][e] + parts[1][e]) + parts[2][e]) + parts[3][e]);
    if (t == 0 && c.lse)
        c.lse[(int64_t)h * s.rows + n] = count ? most + logf(sum) : -INFINITY;
}

/* How lists and shares are cut, from shapes and the chip only. */
static void memory_plan(const struct cuda_state *gpu, memory_shape *s) {
    const int group = s->heads / s->kv_heads;
    s->room = (s->top + TILE + TILE - 1) / TILE * TILE + TILE;
    s->tile = TILE;
    const int64_t free = gpu->shared_most - SEARCH_BYTES - SEARCH_DECLARED;
    while (s->tile > 1 && (int64_t)s->tile * s->room * (int64_t)sizeof(found_key) >
                              (free < 64 << 10 ? free : 64 << 10))
        s->tile /= 2;
    int64_t tiles = ((int64_t)s->rows * group + s->tile - 1) / s->tile * s->kv_heads;
    int64_t shares = tiles > 0 ? 4 * gpu->processors / tiles : 1;
    int64_t most = 4096 / s->top, all = (s->params.ring + 4 * TILE - 1) / (4 * TILE);
    shares = shares < most ? shares : most;
    shares = shares < all ? shares : all;
    s->shares = shares > 1 ? (int)shares : 1;
    s->entries = (int)((s->params.ring + s->shares - 1) / s->shares);
}

OP_FN(memory_attention_forward) {
    static const char name[] = "memory_attention_forward";
    enum { Q, K, V, OFFSETS, START, FIRST, LENGTH, POSITION, O, INDEX, WEIGHT, LSE };
    memory_shape s;
    s.q_offsets = (const int32_t *)args[OFFSETS].data;
    s.start = (const int32_t *)args[START].data;
    s.first = (const int32_t *)args[FIRST].data;
    s.length = (const int32_t *)args[LENGTH].data;
    s.position = (const int32_t *)args[POSITION].data;
    s.sequences = (int)args[START].shape[0];
    s.rows = (int)args[Q].shape[0];
    s.heads = (int)args[Q].shape[1];
    s.kv_heads = (int)args[K].shape[1];
    s.d = (int)args[Q].shape[2];
    s.top = (int)args[INDEX].shape[2];
    s.params = *(const struct memory_attention_params *)params;
    s.wide = rows_packable(args[Q], 4) && rows_packable(args[K], 4);
    if (s.top < 1 || s.top > 1024 || s.params.ring < 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument index has room for %d keys a row, which must be 1 to 1024, "
                         "and the ring holds %lld rows, which must be at least 1",
                         name, s.top, (long long)s.params.ring);
    memory_plan(cuda_state_of(ctx), &s);
    const int64_t lists = (int64_t)s.shares * s.rows * s.heads;
    found_key *found;
    CUDA_TRY(
        cuda_scratch(ctx, name, lists * (s.top * (int64_t)sizeof(found_key) + 4), &found, err));
    const int64_t rows = (int64_t)s.rows * (s.heads / s.kv_heads);
    const int64_t tiles = (rows + s.tile - 1) / s.tile + s.sequences;
    const size_t shared = SEARCH_BYTES + (size_t)s.tile * (size_t)s.room * sizeof(found_key);
    FOR_DTYPE(args[Q].dtype, T, {
        memory_call<T> c = {s,
                            heads3_of<const T>(args[Q]),
                            heads3_of<const T>(args[K]),
                            heads3_of<const T>(args[V]),
                            heads3_of<T>(args[O]),
                            (int32_t *)args[INDEX].data,
                            (float *)args[WEIGHT].data,
                            (float *)args[LSE].data,
                            found,
                            (int *)(found + lists * s.top)};
        CUDA_TRY(cuda_launch(ctx, name, err, memory_search_kernel<T>,
                             dim3((unsigned)tiles, (unsigned)s.kv_heads, (unsigned)s.shares),
                             dim3(TILE_THREADS), shared, c));
        return cuda_launch(ctx, name, err, memory_finish_kernel<T>,
                           dim3((unsigned)s.rows, (unsigned)s.heads), dim3(FINISH_THREADS),
                           (size_t)s.shares * (size_t)s.top * sizeof(found_key), c);
    });
}

/* ------------------------------------------------------------------ backward
 *
 * dq += scale sum_j w_j (do.v_j - do.o) k_j: a warp for a row and head, channels over its lanes. */

template <typename T>
struct memory_gradient_call {
    heads3<const T> k, v, o, dout;
    heads3<T> dq;
    const int32_t *index;
    const float *weight;
    int rows, heads, group, d, top;
    float scale;
};
template <typename T>
__global__ void __launch_bounds__(FINISH_THREADS)
    memory_gradient_kernel(memory_gradient_call<T> c) {
    const int64_t row = (int64_t)blockIdx.x * (FINISH_THREADS / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, d = c.d;
    if (row >= (int64_t)c.rows * c.heads)
        return;
    const int64_t n = row / c.heads;
    const int h = (int)(row % c.heads), kv_head = h / c.group;
    float dout[8], sum[8], delta = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int e = i * 32 + lane;
        dout[i] = e < d ? to_float(c.dout.at(n, h)[e]) : 0.0f;
        delta += e < d ? dout[i] * to_float(c.o.at(n, h)[e]) : 0.0f;
        sum[i] = 0.0f;
    }
    delta = warp_sum(delta);
    for (int x = 0; x < c.top; x++) {
        const int at = c.index[row * c.top + x];
        if (at < 0)
            continue;
        const T *v = c.v.at(at, kv_head), *k = c.k.at(at, kv_head);
        float dp = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i * 32 + lane < d)
                dp += dout[i] * to_float(v[i * 32 + lane]);
        const float ds = c.weight[row * c.top + x] * (warp_sum(dp) - delta) * c.scale;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i * 32 + lane < d)
                sum[i] += ds * to_float(k[i * 32 + lane]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int e = i * 32 + lane;
        if (e < d) {
            T *out = c.dq.at(n, h) + e;
            *out = from_float<T>(to_float(*out) + sum[i]);
        }
    }
}

OP_FN(memory_attention_backward) {
    enum { K, V, INDEX, WEIGHT, O, DO, DQ };
    const int rows = (int)args[O].shape[0], heads = (int)args[O].shape[1];
    FOR_DTYPE(args[K].dtype, T, {
        memory_gradient_call<T> c = {heads3_of<const T>(args[K]),
                                     heads3_of<const T>(args[V]),
                                     heads3_of<const T>(args[O]),
                                     heads3_of<const T>(args[DO]),
                                     heads3_of<T>(args[DQ]),
                                     (const int32_t *)args[INDEX].data,
                                     (const float *)args[WEIGHT].data,
                                     rows,
                                     heads,
                                     heads / (int)args[K].shape[1],
                                     (int)args[K].shape[2],
                                     (int)args[INDEX].shape[2],
                                     ((const struct memory_attention_params *)params)->scale};
        return cuda_launch(ctx, "memory_attention_backward", err, memory_gradient_kernel<T>,
                           dim3(cuda_blocks((int64_t)rows * heads, FINISH_THREADS / 32)),
                           dim3(FINISH_THREADS), 0, c);
    });
}
