/* The cache: for each layer of softmax attention slots * capacity rows of K heads, d wide, of which
 * slot s owns rows s * capacity onwards; for each layer of linear attention a state per slot. All
 * in one allocation of fresh pages: memory is taken as the cache fills. */
#include <stdlib.h>

#include "base/memory.h"
#include "model/model.h"

/* Rotated keys serve attention within a segment, raw ones the memory. */
static bool has_raw(const struct model_config *c, int64_t layer) {
    const struct mixer_config *m = model_mixer(c, layer);
    return m->kind == MIXER_MEMORY && mixer_rotates(m) && c->position == POSITION_ROPE;
}

static int64_t aligned(int64_t bytes) {
    return (bytes + MEMORY_ALIGN - 1) / MEMORY_ALIGN * MEMORY_ALIGN;
}

/* Bytes of a recurrent layer's projected positions. */
static int64_t positions_bytes(const struct model_config *c, int64_t layer, enum dtype act) {
    if (model_mixer(c, layer)->kind != MIXER_RECURRENCE)
        return 0;
    return aligned(model_distances(c) * c->heads * c->head_dim * (int64_t)dtype_size(act));
}

static bool has_sums(const struct model_config *c, int64_t layer) {
    return model_mixer(c, layer)->kind == MIXER_LINEAR;
}

/* Bytes of a layer's k (and as much for v), or of its sums; each a multiple of MEMORY_ALIGN. -1:
 * beyond any memory. */
static int64_t layer_bytes(const struct model_config *c, int64_t layer, int64_t slots,
                           int64_t capacity, enum dtype dtype) {
    int64_t rows, bytes;
    if (has_sums(c, layer)) {
        rows = slots;
        bytes = c->kv_heads * c->head_dim * (c->head_dim + 1) * (int64_t)sizeof(float);
    } else {
        if (__builtin_mul_overflow(slots, capacity, &rows))
            return -1;
        bytes = c->kv_heads * c->head_dim * (int64_t)dtype_size(dtype);
    }
    if (__builtin_mul_overflow(rows, bytes, &bytes) || bytes > INT64_MAX / 4 / MODEL_MOST_LAYERS)
        return -1;
    return aligned(bytes);
}

int64_t kv_cache_bytes(const struct model_config *c, int64_t slots, int64_t capacity,
                       enum dtype dtype) {
    int64_t bytes = 0;
    for (int64_t l = 0; l < c->layers; l++) {
        int64_t n = layer_bytes(c, l, slots, capacity, dtype);
        if (n < 0)
            return INT64_MAX;
        bytes += has_sums(c, l) ? n : has_raw(c, l) ? 3 * n : 2 * n;
        bytes += positions_bytes(c, l, dtype == DT_BF16 ? DT_F32 : dtype);
    }
    return bytes;
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
    int64_t bytes = kv_cache_bytes(config, slots, capacity, dtype);
    if (slots < 1 || capacity < 1 || slots > INT32_MAX / capacity || bytes == INT64_MAX)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a key/value cache of %lld sequences of %lld tokens is not possible",
                         (long long)slots, (long long)capacity);
    struct kv_cache *c = calloc(1, sizeof *c);
    if (!c)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a key/value cache");
    *c = (struct kv_cache){.ctx = m->ctx,
                           .act = m->dtype,
                           .dtype = dtype,
                           .slots = slots,
                           .capacity = capacity,
                           .layers = config->layers,
                           .kv_heads = config->kv_heads,
                           .head_dim = config->head_dim};
    const char *what = "the key/value cache";
    size_t count = (size_t)slots;
    TRY(mem_alloc_zero((void **)&c->length, count * sizeof *c->length, what, err));
    TRY(mem_alloc_zero((void **)&c->summed, count * sizeof *c->summed, what, err));
    TRY(mem_alloc_zero((void **)&c->busy, count * sizeof *c->busy, what, err));
    TRY(mem_alloc_zero((void **)&c->layer, (size_t)c->layers * sizeof *c->layer, what, err));
    TRY(m->ctx->backend->alloc(&c->memory, bytes, true, what, err));
    char *at = c->memory;
    for (int64_t l = 0; l < c->layers; l++) {
        int64_t n = layer_bytes(config, l, slots, capacity, dtype);
        if (has_sums(config, l)) {
            c->layer[l].sums = (float *)(void *)at;
            c->sums = true;
        } else {
            c->layer[l].k = at;
            c->layer[l].v = at += n;
            if (has_raw(config, l))
                c->layer[l].raw = at += n;
        }
        at += n;
        if (positions_bytes(config, l, m->dtype) > 0) {
            c->layer[l].r = at;
            at += positions_bytes(config, l, m->dtype);
        }
    }
    *out = c;
    c = NULL;
done:
    kv_cache_free(c);
    return st;
}

void kv_cache_free(struct kv_cache *c) {
    if (!c)
        return;
    c->ctx->backend->release(c->memory);
    mem_free(c->layer);
    mem_free(c->length);
    mem_free(c->summed);
    mem_free(c->busy);
    free(c);
}

int64_t kv_cache_rewind(struct kv_cache *c, int64_t slot, int64_t length) {
    if (length > c->length[slot])
        length = c->length[slot];
    if (c->sums && c->summed[slot] != length)
        length = 0;
    c->length[slot] = (int32_t)length;
    return length;
}
