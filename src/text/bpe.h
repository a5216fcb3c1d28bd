/* Byte pair encoding of one pre-token.
 *
 * The definition: begin with the bytes; merge the adjacent pair of lowest rank (the leftmost of
 * equals); go on until no pair can be merged. bpe_encode gives exactly that, in time linear in the
 * pre-token, by this property: a sequence of tokens is the encoding of its bytes if and only if
 * each token encodes to itself and each two neighbours, taken alone, encode to themselves (no merge
 * ever crosses a final boundary, and the order of merges on one side does not depend on the other).
 * So the encoding of every prefix is unique, and one pass that takes the longest token and steps
 * back at a dead end visits each position once. The test of a pair replays its merges backwards
 * along the two sides of the boundary. (Antonov and van Antwerpen, "So many tokens, so little
 * time", 2024.)
 *
 * It needs ranks that grow from parts to whole, as training gives them. Lists of merges in another
 * order, and vocabularies whose giant tokens make it step back too often, fall back on the
 * definition with a heap. */
#ifndef TEXT_BPE_H
#define TEXT_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "text/trie.h"

#define NO_TOKEN UINT32_MAX

struct bpe_merge {
    uint32_t left, right, result;
};

struct bpe {
    uint32_t count;           /* ids are below this */
    uint32_t byte_token[256]; /* NO_TOKEN where the vocabulary lacks a byte */
    /* (left, right) -> rank and result; ranks count from 1 */
    struct bpe_pair {
        uint32_t left, right, rank, result; /* rank 0: an empty slot */
    } * pairs;
    uint32_t pair_mask;
    /* How each token comes about: its last merge and that merge's rank; rank 0: a byte. */
    struct bpe_split {
        uint32_t left, right, rank,
            size; /* size: of the token, in bytes; 0: it never comes about */
    } * splits;
    bool linear; /* ranks grow from parts to whole and no byte is missing */
    struct trie trie;
};

/* tokens[id] are the byte strings (size 0: no such token); merges in order of rank, a repeated pair
 * keeps its last rank. */
tril_status bpe_build(struct bpe *b, const struct trie_string *tokens, uint32_t count,
                      const struct bpe_merge *merges, uint32_t merge_count, struct tril_error *err);
void bpe_free(struct bpe *b);

/* Working memory of one encoding thread; zero-initialised, grows as needed. */
struct bpe_scratch {
    void *memory;
    size_t size;
};

/* Encodes n >= 1 bytes into out, which has room for n ids; returns how many, or SIZE_MAX when out
 * of memory. Every byte must have a token. */
size_t bpe_encode(const struct bpe *b, const unsigned char *text, size_t n, uint32_t *out,
                  struct bpe_scratch *scratch);
/* The definition, with a heap: the same ids in time n log n. */
size_t bpe_encode_heap(const struct bpe *b, const unsigned char *text, size_t n, uint32_t *out,
                       struct bpe_scratch *scratch);

static inline const struct bpe_pair *bpe_find(const struct bpe *b, uint32_t left, uint32_t right) {
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    for (uint32_t i = (uint32_t)(h >> 32);; i++) {
        const struct bpe_pair *p = &b->pairs[i & b->pair_mask];
        if (p->rank == 0)
            return NULL;
        if (p->left == left && p->right == right)
            return p;
    }
}

#endif
