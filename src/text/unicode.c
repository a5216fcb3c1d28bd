#include "text/unicode.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

uint8_t unicode_table[UNICODE_TABLE_SIZE];

enum { LU = 1, LL, LT, LM, LO, MARK, NUMBER };

/* Letters, marks and numbers of Unicode 15.1 and 16.0 (DerivedGeneralCategory), for a utf8proc that
 * does not know them yet. */
static const struct {
    uint32_t first, last;
    int category;
} newer[] = {
    {0x0897, 0x0897, MARK},     {0x1C89, 0x1C89, LU},       {0x1C8A, 0x1C8A, LL},
    {0xA7CB, 0xA7CC, LU},       {0xA7CD, 0xA7CD, LL},       {0xA7DA, 0xA7DA, LU},
    {0xA7DB, 0xA7DB, LL},       {0xA7DC, 0xA7DC, LU},       {0x105C0, 0x105F3, LO},
    {0x10D40, 0x10D49, NUMBER}, {0x10D4A, 0x10D4D, LO},     {0x10D4E, 0x10D4E, LM},
    {0x10D4F, 0x10D4F, LO},     {0x10D50, 0x10D65, LU},     {0x10D69, 0x10D6D, MARK},
    {0x10D6F, 0x10D6F, LM},     {0x10D70, 0x10D85, LL},     {0x10EC2, 0x10EC4, LO},
    {0x10EFC, 0x10EFC, MARK},   {0x11380, 0x11389, LO},     {0x1138B, 0x1138B, LO},
    {0x1138E, 0x1138E, LO},     {0x11390, 0x113B5, LO},     {0x113B7, 0x113B7, LO},
    {0x113B8, 0x113C0, MARK},   {0x113C2, 0x113C2, MARK},   {0x113C5, 0x113C5, MARK},
    {0x113C7, 0x113CA, MARK},   {0x113CC, 0x113D0, MARK},   {0x113D1, 0x113D1, LO},
    {0x113D2, 0x113D2, MARK},   {0x113D3, 0x113D3, LO},     {0x113E1, 0x113E2, MARK},
    {0x116D0, 0x116E3, NUMBER}, {0x11BC0, 0x11BE0, LO},     {0x11BF0, 0x11BF9, NUMBER},
    {0x11F5A, 0x11F5A, MARK},   {0x13460, 0x143FA, LO},     {0x16100, 0x1611D, LO},
    {0x1611E, 0x1612F, MARK},   {0x16130, 0x16139, NUMBER}, {0x16D40, 0x16D42, LM},
    {0x16D43, 0x16D6A, LO},     {0x16D6B, 0x16D6C, LM},     {0x16D70, 0x16D79, NUMBER},
    {0x18CFF, 0x18CFF, LO},     {0x1CCF0, 0x1CCF9, NUMBER}, {0x1E5D0, 0x1E5ED, LO},
    {0x1E5EE, 0x1E5EF, MARK},   {0x1E5F0, 0x1E5F0, LO},     {0x1E5F1, 0x1E5FA, NUMBER},
    {0x2EBF0, 0x2EE5D, LO},
};

static unsigned class_of(int category) {
    switch (category) {
    case LU:
    case LT:
        return CHAR_LETTER | CHAR_UPPER | CHAR_WORD;
    case LL:
        return CHAR_LETTER | CHAR_LOWER | CHAR_WORD;
    case LM:
    case LO:
        return CHAR_LETTER | CHAR_UPPER | CHAR_LOWER | CHAR_WORD;
    case MARK:
        return CHAR_UPPER | CHAR_LOWER | CHAR_WORD;
    case NUMBER:
        return CHAR_NUMBER | CHAR_WORD;
    default:
        return 0;
    }
}

static unsigned class_of_utf8proc(utf8proc_category_t category) {
    switch (category) {
    case UTF8PROC_CATEGORY_LU:
        return class_of(LU);
    case UTF8PROC_CATEGORY_LL:
        return class_of(LL);
    case UTF8PROC_CATEGORY_LT:
        return class_of(LT);
    case UTF8PROC_CATEGORY_LM:
        return class_of(LM);
    case UTF8PROC_CATEGORY_LO:
        return class_of(LO);
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
        return class_of(MARK);
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
        return class_of(NUMBER);
    case UTF8PROC_CATEGORY_NO:
        return CHAR_NUMBER; /* superscripts and fractions are no \w */
    case UTF8PROC_CATEGORY_PC:
        return CHAR_WORD;
    default:
        return 0;
    }
}

static void mark(uint32_t first, uint32_t last, unsigned bits) {
    for (uint32_t c = first; c <= last; c++)
        unicode_table[c] |= (uint8_t)bits;
}

/* Characters that NFC may touch: those that decompose and do not come back alone, those with a
 * combining class, and those that compose with what stands before them. */
static void mark_composing(void) {
    for (uint32_t c = 0xC0; c < UNICODE_TABLE_SIZE; c++) {
        const utf8proc_property_t *property = utf8proc_get_property((utf8proc_int32_t)c);
        if (property->combining_class)
            mark(c, c, CHAR_COMPOSES);
        if (property->decomp_seqindex == UINT16_MAX || property->decomp_type)
            continue; /* no canonical decomposition (Hangul syllables: below) */
        utf8proc_int32_t parts[8];
        int boundary = 0;
        utf8proc_ssize_t n =
            utf8proc_decompose_char((utf8proc_int32_t)c, parts, 8, UTF8PROC_DECOMPOSE, &boundary);
        if (n < 1 || n > 8)
            continue;
        for (utf8proc_ssize_t i = 1; i < n; i++)
            mark((uint32_t)parts[i], (uint32_t)parts[i], CHAR_COMPOSES);
        unsigned char utf8[4];
        utf8proc_uint8_t *composed = NULL;
        unsigned size = utf8_put(c, utf8);
        utf8proc_ssize_t got =
            utf8proc_map(utf8, size, &composed, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (got != (utf8proc_ssize_t)size || memcmp(composed, utf8, size) != 0)
            mark(c, c, CHAR_COMPOSES);
        free(composed);
    }
    mark(0x1161, 0x1175, CHAR_COMPOSES); /* Hangul vowels and final consonants */
    mark(0x11A8, 0x11C2, CHAR_COMPOSES);
}

static void prepare(void) {
    for (uint32_t c = 0; c < UNICODE_TABLE_SIZE; c++)
        unicode_table[c] = (uint8_t)class_of_utf8proc(utf8proc_category((utf8proc_int32_t)c));
    for (size_t i = 0; i < sizeof newer / sizeof *newer; i++)
        for (uint32_t c = newer[i].first; c <= newer[i].last; c++)
            if (utf8proc_category((utf8proc_int32_t)c) == UTF8PROC_CATEGORY_CN)
                unicode_table[c] = (uint8_t)class_of(newer[i].category);
    mark('\t', '\r', CHAR_SPACE);
    mark('\n', '\n', CHAR_NEWLINE);
    mark('\r', '\r', CHAR_NEWLINE);
    static const uint32_t spaces[] = {0x20,   0x85,   0xA0,   0x1680, 0x2028,
                                      0x2029, 0x202F, 0x205F, 0x3000};
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++)
        mark(spaces[i], spaces[i], CHAR_SPACE);
    mark(0x2000, 0x200A, CHAR_SPACE);
    /* \w is Alphabetic, M, Nd, Pc and Join_Control; of what is Alphabetic but no L, M or N there
     * are the circled and squared letters. */
    mark(0x200C, 0x200D, CHAR_WORD);
    mark(0x24B6, 0x24E9, CHAR_WORD);
    mark(0x1F130, 0x1F149, CHAR_WORD);
    mark(0x1F150, 0x1F169, CHAR_WORD);
    mark(0x1F170, 0x1F189, CHAR_WORD);
    mark_composing();
}

void unicode_prepare(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, prepare);
}

unsigned utf8_class_before(const unsigned char *begin, const unsigned char *end, unsigned *size) {
    for (unsigned n = 1; n <= 4 && n <= (size_t)(end - begin); n++) {
        if ((end[-(int)n] & 0xC0) == 0x80)
            continue;
        unsigned class = utf8_class(end - n, end, size);
        if (*size == n)
            return class;
        break;
    }
    *size = 1;
    return 0;
}

unsigned utf8_put(uint32_t c, unsigned char *out) {
    if (c < 0x80) {
        out[0] = (unsigned char)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (unsigned char)(0xC0 | c >> 6);
        out[1] = (unsigned char)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (unsigned char)(0xE0 | c >> 12);
        out[1] = (unsigned char)(0x80 | (c >> 6 & 0x3F));
        out[2] = (unsigned char)(0x80 | (c & 0x3F));
        return 3;
    }
    out[0] = (unsigned char)(0xF0 | c >> 18);
    out[1] = (unsigned char)(0x80 | (c >> 12 & 0x3F));
    out[2] = (unsigned char)(0x80 | (c >> 6 & 0x3F));
    out[3] = (unsigned char)(0x80 | (c & 0x3F));
    return 4;
}

unsigned utf8_incomplete_tail(const unsigned char *p, size_t size) {
    for (unsigned n = 1; n <= 3 && n <= size; n++) {
        const unsigned char *q = p + size - n;
        unsigned char lead = q[0];
        if ((lead & 0xC0) == 0x80)
            continue;
        unsigned length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
        if (lead < 0xC2 || lead > 0xF4 || n >= length)
            return 0;
        /* The second byte already tells overlong forms, surrogates and what lies above U+10FFFF. */
        if (n >= 2 && ((lead == 0xE0 && q[1] < 0xA0) || (lead == 0xED && q[1] > 0x9F) ||
                       (lead == 0xF0 && q[1] < 0x90) || (lead == 0xF4 && q[1] > 0x8F)))
            return 0;
        return n;
    }
    return 0;
}

struct growing {
    unsigned char *data;
    size_t size, capacity;
};

static bool append(struct growing *g, const unsigned char *data, size_t size) {
    if (size > g->capacity - g->size) {
        size_t capacity = (g->size + size) * 2 + 64;
        unsigned char *p = realloc(g->data, capacity);
        if (!p)
            return false;
        g->data = p;
        g->capacity = capacity;
    }
    if (size)
        memcpy(g->data + g->size, data, size);
    g->size += size;
    return true;
}

/* A composition never reaches back over an ASCII character, and invalid bytes end a text: runs that
 * begin at an ASCII character and go on to the next one are normalised alone. */
bool unicode_nfc(const unsigned char *text, size_t size, unsigned char **out, size_t *out_size) {
    const unsigned char *end = text + size, *p = text, *copied = text;
    struct growing g = {0};
    bool changed = false;
    while (p < end) {
        const unsigned char *run = p;
        bool composes = false;
        for (bool first = true; p < end; first = false) {
            unsigned n;
            if (!first && *p < 0x80)
                break;
            uint32_t c = utf8_next(p, end, &n);
            if (c == UTF8_INVALID)
                break;
            composes |= (unicode_class(c) & CHAR_COMPOSES) != 0;
            p += n;
        }
        if (composes) {
            utf8proc_uint8_t *composed = NULL;
            utf8proc_ssize_t n =
                utf8proc_map(run, p - run, &composed, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
            if (n < 0) { /* only for want of memory: the run is valid UTF-8 */
                free(g.data);
                return false;
            }
            bool ok = true;
            if (n != p - run || memcmp(run, composed, (size_t)n) != 0) {
                changed = true;
                ok = append(&g, copied, (size_t)(run - copied)) && append(&g, composed, (size_t)n);
                copied = p;
            }
            free(composed);
            if (!ok) {
                free(g.data);
                return false;
            }
        }
        if (p < end && *p >= 0x80)
            p++; /* an invalid byte */
    }
    *out = NULL;
    *out_size = size;
    if (!changed)
        return true;
    if (!append(&g, copied, (size_t)(end - copied)) || !append(&g, (const unsigned char *)"", 1)) {
        free(g.data);
        return false;
    }
    *out = g.data;
    *out_size = g.size - 1;
    return true;
}

uint32_t byte_to_char(unsigned char b) {
    if ((b >= 33 && b <= 126) || (b >= 161 && b != 173))
        return b;
    if (b <= 32)
        return 256u + b;
    if (b <= 160)
        return 256u + 33u + (b - 127u);
    return 256u + 67u; /* 173, the soft hyphen */
}

int char_to_byte(uint32_t c) {
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 255 && c != 173))
        return (int)c;
    if (c >= 256 && c <= 288)
        return (int)(c - 256);
    if (c >= 289 && c <= 322)
        return (int)(c - 289 + 127);
    return c == 323 ? 173 : -1;
}

void byte_alphabet_order(unsigned char order[256]) {
    int n = 0;
    for (uint32_t c = 33; c <= 323; c++) {
        int b = char_to_byte(c);
        if (b >= 0)
            order[n++] = (unsigned char)b;
    }
}
