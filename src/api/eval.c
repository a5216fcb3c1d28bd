/* tril/eval.h: a model on a device, evaluated on a text or on ids. */
#include "tril/eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/device.h"
#include "base/file.h"
#include "base/system.h"
#include "formats/safetensors.h"
#include "lab/kneser_ney.h"
#include "model/ablate.h"
#include "text/shard.h"
#include "text/tokenizer.h"
#include "train/evaluate.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the evaluation");
}

static tril_status open_model(struct op_context *ctx, struct model **m,
                              const struct tril_eval_options *o, bool training,
                              struct tril_error *err) {
    struct model_options options = {
        .dtype = DT_F32, .training = training, .overrides = o->overrides};
    tril_status st = TRIL_OK;
    if (!o->model)
        return error_set(err, TRIL_ERR_ARGUMENT, "no model is given: name its directory");
    TRY(device_open_as(ctx, o->device, o->dtype, &options.dtype, err));
    TRY(model_load(m, o->model, &options, ctx, err));
    TRY(model_ablate(*m, o->ablate, err));
done:
    return st;
}

/* The file's ids as int32, checked against the model's vocabulary. */
static tril_status read_ids(const struct tril_eval_options *o, const struct tokenizer *t,
                            int64_t vocab, int32_t **ids, int64_t *n, struct tril_error *err) {
    struct file_map map = {0};
    uint32_t *encoded = NULL;
    size_t count = 0;
    tril_status st = TRIL_OK;
    TRY(file_map_open(&map, o->data, err));
    TRY(tokenizer_encode_parallel(t, (const char *)map.data, map.size, true, &encoded, &count,
                                  err));
    if (o->max_tokens > 0 && count > (size_t)o->max_tokens)
        count = (size_t)o->max_tokens;
    if (count < 2) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "%s: %zu tokens; an evaluation needs at least two",
                       o->data, count);
        goto done;
    }
    *ids = malloc(count * sizeof **ids);
    if (!*ids) {
        st = no_memory(err);
        goto done;
    }
    for (size_t i = 0; i < count; i++) {
        if ((int64_t)encoded[i] >= vocab) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "the tokenizer gives id %u but the model has %lld embeddings: they do "
                           "not belong together",
                           encoded[i], (long long)vocab);
            goto done;
        }
        (*ids)[i] = (int32_t)encoded[i];
    }
    *n = (int64_t)count;
done:
    free(encoded);
    file_map_close(&map);
    return st;
}

tril_status tril_eval(const struct tril_eval_options *o, struct tril_eval_result *r,
                      struct tril_error *err) {
    struct op_context ctx = {0};
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct tokenizer *t = NULL;
    struct evaluation e;
    int32_t *ids = NULL;
    int64_t n = 0;
    tril_status st = TRIL_OK;
    *r = (struct tril_eval_result){0};
    if (!o->data)
        return error_set(err, TRIL_ERR_ARGUMENT, "no text is given: name it with --data FILE");
    TRY(open_model(&ctx, &m, o, false, err));
    TRY(tokenizer_load(&t, o->tokenizer ? o->tokenizer : o->model, NULL, err));
    TRY(read_ids(o, t, m->config.vocab, &ids, &n, err));
    int64_t context = m->config.context, seq = o->seq;
    if (seq <= 0)
        seq = context < 1024 ? context : 1024;
    if (seq > context) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "--seq %lld is longer than the model's context of %lld", (long long)seq,
                       (long long)context);
        goto done;
    }
    int64_t stride = o->stride > 0 ? o->stride : seq;
    if (stride > seq) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "--stride %lld is longer than the window of %lld tokens: some would never "
                       "be scored",
                       (long long)stride, (long long)seq);
        goto done;
    }
    int64_t batch = seq < 2048 ? 2048 / seq : 1;
    struct workspace_options options = {.max_tokens = batch * seq, .max_sequences = batch};
    TRY(workspace_create(&w, m, &options, err));
    double begun = clock_seconds();
    TRY(evaluate_tokens(m, w, ids, n, seq, stride, batch, NULL, &e, err));
    for (int64_t i = 1; i < n; i++) {
        size_t size;
        tokenizer_token_bytes(t, (uint32_t)ids[i], &size);
        r->bytes += (int64_t)size;
    }
    r->seconds = clock_seconds() - begun;
    r->tokens = e.tokens;
    r->loss = e.loss_sum / (double)e.tokens;
    r->perplexity = exp(r->loss);
    r->bits_per_byte = e.loss_sum / M_LN2 / (double)(r->bytes ? r->bytes : 1);
done:
    workspace_free(w);
    free(ids);
    tokenizer_free(t);
    model_free(m);
    op_context_free(&ctx);
    return st;
}

tril_status tril_eval_baseline(const struct tril_eval_options *o, const char *const *data,
                               int data_count, double valid_fraction,
                               struct tril_baseline_result *r, struct tril_error *err) {
    struct op_context ctx = {0};
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct tokenizer *t = NULL;
    struct dataset *d = NULL;
    struct kneser_ney *counts = NULL;
    struct evaluation e;
    int32_t *ids = NULL;
    tril_status st = TRIL_OK;
    TRY(open_model(&ctx, &m, o, false, err));
    TRY(tokenizer_load(&t, o->tokenizer ? o->tokenizer : o->model, NULL, err));
    struct dataset_options options = {.paths = data,
                                      .path_count = (size_t)data_count,
                                      .valid_fraction = valid_fraction,
                                      .tokenizer = t};
    TRY(dataset_open(&d, &options, err));
    int64_t n = (int64_t)dataset_tokens(d, DATASET_TRAIN);
    int64_t valid = (int64_t)dataset_tokens(d, DATASET_VALID);
    int64_t seq = o->seq > 0 ? o->seq : m->config.context < 1024 ? m->config.context : 1024;
    if (valid <= seq || n < 3 || (int64_t)tokenizer_vocab_size(t) > m->config.vocab) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "the data is too short for a comparison, or the tokenizer is not the "
                       "model's");
        goto done;
    }
    int64_t batch = seq < 2048 ? 2048 / seq : 1;
    struct workspace_options wo = {.max_tokens = batch * seq, .max_sequences = batch};
    TRY(workspace_create(&w, m, &wo, err));
    TRY(evaluate_split(m, w, d, DATASET_VALID, (int)batch, (int)seq, 0, &e, err));
    ids = malloc((size_t)(n > valid ? n : valid) * sizeof *ids);
    if (!ids) {
        st = no_memory(err);
        goto done;
    }
    dataset_read(d, DATASET_TRAIN, 0, (size_t)n, ids);
    TRY(kneser_ney_train(&counts, (uint32_t *)ids, n, tokenizer_vocab_size(t), err));
    dataset_read(d, DATASET_VALID, 0, (size_t)valid, ids);
    TRY(kneser_ney_loss(counts, (uint32_t *)ids, valid, &r->baseline_loss, err));
    r->loss = e.loss_sum / (double)e.tokens;
    r->train_tokens = n;
    r->valid_tokens = valid;
done:
    kneser_ney_free(counts);
    free(ids);
    workspace_free(w);
    dataset_free(d);
    tokenizer_free(t);
    model_free(m);
    op_context_free(&ctx);
    return st;
}

static tril_status write_logits(const char *path, const float *logits, int64_t n, int64_t vocab,
                                struct tril_error *err) {
    struct st_declare d = {.name = "logits", .dtype = DT_F32, .rank = 2, .shape = {n, vocab}};
    struct st_writer *writer = NULL;
    tril_status st = st_writer_open(&writer, path, &d, 1, NULL, 0, err);
    if (st != TRIL_OK)
        return st;
    st = st_writer_write(writer, logits, (size_t)(n * vocab) * sizeof *logits, err);
    if (st != TRIL_OK) {
        st_writer_abort(writer);
        return st;
    }
    return st_writer_finish(writer, err);
}

tril_status tril_eval_ids(const struct tril_eval_options *o, const int32_t *ids, int64_t n,
                          const char *logits_path, const char *grads_path, double *loss,
                          struct tril_error *err) {
    struct op_context ctx = {0};
    struct model *m = NULL;
    struct workspace *w = NULL;
    float *logits = NULL;
    int32_t *targets = NULL;
    double sum = 0;
    int64_t count = 0;
    tril_status st = TRIL_OK;
    if (n < 1 || n > INT32_MAX)
        return error_set(err, TRIL_ERR_ARGUMENT, "give at least one token id");
    if (grads_path && n < 2)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "gradients of a next-token loss need at least two ids");
    TRY(open_model(&ctx, &m, o, grads_path != NULL, err));
    if (n > m->config.context) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%lld ids are longer than the model's context of %lld", (long long)n,
                       (long long)m->config.context);
        goto done;
    }
    int32_t offsets[2] = {0, (int32_t)n};
    struct batch b = {.tokens = n, .sequences = 1, .ids = ids, .offsets = offsets};
    struct workspace_options options = {
        .max_tokens = n, .max_sequences = 1, .backward = grads_path != NULL};
    TRY(workspace_create(&w, m, &options, err));
    targets = malloc((size_t)n * sizeof *targets);
    logits = malloc((size_t)n * (size_t)m->config.vocab * sizeof *logits);
    if (!targets || !logits) {
        st = no_memory(err);
        goto done;
    }
    TRY(model_forward(m, w, &b, logits, err));
    if (logits_path)
        TRY(write_logits(logits_path, logits, n, m->config.vocab, err));
    memcpy(targets, ids + 1, (size_t)(n - 1) * sizeof *targets);
    targets[n - 1] = -1;
    b.targets = targets;
    if (grads_path) {
        struct train_call call = {.scale = 1.0f / (float)(n - 1)};
        const float *arena = NULL;
        const char *prefix = "";
        /* the gradient of the loss itself */
        m->config.dropout_embedding = m->config.dropout_attention = m->config.dropout_residual = 0;
        TRY(model_forward_backward(m, w, &b, &call, &sum, &count, err));
        arena = m->gradient;
        TRY(model_arena_write(m, &arena, &prefix, 1, grads_path, DT_F32, err));
    } else if (n > 1) {
        TRY(model_loss(m, w, &b, &sum, &count, NULL, err));
    }
    if (loss)
        *loss = count ? sum / (double)count : NAN;
done:
    free(logits);
    free(targets);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
    return st;
}
