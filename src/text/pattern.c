/* Patterns are rewritten for PCRE2 in one respect: its \s (and \h, \v inside it) also takes U+180E,
 * which has not been white space since Unicode 6.3, so \s and \S become explicit sets. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/pattern.h"

#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PATTERN_LIMIT 65536 /* bytes of an expression */
#define JIT_STACK (4u << 20)

static const struct {
    enum scan_kind kind;
    const char *name, *regex;
} published[] = {
#define PATTERN_ROW(kind, name, regex) {kind, name, regex},
    PATTERN_LIST(PATTERN_ROW)
#undef PATTERN_ROW
};

/* Other names, and other spellings of the same expressions. */
static const struct {
    enum scan_kind kind;
    const char *text;
} synonyms[] = {
    {SCAN_GPT2, "r50k"},
    {SCAN_GPT2, "p50k"},
    {SCAN_GPT2, "r50k_base"},
    {SCAN_GPT2, "p50k_base"},
    {SCAN_CL100K, "cl100k_base"},
    {SCAN_LLAMA3, "gpt4"},
    {SCAN_LLAMA3, "llama3"},
    {SCAN_QWEN2, "qwen3"},
    {SCAN_QWEN2, "qwen"},
    {SCAN_O200K, "gpt4o"},
    {SCAN_O200K, "o200k_base"},
    {SCAN_GPT2, "'s|'t|'re|'ve|'m|'ll|'d| ?[\\p{L}]+| ?[\\p{N}]+| ?[^\\s\\p{L}\\p{N}]+|"
                "\\s+(?!\\S)|\\s+"},
};

/* tiktoken's own spellings mean this only in its own dialect: Oniguruma has no possessive {n,m}+.
 */
static const struct {
    enum scan_kind kind;
    const char *text;
} rust_synonyms[] = {
    {SCAN_GPT2, "'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|"
                "\\s+(?!\\S)|\\s"},
    {SCAN_CL100K, "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}{1,3}+|"
                  " ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*+|\\s++$|\\s*[\\r\\n]|\\s+(?!\\S)|\\s"},
};

static enum scan_kind known(const char *text, bool names, enum pattern_dialect dialect) {
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (strcmp(text, published[i].regex) == 0 ||
            (names && strcmp(text, published[i].name) == 0))
            return published[i].kind;
    for (size_t i = 0; i < sizeof synonyms / sizeof *synonyms; i++)
        if (strcmp(text, synonyms[i].text) == 0 && (names || strchr(text, '|')))
            return synonyms[i].kind;
    if (dialect == PATTERN_RUST)
        for (size_t i = 0; i < sizeof rust_synonyms / sizeof *rust_synonyms; i++)
            if (strcmp(text, rust_synonyms[i].text) == 0)
                return rust_synonyms[i].kind;
    return SCAN_KINDS;
}

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a pre-tokenisation pattern");
}

tril_status pattern_published(struct pattern *p, enum scan_kind kind, struct tril_error *err) {
    memset(p, 0, sizeof *p);
    p->kind = kind;
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (published[i].kind == kind)
            p->source = strdup(published[i].regex);
    return p->source ? TRIL_OK : no_memory(err);
}

#define SPACE_RANGES                                                                               \
    "\\t-\\r\\x20\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}"                     \
    "\\x{202F}\\x{205F}\\x{3000}"
#define NOT_SPACE_RANGES                                                                           \
    "\\x00-\\x08\\x0E-\\x1F\\x21-\\x{84}\\x{86}-\\x{9F}\\x{A1}-\\x{167F}"                          \
    "\\x{1681}-\\x{1FFF}\\x{200B}-\\x{2027}\\x{202A}-\\x{202E}"                                    \
    "\\x{2030}-\\x{205E}\\x{2060}-\\x{2FFF}\\x{3001}-\\x{10FFFF}"

/* The expression for PCRE2 (malloc'ed), or NULL with the reason. */
static char *translate(const char *regex, enum pattern_dialect dialect, const char **refused) {
    size_t size = strlen(regex), used = 0;
    char *out = malloc(size * sizeof NOT_SPACE_RANGES + 1);
    bool set = false;
    *refused = NULL;
    for (size_t i = 0; out && i < size && !*refused; i++) {
        const char *put = NULL;
        char c = regex[i];
        if (c == '\\' && i + 1 < size) {
            c = regex[++i];
            if (c == 's')
                put = set ? SPACE_RANGES : "[" SPACE_RANGES "]";
            else if (c == 'S')
                put = set ? NOT_SPACE_RANGES : "[" NOT_SPACE_RANGES "]";
            else if (strchr("wWbBhHRXKGQEgkC", c))
                *refused = "an escape that means something else in PCRE2";
            else {
                out[used++] = '\\';
                out[used++] = c;
            }
        } else {
            if (c == '[' && set)
                *refused = "a set inside a set";
            else if (c == '&' && set && regex[i + 1] == '&')
                *refused = "an intersection of sets";
            else if (c == '[') {
                set = true;
                out[used++] = c;
                if (regex[i + 1] == '^')
                    out[used++] = regex[++i];
                if (regex[i + 1] == ']')
                    *refused = "a set that begins with ]";
                continue;
            } else if (c == ']')
                set = false;
            else if (c == '+' && !set && i && regex[i - 1] == '}' && dialect == PATTERN_ONIGURUMA)
                *refused = "}+, which Oniguruma does not read as possessive";
            out[used++] = c;
        }
        if (put) {
            memcpy(out + used, put, strlen(put));
            used += strlen(put);
        }
    }
    if (out)
        out[used] = '\0';
    if (*refused) {
        free(out);
        out = NULL;
    }
    return out;
}

static tril_status compile(struct pattern *p, const char *regex, enum pattern_dialect dialect,
                           struct tril_error *err) {
    const char *refused;
    int code;
    PCRE2_SIZE where;
    p->kind = SCAN_KINDS;
    if (strlen(regex) > PATTERN_LIMIT)
        return error_set(err, TRIL_ERR_UNSUPPORTED, "the pattern is longer than %d bytes",
                         PATTERN_LIMIT);
    char *translated = translate(regex, dialect, &refused);
    p->source = strdup(regex);
    if (!p->source || (!translated && !refused)) {
        free(translated);
        return no_memory(err);
    }
    if (refused)
        return error_set(err, TRIL_ERR_UNSUPPORTED, "the pattern \"%.200s\" has %s", regex,
                         refused);
    uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;
    options |= dialect == PATTERN_ONIGURUMA ? PCRE2_MULTILINE : PCRE2_DOLLAR_ENDONLY;
    p->regex =
        pcre2_compile((PCRE2_SPTR)translated, PCRE2_ZERO_TERMINATED, options, &code, &where, NULL);
    free(translated);
    if (!p->regex) {
        char reason[160];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)reason, sizeof reason);
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the pattern \"%.200s\" cannot be compiled by PCRE2: %s", regex, reason);
    }
    pcre2_jit_compile(p->regex,
                      PCRE2_JIT_COMPLETE); /* without it matching is slower, that is all */
    return TRIL_OK;
}

tril_status pattern_compile(struct pattern *p, const char *regex, enum pattern_dialect dialect,
                            struct tril_error *err) {
    enum scan_kind kind = known(regex, false, dialect);
    if (kind != SCAN_KINDS)
        return pattern_published(p, kind, err);
    memset(p, 0, sizeof *p);
    tril_status st = compile(p, regex, dialect, err);
    if (st != TRIL_OK)
        pattern_free(p);
    return st;
}

tril_status pattern_named(struct pattern *p, const char *text, struct tril_error *err) {
    enum scan_kind kind = known(text, true, PATTERN_RUST);
    if (kind != SCAN_KINDS)
        return pattern_published(p, kind, err);
    memset(p, 0, sizeof *p);
    if (!strpbrk(text, "\\|[(+*"))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the pattern %.100s is neither a known name (gpt2, cl100k, o200k, llama3, "
                         "qwen2) nor a regular expression",
                         text);
    return pattern_compile(p, text, PATTERN_RUST, err);
}

void pattern_free(struct pattern *p) {
    pcre2_code_free(p->regex);
    free(p->source);
    p->regex = NULL;
    p->source = NULL;
}

const char *pattern_name(const struct pattern *p) {
    for (size_t i = 0; i < sizeof published / sizeof *published; i++)
        if (published[i].kind == p->kind)
            return published[i].name;
    return p->source;
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
        pcre2_set_match_limit(s->context, 100000000);
        pcre2_set_heap_limit(s->context, 1u << 20); /* kilobytes */
    }
    *found = false;
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
