/* tril/inspect.h: counting, planning and tracing. */
#include "tril/inspect.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/device.h"
#include "api/source.h"
#include "model/model.h"
#include "train/options.h"

tril_status source_config(const struct tril_model_source *s, struct model_config *c,
                          struct tril_error *err) {
    tril_status st = TRIL_OK;
    if ((s->model != NULL) + (s->preset != NULL) + (s->config != NULL) != 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "name one model: --model DIR, --preset NAME or --config FILE");
    if (s->preset)
        TRY(model_config_preset(c, s->preset, err));
    else
        TRY(model_config_read(c, s->model ? s->model : s->config, err));
    TRY(model_config_override(c, &s->overrides, err));
    TRY(model_config_check(c, err));
done:
    return st;
}

tril_status cache_dtype_parse(enum dtype *out, const char *name, enum dtype usual,
                              struct tril_error *err) {
    *out = name && strcmp(name, "q8") == 0 ? DT_I8 : usual;
    if (!name || *out == DT_I8 || (dtype_parse(name, out) && (*out == DT_F32 || *out == DT_BF16)))
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT, "a cache holds fp32, bf16 or q8, not '%.40s'", name);
}

tril_status recompute_parse(enum recompute *out, const char *name, struct tril_error *err) {
    static const char *const names[] = {"none", "selective", "full"};
    *out = RECOMPUTE_NONE;
    for (int i = 0; name && i < 3; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (enum recompute)i;
            return TRIL_OK;
        }
    return name ? error_set(err, TRIL_ERR_ARGUMENT,
                            "recomputation is none, selective or full, not '%s'", name)
                : TRIL_OK;
}

void model_info_fill(struct tril_model_info *info, const struct model_config *c) {
    *info = (struct tril_model_info){.layers = c->layers,
                                     .dim = c->dim,
                                     .heads = c->heads,
                                     .kv_heads = c->kv_heads,
                                     .head_dim = c->head_dim,
                                     .ffn = c->ffn,
                                     .vocab = c->vocab,
                                     .context = c->context,
                                     .tied = c->tied};
    snprintf(info->type, sizeof info->type, "%s", model_config_type(c, NULL));
}

tril_status tril_inspect_params(const struct tril_model_source *source, int64_t T,
                                struct tril_model_info *info, struct tril_counts *out,
                                struct tril_error *err) {
    struct model_config c;
    struct model_counts n;
    tril_status st = source_config(source, &c, err);
    if (st != TRIL_OK)
        return st;
    model_count(&c, T > 0 ? T : c.context, &n);
    model_info_fill(info, &c);
    *out = (struct tril_counts){.embedding = n.embedding,
                                .position = n.position,
                                .attention = n.attention,
                                .ffn = n.ffn,
                                .norms = n.norms,
                                .head = n.head,
                                .total = n.total,
                                .flops_attention = n.flops_attention,
                                .flops_scores = n.flops_scores,
                                .flops_ffn = n.flops_ffn,
                                .flops_head = n.flops_head,
                                .flops_total =
                                    n.flops_attention + n.flops_scores + n.flops_ffn + n.flops_head,
                                .train_flops = n.train_flops_per_token};
    return TRIL_OK;
}

tril_status tril_inspect_memory(const struct tril_model_source *source,
                                const struct tril_memory_options *o, struct tril_memory *out,
                                struct tril_error *err) {
    struct model_config c;
    struct model_options options = {.training = o->training, .dtype = DT_BF16};
    struct memory_plan p;
    enum recompute recompute;
    enum dtype cache;
    const struct backend *backend;
    bool moments, activations;
    tril_status st = TRIL_OK;
    TRY(source_config(source, &c, err));
    TRY(device_backend(&backend, o->device, err));
    TRY(train_offload_parse(o->offload ? o->offload : "none", &moments, &activations, err));
    if ((moments || activations) && (!o->training || !backend->copy_begin)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "--offload is for training with --device cuda: leave it out");
        goto done;
    }
    TRY(device_dtype(&options.dtype, o->dtype, err));
    if (options.dtype == DT_F16 && !backend->device) {
        st = error_set(err, TRIL_ERR_UNSUPPORTED,
                       "the CPU does not compute in fp16; choose bf16 or fp32, or --device cuda");
        goto done;
    }
    TRY(cache_dtype_parse(&cache, o->kv_dtype, options.dtype, err));
    int64_t batch = o->batch > 0 ? o->batch : 1, seq = o->seq > 0 ? o->seq : c.context;
    if (batch > 1 << 24 || seq > 1 << 30) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "--batch and --seq are beyond what can be planned");
        goto done;
    }
    TRY(recompute_parse(&recompute, o->recompute, err));
    /* Inference: what tril generate uses, a prefill chunk of 512 tokens and one row of logits. */
    int64_t chunk = batch * seq < 512 ? batch * seq : 512;
    struct workspace_options w = {.max_tokens = o->training ? batch * seq : chunk,
                                  .max_sequences = batch,
                                  .max_rows = o->training ? 0 : batch,
                                  .backward = o->training,
                                  .recompute = recompute,
                                  .offload = activations};
    TRY(model_memory_plan(&c, &options, &w, o->training ? 0 : batch, o->training ? 0 : seq, cache,
                          backend, &p, err));
    if (moments)
        memory_plan_offload_moments(&p);
    *out = (struct tril_memory){.weights = p.weights,
                                .masters = p.masters,
                                .gradients = p.gradients,
                                .optimiser = p.optimiser,
                                .activations = p.activations,
                                .packings = p.packings,
                                .logits = p.logits,
                                .cache = p.cache,
                                .other = p.other,
                                .scratch = p.scratch,
                                .total = p.total,
                                .host = p.host};
done:
    return st;
}

struct shape_trace {
    tril_shape_visit *visit;
    void *arg;
};

static void trace(void *arg, int layer, const char *name, const struct tensor *t) {
    const struct shape_trace *s = arg;
    s->visit(s->arg, layer, name, t->rank, t->shape, dtype_name(t->dtype));
}

tril_status tril_inspect_shapes(const struct tril_model_source *source, int64_t T,
                                const char *dtype, const char *device, tril_shape_visit *visit,
                                void *arg, struct tril_error *err) {
    struct op_context ctx = {0};
    struct model_config c;
    struct model *m = NULL;
    struct workspace *w = NULL;
    int32_t *ids = NULL;
    struct model_options options = {.dtype = DT_BF16};
    struct shape_trace s = {visit, arg};
    tril_status st = TRIL_OK;
    TRY(source_config(source, &c, err));
    TRY(device_open_as(&ctx, device, dtype, &options.dtype, err));
    if (source->model) {
        options.overrides = &source->overrides;
        TRY(model_load(&m, source->model, &options, &ctx, err));
    } else {
        TRY(model_create(&m, &c, &options, &ctx, err));
        TRY(model_init(m, 0, err));
    }
    int64_t n = T > 0 ? T : c.context < 16 ? c.context : 16;
    if (n > c.context) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "--seq %lld is longer than the context of %lld",
                       (long long)n, (long long)c.context);
        goto done;
    }
    ids = calloc((size_t)n, sizeof *ids);
    if (!ids) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for %lld tokens", (long long)n);
        goto done;
    }
    int32_t offsets[2] = {0, (int32_t)n};
    struct batch b = {.tokens = n, .sequences = 1, .ids = ids, .offsets = offsets};
    struct workspace_options wo = {.max_tokens = n, .max_sequences = 1};
    TRY(workspace_create(&w, m, &wo, err));
    workspace_set_hook(w, trace, &s);
    float *logits = malloc((size_t)(n * m->config.vocab) * sizeof *logits);
    st = logits ? model_forward(m, w, &b, logits, err)
                : error_set(err, TRIL_ERR_MEMORY, "not enough memory for the logits");
    free(logits);
done:
    free(ids);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
    return st;
}
