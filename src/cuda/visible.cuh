/* Visibility rules on the GPU (definitions: ops/visible.h; the same questions as ops/visible.c, in
 * 32 bits: the host sees to it that positions and sizes stay below 2^30).
 *
 * The rules of a call are packed into words: small sets travel as a kernel's parameter (so that a
 * recorded step replays them), larger ones in scratch. Words: [0] 1 where heads differ, [1 + h] (or
 * [1]) where the rule of head h begins. A rule: causal, parts, then blocks' list, rows, columns,
 * block_q, block_k, then five words for a part. */
#ifndef CUDA_VISIBLE_CUH
#define CUDA_VISIBLE_CUH

#include "cuda/device.cuh"

extern "C" {
#include "ops/visible.h"
}

enum { RULE_CAUSAL, RULE_PARTS, RULE_LIST, RULE_ROWS, RULE_COLUMNS, RULE_Q, RULE_K, RULE_HEAD };
enum { PART_KIND, PART_A, PART_B, PART_REACH, PART_LIST, PART_WORDS };

#define VISIBLE_LIMIT (1 << 30) /* positions and keys lie below */

struct visible_words { /* one head's rule */
    const int32_t *all, *rule;
    __device__ __forceinline__ bool causal() const {
        return rule[RULE_CAUSAL] != 0;
    }
    __device__ __forceinline__ int parts() const {
        return rule[RULE_PARTS];
    }
    __device__ __forceinline__ const int32_t *part(int k) const {
        return rule + RULE_HEAD + k * PART_WORDS;
    }
};

__device__ __forceinline__ bool visible_heads_differ(const int32_t *words) {
    return words[0] != 0;
}
__device__ __forceinline__ visible_words visible_of(const int32_t *words, int head) {
    visible_words w;
    w.all = words;
    w.rule = words + words[words[0] ? 1 + head : 1];
    return w;
}

/* ------------------------------------------------------------------ 64 keys at a time */

__device__ __forceinline__ int floor_div(int a, int b) {
    int q = a / b;
    return q - (a % b < 0);
}
__device__ __forceinline__ int floor_mod(int a, int b) {
    int r = a % b;
    return r < 0 ? r + b : r;
}
/* Bits b of a word with low <= b < high. */
__device__ __forceinline__ uint64_t bits_between(int low, int high) {
    low = max(low, 0);
    high = min(high, 64);
    return low >= high ? 0 : (~(uint64_t)0 >> (64 - high)) & (~(uint64_t)0 << low);
}
__device__ __forceinline__ uint64_t bits_repeat(uint64_t word, int period) {
    for (; period < 64; period *= 2)
        word |= word << period;
    return word;
}
__device__ __forceinline__ uint64_t bits_every(int first, int step) {
    return first >= 64 ? 0 : bits_repeat((uint64_t)1 << first, step);
}
/* Bits b with (j0 + b) mod length >= length - count. */
__device__ static inline uint64_t bits_last_columns(int length, int count, int j0) {
    if (count == 0)
        return 0;
    if (count == length)
        return ~(uint64_t)0;
    int phase = j0 % length, first = length - count - phase;
    if (length >= 64)
        return bits_between(first, length - phase) |
               bits_between(min(first + length, 64), min(length - phase, 64) + length);
    uint64_t all = ((uint64_t)1 << length) - 1, word = all & ~(all >> count);
    return bits_repeat(((word >> phase) | (word << (length - phase))) & all, length);
}
/* Index of the first listed position >= x. */
__device__ static inline int list_find(const int32_t *list, int count, int x) {
    int low = 0, high = count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (list[middle] < x)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}
__device__ static inline bool list_has_between(const int32_t *list, int count, int low, int high) {
    int k = list_find(list, count, low);
    return k < count && list[k] < high;
}
__device__ static inline uint64_t mask_of_blocks(const visible_words &w, int i, int j0, int count) {
    const int32_t *r = w.rule;
    if (i / r[RULE_Q] >= r[RULE_ROWS])
        return 0;
    const uint8_t *row =
        (const uint8_t *)(w.all + r[RULE_LIST]) + (int64_t)(i / r[RULE_Q]) * r[RULE_COLUMNS];
    uint64_t mask = 0;
    for (int c = j0 / r[RULE_K]; c < r[RULE_COLUMNS]; c++) {
        int64_t begin = (int64_t)c * r[RULE_K] - j0, end = begin + r[RULE_K];
        if (begin >= count)
            break;
        if (row[c])
            mask |= bits_between((int)begin, (int)(end < 64 ? end : 64));
    }
    return mask;
}
__device__ static inline uint64_t mask_of_part(const visible_words &w, const int32_t *part, int i,
                                               int p, int j0, int count) {
    int x = p - j0, a = part[PART_A], b = part[PART_B], reach = part[PART_REACH];
    const int32_t *list = w.all + part[PART_LIST];
    uint64_t mask = 0;
    switch (part[PART_KIND]) {
    case VISIBLE_WINDOW:
        return bits_between(x - a + 1, x + a);
    case VISIBLE_SINKS:
        return bits_between(0, a - j0);
    case VISIBLE_GLOBAL:
        if (list_has_between(list, a, p, p + 1))
            return ~(uint64_t)0;
        for (int k = list_find(list, a, j0); k < a && list[k] < j0 + count; k++)
            mask |= (uint64_t)1 << (list[k] - j0);
        return mask;
    case VISIBLE_DILATED:
        if (x - reach >= 64 || x + reach <= 0)
            return 0;
        return bits_between(x - reach + 1, x + reach) & bits_every(floor_mod(x, b), b);
    case VISIBLE_STRIDED:
        return bits_between(x - a + 1, x + a) | bits_every(floor_mod(x, a), a);
    case VISIBLE_FIXED:
        mask = bits_last_columns(a, b, j0); /* fall through */
    case VISIBLE_CHUNK: {
        int begin = p - floor_mod(p, a) - j0;
        return mask | bits_between(begin, begin < 64 ? begin + a : 64);
    }
    default:
        return mask_of_blocks(w, i, j0, count);
    }
}

/* visible_mask of row i at position p: bit b says whether key j0 + b is seen, b < count <= 64. */
__device__ static inline uint64_t visible_bits(const visible_words &w, int i, int p, int j0,
                                               int count) {
    uint64_t allowed = bits_between(0, count), mask = 0;
    if (w.causal())
        allowed &= bits_between(0, p - j0 + 1);
    if (w.parts() == 0 || allowed == 0)
        return allowed;
    for (int k = 0; k < w.parts(); k++)
        mask |= mask_of_part(w, w.part(k), i, p, j0, count);
    return mask & allowed;
}

/* ------------------------------------------------------------------ rectangles
 *
 * Rows [i0, i1), the first at position p0, against keys [j0, j1), none empty. */

struct visible_rectangle {
    int i0, i1, p0, p1, j0, j1, least, most;
};

__device__ __forceinline__ bool multiple_between(int step, int low, int high) {
    return low <= high && floor_div(high, step) * step >= low;
}
__device__ static inline bool blocks_any(const visible_words &w, const visible_rectangle &r,
                                         bool wanted) {
    const int32_t *u = w.rule;
    const uint8_t *list = (const uint8_t *)(w.all + u[RULE_LIST]);
    for (int y = r.i0 / u[RULE_Q]; y <= (r.i1 - 1) / u[RULE_Q]; y++)
        for (int x = r.j0 / u[RULE_K]; x <= (r.j1 - 1) / u[RULE_K]; x++) {
            bool inside = y < u[RULE_ROWS] && x < u[RULE_COLUMNS];
            if ((inside && list[(int64_t)y * u[RULE_COLUMNS] + x] != 0) == wanted)
                return true;
        }
    return false;
}
__device__ __forceinline__ bool same_block_any(int a, const visible_rectangle &r) {
    return floor_div(r.p0, a) <= (r.j1 - 1) / a && r.j0 / a <= floor_div(r.p1 - 1, a);
}
__device__ static inline bool part_any(const visible_words &w, const int32_t *part,
                                       const visible_rectangle &r) {
    int a = part[PART_A], b = part[PART_B], reach = part[PART_REACH];
    const int32_t *list = w.all + part[PART_LIST];
    bool causal = w.causal(), near = r.least < a && r.most > -a;
    switch (part[PART_KIND]) {
    case VISIBLE_WINDOW:
        return near;
    case VISIBLE_SINKS:
        return r.j0 < a;
    case VISIBLE_GLOBAL:
        return list_has_between(list, a, causal ? max(r.p0, r.j0) : r.p0, r.p1) ||
               list_has_between(list, a, r.j0, causal ? min(r.j1, r.p1) : r.j1);
    case VISIBLE_DILATED:
        return multiple_between(b, max(r.least, -reach + 1), min(r.most, reach - 1));
    case VISIBLE_STRIDED:
        return near || multiple_between(a, r.least, r.most);
    case VISIBLE_FIXED: {
        if (same_block_any(a, r))
            return true;
        int phase = r.j0 % a, first = a - b, j = phase >= first ? r.j0 : r.j0 - phase + first;
        return b > 0 && j < r.j1 && (!causal || j < r.p1);
    }
    case VISIBLE_CHUNK:
        return same_block_any(a, r);
    default:
        return blocks_any(w, r, true);
    }
}
__device__ static inline bool visible_some(const visible_words &w, int i0, int i1, int p0, int j0,
                                           int j1) {
    int p1 = p0 + i1 - i0;
    visible_rectangle r = {i0, i1, p0, p1, j0, j1, p0 - (j1 - 1), p1 - 1 - j0};
    if (w.causal()) {
        r.least = max(r.least, 0);
        if (r.least > r.most)
            return false;
    }
    for (int k = 0; k < w.parts(); k++)
        if (part_any(w, w.part(k), r))
            return true;
    return w.parts() == 0;
}
/* Whether all these rows see all these keys; never wrong when it says yes. */
__device__ static inline bool visible_every(const visible_words &w, int i0, int i1, int p0, int j0,
                                            int j1) {
    int p1 = p0 + i1 - i0;
    visible_rectangle r = {i0, i1, p0, p1, j0, j1, p0 - (j1 - 1), p1 - 1 - j0};
    if (w.causal() && r.least < 0)
        return false;
    for (int k = 0; k < w.parts(); k++) {
        const int32_t *part = w.part(k);
        int a = part[PART_A];
        bool near = r.least > -a && r.most < a, all = false;
        switch (part[PART_KIND]) {
        case VISIBLE_WINDOW:
        case VISIBLE_STRIDED:
            all = near;
            break;
        case VISIBLE_SINKS:
            all = j1 <= a;
            break;
        case VISIBLE_GLOBAL:
            break;
        case VISIBLE_DILATED:
            all = near && part[PART_B] == 1;
            break;
        case VISIBLE_FIXED:
        case VISIBLE_CHUNK:
            all = floor_div(min(p0, j0), a) == floor_div(max(p1, j1) - 1, a);
            break;
        default:
            all = !blocks_any(w, r, false);
            break;
        }
        if (all)
            return true;
    }
    return w.parts() == 0;
}

/* ------------------------------------------------------------------ packing, on the host */

static inline int32_t visible_clamped(int64_t x) {
    return (int32_t)(x < VISIBLE_LIMIT ? x : VISIBLE_LIMIT);
}
static inline int64_t visible_block_bytes(const struct visible_rule *r) {
    for (int k = 0; k < r->parts; k++)
        if (r->part[k].kind == VISIBLE_BLOCKS)
            return r->block_rows * r->block_columns;
    return 0;
}
/* Writes the rule at words[at] on; returns where it ends. Only counts where `words` is NULL. */
static inline int64_t visible_pack_rule(const struct visible_rule *r, int32_t *words, int64_t at) {
    int64_t rule = at, bytes = visible_block_bytes(r);
    at += RULE_HEAD + r->parts * PART_WORDS;
    if (words) {
        const int32_t head[RULE_HEAD] = {r->causal,
                                         r->parts,
                                         (int32_t)at,
                                         visible_clamped(r->block_rows),
                                         visible_clamped(r->block_columns),
                                         visible_clamped(r->block_q),
                                         visible_clamped(r->block_k)};
        memcpy(words + rule, head, sizeof head);
        if (bytes)
            memcpy(words + at, r->blocks, (size_t)bytes);
    }
    at += (bytes + 3) / 4;
    for (int k = 0; k < r->parts; k++) {
        const struct visible_part *p = &r->part[k];
        bool global = p->kind == VISIBLE_GLOBAL;
        if (words) {
            int32_t a = visible_clamped(p->a);
            /* the last columns of a block larger than all positions stay where they are */
            int64_t b = p->kind == VISIBLE_FIXED ? p->b - (p->a - a) : p->b;
            const int32_t part[PART_WORDS] = {
                (int32_t)p->kind, a, visible_clamped(b > 0 ? b : 0),
                p->kind == VISIBLE_DILATED ? visible_clamped(p->a * p->b) : 0, (int32_t)at};
            memcpy(words + rule + RULE_HEAD + k * PART_WORDS, part, sizeof part);
            if (global)
                memcpy(words + at, p->list, (size_t)p->a * sizeof *p->list);
        }
        at += global ? p->a : 0;
    }
    return at;
}
/* All rules of a call; returns the number of words. */
static inline int64_t visible_pack(const struct attention_params *p, int64_t heads,
                                   int32_t *words) {
    const struct visible_rule *plain = p->causal ? &visible_causal : &visible_full;
    const struct visible_rule *rules = p->rules ? p->rules : plain;
    int count = p->rules && p->head_rule ? p->rule_count : 1;
    bool differ = count > 1;
    int64_t at = 1 + (differ ? heads : 1);
    if (words)
        words[0] = differ;
    for (int k = 0; k < count; k++) {
        for (int64_t h = 0; words && h < (differ ? heads : 1); h++)
            if (!differ || p->head_rule[h] == k)
                words[1 + h] = (int32_t)at;
        at = visible_pack_rule(&rules[k], words, at);
    }
    return at;
}

#endif
