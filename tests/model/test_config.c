/* Configurations: presets, overrides, JSON both ways, what is refused and in which words; the
 * position tables; the tensor table's layout and names. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "models.h"
#include "tril/config.h"

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

/* A literal as the reader sees a file. */
static tril_status read_text(struct model_config *c, const char *text) {
    json_t *o;
    OK(json_parse(&o, text, strlen(text), "x/config.json", &err));
    err.message[0] = 0;
    tril_status st = model_config_from_json(c, o, "x/config.json", &err);
    json_decref(o);
    return st;
}

static void read_golden(struct model_config *c, const char *version, const char *name) {
    char path[512];
    snprintf(path, sizeof path, "%s/config/transformers-%s/%s.json", TEST_GOLDEN_DIR, version,
             name);
    OK(model_config_read(c, path, &err));
}

/* What transformers 4.57 and 5 write is read, in the same meaning, and survives our own writing. */
static void test_transformers(void **state) {
    (void)state;
    static const char *const names[][2] =
        {
            {"gpt2", "gpt2"},     {"gpt2-changed", "gpt2"}, {"llama", "llama"},
            {"llama3", "llama"},  {"yarn", "llama"},        {"llama-changed", "llama"},
            {"mistral", "llama"}, /* the same computation */
            {"qwen2", "qwen2"},   {"qwen3", "qwen3"},
        };
    struct model_config c, old;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        read_golden(&old, "4", names[i][0]);
        read_golden(&c, "5", names[i][0]);
        configs_equal(&old, &c);
        round_trip(&c, names[i][1]);
    }
    struct model_config gpt2 = preset("gpt2");
    gpt2.dropout_embedding = gpt2.dropout_attention = gpt2.dropout_residual = 0.1f;
    read_golden(&c, "5", "gpt2");
    configs_equal(&gpt2, &c);

    read_golden(&c, "5", "gpt2-changed");
    assert_int_equal(c.ffn, 24);
    assert_int_equal(c.context, 32);
    assert_int_equal(c.activation, ACT_RELU);
    assert_true(c.norm_eps == 1e-6f && !c.scale_attention && c.scale_by_layer && !c.tied);
    assert_true(c.dropout_embedding == 0.05f && c.dropout_attention == 0.2f);
    assert_true(c.dropout_residual == 0 && c.bos_id == 3 && c.eos_id == -1);

    read_golden(&c, "5", "llama-changed");
    assert_int_equal(c.kv_heads, 2);
    assert_int_equal(c.head_dim, 6);
    assert_int_equal(c.activation, ACT_GELU_ERF);
    assert_true(c.qkv_bias && c.attention_out_bias && c.ffn_bias && c.tied && c.norm_eps == 1e-5f);
    assert_true(c.rope_scaling == ROPE_LINEAR && c.rope_factor == 2 && c.rope_theta == 1000);
    assert_true(c.eos_id == 5 && c.dropout_attention == 0.1f && c.dropout_residual == 0);

    read_golden(&c, "4", "llama3");
    assert_true(c.rope_scaling == ROPE_LLAMA3 && c.rope_factor == 8 && c.rope_low == 1 &&
                c.rope_high == 4 && c.rope_original_context == 32 && c.rope_theta == 500000);
    read_golden(&c, "4", "yarn");
    assert_true(c.rope_scaling == ROPE_YARN && c.rope_original_context == 32);
    assert_true(fabs(c.rope_attention_factor - (0.1 * log(2) + 1)) < 1e-6);
    read_golden(&c, "4", "qwen2");
    assert_true(c.qkv_bias && !c.attention_out_bias && !c.qk_norm && c.bos_id == -1);
    read_golden(&c, "5", "qwen3");
    assert_true(!c.qkv_bias && c.qk_norm && c.head_dim == 8);

    for (int v = 4; v <= 5; v++) {
        const char *version = v == 4 ? "4" : "5";
        read_golden(&c, version, "mistral-window");
        for (int64_t l = 0; l < c.layers; l++)
            assert_string_equal(model_mixer(&c, l)->rules, "window:16");
        read_golden(&c, version, "qwen2-window");
        assert_string_equal(model_mixer(&c, 0)->rules, "");
        assert_string_equal(model_mixer(&c, c.layers - 1)->rules, "window:16");
        read_golden(&c, version, "smollm3"); /* its layers without RoPE are the local ones */
        assert_true(c.rope_theta == 5000 && c.tied);
        assert_true(!model_mixer(&c, 0)->no_position && model_mixer(&c, 1)->no_position);
        assert_string_equal(model_mixer(&c, 0)->rules, "");
        assert_string_equal(model_mixer(&c, 1)->rules, "window:16");
    }
}

#define GPT2                                                                                       \
    "\"model_type\":\"gpt2\",\"n_layer\":2,\"n_embd\":16,\"n_head\":2,\"n_positions\":32,"         \
    "\"vocab_size\":64"
#define LLAMA                                                                                      \
    "\"model_type\":\"llama\",\"num_hidden_layers\":2,\"hidden_size\":16,"                         \
    "\"intermediate_size\":24,\"num_attention_heads\":4,\"max_position_embeddings\":64,"           \
    "\"vocab_size\":64"
#define QWEN3                                                                                      \
    "\"model_type\":\"qwen3\",\"num_hidden_layers\":2,\"hidden_size\":16,"                         \
    "\"intermediate_size\":24,\"num_attention_heads\":4,\"num_key_value_heads\":4,"                \
    "\"max_position_embeddings\":64,\"vocab_size\":64"
#define MISTRAL                                                                                    \
    "\"model_type\":\"mistral\",\"num_hidden_layers\":2,\"hidden_size\":16,"                       \
    "\"intermediate_size\":24,\"num_attention_heads\":4,\"num_key_value_heads\":4,"                \
    "\"max_position_embeddings\":64,\"vocab_size\":64"
#define TRIL                                                                                       \
    "\"model_type\":\"tril\",\"num_hidden_layers\":2,\"hidden_size\":16,"                          \
    "\"intermediate_size\":24,\"num_attention_heads\":4,\"num_key_value_heads\":4,"                \
    "\"head_dim\":4,\"max_position_embeddings\":64,\"vocab_size\":64,\"norm\":\"rmsnorm\""

static void test_refusals(void **state) {
    (void)state;
    static const struct {
        const char *text;
        tril_status due;
        const char *words;
    } cases[] = {
        {"[]", TRIL_ERR_FORMAT, "an object"},
        {"3", TRIL_ERR_FORMAT, "an object"},
        {"{}", TRIL_ERR_FORMAT, "\"model_type\" is missing"},
        {"{\"model_type\":7}", TRIL_ERR_FORMAT, "must be a string"},
        {"{\"model_type\":\"bert\"}", TRIL_ERR_UNSUPPORTED, "\"bert\" is not supported"},
        {"{\"model_type\":\"gpt2\"}", TRIL_ERR_FORMAT, "\"n_layer\" is missing"},
        {"{\"model_type\":\"llama\"}", TRIL_ERR_FORMAT, "\"num_hidden_layers\" is missing"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":null}", TRIL_ERR_FORMAT, "is missing"},
        {"{\"model_type\":\"tril\"}", TRIL_ERR_FORMAT, "is missing"},
        /* numbers */
        {"{\"model_type\":\"gpt2\",\"n_layer\":0}", TRIL_ERR_FORMAT, "\"n_layer\" is 0"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":-1}", TRIL_ERR_FORMAT, "from 1 to 4096"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":5000}", TRIL_ERR_FORMAT, "from 1 to 4096"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":1.5}", TRIL_ERR_FORMAT, "an integer"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":\"2\"}", TRIL_ERR_FORMAT, "an integer"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":1e300}", TRIL_ERR_FORMAT, "an integer"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":99999999999999999999}", TRIL_ERR_FORMAT, "n_layer"},
        {"{" GPT2 ",\"n_inner\":0}", TRIL_ERR_FORMAT, "n_inner"},
        {"{" GPT2 ",\"layer_norm_epsilon\":0}", TRIL_ERR_FORMAT, "layer_norm_epsilon"},
        {"{" GPT2 ",\"layer_norm_epsilon\":-1e-5}", TRIL_ERR_FORMAT, "layer_norm_epsilon"},
        {"{" GPT2 ",\"layer_norm_epsilon\":\"1e-5\"}", TRIL_ERR_FORMAT, "a number"},
        {"{" GPT2 ",\"attn_pdrop\":1.5}", TRIL_ERR_FORMAT, "attn_pdrop"},
        {"{" GPT2 ",\"resid_pdrop\":-0.1}", TRIL_ERR_FORMAT, "resid_pdrop"},
        {"{" GPT2 ",\"bos_token_id\":\"<s>\"}", TRIL_ERR_FORMAT, "bos_token_id"},
        {"{" GPT2 ",\"eos_token_id\":[\"a\"]}", TRIL_ERR_FORMAT, "eos_token_id"},
        {"{" GPT2 ",\"initializer_range\":-1}", TRIL_ERR_FORMAT, "initializer_range"},
        {"{\"model_type\":\"gpt2\",\"n_layer\":2,\"n_embd\":16,\"n_head\":3,\"n_positions\":32,"
         "\"vocab_size\":64}",
         TRIL_ERR_FORMAT, "not divisible by the 3 of \"n_head\""},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":2,\"hidden_size\":16,"
         "\"intermediate_size\":24,\"num_attention_heads\":5,\"max_position_embeddings\":64,"
         "\"vocab_size\":64}",
         TRIL_ERR_FORMAT, "not divisible by the 5 of \"num_attention_heads\""},
        {"{" LLAMA ",\"num_key_value_heads\":3}", TRIL_ERR_FORMAT, "must divide"},
        {"{" LLAMA ",\"num_key_value_heads\":8}", TRIL_ERR_FORMAT, "must divide"},
        {"{" LLAMA ",\"num_key_value_heads\":0}", TRIL_ERR_FORMAT, "num_key_value_heads"},
        {"{" LLAMA ",\"head_dim\":5}", TRIL_ERR_FORMAT, "pairs of channels"},
        {"{" LLAMA ",\"head_dim\":70000}", TRIL_ERR_FORMAT, "head_dim"},
        {"{" LLAMA ",\"rms_norm_eps\":2}", TRIL_ERR_FORMAT, "rms_norm_eps"},
        {"{" LLAMA ",\"rope_theta\":0}", TRIL_ERR_FORMAT, "rope_theta"},
        {"{" LLAMA ",\"rope_theta\":-1}", TRIL_ERR_FORMAT, "rope_theta"},
        {"{" LLAMA ",\"tie_word_embeddings\":1}", TRIL_ERR_FORMAT, "true or false"},
        /* fields that would change the computation */
        {"{" GPT2 ",\"activation_function\":\"quick_gelu\"}", TRIL_ERR_UNSUPPORTED, "quick_gelu"},
        {"{" LLAMA ",\"hidden_act\":\"relu2\"}", TRIL_ERR_UNSUPPORTED, "\"hidden_act\" is"},
        {"{" GPT2 ",\"add_cross_attention\":true}", TRIL_ERR_UNSUPPORTED, "add_cross_attention"},
        {"{" GPT2 ",\"pruned_heads\":{\"0\":[1]}}", TRIL_ERR_UNSUPPORTED, "pruned_heads"},
        {"{" LLAMA ",\"quantization_config\":{\"bits\":4}}", TRIL_ERR_UNSUPPORTED,
         "quantization_config"},
        {"{" LLAMA ",\"partial_rotary_factor\":0.5}", TRIL_ERR_UNSUPPORTED,
         "partial_rotary_factor"},
        {"{" LLAMA ",\"sliding_window\":32}", TRIL_ERR_UNSUPPORTED, "sliding_window"},
        {"{" LLAMA ",\"num_local_experts\":8}", TRIL_ERR_UNSUPPORTED, "num_local_experts"},
        {"{" LLAMA ",\"final_logit_softcapping\":30.0}", TRIL_ERR_UNSUPPORTED, "softcapping"},
        {"{" LLAMA ",\"logits_scaling\":8}", TRIL_ERR_UNSUPPORTED, "logits_scaling"},
        {"{" LLAMA ",\"no_rope_layers\":[1,0]}", TRIL_ERR_UNSUPPORTED, "no_rope_layers"},
        {"{" LLAMA ",\"dtype\":\"float8_e4m3fn\"}", TRIL_ERR_UNSUPPORTED, "float8_e4m3fn"},
        {"{" LLAMA ",\"torch_dtype\":\"int8\"}", TRIL_ERR_UNSUPPORTED, "int8"},
        {"{" LLAMA ",\"layer_types\":[\"full_attention\",\"linear_attention\"]}",
         TRIL_ERR_UNSUPPORTED, "layer_types"},
        {"{" LLAMA ",\"layer_types\":[\"full_attention\"]}", TRIL_ERR_FORMAT, "one per layer"},
        {"{" MISTRAL ",\"layer_types\":[\"full_attention\",\"sliding_attention\"],"
         "\"sliding_window\":8}",
         TRIL_ERR_UNSUPPORTED, "layer_types"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"none\",\"mixers\":\"window:4\"}",
         TRIL_ERR_FORMAT, "list of texts"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"none\",\"mixers\":[\"widow:4\"]}",
         TRIL_ERR_ARGUMENT, "widow"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"none\",\"mixers\":[\"full\"]}", TRIL_ERR_FORMAT,
         "own future"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"none\",\"mixers\":[\"linear window:4\"]}",
         TRIL_ERR_FORMAT, "no scores"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"none\",\"mixers\":[\"theta=50\"]}",
         TRIL_ERR_FORMAT, "does not rotate"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"none\",\"mixers\":[\"softcap=-1\"]}",
         TRIL_ERR_ARGUMENT, "above 0"},
        {"{" QWEN3 ",\"layer_types\":[\"full_attention\",\"sliding_attention\"]}",
         TRIL_ERR_UNSUPPORTED, "layer_types"},
        {"{" MISTRAL ",\"attention_bias\":true}", TRIL_ERR_UNSUPPORTED, "attention_bias"},
        {"{" QWEN3 ",\"mlp_bias\":true}", TRIL_ERR_UNSUPPORTED, "mlp_bias"},
        /* RoPE, in both spellings */
        {"{" LLAMA ",\"rope_scaling\":3}", TRIL_ERR_FORMAT, "must be an object"},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"longrope\",\"factor\":2}}", TRIL_ERR_UNSUPPORTED,
         "longrope"},
        {"{" LLAMA ",\"rope_scaling\":{\"rope_type\":\"ntk\",\"factor\":2}}", TRIL_ERR_UNSUPPORTED,
         "\"ntk\""},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"linear\"}}", TRIL_ERR_FORMAT, "\"factor\""},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}}", TRIL_ERR_FORMAT,
         "\"factor\" is 0"},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"llama3\",\"factor\":2}}", TRIL_ERR_FORMAT,
         "low_freq_factor"},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"llama3\",\"factor\":2,\"low_freq_factor\":4,"
         "\"high_freq_factor\":1,\"original_max_position_embeddings\":32}}",
         TRIL_ERR_FORMAT, "high frequency factor"},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2,\"alpha\":1}}",
         TRIL_ERR_UNSUPPORTED, "rope_scaling.alpha"},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2,"
         "\"attention_factor\":2}}",
         TRIL_ERR_UNSUPPORTED, "attention_factor"},
        {"{" LLAMA ",\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":2,"
         "\"truncate\":false}}",
         TRIL_ERR_UNSUPPORTED, "truncate"},
        {"{" LLAMA ",\"rope_parameters\":{\"full_attention\":{\"rope_theta\":1e4}}}",
         TRIL_ERR_UNSUPPORTED, "rope_parameters.full_attention"},
        {"{" LLAMA ",\"rope_parameters\":{\"partial_rotary_factor\":0.5}}", TRIL_ERR_UNSUPPORTED,
         "partial_rotary_factor"},
        {"{" LLAMA ",\"rope_parameters\":{\"rotary_dim\":2}}", TRIL_ERR_UNSUPPORTED, "rotary_dim"},
        {"{" LLAMA ",\"rope_theta\":500000,\"rope_parameters\":{\"rope_theta\":10000.0}}",
         TRIL_ERR_FORMAT, "contradicts \"rope_theta\""},
        {"{" LLAMA ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":2},"
         "\"rope_parameters\":{\"rope_type\":\"linear\",\"factor\":4}}",
         TRIL_ERR_FORMAT, "contradicts \"rope_scaling\""},
        /* tril's own type knows its fields */
        {"{" TRIL ",\"ffn\":\"gated\",\"position\":\"alibi\",\"window\":3}", TRIL_ERR_UNSUPPORTED,
         "\"window\" is not a field"},
        {"{" TRIL ",\"ffn\":\"gated\",\"position\":\"spiral\"}", TRIL_ERR_UNSUPPORTED, "spiral"},
        {"{" TRIL ",\"ffn\":\"gated\"}", TRIL_ERR_FORMAT, "\"position\" is missing"},
        {"{" TRIL ",\"ffn\":\"gated\",\"position\":\"alibi\",\"norm_bias\":true}", TRIL_ERR_FORMAT,
         "RMSNorm has no bias"},
        {"{" TRIL ",\"ffn\":\"none\",\"position\":\"none\",\"ffn_bias\":true}", TRIL_ERR_FORMAT,
         "without FFN"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"rope\",\"rope_parameters\":{"
         "\"rotary_dim\":3}}",
         TRIL_ERR_FORMAT, "pairs of channels"},
        {"{" TRIL ",\"ffn\":\"mlp\",\"position\":\"rope\",\"rope_parameters\":{"
         "\"rotary_dim\":6}}",
         TRIL_ERR_FORMAT, "rotary_dim"},
    };
    struct model_config c;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tril_status st = read_text(&c, cases[i].text);
        if (st != cases[i].due || !strstr(err.message, cases[i].words))
            fail_msg("%s gives %d: %s", cases[i].text, st, err.message);
        assert_int_equal(err.code, st);
        assert_non_null(strstr(err.message, "x/config.json"));
        assert_null(strchr(err.message, '\n'));
    }
    assert_int_equal(model_config_read(&c, test_path("nothing"), &err), TRIL_ERR_IO);
    assert_int_equal(model_config_read(&c, test_dir(), &err), TRIL_ERR_IO);
    assert_non_null(strstr(err.message, "config.json"));
    OK(file_write_atomic(test_path("config.json"), "{\"a\":", 5, &err));
    assert_int_equal(model_config_read(&c, test_dir(), &err), TRIL_ERR_FORMAT);
}

static void test_accepted(void **state) {
    (void)state;
    static const char *const texts[] = {
        "{" GPT2 "}",
        "{" GPT2 ",\"n_ctx\":1024,\"task_specific_params\":{},\"unheard_of\":[1]}",
        "{" GPT2 ",\"reorder_and_upcast_attn\":true,\"activation_function\":\"gelu_fast\"}",
        "{" GPT2 ",\"n_inner\":null,\"n_layer_\":3,\"torch_dtype\":\"float16\"}",
        "{" LLAMA ",\"sliding_window\":64,\"pretraining_tp\":2}",
        "{" LLAMA ",\"sliding_window\":null,\"num_key_value_heads\":null,\"head_dim\":null}",
        "{" LLAMA ",\"rope_scaling\":{\"type\":\"default\"},\"dtype\":\"bfloat16\"}",
        "{" LLAMA ",\"rope_theta\":500.0,\"rope_parameters\":{\"rope_theta\":500}}",
        "{" LLAMA ",\"num_local_experts\":0,\"logit_scale\":1.0,\"partial_rotary_factor\":1}",
        "{" LLAMA ",\"layer_types\":[\"full_attention\",\"full_attention\"]}",
        "{" MISTRAL ",\"sliding_window\":4096}",
        "{" QWEN3 ",\"use_sliding_window\":false,\"sliding_window\":8}",
        "{" QWEN3 ",\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":2}",
        "{" QWEN3 ",\"use_sliding_window\":true,\"sliding_window\":99,"
        "\"layer_types\":[\"full_attention\",\"sliding_attention\"]}",
        "{" TRIL ",\"ffn\":\"none\",\"position\":\"none\",\"hidden_act\":null}",
        "{" TRIL ",\"ffn\":\"gated\",\"position\":\"alibi\"}",
        "{" TRIL ",\"ffn\":\"mlp\",\"position\":\"rope\"}",
    };
    struct model_config c;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (read_text(&c, texts[i]) != TRIL_OK)
            fail_msg("%s: %s", texts[i], err.message);
    OK(read_text(&c, texts[0])); /* transformers' defaults */
    assert_int_equal(c.ffn, 64);
    assert_true(c.activation == ACT_GELU_TANH && c.tied && c.norm_eps == 1e-5f);
    assert_true(c.dropout_residual == 0.1f && c.bos_id == -1 && c.init_std == 0.02f);
    OK(read_text(&c, "{" LLAMA "}"));
    assert_true(c.kv_heads == 4 && c.head_dim == 4 && c.rope_theta == 10000 && !c.tied);
    assert_true(c.norm_eps == 1e-6f && c.activation == ACT_SILU && c.bos_id == 1 && c.eos_id == 2);
    /* YaRN's mscale pair, and its factor from the contexts where it is null. */
    OK(read_text(&c, "{" LLAMA ",\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":null,"
                     "\"original_max_position_embeddings\":16,\"mscale\":1.0,"
                     "\"mscale_all_dim\":0.5}}"));
    assert_true(c.rope_factor == 4);
    assert_true(fabs(c.rope_attention_factor - (0.1 * log(4) + 1) / (0.05 * log(4) + 1)) < 1e-6);
}

/* Every choice on every axis that the checker allows is written and read back unchanged, and its
 * tensor table is sound. */
static void table_check(const struct model_config *c) {
    struct param_table t;
    OK(param_table_create(&t, c, &err));
    assert_int_equal(t.elements % 16, 0);
    int64_t elements = 0, decayed = 0;
    for (int i = 0; i < t.count; i++) {
        const struct param_row *r = &t.rows[i];
        int64_t n = r->shape[0] * r->shape[1], room = (n + 15) / 16 * 16, covered = 0;
        assert_ptr_equal(param_find(&t, r->role, r->layer), r);
        assert_int_equal(r->offset % 16, 0);
        assert_true(r->decay == (r->rank == 2) && r->matrix == r->decay);
        assert_true(r->decay ? r->offset + n <= t.decay_elements : r->offset >= t.decay_elements);
        assert_true(r->offset + room <= t.elements);
        assert_true(r->init == (r->rank == 2 ? INIT_NORMAL : r->init));
        elements += room;
        decayed += r->decay ? room : 0;
        for (int k = 0; k < r->part_count; k++) {
            assert_int_equal(r->parts[k].row_begin, covered);
            covered += r->parts[k].row_count;
            for (int j = 0; j <= i; j++) /* names are unique */
                for (int l = 0; l < t.rows[j].part_count; l++)
                    assert_true((j == i && l == k) ||
                                strcmp(r->parts[k].name, t.rows[j].parts[l].name) != 0);
        }
        assert_int_equal(covered, r->shape[0]);
        for (int j = 0; j < i; j++) { /* rows do not overlap */
            const struct param_row *o = &t.rows[j];
            assert_true(o->offset + o->shape[0] * o->shape[1] <= r->offset ||
                        r->offset + n <= o->offset);
        }
    }
    assert_int_equal(elements, t.elements);
    assert_int_equal(decayed, t.decay_elements);
    assert_null(param_find(&t, PARAM_QKV, -1));
    assert_null(param_find(&t, PARAM_QKV, (int)c->layers));
    assert_null(param_find(&t, PARAM_TOKEN_EMBEDDING, 0));
    assert_true((param_find(&t, PARAM_HEAD, -1) == NULL) == c->tied);
    struct model_counts n;
    model_count(c, 16, &n);
    double total = 0;
    for (int i = 0; i < t.count; i++)
        total += (double)(t.rows[i].shape[0] * t.rows[i].shape[1]);
    assert_true(n.total == total);
    param_table_free(&t);
}

static void test_every_choice(void **state) {
    (void)state;
    int seen = 0;
    for (int bits = 0; bits < 1 << 13; bits++) {
        struct model_config c = tiny_gpt2();
        c.heads = 2;
        c.kv_heads = bits & 1 ? 1 : 2;
        c.head_dim = 6;
        c.norm = bits & 2 ? NORM_RMSNORM : NORM_LAYERNORM;
        c.norm_bias = bits & 4;
        c.final_norm = bits & 8;
        c.qk_norm = bits & 16;
        c.qkv_bias = bits & 32;
        c.attention_out_bias = bits & 64;
        c.ffn_bias = bits & 128;
        c.tied = bits & 256;
        c.position = (enum position_kind)(bits >> 9 & 3);
        c.ffn_kind = (enum ffn_kind)(bits >> 11 & 3);
        c.activation = c.ffn_kind == FFN_NONE ? ACT_NONE : (enum activation)(1 + bits % 4);
        c.ffn = c.ffn_kind == FFN_NONE ? 0 : 20;
        c.rope_factor = c.rope_attention_factor = 1;
        c.rope_theta = 10000;
        c.rope_dim = c.position != POSITION_ROPE ? 0 : bits & 1 ? 6 : 4;
        if (model_config_check(&c, &err) != TRIL_OK)
            continue;
        round_trip(&c, model_config_type(&c, NULL));
        if (bits % 7 == 0)
            table_check(&c);
        seen++;
    }
    assert_true(seen > 1000);
    for (int i = 0; i < VARIANTS; i++) {
        const char *name;
        struct model_config c = variant(i, &name);
        table_check(&c);
    }
    /* RoPE's scalings: static NTK and odd dynamic NTK exist in tril's own type alone. */
    for (int kind = ROPE_PLAIN; kind <= ROPE_LLAMA3; kind++) {
        struct model_config c = tiny_llama();
        c.rope_scaling = (enum rope_scaling_kind)kind;
        c.rope_factor = 2.5f;
        c.rope_original_context = kind >= ROPE_DYNAMIC ? 8 : 0;
        c.rope_low = 1;
        c.rope_high = 4;
        c.rope_beta_fast = 30;
        c.rope_beta_slow = 1.5f;
        c.rope_attention_factor = kind == ROPE_YARN ? 1.25f : 1;
        round_trip(&c, kind == ROPE_NTK || kind == ROPE_DYNAMIC ? "tril" : "llama");
        c.rope_original_context = kind >= ROPE_DYNAMIC ? c.context : 0;
        round_trip(&c, kind == ROPE_NTK ? "tril" : "llama");
        c.rope_attention_factor = 1.5f;
        round_trip(&c, kind == ROPE_YARN ? "llama" : "tril");
    }
    struct model_config c = tiny_llama();
    c.dropout_embedding = 0.1f;
    c.dropout_attention = 0.2f;
    c.dropout_residual = 0.3f;
    c.bos_id = 3;
    round_trip(&c, "llama");
    c.dim = 14; /* which 4 heads do not divide */
    round_trip(&c, "mistral");
}

static void test_overrides(void **state) {
    (void)state;
    struct tril_model_overrides o = tril_model_overrides_none();
    struct model_config c = preset("gpt2"), before = c;
    OK(model_config_override(&c, &o, &err));
    assert_memory_equal(&c, &before, sizeof c);

    o.dim = 384;
    o.heads = 6;
    o.layers = 3;
    OK(model_config_override(&c, &o, &err));
    assert_true(c.kv_heads == 6 && c.head_dim == 64 && c.ffn == 1536 && c.layers == 3);

    c = preset("llama-1b"); /* 4 heads to a group */
    o = tril_model_overrides_none();
    o.heads = 16;
    OK(model_config_override(&c, &o, &err));
    assert_true(c.kv_heads == 4 && c.head_dim == 128 && c.rope_dim == 128 && c.ffn == 8192);
    o.heads = 2;
    OK(model_config_override(&c, &o, &err));
    assert_true(c.kv_heads == 2 && c.head_dim == 1024);

    c = preset("llama-110m");
    o = tril_model_overrides_none();
    o.dim = 384;
    OK(model_config_override(&c, &o, &err));
    assert_true(c.ffn == 1024 && c.head_dim == 32 && c.rope_dim == 32);
    c = preset("llama-110m");
    o.dim = 128; /* 341.3 becomes whole tiles; 12 heads do not divide 128 */
    assert_int_equal(model_config_override(&c, &o, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "128 is not divisible by 12 heads"));
    o.heads = 4;
    o.kv_heads = 2;
    OK(model_config_override(&c, &o, &err));
    assert_true(c.ffn == 384 && c.kv_heads == 2);
    o.head_dim = 48;
    o.ffn = 100;
    OK(model_config_override(&c, &o, &err));
    assert_true(c.head_dim == 48 && c.rope_dim == 48 && c.ffn == 100);

    c = preset("nano");
    o = tril_model_overrides_none();
    o.norm = "layernorm";
    o.ffn_kind = "mlp";
    o.position = "learned";
    OK(model_config_override(&c, &o, &err));
    assert_true(c.norm == NORM_LAYERNORM && c.norm_bias && c.ffn == 1024 && c.rope_dim == 0 &&
                c.activation == ACT_GELU_TANH && c.position == POSITION_LEARNED);
    o = tril_model_overrides_none();
    o.bias = 1;
    OK(model_config_override(&c, &o, &err));
    assert_string_equal(model_config_type(&c, NULL), "gpt2");
    o.bias = 0;
    o.activation = "relu";
    o.ffn_kind = "gated";
    o.position = "rope";
    o.tied = 0;
    o.qk_norm = 1;
    o.dropout = 0.25;
    o.rope_theta = 500;
    o.norm_eps = 1e-3;
    OK(model_config_override(&c, &o, &err));
    assert_true(!c.norm_bias && !c.ffn_bias && c.activation == ACT_RELU && c.rope_dim == 64 &&
                c.ffn == 704 && !c.tied && c.qk_norm && c.dropout_attention == 0.25f &&
                c.rope_theta == 500 && c.norm_eps == 1e-3f);
    o = tril_model_overrides_none();
    o.ffn_kind = "none";
    OK(model_config_override(&c, &o, &err));
    assert_true(c.ffn == 0 && c.activation == ACT_NONE);

    static const struct {
        struct {
            const char *norm, *ffn, *activation, *position;
        } choice;
        int64_t dim, heads, kv_heads, vocab, layers;
        const char *words;
    } bad[] = {
        {{.norm = "batchnorm"}, -1, -1, -1, -1, -1, "batchnorm"},
        {{.ffn = "moe"}, -1, -1, -1, -1, -1, "one of none, mlp, gated"},
        {{.activation = "swish"}, -1, -1, -1, -1, -1, "gelu-tanh"},
        {{.position = "sinus"}, -1, -1, -1, -1, -1, "alibi"},
        {{0}, 255, -1, -1, -1, -1, "255 is not divisible by 4 heads"},
        {{0}, 0, -1, -1, -1, -1, "width"},
        {{0}, -1, 0, -1, -1, -1, "heads"},
        {{0}, -1, -1, 3, -1, -1, "must divide"},
        {{0}, -1, -1, -1, 0, -1, "vocabulary is 0"},
        {{0}, -1, -1, -1, (int64_t)1 << 40, -1, "vocabulary"},
        {{0}, -1, -1, -1, -1, 100000, "number of layers is 100000"},
        {{0}, INT64_MAX, -1, -1, -1, -1, ""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        c = before = preset("nano");
        o = tril_model_overrides_none();
        o.norm = bad[i].choice.norm;
        o.ffn_kind = bad[i].choice.ffn;
        o.activation = bad[i].choice.activation;
        o.position = bad[i].choice.position;
        o.dim = bad[i].dim;
        o.heads = bad[i].heads;
        o.kv_heads = bad[i].kv_heads;
        o.vocab = bad[i].vocab;
        o.layers = bad[i].layers;
        assert_int_equal(model_config_override(&c, &o, &err), TRIL_ERR_ARGUMENT);
        if (!strstr(err.message, bad[i].words))
            fail_msg("case %zu: %s", i, err.message);
        assert_memory_equal(&c, &before, sizeof c); /* nothing changed */
    }
}

/* Frequencies as transformers has them (in double), and ALiBi's published slopes. The table holds
 * cos and sin of position times frequency, rounded once: 2^-24, and theta, factors and bounds are
 * floats: a few 2^-24 of the angle. */
static void test_positions(void **state) {
    (void)state;
    char path[512];
    json_t *root, *rope, *alibi, *one, *list;
    size_t i;
    const char *key;
    snprintf(path, sizeof path, "%s/rope.json", TEST_GOLDEN_DIR);
    OK(json_read(&root, path, 1 << 20, &err));
    rope = json_object_get(root, "rope");
    alibi = json_object_get(root, "alibi");
    json_array_foreach(rope, i, one) {
        struct model_config c;
        OK(model_config_from_json(&c, json_object_get(one, "config"), path, &err));
        const json_t *f = json_object_get(one, "frequencies");
        double factor = json_number_value(json_object_get(one, "attention_factor"));
        int64_t R = c.rope_dim / 2, n = 1000, longer = 0;
        OK(json_get_int(one, "positions", 1, 1 << 20, &longer, path, &err));
        n = longer > n ? longer : n;
        assert_int_equal(json_array_size(f), R);
        assert_true(fabs(c.rope_attention_factor - factor) <= 1e-7 * factor);
        float *cosines = malloc((size_t)(n * R) * sizeof *cosines);
        float *sines = malloc((size_t)(n * R) * sizeof *sines);
        model_rope_table(&c, n, cosines, sines);
        for (int64_t p = 0; p < n; p += p < 10 ? 1 : 97) {
            for (int64_t k = 0; k < R; k++) {
                double angle = (double)p * json_number_value(json_array_get(f, (size_t)k));
                double allowed = factor * (2 * 0x1p-24 + 4 * 0x1p-24 * angle);
                assert_true(fabs(cosines[p * R + k] - factor * cos(angle)) <= allowed);
                assert_true(fabs(sines[p * R + k] - factor * sin(angle)) <= allowed);
            }
        }
        free(cosines);
        free(sines);
    }
    assert_int_equal(json_array_size(rope), 8);
    json_object_foreach(alibi, key, list) {
        float slopes[64];
        size_t heads = json_array_size(list);
        assert_int_equal(heads, atoi(key));
        model_alibi_slopes((int64_t)heads, slopes);
        for (size_t h = 0; h < heads; h++) {
            double due = json_number_value(json_array_get(list, h));
            assert_true(fabs(slopes[h] - due) <= 0x1p-24 * due);
        }
    }
    json_decref(root);
}

/* A model far beyond this machine's memory is planned, and costs nothing. */
static void test_plan(void **state) {
    (void)state;
    struct model_config c = preset("gpt2");
    struct tril_model_overrides o = tril_model_overrides_none();
    o.layers = 96;
    o.dim = 12288;
    o.heads = 96;
    o.context = 2048;
    OK(model_config_override(&c, &o, &err));
    struct model_counts n;
    model_count(&c, 2048, &n);
    assert_true(n.total > 174e9 && n.total < 176e9); /* GPT-3 */
    struct memory_plan plan;
    const struct workspace_options w = {.max_tokens = 2048, .max_sequences = 1, .backward = true};
    OK(model_memory_plan(&c, &(struct model_options){.dtype = DT_BF16, .training = true}, &w, 0, 0,
                         DT_BF16, backend_reference(), &plan, &err));
    assert_true(plan.masters >= 4 * n.total && plan.masters < 4.0001 * n.total);
    assert_true(plan.weights == plan.masters / 2 && plan.gradients == plan.masters);
    assert_true(plan.optimiser == 2 * plan.masters && plan.activations > 1e9);
    double sum = plan.weights + plan.masters + plan.gradients + plan.optimiser + plan.activations +
                 plan.packings + plan.logits + plan.cache + plan.scratch + plan.other;
    assert_true(plan.total == sum);
    OK(model_memory_plan(&c, &(struct model_options){.dtype = DT_BF16, .training = false}, NULL, 4,
                         2048, DT_BF16, backend_reference(), &plan, &err));
    assert_true(plan.masters == 0 && plan.optimiser == 0 && plan.activations == 0);
    assert_true(plan.weights >= 2 * n.total && plan.weights < 2.001 * n.total);
    assert_true(plan.cache == 4.0 * 2048 * 96 * 12288 * 2 * 2);
    OK(model_memory_plan(&c, &(struct model_options){.dtype = DT_BF16, .training = false}, NULL, 4,
                         2048, DT_I8, backend_reference(), &plan, &err));
    assert_true(plan.cache == 4.0 * 2048 * 96 * 2 * (12288 + 96 * 4)); /* a scale a head */
    /* MFU's count for GPT-2 124M at T = 1024: 6 N + 6 L D T, N without positions. */
    c = preset("gpt2");
    model_count(&c, 1024, &n);
    assert_true(n.train_flops_per_token == 6.0 * (124439808 - 1024 * 768) + 6.0 * 12 * 768 * 1024);
    c = preset("nano"); /* tied: the head is counted, once */
    model_count(&c, 256, &n);
    assert_true(n.train_flops_per_token == 6.0 * n.total + 6.0 * 4 * 256 * 256);
    c.tied = false;
    double tied = n.train_flops_per_token;
    model_count(&c, 256, &n);
    assert_true(n.train_flops_per_token == tied);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),      cmocka_unit_test(test_transformers),
        cmocka_unit_test(test_refusals),     cmocka_unit_test(test_accepted),
        cmocka_unit_test(test_every_choice), cmocka_unit_test(test_overrides),
        cmocka_unit_test(test_positions),    cmocka_unit_test(test_plan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
