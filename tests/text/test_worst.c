// ctest: timeout=120
/* The worst texts: runs of one letter, of blanks, of marks, and strings made against greedy
 * merging. Each is a megabyte and must be encoded (and trained on) in linear time: anything that
 * takes quadratic time, some 10^12 steps, runs into the test's time limit. */
#include "text/bpe_train.h"
#include "text/text_support.h"

static struct tril_error err;

/* A text of period `unit`, with a long tail at its end that breaks the rhythm. */
static void fill(char *text, size_t size, const char *unit, size_t unit_size) {
    for (size_t i = 0; i < size; i++)
        text[i] = unit[i % unit_size];
    memcpy(text + size - 8, "xyz zyx\n", 8);
}

static void check(const struct tokenizer *t, const char *unit, size_t unit_size) {
    const size_t size = 1 << 20;
    char *text = malloc(size), *back;
    uint32_t *ids;
    size_t n, back_size;
    fill(text, size, unit, unit_size);
    assert_int_equal(tokenizer_encode(t, text, size, true, &ids, &n, &err), TRIL_OK);
    assert_int_equal(tokenizer_decode(t, ids, n, false, &back, &back_size, &err), TRIL_OK);
    assert_int_equal(back_size, size);
    assert_memory_equal(back, text, size);
    free(back);
    free(ids);
    free(text);
}

static const struct {
    const char *text;
    size_t size;
} units[] = {{"a", 1},
             {" ", 1},
             {"\n", 1},
             {" \n", 2},
             {"\n  ", 3},
             {"'", 1},
             {"''s", 3},
             {"ab", 2},
             {"aab", 3},
             {"A", 1},
             {"Aa", 2},
             {"0", 1},
             {"!", 1},
             {"\0", 1},
             {"\xFF", 1},
             {"\xC3\xA9", 2},
             {"\xCC\x81", 2},         /* marks: letters to o200k, punctuation to the others */
             {"\xF0\x9F\x91\xA9", 4}, /* a picture */
             {"\xE2\x80\xA8\r\n", 5}, /* a line separator and a newline */
             {"<|endoftext|", 12},    /* nearly the special token */
             {"<|endoftext|>", 13},
             {"< mask><mask", 12}};

/* Tokenizers that know the runs: trained on them. */
static void worst_texts(void **state) {
    (void)state;
    static const char *const patterns[] = {"gpt2", "cl100k_base", "cl100k", "qwen2", "o200k"};
    static const char *const specials[] = {"<|endoftext|>"};
    for (size_t p = 0; p < sizeof patterns / sizeof *patterns; p++) {
        struct bpe_train_options o = {.vocab_size = 600,
                                      .pattern = patterns[p],
                                      .specials = specials,
                                      .special_count = 1,
                                      .quiet = true};
        char *text = malloc(1 << 20);
        size_t size = 0;
        for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
            fill(text + size, 40000, units[i].text, units[i].size);
            size += 40000;
        }
        struct tokenizer *t;
        assert_int_equal(tokenizer_train_text(&t, text, size, &o, NULL, &err), TRIL_OK);
        for (size_t i = 0; i < sizeof units / sizeof *units; i++)
            check(t, units[i].text, units[i].size);
        tokenizer_free(t);
        free(text);
    }
}

/* Pre-tokenisation by stages, added tokens with flags, NFC, a regular expression of one's own. */
static void worst_for_stages(void **state) {
    (void)state;
    static const char *const names[] = {"prefix.json", "digits.json", "splits.json", "qwen2.json"};
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
        struct tokenizer *t = golden_tokenizer(names[k], NULL);
        for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
            char *text = malloc(1 << 19);
            fill(text, 1 << 19, units[i].text, units[i].size);
            uint32_t *ids;
            size_t n;
            assert_int_equal(tokenizer_encode(t, text, 1 << 19, true, &ids, &n, &err), TRIL_OK);
            free(ids);
            free(text);
        }
        tokenizer_free(t);
    }
}

/* One pre-token of megabytes: the trainer's work is linear too. */
static void one_word(void **state) {
    (void)state;
    const size_t size = 4 << 20;
    char *text = malloc(size);
    struct dice d = dice_make(81);
    for (int kind = 0; kind < 2; kind++) {
        for (size_t i = 0; i < size; i++)
            text[i] = kind ? (char)('a' + dice_below(&d, 2)) : 'a';
        struct bpe_train_options o = {.vocab_size = 512, .quiet = true};
        struct tokenizer *t;
        struct bpe_train_stats stats;
        assert_int_equal(tokenizer_train_text(&t, text, size, &o, &stats, &err), TRIL_OK);
        assert_int_equal(stats.pre_tokens, 1);
        assert_true(kind == 1 || tokenizer_token_id(t, "aaaaaaaa", 8) >= 0);
        tokenizer_free(t);
    }
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(worst_texts),
                                       cmocka_unit_test(worst_for_stages),
                                       cmocka_unit_test(one_word)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
