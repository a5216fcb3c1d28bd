/* Which model: a preset or a file, with single fields overridden. */
#ifndef TRIL_CONFIG_H
#define TRIL_CONFIG_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Fields < 0 (or NULL) are not given. Overriding heads or width derives key/value heads, head width
 * and FFN width anew unless those are given too. */
struct tril_model_overrides {
    int64_t layers, dim, heads, kv_heads, head_dim, ffn, vocab, context;
    double dropout, rope_theta, norm_eps;
    const char *norm;        /* layernorm | rmsnorm */
    const char *ffn_kind;    /* none | mlp | gated */
    const char *activation;  /* relu | gelu | gelu-tanh | silu */
    const char *position;    /* none | learned | rope | alibi */
    int tied, qk_norm, bias; /* 0, 1, or -1 */
    /* How each layer mixes its tokens: texts separated by '/', a pattern that repeats over the
     * layers: "window:256/window:256/causal", "linear/causal learned-sinks"; docs/model.md. */
    const char *mixers;
    /* RoPE: the share of a head that rotates (0 to 1), and its scaling from `rope_original` tokens
     * (default: the context before the overrides) by `rope_factor`. */
    double rope_share, rope_factor;
    const char *rope_scaling; /* none | linear | ntk | dynamic | yarn | llama3 */
    int64_t rope_original;
};
struct tril_model_overrides tril_model_overrides_none(void);

/* "model3, nano, gpt2, ...": for messages and help. */
const char *tril_preset_names(void);

#ifdef __cplusplus
}
#endif
#endif
