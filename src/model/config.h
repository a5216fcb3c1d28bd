/* A model's configuration: one choice per axis, never a copy of the block.
 *
 * config.json is read as `transformers` writes it for GPT-2 and Llama (and what follows them), and
 * as tril writes it for combinations that no such type covers (model_type "tril"). A field that
 * changes the computation and is not supported is refused by name. */
#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "base/json.h"
#include "model/mixer.h"
#include "ops/ops.h"
#include "tril/config.h"

enum norm_kind { NORM_LAYERNORM, NORM_RMSNORM };
enum ffn_kind { FFN_NONE, FFN_MLP, FFN_GATED };
enum position_kind { POSITION_NONE, POSITION_LEARNED, POSITION_ROPE, POSITION_ALIBI };
enum rope_scaling_kind { ROPE_PLAIN, ROPE_LINEAR, ROPE_NTK, ROPE_DYNAMIC, ROPE_YARN, ROPE_LLAMA3 };

/* Distinct mixers, and layers, that a configuration can hold. */
enum { MODEL_MOST_MIXERS = 16, MODEL_MOST_LAYERS = 4096 };

struct model_config {
    int64_t layers;   /* L */
    int64_t dim;      /* D */
    int64_t heads;    /* H */
    int64_t kv_heads; /* K, divides H */
    int64_t head_dim; /* d; H * d need not be D */
    int64_t ffn;      /* F; 0 with FFN_NONE */
    int64_t vocab;    /* V */
    int64_t context;  /* longest sequence */

    enum norm_kind norm;
    float norm_eps;
    bool final_norm; /* model 3 has none */
    bool qk_norm;    /* RMSNorm over d of q and k, before RoPE */

    enum ffn_kind ffn_kind;
    enum activation activation; /* of the MLP, or of the gate */

    enum position_kind position;
    float rope_theta;
    int64_t rope_dim; /* channels of a head that rotate (2R); head_dim: all */
    enum rope_scaling_kind rope_scaling;
    float rope_factor, rope_low, rope_high, rope_beta_fast, rope_beta_slow, rope_attention_factor;
    int64_t rope_original_context;

    bool qkv_bias, attention_out_bias, ffn_bias, norm_bias;
    bool tied;            /* the head is the token embedding */
    bool scale_by_layer;  /* GPT-2's scale_attn_by_inverse_layer_idx */
    bool scale_attention; /* false: scores are not divided by sqrt(d) */
    /* Dropout probabilities, training only: of the embeddings, of the attention weights, and of
     * what each branch adds to the residual stream. */
    float dropout_embedding, dropout_attention, dropout_residual;
    float init_std; /* 0.02; residual projections get init_std / sqrt(2 L) */

    int64_t bos_id, eos_id; /* -1: none */

    /* Layer l mixes by mixers[layer_mixer[l]]; zeros: causal attention everywhere. */
    struct mixer_config mixers[MODEL_MOST_MIXERS];
    uint8_t layer_mixer[MODEL_MOST_LAYERS];
};

static inline const struct mixer_config *model_mixer(const struct model_config *c, int64_t layer) {
    return &c->mixers[c->layer_mixer[layer]];
}
/* Whether every layer is plain causal attention. */
bool model_mixers_plain(const struct model_config *c);
/* How many of c->mixers are in use: they are numbered by their first layer. */
int model_mixer_count(const struct model_config *c);
/* The first mixer of a kind, or NULL: layers that recall agree in segment, and in keep by kind. */
const struct mixer_config *model_recalls(const struct model_config *c, enum mixer_kind kind);
/* Gives the layers (c->layers of them) the mixers of a pattern that repeats. */
tril_status model_config_set_mixers(struct model_config *c, const struct mixer_config *pattern,
                                    int64_t count, struct tril_error *err);
/* The same from text: "window:256/causal". */
tril_status model_config_parse_mixers(struct model_config *c, const char *text,
                                      struct tril_error *err);
/* The shortest pattern that repeats to what the layers have: its length. */
int64_t model_mixer_period(const struct model_config *c);

/* Whether training drops anything. */
static inline bool model_config_drops(const struct model_config *c) {
    return c->dropout_embedding > 0 || c->dropout_attention > 0 || c->dropout_residual > 0;
}

/* Presets: model3, nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-110m, llama-1b. */
tril_status model_config_preset(struct model_config *c, const char *name, struct tril_error *err);
/* "model3, nano, gpt2, ...": for messages and --help. */
const char *model_config_preset_names(void);

/* Overrides from the command line; see tril/config.h. */
tril_status model_config_override(struct model_config *c, const struct tril_model_overrides *o,
                                  struct tril_error *err);

/* Ranges, divisibility, sizes that overflow; names the field. */
tril_status model_config_check(const struct model_config *c, struct tril_error *err);

/* `where` is the file's name, for messages. */
tril_status model_config_from_json(struct model_config *c, const json_t *root, const char *where,
                                   struct tril_error *err);
tril_status model_config_read(struct model_config *c, const char *dir_or_file,
                              struct tril_error *err);
/* The Hugging Face model type that holds this configuration exactly: "gpt2", "llama", "mistral",
 * "qwen2", "qwen3", "smollm3", or "tril" if none does; then *reason (may be NULL) says why. */
const char *model_config_type(const struct model_config *c, const char **reason);
/* A new JSON object as config.json holds it (dtype: the dtype of the saved weights). */
json_t *model_config_to_json(const struct model_config *c, enum dtype saved);

/* cos and sin tables [C, R] fp32 for RoPE with its scaling and attention factor, computed in
 * double. Sources: Su 2021; linear, NTK-aware, dynamic NTK; YaRN (Peng 2023); Llama 3. */
void model_rope_table(const struct model_config *c, int64_t positions, float *cos, float *sin);
/* The same with a mixer's own theta, unscaled. */
void model_rope_table_plain(const struct model_config *c, double theta, int64_t positions,
                            float *cos, float *sin);
/* YaRN's attention factor (Peng 2023) for a scale s: 0.1 m ln s + 1. */
double model_yarn_scale(double s, double m);
/* ALiBi slopes [H] (Press 2022), any number of heads. */
void model_alibi_slopes(int64_t heads, float *slopes);

#endif
