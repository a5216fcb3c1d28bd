/* Checkpoints: write under a temporary name, sync, rename, prune. */
#include "train/checkpoint.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "model/carry.h"

#define STATE_FILE "trainer_state.json"
#define OPTIMISER_FILE "optimizer.safetensors"
#define CARRY_FILE "carry.safetensors"

static const char *const prefixes[] = {"exp_avg.", "exp_avg_sq.", "master."};

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to handle a checkpoint");
}

/* The step in "step-N", or -1 for any other name. */
static int64_t step_of_name(const char *name) {
    char *end;
    if (strncmp(name, "step-", 5) != 0 || name[5] < '0' || name[5] > '9')
        return -1;
    long long n = strtoll(name + 5, &end, 10);
    return *end ? -1 : n;
}

tril_status checkpoint_write_final(const char *out, struct model *m,
                                   const struct tokenizer *tokenizer, enum dtype saved,
                                   struct tril_error *err) {
    tril_status st = TRIL_OK;
    TRY(dir_make(out, err));
    TRY(model_save(m, out, saved, err));
    if (tokenizer)
        TRY(tokenizer_write_hf(tokenizer, out, m->config.context, err));
done:
    return st;
}

static tril_status write_state(const char *dir, const struct train_state *s, const json_t *options,
                               struct tril_error *err) {
    char hash[24];
    snprintf(hash, sizeof hash, "%016" PRIx64, s->dataset_hash);
    char *path = path_join(dir, STATE_FILE);
    json_t *root = json_pack(
        "{s:s, s:I, s:I, s:{s:I, s:I}, s:s, s:f, s:I, s:O}", "format", "tril trainer state 1",
        "step", (json_int_t)s->step, "tokens", (json_int_t)s->tokens, "loader", "epoch",
        (json_int_t)s->position.epoch, "index", (json_int_t)s->position.index, "dataset_hash", hash,
        "seconds", s->seconds, "best_step", (json_int_t)s->best_step, "options", options);
    tril_status st = path && root ? TRIL_OK : no_memory(err);
    if (st == TRIL_OK && isfinite(s->best_valid_loss))
        json_object_set_new(root, "best_valid_loss", json_real(s->best_valid_loss));
    if (st == TRIL_OK && s->scaling.on)
        json_object_set_new(root, "loss_scaling",
                            json_pack("{s:f, s:I, s:I}", "value", s->scaling.value, "good",
                                      (json_int_t)s->scaling.good, "skipped",
                                      (json_int_t)s->scaling.skipped));
    if (st == TRIL_OK)
        st = json_write(root, path, err);
    json_decref(root);
    free(path);
    return st;
}

/* Removes what is neither among the last `keep` nor the best. Failing to remove is no failure. */
static void prune(const char *checkpoints, int64_t keep, int64_t best) {
    char **names;
    size_t count;
    struct tril_error ignored;
    if (dir_list(checkpoints, &names, &count, &ignored) != TRIL_OK)
        return;
    for (size_t i = 0; i < count; i++) {
        int64_t step = step_of_name(names[i]), newer = 0;
        bool temporary = strncmp(names[i], ".tmp-", 5) == 0;
        for (size_t k = 0; k < count; k++)
            newer += step_of_name(names[k]) > step;
        if (!temporary && (step < 0 || step == best || newer < keep))
            continue;
        char *path = path_join(checkpoints, names[i]);
        if (path)
            dir_remove(path, &ignored);
        free(path);
    }
    dir_list_free(names, count);
}

tril_status checkpoint_write(const char *out, struct model *m, const struct optimiser *o,
                             const struct tokenizer *tokenizer, const struct train_state *state,
                             const json_t *options, const struct carry *carry, enum dtype saved,
                             int64_t keep, struct tril_error *err) {
    tril_status st = TRIL_OK;
    char name[64], temporary[72];
    char *checkpoints = path_join(out, "checkpoints"), *dir = NULL, *final = NULL, *arenas = NULL;
    char *carried = NULL;
    const float *const arrays[] = {o->mean, o->square, m->master};
    snprintf(name, sizeof name, "step-%" PRId64, state->step);
    snprintf(temporary, sizeof temporary, ".tmp-%s", name);
    if (!checkpoints || !(dir = path_join(checkpoints, temporary)) ||
        !(final = path_join(checkpoints, name)) || !(arenas = path_join(dir, OPTIMISER_FILE)) ||
        !(carried = path_join(dir, CARRY_FILE))) {
        st = no_memory(err);
        goto done;
    }
    if (path_exists(dir))
        TRY(dir_remove(dir, err));
    TRY(dir_make(dir, err));
    TRY(checkpoint_write_final(dir, m, tokenizer, saved, err));
    /* Rounded weights cannot be resumed from: the masters then lie with the optimiser. */
    TRY(model_arena_write(m, arrays, prefixes, saved == DT_F32 ? 2 : 3, arenas, DT_F32, err));
    if (carry)
        TRY(carry_write(carry, carried, err));
    TRY(write_state(dir, state, options, err));
    TRY(dir_sync(dir, err));
    if (path_exists(final))
        TRY(dir_remove(final, err));
    if (rename(dir, final) != 0) {
        st = error_set_errno(err, "cannot rename %s to %s", dir, final);
        goto done;
    }
    TRY(dir_sync(checkpoints, err));
    prune(checkpoints, keep, state->best_step);
done:
    if (st != TRIL_OK && dir && path_exists(dir)) {
        struct tril_error ignored;
        dir_remove(dir, &ignored);
    }
    free(carried);
    free(arenas);
    free(final);
    free(dir);
    free(checkpoints);
    return st;
}

tril_status checkpoint_set_aside(const char *out, char **said, struct tril_error *err) {
    char name[40], *latest = NULL, *from = path_join(out, "checkpoints"), *to = NULL;
    tril_status st = TRIL_OK;
    *said = NULL;
    if (!from) {
        st = no_memory(err);
        goto done;
    }
    TRY(checkpoint_latest(out, &latest, err));
    if (!latest)
        goto done;
    for (int i = 1; !to || path_exists(to); i++) {
        free(to);
        snprintf(name, sizeof name, "checkpoints.%d", i);
        to = path_join(out, name);
        if (!to) {
            st = no_memory(err);
            goto done;
        }
    }
    if (rename(from, to) != 0)
        st = error_set_errno(err, "cannot rename %s to %s", from, to);
    else if (asprintf(said, "checkpoints of an earlier run are now in %s", to) < 0)
        *said = NULL;
done:
    free(latest);
    free(from);
    free(to);
    return st;
}

tril_status checkpoint_latest(const char *out, char **dir, struct tril_error *err) {
    char *checkpoints = path_join(out, "checkpoints");
    char **names = NULL;
    size_t count = 0;
    int64_t best = -1;
    tril_status st = TRIL_OK;
    *dir = NULL;
    if (!checkpoints)
        return no_memory(err);
    if (!path_is_dir(checkpoints))
        goto done;
    TRY(dir_list(checkpoints, &names, &count, err));
    for (size_t i = 0; i < count; i++) {
        int64_t step = step_of_name(names[i]);
        char *path = step > best ? path_join(checkpoints, names[i]) : NULL;
        char *state = path ? path_join(path, STATE_FILE) : NULL;
        if (state && path_exists(state)) {
            free(*dir);
            *dir = path;
            path = NULL;
            best = step;
        }
        free(state);
        free(path);
    }
done:
    dir_list_free(names, count);
    free(checkpoints);
    return st;
}

tril_status checkpoint_read_state(const char *dir, struct train_state *s, json_t **options,
                                  struct tril_error *err) {
    char *path = path_join(dir, STATE_FILE);
    json_t *root = NULL;
    int64_t epoch = -1, index = -1;
    const char *hash = NULL;
    tril_status st = TRIL_OK;
    *options = NULL;
    *s = (struct train_state){.step = -1, .best_valid_loss = INFINITY};
    if (!path)
        return no_memory(err);
    TRY(json_read(&root, path, 1 << 20, err));
    TRY(json_get_int(root, "step", 0, INT64_MAX, &s->step, path, err));
    TRY(json_get_int(root, "tokens", 0, INT64_MAX, &s->tokens, path, err));
    TRY(json_get_int(root, "best_step", 0, INT64_MAX, &s->best_step, path, err));
    TRY(json_get_double(root, "seconds", 0, 1e12, &s->seconds, path, err));
    TRY(json_get_double(root, "best_valid_loss", 0, 1e30, &s->best_valid_loss, path, err));
    TRY(json_get_string(root, "dataset_hash", &hash, path, err));
    const json_t *scaling = json_object_get(root, "loss_scaling");
    if (scaling) {
        s->scaling = LOSS_SCALING_BEGIN;
        TRY(json_get_double(scaling, "value", 1e-6, 1e30, &s->scaling.value, path, err));
        TRY(json_get_int(scaling, "good", 0, INT64_MAX, &s->scaling.good, path, err));
        TRY(json_get_int(scaling, "skipped", 0, INT64_MAX, &s->scaling.skipped, path, err));
    }
    const json_t *loader = json_object_get(root, "loader");
    if (!json_is_object(loader) || !json_is_object(json_object_get(root, "options")) || !hash ||
        s->step < 0) {
        st = error_set(err, TRIL_ERR_FORMAT,
                       "%s: 'step', 'loader', 'options' or 'dataset_hash' is missing; resume from "
                       "another checkpoint",
                       path);
        goto done;
    }
    TRY(json_get_int(loader, "epoch", 0, INT64_MAX, &epoch, path, err));
    TRY(json_get_int(loader, "index", 0, INT64_MAX, &index, path, err));
    if (epoch < 0 || index < 0) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s: 'loader' lacks 'epoch' or 'index'", path);
        goto done;
    }
    s->position = (struct loader_position){(uint64_t)epoch, (uint64_t)index};
    s->dataset_hash = strtoull(hash, NULL, 16);
    *options = json_incref(json_object_get(root, "options"));
done:
    json_decref(root);
    free(path);
    return st;
}

tril_status checkpoint_read_arenas(const char *dir, struct model *m, struct optimiser *o,
                                   struct tril_error *err) {
    char *path = path_join(dir, OPTIMISER_FILE);
    float *const arrays[] = {o->mean, o->square, m->master};
    tril_status st = TRIL_OK;
    if (!path)
        return no_memory(err);
    /* The masters lie here only where the weights were saved rounded. */
    json_t *options = NULL;
    struct train_state state;
    TRY(checkpoint_read_state(dir, &state, &options, err));
    const char *saved = json_string_value(json_object_get(options, "save_dtype"));
    bool rounded = saved && strcmp(saved, "fp32") != 0;
    TRY(model_arena_read(m, arrays, prefixes, rounded ? 3 : 2, path, err));
    if (rounded)
        TRY(model_refresh(m, err));
done:
    json_decref(options);
    free(path);
    return st;
}

tril_status checkpoint_read_carry(const char *dir, struct carry *carry, struct tril_error *err) {
    char *path = path_join(dir, CARRY_FILE);
    tril_status st = path ? carry_read(carry, path, err) : no_memory(err);
    free(path);
    return st;
}
