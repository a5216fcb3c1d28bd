/* config.json: refused in one sentence, or a configuration within all limits that survives writing
 * and reading, and whose table of parameters can be made. */
#include <stdlib.h>
#include <string.h>

#include "model/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    json_t *root = NULL, *written = NULL, *again = NULL;
    struct model_config c, back;
    struct tril_error err = {.message = ""};
    if (json_parse(&root, (const char *)data, size, "fuzz", &err) != TRIL_OK)
        return 0;
    tril_status st = model_config_from_json(&c, root, "fuzz", &err);
    if (st != TRIL_OK) {
        if (err.code != st || !err.message[0] || strchr(err.message, '\n'))
            abort();
        goto done;
    }
    if (model_config_check(&c, &err) != TRIL_OK)
        abort();
    written = model_config_to_json(&c, DT_F32);
    if (!written || model_config_from_json(&back, written, "fuzz", &err) != TRIL_OK)
        abort();
    again = model_config_to_json(&back, DT_F32);
    if (!json_equal(written, again) ||
        strcmp(model_config_type(&c, NULL), model_config_type(&back, NULL)) != 0)
        abort();
    struct param_table t;
    if (param_table_create(&t, &c, &err) == TRIL_OK) {
        struct model_counts n;
        model_count(&c, c.context, &n);
        if (!(n.total > 0 && n.total <= (double)t.elements))
            abort();
        param_table_free(&t);
    }
done:
    json_decref(root);
    json_decref(written);
    json_decref(again);
    return 0;
}
