/* The published pre-tokenisation patterns, by hand: each function gives the end of the pre-token
 * that begins at p < end, exactly where the regular expression's match ends (tested against PCRE2
 * and against the original libraries). `end` is the end of the text for look-ahead and `$`. All
 * take time linear in the text over a whole pass. Letters of ASCII are skipped eight at a time. */
#ifndef TEXT_SCAN_H
#define TEXT_SCAN_H

#include <string.h>

#include "text/unicode.h"

/* Letters or digits with `(?i:'s|'t|'re|'ve|'m|'ll|'d)`: see pattern.h for the expressions. */
enum scan_kind {
    SCAN_GPT2,
    SCAN_CL100K, /* tiktoken's present form: white space up to the end of the text stays whole */
    SCAN_LLAMA3, /* cl100k as it was first published: newlines split off even there */
    SCAN_QWEN2,  /* the same with single digits */
    SCAN_O200K,
    SCAN_KINDS
};

#define CHAR_WORD_LIKE (CHAR_LETTER | CHAR_NUMBER | CHAR_SPACE) /* what punctuation is not */

static inline uint64_t load64_little(const unsigned char *p) {
    uint64_t x;
    memcpy(&x, p, sizeof x);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap64(x);
#endif
    return x;
}

/* The high bit of each byte that is no ASCII letter. */
static inline uint64_t not_letters(uint64_t x) {
    const uint64_t ones = 0x0101010101010101u, high = 0x80 * ones;
    uint64_t lower = (x | 0x20 * ones) & ~high;
    uint64_t from_a = lower + (0x80 - 'a') * ones, above_z = lower + (0x7F - 'z') * ones;
    return (~from_a | above_z | x) & high;
}

static inline const unsigned char *skip_class(const unsigned char *p, const unsigned char *end,
                                              unsigned mask, unsigned want) {
    while (p < end) {
        unsigned n = 1, class = *p < 0x80 ? unicode_table[*p] : utf8_class(p, end, &n);
        if (((class & mask) != 0) != want)
            break;
        p += n;
    }
    return p;
}

static inline const unsigned char *skip_letters(const unsigned char *p, const unsigned char *end) {
    for (;;) {
        while (end - p >= 8) {
            uint64_t stop = not_letters(load64_little(p));
            if (stop) {
                p += __builtin_ctzll(stop) >> 3;
                break;
            }
            p += 8;
        }
        while (p < end && unicode_table[*p] & CHAR_LETTER && *p < 0x80)
            p++;
        if (p == end || *p < 0x80)
            return p;
        do { /* a run beyond ASCII */
            unsigned n;
            if (!(utf8_class(p, end, &n) & CHAR_LETTER))
                return p;
            p += n;
        } while (p < end && *p >= 0x80);
    }
}

/* 's 't 'm 'd 're 've 'll after the apostrophe at p: the end, or NULL. U+017F (long s) folds to s.
 */
static inline const unsigned char *scan_contraction(const unsigned char *p,
                                                    const unsigned char *end, bool fold) {
    if (end - p < 2)
        return NULL;
    unsigned fold_bit = fold ? 0x20 : 0;
    unsigned a = p[1] | fold_bit;
    if (a == 's' || a == 't' || a == 'm' || a == 'd')
        return p + 2;
    if (end - p < 3)
        return NULL;
    unsigned b = p[2] | fold_bit;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l'))
        return p + 3;
    if (fold && p[1] == 0xC5 && p[2] == 0xBF)
        return p + 3;
    return NULL;
}

/* White space at p:  \s*[\r\n]+ (unless gpt2), \s+(?!\S), \s+. */
static inline const unsigned char *scan_spaces(const unsigned char *p, const unsigned char *end,
                                               enum scan_kind kind) {
    const unsigned char *q = p, *last = p, *newline = NULL;
    while (q < end) {
        unsigned n = 1, class = *q < 0x80 ? unicode_table[*q] : utf8_class(q, end, &n);
        if (!(class & CHAR_SPACE))
            break;
        last = q;
        q += n;
        if (class & CHAR_NEWLINE)
            newline = q;
    }
    if (kind == SCAN_CL100K && q == end)
        return q;
    if (kind != SCAN_GPT2 && newline)
        return newline;
    return q == end || last == p ? q : last; /* leave one for the word that follows */
}

static inline const unsigned char *scan_gpt2(const unsigned char *p, const unsigned char *end) {
    const unsigned char *q = p;
    unsigned n = 1, class;
    if (*p == ' ') {
        if (++q == end)
            return q;
        class = *q < 0x80 ? unicode_table[*q] : utf8_class(q, end, &n);
        if (class & CHAR_SPACE)
            return scan_spaces(p, end, SCAN_GPT2);
    } else {
        class = *q < 0x80 ? unicode_table[*q] : utf8_class(q, end, &n);
        if (class & CHAR_SPACE)
            return scan_spaces(p, end, SCAN_GPT2);
        if (*p == '\'') {
            const unsigned char *contraction = scan_contraction(p, end, false);
            if (contraction)
                return contraction;
        }
    }
    if (class & CHAR_LETTER)
        return skip_letters(q + n, end);
    if (class & CHAR_NUMBER)
        return skip_class(q + n, end, CHAR_NUMBER, true);
    return skip_class(q + n, end, CHAR_WORD_LIKE, false);
}

static inline const unsigned char *scan_digits(const unsigned char *p, const unsigned char *end,
                                               int most) {
    for (int i = 0; i < most && p < end; i++) {
        unsigned n;
        if (!(utf8_class(p, end, &n) & CHAR_NUMBER))
            break;
        p += n;
    }
    return p;
}

/* ` ?[^\s\p{L}\p{N}]+[\r\n]*` (o200k: `[\r\n/]*`) or white space, the last alternatives. */
static inline const unsigned char *scan_rest(const unsigned char *p, const unsigned char *end,
                                             enum scan_kind kind) {
    const unsigned char *q = p + (*p == ' ');
    unsigned n;
    if (q == end || utf8_class(q, end, &n) & CHAR_WORD_LIKE)
        return scan_spaces(p, end, kind);
    q = skip_class(q + n, end, CHAR_WORD_LIKE, false);
    while (q < end && (*q == '\r' || *q == '\n' || (kind == SCAN_O200K && *q == '/')))
        q++;
    return q;
}

static inline const unsigned char *scan_cl100k(const unsigned char *p, const unsigned char *end,
                                               enum scan_kind kind) {
    unsigned n, class = utf8_class(p, end, &n);
    if (class & CHAR_LETTER)
        return skip_letters(p + n, end);
    if (class & CHAR_NUMBER)
        return scan_digits(p, end, kind == SCAN_QWEN2 ? 1 : 3);
    if (*p == '\'') {
        const unsigned char *contraction = scan_contraction(p, end, true);
        if (contraction)
            return contraction;
    }
    if (!(class & CHAR_NEWLINE) && p + n < end) {
        unsigned m;
        if (utf8_class(p + n, end, &m) & CHAR_LETTER)
            return skip_letters(p + n + m, end);
    }
    return scan_rest(p, end, kind);
}

/* o200k's words:  x?U*L+c?  |  x?U+L*c?  with x = [^\r\n\p{L}\p{N}], U = CHAR_UPPER, L = CHAR_LOWER
 * (which share Lm, Lo and M) and c a contraction. U* takes the whole run of U; if no L follows, it
 * gives characters back to the last one that is also L. */
struct scan_word {
    const unsigned char *first;  /* end by the first form, or NULL */
    const unsigned char *second; /* end by the second form, or NULL */
};

static inline struct scan_word scan_word(const unsigned char *p, const unsigned char *end) {
    struct scan_word w = {NULL, NULL};
    const unsigned char *q = p;
    unsigned n = 1, class = 0;
    for (; q < end; q += n) {
        class = utf8_class(q, end, &n);
        if (!(class & CHAR_UPPER))
            break;
        if (class & CHAR_LOWER)
            w.first = q + n;
    }
    if (q > p)
        w.second = q;
    if (q < end && class & CHAR_LOWER)
        w.first = skip_class(q, end, CHAR_LOWER, true);
    return w;
}

static inline const unsigned char *scan_o200k(const unsigned char *p, const unsigned char *end) {
    unsigned n, class = utf8_class(p, end, &n);
    if (class & CHAR_NUMBER)
        return scan_digits(p, end, 3);
    if (class & CHAR_NEWLINE)
        return scan_spaces(p, end, SCAN_O200K);
    struct scan_word with = {NULL, NULL}, without = {NULL, NULL};
    if (!(class & CHAR_LETTER))
        with = scan_word(p + n, end);
    if (!with.first && class & (CHAR_UPPER | CHAR_LOWER))
        without = scan_word(p, end);
    const unsigned char *q = with.first      ? with.first
                             : without.first ? without.first
                             : with.second   ? with.second
                                             : without.second;
    if (!q)
        return scan_rest(p, end, SCAN_O200K);
    if (q < end && *q == '\'') {
        const unsigned char *contraction = scan_contraction(q, end, true);
        if (contraction)
            q = contraction;
    }
    return q;
}

static inline const unsigned char *scan_next(enum scan_kind kind, const unsigned char *p,
                                             const unsigned char *end) {
    switch (kind) {
    case SCAN_GPT2:
        return scan_gpt2(p, end);
    case SCAN_O200K:
        return scan_o200k(p, end);
    default:
        return scan_cl100k(p, end, kind);
    }
}

#endif
