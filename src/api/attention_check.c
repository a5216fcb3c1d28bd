/* tril/attention.h: is a description one that can be computed? Every size and stride is checked
 * before anything is multiplied, so that whatever follows can use plain int64 arithmetic. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "api/attention.h"

#define MOST ((int64_t)1 << 62)

__attribute__((format(printf, 2, 3))) static tril_status wrong(struct tril_error *err,
                                                               const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return error_set(err, TRIL_ERR_ARGUMENT, "attention: %s", text);
}

static tril_status check_sizes(const struct tril_attention *a, struct tril_error *err) {
    const struct {
        const char *name;
        int64_t value, most;
    } sizes[] = {{"batch", a->batch, INT32_MAX},       {"heads", a->heads, INT32_MAX},
                 {"kv_heads", a->kv_heads, INT32_MAX}, {"queries", a->queries, INT32_MAX},
                 {"keys", a->keys, INT32_MAX},         {"width", a->width, 256}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            return wrong(err, "%s is %lld; it must be 1 to %lld", sizes[i].name,
                         (long long)sizes[i].value, (long long)sizes[i].most);
    if (a->heads % a->kv_heads != 0)
        return wrong(err,
                     "%lld query heads are not a multiple of %lld key/value heads; give a number "
                     "of key/value heads that divides the query heads",
                     (long long)a->heads, (long long)a->kv_heads);
    if (a->batch * a->heads > INT32_MAX)
        return wrong(err, "batch times heads is %lld; at most 2^31 - 1 can be computed at once",
                     (long long)(a->batch * a->heads));
    int64_t rows = 0, total = 0;
    int64_t longest = a->queries > a->keys ? a->queries : a->keys;
    if (__builtin_mul_overflow(a->batch * a->heads, longest, &rows) ||
        __builtin_mul_overflow(rows, (a->width + 1) * 8, &total) || total > MOST)
        return wrong(err, "%lld x %lld x %lld rows of %lld elements overflow the address space",
                     (long long)a->batch, (long long)a->heads, (long long)longest,
                     (long long)a->width);
    if ((unsigned)a->dtype > TRIL_FP16)
        return wrong(err, "there is no dtype %d; give TRIL_FP32, TRIL_BF16 or TRIL_FP16",
                     (int)a->dtype);
    if ((unsigned)a->implementation > TRIL_ATTENTION_LINEAR)
        return wrong(err, "there is no implementation %d", (int)a->implementation);
    if (a->threads < 0 || a->threads > 4096)
        return wrong(err, "threads is %d; it must be 0 (as set) to 4096", a->threads);
    return TRIL_OK;
}

/* Positive strides whose last element can be addressed; `written`: no two elements are one. */
static tril_status check_strides(const char *name, const int64_t stride[3], int64_t batch,
                                 int64_t heads, int64_t rows, int64_t width, bool written,
                                 struct tril_error *err) {
    static const char *const axes[] = {"batch", "heads", "rows"};
    int64_t count[3] = {batch, heads, rows}, last = width;
    if (stride[0] == 0 && stride[1] == 0 && stride[2] == 0)
        return TRIL_OK;
    for (int i = 0; i < 3; i++) {
        int64_t span;
        if (count[i] == 1)
            continue;
        if (stride[i] < 1)
            return wrong(err,
                         "%s_stride is %lld for its %s; strides are positive (all three 0: dense)",
                         name, (long long)stride[i], axes[i]);
        if (__builtin_mul_overflow(stride[i], count[i] - 1, &span) ||
            __builtin_add_overflow(span, last, &last) || last > MOST / 8)
            return wrong(err, "%s_stride %lld times %lld %s overflows the address space", name,
                         (long long)stride[i], (long long)count[i], axes[i]);
    }
    if (!written)
        return TRIL_OK;
    /* Axes in the order of their strides must each step over all of the axes before. */
    bool done[3] = {false, false, false};
    for (int64_t k = 0, extent = width; k < 3; k++) {
        int at = -1;
        for (int i = 0; i < 3; i++)
            if (!done[i] && count[i] > 1 && (at < 0 || stride[i] < stride[at]))
                at = i;
        if (at < 0)
            break;
        if (stride[at] < extent)
            return wrong(err,
                         "%s_stride is %lld for its %s, which overlap: what is written needs at "
                         "least %lld",
                         name, (long long)stride[at], axes[at], (long long)extent);
        extent += stride[at] * (count[at] - 1);
        done[at] = true;
    }
    return TRIL_OK;
}

static tril_status check_numbers(const struct tril_attention *a, struct tril_error *err) {
    if (!isfinite((float)a->scale))
        return wrong(err, "the scale is %g; it must be a finite number", a->scale);
    if (!(a->softcap >= 0) || !isfinite((float)a->softcap))
        return wrong(err, "the softcap is %g; it must be 0 (none) or a positive number",
                     a->softcap);
    if (a->softcap > 0 && (float)a->softcap < 1e-30f)
        return wrong(err, "the softcap %g is too small to divide by", a->softcap);
    if (!(a->dropout >= 0 && (float)a->dropout < 1))
        return wrong(err, "the dropout probability %g is not in [0, 1)", a->dropout);
    if (a->tile_q < 0 || a->tile_k < 0 || a->tile_q > INT32_MAX || a->tile_k > INT32_MAX)
        return wrong(err, "tiles of %lld rows and %lld keys; give positive sizes, or 0",
                     (long long)a->tile_q, (long long)a->tile_k);
    if (a->dropout > 0 && a->heads * a->queries > UINT32_MAX)
        return wrong(err, "with dropout heads times queries must stay below 2^32");
    return TRIL_OK;
}

static tril_status check_lengths(const struct tril_attention *a, struct tril_error *err) {
    if (!a->query_offsets != !a->key_offsets)
        return wrong(err, "a packed batch needs query_offsets and key_offsets, both");
    if (a->query_offsets && (a->query_lengths || a->key_lengths))
        return wrong(err, "a batch is packed (offsets) or padded (lengths), not both");
    const struct {
        const char *name;
        const int32_t *of;
        int64_t most;
    } lengths[] = {{"query_lengths", a->query_lengths, a->queries},
                   {"key_lengths", a->key_lengths, a->keys}};
    const struct {
        const char *name;
        const int32_t *of;
        int64_t most;
    } offsets[] = {{"query_offsets", a->query_offsets, a->queries},
                   {"key_offsets", a->key_offsets, a->keys}};
    for (int k = 0; k < 2; k++) {
        for (int64_t i = 0; lengths[k].of && i < a->batch; i++)
            if (lengths[k].of[i] < 0 || lengths[k].of[i] > lengths[k].most)
                return wrong(err, "%s[%lld] is %d; it must be 0 to %lld", lengths[k].name,
                             (long long)i, lengths[k].of[i], (long long)lengths[k].most);
        for (int64_t i = 0; offsets[k].of && i <= a->batch; i++)
            if (offsets[k].of[i] < (i ? offsets[k].of[i - 1] : 0) ||
                offsets[k].of[i] > offsets[k].most)
                return wrong(err, "%s[%lld] is %d; offsets ascend from 0 or more to at most %lld",
                             offsets[k].name, (long long)i, offsets[k].of[i],
                             (long long)offsets[k].most);
    }
    return TRIL_OK;
}

static tril_status check_bias(const struct tril_attention *a, struct tril_error *err) {
    int64_t bytes;
    if (a->bias_heads == 0)
        return TRIL_OK;
    if (a->bias_heads != 1 && a->bias_heads != a->heads)
        return wrong(err, "the bias has %lld heads; it must have 1 or %lld",
                     (long long)a->bias_heads, (long long)a->heads);
    if (a->bias_dtype != TRIL_FP32 && a->bias_dtype != TRIL_BF16)
        return wrong(err, "the bias must be fp32 or bf16");
    int64_t cells = a->queries * a->keys; /* both below 2^31 */
    if (__builtin_mul_overflow(cells, a->bias_heads * 8, &bytes) || bytes > MOST)
        return wrong(err, "a bias of %lld x %lld x %lld overflows the address space",
                     (long long)a->bias_heads, (long long)a->queries, (long long)a->keys);
    const int64_t *s = a->bias_stride;
    if (s[0] == 0 && s[1] == 0)
        return TRIL_OK;
    if ((a->bias_heads > 1 && s[0] < 1) || (a->queries > 1 && s[1] < 1) ||
        __builtin_mul_overflow(s[0], 8 * a->bias_heads, &bytes) || bytes > MOST / 2 ||
        __builtin_mul_overflow(s[1], 8 * a->queries, &bytes) || bytes > MOST / 2)
        return wrong(err, "bias_stride is %lld, %lld; strides are positive (both 0: dense)",
                     (long long)s[0], (long long)s[1]);
    return TRIL_OK;
}

static tril_status check_linear(const struct tril_attention *a, struct tril_error *err) {
    if (a->visible && strcmp(a->visible, "causal") != 0 && strcmp(a->visible, "full") != 0)
        return wrong(err, "linear attention takes no rule but causal or full, not '%.60s'",
                     a->visible);
    if (a->queries != a->keys)
        return wrong(err, "linear attention needs as many keys as queries, not %lld and %lld",
                     (long long)a->keys, (long long)a->queries);
    if (a->softcap > 0 || a->dropout > 0 || a->bias_heads > 0)
        return wrong(err, "linear attention has no scores: it takes no softcap, dropout or bias");
    for (int64_t i = 0; i <= a->batch; i++)
        if ((a->query_offsets && a->query_offsets[i] != a->key_offsets[i]) ||
            (i < a->batch && (a->query_lengths || a->key_lengths) &&
             (a->query_lengths ? a->query_lengths[i] : (int32_t)a->queries) !=
                 (a->key_lengths ? a->key_lengths[i] : (int32_t)a->keys)))
            return wrong(err, "linear attention needs as many keys as queries in sequence %lld",
                         (long long)i);
    return TRIL_OK;
}

tril_status attention_check(const struct tril_attention *a, struct tril_error *err) {
    tril_status st = TRIL_OK;
    int64_t B = a->query_offsets ? 1 : a->batch;
    TRY(check_sizes(a, err));
    TRY(check_numbers(a, err));
    TRY(check_lengths(a, err));
    TRY(check_strides("q", a->q_stride, B, a->heads, a->queries, a->width, true, err));
    TRY(check_strides("k", a->k_stride, B, a->kv_heads, a->keys, a->width, false, err));
    TRY(check_strides("v", a->v_stride, B, a->kv_heads, a->keys, a->width, false, err));
    TRY(check_strides("o", a->o_stride, B, a->heads, a->queries, a->width, true, err));
    TRY(check_bias(a, err));
    if (a->implementation == TRIL_ATTENTION_LINEAR)
        TRY(check_linear(a, err));
done:
    return st;
}

tril_status attention_check_written(const struct tril_attention *a, struct tril_error *err) {
    tril_status st = TRIL_OK;
    int64_t B = a->query_offsets ? 1 : a->batch;
    TRY(check_strides("k", a->k_stride, B, a->kv_heads, a->keys, a->width, true, err));
    TRY(check_strides("v", a->v_stride, B, a->kv_heads, a->keys, a->width, true, err));
done:
    return st;
}

tril_status attention_rules(const struct tril_attention *a, struct visible_set *set, bool *given,
                            bool *causal, struct tril_error *err) {
    tril_status st = TRIL_OK;
    *given = false;
    *causal = !a->visible || strcmp(a->visible, "causal") == 0;
    if (*causal || strcmp(a->visible, "full") == 0)
        return TRIL_OK;
    TRY(visible_parse(a->visible, set, err));
    TRY(visible_set_heads(set, a->heads, err));
    if (visible_set_wants_blocks(set)) {
        if (!a->blocks)
            return wrong(err, "the rule 'blocks' needs a list of blocks");
        if (a->block_q < 1 || a->block_k < 1 || a->block_q > INT32_MAX || a->block_k > INT32_MAX)
            return wrong(err,
                         "the blocks of the rule 'blocks' are %lld by %lld; give positive sizes",
                         (long long)a->block_q, (long long)a->block_k);
        visible_set_blocks(set, a->blocks, (a->queries + a->block_q - 1) / a->block_q,
                           (a->keys + a->block_k - 1) / a->block_k, a->block_q, a->block_k);
    }
    *given = true;
done:
    return st;
}
