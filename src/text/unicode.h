/* What pre-tokenisation asks of a character, and UTF-8 read strictly.
 *
 * Classes come from utf8proc's tables, plus the characters that Unicode 15.1 and 16.0 added where
 * the installed utf8proc is older: Hugging Face `tokenizers` and tiktoken both stand at Unicode 16.
 */
#ifndef TEXT_UNICODE_H
#define TEXT_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum char_class {
    CHAR_LETTER = 1,    /* \p{L} */
    CHAR_NUMBER = 2,    /* \p{N} */
    CHAR_SPACE = 4,     /* \s: White_Space, 25 characters */
    CHAR_NEWLINE = 8,   /* CR or LF (also CHAR_SPACE) */
    CHAR_UPPER = 16,    /* [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], o200k's first set */
    CHAR_LOWER = 32,    /* [\p{Ll}\p{Lm}\p{Lo}\p{M}], its second */
    CHAR_WORD = 64,     /* \w as Rust's regex crate means it (added tokens with single_word) */
    CHAR_COMPOSES = 128 /* NFC may change a text with this character in it */
};

#define UNICODE_TABLE_SIZE 0x32400u /* all letters and numbers lie below */
extern uint8_t unicode_table[UNICODE_TABLE_SIZE];

/* Fills the table, once; call it before anything else here. */
void unicode_prepare(void);

static inline unsigned unicode_class(uint32_t c) {
    if (c < UNICODE_TABLE_SIZE)
        return unicode_table[c];
    /* Beyond: only the variation selectors are marks. */
    return c >= 0xE0100 && c <= 0xE01EF ? CHAR_UPPER | CHAR_LOWER | CHAR_WORD : 0;
}

#define UTF8_INVALID 0xFFFFFFFFu

/* The character at p < end, and its length in *size. A byte that begins no valid character (cut
 * short, overlong, a surrogate, above U+10FFFF) gives UTF8_INVALID with size 1. */
static inline uint32_t utf8_next(const unsigned char *p, const unsigned char *end, unsigned *size) {
    uint32_t c = p[0];
    size_t left = (size_t)(end - p);
    *size = 1;
    if (c < 0x80)
        return c;
    if (c < 0xC2 || c > 0xF4)
        return UTF8_INVALID;
    if (left < 2 || (p[1] & 0xC0) != 0x80)
        return UTF8_INVALID;
    if (c < 0xE0) {
        *size = 2;
        return (c & 0x1F) << 6 | (p[1] & 0x3Fu);
    }
    if (left < 3 || (p[2] & 0xC0) != 0x80)
        return UTF8_INVALID;
    if (c < 0xF0) {
        c = (c & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
        if (c < 0x800 || (c >= 0xD800 && c < 0xE000))
            return UTF8_INVALID;
        *size = 3;
        return c;
    }
    if (left < 4 || (p[3] & 0xC0) != 0x80)
        return UTF8_INVALID;
    c = (c & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
    if (c < 0x10000 || c > 0x10FFFF)
        return UTF8_INVALID;
    *size = 4;
    return c;
}

/* The class of the character at p, and its length; invalid bytes have class 0, one by one. */
static inline unsigned utf8_class(const unsigned char *p, const unsigned char *end,
                                  unsigned *size) {
    uint32_t c = utf8_next(p, end, size);
    return c == UTF8_INVALID ? 0 : unicode_class(c);
}

/* The character that ends at `end` (> begin): its class, and its length. */
unsigned utf8_class_before(const unsigned char *begin, const unsigned char *end, unsigned *size);

/* Writes c at out (room for 4), returns the length. */
unsigned utf8_put(uint32_t c, unsigned char *out);

/* Bytes at the end of [p, p + size) that could become a valid character if more followed: 0 to 3.
 */
unsigned utf8_incomplete_tail(const unsigned char *p, size_t size);

/* NFC. If the text is unchanged *out is NULL; otherwise a malloc'ed text of *out_size bytes. Bytes
 * that are no UTF-8 stay. false: out of memory. */
bool unicode_nfc(const unsigned char *text, size_t size, unsigned char **out, size_t *out_size);

/* GPT-2's byte alphabet: every byte as a printable character (space is U+0120, "Ġ"). */
uint32_t byte_to_char(unsigned char byte);
/* The byte that a character of the alphabet stands for, or -1. */
int char_to_byte(uint32_t c);
/* The 256 bytes in the order of their characters (33..126, 161..172, 174..255, then the rest). */
void byte_alphabet_order(unsigned char order[256]);

#endif
