/* Tokenizers: byte-level BPE, trained from text or read from Hugging Face's, GPT-2's and tiktoken's
 * files; text to ids and back. A tokenizer is immutable: threads may share it. */
#ifndef TRIL_TOKENIZER_H
#define TRIL_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tokenizer tril_tokenizer;

/* Loads a tokenizer.json, a directory that holds one (or vocab.json and merges.txt), or a tiktoken
 * rank file. `pattern`: NULL, or for a rank file of unknown size "gpt2", "cl100k", "o200k",
 * "llama3", "qwen2" or a regular expression. Free with tril_tokenizer_free. */
tril_status tril_tokenizer_load(tril_tokenizer **out, const char *path, const char *pattern,
                                struct tril_error *err);
void tril_tokenizer_free(tril_tokenizer *tokenizer); /* NULL is fine */

/* The ids of `size` bytes of text: those of Hugging Face `tokenizers` without added special tokens.
 * `special`: the strings of special tokens in the text become those tokens; false: they are
 * ordinary text. *ids is malloc'ed, free() it. Long texts are encoded on all threads. */
tril_status tril_tokenizer_encode(const tril_tokenizer *tokenizer, const char *text, size_t size,
                                  bool special, uint32_t **ids, size_t *count,
                                  struct tril_error *err);
/* The bytes of ids, malloc'ed and NUL-terminated; not always UTF-8. */
tril_status tril_tokenizer_decode(const tril_tokenizer *tokenizer, const uint32_t *ids,
                                  size_t count, bool skip_special, char **text, size_t *size,
                                  struct tril_error *err);

/* Writes a tokenizer.json, atomically. */
tril_status tril_tokenizer_write(const tril_tokenizer *tokenizer, const char *path,
                                 struct tril_error *err);
/* Writes tokenizer.json and tokenizer_config.json into a directory, for transformers'
 * AutoTokenizer. */
tril_status tril_tokenizer_write_dir(const tril_tokenizer *tokenizer, const char *directory,
                                     struct tril_error *err);

struct tril_tokenizer_info {
    uint32_t vocab_size; /* 1 + the greatest id */
    uint32_t merges, specials;
    const char
        *pattern;     /* "gpt2", "cl100k", ... or a regular expression; lives with the tokenizer */
    int64_t bos, eos; /* ids, or -1 */
};
void tril_tokenizer_info_get(const tril_tokenizer *tokenizer, struct tril_tokenizer_info *info);
/* The i-th special or otherwise added token: its id; its text (not NUL-terminated) and length. */
uint32_t tril_tokenizer_special(const tril_tokenizer *tokenizer, uint32_t i, const char **text,
                                size_t *size);

struct tril_tokenizer_train_options {
    const char *const *files; /* text files; a directory means its .txt files */
    size_t file_count;
    uint32_t vocab_size;         /* special tokens and the 256 bytes included */
    const char *pattern;         /* "gpt2" (NULL means it), "cl100k", "o200k", ... */
    const char *const *specials; /* special tokens, which get the first ids */
    size_t special_count;
    int64_t min_count; /* pairs seen fewer times are not merged; 0 means 1 */
    bool quiet;        /* no progress on stderr */
};
struct tril_tokenizer_train_stats {
    int64_t bytes, words, unique_words;
    double count_seconds, merge_seconds;
};
/* Trains byte-level BPE. Of equally frequent pairs the lexicographically greater pair of byte
 * strings is merged first: the result depends on nothing but the text. stats may be NULL. */
tril_status tril_tokenizer_train(tril_tokenizer **out,
                                 const struct tril_tokenizer_train_options *options,
                                 struct tril_tokenizer_train_stats *stats, struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
