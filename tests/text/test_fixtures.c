// ctest: timeout=120
/* The real tokenizers of ../shared/data (skipped where that is not there): published vectors, the
 * public test vectors of llama.cpp, torture texts, the training fixture. */
#include "base/json.h"
#include "text/bpe_train.h"
#include "text/text_support.h"

static struct tril_error err;

static struct tokenizer *load(const char *name) {
    struct tokenizer *t;
    if (tokenizer_load(&t, shared_path(name), NULL, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    return t;
}

static void check_vectors(const struct tokenizer *t, const char *name) {
    json_t *vectors;
    const json_t *v;
    size_t i;
    assert_int_equal(json_read(&vectors, shared_path(name), 1 << 24, &err), TRIL_OK);
    json_array_foreach(vectors, i, v) {
        const json_t *text = json_object_get(v, "text"), *want = json_object_get(v, "ids");
        uint32_t *ids;
        size_t n, size;
        char *back;
        assert_int_equal(tokenizer_encode(t, json_string_value(text), json_string_length(text),
                                          false, &ids, &n, &err),
                         TRIL_OK);
        assert_int_equal(n, json_array_size(want));
        for (size_t k = 0; k < n; k++)
            assert_int_equal(ids[k], json_integer_value(json_array_get(want, k)));
        assert_int_equal(tokenizer_decode(t, ids, n, false, &back, &size, &err), TRIL_OK);
        assert_int_equal(size, json_string_length(text));
        assert_memory_equal(back, json_string_value(text), size);
        free(back);
        free(ids);
    }
    assert_int_equal(i, 64);
    json_decref(vectors);
}

static void published_vectors(void **state) {
    (void)state;
    struct tokenizer *t = load("tokenizers/r50k_base.tiktoken");
    assert_int_equal(tokenizer_vocab_size(t), 50256);
    check_vectors(t, "tokenizers/vectors/r50k_base.json");
    tokenizer_free(t);
    t = load("tokenizers/gpt2");
    assert_int_equal(tokenizer_vocab_size(t), 50257);
    assert_int_equal(tokenizer_eos(t), 50256);
    check_vectors(t, "tokenizers/vectors/r50k_base.json");
    tokenizer_free(t);
    t = load("tokenizers/gpt2/merges.txt");
    check_vectors(t, "tokenizers/vectors/r50k_base.json");
    tokenizer_free(t);
    t = load("tokenizers/cl100k_base.tiktoken");
    assert_int_equal(tokenizer_vocab_size(t), 100256);
    assert_string_equal(tokenizer_pattern(t), "cl100k_tiktoken");
    check_vectors(t, "tokenizers/vectors/cl100k_base.json");
    tokenizer_free(t);
}

static void llama_cpp_vectors(void **state) {
    (void)state;
    static const char separator[] = "\n__ggml_vocab_test__\n";
    struct tokenizer *t = load("tokenizers/gpt2");
    char *texts, *outputs;
    size_t size, out_size, checked = 0;
    assert_int_equal(file_read(shared_path("tokenizers/vectors/ggml-vocab-gpt-2.gguf.inp"), 1 << 20,
                               &texts, &size, &err),
                     TRIL_OK);
    assert_int_equal(file_read(shared_path("tokenizers/vectors/ggml-vocab-gpt-2.gguf.out"), 1 << 20,
                               &outputs, &out_size, &err),
                     TRIL_OK);
    char *line = outputs;
    for (char *text = texts, *next; text; text = next, checked++) {
        char *end = strstr(text, separator);
        next = end ? end + sizeof separator - 1 : NULL;
        if (!next)
            break; /* what follows the last separator is no test */
        uint32_t *ids;
        size_t n;
        assert_int_equal(tokenizer_encode(t, text, (size_t)(end - text), false, &ids, &n, &err),
                         TRIL_OK);
        char *eol = strchr(line, '\n');
        for (size_t i = 0; i < n; i++)
            assert_int_equal(strtoul(line, &line, 10), ids[i]);
        assert_true(strspn(line, " ") == (size_t)(eol - line));
        line = eol + 1;
        free(ids);
    }
    assert_true(checked > 40);
    free(texts);
    free(outputs);
    tokenizer_free(t);
}

static void torture_survives(void **state) {
    (void)state;
    static const char *const tokenizers[] = {"tokenizers/gpt2", "tokenizers/cl100k_base.tiktoken"};
    static const char *const texts[] = {"misc/naughty-strings.txt", "misc/utf8-bmp.txt",
                                        "corpus/test.vi.txt", "corpus/test.multi.txt",
                                        "models/stories260K/model.safetensors"};
    for (size_t k = 0; k < 2; k++) {
        struct tokenizer *t = load(tokenizers[k]);
        for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
            char *text, *back;
            size_t size, n, back_size;
            uint32_t *ids;
            assert_int_equal(file_read(shared_path(texts[i]), 1 << 24, &text, &size, &err),
                             TRIL_OK);
            assert_int_equal(tokenizer_encode(t, text, size, true, &ids, &n, &err), TRIL_OK);
            assert_int_equal(tokenizer_decode(t, ids, n, false, &back, &back_size, &err), TRIL_OK);
            assert_int_equal(back_size, size);
            assert_memory_equal(back, text, size);
            free(back);
            free(ids);
            free(text);
        }
        tokenizer_free(t);
    }
}

/* The first merges and the vocabulary that a correct trainer derives. */
static void training_fixture(void **state) {
    (void)state;
    static const char *const specials[] = {"<|endoftext|>"};
    const char *corpus = shared_path("tokenizers/bpe-training/corpus.en");
    struct bpe_train_options o = {
        .vocab_size = 500, .specials = specials, .special_count = 1, .quiet = true};
    struct tokenizer *t;
    struct bpe_train_stats stats;
    json_t *vocab;
    const json_t *id;
    const char *key;
    char *want, *got;
    size_t want_size, got_size;
    assert_int_equal(tokenizer_train(&t, &corpus, 1, &o, &stats, &err), TRIL_OK);
    assert_int_equal(stats.bytes, 133027);
    const char *out = test_path("fixture.json");
    assert_int_equal(tokenizer_write(t, out, &err), TRIL_OK);
    assert_int_equal(json_read(&vocab,
                               shared_path("tokenizers/bpe-training/"
                                           "train-bpe-reference-vocab.json"),
                               1 << 20, &err),
                     TRIL_OK);
    json_t *written;
    assert_int_equal(json_read(&written, out, 1 << 20, &err), TRIL_OK);
    const json_t *model = json_object_get(written, "model");
    assert_true(json_equal(json_object_get(model, "vocab"), vocab));
    json_object_foreach(vocab, key, id)
        assert_true(json_integer_value(id) < tokenizer_vocab_size(t));
    assert_int_equal(
        file_read(shared_path("tokenizers/bpe-training/train-bpe-reference-merges.txt"), 1 << 20,
                  &want, &want_size, &err),
        TRIL_OK);
    got = calloc(1, want_size + 64);
    got_size = 0;
    for (size_t i = 0; i < json_array_size(json_object_get(model, "merges")); i++)
        got_size +=
            (size_t)sprintf(got + got_size, "%s\n",
                            json_string_value(json_array_get(json_object_get(model, "merges"), i)));
    assert_string_equal(got, want);
    free(got);
    free(want);
    json_decref(written);
    json_decref(vocab);
    tokenizer_free(t);
}

int main(void) {
    shared_path("tokenizers/gpt2"); /* or skip */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_vectors), cmocka_unit_test(llama_cpp_vectors),
        cmocka_unit_test(torture_survives), cmocka_unit_test(training_fixture)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
