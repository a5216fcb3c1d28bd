/* Which keys were seen, and what was recorded for them. */
#include "ops/replay.h"

uint64_t op_replay_key(uint64_t key, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++)
        key = (key ^ p[i]) * 0x100000001b3u;
    return key;
}

static void forget(struct op_context *ctx, struct replay_entry *e) {
    if (e->graph)
        ctx->backend->graph_free(ctx, e->graph);
    *e = (struct replay_entry){0};
}

void op_replay_free(struct op_context *ctx, struct op_replay *r) {
    for (int i = 0; i < REPLAY_MOST; i++)
        forget(ctx, &r->entry[i]);
}

/* The key's entry; a new one in the place of the oldest. */
static struct replay_entry *find(struct op_context *ctx, struct op_replay *r, uint64_t key,
                                 bool *seen) {
    struct replay_entry *oldest = &r->entry[0];
    r->clock++;
    for (int i = 0; i < REPLAY_MOST; i++) {
        struct replay_entry *e = &r->entry[i];
        if (e->used > 0 && e->key == key) {
            *seen = true;
            e->used = r->clock;
            return e;
        }
        if (e->used < oldest->used)
            oldest = e;
    }
    forget(ctx, oldest);
    *seen = false;
    oldest->key = key;
    oldest->used = r->clock;
    return oldest;
}

tril_status op_replay_run(struct op_context *ctx, struct op_replay *r, uint64_t key, op_body *body,
                          void *arg, struct tril_error *err) {
    const struct backend *b = ctx->backend;
    bool seen;
    if (!b->graph_begin)
        return body(arg, err);
    struct replay_entry *e = find(ctx, r, key, &seen);
    if (e->graph && e->scratch == ctx->scratch)
        return b->graph_run(ctx, e->graph, err);
    if (e->graph) { /* the scratch has moved since */
        b->graph_free(ctx, e->graph);
        e->graph = NULL;
    }
    int64_t falls = ctx->host_falls;
    if (!seen || e->plain) { /* scratch grows and libraries choose: not to be recorded */
        tril_status st = body(arg, err);
        e->plain |= ctx->host_falls != falls;
        return st;
    }
    tril_status st = b->graph_begin(ctx, err);
    if (st != TRIL_OK)
        return st;
    const void *scratch = ctx->scratch;
    st = body(arg, NULL);
    tril_status ended = b->graph_end(ctx, &e->graph, NULL);
    if (st == TRIL_OK && ended == TRIL_OK && scratch == ctx->scratch) {
        e->scratch = scratch;
        return b->graph_run(ctx, e->graph, err);
    }
    if (e->graph)
        b->graph_free(ctx, e->graph);
    e->graph = NULL;
    e->plain = true;
    return body(arg, err);
}
