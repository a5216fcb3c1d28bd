/* Generation: load a model directory once, continue texts. */
#ifndef TRIL_GENERATE_H
#define TRIL_GENERATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tril/config.h"
#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A loaded model with its tokenizer: immutable, but used by one thread at a time. */
struct tril_engine;

struct tril_engine_options {
    const char *model;     /* a Hugging Face directory */
    const char *tokenizer; /* NULL: the directory's own */
    const char *dtype;     /* "bf16" | "fp32"; on a GPU "fp16", "tf32" too; NULL: bf16 */
    const char *device;    /* "cpu" | "cuda" | "reference"; NULL: cpu */
    int64_t context; /* tokens a session may hold; 0: the model's context. More than that makes
                      * the model's context longer, where positions are not learned */
    /* Without end (docs/memory.md): the first stream_sinks tokens and the last stream_window are
     * held; the oldest of these leave stream_stride at a time (0: a sixteenth of the window). 0: no
     * stream. */
    int64_t stream_window, stream_sinks, stream_stride;
    /* Decoding over the blocks of 64 tokens that can matter (docs/memory.md): the first one, the
     * last two and so many others; 0: over all. retrieve_check computes full attention too. */
    int64_t retrieve;
    bool retrieve_check;
    /* As in eval.h. NULL: none. */
    const struct tril_model_overrides *overrides;
    const char *ablate; /* parts to switch off, as in eval.h; NULL: none */
    /* Of the key/value cache: "fp32" | "bf16" | "q8" (8-bit integers with a scale for each row and
     * head: a little over half of bf16's memory); NULL: as dtype. Not with a stream or retrieval.
     */
    const char *kv_dtype;
};
tril_status tril_engine_open(struct tril_engine **out, const struct tril_engine_options *options,
                             struct tril_error *err);
void tril_engine_close(struct tril_engine *e); /* NULL is fine */

struct tril_generate_options {
    const char *prompt; /* UTF-8 or any bytes */
    size_t prompt_size;
    const int32_t *prompt_ids; /* instead of prompt; needs no tokenizer */
    int64_t prompt_id_count;
    int64_t max_tokens;
    double temperature;        /* 0: greedy */
    int64_t top_k;             /* 0: off */
    double top_p;              /* 1: off */
    double min_p;              /* 0: off */
    double repetition_penalty; /* 1: off */
    uint64_t seed;
    const char *const *stop; /* generation ends before any of these strings */
    int stop_count;
    bool ignore_eos; /* go on past the end-of-text token */
    bool roll;       /* at the context's end: forget the older half of the text, recompute, go on */
    /* Called with each piece of text as it is certain (whole UTF-8 characters, nothing that could
     * become a stop string); returning nonzero ends generation. May be NULL. */
    int (*on_text)(void *arg, const char *text, size_t size);
    void *arg;
};
/* 0.8, top-p 0.95, 256 tokens. */
struct tril_generate_options tril_generate_defaults(void);

enum tril_finish {
    TRIL_FINISH_LENGTH,
    TRIL_FINISH_EOS,
    TRIL_FINISH_STOP,
    TRIL_FINISH_CONTEXT,
    TRIL_FINISH_CALLBACK
};

struct tril_generation {
    char *text; /* the continuation only; NUL-terminated, `size` bytes without the NUL */
    size_t size;
    int32_t *tokens; /* ids: without the end-of-text token, with those of a stop string */
    int64_t token_count, prompt_tokens;
    enum tril_finish finish;
    double ttft_ms;           /* from the call to the first token */
    double tokens_per_second; /* of the tokens after the first */
    double prefill_tokens_per_second;
    double found; /* with retrieve_check: mean part of attention's probability found; else NAN */
};
tril_status tril_generate(struct tril_engine *e, const struct tril_generate_options *options,
                          struct tril_generation *out, struct tril_error *err);
void tril_generation_free(struct tril_generation *g);
/* "length", "eos", "stop", "context", "callback" */
const char *tril_finish_name(enum tril_finish f);

#ifdef __cplusplus
}
#endif
#endif
