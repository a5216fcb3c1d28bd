/* What happens to attention's scores between q K^T and the exponential: who sees whom, and biases.
 * Shared by the forward and backward kernels, so that both see the same.
 *
 * A call is plain when every rule is causal or full: then keys [0, seen) of a row are visible, and
 * nothing here about rules is used. Otherwise everything goes by rectangles of a unit's rows and
 * keys: one that nobody sees costs one question, one that all see costs no mask, and in between
 * each row gets a word of bits, one for each of 64 keys. */
#ifndef CPU_KERNELS_ATTENTION_SCORE_H
#define CPU_KERNELS_ATTENTION_SCORE_H

#include "cpu/kernels/attention_tile.h"
#include "ops/attention.h"

#define LOG2E 1.44269504088896340736
#define LN2 0.69314718055994530942

/* The rows of a rectangle: [row, row + count) of the rows of sequence s and key/value head kv_head,
 * which are those of all heads of the group, position by position. */
struct row_range {
    int64_t sequence, kv_head, group, row, count;
};

/* Whether some of these rows may see some key of [j0, j1). */
SIMD bool range_any(const struct attention_call *c, const struct row_range *r, int64_t j0,
                    int64_t j1) {
    int64_t h = r->kv_head * r->group;
    int64_t i0 = r->row / r->group, i1 = (r->row + r->count - 1) / r->group + 1;
    return attention_any(c, r->sequence, h, h + r->group, i0, i1, j0, j1);
}

/* Fills the words of these rows for the keys [j0, j0 + count), count <= 64; returns all of them
 * together (0: nobody sees anything). *full says whether everybody sees everything. */
static __attribute__((noinline, unused)) uint64_t range_masks(const struct attention_call *c,
                                                              const struct row_range *r, int64_t j0,
                                                              int64_t count, uint64_t *mask,
                                                              bool *full) {
    int64_t h0 = r->kv_head * r->group, p0 = attention_position(c, r->sequence);
    int64_t i0 = r->row / r->group, i1 = (r->row + r->count - 1) / r->group + 1;
    uint64_t any = 0;
    *full = false;
    if (!range_any(c, r, j0, j0 + count))
        return 0;
    *full = true;
    const struct visible_rule *last = NULL;
    for (int64_t h = h0; h < h0 + r->group && *full; h++) {
        const struct visible_rule *rule = attention_rule(c, h);
        *full = rule == last || visible_all(rule, i0, i1, p0 + i0, j0, j0 + count);
        last = rule;
    }
    if (*full)
        return count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1;
    for (int64_t k = 0; k < r->count; k++) {
        int64_t i = (r->row + k) / r->group, h = h0 + (r->row + k) % r->group;
        mask[k] = visible_mask(attention_rule(c, h), i, p0 + i, j0, (int)count);
        any |= mask[k];
    }
    return any;
}

/* Lanes of vector v of 64 keys whose bit is set. */
SIMD vi mask_lanes(uint64_t mask, int64_t v) {
    vi bit = vi_set(1) << vi_iota();
    return (vi_set((int32_t)(mask >> (v * VF_WIDTH) & ((1u << VF_WIDTH) - 1))) & bit) == bit;
}

/* s[n] + log2(e) bias of query i, head h and the keys from j on. */
SIMD vf add_bias(const struct tensor *bias, int64_t h, int64_t i, int64_t j, int64_t n, vf s) {
    int64_t at = (bias->shape[0] == 1 ? 0 : h) * bias->stride[0] + i * bias->stride[1] + j;
    vf x = vf_zero();
    if (n >= VF_WIDTH)
        x = bias->dtype == DT_F32 ? vf_load_as(bias->data, DT_F32, at, VF_WIDTH)
                                  : vf_load_as(bias->data, DT_BF16, at, VF_WIDTH);
    else if (n > 0)
        x = bias->dtype == DT_F32 ? vf_load_as(bias->data, DT_F32, at, (int)n)
                                  : vf_load_as(bias->data, DT_BF16, at, (int)n);
    return vf_fma(vf_set((float)LOG2E), x, s);
}

#endif
