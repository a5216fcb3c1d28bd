/* The key/value cache: for each layer slots * capacity rows of K heads, d wide; slot s owns rows
 * s * capacity onwards. */
#include <stdlib.h>

#include "base/memory.h"
#include "model/model.h"

int64_t kv_cache_bytes(const struct model_config *c, int64_t slots, int64_t capacity,
                       enum dtype dtype) {
    return 2 * c->layers * slots * capacity * c->kv_heads * c->head_dim *
           (int64_t)dtype_size(dtype);
}

tril_status kv_cache_create(struct kv_cache **out, const struct model *m, int64_t slots,
                            int64_t capacity, enum dtype dtype, struct tril_error *err) {
    tril_status st;
    const struct model_config *config = &m->config;
    *out = NULL;
    if (dtype != DT_F32 && dtype != DT_BF16 && dtype != m->dtype)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "a key/value cache cannot hold %s; choose fp32 or bf16",
                         dtype_name(dtype));
    int64_t rows, bytes;
    if (slots < 1 || capacity < 1 || __builtin_mul_overflow(slots, capacity, &rows) ||
        rows > INT32_MAX ||
        __builtin_mul_overflow(rows, config->layers * config->kv_heads * config->head_dim,
                               &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)dtype_size(dtype), &bytes))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a key/value cache of %lld sequences of %lld tokens is not possible",
                         (long long)slots, (long long)capacity);
    struct kv_cache *c = calloc(1, sizeof *c);
    if (!c)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a key/value cache");
    c->ctx = m->ctx;
    c->dtype = dtype;
    c->slots = slots;
    c->capacity = capacity;
    c->layers = config->layers;
    c->kv_heads = config->kv_heads;
    c->head_dim = config->head_dim;
    TRY(mem_alloc_zero((void **)&c->length, (size_t)slots * sizeof *c->length,
                       "the key/value cache", err));
    TRY(mem_alloc_zero((void **)&c->busy, (size_t)slots * sizeof *c->busy, "the key/value cache",
                       err));
    /* Fresh pages: memory is taken as the cache fills. */
    TRY(m->ctx->backend->alloc(&c->k, bytes, true, "the key/value cache", err));
    TRY(m->ctx->backend->alloc(&c->v, bytes, true, "the key/value cache", err));
    *out = c;
    c = NULL;
done:
    kv_cache_free(c);
    return st;
}

void kv_cache_free(struct kv_cache *c) {
    if (!c)
        return;
    c->ctx->backend->release(c->k);
    c->ctx->backend->release(c->v);
    mem_free(c->length);
    mem_free(c->busy);
    free(c);
}
