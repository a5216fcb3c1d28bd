/* The rows of the table, in the order of the forward pass; their names in a checkpoint; and the
 * layout of an arena, where the rows with weight decay come first. */
#include "model/table.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"

/* Every row starts at a multiple of so many elements: 64 bytes in fp32. */
#define ROW_ALIGN 16

/* At least as many rows as a block, and as everything outside blocks, can have. */
#define LAYER_ROWS 24
#define OTHER_ROWS 8

struct builder {
    struct param_table *table;
    const struct model_config *c;
    bool gpt2; /* GPT-2's names and transposed matrices; else Llama's */
    int layer;
};

static struct param_row *row_add(struct builder *b, enum param_role role, int64_t n, int64_t m) {
    struct param_row *r = &b->table->rows[b->table->count];
    *r = (struct param_row){.role = role,
                            .layer = b->layer,
                            .rank = m ? 2 : 1,
                            .shape = {n, m ? m : 1},
                            .matrix = m != 0,
                            .decay = m != 0,
                            .init = m ? INIT_NORMAL : INIT_ZERO,
                            .init_std = m ? b->c->init_std : 0};
    b->table->row_of[b->layer + 1][role] = b->table->count++;
    return r;
}

static void part_add(struct builder *b, struct param_row *r, int64_t begin, int64_t count,
                     const char *name, const char *suffix) {
    struct param_part *p = &r->parts[r->part_count++];
    if (b->layer < 0)
        snprintf(p->name, sizeof p->name, "%s.%s", name, suffix);
    else
        snprintf(p->name, sizeof p->name,
                 b->gpt2 ? "transformer.h.%d.%s.%s" : "model.layers.%d.%s.%s", b->layer, name,
                 suffix);
    p->row_begin = begin;
    p->row_count = count;
    p->transposed =
        b->gpt2 && r->linear && r->role != PARAM_HEAD && r->role != PARAM_TOKEN_EMBEDDING;
}

static void norm_add(struct builder *b, enum param_role gain, enum param_role bias,
                     const char *name) {
    struct param_row *r = row_add(b, gain, b->c->dim, 0);
    r->init = INIT_ONE;
    part_add(b, r, 0, b->c->dim, name, "weight");
    if (b->c->norm_bias)
        part_add(b, row_add(b, bias, b->c->dim, 0), 0, b->c->dim, name, "bias");
}

/* A linear layer, [outputs, inputs], and its bias. The checkpoint splits its rows into `parts`
 * tensors of counts[i] rows each. */
static void linear_add(struct builder *b, enum param_role role, enum param_role bias_role,
                       bool bias, int64_t inputs, int parts, const int64_t *counts,
                       const char *const *names, bool residual) {
    int64_t outputs = 0, begin = 0;
    for (int i = 0; i < parts; i++)
        outputs += counts[i];
    struct param_row *w = row_add(b, role, outputs, inputs);
    struct param_row *v = bias ? row_add(b, bias_role, outputs, 0) : NULL;
    w->linear = true;
    if (residual) /* GPT-2: the variance of the residual stream stays bounded with depth */
        w->init_std = (float)(b->c->init_std / sqrt(2.0 * (double)b->c->layers));
    for (int i = 0; i < parts; i++) {
        part_add(b, w, begin, counts[i], names[i], "weight");
        if (v)
            part_add(b, v, begin, counts[i], names[i], "bias");
        begin += counts[i];
    }
}

static void block_add(struct builder *b) {
    const struct model_config *c = b->c;
    const int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    const char *names[3];
    norm_add(b, PARAM_NORM1_GAIN, PARAM_NORM1_BIAS, b->gpt2 ? "ln_1" : "input_layernorm");
    if (b->gpt2) {
        names[0] = "attn.c_attn";
        linear_add(b, PARAM_QKV, PARAM_QKV_BIAS, c->qkv_bias, c->dim, 1, (int64_t[]){q + 2 * kv},
                   names, false);
    } else {
        names[0] = "self_attn.q_proj";
        names[1] = "self_attn.k_proj";
        names[2] = "self_attn.v_proj";
        linear_add(b, PARAM_QKV, PARAM_QKV_BIAS, c->qkv_bias, c->dim, 3, (int64_t[]){q, kv, kv},
                   names, false);
    }
    if (c->qk_norm) {
        struct param_row *r = row_add(b, PARAM_Q_NORM, c->head_dim, 0);
        r->init = INIT_ONE;
        part_add(b, r, 0, c->head_dim, "self_attn.q_norm", "weight");
        r = row_add(b, PARAM_K_NORM, c->head_dim, 0);
        r->init = INIT_ONE;
        part_add(b, r, 0, c->head_dim, "self_attn.k_norm", "weight");
    }
    if (model_mixer(c, b->layer)->learned_sinks)
        part_add(b, row_add(b, PARAM_SINKS, c->heads, 0), 0, c->heads, "self_attn", "sinks");
    if (model_mixer(c, b->layer)->kind == MIXER_RECURRENCE) {
        names[0] = "self_attn.r_proj";
        linear_add(b, PARAM_RELATIVE, PARAM_RELATIVE, false, c->dim, 1, (int64_t[]){q}, names,
                   false);
        part_add(b, row_add(b, PARAM_CONTENT_BIAS, q, 0), 0, q, "self_attn", "content_bias");
        part_add(b, row_add(b, PARAM_POSITION_BIAS, q, 0), 0, q, "self_attn", "position_bias");
    }
    if (model_mixer(c, b->layer)->kind == MIXER_MEMORY)
        part_add(b, row_add(b, PARAM_MEMORY_GATE, c->heads, 0), 0, c->heads, "self_attn",
                 "memory_gate");
    names[0] = b->gpt2 ? "attn.c_proj" : "self_attn.o_proj";
    linear_add(b, PARAM_ATTENTION_OUT, PARAM_ATTENTION_OUT_BIAS, c->attention_out_bias, q, 1,
               (int64_t[]){c->dim}, names, true);
    if (c->ffn_kind == FFN_NONE)
        return;
    norm_add(b, PARAM_NORM2_GAIN, PARAM_NORM2_BIAS, b->gpt2 ? "ln_2" : "post_attention_layernorm");
    if (c->ffn_kind == FFN_GATED) {
        names[0] = "mlp.gate_proj";
        names[1] = "mlp.up_proj";
        linear_add(b, PARAM_FFN_UP, PARAM_FFN_UP_BIAS, c->ffn_bias, c->dim, 2,
                   (int64_t[]){c->ffn, c->ffn}, names, false);
    } else {
        names[0] = b->gpt2 ? "mlp.c_fc" : "mlp.up_proj";
        linear_add(b, PARAM_FFN_UP, PARAM_FFN_UP_BIAS, c->ffn_bias, c->dim, 1, (int64_t[]){c->ffn},
                   names, false);
    }
    names[0] = b->gpt2 ? "mlp.c_proj" : "mlp.down_proj";
    linear_add(b, PARAM_FFN_DOWN, PARAM_FFN_DOWN_BIAS, c->ffn_bias, c->ffn, 1, (int64_t[]){c->dim},
               names, true);
}

tril_status param_table_create(struct param_table *t, const struct model_config *c,
                               struct tril_error *err) {
    *t = (struct param_table){0};
    tril_status st = model_config_check(c, err);
    if (st != TRIL_OK)
        return st;
    t->layers = c->layers;
    t->rows = calloc((size_t)c->layers * LAYER_ROWS + OTHER_ROWS, sizeof *t->rows);
    t->row_of = calloc((size_t)c->layers + 1, sizeof *t->row_of);
    if (!t->rows || !t->row_of) {
        param_table_free(t);
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the table of parameters");
    }
    memset(t->row_of, 0xff, ((size_t)c->layers + 1) * sizeof *t->row_of); /* -1 */
    struct builder b = {t, c, strcmp(model_config_type(c, NULL), "gpt2") == 0, -1};
    struct param_row *r = row_add(&b, PARAM_TOKEN_EMBEDDING, c->vocab, c->dim);
    r->linear = c->tied;
    part_add(&b, r, 0, c->vocab, b.gpt2 ? "transformer.wte" : "model.embed_tokens", "weight");
    if (c->position == POSITION_LEARNED) {
        r = row_add(&b, PARAM_POSITION_EMBEDDING, c->context, c->dim);
        part_add(&b, r, 0, c->context, b.gpt2 ? "transformer.wpe" : "model.embed_positions",
                 "weight");
    }
    for (b.layer = 0; b.layer < c->layers; b.layer++)
        block_add(&b);
    b.layer = -1;
    if (c->final_norm)
        norm_add(&b, PARAM_FINAL_NORM_GAIN, PARAM_FINAL_NORM_BIAS,
                 b.gpt2 ? "transformer.ln_f" : "model.norm");
    if (!c->tied) {
        r = row_add(&b, PARAM_HEAD, c->vocab, c->dim);
        r->linear = true;
        part_add(&b, r, 0, c->vocab, "lm_head", "weight");
    }
    /* The layout. A model of 2^50 parameters is beyond any machine and far below overflow. */
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < t->count; i++) {
            r = &t->rows[i];
            if (r->decay != (pass == 0))
                continue;
            int64_t n = r->shape[0] * r->shape[1];
            r->offset = t->elements;
            t->elements += (n + ROW_ALIGN - 1) / ROW_ALIGN * ROW_ALIGN;
            if (t->elements > (int64_t)1 << 50) {
                param_table_free(t);
                return error_set(err, TRIL_ERR_ARGUMENT,
                                 "the model would have more than 10^15 parameters");
            }
        }
        if (pass == 0)
            t->decay_elements = t->elements;
    }
    return TRIL_OK;
}

void param_table_free(struct param_table *t) {
    free(t->rows);
    free(t->row_of);
    *t = (struct param_table){0};
}

const struct param_row *param_find(const struct param_table *t, enum param_role role, int layer) {
    int row = layer < -1 || layer >= t->layers ? -1 : t->row_of[layer + 1][role];
    return row < 0 ? NULL : &t->rows[row];
}

const char *param_part_of_model(const struct param_row *r) {
    switch (r->role) {
    case PARAM_TOKEN_EMBEDDING:
    case PARAM_POSITION_EMBEDDING:
        return "embedding";
    case PARAM_QKV:
    case PARAM_QKV_BIAS:
    case PARAM_Q_NORM:
    case PARAM_K_NORM:
    case PARAM_SINKS:
    case PARAM_RELATIVE:
    case PARAM_CONTENT_BIAS:
    case PARAM_POSITION_BIAS:
    case PARAM_MEMORY_GATE:
    case PARAM_ATTENTION_OUT:
    case PARAM_ATTENTION_OUT_BIAS:
        return "attention";
    case PARAM_FFN_UP:
    case PARAM_FFN_UP_BIAS:
    case PARAM_FFN_DOWN:
    case PARAM_FFN_DOWN_BIAS:
        return "ffn";
    case PARAM_HEAD:
        return "head";
    default:
        return "norm";
    }
}
