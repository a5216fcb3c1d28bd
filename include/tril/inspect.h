/* Looking at a model without running it (or through one forward pass): parameters, FLOPs, memory,
 * shapes. */
#ifndef TRIL_INSPECT_H
#define TRIL_INSPECT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tril/config.h"
#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Which model: exactly one of model, preset, config; then the overrides. */
struct tril_model_source {
    const char *model;  /* a Hugging Face directory */
    const char *preset; /* see tril_preset_names */
    const char *config; /* a config.json */
    struct tril_model_overrides overrides;
};

struct tril_model_info {
    char type[32]; /* "gpt2", "llama", ..., "tril" */
    int64_t layers, dim, heads, kv_heads, head_dim, ffn, vocab, context;
    bool tied;
};

/* Parameters by part, and FLOPs per token of a forward pass at sequence length T (a multiply-add
 * counts two; causal scores counted once). */
struct tril_counts {
    double embedding, position, attention, ffn, norms, head, total; /* head 0 when tied */
    double flops_attention, flops_scores, flops_ffn, flops_head, flops_total;
    double train_flops; /* per token: 6 N + 6 L D T, N with the head, without embedding look-ups */
};
tril_status tril_inspect_params(const struct tril_model_source *source, int64_t T,
                                struct tril_model_info *info, struct tril_counts *counts,
                                struct tril_error *err);

/* Predicted memory in bytes; nothing is allocated. */
struct tril_memory_options {
    bool training;         /* else inference with a key/value cache */
    int64_t batch, seq;    /* training: rows and tokens of a micro-batch; inference: sequences and
                            * their length */
    const char *dtype;     /* "bf16" | "fp32" */
    const char *recompute; /* "none" | "selective" | "full" */
};
struct tril_memory {
    double weights, masters, gradients, optimiser, activations, packings, logits, cache, other;
    double total;
};
tril_status tril_inspect_memory(const struct tril_model_source *source,
                                const struct tril_memory_options *options,
                                struct tril_memory *memory, struct tril_error *err);

/* Calls `visit` for every tensor of one real forward pass over T tokens. layer is -1 outside the
 * blocks; shape has `rank` entries. */
typedef void tril_shape_visit(void *arg, int layer, const char *name, int rank,
                              const int64_t *shape, const char *dtype);
tril_status tril_inspect_shapes(const struct tril_model_source *source, int64_t T,
                                const char *dtype, tril_shape_visit *visit, void *arg,
                                struct tril_error *err);

/* ------------------------------------------------------------------ attention */

/* One real forward pass over a text through the usual kernels, and the mask, the scaled QK^T and
 * the softmax of its layers and heads, recomputed from the pass's queries, keys and log-sum-exp.
 * Any of the outputs may be NULL. */
struct tril_look_options {
    const struct tril_model_source *source; /* a preset or a config gives random weights */
    const char *tokenizer;                  /* NULL: the model directory's own */
    const char *dtype;                      /* "fp32" (NULL) | "bf16" */
    const char *device;                     /* NULL: cpu */
    const char *ablate;                     /* parts to switch off (see tril_eval); NULL: none */
    const char *prompt;                     /* any bytes ... */
    size_t prompt_size;
    const int32_t *ids; /* ... or token ids, which need no tokenizer */
    int64_t id_count;
    int64_t seq;     /* the first so many tokens; 0: all */
    int layer, head; /* -1: all */
    /* safetensors, of the layers and heads chosen: layer.L.scores and .weights fp32 [heads, T, T],
     * .mask u8, .lse fp32 [heads, T]; where softcap, ALiBi or a bias come between, .added; ids */
    const char *out;
    /* One head (layer and head given): scores, mask and weights side by side, with the tokens; or
     * the weights of all that are chosen as a grid. png needs rsvg-convert. */
    const char *svg, *png;
    const char *html; /* the page: every head, one file, no network; at most 2048 tokens */
};

/* Means over the rows of a head: see docs/inspect.md. Entropy in nats, distance in tokens, shares
 * from 0 to 1. */
struct tril_look_head {
    int layer, head;
    double entropy, distance, first, previous, self, sink, largest;
};

struct tril_look {
    struct tril_model_info info;
    int64_t tokens;
    int32_t *ids;  /* [tokens] */
    char **labels; /* [tokens], UTF-8: the token's text ("#7" without a tokenizer) */
    struct tril_look_head *heads;
    int64_t head_count;
    /* With one layer and head chosen and at most 256 tokens, [tokens, tokens]; else NULL. added is
     * NULL where it would be scores. */
    float *scores, *added, *weights;
    uint8_t *mask;
    bool png_made;
    double seconds; /* of the pass */
};
tril_status tril_look(const struct tril_look_options *options, struct tril_look *look,
                      struct tril_error *err);
void tril_look_free(struct tril_look *look);

#ifdef __cplusplus
}
#endif
#endif
