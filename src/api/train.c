/* tril/train.h: the trainer on a device, with samples from the inference room. */
#include "tril/train.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/device.h"
#include "base/file.h"
#include "base/threads.h"
#include "infer/generator.h"
#include "train/checkpoint.h"
#include "train/options.h"
#include "train/trainer.h"
#include "tril/generate.h"

struct tril_train_options tril_train_defaults(void) {
    return train_options_defaults();
}

/* What the strings of saved options live in. */
struct saved_options {
    json_t *json;
    const char **paths;
};

void tril_train_options_free(void *storage) {
    struct saved_options *s = storage;
    if (!s)
        return;
    json_decref(s->json);
    free(s->paths);
    free(s);
}

tril_status tril_train_options_saved(const char *out, struct tril_train_options *options,
                                     void **storage, struct tril_error *err) {
    struct saved_options *s = calloc(1, sizeof *s);
    struct train_state state;
    char *dir = NULL;
    tril_status st = TRIL_OK;
    *storage = NULL;
    if (!s)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the saved options");
    TRY(checkpoint_latest(out, &dir, err));
    if (!dir) {
        *options = train_options_defaults();
        goto done;
    }
    TRY(checkpoint_read_state(dir, &state, &s->json, err));
    TRY(train_options_from_json(options, s->json, &s->paths, dir, err));
    *storage = s;
    s = NULL;
done:
    tril_train_options_free(s);
    free(dir);
    return st;
}

/* A sample on stderr between the steps. */
static tril_status write_sample(void *arg, struct model *m, const struct tokenizer *t, int64_t step,
                                struct tril_error *err) {
    const struct tril_train_options *o = arg;
    struct tril_generate_options g = tril_generate_defaults();
    struct tril_generation out = {0};
    struct session *session = NULL;
    tril_status st = TRIL_OK;
    g.prompt = o->sample_prompt ? o->sample_prompt : "";
    g.prompt_size = strlen(g.prompt);
    g.max_tokens = o->sample_tokens;
    g.seed = o->seed;
    if (o->quiet)
        return TRIL_OK;
    TRY(session_create(&session, m, 0, 0, err));
    TRY(generator_run(session, t, tokenizer_eos(t), &g, &out, err));
    fprintf(stderr, "\n--- sample after step %lld ---\n%s%s\n---\n", (long long)step, g.prompt,
            out.text);
done:
    tril_generation_free(&out);
    session_free(session);
    return st;
}

tril_status tril_train(const struct tril_train_options *options, struct tril_train_result *result,
                       struct tril_error *err) {
    struct op_context ctx = {0};
    struct train_environment environment = {
        .ctx = &ctx, .sample = write_sample, .arg = (void *)options};
    tril_status st = TRIL_OK;
    threads_set((int)options->threads);
    TRY(train_options_check(options, err));
    TRY(device_open_as(&ctx, options->device, options->dtype, &environment.dtype, err));
    if (!options->init_only)
        environment.peak_flops = device_peak_flops(&ctx, environment.dtype);
    TRY(trainer_run(options, &environment, result, err));
done:
    op_context_free(&ctx);
    return st;
}
