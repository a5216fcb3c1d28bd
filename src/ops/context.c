/* The op context: which backend runs, and its scratch. */
#include "base/memory.h" /* MEMORY_ALIGN */
#include "ops/ops.h"

tril_status op_context_init(struct op_context *ctx, const struct backend *backend,
                            struct tril_error *err) {
    *ctx = (struct op_context){.backend = backend};
    if (!backend)
        return error_set(err, TRIL_ERR_INTERNAL, "an op context needs a backend: none was given");
    for (int id = 0; id < OP_COUNT; id++)
        if (!backend->table[id])
            return error_set(err, TRIL_ERR_INTERNAL,
                             "backend %s has no %s: fill its table with the references first",
                             backend->name, op_info_get((enum op_id)id)->name);
    return backend->open ? backend->open(ctx, err) : TRIL_OK;
}

static void scratch_free(struct op_context *ctx) {
    if (!ctx->lent && ctx->scratch)
        ctx->backend->release(ctx->scratch);
    ctx->scratch = NULL;
    ctx->scratch_bytes = 0;
    ctx->lent = false;
}

void op_context_free(struct op_context *ctx) {
    if (!ctx)
        return;
    scratch_free(ctx);
    if (ctx->stream)
        ctx->backend->close(ctx);
    ctx->stream = NULL;
}

void op_context_lend(struct op_context *ctx, void *memory, int64_t bytes) {
    scratch_free(ctx);
    int64_t skip = (int64_t)(-(uintptr_t)memory % MEMORY_ALIGN);
    ctx->lent = true;
    ctx->scratch = (char *)memory + skip;
    ctx->scratch_bytes = memory && bytes > skip ? bytes - skip : 0;
}

void *op_scratch(struct op_context *ctx, int64_t bytes) {
    if (ctx->measuring) {
        ctx->measured = bytes > ctx->measured ? bytes : ctx->measured;
        return NULL;
    }
    if (ctx->lent && bytes <= ctx->scratch_bytes)
        return ctx->scratch ? ctx->scratch : ctx; /* 0 bytes of no memory */
    if (bytes < 0 || ctx->lent)
        return NULL;
    if (ctx->scratch && bytes <= ctx->scratch_bytes)
        return ctx->scratch;
    scratch_free(ctx);
    if (ctx->backend->alloc(&ctx->scratch, bytes, false, "scratch of an operation", NULL) !=
        TRIL_OK)
        return NULL;
    ctx->scratch_bytes = bytes;
    return ctx->scratch;
}

tril_status op_scratch_error(const struct op_context *ctx, const char *name, int64_t bytes,
                             struct tril_error *err) {
    if (ctx->lent)
        return error_set(err, TRIL_ERR_MEMORY,
                         "%s needs %lld bytes of scratch but was lent %lld; ask how much it needs "
                         "and lend that",
                         name, (long long)bytes, (long long)ctx->scratch_bytes);
    return error_set(err, TRIL_ERR_MEMORY, "%s: %lld bytes of scratch are not available", name,
                     (long long)bytes);
}

tril_status op_scratch_needed(struct op_context *ctx, enum op_id id, const struct tensor *args,
                              const void *params, int64_t *bytes, struct tril_error *err) {
    *bytes = 0;
    if ((unsigned)id >= OP_COUNT || !op_info_get(id)->scratch_first)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "operation number %d cannot say beforehand how much scratch it needs",
                         (int)id);
    struct op_context asking = *ctx;
    asking.measuring = true;
    asking.measured = -1;
    struct tril_error ignored;
    struct tril_error *e = err ? err : &ignored;
    tril_status st = op_call(&asking, id, args, params, e);
    if (asking.measured < 0)
        return st;
    *bytes = asking.measured > 0 ? asking.measured + MEMORY_ALIGN - 1 : 0;
    return TRIL_OK;
}
