/* A set of byte strings, each with a number, asked for the longest one that begins a text. Edges
 * live in one hash table (node, byte) -> node; the node of a string whose number is i is i itself.
 */
#ifndef TEXT_TRIE_H
#define TEXT_TRIE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define TRIE_NONE UINT32_MAX

struct trie {
    struct trie_edge {
        uint32_t key, to; /* key: node << 8 | byte; TRIE_NONE: an empty slot */
    } * edges;
    uint32_t mask;      /* table size - 1 */
    uint32_t count;     /* numbers are below this; greater nodes are inner */
    uint32_t root[256]; /* first byte -> node, or TRIE_NONE */
    uint32_t *shorter;  /* [count] the longest other string that this one begins with, or NONE */
};

/* One string of the set. */
struct trie_string {
    const unsigned char *bytes;
    uint32_t size; /* 0: this number is not in the set */
};

/* strings[i] gets number i; all distinct. Fewer than 2^24 nodes. */
tril_status trie_build(struct trie *t, const struct trie_string *strings, uint32_t count,
                       struct tril_error *err);
void trie_free(struct trie *t);

static inline uint32_t trie_step(const struct trie *t, uint32_t node, unsigned char byte) {
    uint32_t key = node << 8 | byte;
    for (uint32_t i = (key * 0x9E3779B1u) >> 7;; i++) {
        const struct trie_edge *e = &t->edges[i & t->mask];
        if (e->key == key)
            return e->to;
        if (e->key == TRIE_NONE)
            return TRIE_NONE;
    }
}

/* The number of the longest string that begins [p, end), or TRIE_NONE; adds the edges it tried to
 * *steps. */
static inline uint32_t trie_longest_counted(const struct trie *t, const unsigned char *p,
                                            const unsigned char *end, size_t *steps) {
    const unsigned char *begin = p;
    uint32_t best = TRIE_NONE;
    if (p == end)
        return best;
    for (uint32_t node = t->root[*p++]; node != TRIE_NONE; node = trie_step(t, node, *p++)) {
        if (node < t->count)
            best = node;
        if (p == end)
            break;
    }
    *steps += (size_t)(p - begin);
    return best;
}

static inline uint32_t trie_longest(const struct trie *t, const unsigned char *p,
                                    const unsigned char *end) {
    size_t steps = 0;
    return trie_longest_counted(t, p, end, &steps);
}

#endif
