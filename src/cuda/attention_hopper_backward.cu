/* Flash attention backward on Hopper (contract: ops.h): bf16 and fp16, heads of 64 and 128
 * channels.
 *
 * Deterministic without atomics or waiting: keys and queries each have a pass of their own, and the
 * scores are computed in both (7 products where 5 would do; docs/cuda.md counts what that costs).
 *   prepare: D = rowsum(dO o) and lse in powers of 2, in tiles, so that one bulk copy fetches them.
 *   keys:    a block keeps K and V of 128 keys; Q and dO of every row that sees them stream by,
 * over all heads of the group. Scores transposed (keys are rows), so that P and dS stay in
 *            registers: dV += P^T dO, dK += dS^T Q. The product dK of one tile runs under the next
 *            one's scores.
 *   rows:    a block keeps Q and dO of 128 rows; K and V stream by: dQ += dS K.
 * Both have a producer warp and two warpgroups, and take work from a counter, longest first, as the
 * forward does. Never run on a GPU yet. */
#include "cuda/attention_hopper.cuh"

static const int STAGES = 2;
static const int THREADS = 384;

template <int width>
struct backward_tile {
    static const int keys = 128, rows = 128;              /* kept by a block of either pass */
    static const int step_rows = 64;                      /* streamed by the pass over keys */
    static const int step_keys = width == 128 ? 64 : 128; /* and by the pass over rows */
    static const int producer_registers = 40, consumer_registers = 232;
    static const int keys_producer = width == 128 ? 24 : 40,
                     keys_consumer = width == 128 ? 240 : 232;
    static const int kept = 128 * width * 2, step_q = step_rows * width * 2,
                     step_kv = step_keys * width * 2;
    static const int stats = 2 * step_rows * 4; /* bytes: lse and D of a tile of rows */
    static const int shared_keys = 2 * kept + STAGES * (2 * step_q + stats) + 1024;
    static const int shared_rows = 2 * kept + STAGES * 2 * step_kv + 1024;
};

/* The block of keys or rows under way, from the producer to the consumers. */
struct backward_work {
    int steps;   /* tiles streamed by (keys: for every head); -1: no more work */
    int step;    /* keys: the first tile; rows: the last block of keys */
    int head;    /* keys: of k and v; rows: of q */
    int at, end; /* first row kept and the end of its sequence, as rows of k or q */
    int key;     /* keys: position of the first key kept; rows: position of the first row */
    int stats;   /* the sequence's (keys) or the tile's (rows) first tile of lse and D */
    sequence_span s;
};

struct backward_barriers {
    uint64_t kept_full, kept_empty, raw;
    uint64_t a_full[STAGES], b_full[STAGES]; /* Q and dO (a); K and V */
    uint64_t a_empty[STAGES], b_empty[STAGES];
    backward_work work[2]; /* in turn: the next is looked for while the last is under way */
};

struct backward_call {
    attention_shape shape;
    const void *o, *dout;
    int64_t o_row, o_head, dout_row, dout_head;
    const float *lse;
    void *dq, *dk, *dv;
    int64_t dq_row, dq_head, dk_row, dk_head, dv_row, dv_head;
    float *stats; /* [heads][tiles][2][step_rows]: lse log2(e), +inf where nothing is seen; D */
    int tiles, key_slots, row_slots;
    unsigned *next; /* of the pass over keys, and of that over rows */
};

#ifdef HOPPER_CODE

/* ------------------------------------------------------------------ prepare */

template <typename T>
__device__ __forceinline__ void zero_head(T *p, int width) {
    for (int k = 0; k < width; k += 8)
        *(uint4 *)(p + k) = make_uint4(0, 0, 0, 0);
}

/* Gradients of rows that belong to no sequence. */
template <typename T, int width>
__device__ __forceinline__ void backward_outside(const backward_call &c, int thread, int threads) {
    const attention_shape &a = c.shape;
    for (int s = -1; s < a.sequences; s++) {
        int begin = s < 0 ? 0 : a.kv_start[s] + a.kv_length[s];
        int end = s + 1 < a.sequences ? a.kv_start[s + 1] : a.keys;
        for (int row = begin + thread; row < end; row += threads)
            for (int head = 0; head < a.kv_heads; head++) {
                zero_head((T *)c.dk + row * c.dk_row + head * c.dk_head, width);
                zero_head((T *)c.dv + row * c.dv_row + head * c.dv_head, width);
            }
    }
    int begin = a.q_offsets[0], end = a.q_offsets[a.sequences];
    for (int i = thread; i < begin + a.rows - end; i += threads) {
        int64_t row = i < begin ? i : i - begin + end;
        for (int head = 0; head < a.heads; head++)
            zero_head((T *)c.dq + row * c.dq_row + head * c.dq_head, width);
    }
}
#endif

/* A block a tile of rows (x) and head (y); four threads a row. */
template <typename T, int width>
__global__ void __launch_bounds__(backward_tile<width>::step_rows * 4)
    attention_hopper_prepare_kernel(const backward_call c) {
#ifdef HOPPER_CODE
    const int size = backward_tile<width>::step_rows;
    const attention_shape &a = c.shape;
    if (blockIdx.y == 0)
        backward_outside<T, width>(c, (int)(blockIdx.x * blockDim.x + threadIdx.x),
                                   (int)(gridDim.x * blockDim.x));
    int first, tile = (int)blockIdx.x, head = (int)blockIdx.y, in_tile = (int)threadIdx.x / 4;
    int s = slot_sequence(a.q_offsets, a.sequences, size, tile, &first);
    int i = (tile - first) * size + in_tile, begin = a.q_offsets[s];
    if (tile < first || (tile - first) * size >= a.q_offsets[s + 1] - begin)
        return;
    float sum = 0, lse = INFINITY;
    if (i < a.q_offsets[s + 1] - begin) {
        int64_t row = begin + i;
        const T *o = (const T *)c.o + row * c.o_row + head * c.o_head;
        const T *g = (const T *)c.dout + row * c.dout_row + head * c.dout_head;
        for (int k = (int)threadIdx.x % 4 * 8; k < width; k += 32) {
            float x[8], y[8];
            load_packed<T, 8>(o + k, x);
            load_packed<T, 8>(g + k, y);
#pragma unroll
            for (int e = 0; e < 8; e++)
                sum += x[e] * y[e];
        }
        float l = c.lse[(int64_t)head * a.rows + row];
        lse = l == -INFINITY ? INFINITY : l * 1.44269504088896341f;
    }
    sum = quad_sum(sum);
    if (threadIdx.x % 4 == 0) {
        float *to = c.stats + ((int64_t)head * c.tiles + tile) * 2 * size + in_tile;
        to[0] = lse;
        to[size] = sum;
    }
#endif
}

#ifdef HOPPER_CODE

/* ------------------------------------------------------------------ both passes */

__device__ __forceinline__ void backward_barriers_init(backward_barriers *b) {
    if (threadIdx.x == 0) {
        barrier_init(&b->kept_full, 1);
        barrier_init(&b->kept_empty, 8);
        barrier_init(&b->raw, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&b->a_full[i], 1);
            barrier_init(&b->b_full[i], 1);
            barrier_init(&b->a_empty[i], 8);
            barrier_init(&b->b_empty[i], 8);
        }
        barrier_init_fence();
    }
    __syncthreads();
}
__device__ __forceinline__ void release(uint64_t *empty) {
    if (threadIdx.x % 32 == 0)
        barrier_arrive(empty);
}

/* d += a b^T over the channels: a [64 of `a_rows`, width], b [columns, width], tiles. */
template <typename T, int width, int a_rows, int columns>
__device__ __forceinline__ void product_channels(float (&d)[columns / 2], uint64_t a, uint64_t b) {
#pragma unroll
    for (int i = 0; i < width / 16; i++)
        product<false>(d, a + (uint64_t)((i / 4 * a_rows * 128 + i % 4 * 32) >> 4),
                       b + (uint64_t)((i / 4 * columns * 128 + i % 4 * 32) >> 4), true, T());
    product_commit();
}
/* d += f b: b [depth, width], a tile. */
template <typename T, int width, int depth>
__device__ __forceinline__ void product_rows(float (&d)[width / 2],
                                             const uint32_t (&f)[depth / 16][4], uint64_t b) {
#pragma unroll
    for (int i = 0; i < depth / 16; i++)
        product<true>(d, f[i], b + (uint64_t)(i * 16 * 128 >> 4), true, T());
    product_commit();
}

/* ------------------------------------------------------------------ the pass over keys */

template <int width>
__device__ __forceinline__ bool keys_find(const backward_call &c, unsigned item, backward_work &w) {
    using tile = backward_tile<width>;
    const attention_shape &a = c.shape;
    int slot = (int)(item / (unsigned)a.kv_heads), first;
    int s = slot_sequence(a.kv_start, a.sequences, tile::keys, slot, &first);
    w.s = sequence_of(a, s);
    w.key = (slot - first) * tile::keys;
    if (w.key < 0 || w.key >= w.s.keys)
        return false;
    int last = w.key + tile::keys < w.s.keys ? w.key + tile::keys : w.s.keys;
    int shift = w.s.keys - w.s.rows;
    int from = w.key - a.right - shift, to = last - 1 + a.left - shift; /* rows that see some */
    from = from > 0 ? from : 0;
    to = to < w.s.rows - 1 ? to : w.s.rows - 1;
    w.step = from / tile::step_rows;
    w.steps = to >= from ? to / tile::step_rows - w.step + 1 : 0;
    w.head = (int)(item % (unsigned)a.kv_heads);
    w.at = w.s.key + w.key;
    w.end = w.s.key + w.s.keys;
    w.stats = w.s.row / tile::step_rows + s;
    return true;
}

template <int width>
__device__ __forceinline__ void keys_produce(const CUtensorMap *q_map, const CUtensorMap *k_map,
                                             const CUtensorMap *v_map, const CUtensorMap *do_map,
                                             const backward_call &c, char *memory,
                                             backward_barriers *b) {
    using tile = backward_tile<width>;
    char *k = memory, *v = k + tile::kept, *q = v + tile::kept;
    char *dout = q + STAGES * tile::step_q, *stats = dout + STAGES * tile::step_q;
    int lane = threadIdx.x % 32, group = c.shape.heads / c.shape.kv_heads;
    unsigned items = (unsigned)c.key_slots * (unsigned)c.shape.kv_heads;
    unsigned count = 0, tails = 0;
    for (unsigned turn = 0;; turn++) {
        backward_work &w = b->work[turn & 1];
        if (lane == 0) {
            unsigned item;
            do {
                item = atomicAdd(&c.next[0], 1u);
            } while (item < items && !keys_find<width>(c, item, w));
            if (item >= items)
                w.steps = -1;
            barrier_wait(&b->kept_empty, (turn & 1) ^ 1);
            if (w.steps > 0) {
                barrier_arrive_expect(&b->kept_full, 2 * tile::kept);
                tile_load<width, tile::keys>(k, k_map, &b->kept_full, w.head, w.at);
                tile_load<width, tile::keys>(v, v_map, &b->kept_full, w.head, w.at);
            } else {
                barrier_arrive(&b->kept_full);
            }
        }
        __syncwarp();
        if (w.steps < 0)
            return;
        for (int head = w.head * group; head < (w.head + 1) * group; head++)
            for (int step = w.step; step < w.step + w.steps; step++, count++) {
                int at = count % STAGES, row = w.s.row + step * tile::step_rows;
                int inside = w.s.rows - step * tile::step_rows;
                bool tail = inside < tile::step_rows;
                if (lane == 0) {
                    uint64_t *full = tail ? &b->raw : &b->a_full[at];
                    barrier_wait(&b->a_empty[at], (count / STAGES & 1) ^ 1);
                    barrier_arrive_expect(full, 2 * tile::step_q + tile::stats);
                    copy_bulk(stats + at * tile::stats,
                              (const char *)c.stats +
                                  (int64_t)(head * c.tiles + w.stats + step) * tile::stats,
                              tile::stats, full);
                    tile_load<width, tile::step_rows>(q + at * tile::step_q, q_map, full, head,
                                                      row);
                    tile_load<width, tile::step_rows>(dout + at * tile::step_q, do_map, full, head,
                                                      row);
                }
                __syncwarp();
                if (tail) {
                    barrier_wait(&b->raw, tails++ & 1);
                    tile_clear<width, tile::step_rows>(q + at * tile::step_q, inside, lane);
                    tile_clear<width, tile::step_rows>(dout + at * tile::step_q, inside, lane);
                    if (lane == 0)
                        barrier_arrive(&b->a_full[at]);
                }
            }
    }
}

template <typename T, int width>
__device__ __forceinline__ void keys_consume(const backward_call &c, char *memory,
                                             backward_barriers *b) {
    using tile = backward_tile<width>;
    const attention_shape &a = c.shape;
    const int columns = tile::step_rows;
    int group = (int)threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    int own = group * 64 + (int)threadIdx.x % 128 / 32 * 16 + lane / 4;
    char *q = memory + 2 * tile::kept, *dout = q + STAGES * tile::step_q;
    const char *stats = dout + STAGES * tile::step_q;
    uint64_t k = product_matrix(memory + group * 64 * 128, 0);
    uint64_t v = product_matrix(memory + tile::kept + group * 64 * 128, 0);
    unsigned count = 0;
    for (unsigned turn = 0;; turn++) {
        barrier_wait(&b->kept_full, turn & 1);
        const backward_work &w = b->work[turn & 1];
        int each = w.steps, steps = each * (a.heads / a.kv_heads);
        if (steps < 0)
            return;
        /* Positions of the rows that stream by, for every head of the group anew. */
        int key = w.key;
        int from = w.step * columns + w.s.keys - w.s.rows;
        int to = from + each * columns, p0 = from;
        float dk[width / 2], dv[width / 2];
#pragma unroll
        for (int i = 0; i < width / 2; i++)
            dk[i] = dv[i] = 0;
        uint32_t ds[columns / 16][4];
        for (int i = 0; i < steps; i++, count++) {
            int at = count % STAGES;
            unsigned parity = count / STAGES & 1;
            float s[columns / 2] = {}, dp[columns / 2] = {};
            barrier_wait(&b->a_full[at], parity);
            product_hold(s); /* their zeros come before the first product */
            product_hold(dp);
            product_begin();
            product_channels<T, width, tile::keys, columns>(
                s, k, product_matrix(q + at * tile::step_q, 0));
            product_channels<T, width, tile::keys, columns>(
                dp, v, product_matrix(dout + at * tile::step_q, 0));
            product_wait<1>(); /* the scores, and the last tile's dK */
            product_hold(s);
            product_hold(dk);
            product_hold(ds);
            if (i > 0)
                release(&b->a_empty[1 - at]);

            /* Columns are rows of q, from position p0 on. */
            const float *lse = (const float *)(stats + at * tile::stats) + lane % 4 * 2;
            bool hidden = key + tile::keys > p0 + a.right + 1 || key < p0 + columns - 1 - a.left;
#pragma unroll
            for (int j = 0; j < columns / 2; j += 4) {
                float2 l = *(const float2 *)(lse + j * 2);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[j + e] = exp2_fast(s[j + e] * a.scale_log2e - (e % 2 ? l.y : l.x));
            }
            if (hidden) {
#pragma unroll
                for (int j = 0; j < columns / 2; j++) {
                    int position = p0 + j / 4 * 8 + lane % 4 * 2 + j % 2;
                    int at_key = key + own + j / 2 % 2 * 8;
                    if (at_key > position + a.right || at_key < position - a.left)
                        s[j] = 0;
                }
            }
            uint32_t p[columns / 16][4];
            to_factor<T>(s, p);
            product_hold(p);
            product_hold(dv);
            product_begin();
            product_rows<T, width, columns>(
                dv, p, product_matrix(dout + at * tile::step_q, columns * 128));
            product_wait<1>();
            product_hold(dp);
#pragma unroll
            for (int j = 0; j < columns / 2; j += 4) {
                float2 d = *(const float2 *)(lse + columns + j * 2);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    dp[j + e] = s[j + e] * (dp[j + e] - (e % 2 ? d.y : d.x));
            }
            product_hold(dp);  /* computed under dV: nothing sinks below the wait */
            product_wait<0>(); /* dV: its factor's registers become dS */
            product_hold(dv);
            product_hold(p);
            to_factor<T>(dp, ds);
            product_hold(ds);
            product_hold(dk);
            product_begin();
            product_rows<T, width, columns>(dk, ds,
                                            product_matrix(q + at * tile::step_q, columns * 128));
            p0 = p0 + columns == to ? from : p0 + columns;
        }
        product_wait<0>();
        product_hold(dk);
        product_hold(dv);
        if (steps > 0)
            release(&b->a_empty[(count - 1) % STAGES]);
        int row = w.at + own, end = w.end, head = w.head;
        __syncwarp(); /* all lanes have read the work */
        release(&b->kept_empty);
        const float one[2] = {1, 1}, scale[2] = {a.scale, a.scale};
        write_rows<T>(dv, one, (T *)c.dv + head * c.dv_head, c.dv_row, row, end);
        write_rows<T>(dk, scale, (T *)c.dk + head * c.dk_head, c.dk_row, row, end);
    }
}
#endif

template <typename T, int width>
__global__ void __launch_bounds__(THREADS, 1)
    attention_hopper_keys_kernel(const __grid_constant__ CUtensorMap q_map,
                                 const __grid_constant__ CUtensorMap k_map,
                                 const __grid_constant__ CUtensorMap v_map,
                                 const __grid_constant__ CUtensorMap do_map,
                                 const __grid_constant__ backward_call c) {
#ifdef HOPPER_CODE
    using tile = backward_tile<width>;
    CUDA_SHARED(char, memory);
    backward_barriers *b = (backward_barriers *)(memory + tile::shared_keys - 1024);
    backward_barriers_init(b);
    if (threadIdx.x < 128) {
        registers_give<tile::keys_producer>();
        if (threadIdx.x < 32)
            keys_produce<width>(&q_map, &k_map, &v_map, &do_map, c, memory, b);
    } else {
        registers_take<tile::keys_consumer>();
        keys_consume<T, width>(c, memory, b);
    }
#endif
}

/* ------------------------------------------------------------------ the pass over rows */

#ifdef HOPPER_CODE

template <int width>
__device__ __forceinline__ bool rows_find(const backward_call &c, unsigned item, backward_work &w) {
    using tile = backward_tile<width>;
    const attention_shape &a = c.shape;
    int slot = c.row_slots - 1 - (int)(item / (unsigned)a.heads), first;
    int s = slot_sequence(a.q_offsets, a.sequences, tile::rows, slot, &first);
    w.s = sequence_of(a, s);
    int row = (slot - first) * tile::rows;
    if (row < 0 || row >= w.s.rows)
        return false;
    int end = row + tile::rows < w.s.rows ? row + tile::rows : w.s.rows;
    w.key = row + w.s.keys - w.s.rows;
    int from = visible_first(a, w.key);
    int to = visible_end(a, w.key + end - 1 - row, w.s.keys);
    from = from > 0 ? from / tile::step_keys : 0;
    to = to > 0 ? (to + tile::step_keys - 1) / tile::step_keys : 0;
    w.steps = to > from ? to - from : 0;
    w.step = to - 1;
    w.head = (int)(item % (unsigned)a.heads);
    w.at = w.s.row + row;
    w.end = w.s.row + w.s.rows;
    w.stats = w.s.row / tile::step_rows + s + row / tile::step_rows;
    return true;
}

template <int width>
__device__ __forceinline__ void rows_produce(const CUtensorMap *q_map, const CUtensorMap *k_map,
                                             const CUtensorMap *v_map, const CUtensorMap *do_map,
                                             const backward_call &c, char *memory,
                                             backward_barriers *b) {
    using tile = backward_tile<width>;
    char *q = memory, *dout = q + tile::kept, *k = dout + tile::kept;
    char *v = k + STAGES * tile::step_kv;
    int lane = threadIdx.x % 32, group = c.shape.heads / c.shape.kv_heads;
    unsigned items = (unsigned)c.row_slots * (unsigned)c.shape.heads;
    unsigned count = 0, tails = 0;
    for (unsigned turn = 0;; turn++) {
        backward_work &w = b->work[turn & 1];
        if (lane == 0) {
            unsigned item;
            do {
                item = atomicAdd(&c.next[1], 1u);
            } while (item < items && !rows_find<width>(c, item, w));
            if (item >= items)
                w.steps = -1;
            barrier_wait(&b->kept_empty, (turn & 1) ^ 1);
            if (w.steps > 0) {
                barrier_arrive_expect(&b->kept_full, 2 * tile::kept);
                tile_load<width, tile::rows>(q, q_map, &b->kept_full, w.head, w.at);
                tile_load<width, tile::rows>(dout, do_map, &b->kept_full, w.head, w.at);
            } else {
                barrier_arrive(&b->kept_full);
            }
        }
        __syncwarp();
        if (w.steps < 0)
            return;
        for (int i = 0; i < w.steps; i++, count++) {
            int at = count % STAGES, key = (w.step - i) * tile::step_keys;
            int inside = w.s.keys - key;
            unsigned parity = count / STAGES & 1;
            bool tail = inside < tile::step_keys;
            if (lane == 0) {
                barrier_wait(&b->a_empty[at], parity ^ 1);
                uint64_t *full = tail ? &b->raw : &b->a_full[at];
                barrier_arrive_expect(full, tail ? 2 * tile::step_kv : tile::step_kv);
                tile_load<width, tile::step_keys>(k + at * tile::step_kv, k_map, full,
                                                  w.head / group, w.s.key + key);
                barrier_wait(&b->b_empty[at], parity ^ 1);
                if (!tail) {
                    full = &b->b_full[at];
                    barrier_arrive_expect(full, tile::step_kv);
                }
                tile_load<width, tile::step_keys>(v + at * tile::step_kv, v_map, full,
                                                  w.head / group, w.s.key + key);
            }
            __syncwarp();
            if (tail) {
                barrier_wait(&b->raw, tails++ & 1);
                tile_clear<width, tile::step_keys>(k + at * tile::step_kv, inside, lane);
                tile_clear<width, tile::step_keys>(v + at * tile::step_kv, inside, lane);
                if (lane == 0) {
                    barrier_arrive(&b->a_full[at]);
                    barrier_arrive(&b->b_full[at]);
                }
            }
        }
    }
}

template <typename T, int width>
__device__ __forceinline__ void rows_consume(const backward_call &c, char *memory,
                                             backward_barriers *b) {
    using tile = backward_tile<width>;
    const attention_shape &a = c.shape;
    const int columns = tile::step_keys;
    int group = (int)threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    int own = group * 64 + (int)threadIdx.x % 128 / 32 * 16 + lane / 4;
    char *k = memory + 2 * tile::kept, *v = k + STAGES * tile::step_kv;
    uint64_t q = product_matrix(memory + group * 64 * 128, 0);
    uint64_t dout = product_matrix(memory + tile::kept + group * 64 * 128, 0);
    unsigned count = 0;
    for (unsigned turn = 0;; turn++) {
        barrier_wait(&b->kept_full, turn & 1);
        const backward_work &w = b->work[turn & 1];
        int steps = w.steps;
        if (steps < 0)
            return;
        int key = w.step * columns, row = w.at + own, end = w.end;
        int position = w.key + group * 64, keys = w.s.keys, head = w.head;
        int all_from = visible_first(a, position + 63), all_to = visible_end(a, position, keys);
        position += own - group * 64;
        float lse[2], delta[2], dq[width / 2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int i = own + 8 * r, slot = w.stats + i / tile::step_rows;
            const float *from = c.stats + ((int64_t)head * c.tiles + slot) * 2 * tile::step_rows +
                                i % tile::step_rows;
            bool inside = row + 8 * r < end;
            lse[r] = inside ? from[0] : INFINITY;
            delta[r] = inside ? from[tile::step_rows] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < width / 2; i++)
            dq[i] = 0;
        uint32_t ds[columns / 16][4];
        for (int i = 0; i < steps; i++, key -= columns) {
            int at = (count + (unsigned)i) % STAGES;
            unsigned parity = (count + (unsigned)i) / STAGES & 1;
            float s[columns / 2] = {}, dp[columns / 2] = {};
            barrier_wait(&b->a_full[at], parity);
            product_hold(s); /* their zeros come before the first product */
            product_hold(dp);
            product_begin();
            product_channels<T, width, tile::rows, columns>(
                s, q, product_matrix(k + at * tile::step_kv, 0));
            barrier_wait(&b->b_full[at], parity);
            product_begin();
            product_channels<T, width, tile::rows, columns>(
                dp, dout, product_matrix(v + at * tile::step_kv, 0));
            product_wait<1>(); /* the scores, and the last block's dQ */
            product_hold(s);
            product_hold(dq);
            product_hold(ds);
            if (i > 0)
                release(&b->a_empty[1 - at]);
            bool hidden = key < all_from || key + columns > all_to;
#pragma unroll
            for (int j = 0; j < columns / 2; j++)
                s[j] = exp2_fast(s[j] * a.scale_log2e - lse[j / 2 % 2]);
            if (hidden) {
#pragma unroll
                for (int j = 0; j < columns / 2; j++) {
                    int p = position + j / 2 % 2 * 8;
                    int at_key = key + j / 4 * 8 + lane % 4 * 2 + j % 2;
                    if (at_key < visible_first(a, p) || at_key >= visible_end(a, p, keys))
                        s[j] = 0;
                }
            }
            product_wait<0>();
            product_hold(dp);
            release(&b->b_empty[at]);
#pragma unroll
            for (int j = 0; j < columns / 2; j++)
                dp[j] = s[j] * (dp[j] - delta[j / 2 % 2]);
            to_factor<T>(dp, ds);
            product_hold(ds);
            product_hold(dq);
            product_begin();
            product_rows<T, width, columns>(dq, ds,
                                            product_matrix(k + at * tile::step_kv, columns * 128));
        }
        product_wait<0>();
        product_hold(dq);
        if (steps > 0)
            release(&b->a_empty[(count + (unsigned)steps - 1) % STAGES]);
        count += (unsigned)steps;
        __syncwarp(); /* all lanes have read the work */
        release(&b->kept_empty);
        const float scale[2] = {a.scale, a.scale};
        write_rows<T>(dq, scale, (T *)c.dq + head * c.dq_head, c.dq_row, row, end);
    }
}
#endif

template <typename T, int width>
__global__ void __launch_bounds__(THREADS, 1)
    attention_hopper_rows_kernel(const __grid_constant__ CUtensorMap q_map,
                                 const __grid_constant__ CUtensorMap k_map,
                                 const __grid_constant__ CUtensorMap v_map,
                                 const __grid_constant__ CUtensorMap do_map,
                                 const __grid_constant__ backward_call c) {
#ifdef HOPPER_CODE
    using tile = backward_tile<width>;
    CUDA_SHARED(char, memory);
    backward_barriers *b = (backward_barriers *)(memory + tile::shared_rows - 1024);
    backward_barriers_init(b);
    if (threadIdx.x < 128) {
        registers_give<tile::producer_registers>();
        if (threadIdx.x < 32)
            rows_produce<width>(&q_map, &k_map, &v_map, &do_map, c, memory, b);
    } else {
        registers_take<tile::consumer_registers>();
        rows_consume<T, width>(c, memory, b);
    }
#endif
}

/* ------------------------------------------------------------------ host */

template <typename T, int width>
static tril_status backward_launch(struct op_context *ctx, const struct tensor *args,
                                   backward_call c, struct tril_error *err) {
    using tile = backward_tile<width>;
    const char *name = "attention_backward";
    const attention_shape &a = c.shape;
    cudaStream_t stream = cuda_state_of(ctx)->stream;
    c.tiles = slot_count(a.rows, a.sequences, tile::step_rows);
    c.key_slots = slot_count(a.keys, a.sequences, tile::keys);
    c.row_slots = slot_count(a.rows, a.sequences, tile::rows);
    int64_t stats = (int64_t)a.heads * c.tiles * tile::stats;
    CUDA_TRY(cuda_scratch(ctx, name, 256 + stats, &c.next, err));
    c.stats = (float *)((char *)c.next + 256);
    /* Maps know how many rows a tile has: Q, K, V and dO of the pass over keys, then over rows. */
    static const int which[] = {B_Q, B_K, B_V, B_DO};
    const int boxes[2][4] = {{tile::step_rows, tile::keys, tile::keys, tile::step_rows},
                             {tile::rows, tile::step_keys, tile::step_keys, tile::rows}};
    CUtensorMap map[2][4];
    for (int i = 0; i < 8; i++)
        if (!tensor_map_make(&map[i / 4][i % 4], &args[which[i % 4]], boxes[i / 4][i % 4]))
            return attention_hopper_no_map(name, err);
    CUDA_TRY(cuda_check(cudaMemsetAsync(c.next, 0, 2 * sizeof *c.next, stream), name, err));
    CUDA_TRY(cuda_launch(ctx, name, err, attention_hopper_prepare_kernel<T, width>,
                         dim3((unsigned)c.tiles, (unsigned)a.heads), dim3(tile::step_rows * 4), 0,
                         c));
    int64_t most = cuda_state_of(ctx)->processors;
    int64_t of_keys = (int64_t)c.key_slots * a.kv_heads, of_rows = (int64_t)c.row_slots * a.heads;
    CUDA_TRY(cuda_launch(ctx, name, err, attention_hopper_keys_kernel<T, width>,
                         dim3((unsigned)(of_keys < most ? of_keys : most)), dim3(THREADS),
                         tile::shared_keys, map[0][0], map[0][1], map[0][2], map[0][3], c));
    return cuda_launch(ctx, name, err, attention_hopper_rows_kernel<T, width>,
                       dim3((unsigned)(of_rows < most ? of_rows : most)), dim3(THREADS),
                       tile::shared_rows, map[1][0], map[1][1], map[1][2], map[1][3], c);
}

extern "C" tril_status attention_hopper_backward(struct op_context *ctx, const struct tensor *args,
                                                 const struct attention_params *p,
                                                 struct tril_error *err) {
    backward_call c = {};
    c.shape = attention_shape_of(args, p);
    c.o = args[B_O].data;
    c.o_row = args[B_O].stride[0];
    c.o_head = args[B_O].stride[1];
    c.dout = args[B_DO].data;
    c.dout_row = args[B_DO].stride[0];
    c.dout_head = args[B_DO].stride[1];
    c.lse = (const float *)args[B_LSE].data;
    c.dq = args[B_DQ].data;
    c.dq_row = args[B_DQ].stride[0];
    c.dq_head = args[B_DQ].stride[1];
    c.dk = args[B_DK].data;
    c.dk_row = args[B_DK].stride[0];
    c.dk_head = args[B_DK].stride[1];
    c.dv = args[B_DV].data;
    c.dv_row = args[B_DV].stride[0];
    c.dv_head = args[B_DV].stride[1];
    bool brain = args[B_Q].dtype == DT_BF16;
    if (args[B_Q].shape[2] == 128)
        return brain ? backward_launch<__nv_bfloat16, 128>(ctx, args, c, err)
                     : backward_launch<__half, 128>(ctx, args, c, err);
    return brain ? backward_launch<__nv_bfloat16, 64>(ctx, args, c, err)
                 : backward_launch<__half, 64>(ctx, args, c, err);
}
