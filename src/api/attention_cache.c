/* tril/attention.h: the forward against a key/value cache. One call of the operation where the
 * queries lie as it wants them (packed, or one a sequence), else one for each element. */
#include <string.h>

#include "api/attention.h"
#include "base/memory.h"

#define MOST ((int64_t)1 << 60)

struct cached {
    const struct tril_attention *a;
    const struct tril_attention_cache *cache;
    const struct tril_attention_buffers *b;
    enum dtype dtype, of_cache;
    int64_t calls, sequences; /* of a call */
    bool packed;
    int64_t q_stride[3], o_stride[3];
    struct attention_params params;
    struct visible_set rules;
    struct op_context ctx;
    struct staged staged;
    /* in scratch */
    int32_t *offsets, *start; /* [sequences + 1], [sequences] */
    float *lse;               /* [H, B], where the caller's is [B, H, 1] */
    size_t used;
};

static tril_status wrong(const char *what, struct tril_error *err) {
    return error_set(err, TRIL_ERR_ARGUMENT, "attention with a cache: %s", what);
}

static tril_status check(const struct cached *x, struct tril_error *err) {
    const struct tril_attention *a = x->a;
    const struct tril_attention_cache *c = x->cache;
    int64_t row = c->row_stride ? c->row_stride : a->kv_heads * a->width, elements;
    if (a->dtype == TRIL_FP16)
        return wrong("the queries must be fp32 or bf16", err);
    if (a->implementation == TRIL_ATTENTION_LINEAR || a->dropout > 0)
        return wrong("there is no dropout and no linear attention; that has a state instead", err);
    if ((unsigned)c->dtype > TRIL_CACHE_INT8)
        return wrong("the cache must be fp32, bf16 or 8-bit integers", err);
    if (c->dtype == TRIL_CACHE_FP32 && a->dtype == TRIL_BF16)
        return wrong("under bf16 queries the cache must be bf16 or 8-bit integers", err);
    if (c->rows < 1 || c->rows > INT32_MAX || row < a->kv_heads * a->width ||
        __builtin_mul_overflow(row, c->rows, &elements) || elements > MOST)
        return wrong("it needs 1 to 2^31 - 1 rows, at least Hk d elements apart", err);
    if (!c->lengths || !c->start == !c->pages)
        return wrong("it needs `lengths`, and either `start` or `pages`", err);
    if (c->pages && (c->page_size < 1 || c->page_size > INT32_MAX || c->page_columns < 1 ||
                     c->page_columns > INT32_MAX))
        return wrong("pages need a page_size and page_columns of at least 1", err);
    for (int64_t i = 0; i < a->batch; i++)
        if (c->lengths[i] < 0 || c->lengths[i] > a->keys ||
            (c->pages && c->lengths[i] > c->page_columns * c->page_size))
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "attention with a cache: lengths[%lld] is %d; it must be 0 to %lld "
                             "(keys), and lie on the pages",
                             (long long)i, c->lengths[i], (long long)a->keys);
    return TRIL_OK;
}

static void strides(const int64_t given[3], int64_t out[3], const struct tril_attention *a) {
    bool dense = given[0] == 0 && given[1] == 0 && given[2] == 0;
    out[0] = dense ? a->heads * a->queries * a->width : given[0];
    out[1] = dense ? a->queries * a->width : given[1];
    out[2] = dense ? a->width : given[2];
}

static void *take(struct cached *x, char *memory, int64_t bytes) {
    void *at = memory ? memory + x->used : NULL;
    x->used += ((size_t)bytes + 63) / 64 * 64;
    return at;
}

static void place(struct cached *x, char *memory) {
    x->used = 0;
    x->offsets = take(x, memory, (x->sequences + 1) * 4);
    x->start = take(x, memory, x->sequences * 4);
    bool turned = !x->packed && x->sequences > 1 && x->b && x->b->lse;
    x->lse = turned ? take(x, memory, x->sequences * x->a->heads * 4) : NULL;
}

static tril_status cached_open(struct cached *x, const struct tril_attention *a,
                               const struct tril_attention_cache *cache,
                               const struct tril_attention_buffers *b, struct tril_error *err) {
    tril_status st = TRIL_OK;
    bool given;
    struct tril_attention without = *a; /* of the keys' own layout */
    *x = (struct cached){.a = a, .cache = cache, .b = b};
    memset(without.k_stride, 0, sizeof without.k_stride);
    memset(without.v_stride, 0, sizeof without.v_stride);
    without.key_lengths = NULL;
    without.key_offsets = without.query_offsets; /* (both or none) */
    if (a->query_offsets)
        without.keys = a->keys > a->queries ? a->keys : a->queries;
    TRY(attention_check(&without, err));
    TRY(check(x, err));
    x->dtype = attention_dtype(a->dtype);
    x->of_cache = cache->dtype == TRIL_CACHE_FP32   ? DT_F32
                  : cache->dtype == TRIL_CACHE_BF16 ? DT_BF16
                                                    : DT_I8;
    x->packed = a->query_offsets != NULL;
    bool together = x->packed || (a->queries == 1 && !a->query_lengths);
    x->sequences = together ? a->batch : 1;
    x->calls = together ? 1 : a->batch;
    strides(a->q_stride, x->q_stride, a);
    strides(a->o_stride, x->o_stride, a);
    x->params = (struct attention_params){
        .scale = (float)a->scale,
        .softcap = (float)a->softcap,
        .page_size = cache->pages ? (int32_t)cache->page_size : 0,
        .implementation = a->implementation == TRIL_ATTENTION_FUSED ? ATTENTION_FUSED
                          : a->implementation == TRIL_ATTENTION_MATERIALISED
                              ? ATTENTION_MATERIALISED
                              : ATTENTION_FLASH,
        .block_q = (int32_t)a->tile_q,
        .block_k = (int32_t)a->tile_k,
    };
    TRY(attention_rules(a, &x->rules, &given, &x->params.causal, err));
    if (given) {
        x->params.rules = x->rules.rules;
        x->params.rule_count = x->rules.rule_count;
        x->params.head_rule = x->rules.rule_count > 1 ? x->rules.head_rule : NULL;
    }
    TRY(attention_open(a, &x->ctx, &x->staged, err));
    place(x, NULL);
done:
    return st;
}

static void cached_close(struct cached *x) {
    visible_set_free(&x->rules);
    op_context_free(&x->ctx);
    staged_close(&x->staged);
}

/* The queries (or outputs) of call i as [rows, H, d]. */
static struct tensor rows(const struct cached *x, const void *data, const int64_t stride[3],
                          int64_t i) {
    const struct tril_attention *a = x->a;
    bool each = x->calls > 1 || !(x->packed || a->queries == 1);
    int64_t n = x->packed || each ? a->queries : a->batch;
    char *at = (char *)(uintptr_t)data + i * stride[0] * (int64_t)dtype_size(x->dtype);
    return (struct tensor){at,
                           x->dtype,
                           3,
                           {n, a->heads, a->width, 1},
                           {x->packed || each ? stride[2] : stride[0], stride[1], 1, 1}};
}

static struct tensor keys(const struct cached *x, const void *data) {
    const struct tril_attention *a = x->a;
    struct tensor t =
        tensor_3d((void *)(uintptr_t)data, x->of_cache, x->cache->rows, a->kv_heads, a->width);
    if (x->cache->row_stride)
        t.stride[0] = x->cache->row_stride;
    return t;
}

static struct tensor optional_1d(const void *data, enum dtype t, int64_t n) {
    return data ? tensor_1d((void *)(uintptr_t)data, t, n) : tensor_none();
}

/* Call i; bytes not NULL: only says what it needs. */
static tril_status call(struct cached *x, int64_t i, int64_t *bytes, struct tril_error *err) {
    const struct tril_attention *a = x->a;
    const struct tril_attention_cache *c = x->cache;
    const struct tril_attention_buffers *b = x->b;
    int64_t S = x->sequences, heads = a->heads;
    struct tensor q = rows(x, b->q, x->q_stride, i), o = rows(x, b->o, x->o_stride, i), lse;
    float *to = x->lse ? x->lse : b->lse ? b->lse + i * heads * a->queries : NULL;
    lse = to ? tensor_2d(to, DT_F32, heads, q.shape[0]) : tensor_none();
    for (int64_t s = 0; s <= S; s++)
        x->offsets[s] = x->packed          ? a->query_offsets[s]
                        : a->query_lengths ? (s ? a->query_lengths[i] : 0)
                        : S > 1            ? (int32_t)s
                                           : (int32_t)(s * q.shape[0]);
    for (int64_t s = 0; s < S; s++)
        x->start[s] = c->start ? c->start[i + s] : 0;
    struct attention_inputs in = {
        .q = q,
        .k = keys(x, c->k),
        .v = keys(x, c->v),
        .q_offsets = tensor_1d(x->offsets, DT_I32, S + 1),
        .kv_start = tensor_1d(x->start, DT_I32, S),
        .kv_length = tensor_1d((int32_t *)(uintptr_t)(c->lengths + i), DT_I32, S),
        .slopes = optional_1d(b->slopes, DT_F32, heads),
        .sink = optional_1d(b->sink, DT_F32, heads),
    };
    if (c->pages)
        in.pages = tensor_2d((int32_t *)(uintptr_t)(c->pages + i * c->page_columns), DT_I32, S,
                             c->page_columns);
    if (x->of_cache == DT_I8) {
        in.k_scale = tensor_2d((float *)(uintptr_t)c->k_scale, DT_F32, c->rows, a->kv_heads);
        in.v_scale = tensor_2d((float *)(uintptr_t)c->v_scale, DT_F32, c->rows, a->kv_heads);
    }
    if (a->bias_heads > 0) {
        in.bias = tensor_3d((void *)(uintptr_t)b->bias, attention_dtype(a->bias_dtype),
                            a->bias_heads, a->queries, a->keys);
        if (a->bias_stride[0] || a->bias_stride[1]) {
            in.bias.stride[0] = a->bias_stride[0];
            in.bias.stride[1] = a->bias_stride[1];
        }
    }
    if (bytes)
        return attention_scratch(&x->ctx, &in, o, lse, tensor_none(), NULL, &x->params, bytes, err);
    tril_status st = attention_forward(&x->ctx, &in, o, lse, &x->params, err);
    for (int64_t s = 0; x->lse && st == TRIL_OK && s < S; s++)
        for (int64_t h = 0; h < heads; h++)
            b->lse[s * heads + h] = x->lse[h * S + s];
    return st;
}

tril_status tril_attention_cached_scratch(const struct tril_attention *a,
                                          const struct tril_attention_cache *cache, size_t *bytes,
                                          struct tril_error *err) {
    static char here; /* stands for every tensor: nothing is read or written */
    static float number;
    struct tril_attention_buffers b = {.q = &here,
                                       .slopes = &number,
                                       .bias = a->bias_heads ? &here : NULL,
                                       .sink = &number,
                                       .o = &here,
                                       .lse = &number};
    struct tril_attention_cache there = *cache;
    struct cached x = {0};
    void *memory = NULL;
    int64_t most = 0, one = 0;
    tril_status st = TRIL_OK;
    there.k = there.v = &here;
    there.k_scale = there.v_scale = &number;
    TRY(cached_open(&x, a, &there, &b, err));
    *bytes = x.used + 2 * MEMORY_ALIGN;
    if (a->implementation == TRIL_ATTENTION_REFERENCE)
        goto done; /* takes what it needs by itself */
    TRY(mem_alloc(&memory, x.used, "attention", err));
    place(&x, memory);
    int threads = attention_threads_set(a);
    for (int64_t i = 0; i < x.calls && st == TRIL_OK; i++) {
        st = call(&x, i, &one, err);
        most = one > most ? one : most;
    }
    attention_threads_restore(a, threads);
    *bytes += (size_t)most + MEMORY_ALIGN;
done:
    cached_close(&x);
    mem_free(memory);
    return st;
}

tril_status tril_attention_cached(const struct tril_attention *a,
                                  const struct tril_attention_cache *cache,
                                  const struct tril_attention_buffers *b, void *scratch,
                                  size_t scratch_bytes, struct tril_error *err) {
    struct cached x = {0};
    void *own = NULL;
    tril_status st = TRIL_OK;
    TRY(cached_open(&x, a, cache, b, err));
    if (!b->q || !b->o || !cache->k || !cache->v) {
        st = wrong("q, o or the cache's k or v is missing (NULL)", err);
        goto done;
    }
    if (x.of_cache == DT_I8 && (!cache->k_scale || !cache->v_scale)) {
        st = wrong("8-bit integers need k_scale and v_scale", err);
        goto done;
    }
    if (!b->bias != (a->bias_heads == 0)) {
        st = wrong("bias and bias_heads must be given both or neither", err);
        goto done;
    }
    if (scratch) {
        size_t skip = -(uintptr_t)scratch % MEMORY_ALIGN;
        if (scratch_bytes < skip + x.used) {
            st = error_set(err, TRIL_ERR_MEMORY,
                           "attention: %zu bytes of scratch are too few; "
                           "tril_attention_cached_scratch says how many it takes",
                           scratch_bytes);
            goto done;
        }
        char *memory = (char *)scratch + skip;
        place(&x, memory);
        op_context_lend(&x.ctx, memory + x.used, (int64_t)(scratch_bytes - skip - x.used));
    } else {
        TRY(mem_alloc(&own, x.used, "attention", err));
        place(&x, own);
    }
    int threads = attention_threads_set(a);
    for (int64_t i = 0; i < x.calls && st == TRIL_OK; i++)
        st = call(&x, i, NULL, err);
    attention_threads_restore(a, threads);
done:
    cached_close(&x);
    mem_free(own);
    return st;
}
