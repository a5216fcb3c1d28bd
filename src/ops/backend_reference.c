/* The reference backend: host memory, every operation by its scalar reference. */
#include <pthread.h>
#include <string.h>

#include "base/memory.h"
#include "ops/ops.h"

static tril_status host_alloc(void **out, int64_t bytes, bool zero, const char *what,
                              struct tril_error *err) {
    if (bytes < 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: %lld bytes cannot be allocated", what,
                         (long long)bytes);
    return (zero ? mem_alloc_zero : mem_alloc)(out, (size_t)bytes, what, err);
}

static tril_status host_copy(struct op_context *ctx, void *dst, const void *src, int64_t bytes,
                             struct tril_error *err) {
    (void)ctx;
    (void)err;
    if (bytes > 0)
        memmove(dst, src, (size_t)bytes);
    return TRIL_OK;
}

static tril_status host_fill_zero(struct op_context *ctx, void *dst, int64_t bytes,
                                  struct tril_error *err) {
    (void)ctx;
    (void)err;
    if (bytes > 0)
        memset(dst, 0, (size_t)bytes);
    return TRIL_OK;
}

static tril_status host_synchronise(struct op_context *ctx, struct tril_error *err) {
    (void)ctx;
    (void)err;
    return TRIL_OK;
}

static tril_status no_prepare(struct op_context *ctx, struct weight *w, unsigned uses,
                              struct tril_error *err) {
    (void)ctx;
    (void)err;
    w->uses = uses; /* the references read value every time */
    return TRIL_OK;
}

static tril_status no_refresh(struct op_context *ctx, struct weight *w, struct tril_error *err) {
    (void)ctx;
    (void)w;
    (void)err;
    return TRIL_OK;
}

static void no_release(struct weight *w) {
    w->state = NULL;
    w->uses = 0;
}

static int64_t no_bytes(int64_t outputs, int64_t inputs, enum dtype t, unsigned uses) {
    (void)outputs;
    (void)inputs;
    (void)t;
    (void)uses;
    return 0;
}

static struct backend reference = {
    .name = "reference",
    .alloc = host_alloc,
    .release = mem_free,
    .upload = host_copy,
    .download = host_copy,
    .fill_zero = host_fill_zero,
    .synchronise = host_synchronise,
    .weight_prepare = no_prepare,
    .weight_refresh = no_refresh,
    .weight_release = no_release,
    .weight_bytes = no_bytes,
};

static void fill_table(void) {
    for (int id = 0; id < OP_COUNT; id++)
        reference.table[id] = op_info_get((enum op_id)id)->reference;
}

const struct backend *backend_reference(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill_table);
    return &reference;
}
