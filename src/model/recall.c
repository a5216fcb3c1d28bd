/* Layers that recall earlier segments: recurrence (Dai et al. 2019) and external memory (Wu et al.
 * 2022), each in three situations:
 *
 *   alone       a call's sequences are whole texts, cut into segments: what a layer recalls are
 *               keys of the same call (recurrence: with their gradients)
 *   with cache  the same, and the cache holds the keys of earlier calls
 *   with carry  a call's sequences are one segment each; what came before lies in the carry, and is
 *               detached. Of a recurrence it is the layer's inputs, whose keys and values are made
 *               anew: the projections learn from them.
 *
 * All three compute the same function. At the end: attention over retrieved blocks of a cache,
 * which is no layer of its own but an approximation of attention. */
#include <math.h>
#include <stdlib.h>

#include "model/carry.h"
#include "model/internal.h"

bool recall_stages(const struct model_config *c) {
    return carry_segment(c) > 0;
}

/* ------------------------------------------------------------------ a call's integers */

static tril_status check_carry(const struct pass *p, struct tril_error *err) {
    const struct batch *b = p->batch;
    struct carry *c = b->carry;
    tril_status st = TRIL_OK;
    int64_t s = 0;
    if (b->cache || !p->w->options.carry || c->layers != p->m->config.layers ||
        c->segment != carry_segment(&p->m->config) || c->dim != p->m->config.dim)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a batch carries what it recalls without a cache, in a workspace and for "
                         "a model made for it");
    for (; s < b->sequences && st == TRIL_OK; s++) {
        int64_t slot = b->slots ? b->slots[s] : s, n = b->offsets[s + 1] - b->offsets[s];
        if (slot < 0 || slot >= c->slots || c->busy[slot]) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "sequence %lld of the batch carries in slot %lld: there are %lld, each "
                           "for one sequence",
                           (long long)s, (long long)slot, (long long)c->slots);
            break;
        }
        c->busy[slot] = true;
        if (n != c->segment)
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "a sequence has %lld tokens, but one that carries on must be a segment "
                           "of %lld: give --seq %lld",
                           (long long)n, (long long)c->segment, (long long)c->segment);
    }
    for (int64_t i = 0; i < s; i++)
        c->busy[b->slots ? b->slots[i] : i] = false;
    return st;
}

/* Rows that n entries from `entry` on have in a slot's ring. */
static void ring_list(const struct carry_ring *r, int64_t slot, int64_t entry, int64_t n,
                      int32_t *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = (int32_t)(slot * r->rows + (r->first[slot] + entry + i) % r->rows);
}

static void carry_stage(struct pass *p, recall_stage *stage, int64_t *used) {
    struct recall_inputs *in = &p->recall;
    const struct batch *b = p->batch;
    const struct carry *c = b->carry;
    in->past = 0;
    for (int64_t s = 0; s < p->S; s++)
        in->past += c->states.length[b->slots ? b->slots[s] : s];
    in->ring = c->keys.rows;
    int32_t *past = stage(p, used, in->past, &in->past_rows);
    int32_t *states = stage(p, used, p->N, &in->state_rows);
    int32_t *keys = stage(p, used, p->N, &in->ring_rows);
    for (int64_t s = 0; s < p->S; s++) {
        int64_t slot = b->slots ? b->slots[s] : s, begin = b->offsets[s];
        int64_t n = b->offsets[s + 1] - begin;
        if (c->states.rows) {
            ring_list(&c->states, slot, 0, c->states.length[slot], past);
            ring_list(&c->states, slot, c->states.length[slot], n, states + begin);
            past += c->states.length[slot];
        }
        if (c->keys.rows)
            ring_list(&c->keys, slot, c->keys.length[slot], n, keys + begin);
    }
}

/* What layers of a kind see in a cache: keys from `entry` on, which lie in a slot's rows from start
 * on, `entry` in row start + first; after `ring` rows they begin anew. Of a cache that does not
 * roll all keys; of a rolling one no more than it must still hold, and of a recurrence whole
 * segments, by which its operation counts. */
struct cached_past {
    int64_t entry, start, first, ring, segment;
};

static struct cached_past cached_past(const struct pass *p, enum mixer_kind kind, int64_t slot,
                                      int64_t held) {
    const struct kv_cache *c = p->batch->cache;
    const struct mixer_config *m = model_recalls(&p->m->config, kind);
    const struct kv_roll *r = m ? &c->roll[m - p->m->config.mixers] : NULL;
    struct cached_past past = {
        .start = slot * c->capacity, .ring = c->capacity, .segment = m ? m->segment : 1};
    if (!r || !r->ring)
        return past;
    past.entry = held - held % m->segment - m->keep;
    if (past.entry < 0)
        past.entry = 0;
    if (kind == MIXER_RECURRENCE)
        past.entry -= past.entry % m->segment;
    past.ring = r->ring * KV_PAGE;
    past.start = slot * kv_roll_rows(r, c->capacity);
    past.first = past.entry % past.ring;
    return past;
}

tril_status recall_begin(struct pass *p, recall_stage *stage, int64_t *used,
                         struct tril_error *err) {
    struct recall_inputs *in = &p->recall;
    const struct batch *b = p->batch;
    const struct carry *carry = b->carry;
    if (carry) {
        tril_status st = check_carry(p, err);
        if (st != TRIL_OK)
            return st;
        carry_stage(p, stage, used);
    }
    int32_t *start = stage(p, used, p->S, &in->past_start);
    int32_t *length = stage(p, used, p->S, &in->past_length);
    int32_t *ring_start = stage(p, used, p->S, &in->ring_start);
    int32_t *first = stage(p, used, p->S, &in->ring_first);
    int32_t *ring_length = stage(p, used, p->S, &in->ring_length);
    int32_t *position = stage(p, used, p->S, &in->ring_position);
    int32_t past = 0;
    for (int64_t s = 0; s < p->S; s++) {
        int64_t slot = b->slots ? b->slots[s] : s;
        int32_t n = b->offsets[s + 1] - b->offsets[s];
        start[s] = length[s] = first[s] = position[s] = 0;
        if (b->cache) {
            const int32_t held = b->cache->length[slot];
            const struct cached_past states = cached_past(p, MIXER_RECURRENCE, slot, held);
            const struct cached_past keys = cached_past(p, MIXER_MEMORY, slot, held);
            start[s] = (int32_t)(states.start + states.first);
            length[s] = (int32_t)(held - states.entry);
            ring_start[s] = (int32_t)keys.start;
            first[s] = (int32_t)keys.first;
            ring_length[s] = (int32_t)(held - keys.entry + n);
            position[s] = (int32_t)(keys.entry % keys.segment);
            in->ring = keys.ring;
        } else if (carry) {
            start[s] = past;
            past += length[s] = carry->states.length[slot];
            ring_start[s] = (int32_t)(slot * carry->keys.rows);
            first[s] = carry->keys.first[slot];
            ring_length[s] = carry->keys.length[slot] + n;
            position[s] = (int32_t)(carry->keys.dropped[slot] % carry->segment);
        } else {
            ring_start[s] = b->offsets[s];
            ring_length[s] = n;
        }
    }
    if (!carry) {
        int32_t *rows = b->cache ? NULL : stage(p, used, p->N, &in->ring_rows);
        for (int64_t n = 0; rows && n < p->N; n++)
            rows[n] = (int32_t)n;
        in->ring = b->cache ? in->ring : p->max_kv;
    }
    return TRIL_OK;
}

static void ring_push(struct carry_ring *r, int64_t slot, int64_t n) {
    if (!r->rows)
        return;
    int64_t length = r->length[slot] + n, drop = length > r->keep ? length - r->keep : 0;
    r->first[slot] = (int32_t)((r->first[slot] + drop) % r->rows);
    r->length[slot] = (int32_t)(length - drop);
    r->dropped[slot] += drop;
}

void recall_end(struct pass *p) {
    const struct batch *b = p->batch;
    for (int64_t s = 0; b->carry && recall_stages(&p->m->config) && s < p->S; s++) {
        int64_t slot = b->slots ? b->slots[s] : s, n = b->offsets[s + 1] - b->offsets[s];
        ring_push(&b->carry->states, slot, n);
        ring_push(&b->carry->keys, slot, n);
    }
}

/* ------------------------------------------------------------------ recurrence */

static const struct norm_site *norm1_of(int l, struct norm_site *site) {
    *site = (struct norm_site){PARAM_NORM1_GAIN, PARAM_NORM1_BIAS, l};
    return site;
}

/* The projected positions [R, H, d], of the distances that the call has; from the cache, where they
 * stay. */
static tril_status positions_forward(struct pass *p, int l, struct tensor *r,
                                     struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const int64_t D = m->config.dim, A = m->config.heads * m->config.head_dim;
    const int64_t all = model_distances(&m->config);
    struct kv_cache *cache = p->batch->cache;
    int64_t reach = p->max_kv;
    for (int64_t s = 0; p->batch->carry && s < p->S; s++) {
        int64_t slot = p->batch->slots ? p->batch->slots[s] : s;
        int64_t keys = p->batch->carry->states.length[slot] + p->max_q;
        reach = keys > reach ? keys : reach;
    }
    reach = cache || reach > all ? all : reach;
    *r = cache ? tensor_2d(cache->layer[l].r, m->dtype, reach, A)
               : activation_view(p->w, A_R, l, reach);
    if (!cache || !cache->layer[l].r_made)
        TRY(linear_forward(p->ctx, tensor_2d(m->sinusoids, m->dtype, reach, D),
                           param_weight(m, PARAM_RELATIVE, l), tensor_none(), tensor_none(), *r,
                           tensor_none(), ACT_NONE, err));
    if (cache)
        cache->layer[l].r_made = true;
    *r = tensor_heads(*r, m->config.heads);
    st = TRIL_OK;
done:
    return st;
}

/* Keys and values of what is carried in: from the layer's inputs, through its norm and QKV. */
static tril_status past_forward(struct pass *p, int l, struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const struct carry *c = p->batch->carry;
    const int64_t P = p->recall.past;
    struct norm_site site;
    struct tensor all = tensor_2d(c->layer[l].x, c->wide, c->slots * c->states.rows, c->dim);
    struct tensor x = activation_view(p->w, A_PAST_X, l, P);       /* [P, D] fp32 */
    struct tensor norm = activation_view(p->w, A_PAST_NORM, l, P); /* [P, D] act */
    TRY(gather_rows(p->ctx, all, p->recall.past_rows, x, err));
    TRY(norm_forward(p, *norm1_of(l, &site), x, norm, activation_view(p->w, A_PAST_MEAN, l, P),
                     activation_view(p->w, A_PAST_RSTD, l, P), err));
    TRY(linear_forward(p->ctx, norm, param_weight(m, PARAM_QKV, l),
                       param_vector(m, PARAM_QKV_BIAS, l), tensor_none(),
                       activation_view(p->w, A_PAST_QKV, l, P), tensor_none(), ACT_NONE, err));
done:
    return st;
}

/* u or w: [H, d]. */
static struct tensor bias_view(const struct model *m, struct tensor t) {
    return tensor_2d(t.data, t.dtype, m->config.heads, m->config.head_dim);
}

/* The operation's inputs; r is set by the caller. Brings the past, where it is carried. */
static tril_status recurrence_inputs(struct pass *p, int l, const struct qkv_views *v,
                                     struct relative_attention_inputs *in,
                                     struct relative_attention_params *params,
                                     struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model *m = p->m;
    const struct model_config *c = &m->config;
    const struct mixer_config *mixer = model_mixer(c, l);
    const int64_t H = c->heads, K = c->kv_heads, d = c->head_dim;
    *in = (struct relative_attention_inputs){
        .q = v->q,
        .k = v->k,
        .v = v->v,
        .q_offsets = p->offsets,
        .u = bias_view(m, param_vector(m, PARAM_CONTENT_BIAS, l)),
        .w = bias_view(m, param_vector(m, PARAM_POSITION_BIAS, l))};
    *params = (struct relative_attention_params){.scale = attention_params_make(p, l).scale};
    const struct kv_cache *cache = p->batch->cache;
    if (p->batch->carry) { /* everything carried in is seen */
        if (p->recall.past > 0) {
            struct tensor qkv = activation_view(p->w, A_PAST_QKV, l, p->recall.past);
            TRY(past_forward(p, l, err));
            in->past_k = heads_view(qkv, H * d, K, d);
            in->past_v = heads_view(qkv, (H + K) * d, K, d);
        }
    } else {
        params->segment = mixer->segment;
        params->memory = mixer->keep;
    }
    if (cache) {
        in->past_k = cache_view(p, l, cache->layer[l].k);
        in->past_v = cache_view(p, l, cache->layer[l].v);
    }
    if (in->past_k.data) {
        in->past_start = p->recall.past_start;
        in->past_length = p->recall.past_length;
    }
done:
    return st;
}

tril_status recurrence_forward(struct pass *p, int l, struct tensor x, const struct qkv_views *v,
                               struct tensor heads, struct tensor lse, struct tril_error *err) {
    tril_status st;
    struct relative_attention_inputs in;
    struct relative_attention_params params;
    struct qkv_views stored = *v;
    const struct carry *c = p->batch->carry;
    if (c)
        TRY(scatter_rows(p->ctx, x, p->recall.state_rows,
                         tensor_2d(c->layer[l].x, c->wide, c->slots * c->states.rows, c->dim),
                         err));
    if (p->batch->cache)
        TRY(cache_forward(p, l, &stored, err));
    if (p->wanted == 0 && l == p->m->config.layers - 1)
        return TRIL_OK; /* only the cache was to be filled */
    TRY(recurrence_inputs(p, l, v, &in, &params, err));
    TRY(positions_forward(p, l, &in.r, err));
    TRY(relative_attention_forward(p->ctx, &in, heads, lse, params, err));
    if (p->w->watch && p->w->watch_relative)
        TRY(p->w->watch_relative(p->w->watch_arg, l, &in, lse, &params, err));
done:
    return st;
}

tril_status recurrence_backward(struct pass *p, int l, struct tensor heads, struct tensor dheads,
                                const struct qkv_views *v, const struct qkv_views *g,
                                struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const struct model_config *c = &m->config;
    const int64_t H = c->heads, K = c->kv_heads, d = c->head_dim;
    struct relative_attention_inputs in;
    struct relative_attention_params params;
    TRY(recurrence_inputs(p, l, v, &in, &params, err));
    TRY(positions_forward(p, l, &in.r, err));
    struct tensor dr = activation_view(p->w, A_DR, l, in.r.shape[0]); /* [R, H d] act */
    struct relative_attention_gradients out = {
        .dq = g->q,
        .dk = g->k,
        .dv = g->v,
        .du = bias_view(m, param_gradient(m, PARAM_CONTENT_BIAS, l)),
        .dw = bias_view(m, param_gradient(m, PARAM_POSITION_BIAS, l)),
        .dr = tensor_heads(dr, H)};
    if (p->recall.past > 0) {
        struct tensor dpast = activation_view(p->w, A_DPAST_QKV, l, p->recall.past);
        TRY(p->ctx->backend->fill_zero(p->ctx, dpast.data, tensor_bytes(&dpast), err));
        out.dpast_k = heads_view(dpast, H * d, K, d);
        out.dpast_v = heads_view(dpast, (H + K) * d, K, d);
    }
    TRY(relative_attention_backward(p->ctx, &in, tensor_heads(heads, H),
                                    activation_view(p->w, A_LSE, l, p->N), tensor_heads(dheads, H),
                                    &out, params, err));
    TRY(linear_backward_weight(p->ctx, dr, tensor_2d(m->sinusoids, m->dtype, dr.shape[0], c->dim),
                               param_gradient(m, PARAM_RELATIVE, l), tensor_none(), p->overwrite,
                               err));
done:
    return st;
}

tril_status past_backward(struct pass *p, int l, struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const int64_t P = p->recall.past;
    struct norm_site site;
    struct tensor dqkv = activation_view(p->w, A_DPAST_QKV, l, P);   /* [P, (H + 2K) d] act */
    struct tensor dnorm = activation_view(p->w, A_DPAST_NORM, l, P); /* [P, D] act */
    struct tensor dx = activation_view(p->w, A_DPAST_X, l, P);       /* [P, D] fp32, not used */
    TRY(linear_backward_weight(p->ctx, dqkv, activation_view(p->w, A_PAST_NORM, l, P),
                               param_gradient(m, PARAM_QKV, l),
                               param_gradient(m, PARAM_QKV_BIAS, l), false, err));
    TRY(linear_backward_input(p->ctx, dqkv, param_weight(m, PARAM_QKV, l), dnorm, err));
    TRY(p->ctx->backend->fill_zero(p->ctx, dx.data, tensor_bytes(&dx), err));
    TRY(norm_backward(p, *norm1_of(l, &site), dnorm, activation_view(p->w, A_PAST_X, l, P),
                      activation_view(p->w, A_PAST_MEAN, l, P),
                      activation_view(p->w, A_PAST_RSTD, l, P), dx, err));
done:
    return st;
}

/* ------------------------------------------------------------------ memory */

/* Where the memory of a layer lies, [rows, K, d]: in the cache, the carry, or the call's own
 * tensors. */
static void memory_views(const struct pass *p, int l, const struct qkv_views *v, struct tensor *k,
                         struct tensor *values) {
    const struct model_config *c = &p->m->config;
    const struct kv_cache *cache = p->batch->cache;
    const struct carry *carry = p->batch->carry;
    const int64_t K = c->kv_heads, d = c->head_dim;
    if (cache) {
        *k = cache_view(p, l, cache->layer[l].raw ? cache->layer[l].raw : cache->layer[l].k);
        *values = cache_view(p, l, cache->layer[l].v);
    } else if (carry) {
        *k = tensor_3d(carry->layer[l].k, carry->act, carry->slots * carry->keys.rows, K, d);
        *values = *k;
        values->data = carry->layer[l].v;
    } else {
        struct tensor raw = activation_view(p->w, A_RECALL_KEYS, l, p->N);
        *k = raw.data ? tensor_heads(raw, K) : v->k;
        *values = v->v;
    }
}

tril_status memory_forward(struct pass *p, int l, const struct qkv_views *v,
                           struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *c = &p->m->config;
    const struct mixer_config *mixer = model_mixer(c, l);
    const int64_t H = c->heads;
    struct tensor rows = p->batch->cache ? cache_rows(p, l) : p->recall.ring_rows;
    struct memory_attention_inputs in = {.q = v->q,
                                         .q_offsets = p->offsets,
                                         .kv_start = p->recall.ring_start,
                                         .kv_first = p->recall.ring_first,
                                         .kv_length = p->recall.ring_length,
                                         .kv_position = p->recall.ring_position};
    struct memory_attention_params params = {.scale = attention_params_make(p, l).scale,
                                             .segment = mixer->segment,
                                             .capacity = mixer->keep,
                                             .ring = p->recall.ring};
    memory_views(p, l, v, &in.k, &in.v);
    if (p->batch->cache || p->batch->carry) {
        TRY(cache_store(p->ctx, v->k, rows, in.k, err));
        TRY(cache_store(p->ctx, v->v, rows, in.v, err));
    } else if (in.k.data != v->k.data) {
        TRY(cache_store(p->ctx, v->k, p->recall.ring_rows, in.k, err));
    }
    if (p->wanted == 0 && l == c->layers - 1)
        goto done;
    TRY(memory_attention_forward(p->ctx, &in,
                                 tensor_heads(activation_view(p->w, A_RECALLED, l, p->N), H),
                                 tensor_heads(activation_view(p->w, A_RECALL_ROWS, l, p->N), H),
                                 tensor_heads(activation_view(p->w, A_RECALL_WEIGHTS, l, p->N), H),
                                 activation_view(p->w, A_RECALL_LSE, l, p->N), params, err));
done:
    return st;
}

tril_status memory_gate(struct pass *p, int l, struct tensor heads, struct tril_error *err) {
    const int64_t H = p->m->config.heads;
    return gate_forward(p->ctx, tensor_heads(activation_view(p->w, A_LOCAL, l, p->N), H),
                        tensor_heads(activation_view(p->w, A_RECALLED, l, p->N), H),
                        activation_view(p->w, A_RECALL_LSE, l, p->N),
                        param_vector(p->m, PARAM_MEMORY_GATE, l), tensor_heads(heads, H), err);
}

tril_status memory_gate_backward(struct pass *p, int l, struct tensor dheads,
                                 struct tril_error *err) {
    const int64_t H = p->m->config.heads;
    return gate_backward(
        p->ctx, tensor_heads(dheads, H), tensor_heads(activation_view(p->w, A_LOCAL, l, p->N), H),
        tensor_heads(activation_view(p->w, A_RECALLED, l, p->N), H),
        activation_view(p->w, A_RECALL_LSE, l, p->N), param_vector(p->m, PARAM_MEMORY_GATE, l),
        tensor_heads(activation_view(p->w, A_DLOCAL, l, p->N), H),
        tensor_heads(activation_view(p->w, A_DRECALLED, l, p->N), H),
        param_gradient(p->m, PARAM_MEMORY_GATE, l), err);
}

tril_status memory_backward(struct pass *p, int l, const struct qkv_views *v, struct tensor dq,
                            struct tril_error *err) {
    const int64_t H = p->m->config.heads;
    struct tensor k, values;
    memory_views(p, l, v, &k, &values);
    return memory_attention_backward(
        p->ctx, k, values, tensor_heads(activation_view(p->w, A_RECALL_ROWS, l, p->N), H),
        tensor_heads(activation_view(p->w, A_RECALL_WEIGHTS, l, p->N), H),
        tensor_heads(activation_view(p->w, A_RECALLED, l, p->N), H),
        tensor_heads(activation_view(p->w, A_DRECALLED, l, p->N), H), dq,
        attention_params_make(p, l).scale, err);
}

/* ------------------------------------------------------------------ retrieval */

bool retrieval_applies(const struct pass *p, int l) {
    const struct kv_cache *c = p->batch->cache;
    return c && c->layer[l].low && p->max_q == 1 && !p->w->watch;
}

/* What part of the full attention's probability was found, summed over heads and sequences. */
static tril_status measure_found(struct pass *p, struct tril_error *err) {
    struct kv_cache *c = p->batch->cache;
    const int64_t n = c->heads * p->S;
    float *lse = malloc((size_t)(2 * n) * sizeof *lse);
    if (!lse)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to measure retrieval");
    tril_status st =
        p->ctx->backend->download(p->ctx, lse, c->lse, 2 * n * (int64_t)sizeof *lse, err);
    for (int64_t i = 0; i < n && st == TRIL_OK; i++) {
        c->found_sum += exp((double)lse[n + i] - (double)lse[i]);
        c->found += 1;
    }
    free(lse);
    return st;
}

tril_status retrieval_forward(struct pass *p, int l, const struct attention_inputs *full,
                              struct tensor heads, const struct attention_params *a,
                              struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct kv_cache *c = p->batch->cache;
    const struct kv_retrieve *r = &c->retrieve;
    const int64_t blocks = (full->k.shape[0] + r->block - 1) / r->block;
    const int64_t K = c->kv_heads, d = c->head_dim;
    struct retrieve_inputs in = {.q = full->q,
                                 .k = full->k,
                                 .v = full->v,
                                 .kv_start = full->kv_start,
                                 .kv_length = full->kv_length,
                                 .low = tensor_3d(c->layer[l].low, DT_F32, blocks, K, d),
                                 .high = tensor_3d(c->layer[l].high, DT_F32, blocks, K, d)};
    struct retrieve_params params = {
        .scale = a->scale, .block = r->block, .first = r->first, .last = r->last, .top = r->top};
    struct tensor lse = tensor_2d(c->lse, DT_F32, c->heads, p->S), part = tensor_none();
    if (r->measure) {
        TRY(attention_forward(p->ctx, full, heads, lse, a, err));
        part = lse;
        part.data = c->lse + c->heads * p->S;
    }
    TRY(retrieve(p->ctx, &in, heads, part,
                 tensor_3d(c->blocks, DT_I32, p->S, K, r->first + r->last + r->top), params, err));
    if (r->measure)
        TRY(measure_found(p, err));
done:
    return st;
}
