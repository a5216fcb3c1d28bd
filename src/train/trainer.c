/* The trainer. One run is: open the data, make or load the model, then
 *
 *   for each step: grad_accum x (batch -> forward, backward) -> clip, AdamW -> log
 *                  now and then: validate, sample, checkpoint
 *
 * Everything that a step depends on (arenas, loader position, step number) is in a checkpoint, and
 * every random number is keyed by (seed, step), so a resumed run takes the same bits. */
#include "train/trainer.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/progress.h"
#include "base/system.h"
#include "model/carry.h"
#include "text/bpe_train.h"
#include "text/shard.h"
#include "train/checkpoint.h"
#include "train/evaluate.h"
#include "train/options.h"
#include "train/report.h"
#include "train/schedule.h"

struct trainer {
    struct tril_train_options *o; /* our copy */
    const struct train_environment *env;
    enum dtype saved;
    enum recompute recompute;
    bool offload_moments, offload_activations;
    double predicted; /* bytes of a device's memory; 0 on the CPU */
    struct tokenizer *tokenizer;
    struct dataset *data;
    struct model *model;
    struct workspace *workspace;
    struct carry *carry; /* with --order streams, where layers recall earlier segments */
    struct optimiser optimiser;
    struct loader loader;
    struct schedule schedule;
    struct report report;
    struct train_state state;
    json_t *options;   /* as saved in checkpoints */
    char *resume_from; /* directory of the checkpoint, or NULL */
    char *log_path;
    int32_t *buffer;    /* grad_accum micro-batches of inputs, targets, positions, offsets */
    int64_t last_saved; /* by this run; -1: none yet */
    int64_t resumed_at;
    int lock; /* of OUT */
};

/* ------------------------------------------------------------------ setting up */

static void note(const struct trainer *t, const char *text, const char *value) {
    if (!t->o->quiet)
        fprintf(stderr, "%-10s %s\n", text, value);
}

/* The tokenizer: given, the model's own, OUT's from an earlier run, or trained on the data. */
static tril_status make_tokenizer(struct trainer *t, int64_t preset_vocab, struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    const char *from = t->resume_from ? t->resume_from : o->tokenizer ? o->tokenizer : o->model;
    static const char *const specials[] = {"<|endoftext|>"};
    struct bpe_train_stats stats;
    char line[160];
    if (from)
        return tokenizer_load(&t->tokenizer, from, NULL, err);
    if (o->data_count < 1)
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "a tokenizer is needed: give --tokenizer FILE, or --data FILE to train one");
    struct bpe_train_options options = {.vocab_size =
                                            (uint32_t)(o->vocab > 0 ? o->vocab : preset_vocab),
                                        .pattern = o->pattern,
                                        .specials = specials,
                                        .special_count = 1,
                                        .quiet = o->quiet};
    tril_status st =
        tokenizer_train(&t->tokenizer, o->data, (size_t)o->data_count, &options, &stats, err);
    if (st != TRIL_OK)
        return st;
    snprintf(line, sizeof line, "byte-level BPE of %u tokens, trained on %.1f MB in %.1f s",
             tokenizer_vocab_size(t->tokenizer), (double)stats.bytes / 1e6,
             stats.count_seconds + stats.merge_seconds);
    note(t, "tokenizer", line);
    return TRIL_OK;
}

static tril_status open_data(struct trainer *t, struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    struct dataset_options options = {.paths = o->data,
                                      .path_count = (size_t)o->data_count,
                                      .valid_path = o->valid,
                                      .valid_fraction = o->valid_fraction,
                                      .tokenizer = t->tokenizer,
                                      .marker = o->marker,
                                      .cache_dir = o->cache,
                                      .quiet = o->quiet};
    struct loader_options loader = {.split = DATASET_TRAIN,
                                    .batch = (int)o->batch,
                                    .seq = (int)o->seq,
                                    .order = strcmp(o->order, "sequential") == 0 ? LOADER_SEQUENTIAL
                                             : strcmp(o->order, "streams") == 0  ? LOADER_STREAMS
                                                                                 : LOADER_SHUFFLED,
                                    .seed = o->seed,
                                    .mask_documents = o->mask_documents};
    char line[160];
    tril_status st = dataset_open(&t->data, &options, err);
    if (st != TRIL_OK)
        return st;
    snprintf(line, sizeof line, "%" PRIu64 " training tokens, %" PRIu64 " for validation",
             dataset_tokens(t->data, DATASET_TRAIN), dataset_tokens(t->data, DATASET_VALID));
    note(t, "data", line);
    return loader_open(&t->loader, t->data, &loader, err);
}

/* The configuration of a model from scratch; before the tokenizer exists, of the size asked for. */
static tril_status make_config(const struct trainer *t, struct model_config *c,
                               struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    struct tril_model_overrides overrides = o->overrides;
    tril_status st = TRIL_OK;
    if (o->config)
        TRY(model_config_read(c, o->config, err));
    else
        TRY(model_config_preset(c, o->preset ? o->preset : "nano", err));
    int64_t tokens = t->tokenizer ? tokenizer_vocab_size(t->tokenizer) : o->vocab;
    if (tokens > 0) /* a config.json may round its vocabulary up */
        overrides.vocab = o->config && tokens <= c->vocab ? c->vocab : tokens;
    if (overrides.context < 0 && !o->config)
        overrides.context = c->context > o->seq ? c->context : o->seq; /* --seq 0: the preset's */
    TRY(model_config_override(c, &overrides, err));
    if (t->tokenizer) {
        c->eos_id = tokenizer_eos(t->tokenizer);
        c->bos_id = tokenizer_bos(t->tokenizer) >= 0 ? tokenizer_bos(t->tokenizer) : c->eos_id;
    }
    st = model_config_check(c, err);
done:
    return st;
}

static tril_status make_model(struct trainer *t, struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    struct model_options options = {.training = true, .dtype = t->env->dtype};
    struct model_config config;
    struct model_counts counts;
    char line[160], count[32];
    tril_status st = TRIL_OK;
    const char *from = t->resume_from ? t->resume_from : o->model;
    if (from) {
        options.overrides = t->resume_from ? NULL : &o->overrides;
        TRY(model_load(&t->model, from, &options, t->env->ctx, err));
        if (t->tokenizer)
            TRY(tokenizer_check_model(t->tokenizer, t->model->config.vocab, from, err));
    } else {
        TRY(make_config(t, &config, err));
        TRY(model_create(&t->model, &config, &options, t->env->ctx, err));
        TRY(model_init(t->model, o->seed, err));
    }
    const struct model_config *c = &t->model->config;
    if (o->seq > c->context) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "--seq %" PRId64 " is longer than the model's context of %" PRId64, o->seq,
                       c->context);
        goto done;
    }
    model_count(c, o->seq, &counts);
    snprintf(line, sizeof line,
             "%s parameters: %" PRId64 " layers, width %" PRId64 ", %" PRId64
             " heads, vocabulary %" PRId64 ", %s",
             format_count(counts.total, count), c->layers, c->dim, c->heads, c->vocab, o->dtype);
    note(t, "model", line);
done:
    return st;
}

/* On a device: what the run will take of its memory. */
static tril_status predict(struct trainer *t, const struct workspace_options *w,
                           struct tril_error *err) {
    const struct backend *b = t->env->ctx->backend;
    const struct model_options options = {.dtype = t->model->dtype, .training = true};
    struct memory_plan p;
    char line[160], device[32], host[32];
    if (!b->plan)
        return TRIL_OK;
    tril_status st = model_memory_plan(&t->model->config, &options, w, 0, 0, DT_F32, b, &p, err);
    if (st != TRIL_OK)
        return st;
    if (t->offload_moments)
        memory_plan_offload_moments(&p);
    t->predicted = p.total;
    snprintf(line, sizeof line, "%s of the GPU's predicted%s%s%s", format_bytes(p.total, device),
             p.host > 0 ? ", and " : "", p.host > 0 ? format_bytes(p.host, host) : "",
             p.host > 0 ? " of the host's" : "");
    note(t, "memory", line);
    return TRIL_OK;
}

/* Steps from --steps, --tokens or --epochs; by default ten epochs, between 200 and 5000 steps. */
static int64_t planned_steps(const struct trainer *t) {
    const struct tril_train_options *o = t->o;
    double per_step = (double)(o->batch * o->seq * o->grad_accum);
    double epoch = (double)dataset_tokens(t->data, DATASET_TRAIN) / per_step;
    double steps = 10 * epoch;
    if (o->steps >= 0)
        return o->steps;
    if (o->tokens >= 0)
        return (int64_t)ceil((double)o->tokens / per_step);
    if (o->epochs >= 0)
        return (int64_t)ceil(o->epochs * epoch);
    return (int64_t)(steps < 200 ? 200 : steps > 5000 ? 5000 : steps);
}

static tril_status make_rest(struct trainer *t, struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    tril_status st = TRIL_OK;
    int64_t n = o->batch * o->seq;
    struct workspace_options w = {.max_tokens = n,
                                  .max_sequences = o->mask_documents ? n : o->batch,
                                  .backward = true,
                                  .recompute = t->recompute,
                                  .offload = t->offload_activations};
    struct adamw_params adamw = {.beta1 = (float)o->beta1,
                                 .beta2 = (float)o->beta2,
                                 .eps = (float)o->eps,
                                 .decay = (float)o->weight_decay};
    const int64_t segment = carry_segment(&t->model->config);
    w.carry = segment > 0 && strcmp(o->order, "streams") == 0;
    if (w.carry && o->seq != segment)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the model's layers recall by segments of %" PRId64 " tokens, so that "
                         "rows that go on need --seq %" PRId64,
                         segment, segment);
    TRY(predict(t, &w, err));
    TRY(workspace_create(&t->workspace, t->model, &w, err));
    if (w.carry)
        TRY(carry_create(&t->carry, t->model, o->batch, err));
    TRY((t->offload_moments ? optimiser_create_offloaded : optimiser_create)(
        &t->optimiser, t->model, &adamw, (float)o->clip, err));
    if (t->model->dtype == DT_F16)
        t->optimiser.scaling = LOSS_SCALING_BEGIN;
    t->buffer = malloc((size_t)(o->grad_accum * (4 * n + 3)) * sizeof *t->buffer);
    if (!t->buffer)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the batches");
    t->schedule = (struct schedule){
        .lr = o->lr, .min_lr = o->lr * o->min_lr_fraction, .steps = planned_steps(t)};
    t->schedule.warmup = (int64_t)ceil(o->warmup_fraction * (double)t->schedule.steps);
    TRY(schedule_parse(&t->schedule.kind, o->schedule, err));
done:
    return st;
}

/* Finds the checkpoint to go on from and compares its options with ours. */
static tril_status find_checkpoint(struct trainer *t, struct tril_error *err) {
    json_t *saved = NULL;
    tril_status st = TRIL_OK;
    TRY(checkpoint_latest(t->o->out, &t->resume_from, err));
    if (!t->resume_from)
        goto done;
    TRY(checkpoint_read_state(t->resume_from, &t->state, &saved, err));
    TRY(train_options_check_resume(saved, t->options, t->resume_from, err));
done:
    json_decref(saved);
    return st;
}

static tril_status restore(struct trainer *t, struct tril_error *err) {
    tril_status st = TRIL_OK;
    if (t->state.dataset_hash != dataset_hash(t->data)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s was trained on other data than what is given now; a resumed run needs "
                       "the same texts and tokenizer",
                       t->resume_from);
        goto done;
    }
    TRY(checkpoint_read_arenas(t->resume_from, t->model, &t->optimiser, err));
    if (t->optimiser.scaling.on && t->state.scaling.on)
        t->optimiser.scaling = t->state.scaling;
    TRY(loader_seek(&t->loader, t->state.position, err));
    if (t->carry)
        TRY(checkpoint_read_carry(t->resume_from, t->carry, err));
done:
    return st;
}

/* ------------------------------------------------------------------ one step */

/* Forward and backward of grad_accum micro-batches: the gradient of the mean loss over all their
 * targets. */
static tril_status accumulate_gradients(struct trainer *t, double *mean_loss,
                                        struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    int64_t n = o->batch * o->seq, stride = 4 * n + 3, targets = 0, count;
    double loss = 0, part;
    tril_status st = TRIL_OK;
    for (int64_t a = 0; a < o->grad_accum; a++) {
        int32_t *at = t->buffer + a * stride;
        struct loader_batch lb = {
            .inputs = at, .targets = at + n, .positions = at + 2 * n, .offsets = at + 3 * n};
        loader_next(&t->loader, &lb);
        at[4 * n + 1] = lb.sequences;
        at[4 * n + 2] = lb.begins;
        for (int64_t i = 0; i < n; i++)
            targets += lb.targets[i] >= 0;
    }
    for (int64_t a = 0; a < o->grad_accum; a++) {
        int32_t *at = t->buffer + a * stride;
        struct batch b = {.tokens = n,
                          .sequences = at[4 * n + 1],
                          .ids = at,
                          .targets = at + n,
                          .positions = at + 2 * n,
                          .offsets = at + 3 * n,
                          .carry = t->carry};
        const float scale = (float)t->optimiser.scaling.value;
        struct train_call call = {.scale = targets ? scale / (float)targets : 0.0f,
                                  .seed = o->seed,
                                  .step = (uint64_t)(t->state.step * o->grad_accum + a),
                                  .overwrite = a == 0};
        if (t->carry && at[4 * n + 2])
            carry_reset(t->carry, -1);
        TRY(model_forward_backward(t->model, t->workspace, &b, &call, &part, &count, err));
        loss += part;
    }
    *mean_loss = loss / (double)(targets ? targets : 1);
done:
    return st;
}

static tril_status validate(struct trainer *t, double *loss, struct tril_error *err) {
    struct evaluation e;
    int64_t batch = t->o->batch, seq = t->o->seq, segment = carry_segment(&t->model->config);
    if (t->carry) { /* one long row, whose segments recall each other */
        int64_t most =
            t->model->config.context < batch * seq ? t->model->config.context : batch * seq;
        int64_t text = (int64_t)dataset_tokens(t->data, DATASET_VALID) - 1;
        seq = (most < text ? most : text) / segment * segment;
        seq = seq > segment ? seq : segment;
        batch = 1;
    }
    if (dataset_tokens(t->data, DATASET_VALID) < (uint64_t)seq + 1) {
        *loss = NAN;
        return TRIL_OK;
    }
    tril_status st = evaluate_split(t->model, t->workspace, t->data, DATASET_VALID, (int)batch,
                                    (int)seq, t->o->eval_tokens, &e, err);
    *loss = st == TRIL_OK ? e.loss_sum / (double)e.tokens : NAN;
    return st;
}

static tril_status save(struct trainer *t, struct tril_error *err) {
    if (t->last_saved == t->state.step)
        return TRIL_OK;
    t->state.scaling = t->optimiser.scaling;
    tril_status st = checkpoint_write(t->o->out, t->model, &t->optimiser, t->tokenizer, &t->state,
                                      t->options, t->carry, t->saved, t->o->keep, err);
    if (st == TRIL_OK)
        t->last_saved = t->state.step;
    return st;
}

static bool every(int64_t interval, int64_t step, int64_t steps) {
    return interval > 0 && (step % interval == 0 || step == steps);
}

static tril_status not_finite(struct trainer *t, double loss, double norm, struct tril_error *err) {
    const char *what = isfinite(loss) ? "gradient norm" : "loss";
    if (t->last_saved < 0 && !t->resume_from)
        return error_set(err, TRIL_ERR_NUMERIC,
                         "the %s is not finite at step %" PRId64 " (loss %g, gradient norm %g), "
                         "before any checkpoint: lower --lr, or take --dtype fp32; weights that "
                         "were given with --model may hold NaN",
                         what, t->state.step + 1, loss, norm);
    return error_set(
        err, TRIL_ERR_NUMERIC,
        "the %s is not finite at step %" PRId64 " (loss %g, gradient norm %g); the last "
        "good checkpoint is %s/checkpoints/step-%" PRId64 ": resume it with a lower --lr, a lower "
        "--clip or --dtype fp32",
        what, t->state.step + 1, loss, norm, t->o->out,
        t->last_saved < 0 ? t->resumed_at : t->last_saved);
}

/* The most memory that the run took until now. */
static struct backend_memory memory_of(const struct trainer *t) {
    struct backend_memory memory = {0};
    if (t->env->ctx->backend->memory)
        t->env->ctx->backend->memory(&memory);
    return memory;
}

static tril_status train_step(struct trainer *t, struct tril_train_result *r, double started,
                              struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    struct model_counts counts;
    double loss, norm, begun = clock_seconds(), valid = NAN;
    int64_t steps = t->schedule.steps;
    bool applied;
    tril_status st = TRIL_OK;
    TRY(accumulate_gradients(t, &loss, err));
    if (!isfinite(loss))
        return not_finite(t, loss, NAN, err);
    double lr = schedule_rate(&t->schedule, t->state.step);
    TRY(optimiser_step(&t->optimiser, t->state.step + 1 - t->optimiser.scaling.skipped, lr, &norm,
                       &applied, err));
    if (!applied && t->optimiser.scaling.on && t->optimiser.scaling.value >= 1)
        report_note(&t->report,
                    "step %" PRId64 ": a gradient overflowed; losses are now scaled by %g",
                    t->state.step + 1, t->optimiser.scaling.value);
    else if (!applied)
        return not_finite(t, loss, norm, err);
    double seconds = clock_seconds() - begun;
    double tokens = (double)(o->batch * o->seq * o->grad_accum);
    t->state.step++;
    t->state.tokens += (int64_t)tokens;
    t->state.position = t->loader.position;
    t->state.seconds += seconds;
    if (every(o->eval_every, t->state.step, steps)) {
        TRY(validate(t, &valid, err));
        if (valid < t->state.best_valid_loss) {
            t->state.best_valid_loss = valid;
            t->state.best_step = t->state.step;
        }
        r->valid_loss = valid;
    }
    model_count(&t->model->config, o->seq, &counts);
    const struct backend_memory memory = memory_of(t);
    struct step_report report = {
        .step = t->state.step,
        .steps = steps,
        .tokens = t->state.tokens,
        .epoch = (double)t->state.tokens / (double)dataset_tokens(t->data, DATASET_TRAIN),
        .loss = loss,
        .lr = lr,
        .grad_norm = norm,
        .tokens_per_second = tokens / seconds,
        .mfu = t->env->peak_flops > 0
                   ? counts.train_flops_per_token * tokens / seconds / t->env->peak_flops
                   : NAN,
        .valid_loss = valid,
        .elapsed = t->state.seconds,
        .device_peak = memory.device_peak,
        .pinned_peak = memory.host_peak};
    TRY(report_step(&t->report, &report, err));
    r->loss = loss;
    r->seconds = clock_seconds() - started;
    if (every(o->sample_every, t->state.step, steps) && t->env->sample)
        TRY(t->env->sample(t->env->arg, t->model, t->tokenizer, t->state.step, err));
    /* A checkpoint is due at its interval, and when the best validation loss is to be kept. */
    if (every(o->checkpoint_every, t->state.step, steps))
        TRY(save(t, err));
done:
    return st;
}

/* ------------------------------------------------------------------ the run */

static tril_status set_up(struct trainer *t, struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    struct model_config preset = {0};
    tril_status st = TRIL_OK;
    TRY(dir_make(o->out, err));
    TRY(dir_lock(o->out, &t->lock, err));
    t->options = train_options_to_json(o);
    t->log_path = o->log ? strdup(o->log) : path_join(o->out, "log.jsonl");
    if (!t->options || !t->log_path)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to start");
    if (o->resume)
        TRY(find_checkpoint(t, err));
    if (o->resume && !t->resume_from)
        note(t, "resume", "there is no checkpoint yet: starting from the beginning");
    const char *from = t->resume_from ? t->resume_from : o->model;
    if (from)
        TRY(model_config_read(&preset, from, err));
    else /* a wrong shape is refused before a tokenizer is trained */
        TRY(make_config(t, &preset, err));
    if (o->seq == 0)
        t->o->seq = preset.context < 256 ? preset.context : 256;
    TRY(make_tokenizer(t, preset.vocab, err));
    if (!o->init_only)
        TRY(open_data(t, err));
    TRY(make_model(t, err));
done:
    return st;
}

static void tear_down(struct trainer *t) {
    report_close(&t->report);
    optimiser_free(&t->optimiser);
    workspace_free(t->workspace);
    carry_free(t->carry);
    model_free(t->model);
    dataset_free(t->data);
    tokenizer_free(t->tokenizer);
    json_decref(t->options);
    free(t->buffer);
    free(t->log_path);
    free(t->resume_from);
    dir_unlock(t->lock);
}

/* Before the first step of a new run: an earlier one's checkpoints are not mixed with its own. */
static tril_status begin_anew(struct trainer *t, struct tril_error *err) {
    char *aside = NULL;
    tril_status st = checkpoint_set_aside(t->o->out, &aside, err);
    t->state.dataset_hash = dataset_hash(t->data);
    if (aside)
        note(t, "earlier", aside);
    if (dataset_tokens(t->data, DATASET_VALID) < (uint64_t)t->o->seq + 1 && t->o->eval_every > 0)
        note(t, "validation", "none: its text is shorter than one sequence (--seq)");
    free(aside);
    return st;
}

static tril_status run(struct trainer *t, struct tril_train_result *r, struct tril_error *err) {
    const struct tril_train_options *o = t->o;
    double started = clock_seconds();
    tril_status st = TRIL_OK;
    TRY(make_rest(t, err));
    if (t->resume_from)
        TRY(restore(t, err));
    else
        TRY(begin_anew(t, err));
    TRY(report_open(&t->report, t->log_path, t->state.step, o->quiet, err));
    if (t->resume_from)
        report_note(&t->report, "resumed    %s, at step %" PRId64 " of %" PRId64, t->resume_from,
                    t->state.step, t->schedule.steps);
    int64_t first = t->state.step;
    t->resumed_at = first;
    while (t->state.step < t->schedule.steps && !signal_caught())
        TRY(train_step(t, r, started, err));
    int64_t done_now = t->state.step - first;
    const struct backend_memory memory = memory_of(t);
    r->predicted_device_bytes = t->predicted;
    r->peak_device_bytes = (double)memory.device_peak;
    r->peak_pinned_bytes = (double)memory.host_peak;
    r->steps = t->state.step;
    r->tokens = t->state.tokens;
    r->best_valid_loss = t->state.best_valid_loss;
    r->seconds = clock_seconds() - started;
    r->tokens_per_second =
        done_now > 0 ? (double)(done_now * o->batch * o->seq * o->grad_accum) / r->seconds : 0;
    TRY(report_draw(&t->report, o->out, err));
    if (signal_caught()) {
        TRY(save(t, err));
        st = error_set(err, TRIL_ERR_INTERRUPTED,
                       "stopped by a signal after step %" PRId64 "; go on with: tril train "
                       "--resume --out %s",
                       t->state.step, o->out);
        goto done;
    }
    TRY(checkpoint_write_final(o->out, t->model, t->tokenizer, t->saved, err));
done:
    return st;
}

tril_status trainer_run(const struct tril_train_options *options,
                        const struct train_environment *environment,
                        struct tril_train_result *result, struct tril_error *err) {
    struct tril_train_options o = *options;
    struct tril_train_result ignored;
    struct trainer t = {.o = &o, .env = environment, .last_saved = -1, .lock = -1};
    struct model_counts counts;
    tril_status st = TRIL_OK;
    if (!result)
        result = &ignored;
    *result =
        (struct tril_train_result){.loss = NAN, .valid_loss = NAN, .best_valid_loss = INFINITY};
    t.state.best_valid_loss = INFINITY;
    TRY(train_options_check(&o, err));
    dtype_parse(o.save_dtype, &t.saved);
    t.recompute = strcmp(o.recompute, "full") == 0        ? RECOMPUTE_FULL
                  : strcmp(o.recompute, "selective") == 0 ? RECOMPUTE_SELECTIVE
                                                          : RECOMPUTE_NONE;
    TRY(train_offload_parse(o.offload ? o.offload : "none", &t.offload_moments,
                            &t.offload_activations, err));
    if (environment->ctx->backend->memory_reset) /* measuring the device's limits took some */
        environment->ctx->backend->memory_reset();
    TRY(set_up(&t, err));
    model_count(&t.model->config, o.seq, &counts);
    result->parameters = (uint64_t)counts.total;
    if (o.init_only) {
        TRY(checkpoint_write_final(o.out, t.model, t.tokenizer, t.saved, err));
        goto done;
    }
    /* Intervals: about twenty validations a run, checkpoints as often. */
    int64_t twentieth = planned_steps(&t) / 20;
    if (o.eval_every < 0)
        o.eval_every = twentieth > 0 ? twentieth : 1;
    if (o.checkpoint_every < 0)
        o.checkpoint_every = o.eval_every;
    TRY(run(&t, result, err));
done:
    tear_down(&t);
    return st;
}
