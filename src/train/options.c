/* One table of all training options, from which JSON is written, read and compared. */
#include "train/options.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "train/schedule.h"

enum field_kind { FIELD_STRING, FIELD_INT, FIELD_NUMBER, FIELD_BOOL, FIELD_INT32, FIELD_SEED };

struct field {
    const char *name;
    enum field_kind kind;
    size_t offset;
    bool fixed; /* must be the same when a run is resumed */
};

#define F(name, kind, fixed)                                                                       \
    { #name, kind, offsetof(struct tril_train_options, name), fixed }
#define O(name, kind)                                                                              \
    { #name, kind, offsetof(struct tril_train_options, overrides.name), true }

static const struct field fields[] = {
    F(valid, FIELD_STRING, true),
    F(valid_fraction, FIELD_NUMBER, true),
    F(marker, FIELD_STRING, true),
    F(order, FIELD_STRING, true),
    F(mask_documents, FIELD_BOOL, true),
    F(cache, FIELD_STRING, false),
    F(tokenizer, FIELD_STRING, false),
    F(vocab, FIELD_INT, false),
    F(pattern, FIELD_STRING, false),
    F(model, FIELD_STRING, false),
    F(preset, FIELD_STRING, false),
    F(config, FIELD_STRING, false),
    O(layers, FIELD_INT),
    O(dim, FIELD_INT),
    O(heads, FIELD_INT),
    O(kv_heads, FIELD_INT),
    O(head_dim, FIELD_INT),
    O(ffn, FIELD_INT),
    O(context, FIELD_INT),
    O(dropout, FIELD_NUMBER),
    O(rope_theta, FIELD_NUMBER),
    O(norm_eps, FIELD_NUMBER),
    O(rope_share, FIELD_NUMBER),
    O(rope_scaling, FIELD_STRING),
    O(rope_factor, FIELD_NUMBER),
    O(rope_original, FIELD_INT),
    O(mixers, FIELD_STRING),
    O(norm, FIELD_STRING),
    O(ffn_kind, FIELD_STRING),
    O(activation, FIELD_STRING),
    O(position, FIELD_STRING),
    O(tied, FIELD_INT32),
    O(qk_norm, FIELD_INT32),
    O(bias, FIELD_INT32),
    F(batch, FIELD_INT, true),
    F(seq, FIELD_INT, true),
    F(grad_accum, FIELD_INT, true),
    F(steps, FIELD_INT, false),
    F(tokens, FIELD_INT, false),
    F(epochs, FIELD_NUMBER, false),
    F(lr, FIELD_NUMBER, false),
    F(min_lr_fraction, FIELD_NUMBER, false),
    F(warmup_fraction, FIELD_NUMBER, false),
    F(schedule, FIELD_STRING, false),
    F(beta1, FIELD_NUMBER, false),
    F(beta2, FIELD_NUMBER, false),
    F(eps, FIELD_NUMBER, false),
    F(weight_decay, FIELD_NUMBER, false),
    F(clip, FIELD_NUMBER, false),
    F(seed, FIELD_SEED, true),
    F(dtype, FIELD_STRING, true),
    F(recompute, FIELD_STRING, false),
    F(offload, FIELD_STRING, false),
    F(device, FIELD_STRING, false),
    F(threads, FIELD_INT, false),
    F(eval_every, FIELD_INT, false),
    F(eval_tokens, FIELD_INT, false),
    F(checkpoint_every, FIELD_INT, false),
    F(keep, FIELD_INT, false),
    F(sample_every, FIELD_INT, false),
    F(sample_tokens, FIELD_INT, false),
    F(sample_prompt, FIELD_STRING, false),
    F(log, FIELD_STRING, false),
    F(save_dtype, FIELD_STRING, false),
};
enum { FIELD_COUNT = sizeof fields / sizeof *fields };

struct tril_train_options train_options_defaults(void) {
    struct tril_train_options o = {
        .valid_fraction = 0.1,
        .order = "shuffled",
        .pattern = "gpt2",
        .vocab = -1,
        .batch = 8,
        .seq = 0,
        .grad_accum = 1,
        .steps = -1,
        .tokens = -1,
        .epochs = -1,
        .lr = 3e-4,
        .min_lr_fraction = 0.1,
        .warmup_fraction = 0.05,
        .schedule = "cosine",
        .beta1 = 0.9,
        .beta2 = 0.95,
        .eps = 1e-8,
        .weight_decay = 0.1,
        .clip = 1.0,
        .seed = 1337,
        .dtype = "bf16",
        .recompute = "none",
        .offload = "none",
        .device = "cpu",
        .eval_every = -1,
        .eval_tokens = 65536,
        .checkpoint_every = -1,
        .keep = 2,
        .sample_every = 0,
        .sample_tokens = 64,
        .save_dtype = "fp32",
    };
    o.overrides = tril_model_overrides_none();
    return o;
}

static json_t *field_to_json(const struct tril_train_options *o, const struct field *f) {
    const char *at = (const char *)o + f->offset;
    switch (f->kind) {
    case FIELD_STRING: {
        const char *s = *(const char *const *)at;
        return s ? json_string(s) : NULL;
    }
    case FIELD_INT:
        return json_integer(*(const int64_t *)at);
    case FIELD_SEED:
        return json_integer((int64_t) * (const uint64_t *)at);
    case FIELD_INT32:
        return json_integer(*(const int *)at);
    case FIELD_NUMBER:
        return json_real(*(const double *)at);
    case FIELD_BOOL:
        return json_boolean(*(const bool *)at);
    }
    return NULL;
}

json_t *train_options_to_json(const struct tril_train_options *o) {
    json_t *root = json_object(), *data = json_array();
    if (!root || !data) {
        json_decref(root);
        json_decref(data);
        return NULL;
    }
    for (int i = 0; i < o->data_count; i++)
        json_array_append_new(data, json_string(o->data[i]));
    json_object_set_new(root, "data", data);
    for (int i = 0; i < FIELD_COUNT; i++) {
        json_t *value = field_to_json(o, &fields[i]);
        if (value)
            json_object_set_new(root, fields[i].name, value);
    }
    return root;
}

static tril_status field_from_json(struct tril_train_options *o, const struct field *f,
                                   const json_t *json, const char *where, struct tril_error *err) {
    char *at = (char *)o + f->offset;
    int64_t i = 0;
    tril_status st;
    switch (f->kind) {
    case FIELD_STRING:
        return json_get_string(json, f->name, (const char **)at, where, err);
    case FIELD_INT:
        return json_get_int(json, f->name, INT64_MIN, INT64_MAX, (int64_t *)at, where, err);
    case FIELD_SEED:
        i = (int64_t) * (uint64_t *)at;
        st = json_get_int(json, f->name, INT64_MIN, INT64_MAX, &i, where, err);
        *(uint64_t *)at = (uint64_t)i;
        return st;
    case FIELD_INT32:
        i = *(int *)at;
        st = json_get_int(json, f->name, -1, 1, &i, where, err);
        *(int *)at = (int)i;
        return st;
    case FIELD_NUMBER:
        return json_get_double(json, f->name, -HUGE_VAL, HUGE_VAL, (double *)at, where, err);
    case FIELD_BOOL:
        return json_get_bool(json, f->name, (bool *)at, where, err);
    }
    return TRIL_OK;
}

tril_status train_options_from_json(struct tril_train_options *o, const json_t *json,
                                    const char ***paths, const char *where,
                                    struct tril_error *err) {
    tril_status st = TRIL_OK;
    const json_t *data = json_object_get(json, "data");
    *o = train_options_defaults();
    *paths = NULL;
    for (int i = 0; i < FIELD_COUNT; i++)
        TRY(field_from_json(o, &fields[i], json, where, err));
    size_t count = json_array_size(data);
    *paths = calloc(count + 1, sizeof **paths);
    if (!*paths) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the saved options");
        goto done;
    }
    for (size_t i = 0; i < count; i++)
        if (!((*paths)[i] = json_string_value(json_array_get(data, i)))) {
            st = error_set(err, TRIL_ERR_FORMAT, "%s: 'data' is not a list of paths", where);
            goto done;
        }
    o->data = *paths;
    o->data_count = (int)count;
done:
    if (st != TRIL_OK) {
        free(*paths);
        *paths = NULL;
    }
    return st;
}

tril_status train_options_check_resume(const json_t *saved, const json_t *now, const char *where,
                                       struct tril_error *err) {
    for (int i = 0; i < FIELD_COUNT; i++) {
        if (!fields[i].fixed)
            continue;
        const json_t *a = json_object_get(saved, fields[i].name);
        const json_t *b = json_object_get(now, fields[i].name);
        if ((a != NULL) == (b != NULL) && (!a || json_equal(a, b)))
            continue;
        char option[32];
        snprintf(option, sizeof option, "%s", fields[i].name);
        for (char *c = option; *c; c++)
            *c = *c == '_' ? '-' : *c;
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the run was started with another value of --%s; a resumed run "
                         "keeps it (leave the option out, or start afresh in another --out)",
                         where, option);
    }
    return TRIL_OK;
}

static tril_status check_range(const char *option, double value, double min, double max,
                               struct tril_error *err) {
    if (value >= min && value <= max)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT, "%s must be from %g to %g, not %g", option, min, max,
                     value);
}

/* A value that is one of four names; NULL: of fewer. */
static tril_status check_choice(const char *option, const char *value, const char *const names[4],
                                struct tril_error *err) {
    char list[96] = "";
    for (int i = 0, n = 0; i < 4 && names[i]; i++) {
        if (value && strcmp(value, names[i]) == 0)
            return TRIL_OK;
        const char *before = i == 0 ? "" : i == 3 || !names[i + 1] ? " or " : ", ";
        n += snprintf(list + n, sizeof list - (size_t)n, "%s%s", before, names[i]);
    }
    return error_set(err, TRIL_ERR_ARGUMENT, "%s is %s, not '%s'", option, list,
                     value ? value : "");
}
#define CHOICE(...) ((const char *const[4]){__VA_ARGS__})

tril_status train_offload_parse(const char *name, bool *moments, bool *activations,
                                struct tril_error *err) {
    *moments = strcmp(name, "optimizer") == 0 || strcmp(name, "all") == 0;
    *activations = strcmp(name, "activations") == 0 || strcmp(name, "all") == 0;
    if (*moments || *activations || strcmp(name, "none") == 0)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT,
                     "--offload is none, optimizer, activations or all, not '%.40s'", name);
}

tril_status train_options_check(const struct tril_train_options *o, struct tril_error *err) {
    tril_status st = TRIL_OK;
    enum schedule_kind kind;
    bool moments, activations;
    if (!o->out)
        return error_set(err, TRIL_ERR_ARGUMENT, "where to? give a directory with --out");
    if (o->data_count < 1 && o->resume)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "there is no complete checkpoint in %s/checkpoints to go on from (and no "
                         "--data to begin with)",
                         o->out);
    if (o->data_count < 1 && !o->init_only)
        return error_set(err, TRIL_ERR_ARGUMENT, "there is no text to train on: give --data FILE");
    if (o->model && (o->preset || o->config))
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "--model goes on from an existing model; it excludes --preset and --config");
    if (o->preset && o->config)
        return error_set(err, TRIL_ERR_ARGUMENT, "--preset and --config exclude each other");
    if ((o->steps >= 0) + (o->tokens >= 0) + (o->epochs >= 0) > 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "--steps, --tokens and --epochs exclude each other; give one");
    TRY(check_range("--batch", (double)o->batch, 1, 65536, err));
    TRY(check_range("--seq", (double)o->seq, 0, 1 << 24, err));
    TRY(check_range("--batch times --seq", (double)o->batch * (double)o->seq, 0, 1 << 26, err));
    TRY(check_range("--grad-accum", (double)o->grad_accum, 1, 65536, err));
    TRY(check_range("--lr", o->lr, 0, 10, err));
    TRY(check_range("--min-lr-fraction", o->min_lr_fraction, 0, 1, err));
    TRY(check_range("--warmup-frac", o->warmup_fraction, 0, 1, err));
    TRY(check_range("--beta1", o->beta1, 0, 0.999999, err));
    TRY(check_range("--beta2", o->beta2, 0, 0.9999999, err));
    TRY(check_range("--eps", o->eps, 0, 1, err));
    TRY(check_range("--weight-decay", o->weight_decay, 0, 10, err));
    TRY(check_range("--clip", o->clip, 0, 1e9, err));
    TRY(check_range("--valid-fraction", o->valid_fraction, 0, 0.9, err));
    TRY(check_range("--keep", (double)o->keep, 1, 1e6, err));
    TRY(check_choice("--dtype", o->dtype, CHOICE("bf16", "fp32", "fp16", "tf32"), err));
    TRY(check_choice("--save-dtype", o->save_dtype, CHOICE("fp32", "bf16"), err));
    TRY(check_choice("--order", o->order, CHOICE("shuffled", "sequential", "streams"), err));
    TRY(check_choice("--recompute", o->recompute, CHOICE("none", "selective", "full"), err));
    TRY(train_offload_parse(o->offload ? o->offload : "none", &moments, &activations, err));
    if ((moments || activations) && (!o->device || strcmp(o->device, "cuda") != 0)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "--offload moves what a GPU has no room for into the host's memory; with "
                       "--device %s everything lies there already: give --offload none",
                       o->device ? o->device : "cpu");
        goto done;
    }
    TRY(schedule_parse(&kind, o->schedule, err));
done:
    return st;
}
