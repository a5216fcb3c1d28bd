/* What attention's kernels share: the call as the GPU sees it, tiles of rows and keys of sequences
 * whose lengths only the GPU knows, scores, dropout and the end of a row's softmax.
 *
 * Lengths are never read on the host. Tiles of sequences of unknown lengths are numbered so that a
 * block finds its own by bisection: cut the rows [offset(u), offset(u+1)) of segment u into tiles
 * of `per`, and let its tiles begin at number offset(u) / per + u. These numbers ascend strictly,
 * leave at least as much room as there are tiles, and end at rows / per + segments. */
#ifndef CUDA_ATTENTION_CUH
#define CUDA_ATTENTION_CUH

#include "cuda/visible.cuh"

extern "C" {
#include "ops/attention.h"
}

struct heads_view { /* [rows, heads, d] */
    char *data;
    int64_t row, head; /* in elements */
    int dtype;
};

enum { NEAR_RULES = 256 }; /* words of rules that travel as a parameter */

struct attention_view {
    heads_view q, k, v, o, dout, dq, dk, dv;
    float *lse, *delta;
    const float *slopes, *sink, *k_scale, *v_scale;
    const int64_t *step;
    const int32_t *q_offsets, *kv_start, *kv_length, *pages;
    const char *bias;
    float *dbias, *dsink;
    int64_t bias_head, bias_row, dbias_head, dbias_row;
    int bias_dtype, bias_heads, bias_rows, bias_columns;
    int rows, keys, heads, kv_heads, group, width, sequences, page_columns, page_size;
    float scale, softcap, dropout;
    struct random_key key;
    const int32_t *far_rules; /* NULL: near_rules */
    int32_t near_rules[NEAR_RULES];
    __device__ __forceinline__ const int32_t *rules() const {
        return far_rules ? far_rules : near_rules;
    }
};

static const float LOG2E = 1.4426950408889634f, LN2 = 0.69314718055994531f;

/* ------------------------------------------------------------------ elements */

__device__ __forceinline__ float load_any(const char *p, int dtype, int64_t i) {
    switch (dtype) {
    case DT_F32:
        return ((const float *)p)[i];
    case DT_BF16:
        return to_float(((const __nv_bfloat16 *)p)[i]);
    case DT_F16:
        return to_float(((const __half *)p)[i]);
    default:
        return (float)((const signed char *)p)[i];
    }
}
__device__ __forceinline__ void store_any(char *p, int dtype, int64_t i, float x) {
    if (dtype == DT_F32)
        ((float *)p)[i] = x;
    else if (dtype == DT_BF16)
        ((__nv_bfloat16 *)p)[i] = from_float<__nv_bfloat16>(x);
    else
        ((__half *)p)[i] = from_float<__half>(x);
}

/* ------------------------------------------------------------------ tiles */

/* Where segment u of the query rows begins: before the sequences, the sequences, after them. */
__device__ __forceinline__ int row_segment(const attention_view &a, int u) {
    return u == 0 ? 0 : u <= a.sequences + 1 ? a.q_offsets[u - 1] : a.rows;
}
/* The same of the keys, with what lies between the sequences' keys: sequence s is 2 s + 1. */
__device__ __forceinline__ int key_segment(const attention_view &a, int u) {
    int s = (u - 1) / 2;
    if (u == 0)
        return 0;
    if (s >= a.sequences)
        return a.keys;
    return a.kv_start[s] + (u % 2 ? 0 : a.kv_length[s]);
}
/* Tile `number`: the segment it belongs to, and its first element within. */
template <typename F>
__device__ __forceinline__ int find_tile(int number, int per, int segments, int *first, F begin) {
    int low = 0, high = segments - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (begin(middle) / per + middle <= number)
            low = middle;
        else
            high = middle - 1;
    }
    *first = (number - begin(low) / per - low) * per;
    return low;
}
static inline unsigned row_tiles(const attention_view &a, int per) {
    return (unsigned)(a.rows / per + a.sequences + 2);
}
static inline unsigned key_tiles(const attention_view &a, int per) {
    return (unsigned)(a.keys / per + 2 * a.sequences + 1);
}

/* Some query rows of one sequence (or of none: s = -1, no keys), or some keys of one. */
struct attention_tile {
    int s, begin, own; /* sequence; its first row in q, and how many */
    int first;         /* of the tile, within the sequence */
    int length, start, position;
};
__device__ __forceinline__ void tile_sequence(const attention_view &a, int s, attention_tile *t) {
    t->s = s;
    t->length = a.kv_length[s];
    t->start = a.kv_start[s];
    t->begin = a.q_offsets[s];
    t->own = a.q_offsets[s + 1] - t->begin;
    t->position = t->length - t->own;
}
/* False: there is no such tile. */
__device__ __forceinline__ bool find_rows(const attention_view &a, int number, int per,
                                          attention_tile *t) {
    int u = find_tile(number, per, a.sequences + 2, &t->first,
                      [&](int i) { return row_segment(a, i); });
    if (u == 0 || u > a.sequences) {
        t->begin = row_segment(a, u);
        t->own = row_segment(a, u + 1) - t->begin;
        t->s = -1;
        t->length = t->start = t->position = 0;
    } else
        tile_sequence(a, u - 1, t);
    return t->first < t->own;
}
__device__ __forceinline__ bool find_keys(const attention_view &a, int number, int per,
                                          attention_tile *t) {
    int u = find_tile(number, per, 2 * a.sequences + 1, &t->first,
                      [&](int i) { return key_segment(a, i); });
    if (u % 2)
        tile_sequence(a, u / 2, t);
    else {
        t->start = key_segment(a, u);
        t->length = key_segment(a, u + 1) - t->start;
        t->s = -1;
        t->begin = t->own = t->position = 0;
    }
    return t->first < t->length;
}
/* The sequence of query row n, or -1. */
__device__ __forceinline__ int sequence_of(const attention_view &a, int n) {
    int low = 0, high = a.sequences - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (a.q_offsets[middle] <= n)
            low = middle;
        else
            high = middle - 1;
    }
    return high >= 0 && n >= a.q_offsets[low] && n < a.q_offsets[low + 1] ? low : -1;
}

/* Row of k and v that holds key j, -1: none (an evicted page, which nobody sees). */
__device__ __forceinline__ int key_row(const attention_view &a, const attention_tile &t, int j) {
    if (!a.pages)
        return t.start + j;
    int page = a.pages[(int64_t)t.s * a.page_columns + j / a.page_size];
    return page < 0 ? -1 : page * a.page_size + j % a.page_size;
}

/* ------------------------------------------------------------------ visibility */

/* Whether rows [i0, i1) see some (or every) key of [j0, j1), over heads [h0, h0 + heads). */
__device__ static inline bool heads_some(const attention_view &a, const attention_tile &t, int h0,
                                         int heads, int i0, int i1, int j0, int j1) {
    const int32_t *words = a.rules();
    heads = visible_heads_differ(words) ? heads : 1;
    for (int h = h0; h < h0 + heads; h++)
        if (visible_some(visible_of(words, h), i0, i1, t.position + i0, j0, j1))
            return true;
    return false;
}
__device__ static inline bool heads_every(const attention_view &a, const attention_tile &t, int h0,
                                          int heads, int i0, int i1, int j0, int j1) {
    const int32_t *words = a.rules();
    heads = visible_heads_differ(words) ? heads : 1;
    for (int h = h0; h < h0 + heads; h++)
        if (!visible_every(visible_of(words, h), i0, i1, t.position + i0, j0, j1))
            return false;
    return true;
}
/* The first tile of `per` keys at or after j0 (below `last`) that some of the rows sees, or `last`.
 * Every lane of a warp asks about a tile of its own. */
__device__ static inline int next_keys(const attention_view &a, const attention_tile &t, int h0,
                                       int heads, int i0, int i1, int j0, int last, int per) {
    for (; j0 < last; j0 += 32 * per) {
        int j = j0 + (int)(threadIdx.x % 32) * per;
        bool some =
            j < last && heads_some(a, t, h0, heads, i0, i1, j, j + per < last ? j + per : last);
        unsigned all = __ballot_sync(0xffffffffu, some);
        if (all)
            return j0 + (__ffs((int)all) - 1) * per;
    }
    return last;
}
/* The same of query rows that see some key of [j0, j1). */
__device__ static inline int next_rows(const attention_view &a, const attention_tile &t, int h,
                                       int i0, int j0, int j1, int per) {
    for (; i0 < t.own; i0 += 32 * per) {
        int i = i0 + (int)(threadIdx.x % 32) * per;
        bool some =
            i < t.own && heads_some(a, t, h, 1, i, i + per < t.own ? i + per : t.own, j0, j1);
        unsigned all = __ballot_sync(0xffffffffu, some);
        if (all)
            return i0 + (__ffs((int)all) - 1) * per;
    }
    return t.own;
}

/* ------------------------------------------------------------------ scores */

/* From q.k: scaled, capped, with slope and bias. *in receives d score / d (q.k). */
__device__ __forceinline__ float attention_score_of(const attention_view &a, float x, int h, int i,
                                                    int p, int j, float slope, float *in) {
    float d = a.scale;
    x *= a.scale;
    if (a.softcap > 0.0f) {
        float t = tanhf(x / a.softcap);
        x = a.softcap * t;
        d *= 1.0f - t * t;
    }
    if (a.slopes)
        x -= slope * fabsf((float)(p - j));
    if (a.bias)
        x += load_any(a.bias, a.bias_dtype,
                      (a.bias_heads == 1 ? 0 : h) * a.bias_head + i * a.bias_row + j);
    *in = d;
    return x;
}

/* The key of dropout's stream with the step put in. */
__device__ __forceinline__ struct random_key dropout_key(const attention_view &a) {
    struct random_key key = a.key;
    if (a.step)
        key.step = (uint64_t)*a.step;
    return key;
}
/* What multiplies the probabilities of keys j .. j + 3 (j a multiple of 4) for head h, row n of q:
 * 0 or 1 / (1 - p). */
__device__ __forceinline__ void dropout_four(const attention_view &a, const struct random_key &key,
                                             int h, int n, int j, float out[4]) {
    uint32_t word[4];
    philox_block(key, ((uint64_t)((int64_t)h * a.rows + n) << 30) + (uint64_t)(j / 4), word);
#pragma unroll
    for (int k = 0; k < 4; k++)
        out[k] = philox_uniform(word[k]) >= a.dropout ? 1.0f / (1.0f - a.dropout) : 0.0f;
}
__device__ __forceinline__ float dropout_one(const attention_view &a, const struct random_key &key,
                                             int h, int n, int j) {
    float four[4];
    dropout_four(a, key, h, n, j & ~3, four);
    return (j & 2) ? (j & 1 ? four[3] : four[2]) : (j & 1 ? four[1] : four[0]);
}

/* The end of a row: m its maximum and l its sum, in powers of 2. Returns what its output is
 * multiplied by; *lse is the natural logarithm of the denominator. `sink` NULL: none. */
__device__ __forceinline__ float attention_finish(float m, float l, const float *sink, float *lse) {
    if (sink) {
        float s = *sink * LOG2E, both = fmaxf(m, s);
        if (both != -INFINITY) {
            float mine = exp2f(m - both);
            l = l * mine + exp2f(s - both);
            *lse = (both + log2f(l)) * LN2;
            return mine / l;
        }
    }
    if (l == 0.0f) {
        *lse = -INFINITY;
        return 0.0f;
    }
    *lse = (m + log2f(l)) * LN2;
    return 1.0f / l;
}

/* How a forward is cut: `fold` heads that share a key/value head lie in one tile of rows (row r of
 * a tile: query r / fold, head r % fold), and keys in pieces of `chunk`, a block each (the last
 * dimension of the grid), whose results are put together afterwards. */
struct attention_cut {
    int fold, chunk, splits; /* splits 1: the output is written at once */
    float2 *part;            /* [splits, H, N]: maximum and sum of a row, in powers of 2 */
    float *part_o;           /* [splits, H, N, d], not yet divided by the sum */
};

/* ------------------------------------------------------------------ bodies
 *
 * In fp32 arithmetic, for everything: attention_fma.cu, attention_fma_backward.cu. */
tril_status attention_fma_forward(struct op_context *ctx, const attention_view &a,
                                  const attention_cut &cut, struct tril_error *err);
tril_status attention_fma_backward(struct op_context *ctx, const attention_view &a,
                                   struct tril_error *err);
tril_status attention_fma_dbias(struct op_context *ctx, const attention_view &a,
                                struct tril_error *err);

/* The textbook's, to compare with: attention_materialised.cu. `scratch` has as many bytes as that
 * says; the backward has a.delta. */
int64_t attention_materialised_bytes(const attention_view &a, const struct attention_params *p,
                                     bool backward);
tril_status attention_materialised(struct op_context *ctx, const attention_view &a,
                                   const struct attention_params *p, bool backward, char *scratch,
                                   struct tril_error *err);

/* On tensor cores: all of q, k, v, o (and their gradients) bf16, or all fp16: attention_mma.cu,
 * attention_mma_backward.cu. */
bool attention_mma_takes_forward(const attention_view &a);
tril_status attention_mma_forward(struct op_context *ctx, const attention_view &a,
                                  const attention_cut &cut, struct tril_error *err);
bool attention_mma_takes_backward(const attention_view &a);
tril_status attention_mma_backward(struct op_context *ctx, const attention_view &a,
                                   struct tril_error *err);

#endif
