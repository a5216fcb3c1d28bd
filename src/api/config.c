/* tril/config.h: presets and overrides. */
#include "tril/config.h"

#include "model/config.h"

struct tril_model_overrides tril_model_overrides_none(void) {
    return (struct tril_model_overrides){.layers = -1,
                                         .dim = -1,
                                         .heads = -1,
                                         .kv_heads = -1,
                                         .head_dim = -1,
                                         .ffn = -1,
                                         .vocab = -1,
                                         .context = -1,
                                         .dropout = -1,
                                         .rope_theta = -1,
                                         .norm_eps = -1,
                                         .rope_share = -1,
                                         .rope_factor = -1,
                                         .rope_original = -1,
                                         .tied = -1,
                                         .qk_norm = -1,
                                         .bias = -1};
}

const char *tril_preset_names(void) {
    return model_config_preset_names();
}
