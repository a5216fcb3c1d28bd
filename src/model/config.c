/* Presets, overrides and the limits of a configuration. JSON is in config_read.c and
 * config_write.c. */
#include "model/config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What most presets share; shape, position and biases follow per preset. */
static struct model_config config_base(void) {
    return (struct model_config){
        .norm_eps = 1e-5f,
        .final_norm = true,
        .rope_theta = 10000.0f,
        .rope_factor = 1.0f,
        .rope_low = 1.0f,
        .rope_high = 4.0f,
        .rope_beta_fast = 32.0f,
        .rope_beta_slow = 1.0f,
        .rope_attention_factor = 1.0f,
        .tied = true,
        .scale_attention = true,
        .init_std = 0.02f,
        .bos_id = -1,
        .eos_id = -1,
    };
}

static struct model_config config_gpt2(int64_t layers, int64_t dim, int64_t heads) {
    struct model_config c = config_base();
    c.layers = layers;
    c.dim = dim;
    c.heads = c.kv_heads = heads;
    c.ffn = 4 * dim;
    c.vocab = 50257;
    c.context = 1024;
    c.norm = NORM_LAYERNORM;
    c.ffn_kind = FFN_MLP;
    c.activation = ACT_GELU_TANH;
    c.position = POSITION_LEARNED;
    c.qkv_bias = c.attention_out_bias = c.ffn_bias = c.norm_bias = true;
    c.bos_id = c.eos_id = 50256;
    return c;
}

static struct model_config config_llama(int64_t layers, int64_t dim, int64_t heads,
                                        int64_t kv_heads, int64_t ffn) {
    struct model_config c = config_base();
    c.layers = layers;
    c.dim = dim;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.ffn = ffn;
    c.norm = NORM_RMSNORM;
    c.ffn_kind = FFN_GATED;
    c.activation = ACT_SILU;
    c.position = POSITION_ROPE;
    return c;
}

static const char *const preset_names[] = {"model3",     "nano",    "gpt2",       "gpt2-medium",
                                           "gpt2-large", "gpt2-xl", "llama-110m", "llama-1b"};

const char *model_config_preset_names(void) {
    return "model3, nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-110m, llama-1b";
}

tril_status model_config_preset(struct model_config *c, const char *name, struct tril_error *err) {
    int which = -1;
    for (int i = 0; i < (int)(sizeof preset_names / sizeof *preset_names); i++)
        if (strcmp(name, preset_names[i]) == 0)
            which = i;
    switch (which) {
    case 0: /* one head, no feed-forward: the smallest thing that attends */
        *c = config_gpt2(1, 64, 1);
        c->ffn = 0;
        c->ffn_kind = FFN_NONE;
        c->activation = ACT_NONE;
        c->context = 8;
        c->final_norm = false;
        c->qkv_bias = c->attention_out_bias = c->ffn_bias = false;
        break;
    case 1:
        *c = config_llama(4, 256, 4, 4, 704);
        c->vocab = 4096;
        c->context = 256;
        break;
    case 2:
        *c = config_gpt2(12, 768, 12);
        break;
    case 3:
        *c = config_gpt2(24, 1024, 16);
        break;
    case 4:
        *c = config_gpt2(36, 1280, 20);
        break;
    case 5:
        *c = config_gpt2(48, 1600, 25);
        break;
    case 6:
        *c = config_llama(12, 768, 12, 12, 2048);
        c->vocab = 32000;
        c->context = 1024;
        c->bos_id = 1;
        c->eos_id = 2;
        break;
    case 7:
        *c = config_llama(16, 2048, 32, 8, 8192);
        c->vocab = 128256;
        c->context = 131072;
        c->rope_theta = 500000.0f;
        c->rope_scaling = ROPE_LLAMA3;
        c->rope_factor = 32.0f;
        c->rope_original_context = 8192;
        c->bos_id = 128000;
        c->eos_id = 128001;
        break;
    default:
        return error_set(err, TRIL_ERR_ARGUMENT, "there is no preset \"%.60s\"; the presets are %s",
                         name, model_config_preset_names());
    }
    c->head_dim = c->dim / c->heads;
    c->rope_dim = c->position == POSITION_ROPE ? c->head_dim : 0;
    return TRIL_OK;
}

/* Mixers. */

bool model_mixers_plain(const struct model_config *c) {
    static const struct mixer_config plain;
    for (int i = 0; i < model_mixer_count(c); i++)
        if (!mixer_equal(&c->mixers[i], &plain))
            return false;
    return true;
}

int model_mixer_count(const struct model_config *c) {
    int most = 0;
    for (int64_t l = 0; l < c->layers; l++)
        most = c->layer_mixer[l] > most ? c->layer_mixer[l] : most;
    return most + 1;
}

int64_t model_mixer_period(const struct model_config *c) {
    for (int64_t n = 1; n < c->layers; n++) {
        int64_t l = n;
        while (l < c->layers && c->layer_mixer[l] == c->layer_mixer[l - n])
            l++;
        if (l == c->layers)
            return n;
    }
    return c->layers;
}

tril_status model_config_set_mixers(struct model_config *c, const struct mixer_config *pattern,
                                    int64_t count, struct tril_error *err) {
    struct mixer_config kinds[MODEL_MOST_MIXERS] = {0};
    uint8_t of_layer[MODEL_MOST_LAYERS];
    int known = 0;
    if (count < 1 || count > c->layers || c->layers > MODEL_MOST_LAYERS)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%lld mixers cannot be shared out over %lld layers; give from 1 to as "
                         "many as there are layers",
                         (long long)count, (long long)c->layers);
    for (int64_t l = 0; l < c->layers; l++) {
        const struct mixer_config *m = &pattern[l % count];
        int i = 0;
        while (i < known && !mixer_equal(&kinds[i], m))
            i++;
        if (i == MODEL_MOST_MIXERS)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "the layers have more than %d different mixers; tril takes so many",
                             MODEL_MOST_MIXERS);
        if (i == known)
            kinds[known++] = *m;
        of_layer[l] = (uint8_t)i;
    }
    memcpy(c->mixers, kinds, sizeof kinds);
    memset(c->layer_mixer, 0, sizeof c->layer_mixer);
    memcpy(c->layer_mixer, of_layer, (size_t)c->layers);
    return TRIL_OK;
}

tril_status model_config_parse_mixers(struct model_config *c, const char *text,
                                      struct tril_error *err) {
    tril_status st = TRIL_OK;
    int64_t count = 1, n = 0;
    for (const char *s = text; *s; s++)
        count += *s == '/';
    struct mixer_config *pattern = calloc((size_t)count, sizeof *pattern);
    char *copy = strdup(text);
    if (!pattern || !copy)
        TRY(error_set(err, TRIL_ERR_MEMORY, "not enough memory for %lld mixers", (long long)count));
    for (char *s = copy; s; n++) {
        char *end = strchr(s, '/');
        if (end)
            *end++ = 0;
        TRY(mixer_parse(&pattern[n], s, err));
        s = end;
    }
    TRY(model_config_set_mixers(c, pattern, count, err));
done:
    free(pattern);
    free(copy);
    return st;
}

/* Overrides. */

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

/* The index of `name` in `names` (NULL-terminated), or ERR_ARGUMENT listing them. */
static tril_status choice_parse(const char *name, const char *what, const char *const *names,
                                int *out, struct tril_error *err) {
    char list[128] = "";
    for (int i = 0; names[i]; i++) {
        if (strcmp(name, names[i]) == 0) {
            *out = i;
            return TRIL_OK;
        }
        size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "", names[i]);
    }
    return error_set(err, TRIL_ERR_ARGUMENT, "%s cannot be \"%.60s\"; choose one of %s", what, name,
                     list);
}

/* The FFN width of a new model width: the old proportion, or the customary one. */
static int64_t ffn_derive(const struct model_config *c, int64_t old_dim, int64_t old_ffn) {
    if (c->ffn_kind == FFN_NONE)
        return 0;
    if (old_ffn > 0 && old_dim > 0 && (c->dim * old_ffn) % old_dim == 0)
        return c->dim * old_ffn / old_dim;
    if (c->ffn_kind == FFN_MLP)
        return 4 * c->dim;
    /* As many parameters as 4 D without a gate, in whole tiles. */
    double ratio = old_ffn > 0 && old_dim > 0 ? (double)old_ffn / (double)old_dim : 8.0 / 3.0;
    int64_t unit = c->dim >= 128 ? 64 : 8;
    return ((int64_t)ceil(ratio * (double)c->dim) + unit - 1) / unit * unit;
}

static tril_status override_kinds(struct model_config *c, const struct tril_model_overrides *o,
                                  struct tril_error *err) {
    static const char *const norms[] = {"layernorm", "rmsnorm", NULL};
    static const char *const ffns[] = {"none", "mlp", "gated", NULL};
    static const char *const positions[] = {"none", "learned", "rope", "alibi", NULL};
    static const char *const activations[] = {"relu", "gelu", "gelu-tanh", "silu", NULL};
    tril_status st = TRIL_OK;
    int i;
    if (o->norm) {
        TRY(choice_parse(o->norm, "the norm", norms, &i, err));
        if (c->norm != (enum norm_kind)i)
            c->norm_bias = i == NORM_LAYERNORM;
        c->norm = (enum norm_kind)i;
    }
    if (o->ffn_kind) {
        TRY(choice_parse(o->ffn_kind, "the FFN", ffns, &i, err));
        if (c->ffn_kind != (enum ffn_kind)i) {
            static const enum activation usual[] = {ACT_NONE, ACT_GELU_TANH, ACT_SILU};
            c->activation = usual[i];
            c->ffn = 0;
            if (i == FFN_NONE)
                c->ffn_bias = false;
        }
        c->ffn_kind = (enum ffn_kind)i;
    }
    if (o->activation) {
        TRY(choice_parse(o->activation, "the activation", activations, &i, err));
        static const enum activation kinds[] = {ACT_RELU, ACT_GELU_ERF, ACT_GELU_TANH, ACT_SILU};
        if (c->ffn_kind == FFN_NONE) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "an activation is given, but the model has no FFN that could use it");
            goto done;
        }
        c->activation = kinds[i];
    }
    if (o->position) {
        TRY(choice_parse(o->position, "the position", positions, &i, err));
        c->position = (enum position_kind)i;
    }
    if (o->bias >= 0) {
        c->qkv_bias = c->attention_out_bias = o->bias;
        c->ffn_bias = o->bias && c->ffn_kind != FFN_NONE;
        c->norm_bias = o->bias && c->norm == NORM_LAYERNORM;
    }
done:
    return st;
}

/* RoPE of `n`, which was `c`. */
static tril_status override_rope(struct model_config *n, const struct model_config *c,
                                 const struct tril_model_overrides *o, struct tril_error *err) {
    static const char *const scalings[] = {"none", "linear", "ntk", "dynamic",
                                           "yarn", "llama3", NULL};
    tril_status st = TRIL_OK;
    int i;
    if (n->position != POSITION_ROPE) {
        n->rope_dim = 0;
        n->rope_scaling = ROPE_PLAIN;
        if (o->rope_scaling || o->rope_share >= 0 || o->rope_factor >= 0 || o->rope_original >= 0)
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "RoPE's settings are given, but the model's positions are not rope");
        goto done;
    }
    if (c->position != POSITION_ROPE || c->rope_dim == c->head_dim)
        n->rope_dim = n->head_dim;
    if (o->rope_share >= 0)
        n->rope_dim = (int64_t)(o->rope_share * (double)n->head_dim / 2 + 0.5) * 2;
    if (o->rope_theta >= 0)
        n->rope_theta = (float)o->rope_theta;
    if (!o->rope_scaling && o->rope_factor < 0 && o->rope_original < 0)
        goto done;
    if (o->rope_scaling) {
        TRY(choice_parse(o->rope_scaling, "the RoPE scaling", scalings, &i, err));
        n->rope_scaling = (enum rope_scaling_kind)i;
        n->rope_original_context = 0;
        n->rope_attention_factor = 1;
    }
    if (o->rope_original >= 0)
        n->rope_original_context = o->rope_original;
    else if (n->rope_original_context == 0)
        n->rope_original_context = c->context;
    n->rope_factor = o->rope_factor >= 0 ? (float)o->rope_factor
                                         : (float)n->context / (float)n->rope_original_context;
    if (n->rope_scaling == ROPE_YARN)
        n->rope_attention_factor = (float)model_yarn_scale(n->rope_factor, 1.0);
    if (n->rope_scaling == ROPE_PLAIN || n->rope_scaling == ROPE_LINEAR ||
        n->rope_scaling == ROPE_NTK)
        n->rope_original_context = 0; /* these do not look at it */
    if (n->rope_scaling == ROPE_PLAIN)
        n->rope_factor = 1;
done:
    return st;
}

tril_status model_config_override(struct model_config *c, const struct tril_model_overrides *o,
                                  struct tril_error *err) {
    tril_status st;
    struct model_config n = *c;
    bool reshaped = o->dim >= 0 || o->heads >= 0;
    TRY(override_kinds(&n, o, err));
#define OVERRIDE(field)                                                                            \
    if (o->field >= 0)                                                                             \
    n.field = o->field
    OVERRIDE(layers);
    OVERRIDE(dim);
    OVERRIDE(heads);
    OVERRIDE(kv_heads);
    OVERRIDE(head_dim);
    OVERRIDE(ffn);
    OVERRIDE(vocab);
    OVERRIDE(context);
    OVERRIDE(tied);
    OVERRIDE(qk_norm);
#undef OVERRIDE
    /* More layers continue the pattern; fewer may leave mixers that nobody uses. */
    for (int64_t l = c->layers; l < n.layers && l < MODEL_MOST_LAYERS && c->layers > 0; l++)
        n.layer_mixer[l] = n.layer_mixer[l % c->layers];
    if (o->mixers && n.layers <= MODEL_MOST_LAYERS)
        TRY(model_config_parse_mixers(&n, o->mixers, err));
    if (reshaped && o->kv_heads < 0) { /* the same number of heads to a group, if that divides */
        int64_t group = c->kv_heads > 0 ? c->heads / c->kv_heads : 1;
        n.kv_heads = group > 0 && n.heads % group == 0 ? n.heads / group : n.heads;
    }
    if (reshaped && o->head_dim < 0) {
        if (n.heads < 1 || n.dim % n.heads != 0) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "the width %lld is not divisible by %lld heads; change either, or give "
                           "the head width",
                           (long long)n.dim, (long long)n.heads);
            goto done;
        }
        n.head_dim = n.dim / n.heads;
    }
    if (o->ffn < 0 && (n.dim != c->dim || n.ffn_kind != c->ffn_kind) && n.dim > 0 &&
        n.dim <= 1 << 24)
        n.ffn = ffn_derive(&n, c->dim, n.ffn_kind == c->ffn_kind ? c->ffn : 0);
    TRY(override_rope(&n, c, o, err));
    if (o->dropout >= 0)
        n.dropout_embedding = n.dropout_attention = n.dropout_residual = (float)o->dropout;
    if (o->norm_eps >= 0)
        n.norm_eps = (float)o->norm_eps;
    if (o->vocab >= 0) {
        n.bos_id = n.bos_id < n.vocab ? n.bos_id : -1;
        n.eos_id = n.eos_id < n.vocab ? n.eos_id : -1;
    }
    TRY(model_config_check(&n, err));
    *c = n;
done:
    return st;
}

/* The limits. */

struct range {
    const char *name;
    double value, min, max;
};

static tril_status ranges_check(const struct range *r, size_t count, struct tril_error *err) {
    for (size_t i = 0; i < count; i++)
        if (!(r[i].value >= r[i].min && r[i].value <= r[i].max))
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "the model's %s is %.10g, but must be from %.10g to %.10g", r[i].name,
                             r[i].value, r[i].min, r[i].max);
    return TRIL_OK;
}

/* Layers that recall share their segments, and layers of one kind what they keep: a batch then
 * carries one amount of each. */
static tril_status recall_check(const struct model_config *c, struct tril_error *err) {
    const struct mixer_config *first = NULL, *of_kind[MIXER_MEMORY + 1] = {NULL};
    for (int i = 0; i < model_mixer_count(c); i++) {
        const struct mixer_config *m = &c->mixers[i];
        if (!mixer_recalls(m))
            continue;
        if (m->kind == MIXER_RECURRENCE && c->qk_norm)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "a model with a qk-norm has no recurrent layers");
        if (c->position == POSITION_LEARNED)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "layers that recall earlier segments and learned positions exclude "
                             "each other: choose rope, alibi or none");
        if (first && first->segment != m->segment)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "layers recall by segments of %d and of %d tokens; give them one "
                             "length",
                             (int)first->segment, (int)m->segment);
        if (of_kind[m->kind] &&
            (of_kind[m->kind]->keep != m->keep || of_kind[m->kind]->top != m->top))
            return error_set(
                err, TRIL_ERR_ARGUMENT,
                "layers of one kind keep %d and %d tokens, or look for different numbers "
                "of keys; give them the same",
                (int)of_kind[m->kind]->keep, (int)m->keep);
        first = m;
        of_kind[m->kind] = m;
    }
    return TRIL_OK;
}

const struct mixer_config *model_recalls(const struct model_config *c, enum mixer_kind kind) {
    for (int i = 0; i < model_mixer_count(c); i++)
        if (c->mixers[i].kind == kind)
            return &c->mixers[i];
    return NULL;
}

tril_status model_config_check(const struct model_config *c, struct tril_error *err) {
    tril_status st;
    bool rope = c->position == POSITION_ROPE, ffn = c->ffn_kind != FFN_NONE;
    const struct range shape[] = {
        {"number of layers", (double)c->layers, 1, MODEL_MOST_LAYERS},
        {"width", (double)c->dim, 1, 1 << 20},
        {"number of heads", (double)c->heads, 1, 1 << 16},
        {"number of key/value heads", (double)c->kv_heads, 1, 1 << 16},
        {"head width", (double)c->head_dim, 1, 1 << 16},
        {"FFN width", (double)c->ffn, ffn ? 1 : 0, ffn ? 1 << 24 : 0},
        {"vocabulary", (double)c->vocab, 1, 1 << 24},
        {"context", (double)c->context, 1, 1 << 26},
        {"norm epsilon", c->norm_eps, 1e-30, 1},
        {"dropout of embeddings", c->dropout_embedding, 0, 0.999},
        {"dropout of attention", c->dropout_attention, 0, 0.999},
        {"dropout of residual branches", c->dropout_residual, 0, 0.999},
        {"standard deviation of initial weights", c->init_std, 0, 100},
        {"BOS id", (double)c->bos_id, -1, (double)c->vocab - 1},
        {"EOS id", (double)c->eos_id, -1, (double)c->vocab - 1},
    };
    TRY(ranges_check(shape, sizeof shape / sizeof *shape, err));
    if (c->heads % c->kv_heads != 0) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%lld heads cannot be shared out over %lld key/value heads; the latter must "
                       "divide the former",
                       (long long)c->heads, (long long)c->kv_heads);
        goto done;
    }
    const struct range derived[] = {
        /* Products of the ranges above stay far below 2^63. */
        {"heads times head width", (double)(c->heads * c->head_dim), 1, 1 << 20},
        {"number of parameters in a matrix",
         (double)c->dim * (double)(c->vocab > 2 * c->ffn ? c->vocab : 2 * c->ffn), 1, 0x1p40},
    };
    TRY(ranges_check(derived, sizeof derived / sizeof *derived, err));
    if ((c->norm != NORM_LAYERNORM && c->norm != NORM_RMSNORM) || c->ffn_kind > FFN_GATED ||
        c->position > POSITION_ALIBI || c->rope_scaling > ROPE_LLAMA3 || c->activation > ACT_SILU) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "the model's configuration names an unknown kind");
        goto done;
    }
    if (c->norm == NORM_RMSNORM && c->norm_bias) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "an RMSNorm has no bias, but one is asked for");
        goto done;
    }
    if (ffn != (c->activation != ACT_NONE) || (!ffn && c->ffn_bias)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       ffn ? "the FFN needs an activation (relu, gelu, gelu-tanh or silu)"
                           : "a model without FFN has no activation and no FFN bias");
        goto done;
    }
    if (rope) {
        if (c->rope_dim < 2 || c->rope_dim % 2 != 0 || c->rope_dim > c->head_dim) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "rotary positions turn pairs of channels: %lld of a head width of %lld "
                           "cannot be turned; it must be even, at least 2 and at most that width",
                           (long long)c->rope_dim, (long long)c->head_dim);
            goto done;
        }
        bool scaled = c->rope_scaling != ROPE_PLAIN;
        bool original = c->rope_scaling == ROPE_DYNAMIC || c->rope_scaling == ROPE_YARN ||
                        c->rope_scaling == ROPE_LLAMA3;
        const struct range ropes[] = {
            {"RoPE theta", c->rope_theta, 1.0001, 1e15},
            {"RoPE factor", scaled ? c->rope_factor : 1, 1e-3, 1e6},
            {"RoPE attention factor", c->rope_attention_factor, 1e-3, 1e3},
            {"RoPE original context", original ? (double)c->rope_original_context : 1, 1, 1 << 26},
        };
        TRY(ranges_check(ropes, sizeof ropes / sizeof *ropes, err));
        if (c->rope_scaling == ROPE_LLAMA3) {
            const struct range bands[] = {
                {"RoPE low frequency factor", c->rope_low, 1e-3, 1e6},
                {"RoPE high frequency factor", c->rope_high, (double)c->rope_low * 1.000001, 1e6},
            };
            TRY(ranges_check(bands, sizeof bands / sizeof *bands, err));
        }
        if (c->rope_scaling == ROPE_YARN) {
            const struct range bands[] = {
                {"RoPE beta_slow", c->rope_beta_slow, 1e-3, 1e6},
                {"RoPE beta_fast", c->rope_beta_fast, c->rope_beta_slow, 1e6},
            };
            TRY(ranges_check(bands, sizeof bands / sizeof *bands, err));
        }
        if (c->rope_dim == 2 && (c->rope_scaling == ROPE_NTK || c->rope_scaling == ROPE_DYNAMIC)) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "NTK scaling needs at least 4 rotating channels in a head, not 2");
            goto done;
        }
    }
    TRY(recall_check(c, err));
    for (int i = 0; i < model_mixer_count(c); i++) {
        TRY(mixer_check(&c->mixers[i], c->heads, err));
        if (c->mixers[i].rope_theta > 0 && (!rope || c->mixers[i].no_position)) {
            st = error_set(err, TRIL_ERR_ARGUMENT,
                           "a mixer names its own RoPE theta, but does not rotate: %s",
                           rope ? "it says no-position" : "the model's positions are not rope");
            goto done;
        }
    }
done:
    return st;
}
