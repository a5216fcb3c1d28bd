/* Small models for the tests of this room. */
#ifndef TESTS_MODEL_MODELS_H
#define TESTS_MODEL_MODELS_H

#include "model/model.h"
#include "support/support.h"

/* Prints the message and fails when a call fails. */
#define OK(call)                                                                                   \
    do {                                                                                           \
        err.message[0] = 0;                                                                        \
        if ((call) != TRIL_OK)                                                                     \
            fail_msg("%s: %s", #call, err.message);                                                \
    } while (0)

/* Two layers, 12 wide, 3 heads of 4, 19 tokens of vocabulary, context 16. */
static inline struct model_config tiny_gpt2(void) {
    return (struct model_config){.layers = 2,
                                 .dim = 12,
                                 .heads = 3,
                                 .kv_heads = 3,
                                 .head_dim = 4,
                                 .ffn = 20,
                                 .vocab = 19,
                                 .context = 16,
                                 .norm = NORM_LAYERNORM,
                                 .norm_eps = 1e-5f,
                                 .final_norm = true,
                                 .ffn_kind = FFN_MLP,
                                 .activation = ACT_GELU_TANH,
                                 .position = POSITION_LEARNED,
                                 .qkv_bias = true,
                                 .attention_out_bias = true,
                                 .ffn_bias = true,
                                 .norm_bias = true,
                                 .tied = true,
                                 .scale_attention = true,
                                 .init_std = 0.2f,
                                 .bos_id = -1,
                                 .eos_id = -1};
}

/* Llama's choices at the same size: 4 heads over 2 key/value heads of 6, which is not D / H. */
static inline struct model_config tiny_llama(void) {
    struct model_config c = tiny_gpt2();
    c.heads = 4;
    c.kv_heads = 2;
    c.head_dim = 6;
    c.norm = NORM_RMSNORM;
    c.ffn_kind = FFN_GATED;
    c.activation = ACT_SILU;
    c.position = POSITION_ROPE;
    c.rope_theta = 100;
    c.rope_dim = c.head_dim;
    c.rope_factor = c.rope_attention_factor = 1;
    c.qkv_bias = c.attention_out_bias = c.ffn_bias = c.norm_bias = false;
    c.tied = false;
    return c;
}

/* One head, no MLP, no final norm, no QKV bias; tied. */
static inline struct model_config tiny_model3(void) {
    struct model_config c = tiny_gpt2();
    c.layers = 1;
    c.heads = c.kv_heads = 1;
    c.head_dim = c.dim;
    c.ffn = 0;
    c.ffn_kind = FFN_NONE;
    c.activation = ACT_NONE;
    c.final_norm = false;
    c.qkv_bias = c.attention_out_bias = c.ffn_bias = false;
    return c;
}

/* A configuration for each choice on each axis, and mixtures. */
#define VARIANTS 22
static inline struct model_config variant(int i, const char **name) {
    const bool gpt2 = i < 6 || i == 14 || i == 15 || i == 17 || i == 19;
    struct model_config c = gpt2 ? tiny_gpt2() : tiny_llama();
    static const char *const names[VARIANTS] = {"gpt2",
                                                "model3",
                                                "alibi",
                                                "gpt2, untied, relu, no biases",
                                                "gelu, scaled by layer, no positions",
                                                "gpt2, rope, grouped heads",
                                                "llama",
                                                "qk-norm, partial rope",
                                                "llama, tied, no ffn",
                                                "gated gelu, biases, alibi",
                                                "layernorm without bias, qk-norm, one kv head",
                                                "rmsnorm, mlp, learned positions",
                                                "a window in one layer",
                                                "linear, then capped with learned sinks",
                                                "rules by head",
                                                "alibi, fixed blocks, one layer without",
                                                "two thetas, one layer without rope",
                                                "linear, learned positions",
                                                "qk-norm, a window",
                                                "recurrence",
                                                "recurrence with groups, rope elsewhere",
                                                "memory, recurrence, rope"};
    static const char *const mixers[VARIANTS] = {[12] = "window:3/causal",
                                                 [13] = "linear/learned-sinks softcap=5",
                                                 [14] = "0=window:2+sinks:1 1=strided:3 2=causal/"
                                                        "dilated:2,2",
                                                 [15] = "fixed:4,1/no-position",
                                                 [16] = "window:4 theta=20/no-position/global:0,5",
                                                 [17] = "linear",
                                                 [18] = "causal/window:5",
                                                 [19] = "recurrence segment=3 keep=2",
                                                 [20] = "recurrence segment=2 keep=5/causal",
                                                 [21] = "memory segment=2 keep=4 top=3/"
                                                        "recurrence segment=2 keep=3"};
    *name = names[i];
    switch (i) {
    case 1:
        return tiny_model3();
    case 2:
        c.position = POSITION_ALIBI;
        break;
    case 3:
        c.tied = false;
        c.activation = ACT_RELU;
        c.qkv_bias = c.attention_out_bias = c.ffn_bias = c.norm_bias = false;
        break;
    case 4:
        c.position = POSITION_NONE;
        c.activation = ACT_GELU_ERF;
        c.scale_by_layer = true;
        break;
    case 5:
        c.position = POSITION_ROPE;
        c.rope_theta = 50;
        c.rope_dim = c.head_dim;
        c.rope_factor = c.rope_attention_factor = 1;
        c.kv_heads = 1;
        break;
    case 7:
        c.qk_norm = true;
        c.rope_dim = 4;
        break;
    case 8:
        c.tied = true;
        c.ffn_kind = FFN_NONE;
        c.ffn = 0;
        c.activation = ACT_NONE;
        break;
    case 9:
        c.activation = ACT_GELU_TANH;
        c.qkv_bias = c.attention_out_bias = c.ffn_bias = true;
        c.position = POSITION_ALIBI;
        c.rope_dim = 0;
        break;
    case 10:
        c.norm = NORM_LAYERNORM;
        c.qk_norm = true;
        c.kv_heads = 1;
        break;
    case 11:
        c.ffn_kind = FFN_MLP;
        c.position = POSITION_LEARNED;
        c.rope_dim = 0;
        break;
    case 15:
        c.position = POSITION_ALIBI;
        break;
    case 16:
        c.layers = 3;
        break;
    case 18:
        c.qk_norm = true;
        break;
    case 19:
        c.position = POSITION_NONE;
        break;
    default:
        break;
    }
    if (mixers[i]) {
        struct tril_error err;
        if (model_config_parse_mixers(&c, mixers[i], &err) != TRIL_OK)
            fail_msg("%s", err.message);
    }
    return c;
}

/* Three sequences of 5, 1 and 7 tokens, some targets ignored. */
#define TINY_TOKENS 13
static const int32_t tiny_ids[TINY_TOKENS] = {3, 0, 18, 7, 3, 11, 5, 5, 9, 1, 16, 2, 18};
static const int32_t tiny_targets[TINY_TOKENS] = {0, 18, -1, 3, 4, 6, 5, 9, -7, 16, 2, 18, 0};
static const int32_t tiny_offsets[4] = {0, 5, 6, 13};
static inline struct batch tiny_batch(void) {
    return (struct batch){.tokens = TINY_TOKENS,
                          .sequences = 3,
                          .ids = tiny_ids,
                          .offsets = tiny_offsets,
                          .targets = tiny_targets};
}

#endif
