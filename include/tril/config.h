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
};
struct tril_model_overrides tril_model_overrides_none(void);

/* "model3, nano, gpt2, ...": for messages and help. */
const char *tril_preset_names(void);

#ifdef __cplusplus
}
#endif
#endif
