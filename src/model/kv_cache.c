/* The cache: for each layer of softmax attention slots * rows of K heads, d wide, of which slot s
 * owns rows s * rows onwards: as many as the capacity, or a few pages that roll; for each layer of
 * linear attention a state per slot. All in one allocation of fresh pages: memory is taken as the
 * cache fills. */
#include <stdlib.h>

#include "base/memory.h"
#include "model/model.h"

/* Rotated keys serve attention, raw ones a memory, and rotating anew after an eviction. */
static bool has_raw(const struct model_config *c, int64_t layer, bool stream) {
    const struct mixer_config *m = model_mixer(c, layer);
    return (stream || m->kind == MIXER_MEMORY) && m->kind != MIXER_LINEAR && mixer_rotates(m) &&
           c->position == POSITION_ROPE;
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

/* How a mixer's layers roll: they keep the pages that the first queries of the longest call still
 * see while its last keys are stored. No ring where the sequence fits in no more pages. */
static struct kv_roll roll_make(const struct model_config *c, int mixer, int64_t capacity,
                                int64_t most) {
    struct kv_roll r = {0};
    int64_t first;
    if (!mixer_reach(&c->mixers[mixer], c->heads, &first, &r.reach))
        return r;
    if (most < 1 || most > capacity)
        most = capacity;
    r.twice = c->mixers[mixer].kind == MIXER_RECURRENCE;
    r.first = (first + KV_PAGE - 1) / KV_PAGE;
    r.ring = (r.reach + most + KV_PAGE - 1) / KV_PAGE + 1;
    if (kv_roll_rows(&r, capacity) >= (capacity + KV_PAGE - 1) / KV_PAGE * KV_PAGE)
        return (struct kv_roll){0};
    return r;
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

/* Bytes of the scales of k, and as many of v, where they are i8. */
static int64_t scale_bytes(const struct model_config *c, int64_t layer, int64_t slots, int64_t rows,
                           enum dtype dtype) {
    if (dtype != DT_I8 || has_sums(c, layer))
        return 0;
    return aligned(slots * rows * c->kv_heads * (int64_t)sizeof(float));
}

static int64_t cache_bytes(const struct model_config *c, int64_t slots, int64_t capacity,
                           int64_t most, enum dtype dtype, bool stream) {
    int64_t bytes = 0, rows[MODEL_MOST_MIXERS];
    for (int i = 0; i < model_mixer_count(c); i++) {
        struct kv_roll roll = roll_make(c, i, capacity, stream ? capacity : most);
        rows[i] = kv_roll_rows(&roll, capacity);
    }
    for (int64_t l = 0; l < c->layers; l++) {
        int64_t n = layer_bytes(c, l, slots, rows[c->layer_mixer[l]], dtype);
        if (n < 0)
            return INT64_MAX;
        bytes += has_sums(c, l) ? n : has_raw(c, l, stream) ? 3 * n : 2 * n;
        bytes += 2 * scale_bytes(c, l, slots, rows[c->layer_mixer[l]], dtype);
        bytes += positions_bytes(c, l, dtype_size(dtype) <= 2 ? DT_F32 : dtype);
    }
    return bytes;
}

int64_t kv_cache_bytes(const struct model_config *c, int64_t slots, int64_t capacity, int64_t most,
                       enum dtype dtype) {
    return cache_bytes(c, slots, capacity, most, dtype, false);
}

/* The page tables, which never change: what a key's page held before is hidden by the rules. */
static tril_status rolls_create(struct kv_cache *c, const struct model_config *config,
                                struct tril_error *err) {
    tril_status st = TRIL_OK;
    const char *what = "the key/value cache's pages";
    for (int i = 0; i < model_mixer_count(config); i++) {
        struct kv_roll *r = &c->roll[i];
        *r = roll_make(config, i, c->capacity, c->most);
        if (!r->ring)
            continue;
        c->rolls = true;
        int64_t count = c->slots * c->columns, bytes = count * (int64_t)sizeof *r->host;
        TRY(mem_alloc((void **)&r->host, (size_t)bytes, what, err));
        TRY(c->ctx->backend->alloc((void **)&r->table, 2 * bytes, true, what, err));
        for (int64_t k = 0; k < count; k++)
            r->host[k] = (int32_t)(k / c->columns * (kv_roll_rows(r, c->capacity) / KV_PAGE) +
                                   kv_roll_page(r, k % c->columns));
        TRY(c->ctx->backend->upload(c->ctx, r->table, r->host, bytes, err));
    }
done:
    return st;
}

static tril_status create(struct kv_cache **out, const struct model *m, int64_t slots,
                          int64_t capacity, int64_t most, enum dtype dtype, bool stream,
                          struct tril_error *err) {
    tril_status st;
    const struct model_config *config = &m->config;
    *out = NULL;
    bool recalls = stream;
    for (int64_t l = 0; l < config->layers; l++)
        recalls = recalls || mixer_recalls(model_mixer(config, l));
    if (dtype == DT_I8 && recalls)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "keys of 8 bits can neither be rotated anew nor recalled by recurrence "
                         "and memory layers; choose a cache of fp32 or bf16");
    if (dtype != DT_F32 && dtype != DT_BF16 && dtype != DT_I8 && dtype != m->dtype)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "a key/value cache cannot hold %s; choose fp32, bf16 or 8 bits",
                         dtype_name(dtype));
    int64_t bytes = slots < 1 || capacity < 1 || slots > INT32_MAX / 2 / capacity
                        ? INT64_MAX
                        : cache_bytes(config, slots, capacity, most, dtype, stream);
    if (bytes == INT64_MAX)
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
                           .most = most > 0 && most < capacity && !stream ? most : capacity,
                           .columns = (capacity + KV_PAGE - 1) / KV_PAGE,
                           .layers = config->layers,
                           .kv_heads = config->kv_heads,
                           .head_dim = config->head_dim};
    const char *what = "the key/value cache";
    size_t count = (size_t)slots;
    TRY(mem_alloc_zero((void **)&c->length, count * sizeof *c->length, what, err));
    TRY(mem_alloc_zero((void **)&c->reached, count * sizeof *c->reached, what, err));
    TRY(mem_alloc_zero((void **)&c->summed, count * sizeof *c->summed, what, err));
    TRY(mem_alloc_zero((void **)&c->busy, count * sizeof *c->busy, what, err));
    TRY(mem_alloc_zero((void **)&c->layer, (size_t)c->layers * sizeof *c->layer, what, err));
    TRY(m->ctx->backend->alloc(&c->memory, bytes, true, what, err));
    TRY(rolls_create(c, config, err));
    char *at = c->memory;
    for (int64_t l = 0; l < c->layers; l++) {
        int64_t rows = kv_roll_rows(&c->roll[config->layer_mixer[l]], capacity);
        int64_t n = layer_bytes(config, l, slots, rows, dtype);
        if (has_sums(config, l)) {
            c->layer[l].sums = (float *)(void *)at;
            c->sums = true;
        } else {
            c->layer[l].k = at;
            c->layer[l].v = at += n;
            if (has_raw(config, l, stream))
                c->layer[l].raw = at += n;
        }
        at += n;
        if (scale_bytes(config, l, slots, rows, dtype) > 0) {
            c->layer[l].k_scale = (float *)(void *)at;
            at += scale_bytes(config, l, slots, rows, dtype);
            c->layer[l].v_scale = (float *)(void *)at;
            at += scale_bytes(config, l, slots, rows, dtype);
        }
        if (positions_bytes(config, l, m->dtype) > 0) {
            c->layer[l].r = at;
            at += positions_bytes(config, l, m->dtype);
        }
    }
    if (stream) {
        int64_t row = c->kv_heads * c->head_dim * (int64_t)dtype_size(dtype);
        TRY(m->ctx->backend->alloc(&c->spare, capacity * row, false, what, err));
        TRY(m->ctx->backend->alloc((void **)&c->rows, capacity * (int64_t)sizeof *c->rows, false,
                                   what, err));
        TRY(mem_alloc((void **)&c->list, (size_t)capacity * sizeof *c->list, what, err));
    }
    *out = c;
    c = NULL;
done:
    kv_cache_free(c);
    return st;
}

tril_status kv_cache_create(struct kv_cache **out, const struct model *m, int64_t slots,
                            int64_t capacity, int64_t most, enum dtype dtype,
                            struct tril_error *err) {
    return create(out, m, slots, capacity, most, dtype, false, err);
}

static bool retrieves(const struct model_config *c, int64_t layer) {
    const struct mixer_config *m = model_mixer(c, layer);
    return m->kind == MIXER_ATTENTION && !m->rules[0] && m->softcap == 0 && !m->learned_sinks &&
           (c->position != POSITION_ALIBI || m->no_position);
}

tril_status kv_cache_create_retrieve(struct kv_cache **out, const struct model *m, int64_t slots,
                                     int64_t capacity, enum dtype dtype,
                                     const struct kv_retrieve *r, struct tril_error *err) {
    tril_status st;
    const struct backend *b = m->ctx->backend;
    const char *what = "the bounds of a cache";
    const int64_t word = (int64_t)sizeof(float);
    int64_t seen = r->first + r->last + r->top;
    TRY(create(out, m, slots, capacity, 0, dtype, false, err));
    struct kv_cache *c = *out;
    if (dtype == DT_I8) {
        st = error_set(err, TRIL_ERR_UNSUPPORTED,
                       "a cache of 8 bits cannot be searched; choose fp32 or bf16 for retrieval");
        goto done;
    }
    if (r->top < 1 || r->block < 1 || r->block > capacity || r->first < 0 || r->last < 1 ||
        seen > INT32_MAX / r->block || (slots > 1 && capacity % r->block)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "a cache of %lld tokens cannot be searched for %lld blocks of %lld",
                       (long long)capacity, (long long)r->top, (long long)r->block);
        goto done;
    }
    c->retrieve = *r;
    c->heads = m->config.heads;
    int64_t blocks = (slots * capacity + r->block - 1) / r->block;
    int64_t bytes = blocks * c->kv_heads * c->head_dim * word;
    TRY(b->alloc((void **)&c->blocks, slots * c->kv_heads * seen * word, false, what, err));
    TRY(b->alloc((void **)&c->lse, 2 * c->heads * slots * word, false, what, err));
    for (int64_t l = 0; l < c->layers; l++)
        if (retrieves(&m->config, l)) {
            TRY(b->alloc((void **)&c->layer[l].low, bytes, true, what, err));
            TRY(b->alloc((void **)&c->layer[l].high, bytes, true, what, err));
        }
done:
    if (st != TRIL_OK) {
        kv_cache_free(*out);
        *out = NULL;
    }
    return st;
}

tril_status kv_cache_create_stream(struct kv_cache **out, const struct model *m, int64_t slots,
                                   int64_t capacity, enum dtype dtype, struct tril_error *err) {
    return create(out, m, slots, capacity, 0, dtype, true, err);
}

void kv_cache_free(struct kv_cache *c) {
    if (!c)
        return;
    c->ctx->backend->release(c->memory);
    c->ctx->backend->release(c->spare);
    c->ctx->backend->release(c->blocks);
    c->ctx->backend->release(c->lse);
    for (int64_t l = 0; c->layer && l < c->layers; l++) {
        c->ctx->backend->release(c->layer[l].low);
        c->ctx->backend->release(c->layer[l].high);
    }
    c->ctx->backend->release(c->rows);
    mem_free(c->list);
    for (int i = 0; i < MODEL_MOST_MIXERS; i++) {
        c->ctx->backend->release(c->roll[i].table);
        mem_free(c->roll[i].host);
    }
    mem_free(c->layer);
    mem_free(c->length);
    mem_free(c->reached);
    mem_free(c->summed);
    mem_free(c->busy);
    free(c);
}

/* Whether the pages that queries from `length` on see are still those that were stored. */
static bool pages_intact(const struct kv_cache *c, int64_t slot, int64_t length) {
    const int64_t last = (c->reached[slot] - 1) / KV_PAGE; /* the last page written */
    for (int i = 0; i < MODEL_MOST_MIXERS; i++) {
        const struct kv_roll *r = &c->roll[i];
        int64_t oldest = (length - c->roll[i].reach + 1) / KV_PAGE;
        oldest = oldest < r->first ? r->first : oldest;
        if (r->ring && last >= r->first && oldest <= last - r->ring)
            return false;
    }
    return true;
}

int64_t kv_cache_rewind(struct kv_cache *c, int64_t slot, int64_t length) {
    if (length > c->length[slot])
        length = c->length[slot];
    if ((c->sums && c->summed[slot] != length) || !pages_intact(c, slot, length))
        length = 0;
    c->length[slot] = (int32_t)length;
    if (length == 0)
        c->reached[slot] = 0;
    return length;
}

/* Rows [first + count, length) of a slot move to `first`: out through the spare rows. */
static tril_status rows_move(struct kv_cache *c, void *x, int64_t slot, int64_t first, int64_t kept,
                             struct tril_error *err) {
    tril_status st;
    const int64_t width = c->kv_heads * c->head_dim, begin = slot * c->capacity + first;
    char *to = (char *)x + begin * width * (int64_t)dtype_size(c->dtype);
    TRY(gather_rows(c->ctx, tensor_2d(x, c->dtype, c->slots * c->capacity, width),
                    tensor_1d(c->rows, DT_I32, kept), tensor_2d(c->spare, c->dtype, kept, width),
                    err));
    TRY(cast(c->ctx, tensor_1d(c->spare, c->dtype, kept * width),
             tensor_1d(to, c->dtype, kept * width), err));
done:
    return st;
}

/* Keys [first, first + kept) of a slot, rotated anew from the raw ones; c->rows holds positions. */
static tril_status rows_rotate(struct kv_cache *c, const struct model *m, int64_t l, int64_t slot,
                               int64_t first, int64_t kept, struct tril_error *err) {
    tril_status st;
    const struct model_config *config = &m->config;
    const struct mixer_tables *t = &m->mixers[config->layer_mixer[l]];
    const int64_t width = c->kv_heads * c->head_dim;
    const int64_t at = (slot * c->capacity + first) * width * (int64_t)dtype_size(c->dtype);
    const int64_t R = config->rope_dim / 2;
    char *k = (char *)c->layer[l].k + at;
    TRY(cast(c->ctx, tensor_1d((char *)c->layer[l].raw + at, c->dtype, kept * width),
             tensor_1d(k, c->dtype, kept * width), err));
    TRY(rope_forward(
        c->ctx, tensor_3d(k, c->dtype, kept, c->kv_heads, c->head_dim),
        tensor_1d(c->rows, DT_I32, kept), tensor_2d(t->rope_cos, model_wide(m), config->context, R),
        tensor_2d(t->rope_sin, model_wide(m), config->context, R), (struct rope_params){0}, err));
done:
    return st;
}

tril_status kv_cache_evict(struct kv_cache *c, const struct model *m, int64_t slot, int64_t first,
                           int64_t count, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct backend *b = c->ctx->backend;
    const int64_t length = c->length[slot], kept = length - first - count;
    if (!c->spare || first < 0 || count < 0 || kept < 0)
        return error_set(err, TRIL_ERR_INTERNAL,
                         "tokens %lld to %lld cannot leave a cache that holds %lld",
                         (long long)first, (long long)(first + count), (long long)length);
    for (int64_t i = 0; i < kept; i++)
        c->list[i] = (int32_t)(slot * c->capacity + first + count + i);
    TRY(b->upload(c->ctx, c->rows, c->list, kept * (int64_t)sizeof *c->list, err));
    for (int64_t l = 0; l < c->layers && kept > 0; l++) {
        struct kv_layer *layer = &c->layer[l];
        if (!layer->k)
            continue;
        TRY(rows_move(c, layer->v, slot, first, kept, err));
        TRY(rows_move(c, layer->raw ? layer->raw : layer->k, slot, first, kept, err));
    }
    for (int64_t i = 0; i < kept; i++)
        c->list[i] = (int32_t)(first + i);
    TRY(b->upload(c->ctx, c->rows, c->list, kept * (int64_t)sizeof *c->list, err));
    for (int64_t l = 0; l < c->layers && kept > 0; l++)
        if (c->layer[l].raw)
            TRY(rows_rotate(c, m, l, slot, first, kept, err));
    c->length[slot] = (int32_t)(first + kept);
    if (c->summed[slot] == length) /* sums forget nothing */
        c->summed[slot] = c->length[slot];
done:
    return st;
}
