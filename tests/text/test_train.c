/* Training against the definition carried out naively, on random texts, with ties; threads and
 * special tokens; what is refused. */
#include "base/threads.h"
#include "text/bpe_train.h"
#include "text/pretokens.h"
#include "text/text_support.h"

static struct tril_error err;

/* The definition: pre-tokens as lists of byte strings; count all pairs; merge the most frequent, of
 * equals the greater pair of byte strings. */
struct naive {
    struct part {
        unsigned char bytes[64];
        size_t size;
    } parts[4096];
    size_t count;    /* parts of all pre-tokens */
    bool ends[4096]; /* the part ends its pre-token */
};

static bool collect(void *arg, const unsigned char *p, size_t size) {
    struct naive *n = arg;
    for (size_t i = 0; i < size && n->count < 4096; i++) {
        n->parts[n->count].bytes[0] = p[i];
        n->parts[n->count].size = 1;
        n->ends[n->count++] = i + 1 == size;
    }
    return n->count < 4096;
}

static int compare_bytes(const struct part *a, const struct part *b) {
    int order = memcmp(a->bytes, b->bytes, a->size < b->size ? a->size : b->size);
    return order ? order : a->size < b->size ? -1 : a->size > b->size;
}

static bool same_part(const struct part *a, const struct part *b) {
    return a->size == b->size && memcmp(a->bytes, b->bytes, a->size) == 0;
}

/* The next merge; false if no pair is left. */
static bool next_merge(struct naive *n, struct part *left, struct part *right) {
    size_t best_count = 0;
    for (size_t i = 0; i + 1 < n->count; i++) {
        size_t count = 0;
        if (n->ends[i])
            continue;
        for (size_t k = 0; k + 1 < n->count; k++)
            count += !n->ends[k] && same_part(&n->parts[k], &n->parts[i]) &&
                     same_part(&n->parts[k + 1], &n->parts[i + 1]);
        int order = count > best_count ? 1 : count < best_count ? -1 : 0;
        if (order == 0)
            order = compare_bytes(&n->parts[i], left);
        if (order == 0)
            order = compare_bytes(&n->parts[i + 1], right);
        if (order > 0) {
            best_count = count;
            *left = n->parts[i];
            *right = n->parts[i + 1];
        }
    }
    if (!best_count || left->size + right->size > sizeof left->bytes)
        return false;
    size_t to = 0;
    for (size_t i = 0; i < n->count; i++, to++) {
        n->parts[to] = n->parts[i];
        n->ends[to] = n->ends[i];
        if (i + 1 < n->count && !n->ends[i] && same_part(&n->parts[i], left) &&
            same_part(&n->parts[i + 1], right)) {
            memcpy(n->parts[to].bytes + left->size, right->bytes, right->size);
            n->parts[to].size += right->size;
            n->ends[to] = n->ends[++i];
        }
    }
    n->count = to;
    return true;
}

static void equals_the_definition(void **state) {
    (void)state;
    struct dice d = dice_make(9);
    struct naive *n = malloc(sizeof *n);
    for (int round = 0; round < 60; round++) {
        char text[1200];
        size_t size = 0;
        uint32_t letters = 2 + dice_below(&d, 4), count = 100 + dice_below(&d, 400);
        for (uint32_t i = 0; i < count; i++)
            text[size++] = dice_below(&d, 5) ? (char)('a' + dice_below(&d, letters)) : ' ';
        if (round % 3 == 0) /* one long run */
            for (int i = 0; i < 300; i++)
                text[size++] = i < 250 ? 'a' : (char)('a' + dice_below(&d, 2));
        struct bpe_train_options o = {
            .vocab_size = 256 + 40, .pattern = round % 2 ? "gpt2" : "cl100k", .quiet = true};
        struct tokenizer *t;
        assert_int_equal(tokenizer_train_text(&t, text, size, &o, NULL, &err), TRIL_OK);
        n->count = 0;
        assert_int_equal(pretokenize(t, text, size, collect, n, &err), TRIL_OK);
        for (uint32_t id = 256; id < 296; id++) {
            struct part left = {0}, right = {0};
            size_t got_size;
            const unsigned char *got = tokenizer_token_bytes(t, id, &got_size);
            if (!next_merge(n, &left, &right)) {
                assert_true(got == NULL || left.size + right.size > 64);
                break;
            }
            memcpy(left.bytes + left.size, right.bytes, right.size);
            assert_non_null(got);
            assert_int_equal(got_size, left.size + right.size);
            assert_memory_equal(got, left.bytes, got_size);
        }
        tokenizer_free(t);
    }
    free(n);
}

/* Many threads, several files, another order of files: the same tokenizer. */
static void threads_and_files(void **state) {
    (void)state;
    struct dice d = dice_make(13);
    const size_t room = 5 << 20;
    char *text = malloc(room + 4096);
    size_t size = 0;
    while (size < room)
        size += random_text(&d, (unsigned char *)text + size, 4096, false);
    static const char *const specials[] = {"<|endoftext|>", "[PAD]"};
    struct bpe_train_options o = {
        .vocab_size = 1000, .specials = specials, .special_count = 2, .quiet = true};
    uint64_t hashes[3];
    size_t cut = pattern_safe_cut((unsigned char *)text, size, size / 3);
    assert_int_equal(file_write_atomic(test_path("a.txt"), text, cut, &err), TRIL_OK);
    assert_int_equal(file_write_atomic(test_path("b.txt"), text + cut, size - cut, &err), TRIL_OK);
    assert_int_equal(file_write_atomic(test_path("c.md"), "not read", 8, &err), TRIL_OK);
    for (int i = 0; i < 3; i++) {
        struct tokenizer *t;
        const char *both[] = {test_path("b.txt"), test_path("a.txt")}, *dir = test_dir();
        threads_set(i + 1);
        assert_int_equal(i == 0   ? tokenizer_train_text(&t, text, size, &o, NULL, &err)
                         : i == 1 ? tokenizer_train(&t, both, 2, &o, NULL, &err)
                                  : tokenizer_train(&t, &dir, 1, &o, NULL, &err),
                         TRIL_OK);
        hashes[i] = tokenizer_hash(t);
        assert_int_equal(tokenizer_special_id(t, "[PAD]"), 1);
        assert_int_equal(tokenizer_vocab_size(t), 1000);
        /* Special strings are no training text. */
        assert_int_equal(tokenizer_token_id(t, "<|endoftext|>", 13), 0);
        assert_int_equal(tokenizer_token_id(t, "endoftext", 9), -1);
        tokenizer_free(t);
    }
    threads_set(0);
    assert_true(hashes[0] == hashes[1] && hashes[1] == hashes[2]);
    free(text);
}

/* Special tokens that coincide with bytes or merges share their ids, as in the written file they
 * must. */
static void odd_specials(void **state) {
    (void)state;
    static const char *const specials[] = {"the", "a", "two words", "\xC3\xA9"};
    struct bpe_train_options o = {
        .vocab_size = 300, .specials = specials, .special_count = 4, .quiet = true};
    const char *text = "there these tthhee other bathe lathe rathe th e th e";
    struct tokenizer *t, *again;
    assert_int_equal(tokenizer_train_text(&t, text, strlen(text), &o, NULL, &err), TRIL_OK);
    const char *path = test_path("odd.json");
    assert_int_equal(tokenizer_write(t, path, &err), TRIL_OK);
    if (tokenizer_load(&again, path, NULL, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    assert_true(tokenizer_hash(again) == tokenizer_hash(t));
    assert_int_equal(tokenizer_token_id(t, "a", 1), 1);
    assert_int_equal(tokenizer_special_id(again, "two words"), 2);
    tokenizer_free(t);
    tokenizer_free(again);
}

static void refusals(void **state) {
    (void)state;
    struct tokenizer *t;
    const char *missing = test_path("missing.txt"), *empty = test_path("empty.txt"),
               *junk = test_path("junk.bin");
    static const char *const twice[] = {"<x>", "<x>"}, *const bad[] = {"\xFF"},
                             *const none[] = {""};
    struct bpe_train_options o = {.vocab_size = 300, .quiet = true};
    unsigned char bytes[4096];
    struct dice d = dice_make(1);
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (unsigned char)dice_below(&d, 256);
    assert_int_equal(file_write_atomic(empty, "", 0, &err), TRIL_OK);
    assert_int_equal(file_write_atomic(junk, bytes, sizeof bytes, &err), TRIL_OK);
    assert_int_equal(tokenizer_train(&t, &missing, 1, &o, NULL, &err), TRIL_ERR_IO);
    assert_non_null(strstr(err.message, "missing.txt"));
    assert_int_equal(tokenizer_train(&t, &empty, 1, &o, NULL, &err), TRIL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "empty.txt"));
    assert_int_equal(tokenizer_train(&t, &junk, 1, &o, NULL, &err), TRIL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "looks binary"));
    assert_int_equal(tokenizer_train(&t, NULL, 0, &o, NULL, &err), TRIL_ERR_ARGUMENT);
    const char *dir = test_path("dir");
    assert_int_equal(dir_make(dir, &err), TRIL_OK);
    assert_int_equal(tokenizer_train(&t, &dir, 1, &o, NULL, &err), TRIL_ERR_IO);
    o.vocab_size = 255;
    assert_int_equal(tokenizer_train_text(&t, "abc", 3, &o, NULL, &err), TRIL_ERR_ARGUMENT);
    o.vocab_size = UINT32_MAX;
    assert_int_equal(tokenizer_train_text(&t, "abc", 3, &o, NULL, &err), TRIL_ERR_ARGUMENT);
    o.vocab_size = 300;
    o.pattern = "what";
    assert_int_equal(tokenizer_train_text(&t, "abc", 3, &o, NULL, &err), TRIL_ERR_ARGUMENT);
    o.pattern = NULL;
    o.specials = twice;
    o.special_count = 2;
    assert_int_equal(tokenizer_train_text(&t, "abc", 3, &o, NULL, &err), TRIL_ERR_ARGUMENT);
    o.special_count = 1;
    o.specials = bad;
    assert_int_equal(tokenizer_train_text(&t, "abc", 3, &o, NULL, &err), TRIL_ERR_ARGUMENT);
    o.specials = none;
    assert_int_equal(tokenizer_train_text(&t, "abc", 3, &o, NULL, &err), TRIL_ERR_ARGUMENT);
    /* A text with fewer pairs than asked for gives what there is. */
    o.special_count = 0;
    assert_int_equal(tokenizer_train_text(&t, "abc", 3, &o, NULL, &err), TRIL_OK);
    assert_int_equal(tokenizer_vocab_size(t), 258);
    tokenizer_free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(equals_the_definition),
                                       cmocka_unit_test(threads_and_files),
                                       cmocka_unit_test(odd_specials), cmocka_unit_test(refusals)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
