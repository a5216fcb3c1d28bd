/* The generic shim: from a description's roles and shapes follows what has to travel. */
#include "ops/host_fallback.h"

#include "base/memory.h"
#include "ops/describe.h"

/* Memory that one argument, or several that overlap, lies in. */
struct region {
    char *begin, *end, *host;
    bool written;
};

/* [begin, end) of an argument's elements; empty where it has none. */
static struct region region_of(const struct tensor *t) {
    struct region r = {.begin = t->data, .end = t->data};
    int64_t last = 0;
    for (int k = 0; k < t->rank; k++) {
        if (t->shape[k] < 1)
            return r;
        last += (t->shape[k] - 1) * t->stride[k];
    }
    if (t->data)
        r.end = r.begin + (last + 1) * (int64_t)dtype_size(t->dtype);
    return r;
}

/* Joins r with every region it overlaps; they are replaced by one. */
static int regions_add(struct region *all, int count, struct region r) {
    if (r.begin == r.end)
        return count;
    for (int i = 0; i < count;)
        if (r.begin < all[i].end && all[i].begin < r.end) {
            r.begin = r.begin < all[i].begin ? r.begin : all[i].begin;
            r.end = r.end > all[i].end ? r.end : all[i].end;
            r.written |= all[i].written;
            all[i] = all[--count];
            i = 0;
        } else {
            i++;
        }
    all[count] = r;
    return count + 1;
}

tril_status op_host_fallback(struct op_context *ctx, const struct op_info *info,
                             const struct tensor *args, const void *params,
                             struct tril_error *err) {
    const struct backend *b = ctx->backend;
    struct region all[OP_MAX_ARGS];
    struct tensor host[OP_MAX_ARGS];
    void *memory = NULL;
    size_t bytes = 0;
    int count = 0;
    tril_status st = TRIL_OK;
    ctx->host_falls++;
    if (ctx->planning)
        return TRIL_OK;
    for (int i = 0; i < info->arg_count; i++) {
        struct region r = region_of(&args[i]);
        r.written = op_arg_role(info, i, args, params) != ARG_IN;
        count = regions_add(all, count, r);
    }
    for (int i = 0; i < count; i++)
        bytes += arena_block_size((size_t)(all[i].end - all[i].begin));
    TRY(mem_alloc(&memory, bytes, "an operation on the host", err));
    char *at = memory;
    for (int i = 0; i < count; i++) {
        int64_t size = all[i].end - all[i].begin;
        all[i].host = at;
        at += arena_block_size((size_t)size);
        TRY(b->download(ctx, all[i].host, all[i].begin, size, err));
    }
    for (int i = 0; i < info->arg_count; i++) {
        host[i] = args[i];
        char *data = args[i].data;
        for (int r = 0; r < count; r++)
            if (data && data >= all[r].begin && data < all[r].end)
                host[i].data = all[r].host + (data - all[r].begin);
    }
    TRY(info->reference(ctx, host, params, err));
    for (int i = 0; i < count; i++)
        if (all[i].written)
            TRY(b->upload(ctx, all[i].begin, all[i].host, all[i].end - all[i].begin, err));
done:
    mem_free(memory);
    return st;
}
