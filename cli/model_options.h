/* The options that choose or change a model, shared by the commands that take them. */
#ifndef CLI_MODEL_OPTIONS_H
#define CLI_MODEL_OPTIONS_H

#include <stdbool.h>

#include "options.h"
#include "tril/config.h"

/* Flags behind the overrides that are no plain numbers. */
struct model_flags {
    bool tied, untied, qk_norm, no_bias;
};

#define DEVICE_OPTION(out)                                                                         \
    {                                                                                              \
        "device", "NAME", "where it runs; cuda: an NVIDIA GPU", OPTION_CHOICE, out, 0, 0,          \
            "cpu|cuda|reference"                                                                   \
    }

#define ABLATE_HELP                                                                                \
    "parts to switch off: mlp, attention, layer:L, head:L.H, residual, norm, q, scale, position"

/* Rows for what changes no parameter, so that a trained model can be opened with them; `o` is a
 * struct tril_model_overrides. */
#define VIEW_OPTIONS(o)                                                                              \
    {"rope-theta", "X", "RoPE's base", OPTION_NUMBER, &(o).rope_theta, 1, 1e12, NULL},               \
        {"rope-share", "X", "part of a head that rotates (1)", OPTION_NUMBER, &(o).rope_share, 0, 1, \
         NULL},                                                                                      \
        {"rope-scaling",                                                                             \
         "KIND",                                                                                     \
         "to reach beyond the context trained for",                                                  \
         OPTION_CHOICE,                                                                              \
         &(o).rope_scaling,                                                                          \
         0,                                                                                          \
         0,                                                                                          \
         "none|linear|ntk|dynamic|yarn|llama3"},                                                     \
        {"rope-factor",                                                                              \
         "X",                                                                                        \
         "... by so much (context / original)",                                                      \
         OPTION_NUMBER,                                                                              \
         &(o).rope_factor,                                                                           \
         1,                                                                                          \
         1e6,                                                                                        \
         NULL},                                                                                      \
        {"rope-original",                                                                            \
         "N",                                                                                        \
         "... from so many tokens",                                                                  \
         OPTION_INT,                                                                                 \
         &(o).rope_original,                                                                         \
         1,                                                                                          \
         1e8,                                                                                        \
         NULL},                                                                                      \
    {                                                                                                \
        "mixers", "TEXT", "what each layer sees, repeating: window:64/causal, linear",               \
            OPTION_STRING, &(o).mixers, 0, 0, NULL                                                   \
    }

/* Rows for an option table: `o` is a struct tril_model_overrides, `f` a struct model_flags. */
#define MODEL_OPTIONS(o, f)                                                                          \
    {"layers", "L", "blocks", OPTION_INT, &(o).layers, 1, 1e6, NULL},                                \
        {"heads", "H", "query heads", OPTION_INT, &(o).heads, 1, 1e6, NULL},                         \
        {"kv-heads", "K", "key/value heads", OPTION_INT, &(o).kv_heads, 1, 1e6, NULL},               \
        {"head-dim", "N", "width of a head", OPTION_INT, &(o).head_dim, 1, 1e6, NULL},               \
        {"dim", "D", "width", OPTION_INT, &(o).dim, 1, 1e7, NULL},                                   \
        {"ffn", "F", "hidden width of the FFN", OPTION_INT, &(o).ffn, 1, 1e8, NULL},                 \
        {"context", "N", "longest sequence", OPTION_INT, &(o).context, 1, 1e8, NULL},                \
        {"norm", "KIND", "of a block", OPTION_CHOICE, &(o).norm, 0, 0, "layernorm|rmsnorm"},         \
        {"ffn-kind", "KIND", "of a block", OPTION_CHOICE, &(o).ffn_kind, 0, 0, "none|mlp|gated"},    \
        {"activation",                                                                               \
         "NAME",                                                                                     \
         "of the FFN",                                                                               \
         OPTION_CHOICE,                                                                              \
         &(o).activation,                                                                            \
         0,                                                                                          \
         0,                                                                                          \
         "relu|gelu|gelu-tanh|silu"},                                                                \
        {"position",    "KIND", "of tokens", OPTION_CHOICE,                                          \
         &(o).position, 0,      0,           "none|learned|rope|alibi"},                             \
        VIEW_OPTIONS(o),                                                                             \
        {"norm-eps", "X", "epsilon of the norms", OPTION_NUMBER, &(o).norm_eps, 0, 1, NULL},         \
        {"dropout", "P", "embeddings, attention, residual branches", OPTION_NUMBER, &(o).dropout, 0, \
         0.99,      NULL},                                                                           \
        {"tied", NULL, "the head is the token embedding", OPTION_FLAG, &(f).tied, 0, 0, NULL},       \
        {"untied", NULL, "the head has its own weights", OPTION_FLAG, &(f).untied, 0, 0, NULL},      \
        {"qk-norm", NULL, "RMSNorm on queries and keys", OPTION_FLAG, &(f).qk_norm, 0, 0, NULL}, {   \
        "no-bias", NULL, "no biases anywhere", OPTION_FLAG, &(f).no_bias, 0, 0, NULL                 \
    }

static inline void model_flags_apply(const struct model_flags *f, struct tril_model_overrides *o) {
    if (f->tied || f->untied)
        o->tied = f->tied;
    if (f->qk_norm)
        o->qk_norm = 1;
    if (f->no_bias)
        o->bias = 0;
}

#endif
