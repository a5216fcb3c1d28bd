/* Pre-tokenisation patterns: the published ones by hand (scan.h), any other through PCRE2. */
#ifndef TEXT_PATTERN_H
#define TEXT_PATTERN_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "text/scan.h"

/* kind, name, the expression as Hugging Face tokenizers (Oniguruma) read and tril writes it */
#define PATTERN_LIST(X)                                                                            \
    X(SCAN_GPT2, "gpt2",                                                                           \
      "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+")        \
    X(SCAN_CL100K, "cl100k_tiktoken",                                                              \
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"                    \
      " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s+\\z|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")                     \
    X(SCAN_LLAMA3, "cl100k",                                                                       \
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"                    \
      " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")                             \
    X(SCAN_QWEN2, "qwen2",                                                                         \
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"                         \
      " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")                             \
    X(SCAN_O200K, "o200k",                                                                         \
      "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*"                                \
      "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"                               \
      "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"                                \
      "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"                               \
      "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")

struct pattern {
    enum scan_kind kind; /* SCAN_KINDS: a regular expression of its own */
    char *source;        /* the expression */
    void *regex;         /* compiled, for SCAN_KINDS */
};

enum pattern_dialect {
    PATTERN_ONIGURUMA, /* in a tokenizer.json: ^ and $ match at lines */
    PATTERN_RUST       /* tiktoken's, from the command line: they match at the text's ends */
};

/* A pattern by its name ("gpt2", "cl100k", "llama3", "qwen2", "o200k", ...) or, if it is none, as
 * an expression. Expressions equal to a published one are recognised. */
tril_status pattern_named(struct pattern *p, const char *name_or_regex, struct tril_error *err);
/* An expression, in a dialect. Constructs that PCRE2 would read otherwise are refused. */
tril_status pattern_compile(struct pattern *p, const char *regex, enum pattern_dialect dialect,
                            struct tril_error *err);
/* A published pattern by its kind. */
tril_status pattern_published(struct pattern *p, enum scan_kind kind, struct tril_error *err);
void pattern_free(struct pattern *p);
/* "gpt2", "cl100k", ... or the expression. */
const char *pattern_name(const struct pattern *p);

/* An expression compiled by PCRE2 (pattern_regex.c); pattern_compile is the way to it. */
tril_status pattern_regex_compile(void **out, const char *regex, enum pattern_dialect dialect,
                                  struct tril_error *err);
void pattern_regex_free(void *regex);

/* Working memory of one thread for regular expressions. */
struct pattern_scratch {
    void *match, *context, *stack;
};
void pattern_scratch_free(struct pattern_scratch *s);

/* The next match of a regular expression (kind SCAN_KINDS) in [text + at, text + size), which is
 * looked for with the whole text in view: its begin and end; found is false where there is none.
 * The text must be valid UTF-8. Matches of no width are passed over. */
tril_status pattern_match(const struct pattern *p, struct pattern_scratch *s,
                          const unsigned char *text, size_t size, size_t at, size_t *begin,
                          size_t *end, bool *found, struct tril_error *err);

#endif
