#include "text/trie.h"

#include <stdlib.h>
#include <string.h>

#define NODE_LIMIT 0xFFFFFFu

static void add_edge(struct trie *t, uint32_t node, unsigned char byte, uint32_t to) {
    uint32_t key = node << 8 | byte;
    uint32_t i = (key * 0x9E3779B1u) >> 7;
    while (t->edges[i & t->mask].key != TRIE_NONE)
        i++;
    t->edges[i & t->mask] = (struct trie_edge){key, to};
}

/* Prefixes that strings share leave the table emptier than it need be: into one that is at most
 * half full, and so in the caches as far as may be. */
static void tighten(struct trie *t, size_t edges) {
    struct trie_edge *wide = t->edges;
    size_t old = (size_t)t->mask + 1, slots = 16;
    while (slots < 2 * edges)
        slots *= 2;
    struct trie_edge *tight = slots < old ? malloc(slots * sizeof *tight) : NULL;
    if (!tight)
        return;
    memset(tight, 0xFF, slots * sizeof *tight);
    t->edges = tight;
    t->mask = (uint32_t)(slots - 1);
    for (size_t i = 0; i < old; i++)
        if (wide[i].key != TRIE_NONE)
            add_edge(t, wide[i].key >> 8, (unsigned char)wide[i].key, wide[i].to);
    free(wide);
}

/* Numbers of the set's strings, shorter strings first. */
static uint32_t *order_by_size(const struct trie_string *strings, uint32_t count, uint32_t *used) {
    uint32_t longest = 0, n = 0;
    for (uint32_t i = 0; i < count; i++)
        if (strings[i].size > longest)
            longest = strings[i].size;
    uint32_t *start = calloc((size_t)longest + 2, sizeof *start);
    uint32_t *order = malloc(((size_t)count + 1) * sizeof *order);
    if (start && order) {
        for (uint32_t i = 0; i < count; i++)
            start[strings[i].size + 1]++;
        n = count - start[1];
        start[1] = 0;
        for (uint32_t s = 1; s <= longest; s++)
            start[s + 1] += start[s];
        for (uint32_t i = 0; i < count; i++)
            if (strings[i].size)
                order[start[strings[i].size]++] = i;
    } else {
        free(order);
        order = NULL;
    }
    free(start);
    *used = n;
    return order;
}

tril_status trie_build(struct trie *t, const struct trie_string *strings, uint32_t count,
                       struct tril_error *err) {
    tril_status st = TRIL_OK;
    uint32_t *order = NULL, used = 0;
    size_t bytes = 0, slots = 16, edges = 0;
    memset(t, 0, sizeof *t);
    t->count = count;
    for (int b = 0; b < 256; b++)
        t->root[b] = TRIE_NONE;
    for (uint32_t i = 0; i < count; i++)
        bytes += strings[i].size;
    if (bytes + count >= NODE_LIMIT)
        return error_set(
            err, TRIL_ERR_UNSUPPORTED,
            "the vocabulary's tokens have %zu bytes together; tril supports 16 million", bytes);
    while (slots < 2 * bytes) /* shared prefixes make it emptier than half full */
        slots *= 2;
    t->mask = (uint32_t)(slots - 1);
    t->edges = malloc(slots * sizeof *t->edges);
    t->shorter = malloc(((size_t)count + 1) * sizeof *t->shorter);
    order = order_by_size(strings, count, &used);
    if (!t->edges || !t->shorter || !order) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the vocabulary's trie");
        trie_free(t);
        goto done;
    }
    memset(t->edges, 0xFF, slots * sizeof *t->edges);
    uint32_t next = count;
    for (uint32_t k = 0; k < used; k++) {
        uint32_t number = order[k], shorter = TRIE_NONE, node = TRIE_NONE;
        const struct trie_string *s = &strings[number];
        for (uint32_t j = 0; j < s->size; j++) {
            bool last = j + 1 == s->size;
            uint32_t to = j == 0 ? t->root[s->bytes[0]] : trie_step(t, node, s->bytes[j]);
            if (to == TRIE_NONE) { /* longer strings come later: the last node is always new */
                to = last ? number : next++;
                if (j == 0) {
                    t->root[s->bytes[0]] = to;
                } else {
                    add_edge(t, node, s->bytes[j], to);
                    edges++;
                }
            } else if (to < count) {
                shorter = to;
            }
            node = to;
        }
        t->shorter[number] = shorter;
    }
    tighten(t, edges);
done:
    free(order);
    return st;
}

void trie_free(struct trie *t) {
    free(t->edges);
    free(t->shorter);
    t->edges = NULL;
    t->shorter = NULL;
}
