/* Rings of states and of keys and values: allocation, saving. */
#include "model/carry.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "formats/safetensors.h"

int64_t carry_segment(const struct model_config *c) {
    const struct mixer_config *m = model_recalls(c, MIXER_RECURRENCE);
    m = m ? m : model_recalls(c, MIXER_MEMORY);
    return m ? m->segment : 0;
}

static int64_t ring_rows(const struct mixer_config *m) {
    return m ? (int64_t)m->keep + m->segment : 0;
}

/* Bytes of a layer's x, or of its k (and as much for v). */
static int64_t layer_bytes(const struct model_config *c, int64_t l, int64_t slots, enum dtype act) {
    const struct mixer_config *m = model_mixer(c, l);
    int64_t size = 0;
    if (m->kind == MIXER_RECURRENCE)
        size = c->dim * (int64_t)dtype_size(act == DT_F64 ? DT_F64 : DT_F32);
    else if (m->kind == MIXER_MEMORY)
        size = c->kv_heads * c->head_dim * (int64_t)dtype_size(act);
    size *= slots * (mixer_recalls(m) ? ring_rows(m) : 0);
    return (size + MEMORY_ALIGN - 1) / MEMORY_ALIGN * MEMORY_ALIGN;
}

int64_t carry_bytes(const struct model_config *c, int64_t slots, enum dtype act) {
    int64_t bytes = 0;
    for (int64_t l = 0; l < c->layers; l++)
        bytes += layer_bytes(c, l, slots, act) * (model_mixer(c, l)->kind == MIXER_MEMORY ? 2 : 1);
    return bytes;
}

static tril_status ring_create(struct carry_ring *r, const struct mixer_config *m, int64_t slots,
                               struct tril_error *err) {
    tril_status st = TRIL_OK;
    const char *what = "what a batch carries";
    size_t n = (size_t)slots;
    r->keep = m ? m->keep : 0;
    r->rows = ring_rows(m);
    TRY(mem_alloc_zero((void **)&r->first, n * sizeof *r->first, what, err));
    TRY(mem_alloc_zero((void **)&r->length, n * sizeof *r->length, what, err));
    TRY(mem_alloc_zero((void **)&r->dropped, n * sizeof *r->dropped, what, err));
done:
    return st;
}

tril_status carry_create(struct carry **out, const struct model *m, int64_t slots,
                         struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *config = &m->config;
    const char *what = "what a batch carries";
    *out = NULL;
    if (carry_segment(config) == 0 || slots < 1 || slots > INT32_MAX / 2 ||
        slots * ring_rows(model_recalls(config, MIXER_MEMORY)) > INT32_MAX ||
        slots * ring_rows(model_recalls(config, MIXER_RECURRENCE)) > INT32_MAX)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%lld rows cannot carry what this model's layers recall (if any do)",
                         (long long)slots);
    struct carry *c = calloc(1, sizeof *c);
    if (!c)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for %s", what);
    *c = (struct carry){.ctx = m->ctx,
                        .slots = slots,
                        .layers = config->layers,
                        .segment = carry_segment(config),
                        .wide = model_wide(m),
                        .act = m->dtype,
                        .dim = config->dim,
                        .kv_heads = config->kv_heads,
                        .head_dim = config->head_dim,
                        .bytes = carry_bytes(config, slots, m->dtype)};
    TRY(ring_create(&c->states, model_recalls(config, MIXER_RECURRENCE), slots, err));
    TRY(ring_create(&c->keys, model_recalls(config, MIXER_MEMORY), slots, err));
    TRY(mem_alloc_zero((void **)&c->busy, (size_t)slots * sizeof *c->busy, what, err));
    TRY(mem_alloc_zero((void **)&c->layer, (size_t)c->layers * sizeof *c->layer, what, err));
    TRY(m->ctx->backend->alloc(&c->memory, c->bytes, true, what, err));
    char *at = c->memory;
    for (int64_t l = 0; l < c->layers; l++) {
        int64_t n = layer_bytes(config, l, slots, m->dtype);
        if (model_mixer(config, l)->kind == MIXER_RECURRENCE) {
            c->layer[l].x = at;
        } else if (model_mixer(config, l)->kind == MIXER_MEMORY) {
            c->layer[l].k = at;
            c->layer[l].v = at += n;
        }
        at += n;
    }
    *out = c;
    c = NULL;
done:
    carry_free(c);
    return st;
}

static void ring_free(struct carry_ring *r) {
    mem_free(r->first);
    mem_free(r->length);
    mem_free(r->dropped);
}

void carry_free(struct carry *c) {
    if (!c)
        return;
    c->ctx->backend->release(c->memory);
    ring_free(&c->states);
    ring_free(&c->keys);
    mem_free(c->busy);
    mem_free(c->layer);
    free(c);
}

void carry_reset(struct carry *c, int64_t slot) {
    for (int64_t s = slot < 0 ? 0 : slot; s < (slot < 0 ? c->slots : slot + 1); s++) {
        c->states.first[s] = c->states.length[s] = 0;
        c->keys.first[s] = c->keys.length[s] = 0;
        c->states.dropped[s] = c->keys.dropped[s] = 0;
    }
}

/* ------------------------------------------------------------------ saving */

/* The file: "rings" i64 [6, slots], and the memory as bytes. */
enum { RING_NUMBERS = 6 };

static void rings_pack(const struct carry *c, int64_t *out) {
    const struct carry_ring *rings[] = {&c->states, &c->keys};
    for (int r = 0; r < 2; r++)
        for (int64_t s = 0; s < c->slots; s++) {
            out[(3 * r) * c->slots + s] = rings[r]->first[s];
            out[(3 * r + 1) * c->slots + s] = rings[r]->length[s];
            out[(3 * r + 2) * c->slots + s] = rings[r]->dropped[s];
        }
}

/* False where the numbers cannot be those of these rings. */
static bool rings_unpack(struct carry *c, const int64_t *in) {
    struct carry_ring *rings[] = {&c->states, &c->keys};
    for (int r = 0; r < 2; r++)
        for (int64_t s = 0; s < c->slots; s++) {
            int64_t first = in[(3 * r) * c->slots + s], length = in[(3 * r + 1) * c->slots + s];
            int64_t dropped = in[(3 * r + 2) * c->slots + s];
            if (first < 0 || length < 0 || dropped < 0 || length > rings[r]->keep ||
                (first > 0 && first >= rings[r]->rows))
                return false;
            rings[r]->first[s] = (int32_t)first;
            rings[r]->length[s] = (int32_t)length;
            rings[r]->dropped[s] = dropped;
        }
    return true;
}

tril_status carry_write(const struct carry *c, const char *path, struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct st_writer *w = NULL;
    const struct st_declare tensors[] = {{"memory", DT_U8, 1, {c->bytes}},
                                         {"rings", DT_I64, 2, {RING_NUMBERS, c->slots}}};
    int64_t *rings = NULL;
    void *host = NULL;
    const int64_t numbers = RING_NUMBERS * c->slots;
    TRY(mem_alloc((void **)&rings, (size_t)numbers * sizeof *rings, "a carry's rings", err));
    TRY(mem_alloc(&host, (size_t)c->bytes, "a carry's copy", err));
    rings_pack(c, rings);
    TRY(c->ctx->backend->download(c->ctx, host, c->memory, c->bytes, err));
    TRY(st_writer_open(&w, path, tensors, 2, NULL, 0, err));
    TRY(st_writer_write(w, host, (size_t)c->bytes, err));
    TRY(st_writer_write(w, rings, (size_t)numbers * sizeof *rings, err));
    st = st_writer_finish(w, err);
    w = NULL;
done:
    st_writer_abort(w);
    mem_free(host);
    mem_free(rings);
    return st;
}

tril_status carry_read(struct carry *c, const char *path, struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct safetensors *file = NULL;
    int64_t *rings = NULL;
    const size_t size = (size_t)(RING_NUMBERS * c->slots) * sizeof *rings;
    TRY(safetensors_open(&file, path, err));
    TRY(mem_alloc((void **)&rings, size, "a carry's rings", err));
    const struct st_tensor *memory = safetensors_find(file, "memory");
    const struct st_tensor *numbers = safetensors_find(file, "rings");
    bool fits = memory && numbers && memory->bytes == (size_t)c->bytes && numbers->bytes == size;
    if (fits) {
        memcpy(rings, numbers->data, size);
        fits = rings_unpack(c, rings);
    }
    if (!fits) {
        carry_reset(c, -1);
        st = error_set(err, TRIL_ERR_FORMAT,
                       "%s does not hold what this model's batches carry: resume from another "
                       "checkpoint",
                       path);
        goto done;
    }
    TRY(c->ctx->backend->upload(c->ctx, c->memory, memory->data, c->bytes, err));
done:
    safetensors_close(file);
    mem_free(rings);
    return st;
}
