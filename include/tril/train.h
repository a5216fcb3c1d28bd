/* Training: from text files to a Hugging Face directory, in one call that can be interrupted and
 * resumed bit for bit. */
#ifndef TRIL_TRAIN_H
#define TRIL_TRAIN_H

#include <stdbool.h>
#include <stdint.h>

#include "tril/config.h"
#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Every field has a default: tril_train_defaults. Strings are borrowed. */
struct tril_train_options {
    /* data */
    const char *const *data; /* text files or directories of .txt files */
    int data_count;
    const char *valid;     /* NULL: the last valid_fraction of the data */
    double valid_fraction; /* 0.1 */
    const char *marker;    /* line that separates documents; NULL: the end-of-text string */
    const char *order;     /* "shuffled" | "sequential" | "streams" */
    bool mask_documents;   /* documents in one row do not see each other */
    const char *cache;     /* where token shards are kept; NULL: the user's cache directory */

    /* tokenizer */
    const char *tokenizer; /* file or directory; NULL: the model's, or one trained on the data */
    int64_t vocab;         /* of a tokenizer to be trained; < 0: the preset's */
    const char *pattern;   /* "gpt2" | "cl100k" */

    /* model */
    const char *model;  /* directory to go on from; NULL: from scratch */
    const char *preset; /* NULL: "nano" */
    const char *config; /* a config.json; NULL: the preset */
    struct tril_model_overrides overrides;

    /* optimisation */
    int64_t batch, seq, grad_accum; /* rows, tokens a row (0: 256, or the context if that is
                                     * shorter), micro-batches a step */
    int64_t steps, tokens;          /* < 0: not given; the first given of steps, tokens, epochs */
    double epochs;
    double lr, min_lr_fraction, warmup_fraction;
    const char *schedule;                         /* "cosine" | "linear" | "constant" */
    double beta1, beta2, eps, weight_decay, clip; /* clip 0: none */
    uint64_t seed;

    /* how */
    const char *dtype;     /* "bf16" | "fp32"; on a GPU "fp16", "tf32" too */
    const char *recompute; /* "none" | "selective" | "full" */
    const char *offload;   /* "none" | "optimizer" | "activations" | "all": what waits in the host's
                              memory (devices only) */
    const char *device;    /* "cpu" | "cuda" | "reference" */
    int64_t threads;       /* 0: all */

    /* output */
    const char *out;
    bool resume, init_only;
    int64_t eval_every, eval_tokens; /* steps; tokens of validation used (0: all) */
    int64_t checkpoint_every, keep;  /* steps; how many of the last are kept */
    int64_t sample_every, sample_tokens;
    const char *sample_prompt;
    const char *log;        /* JSON lines; NULL: OUT/log.jsonl */
    const char *save_dtype; /* "fp32" | "bf16" */
    bool quiet;
};

struct tril_train_options tril_train_defaults(void);

/* The options a run in `out` was started with, read from its last checkpoint, so that --resume
 * needs no others. *storage owns their strings; free it with tril_train_options_free. */
tril_status tril_train_options_saved(const char *out, struct tril_train_options *options,
                                     void **storage, struct tril_error *err);
void tril_train_options_free(void *storage);

struct tril_train_result {
    int64_t steps, tokens;
    double loss, valid_loss, best_valid_loss; /* nats per token; NaN when not measured */
    double seconds, tokens_per_second;
    uint64_t parameters;
    /* On a device, bytes: its memory as predicted and at most in use, and the host's pinned memory
     * at most in use; else 0. */
    double predicted_device_bytes, peak_device_bytes, peak_pinned_bytes;
};

/* Trains. Progress goes to stderr unless options->quiet. SIGINT and SIGTERM end it after a
 * checkpoint with ERR_INTERRUPTED (the caller has called tril_signals_catch). A loss that is not
 * finite ends it with ERR_NUMERIC; the last good checkpoint stays. result may be NULL. */
tril_status tril_train(const struct tril_train_options *options, struct tril_train_result *result,
                       struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
