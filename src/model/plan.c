/* Counting and predicting: parameters, FLOPs and memory from the configuration alone. Nothing here
 * allocates more than the table of names, so models beyond any machine can be planned. */
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "model/carry.h"
#include "model/internal.h"

/* Keys that a token sees on average in layers that recall, at the price of attention's (two
 * products): a recurrence has a third product for the positions, a search has one. */
static double recalled_keys(const struct mixer_config *m, int64_t T) {
    double sum = 0;
    enum { ROWS = 64 };
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t p = (2 * r + 1) * T / (2 * ROWS), own = p % m->segment + 1, before = p + 1 - own;
        before = before < m->keep ? before : m->keep;
        sum += m->kind == MIXER_RECURRENCE ? 1.5 * (double)(own + before)
                                           : (double)own + 0.5 * (double)(before + m->top);
    }
    return sum / ROWS;
}

/* Keys that a token sees on average in a sequence of T, over the heads: T / 2 where everything past
 * is seen; by rules, counted in rows spread over the sequence. Linear attention costs as much as d.
 */
static double mixer_keys(const struct model_config *c, int i, int64_t T) {
    enum { ROWS = 64 };
    const struct mixer_config *m = &c->mixers[i];
    struct visible_set set = {0};
    double seen = 0;
    if (m->kind == MIXER_LINEAR)
        return (double)c->head_dim;
    if (mixer_recalls(m))
        return recalled_keys(m, T);
    if (!m->rules[0] || mixer_rules(m, c->heads, &set, NULL) != TRIL_OK) {
        visible_set_free(&set);
        return (double)T / 2;
    }
    for (int64_t h = 0; h < c->heads; h++) {
        if (h > 0 && (!set.head_rule || set.head_rule[h] == set.head_rule[h - 1]))
            continue; /* counted with the head before */
        int64_t alike = 1;
        while (h + alike < c->heads &&
               (!set.head_rule || set.head_rule[h + alike] == set.head_rule[h]))
            alike++;
        const struct visible_rule *rule = &set.rules[set.head_rule ? set.head_rule[h] : 0];
        for (int64_t r = 0; r < ROWS; r++) {
            int64_t p = (2 * r + 1) * T / (2 * ROWS);
            for (int64_t j = 0; j <= p; j += 64)
                seen += (double)alike * __builtin_popcountll(visible_mask(rule, p, p, j, 64));
        }
    }
    visible_set_free(&set);
    return seen / ROWS / (double)c->heads;
}

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
    for (int64_t l = 0; l < c->layers; l++) {
        const struct mixer_config *m = model_mixer(c, l);
        n.attention += m->learned_sinks || m->kind == MIXER_MEMORY ? (double)c->heads : 0;
        n.attention += m->kind == MIXER_RECURRENCE ? A * D + 2 * A : 0;
    }
    if (ffn)
        n.ffn = L * (U * D + D * F + (c->ffn_bias ? U + D : 0));
    double norm = c->norm_bias ? 2 * D : D;
    n.norms = (L * (ffn ? 2 : 1) + (c->final_norm ? 1 : 0)) * norm;
    n.head = c->tied ? 0 : V * D;
    n.total = n.embedding + n.position + n.attention + n.ffn + n.norms + n.head;
    n.flops_attention = 2 * L * (Q * D + D * A);
    n.flops_ffn = ffn ? 2 * L * (U * D + D * F) : 0;
    n.flops_head = 2 * V * D;
    double keys[MODEL_MOST_MIXERS];
    for (int i = 0; i < model_mixer_count(c); i++)
        keys[i] = mixer_keys(c, i, T);
    for (int64_t l = 0; l < c->layers; l++) {
        n.flops_scores += 4 * A * keys[c->layer_mixer[l]];
    }
    double looked_up = n.position + (c->tied ? 0 : n.embedding);
    n.train_flops_per_token = 6 * (n.total - looked_up) + 3 * n.flops_scores;
    *out = n;
}

/* ------------------------------------------------------------------ scratch
 *
 * What operations ask for beside their arguments is found by the passes themselves, on a backend
 * that only notes it (ops/imaginary.h). */

/* A batch of N tokens in S sequences as even as can be; NULL: no memory. */
static int32_t *batch_make(struct batch *b, int64_t N, int64_t S) {
    int32_t *ids = calloc((size_t)(N + 2 * S + 2), sizeof *ids);
    if (!ids)
        return NULL;
    int32_t *offsets = ids + N, *slots = offsets + S + 1;
    for (int64_t s = 0; s <= S; s++)
        offsets[s] = (int32_t)(N / S * s + (s < N % S ? s : N % S));
    for (int64_t s = 0; s < S; s++)
        slots[s] = (int32_t)s;
    *b = (struct batch){.tokens = N,
                        .sequences = S,
                        .ids = ids,
                        .targets = ids,
                        .offsets = offsets,
                        .slots = slots};
    return ids;
}

static tril_status training_plan(struct model *m, struct workspace *w, struct tril_error *err) {
    tril_status st;
    const struct workspace_options *o = &w->options;
    const struct train_call call = {.scale = 1, .overwrite = true};
    const int64_t n = m->table.elements;
    struct batch b;
    double sum;
    int64_t count;
    int32_t *memory = batch_make(&b, o->max_tokens, o->max_sequences);
    if (!memory)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a prediction");
    TRY(model_forward_backward(m, w, &b, &call, &sum, &count, err));
    TRY(sum_squares(m->ctx, tensor_1d(m->gradient, DT_F32, n), tensor_1d(m->gradient, DT_F64, 1),
                    err));
done:
    free(memory);
    return st;
}

/* The last `N` tokens of S slots, the cache then full. */
static tril_status inference_pass(struct model *m, struct workspace *w, struct kv_cache *cache,
                                  int64_t N, int64_t S, struct tril_error *err) {
    tril_status st;
    struct pass p;
    struct batch b;
    int32_t *memory = batch_make(&b, N, S), row = (int32_t)(N - 1);
    if (!memory)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a prediction");
    b.cache = cache;
    b.rows = S == N ? NULL : &row;
    b.row_count = 1;
    for (int64_t s = 0; s < S; s++)
        cache->length[s] = cache->summed[s] = (int32_t)(cache->capacity - N / S);
    TRY(pass_begin(&p, m, w, &b, false, NULL, err));
    p.wanted = S == N ? N : 1;
    p.gather_early = S < N && p.wanted <= w->layout.head_rows;
    TRY(logits_body(&p, err));
done:
    free(memory);
    return st;
}

/* A token drawn from each of N rows of logits, by filters. */
static tril_status draw_plan(struct model *m, int64_t N, struct tril_error *err) {
    tril_status st;
    void *at = NULL; /* of everything: nobody looks */
    TRY(m->ctx->backend->alloc(&at, 1, false, "a prediction", err));
    const struct sample_rows rows = {
        .options = tensor_2d(at, DT_F32, N, SAMPLE_OPTIONS),
        .top_k = tensor_1d(at, DT_I32, N),
        .seed = tensor_1d(at, DT_I64, N),
        .index = tensor_1d(at, DT_I64, N),
        .token = tensor_1d(at, DT_I32, N),
        .status = tensor_1d(at, DT_I32, N),
        .log_probability = tensor_1d(at, DT_F32, N),
    };
    TRY(sample(m->ctx, tensor_2d(at, DT_F32, N, m->config.vocab), &rows, err));
done:
    m->ctx->backend->release(at);
    return st;
}

/* A chunk of one sequence's prompt, and a token for each of all. */
static tril_status inference_plan(struct model *m, struct workspace *w, int64_t slots,
                                  int64_t capacity, enum dtype dtype, struct tril_error *err) {
    tril_status st;
    struct kv_cache *cache = NULL;
    const int64_t most = w->options.max_tokens;
    int64_t chunk = most < capacity ? most : capacity, at_once = slots < most ? slots : most;
    at_once = at_once < w->options.max_sequences ? at_once : w->options.max_sequences;
    TRY(kv_cache_create(&cache, m, slots, capacity, chunk, dtype, err));
    if (chunk > 1)
        TRY(inference_pass(m, w, cache, chunk, 1, err));
    TRY(inference_pass(m, w, cache, at_once, at_once, err));
    TRY(draw_plan(m, at_once, err));
done:
    kv_cache_free(cache);
    return st;
}

static tril_status scratch_plan(const struct model_config *c, const struct model_options *options,
                                const struct workspace_options *o, int64_t slots, int64_t capacity,
                                enum dtype cache, const struct backend *backend, double *bytes,
                                struct tril_error *err) {
    tril_status st;
    struct op_context ctx = {0};
    struct model_config longer = *c; /* as long as what is asked about */
    struct model *m = NULL;
    struct workspace *w = NULL;
    int64_t fixed = 0, row = slots > 0 ? capacity : (o->max_tokens - 1) / o->max_sequences + 1;
    longer.context = row > c->context ? row : c->context;
    TRY(backend->plan(&ctx, &fixed, err));
    TRY(model_create(&m, &longer, options, &ctx, err));
    TRY(workspace_create(&w, m, o, err));
    if (o->backward)
        TRY(training_plan(m, w, err));
    else if (slots > 0)
        TRY(inference_plan(m, w, slots, capacity, cache, err));
    *bytes = (double)(fixed + ctx.planned);
done:
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
    return st;
}

void memory_plan_offload_moments(struct memory_plan *p) {
    p->host += p->optimiser;
    p->total -= p->optimiser;
    p->optimiser = 0;
}

tril_status model_memory_plan(const struct model_config *c, const struct model_options *options,
                              const struct workspace_options *w, int64_t cache_slots,
                              int64_t cache_capacity, enum dtype cache_dtype,
                              const struct backend *backend, struct memory_plan *out,
                              struct tril_error *err) {
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
        p.host = (double)(l.leaving * (l.input + l.group));
        if (backend->plan)
            TRY(scratch_plan(c, options, w, cache_slots, cache_capacity, cache_dtype, backend,
                             &p.scratch, err));
    }
    if (cache_slots > 0)
        p.cache = (double)kv_cache_bytes(c, cache_slots, cache_capacity, w ? w->max_tokens : 0,
                                         cache_dtype);
    if (w && w->carry)
        p.cache += (double)carry_bytes(c, w->max_sequences, options->dtype);
    p.other += size * (double)(model_distances(c) * c->dim);
    if (c->position == POSITION_ROPE)
        p.other += wide * (double)c->context * (double)c->rope_dim;
    p.total = p.weights + p.masters + p.gradients + p.optimiser + p.activations + p.packings +
              p.logits + p.cache + p.scratch + p.other;
    *out = p;
done:
    param_table_free(&t);
    return st;
}
