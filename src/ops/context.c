/* The op context: which backend runs, and its scratch. */
#include "base/memory.h"
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
    return TRIL_OK;
}

void op_context_free(struct op_context *ctx) {
    if (!ctx)
        return;
    mem_free(ctx->scratch);
    ctx->scratch = NULL;
    ctx->scratch_bytes = 0;
}

void *op_scratch(struct op_context *ctx, int64_t bytes) {
    if (bytes < 0)
        return NULL;
    if (ctx->scratch && bytes <= ctx->scratch_bytes)
        return ctx->scratch;
    mem_free(ctx->scratch);
    ctx->scratch = NULL;
    ctx->scratch_bytes = 0;
    if (mem_alloc(&ctx->scratch, (size_t)bytes, "scratch of an operation", NULL) != TRIL_OK)
        return NULL;
    ctx->scratch_bytes = bytes;
    return ctx->scratch;
}
