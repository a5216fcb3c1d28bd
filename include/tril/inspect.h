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

/* Predicted memory in bytes; nothing is allocated. On cuda total is the GPU's memory (but for what
 * its driver takes itself); host is the host's pinned memory beside, with offloading. */
struct tril_memory_options {
    bool training;         /* else inference with a key/value cache */
    int64_t batch, seq;    /* training: rows and tokens of a micro-batch; inference: sequences and
                            * their length */
    const char *dtype;     /* "bf16" | "fp32" */
    const char *recompute; /* "none" | "selective" | "full" */
    const char *device;    /* "cpu" | "cuda"; NULL: cpu */
    const char *offload;   /* training on cuda: as tril/train.h's; NULL: none */
    const char *kv_dtype;  /* inference: "fp32" | "bf16" | "q8"; NULL: as dtype */
};
struct tril_memory {
    double weights, masters, gradients, optimiser, activations, packings, logits, cache, other;
    double scratch; /* of operations and libraries, on cuda; else in other */
    double total, host;
};
tril_status tril_inspect_memory(const struct tril_model_source *source,
                                const struct tril_memory_options *options,
                                struct tril_memory *memory, struct tril_error *err);

/* Calls `visit` for every tensor of one real forward pass over T tokens on `device` ("cpu", which
 * NULL means, or "cuda"). layer is -1 outside the blocks; shape has `rank` entries. */
typedef void tril_shape_visit(void *arg, int layer, const char *name, int rank,
                              const int64_t *shape, const char *dtype);
tril_status tril_inspect_shapes(const struct tril_model_source *source, int64_t T,
                                const char *dtype, const char *device, tril_shape_visit *visit,
                                void *arg, struct tril_error *err);

/* ------------------------------------------------------------------ weights */

enum { TRIL_WEIGHT_BINS = 48 };

/* One tensor of a checkpoint. */
struct tril_weight_row {
    char name[128];     /* the checkpoint's */
    int layer;          /* -1: outside the layers */
    int64_t rows, cols; /* a vector has one row */
    char dtype[8];
    double mean, std, min, max;
    double kurtosis;    /* 3 for a normal distribution */
    double near_zero;   /* share of |x| < std / 10: 0.080 for a normal distribution */
    double spectral;    /* largest singular value (power iteration); NaN for vectors */
    double stable_rank; /* |W|_F^2 / spectral^2: how many directions matter; NaN for vectors */
    /* Counts in equal bins of [-reach, reach], the outer ones with all beyond; one reach for all
     * layers of a matrix. */
    double reach;
    int64_t bins[TRIL_WEIGHT_BINS];
};
struct tril_weights {
    struct tril_weight_row *rows;
    int64_t count;
};
/* Distribution of every tensor of a directory's checkpoint, in order of layers. csv: a table; svg:
 * a histogram of each matrix, layers side by side; either may be NULL. */
tril_status tril_inspect_weights(const char *model, const char *csv, const char *svg,
                                 struct tril_weights *out, struct tril_error *err);
void tril_weights_free(struct tril_weights *w);

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
    double uniform; /* the entropy that even weights would have */
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

/* ------------------------------------------------------------------ over-smoothing */

/* Depth by depth: row 0 the embeddings, row l after layer l - 1 (counted from 0). */
struct tril_smoothing_row {
    double similarity; /* mean cosine between two tokens of a text */
    double residual;   /* share of the tokens' norm that is left without their mean: 0 when all are
                        * one (Dong et al. 2021) */
    double norm;       /* root mean square over tokens */
    double entropy, uniform; /* of the layer's attention, and of even weights; NaN in row 0 */
};
struct tril_smoothing {
    struct tril_smoothing_row *rows;
    int64_t count, tokens, windows;
    double loss; /* nats per token */
};
/* How alike the tokens of a text become: the first `windows` windows of options->seq tokens (0: the
 * context, at most 512), as means. Of the outputs only svg is used. csv_path may be NULL. */
tril_status tril_smoothing(const struct tril_look_options *options, int64_t windows,
                           const char *csv_path, struct tril_smoothing *out,
                           struct tril_error *err);
void tril_smoothing_free(struct tril_smoothing *s);

#ifdef __cplusplus
}
#endif
#endif
