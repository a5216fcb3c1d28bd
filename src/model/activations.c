/* The activation table and the layout of a workspace's arena.
 *
 *   arena: | inputs, losses | x 0 .. L | layer 0 kept | layer 1 kept | ... | shared scratch |
 *
 * With offloading three x and two groups of what a layer keeps stand for all.
 *
 * Shared scratch is placed greedily, largest first, each buffer at the lowest offset where it meets
 * no other that is alive in one of its phases. */
#include "model/activations.h"

#include <string.h>

#include "base/memory.h"

/* When a buffer is alive. AGAIN: while full recomputation reruns a layer's forward during the
 * backward pass, so that forward scratch keeps clear of the gradient of the residual stream. */
enum { ATT_F = 1, FFN_F = 2, HEAD = 4, FFN_B = 8, ATT_B = 16, AGAIN = 32, ALWAYS = 63 };

enum buffer_type { TYPE_ACT, TYPE_F32, TYPE_F64, TYPE_I32 };

/* What a buffer exists for; every bit must hold. */
enum {
    FOR_BACKWARD = 1,
    FOR_LAYERNORM = 2,
    FOR_QK_NORM = 4,
    FOR_FFN = 8,
    FOR_GATED = 16,
    FOR_DROPOUT = 32,
    FOR_FINAL_NORM = 64,
    FOR_CAST = 128, /* the branches' gradients differ from the residual stream's */
    FOR_PRE = 256,  /* the pre-activation is kept or needed */
    FOR_SINKS = 512,
    FOR_SUMS = 1024, /* linear attention through a cache */
    FOR_RECURRENCE = 2048,
    FOR_PAST = 4096, /* recurrence that is carried in */
    FOR_MEMORY = 8192,
    FOR_RAW = 16384 /* memory whose keys are rotated for other use */
};

struct activation_row {
    const char *name, *shape;
    enum buffer_type type;
    enum activation_kind kind;
    unsigned phases, needs;
};

static const struct activation_row table[A_COUNT] = {
    [A_X] = {"x", "N D", TYPE_F32, KIND_INPUT, ALWAYS, 0},
    [A_MEAN1] = {"norm 1 / mean", "N", TYPE_F32, KIND_SAVED, ATT_F | ATT_B,
                 FOR_BACKWARD | FOR_LAYERNORM},
    [A_RSTD1] = {"norm 1 / rstd", "N", TYPE_F32, KIND_SAVED, ATT_F | ATT_B, FOR_BACKWARD},
    [A_NORM1] = {"norm 1", "N D", TYPE_ACT, KIND_RECOMPUTABLE, ATT_F | ATT_B, 0},
    [A_QKV] = {"qkv", "N Q", TYPE_ACT, KIND_SAVED, ATT_F | ATT_B, 0},
    [A_QK] = {"qk normalised", "N E", TYPE_ACT, KIND_SAVED, ATT_F | ATT_B, FOR_QK_NORM},
    [A_Q_RSTD] = {"q norm / rstd", "N H", TYPE_F32, KIND_SAVED, ATT_F | ATT_B,
                  FOR_BACKWARD | FOR_QK_NORM},
    [A_K_RSTD] = {"k norm / rstd", "N K", TYPE_F32, KIND_SAVED, ATT_F | ATT_B,
                  FOR_BACKWARD | FOR_QK_NORM},
    [A_ATTENTION] = {"attention", "N A", TYPE_ACT, KIND_SAVED, ATT_F | ATT_B, 0},
    [A_LSE] = {"attention / lse", "H N", TYPE_F32, KIND_SAVED, ATT_F | ATT_B, FOR_BACKWARD},
    [A_BRANCH] = {"branch", "N D", TYPE_ACT, KIND_SCRATCH, ATT_F | FFN_F | AGAIN,
                  FOR_BACKWARD | FOR_DROPOUT},
    [A_MID] = {"x after attention", "N D", TYPE_F32, KIND_SAVED, FFN_F | FFN_B,
               FOR_BACKWARD | FOR_FFN},
    [A_MEAN2] = {"norm 2 / mean", "N", TYPE_F32, KIND_SAVED, FFN_F | FFN_B,
                 FOR_BACKWARD | FOR_FFN | FOR_LAYERNORM},
    [A_RSTD2] = {"norm 2 / rstd", "N", TYPE_F32, KIND_SAVED, FFN_F | FFN_B, FOR_BACKWARD | FOR_FFN},
    [A_NORM2] = {"norm 2", "N D", TYPE_ACT, KIND_RECOMPUTABLE, FFN_F | FFN_B, FOR_FFN},
    [A_PRE] = {"ffn before activation", "N U", TYPE_ACT, KIND_SAVED, FFN_F | FFN_B,
               FOR_FFN | FOR_PRE},
    [A_HIDDEN] = {"ffn hidden", "N F", TYPE_ACT, KIND_RECOMPUTABLE, FFN_F | FFN_B, FOR_FFN},
    [A_ROWS_X] = {"wanted rows", "n D", TYPE_F32, KIND_SCRATCH, ATT_F | FFN_F | HEAD, 0},
    [A_ROWS_HEADS] = {"wanted rows / attention", "n A", TYPE_ACT, KIND_SCRATCH, ATT_F, 0},
    [A_FINAL] = {"head input", "n D", TYPE_ACT, KIND_SCRATCH, HEAD, 0},
    [A_FINAL_MEAN] = {"final norm / mean", "n", TYPE_F32, KIND_SCRATCH, HEAD,
                      FOR_BACKWARD | FOR_FINAL_NORM | FOR_LAYERNORM},
    [A_FINAL_RSTD] = {"final norm / rstd", "n", TYPE_F32, KIND_SCRATCH, HEAD,
                      FOR_BACKWARD | FOR_FINAL_NORM},
    [A_LOGITS] = {"logits", "n V", TYPE_F32, KIND_SCRATCH, HEAD, 0},
    [A_MAXIMUM] = {"logits / maximum", "n", TYPE_F32, KIND_SCRATCH, HEAD, 0},
    [A_SUM] = {"logits / sum", "n", TYPE_F32, KIND_SCRATCH, HEAD, 0},
    [A_TARGET] = {"logits / target", "n", TYPE_F32, KIND_SCRATCH, HEAD, 0},
    [A_DFINAL] = {"head input / gradient", "n D", TYPE_ACT, KIND_SCRATCH, HEAD,
                  FOR_BACKWARD | FOR_FINAL_NORM},
    [A_DX] = {"x / gradient", "N D", TYPE_F32, KIND_SCRATCH, HEAD | FFN_B | ATT_B | AGAIN,
              FOR_BACKWARD},
    [A_DY] = {"branch / gradient", "N D", TYPE_ACT, KIND_SCRATCH, FFN_B | ATT_B,
              FOR_BACKWARD | FOR_CAST},
    [A_DNORM] = {"norm / gradient", "N D", TYPE_ACT, KIND_SCRATCH, FFN_B | ATT_B, FOR_BACKWARD},
    [A_DHIDDEN] = {"ffn hidden / gradient", "N F", TYPE_ACT, KIND_SCRATCH, FFN_B,
                   FOR_BACKWARD | FOR_FFN},
    [A_DPRE] = {"ffn before activation / gradient", "N U", TYPE_ACT, KIND_SCRATCH, FFN_B,
                FOR_BACKWARD | FOR_FFN | FOR_GATED},
    [A_DQKV] = {"qkv / gradient", "N Q", TYPE_ACT, KIND_SCRATCH, ATT_B, FOR_BACKWARD},
    [A_DATTENTION] = {"attention / gradient", "N A", TYPE_ACT, KIND_SCRATCH, ATT_B, FOR_BACKWARD},
    [A_DSINKS] = {"learned sinks / gradient", "H", TYPE_F32, KIND_SCRATCH, ATT_B,
                  FOR_BACKWARD | FOR_SINKS},
    [A_SUMS] = {"sums of linear attention", "S M", TYPE_F32, KIND_SCRATCH, ATT_F, FOR_SUMS},
    [A_R] = {"positions", "R A", TYPE_ACT, KIND_SCRATCH, ATT_F | ATT_B, FOR_RECURRENCE},
    [A_DR] = {"positions / gradient", "R A", TYPE_ACT, KIND_SCRATCH, ATT_B,
              FOR_BACKWARD | FOR_RECURRENCE},
    [A_PAST_X] = {"past", "P D", TYPE_F32, KIND_SCRATCH, ATT_F | ATT_B, FOR_PAST},
    [A_PAST_MEAN] = {"past / mean", "P", TYPE_F32, KIND_SCRATCH, ATT_F | ATT_B,
                     FOR_PAST | FOR_LAYERNORM},
    [A_PAST_RSTD] = {"past / rstd", "P", TYPE_F32, KIND_SCRATCH, ATT_F | ATT_B, FOR_PAST},
    [A_PAST_NORM] = {"past / norm", "P D", TYPE_ACT, KIND_SCRATCH, ATT_F | ATT_B, FOR_PAST},
    [A_PAST_QKV] = {"past / qkv", "P Q", TYPE_ACT, KIND_SCRATCH, ATT_F | ATT_B, FOR_PAST},
    [A_DPAST_QKV] = {"past / qkv / gradient", "P Q", TYPE_ACT, KIND_SCRATCH, ATT_B,
                     FOR_BACKWARD | FOR_PAST},
    [A_DPAST_NORM] = {"past / norm / gradient", "P D", TYPE_ACT, KIND_SCRATCH, ATT_B,
                      FOR_BACKWARD | FOR_PAST},
    [A_DPAST_X] = {"past / gradient", "P D", TYPE_F32, KIND_SCRATCH, ATT_B,
                   FOR_BACKWARD | FOR_PAST},
    [A_LOCAL] = {"attention / local", "N A", TYPE_ACT, KIND_SAVED, ATT_F | ATT_B, FOR_MEMORY},
    [A_RECALLED] = {"attention / recalled", "N A", TYPE_ACT, KIND_SAVED, ATT_F | ATT_B, FOR_MEMORY},
    [A_RECALL_LSE] = {"recalled / lse", "H N", TYPE_F32, KIND_SAVED, ATT_F | ATT_B, FOR_MEMORY},
    [A_RECALL_ROWS] = {"recalled / rows", "N B", TYPE_I32, KIND_SAVED, ATT_F | ATT_B, FOR_MEMORY},
    [A_RECALL_WEIGHTS] = {"recalled / weights", "N B", TYPE_F32, KIND_SAVED, ATT_F | ATT_B,
                          FOR_MEMORY},
    [A_RECALL_KEYS] = {"recalled / own keys", "N G", TYPE_ACT, KIND_SAVED, ATT_F | ATT_B,
                       FOR_MEMORY | FOR_RAW},
    [A_DLOCAL] = {"attention / local / gradient", "N A", TYPE_ACT, KIND_SCRATCH, ATT_B,
                  FOR_BACKWARD | FOR_MEMORY},
    [A_DRECALLED] = {"attention / recalled / gradient", "N A", TYPE_ACT, KIND_SCRATCH, ATT_B,
                     FOR_BACKWARD | FOR_MEMORY},
    [A_INPUTS] = {"inputs", "I", TYPE_I32, KIND_SCRATCH, ALWAYS, 0},
    [A_ROW_LOSS] = {"loss", "N", TYPE_F32, KIND_SCRATCH, ALWAYS, 0},
    [A_TOTAL] = {"total loss", "2", TYPE_F64, KIND_SCRATCH, ALWAYS, 0},
};

const char *activation_name(enum activation_id id) {
    return table[id].name;
}

const char *activation_shape(enum activation_id id) {
    return table[id].shape;
}

/* A chunk of logits takes at most this much (but never fewer than 16 rows): large enough that the
 * head's fp32 gradient, read and written once per chunk, is not what the time goes to. */
#define HEAD_CHUNK_BYTES (INT64_C(64) << 20)

/* Layers whose activations are on the device at once, with offloading: the one that is computed,
 * and one that leaves or comes back meanwhile. */
enum { OFFLOAD_GROUPS = 2 };

static int64_t round_up(int64_t x, int64_t to) {
    return (x + to - 1) / to * to;
}

static int64_t head_chunk_rows(int64_t vocab, int64_t tokens, int64_t row_bytes) {
    int64_t most = HEAD_CHUNK_BYTES / (vocab * row_bytes) / 16 * 16;
    if (most < 16)
        most = 16;
    int64_t chunks = (tokens + most - 1) / most; /* even chunks, so that the last is not tiny */
    int64_t rows = round_up((tokens + chunks - 1) / chunks, 16);
    return rows < tokens ? rows : tokens;
}

/* Integers of a call: ids, positions, targets, cache rows, wanted rows [N]; offsets, starts,
 * lengths and slots [S + 1]; the step; for layers that recall: rows written [N] (two kinds) and
 * carried in, and six numbers a sequence; cache rows [N] of each mixer whose layers roll (of
 * recurrences twice); each padded to a cache line. */
static int64_t input_integers(int64_t tokens, int64_t sequences, int64_t carried, int64_t rolls) {
    return (7 + rolls) * round_up(tokens, 16) + 11 * round_up(sequences + 1, 16) +
           round_up(carried, 16) + 16;
}

static unsigned circumstances(const struct model_config *c, enum dtype act,
                              const struct workspace_options *o) {
    unsigned f = 0;
    f |= o->backward ? FOR_BACKWARD : 0;
    f |= c->norm == NORM_LAYERNORM ? FOR_LAYERNORM : 0;
    f |= c->qk_norm ? FOR_QK_NORM : 0;
    f |= c->ffn_kind != FFN_NONE ? FOR_FFN : 0;
    f |= c->ffn_kind == FFN_GATED ? FOR_GATED : 0;
    f |= c->dropout_residual > 0 ? FOR_DROPOUT : 0;
    f |= c->final_norm ? FOR_FINAL_NORM : 0;
    f |= dtype_size(act) == 2 || c->dropout_residual > 0 ? FOR_CAST : 0;
    f |= o->backward || c->ffn_kind == FFN_GATED ? FOR_PRE : 0;
    for (int i = 0; i < model_mixer_count(c); i++) {
        f |= c->mixers[i].learned_sinks ? FOR_SINKS : 0;
        f |= c->mixers[i].kind == MIXER_LINEAR && !o->backward ? FOR_SUMS : 0;
        if (c->mixers[i].kind == MIXER_RECURRENCE)
            f |= o->carry ? FOR_RECURRENCE | FOR_PAST : FOR_RECURRENCE;
        if (c->mixers[i].kind == MIXER_MEMORY)
            f |= c->position == POSITION_ROPE ? FOR_MEMORY | FOR_RAW : FOR_MEMORY;
    }
    return f;
}

/* The instances that a kind has: 1 (a shared buffer) or one per layer. */
static bool per_layer(enum activation_kind kind, const struct workspace_options *o) {
    if (!o->backward || kind == KIND_SCRATCH)
        return false;
    return kind == KIND_INPUT || (kind == KIND_SAVED && o->recompute != RECOMPUTE_FULL) ||
           (kind == KIND_RECOMPUTABLE && o->recompute == RECOMPUTE_NONE);
}

/* A single buffer's lifetime: with full recomputation a layer's buffers last until its backward (so
 * that the last layer needs no rerun), and none of them may share memory with another. */
static unsigned lifetime(const struct activation_row *r, const struct workspace_options *o) {
    if (o->backward && o->recompute == RECOMPUTE_FULL &&
        (r->kind == KIND_SAVED || r->kind == KIND_RECOMPUTABLE))
        return ALWAYS;
    return r->phases;
}

static void place_shared(struct activation_layout *l, const int64_t *bytes, const bool *shared,
                         const struct workspace_options *o, int64_t begin, int64_t *end) {
    bool placed[A_COUNT] = {false};
    *end = begin;
    for (;;) {
        int next = -1;
        for (int i = 0; i < A_COUNT; i++)
            if (shared[i] && !placed[i] && (next < 0 || bytes[i] > bytes[next]))
                next = i;
        if (next < 0)
            return;
        int64_t at = begin;
        unsigned phases = lifetime(&table[next], o);
        for (bool moved = true; moved;) {
            moved = false;
            for (int i = 0; i < A_COUNT; i++)
                if (placed[i] && (lifetime(&table[i], o) & phases) &&
                    at < l->offset[i] + bytes[i] && l->offset[i] < at + bytes[next]) {
                    at = l->offset[i] + bytes[i];
                    moved = true;
                }
        }
        l->offset[next] = at;
        placed[next] = true;
        if (at + bytes[next] > *end)
            *end = at + bytes[next];
    }
}

tril_status activation_layout_make(struct activation_layout *l, const struct model_config *c,
                                   enum dtype act, const struct workspace_options *o,
                                   struct tril_error *err) {
    memset(l, 0, sizeof *l);
    if (o->max_tokens < 1 || o->max_sequences < 1 || o->max_rows < 0 ||
        o->max_tokens > INT32_MAX / 16 || o->max_sequences > INT32_MAX / 16)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a workspace for %lld tokens in %lld sequences is not possible; at least "
                         "1 and at most %d",
                         (long long)o->max_tokens, (long long)o->max_sequences, INT32_MAX / 16);
    /* Backward overwrites the logits with their gradient, so both have the compute dtype. */
    enum dtype wide = act == DT_F64 ? DT_F64 : DT_F32;
    enum dtype logits = o->backward ? act : wide;
    if (!o->backward && o->max_rows)
        l->head_rows = o->max_rows < o->max_tokens ? o->max_rows : o->max_tokens;
    else
        l->head_rows = head_chunk_rows(c->vocab, o->max_tokens, (int64_t)dtype_size(logits));

    int64_t size[128] = {0};
    size['N'] = o->max_tokens;
    size['n'] = l->head_rows;
    size['D'] = c->dim;
    size['H'] = c->heads;
    size['K'] = c->kv_heads;
    size['A'] = c->heads * c->head_dim;
    size['E'] = (c->heads + c->kv_heads) * c->head_dim;
    size['Q'] = (c->heads + 2 * c->kv_heads) * c->head_dim;
    size['F'] = c->ffn;
    size['U'] = c->ffn_kind == FFN_GATED ? 2 * c->ffn : c->ffn;
    size['V'] = c->vocab;
    const struct mixer_config *recurrent = model_recalls(c, MIXER_RECURRENCE);
    size['P'] = recurrent && o->carry ? o->max_sequences * recurrent->keep : 0;
    size['R'] = model_distances(c);
    size['G'] = c->kv_heads * c->head_dim;
    for (int i = 0; i < model_mixer_count(c); i++)
        if (c->mixers[i].top * c->heads > size['B'])
            size['B'] = c->mixers[i].top * c->heads;
    if (size['P'] > INT32_MAX / 16)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%lld sequences that carry in %d tokens each are too many",
                         (long long)o->max_sequences, (int)recurrent->keep);
    int64_t rolls = 0, first, reach;
    for (int i = 0; i < model_mixer_count(c) && !o->backward; i++)
        if (mixer_reach(&c->mixers[i], c->heads, &first, &reach))
            rolls += c->mixers[i].kind == MIXER_RECURRENCE ? 2 : 1;
    size['I'] = input_integers(o->max_tokens, o->max_sequences, size['P'], rolls);
    size['S'] = o->max_sequences;
    size['M'] = c->kv_heads * c->head_dim * (c->head_dim + 1);
    size['2'] = 2;

    unsigned now = circumstances(c, act, o);
    int64_t bytes[A_COUNT] = {0}, at = 0, group = 0;
    bool shared[A_COUNT] = {false};
    for (int i = 0; i < A_COUNT; i++) {
        const struct activation_row *r = &table[i];
        l->present[i] = (r->needs & ~now) == 0;
        if (!l->present[i])
            continue;
        const enum dtype fixed[] = {[TYPE_F32] = wide, [TYPE_F64] = DT_F64, [TYPE_I32] = DT_I32};
        enum dtype t = i == A_LOGITS ? logits : r->type == TYPE_ACT ? act : fixed[r->type];
        int64_t a = size[(unsigned char)r->shape[0]];
        int64_t b = r->shape[1] ? size[(unsigned char)r->shape[2]] : 1;
        l->shape[i] = r->shape[1] ? tensor_2d(NULL, t, a, b) : tensor_1d(NULL, t, a);
        l->variable[i] = strchr("NnSPR", r->shape[0]) ? 0 : r->shape[1] ? 1 : -1;
        if (__builtin_mul_overflow(a, b, &bytes[i]) ||
            __builtin_mul_overflow(bytes[i], (int64_t)dtype_size(t), &bytes[i]) ||
            bytes[i] > INT64_MAX / 4096 / c->layers)
            return error_set(err, TRIL_ERR_MEMORY,
                             "the activations of %lld tokens are larger than any memory: reduce "
                             "the batch or the context",
                             (long long)o->max_tokens);
        bytes[i] = round_up(bytes[i], MEMORY_ALIGN);
        if (per_layer(r->kind, o)) {
            l->stride[i] = bytes[i]; /* A_X; the others follow once their group is known */
            if (i != A_X)
                group += bytes[i];
        } else if (r->phases == ALWAYS) {
            l->offset[i] = at;
            at += bytes[i];
        } else {
            shared[i] = true;
        }
    }
    l->rest = at;
    if (!o->backward)
        l->rest -= bytes[A_X];
    l->inputs = c->layers + 1;
    l->groups = c->layers;
    if (o->offload && c->layers > OFFLOAD_GROUPS) {
        l->groups = OFFLOAD_GROUPS;
        l->inputs = OFFLOAD_GROUPS + 1;
        l->leaving = c->layers - OFFLOAD_GROUPS;
    }
    l->input = bytes[A_X];
    l->group = group;
    if (l->stride[A_X]) {
        l->offset[A_X] = at;
        at += l->inputs * bytes[A_X];
    }
    l->group_offset = at;
    int64_t in_group = 0;
    for (int i = 0; i < A_COUNT; i++)
        if (i != A_X && l->stride[i]) {
            l->offset[i] = at + in_group;
            in_group += bytes[i];
            l->stride[i] = group;
        }
    at += l->groups * group;
    l->kept = at - l->rest;
    int64_t end;
    place_shared(l, bytes, shared, o, at, &end);
    l->bytes = end;
    l->logits = bytes[A_LOGITS];
    if (l->logits > end - at)
        l->logits = end - at;
    l->shared = end - at - l->logits;
    return TRIL_OK;
}
