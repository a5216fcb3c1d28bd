/* Looking at a model without running it (or through one forward pass): parameters, FLOPs, memory,
 * shapes. */
#ifndef TRIL_INSPECT_H
#define TRIL_INSPECT_H

#include <stdbool.h>
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

#ifdef __cplusplus
}
#endif
#endif
