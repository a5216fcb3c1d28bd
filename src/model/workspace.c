/* A workspace: one arena laid out by the activation table, and the check of a batch, whose integers
 * travel to the backend in a single upload. */
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "model/internal.h"

tril_status workspace_create(struct workspace **out, const struct model *m,
                             const struct workspace_options *o, struct tril_error *err) {
    tril_status st;
    *out = NULL;
    if (o->backward && !m->training)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a model opened for inference has no gradients: open it for training");
    struct workspace *w = calloc(1, sizeof *w);
    if (!w)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a workspace");
    w->model = m;
    w->ctx = m->ctx;
    w->options = *o;
    const struct backend *b = m->ctx->backend;
    if (o->offload && !b->copy_begin)
        TRY(error_set(err, TRIL_ERR_UNSUPPORTED,
                      "activations cannot be offloaded from %s to the host's memory: that is where "
                      "they are",
                      b->name));
    TRY(activation_layout_make(&w->layout, &m->config, m->dtype, o, err));
    if (w->layout.leaving > 0)
        TRY(b->host_alloc((void **)&w->host,
                          w->layout.leaving * (w->layout.input + w->layout.group), false,
                          "the activations in the host's memory", err));
    TRY(b->alloc((void **)&w->arena, w->layout.bytes, false, "the activations", err));
    w->staging_size = w->layout.shape[A_INPUTS].shape[0];
    TRY(mem_alloc((void **)&w->staging, (size_t)w->staging_size * sizeof *w->staging,
                  "a batch's integers", err));
    *out = w;
    w = NULL;
done:
    workspace_free(w);
    return st;
}

void workspace_free(struct workspace *w) {
    if (!w)
        return;
    op_replay_free(w->ctx, &w->replay);
    w->ctx->backend->release(w->arena);
    if (w->host)
        w->ctx->backend->host_release(w->host);
    w->ctx->backend->release(w->watch_lse);
    mem_free(w->staging);
    free(w);
}

int64_t workspace_bytes(const struct workspace *w) {
    return w->layout.bytes;
}

void workspace_set_hook(struct workspace *w, model_hook *hook_fn, void *arg) {
    w->hook = hook_fn;
    w->hook_arg = arg;
}

tril_status workspace_watch_attention(struct workspace *w, attention_hook *hook_fn, void *arg,
                                      struct tril_error *err) {
    const int64_t H = w->model->config.heads, N = w->options.max_tokens;
    const int64_t bytes = H * N * (int64_t)dtype_size(model_wide(w->model));
    tril_status st = TRIL_OK;
    if (hook_fn && !w->watch_lse && !w->layout.present[A_LSE])
        TRY(w->ctx->backend->alloc(&w->watch_lse, bytes, false, "the log-sum-exp", err));
    w->watch = hook_fn;
    w->watch_arg = arg;
done:
    return st;
}

void workspace_watch_relative(struct workspace *w, relative_hook *hook_fn) {
    w->watch_relative = hook_fn;
}

struct tensor lse_view(const struct pass *p, int layer) {
    const struct workspace *w = p->w;
    if (w->watch && w->watch_lse)
        return tensor_2d(w->watch_lse, model_wide(p->m), p->m->config.heads, p->N);
    return activation_view(w, A_LSE, layer, p->N);
}

struct tensor activation_view(const struct workspace *w, enum activation_id id, int layer,
                              int64_t rows) {
    const struct activation_layout *l = &w->layout;
    if (!l->present[id])
        return tensor_none();
    struct tensor t = l->shape[id];
    const int64_t instance = layer % (id == A_X ? l->inputs : l->groups);
    t.data = w->arena + l->offset[id] + instance * l->stride[id];
    if (l->variable[id] >= 0)
        t.shape[l->variable[id]] = rows;
    if (t.rank == 2)
        t.stride[0] = t.shape[1];
    return t;
}

/* ------------------------------------------------------------------ a call's inputs */

static tril_status check_sizes(const struct pass *p, bool with_targets, struct tril_error *err) {
    const struct batch *b = p->batch;
    const struct workspace_options *o = &p->w->options;
    if (b->tokens < 1 || b->sequences < 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the batch is empty: it needs at least one token and one sequence");
    if (b->tokens > o->max_tokens || b->sequences > o->max_sequences)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the batch holds %lld tokens in %lld sequences; the workspace was made "
                         "for %lld in %lld",
                         (long long)b->tokens, (long long)b->sequences, (long long)o->max_tokens,
                         (long long)o->max_sequences);
    if (!b->ids || !b->offsets || (with_targets && !b->targets) || (b->cache && !b->slots))
        return error_set(err, TRIL_ERR_ARGUMENT, "the batch has no %s",
                         !b->ids                       ? "token ids"
                         : !b->offsets                 ? "sequence offsets"
                         : with_targets && !b->targets ? "targets"
                                                       : "cache slots");
    if (b->offsets[0] != 0 || b->offsets[b->sequences] != b->tokens)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the batch's offsets run from %d to %d; they must cover tokens 0 to %lld",
                         b->offsets[0], b->offsets[b->sequences], (long long)b->tokens);
    for (int64_t s = 0; s < b->sequences; s++)
        if (b->offsets[s + 1] <= b->offsets[s])
            return error_set(err, TRIL_ERR_ARGUMENT, "sequence %lld of the batch is empty",
                             (long long)s);
    if (b->rows && (b->row_count < 0 || b->row_count > o->max_tokens))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the logits of %lld rows are wanted; the workspace allows %lld",
                         (long long)b->row_count, (long long)o->max_tokens);
    return TRIL_OK;
}

static tril_status check_cache(const struct pass *p, struct tril_error *err) {
    const struct batch *b = p->batch;
    struct kv_cache *c = b->cache;
    const struct model_config *config = &p->m->config;
    if (c->layers != config->layers || c->kv_heads != config->kv_heads ||
        c->head_dim != config->head_dim)
        return error_set(err, TRIL_ERR_ARGUMENT, "the key/value cache was made for another model");
    tril_status st = TRIL_OK;
    int64_t s = 0;
    for (; s < b->sequences && st == TRIL_OK; s++) {
        int32_t slot = b->slots[s];
        if (slot < 0 || slot >= c->slots || c->busy[slot]) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           slot < 0 || slot >= c->slots
                               ? "cache slot %d does not exist: there are %lld"
                               : "cache slot %d is used by two sequences of one batch (of %lld)",
                           slot, (long long)c->slots);
            break;
        }
        c->busy[slot] = true;
        int64_t length = c->length[slot], more = b->offsets[s + 1] - b->offsets[s];
        if (c->sums && length > 0 && c->summed[slot] != length)
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "cache slot %d was set back to %lld tokens, but linear attention cannot "
                           "forget: start the sequence anew",
                           slot, (long long)length);
        else if (c->rolls && more > c->most)
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "cache slot %d is to take %lld tokens at once, and was made for %lld: "
                           "give them in several calls",
                           slot, (long long)more, (long long)c->most);
        else if (length + more > c->capacity)
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "cache slot %d holds %lld of %lld tokens: %lld more do not fit; shorten "
                           "the text",
                           slot, (long long)length, (long long)c->capacity, (long long)more);
    }
    for (int64_t i = 0; i < s; i++)
        c->busy[b->slots[i]] = false;
    return st;
}

static tril_status check_tokens(const struct pass *p, bool with_targets, struct tril_error *err) {
    const struct batch *b = p->batch;
    const int64_t V = p->m->config.vocab, C = p->m->config.context;
    for (int64_t n = 0; n < b->tokens; n++)
        if (b->ids[n] < 0 || b->ids[n] >= V)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "token id %d (number %lld of the batch) is outside the vocabulary of "
                             "%lld; use the model's own tokenizer",
                             b->ids[n], (long long)n, (long long)V);
    for (int64_t n = 0; with_targets && n < b->tokens; n++)
        if (b->targets[n] >= V)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "target id %d (number %lld of the batch) is outside the vocabulary of "
                             "%lld; use the model's own tokenizer",
                             b->targets[n], (long long)n, (long long)V);
    for (int64_t s = 0; s < b->sequences; s++) {
        int64_t held = b->cache ? b->cache->length[b->slots[s]] : 0;
        int64_t length = held + b->offsets[s + 1] - b->offsets[s];
        if (length > C)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "a sequence of %lld tokens is longer than the model's context of "
                             "%lld: shorten it",
                             (long long)length, (long long)C);
    }
    for (int64_t n = 0; b->positions && n < b->tokens; n++)
        if (b->positions[n] < 0 || b->positions[n] >= C)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "position %d is outside the model's context of %lld", b->positions[n],
                             (long long)C);
    for (int64_t r = 0; b->rows && r < b->row_count; r++)
        if (b->rows[r] < 0 || b->rows[r] >= b->tokens)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "logits of row %d are wanted, but the batch has %lld tokens",
                             b->rows[r], (long long)b->tokens);
    return TRIL_OK;
}

/* Takes `count` integers of the staging buffer, padded to a cache line: the host's end is returned,
 * the backend's view goes to *view. */
static int32_t *stage(struct pass *p, int64_t *used, int64_t count, struct tensor *view) {
    int32_t *host = p->w->staging + *used;
    *view = tensor_1d((int32_t *)(void *)(p->w->arena + p->w->layout.offset[A_INPUTS]) + *used,
                      DT_I32, count);
    *used += (count + 15) / 16 * 16;
    return host;
}

/* New sequences begin with sums of zero. Until the call is over, what the sums hold is unknown. */
static tril_status sums_begin(struct pass *p, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *config = &p->m->config;
    struct kv_cache *c = p->batch->cache;
    const int64_t size = config->kv_heads * config->head_dim * (config->head_dim + 1);
    for (int64_t s = 0; s < p->S; s++) {
        int32_t slot = p->batch->slots[s];
        for (int64_t l = 0; l < c->layers && c->length[slot] == 0; l++)
            if (c->layer[l].sums)
                TRY(p->ctx->backend->fill_zero(p->ctx, c->layer[l].sums + slot * size,
                                               size * (int64_t)sizeof(float), err));
        c->summed[slot] = -1;
    }
done:
    return st;
}

/* Where the call's keys go in the layers that roll, and the page tables of its sequences. */
static tril_status rolls_begin(struct pass *p, int64_t *used, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct batch *b = p->batch;
    const struct kv_cache *c = b->cache;
    for (int i = 0; i < MODEL_MOST_MIXERS; i++) {
        const struct kv_roll *r = &c->roll[i];
        if (!r->ring)
            continue;
        int32_t *rows = stage(p, used, p->N, &p->roll_rows[i]), *table = r->table;
        int32_t *again = r->twice ? stage(p, used, p->N, &p->roll_again[i]) : NULL;
        for (int64_t s = 0; s < p->S; s++) {
            int64_t begin = b->offsets[s], held = c->length[b->slots[s]];
            const int32_t *pages = r->host + b->slots[s] * c->columns;
            for (int64_t n = begin; n < b->offsets[s + 1]; n++) {
                int64_t j = held + n - begin;
                rows[n] = (int32_t)(pages[j / KV_PAGE] * KV_PAGE + j % KV_PAGE);
                if (again)
                    again[n] = (int32_t)(rows[n] + r->ring * KV_PAGE);
            }
            if (p->slots_adjoin)
                continue;
            TRY(p->ctx->backend->upload(p->ctx, table + (c->slots + s) * c->columns, pages,
                                        c->columns * (int64_t)sizeof *pages, err));
        }
        table += (p->slots_adjoin ? b->slots[0] : c->slots) * c->columns;
        p->pages[i] = tensor_2d(table, DT_I32, p->S, c->columns);
    }
done:
    return st;
}

tril_status pass_begin(struct pass *p, struct model *m, struct workspace *w, const struct batch *b,
                       bool with_targets, const struct train_call *call, struct tril_error *err) {
    tril_status st;
    *p =
        (struct pass){.m = m, .w = w, .ctx = m->ctx, .batch = b, .N = b->tokens, .S = b->sequences};
    TRY(check_sizes(p, with_targets, err));
    if (b->cache)
        TRY(check_cache(p, err));
    TRY(check_tokens(p, with_targets, err));
    if (m->ablation && (call || w->options.backward))
        TRY(error_set(err, TRIL_ERR_UNSUPPORTED,
                      "parts of the model are switched off: that is for inference alone"));
    p->keep = call != NULL;
    p->overwrite = call != NULL && call->overwrite;

    int64_t used = 0;
    memcpy(stage(p, &used, p->N, &p->ids), b->ids, (size_t)p->N * sizeof *b->ids);
    memcpy(stage(p, &used, p->S + 1, &p->offsets), b->offsets,
           (size_t)(p->S + 1) * sizeof *b->offsets);
    int32_t *positions = stage(p, &used, p->N, &p->positions);
    int32_t *start = stage(p, &used, p->S, &p->kv_start);
    int32_t *length = stage(p, &used, p->S, &p->kv_length);
    if (b->cache)
        memcpy(stage(p, &used, p->S, &p->slots), b->slots, (size_t)p->S * sizeof *b->slots);
    int32_t *cache_rows = b->cache ? stage(p, &used, p->N, &p->cache_rows) : NULL;
    for (int64_t s = 0; s < p->S; s++) {
        int32_t begin = b->offsets[s], n = b->offsets[s + 1] - begin;
        int32_t held = b->cache ? b->cache->length[b->slots[s]] : 0;
        start[s] = b->cache ? (int32_t)(b->slots[s] * b->cache->capacity) : begin;
        length[s] = held + n;
        for (int32_t i = 0; i < n; i++) {
            positions[begin + i] = b->positions ? b->positions[begin + i] : held + i;
            if (cache_rows)
                cache_rows[begin + i] = start[s] + held + i;
        }
        p->max_q = n > p->max_q ? n : p->max_q;
        p->max_kv = length[s] > p->max_kv ? length[s] : p->max_kv;
    }
    if (b->cache && b->cache->retrieve.top > 0) {
        int32_t *held = stage(p, &used, p->S, &p->held);
        for (int64_t s = 0; s < p->S; s++)
            held[s] = b->cache->length[b->slots[s]];
    }
    if (with_targets)
        memcpy(stage(p, &used, p->N, &p->targets), b->targets, (size_t)p->N * sizeof *b->targets);
    if (b->rows && b->row_count)
        memcpy(stage(p, &used, b->row_count, &p->rows), b->rows,
               (size_t)b->row_count * sizeof *b->rows);
    if (call) {
        p->key = (struct random_key){.seed = call->seed, .step = call->step};
        int64_t step = (int64_t)call->step;
        memcpy(stage(p, &used, 2, &p->step), &step, sizeof step);
        p->step = tensor_1d(p->step.data, DT_I64, 1);
    }
    p->slots_adjoin = true;
    for (int64_t s = 0; b->cache && s < p->S; s++)
        p->slots_adjoin &= b->slots[s] == b->slots[0] + s;
    if (b->cache && b->cache->rolls)
        TRY(rolls_begin(p, &used, err));
    if (b->cache && b->cache->sums)
        TRY(sums_begin(p, err));
    if (recall_stages(&m->config))
        TRY(recall_begin(p, stage, &used, err));
    TRY(m->ctx->backend->upload(m->ctx, p->ids.data, w->staging, used * (int64_t)sizeof *w->staging,
                                err));
done:
    return st;
}

/* Host-known bounds only choose how kernels divide the work; in steps, so that a growing cache does
 * not make every call another one. */
static int32_t rounded_up(int32_t keys, int64_t most) {
    int32_t step = 256;
    while (keys > 16 * step && step < 1 << 20)
        step *= 2;
    int64_t up = ((int64_t)keys + step - 1) / step * step;
    return (int32_t)(up < most ? up : most);
}

tril_status pass_run(struct pass *p, const char *what, float scale, op_body *body, void *arg,
                     struct tril_error *err) {
    const struct parameter_hooks *h = &p->m->hooks;
    const struct kv_cache *c = p->batch->cache;
    struct workspace *w = p->w;
    if (!p->ctx->backend->graph_begin || w->hook || w->watch || h->acquire || h->release ||
        h->gradient_ready || p->m->ablation || recall_stages(&p->m->config) ||
        (c && c->retrieve.top > 0))
        return body(arg, err);
    if (c)
        p->max_kv = rounded_up(p->max_kv, c->capacity);
    const struct {
        const void *model, *cache, *memory, *carry, *draw, *seen, *log_probability;
        int64_t tokens, sequences, wanted, capacity, slot;
        uint64_t seed;
        int32_t max_q, max_kv, flags;
        float scale;
    } k = {p->m,
           c,
           c ? c->memory : NULL,
           p->batch->carry,
           p->draw ? p->draw->token.data : NULL,
           p->draw ? p->draw->seen.data : NULL,
           p->draw ? p->draw->log_probability.data : NULL,
           p->N,
           p->S,
           p->wanted,
           c ? c->capacity : 0,
           c && p->slots_adjoin ? p->batch->slots[0] : -1,
           p->key.seed,
           p->max_q,
           p->max_kv,
           p->keep | p->overwrite << 1 | p->slots_adjoin << 2 | p->gather_early << 3 |
               (p->rows.data != NULL) << 4 | (p->draw && p->draw->params.greedy) << 5,
           scale};
    uint64_t key = op_replay_key(OP_REPLAY_KEY, what, strlen(what));
    return op_replay_run(p->ctx, &w->replay, op_replay_key(key, &k, sizeof k), body, arg, err);
}
