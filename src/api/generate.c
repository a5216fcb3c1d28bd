/* tril/generate.h: an engine is a model, its tokenizer and one session. */
#include "tril/generate.h"

#include <pthread.h>
#include <stdlib.h>

#include "api/device.h"
#include "api/source.h"
#include "infer/generator.h"
#include "model/ablate.h"

struct tril_engine {
    struct op_context ctx;
    struct model *model;
    struct tokenizer *tokenizer; /* NULL: there is none, and why: */
    struct tril_error without;
    struct session *session;
};

/* A tokenizer read while the model is: a vocabulary takes as long as a fifth of a small model. */
struct reading {
    const char *path;
    struct tokenizer *tokenizer;
    struct tril_error error;
    tril_status status;
    pthread_t thread;
    bool parallel;
};
static void *reading_run(void *arg) {
    struct reading *r = arg;
    r->status = tokenizer_load(&r->tokenizer, r->path, NULL, &r->error);
    return NULL;
}
static void reading_begin(struct reading *r) {
    r->parallel = pthread_create(&r->thread, NULL, reading_run, r) == 0;
    if (!r->parallel)
        reading_run(r);
}
static void reading_end(struct reading *r) {
    if (r->parallel)
        pthread_join(r->thread, NULL);
}

tril_status tril_engine_open(struct tril_engine **out, const struct tril_engine_options *o,
                             struct tril_error *err) {
    struct model_options options = {.dtype = DT_BF16};
    struct tril_model_overrides overrides =
        o->overrides ? *o->overrides : tril_model_overrides_none();
    struct model_config config;
    struct reading reading = {.path = o->tokenizer ? o->tokenizer : o->model};
    tril_status st = TRIL_OK;
    enum dtype cache;
    struct tril_engine *e = calloc(1, sizeof *e);
    *out = NULL;
    if (!e)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for an engine");
    if (!o->model) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "no model is given: name its directory");
        goto done;
    }
    TRY(device_open_as(&e->ctx, o->device, o->dtype, &options.dtype, err));
    if (o->stream_window == 0 && (o->stream_sinks > 0 || o->stream_stride > 0)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "sinks and a stride belong to a stream: give its window (--stream-window)");
        goto done;
    }
    if ((o->retrieve > 0 && o->stream_window > 0) || (o->retrieve_check && o->retrieve == 0)) {
        st =
            error_set(err, TRIL_ERR_ARGUMENT,
                      "retrieval (--retrieve N) is for caches that keep everything, and a check of "
                      "it needs it: choose it or a stream");
        goto done;
    }
    TRY(cache_dtype_parse(&cache, o->kv_dtype, options.dtype, err));
    if (cache != options.dtype && (o->retrieve > 0 || o->stream_window > 0)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "streams and retrieval keep their cache in the model's dtype: leave out "
                       "--kv-dtype, or them");
        goto done;
    }
    TRY(model_config_read(&config, o->model, err));
    if (o->context > config.context && config.position != POSITION_LEARNED)
        overrides.context = o->context;
    options.overrides = &overrides;
    reading_begin(&reading);
    st = model_load(&e->model, o->model, &options, &e->ctx, err);
    reading_end(&reading);
    e->tokenizer = reading.tokenizer;
    e->without = reading.error; /* said when a text needs one */
    if (st != TRIL_OK)
        goto done;
    TRY(model_ablate(e->model, o->ablate, err));
    if (o->tokenizer && reading.status != TRIL_OK) {
        st = error_set(err, reading.status, "%s", reading.error.message);
        goto done;
    }
    if (o->tokenizer)
        TRY(tokenizer_check_model(e->tokenizer, config.vocab, o->model, err));
    const struct session_stream stream = {o->stream_window, o->stream_sinks, o->stream_stride};
    const struct kv_retrieve retrieve = {o->retrieve, 64, 1, 2, o->retrieve_check};
    if (o->retrieve > 0)
        TRY(session_create_retrieve(&e->session, e->model, o->context, 0, &retrieve, err));
    else if (stream.window > 0)
        TRY(session_create_stream(&e->session, e->model, &stream, 0, err));
    else
        TRY(session_create_as(&e->session, e->model, o->context, 0, cache, err));
    *out = e;
done:
    if (st != TRIL_OK)
        tril_engine_close(e);
    return st;
}

void tril_engine_close(struct tril_engine *e) {
    if (!e)
        return;
    session_free(e->session);
    tokenizer_free(e->tokenizer);
    model_free(e->model);
    op_context_free(&e->ctx);
    free(e);
}

struct tril_generate_options tril_generate_defaults(void) {
    return (struct tril_generate_options){.prompt = "",
                                          .max_tokens = 256,
                                          .temperature = 0.8,
                                          .top_p = 0.95,
                                          .repetition_penalty = 1,
                                          .seed = 1337};
}

tril_status tril_generate(struct tril_engine *e, const struct tril_generate_options *o,
                          struct tril_generation *out, struct tril_error *err) {
    int64_t eos = e->model->config.eos_id;
    *out = (struct tril_generation){0};
    if (!e->tokenizer && !o->prompt_ids)
        return error_set(err, e->without.code, "%s (another one: --tokenizer FILE)",
                         e->without.message);
    if (e->tokenizer && tokenizer_eos(e->tokenizer) >= 0)
        eos = tokenizer_eos(e->tokenizer);
    return generator_run(e->session, e->tokenizer, eos, o, out, err);
}

const char *tril_finish_name(enum tril_finish f) {
    static const char *const names[] = {"length", "eos", "stop", "context", "callback"};
    return names[f];
}
