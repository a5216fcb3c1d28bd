/* What the forward and the backward of relative attention share: arguments as kernels see them, and
 * the products behind a tile of scores.
 *
 *   score_ij = scale (q_i.k_j + u.k_j + q_i.r_t + w.r_t),  t = p_i - j
 *
 * For 64 rows at positions p0 + i and 64 keys j0 + x, t = (p0 - j0) + (i - x): the products of the
 * rows with two neighbouring blocks of 64 distances, `high` from p0 - j0 on and `low` before it,
 * read along the diagonals: (i, x) is (i, i - x) in high if that is not negative, else (i, 64 + i -
 * x) in low. The next tile's other block is one of these, so a tile costs one product of each kind.
 * Blocks lie transposed, [distance][row]. */
#ifndef CUDA_RELATIVE_ATTENTION_CUH
#define CUDA_RELATIVE_ATTENTION_CUH

#include "cuda/tile.cuh"

struct relative_shape {
    const int32_t *q_offsets, *past_start, *past_length; /* past_*: NULL without a past */
    const float *u, *w;                                  /* [H, d] */
    int sequences, rows, past_rows, heads, kv_heads, d, distances;
    float scale;
    int64_t segment, memory;
    bool wide;
};
template <typename T>
struct relative_inputs {
    relative_shape shape;
    heads3<const T> q, k, v, past_k, past_v, r;
};
enum {
    RELATIVE_Q,
    RELATIVE_K,
    RELATIVE_V,
    RELATIVE_OFFSETS,
    RELATIVE_PAST_K,
    RELATIVE_PAST_V,
    RELATIVE_START,
    RELATIVE_LENGTH,
    RELATIVE_U,
    RELATIVE_W,
    RELATIVE_R,
    RELATIVE_O,
    RELATIVE_LSE,
    RELATIVE_DO,
    RELATIVE_DQ,
    RELATIVE_DK,
    RELATIVE_DV,
    RELATIVE_DPAST_K,
    RELATIVE_DPAST_V,
    RELATIVE_DU,
    RELATIVE_DW,
    RELATIVE_DR
};

static inline struct relative_shape relative_shape_of(const struct tensor *args,
                                                      const void *params) {
    const struct relative_attention_params *p = (const struct relative_attention_params *)params;
    struct relative_shape s;
    const bool past = args[RELATIVE_PAST_K].data != NULL;
    s.q_offsets = (const int32_t *)args[RELATIVE_OFFSETS].data;
    s.past_start = past ? (const int32_t *)args[RELATIVE_START].data : NULL;
    s.past_length = past ? (const int32_t *)args[RELATIVE_LENGTH].data : NULL;
    s.u = (const float *)args[RELATIVE_U].data;
    s.w = (const float *)args[RELATIVE_W].data;
    s.sequences = (int)args[RELATIVE_OFFSETS].shape[0] - 1;
    s.rows = (int)args[RELATIVE_Q].shape[0];
    s.past_rows = past ? (int)args[RELATIVE_PAST_K].shape[0] : 0;
    s.heads = (int)args[RELATIVE_Q].shape[1];
    s.kv_heads = (int)args[RELATIVE_K].shape[1];
    s.d = (int)args[RELATIVE_Q].shape[2];
    s.distances = (int)args[RELATIVE_R].shape[0];
    s.scale = p->scale;
    s.segment = p->segment;
    s.memory = p->memory;
    s.wide = true;
    return s;
}
template <typename T>
static inline relative_inputs<T> relative_inputs_of(const struct relative_shape &s,
                                                    const struct tensor *args) {
    return {s,
            heads3_of<const T>(args[RELATIVE_Q]),
            heads3_of<const T>(args[RELATIVE_K]),
            heads3_of<const T>(args[RELATIVE_V]),
            heads3_of<const T>(args[RELATIVE_PAST_K]),
            heads3_of<const T>(args[RELATIVE_PAST_V]),
            heads3_of<const T>(args[RELATIVE_R])};
}

/* A sequence: its own rows begin at `begin`, its past at `past_begin`. */
struct relative_place {
    int begin, own, past_begin, past;
};
__device__ __forceinline__ relative_place relative_place_of(const relative_shape &s, int sequence) {
    relative_place p;
    p.begin = s.q_offsets[sequence];
    p.own = s.q_offsets[sequence + 1] - p.begin;
    p.past_begin = s.past_length ? s.past_start[sequence] : 0;
    p.past = s.past_length ? s.past_length[sequence] : 0;
    return p;
}
/* The first key that the row at position p sees. */
__device__ __forceinline__ int relative_first(const relative_shape &s, int p) {
    if (!s.segment)
        return 0;
    int64_t first = p - p % s.segment - s.memory;
    return first > 0 ? (int)first : 0;
}
/* Row of key j, or NULL where there is none. */
template <typename X>
__device__ __forceinline__ X *relative_key(const relative_place &p, const heads3<X> &own,
                                           const heads3<X> &past, int j, int h) {
    if (j < 0 || j >= p.past + p.own)
        return NULL;
    return j < p.past ? past.at(p.past_begin + j, h) : own.at(p.begin + j - p.past, h);
}

/* Slices in shared memory, and what the products leave: 64 numbers each. */
struct relative_space {
    float *a, *b, *m;       /* slices of q, k, r */
    float *content, *place; /* u.k_j; w.r_t */
};

/* Products of rows i0 + 0..63 of a sequence with keys j0 + 0..63 (scores, if `keys`) and with
 * distances t0 + 0..63, whose products go to `block` with w.r added; u.k to space.content. Ends
 * with a barrier. */
template <typename T>
__device__ __forceinline__ void
relative_products(const relative_inputs<T> &c, const relative_place &p, const relative_space &space,
                  int h, int i0, bool keys, int j0, int t0, float (&scores)[4][4], float *block) {
    const relative_shape &s = c.shape;
    const int t = threadIdx.x, kv_head = h / (s.heads / s.kv_heads), d = s.d;
    float band[4][4], content = 0.0f, place = 0.0f;
    tile_clear(band);
    tile_clear(scores);
    for (int first = 0; first < d; first += SLICE) {
        load_slice<T>(
            space.a, [&](int i) { return i0 + i < p.own ? c.q.at(p.begin + i0 + i, h) : NULL; },
            first, d, s.wide, tile_same());
        if (keys)
            load_slice<T>(
                space.b, [&](int i) { return relative_key(p, c.k, c.past_k, j0 + i, kv_head); },
                first, d, s.wide, tile_same());
        load_slice<T>(
            space.m,
            [&](int i) { return t0 + i >= 0 && t0 + i < s.distances ? c.r.at(t0 + i, h) : NULL; },
            first, d, s.wide, tile_same());
        __syncthreads();
        if (keys)
            tile_product<SLICE>(scores, space.a, space.b);
        tile_product<SLICE>(band, space.a, space.m);
        for (int x = t % 4 * 8; x < t % 4 * 8 + 8 && first + x < d; x++) {
            if (keys)
                content += s.u[(int64_t)h * d + first + x] * space.b[x * TILE_LD + t / 4];
            place += s.w[(int64_t)h * d + first + x] * space.m[x * TILE_LD + t / 4];
        }
        __syncthreads();
    }
#pragma unroll
    for (int x = 1; x < 4; x *= 2) {
        content += __shfl_xor_sync(0xffffffffu, content, x);
        place += __shfl_xor_sync(0xffffffffu, place, x);
    }
    if (t % 4 == 0) {
        space.content[t / 4] = content;
        space.place[t / 4] = place;
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < 4; x++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            band[r][x] += space.place[t % 16 * 4 + x];
    tile_keep_transposed(block, band);
    __syncthreads();
}

/* Where the position's part of pair (i, x) lies. */
__device__ __forceinline__ float *relative_at(float *high, float *low, int i, int x) {
    return i >= x ? high + (i - x) * TILE_LD + i : low + (TILE + i - x) * TILE_LD + i;
}
/* Whether row i0 + i of the sequence sees key j. */
__device__ __forceinline__ bool relative_seen(const relative_shape &s, const relative_place &p,
                                              int i, int j) {
    return i < p.own && j >= 0 && j <= p.past + i && j >= relative_first(s, p.past + i);
}

#endif
