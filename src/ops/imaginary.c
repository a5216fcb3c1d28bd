/* A backend's memory functions without memory. */
#include "ops/imaginary.h"

#include <stdatomic.h>
#include <string.h>

/* Addresses far from any real one, aligned as real ones are. */
static tril_status imagine(void **out, int64_t bytes, bool zero, const char *what,
                           struct tril_error *err) {
    static atomic_uint_fast64_t next = UINT64_C(1) << 62;
    (void)zero;
    if (bytes < 0 || bytes > INT64_C(1) << 56)
        return error_set(err, TRIL_ERR_MEMORY, "%s: %lld bytes are beyond any memory", what,
                         (long long)bytes);
    *out = (void *)(uintptr_t)atomic_fetch_add(&next, (uint64_t)(bytes + 4096) / 4096 * 4096);
    return TRIL_OK;
}

static void forget(void *p) {
    (void)p;
}

static tril_status no_upload(struct op_context *ctx, void *dst, const void *host, int64_t bytes,
                             struct tril_error *err) {
    (void)ctx, (void)dst, (void)host, (void)bytes, (void)err;
    return TRIL_OK;
}

static tril_status zeros(struct op_context *ctx, void *host, const void *src, int64_t bytes,
                         struct tril_error *err) {
    (void)ctx, (void)src, (void)err;
    if (bytes > 0)
        memset(host, 0, (size_t)bytes);
    return TRIL_OK;
}

static tril_status no_fill(struct op_context *ctx, void *dst, int64_t bytes,
                           struct tril_error *err) {
    (void)ctx, (void)dst, (void)bytes, (void)err;
    return TRIL_OK;
}

static tril_status no_work(struct op_context *ctx, struct tril_error *err) {
    (void)ctx, (void)err;
    return TRIL_OK;
}

static tril_status no_copy(struct op_context *ctx, int mark, void *dst, const void *src,
                           int64_t bytes, struct tril_error *err) {
    (void)ctx, (void)mark, (void)dst, (void)src, (void)bytes, (void)err;
    return TRIL_OK;
}

static tril_status no_wait(struct op_context *ctx, int mark, struct tril_error *err) {
    (void)ctx, (void)mark, (void)err;
    return TRIL_OK;
}

void backend_imagine(struct backend *b) {
    b->alloc = imagine;
    b->release = forget;
    b->upload = no_upload;
    b->download = zeros;
    b->fill_zero = no_fill;
    b->synchronise = no_work;
    b->host_alloc = imagine;
    b->host_release = forget;
    b->copy_begin = no_copy;
    b->copy_wait = no_wait;
    b->memory = NULL;
    b->memory_reset = NULL;
    b->plan = NULL;
    b->graph_begin = NULL; /* bodies run, once */
    b->graph_end = NULL;
    b->graph_run = NULL;
    b->graph_free = NULL;
}

void op_context_imagine(struct op_context *ctx, const struct backend *imaginary, void *stream) {
    *ctx = (struct op_context){
        .backend = imaginary, .stream = stream, .measuring = true, .planning = true};
}
