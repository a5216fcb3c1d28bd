/* Tokenizers of every kind against Hugging Face tokenizers and tiktoken (tests/golden/tokenizer,
 * written by oracle/tokenizer_golden.py), written again and read again; on any bytes; on several
 * threads. */
#include "base/json.h"
#include "base/threads.h"
#include "text/text_support.h"
#include "text/tokenizer.h"

static struct tril_error err;
static json_t *files;

static const char *golden(const char *name) {
    static char path[512];
    snprintf(path, sizeof path, "%s/tokenizer/%s", TEST_GOLDEN_DIR, name);
    return path;
}

static int setup(void **state) {
    (void)state;
    return json_read(&files, golden("cases.json"), 1 << 24, &err) != TRIL_OK;
}

static int teardown(void **state) {
    (void)state;
    json_decref(files);
    return 0;
}

static struct tokenizer *load(const char *path, const char *pattern) {
    struct tokenizer *t;
    if (tokenizer_load(&t, path, pattern, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    return t;
}

/* All cases of one file; returns how many. */
static size_t check_cases(const struct tokenizer *t, const json_t *file, bool ranks) {
    const json_t *cases = json_object_get(file, "cases"), *c;
    size_t i;
    json_array_foreach(cases, i, c) {
        const json_t *text = json_object_get(c, "text"), *want = json_object_get(c, "ids"),
                     *decoded = json_object_get(c, "decoded");
        uint32_t *ids;
        size_t n, size;
        char *back;
        assert_int_equal(tokenizer_encode(t, json_string_value(text), json_string_length(text),
                                          !ranks, &ids, &n, &err),
                         TRIL_OK);
        bool same = n == json_array_size(want);
        for (size_t k = 0; same && k < n; k++)
            same = ids[k] == json_integer_value(json_array_get(want, k));
        if (!same)
            fail_msg("%s: other ids for \"%s\"", json_string_value(json_object_get(file, "file")),
                     json_string_value(text));
        assert_int_equal(tokenizer_decode(t, ids, n, false, &back, &size, &err), TRIL_OK);
        if (!decoded) { /* else the other library says U+FFFD where we keep bytes, or NFC differs */
            assert_int_equal(size, json_string_length(text));
            assert_memory_equal(back, json_string_value(text), size);
        }
        free(back);
        free(ids);
    }
    return i;
}

static void ids_of_the_libraries(void **state) {
    (void)state;
    size_t i, checked = 0;
    const json_t *file;
    json_array_foreach(files, i, file) {
        const char *name = json_string_value(json_object_get(file, "file"));
        const char *pattern = json_string_value(json_object_get(file, "pattern"));
        struct tokenizer *t = load(golden(name), pattern);
        checked += check_cases(t, file, pattern != NULL);
        /* What is written means the same, also in the form that other kinds of file are written in.
         */
        assert_int_equal(tokenizer_write_hf(t, test_dir(), 128, &err), TRIL_OK);
        struct tokenizer *again = load(test_dir(), NULL);
        check_cases(again, file, pattern != NULL);
        assert_int_equal(tokenizer_vocab_size(again), tokenizer_vocab_size(t));
        assert_string_equal(tokenizer_pattern(again), tokenizer_pattern(t));
        assert_true(tokenizer_hash(again) == tokenizer_hash(t));
        tokenizer_free(again);
        tokenizer_free(t);
    }
    assert_true(checked > 300);
}

/* Any bytes come back, in one piece and streamed; the stream never cuts a character. */
static void check_round_trip(const struct tokenizer *t, const unsigned char *text, size_t size,
                             bool special) {
    uint32_t *ids;
    size_t n, back_size, at = 0;
    char *back;
    assert_int_equal(tokenizer_encode(t, (const char *)text, size, special, &ids, &n, &err),
                     TRIL_OK);
    assert_int_equal(tokenizer_decode(t, ids, n, false, &back, &back_size, &err), TRIL_OK);
    assert_int_equal(back_size, size);
    assert_memory_equal(back, text, size);
    struct tokenizer_stream s;
    tokenizer_stream_begin(&s, t, false);
    for (size_t i = 0; i <= n; i++) {
        const char *piece;
        size_t length;
        if (i < n)
            assert_int_equal(tokenizer_stream_next(&s, ids[i], &piece, &length, &err), TRIL_OK);
        else
            tokenizer_stream_end(&s, &piece, &length);
        assert_true(at + length <= size);
        assert_memory_equal(piece, text + at, length);
        at += length;
        /* No valid character of the text spans the cut. */
        for (size_t back_by = 1; back_by < 4 && back_by <= at && at < size; back_by++) {
            unsigned width;
            if (utf8_next(text + at - back_by, text + size, &width) != UTF8_INVALID)
                assert_true(width <= back_by);
        }
    }
    assert_int_equal(at, size);
    tokenizer_stream_free(&s);
    free(back);
    free(ids);
}

static void any_bytes_survive(void **state) {
    (void)state;
    struct dice d = dice_make(21);
    static const char *const names[] = {"gpt2.json", "cl100k.json", "llama3.json", "o200k.json"};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        struct tokenizer *t = load(golden(names[k]), NULL);
        unsigned char text[4096];
        for (int i = 0; i < 1500; i++) {
            size_t n = random_text(&d, text, sizeof text, true);
            check_round_trip(t, text, n, i % 2 == 0);
        }
        for (int b = 0; b < 65536; b++) {
            text[0] = (unsigned char)b;
            text[1] = (unsigned char)(b >> 8);
            check_round_trip(t, text, 2, false);
        }
        tokenizer_free(t);
    }
}

static void stream_holds_back(void **state) {
    (void)state;
    struct tokenizer *t = load(golden("gpt2.json"), NULL);
    struct tokenizer_stream s;
    const char *text;
    size_t size;
    tokenizer_stream_begin(&s, t, true);
    /* "é" as two byte tokens; an 0xF0 that never becomes a character; the special token, skipped.
     */
    const unsigned char bytes[] = {0xC3, 0xA9, 0xF0, 'x', 0xE2, 0x82};
    static const char *const pieces[] = {"", "\xC3\xA9", "", "\xF0x", "", ""};
    for (size_t i = 0; i < sizeof bytes; i++) {
        int64_t id = tokenizer_token_id(t, bytes + i, 1);
        assert_true(id >= 0);
        assert_int_equal(tokenizer_stream_next(&s, (uint32_t)id, &text, &size, &err), TRIL_OK);
        assert_string_equal(text, pieces[i]);
        assert_int_equal(tokenizer_stream_next(&s, (uint32_t)tokenizer_eos(t), &text, &size, &err),
                         TRIL_OK);
        assert_int_equal(size, 0);
    }
    tokenizer_stream_end(&s, &text, &size);
    assert_int_equal(size, 2);
    assert_string_equal(text, "\xE2\x82");
    tokenizer_stream_end(&s, &text, &size);
    assert_int_equal(size, 0);
    assert_int_equal(tokenizer_stream_next(&s, 99999, &text, &size, &err), TRIL_ERR_ARGUMENT);
    tokenizer_stream_free(&s);
    tokenizer_free(t);
}

static void accessors(void **state) {
    (void)state;
    struct tokenizer *t = load(golden("llama3.json"), NULL);
    size_t size;
    assert_string_equal(tokenizer_pattern(t), "cl100k");
    assert_int_equal(tokenizer_special_id(t, "<|endoftext|>"), 0);
    assert_int_equal(tokenizer_special_id(t, "<|nothing|>"), -1);
    assert_int_equal(tokenizer_bos(t), tokenizer_special_id(t, "<|begin_of_text|>"));
    assert_int_equal(tokenizer_eos(t), 0);
    assert_int_equal(tokenizer_added_count(t), 2);
    assert_true(tokenizer_is_special(t, 0));
    assert_false(tokenizer_is_special(t, 5));
    assert_false(tokenizer_is_special(t, 1u << 30));
    assert_null(tokenizer_token_bytes(t, tokenizer_vocab_size(t), &size));
    for (uint32_t i = 0; i < tokenizer_vocab_size(t); i++) {
        const unsigned char *bytes = tokenizer_token_bytes(t, i, &size);
        assert_non_null(bytes);
        assert_int_equal(tokenizer_token_id(t, bytes, size), i);
    }
    tokenizer_free(t);
    tokenizer_free(NULL);
    /* A rank file names no special tokens: their strings are text. */
    t = load(golden("ranks.tiktoken"), "gpt2");
    uint32_t *ids;
    assert_int_equal(tokenizer_eos(t), -1);
    assert_int_equal(tokenizer_encode(t, "<|endoftext|>", 13, true, &ids, &size, &err), TRIL_OK);
    assert_true(size > 3);
    free(ids);
    tokenizer_free(t);
}

/* Long texts on several threads, and one letter a hundred thousand times. */
static void threads_change_nothing(void **state) {
    (void)state;
    struct dice d = dice_make(33);
    const size_t room = 6 << 20;
    unsigned char *text = malloc(room + 4096);
    threads_set(3);
    for (size_t k = 0; k < json_array_size(files); k++) {
        const json_t *file = json_array_get(files, k);
        const char *pattern = json_string_value(json_object_get(file, "pattern"));
        struct tokenizer *t =
            load(golden(json_string_value(json_object_get(file, "file"))), pattern);
        size_t size = 0, n, m;
        while (size < room / (k ? 3 : 1))
            size += random_text(&d, text + size, 4096, k % 2 == 0);
        memset(text + size / 2, 'a', size / 8);
        uint32_t *one, *many;
        assert_int_equal(tokenizer_encode(t, (char *)text, size, true, &one, &n, &err), TRIL_OK);
        assert_int_equal(tokenizer_encode_parallel(t, (char *)text, size, true, &many, &m, &err),
                         TRIL_OK);
        assert_int_equal(n, m);
        assert_memory_equal(one, many, n * sizeof *one);
        free(one);
        free(many);
        tokenizer_free(t);
    }
    threads_set(0);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_of_the_libraries), cmocka_unit_test(any_bytes_survive),
        cmocka_unit_test(stream_holds_back), cmocka_unit_test(accessors),
        cmocka_unit_test(threads_change_nothing)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
