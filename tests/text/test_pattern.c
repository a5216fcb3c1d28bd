// ctest: timeout=120
/* The hand-written patterns against their regular expressions under PCRE2, on random texts;
 * character classes; NFC; the byte alphabet; UTF-8. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

#include "text/pattern.h"
#include "text/text_support.h"

static struct tril_error err;

/* A published expression compiled as if it were unknown: a blank set keeps it from being
 * recognised. */
static struct pattern compiled(enum scan_kind kind) {
    struct pattern known, p;
    assert_int_equal(pattern_published(&known, kind, &err), TRIL_OK);
    char *regex = malloc(strlen(known.source) + 8);
    sprintf(regex, "(?:%s)", known.source);
    assert_int_equal(pattern_compile(&p, regex, PATTERN_RUST, &err), TRIL_OK);
    assert_int_equal(p.kind, SCAN_KINDS);
    free(regex);
    pattern_free(&known);
    return p;
}

static void compare(enum scan_kind kind, struct pattern *p, struct pattern_scratch *s,
                    const unsigned char *text, size_t size) {
    size_t at = 0;
    while (at < size) {
        size_t begin, end;
        bool found;
        assert_int_equal(pattern_match(p, s, text, size, at, &begin, &end, &found, &err), TRIL_OK);
        assert_true(found);
        assert_int_equal(begin, at);
        const unsigned char *stop = scan_next(kind, text + at, text + size);
        if (stop != text + end) {
            fprintf(stderr, "pattern %d at byte %zu of \"%s\": %zu, not %zu\n", (int)kind, at, text,
                    (size_t)(stop - text), end);
            fail();
        }
        at = end;
    }
}

/* Characters of which the installed PCRE2 (an older Unicode) thinks otherwise than our table. */
static uint8_t disputed[0x110000];

static void find_disputed(void) {
    static const struct {
        const char *regex;
        unsigned class;
    } sets[] = {{"\\p{L}(|x)", CHAR_LETTER},
                {"\\p{N}(|x)", CHAR_NUMBER},
                {"[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}](|x)", CHAR_UPPER},
                {"[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}](|x)", CHAR_LOWER}};
    unsigned char *text = malloc(4 * 0x110000);
    size_t size = 0, begin, end;
    for (uint32_t c = 0; c < 0x110000; c++)
        if (c < 0xD800 || c >= 0xE000)
            size += utf8_put(c, text + size);
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        struct pattern p;
        struct pattern_scratch s = {0};
        bool found = true;
        uint8_t *has = calloc(0x110000, 1);
        assert_int_equal(pattern_named(&p, sets[i].regex, &err), TRIL_OK);
        for (size_t at = 0; found; at = end) {
            unsigned n;
            assert_int_equal(pattern_match(&p, &s, text, size, at, &begin, &end, &found, &err), 0);
            if (found)
                has[utf8_next(text + begin, text + size, &n)] = 1;
        }
        for (uint32_t c = 0; c < 0x110000; c++)
            disputed[c] |= has[c] != ((unicode_class(c) & sets[i].class) != 0);
        free(has);
        pattern_scratch_free(&s);
        pattern_free(&p);
    }
    free(text);
    unsigned count = 0;
    for (uint32_t c = 0; c < 0x110000; c++)
        count += disputed[c];
    assert_true(count < 12000); /* what Unicode 15 and 16 added, at most */
    for (uint32_t c = 0; c < 0x900; c++)
        assert_true(!disputed[c] || c == 0x897);
}

static bool agreed(const unsigned char *text, size_t size) {
    for (size_t i = 0; i < size;) {
        unsigned n;
        if (disputed[utf8_next(text + i, text + size, &n)])
            return false;
        i += n;
    }
    return true;
}

static void scans_equal_regexes(void **state) {
    (void)state;
    enum { ROOM = 2048 };
    unsigned char text[ROOM];
    find_disputed();
    for (int kind = 0; kind < SCAN_KINDS; kind++) {
        struct pattern p = compiled((enum scan_kind)kind);
        struct pattern_scratch s = {0};
        struct dice d = dice_make(100 + (uint64_t)kind);
        for (int i = 0; i < 6000; i++) {
            size_t n = random_text(&d, text, ROOM, false);
            if (agreed(text, n))
                compare((enum scan_kind)kind, &p, &s, text, n);
        }
        /* Every sequence of four of the characters that decide. */
        static const char *const atoms[] = {" ",        "\n",       "\t", "a",  "A",
                                            "1",        "!",        "'",  "s",  "\xC2\xA0",
                                            "\xCC\x81", "\xCA\xB0", "l",  "\r", "/"};
        const int n = sizeof atoms / sizeof *atoms;
        for (int i = 0; i < n * n * n * n; i++) {
            int k = i;
            text[0] = '\0';
            for (int j = 0; j < 4; j++, k /= n)
                strcat((char *)text, atoms[k % n]);
            compare((enum scan_kind)kind, &p, &s, text, strlen((char *)text));
        }
        pattern_scratch_free(&s);
        pattern_free(&p);
    }
}

/* Any bytes: every scan moves on and ends. */
static void scans_pass_junk(void **state) {
    (void)state;
    struct dice d = dice_make(7);
    for (int i = 0; i < 20000; i++) {
        size_t n = 1 + dice_below(&d, 40);
        unsigned char *text = malloc(n); /* exactly: the sanitizer sees a byte too far */
        for (size_t k = 0; k < n; k++)
            text[k] = (unsigned char)(dice_below(&d, 3) ? dice_below(&d, 256)
                                                        : (uint32_t) " '\nas"[k % 5]);
        for (int kind = 0; kind < SCAN_KINDS; kind++)
            for (const unsigned char *p = text; p < text + n;) {
                const unsigned char *q = scan_next((enum scan_kind)kind, p, text + n);
                assert_true(q > p && q <= text + n);
                p = q;
            }
        free(text);
    }
}

static void patterns_by_name(void **state) {
    (void)state;
    static const struct {
        const char *name;
        enum scan_kind kind;
    } names[] = {{"gpt2", SCAN_GPT2},     {"cl100k", SCAN_LLAMA3}, {"cl100k_base", SCAN_CL100K},
                 {"llama3", SCAN_LLAMA3}, {"qwen2", SCAN_QWEN2},   {"o200k", SCAN_O200K}};
    struct pattern p;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        assert_int_equal(pattern_named(&p, names[i].name, &err), TRIL_OK);
        assert_int_equal(p.kind, names[i].kind);
        pattern_free(&p);
    }
    assert_int_equal(pattern_named(&p, "gpt7", &err), TRIL_ERR_ARGUMENT);
    assert_int_equal(pattern_named(&p, "(unclosed|", &err), TRIL_ERR_UNSUPPORTED);
    assert_int_equal(pattern_named(&p, "\\w+|\\s+", &err), TRIL_ERR_UNSUPPORTED);
    assert_int_equal(pattern_compile(&p, "\\p{N}{1,3}+|\\S|\\s", PATTERN_ONIGURUMA, &err),
                     TRIL_ERR_UNSUPPORTED);
    static const char *const good[] = {"\\p{L}+|\\P{L}+", "\\x{41}+|[^A]+", "\\pL+|\\PL",
                                       "\\p{N}{1,3}|\\p{Lu}?\\p{Ll}+|.|\n"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        if (pattern_compile(&p, good[i], PATTERN_ONIGURUMA, &err) != TRIL_OK)
            fail_msg("%s", err.message);
        pattern_free(&p);
    }
    assert_int_equal(pattern_compile(&p, "a{2}+|.", PATTERN_ONIGURUMA, &err), TRIL_ERR_UNSUPPORTED);
    assert_int_equal(pattern_compile(&p, "a{2}+|.", PATTERN_RUST, &err), TRIL_OK);
    pattern_free(&p);
    assert_int_equal(pattern_compile(&p, "[a&&b]|.", PATTERN_ONIGURUMA, &err),
                     TRIL_ERR_UNSUPPORTED);
}

/* A pattern that backtracks without end gives an error, not a hang. */
static void patterns_give_up(void **state) {
    (void)state;
    struct pattern p;
    struct pattern_scratch s = {0};
    unsigned char text[64];
    size_t begin, end;
    bool found;
    memset(text, 'a', sizeof text);
    text[63] = '!';
    assert_int_equal(pattern_named(&p, "(?:a+)+(?:a+)+(?:a+)+$", &err), TRIL_OK);
    assert_int_equal(pattern_match(&p, &s, text, sizeof text, 0, &begin, &end, &found, &err),
                     TRIL_ERR_UNSUPPORTED);
    pattern_scratch_free(&s);
    pattern_free(&p);
}

static void classes(void **state) {
    (void)state;
    unsigned letters = 0, numbers = 0, spaces = 0, marks = 0;
    for (uint32_t c = 0; c < 0x110000; c++) {
        unsigned class = unicode_class(c);
        letters += (class & CHAR_LETTER) != 0;
        numbers += (class & CHAR_NUMBER) != 0;
        spaces += (class & CHAR_SPACE) != 0;
        marks += !(class & CHAR_LETTER) && class & CHAR_UPPER;
        assert_false(class & CHAR_LETTER && class & (CHAR_NUMBER | CHAR_SPACE));
    }
    /* As counted in Hugging Face tokenizers 0.23 and tiktoken 0.14 (Unicode 16). */
    assert_int_equal(letters, 141028);
    assert_int_equal(numbers, 1911);
    assert_int_equal(spaces, 25);
    assert_int_equal(marks, 2501);
}

static void utf8(void **state) {
    (void)state;
    for (uint32_t c = 0; c < 0x110000; c++) {
        unsigned char bytes[4];
        unsigned n = utf8_put(c, bytes), got;
        bool surrogate = c >= 0xD800 && c < 0xE000;
        assert_int_equal(utf8_next(bytes, bytes + n, &got), surrogate ? UTF8_INVALID : c);
        assert_int_equal(got, surrogate ? 1 : n);
        for (unsigned k = 1; k < n; k++) {
            assert_int_equal(utf8_next(bytes, bytes + k, &got), UTF8_INVALID);
            if (!surrogate)
                assert_int_equal(utf8_incomplete_tail(bytes, k), k);
        }
        assert_int_equal(utf8_incomplete_tail(bytes, n), 0);
        if (!surrogate) {
            assert_int_equal(utf8_class_before(bytes, bytes + n, &got), unicode_class(c));
            assert_int_equal(got, n);
        }
    }
    static const char *const bad[] = {
        "\x80",         "\xC0\x80",         "\xC1\xBF",         "\xE0\x80\x80",
        "\xED\xA0\x80", "\xF0\x80\x80\x80", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80",
        "\xFF",         "\xE2\x82",         "\xE2(\xA1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        unsigned n;
        const unsigned char *p = (const unsigned char *)bad[i];
        assert_int_equal(utf8_next(p, p + strlen(bad[i]), &n), UTF8_INVALID);
        assert_int_equal(n, 1);
    }
    assert_int_equal(utf8_incomplete_tail((const unsigned char *)"\xE0\x80", 2), 0); /* overlong */
    assert_int_equal(utf8_incomplete_tail((const unsigned char *)"\xED\xA0", 2), 0); /* surrogate */
    assert_int_equal(utf8_incomplete_tail((const unsigned char *)"\xF4\x90", 2), 0);
}

/* NFC run by run equals utf8proc on the whole text. */
static void nfc(void **state) {
    (void)state;
    struct dice d = dice_make(11);
    unsigned char text[2048];
    int changed = 0;
    for (int i = 0; i < 20000; i++) {
        size_t n = random_text(&d, text, sizeof text, false), got_size;
        unsigned char *got;
        utf8proc_uint8_t *want = NULL;
        utf8proc_ssize_t size =
            utf8proc_map(text, (utf8proc_ssize_t)n, &want, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        assert_true(size >= 0);
        assert_true(unicode_nfc(text, n, &got, &got_size));
        assert_int_equal(got_size, size);
        assert_memory_equal(got ? got : text, want, (size_t)size);
        changed += got != NULL;
        free(got);
        free(want);
    }
    assert_true(changed > 1000);
    unsigned char *got;
    size_t size;
    assert_true(unicode_nfc((const unsigned char *)"\xFF"
                                                   "e\xCC\x81\xCC",
                            5, &got, &size));
    assert_int_equal(size, 4);
    assert_memory_equal(got, "\xFF\xC3\xA9\xCC", 4);
    free(got);
}

static void alphabet(void **state) {
    (void)state;
    unsigned char order[256];
    bool seen[256] = {false};
    for (int b = 0; b < 256; b++)
        assert_int_equal(char_to_byte(byte_to_char((unsigned char)b)), b);
    assert_int_equal(byte_to_char(' '), 0x120);
    assert_int_equal(byte_to_char('\n'), 0x10A);
    assert_int_equal(byte_to_char(0xAD), 0x143);
    assert_int_equal(char_to_byte(' '), -1);
    assert_int_equal(char_to_byte(0x144), -1);
    byte_alphabet_order(order);
    assert_int_equal(order[0], '!');
    assert_int_equal(order[255], 0xAD);
    for (int i = 0; i < 256; i++) {
        assert_false(seen[order[i]]);
        seen[order[i]] = true;
    }
}

int main(void) {
    unicode_prepare();
    const struct CMUnitTest tests[] = {cmocka_unit_test(scans_equal_regexes),
                                       cmocka_unit_test(scans_pass_junk),
                                       cmocka_unit_test(patterns_by_name),
                                       cmocka_unit_test(patterns_give_up),
                                       cmocka_unit_test(classes),
                                       cmocka_unit_test(utf8),
                                       cmocka_unit_test(nfc),
                                       cmocka_unit_test(alphabet)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
