/* config.json, written: as the model type that holds the configuration exactly, else as tril's own.
 * The RoPE fields are written in both spellings (transformers 4 and 5), which agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"

/* What `transformers` can say of mixers: a window in some layers, no RoPE in some. */
struct layer_kinds {
    int64_t window;            /* of the local layers; 0: there are none */
    bool full, local, no_rope; /* whether some layer is so */
    const char *other;         /* else: why not */
};

static int64_t mixer_window(const struct mixer_config *m) {
    long long window = 0;
    int end = 0;
    return sscanf(m->rules, "window:%lld%n", &window, &end) == 1 && !m->rules[end] ? window : 0;
}

static struct layer_kinds layer_kinds(const struct model_config *c) {
    struct layer_kinds k = {0};
    for (int64_t l = 0; l < c->layers; l++) {
        const struct mixer_config *m = model_mixer(c, l);
        int64_t window = mixer_window(m);
        if (m->kind == MIXER_LINEAR)
            k.other = "some layers use linear attention";
        else if (mixer_recalls(m))
            k.other = "some layers recall earlier segments";
        else if (m->softcap > 0 || m->learned_sinks)
            k.other = "some layers cap their scores or have learned sinks";
        else if (m->rope_theta > 0)
            k.other = "some layers have a RoPE of their own";
        else if ((m->rules[0] && !window) || (window && k.window && window != k.window))
            k.other = "some layers see by rules other than one sliding window";
        k.no_rope |= m->no_position;
        k.local |= window > 0;
        k.full |= window == 0;
        k.window = window ? window : k.window;
    }
    return k;
}

/* Llama and its relatives differ in the biases, the qk-norm and what layers may differ in. */
static const char *llama_type(const struct model_config *c, const struct layer_kinds *k,
                              const char **reason) {
    bool same = c->qkv_bias == c->attention_out_bias, none = !c->qkv_bias && !c->attention_out_bias;
    *reason = "no type has these biases together";
    if (c->qk_norm || (c->qkv_bias && !c->attention_out_bias && !c->ffn_bias)) {
        if (k->no_rope)
            *reason = "no type has layers without RoPE together with a qk-norm or these biases";
        else if (!c->qk_norm)
            return "qwen2";
        else if (same && !c->ffn_bias)
            return "qwen3";
        return "tril";
    }
    if (k->no_rope || (k->local && k->full))
        return same ? "smollm3" : "tril";
    if (k->local || c->dim % c->heads != 0) /* Llama insists on a width that the heads divide */
        return none && !c->ffn_bias ? "mistral" : "tril";
    return same ? "llama" : "tril";
}

const char *model_config_type(const struct model_config *c, const char **reason) {
    const char *unused;
    struct layer_kinds k = layer_kinds(c);
    reason = reason ? reason : &unused;
    *reason = k.other;
    if (k.other)
        return "tril";
    bool plain_scores = c->scale_attention && !c->scale_by_layer;
    bool gpt2 = c->norm == NORM_LAYERNORM && c->norm_bias && c->final_norm && !c->qk_norm &&
                c->ffn_kind == FFN_MLP && c->position == POSITION_LEARNED && c->qkv_bias &&
                c->attention_out_bias && c->ffn_bias && c->kv_heads == c->heads &&
                c->heads * c->head_dim == c->dim;
    if (gpt2 && !k.local)
        return "gpt2";
    /* `transformers` knows no static NTK, and takes the context as what dynamic NTK scales from. */
    if (gpt2)
        *reason = "GPT-2 has no windows";
    else if (c->norm != NORM_RMSNORM || c->ffn_kind != FFN_GATED || c->position != POSITION_ROPE)
        *reason = "the norm, FFN and positions are together neither GPT-2's (LayerNorm, MLP, "
                  "learned, all biases) nor Llama's (RMSNorm, gated, RoPE)";
    else if (!c->final_norm || !plain_scores)
        *reason = "the final norm or the scale of the scores is not the usual one";
    else if (c->rope_dim != c->head_dim)
        *reason = "RoPE turns a part of each head alone";
    else if (c->rope_scaling == ROPE_NTK ||
             (c->rope_scaling == ROPE_DYNAMIC && c->rope_original_context != c->context) ||
             (c->rope_scaling != ROPE_YARN && c->rope_attention_factor != 1.0f))
        *reason = "the RoPE scaling is none of linear, dynamic, yarn and llama3";
    else
        return llama_type(c, &k, reason);
    return "tril";
}

/* The shortest decimal that reads back as the same float. */
static json_t *json_float(float x) {
    char text[32];
    for (int digits = 1; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if ((float)strtod(text, NULL) == x)
            break;
    }
    return json_real(strtod(text, NULL));
}

static json_t *json_id(int64_t id) {
    return id < 0 ? json_null() : json_integer(id);
}

static const char *dtype_config_name(enum dtype t) {
    return t == DT_BF16 ? "bfloat16" : t == DT_F16 ? "float16" : "float32";
}

static const char *activation_name(enum activation a, bool gpt2) {
    switch (a) {
    case ACT_RELU:
        return "relu";
    case ACT_GELU_ERF:
        return "gelu";
    case ACT_GELU_TANH:
        return gpt2 ? "gelu_new" : "gelu_pytorch_tanh";
    default:
        return "silu";
    }
}

/* rope_parameters (`five`), or rope_scaling. */
static json_t *rope_json(const struct model_config *c, bool five) {
    static const char *const kinds[] = {"default", "linear", "ntk", "dynamic", "yarn", "llama3"};
    json_t *o = json_object();
    json_object_set_new(o, "rope_type", json_string(kinds[c->rope_scaling]));
    if (five)
        json_object_set_new(o, "rope_theta", json_float(c->rope_theta));
    if (c->rope_scaling != ROPE_PLAIN)
        json_object_set_new(o, "factor", json_float(c->rope_factor));
    if (c->rope_scaling == ROPE_LLAMA3) {
        json_object_set_new(o, "low_freq_factor", json_float(c->rope_low));
        json_object_set_new(o, "high_freq_factor", json_float(c->rope_high));
    }
    if (c->rope_scaling == ROPE_YARN) {
        json_object_set_new(o, "beta_fast", json_float(c->rope_beta_fast));
        json_object_set_new(o, "beta_slow", json_float(c->rope_beta_slow));
    }
    if (c->rope_scaling == ROPE_YARN || c->rope_attention_factor != 1.0f)
        json_object_set_new(o, "attention_factor", json_float(c->rope_attention_factor));
    if (c->rope_scaling == ROPE_YARN || c->rope_scaling == ROPE_LLAMA3 ||
        (c->rope_scaling == ROPE_DYNAMIC && c->rope_original_context != c->context))
        json_object_set_new(o, "original_max_position_embeddings",
                            json_integer(c->rope_original_context));
    if (c->rope_dim != c->head_dim)
        json_object_set_new(o, "rotary_dim", json_integer(c->rope_dim));
    return o;
}

static void gpt2_write(json_t *o, const struct model_config *c) {
    json_object_set_new(o, "vocab_size", json_integer(c->vocab));
    json_object_set_new(o, "n_positions", json_integer(c->context));
    json_object_set_new(o, "n_embd", json_integer(c->dim));
    json_object_set_new(o, "n_layer", json_integer(c->layers));
    json_object_set_new(o, "n_head", json_integer(c->heads));
    json_object_set_new(o, "n_inner", c->ffn == 4 * c->dim ? json_null() : json_integer(c->ffn));
    json_object_set_new(o, "activation_function",
                        json_string(activation_name(c->activation, true)));
    json_object_set_new(o, "embd_pdrop", json_float(c->dropout_embedding));
    json_object_set_new(o, "attn_pdrop", json_float(c->dropout_attention));
    json_object_set_new(o, "resid_pdrop", json_float(c->dropout_residual));
    json_object_set_new(o, "layer_norm_epsilon", json_float(c->norm_eps));
    json_object_set_new(o, "scale_attn_weights", json_boolean(c->scale_attention));
    json_object_set_new(o, "scale_attn_by_inverse_layer_idx", json_boolean(c->scale_by_layer));
}

/* The fields that Llama's relatives and tril's own type share. */
static void shape_write(json_t *o, const struct model_config *c) {
    json_object_set_new(o, "vocab_size", json_integer(c->vocab));
    json_object_set_new(o, "max_position_embeddings", json_integer(c->context));
    json_object_set_new(o, "hidden_size", json_integer(c->dim));
    json_object_set_new(o, "intermediate_size", json_integer(c->ffn));
    json_object_set_new(o, "num_hidden_layers", json_integer(c->layers));
    json_object_set_new(o, "num_attention_heads", json_integer(c->heads));
    json_object_set_new(o, "num_key_value_heads", json_integer(c->kv_heads));
    json_object_set_new(o, "head_dim", json_integer(c->head_dim));
    json_object_set_new(
        o, "hidden_act",
        c->ffn_kind == FFN_NONE ? json_null() : json_string(activation_name(c->activation, false)));
}

static void llama_write(json_t *o, const struct model_config *c, const char *type) {
    bool qwen3 = strcmp(type, "qwen3") == 0, qwen2 = strcmp(type, "qwen2") == 0;
    bool smollm = strcmp(type, "smollm3") == 0, llama = strcmp(type, "llama") == 0;
    struct layer_kinds kinds = layer_kinds(c);
    shape_write(o, c);
    json_object_set_new(o, "rms_norm_eps", json_float(c->norm_eps));
    json_object_set_new(o, "rope_theta", json_float(c->rope_theta));
    json_object_set_new(o, "rope_scaling",
                        c->rope_scaling == ROPE_PLAIN ? json_null() : rope_json(c, false));
    json_object_set_new(o, "rope_parameters", rope_json(c, true));
    if (llama || qwen3 || smollm)
        json_object_set_new(o, "attention_bias", json_boolean(c->qkv_bias));
    if (llama || smollm)
        json_object_set_new(o, "mlp_bias", json_boolean(c->ffn_bias));
    if (!llama)
        json_object_set_new(o, "sliding_window",
                            kinds.local ? json_integer(kinds.window) : json_null());
    if (qwen2 || qwen3 || smollm)
        json_object_set_new(o, "use_sliding_window", json_boolean(kinds.local));
    if ((qwen2 || qwen3 || smollm) && kinds.local) {
        json_t *types = json_array();
        for (int64_t l = 0; l < c->layers; l++)
            json_array_append_new(types,
                                  json_string(mixer_window(model_mixer(c, l)) ? "sliding_attention"
                                                                              : "full_attention"));
        json_object_set_new(o, "layer_types", types);
    }
    if (smollm) {
        json_t *rope = json_array();
        for (int64_t l = 0; l < c->layers; l++)
            json_array_append_new(rope, json_integer(!model_mixer(c, l)->no_position));
        json_object_set_new(o, "no_rope_layers", rope);
        /* Absent, it would be an id of SmolLM3's own vocabulary. */
        json_object_set_new(o, "pad_token_id", json_null());
    }
    json_object_set_new(o, "attention_dropout", json_float(c->dropout_attention));
    /* `transformers` has no other dropout in these models, and passes over these two. */
    if (c->dropout_embedding > 0)
        json_object_set_new(o, "embd_pdrop", json_float(c->dropout_embedding));
    if (c->dropout_residual > 0)
        json_object_set_new(o, "resid_pdrop", json_float(c->dropout_residual));
}

static void tril_write(json_t *o, const struct model_config *c) {
    static const char *const norms[] = {"layernorm", "rmsnorm"};
    static const char *const ffns[] = {"none", "mlp", "gated"};
    static const char *const positions[] = {"none", "learned", "rope", "alibi"};
    shape_write(o, c);
    json_object_set_new(o, "norm", json_string(norms[c->norm]));
    json_object_set_new(o, "norm_eps", json_float(c->norm_eps));
    json_object_set_new(o, "norm_bias", json_boolean(c->norm_bias));
    json_object_set_new(o, "final_norm", json_boolean(c->final_norm));
    json_object_set_new(o, "qk_norm", json_boolean(c->qk_norm));
    json_object_set_new(o, "ffn", json_string(ffns[c->ffn_kind]));
    json_object_set_new(o, "ffn_bias", json_boolean(c->ffn_bias));
    json_object_set_new(o, "position", json_string(positions[c->position]));
    if (c->position == POSITION_ROPE)
        json_object_set_new(o, "rope_parameters", rope_json(c, true));
    json_object_set_new(o, "qkv_bias", json_boolean(c->qkv_bias));
    json_object_set_new(o, "attention_out_bias", json_boolean(c->attention_out_bias));
    json_object_set_new(o, "scale_attn_weights", json_boolean(c->scale_attention));
    json_object_set_new(o, "scale_attn_by_inverse_layer_idx", json_boolean(c->scale_by_layer));
    json_object_set_new(o, "embd_pdrop", json_float(c->dropout_embedding));
    json_object_set_new(o, "attn_pdrop", json_float(c->dropout_attention));
    json_object_set_new(o, "resid_pdrop", json_float(c->dropout_residual));
    if (!model_mixers_plain(c)) {
        json_t *mixers = json_array();
        char text[MIXER_TEXT];
        for (int64_t l = 0; l < model_mixer_period(c); l++)
            json_array_append_new(mixers, json_string(mixer_print(model_mixer(c, l), text)));
        json_object_set_new(o, "mixers", mixers);
    }
}

json_t *model_config_to_json(const struct model_config *c, enum dtype saved) {
    static const struct {
        const char *type, *architecture;
    } types[] = {{"gpt2", "GPT2LMHeadModel"},       {"llama", "LlamaForCausalLM"},
                 {"mistral", "MistralForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"},
                 {"qwen3", "Qwen3ForCausalLM"},     {"smollm3", "SmolLM3ForCausalLM"},
                 {"tril", "TrilForCausalLM"}};
    const char *type = model_config_type(c, NULL);
    json_t *o = json_object(), *architectures = json_array();
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(type, types[i].type) == 0)
            json_array_append_new(architectures, json_string(types[i].architecture));
    json_object_set_new(o, "architectures", architectures);
    json_object_set_new(o, "model_type", json_string(type));
    if (strcmp(type, "gpt2") == 0)
        gpt2_write(o, c);
    else if (strcmp(type, "tril") == 0)
        tril_write(o, c);
    else
        llama_write(o, c, type);
    json_object_set_new(o, "tie_word_embeddings", json_boolean(c->tied));
    json_object_set_new(o, "initializer_range", json_float(c->init_std));
    json_object_set_new(o, "bos_token_id", json_id(c->bos_id));
    json_object_set_new(o, "eos_token_id", json_id(c->eos_id));
    json_object_set_new(o, "dtype", json_string(dtype_config_name(saved)));
    return o;
}
