/* Learning merges from counted pre-tokens: the inner part of training. */
#ifndef TEXT_BPE_MERGE_H
#define TEXT_BPE_MERGE_H

#include "text/pretokens.h"

/* Tokens by id, growing while merges are learnt. */
struct bpe_vocab {
    struct trie_string *tokens; /* [capacity] bytes lie in blocks that the vocabulary owns */
    uint32_t count, capacity;
    uint32_t byte_token[256];
    struct bpe_merge *merges; /* [capacity] */
    uint32_t merge_count;
    struct byte_block {
        struct byte_block *next;
        size_t used;
        unsigned char bytes[65536];
    } * blocks;
};

/* Adds merges until v->count == v->capacity or no pair is left that was seen min_count times. A
 * merge whose bytes are a token already (a special one's) gets that token's id. `progress` may be
 * NULL. */
tril_status bpe_learn(struct bpe_vocab *v, const struct pretokens *words, int64_t min_count,
                      void (*progress)(void *arg, uint32_t count), void *arg,
                      struct tril_error *err);
/* Bytes that live as long as the vocabulary; NULL: out of memory. size <= 65536 each. */
unsigned char *bpe_vocab_bytes(struct bpe_vocab *v, size_t size);
void bpe_vocab_free(struct bpe_vocab *v);

#endif
