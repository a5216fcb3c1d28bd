/* The backward pass: A_DX [N, D] fp32 is the gradient of the residual stream. It flows unchanged
 * through every addition; each branch takes a copy in the compute dtype, runs backwards, and its
 * norm adds the result back onto A_DX. Gradients of parameters accumulate into the model's arena.
 */
#include "model/internal.h"

tril_status norm_backward(struct pass *p, struct norm_site site, struct tensor dy, struct tensor x,
                          struct tensor mean, struct tensor rstd, struct tensor dx,
                          struct tril_error *err) {
    struct norm_params params = {.eps = p->m->config.norm_eps};
    struct tensor gain = param_vector(p->m, site.gain, site.layer);
    struct tensor dgain = param_gradient(p->m, site.gain, site.layer);
    if (p->m->config.norm == NORM_RMSNORM)
        return rmsnorm_backward(p->ctx, dy, x, gain, rstd, dx, dgain, params, err);
    struct tensor dbias = param_gradient(p->m, site.bias, site.layer);
    return layernorm_backward(p->ctx, dy, x, gain, mean, rstd, dx, dgain, dbias, params, err);
}

/* The gradient of a branch's last product, before its dropout: A_DX in the compute dtype. */
static tril_status branch_gradient(struct pass *p, int l, enum random_use use, struct tensor *dy,
                                   struct tril_error *err) {
    struct tensor dx = activation_view(p->w, A_DX, 0, p->N); /* [N, D] fp32 */
    *dy = activation_view(p->w, A_DY, 0, p->N);              /* [N, D] act, or absent */
    struct dropout_params drop = dropout_params_make(p, use, l);
    if (drop.p > 0)
        return dropout_backward(p->ctx, dx, p->step, *dy, drop, err);
    if (dy->data)
        return cast(p->ctx, tensor_1d(dx.data, dx.dtype, tensor_count(&dx)),
                    tensor_1d(dy->data, dy->dtype, tensor_count(dy)), err);
    *dy = dx; /* the same dtype, and nothing to undo */
    return TRIL_OK;
}

/* y = x W^T + b: dW += dy^T x, db += sum dy, and dx = dy W. */
static tril_status linear_backward(struct pass *p, int l, enum param_role weight,
                                   enum param_role bias, struct tensor dy, struct tensor x,
                                   struct tensor dx, struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    TRY(linear_backward_weight(p->ctx, dy, x, param_gradient(m, weight, l),
                               param_gradient(m, bias, l), p->overwrite, err));
    TRY(linear_backward_input(p->ctx, dy, param_weight(m, weight, l), dx, err));
done:
    return st;
}

static tril_status ffn_backward(struct pass *p, int l, struct tril_error *err) {
    tril_status st;
    struct workspace *w = p->w;
    const struct model_config *c = &p->m->config;
    const struct norm_site site = {PARAM_NORM2_GAIN, PARAM_NORM2_BIAS, l};
    struct tensor mid = activation_view(w, A_MID, l, p->N);         /* [N, D] fp32 */
    struct tensor mean = activation_view(w, A_MEAN2, l, p->N);      /* [N] */
    struct tensor rstd = activation_view(w, A_RSTD2, l, p->N);      /* [N] */
    struct tensor norm2 = activation_view(w, A_NORM2, l, p->N);     /* [N, D] act */
    struct tensor pre = activation_view(w, A_PRE, l, p->N);         /* [N, F or 2F] act */
    struct tensor hidden = activation_view(w, A_HIDDEN, l, p->N);   /* [N, F] act */
    struct tensor dhidden = activation_view(w, A_DHIDDEN, 0, p->N); /* [N, F] act */
    struct tensor dnorm = activation_view(w, A_DNORM, 0, p->N);     /* [N, D] act */
    struct tensor dx = activation_view(w, A_DX, 0, p->N);           /* [N, D] fp32 */
    struct tensor dpre = dhidden, dy;
    if (w->options.recompute == RECOMPUTE_SELECTIVE) {
        TRY(norm_forward(p, site, mid, norm2, mean, rstd, err));
        TRY(c->ffn_kind == FFN_GATED ? gated_forward(p->ctx, pre, hidden, c->activation, err)
                                     : activation_forward(p->ctx, pre, hidden, c->activation, err));
    }
    TRY(branch_gradient(p, l, RANDOM_DROPOUT_RESIDUAL_FFN, &dy, err));
    TRY(linear_backward(p, l, PARAM_FFN_DOWN, PARAM_FFN_DOWN_BIAS, dy, hidden, dhidden, err));
    if (c->ffn_kind == FFN_GATED) {
        dpre = activation_view(w, A_DPRE, 0, p->N); /* [N, 2F] act */
        TRY(gated_backward(p->ctx, dhidden, pre, dpre, c->activation, err));
    } else {
        TRY(activation_backward(p->ctx, dhidden, pre, dpre, c->activation, err));
    }
    TRY(linear_backward(p, l, PARAM_FFN_UP, PARAM_FFN_UP_BIAS, dpre, norm2, dnorm, err));
    TRY(norm_backward(p, site, dnorm, mid, mean, rstd, dx, err));
done:
    return st;
}

/* dq, dk, dv in the fused buffer, through the attention, RoPE and the qk-norm. */
static tril_status heads_backward(struct pass *p, int l, struct tensor heads, struct tensor dheads,
                                  struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const struct model_config *c = &m->config;
    struct qkv_views v = qkv_views_make(p, l), g = qkv_gradient_views(p);
    if (model_mixer(c, l)->kind == MIXER_LINEAR) {
        const struct linear_attention_params params = {.causal = true};
        TRY(linear_attention_backward(p->ctx, v.q, v.k, v.v, p->offsets, tensor_none(),
                                      tensor_heads(heads, c->heads), tensor_heads(dheads, c->heads),
                                      tensor_none(), g.q, g.k, g.v, tensor_none(), params, err));
    } else if (model_mixer(c, l)->kind == MIXER_RECURRENCE) {
        TRY(recurrence_backward(p, l, heads, dheads, &v, &g, err));
    } else {
        const bool gated = model_mixer(c, l)->kind == MIXER_MEMORY;
        if (gated) {
            TRY(memory_gate_backward(p, l, dheads, err));
            heads = activation_view(p->w, A_LOCAL, l, p->N);   /* [N, H d] act */
            dheads = activation_view(p->w, A_DLOCAL, 0, p->N); /* [N, H d] act */
        }
        struct attention_params a = attention_params_make(p, l);
        struct attention_inputs in = attention_inputs_make(p, l, &v);
        struct tensor dsinks =
            in.sink.data ? activation_view(p->w, A_DSINKS, 0, p->N) : tensor_none(); /* [H] */
        struct attention_gradients out = {.dq = g.q, .dk = g.k, .dv = g.v, .dsink = dsinks};
        TRY(attention_backward(p->ctx, &in, tensor_heads(heads, c->heads),
                               activation_view(p->w, A_LSE, l, p->N),
                               tensor_heads(dheads, c->heads), &out, &a, err));
        if (dsinks.data)
            TRY(accumulate(p->ctx, dsinks, param_gradient(m, PARAM_SINKS, l), 1.0f, err));
    }
    TRY(rotate(p, l, g.q, g.k, true, err));
    if (model_mixer(c, l)->kind == MIXER_MEMORY)
        TRY(memory_backward(p, l, &v, g.q, err));
    if (c->qk_norm) {
        struct norm_params params = {.eps = c->norm_eps, .overwrite = true};
        TRY(rmsnorm_backward(p->ctx, g.q, v.raw_q, param_vector(m, PARAM_Q_NORM, l), v.q_rstd, g.q,
                             param_gradient(m, PARAM_Q_NORM, l), params, err));
        TRY(rmsnorm_backward(p->ctx, g.k, v.raw_k, param_vector(m, PARAM_K_NORM, l), v.k_rstd, g.k,
                             param_gradient(m, PARAM_K_NORM, l), params, err));
    }
done:
    return st;
}

static tril_status attention_branch_backward(struct pass *p, int l, struct tril_error *err) {
    tril_status st;
    struct workspace *w = p->w;
    const struct norm_site site = {PARAM_NORM1_GAIN, PARAM_NORM1_BIAS, l};
    struct tensor x = activation_view(w, A_X, l, p->N);               /* [N, D] fp32 */
    struct tensor mean = activation_view(w, A_MEAN1, l, p->N);        /* [N] */
    struct tensor rstd = activation_view(w, A_RSTD1, l, p->N);        /* [N] */
    struct tensor norm1 = activation_view(w, A_NORM1, l, p->N);       /* [N, D] act */
    struct tensor heads = activation_view(w, A_ATTENTION, l, p->N);   /* [N, H d] act */
    struct tensor dheads = activation_view(w, A_DATTENTION, 0, p->N); /* [N, H d] act */
    struct tensor dqkv = activation_view(w, A_DQKV, 0, p->N);         /* [N, (H + 2K) d] act */
    struct tensor dnorm = activation_view(w, A_DNORM, 0, p->N);       /* [N, D] act */
    struct tensor dx = activation_view(w, A_DX, 0, p->N);             /* [N, D] fp32 */
    struct tensor dy;
    TRY(branch_gradient(p, l, RANDOM_DROPOUT_RESIDUAL_ATTENTION, &dy, err));
    TRY(linear_backward(p, l, PARAM_ATTENTION_OUT, PARAM_ATTENTION_OUT_BIAS, dy, heads, dheads,
                        err));
    TRY(heads_backward(p, l, heads, dheads, err));
    if (w->options.recompute == RECOMPUTE_SELECTIVE)
        TRY(norm_forward(p, site, x, norm1, mean, rstd, err));
    TRY(linear_backward(p, l, PARAM_QKV, PARAM_QKV_BIAS, dqkv, norm1, dnorm, err));
    if (p->recall.past > 0 && model_mixer(&p->m->config, l)->kind == MIXER_RECURRENCE)
        TRY(past_backward(p, l, err));
    TRY(norm_backward(p, site, dnorm, x, mean, rstd, dx, err));
done:
    return st;
}

tril_status layer_backward(struct pass *p, int l, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *c = &p->m->config;
    TRY(layer_acquire(p->m, l, err));
    TRY(offload_before_backward(p, l, err));
    /* The last layer's buffers still hold what its forward pass left there. */
    if (p->w->options.recompute == RECOMPUTE_FULL && l < c->layers - 1)
        TRY(layer_forward(p, l, true, err));
    if (c->ffn_kind != FFN_NONE)
        TRY(ffn_backward(p, l, err));
    TRY(attention_branch_backward(p, l, err));
    TRY(offload_after_backward(p, l, err));
    TRY(layer_release(p->m, l, err));
    TRY(layer_gradient_ready(p->m, l, err));
done:
    return st;
}

/* Before a call that replaces the gradients: zeroes those to which operations add. These are the
 * vectors (the rows without decay, the arena's end) and the embeddings; a tied one is first written
 * by the head. */
static tril_status gradients_zero(struct pass *p, struct tril_error *err) {
    tril_status st;
    const struct model *m = p->m;
    const struct backend *b = p->ctx->backend;
    const int64_t size = (int64_t)dtype_size(model_wide(m)), decayed = m->table.decay_elements;
    TRY(b->fill_zero(p->ctx, (char *)m->gradient + decayed * size,
                     (m->table.elements - decayed) * size, err));
    struct tensor wte = param_gradient(m, PARAM_TOKEN_EMBEDDING, -1);    /* [V, D] */
    struct tensor wpe = param_gradient(m, PARAM_POSITION_EMBEDDING, -1); /* [C, D] */
    if (!m->config.tied)
        TRY(b->fill_zero(p->ctx, wte.data, tensor_bytes(&wte), err));
    if (wpe.data)
        TRY(b->fill_zero(p->ctx, wpe.data, tensor_bytes(&wpe), err));
done:
    return st;
}

struct training {
    struct pass *p;
    float scale;
};

static tril_status training_body(void *arg, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct training *t = arg;
    struct pass *p = t->p;
    struct model *m = p->m;
    if (p->overwrite)
        TRY(gradients_zero(p, err));
    TRY(layers_forward(p, err));
    TRY(head_loss(p, t->scale, err));
    for (int l = (int)m->config.layers - 1; l >= 0; l--)
        TRY(layer_backward(p, l, err));
    struct tensor dx = activation_view(p->w, A_DX, 0, p->N); /* [N, D] fp32 */
    struct dropout_params drop = dropout_params_make(p, RANDOM_DROPOUT_EMBED, 0);
    if (drop.p > 0)
        TRY(dropout_backward(p->ctx, dx, p->step, dx, drop, err));
    struct tensor dwpe = param_gradient(m, PARAM_POSITION_EMBEDDING, -1); /* [C, D] */
    TRY(embed_backward(p->ctx, p->ids, dwpe.data ? p->positions : tensor_none(), dx,
                       param_gradient(m, PARAM_TOKEN_EMBEDDING, -1), dwpe, err));
    TRY(layer_gradient_ready(m, -1, err));
done:
    return st;
}

tril_status model_forward_backward(struct model *m, struct workspace *w, const struct batch *b,
                                   const struct train_call *call, double *loss_sum, int64_t *count,
                                   struct tril_error *err) {
    tril_status st;
    struct pass p;
    if (!w->options.backward)
        return error_set(err, TRIL_ERR_INTERNAL, "the workspace was made without a backward pass");
    if (b->cache)
        return error_set(err, TRIL_ERR_ARGUMENT, "training does not use a key/value cache");
    TRY(pass_begin(&p, m, w, b, true, call, err));
    p.wanted = p.N;
    struct training t = {&p, call->scale};
    TRY(pass_run(&p, "training", call->scale, training_body, &t, err));
    TRY(loss_download(&p, loss_sum, count, NULL, err));
    recall_end(&p);
done:
    return st;
}
