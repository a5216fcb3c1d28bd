/* Evaluation: loss, perplexity and bits per byte of a model on a text; its logits and gradients for
 * given token ids, so that anyone can check them against anything. */
#ifndef TRIL_EVAL_H
#define TRIL_EVAL_H

#include <stddef.h>
#include <stdint.h>

#include "tril/config.h"
#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

struct tril_eval_options {
    const char *model;     /* a Hugging Face directory */
    const char *tokenizer; /* NULL: the directory's own */
    const char *dtype;     /* "fp32" (NULL) | "bf16"; on a GPU "fp16", "tf32" too */
    const char *device;    /* NULL: cpu */
    const char *data;      /* a text file */
    /* Changes to the model that leave its parameters as they are: context, RoPE's scaling, mixers,
     * ... NULL: none. */
    const struct tril_model_overrides *overrides;
    /* Parts to switch off, for this evaluation alone (NULL: none): a list of mlp, attention,
     * layer:L, head:L.H, residual, norm, q, scale, position; docs/inspect.md. Not with gradients.
     */
    const char *ablate;
    int64_t seq;        /* window in tokens; 0: the context, at most 1024 */
    int64_t stride;     /* tokens between windows' starts; 0: seq (no overlap) */
    int64_t max_tokens; /* of the text; 0: all */
};

struct tril_eval_result {
    double loss;          /* mean over scored tokens, nats */
    double perplexity;    /* e^loss */
    double bits_per_byte; /* total loss in bits / bytes of the scored tokens */
    int64_t tokens;       /* scored: all but the first */
    int64_t bytes;
    double seconds;
};

/* The text as one sequence, in windows (see --stride in `tril eval --help`). */
tril_status tril_eval(const struct tril_eval_options *options, struct tril_eval_result *result,
                      struct tril_error *err);

/* A model beside counting: both on the validation part of the same data, divided as tril train
 * divides it (train.h), the counts taken from its training part. */
struct tril_baseline_result {
    double loss;          /* the model's, nats per token, in windows of seq */
    double baseline_loss; /* of an interpolated Kneser-Ney 3-gram model of the training tokens */
    int64_t train_tokens, valid_tokens;
};
/* Uses options->model, tokenizer, dtype, device, seq; `data` are text files or directories;
 * valid_fraction as in training (0.1). */
tril_status tril_eval_baseline(const struct tril_eval_options *options, const char *const *data,
                               int data_count, double valid_fraction,
                               struct tril_baseline_result *result, struct tril_error *err);

/* Writes `logits` fp32 [T, V] of the ids (data and tokenizer are not used) to a safetensors file;
 * with grads_path also the gradient of the mean next-token loss for every parameter, under its name
 * and in its layout in the checkpoint, tied ones once, summed. Either path may be NULL. *loss (may
 * be NULL) receives the mean next-token loss, NaN for a single id. */
tril_status tril_eval_ids(const struct tril_eval_options *options, const int32_t *ids,
                          int64_t count, const char *logits_path, const char *grads_path,
                          double *loss, struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
