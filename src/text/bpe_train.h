/* Training a byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019).
 *
 * Texts are cut into pre-tokens; each distinct pre-token is kept once with its count. Then, again
 * and again, the most frequent adjacent pair of tokens becomes a new token. Ties go to the greater
 * pair of byte strings (compare the left tokens as bytes, then the right ones), so the result
 * depends on the text only, not on threads or the order of files.
 *
 * Ids: special tokens first (in the order given), then the 256 bytes in GPT-2's order (printable
 * ones first), then the merges. */
#ifndef TEXT_BPE_TRAIN_H
#define TEXT_BPE_TRAIN_H

#include "text/tokenizer.h"

struct bpe_train_options {
    uint32_t vocab_size; /* >= 256 + specials; fewer come out where the text has no more pairs */
    const char *pattern; /* "gpt2" (NULL means it), "cl100k", or any name tokenizer_load knows */
    const char *const *specials; /* contents; cut out of the text and not trained on */
    size_t special_count;
    int64_t min_count; /* pairs seen fewer times are not merged; 0 means 1 */
    bool quiet;        /* no progress on stderr */
};

struct bpe_train_stats {
    int64_t bytes, pre_tokens, unique_pre_tokens; /* read, counted, distinct */
    double count_seconds, merge_seconds;
};

/* Trains on files of any size (mapped, read once, threads_count() threads); a directory means its
 * .txt files. stats may be NULL. */
tril_status tokenizer_train(struct tokenizer **out, const char *const *paths, size_t path_count,
                            const struct bpe_train_options *options, struct bpe_train_stats *stats,
                            struct tril_error *err);
/* The same from memory. */
tril_status tokenizer_train_text(struct tokenizer **out, const char *text, size_t size,
                                 const struct bpe_train_options *options,
                                 struct bpe_train_stats *stats, struct tril_error *err);

#endif
