/* Flash attention forward on Hopper (Shah et al. 2024, "FlashAttention-3", idea only; contract:
 * ops.h): bf16 and fp16, heads of 64 and 128 channels.
 *
 * A block is one producer warp, which copies tiles of Q, K and V by the bulk copy engine, and two
 * (d = 128) or three (d = 64) warpgroups of 64 rows each, which hold scores, probabilities and the
 * output in registers. Keys go from the diagonal down. Of a key block, the scores' product and the
 * previous block's P V are issued together; the softmax runs while P V does, and named barriers
 * pass the turn to issue around, so that one warpgroup's softmax hides behind another's products.
 * Blocks stay (one a multiprocessor) and take the next (rows, head), longest first, from a counter.
 *
 * Tile: 128 rows x 128 keys (d = 128), 192 x 128 (d = 64). Shared memory: Q 32 KB + 2 x (K + V) 128
 * KB; Q 24 KB + 3 x (K + V) 96 KB. Budget: docs/cuda.md. Never run on a GPU yet. */
#include "cuda/attention_hopper.cuh"

static const int KEYS = 128;             /* of a block of keys */
static const int64_t L2_HELD = 32 << 20; /* of keys and values, of 50 MB */

template <int width>
struct forward_tile {
    static const int consumers = width == 128 ? 2 : 3;
    static const int rows = 64 * consumers;
    static const int stages = width == 128 ? 2 : 3;
    static const int threads = 128 * (consumers + 1);
    static const int q_bytes = rows * width * 2, kv_bytes = KEYS * width * 2;
    static const int shared = q_bytes + 2 * stages * kv_bytes + 1024;
    static const int producer_registers = width == 128 ? 40 : 32;
    static const int consumer_registers = width == 128 ? 232 : 160;
};

/* (rows, head) under way, from the producer to the consumers. */
struct forward_work {
    int blocks; /* of keys; 0: the rows see nothing; -1: no more work */
    int last;   /* the first block visited */
    int head;
    int row, rows;     /* first row of the tile and end of its sequence, as rows of q */
    int position;      /* of the tile's first row */
    int keys, key_row; /* of the sequence */
};

template <int stages>
struct forward_barriers {
    uint64_t q_full, q_empty;
    uint64_t k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];
    uint64_t v_raw; /* V has come, but its end must be cleared first */
    forward_work work;
};

struct forward_call {
    attention_shape shape;
    void *o;
    int64_t o_row, o_head;
    float *lse;  /* may be NULL */
    int slots;   /* tiles of rows at most */
    int section; /* heads whose keys and values stay in the L2 cache together */
    unsigned *next;
};

#ifdef HOPPER_CODE

/* Item `item` of the list: sections of heads; in each the last tiles (the longest, where the rule
 * is causal) first, and a tile's heads side by side. False where the slot is empty. */
template <int rows>
__device__ __forceinline__ bool forward_find(const forward_call &c, unsigned item,
                                             forward_work *w) {
    const attention_shape &a = c.shape;
    unsigned whole = (unsigned)c.slots * (unsigned)c.section;
    int begin = (int)(item / whole) * c.section;
    unsigned rest = item % whole;
    unsigned heads = (unsigned)(a.heads - begin < c.section ? a.heads - begin : c.section);
    int slot = c.slots - 1 - (int)(rest / heads), first;
    int s = slot_sequence(a.q_offsets, a.sequences, rows, slot, &first);
    sequence_span at = sequence_of(a, s);
    int row = (slot - first) * rows;
    if (row < 0 || row >= at.rows)
        return false;
    int end = row + rows < at.rows ? row + rows : at.rows;
    int shift = at.keys - at.rows;
    int from = visible_first(a, row + shift), to = visible_end(a, end - 1 + shift, at.keys);
    from = from > 0 ? from / KEYS : 0;
    to = to > 0 ? (to + KEYS - 1) / KEYS : 0;
    w->blocks = to > from ? to - from : 0;
    w->last = to - 1;
    w->head = begin + (int)(rest % heads);
    w->row = at.row + row;
    w->rows = at.row + at.rows;
    w->position = row + shift;
    w->keys = at.keys;
    w->key_row = at.key;
    return true;
}

/* The producer warp. */
template <int width>
__device__ __forceinline__ void forward_produce(const CUtensorMap *q_map, const CUtensorMap *k_map,
                                                const CUtensorMap *v_map, const forward_call &c,
                                                char *memory,
                                                forward_barriers<forward_tile<width>::stages> *b) {
    using tile = forward_tile<width>;
    char *q = memory, *k = q + tile::q_bytes, *v = k + tile::stages * tile::kv_bytes;
    int lane = threadIdx.x % 32, group = c.shape.heads / c.shape.kv_heads;
    unsigned items = (unsigned)c.slots * (unsigned)c.shape.heads;
    unsigned count = 0, tails = 0; /* blocks of keys loaded, and cleared */
    for (unsigned turn = 0;; turn++) {
        forward_work w;
        if (lane == 0) {
            bool found = false;
            unsigned item;
            while (!found && (item = atomicAdd(c.next, 1u)) < items)
                found = forward_find<tile::rows>(c, item, &w);
            if (!found)
                w.blocks = -1;
            barrier_wait(&b->q_empty, (turn & 1) ^ 1);
            b->work = w;
            if (w.blocks > 0) {
                barrier_arrive_expect(&b->q_full, tile::q_bytes);
                tile_load<width, tile::rows>(q, q_map, &b->q_full, w.head, w.row);
            } else {
                barrier_arrive(&b->q_full);
            }
        }
        w.blocks = __shfl_sync(0xffffffffu, w.blocks, 0);
        if (w.blocks < 0)
            return;
        w.last = __shfl_sync(0xffffffffu, w.last, 0);
        w.keys = __shfl_sync(0xffffffffu, w.keys, 0);
        w.key_row = __shfl_sync(0xffffffffu, w.key_row, 0);
        w.head = __shfl_sync(0xffffffffu, w.head, 0);
        for (int i = 0; i < w.blocks; i++, count++) {
            int at = count % tile::stages, key = (w.last - i) * KEYS, inside = w.keys - key;
            unsigned parity = count / tile::stages & 1;
            uint64_t *full = inside < KEYS ? &b->v_raw : &b->v_full[at];
            char *to = v + at * tile::kv_bytes;
            if (lane == 0) {
                barrier_wait(&b->k_empty[at], parity ^ 1);
                barrier_arrive_expect(&b->k_full[at], tile::kv_bytes);
                tile_load<width, KEYS>(k + at * tile::kv_bytes, k_map, &b->k_full[at],
                                       w.head / group, w.key_row + key);
                barrier_wait(&b->v_empty[at], parity ^ 1);
                barrier_arrive_expect(full, tile::kv_bytes);
                tile_load<width, KEYS>(to, v_map, full, w.head / group, w.key_row + key);
            }
            __syncwarp();
            if (inside < KEYS) {
                barrier_wait(&b->v_raw, tails++ & 1);
                tile_clear<width, KEYS>(to, inside, lane);
                if (lane == 0)
                    barrier_arrive(&b->v_full[at]);
            }
        }
    }
}

/* Two rows of a thread: where they stand, the running maximum and (of this thread's columns) sum.
 */
struct softmax_rows {
    float most[2], sum[2];
};

/* Scores s of keys `key` on become exp2(s c - maximum); *again: what earlier sums shrink by. */
template <int count>
__device__ __forceinline__ void softmax_step(float (&s)[count], softmax_rows &r, float c,
                                             float (&again)[2]) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float most = r.most[k];
#pragma unroll
        for (int i = 0; i < count; i += 4)
            most = fmaxf(most, fmaxf(s[i + 2 * k], s[i + 2 * k + 1]));
        most = quad_max(most);
        float base = most == -INFINITY ? 0.0f : most * c;
        again[k] = exp2_fast(r.most[k] * c - base);
        r.most[k] = most;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < count; i += 4) {
            s[i + 2 * k] = exp2_fast(s[i + 2 * k] * c - base);
            s[i + 2 * k + 1] = exp2_fast(s[i + 2 * k + 1] * c - base);
            sum += s[i + 2 * k] + s[i + 2 * k + 1];
        }
        r.sum[k] = r.sum[k] * again[k] + sum;
    }
}

/* Hides what the rows at `position` and 8 below do not see of the keys from `key` on. */
template <int count>
__device__ __forceinline__ void hide(float (&s)[count], const attention_shape &a, int position,
                                     int keys, int key) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int from = visible_first(a, position + 8 * k) - key;
        int to = visible_end(a, position + 8 * k, keys) - key;
#pragma unroll
        for (int i = 0; i < count; i++)
            if (i / 2 % 2 == k) {
                int column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
                if (column < from || column >= to)
                    s[i] = -INFINITY;
            }
    }
}

/* A warpgroup of 64 rows. */
template <typename T, int width>
__device__ __forceinline__ void forward_consume(const forward_call &c, char *memory,
                                                forward_barriers<forward_tile<width>::stages> *b) {
    using tile = forward_tile<width>;
    const attention_shape &a = c.shape;
    int group = (int)threadIdx.x / 128 - 1; /* of the consumers */
    int lane = threadIdx.x % 32, in_group = threadIdx.x % 128;
    int own = in_group / 32 * 16 + lane / 4; /* this thread's first row in the group's */
    const int half = KEYS * 128;             /* bytes of half a tile of keys */
    char *keys = memory + tile::q_bytes, *values = keys + tile::stages * tile::kv_bytes;
    uint64_t q = product_matrix(memory + group * 64 * 128, 0);
    unsigned count = 0;

    auto scores = [&](float(&s)[KEYS / 2], int at) {
        uint64_t k = product_matrix(keys + at * tile::kv_bytes, 0);
#pragma unroll
        for (int i = 0; i < width / 16; i++)
            product<false>(s, q + (uint64_t)((i / 4 * tile::rows * 128 + i % 4 * 32) >> 4),
                           k + (uint64_t)((i / 4 * half + i % 4 * 32) >> 4), i > 0, T());
        product_commit();
    };
    auto add_values = [&](float(&o)[width / 2], const uint32_t(&p)[KEYS / 16][4], int at) {
        uint64_t v = product_matrix(values + at * tile::kv_bytes, half);
        product_begin(); /* o and p were written since the scores' */
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            product<true>(o, p[i], v + (uint64_t)(i * 16 * 128 >> 4), true, T());
        product_commit();
    };
    auto release = [&](uint64_t *empty) {
        if (lane == 0)
            barrier_arrive(empty);
    };
    const int turns = 1; /* named barriers: 1 + group */
    if (group == tile::consumers - 1)
        group_arrive(turns, 256);

    for (unsigned turn = 0;; turn++) {
        barrier_wait(&b->q_full, turn & 1);
        forward_work w = b->work;
        if (w.blocks < 0)
            break;
        int row = w.row + group * 64 + own; /* of q */
        int position = w.position + group * 64;
        float o[width / 2];
#pragma unroll
        for (int i = 0; i < width / 2; i++)
            o[i] = 0;
        softmax_rows r = {{-INFINITY, -INFINITY}, {0, 0}};

        /* Whether some of the group's rows do not see all of a block. */
        int all_from = visible_first(a, position + 63), all_to = visible_end(a, position, w.keys);
        auto look = [&](float(&s)[KEYS / 2], int key) {
            if (key < all_from || key + KEYS > all_to)
                hide(s, a, position + own, w.keys, key);
        };
        if (w.blocks > 0) {
            float s[KEYS / 2], again[2];
            uint32_t p[KEYS / 16][4];
            int at = count % tile::stages, key = w.last * KEYS;
            unsigned parity = count / tile::stages & 1;
            barrier_wait(&b->k_full[at], parity);
            product_begin();
            scores(s, at);
            product_wait<0>();
            product_hold(s);
            release(&b->k_empty[at]);
            look(s, key);
            softmax_step(s, r, a.scale_log2e, again);
            to_factor<T>(s, p);
            for (int i = 1; i < w.blocks; i++) {
                int before = at;
                unsigned parity_before = parity;
                at = (count + (unsigned)i) % tile::stages;
                parity = (count + (unsigned)i) / tile::stages & 1;
                key -= KEYS;
                barrier_wait(&b->k_full[at], parity);
                group_wait(turns + group, 256);
                product_hold(o);
                product_hold(p);
                product_begin();
                scores(s, at);
                barrier_wait(&b->v_full[before], parity_before);
                add_values(o, p, before);
                group_arrive(turns + (group + 1) % tile::consumers, 256);
                product_wait<1>();
                product_hold(s);
                release(&b->k_empty[at]);
                look(s, key);
                softmax_step(s, r, a.scale_log2e, again);
                product_after(r.sum[0] + r.sum[1]); /* the softmax runs under P V */
                product_wait<0>();
                product_hold(o);
                product_hold(p);
                release(&b->v_empty[before]);
#pragma unroll
                for (int k = 0; k < width / 2; k++)
                    o[k] *= again[k / 2 % 2];
                to_factor<T>(s, p);
            }
            release(&b->q_empty);
            barrier_wait(&b->v_full[at], parity);
            product_hold(o);
            product_hold(p);
            add_values(o, p, at);
            product_wait<0>();
            product_hold(o);
            release(&b->v_empty[at]);
            count += (unsigned)w.blocks;
        } else {
            __syncwarp(); /* all lanes have read the work */
            release(&b->q_empty);
        }

        float inverse[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float sum = quad_sum(r.sum[k]);
            inverse[k] = sum > 0 ? 1.0f / sum : 0.0f;
            if (c.lse && lane % 4 == 0 && row + 8 * k < w.rows)
                c.lse[(int64_t)w.head * a.rows + row + 8 * k] =
                    sum > 0 ? r.most[k] * a.scale + logf(sum) : -INFINITY;
        }
        write_rows<T>(o, inverse, (T *)c.o + w.head * c.o_head, c.o_row, row, w.rows);
    }
    if (group == 0) /* takes the last turn, so that no arrival is left over */
        group_wait(turns, 256);
}

/* Rows of q that belong to no sequence: before the first and after the last. */
template <typename T, int width>
__device__ __forceinline__ void forward_outside(const forward_call &c, int thread, int threads) {
    const attention_shape &a = c.shape;
    int begin = a.q_offsets[0], end = a.q_offsets[a.sequences];
    int outside = begin + a.rows - end;
    for (int i = (int)blockIdx.x * threads + thread; i < outside; i += (int)gridDim.x * threads) {
        int64_t row = i < begin ? i : i - begin + end;
        for (int head = 0; head < a.heads; head++) {
            for (int k = 0; k < width; k += 8)
                *(uint4 *)((T *)c.o + row * c.o_row + head * c.o_head + k) = make_uint4(0, 0, 0, 0);
            if (c.lse)
                c.lse[(int64_t)head * a.rows + row] = -INFINITY;
        }
    }
}
#endif

template <typename T, int width>
__global__ void __launch_bounds__(forward_tile<width>::threads, 1)
    attention_hopper_forward_kernel(const __grid_constant__ CUtensorMap q_map,
                                    const __grid_constant__ CUtensorMap k_map,
                                    const __grid_constant__ CUtensorMap v_map,
                                    const __grid_constant__ forward_call c) {
#ifdef HOPPER_CODE
    using tile = forward_tile<width>;
    CUDA_SHARED(char, memory);
    auto *b = (forward_barriers<tile::stages> *)(memory + tile::shared - 1024);
    static_assert(sizeof *b <= 1024, "the barriers' place");
    if (threadIdx.x == 0) {
        copy_prepare(&q_map);
        copy_prepare(&k_map);
        copy_prepare(&v_map);
        barrier_init(&b->q_full, 1);
        barrier_init(&b->q_empty, 4 * tile::consumers);
        barrier_init(&b->v_raw, 1);
        for (int i = 0; i < tile::stages; i++) {
            barrier_init(&b->k_full[i], 1);
            barrier_init(&b->v_full[i], 1);
            barrier_init(&b->k_empty[i], 4 * tile::consumers);
            barrier_init(&b->v_empty[i], 4 * tile::consumers);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_give<tile::producer_registers>();
        if (threadIdx.x < 32)
            forward_produce<width>(&q_map, &k_map, &v_map, c, memory, b);
        else
            forward_outside<T, width>(c, (int)threadIdx.x - 32, 96);
    } else {
        registers_take<tile::consumer_registers>();
        forward_consume<T, width>(c, memory, b);
    }
#endif
}

template <typename T, int width>
static tril_status forward_launch(struct op_context *ctx, const struct tensor *args,
                                  const forward_call &c, struct tril_error *err) {
    using tile = forward_tile<width>;
    CUtensorMap q, k, v;
    if (!tensor_map_make(&q, &args[F_Q], tile::rows) || !tensor_map_make(&k, &args[F_K], KEYS) ||
        !tensor_map_make(&v, &args[F_V], KEYS))
        return attention_hopper_no_map("attention_forward", err);
    int64_t items = (int64_t)c.slots * c.shape.heads;
    int64_t most = cuda_state_of(ctx)->processors;
    return cuda_launch(ctx, "attention_forward", err, attention_hopper_forward_kernel<T, width>,
                       dim3((unsigned)(items < most ? items : most)), dim3(tile::threads),
                       tile::shared, q, k, v, c);
}

extern "C" tril_status attention_hopper_forward(struct op_context *ctx, const struct tensor *args,
                                                const struct attention_params *p,
                                                struct tril_error *err) {
    forward_call c;
    int width = (int)args[F_Q].shape[2];
    CUDA_TRY(cuda_scratch(ctx, "attention_forward", 256, &c.next, err));
    c.shape = attention_shape_of(args, p);
    c.o = args[F_O].data;
    c.o_row = args[F_O].stride[0];
    c.o_head = args[F_O].stride[1];
    c.lse = (float *)args[F_LSE].data;
    c.slots = slot_count(c.shape.rows, c.shape.sequences,
                         width == 128 ? forward_tile<128>::rows : forward_tile<64>::rows);
    int64_t held = (int64_t)4 * c.shape.keys * width + 1; /* bytes of a head's keys and values */
    int64_t heads = L2_HELD / held < 1 ? 1 : L2_HELD / held;
    heads = heads < c.shape.kv_heads ? heads : c.shape.kv_heads;
    c.section = (int)heads * (c.shape.heads / c.shape.kv_heads);
    CUDA_TRY(cuda_check(cudaMemsetAsync(c.next, 0, sizeof *c.next, cuda_state_of(ctx)->stream),
                        "attention_forward", err));
    bool brain = args[F_Q].dtype == DT_BF16;
    if (width == 128)
        return brain ? forward_launch<__nv_bfloat16, 128>(ctx, args, c, err)
                     : forward_launch<__half, 128>(ctx, args, c, err);
    return brain ? forward_launch<__nv_bfloat16, 64>(ctx, args, c, err)
                 : forward_launch<__half, 64>(ctx, args, c, err);
}
