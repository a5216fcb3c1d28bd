/* What the files of the model share: the workspace, one call's state, and views. */
#ifndef MODEL_INTERNAL_H
#define MODEL_INTERNAL_H

#include "model/activations.h"
#include "model/model.h"
#include "ops/replay.h"
#include "ops/sample.h"

struct workspace {
    const struct model *model;
    struct op_context *ctx;
    struct workspace_options options;
    struct activation_layout layout;
    char *arena;          /* the backend's memory, layout.bytes */
    char *host;           /* the host's: what layers keep that left; NULL: all stay (offload.c) */
    int32_t *staging;     /* host: a call's integers, uploaded at once into A_INPUTS */
    int64_t staging_size; /* integers */
    model_hook *hook;
    void *hook_arg;
    attention_hook *watch;
    relative_hook *watch_relative; /* called with watch_arg */
    void *watch_arg;
    void *watch_lse; /* [H, max_tokens], while somebody watches a workspace that keeps none */
    struct op_replay replay;
};

/* One call: sizes, views of the inputs in the backend's memory, and what is wanted. */
struct pass {
    struct model *m;
    struct workspace *w;
    struct op_context *ctx;
    const struct batch *batch;
    int64_t N, S;
    int64_t wanted; /* rows whose logits are wanted; 0: none (only the cache is filled) */
    const struct sample_rows *draw; /* what a token of each is drawn with; NULL: none is */
    bool keep;                      /* a backward pass follows */
    bool overwrite;                 /* which replaces the gradients */
    bool slots_adjoin;              /* the sequences' cache slots are consecutive */
    bool gather_early; /* the last layer goes on with the wanted rows alone after attention */
    struct random_key key;
    int32_t max_q, max_kv;
    struct tensor roll_rows[MODEL_MOST_MIXERS];  /* [N]: cache rows of the layers that roll */
    struct tensor roll_again[MODEL_MOST_MIXERS]; /* [N]: where they lie once more */
    struct tensor pages[MODEL_MOST_MIXERS];      /* [S, columns]: and their pages */
    struct tensor held; /* [S]: tokens that the cache holds already; with retrieval */
    struct tensor ids, positions, offsets, kv_start, kv_length, targets, cache_rows, slots, rows,
        step;
    /* For layers that recall (recall.c); the rows of a carry are those of its rings. */
    struct recall_inputs {
        struct tensor past_start, past_length; /* [S]: keys before the call's, of a recurrence */
        struct tensor past_rows, state_rows;   /* [past], [N]: of carried states, read, written */
        struct tensor ring_start, ring_first, ring_length, ring_position; /* [S]: of a memory */
        struct tensor ring_rows;                                          /* [N], written */
        int64_t past, ring; /* rows carried in; rows of a sequence's memory */
    } recall;
};

/* Checks a batch against the model, the workspace and the cache, and uploads its integers. `step`
 * keys dropout. */
tril_status pass_begin(struct pass *p, struct model *m, struct workspace *w, const struct batch *b,
                       bool with_targets, const struct train_call *call, struct tril_error *err);

/* Runs what a call computes, `body`, from its inputs in the backend's memory to its outputs there:
 * recorded and replayed where nobody looks on and nothing but the key of `what` (which body), the
 * sizes and the addresses matters. */
tril_status pass_run(struct pass *p, const char *what, float scale, op_body *body, void *arg,
                     struct tril_error *err);

/* A buffer's view for `rows` tokens; absent buffers give an absent tensor. */
struct tensor activation_view(const struct workspace *w, enum activation_id id, int layer,
                              int64_t rows);

/* Parameters as the operations take them; absent where the configuration has none. */
const struct weight *param_weight(const struct model *m, enum param_role role, int layer);
struct tensor param_vector(const struct model *m, enum param_role role, int layer);
struct tensor param_gradient(const struct model *m, enum param_role role, int layer);

/* The norm of the configuration: gain and bias are parameters of `layer`; statistics optional. */
struct norm_site {
    enum param_role gain, bias;
    int layer;
};
tril_status norm_forward(struct pass *p, struct norm_site site, struct tensor x, struct tensor y,
                         struct tensor mean, struct tensor rstd, struct tril_error *err);
tril_status norm_backward(struct pass *p, struct norm_site site, struct tensor dy, struct tensor x,
                          struct tensor mean, struct tensor rstd, struct tensor dx,
                          struct tril_error *err);

/* q, k and v of a layer as the attention operation takes them: [N, H or K, d] views. */
struct qkv_views {
    struct tensor q, k, v;          /* normalised and rotated */
    struct tensor raw_q, raw_k;     /* as the product gave them (the same without qk-norm) */
    struct tensor q_rstd, k_rstd;   /* with qk-norm */
    struct tensor k_scale, v_scale; /* of a cache of i8, where it stands in the place of k and v */
};
struct qkv_views qkv_views_make(const struct pass *p, int layer);
struct qkv_views qkv_gradient_views(const struct pass *p); /* q, k, v alone: of A_DQKV */
struct attention_params attention_params_make(const struct pass *p, int layer);
/* Everything that the attention of `layer` reads; k and v of the call, without a cache. */
struct attention_inputs attention_inputs_make(const struct pass *p, int layer,
                                              const struct qkv_views *v);
/* Turns q and k (or, backwards, their gradients) where the layer has RoPE. */
tril_status rotate(struct pass *p, int layer, struct tensor q, struct tensor k, bool back,
                   struct tril_error *err);
/* Channels [begin, begin + heads * d) of t [N, ...] as [N, heads, d]. */
struct tensor heads_view(struct tensor t, int64_t begin, int64_t heads, int64_t d);
/* k, v or raw k of a layer's cache, and the rows of it that the call's tokens have. */
struct tensor cache_view(const struct pass *p, int layer, void *data);
struct tensor cache_rows(const struct pass *p, int layer);
/* k and v to their rows of the cache, which then stands in their place: [slots * capacity, K, d].
 */
tril_status cache_forward(struct pass *p, int layer, struct qkv_views *v, struct tril_error *err);

/* Recurrence and memory (recall.c): what replaces the attention of a layer, and what comes before
 * its rotation; x is the layer's input. */
bool recall_stages(const struct model_config *c);
/* Integers of the call for layers that recall: fills p->recall, host side at `host` (which stages
 * `count` integers and gives the backend's view). */
typedef int32_t *recall_stage(struct pass *p, int64_t *used, int64_t count, struct tensor *view);
tril_status recall_begin(struct pass *p, recall_stage *stage, int64_t *used,
                         struct tril_error *err);
tril_status recurrence_forward(struct pass *p, int layer, struct tensor x,
                               const struct qkv_views *v, struct tensor heads, struct tensor lse,
                               struct tril_error *err);
/* Gradients of q, k, v; of the carried rows' keys and values into A_DPAST_QKV. */
tril_status recurrence_backward(struct pass *p, int layer, struct tensor heads,
                                struct tensor dheads, const struct qkv_views *v,
                                const struct qkv_views *g, struct tril_error *err);
/* From A_DPAST_QKV: the share of the carried rows in the gradients of the norm and of QKV. */
tril_status past_backward(struct pass *p, int layer, struct tril_error *err);
/* Before the rotation: remembers the call's keys and values, and recalls: A_RECALLED. */
tril_status memory_forward(struct pass *p, int layer, const struct qkv_views *v,
                           struct tril_error *err);
/* heads = A_LOCAL and A_RECALLED through the gate; and back: A_DLOCAL, A_DRECALLED. */
tril_status memory_gate(struct pass *p, int layer, struct tensor heads, struct tril_error *err);
tril_status memory_gate_backward(struct pass *p, int layer, struct tensor dheads,
                                 struct tril_error *err);
/* Adds to dq (before the rotation) what comes through A_DRECALLED. */
tril_status memory_backward(struct pass *p, int layer, const struct qkv_views *v, struct tensor dq,
                            struct tril_error *err);
/* Whether this call's attention in the layer sees a part of the cache alone (q after rotation). */
bool retrieval_applies(const struct pass *p, int layer);
tril_status retrieval_forward(struct pass *p, int layer, const struct attention_inputs *full,
                              struct tensor heads, const struct attention_params *a,
                              struct tril_error *err);
/* After a call: its tokens become past. */
void recall_end(struct pass *p);

/* Dropout of the embeddings or of a branch; p 0: none. */
struct dropout_params dropout_params_make(const struct pass *p, enum random_use use, int layer);

/* One layer, from A_X of `layer` to A_X of the next. `again`: a rerun during the backward pass,
 * which ends where nothing more is needed. */
tril_status layer_forward(struct pass *p, int layer, bool again, struct tril_error *err);
/* tokens -> A_X of layer 0, then all layers. */
tril_status layers_forward(struct pass *p, struct tril_error *err);
/* All of it and the head, of a struct pass: what model_forward runs. */
tril_status logits_body(void *pass, struct tril_error *err);
/* A_DX: gradient of the output of `layer` -> of its input. */
tril_status layer_backward(struct pass *p, int layer, struct tril_error *err);

/* Activations that wait in the host's memory between the passes (offload.c): called around each
 * layer of a training pass; nothing where all stay. */
tril_status offload_before_forward(struct pass *p, int layer, struct tril_error *err);
tril_status offload_after_forward(struct pass *p, int layer, struct tril_error *err);
tril_status offload_before_backward(struct pass *p, int layer, struct tril_error *err);
tril_status offload_after_backward(struct pass *p, int layer, struct tril_error *err);

/* The head's chunks over all rows: losses; with p->keep also the gradients, scaled, down to A_DX.
 */
tril_status head_loss(struct pass *p, float scale, struct tril_error *err);
tril_status loss_download(struct pass *p, double *loss_sum, int64_t *count, float *row_loss,
                          struct tril_error *err);
/* Logits of the wanted rows: as many as one chunk holds at once (those of a decoding step) are
 * computed by head_forward and stay in the backend's memory, where p->draw draws from them;
 * head_logits brings them into host memory [wanted, V], computing what there is more of. */
tril_status head_forward(struct pass *p, struct tril_error *err);
tril_status head_logits(struct pass *p, float *logits, struct tril_error *err);

static inline tril_status layer_acquire(const struct model *m, int layer, struct tril_error *err) {
    return m->hooks.acquire ? m->hooks.acquire(m->hooks.arg, layer, err) : TRIL_OK;
}
static inline tril_status layer_release(const struct model *m, int layer, struct tril_error *err) {
    return m->hooks.release ? m->hooks.release(m->hooks.arg, layer, err) : TRIL_OK;
}
static inline tril_status layer_gradient_ready(const struct model *m, int layer,
                                               struct tril_error *err) {
    return m->hooks.gradient_ready ? m->hooks.gradient_ready(m->hooks.arg, layer, err) : TRIL_OK;
}

/* Where attention leaves its log-sum-exp: absent if nobody wants it. */
struct tensor lse_view(const struct pass *p, int layer);

static inline void hook(const struct pass *p, int layer, const char *name, struct tensor t) {
    if (p->w->hook && t.data)
        p->w->hook(p->w->hook_arg, layer, name, &t);
}

#endif
