/* Memory of whatever computes: tensors filled and fetched; what of a device's memory is held,
 * counted at its allocations (the host's is the kernel's to tell: measure.c). */
#include <stdlib.h>

#include "base/memory.h"
#include "lab/lab.h"

/* ------------------------------------------------------------------ tensors */

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

/* ------------------------------------------------------------------ counting
 *
 * A backend's alloc and release know no context, so there is one count for the process. */

static struct {
    const struct backend *device;
    struct backend shim;
    struct held {
        void *at;
        int64_t bytes;
    } * held;
    int64_t count, room, now, most;
} watch;

static tril_status counted_alloc(void **out, int64_t bytes, bool zero, const char *what,
                                 struct tril_error *err) {
    if (watch.count == watch.room) {
        int64_t room = watch.room ? 2 * watch.room : 64;
        struct held *more = realloc(watch.held, (size_t)room * sizeof *more);
        if (!more)
            return lab_no_memory(err);
        watch.held = more;
        watch.room = room;
    }
    tril_status st = watch.device->alloc(out, bytes, zero, what, err);
    if (st != TRIL_OK)
        return st;
    watch.held[watch.count++] = (struct held){*out, bytes};
    watch.now += bytes;
    watch.most = watch.now > watch.most ? watch.now : watch.most;
    return TRIL_OK;
}

static void counted_release(void *p) {
    for (int64_t i = 0; p && i < watch.count; i++)
        if (watch.held[i].at == p) {
            watch.now -= watch.held[i].bytes;
            watch.held[i] = watch.held[--watch.count];
            break;
        }
    watch.device->release(p);
}

const struct backend *lab_watch(const struct backend *device) {
    watch.device = device;
    watch.shim = *device;
    watch.shim.alloc = counted_alloc;
    watch.shim.release = counted_release;
    return &watch.shim;
}

void lab_watch_end(void) {
    free(watch.held);
    watch.held = NULL;
    watch.count = watch.room = watch.now = watch.most = 0;
}

tril_status lab_watch_peak(lab_work *work, void *arg, double *bytes, struct tril_error *err) {
    int64_t before = watch.now;
    watch.most = before;
    tril_status st = work(arg, err);
    *bytes = (double)(watch.most - before);
    return st;
}
