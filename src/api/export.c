/* tril/export.h: a model read, changed where its parameters stay the same, and written again. */
#include "tril/export.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/device.h"
#include "base/file.h"
#include "model/model.h"
#include "text/tokenizer.h"

/* Refuses a directory that holds a model already. */
static tril_status check_empty(const char *dir, struct tril_error *err) {
    tril_status st = TRIL_OK;
    char *config = path_join(dir, "config.json");
    if (!config)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", dir);
    if (path_exists(config))
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s holds a model, which would be lost: name another directory", dir);
    free(config);
    return st;
}

/* A model without a tokenizer.json is exported without. */
static tril_status copy_tokenizer(const struct tril_export_options *o, const struct model_config *c,
                                  struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct tokenizer *t = NULL;
    char *path = path_join(o->model, "tokenizer.json");
    if (!path)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", o->out);
    if (path_exists(path)) {
        TRY(tokenizer_load(&t, o->model, NULL, err));
        TRY(tokenizer_write_hf(t, o->out, c->context, err));
    }
done:
    tokenizer_free(t);
    free(path);
    return st;
}

tril_status tril_export(const struct tril_export_options *o, char type[32],
                        struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct op_context ctx = {0};
    struct model *m = NULL;
    struct model_options options = {.dtype = DT_F32, .training = true, .overrides = o->overrides};
    enum dtype saved = DT_F32;
    const char *reason;
    if (!o->model || !o->out)
        return error_set(err, TRIL_ERR_ARGUMENT, "name the model and the directory to write: %s",
                         !o->model ? "--model DIR" : "--out DIR");
    if (o->dtype && (!dtype_parse(o->dtype, &saved) ||
                     (saved != DT_F32 && saved != DT_BF16 && saved != DT_F16)))
        return error_set(err, TRIL_ERR_ARGUMENT, "the dtype is fp32, bf16 or fp16, not '%s'",
                         o->dtype);
    TRY(check_empty(o->out, err));
    TRY(device_open(&ctx, "cpu", err));
    TRY(model_load(&m, o->model, &options, &ctx, err));
    snprintf(type, 32, "%s", model_config_type(&m->config, &reason));
    if (strcmp(type, "tril") == 0 && !o->native)
        TRY(error_set(err, TRIL_ERR_UNSUPPORTED,
                      "%s: transformers has no model type for it: %s; --native writes tril's own",
                      o->model, reason));
    TRY(dir_make(o->out, err));
    TRY(model_save(m, o->out, saved, err));
    TRY(copy_tokenizer(o, &m->config, err));
done:
    model_free(m);
    op_context_free(&ctx);
    return st;
}
