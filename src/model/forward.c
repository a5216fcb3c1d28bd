/* The forward pass, one function per part of a layer.
 *
 *   x [N, D] fp32 is the residual stream; everything between a norm and the next residual addition
 *   is in the compute dtype ("act"). A training pass keeps what the activation table says; an
 *   inference pass reuses one set of buffers and adds to x in place. */
#include <math.h>

#include "model/ablate.h"
#include "model/internal.h"

/* ------------------------------------------------------------------ helpers */

tril_status norm_forward(struct pass *p, struct norm_site site, struct tensor x, struct tensor y,
                         struct tensor mean, struct tensor rstd, struct tril_error *err) {
    struct norm_params params = {.eps = p->m->config.norm_eps};
    struct tensor gain = param_vector(p->m, site.gain, site.layer);
    if (ablated(p->m, site.layer, OFF_NORM)) {
        int64_t n = x.shape[0] * x.shape[1];
        return cast(p->ctx, tensor_1d(x.data, x.dtype, n), tensor_1d(y.data, y.dtype, n), err);
    }
    if (p->m->config.norm == NORM_RMSNORM)
        return rmsnorm_forward(p->ctx, x, gain, y, rstd, params, err);
    struct tensor bias = param_vector(p->m, site.bias, site.layer);
    return layernorm_forward(p->ctx, x, gain, bias, y, mean, rstd, params, err);
}

struct tensor heads_view(struct tensor t, int64_t begin, int64_t heads, int64_t d) {
    struct tensor h = t;
    h.data = (char *)t.data + (size_t)begin * dtype_size(t.dtype);
    h.rank = 3;
    h.shape[1] = heads;
    h.shape[2] = d;
    h.stride[1] = d;
    h.stride[2] = 1;
    return h;
}

struct qkv_views qkv_views_make(const struct pass *p, int layer) {
    const struct model_config *c = &p->m->config;
    const int64_t d = c->head_dim, H = c->heads, K = c->kv_heads;
    struct tensor qkv = activation_view(p->w, A_QKV, layer, p->N);
    struct qkv_views v = {0};
    v.q = v.raw_q = heads_view(qkv, 0, H, d);
    v.k = v.raw_k = heads_view(qkv, H * d, K, d);
    v.v = heads_view(qkv, (H + K) * d, K, d);
    if (c->qk_norm) {
        struct tensor qk = activation_view(p->w, A_QK, layer, p->N);
        v.q = heads_view(qk, 0, H, d);
        v.k = heads_view(qk, H * d, K, d);
        v.q_rstd = activation_view(p->w, A_Q_RSTD, layer, p->N);
        v.k_rstd = activation_view(p->w, A_K_RSTD, layer, p->N);
    }
    return v;
}

struct qkv_views qkv_gradient_views(const struct pass *p) {
    const struct model_config *c = &p->m->config;
    const int64_t d = c->head_dim, H = c->heads, K = c->kv_heads;
    struct tensor dqkv = activation_view(p->w, A_DQKV, 0, p->N);
    return (struct qkv_views){.q = heads_view(dqkv, 0, H, d),
                              .k = heads_view(dqkv, H * d, K, d),
                              .v = heads_view(dqkv, (H + K) * d, K, d)};
}

struct attention_params attention_params_make(const struct pass *p, int layer) {
    const struct model_config *c = &p->m->config;
    const struct mixer_config *mixer = model_mixer(c, layer);
    const struct visible_set *rules = &p->m->mixers[c->layer_mixer[layer]].rules;
    double scale = c->scale_attention ? 1.0 / sqrt((double)c->head_dim) : 1.0;
    if (c->scale_by_layer)
        scale /= layer + 1;
    if (ablated(p->m, layer, OFF_SCALE))
        scale = 1;
    struct attention_params a = {.scale = (float)scale,
                                 .softcap = mixer->softcap,
                                 .causal = true,
                                 .page_size = KV_PAGE,
                                 .max_q = p->max_q,
                                 .max_kv = p->max_kv,
                                 .dropout = p->keep ? c->dropout_attention : 0,
                                 .key = p->key};
    a.key.layer = (uint32_t)layer;
    a.key.op = RANDOM_DROPOUT_ATTENTION;
    if (mixer->rules[0] ||
        mixer->kind == MIXER_MEMORY) { /* without: plainly causal, which kernels know best */
        a.rules = rules->rules;
        a.rule_count = rules->rule_count;
        a.head_rule = rules->head_rule;
    }
    return a;
}

struct attention_inputs attention_inputs_make(const struct pass *p, int layer,
                                              const struct qkv_views *v) {
    const struct model *m = p->m;
    const bool alibi = m->slopes && !model_mixer(&m->config, layer)->no_position &&
                       !ablated(m, layer, OFF_POSITION);
    return (struct attention_inputs){
        .q = v->q,
        .k = v->k,
        .v = v->v,
        .k_scale = v->k_scale,
        .v_scale = v->v_scale,
        .q_offsets = p->offsets,
        .kv_start = p->kv_start,
        .kv_length = p->kv_length,
        .slopes = alibi ? tensor_1d(m->slopes, model_wide(m), m->config.heads) : tensor_none(),
        .pages = p->pages[m->config.layer_mixer[layer]],
        .sink = param_vector(m, PARAM_SINKS, layer),
        .step = p->step};
}

tril_status rotate(struct pass *p, int layer, struct tensor q, struct tensor k, bool back,
                   struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *c = &p->m->config;
    const struct mixer_tables *t = &p->m->mixers[c->layer_mixer[layer]];
    const struct rope_params params = {0};
    if (!t->rope_cos || ablated(p->m, layer, OFF_POSITION))
        return TRIL_OK;
    struct tensor cosines = tensor_2d(t->rope_cos, model_wide(p->m), c->context, c->rope_dim / 2);
    struct tensor sines = tensor_2d(t->rope_sin, model_wide(p->m), c->context, c->rope_dim / 2);
    if (back) {
        TRY(rope_backward(p->ctx, q, p->positions, cosines, sines, params, err));
        TRY(rope_backward(p->ctx, k, p->positions, cosines, sines, params, err));
    } else {
        TRY(rope_forward(p->ctx, q, p->positions, cosines, sines, params, err));
        TRY(rope_forward(p->ctx, k, p->positions, cosines, sines, params, err));
    }
done:
    return st;
}

struct dropout_params dropout_params_make(const struct pass *p, enum random_use use, int layer) {
    const struct model_config *c = &p->m->config;
    struct dropout_params d = {.key = p->key};
    if (p->keep)
        d.p = use == RANDOM_DROPOUT_EMBED ? c->dropout_embedding : c->dropout_residual;
    d.key.layer = (uint32_t)layer;
    d.key.op = use;
    return d;
}

/* The end of a branch: out = x + dropout(in W^T + bias). in [rows, I] act; x, out [rows, D] fp32,
 * which may be the same. */
static tril_status branch_end(struct pass *p, int layer, enum param_role weight,
                              enum param_role bias, enum random_use use, struct tensor in,
                              struct tensor x, struct tensor out, struct tril_error *err) {
    tril_status st;
    const struct weight *w = param_weight(p->m, weight, layer);
    struct tensor b = param_vector(p->m, bias, layer);
    struct dropout_params drop = dropout_params_make(p, use, layer);
    if (ablated(p->m, layer, OFF_RESIDUAL))
        x = tensor_none();
    if (!(drop.p > 0))
        return linear_forward(p->ctx, in, w, b, x, out, tensor_none(), ACT_NONE, err);
    struct tensor branch = activation_view(p->w, A_BRANCH, layer, in.shape[0]); /* [N, D] act */
    TRY(linear_forward(p->ctx, in, w, b, tensor_none(), branch, tensor_none(), ACT_NONE, err));
    TRY(dropout_forward(p->ctx, branch, x, p->step, out, drop, err));
done:
    return st;
}

/* ------------------------------------------------------------------ attention */

struct tensor cache_view(const struct pass *p, int l, void *data) {
    const struct kv_cache *c = p->batch->cache;
    const struct kv_roll *roll = &c->roll[p->m->config.layer_mixer[l]];
    return tensor_3d(data, c->dtype, c->slots * kv_roll_rows(roll, c->capacity), c->kv_heads,
                     c->head_dim);
}

struct tensor cache_rows(const struct pass *p, int l) {
    const int mixer = p->m->config.layer_mixer[l];
    return p->batch->cache->roll[mixer].ring ? p->roll_rows[mixer] : p->cache_rows;
}

/* norm 1, QKV, qk-norm, RoPE: x [N, D] -> q [N, H, d], k, v [N, K, d]. */
static tril_status qkv_forward(struct pass *p, int l, struct tensor x, struct qkv_views *v,
                               struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    struct workspace *w = p->w;
    struct tensor mean = activation_view(w, A_MEAN1, l, p->N);  /* [N] */
    struct tensor rstd = activation_view(w, A_RSTD1, l, p->N);  /* [N] */
    struct tensor norm1 = activation_view(w, A_NORM1, l, p->N); /* [N, D] act */
    struct tensor qkv = activation_view(w, A_QKV, l, p->N);     /* [N, (H + 2K) d] act */
    *v = qkv_views_make(p, l);

    TRY(norm_forward(p, (struct norm_site){PARAM_NORM1_GAIN, PARAM_NORM1_BIAS, l}, x, norm1, mean,
                     rstd, err));
    hook(p, l, "norm 1", norm1);
    TRY(linear_forward(p->ctx, norm1, param_weight(m, PARAM_QKV, l),
                       param_vector(m, PARAM_QKV_BIAS, l), tensor_none(), qkv, tensor_none(),
                       ACT_NONE, err));
    hook(p, l, "attention / qkv", qkv);
    if (m->config.qk_norm) {
        struct norm_params params = {.eps = m->config.norm_eps};
        TRY(rmsnorm_forward(p->ctx, v->raw_q, param_vector(m, PARAM_Q_NORM, l), v->q, v->q_rstd,
                            params, err));
        TRY(rmsnorm_forward(p->ctx, v->raw_k, param_vector(m, PARAM_K_NORM, l), v->k, v->k_rstd,
                            params, err));
    }
    if (model_mixer(&m->config, l)->kind == MIXER_MEMORY)
        TRY(memory_forward(p, l, v, err));
    const struct kv_cache *cache = p->batch->cache;
    if (cache && cache->layer[l].raw)
        TRY(cache_store(p->ctx, v->k, cache_rows(p, l), cache_view(p, l, cache->layer[l].raw),
                        err));
    TRY(rotate(p, l, v->q, v->k, false, err));
    if (ablated(m, l, OFF_Q))
        TRY(ablate_q(m, v->q, err));
    hook(p, l, "attention / q", v->q);
    hook(p, l, "attention / k", v->k);
    hook(p, l, "attention / v", v->v);
done:
    return st;
}

tril_status cache_forward(struct pass *p, int l, struct qkv_views *v, struct tril_error *err) {
    tril_status st;
    const struct kv_cache *c = p->batch->cache;
    const int mixer = p->m->config.layer_mixer[l];
    const struct tensor k = cache_view(p, l, c->layer[l].k), rows = cache_rows(p, l);
    const struct tensor values = cache_view(p, l, c->layer[l].v);
    if (c->dtype == DT_I8) {
        struct tensor k_scale = tensor_2d(c->layer[l].k_scale, DT_F32, k.shape[0], c->kv_heads);
        struct tensor v_scale = tensor_2d(c->layer[l].v_scale, DT_F32, k.shape[0], c->kv_heads);
        TRY(cache_store_quantised(p->ctx, v->k, rows, k, k_scale, err));
        TRY(cache_store_quantised(p->ctx, v->v, rows, values, v_scale, err));
        v->k_scale = k_scale;
        v->v_scale = v_scale;
    } else {
        TRY(cache_store(p->ctx, v->k, rows, k, err));
        TRY(cache_store(p->ctx, v->v, rows, values, err));
    }
    if (c->roll[mixer].twice) {
        TRY(cache_store(p->ctx, v->k, p->roll_again[mixer], k, err));
        TRY(cache_store(p->ctx, v->v, p->roll_again[mixer], values, err));
    }
    if (c->layer[l].low) {
        int64_t blocks = (k.shape[0] + c->retrieve.block - 1) / c->retrieve.block;
        TRY(block_bounds(p->ctx, k, p->kv_start, p->held, p->kv_length,
                         tensor_3d(c->layer[l].low, DT_F32, blocks, c->kv_heads, c->head_dim),
                         tensor_3d(c->layer[l].high, DT_F32, blocks, c->kv_heads, c->head_dim),
                         c->retrieve.block, err));
    }
    v->k = k;
    v->v = values;
done:
    return st;
}

/* Linear attention: with a cache from the sequences' sums, which it brings up to date. */
static tril_status linear_heads_forward(struct pass *p, int l, const struct qkv_views *v,
                                        struct tensor heads, struct tril_error *err) {
    tril_status st;
    const struct model_config *c = &p->m->config;
    const struct kv_cache *cache = p->batch->cache;
    const struct linear_attention_params params = {.causal = true};
    if (!cache)
        return linear_attention_forward(p->ctx, v->q, v->k, v->v, p->offsets, tensor_none(), heads,
                                        tensor_none(), params, err);
    const int64_t K = c->kv_heads, d = c->head_dim, size = K * d * (d + 1);
    struct tensor all = tensor_2d(cache->layer[l].sums, DT_F32, cache->slots, size);
    struct tensor own = activation_view(p->w, A_SUMS, 0, p->S);
    if (p->slots_adjoin) { /* the usual case: no copies */
        own = all;
        own.data = cache->layer[l].sums + p->batch->slots[0] * size;
    } else {
        TRY(gather_rows(p->ctx, all, p->slots, own, err));
    }
    struct tensor sums = tensor_4d(own.data, DT_F32, p->S, K, d, d + 1);
    TRY(linear_attention_forward(p->ctx, v->q, v->k, v->v, p->offsets, sums, heads, sums, params,
                                 err));
    if (!p->slots_adjoin)
        TRY(scatter_rows(p->ctx, own, p->slots, all, err));
done:
    return st;
}

/* x [N, D] -> heads [N, H d] act, the attention's output before its projection. */
static tril_status heads_forward(struct pass *p, int l, struct tensor x, struct tensor heads,
                                 struct tril_error *err) {
    tril_status st;
    const struct model_config *c = &p->m->config;
    struct qkv_views v;
    struct attention_params a = attention_params_make(p, l);
    struct tensor lse = lse_view(p, l); /* [H, N], or absent */
    TRY(qkv_forward(p, l, x, &v, err));
    if (model_mixer(c, l)->kind == MIXER_LINEAR) {
        TRY(linear_heads_forward(p, l, &v, heads_view(heads, 0, c->heads, c->head_dim), err));
        TRY(ablate_heads(p->m, l, heads, err));
        hook(p, l, "attention / heads", heads);
        goto done;
    }
    if (model_mixer(c, l)->kind == MIXER_RECURRENCE) {
        TRY(recurrence_forward(p, l, x, &v, heads_view(heads, 0, c->heads, c->head_dim), lse, err));
        TRY(ablate_heads(p->m, l, heads, err));
        hook(p, l, "attention / heads", heads);
        goto done;
    }
    const bool gated = model_mixer(c, l)->kind == MIXER_MEMORY;
    struct tensor local = gated ? activation_view(p->w, A_LOCAL, l, p->N) : heads;
    if (p->batch->cache)
        TRY(cache_forward(p, l, &v, err));
    if (p->wanted == 0 && l == c->layers - 1)
        goto done; /* only the cache was to be filled */
    struct attention_inputs in = attention_inputs_make(p, l, &v);
    if (retrieval_applies(p, l))
        TRY(retrieval_forward(p, l, &in, heads_view(heads, 0, c->heads, c->head_dim), &a, err));
    else
        TRY(attention_forward(p->ctx, &in, heads_view(local, 0, c->heads, c->head_dim), lse, &a,
                              err));
    if (p->w->watch)
        TRY(p->w->watch(p->w->watch_arg, l, &in, lse, &a, err));
    if (gated)
        TRY(memory_gate(p, l, heads, err));
    TRY(ablate_heads(p->m, l, heads, err));
    hook(p, l, "attention / heads", heads);
done:
    return st;
}

/* ------------------------------------------------------------------ FFN */

/* norm 2, first matrix, activation: x [rows, D] fp32 -> hidden [rows, F] act. */
static tril_status hidden_forward(struct pass *p, int l, struct tensor x, struct tensor hidden,
                                  struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const struct weight *up = param_weight(m, PARAM_FFN_UP, l);
    const int64_t rows = x.shape[0];
    const enum activation activation = m->config.activation;
    struct tensor bias = param_vector(m, PARAM_FFN_UP_BIAS, l);
    struct tensor mean = activation_view(p->w, A_MEAN2, l, rows);  /* [N] */
    struct tensor rstd = activation_view(p->w, A_RSTD2, l, rows);  /* [N] */
    struct tensor norm2 = activation_view(p->w, A_NORM2, l, rows); /* [N, D] act */
    struct tensor pre = activation_view(p->w, A_PRE, l, rows);     /* [N, F or 2F] act, or absent */

    TRY(norm_forward(p, (struct norm_site){PARAM_NORM2_GAIN, PARAM_NORM2_BIAS, l}, x, norm2, mean,
                     rstd, err));
    hook(p, l, "norm 2", norm2);
    if (m->config.ffn_kind == FFN_GATED) {
        TRY(linear_forward(p->ctx, norm2, up, bias, tensor_none(), pre, tensor_none(), ACT_NONE,
                           err));
        hook(p, l, "ffn / gate and up", pre);
        TRY(gated_forward(p->ctx, pre, hidden, activation, err));
    } else if (pre.data) {
        /* Not fused: recomputation must find the same bits from the stored pre-activation. */
        TRY(linear_forward(p->ctx, norm2, up, bias, tensor_none(), pre, tensor_none(), ACT_NONE,
                           err));
        hook(p, l, "ffn / up", pre);
        TRY(activation_forward(p->ctx, pre, hidden, activation, err));
    } else {
        TRY(linear_forward(p->ctx, norm2, up, bias, tensor_none(), hidden, tensor_none(),
                           activation, err));
    }
    hook(p, l, "ffn / hidden", hidden);
done:
    return st;
}

/* ------------------------------------------------------------------ layers */

/* From here on the last layer needs only the rows whose logits are wanted. */
static tril_status gather_wanted(struct pass *p, struct tensor *x, struct tensor *heads,
                                 struct tril_error *err) {
    tril_status st;
    struct tensor rows_x = activation_view(p->w, A_ROWS_X, 0, p->wanted);
    struct tensor rows_heads = activation_view(p->w, A_ROWS_HEADS, 0, p->wanted);
    TRY(gather_rows(p->ctx, *x, p->rows, rows_x, err));
    TRY(gather_rows(p->ctx, *heads, p->rows, rows_heads, err));
    *x = rows_x;
    *heads = rows_heads;
done:
    return st;
}

tril_status layer_forward(struct pass *p, int l, bool again, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const bool ffn = p->m->config.ffn_kind != FFN_NONE && !ablated(p->m, l, OFF_MLP);
    const bool attention = !ablated(p->m, l, OFF_ATTENTION);
    struct tensor x = activation_view(p->w, A_X, l, p->N);             /* [N, D] fp32 */
    struct tensor heads = activation_view(p->w, A_ATTENTION, l, p->N); /* [N, H d] act */
    if (attention)
        TRY(heads_forward(p, l, x, heads, err));
    if (again && !ffn)
        goto done;
    if (l == p->m->config.layers - 1 && !p->keep) {
        if (p->wanted == 0)
            goto done;
        if (p->gather_early)
            TRY(gather_wanted(p, &x, &heads, err));
    }
    /* Where x is kept, each addition goes to a buffer of its own; otherwise it is in place. */
    const bool kept = p->w->options.backward;
    struct tensor next = kept ? activation_view(p->w, A_X, l + 1, p->N) : x;
    struct tensor mid = kept && ffn ? activation_view(p->w, A_MID, l, p->N) : next;
    if (attention)
        TRY(branch_end(p, l, PARAM_ATTENTION_OUT, PARAM_ATTENTION_OUT_BIAS,
                       RANDOM_DROPOUT_RESIDUAL_ATTENTION, heads, x, mid, err));
    hook(p, l, "x after attention", mid);
    if (ffn) {
        struct tensor hidden = activation_view(p->w, A_HIDDEN, l, mid.shape[0]); /* [N, F] act */
        TRY(hidden_forward(p, l, mid, hidden, err));
        if (again)
            goto done;
        TRY(branch_end(p, l, PARAM_FFN_DOWN, PARAM_FFN_DOWN_BIAS, RANDOM_DROPOUT_RESIDUAL_FFN,
                       hidden, mid, next, err));
        hook(p, l, "x after ffn", next);
    }
done:
    return st;
}

tril_status layers_forward(struct pass *p, struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const struct weight *wpe = param_weight(m, PARAM_POSITION_EMBEDDING, -1);
    struct tensor x = activation_view(p->w, A_X, 0, p->N); /* [N, D] fp32 */
    TRY(layer_acquire(m, -1, err));
    if (ablated(m, -1, OFF_POSITION))
        wpe = NULL;
    TRY(embed_forward(p->ctx, p->ids, wpe ? p->positions : tensor_none(),
                      param_weight(m, PARAM_TOKEN_EMBEDDING, -1)->value,
                      wpe ? wpe->value : tensor_none(), x, err));
    struct dropout_params drop = dropout_params_make(p, RANDOM_DROPOUT_EMBED, 0);
    if (drop.p > 0)
        TRY(dropout_forward(p->ctx, x, tensor_none(), p->step, x, drop, err));
    hook(p, -1, "x", x);
    TRY(layer_release(m, -1, err));
    for (int l = 0; l < m->config.layers; l++) {
        TRY(layer_acquire(m, l, err));
        TRY(offload_before_forward(p, l, err));
        TRY(layer_forward(p, l, false, err));
        TRY(offload_after_forward(p, l, err));
        TRY(layer_release(m, l, err));
    }
done:
    return st;
}

tril_status logits_body(void *arg, struct tril_error *err) {
    struct pass *p = arg;
    tril_status st;
    TRY(layers_forward(p, err));
    TRY(head_forward(p, err));
done:
    return st;
}

/* The pass up to the logits, which stay in the backend's memory. */
static tril_status logits_begin(struct pass *p, struct model *m, struct workspace *w,
                                const struct batch *b, bool wanted, const struct sample_rows *draw,
                                struct tril_error *err) {
    tril_status st;
    TRY(pass_begin(p, m, w, b, false, NULL, err));
    p->wanted = !wanted ? 0 : b->rows ? b->row_count : p->N;
    p->draw = draw;
    p->gather_early =
        !w->options.backward && b->rows && p->wanted < p->N && p->wanted <= w->layout.head_rows;
    TRY(pass_run(p, draw ? "draw" : "logits", 0, logits_body, p, err));
done:
    return st;
}

/* The call's tokens are in the cache now. */
static void logits_end(struct pass *p) {
    const struct batch *b = p->batch;
    if (b->cache)
        for (int64_t s = 0; s < p->S; s++) {
            int32_t slot = b->slots[s];
            b->cache->length[slot] += b->offsets[s + 1] - b->offsets[s];
            b->cache->summed[slot] = b->cache->length[slot];
            if (b->cache->reached[slot] < b->cache->length[slot])
                b->cache->reached[slot] = b->cache->length[slot];
        }
    recall_end(p);
}

tril_status model_forward(struct model *m, struct workspace *w, const struct batch *b,
                          float *logits, struct tril_error *err) {
    tril_status st;
    struct pass p;
    TRY(logits_begin(&p, m, w, b, logits != NULL, NULL, err));
    TRY(head_logits(&p, logits, err));
    logits_end(&p);
done:
    return st;
}

tril_status model_draw(struct model *m, struct workspace *w, const struct batch *b,
                       const struct sample_rows *rows, struct tril_error *err) {
    tril_status st;
    struct pass p;
    TRY(logits_begin(&p, m, w, b, true, rows, err));
    logits_end(&p);
done:
    return st;
}
