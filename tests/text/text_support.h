/* For the tests of the text room: random texts, and the data that only some machines have. */
#ifndef TESTS_TEXT_SUPPORT_H
#define TESTS_TEXT_SUPPORT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/random.h"
#include "support/support.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

/* A stream of random numbers. */
struct dice {
    struct random_key key;
    uint64_t element;
};

static inline struct dice dice_make(uint64_t seed) {
    return (struct dice){.key = {.seed = seed, .op = RANDOM_TEST}};
}

static inline uint32_t dice_below(struct dice *d, uint32_t n) {
    return random_u32(&d->key, d->element++) % n;
}

/* A random text of up to `room` bytes, NUL-terminated: words, runs of white space, digits, marks,
 * and characters from all over Unicode; with `junk`, bytes that are no UTF-8 too. Returns its size.
 */
static inline size_t random_text(struct dice *d, unsigned char *out, size_t room, bool junk) {
    static const char *const words[] = {"the",
                                        " of",
                                        "I'll",
                                        " we've",
                                        "IT'S",
                                        "don't",
                                        "'\xC5\xBF",
                                        "'RE",
                                        "''s",
                                        "hello world",
                                        "\xC4\x91\xC6\xB0\xE1\xBB\243c",
                                        "ti\xE1\xBA\xBFng",
                                        "e\xCC\x81",
                                        "A\xCC\x8A\xCC\xA3",
                                        "\xE4\xB8\xAD\xE6\x96\x87",
                                        "\xED\x95\x9C",
                                        "\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB",
                                        "\xC7\x85",
                                        "\xCA\xB0",
                                        "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x9A\x80",
                                        "<|endoftext|>",
                                        "123456",
                                        "\xD9\xA3\xD9\xA4",
                                        "\xC2\xBD",
                                        "\xE2\x85\xA7",
                                        "!?;",
                                        "/\r\n",
                                        "...",
                                        "==="};
    static const uint32_t spaces[] = {' ',  ' ',  ' ',    '\t',   '\n',   '\r',   0x0B,
                                      0x85, 0xA0, 0x2003, 0x2028, 0x3000, 0x180E, 0x200B};
    size_t n = 0;
    uint32_t parts = dice_below(d, 24);
    while (parts-- && n + 64 < room) {
        uint32_t kind = dice_below(d, junk ? 8 : 7), count = 1 + dice_below(d, 6);
        if (kind < 2) {
            const char *w = words[dice_below(d, sizeof words / sizeof *words)];
            memcpy(out + n, w, strlen(w));
            n += strlen(w);
        } else if (kind == 2) {
            while (count--)
                n += utf8_put(spaces[dice_below(d, sizeof spaces / sizeof *spaces)], out + n);
        } else if (kind == 3) {
            unsigned char c = (unsigned char)"aZ 0-"[dice_below(d, 5)];
            for (count = 1 + dice_below(d, 40); count--;)
                out[n++] = c;
        } else if (kind == 4) {
            while (count--)
                out[n++] = (unsigned char)(32 + dice_below(d, 95));
        } else if (kind < 7) {
            while (count--) {
                uint32_t c = kind == 5 ? dice_below(d, 0x3000) : dice_below(d, 0x110000);
                if (c < 0xD800 || c >= 0xE000)
                    n += utf8_put(c, out + n);
            }
        } else {
            while (count--)
                out[n++] = (unsigned char)dice_below(d, 256);
        }
    }
    out[n] = '\0';
    return n;
}

/* A tokenizer of tests/golden/tokenizer. */
static inline struct tokenizer *golden_tokenizer(const char *name, const char *pattern) {
    struct tokenizer *t;
    struct tril_error error;
    char path[512];
    snprintf(path, sizeof path, "%s/tokenizer/%s", TEST_GOLDEN_DIR, name);
    if (tokenizer_load(&t, path, pattern, &error) != TRIL_OK)
        fail_msg("%s", error.message);
    return t;
}

/* Writes a file into the test's folder and returns its path, valid as test_path's. */
static inline const char *text_write(const char *name, const char *text) {
    struct tril_error error;
    const char *path = test_path(name);
    if (file_write_atomic(path, text, strlen(text), &error) != TRIL_OK)
        fail_msg("%s", error.message);
    return path;
}

/* TEST_SHARED_DIR/name; exits as skipped where it is not there. Valid until the eighth call from
 * here. */
static inline const char *shared_path(const char *name) {
    static char paths[8][512];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", TEST_SHARED_DIR, name);
    if (!path_exists(path)) {
        printf("skipped: %s is not on this machine\n", path);
        exit(TEST_SKIP);
    }
    return path;
}

#endif
