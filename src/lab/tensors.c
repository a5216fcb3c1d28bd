/* Memory of whatever computes: tensors filled and fetched; what of a device's memory is held,
 * counted at its allocations (the host's is the kernel's to tell: measure.c). */
#include <stdlib.h>

#include "base/memory.h"
#include "lab/lab.h"

tril_status lab_fill(struct op_context *ctx, void *data, enum dtype t, int64_t n, float scale,
                     const struct random_key *key, struct tril_error *err) {
    enum { PIECE = 4096 };
    const int64_t size = (int64_t)dtype_size(t);
    float piece[PIECE], as[PIECE];
    tril_status st = TRIL_OK;
    for (int64_t at = 0; at < n && st == TRIL_OK; at += PIECE) {
        int64_t some = n - at < PIECE ? n - at : PIECE;
        random_normal_fill(key, (uint64_t)at, some, piece);
        for (int64_t i = 0; i < some; i++)
            piece[i] *= scale;
        dtype_convert(as, t, piece, DT_F32, (size_t)some);
        st = ctx->backend->upload(ctx, (char *)data + at * size, as, some * size, err);
    }
    return st;
}

tril_status lab_fetch(struct op_context *ctx, const void *data, enum dtype t, int64_t n,
                      float **out, struct tril_error *err) {
    void *as = NULL;
    tril_status st = TRIL_OK;
    *out = NULL;
    TRY(mem_alloc(&as, (size_t)n * dtype_size(t), "a result", err));
    TRY(mem_alloc((void **)out, (size_t)n * sizeof **out, "a result", err));
    TRY(ctx->backend->download(ctx, as, data, n * (int64_t)dtype_size(t), err));
    dtype_convert(*out, DT_F32, as, t, (size_t)n);
done:
    mem_free(as);
    return st;
}
