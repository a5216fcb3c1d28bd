/* tril/attention.h: [B, H, T, d] expressed to the operation, which knows rows and heads.
 *
 * Where batch and heads lie evenly behind one another (every dense tensor), the batch is simply
 * more heads: one call of B H heads, B Hk key/value heads, whose grouping is the same. Where they
 * do not, or where something is one per head or per sequence (a bias, lengths, dropout's stream),
 * each batch element is a call of its own on a strided view. Nothing is copied but fp16, which the
 * CPU computes in fp32. A packed batch is what the operation takes anyway. On a device all is the
 * same, through a backend that copies (api/staged.h). */
#include "api/attention.h"

#include <math.h>
#include <string.h>

#include "api/device.h"
#include "base/memory.h"
#include "base/threads.h"
#include "model/config.h"

enum direction { FORWARD, BACKWARD };
enum way { WHOLE, EACH, PACKED };

/* The tensors, in this order wherever there is one of each. */
enum { Q, K, V, O, DOUT, DQ, DK, DV, TENSORS };

static bool of_keys(int t) {
    return t == K || t == V || t == DK || t == DV;
}

/* A tensor as the operation will see it: strides for batch, heads, rows. */
struct placed {
    void *data;
    int64_t batch, head, row;
};

struct plan {
    const struct tril_attention *a;
    enum way way;
    enum dtype dtype;               /* of the operation */
    int64_t calls, heads, kv_heads; /* of one call */
    struct placed at[TENSORS];
    bool narrow; /* fp16: at[] are dense fp32 copies, as[] the caller's */
    struct placed as[TENSORS];
    struct attention_params params;
    struct visible_set rules;
    bool ruled;
    struct op_context ctx;
    struct staged staged;
    /* in the caller's scratch (NULL while sizes are taken) */
    char *memory;
    size_t used, small;
    float *slopes, *sink, *dsink, *dbias; /* dsink, dbias: one call's share */
    uint8_t *head_rule;
    int32_t *lengths; /* of a packed batch's keys */
};

static void *mutable(const void *p) {
    return (void *)(uintptr_t)p;
}

/* ------------------------------------------------------------------ planning */

static struct placed place(const void *data, const int64_t stride[3], int64_t heads, int64_t rows,
                           int64_t width) {
    if (stride[0] == 0 && stride[1] == 0 && stride[2] == 0)
        return (struct placed){mutable(data), heads * rows * width, rows * width, width};
    return (struct placed){mutable(data), stride[0], stride[1], stride[2]};
}

static void place_all(struct plan *p, const struct tril_attention_buffers *b) {
    static const int64_t dense[3] = {0, 0, 0};
    const struct tril_attention *a = p->a;
    const void *data[] = {b->q, b->k, b->v, b->o, b->dout, b->dq, b->dk, b->dv};
    const int64_t *stride[] = {a->q_stride, a->k_stride, a->v_stride, a->o_stride,
                               a->o_stride, a->q_stride, a->k_stride, a->v_stride};
    for (int t = 0; t < TENSORS; t++) {
        int64_t heads = of_keys(t) ? a->kv_heads : a->heads;
        int64_t rows = of_keys(t) ? a->keys : a->queries;
        p->at[t] = p->as[t] = place(data[t], stride[t], heads, rows, a->width);
        if (p->narrow)
            p->at[t] = place(NULL, dense, heads, rows, a->width);
    }
}

/* Batch and heads as one even row of B H heads, if they are one. */
static bool merge(struct placed *p, int64_t batch, int64_t heads) {
    if (batch > 1 && heads == 1)
        p->head = p->batch;
    else if (batch > 1 && p->batch != heads * p->head)
        return false;
    return true;
}

static enum way way_choose(struct plan *p, enum direction direction) {
    const struct tril_attention *a = p->a;
    struct placed merged[TENSORS];
    bool softmax = a->implementation != TRIL_ATTENTION_LINEAR;
    if (a->query_offsets)
        return PACKED;
    if (a->batch > 1 &&
        (a->query_lengths || a->key_lengths || (softmax && (a->dropout > 0 || a->bias_heads > 1))))
        return EACH;
    memcpy(merged, p->at, sizeof merged);
    for (int t = 0; t < (direction == FORWARD ? DOUT : TENSORS); t++)
        if (!merge(&merged[t], a->batch, of_keys(t) ? a->kv_heads : a->heads))
            return EACH;
    memcpy(p->at, merged, sizeof merged);
    return WHOLE;
}

static void *take(struct plan *p, int64_t bytes) {
    void *at = p->memory ? (void *)((uintptr_t)p->memory + p->used) : NULL;
    p->used += ((size_t)bytes + 63) / 64 * 64;
    return at;
}

/* What the plan itself keeps in scratch, small things first; p->memory NULL: only counts. */
static void plan_place(struct plan *p, enum direction direction) {
    const struct tril_attention *a = p->a;
    int64_t matrix = a->bias_heads * a->queries * a->keys;
    bool more_heads = p->way == WHOLE && a->batch > 1;
    p->used = 0;
    p->slopes = more_heads ? take(p, p->heads * 4) : NULL;
    p->sink = more_heads ? take(p, p->heads * 4) : NULL;
    p->head_rule = more_heads && p->rules.rule_count > 1 ? take(p, p->heads) : NULL;
    p->lengths = p->way == PACKED ? take(p, a->batch * 4) : NULL;
    p->dsink =
        direction == BACKWARD && p->way != PACKED && a->batch > 1 ? take(p, p->heads * 4) : NULL;
    p->small = p->used;
    p->dbias = direction == BACKWARD && p->way == EACH && matrix > 0 ? take(p, matrix * 4) : NULL;
    int64_t batch = p->way == PACKED ? 1 : a->batch;
    for (int t = 0; p->narrow && t < (direction == FORWARD ? DOUT : TENSORS); t++)
        p->at[t].data = take(p, batch * a->width * 4 *
                                    (of_keys(t) ? a->kv_heads * a->keys : a->heads * a->queries));
}

bool attention_on_device(const struct tril_attention *a) {
    return a->device && strcmp(a->device, "cpu") != 0 && strcmp(a->device, "reference") != 0 &&
           a->implementation != TRIL_ATTENTION_REFERENCE;
}

tril_status attention_check_device(const struct tril_attention *a, struct tril_error *err) {
    if (!attention_on_device(a) || a->implementation != TRIL_ATTENTION_FUSED)
        return TRIL_OK;
    return error_set(
        err, TRIL_ERR_UNSUPPORTED,
        "attention: the implementation fused is the CPU's, for comparison; on %s there "
        "are flash, materialised and linear",
        a->device);
}

tril_status attention_open(const struct tril_attention *a, struct op_context *ctx,
                           struct staged *staged, struct tril_error *err) {
    tril_status st = attention_check_device(a, err);
    if (st != TRIL_OK)
        return st;
    if (attention_on_device(a))
        return staged_open(staged, ctx, a->device, err);
    return device_open(ctx, a->implementation == TRIL_ATTENTION_REFERENCE ? "reference" : a->device,
                       err);
}

static tril_status plan_make(struct plan *p, const struct tril_attention *a,
                             const struct tril_attention_buffers *b, enum direction direction,
                             struct tril_error *err) {
    tril_status st = TRIL_OK;
    *p = (struct plan){.a = a, .narrow = a->dtype == TRIL_FP16 && !attention_on_device(a)};
    TRY(attention_check(a, err));
    if (direction == BACKWARD)
        TRY(attention_check_written(a, err));
    p->dtype = p->narrow ? DT_F32 : attention_dtype(a->dtype);
    p->params = (struct attention_params){
        .scale = (float)a->scale,
        .softcap = (float)a->softcap,
        .dropout = (float)a->dropout,
        .key = {.seed = a->seed, .op = RANDOM_DROPOUT_ATTENTION},
        .implementation = a->implementation == TRIL_ATTENTION_FUSED ? ATTENTION_FUSED
                          : a->implementation == TRIL_ATTENTION_MATERIALISED
                              ? ATTENTION_MATERIALISED
                              : ATTENTION_FLASH,
        .block_q = (int32_t)a->tile_q,
        .block_k = (int32_t)a->tile_k,
    };
    TRY(attention_rules(a, &p->rules, &p->ruled, &p->params.causal, err));
    place_all(p, b);
    p->way = way_choose(p, direction);
    p->calls = p->way == EACH ? a->batch : 1;
    p->heads = p->way == WHOLE ? a->batch * a->heads : a->heads;
    p->kv_heads = p->way == WHOLE ? a->batch * a->kv_heads : a->kv_heads;
    TRY(attention_open(a, &p->ctx, &p->staged, err));
    plan_place(p, direction);
done:
    return st;
}

static void plan_free(struct plan *p) {
    visible_set_free(&p->rules);
    op_context_free(&p->ctx);
    staged_close(&p->staged);
}

/* ------------------------------------------------------------------ one call */

/* Batch element i of tensor t as [rows, heads, d]. */
static struct tensor view(const struct plan *p, int t, int64_t i) {
    const struct placed *at = &p->at[t];
    int64_t rows = of_keys(t) ? p->a->keys : p->a->queries;
    int64_t heads = of_keys(t) ? p->kv_heads : p->heads;
    char *data = at->data;
    if (data && p->way == EACH)
        data += i * at->batch * (int64_t)dtype_size(p->dtype);
    return (struct tensor){
        data, p->dtype, 3, {rows, heads, p->a->width, 1}, {at->row, at->head, 1, 1}};
}

/* One value a head, for all of a call's heads. What only stands for values is not read. */
static struct tensor per_head(const struct plan *p, const float *given, float *copy) {
    if (!given)
        return tensor_none();
    for (int64_t i = 0; copy && !p->ctx.measuring && i < p->heads; i++)
        copy[i] = given[i % p->a->heads];
    return tensor_1d(copy ? copy : mutable(given), DT_F32, p->heads);
}

static struct tensor bias_view(const struct plan *p, void *data, enum dtype t, bool dense) {
    const struct tril_attention *a = p->a;
    const int64_t *s = a->bias_stride;
    struct tensor x = tensor_3d(data, t, a->bias_heads, a->queries, a->keys);
    if (!data || a->bias_heads == 0)
        return tensor_none();
    if (!dense && (s[0] || s[1])) {
        x.stride[0] = s[0];
        x.stride[1] = s[1];
    }
    return x;
}

/* The offsets and lengths of one call's sequences. */
struct sequences {
    int32_t offsets[2], start, length;
};

static void sequences_fill(const struct plan *p, int64_t i, struct sequences *s,
                           struct attention_inputs *in) {
    const struct tril_attention *a = p->a;
    if (p->way == PACKED) {
        for (int64_t k = 0; k < a->batch; k++)
            p->lengths[k] = a->key_offsets[k + 1] - a->key_offsets[k];
        in->q_offsets = tensor_1d(mutable(a->query_offsets), DT_I32, a->batch + 1);
        in->kv_start = tensor_1d(mutable(a->key_offsets), DT_I32, a->batch);
        in->kv_length = tensor_1d(p->lengths, DT_I32, a->batch);
        return;
    }
    *s = (struct sequences){.offsets = {0, (int32_t)a->queries}, .length = (int32_t)a->keys};
    if (a->query_lengths)
        s->offsets[1] = a->query_lengths[i];
    if (a->key_lengths)
        s->length = a->key_lengths[i];
    in->q_offsets = tensor_1d(s->offsets, DT_I32, 2);
    in->kv_start = tensor_1d(&s->start, DT_I32, 1);
    in->kv_length = tensor_1d(&s->length, DT_I32, 1);
}

static void inputs_fill(struct plan *p, int64_t i, const struct tril_attention_buffers *b,
                        struct sequences *s, struct attention_inputs *in) {
    const struct tril_attention *a = p->a;
    *in = (struct attention_inputs){.q = view(p, Q, i), .k = view(p, K, i), .v = view(p, V, i)};
    sequences_fill(p, i, s, in);
    in->slopes = per_head(p, b->slopes, p->slopes);
    in->sink = per_head(p, b->sink, p->sink);
    in->bias = bias_view(p, mutable(b->bias), attention_dtype(a->bias_dtype), false);
    p->params.key.layer = (uint32_t)i;
    if (p->ruled) {
        p->params.rules = p->rules.rules;
        p->params.rule_count = p->rules.rule_count;
        p->params.head_rule = p->rules.rule_count > 1 ? p->rules.head_rule : NULL;
        for (int64_t h = 0; p->head_rule && h < p->heads; h++)
            p->head_rule[h] = p->rules.head_rule[h % a->heads];
        if (p->head_rule)
            p->params.head_rule = p->head_rule;
    }
}

static struct tensor lse_view(const struct plan *p, float *lse, int64_t i) {
    if (!lse)
        return tensor_none();
    return tensor_2d(lse + (p->way == EACH ? i * p->heads * p->a->queries : 0), DT_F32, p->heads,
                     p->a->queries);
}

/* [S, Hk, d, d + 1] of one call. */
static struct tensor state_view(const struct plan *p, const float *state, int64_t i) {
    int64_t d = p->a->width, sequences = p->way == PACKED ? p->a->batch : 1;
    if (!state)
        return tensor_none();
    return (struct tensor){mutable(state + (p->way == EACH ? i * p->kv_heads * d * (d + 1) : 0)),
                           DT_F32,
                           4,
                           {sequences, p->kv_heads, d, d + 1},
                           {p->kv_heads * d * (d + 1), d * (d + 1), d + 1, 1}};
}

static tril_status forward_call(struct plan *p, int64_t i, const struct tril_attention_buffers *b,
                                struct tril_error *err) {
    struct attention_inputs in;
    struct sequences s;
    inputs_fill(p, i, b, &s, &in);
    if (p->a->implementation == TRIL_ATTENTION_LINEAR)
        return linear_attention_forward(
            &p->ctx, in.q, in.k, in.v, in.q_offsets, state_view(p, b->state, i), view(p, O, i),
            state_view(p, b->state_out, i),
            (struct linear_attention_params){.causal = p->params.causal}, err);
    return attention_forward(&p->ctx, &in, view(p, O, i), lse_view(p, b->lse, i), &p->params, err);
}

static tril_status backward_call(struct plan *p, int64_t i, const struct tril_attention_buffers *b,
                                 struct tril_error *err) {
    const struct tril_attention *a = p->a;
    struct attention_inputs in;
    struct sequences s;
    inputs_fill(p, i, b, &s, &in);
    if (a->implementation == TRIL_ATTENTION_LINEAR)
        return linear_attention_backward(
            &p->ctx, in.q, in.k, in.v, in.q_offsets, state_view(p, b->state, i), view(p, O, i),
            view(p, DOUT, i), tensor_none(), view(p, DQ, i), view(p, DK, i), view(p, DV, i),
            tensor_none(), (struct linear_attention_params){.causal = p->params.causal}, err);
    float *dbias = i > 0 ? p->dbias : b->dbias, *dsink = p->dsink ? p->dsink : b->dsink;
    struct attention_gradients g = {
        .dq = view(p, DQ, i),
        .dk = view(p, DK, i),
        .dv = view(p, DV, i),
        .dbias = b->dbias ? bias_view(p, dbias, DT_F32, true) : tensor_none(),
        .dsink = b->dsink ? tensor_1d(dsink, DT_F32, p->heads) : tensor_none(),
    };
    tril_status st = attention_backward(&p->ctx, &in, view(p, O, i), lse_view(p, b->lse, i),
                                        view(p, DOUT, i), &g, &p->params, err);
    if (st != TRIL_OK)
        return st;
    if (b->dsink && p->dsink) {
        if (i == 0)
            memset(b->dsink, 0, (size_t)a->heads * 4);
        for (int64_t h = 0; h < p->heads; h++)
            b->dsink[h % a->heads] += p->dsink[h];
    }
    if (b->dbias && i > 0 && a->bias_heads > 0)
        for (int64_t n = a->bias_heads * a->queries * a->keys, k = 0; k < n; k++)
            b->dbias[k] += p->dbias[k];
    return TRIL_OK;
}

/* ------------------------------------------------------------------ fp16 */

/* Between the caller's fp16 and the dense fp32 copy. */
static void convert(const struct plan *p, int t, bool in) {
    const struct tril_attention *a = p->a;
    const struct placed *wide = &p->at[t], *as = &p->as[t];
    int64_t batch = p->way == PACKED ? 1 : a->batch, d = a->width;
    int64_t heads = of_keys(t) ? a->kv_heads : a->heads;
    int64_t rows = of_keys(t) ? a->keys : a->queries;
    float *to = wide->data;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t r = 0; r < rows; r++, to += d) {
                uint16_t *at = (uint16_t *)as->data + b * as->batch + h * as->head + r * as->row;
                if (in)
                    dtype_convert(to, DT_F32, at, DT_F16, (size_t)d);
                else
                    dtype_convert(at, DT_F16, to, DT_F32, (size_t)d);
            }
}

/* ------------------------------------------------------------------ the calls */

int attention_threads_set(const struct tril_attention *a) {
    int threads = threads_count();
    if (a->threads > 0 && a->threads != threads)
        threads_set(a->threads);
    return threads;
}

void attention_threads_restore(const struct tril_attention *a, int threads) {
    if (a->threads > 0 && a->threads != threads)
        threads_set(threads == threads_available() ? 0 : threads);
}

static tril_status run(struct plan *p, const struct tril_attention_buffers *b,
                       enum direction direction, struct tril_error *err) {
    static const int in[][6] = {{Q, K, V, -1}, {Q, K, V, O, DOUT, -1}};
    static const int out[][4] = {{O, -1}, {DQ, DK, DV, -1}};
    int threads = attention_threads_set(p->a);
    tril_status st = TRIL_OK;
    for (const int *t = in[direction]; p->narrow && *t >= 0; t++)
        convert(p, *t, true);
    for (int64_t i = 0; i < p->calls && st == TRIL_OK; i++)
        st = (direction == FORWARD ? forward_call : backward_call)(p, i, b, err);
    for (const int *t = out[direction]; p->narrow && *t >= 0 && st == TRIL_OK; t++)
        convert(p, *t, false);
    attention_threads_restore(p->a, threads);
    return st;
}

static tril_status missing(const char *name, struct tril_error *err) {
    return error_set(err, TRIL_ERR_ARGUMENT, "attention: the tensor %s is missing (NULL)", name);
}

static tril_status check_buffers(const struct tril_attention *a,
                                 const struct tril_attention_buffers *b, enum direction direction,
                                 struct tril_error *err) {
    bool linear = a->implementation == TRIL_ATTENTION_LINEAR;
    const struct {
        const char *name;
        const void *data;
    } needed[] = {{"q", b->q},       {"k", b->k},   {"v", b->v},   {"o", b->o},
                  {"dout", b->dout}, {"dq", b->dq}, {"dk", b->dk}, {"dv", b->dv}};
    for (int t = 0; t < (direction == FORWARD ? DOUT : TENSORS); t++)
        if (!needed[t].data)
            return missing(needed[t].name, err);
    if (direction == BACKWARD && !b->lse && !linear)
        return missing("lse", err);
    if (!b->bias != (a->bias_heads == 0))
        return error_set(err, TRIL_ERR_ARGUMENT, "attention: %s",
                         b->bias ? "there is a bias, but bias_heads is 0"
                                 : "bias_heads is given, but the bias is missing (NULL)");
    if (b->dbias && !b->bias)
        return missing("bias", err);
    if (b->dsink && !b->sink)
        return missing("sink", err);
    if (linear && (b->slopes || b->sink))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "attention: linear attention has no scores: it takes no ALiBi and no "
                         "sinks");
    if (!linear && (b->state || b->state_out))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "attention: only linear attention carries a state");
    return TRIL_OK;
}

/* The plan's memory and the operation's, from the caller's scratch if there is one. */
static tril_status plan_lend(struct plan *p, enum direction direction, void *scratch, size_t bytes,
                             void **own, struct tril_error *err) {
    tril_status st = TRIL_OK;
    *own = NULL;
    if (scratch) {
        size_t skip = -(uintptr_t)scratch % MEMORY_ALIGN;
        if (bytes < skip + p->used)
            return error_set(err, TRIL_ERR_MEMORY,
                             "attention: %zu bytes of scratch are too few; "
                             "tril_attention_scratch says how many it takes",
                             bytes);
        p->memory = (char *)scratch + skip;
        op_context_lend(&p->ctx, p->memory + p->used, (int64_t)(bytes - skip - p->used));
    } else if (p->used > 0) {
        TRY(mem_alloc(own, p->used, "attention", err));
        p->memory = *own;
    }
    plan_place(p, direction);
done:
    return st;
}

static tril_status call(const struct tril_attention *a, const struct tril_attention_buffers *b,
                        enum direction direction, void *scratch, size_t bytes,
                        struct tril_error *err) {
    struct plan p = {0};
    void *own = NULL;
    tril_status st = TRIL_OK;
    TRY(plan_make(&p, a, b, direction, err));
    TRY(check_buffers(a, b, direction, err));
    TRY(plan_lend(&p, direction, scratch, bytes, &own, err));
    TRY(run(&p, b, direction, err));
done:
    plan_free(&p);
    mem_free(own);
    return st;
}

tril_status tril_attention_forward(const struct tril_attention *a,
                                   const struct tril_attention_buffers *b, void *scratch,
                                   size_t scratch_bytes, struct tril_error *err) {
    return call(a, b, FORWARD, scratch, scratch_bytes, err);
}

tril_status tril_attention_backward(const struct tril_attention *a,
                                    const struct tril_attention_buffers *b, void *scratch,
                                    size_t scratch_bytes, struct tril_error *err) {
    return call(a, b, BACKWARD, scratch, scratch_bytes, err);
}

/* ------------------------------------------------------------------ scratch */

static tril_status measure(const struct tril_attention *a, enum direction direction, size_t *bytes,
                           int64_t blocks[2], struct tril_error *err) {
    static char here; /* stands for every tensor: nothing is read or written */
    bool linear = a->implementation == TRIL_ATTENTION_LINEAR;
    enum op_id ids[][2] = {{OP_ATTENTION_FORWARD, OP_LINEAR_ATTENTION_FORWARD},
                           {OP_ATTENTION_BACKWARD, OP_LINEAR_ATTENTION_BACKWARD}};
    enum op_id id = ids[direction][linear];
    struct tril_attention_buffers b = {.q = &here,
                                       .k = &here,
                                       .v = &here,
                                       .slopes = linear ? NULL : (float *)(void *)&here,
                                       .bias = a->bias_heads ? &here : NULL,
                                       .sink = linear ? NULL : (float *)(void *)&here,
                                       .o = &here,
                                       .lse = (float *)(void *)&here,
                                       .dout = &here,
                                       .dq = &here,
                                       .dk = &here,
                                       .dv = &here,
                                       .dbias = a->bias_heads ? (float *)(void *)&here : NULL,
                                       .dsink = linear ? NULL : (float *)(void *)&here};
    struct plan p = {0};
    void *small = NULL;
    int64_t most = 0;
    tril_status st = TRIL_OK;
    TRY(plan_make(&p, a, &b, direction, err));
    *bytes = p.used + 2 * MEMORY_ALIGN;
    if (p.ctx.backend->table[id] == op_info_get(id)->reference)
        goto done; /* references take what they need by themselves */
    TRY(mem_alloc(&small, p.small, "attention", err));
    p.memory = small;
    plan_place(&p, direction);
    for (int t = 0; t < TENSORS; t++)
        p.at[t].data = &here;
    int threads = attention_threads_set(a);
    p.ctx.measuring = true;
    for (int64_t i = 0; i < p.calls; i++) {
        struct tril_error told = {0};
        p.ctx.measured = -1;
        st = (direction == FORWARD ? forward_call : backward_call)(&p, i, &b, &told);
        if (p.ctx.measured < 0) { /* refused before it came to that */
            if (err)
                *err = told;
            break;
        }
        most = p.ctx.measured > most ? p.ctx.measured : most;
        st = TRIL_OK;
    }
    attention_threads_restore(a, threads);
    *bytes += (size_t)most + MEMORY_ALIGN;
    blocks[0] = p.ctx.block_rows;
    blocks[1] = p.ctx.block_keys;
done:
    plan_free(&p);
    mem_free(small);
    return st;
}

tril_status attention_measure(const struct tril_attention *a, size_t *forward, size_t *backward,
                              int64_t *block_rows, int64_t *block_keys, struct tril_error *err) {
    int64_t blocks[2] = {0, 0};
    size_t ignored;
    tril_status st = TRIL_OK;
    TRY(measure(a, FORWARD, forward ? forward : &ignored, blocks, err));
    *block_rows = blocks[0];
    *block_keys = blocks[1];
    if (backward)
        TRY(measure(a, BACKWARD, backward, blocks, err));
done:
    return st;
}

tril_status tril_attention_scratch(const struct tril_attention *a, size_t *forward,
                                   size_t *backward, struct tril_error *err) {
    int64_t blocks[2];
    return attention_measure(a, forward, backward, &blocks[0], &blocks[1], err);
}

/* ------------------------------------------------------------------ probabilities */

#define PIECE_BYTES ((int64_t)16 << 20)
#define DEVICE_PIECE_BYTES ((int64_t)256 << 20) /* a device is sent q and k for every piece */

/* The weights of `count` rows of call i, from [count, heads, Tk] into their places in p [B, H,
 * row_count, Tk], with dropout. */
static void probabilities_place(const struct plan *p, int64_t i, const float *piece,
                                const int32_t *rows, int64_t first, int64_t count,
                                int64_t row_count, float *out) {
    const struct tril_attention *a = p->a;
    int64_t keys = a->keys, head0 = p->way == EACH ? i * p->heads : 0;
    float least = (float)a->dropout, factor = 1 / (1 - least);
    for (int64_t r = 0; r < count; r++)
        for (int64_t h = 0; h < p->heads; h++) {
            const float *from = piece + (r * p->heads + h) * keys;
            float *to = out + ((head0 + h) * row_count + first + r) * keys;
            memcpy(to, from, (size_t)keys * 4);
            if (least == 0)
                continue;
            uint64_t element = (uint64_t)(h * a->queries + rows[r]) << 32;
            for (int64_t j = 0; j < keys; j++)
                to[j] = random_uniform(&p->params.key, element + (uint64_t)j) >= least
                            ? to[j] * factor
                            : 0;
        }
}

static tril_status probabilities_check(const struct tril_attention *a,
                                       const struct tril_attention_buffers *b, const int32_t *rows,
                                       int64_t count, const float *p, struct tril_error *err) {
    if (a->implementation == TRIL_ATTENTION_LINEAR || a->query_offsets)
        return error_set(err, TRIL_ERR_ARGUMENT, "attention: %s has no probabilities to give",
                         a->query_offsets ? "a packed batch" : "linear attention");
    if (!b->q || !b->k || !b->lse || !p)
        return missing(!b->q ? "q" : !b->k ? "k" : !b->lse ? "lse" : "p", err);
    if (!b->bias != (a->bias_heads == 0))
        return missing("bias", err);
    if (count < 1 || (!rows && count > a->queries))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "attention: the probabilities of %lld rows are asked for, of %lld",
                         (long long)count, (long long)a->queries);
    for (int64_t r = 0; rows && r < count; r++)
        if (rows[r] < 0 || rows[r] >= a->queries)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "attention: the probabilities of row %d are asked for; rows are 0 to "
                             "%lld",
                             rows[r], (long long)a->queries - 1);
    return TRIL_OK;
}

tril_status tril_attention_probabilities(const struct tril_attention *a,
                                         const struct tril_attention_buffers *b,
                                         const int32_t *rows, int64_t row_count, float *out,
                                         struct tril_error *err) {
    struct plan p = {0};
    void *own = NULL, *piece = NULL, *numbers = NULL;
    struct attention_inputs in;
    struct sequences s;
    tril_status st = TRIL_OK;
    TRY(plan_make(&p, a, b, FORWARD, err));
    TRY(probabilities_check(a, b, rows, row_count, out, err));
    TRY(plan_lend(&p, FORWARD, NULL, 0, &own, err));
    if (p.narrow) {
        convert(&p, Q, true);
        convert(&p, K, true);
    }
    int64_t most =
        (attention_on_device(a) ? DEVICE_PIECE_BYTES : PIECE_BYTES) / (p.heads * a->keys * 4);
    most = most < 1 ? 1 : most > row_count ? row_count : most;
    TRY(mem_alloc(&piece, (size_t)(most * p.heads * a->keys) * 4, "rows of probabilities", err));
    TRY(mem_alloc(&numbers, (size_t)most * 4, "rows of probabilities", err));
    for (int64_t i = 0; i < p.calls; i++)
        for (int64_t first = 0, n; first < row_count; first += n) {
            n = row_count - first < most ? row_count - first : most;
            for (int64_t r = 0; r < n; r++)
                ((int32_t *)numbers)[r] = rows ? rows[first + r] : (int32_t)(first + r);
            inputs_fill(&p, i, b, &s, &in);
            TRY(attention_probabilities(
                &p.ctx, &in, tensor_1d(numbers, DT_I32, n), lse_view(&p, b->lse, i),
                tensor_3d(piece, DT_F32, n, p.heads, a->keys), &p.params, err));
            probabilities_place(&p, i, piece, numbers, first, n, row_count, out);
        }
done:
    plan_free(&p);
    mem_free(own);
    mem_free(piece);
    mem_free(numbers);
    return st;
}

/* ------------------------------------------------------------------ small things */

struct tril_attention tril_attention_defaults(int64_t batch, int64_t heads, int64_t length,
                                              int64_t width) {
    return (struct tril_attention){.batch = batch,
                                   .heads = heads,
                                   .kv_heads = heads,
                                   .queries = length,
                                   .keys = length,
                                   .width = width,
                                   .scale = width > 0 ? 1 / sqrt((double)width) : 1,
                                   .block_q = 64,
                                   .block_k = 64};
}

void tril_attention_alibi(int64_t heads, float *slopes) {
    model_alibi_slopes(heads, slopes);
}
