/* Writing a model anew: in another dtype, with other settings, for other programs. */
#ifndef TRIL_EXPORT_H
#define TRIL_EXPORT_H

#include <stdbool.h>

#include "tril/config.h"
#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

struct tril_export_options {
    const char *model; /* a Hugging Face directory */
    const char *out;   /* the new one; made if missing, otherwise without a model in it */
    const char *dtype; /* of the weights: "fp32" (NULL), "bf16", "fp16" */
    const struct tril_model_overrides *overrides; /* as in eval.h; NULL: none */
    bool native; /* a model that `transformers` has no type for is written as tril's own type; else
                    it is refused, with the reason (ERR_UNSUPPORTED) */
};

/* Writes config.json, model.safetensors, generation_config.json and, if the model has one, the
 * tokenizer. `type` receives the model type written ("gpt2", "llama", ..., "tril"). */
tril_status tril_export(const struct tril_export_options *options, char type[32],
                        struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
