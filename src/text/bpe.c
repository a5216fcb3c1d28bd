#include "text/bpe.h"

#include <stdlib.h>
#include <string.h>

/* Whether the tokens a, b, side by side, stay as they are under all merges of rank < limit. Undoes
 * their merges from the last to the first; in each state that they were in, a pair across the
 * boundary that would have been merged before the next step of either side is a contradiction. Of
 * equal ranks the left one goes first, so the right one is undone first. Adds its work to *steps.
 */
static bool pair_stays(const struct bpe *b, uint32_t left, uint32_t right, uint32_t limit,
                       size_t *steps) {
    for (;; ++*steps) {
        const struct bpe_pair *p = bpe_find(b, left, right);
        if (p && p->rank < limit)
            return false;
        const struct bpe_split *l = &b->splits[left], *r = &b->splits[right];
        if (l->rank > r->rank) {
            limit = l->rank;
            left = l->right;
        } else if (r->rank) {
            limit = r->rank + 1;
            right = r->left;
        } else {
            return true; /* two bytes */
        }
    }
}

static void pair_add(struct bpe *b, const struct bpe_merge *m, uint32_t rank) {
    uint64_t h = ((uint64_t)m->left << 32 | m->right) * 0x9E3779B97F4A7C15u;
    for (uint32_t i = (uint32_t)(h >> 32);; i++) {
        struct bpe_pair *p = &b->pairs[i & b->pair_mask];
        if (p->rank == 0 || (p->left == m->left && p->right == m->right)) {
            *p = (struct bpe_pair){m->left, m->right, rank, m->result};
            return;
        }
    }
}

/* Finds how each token comes about, in order of rank, and whether ranks grow from parts to whole. A
 * merge whose parts never come about is idle; one whose parts come about only later makes the list
 * improper. */
static bool derive(struct bpe *b, const struct trie_string *tokens, const struct bpe_merge *merges,
                   uint32_t merge_count) {
    bool proper = true;
    size_t steps = 0;
    for (int i = 0; i < 256; i++) {
        if (b->byte_token[i] == NO_TOKEN)
            proper = false;
        else
            b->splits[b->byte_token[i]].size = 1;
    }
    for (uint32_t i = 0; i < merge_count; i++) {
        const struct bpe_merge *m = &merges[i];
        const struct bpe_pair *p = bpe_find(b, m->left, m->right);
        struct bpe_split *s = &b->splits[m->result];
        if (!p || p->rank != i + 1 || s->size)
            continue; /* repeated later, or the token comes about otherwise */
        if (b->splits[m->left].size && b->splits[m->right].size &&
            pair_stays(b, m->left, m->right, i + 1, &steps))
            *s = (struct bpe_split){m->left, m->right, i + 1, tokens[m->result].size};
    }
    for (uint32_t i = 0; i < merge_count && proper; i++) {
        const struct bpe_pair *p = bpe_find(b, merges[i].left, merges[i].right);
        const struct bpe_split *l = &b->splits[merges[i].left], *r = &b->splits[merges[i].right];
        if (p && p->rank == i + 1 && l->size && r->size && (l->rank > i || r->rank > i))
            proper = false;
    }
    return proper;
}

tril_status bpe_build(struct bpe *b, const struct trie_string *tokens, uint32_t count,
                      const struct bpe_merge *merges, uint32_t merge_count,
                      struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct trie_string *reachable = NULL;
    size_t slots = 16;
    memset(b, 0, sizeof *b);
    b->count = count;
    for (int i = 0; i < 256; i++)
        b->byte_token[i] = NO_TOKEN;
    for (uint32_t i = 0; i < count; i++)
        if (tokens[i].size == 1)
            b->byte_token[tokens[i].bytes[0]] = i;
    while (slots < 2 * (size_t)merge_count)
        slots *= 2;
    b->pair_mask = (uint32_t)(slots - 1);
    b->pairs = calloc(slots, sizeof *b->pairs);
    b->splits = calloc((size_t)count + 1, sizeof *b->splits);
    if (!b->pairs || !b->splits) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for %u merges", merge_count);
        goto done;
    }
    for (uint32_t i = 0; i < merge_count; i++)
        pair_add(b, &merges[i], i + 1);
    b->linear = derive(b, tokens, merges, merge_count);
    if (b->linear) {
        reachable = malloc(((size_t)count + 1) * sizeof *reachable);
        if (!reachable) {
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for %u tokens", count);
            goto done;
        }
        for (uint32_t i = 0; i < count; i++)
            reachable[i] = (struct trie_string){tokens[i].bytes, b->splits[i].size};
        TRY(trie_build(&b->trie, reachable, count, err));
    }
done:
    free(reachable);
    if (st != TRIL_OK)
        bpe_free(b);
    return st;
}

void bpe_free(struct bpe *b) {
    free(b->pairs);
    free(b->splits);
    trie_free(&b->trie);
    b->pairs = NULL;
    b->splits = NULL;
}

static void *scratch_take(struct bpe_scratch *s, size_t size) {
    if (s->size < size) {
        free(s->memory);
        s->size = size + size / 2;
        s->memory = malloc(s->size);
        if (!s->memory)
            s->size = 0;
    }
    return s->memory;
}

#define STEPS_PER_BYTE 64

/* A vocabulary of giant tokens could cost their length at every position: beyond a fixed number of
 * steps per byte (text takes about 3) the heap takes over, whose time no vocabulary can change. */
static size_t encode_linear(const struct bpe *b, const unsigned char *text, size_t n, uint32_t *out,
                            struct bpe_scratch *scratch) {
    const unsigned char *end = text + n;
    uint64_t small[4] = {0}, *dead = small; /* positions from which nothing leads to the end */
    if (n >= 256) {
        dead = scratch_take(scratch, n / 64 * 8 + 8);
        if (!dead)
            return SIZE_MAX;
        memset(dead, 0, n / 64 * 8 + 8);
    }
    size_t count = 0, at = 0, steps = 0;
    uint32_t next = trie_longest_counted(&b->trie, text, end, &steps);
    while (at < n) {
        if (steps / STEPS_PER_BYTE > n)
            return bpe_encode_heap(b, text, n, out, scratch);
        for (; next != TRIE_NONE; next = b->trie.shorter[next]) {
            size_t to = at + b->splits[next].size;
            if (!(dead[to / 64] >> (to % 64) & 1) &&
                (count == 0 || pair_stays(b, out[count - 1], next, UINT32_MAX, &steps)))
                break;
        }
        if (next != TRIE_NONE) {
            out[count++] = next;
            at += b->splits[next].size;
            next = trie_longest_counted(&b->trie, text + at, end, &steps);
        } else { /* the first position is never dead: every text has an encoding */
            dead[at / 64] |= (uint64_t)1 << (at % 64);
            uint32_t last = out[--count];
            at -= b->splits[last].size;
            next = b->trie.shorter[last];
        }
    }
    return count;
}

size_t bpe_encode(const struct bpe *b, const unsigned char *text, size_t n, uint32_t *out,
                  struct bpe_scratch *scratch) {
    return b->linear ? encode_linear(b, text, n, out, scratch)
                     : bpe_encode_heap(b, text, n, out, scratch);
}

struct heap {
    uint64_t *entries; /* rank << 32 | position: the least is on top */
    size_t count;
};

static void heap_push(struct heap *h, uint64_t entry) {
    size_t i = h->count++;
    while (i > 0 && h->entries[(i - 1) / 2] > entry) {
        h->entries[i] = h->entries[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    h->entries[i] = entry;
}

static uint64_t heap_pop(struct heap *h) {
    uint64_t top = h->entries[0], last = h->entries[--h->count];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= h->count)
            break;
        if (child + 1 < h->count && h->entries[child + 1] < h->entries[child])
            child++;
        if (h->entries[child] >= last)
            break;
        h->entries[i] = h->entries[child];
        i = child;
    }
    h->entries[i] = last;
    return top;
}

/* Each merge pushes at most two entries and takes one symbol away: 3 n entries suffice. An entry is
 * stale unless the pair at its position still has its rank. */
size_t bpe_encode_heap(const struct bpe *b, const unsigned char *text, size_t n, uint32_t *out,
                       struct bpe_scratch *scratch) {
    uint64_t *memory;
    if (n >= UINT32_MAX || !(memory = scratch_take(scratch, n * (3 * 8 + 2 * 4))))
        return SIZE_MAX;
    struct heap heap = {memory, 0};
    uint32_t *prev = (uint32_t *)(memory + 3 * n), *next = prev + n;
    const struct bpe_pair *p;
    for (size_t i = 0; i < n; i++) {
        out[i] = b->byte_token[text[i]];
        prev[i] = (uint32_t)i - 1; /* UINT32_MAX: none */
        next[i] = (uint32_t)i + 1;
    }
    for (size_t i = 0; i + 1 < n; i++)
        if ((p = bpe_find(b, out[i], out[i + 1])))
            heap_push(&heap, (uint64_t)p->rank << 32 | i);
    while (heap.count) {
        uint64_t top = heap_pop(&heap);
        uint32_t i = (uint32_t)top, j = out[i] == NO_TOKEN ? (uint32_t)n : next[i];
        if (j >= n || !(p = bpe_find(b, out[i], out[j])) || p->rank != top >> 32)
            continue;
        out[i] = p->result;
        out[j] = NO_TOKEN;
        next[i] = next[j];
        if (next[i] < n) {
            prev[next[i]] = i;
            if ((p = bpe_find(b, out[i], out[next[i]])))
                heap_push(&heap, (uint64_t)p->rank << 32 | i);
        }
        if (prev[i] != UINT32_MAX && (p = bpe_find(b, out[prev[i]], out[i])))
            heap_push(&heap, (uint64_t)p->rank << 32 | prev[i]);
    }
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        if (out[i] != NO_TOKEN)
            out[count++] = out[i];
    return count;
}
