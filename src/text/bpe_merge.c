/* All distinct pre-tokens lie one after another in `at`, one cell per byte and one empty cell
 * behind each. A token stands at its first byte; where it is longer, its last byte names it too (so
 * that the neighbour on the right finds it) and the cells between are empty:
 *
 *     th e c a t _     pair (th, e): positions 0, ...
 *     t  h
 *
 * Every pair keeps its count (weighted by the pre-tokens' counts) and the positions where it came
 * about. Positions go stale when a neighbour changes; a look at the cells tells. Merging a pair
 * visits its positions only, so all merges together take time in proportion to the bytes merged. A
 * heap gives the most frequent pair; counts of existing pairs only fall, so an entry whose count
 * has changed is put back with its new one. */
#include "text/bpe_merge.h"

#include <stdlib.h>
#include <string.h>

#include "base/memory.h"

#define EMPTY UINT32_MAX
/* Longer tokens are not made: they serve nobody, and texts without blanks (runs of a letter, DNA)
 * would fill a vocabulary with strings of ever the same. Published vocabularies end at 128 bytes.
 */
#define TOKEN_LIMIT ((size_t)256)

struct pair {
    uint32_t left, right;
    int64_t count;
    uint32_t *positions;
    uint32_t n, capacity;
};

struct learner {
    struct bpe_vocab *v;
    uint32_t *at, *word; /* per cell: the token; the pre-token it belongs to */
    int64_t *weights;    /* per pre-token */
    uint32_t cells, words;
    struct pair *pairs;
    uint32_t pair_count, pair_capacity;
    uint32_t *slots, mask; /* hash table of pairs */
    struct entry {
        int64_t count;
        uint32_t pair;
    } * heap;
    size_t heap_count, heap_capacity;
    uint32_t *touched, touched_count, touched_capacity; /* pairs made by the present merge */
};

unsigned char *bpe_vocab_bytes(struct bpe_vocab *v, size_t size) {
    struct byte_block *b = v->blocks;
    if (!b || size > sizeof b->bytes - b->used) {
        if (size > sizeof b->bytes || !(b = malloc(sizeof *b)))
            return NULL;
        b->next = v->blocks;
        b->used = 0;
        v->blocks = b;
    }
    b->used += size;
    return b->bytes + b->used - size;
}

void bpe_vocab_free(struct bpe_vocab *v) {
    while (v->blocks) {
        struct byte_block *next = v->blocks->next;
        free(v->blocks);
        v->blocks = next;
    }
    free(v->tokens);
    free(v->merges);
    memset(v, 0, sizeof *v);
}

static uint32_t length(const struct learner *l, uint32_t token) {
    return l->v->tokens[token].size;
}

static uint64_t pair_hash(uint32_t left, uint32_t right) {
    return ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u >> 20;
}

static bool grow_slots(struct learner *l) {
    size_t slots = l->slots ? 2 * ((size_t)l->mask + 1) : 1u << 16;
    uint32_t *table = slots < UINT32_MAX ? malloc(slots * sizeof *table) : NULL;
    if (!table)
        return false;
    memset(table, 0xFF, slots * sizeof *table);
    for (uint32_t i = 0; i < l->pair_count; i++) {
        uint64_t h = pair_hash(l->pairs[i].left, l->pairs[i].right);
        while (table[h & (slots - 1)] != EMPTY)
            h++;
        table[h & (slots - 1)] = i;
    }
    free(l->slots);
    l->slots = table;
    l->mask = (uint32_t)(slots - 1);
    return true;
}

/* The pair's index, made if it is new; EMPTY: out of memory. */
static uint32_t pair_get(struct learner *l, uint32_t left, uint32_t right) {
    if ((uint64_t)l->pair_count * 2 >= (uint64_t)l->mask && !grow_slots(l))
        return EMPTY;
    uint64_t h = pair_hash(left, right);
    for (; l->slots[h & l->mask] != EMPTY; h++) {
        const struct pair *p = &l->pairs[l->slots[h & l->mask]];
        if (p->left == left && p->right == right)
            return l->slots[h & l->mask];
    }
    if (l->pair_count == l->pair_capacity) {
        uint32_t capacity = l->pair_capacity ? l->pair_capacity * 2 : 1u << 14;
        struct pair *pairs = realloc(l->pairs, capacity * sizeof *pairs);
        if (!pairs)
            return EMPTY;
        l->pairs = pairs;
        l->pair_capacity = capacity;
    }
    l->pairs[l->pair_count] = (struct pair){.left = left, .right = right};
    return l->slots[h & l->mask] = l->pair_count++;
}

static bool add_position(struct pair *p, uint32_t position) {
    if (p->n == p->capacity) {
        uint32_t capacity = p->capacity ? p->capacity + p->capacity / 2 + 1 : 4;
        uint32_t *positions = realloc(p->positions, capacity * sizeof *positions);
        if (!positions)
            return false;
        p->positions = positions;
        p->capacity = capacity;
    }
    p->positions[p->n++] = position;
    return true;
}

/* Whether pair a goes before pair b: more frequent, else greater as strings of bytes. */
static bool before(const struct learner *l, struct entry a, struct entry b) {
    if (a.count != b.count)
        return a.count > b.count;
    const struct pair *p = &l->pairs[a.pair], *q = &l->pairs[b.pair];
    for (int side = 0; side < 2; side++) {
        const struct trie_string *x = &l->v->tokens[side ? p->right : p->left],
                                 *y = &l->v->tokens[side ? q->right : q->left];
        int order = memcmp(x->bytes, y->bytes, x->size < y->size ? x->size : y->size);
        if (order)
            return order > 0;
        if (x->size != y->size)
            return x->size > y->size;
    }
    return false;
}

static bool heap_push(struct learner *l, struct entry e) {
    if (l->heap_count == l->heap_capacity) {
        size_t capacity = l->heap_capacity ? l->heap_capacity * 2 : 1u << 14;
        struct entry *heap = realloc(l->heap, capacity * sizeof *heap);
        if (!heap)
            return false;
        l->heap = heap;
        l->heap_capacity = capacity;
    }
    size_t i = l->heap_count++;
    for (; i > 0 && before(l, e, l->heap[(i - 1) / 2]); i = (i - 1) / 2)
        l->heap[i] = l->heap[(i - 1) / 2];
    l->heap[i] = e;
    return true;
}

static struct entry heap_pop(struct learner *l) {
    struct entry top = l->heap[0], last = l->heap[--l->heap_count];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= l->heap_count)
            break;
        if (child + 1 < l->heap_count && before(l, l->heap[child + 1], l->heap[child]))
            child++;
        if (!before(l, l->heap[child], last))
            break;
        l->heap[i] = l->heap[child];
        i = child;
    }
    l->heap[i] = last;
    return top;
}

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to train a tokenizer on this text");
}

static void lay_word(struct learner *l, uint32_t *cell, const unsigned char *p, uint32_t size,
                     int64_t count) {
    for (uint32_t i = 0; i < size; i++, ++*cell) {
        l->at[*cell] = l->v->byte_token[p[i]];
        l->word[*cell] = l->words;
    }
    l->at[(*cell)++] = EMPTY;
    l->weights[l->words++] = count;
}

/* Cells, weights and the pairs of bytes. */
static tril_status lay_out(struct learner *l, const struct pretokens *words,
                           struct tril_error *err) {
    size_t cells = 1, count = words->short_count + words->long_count;
    for (size_t i = 0; i < words->short_slots; i++)
        if (words->shorts[i].count)
            cells += (words->shorts[i].key[1] >> 56) + 1;
    for (size_t i = 0; i < words->long_slots; i++)
        if (words->longs[i].size)
            cells += (size_t)words->longs[i].size + 1;
    if (cells >= EMPTY)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the text's distinct pre-tokens have %zu bytes; tril trains on up to 4 GB "
                         "of them: give less text",
                         cells);
    l->at = malloc(cells * sizeof *l->at);
    l->word = malloc(cells * sizeof *l->word);
    l->weights = malloc((count + 1) * sizeof *l->weights);
    if (!l->at || !l->word || !l->weights || !grow_slots(l))
        return no_memory(err);
    uint32_t cell = 0;
    l->at[cell++] = EMPTY; /* every first byte has a left neighbour */
    for (size_t i = 0; i < words->short_slots; i++) {
        const struct short_word *w = &words->shorts[i];
        unsigned char bytes[16];
        if (!w->count)
            continue;
        for (int k = 0; k < 16; k++)
            bytes[k] = (unsigned char)(w->key[k / 8] >> 8 * (k % 8));
        lay_word(l, &cell, bytes, bytes[15], w->count);
    }
    for (size_t i = 0; i < words->long_slots; i++)
        if (words->longs[i].size)
            lay_word(l, &cell, words->bytes + words->longs[i].at, words->longs[i].size,
                     words->longs[i].count);
    l->cells = cell;
    for (uint32_t i = 0; i + 1 < cell; i++) {
        if (l->at[i] == EMPTY || l->at[i + 1] == EMPTY)
            continue;
        uint32_t p = pair_get(l, l->at[i], l->at[i + 1]);
        if (p == EMPTY || !add_position(&l->pairs[p], i))
            return no_memory(err);
        l->pairs[p].count += l->weights[l->word[i]];
    }
    for (uint32_t i = 0; i < l->pair_count; i++)
        if (!heap_push(l, (struct entry){l->pairs[i].count, i}))
            return no_memory(err);
    return TRIL_OK;
}

/* A pair that the present merge brings about at a position. */
static bool appear(struct learner *l, uint32_t left, uint32_t right, uint32_t position,
                   int64_t weight) {
    uint32_t before_count = l->pair_count, p = pair_get(l, left, right);
    if (p == EMPTY || !add_position(&l->pairs[p], position))
        return false;
    if (p >= before_count) {
        if (l->touched_count == l->touched_capacity) {
            uint32_t capacity = l->touched_capacity ? l->touched_capacity * 2 : 1024;
            uint32_t *touched = realloc(l->touched, capacity * sizeof *touched);
            if (!touched)
                return false;
            l->touched = touched;
            l->touched_capacity = capacity;
        }
        l->touched[l->touched_count++] = p;
    }
    l->pairs[p].count += weight;
    return true;
}

static void disappear(struct learner *l, uint32_t left, uint32_t right, int64_t weight) {
    uint64_t h = pair_hash(left, right);
    for (; l->slots[h & l->mask] != EMPTY; h++) {
        struct pair *p = &l->pairs[l->slots[h & l->mask]];
        if (p->left == left && p->right == right) {
            p->count -= weight;
            return;
        }
    }
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Replaces pair `index` by the token `made` wherever it stands. */
static bool merge_pair(struct learner *l, uint32_t index, uint32_t made) {
    uint32_t left = l->pairs[index].left, right = l->pairs[index].right, n = l->pairs[index].n;
    uint32_t *positions = l->pairs[index].positions; /* pairs may move meanwhile */
    uint32_t left_size = length(l, left), right_size = length(l, right);
    bool ok = true;
    l->pairs[index].positions = NULL;
    l->pairs[index].n = l->pairs[index].capacity = 0;
    if (left == right) /* overlapping places: the left one first */
        qsort(positions, n, sizeof *positions, ascending);
    for (uint32_t k = 0; k < n && ok; k++) {
        uint32_t i = positions[k], j = i + left_size, next = j + right_size;
        if (l->at[i] != left || l->at[j] != right)
            continue;
        int64_t weight = l->weights[l->word[i]];
        uint32_t x = l->at[i - 1], y = l->at[next];
        if (left_size > 1)
            l->at[j - 1] = EMPTY;
        l->at[j] = EMPTY;
        l->at[i] = made;
        l->at[next - 1] = made;
        if (x != EMPTY) {
            disappear(l, x, left, weight);
            ok = appear(l, x, made, i - length(l, x), weight);
        }
        if (y != EMPTY && ok) {
            disappear(l, right, y, weight);
            ok = appear(l, made, y, i, weight);
        }
    }
    free(positions);
    l->pairs[index].count = 0;
    return ok;
}

/* The id of left + right: a new token, or one that has the same bytes. EMPTY: out of memory. */
static uint32_t make_token(struct bpe_vocab *v, uint32_t left, uint32_t right, uint32_t specials) {
    const struct trie_string *a = &v->tokens[left], *b = &v->tokens[right];
    unsigned char *bytes = bpe_vocab_bytes(v, (size_t)a->size + b->size);
    if (!bytes)
        return EMPTY;
    memcpy(bytes, a->bytes, a->size);
    memcpy(bytes + a->size, b->bytes, b->size);
    for (uint32_t i = 0; i < specials; i++)
        if (v->tokens[i].size == a->size + b->size &&
            memcmp(v->tokens[i].bytes, bytes, v->tokens[i].size) == 0)
            return i;
    v->tokens[v->count] = (struct trie_string){bytes, a->size + b->size};
    return v->count++;
}

tril_status bpe_learn(struct bpe_vocab *v, const struct pretokens *words, int64_t min_count,
                      void (*progress)(void *arg, uint32_t count), void *arg,
                      struct tril_error *err) {
    struct learner l = {.v = v};
    uint32_t specials = v->count; /* what is there before: bytes and special tokens */
    tril_status st;
    TRY(lay_out(&l, words, err));
    while (v->count < v->capacity && l.heap_count) {
        struct entry top = heap_pop(&l);
        struct pair *p = &l.pairs[top.pair];
        if (p->count != top.count) { /* it has become rarer */
            if (p->count > 0 && !heap_push(&l, (struct entry){p->count, top.pair})) {
                st = no_memory(err);
                goto done;
            }
            continue;
        }
        if (top.count < min_count)
            break;
        if (v->tokens[p->left].size + (size_t)v->tokens[p->right].size > TOKEN_LIMIT)
            continue;
        uint32_t left = p->left, right = p->right, made = make_token(v, left, right, specials);
        l.touched_count = 0;
        if (made == EMPTY || !merge_pair(&l, top.pair, made)) {
            st = no_memory(err);
            goto done;
        }
        v->merges[v->merge_count++] = (struct bpe_merge){left, right, made};
        for (uint32_t i = 0; i < l.touched_count; i++) {
            uint32_t t = l.touched[i];
            if (l.pairs[t].count > 0 && !heap_push(&l, (struct entry){l.pairs[t].count, t})) {
                st = no_memory(err);
                goto done;
            }
        }
        if (progress)
            progress(arg, v->count);
    }
done:
    for (uint32_t i = 0; i < l.pair_count; i++)
        free(l.pairs[i].positions);
    free(l.pairs);
    free(l.slots);
    free(l.heap);
    free(l.touched);
    free(l.at);
    free(l.word);
    free(l.weights);
    return st;
}
