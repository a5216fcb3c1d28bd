/* The model: parameters, one explicit forward and one explicit backward.
 *
 *   tokens -> embed -> [ norm -> attention -> +residual -> norm -> ffn -> +residual ] x L
 *          -> norm -> head -> loss or logits
 *
 * A call takes flattened tokens of several sequences (see struct batch): a training batch, a packed
 * batch of documents, a prefill chunk and a mixed decoding batch are the same call. Model code
 * never dereferences a tensor's data: it allocates, copies and computes through the backend. */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "model/config.h"
#include "model/table.h"

enum recompute { RECOMPUTE_NONE, RECOMPUTE_SELECTIVE, RECOMPUTE_FULL };

/* Calls around the use of a layer's parameters (for sharded or offloaded parameters and for
 * reductions that overlap the backward pass). Layers 0 .. L-1; -1 the embeddings; L the final norm
 * and the head. Any may be NULL. A tied head's gradient is ready with -1. */
struct parameter_hooks {
    void *arg;
    tril_status (*acquire)(void *arg, int layer, struct tril_error *err);
    tril_status (*release)(void *arg, int layer, struct tril_error *err);
    tril_status (*gradient_ready)(void *arg, int layer, struct tril_error *err);
};

/* What a mixer of the configuration needs beside parameters. */
struct mixer_tables {
    struct visible_set rules;
    float *rope_cos, *rope_sin; /* [context, R], or NULL: no rotation */
    bool shared;                /* the tables are those of an earlier mixer */
};

/* Parameters in the backend's memory. Training: fp32 masters, fp32 gradients and (bf16) compute
 * copies, each one arena laid out by the table. Inference: compute copies only, each row an
 * allocation of its own, so that a linear weight can live in its packed form alone. */
struct model {
    struct model_config config;
    struct param_table table;
    struct op_context *ctx; /* borrowed */
    enum dtype dtype;       /* compute dtype of matrices and activations: fp32 or bf16 */
    bool training;
    float *master;          /* [table.elements] fp32, training only */
    float *gradient;        /* [table.elements] fp32, training only */
    void *compute;          /* [table.elements] dtype, training only; == master when fp32 */
    void **rows;            /* [table.count]; inference: a row's own memory (NULL: released) */
    struct weight *weights; /* [table.count]; .value views the compute copy (matrix rows) */
    float **vectors;        /* [table.count]; fp32 data of the other rows */
    bool *prepared;         /* [table.count]; the row's packings exist */
    float *slopes;          /* [H] or NULL */
    void *sinusoids; /* [model_distances, D] of the compute dtype, or NULL: no recurrent layers */
    struct mixer_tables mixers[MODEL_MOST_MIXERS];
    struct parameter_hooks hooks;
    struct ablation *ablation; /* parts that are off (ablate.h); NULL: none */
};

/* Distances between a token and what it sees in a recurrent layer, 0 among them; 0: there are no
 * such layers. */
int64_t model_distances(const struct model_config *c);

/* Index of a row in the table, or -1 when the configuration has none; layer -1 for rows outside
 * blocks. */
int model_row(const struct model *m, enum param_role role, int layer);
/* The row that holds the head: its own, or the token embedding when tied. */
int model_head_row(const struct model *m);

/* dtype fp32 or bf16. DT_F64 is for finite differences on the reference backend: everything that is
 * otherwise fp32 (masters, gradients, the residual stream, tables) is then double. */
struct model_options {
    enum dtype dtype;
    bool training;
    /* model_load: applied to the file's configuration; what changes the shape of a parameter makes
     * the file unfit. NULL: none. */
    const struct tril_model_overrides *overrides;
};
/* fp32, or double in a DT_F64 model: the dtype of masters, gradients, vectors, the residual. */
static inline enum dtype model_wide(const struct model *m) {
    return m->dtype == DT_F64 ? DT_F64 : DT_F32;
}

/* Allocates; parameters are zero until model_init or model_load fills them. */
tril_status model_create(struct model **out, const struct model_config *config,
                         const struct model_options *options, struct op_context *ctx,
                         struct tril_error *err);
void model_free(struct model *m); /* NULL is fine */

/* Draws initial parameters (GPT-2's scheme): a function of seed, row and element only. Ends with
 * model_refresh. */
tril_status model_init(struct model *m, uint64_t seed, struct tril_error *err);

/* How loaders fill a model: elements begin .. begin + count of a row, in its logical layout, from
 * host memory of any float dtype. Training models: masters and compute copy both. Then, when a row
 * is complete, model_row_done builds its packings (and lets an inference model drop the plain
 * copy): calling it row by row keeps the peak of memory low; model_refresh does the rest. */
tril_status model_row_upload(struct model *m, int row, int64_t begin, int64_t count,
                             const void *host, enum dtype t, struct tril_error *err);
tril_status model_row_done(struct model *m, int row, struct tril_error *err);
/* Elements of a master (training) as fp32 in host memory. */
tril_status model_row_download(const struct model *m, int row, int64_t begin, int64_t count,
                               float *host, struct tril_error *err);
/* compute = masters, rounded (after something other than adamw's `copy` wrote the masters). */
tril_status model_cast_masters(struct model *m, struct tril_error *err);
/* Reads a Hugging Face directory: config, then weights (fp32, bf16, fp16; sharded; tied or not).
 * Missing, surplus or misshapen tensors are refused by name. */
tril_status model_load(struct model **out, const char *dir, const struct model_options *options,
                       struct op_context *ctx, struct tril_error *err);
/* Writes config.json, model.safetensors (dtype `saved`) and generation_config.json into an existing
 * directory, each atomically. Training models only (from the fp32 masters). */
tril_status model_save(struct model *m, const char *dir, enum dtype saved, struct tril_error *err);
/* Writes any fp32 arena laid out by the table (gradients, optimiser state) under the checkpoint's
 * names and layouts, with `prefix` before each name; reads it back. */
tril_status model_arena_write(const struct model *m, const float *const *arenas,
                              const char *const *prefixes, int count, const char *path,
                              enum dtype dtype, struct tril_error *err);
tril_status model_arena_read(const struct model *m, float *const *arenas,
                             const char *const *prefixes, int count, const char *path,
                             struct tril_error *err);
/* After an update of the compute copies (fp32: of the masters): rebuilds packings. */
tril_status model_refresh(struct model *m, struct tril_error *err);

/* What layers remember of past tokens, of `slots` sequences of up to `capacity` tokens: keys and
 * values; of linear attention, its sums. Keys and values are contiguous, or, where the layer's
 * rules see a bounded way back, roll: pages of the first keys stay, the others are taken anew in
 * turn. */
struct kv_layer {
    void *k, *v;       /* [slots * kv_roll_rows(), K, d], or NULL */
    void *raw;         /* k before its rotation, for a memory and where tokens leave; NULL: as k */
    void *r;           /* recurrence: the projected positions [distances, H d], or NULL */
    bool r_made;       /* they are there */
    float *low, *high; /* retrieval: bounds of the keys by blocks, or NULL */
    float *sums;       /* [slots, K, d, d + 1], or NULL */
    float *k_scale, *v_scale; /* [slots * kv_roll_rows(), K] of a cache of i8, or NULL */
};
/* Decoding over a part of the cache: ops.h, retrieve. */
struct kv_retrieve {
    int64_t top;   /* blocks that compete and are seen; 0: no retrieval */
    int64_t block; /* keys of a block */
    int64_t first, last;
    bool measure; /* computes full attention too, and keeps what part of it was found */
};
enum { KV_PAGE = 128 }; /* keys */
/* How the layers of one mixer roll: key j lies in page j / KV_PAGE, which is page
 * kv_roll_page() of the slot's. A recurrence, whose operation knows no pages, has every key twice,
 * a ring apart: wherever its last keys begin, they adjoin. */
struct kv_roll {
    int64_t first, ring; /* pages; ring 0: contiguous */
    bool twice;
    int64_t reach;  /* position p sees no key from the ring before p - reach + 1 */
    int32_t *table; /* the backend's, [2 slots, columns]; the second half: of one call */
    int32_t *host;  /* [slots, columns] */
};
static inline int64_t kv_roll_page(const struct kv_roll *r, int64_t page) {
    return page < r->first ? page : r->first + (page - r->first) % r->ring;
}
/* Rows of a sequence in such a layer of a cache of `capacity`. */
static inline int64_t kv_roll_rows(const struct kv_roll *r, int64_t capacity) {
    return r->ring ? (r->first + r->ring) * KV_PAGE * (r->twice ? 2 : 1) : capacity;
}
struct kv_cache {
    struct op_context *ctx;
    struct kv_retrieve retrieve;
    int32_t *blocks;         /* the backend's, [slots, K, first + last + top] */
    float *lse;              /* the backend's, [2, H, slots]: measuring */
    double found, found_sum; /* measured: heads, and the probability that they found */
    int64_t heads;
    enum dtype act; /* of r */
    void *memory;
    struct kv_layer *layer; /* [layers] */
    enum dtype dtype;
    int64_t slots, capacity, layers, kv_heads, head_dim;
    int64_t most;    /* tokens of a sequence in one call, if a layer rolls */
    int64_t columns; /* pages of a sequence */
    struct kv_roll roll[MODEL_MOST_MIXERS];
    bool rolls;       /* some layer does */
    int32_t *length;  /* host, [slots]: tokens held; kv_cache_rewind lowers it */
    int32_t *reached; /* host, [slots]: the most that was held since it was empty */
    int32_t *summed;  /* host, [slots]: tokens in the sums; -1: unknown, after a failed call */
    bool *busy;       /* host, [slots]: in the call being checked */
    bool sums;        /* some layer has sums */
    void *spare;      /* rows of one slot, while tokens leave: [capacity, K, d]; or NULL */
    int32_t *rows;    /* the backend's, [capacity] */
    int32_t *list;    /* host, [capacity] */
};
/* most: tokens of a sequence that a call may bring (0: up to the capacity); the fewer, the less a
 * rolling layer needs. dtype: the model's, fp32, bf16, or i8: each head of a row as 8-bit integers
 * and a scale (cache_store_quantised), for layers that recall nothing. */
tril_status kv_cache_create(struct kv_cache **out, const struct model *m, int64_t slots,
                            int64_t capacity, int64_t most, enum dtype dtype,
                            struct tril_error *err);
/* One that tokens can leave at its beginning too (kv_cache_evict): keys are kept unrotated beside,
 * and no layer rolls. */
tril_status kv_cache_create_stream(struct kv_cache **out, const struct model *m, int64_t slots,
                                   int64_t capacity, enum dtype dtype, struct tril_error *err);
/* One for retrieval, where a call gives one token to each of its sequences and the layer's
 * attention is plainly causal, with nothing but its scores (no rules, caps, sinks, ALiBi);
 * elsewhere attention stays full. capacity is a multiple of the block if there are several slots.
 */
tril_status kv_cache_create_retrieve(struct kv_cache **out, const struct model *m, int64_t slots,
                                     int64_t capacity, enum dtype dtype,
                                     const struct kv_retrieve *r, struct tril_error *err);
/* Forgets tokens [first, first + count) of a slot; those after them move up and count their
 * positions from their new places on (Xiao et al. 2023: positions are places in the cache). */
tril_status kv_cache_evict(struct kv_cache *c, const struct model *m, int64_t slot, int64_t first,
                           int64_t count, struct tril_error *err);
void kv_cache_free(struct kv_cache *c); /* NULL is fine */
/* Forgets a slot's end: keeps at most `length` tokens, and returns how many it could keep: sums
 * cannot be undone and pages that were taken anew are gone, so that it may have to start over at
 * 0. */
int64_t kv_cache_rewind(struct kv_cache *c, int64_t slot, int64_t length);
/* Bytes that kv_cache_create would allocate in the backend's memory. */
int64_t kv_cache_bytes(const struct model_config *c, int64_t slots, int64_t capacity, int64_t most,
                       enum dtype dtype);

/* One call's input, all host memory. Sequence s owns tokens offsets[s] .. offsets[s+1]. */
struct batch {
    int64_t tokens;           /* N */
    int64_t sequences;        /* S */
    const int32_t *ids;       /* [N] */
    const int32_t *positions; /* [N]; NULL: 0, 1, ... per sequence (after what the cache holds) */
    const int32_t *offsets;   /* [S+1] */
    const int32_t *targets;   /* [N], negative ignored; for loss */
    struct kv_cache *cache;   /* NULL: none; keys are the call's own */
    struct carry *carry;      /* carry.h; NULL: layers recall nothing from earlier calls */
    const int32_t *slots;     /* [S] slots of the cache or of the carry; NULL without a cache: s */
    const int32_t *rows;      /* rows whose logits are wanted, [row_count]; NULL: all */
    int64_t row_count;
};

/* Activations and scratch for calls of up to so many tokens; grows never, reused always. */
struct workspace;
struct workspace_options {
    int64_t max_tokens, max_sequences;
    int64_t max_rows; /* logits rows at once (inference); 0: as many as fit in a few tens of MB */
    bool backward;
    enum recompute recompute;
    bool carry;   /* batches may name one */
    bool offload; /* what is kept for the backward pass waits in the host's memory (devices only) */
};
tril_status workspace_create(struct workspace **out, const struct model *m,
                             const struct workspace_options *o, struct tril_error *err);
void workspace_free(struct workspace *w);
int64_t workspace_bytes(const struct workspace *w); /* of the backend's memory */

/* Called after each tensor of a forward pass, for shape traces and inspection; `name` such as
 * "layer 3 / attention / q". */
typedef void model_hook(void *arg, int layer, const char *name, const struct tensor *t);
void workspace_set_hook(struct workspace *w, model_hook *hook, void *arg);
/* Called after each softmax attention of a forward pass with exactly what the operation was given,
 * and the log-sum-exp [H, N] that it left (look.h keeps them; what they say is unchanged by the
 * looking). NULL ends it. */
typedef tril_status attention_hook(void *arg, int layer, const struct attention_inputs *in,
                                   struct tensor lse, const struct attention_params *params,
                                   struct tril_error *err);
tril_status workspace_watch_attention(struct workspace *w, attention_hook *hook, void *arg,
                                      struct tril_error *err);
/* The same of layers with relative positions, for the same watcher; NULL: those are passed over. */
typedef tril_status relative_hook(void *arg, int layer, const struct relative_attention_inputs *in,
                                  struct tensor lse, const struct relative_attention_params *params,
                                  struct tril_error *err);
void workspace_watch_relative(struct workspace *w, relative_hook *hook);

/* Logits of the wanted rows: fp32 [row_count or N, V] host memory (may be NULL: only the cache is
 * filled). With a cache, the new keys and values are appended and lengths advanced. Ids out of
 * range and sequences beyond the context or the cache are refused before anything is computed. */
tril_status model_forward(struct model *m, struct workspace *w, const struct batch *b,
                          float *logits, struct tril_error *err);
/* The same with a draw in the place of the logits' download: the wanted rows, as many as the
 * workspace computes at once at most, get a token each, in the backend's memory (ops/sample.h);
 * what was computed may still be under way when this returns. */
struct sample_rows;
tril_status model_draw(struct model *m, struct workspace *w, const struct batch *b,
                       const struct sample_rows *rows, struct tril_error *err);
/* Sum over targets of the loss (nats, double) and their number; head and loss in chunks.
 * row_loss [N] optional. */
tril_status model_loss(struct model *m, struct workspace *w, const struct batch *b,
                       double *loss_sum, int64_t *count, float *row_loss, struct tril_error *err);
/* Forward and backward: gradients of scale * (sum of losses) accumulate into m->gradient, or with
 * `overwrite` replace what it holds: a step's first micro-batch needs no zeroed gradients, which
 * saves a pass over them all. `step` keys dropout (give each micro-batch its own); seed likewise.
 */
struct train_call {
    float scale;
    uint64_t seed, step;
    bool overwrite;
};
tril_status model_forward_backward(struct model *m, struct workspace *w, const struct batch *b,
                                   const struct train_call *call, double *loss_sum, int64_t *count,
                                   struct tril_error *err);

/* Memory that a run would take, by part, in bytes; nothing is allocated. On a device total is the
 * device's, with what operations and libraries take beside (scratch); activations that wait in the
 * host's memory are not in it, but in host. */
struct memory_plan {
    double weights, masters, gradients, optimiser, activations, packings, logits, cache, scratch,
        other, total, host;
};
/* The optimiser's moments into the host's memory. */
void memory_plan_offload_moments(struct memory_plan *p);
tril_status model_memory_plan(const struct model_config *c, const struct model_options *options,
                              const struct workspace_options *w, int64_t cache_slots,
                              int64_t cache_capacity, enum dtype cache_dtype,
                              const struct backend *backend, struct memory_plan *out,
                              struct tril_error *err);

/* Parameters and FLOPs by part. MFU's count: 6 N + 6 L D T per trained token, N with the head and
 * without embedding look-ups. */
struct model_counts {
    double embedding, position, attention, ffn, norms, head, total; /* head 0 when tied */
    double flops_attention, flops_ffn, flops_head,
        flops_scores; /* forward, per token at length T */
    double train_flops_per_token;
};
void model_count(const struct model_config *c, int64_t T, struct model_counts *out);

#endif
