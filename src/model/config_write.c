/* config.json, written: as the model type that holds the configuration exactly, else as tril's own.
 * The RoPE fields are written in both spellings (transformers 4 and 5), which agree. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"

const char *model_config_type(const struct model_config *c) {
    bool plain_scores = c->scale_attention && !c->scale_by_layer;
    if (c->norm == NORM_LAYERNORM && c->norm_bias && c->final_norm && !c->qk_norm &&
        c->ffn_kind == FFN_MLP && c->position == POSITION_LEARNED && c->qkv_bias &&
        c->attention_out_bias && c->ffn_bias && c->kv_heads == c->heads &&
        c->heads * c->head_dim == c->dim)
        return "gpt2";
    /* `transformers` knows no static NTK, and takes the context as what dynamic NTK scales from. */
    bool rope = c->position == POSITION_ROPE && c->rope_dim == c->head_dim &&
                c->rope_scaling != ROPE_NTK &&
                (c->rope_scaling != ROPE_DYNAMIC || c->rope_original_context == c->context) &&
                (c->rope_scaling == ROPE_YARN || c->rope_attention_factor == 1.0f);
    if (c->norm != NORM_RMSNORM || !c->final_norm || c->ffn_kind != FFN_GATED || !rope ||
        !plain_scores)
        return "tril";
    if (c->qk_norm)
        return c->qkv_bias == c->attention_out_bias && !c->ffn_bias ? "qwen3" : "tril";
    if (c->qkv_bias && !c->attention_out_bias && !c->ffn_bias)
        return "qwen2";
    /* Llama insists on a width that the heads divide; Mistral does not, but has no biases. */
    if (c->dim % c->heads == 0)
        return c->qkv_bias == c->attention_out_bias ? "llama" : "tril";
    return !c->qkv_bias && !c->attention_out_bias && !c->ffn_bias ? "mistral" : "tril";
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
    shape_write(o, c);
    json_object_set_new(o, "rms_norm_eps", json_float(c->norm_eps));
    json_object_set_new(o, "rope_theta", json_float(c->rope_theta));
    json_object_set_new(o, "rope_scaling",
                        c->rope_scaling == ROPE_PLAIN ? json_null() : rope_json(c, false));
    json_object_set_new(o, "rope_parameters", rope_json(c, true));
    if (strcmp(type, "llama") == 0 || qwen3)
        json_object_set_new(o, "attention_bias", json_boolean(c->qkv_bias));
    if (strcmp(type, "llama") == 0)
        json_object_set_new(o, "mlp_bias", json_boolean(c->ffn_bias));
    if (strcmp(type, "mistral") == 0 || qwen2 || qwen3)
        json_object_set_new(o, "sliding_window", json_null());
    if (qwen2 || qwen3)
        json_object_set_new(o, "use_sliding_window", json_false());
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
}

json_t *model_config_to_json(const struct model_config *c, enum dtype saved) {
    static const struct {
        const char *type, *architecture;
    } types[] = {{"gpt2", "GPT2LMHeadModel"},       {"llama", "LlamaForCausalLM"},
                 {"mistral", "MistralForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"},
                 {"qwen3", "Qwen3ForCausalLM"},     {"tril", "TrilForCausalLM"}};
    const char *type = model_config_type(c);
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
