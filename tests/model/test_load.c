/* Loading and saving whole models: every variant round trips in every dtype; names and shapes that
 * do not fit are refused by name; what `transformers` also writes is passed over. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/file.h"
#include "formats/safetensors.h"
#include "models.h"

static struct tril_error err;
static struct op_context ctx;

static struct model *fresh(struct model_config c, uint64_t seed) {
    struct model *m;
    OK(model_create(&m, &c, &(struct model_options){.dtype = DT_F32, .training = true}, &ctx,
                    &err));
    OK(model_init(m, seed, &err));
    /* Norms and biases too, so that nothing can be mixed up unseen. */
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        float *v = malloc((size_t)n * sizeof *v);
        struct random_key key = {seed, 1, (uint32_t)i, RANDOM_TEST};
        for (int64_t k = 0; k < n; k++)
            v[k] = random_normal(&key, (uint64_t)k);
        OK(model_row_upload(m, i, 0, n, v, DT_F32, &err));
        free(v);
    }
    OK(model_refresh(m, &err));
    return m;
}

static const char *fresh_dir(const char *name) {
    const char *path = test_path(name);
    if (path_exists(path))
        OK(dir_remove(path, &err));
    OK(dir_make(path, &err));
    return path;
}

/* The parameters of both are the same, after rounding a's to `t`. */
static void parameters_equal(const struct model *a, const struct model *b, enum dtype t) {
    assert_int_equal(a->table.count, b->table.count);
    for (int i = 0; i < a->table.count; i++) {
        const struct param_row *r = &a->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        float *x = malloc((size_t)n * sizeof *x), *y = malloc((size_t)n * sizeof *y);
        void *rounded = malloc((size_t)n * 8);
        OK(model_row_download(a, i, 0, n, x, &err));
        OK(model_row_download(b, i, 0, n, y, &err));
        dtype_convert(rounded, t, x, DT_F32, (size_t)n);
        dtype_convert(x, DT_F32, rounded, t, (size_t)n);
        if (memcmp(x, y, (size_t)n * sizeof *x) != 0)
            fail_msg("%s differs", r->parts[0].name);
        free(x);
        free(y);
        free(rounded);
    }
}

static void test_round_trips(void **state) {
    (void)state;
    static const enum dtype saved[] = {DT_F32, DT_BF16, DT_F16};
    for (int v = 0; v < VARIANTS; v++) {
        const char *name;
        struct model_config c = variant(v, &name);
        struct model *m = fresh(c, (uint64_t)v), *back;
        for (int t = 0; t < 3; t++) {
            const char *dir = fresh_dir("model");
            OK(model_save(m, dir, saved[t], &err));
            OK(model_load(&back, dir, &(struct model_options){.dtype = DT_F32, .training = true},
                          &ctx, &err));
            parameters_equal(m, back, saved[t]);
            assert_string_equal(model_config_type(&m->config, NULL),
                                model_config_type(&back->config, NULL));
            model_free(back);
            /* For inference, weights live rounded; on this backend nothing is packed away. */
            OK(model_load(&back, dir, &(struct model_options){.dtype = DT_BF16, .training = false},
                          &ctx, &err));
            if (saved[t] == DT_BF16)
                parameters_equal(m, back, DT_BF16);
            model_free(back);
        }
        model_free(m);
    }
}

static void test_types(void **state) {
    (void)state;
    static const char *const types[VARIANTS] = {"gpt2",    "tril", "tril", "tril", "tril", "tril",
                                                "llama",   "tril", "tril", "tril", "tril", "tril",
                                                "smollm3", "tril", "tril", "tril", "tril", "tril",
                                                "qwen3",   "tril", "tril", "tril"};
    for (int v = 0; v < VARIANTS; v++) {
        const char *name;
        struct model_config c = variant(v, &name);
        assert_string_equal(model_config_type(&c, NULL), types[v]);
    }
}

/* The tensors of a file, with a say in each: `change` may rename, drop (NULL), reshape, retype. */
struct edit {
    const char *from, *to; /* tensor names; to NULL: dropped */
    int64_t shape0;        /* > 0: the first dimension becomes this */
    enum dtype t;
    const char *extra; /* an additional tensor's name ... */
    int64_t extra_shape[2];
    bool strip; /* the first component of all names */
};

static void edit_model(const char *dir, const struct edit *e) {
    char path[512];
    struct safetensors *s;
    struct st_writer *w;
    OK(safetensors_open(&s, dir, &err));
    size_t count = safetensors_count(s), n = 0;
    struct st_declare *d = calloc(count + 1, sizeof *d);
    for (size_t i = 0; i < count; i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        const char *dot = strchr(t->name, '.');
        if (e->from && strcmp(t->name, e->from) == 0 && !e->to)
            continue;
        d[n] = (struct st_declare){.name = t->name, .dtype = t->dtype, .rank = t->rank};
        memcpy(d[n].shape, t->shape, sizeof d[n].shape);
        if (e->from && strcmp(t->name, e->from) == 0) {
            d[n].name = e->to;
            d[n].shape[0] = e->shape0 > 0 ? e->shape0 : d[n].shape[0];
            d[n].dtype = e->t;
        } else if (e->strip && dot && strncmp(t->name, "lm_head", 7) != 0) {
            d[n].name = dot + 1;
        }
        n++;
    }
    if (e->extra)
        d[n++] = (struct st_declare){.name = e->extra,
                                     .dtype = DT_F32,
                                     .rank = 2,
                                     .shape = {e->extra_shape[0], e->extra_shape[1]}};
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    OK(st_writer_open(&w, path, d, n, NULL, 0, &err));
    for (size_t i = 0; i < n; i++) {
        size_t bytes = dtype_size(d[i].dtype);
        for (int k = 0; k < d[i].rank; k++)
            bytes *= (size_t)d[i].shape[k];
        const struct st_tensor *t = safetensors_find(s, d[i].name);
        for (size_t k = 0; !t && e->strip && k < count; k++) {
            const char *dot = strchr(safetensors_at(s, k)->name, '.');
            if (dot && strcmp(dot + 1, d[i].name) == 0)
                t = safetensors_at(s, k);
        }
        void *zeros = calloc(1, bytes + 1);
        OK(st_writer_write(w, t && t->bytes == bytes ? t->data : zeros, bytes, &err));
        free(zeros);
    }
    OK(st_writer_finish(w, &err));
    safetensors_close(s);
    free(d);
}

static void test_names(void **state) {
    (void)state;
    const char *variant_name;
    static const struct {
        int variant; /* 0 GPT-2, 6 Llama (untied), -1 Llama tied */
        struct edit edit;
        tril_status due;
        const char *words;
    } cases[] = {
        {0, {.strip = true}, TRIL_OK, ""},
        {6, {.strip = true}, TRIL_OK, ""},
        {0, {.extra = "transformer.h.0.attn.bias", .extra_shape = {16, 16}}, TRIL_OK, ""},
        {0, {.extra = "h.1.attn.masked_bias", .extra_shape = {1, 1}}, TRIL_OK, ""},
        {6,
         {.extra = "model.layers.0.self_attn.rotary_emb.inv_freq", .extra_shape = {1, 3}},
         TRIL_OK,
         ""},
        {0, {.extra = "lm_head.weight", .extra_shape = {19, 12}}, TRIL_OK, ""},
        {-1, {.extra = "lm_head.weight", .extra_shape = {19, 12}}, TRIL_OK, ""},
        {-1,
         {.from = "model.embed_tokens.weight", .extra = "lm_head.weight", .extra_shape = {19, 12}},
         TRIL_OK,
         ""},
        {0,
         {.extra = "lm_head.weight", .extra_shape = {18, 12}},
         TRIL_ERR_FORMAT,
         "\"lm_head.weight\" belongs to no parameter"},
        {0,
         {.extra = "transformer.h.2.ln_1.weight", .extra_shape = {12, 1}},
         TRIL_ERR_FORMAT,
         "belongs to no parameter"},
        {6, {.extra = "score.weight", .extra_shape = {2, 12}}, TRIL_ERR_FORMAT, "score.weight"},
        {0, {.from = "transformer.wpe.weight"}, TRIL_ERR_FORMAT, "wpe.weight\" is missing"},
        {6, {.from = "lm_head.weight"}, TRIL_ERR_FORMAT, "lm_head.weight\" is missing"},
        {6,
         {.from = "model.layers.1.self_attn.k_proj.weight"},
         TRIL_ERR_FORMAT,
         "k_proj.weight\" is missing"},
        {0,
         {.from = "transformer.wte.weight",
          .to = "transformer.wte.weight",
          .shape0 = 20,
          .t = DT_F32},
         TRIL_ERR_FORMAT,
         "has the shape [20, 12], but the configuration asks for [19, 12]"},
        {0,
         {.from = "transformer.ln_f.weight",
          .to = "transformer.ln_f.weight",
          .shape0 = 12,
          .t = DT_I32},
         TRIL_ERR_UNSUPPORTED,
         "holds I32"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct model_config c = variant(cases[i].variant < 0 ? 6 : cases[i].variant, &variant_name);
        if (cases[i].variant < 0)
            c.tied = true;
        struct model *m = fresh(c, 5), *back = NULL;
        const char *dir = fresh_dir("model");
        OK(model_save(m, dir, DT_F32, &err));
        edit_model(dir, &cases[i].edit);
        tril_status st = model_load(
            &back, dir, &(struct model_options){.dtype = DT_F32, .training = true}, &ctx, &err);
        if (st != cases[i].due || (st != TRIL_OK && !strstr(err.message, cases[i].words)))
            fail_msg("case %zu: %s", i, err.message);
        if (st == TRIL_OK && !cases[i].edit.from)
            parameters_equal(m, back, DT_F32);
        assert_true((back == NULL) == (st != TRIL_OK));
        model_free(back);
        model_free(m);
    }
}

/* A file whose header is no multiple of 8 long, so that its data lie crooked. */
static void test_unaligned(void **state) {
    (void)state;
    const char *name, *dir = fresh_dir("model");
    struct model *m = fresh(variant(0, &name), 5), *back;
    OK(model_save(m, dir, DT_F32, &err));
    char path[512], *data;
    size_t size;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    OK(file_read(path, 1 << 24, &data, &size, &err));
    char *longer = malloc(size + 1);
    size_t header = 8 + ((size_t)(unsigned char)data[0] | (size_t)(unsigned char)data[1] << 8);
    memcpy(longer, data, header);
    longer[header] = ' ';
    memcpy(longer + header + 1, data + header, size - header);
    longer[0]++; /* a multiple of 8 before, so no carry */
    OK(file_write_atomic(path, longer, size + 1, &err));
    OK(model_load(&back, dir, &(struct model_options){.dtype = DT_F32, .training = true}, &ctx,
                  &err));
    parameters_equal(m, back, DT_F32);
    model_free(back);
    model_free(m);
    free(data);
    free(longer);
}

static void test_arenas(void **state) {
    (void)state;
    static const char *const prefixes[] = {"mean.", "square."};
    const char *path = test_path("arenas.safetensors");
    for (int v = 0; v < VARIANTS; v += 3) {
        const char *name;
        struct model *m = fresh(variant(v, &name), 1), *n = fresh(variant(v, &name), 2);
        float *a[2] = {m->master, n->master}, *b[2];
        size_t bytes = (size_t)m->table.elements * sizeof **a;
        OK(model_arena_write(m, (const float *const *)a, prefixes, 2, path, DT_F32, &err));
        for (int i = 0; i < 2; i++)
            b[i] = calloc(1, bytes);
        OK(model_arena_read(m, b, prefixes, 2, path, &err));
        for (int i = 0; i < 2; i++)
            assert_memory_equal(a[i], b[i], bytes);
        /* Too few and too many arenas, and another model's file. */
        memset(b[0], 0, bytes);
        assert_int_equal(model_arena_read(m, b, prefixes, 1, path, &err), TRIL_ERR_FORMAT);
        assert_non_null(strstr(err.message, "belongs to another"));
        assert_int_equal(
            model_arena_read(m, b, (const char *const[]){"mean.", "other."}, 2, path, &err),
            TRIL_ERR_FORMAT);
        assert_non_null(strstr(err.message, "is missing"));
        struct model_config c = variant(v, &name);
        c.vocab++;
        struct model *other = fresh(c, 1);
        assert_int_equal(model_arena_read(other, b, prefixes, 2, path, &err), TRIL_ERR_FORMAT);
        for (int64_t k = 0; k < m->table.elements; k++)
            assert_true(b[0][k] == 0);
        for (int i = 0; i < 2; i++)
            free(b[i]);
        model_free(other);
        model_free(m);
        model_free(n);
    }
}

/* The names and layouts of a checkpoint, as `transformers` has them. */
static void test_layouts(void **state) {
    (void)state;
    const char *name, *dir = fresh_dir("model");
    struct model *m = fresh(variant(0, &name), 3);
    OK(model_save(m, dir, DT_F32, &err));
    struct safetensors *s;
    OK(safetensors_open(&s, dir, &err));
    const struct st_tensor *t = safetensors_find(s, "transformer.h.1.attn.c_attn.weight");
    assert_non_null(t);
    assert_int_equal(t->shape[0], 12);
    assert_int_equal(t->shape[1], 36);
    int row = model_row(m, PARAM_QKV, 1);
    float *w = malloc(36 * 12 * sizeof *w);
    OK(model_row_download(m, row, 0, 36 * 12, w, &err));
    for (int o = 0; o < 36; o++)
        for (int i = 0; i < 12; i++)
            assert_true(((const float *)t->data)[i * 36 + o] == w[o * 12 + i]);
    assert_null(safetensors_find(s, "lm_head.weight"));
    assert_string_equal(safetensors_metadata(s, "format"), "pt");
    assert_int_equal(safetensors_count(s), 4 + 2 * 12);
    safetensors_close(s);
    free(w);
    model_free(m);
    dir = fresh_dir("model");
    m = fresh(variant(6, &name), 3);
    OK(model_save(m, dir, DT_F32, &err));
    OK(safetensors_open(&s, dir, &err));
    t = safetensors_find(s, "model.layers.0.self_attn.v_proj.weight");
    w = malloc(48 * 12 * sizeof *w);
    OK(model_row_download(m, model_row(m, PARAM_QKV, 0), 0, 48 * 12, w, &err));
    assert_int_equal(t->shape[0], 12);
    assert_memory_equal(t->data, w + 36 * 12, 12 * 12 * sizeof *w);
    t = safetensors_find(s, "model.layers.1.mlp.up_proj.weight");
    OK(model_row_download(m, model_row(m, PARAM_FFN_UP, 1), 20 * 12, 20 * 12, w, &err));
    assert_memory_equal(t->data, w, 20 * 12 * sizeof *w);
    assert_int_equal(safetensors_count(s), 3 + 2 * 9);
    safetensors_close(s);
    free(w);
    model_free(m);
}

static void test_refusals(void **state) {
    (void)state;
    struct model *m = (void *)1;
    const struct model_options o = {.dtype = DT_F32, .training = false};
    assert_int_equal(model_load(&m, test_path("nowhere"), &o, &ctx, &err), TRIL_ERR_IO);
    assert_null(m);
    const char *dir = fresh_dir("model");
    assert_int_equal(model_load(&m, dir, &o, &ctx, &err), TRIL_ERR_IO);
    assert_non_null(strstr(err.message, "config.json"));
    const char *name;
    struct model *saved = fresh(variant(0, &name), 3);
    assert_int_equal(model_save(saved, test_path("nowhere"), DT_F32, &err), TRIL_ERR_IO);
    OK(model_save(saved, dir, DT_F32, &err));
    char path[512];
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    remove(path);
    assert_int_equal(model_load(&m, dir, &o, &ctx, &err), TRIL_ERR_IO);
    /* A configuration that asks for the impossible fails at the file, before any allocation. */
    struct model_config huge = variant(6, &name);
    huge.layers = 512;
    huge.dim = huge.ffn = 1 << 19;
    json_t *json = model_config_to_json(&huge, DT_F32);
    OK(model_save(saved, dir, DT_F32, &err));
    snprintf(path, sizeof path, "%s/config.json", dir);
    OK(json_write(json, path, &err));
    json_decref(json);
    assert_int_equal(model_load(&m, dir, &o, &ctx, &err), TRIL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "is missing"));
    model_free(saved);
}

static int setup(void **state) {
    (void)state;
    return op_context_init(&ctx, backend_reference(), &err) == TRIL_OK ? 0 : -1;
}

static int teardown(void **state) {
    (void)state;
    op_context_free(&ctx);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips), cmocka_unit_test(test_types),
        cmocka_unit_test(test_names),       cmocka_unit_test(test_unaligned),
        cmocka_unit_test(test_arenas),      cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
