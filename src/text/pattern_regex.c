/* Expressions of one's own, through PCRE2. They are written for Oniguruma or Rust's regex and
 * rewritten here where PCRE2 would read them otherwise:
 *  - its \s under UCP also takes U+180E, which has not been white space since Unicode 6.3, so \s
 * and \S become explicit sets;
 *  - its tables may be of an older Unicode, so \p{L}, \p{N}, \p{M} and the classes of letters get
 * the characters added that our table has and PCRE2's lacks;
 *  - what cannot be rewritten is refused. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/pattern.h"

#define PATTERN_LIMIT 65536 /* bytes of an expression */
#define JIT_STACK (4u << 20)
/* A match may take MATCH_STEPS, and so many more for each byte that is left of the text. */
#define MATCH_STEPS 1000000u
#define MATCH_STEPS_PER_BYTE 64u
#define MATCH_STEPS_MOST 4000000000u

#define SPACE_RANGES                                                                               \
    "\\t-\\r\\x20\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}"                     \
    "\\x{202F}\\x{205F}\\x{3000}"
#define NOT_SPACE_RANGES                                                                           \
    "\\x00-\\x08\\x0E-\\x1F\\x21-\\x{84}\\x{86}-\\x{9F}\\x{A1}-\\x{167F}"                          \
    "\\x{1681}-\\x{1FFF}\\x{200B}-\\x{2027}\\x{202A}-\\x{202E}"                                    \
    "\\x{2030}-\\x{205E}\\x{2060}-\\x{2FFF}\\x{3001}-\\x{10FFFF}"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a pre-tokenisation pattern");
}

struct string {
    char *data;
    size_t size, capacity;
    bool failed;
};

static void put(struct string *s, const char *text, size_t size) {
    if (s->size + size + 1 > s->capacity) {
        size_t capacity = (s->size + size) * 2 + 256;
        char *data = realloc(s->data, capacity);
        if (!data) {
            s->failed = true;
            return;
        }
        s->data = data;
        s->capacity = capacity;
    }
    memcpy(s->data + s->size, text, size);
    s->size += size;
    s->data[s->size] = '\0';
}

/* ------------------------------------------------- characters newer than PCRE2's tables */

static struct {
    const char *name;
    unsigned mask, want; /* of unicode_class */
    struct string missing;
} properties[] = {
    {"L", CHAR_LETTER, CHAR_LETTER, {0}},
    {"N", CHAR_NUMBER, CHAR_NUMBER, {0}},
    {"M", CHAR_LETTER | CHAR_UPPER | CHAR_LOWER, CHAR_UPPER | CHAR_LOWER, {0}},
    {"Lu", CHAR_LETTER | CHAR_UPPER | CHAR_LOWER, CHAR_LETTER | CHAR_UPPER, {0}},
    {"Ll", CHAR_LETTER | CHAR_UPPER | CHAR_LOWER, CHAR_LETTER | CHAR_LOWER, {0}},
    {"Lo", CHAR_LETTER | CHAR_UPPER | CHAR_LOWER, CHAR_LETTER | CHAR_UPPER | CHAR_LOWER, {0}},
};
#define PROPERTIES (sizeof properties / sizeof *properties)

/* The characters of a property that PCRE2 says are unassigned, as ranges for a set. */
static void find_missing(struct string *out, unsigned mask, unsigned want,
                         const bool unassigned[UNICODE_TABLE_SIZE]) {
    for (uint32_t c = 0x300; c < UNICODE_TABLE_SIZE; c++) {
        uint32_t last = c;
        if (!unassigned[c] || (unicode_class(c) & mask) != want)
            continue;
        while (last + 1 < UNICODE_TABLE_SIZE && unassigned[last + 1] &&
               (unicode_class(last + 1) & mask) == want)
            last++;
        char range[40];
        put(out, range,
            (size_t)snprintf(range, sizeof range, "\\x{%X}-\\x{%X}", (unsigned)c, (unsigned)last));
        c = last;
    }
}

static void find_all_missing(void) {
    int code;
    PCRE2_SIZE where;
    size_t size = 0;
    unsigned char *text = malloc(4 * UNICODE_TABLE_SIZE);
    bool *unassigned = calloc(UNICODE_TABLE_SIZE, sizeof *unassigned);
    pcre2_code *regex = pcre2_compile((PCRE2_SPTR) "\\p{Cn}", PCRE2_ZERO_TERMINATED, PCRE2_UTF,
                                      &code, &where, NULL);
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    unicode_prepare();
    if (text && unassigned && regex && match) {
        for (uint32_t c = 0x300; c < UNICODE_TABLE_SIZE; c++) /* only those in question */
            if (unicode_class(c) & (CHAR_LETTER | CHAR_NUMBER | CHAR_UPPER))
                size += utf8_put(c, text + size);
        for (size_t at = 0;
             at < size && pcre2_match(regex, text, size, at, PCRE2_NO_UTF_CHECK, match, NULL) > 0;
             at = pcre2_get_ovector_pointer(match)[1]) {
            unsigned n;
            unassigned[utf8_next(text + pcre2_get_ovector_pointer(match)[0], text + size, &n)] =
                true;
        }
        for (size_t i = 0; i < PROPERTIES; i++)
            find_missing(&properties[i].missing, properties[i].mask, properties[i].want,
                         unassigned);
    }
    pcre2_match_data_free(match);
    pcre2_code_free(regex);
    free(unassigned);
    free(text);
}

/* \p{NAME} or \pX at `p` (behind the backslash): its length and what to add to it, or 0. */
static size_t property_at(const char *p, const char **missing) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    size_t length, total;
    const char *name;
    if (p[1] == '{') {
        const char *end = strchr(p, '}');
        if (!end)
            return 0;
        name = p + 2;
        length = (size_t)(end - name);
        total = length + 3;
    } else {
        name = p + 1;
        length = 1;
        total = 2;
    }
    for (size_t i = 0; i < PROPERTIES; i++)
        if (strlen(properties[i].name) == length && memcmp(properties[i].name, name, length) == 0) {
            pthread_once(&once, find_all_missing);
            *missing = properties[i].missing.data ? properties[i].missing.data : "";
            return total;
        }
    return 0;
}

/* ------------------------------------------------- rewriting and compiling */

/* Whether the '}' at p ends a repetition ({2}, {1,3}) and not \p{L} or \x{41}. */
static bool ends_repetition(const char *regex, const char *p) {
    const char *open = p;
    while (open > regex && *open != '{')
        open--;
    if (open + 1 >= p || strspn(open + 1, "0123456789,") != (size_t)(p - open) - 1)
        return false;
    return !(open >= regex + 2 && open[-2] == '\\' && strchr("pPx", open[-1]));
}

static void put_set(struct string *out, bool inside, const char *before, const char *text,
                    size_t size, const char *more) {
    if (!inside)
        put(out, before, strlen(before));
    put(out, text, size);
    put(out, more, strlen(more));
    if (!inside)
        put(out, "]", 1);
}

/* The expression for PCRE2; NULL in `*refused` unless it cannot be had. */
static struct string translate(const char *regex, enum pattern_dialect dialect,
                               const char **refused) {
    struct string out = {0};
    bool set = false;
    *refused = NULL;
    for (const char *p = regex; *p && !*refused; p++) {
        const char *missing;
        size_t n;
        if (*p == '\\' && p[1]) {
            char c = *++p;
            if (c == 's') {
                put_set(&out, set, "[", SPACE_RANGES, sizeof SPACE_RANGES - 1, "");
            } else if (c == 'S') {
                put_set(&out, set, "[", NOT_SPACE_RANGES, sizeof NOT_SPACE_RANGES - 1, "");
            } else if (c == 'p' && (n = property_at(p, &missing))) {
                put_set(&out, set, "[", p - 1, n + 1, missing);
                p += n - 1;
            } else if (c == 'P' && !set && (n = property_at(p, &missing))) {
                put(&out, "[^\\p", 4);
                put(&out, p + 1, n - 1);
                put(&out, missing, strlen(missing));
                put(&out, "]", 1);
                p += n - 1;
            } else if (strchr("wWbBhHRXKGQEgkC", c)) {
                *refused = "an escape that means something else in PCRE2";
            } else {
                put(&out, p - 1, 2);
            }
            continue;
        }
        if (*p == '[' && set)
            *refused = "a set inside a set";
        else if (*p == '&' && set && p[1] == '&')
            *refused = "an intersection of sets";
        else if (*p == '+' && !set && p > regex && p[-1] == '}' && dialect == PATTERN_ONIGURUMA &&
                 ends_repetition(regex, p - 1))
            *refused = "}+, which Oniguruma does not read as possessive";
        else if (*p == ']')
            set = false;
        put(&out, p, 1);
        if (*p == '[') {
            set = true;
            if (p[1] == '^')
                put(&out, ++p, 1);
            if (p[1] == ']')
                *refused = "a set that begins with ]";
        }
    }
    return out;
}

tril_status pattern_regex_compile(void **out, const char *regex, enum pattern_dialect dialect,
                                  struct tril_error *err) {
    const char *refused;
    int code;
    PCRE2_SIZE where;
    *out = NULL;
    if (strlen(regex) > PATTERN_LIMIT)
        return error_set(err, TRIL_ERR_UNSUPPORTED, "the pattern is longer than %d bytes",
                         PATTERN_LIMIT);
    struct string s = translate(regex, dialect, &refused);
    if (refused || s.failed || !s.data) {
        free(s.data);
        if (!refused)
            return *regex ? no_memory(err)
                          : error_set(err, TRIL_ERR_FORMAT, "the pattern is empty");
        return error_set(err, TRIL_ERR_UNSUPPORTED, "the pattern \"%.200s\" has %s", regex,
                         refused);
    }
    uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;
    options |= dialect == PATTERN_ONIGURUMA ? PCRE2_MULTILINE : PCRE2_DOLLAR_ENDONLY;
    *out = pcre2_compile((PCRE2_SPTR)s.data, s.size, options, &code, &where, NULL);
    free(s.data);
    if (!*out) {
        char reason[160];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the pattern \"%.200s\" cannot be compiled by PCRE2: %s", regex, reason);
    }
    pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE); /* without it matching is slower, that is all */
    return TRIL_OK;
}

void pattern_regex_free(void *regex) {
    pcre2_code_free(regex);
}

void pattern_scratch_free(struct pattern_scratch *s) {
    pcre2_match_data_free(s->match);
    pcre2_match_context_free(s->context);
    pcre2_jit_stack_free(s->stack);
    memset(s, 0, sizeof *s);
}

tril_status pattern_match(const struct pattern *p, struct pattern_scratch *s,
                          const unsigned char *text, size_t size, size_t at, size_t *begin,
                          size_t *end, bool *found, struct tril_error *err) {
    if (!s->match) {
        s->match = pcre2_match_data_create(1, NULL);
        s->context = pcre2_match_context_create(NULL);
        s->stack = pcre2_jit_stack_create(32768, JIT_STACK, NULL);
        if (!s->match || !s->context || !s->stack)
            return no_memory(err);
        pcre2_jit_stack_assign(s->context, NULL, s->stack);
        pcre2_set_heap_limit(s->context, 1u << 20); /* kilobytes */
    }
    *found = false;
    /* Expressions that cut text take a few steps per byte of a match; others are stopped. */
    pcre2_set_match_limit(s->context,
                          (uint32_t)(size - at < MATCH_STEPS_MOST / MATCH_STEPS_PER_BYTE
                                         ? MATCH_STEPS + MATCH_STEPS_PER_BYTE * (size - at)
                                         : MATCH_STEPS + MATCH_STEPS_MOST));
    while (at < size) {
        uint32_t options = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
        int n = pcre2_match(p->regex, text, size, at, options, s->match, s->context);
        if (n == PCRE2_ERROR_JIT_STACKLIMIT)
            n = pcre2_match(p->regex, text, size, at, options | PCRE2_NO_JIT, s->match, s->context);
        if (n == PCRE2_ERROR_NOMATCH)
            return TRIL_OK;
        if (n == PCRE2_ERROR_NOMEMORY)
            return no_memory(err);
        if (n < 0) {
            char reason[160];
            pcre2_get_error_message(n, (PCRE2_UCHAR *)reason, sizeof reason);
            return error_set(err, TRIL_ERR_UNSUPPORTED,
                             "the pattern \"%.200s\" gives up on this text: %s", p->source, reason);
        }
        const PCRE2_SIZE *o = pcre2_get_ovector_pointer(s->match);
        if (o[0] < o[1] && o[0] >= at) { /* \K is refused; this guards against the rest */
            *begin = o[0];
            *end = o[1];
            *found = true;
            return TRIL_OK;
        }
        at = o[1] > at ? o[1] : at + 1;
    }
    return TRIL_OK;
}
