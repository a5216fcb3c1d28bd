/* Counting and predicting: parameters, FLOPs and memory from the configuration alone. Nothing here
 * allocates more than the table of names, so models beyond any machine can be planned. */
#include <string.h>

#include "model/activations.h"

void model_count(const struct model_config *c, int64_t T, struct model_counts *out) {
    const double L = (double)c->layers, D = (double)c->dim, V = (double)c->vocab;
    const double F = (double)c->ffn, d = (double)c->head_dim;
    const double A = (double)c->heads * d, Q = A + 2.0 * (double)c->kv_heads * d;
    const double U = c->ffn_kind == FFN_GATED ? 2 * F : F;
    const bool ffn = c->ffn_kind != FFN_NONE;
    struct model_counts n = {0};
    n.embedding = V * D;
    n.position = c->position == POSITION_LEARNED ? (double)c->context * D : 0;
    n.attention = L * (Q * D + D * A + (c->qkv_bias ? Q : 0) + (c->attention_out_bias ? D : 0) +
                       (c->qk_norm ? 2 * d : 0));
    if (ffn)
        n.ffn = L * (U * D + D * F + (c->ffn_bias ? U + D : 0));
    double norm = c->norm_bias ? 2 * D : D;
    n.norms = (L * (ffn ? 2 : 1) + (c->final_norm ? 1 : 0)) * norm;
    n.head = c->tied ? 0 : V * D;
    n.total = n.embedding + n.position + n.attention + n.ffn + n.norms + n.head;
    n.flops_attention = 2 * L * (Q * D + D * A);
    n.flops_ffn = ffn ? 2 * L * (U * D + D * F) : 0;
    n.flops_head = 2 * V * D;
    /* Scores and their sum over values: a token sees T / 2 others on average. */
    n.flops_scores = 2 * L * A * (double)T;
    double looked_up = n.position + (c->tied ? 0 : n.embedding);
    n.train_flops_per_token = 6 * (n.total - looked_up) + 3 * n.flops_scores;
    *out = n;
}

tril_status model_memory_plan(const struct model_config *c, const struct model_options *options,
                              const struct workspace_options *w, int64_t cache_slots,
                              int64_t cache_capacity, const struct backend *backend,
                              struct memory_plan *out, struct tril_error *err) {
    tril_status st;
    struct param_table t = {0};
    struct memory_plan p = {0};
    const double size = (double)dtype_size(options->dtype), wide = 4;
    TRY(param_table_create(&t, c, err));
    if (options->training) {
        p.masters = p.gradients = wide * (double)t.elements;
        p.weights = options->dtype == DT_F32 ? 0 : size * (double)t.elements;
        p.optimiser = 2 * wide * (double)t.elements;
    }
    for (int i = 0; i < t.count; i++) {
        const struct param_row *r = &t.rows[i];
        double elements = (double)r->shape[0] * (double)r->shape[1];
        if (!options->training)
            p.weights += elements * (r->matrix ? size : wide);
        unsigned uses = options->training ? WEIGHT_FORWARD | WEIGHT_BACKWARD : WEIGHT_FORWARD;
        if (!options->training && r->role != PARAM_TOKEN_EMBEDDING)
            uses |= WEIGHT_STATIC;
        if (r->linear)
            p.packings +=
                (double)backend->weight_bytes(r->shape[0], r->shape[1], options->dtype, uses);
    }
    if (w) {
        struct activation_layout l;
        TRY(activation_layout_make(&l, c, options->dtype, w, err));
        p.logits = (double)l.logits;
        p.other = (double)l.rest;
        p.activations = (double)l.bytes - p.logits - p.other;
    }
    if (cache_slots > 0)
        p.cache = (double)kv_cache_bytes(c, cache_slots, cache_capacity, options->dtype);
    if (c->position == POSITION_ROPE)
        p.other += wide * (double)c->context * (double)c->rope_dim;
    p.total = p.weights + p.masters + p.gradients + p.optimiser + p.activations + p.packings +
              p.logits + p.cache + p.other;
    *out = p;
done:
    param_table_free(&t);
    return st;
}
