/* Configurations: presets, overrides, JSON both ways, what is refused and in which words; the
 * position tables; the tensor table's layout and names. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/file.h"
#include "model/config.h"
#include "model/table.h"

static struct tril_error err;

static struct model_config preset(const char *name) {
    struct model_config c;
    assert_int_equal(model_config_preset(&c, name, &err), TRIL_OK);
    assert_int_equal(model_config_check(&c, &err), TRIL_OK);
    return c;
}

/* Every field, except RoPE's where the model has none (they mean nothing then). */
static void configs_equal(const struct model_config *a, const struct model_config *b) {
#define SAME(field) assert_true(a->field == b->field)
    SAME(layers);
    SAME(dim);
    SAME(heads);
    SAME(kv_heads);
    SAME(head_dim);
    SAME(ffn);
    SAME(vocab);
    SAME(context);
    SAME(norm);
    SAME(norm_eps);
    SAME(final_norm);
    SAME(qk_norm);
    SAME(ffn_kind);
    SAME(activation);
    SAME(position);
    SAME(rope_dim);
    SAME(rope_scaling);
    if (a->position == POSITION_ROPE)
        SAME(rope_theta);
    if (a->rope_scaling != ROPE_PLAIN) {
        SAME(rope_factor);
        SAME(rope_original_context);
    }
    if (a->rope_scaling == ROPE_LLAMA3) {
        SAME(rope_low);
        SAME(rope_high);
    }
    if (a->rope_scaling == ROPE_YARN) {
        SAME(rope_beta_fast);
        SAME(rope_beta_slow);
    }
    SAME(rope_attention_factor);
    SAME(qkv_bias);
    SAME(attention_out_bias);
    SAME(ffn_bias);
    SAME(norm_bias);
    SAME(tied);
    SAME(scale_by_layer);
    SAME(scale_attention);
    SAME(dropout_embedding);
    SAME(dropout_attention);
    SAME(dropout_residual);
    SAME(init_std);
    SAME(bos_id);
    SAME(eos_id);
#undef SAME
}

/* Through text, as a file would. */
static void round_trip(const struct model_config *c, const char *type) {
    struct model_config back;
    json_t *o = model_config_to_json(c, DT_F32), *parsed;
    assert_string_equal(json_string_value(json_object_get(o, "model_type")), type);
    char *text = json_dumps(o, JSON_REAL_PRECISION(17));
    assert_int_equal(json_parse(&parsed, text, strlen(text), "config.json", &err), TRIL_OK);
    if (model_config_from_json(&back, parsed, "config.json", &err) != TRIL_OK)
        fail_msg("%s", err.message);
    configs_equal(c, &back);
    free(text);
    json_decref(o);
    json_decref(parsed);
}

static double parameters(const char *name) {
    struct model_config c = preset(name);
    struct param_table t;
    assert_int_equal(param_table_create(&t, &c, &err), TRIL_OK);
    double n = 0;
    for (int i = 0; i < t.count; i++)
        n += (double)(t.rows[i].shape[0] * t.rows[i].shape[1]);
    param_table_free(&t);
    return n;
}

static void test_presets(void **state) {
    (void)state;
    /* The published sizes. */
    assert_true(parameters("gpt2") == 124439808);
    assert_true(parameters("gpt2-medium") == 354823168);
    assert_true(parameters("gpt2-large") == 774030080);
    assert_true(parameters("gpt2-xl") == 1557611200);
    assert_true(parameters("llama-110m") == 109529856);
    assert_true(parameters("llama-1b") == 1235814400);
    assert_true(parameters("model3") == 50257 * 64 + 8 * 64 + 2 * 64 + 4 * 64 * 64);
    struct model_config c = preset("gpt2");
    round_trip(&c, "gpt2");
    c = preset("llama-1b");
    round_trip(&c, "llama");
    c = preset("llama-110m");
    round_trip(&c, "llama");
    c = preset("nano");
    round_trip(&c, "llama");
    c = preset("model3");
    round_trip(&c, "tril");
    assert_int_equal(model_config_preset(&c, "gpt9", &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "gpt2-xl"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
