/* tril/config.h: presets; src/model/config.c has the overrides. */
#include "tril/config.h"

#include "model/config.h"

const char *tril_preset_names(void) {
    return model_config_preset_names();
}
