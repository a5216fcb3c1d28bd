/* Names of patterns, and which expressions are published ones. */
#include "text/pattern.h"

#include <stdlib.h>
#include <string.h>

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

tril_status pattern_compile(struct pattern *p, const char *regex, enum pattern_dialect dialect,
                            struct tril_error *err) {
    enum scan_kind kind = known(regex, false, dialect);
    if (kind != SCAN_KINDS)
        return pattern_published(p, kind, err);
    memset(p, 0, sizeof *p);
    p->kind = SCAN_KINDS;
    p->source = strdup(regex);
    tril_status st =
        p->source ? pattern_regex_compile(&p->regex, regex, dialect, err) : no_memory(err);
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
    pattern_regex_free(p->regex);
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
