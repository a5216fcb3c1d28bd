/* config.json, read. The meaning of every field is that of `transformers` (4.57 and 5), defaults of
 * absent fields included. Fields fall into four groups: honoured; harmless (labels, versions,
 * settings of generation); neutral only at some value, and refused by name at any other; and, for
 * tril's own type, unknown, which is refused too. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "model/config.h"

#define CONFIG_LIMIT ((size_t)16 << 20)

struct reader {
    struct model_config *c;
    const json_t *root;
    const char *where;
    struct tril_error *err;
};

/* The field, or NULL where it is absent or null. */
static const json_t *field(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return value && !json_is_null(value) ? value : NULL;
}

static tril_status refuse(const struct reader *r, const json_t *value, const char *key) {
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(8));
    tril_status st = error_set(
        r->err, TRIL_ERR_UNSUPPORTED,
        "%s: \"%s\" is %.60s%s, which would change the computation in a way tril does not support",
        r->where, key, text ? text : "?", text && strlen(text) > 60 ? "..." : "");
    free(text);
    return st;
}

/* Fields of these and of related model types that change the computation unless they have the
 * neutral value (or are absent or null). */
enum neutral { NEUTRAL_FALSE, NEUTRAL_ZERO, NEUTRAL_ONE, NEUTRAL_EMPTY, NEUTRAL_ABSENT };
static const struct {
    const char *key;
    enum neutral neutral;
} neutral_fields[] = {
    {"add_cross_attention", NEUTRAL_FALSE},
    {"is_encoder_decoder", NEUTRAL_FALSE},
    {"tie_encoder_decoder", NEUTRAL_FALSE},
    {"pruned_heads", NEUTRAL_EMPTY},
    {"quantization_config", NEUTRAL_ABSENT},
    {"compression_config", NEUTRAL_ABSENT},
    {"sparsity_config", NEUTRAL_ABSENT},
    {"per_layer_config", NEUTRAL_ABSENT},
    {"block_configs", NEUTRAL_ABSENT},
    {"parallel_attn", NEUTRAL_FALSE},
    {"use_parallel_residual", NEUTRAL_FALSE},
    {"new_decoder_architecture", NEUTRAL_FALSE},
    {"multi_query", NEUTRAL_FALSE},
    {"alibi", NEUTRAL_FALSE},
    {"use_alibi", NEUTRAL_FALSE},
    {"use_qk_norm", NEUTRAL_FALSE},
    {"qk_layernorm", NEUTRAL_FALSE},
    {"use_post_norm", NEUTRAL_FALSE},
    {"use_mrope", NEUTRAL_FALSE},
    {"rope_interleave", NEUTRAL_FALSE},
    {"rope_interleaved", NEUTRAL_FALSE},
    {"rotary_dim", NEUTRAL_ABSENT},
    {"rotary_pct", NEUTRAL_ONE},
    {"partial_rotary_factor", NEUTRAL_ONE},
    {"rope_local_base_freq", NEUTRAL_ABSENT},
    {"no_rope_layers", NEUTRAL_EMPTY},
    {"no_rope_layer_interval", NEUTRAL_ABSENT},
    {"clip_qkv", NEUTRAL_ABSENT},
    {"attention_sinks", NEUTRAL_ABSENT},
    {"attention_chunk_size", NEUTRAL_ABSENT},
    {"attention_multiplier", NEUTRAL_ABSENT},
    {"attn_logit_softcapping", NEUTRAL_ABSENT},
    {"final_logit_softcapping", NEUTRAL_ABSENT},
    {"query_pre_attn_scalar", NEUTRAL_ABSENT},
    {"logit_scale", NEUTRAL_ONE},
    {"logits_scaling", NEUTRAL_ONE},
    {"embedding_multiplier", NEUTRAL_ONE},
    {"scale_embedding", NEUTRAL_FALSE},
    {"scale_emb", NEUTRAL_ONE},
    {"residual_multiplier", NEUTRAL_ONE},
    {"num_local_experts", NEUTRAL_ZERO},
    {"num_experts", NEUTRAL_ZERO},
    {"n_routed_experts", NEUTRAL_ZERO},
    {"num_experts_per_tok", NEUTRAL_ZERO},
    {"kv_lora_rank", NEUTRAL_ABSENT},
    {"q_lora_rank", NEUTRAL_ABSENT},
    {"num_kv_shared_layers", NEUTRAL_ZERO},
};

static tril_status neutral_check(const struct reader *r, bool smollm) {
    for (size_t i = 0; i < sizeof neutral_fields / sizeof *neutral_fields; i++) {
        if (smollm && strncmp(neutral_fields[i].key, "no_rope_layer", 13) == 0)
            continue; /* there they are honoured */
        const json_t *value = field(r->root, neutral_fields[i].key);
        bool good = !value;
        switch (value ? neutral_fields[i].neutral : NEUTRAL_ABSENT) {
        case NEUTRAL_FALSE:
            good = json_is_false(value);
            break;
        case NEUTRAL_ZERO:
            good = json_is_number(value) && json_number_value(value) == 0;
            break;
        case NEUTRAL_ONE:
            good = json_is_number(value) && json_number_value(value) == 1;
            break;
        case NEUTRAL_EMPTY:
            good = (json_is_object(value) && json_object_size(value) == 0) ||
                   (json_is_array(value) && json_array_size(value) == 0);
            break;
        case NEUTRAL_ABSENT:
            break;
        }
        if (!good)
            return refuse(r, value, neutral_fields[i].key);
    }
    return TRIL_OK;
}

/* Getters. */

static tril_status int_required(const struct reader *r, const char *key, int64_t max,
                                int64_t *out) {
    if (!field(r->root, key))
        return error_set(r->err, TRIL_ERR_FORMAT, "%s: the field \"%s\" is missing", r->where, key);
    return json_get_int(r->root, key, 1, max, out, r->where, r->err);
}

static tril_status float_get(const struct reader *r, const json_t *object, const char *key,
                             double min, double max, float *out) {
    double x = *out;
    tril_status st = json_get_double(object, key, min, max, &x, r->where, r->err);
    if (st == TRIL_OK && field(object, key))
        *out = (float)x;
    return st;
}

static tril_status activation_get(const struct reader *r, const char *key, enum activation usual) {
    static const struct {
        const char *name;
        enum activation kind;
    } names[] = {
        {"relu", ACT_RELU},
        {"gelu", ACT_GELU_ERF},
        {"gelu_python", ACT_GELU_ERF},
        {"gelu_new", ACT_GELU_TANH},
        {"gelu_pytorch_tanh", ACT_GELU_TANH},
        {"gelu_python_tanh", ACT_GELU_TANH},
        {"gelu_fast", ACT_GELU_TANH},
        {"gelu_accurate", ACT_GELU_TANH},
        {"silu", ACT_SILU},
        {"swish", ACT_SILU},
    };
    const char *name = NULL;
    tril_status st = json_get_string(r->root, key, &name, r->where, r->err);
    if (st != TRIL_OK)
        return st;
    r->c->activation = usual;
    if (!name)
        return TRIL_OK;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(name, names[i].name) == 0) {
            r->c->activation = names[i].kind;
            return TRIL_OK;
        }
    }
    return refuse(r, field(r->root, key), key);
}

/* A special token's id: an integer, or a list whose first counts (generation_config.json holds the
 * others). Ids beyond the vocabulary are what `transformers` writes when nobody chose one: none. */
static tril_status id_get(const struct reader *r, const char *key, int64_t usual, int64_t *out) {
    const json_t *value = json_object_get(r->root, key);
    int64_t id = value ? -1 : usual;
    if (json_is_array(value) && json_array_size(value) > 0)
        value = json_array_get(value, 0);
    if (json_is_integer(value) && json_integer_value(value) >= -1) {
        id = json_integer_value(value);
    } else if (value && !json_is_null(value)) {
        return error_set(r->err, TRIL_ERR_FORMAT,
                         "%s: \"%s\" must be a token's id, a list of ids, or null", r->where, key);
    }
    *out = id < r->c->vocab ? id : -1;
    return TRIL_OK;
}

static tril_status common_get(const struct reader *r, const char *const *dropouts, double dropout,
                              bool tied, int64_t bos, int64_t eos) {
    static const char *const dtypes[] = {"float32",       "bfloat16",       "float16",
                                         "torch.float32", "torch.bfloat16", "torch.float16"};
    struct model_config *c = r->c;
    float *places[] = {&c->dropout_embedding, &c->dropout_attention, &c->dropout_residual};
    tril_status st = TRIL_OK;
    for (int i = 0; i < 3; i++) {
        *places[i] = (float)dropout;
        TRY(float_get(r, r->root, dropouts[i], 0, 0.999, places[i]));
    }
    c->tied = tied;
    TRY(json_get_bool(r->root, "tie_word_embeddings", &c->tied, r->where, r->err));
    c->init_std = 0.02f;
    TRY(float_get(r, r->root, "initializer_range", 0, 100, &c->init_std));
    TRY(id_get(r, "bos_token_id", bos, &c->bos_id));
    TRY(id_get(r, "eos_token_id", eos, &c->eos_id));
    for (int i = 0; i < 2; i++) { /* the weights tell their dtype themselves */
        const char *key = i ? "torch_dtype" : "dtype", *name = NULL;
        bool known = false;
        TRY(json_get_string(r->root, key, &name, r->where, r->err));
        for (size_t k = 0; name && k < sizeof dtypes / sizeof *dtypes; k++)
            known |= strcmp(name, dtypes[k]) == 0;
        if (name && !known) {
            st = error_set(r->err, TRIL_ERR_UNSUPPORTED,
                           "%s: \"%s\" is \"%.40s\"; tril reads float32, bfloat16 and float16",
                           r->where, key, name);
            goto done;
        }
    }
done:
    return st;
}

/* RoPE. */

struct rope {
    enum rope_scaling_kind kind;
    float theta, factor, low, high, beta_fast, beta_slow, attention_factor;
    int64_t original, dim;
};

/* One of rope_scaling, rope_parameters. */
static tril_status rope_parse(const struct reader *r, const char *key, const json_t *o, bool own,
                              struct rope *rope) {
    static const char *const kinds[] = {"default", "linear", "ntk", "dynamic", "yarn", "llama3"};
    static const char *const known[] = {
        "rope_type",        "type",
        "rope_theta",       "factor",
        "low_freq_factor",  "high_freq_factor",
        "beta_fast",        "beta_slow",
        "attention_factor", "original_max_position_embeddings",
        "mscale",           "mscale_all_dim",
        "truncate",         "partial_rotary_factor",
        "rotary_dim",
    };
    char where[256], name[96];
    tril_status st = TRIL_OK;
    const char *kind = NULL, *child;
    const json_t *value;
    float mscale = 0, mscale_all = 0;
    bool truncate = true;
    snprintf(where, sizeof where, "%.200s: \"%s\"", r->where, key);
    struct reader in = *r;
    in.where = where;
    if (!json_is_object(o)) {
        st = error_set(r->err, TRIL_ERR_FORMAT, "%s must be an object", where);
        goto done;
    }
    json_object_foreach((json_t *)(uintptr_t)o, child, value) {
        bool found = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            found |= strcmp(child, known[i]) == 0;
        if (!json_is_null(value) && (!found || (strcmp(child, "rotary_dim") == 0 && !own))) {
            snprintf(name, sizeof name, "%s.%.60s", key, child);
            st = refuse(r, value, name);
            goto done;
        }
    }
    TRY(json_get_string(o, "type", &kind, where, r->err));
    TRY(json_get_string(o, "rope_type", &kind, where, r->err));
    int which = kind ? -1 : 0;
    for (int i = 0; kind && i < (int)(sizeof kinds / sizeof *kinds); i++)
        if (strcmp(kind, kinds[i]) == 0 && (own || i != ROPE_NTK))
            which = i;
    if (which < 0) {
        st =
            error_set(r->err, TRIL_ERR_UNSUPPORTED,
                      "%s has the type \"%.40s\"; tril supports default, linear, dynamic, yarn and "
                      "llama3",
                      where, kind);
        goto done;
    }
    rope->kind = (enum rope_scaling_kind)which;
    bool scaled = rope->kind != ROPE_PLAIN;
    if (scaled && rope->kind != ROPE_YARN && !field(o, "factor")) {
        st = error_set(r->err, TRIL_ERR_FORMAT, "%s: the field \"factor\" is missing", where);
        goto done;
    }
    if (rope->kind == ROPE_LLAMA3 &&
        (!field(o, "low_freq_factor") || !field(o, "high_freq_factor"))) {
        st = error_set(r->err, TRIL_ERR_FORMAT,
                       "%s: low_freq_factor or high_freq_factor is missing", where);
        goto done;
    }
    TRY(float_get(&in, o, "rope_theta", 1.0001, 1e15, &rope->theta));
    TRY(json_get_int(o, "original_max_position_embeddings", 1, 1 << 26, &rope->original, where,
                     r->err));
    if (rope->kind == ROPE_DYNAMIC && !own) /* `transformers` never looks at it */
        rope->original = r->c->context;
    rope->factor = rope->kind == ROPE_YARN ? (float)r->c->context / (float)rope->original : 1.0f;
    TRY(float_get(&in, o, "factor", 1e-3, 1e6, &rope->factor));
    TRY(float_get(&in, o, "low_freq_factor", 1e-3, 1e6, &rope->low));
    TRY(float_get(&in, o, "high_freq_factor", 1e-3, 1e6, &rope->high));
    TRY(float_get(&in, o, "beta_fast", 1e-3, 1e6, &rope->beta_fast));
    TRY(float_get(&in, o, "beta_slow", 1e-3, 1e6, &rope->beta_slow));
    TRY(float_get(&in, o, "mscale", 0, 1e3, &mscale));
    TRY(float_get(&in, o, "mscale_all_dim", 0, 1e3, &mscale_all));
    TRY(json_get_bool(o, "truncate", &truncate, where, r->err));
    if (!truncate) {
        st = refuse(r, field(o, "truncate"), "rope_parameters.truncate");
        goto done;
    }
    if (rope->kind == ROPE_YARN)
        rope->attention_factor =
            (float)(mscale > 0 && mscale_all > 0 ? model_yarn_scale(rope->factor, mscale) /
                                                       model_yarn_scale(rope->factor, mscale_all)
                                                 : model_yarn_scale(rope->factor, 1.0));
    TRY(float_get(&in, o, "attention_factor", 1e-3, 1e3, &rope->attention_factor));
    if (rope->kind != ROPE_YARN && !own && rope->attention_factor != 1.0f) {
        st = refuse(r, field(o, "attention_factor"), "attention_factor");
        goto done;
    }
    float part = 1.0f;
    TRY(float_get(&in, o, "partial_rotary_factor", 0, 1, &part));
    if (part != 1.0f) {
        st = refuse(r, field(o, "partial_rotary_factor"), "partial_rotary_factor");
        goto done;
    }
    TRY(json_get_int(o, "rotary_dim", 2, r->c->head_dim, &rope->dim, where, r->err));
done:
    return st;
}

/* Both spellings: rope_theta and rope_scaling (transformers 4), rope_parameters (5). A file may
 * hold both, but then they must agree. */
static tril_status rope_get(const struct reader *r, bool own) {
    struct model_config *c = r->c;
    tril_status st = TRIL_OK;
    const struct rope plain = {.theta = 10000.0f,
                               .factor = 1.0f,
                               .low = 1.0f,
                               .high = 4.0f,
                               .beta_fast = 32.0f,
                               .beta_slow = 1.0f,
                               .attention_factor = 1.0f,
                               .original = c->context,
                               .dim = c->head_dim};
    struct rope old = plain, new = plain;
    const json_t *scaling = field(r->root, "rope_scaling");
    const json_t *parameters = field(r->root, "rope_parameters");
    TRY(float_get(r, r->root, "rope_theta", 1.0001, 1e15, &old.theta));
    new.theta = old.theta;
    if (scaling)
        TRY(rope_parse(r, "rope_scaling", scaling, own, &old));
    if (parameters)
        TRY(rope_parse(r, "rope_parameters", parameters, own, &new));
    else
        new = old;
    bool theta_differs = field(r->root, "rope_theta") && old.theta != new.theta;
    bool rest_differs =
        scaling &&
        (old.kind != new.kind || old.factor != new.factor || old.low != new.low ||
         old.high != new.high || old.beta_fast != new.beta_fast || old.beta_slow != new.beta_slow ||
         old.original != new.original || old.attention_factor != new.attention_factor);
    if (theta_differs || rest_differs) {
        st = error_set(r->err, TRIL_ERR_FORMAT,
                       "%s: \"rope_parameters\" contradicts \"%s\"; keep the right one of the two",
                       r->where, rest_differs ? "rope_scaling" : "rope_theta");
        goto done;
    }
    c->rope_theta = new.theta;
    c->rope_scaling = new.kind;
    c->rope_factor = new.factor;
    c->rope_low = new.low;
    c->rope_high = new.high;
    c->rope_beta_fast = new.beta_fast;
    c->rope_beta_slow = new.beta_slow;
    c->rope_attention_factor = new.attention_factor;
    c->rope_original_context =
        new.kind == ROPE_DYNAMIC || new.kind == ROPE_YARN || new.kind == ROPE_LLAMA3 ? new.original
                                                                                     : 0;
    c->rope_dim = new.dim;
done:
    return st;
}

/* The model types. */

static tril_status gpt2_read(const struct reader *r) {
    static const char *const dropouts[] = {"embd_pdrop", "attn_pdrop", "resid_pdrop"};
    struct model_config *c = r->c;
    tril_status st = TRIL_OK;
    TRY(int_required(r, "n_layer", 4096, &c->layers));
    TRY(int_required(r, "n_embd", 1 << 20, &c->dim));
    TRY(int_required(r, "n_head", 1 << 16, &c->heads));
    TRY(int_required(r, "n_positions", 1 << 26, &c->context));
    TRY(int_required(r, "vocab_size", 1 << 24, &c->vocab));
    if (c->dim % c->heads != 0) {
        st = error_set(r->err, TRIL_ERR_FORMAT,
                       "%s: \"n_embd\" is %lld, which is not divisible by the %lld of \"n_head\"",
                       r->where, (long long)c->dim, (long long)c->heads);
        goto done;
    }
    c->kv_heads = c->heads;
    c->head_dim = c->dim / c->heads;
    c->ffn = 4 * c->dim;
    TRY(json_get_int(r->root, "n_inner", 1, 1 << 24, &c->ffn, r->where, r->err));
    c->norm = NORM_LAYERNORM;
    c->norm_eps = 1e-5f;
    TRY(float_get(r, r->root, "layer_norm_epsilon", 1e-30, 1, &c->norm_eps));
    c->final_norm = true;
    c->ffn_kind = FFN_MLP;
    TRY(activation_get(r, "activation_function", ACT_GELU_TANH));
    c->position = POSITION_LEARNED;
    c->qkv_bias = c->attention_out_bias = c->ffn_bias = c->norm_bias = true;
    c->scale_attention = true;
    TRY(json_get_bool(r->root, "scale_attn_weights", &c->scale_attention, r->where, r->err));
    TRY(json_get_bool(r->root, "scale_attn_by_inverse_layer_idx", &c->scale_by_layer, r->where,
                      r->err));
    TRY(common_get(r, dropouts, 0.1, true, 50256, 50256));
done:
    return st;
}

/* Which layers have a sliding window and which rotate: the fields of Llama (none), of Mistral (all
 * layers, 4096 where the field is absent), of Qwen (from max_window_layers on, or by layer_types)
 * and of SmolLM3. A window as long as the context hides nothing. */
struct layers {
    int64_t window;
    bool local[MODEL_MOST_LAYERS], no_rope[MODEL_MOST_LAYERS];
};

static tril_status layer_types_get(const struct reader *r, struct layers *x) {
    const json_t *types = field(r->root, "layer_types");
    if (!json_is_array(types) || json_array_size(types) != (size_t)r->c->layers)
        return error_set(r->err, TRIL_ERR_FORMAT,
                         "%s: \"layer_types\" must be a list of %lld names, one per layer",
                         r->where, (long long)r->c->layers);
    for (size_t i = 0; i < json_array_size(types); i++) {
        const char *kind = json_string_value(json_array_get(types, i));
        x->local[i] = kind && strcmp(kind, "sliding_attention") == 0;
        if (!kind || (!x->local[i] && strcmp(kind, "full_attention") != 0) ||
            (x->local[i] && x->window < 1))
            return refuse(r, json_array_get(types, i), "layer_types");
    }
    return TRIL_OK;
}

static tril_status no_rope_get(const struct reader *r, struct layers *x) {
    const json_t *list = field(r->root, "no_rope_layers"), *value;
    int64_t every = 4;
    tril_status st =
        json_get_int(r->root, "no_rope_layer_interval", 1, INT32_MAX, &every, r->where, r->err);
    for (int64_t l = 0; l < r->c->layers && st == TRIL_OK; l++) {
        x->no_rope[l] = (l + 1) % every == 0;
        if (!list)
            continue;
        value = json_array_get(list, (size_t)l);
        if (!json_is_integer(value))
            st = error_set(r->err, TRIL_ERR_FORMAT,
                           "%s: \"no_rope_layers\" must be a list of %lld numbers, one per layer",
                           r->where, (long long)r->c->layers);
        x->no_rope[l] = json_integer_value(value) == 0;
    }
    return st;
}

static tril_status layers_read(const struct reader *r, const char *type) {
    struct model_config *c = r->c;
    tril_status st = TRIL_OK;
    bool mistral = strcmp(type, "mistral") == 0, smollm = strcmp(type, "smollm3") == 0;
    bool use = mistral, llama = strcmp(type, "llama") == 0;
    int64_t full_layers = mistral || smollm ? 0 : 28;
    struct layers *x = calloc(1, sizeof *x);
    struct mixer_config *pattern = calloc((size_t)c->layers, sizeof *pattern);
    if (!x || !pattern)
        TRY(error_set(r->err, TRIL_ERR_MEMORY, "not enough memory for %lld layers",
                      (long long)c->layers));
    x->window = llama || smollm || json_object_get(r->root, "sliding_window") ? 0 : 4096;
    TRY(json_get_int(r->root, "sliding_window", 0, INT64_MAX, &x->window, r->where, r->err));
    if (llama && x->window > 0 && x->window < c->context) { /* `transformers` passes over it */
        st = refuse(r, field(r->root, "sliding_window"), "sliding_window");
        goto done;
    }
    TRY(json_get_bool(r->root, "use_sliding_window", &use, r->where, r->err));
    TRY(json_get_int(r->root, "max_window_layers", 0, INT64_MAX, &full_layers, r->where, r->err));
    x->window = use && !llama ? x->window : 0;
    if (smollm)
        TRY(no_rope_get(r, x));
    for (int64_t l = 0; l < c->layers; l++)
        x->local[l] = x->window > 0 && l >= full_layers && (!smollm || x->no_rope[l]);
    if (field(r->root, "layer_types"))
        TRY(layer_types_get(r, x));
    for (int64_t l = 0; l < c->layers; l++) {
        if (mistral && x->local[l] != (x->window > 0)) { /* there all layers are alike */
            st = refuse(r, field(r->root, "layer_types"), "layer_types");
            goto done;
        }
        if (x->local[l] && x->window < c->context)
            snprintf(pattern[l].rules, MIXER_RULES, "window:%lld", (long long)x->window);
        pattern[l].no_position = x->no_rope[l];
    }
    TRY(model_config_set_mixers(c, pattern, c->layers, r->err));
done:
    free(x);
    free(pattern);
    return st;
}

static tril_status llama_read(const struct reader *r, const char *type) {
    static const char *const dropouts[] = {"embd_pdrop", "attention_dropout", "resid_pdrop"};
    struct model_config *c = r->c;
    tril_status st = TRIL_OK;
    bool llama = strcmp(type, "llama") == 0, qwen2 = strcmp(type, "qwen2") == 0;
    bool qwen3 = strcmp(type, "qwen3") == 0, smollm = strcmp(type, "smollm3") == 0;
    TRY(int_required(r, "num_hidden_layers", 4096, &c->layers));
    TRY(int_required(r, "hidden_size", 1 << 20, &c->dim));
    TRY(int_required(r, "intermediate_size", 1 << 24, &c->ffn));
    TRY(int_required(r, "num_attention_heads", 1 << 16, &c->heads));
    TRY(int_required(r, "max_position_embeddings", 1 << 26, &c->context));
    TRY(int_required(r, "vocab_size", 1 << 24, &c->vocab));
    c->kv_heads = c->heads;
    if (!llama && !json_object_get(r->root, "num_key_value_heads"))
        TRY(int_required(r, "num_key_value_heads", 1 << 16, &c->kv_heads));
    TRY(json_get_int(r->root, "num_key_value_heads", 1, 1 << 16, &c->kv_heads, r->where, r->err));
    c->head_dim = qwen3 ? 128 : c->dim / c->heads;
    if (!qwen3 && !field(r->root, "head_dim") && c->dim % c->heads != 0) {
        st = error_set(r->err, TRIL_ERR_FORMAT,
                       "%s: \"hidden_size\" is %lld, which is not divisible by the %lld of "
                       "\"num_attention_heads\", and there is no \"head_dim\"",
                       r->where, (long long)c->dim, (long long)c->heads);
        goto done;
    }
    TRY(json_get_int(r->root, "head_dim", 1, 1 << 16, &c->head_dim, r->where, r->err));
    c->norm = NORM_RMSNORM;
    c->norm_eps = 1e-6f;
    TRY(float_get(r, r->root, "rms_norm_eps", 1e-30, 1, &c->norm_eps));
    c->final_norm = true;
    c->qk_norm = qwen3;
    c->ffn_kind = FFN_GATED;
    TRY(activation_get(r, "hidden_act", ACT_SILU));
    c->position = POSITION_ROPE;
    if (smollm && !field(r->root, "rope_theta") && !field(r->root, "rope_parameters")) {
        st =
            error_set(r->err, TRIL_ERR_FORMAT, "%s: the field \"rope_theta\" is missing", r->where);
        goto done;
    }
    TRY(rope_get(r, false));
    c->scale_attention = true;
    bool bias = false, mlp_bias = false;
    TRY(json_get_bool(r->root, "attention_bias", &bias, r->where, r->err));
    TRY(json_get_bool(r->root, "mlp_bias", &mlp_bias, r->where, r->err));
    if (bias && !llama && !qwen3 && !smollm) {
        st = refuse(r, field(r->root, "attention_bias"), "attention_bias");
        goto done;
    }
    if (mlp_bias && !llama && !smollm) {
        st = refuse(r, field(r->root, "mlp_bias"), "mlp_bias");
        goto done;
    }
    c->qkv_bias = bias || qwen2;
    c->attention_out_bias = bias;
    c->ffn_bias = mlp_bias;
    TRY(layers_read(r, type));
    TRY(common_get(r, dropouts, 0.0, smollm, qwen2 || qwen3 ? -1 : 1, qwen2 || qwen3 ? -1 : 2));
done:
    return st;
}

/* The index of a string field among the choices; the field is required. */
static tril_status choice_get(const struct reader *r, const char *key, const char *const *choices,
                              int *out) {
    const char *name = NULL;
    tril_status st = json_get_string(r->root, key, &name, r->where, r->err);
    if (st != TRIL_OK)
        return st;
    if (!name)
        return error_set(r->err, TRIL_ERR_FORMAT, "%s: the field \"%s\" is missing", r->where, key);
    for (*out = 0; choices[*out]; ++*out)
        if (strcmp(name, choices[*out]) == 0)
            return TRIL_OK;
    return refuse(r, field(r->root, key), key);
}

/* "mixers": a list of texts, one for each layer, or fewer, which repeat. */
static tril_status mixers_get(const struct reader *r) {
    const json_t *list = field(r->root, "mixers");
    struct mixer_config *pattern = NULL;
    tril_status st = TRIL_OK;
    if (!list)
        return TRIL_OK;
    size_t n = json_is_array(list) ? json_array_size(list) : 0;
    if (n < 1 || n > MODEL_MOST_LAYERS)
        return error_set(r->err, TRIL_ERR_FORMAT,
                         "%s: \"mixers\" must be a list of texts, at most one for each layer",
                         r->where);
    pattern = calloc(n, sizeof *pattern);
    if (!pattern)
        return error_set(r->err, TRIL_ERR_MEMORY, "not enough memory for %zu mixers", n);
    for (size_t i = 0; i < n; i++) {
        const char *text = json_string_value(json_array_get(list, i));
        st = text ? mixer_parse(&pattern[i], text, r->err)
                  : error_set(r->err, TRIL_ERR_FORMAT, "a mixer is no text");
        if (st != TRIL_OK)
            goto done;
    }
    st = model_config_set_mixers(r->c, pattern, (int64_t)n, r->err);
done:
    if (st != TRIL_OK)
        error_prefix(r->err, "%s: \"mixers\"", r->where);
    free(pattern);
    return st;
}

/* Every field that model_config_to_json writes. */
static tril_status tril_read(const struct reader *r) {
    static const char *const dropouts[] = {"embd_pdrop", "attn_pdrop", "resid_pdrop"};
    static const char *const norms[] = {"layernorm", "rmsnorm", NULL};
    static const char *const ffns[] = {"none", "mlp", "gated", NULL};
    static const char *const positions[] = {"none", "learned", "rope", "alibi", NULL};
    static const char *const known[] = {"model_type",
                                        "architectures",
                                        "num_hidden_layers",
                                        "hidden_size",
                                        "num_attention_heads",
                                        "num_key_value_heads",
                                        "head_dim",
                                        "intermediate_size",
                                        "vocab_size",
                                        "max_position_embeddings",
                                        "norm",
                                        "norm_eps",
                                        "final_norm",
                                        "qk_norm",
                                        "ffn",
                                        "hidden_act",
                                        "position",
                                        "rope_parameters",
                                        "qkv_bias",
                                        "attention_out_bias",
                                        "ffn_bias",
                                        "norm_bias",
                                        "tie_word_embeddings",
                                        "scale_attn_weights",
                                        "scale_attn_by_inverse_layer_idx",
                                        "embd_pdrop",
                                        "attn_pdrop",
                                        "resid_pdrop",
                                        "initializer_range",
                                        "bos_token_id",
                                        "eos_token_id",
                                        "pad_token_id",
                                        "dtype",
                                        "torch_dtype",
                                        "mixers"};
    struct model_config *c = r->c;
    tril_status st = TRIL_OK;
    const char *key;
    const json_t *value;
    int choice;
    json_object_foreach((json_t *)(uintptr_t)r->root, key, value) {
        bool found = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            found |= strcmp(key, known[i]) == 0;
        if (!found) {
            st = error_set(r->err, TRIL_ERR_UNSUPPORTED,
                           "%s: \"%.60s\" is not a field of the model type tril", r->where, key);
            goto done;
        }
    }
    TRY(int_required(r, "num_hidden_layers", 4096, &c->layers));
    TRY(int_required(r, "hidden_size", 1 << 20, &c->dim));
    TRY(int_required(r, "num_attention_heads", 1 << 16, &c->heads));
    TRY(int_required(r, "num_key_value_heads", 1 << 16, &c->kv_heads));
    TRY(int_required(r, "head_dim", 1 << 16, &c->head_dim));
    TRY(int_required(r, "max_position_embeddings", 1 << 26, &c->context));
    TRY(int_required(r, "vocab_size", 1 << 24, &c->vocab));
    TRY(choice_get(r, "norm", norms, &choice));
    c->norm = (enum norm_kind)choice;
    c->norm_eps = 1e-5f;
    TRY(float_get(r, r->root, "norm_eps", 1e-30, 1, &c->norm_eps));
    TRY(choice_get(r, "ffn", ffns, &choice));
    c->ffn_kind = (enum ffn_kind)choice;
    if (c->ffn_kind != FFN_NONE) {
        TRY(int_required(r, "intermediate_size", 1 << 24, &c->ffn));
        TRY(activation_get(r, "hidden_act", c->ffn_kind == FFN_GATED ? ACT_SILU : ACT_GELU_TANH));
    }
    TRY(choice_get(r, "position", positions, &choice));
    c->position = (enum position_kind)choice;
    if (c->position == POSITION_ROPE)
        TRY(rope_get(r, true));
    c->final_norm = true;
    c->scale_attention = true;
    const struct {
        const char *name;
        bool *flag;
    } flags[] = {
        {"final_norm", &c->final_norm},
        {"qk_norm", &c->qk_norm},
        {"qkv_bias", &c->qkv_bias},
        {"attention_out_bias", &c->attention_out_bias},
        {"ffn_bias", &c->ffn_bias},
        {"norm_bias", &c->norm_bias},
        {"scale_attn_weights", &c->scale_attention},
        {"scale_attn_by_inverse_layer_idx", &c->scale_by_layer},
    };
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        TRY(json_get_bool(r->root, flags[i].name, flags[i].flag, r->where, r->err));
    TRY(common_get(r, dropouts, 0.0, true, -1, -1));
    TRY(mixers_get(r));
done:
    return st;
}

tril_status model_config_from_json(struct model_config *c, const json_t *root, const char *where,
                                   struct tril_error *err) {
    struct model_config n = {.rope_theta = 10000.0f,
                             .rope_factor = 1.0f,
                             .rope_low = 1.0f,
                             .rope_high = 4.0f,
                             .rope_beta_fast = 32.0f,
                             .rope_beta_slow = 1.0f,
                             .rope_attention_factor = 1.0f};
    struct reader r = {&n, root, where, err};
    const char *type = NULL;
    tril_status st = json_get_string(root, "model_type", &type, where, err);
    if (st != TRIL_OK)
        return st;
    if (!type)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: the field \"model_type\" is missing; is this a model's config.json?",
                         where);
    if (strcmp(type, "tril") == 0) {
        TRY(tril_read(&r));
    } else {
        TRY(neutral_check(&r, strcmp(type, "smollm3") == 0));
        if (strcmp(type, "gpt2") == 0) {
            TRY(gpt2_read(&r));
        } else if (strcmp(type, "llama") == 0 || strcmp(type, "mistral") == 0 ||
                   strcmp(type, "qwen2") == 0 || strcmp(type, "qwen3") == 0 ||
                   strcmp(type, "smollm3") == 0) {
            TRY(llama_read(&r, type));
        } else {
            st = error_set(err, TRIL_ERR_UNSUPPORTED,
                           "%s: the model type \"%.60s\" is not supported; tril opens gpt2, llama, "
                           "mistral, qwen2, qwen3, smollm3 and its own",
                           where, type);
            goto done;
        }
    }
    st = model_config_check(&n, err);
    if (st != TRIL_OK) {
        error_prefix(err, "%s", where);
        if (err)
            err->code = TRIL_ERR_FORMAT;
        st = TRIL_ERR_FORMAT;
        goto done;
    }
    *c = n;
done:
    return st;
}

tril_status model_config_read(struct model_config *c, const char *dir_or_file,
                              struct tril_error *err) {
    json_t *root = NULL;
    char *joined = NULL;
    tril_status st = TRIL_OK;
    const char *path = dir_or_file;
    if (path_is_dir(dir_or_file)) {
        path = joined = path_join(dir_or_file, "config.json");
        if (!joined) {
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", dir_or_file);
            goto done;
        }
    }
    TRY(json_read(&root, path, CONFIG_LIMIT, err));
    TRY(model_config_from_json(c, root, path, err));
done:
    json_decref(root);
    free(joined);
    return st;
}
