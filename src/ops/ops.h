/* The operation table: what tril computes with, each operation once.
 *
 * An operation is an entry of op_list.inc, a description of its arguments (role, shape in symbols,
 * allowed dtypes), a scalar reference that accumulates in double, and one slot in every backend's
 * table. The model calls the typed functions at the end of this file; they pack their arguments and
 * go through op_call, which checks them against the description. From the same description come the
 * tests (every backend against the reference, references against finite differences), the FLOPs and
 * the bytes.
 *
 * Conventions, unless an operation says otherwise:
 *   N tokens (rows of a flattened batch), D width, H query heads, K key/value heads, d head width,
 *   F hidden width of the FFN, I and O inputs and outputs of a linear layer, V vocabulary, S
 * sequences. Parameter gradients accumulate; activation gradients overwrite; the gradient of the
 * residual stream (fp32) accumulates. Norm gains, biases, statistics and losses are fp32. "act" is
 * fp32 or bf16: the storage of activations; all arithmetic is at least fp32. */
#ifndef OPS_OPS_H
#define OPS_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/random.h"
#include "ops/tensor.h"

enum op_id {
#define OP(id, name) OP_##id,
#include "ops/op_list.inc"
#undef OP
    OP_COUNT
};

#define OP_MAX_ARGS 24

struct backend;

/* Where and how operations run. One per engine or trainer; used by one thread at a time. */
struct op_context {
    const struct backend *backend;
    void *stream;  /* the backend's own; NULL on the CPU */
    void *scratch; /* grows to the largest request, then stays: op_scratch */
    int64_t scratch_bytes;
    bool lent;        /* scratch is the caller's: op_context_lend */
    bool measuring;   /* op_scratch only notes what it is asked for: op_scratch_needed */
    int64_t measured; /* the largest request, then */
    int64_t block_rows, block_keys; /* what the last flash attention_forward worked in */
    bool reference;     /* run every operation through its reference (slow; for checking) */
    int64_t host_falls; /* operations of a device that ran on the host: host_fallback.h */
    bool planning;      /* nothing is computed (imaginary.h): only scratch that calls ask for is */
    int64_t planned;    /* noted, here the most */
};

tril_status op_context_init(struct op_context *ctx, const struct backend *backend,
                            struct tril_error *err);
void op_context_free(struct op_context *ctx);
/* Scratch of at least `bytes` (64-byte aligned, memory of the context's backend), valid until the
 * next call; NULL when out of memory, when lent scratch is too small, or when measuring. */
void *op_scratch(struct op_context *ctx, int64_t bytes);
/* What a kernel returns when op_scratch gave NULL: ERR_MEMORY with a sentence that says which. */
tril_status op_scratch_error(const struct op_context *ctx, const char *name, int64_t bytes,
                             struct tril_error *err);
/* Makes the caller's memory (any alignment) the scratch of all calls through `ctx`, which allocates
 * none from then on: what does not fit fails with ERR_MEMORY. */
void op_context_lend(struct op_context *ctx, void *memory, int64_t bytes);

typedef tril_status op_fn(struct op_context *ctx, const struct tensor *args, const void *params,
                          struct tril_error *err);

enum op_role { ARG_IN, ARG_OUT, ARG_ACCUMULATE /* read and added to */, ARG_INOUT };

#define DT_MASK(t) (1u << (t))
#define DT_ACT (DT_MASK(DT_F32) | DT_MASK(DT_BF16))
#define DT_FLOAT (DT_ACT | DT_MASK(DT_F16))

struct op_arg {
    const char *name;  /* "x", "dy", ...: a backward's "dx" is the gradient of its forward's "x" */
    const char *shape; /* symbols separated by blanks: "N D", "S+1", "N 2F", "1"; alternatives by
                          '|' ("N D|N H D"): one call uses the same alternative for all arguments */
    enum op_role role;
    unsigned dtypes;      /* mask of DT_MASK */
    bool optional;        /* data may be NULL */
    bool strided;         /* any strides with last 1; otherwise the tensor must be dense */
    bool act;             /* all such arguments of one call have the same dtype */
    const char *index_of; /* integers in [0, that symbol's size), e.g. "V"; or NULL */
};

/* The sizes and parameters of one test or benchmark case. */
struct op_case {
    const char *label;
    int64_t size[128];                                      /* by symbol letter, e.g. size['N'] */
    unsigned char params[192] __attribute__((aligned(16))); /* (read by C++ too) */
    unsigned absent;                  /* bit i: optional argument i is left out */
    unsigned strided;                 /* bit i: argument i has gaps between its rows */
    int variant;                      /* which alternative of the shapes */
    enum dtype act;                   /* dtype for arguments that allow more than one */
    unsigned char dtype[OP_MAX_ARGS]; /* per argument instead of act: dtype + 1; 0: act */
    unsigned char alias[OP_MAX_ARGS]; /* argument i shares argument alias[i] - 1's memory; 0: not */
};

struct op_info {
    enum op_id id;
    const char *name;
    const struct op_arg *args;
    int arg_count;
    op_fn *reference;
    /* Fills case `index` (0, 1, ...); false when there are no more. */
    bool (*test_case)(int index, struct op_case *out);
    /* Fills arguments whose content is not free (offsets, tables); NULL when random data will do.
     */
    void (*test_fill)(const struct op_case *c, struct tensor *args, const struct random_key *key);
    /* Useful floating-point operations of a call; NULL: bytes are the measure. */
    double (*flops)(const struct tensor *args, const void *params);
    /* Longest sum behind one output, or roundings in a row (sizes the tolerance); NULL: 1. */
    double (*reduction)(const struct tensor *args, const void *params);
    /* What the description cannot say (2R <= d, H a multiple of K); NULL: nothing. */
    tril_status (*check)(const struct tensor *args, const void *params, struct tril_error *err);
    /* The role of argument i where it depends on the call; NULL: args[i].role. */
    enum op_role (*role)(int i, const struct tensor *args, const void *params);
    /* Bytes that a call must at least move, where tables are read only in part; NULL: see op_bytes.
     */
    double (*bytes)(const struct tensor *args, const void *params);
    /* Intermediate factors of a product may be rounded to the activations' dtype (the probabilities
     * in flash attention): the tolerance then uses that dtype's epsilon. */
    bool rounds_intermediates;
    /* Kernels ask op_scratch, once and before they touch any data, for all that they need (0 bytes
     * too) and return at once when they get none: op_scratch_needed works. */
    bool scratch_first;
};

const struct op_info *op_info_get(enum op_id id);
/* Bytes that a call must at least move: every argument once, those read and written twice. */
double op_bytes(enum op_id id, const struct tensor *args, const void *params);

/* Checks args against the description (shapes consistent, dtypes allowed, dense where required) and
 * runs the operation: the backend's slot, or the reference if ctx->reference. An absent argument is
 * one whose data is NULL and whose shape is not empty. References also take every float argument as
 * DT_F64, all of a call at once: then they are exact enough for finite differences. */
tril_status op_call(struct op_context *ctx, enum op_id id, const struct tensor *args,
                    const void *params, struct tril_error *err);

/* Bytes that the caller must lend (op_context_lend) for op_call with the same arguments, threads
 * and backend to run without allocating. Reads the integer arguments (offsets, lengths, pages), no
 * others, and writes nothing. Only for operations with scratch_first; ERR_ARGUMENT otherwise. */
tril_status op_scratch_needed(struct op_context *ctx, enum op_id id, const struct tensor *args,
                              const void *params, int64_t *bytes, struct tril_error *err);

/* ------------------------------------------------------------------ backends */

/* A linear layer's weight: opaque to the model. `value` is the logical matrix [O, I], row-major, in
 * the backend's memory; `state` holds whatever the backend made of it (packed panels,
 * transposes).*/
struct weight {
    struct tensor value;
    void *state;
    unsigned uses; /* WEIGHT_* */
};
enum {
    WEIGHT_FORWARD = 1,  /* linear_forward will be called */
    WEIGHT_BACKWARD = 2, /* linear_backward_input will be called */
    WEIGHT_STATIC = 4 /* never updated: where prepare needs `value` no longer it sets value.data to
                         NULL (the shape stays), and the caller may release that memory */
};

enum { COPY_MARKS = 2 };

/* Bytes of the backend's memory that are in use, and the most at once since the process began or
 * memory_reset; and of host_alloc's. */
struct backend_memory {
    int64_t device, device_peak, host, host_peak;
};

struct backend {
    const char *name;       /* "reference", "cpu", "cuda" */
    op_fn *table[OP_COUNT]; /* never NULL: the reference where nothing better exists */
    bool device; /* its memory is not the host's: references run through ops/host_fallback.h */

    /* What a context needs beyond its fields (a stream, handles), in ctx->stream. Optional. */
    tril_status (*open)(struct op_context *, struct tril_error *err);
    void (*close)(struct op_context *);

    /* Memory that operations may touch. `what` is named when it fails. */
    tril_status (*alloc)(void **out, int64_t bytes, bool zero, const char *what,
                         struct tril_error *err);
    void (*release)(void *p);
    tril_status (*upload)(struct op_context *, void *dst, const void *host, int64_t bytes,
                          struct tril_error *err);
    tril_status (*download)(struct op_context *, void *host, const void *src, int64_t bytes,
                            struct tril_error *err);
    tril_status (*fill_zero)(struct op_context *, void *dst, int64_t bytes, struct tril_error *err);
    tril_status (*synchronise)(struct op_context *, struct tril_error *err);

    /* Devices: memory of the host that operations and all calls above take like the backend's own,
     * at the speed of the bus between (pinned and mapped). */
    tril_status (*host_alloc)(void **out, int64_t bytes, bool zero, const char *what,
                              struct tril_error *err);
    void (*host_release)(void *p);
    /* Copies between the two that run beside the operations: copy_begin's comes after everything
     * called before and after the copies begun before; what is called after copy_wait comes after
     * the last copy begun under that mark (0 <= mark < COPY_MARKS). Until then nothing may touch
     * what is copied to, or write what is copied from. A recording must wait for what it began. */
    tril_status (*copy_begin)(struct op_context *, int mark, void *dst, const void *src,
                              int64_t bytes, struct tril_error *err);
    tril_status (*copy_wait)(struct op_context *, int mark, struct tril_error *err);
    /* What is in use; and forgetting the peaks. */
    void (*memory)(struct backend_memory *out);
    void (*memory_reset)(void);
    /* A context for predicting memory, which needs no device (imaginary.h); *fixed: bytes that a
     * context takes besides scratch. op_context_free frees it. */
    tril_status (*plan)(struct op_context *out, int64_t *fixed, struct tril_error *err);

    /* Recording what is launched between begin and end instead of running it, and running it
     * (replay.h). All or none; NULL: launches cost next to nothing. */
    tril_status (*graph_begin)(struct op_context *, struct tril_error *err);
    tril_status (*graph_end)(struct op_context *, void **graph, struct tril_error *err);
    tril_status (*graph_run)(struct op_context *, void *graph, struct tril_error *err);
    void (*graph_free)(struct op_context *, void *graph);

    /* Packings of a weight. prepare must come before its first use in an operation, refresh after
     * every update of `value`. Either may do nothing. */
    tril_status (*weight_prepare)(struct op_context *, struct weight *, unsigned uses,
                                  struct tril_error *err);
    tril_status (*weight_refresh)(struct op_context *, struct weight *, struct tril_error *err);
    void (*weight_release)(struct weight *);
    /* Bytes that prepare would add for an [O, I] weight of this dtype (memory prediction): net of
     * `value` where WEIGHT_STATIC lets that go, so possibly 0 or less. */
    int64_t (*weight_bytes)(int64_t outputs, int64_t inputs, enum dtype t, unsigned uses);
};

/* The plain scalar backend: references in host memory. */
const struct backend *backend_reference(void);

/* ------------------------------------------------------------------ the operations */

/* x[n] = wte[tokens[n]] (+ wpe[positions[n]]).            tokens, positions i32 [N]
 * wte [V, D], wpe [C, D] (optional; then positions too) any float; x [N, D] fp32 (the residual). */
tril_status embed_forward(struct op_context *ctx, struct tensor tokens, struct tensor positions,
                          struct tensor wte, struct tensor wpe, struct tensor x,
                          struct tril_error *err);
/* dwte[tokens[n]] += dx[n], dwpe[positions[n]] += dx[n]; fp32; rows summed in order of n. */
tril_status embed_backward(struct op_context *ctx, struct tensor tokens, struct tensor positions,
                           struct tensor dx, struct tensor dwte, struct tensor dwpe,
                           struct tril_error *err);

/* Both norms take x [N, D] or, for qk-norm, [N, H, d] (strided; the last dimension is normalised),
 * fp32 or act. gain [D] fp32 always; layernorm's bias [D] fp32 optional.
 *   layernorm (Ba et al. 2016):   y = (x - mean) * rstd * gain + bias, rstd = 1/sqrt(var + eps)
 *   rmsnorm (Zhang, Sennrich 2019): y = x * rstd * gain, rstd = 1/sqrt(mean(x^2) + eps)
 * mean, rstd fp32, one per normalised row: outputs, optional (inference). y may alias x.
 * gain_offset is added to the gain (Gemma's 1 + g); 0 otherwise. */
struct norm_params {
    float eps;
    float gain_offset;
    bool overwrite; /* backward: an fp32 dx is overwritten too (qk-norm on fp32 activations) */
};
tril_status layernorm_forward(struct op_context *ctx, struct tensor x, struct tensor gain,
                              struct tensor bias, struct tensor y, struct tensor mean,
                              struct tensor rstd, struct norm_params p, struct tril_error *err);
/* dx (fp32: accumulates; act: overwrites, may alias dy), dgain, dbias accumulate (fp32). */
tril_status layernorm_backward(struct op_context *ctx, struct tensor dy, struct tensor x,
                               struct tensor gain, struct tensor mean, struct tensor rstd,
                               struct tensor dx, struct tensor dgain, struct tensor dbias,
                               struct norm_params p, struct tril_error *err);
tril_status rmsnorm_forward(struct op_context *ctx, struct tensor x, struct tensor gain,
                            struct tensor y, struct tensor rstd, struct norm_params p,
                            struct tril_error *err);
tril_status rmsnorm_backward(struct op_context *ctx, struct tensor dy, struct tensor x,
                             struct tensor gain, struct tensor rstd, struct tensor dx,
                             struct tensor dgain, struct norm_params p, struct tril_error *err);

enum activation { ACT_NONE, ACT_RELU, ACT_GELU_ERF, ACT_GELU_TANH, ACT_SILU };

/* y = act(x w^T + bias) + residual, with the pre-activation x w^T + bias kept in `pre` if present.
 * x [N, I] act (rows may be strided), w [O, I], bias [O] fp32 optional, residual [N, O] fp32
 * optional (may alias y), y [N, O] act or fp32 (rows may be strided), pre [N, O] act optional.
 * Products accumulate in fp32 in an order over I that does not depend on N or on the threads (the
 * CPU's inference kernels; DESIGN contract 12). w needs weight_prepare(WEIGHT_FORWARD) before. */
struct linear_params {
    enum activation activation;
    bool overwrite;              /* linear_backward_weight only */
    const struct weight *weight; /* the same matrix as args' w, with its packings; may be NULL */
};
/* (linear_backward_input takes linear_params too, of which it uses only weight.) */
tril_status linear_forward(struct op_context *ctx, struct tensor x, const struct weight *w,
                           struct tensor bias, struct tensor residual, struct tensor y,
                           struct tensor pre, enum activation activation, struct tril_error *err);
/* dx [N, I] = dy [N, O] w [O, I]; dx overwritten, act or fp32; dy act. */
tril_status linear_backward_input(struct op_context *ctx, struct tensor dy, const struct weight *w,
                                  struct tensor dx, struct tril_error *err);
/* dw [O, I] += dy^T x, or with `overwrite` = dy^T x (a step's first: what dw holds, uninitialised
 * memory even, does not matter); db [O] += column sums of dy; fp32; db optional; dy, x act, rows
 * strided. */
tril_status linear_backward_weight(struct op_context *ctx, struct tensor dy, struct tensor x,
                                   struct tensor dw, struct tensor db, bool overwrite,
                                   struct tril_error *err);

/* Rotary embedding in place (Su et al. 2021): for each head the pair (x1, x2) at angle
 * positions[n] * frequency i becomes (x1 cos - x2 sin, x2 cos + x1 sin).
 * x [N, H, d] act, strided. cos, sin fp32 [C, R] (R pairs; 2R <= d: partial rotation of the first
 * 2R channels; any attention factor is already multiplied in). Pairs are (i, i + R) as in Llama's
 * Hugging Face layout, or (2i, 2i + 1) when interleaved. backward rotates by the negative angle. */
struct rope_params {
    bool interleaved;
};
tril_status rope_forward(struct op_context *ctx, struct tensor x, struct tensor positions,
                         struct tensor cos, struct tensor sin, struct rope_params p,
                         struct tril_error *err);
tril_status rope_backward(struct op_context *ctx, struct tensor dx, struct tensor positions,
                          struct tensor cos, struct tensor sin, struct rope_params p,
                          struct tril_error *err);

/* Scaled dot-product attention over S sequences of flattened tokens:
 *   o_i = sum_j softmax_j(score_ij) v_j
 *   score_ij = softcap(scale q_i.k_j) - slope |p_i - j| + bias_ij,  j visible to i
 * where i and j count within the sequence and p_i = i + kv_length - n is the query's position
 * (aligned at the last row and column; n rows). */
struct attention_inputs { /* optional ones: data NULL */
    struct tensor q;      /* [N, H, d] act strided */
    /* [M, K, d] strided, H % K == 0: act (a cache may be bf16 under fp32 q), or i8 with scales
     * (forward only) */
    struct tensor k, v;
    struct tensor q_offsets; /* i32 [S+1]: sequence s owns query rows q_offsets[s] .. [s+1] */
    /* i32 [S]: keys of sequence s are rows kv_start[s] + j of k and v, j < kv_length[s] */
    struct tensor kv_start, kv_length;
    /* i32 [S, P] optional, forward only: key j is row pages[s][j / page_size] * page_size +
     * j % page_size instead; a page whose keys no query sees may be negative (evicted) */
    struct tensor pages;
    struct tensor slopes; /* fp32 [H] optional: ALiBi (Press et al. 2022) */
    /* fp32 or bf16 [1 or H, A, U] strided, optional: bias[h][i][j]; A >= longest n, U >= longest
     * kv_length; -inf hides a key */
    struct tensor bias;
    struct tensor sink;             /* fp32 [H] optional: exp(sink) joins each row's denominator */
    struct tensor k_scale, v_scale; /* fp32 [M, K] with i8 k and v: value = scale[row][head] * i8 */
    struct tensor step;             /* i64 [1] optional: replaces params->key.step */
};
struct visible_rule;
/* How the CPU computes; the reference ignores it, the results agree. */
enum attention_implementation {
    ATTENTION_FLASH,       /* tiled, online softmax (Dao 2023): O(N d) memory; docs/attention.md */
    ATTENTION_FUSED,       /* row by row: one row of scores at a time */
    ATTENTION_MATERIALISED /* the textbook: all scores of a head in memory */
};
struct attention_params {
    float scale;
    float softcap;         /* 0: none; else cap * tanh(score / cap) */
    bool causal;           /* without rules: j <= p_i */
    int32_t page_size;     /* with pages */
    int32_t max_q, max_kv; /* host-known bounds of the lengths (0: unknown), for planning */
    float dropout; /* of the probabilities (Srivastava et al.): element ((h * N + n) * 2^32 + */
    struct random_key key; /* j) of the stream `key`; kept values divided by 1 - dropout */
    const struct visible_rule *rules; /* visible.h; host memory; NULL: `causal` says all */
    int32_t rule_count;
    const uint8_t *head_rule; /* [H] indices of rules; NULL: rule 0 for all heads */
    enum attention_implementation implementation;
    /* Rows and keys of flash's tiles forward; 0: chosen by the kernels. The CPU rounds rows up to a
     * multiple of a step (at most 96) and keys to 16, 32 or 64. Results agree within rounding. */
    int32_t block_q, block_k;
};
/* o [N, H, d] act strided; lse fp32 [H, N] optional: natural log of the denominator, the sink
 * included; a row that sees nothing: o = 0, lse = -inf, or the sink. */
tril_status attention_forward(struct op_context *ctx, const struct attention_inputs *in,
                              struct tensor o, struct tensor lse, const struct attention_params *p,
                              struct tril_error *err);
struct attention_gradients {  /* all overwritten */
    struct tensor dq, dk, dv; /* act strided; they may lie in one fused buffer */
    struct tensor dbias; /* fp32, bias's shape, strided, optional: summed over sequences, and over
                            heads where bias has one */
    struct tensor dsink; /* fp32 [H] optional */
};
/* From the forward's o and lse and the gradient of o. Not for pages and i8. */
tril_status attention_backward(struct op_context *ctx, const struct attention_inputs *in,
                               struct tensor o, struct tensor lse, struct tensor dout,
                               const struct attention_gradients *g,
                               const struct attention_params *p, struct tril_error *err);

/* op_scratch_needed for these calls; g NULL: for the forward (then lse may be absent, and dout is
 * ignored). */
tril_status attention_scratch(struct op_context *ctx, const struct attention_inputs *in,
                              struct tensor o, struct tensor lse, struct tensor dout,
                              const struct attention_gradients *g, const struct attention_params *p,
                              int64_t *bytes, struct tril_error *err);

/* The weights of chosen query rows, which the forward does not keep: p [R, H, C] fp32, C >= longest
 * kv_length: p[r][h][j] = exp(score_ij - lse_i) of row rows[r] (i32 [R], a row of q) and key j of
 * its sequence; 0 where unseen, beyond the sequence's keys, and for rows of no sequence. Before
 * dropout. lse [H, N] from the forward (with a sink, the weights add up to less than 1). `in` as
 * there; v, v_scale and sink are not looked at. O(R C) time and memory a head. */
tril_status attention_probabilities(struct op_context *ctx, const struct attention_inputs *in,
                                    struct tensor rows, struct tensor lse, struct tensor p,
                                    const struct attention_params *params, struct tril_error *err);

/* Linear attention (Katharopoulos et al. 2020) over S sequences of flattened tokens: with phi(x) =
 * elu(x) + 1 in place of the softmax's exponential, every row needs only two sums over the keys it
 * sees,
 *   S_i = S_{i-1} + phi(k_i) v_i^T    z_i = z_{i-1} + phi(k_i)    o_i = phi(q_i) S_i / phi(q_i).z_i
 * so time is O(N d^2), and decoding carries a state of fixed size. q [N, H, d], k, v [N, K, d] act
 * strided, H % K == 0, d 1 to 256; q_offsets i32 [S+1] as in attention (rows of k and v are those
 * of q). Not causal: every row sees all keys of its sequence. state fp32 [S, K, d, d+1] (optional,
 * else zeros): S before the first row, z in the last column; next (optional): the same after the
 * last row; it may be state's memory. o [N, H, d] act strided; where phi(q).z is 0 (all of q or of
 * k below -87) o is 0. Many rows are computed in chunks, few by the recurrence: equal up to
 * rounding. A row's bits do not depend on the other sequences or on the threads. */
struct linear_attention_params {
    bool causal;
};
tril_status linear_attention_forward(struct op_context *ctx, struct tensor q, struct tensor k,
                                     struct tensor v, struct tensor q_offsets, struct tensor state,
                                     struct tensor o, struct tensor next,
                                     struct linear_attention_params p, struct tril_error *err);
/* dq, dk, dv (act, strided; they may lie in one fused buffer) and dstate (optional) overwritten;
 * dnext, the gradient of next, optional (else zeros). State sums and denominators are recomputed.
 * Memory: N d (4 + 2 d / 96) fp32 at most, while it runs. */
tril_status linear_attention_backward(struct op_context *ctx, struct tensor q, struct tensor k,
                                      struct tensor v, struct tensor q_offsets, struct tensor state,
                                      struct tensor o, struct tensor dout, struct tensor dnext,
                                      struct tensor dq, struct tensor dk, struct tensor dv,
                                      struct tensor dstate, struct linear_attention_params p,
                                      struct tril_error *err);

/* Attention with the relative positions of Transformer-XL (Dai et al. 2019), over S sequences of
 * flattened tokens, each after a past of its own:
 *   o_i = sum_j softmax_j(score_ij) v_j    score_ij = scale ((q_i + u).k_j + (q_i + w).r_{p - j})
 * Keys j of sequence s: past rows past_start[s] .. + past_length[s], then its own rows; row i
 * stands at position p = past_length[s] + i and sees the keys first(p) <= j <= p, where first(p) is
 * 0, or with a segment p - p mod segment - memory: its own segment and so many tokens before.
 * O(N d) memory: the position's part of a tile of scores is a product of its rows with a band of r,
 * read along the diagonals. */
struct relative_attention_inputs {
    struct tensor q;              /* [N, H, d] act strided */
    struct tensor k, v;           /* [N, K, d] act strided, H % K == 0 */
    struct tensor q_offsets;      /* i32 [S+1]: rows of q, k and v of each sequence */
    struct tensor past_k, past_v; /* [P, K, d] act strided; these four together or not at all */
    struct tensor past_start, past_length; /* i32 [S] */
    struct tensor u, w;                    /* fp32 [H, d]: biases of content and of position */
    struct tensor r; /* [M, H, d] act strided: row t for distance t; M >= the keys of a row */
};
struct relative_attention_params {
    float scale;
    int64_t segment, memory; /* segment 0: everything before is seen */
};
/* o [N, H, d] act strided; lse fp32 [H, N] optional. */
tril_status relative_attention_forward(struct op_context *ctx,
                                       const struct relative_attention_inputs *in, struct tensor o,
                                       struct tensor lse, struct relative_attention_params p,
                                       struct tril_error *err);
struct relative_attention_gradients {
    struct tensor dq, dk, dv;       /* act strided, overwritten */
    struct tensor dpast_k, dpast_v; /* the same; optional: NULL where the past is detached */
    struct tensor du, dw;           /* fp32 [H, d], accumulate */
    struct tensor dr;               /* act strided, overwritten */
};
/* From the forward's o and lse and the gradient of o; the pasts ascend and do not overlap. */
tril_status relative_attention_backward(struct op_context *ctx,
                                        const struct relative_attention_inputs *in, struct tensor o,
                                        struct tensor lse, struct tensor dout,
                                        const struct relative_attention_gradients *g,
                                        struct relative_attention_params p, struct tril_error *err);

/* Attention over an external memory (Wu et al. 2022): every row and head attends to the `top` keys
 * with the largest scores scale q.k of its sequence's memory, found exactly; of equal scores the
 * older key wins. The memory is a ring: entry e (0 the oldest) of sequence s is row kv_start[s] +
 * (kv_first[s] + e) mod ring of k and v. Its last entries are the rows' own tokens (row i of n is
 * entry p = kv_length[s] - n + i), of which it sees none: with a segment c, it sees the entries
 * e0 - capacity <= e < e0, e0 = p - (kv_position[s] + p) mod c the beginning of its segment, where
 * kv_position[s] is the position in the text of entry 0. Without (segment 0) it sees all entries,
 * the last ones too: then the memory is simply a memory.
 * Writes o = sum_j w_j v_j [N, H, d] act strided, w the softmax over the keys found; index i32
 * [N, H, T] (T = top): their rows of k, oldest first, then -1; weight fp32 [N, H, T]: w, then 0;
 * lse fp32 [H, N] optional. A row that sees nothing: o = 0, lse = -inf. */
struct memory_attention_inputs {
    struct tensor q;         /* [N, H, d] act strided */
    struct tensor k, v;      /* [M, K, d] act strided, H % K == 0 */
    struct tensor q_offsets; /* i32 [S+1] */
    struct tensor kv_start, kv_first, kv_length, kv_position; /* i32 [S] */
};
struct memory_attention_params {
    float scale;
    int64_t segment;  /* c; 0: none */
    int64_t capacity; /* entries before the segment that are seen; 0: all */
    int64_t ring;     /* rows of a sequence's memory, >= kv_length */
};
tril_status memory_attention_forward(struct op_context *ctx,
                                     const struct memory_attention_inputs *in, struct tensor o,
                                     struct tensor index, struct tensor weight, struct tensor lse,
                                     struct memory_attention_params p, struct tril_error *err);
/* dq (act, strided, accumulates) alone: the memory is detached. From the forward's index, weight
 * and o. */
tril_status memory_attention_backward(struct op_context *ctx, struct tensor k, struct tensor v,
                                      struct tensor index, struct tensor weight, struct tensor o,
                                      struct tensor dout, struct tensor dq, float scale,
                                      struct tril_error *err);

/* y = (1 - g) a + g b with g = sigmoid(gate) of the head (Wu et al. 2022), where b's row is there:
 * where lse is -inf (b's softmax had nothing), y = a. a, b, y [N, H, d] act strided; lse fp32
 * [H, N]; gate fp32 [H]. y may alias a. */
tril_status gate_forward(struct op_context *ctx, struct tensor a, struct tensor b,
                         struct tensor lse, struct tensor gate, struct tensor y,
                         struct tril_error *err);
/* da, db overwritten (act, strided); dgate accumulates. */
tril_status gate_backward(struct op_context *ctx, struct tensor dy, struct tensor a,
                          struct tensor b, struct tensor lse, struct tensor gate, struct tensor da,
                          struct tensor db, struct tensor dgate, struct tril_error *err);

/* Decoding over a part of a long cache (Tang et al. 2024, "Quest"). The keys of a sequence are cut
 * into blocks; the smallest and the largest value of every channel in a block bound the score that
 * any of its keys can have, q.k <= sum_t max(q_t low_t, q_t high_t). Row n of q, a sequence of its
 * own whose last key is its own token, attends exactly, and to all keys of: its `first` blocks, its
 * `last` blocks, and of the others the `top` with the largest bound (over the heads that share the
 * key/value head; of equal ones the earlier). kv_start must be a multiple of `block`; block b of a
 * sequence is row kv_start / block + b of low and high. */
struct retrieve_inputs {
    struct tensor q;                   /* [N, H, d] act strided */
    struct tensor k, v;                /* [M, K, d] act strided, H % K == 0 */
    struct tensor kv_start, kv_length; /* i32 [N] */
    struct tensor low, high;           /* fp32 [B, K, d]: block_bounds */
};
struct retrieve_params {
    float scale; /* above 0 */
    int64_t block, first, last, top;
};
/* o [N, H, d] act strided; lse fp32 [H, N] optional, of the keys seen; blocks i32 [N, K, T], T >=
 * first + last + top: those seen, ascending, then -1. */
tril_status retrieve(struct op_context *ctx, const struct retrieve_inputs *in, struct tensor o,
                     struct tensor lse, struct tensor blocks, struct retrieve_params p,
                     struct tril_error *err);
/* Brings low and high up to date, where keys kv_from[s] .. kv_length[s] of sequence s are new: the
 * blocks that hold one of them are computed whole; the others stay. kv_* i32 [S]. */
tril_status block_bounds(struct op_context *ctx, struct tensor k, struct tensor kv_start,
                         struct tensor kv_from, struct tensor kv_length, struct tensor low,
                         struct tensor high, int64_t block, struct tril_error *err);

/* y = act(x), dx = dy * act'(x): [N, F] act; y may alias x, dx may alias dy. */
struct activation_params {
    enum activation activation;
};
tril_status activation_forward(struct op_context *ctx, struct tensor x, struct tensor y,
                               enum activation a, struct tril_error *err);
tril_status activation_backward(struct op_context *ctx, struct tensor dy, struct tensor x,
                                struct tensor dx, enum activation a, struct tril_error *err);
/* Gated unit (Shazeer 2020): x [N, 2F] = (gate | up), y [N, F] = act(gate) * up; dx [N, 2F], which
 * may alias x. */
tril_status gated_forward(struct op_context *ctx, struct tensor x, struct tensor y,
                          enum activation a, struct tril_error *err);
tril_status gated_backward(struct op_context *ctx, struct tensor dy, struct tensor x,
                           struct tensor dx, enum activation a, struct tril_error *err);

/* y = dropout(x) + residual (residual optional, fp32, may alias y): element n*D + i of the stream
 * survives if random_uniform >= p and is divided by 1 - p. dx = dropout'(dy), same mask; dy fp32 or
 * act, dx act. x act, y act or fp32; *step (i64 [1], optional) replaces key.step. [N, D]. */
struct dropout_params {
    float p;
    struct random_key key;
};
tril_status dropout_forward(struct op_context *ctx, struct tensor x, struct tensor residual,
                            struct tensor step, struct tensor y, struct dropout_params p,
                            struct tril_error *err);
tril_status dropout_backward(struct op_context *ctx, struct tensor dy, struct tensor step,
                             struct tensor dx, struct dropout_params p, struct tril_error *err);

/* Cross-entropy in two phases, so that a sharded vocabulary can reduce between them.
 * forward: logits [N, V] act or fp32, targets i32 [N] (negative: ignored) -> maximum, sum (of
 *   exp(l - maximum)), target (the target's logit; 0 if ignored), fp32 [N].
 * loss: row_loss[n] = log(sum) + maximum - target, or 0 if ignored; total f64 [2] += (sum, count).
 * backward: dlogits [N, V] act = scale * (softmax - onehot), 0 for ignored rows; may alias logits
 * if the dtypes are equal. */
struct cross_entropy_params { /* of cross_entropy_backward; the others take none */
    float scale;
};
tril_status cross_entropy_forward(struct op_context *ctx, struct tensor logits,
                                  struct tensor targets, struct tensor maximum, struct tensor sum,
                                  struct tensor target, struct tril_error *err);
tril_status cross_entropy_loss(struct op_context *ctx, struct tensor targets, struct tensor maximum,
                               struct tensor sum, struct tensor target, struct tensor row_loss,
                               struct tensor total, struct tril_error *err);
tril_status cross_entropy_backward(struct op_context *ctx, struct tensor logits,
                                   struct tensor targets, struct tensor maximum, struct tensor sum,
                                   struct tensor dlogits, float scale, struct tril_error *err);

/* cache[rows[n]] = x[n], converting: x [N, K, d] act strided, rows i32 [N], all different, cache
 * [M, K, d]. */
tril_status cache_store(struct op_context *ctx, struct tensor x, struct tensor rows,
                        struct tensor cache, struct tril_error *err);
/* The same into 8 bits: cache i8 [M, K, d] and scale fp32 [M, K] so that x is about scale * cache,
 * scale = max|x| / 127 of a row's head; the error is at most scale / 2. A head with a NaN or an
 * infinity has that as its scale and zeros in the cache (NaN when read). */
tril_status cache_store_quantised(struct op_context *ctx, struct tensor x, struct tensor rows,
                                  struct tensor cache, struct tensor scale, struct tril_error *err);
/* y[r] = x[rows[r]]: x [N, D], rows i32 [R], y [R, D] (converting). scatter_rows: y[rows[r]] =
 * x[r], the rows all different; the other rows of y stay. */
tril_status gather_rows(struct op_context *ctx, struct tensor x, struct tensor rows,
                        struct tensor y, struct tril_error *err);
tril_status scatter_rows(struct op_context *ctx, struct tensor x, struct tensor rows,
                         struct tensor y, struct tril_error *err);

/* y = x converted (any float dtypes), and y += alpha * x (y fp32), over [N]. */
struct accumulate_params {
    float alpha;
};
tril_status cast(struct op_context *ctx, struct tensor x, struct tensor y, struct tril_error *err);
tril_status accumulate(struct op_context *ctx, struct tensor x, struct tensor y, float alpha,
                       struct tril_error *err);

/* total f64 [1] += sum x^2 over [N] fp32, summed in fixed chunks (deterministic). */
tril_status sum_squares(struct op_context *ctx, struct tensor x, struct tensor total,
                        struct tril_error *err);

/* What changes from step to step, in the backend's memory: fp32 [HYPER_COUNT]. */
enum {
    HYPER_LR,
    HYPER_CORRECTION1, /* 1 / (1 - beta1^t) */
    HYPER_CORRECTION2, /* 1 / (1 - beta2^t) */
    HYPER_GRAD_SCALE,  /* multiplies every gradient: clip factor times 1 / loss scale */
    HYPER_GRAD_NORM,   /* out: the norm before clipping, for the log */
    HYPER_FOUND_INF,   /* out: 1 if the norm is not finite; adamw then does nothing */
    HYPER_COUNT = 8
};
struct clip_params {
    float limit, unscale;
};
/* norm = sqrt(total) * unscale; hyper[GRAD_NORM] = norm; hyper[GRAD_SCALE] = unscale * min(1,
 * limit / (norm + 1e-6)) (limit <= 0: no clipping); hyper[FOUND_INF] = not finite. */
tril_status clip_factor(struct op_context *ctx, struct tensor total, struct tensor hyper,
                        float limit, float unscale, struct tril_error *err);

/* AdamW (Loshchilov, Hutter 2019), decoupled decay, over [N] fp32:
 *   g' = g * hyper[GRAD_SCALE]; m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2
 *   p -= lr * (m * c1 / (sqrt(v * c2) + eps) + decay * p)
 * copy (bf16 or fp16 [N], optional) receives the rounded p. */
struct adamw_params {
    float beta1, beta2, eps, decay;
};
tril_status adamw(struct op_context *ctx, struct tensor p, struct tensor g, struct tensor m,
                  struct tensor v, struct tensor copy, struct tensor hyper,
                  struct adamw_params params, struct tril_error *err);

#endif
