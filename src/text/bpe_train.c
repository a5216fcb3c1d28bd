/* Training: count distinct pre-tokens in parallel, then merge the most frequent pair again and
 * again.
 *
 * Each distinct pre-token is a list of token ids with a count. A table holds each adjacent pair
 * with its count and the words it was ever seen in; a heap holds pairs by count, entries going
 * stale as counts fall (they are put back when they come up). A merge touches only the words of its
 * pair. */
#include "text/bpe_train.h"

#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/progress.h"
#include "base/system.h"
#include "base/threads.h"
#include "text/input.h"
#include "text/tokenizer_impl.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to train a tokenizer");
}

/* ------------------------------------------------------------------ counting pre-tokens */

struct word {
    const unsigned char *bytes; /* in a file's map, or in the counter's own memory */
    uint32_t size;
    int64_t count;
};

/* A hash table of words; one per worker, then all are added up. */
struct counter {
    struct word *words;
    uint32_t *slots; /* index + 1; 0: empty */
    size_t count, capacity, mask;
    int64_t pre_tokens;
    bool failed;
};

static bool counter_grow(struct counter *c) {
    size_t slots = c->mask ? 2 * (c->mask + 1) : 1 << 12;
    struct word *words = realloc(c->words, slots / 2 * sizeof *words);
    if (words)
        c->words = words;
    uint32_t *table = calloc(slots, sizeof *table);
    if (!words || !table || slots / 2 >= UINT32_MAX) {
        free(table);
        return false;
    }
    c->capacity = slots / 2;
    c->mask = slots - 1;
    for (size_t i = 0; i < c->count; i++) {
        uint64_t h = hash_bytes(c->words[i].bytes, c->words[i].size, 0);
        while (table[h & c->mask])
            h++;
        table[h & c->mask] = (uint32_t)i + 1;
    }
    free(c->slots);
    c->slots = table;
    return true;
}

static void counter_add(struct counter *c, const unsigned char *p, size_t size, int64_t count) {
    c->pre_tokens += count;
    if (c->count == c->capacity && !counter_grow(c)) {
        c->failed = true;
        return;
    }
    uint64_t h = hash_bytes(p, size, 0);
    for (;; h++) {
        uint32_t slot = c->slots[h & c->mask];
        if (!slot)
            break;
        struct word *w = &c->words[slot - 1];
        if (w->size == size && memcmp(w->bytes, p, size) == 0) {
            w->count += count;
            return;
        }
    }
    c->words[c->count] = (struct word){p, (uint32_t)size, count};
    c->slots[h & c->mask] = (uint32_t)++c->count;
}

static void counter_free(struct counter *c) {
    free(c->words);
    free(c->slots);
}

struct counting {
    enum scan_kind kind;
    const struct matcher *specials;
    const unsigned char *text;
    const size_t *cuts;
    struct counter *workers;
};

/* Pre-tokens of one stretch without special tokens. */
static void count_plain(struct counter *c, enum scan_kind kind, const unsigned char *p,
                        const unsigned char *end) {
    while (p < end && !c->failed) {
        const unsigned char *q = scan_next(kind, p, end);
        while (q - p > UINT32_MAX / 4) { /* absurdly long: cut, rather than overflow a size */
            counter_add(c, p, UINT32_MAX / 4, 1);
            p += UINT32_MAX / 4;
        }
        counter_add(c, p, (size_t)(q - p), 1);
        p = q;
    }
}

static void count_part(void *arg, int64_t begin, int64_t end, int worker) {
    const struct counting *a = arg;
    struct counter *c = &a->workers[worker];
    for (int64_t i = begin; i < end; i++) {
        size_t at = a->cuts[i];
        struct added_match m;
        while (matcher_find(a->specials, a->text, a->cuts[i + 1], at, &m)) {
            count_plain(c, a->kind, a->text + at, a->text + m.begin);
            at = m.end;
        }
        count_plain(c, a->kind, a->text + at, a->text + a->cuts[i + 1]);
    }
}

/* Counts a text on all threads, cut where every published pattern ends a pre-token. */
static tril_status count_text(struct counting *a, const unsigned char *text, size_t size,
                              struct tril_error *err) {
    enum { CHUNK = 1 << 20 };
    size_t most = size / CHUNK + 2, n = 0;
    size_t *cuts = malloc((most + 1) * sizeof *cuts);
    if (!cuts)
        return no_memory(err);
    cuts[0] = 0;
    while (cuts[n] < size) {
        cuts[n + 1] =
            cuts[n] + CHUNK >= size ? size : pattern_safe_cut(text, size, cuts[n] + CHUNK);
        n++;
    }
    a->text = text;
    a->cuts = cuts;
    parallel_for((int64_t)n, 1, count_part, a);
    free(cuts);
    return TRIL_OK;
}

static int by_bytes(const void *a, const void *b) {
    const struct word *x = a, *y = b;
    uint32_t n = x->size < y->size ? x->size : y->size;
    int order = memcmp(x->bytes, y->bytes, n);
    return order ? order : (x->size > y->size) - (x->size < y->size);
}

/* Adds the workers' counts up in workers[0], in an order that does not depend on who counted what.
 */
static tril_status gather(struct counter *workers, int count, struct tril_error *err) {
    for (int w = 0; w < count; w++) {
        for (size_t i = 0; w > 0 && i < workers[w].count; i++) {
            const struct word *word = &workers[w].words[i];
            counter_add(&workers[0], word->bytes, word->size, word->count);
        }
        if (workers[w].failed || workers[0].failed)
            return no_memory(err);
    }
    if (workers[0].count)
        qsort(workers[0].words, workers[0].count, sizeof(struct word), by_bytes);
    return TRIL_OK;
}

/* ------------------------------------------------------------------ merging */

struct pair {
    uint32_t left, right;
    int64_t count;
    uint32_t *words; /* where it was seen; may name words that no longer hold it */
    uint32_t word_count, word_capacity;
};

struct entry {
    int64_t count;
    uint32_t pair;
};

struct trainer {
    /* the words: ids of word w are ids[start[w]] .. + length[w] */
    uint32_t *ids, *length;
    size_t *start;
    int64_t *count;
    size_t word_count;
    /* tokens as bytes */
    struct trie_string *tokens;
    uint32_t token_count, token_limit;
    /* pairs, and their hash table (index + 1) */
    struct pair *pairs;
    uint32_t *slots;
    size_t pair_count, pair_capacity, mask;
    struct entry *heap;
    size_t heap_count, heap_capacity;
    struct bpe_merge *merges;
    uint32_t merge_count;
    bool failed;
};

static int compare_tokens(const struct trainer *t, uint32_t a, uint32_t b) {
    const struct trie_string *x = &t->tokens[a], *y = &t->tokens[b];
    uint32_t n = x->size < y->size ? x->size : y->size;
    int order = memcmp(x->bytes, y->bytes, n);
    return order ? order : (x->size > y->size) - (x->size < y->size);
}

/* Whether a comes before b: the greater count, then the greater pair of byte strings. */
static bool before(const struct trainer *t, struct entry a, struct entry b) {
    if (a.count != b.count)
        return a.count > b.count;
    const struct pair *x = &t->pairs[a.pair], *y = &t->pairs[b.pair];
    int order = compare_tokens(t, x->left, y->left);
    return (order ? order : compare_tokens(t, x->right, y->right)) > 0;
}

static void heap_push(struct trainer *t, struct entry e) {
    if (t->heap_count == t->heap_capacity) {
        size_t capacity = t->heap_capacity ? 2 * t->heap_capacity : 1 << 12;
        struct entry *grown = realloc(t->heap, capacity * sizeof *grown);
        if (!grown) {
            t->failed = true;
            return;
        }
        t->heap = grown;
        t->heap_capacity = capacity;
    }
    size_t i = t->heap_count++;
    for (; i > 0 && before(t, e, t->heap[(i - 1) / 2]); i = (i - 1) / 2)
        t->heap[i] = t->heap[(i - 1) / 2];
    t->heap[i] = e;
}

static struct entry heap_pop(struct trainer *t) {
    struct entry top = t->heap[0], last = t->heap[--t->heap_count];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= t->heap_count)
            break;
        if (child + 1 < t->heap_count && before(t, t->heap[child + 1], t->heap[child]))
            child++;
        if (!before(t, t->heap[child], last))
            break;
        t->heap[i] = t->heap[child];
        i = child;
    }
    t->heap[i] = last;
    return top;
}

static bool pairs_grow(struct trainer *t) {
    size_t slots = t->mask ? 2 * (t->mask + 1) : 1 << 13;
    struct pair *pairs = realloc(t->pairs, slots / 2 * sizeof *pairs);
    if (pairs)
        t->pairs = pairs;
    uint32_t *table = calloc(slots, sizeof *table);
    if (!pairs || !table || slots / 2 >= UINT32_MAX) {
        free(table);
        return false;
    }
    t->pair_capacity = slots / 2;
    t->mask = slots - 1;
    for (size_t i = 0; i < t->pair_count; i++) {
        uint64_t h = ((uint64_t)t->pairs[i].left << 32 | t->pairs[i].right) * 0x9E3779B97F4A7C15u;
        for (h >>= 20; table[h & t->mask]; h++)
            ;
        table[h & t->mask] = (uint32_t)i + 1;
    }
    free(t->slots);
    t->slots = table;
    return true;
}

/* The pair's index, made if it is new; UINT32_MAX when out of memory. */
static uint32_t pair_index(struct trainer *t, uint32_t left, uint32_t right) {
    if (t->pair_count == t->pair_capacity && !pairs_grow(t)) {
        t->failed = true;
        return UINT32_MAX;
    }
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    for (h >>= 20; t->slots[h & t->mask]; h++) {
        uint32_t i = t->slots[h & t->mask] - 1;
        if (t->pairs[i].left == left && t->pairs[i].right == right)
            return i;
    }
    t->pairs[t->pair_count] = (struct pair){.left = left, .right = right};
    t->slots[h & t->mask] = (uint32_t)++t->pair_count;
    return (uint32_t)t->pair_count - 1;
}

/* `word` holds the pair (once more): counts it, notes the word unless it was noted last. */
static uint32_t pair_add(struct trainer *t, uint32_t left, uint32_t right, uint32_t word) {
    uint32_t i = pair_index(t, left, right);
    if (i == UINT32_MAX)
        return i;
    struct pair *p = &t->pairs[i];
    p->count += t->count[word];
    if (p->word_count && p->words[p->word_count - 1] == word)
        return i;
    if (p->word_count == p->word_capacity) {
        uint32_t capacity = p->word_capacity ? 2 * p->word_capacity : 4;
        uint32_t *grown = realloc(p->words, capacity * sizeof *grown);
        if (!grown) {
            t->failed = true;
            return UINT32_MAX;
        }
        p->words = grown;
        p->word_capacity = capacity;
    }
    p->words[p->word_count++] = word;
    return i;
}

/* Replaces the pair by `token` in one word, and brings the counts of its neighbours up to date. New
 * pairs go onto the heap once per merge, when all words are done: `fresh` collects them. */
static void merge_word(struct trainer *t, uint32_t word, uint32_t left, uint32_t right,
                       uint32_t token) {
    uint32_t *ids = t->ids + t->start[word], n = t->length[word], out = 0;
    int64_t count = t->count[word];
    bool found = false;
    for (uint32_t i = 0; i + 1 < n && !found; i++)
        found = ids[i] == left && ids[i + 1] == right;
    if (!found)
        return;
    /* All of the word's pairs go, then all pairs of what it became come. */
    for (uint32_t i = 0; i + 1 < n; i++) {
        uint32_t p = pair_index(t, ids[i], ids[i + 1]);
        if (p == UINT32_MAX)
            return;
        t->pairs[p].count -= count;
    }
    for (uint32_t i = 0; i < n; i++) {
        bool here = i + 1 < n && ids[i] == left && ids[i + 1] == right;
        ids[out++] = here ? token : ids[i];
        i += here;
    }
    t->length[word] = out;
    for (uint32_t i = 0; i + 1 < out; i++) {
        if (ids[i] == token || ids[i + 1] == token) {
            pair_add(t, ids[i], ids[i + 1], word);
        } else {
            uint32_t p = pair_index(t, ids[i], ids[i + 1]);
            if (p != UINT32_MAX)
                t->pairs[p].count += count;
        }
    }
}

/* The id of left + right: a new token, or an older one with the same bytes. */
static uint32_t token_make(struct trainer *t, uint32_t left, uint32_t right, bool *new_one) {
    const struct trie_string *a = &t->tokens[left], *b = &t->tokens[right];
    uint32_t size = a->size + b->size;
    unsigned char *bytes = malloc(size);
    if (!bytes) {
        t->failed = true;
        return NO_TOKEN;
    }
    memcpy(bytes, a->bytes, a->size);
    memcpy(bytes + a->size, b->bytes, b->size);
    *new_one = true;
    for (uint32_t i = 0; i < t->token_count; i++)
        if (t->tokens[i].size == size && memcmp(t->tokens[i].bytes, bytes, size) == 0) {
            free(bytes);
            *new_one = false;
            return i;
        }
    t->tokens[t->token_count] = (struct trie_string){bytes, size};
    return t->token_count++;
}

static tril_status train_merges(struct trainer *t, int64_t min_count, bool quiet,
                                struct tril_error *err) {
    struct progress progress;
    uint32_t first = t->token_count;
    tril_status st = TRIL_OK;
    progress_start(&progress, "merging", t->token_limit - first);
    for (size_t w = 0; w < t->word_count && !t->failed; w++) {
        const uint32_t *ids = t->ids + t->start[w];
        for (uint32_t i = 0; i + 1 < t->length[w]; i++)
            pair_add(t, ids[i], ids[i + 1], (uint32_t)w);
    }
    for (uint32_t i = 0; i < t->pair_count; i++)
        heap_push(t, (struct entry){t->pairs[i].count, i});
    while (t->token_count < t->token_limit && t->merge_count < 2 * t->token_limit &&
           t->heap_count && !t->failed) {
        struct entry top = heap_pop(t);
        struct pair pair = t->pairs[top.pair];
        bool new_one;
        if (top.count != pair.count) { /* stale: its count has fallen */
            if (pair.count >= min_count && pair.count < top.count)
                heap_push(t, (struct entry){pair.count, top.pair});
            continue;
        }
        if (pair.count < min_count)
            break;
        uint32_t token = token_make(t, pair.left, pair.right, &new_one);
        if (token == NO_TOKEN)
            break;
        t->merges[t->merge_count++] = (struct bpe_merge){pair.left, pair.right, token};
        size_t known = t->pair_count;
        /* The list is taken off the pair: merging may move the table of pairs. */
        t->pairs[top.pair].words = NULL;
        t->pairs[top.pair].word_count = t->pairs[top.pair].word_capacity = 0;
        for (uint32_t i = 0; i < pair.word_count && !t->failed; i++)
            merge_word(t, pair.words[i], pair.left, pair.right, token);
        free(pair.words);
        for (uint32_t i = (uint32_t)known; i < t->pair_count; i++)
            heap_push(t, (struct entry){t->pairs[i].count, i});
        if (!new_one) /* an older token's pairs may have grown, too */
            for (uint32_t i = 0; i < known; i++)
                if ((t->pairs[i].left == token || t->pairs[i].right == token) &&
                    t->pairs[i].count > 0)
                    heap_push(t, (struct entry){t->pairs[i].count, i});
        if (!quiet)
            progress_update(&progress, t->token_count - first, NULL);
    }
    progress_end(&progress);
    if (t->failed)
        st = no_memory(err);
    return st;
}

/* ------------------------------------------------------------------ put together */

/* GPT-2's order of the bytes: the printable ones first. */
static void byte_order(unsigned char order[256]) {
    int n = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int b = 0; b < 256; b++) {
            bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
            if (printable == (pass == 0))
                order[n++] = (unsigned char)b;
        }
}

/* Words as lists of ids; the first tokens: `specials` empty ones, then the bytes. */
static tril_status trainer_create(struct trainer *t, const struct counter *c, uint32_t specials,
                                  uint32_t limit, const unsigned char order[256],
                                  struct tril_error *err) {
    size_t total = 0;
    uint32_t id_of[256];
    for (size_t i = 0; i < c->count; i++)
        total += c->words[i].size;
    t->word_count = c->count;
    t->token_limit = limit;
    t->ids = malloc((total + 1) * sizeof *t->ids);
    t->length = malloc((c->count + 1) * sizeof *t->length);
    t->start = malloc((c->count + 1) * sizeof *t->start);
    t->count = malloc((c->count + 1) * sizeof *t->count);
    t->tokens = calloc((size_t)limit + 1, sizeof *t->tokens);
    t->merges = malloc(((size_t)limit * 2 + 1) * sizeof *t->merges);
    if (!t->ids || !t->length || !t->start || !t->count || !t->tokens || !t->merges)
        return no_memory(err);
    t->token_count = specials;
    for (int i = 0; i < 256; i++) {
        id_of[order[i]] = t->token_count;
        unsigned char *byte = malloc(1);
        if (!byte)
            return no_memory(err);
        *byte = order[i];
        t->tokens[t->token_count++] = (struct trie_string){byte, 1};
    }
    size_t at = 0;
    for (size_t w = 0; w < c->count; w++) {
        t->start[w] = at;
        t->length[w] = c->words[w].size;
        t->count[w] = c->words[w].count;
        for (uint32_t i = 0; i < c->words[w].size; i++)
            t->ids[at++] = id_of[c->words[w].bytes[i]];
    }
    return TRIL_OK;
}

static void trainer_free(struct trainer *t) {
    for (size_t i = 0; i < t->pair_count; i++)
        free(t->pairs[i].words);
    for (uint32_t i = 0; t->tokens && i < t->token_count; i++)
        free((void *)t->tokens[i].bytes);
    free(t->pairs);
    free(t->slots);
    free(t->heap);
    free(t->ids);
    free(t->length);
    free(t->start);
    free(t->count);
    free(t->tokens);
    free(t->merges);
}

static tril_status build(struct tokenizer **out, const struct trainer *t,
                         const struct bpe_train_options *o, struct pattern *pattern,
                         struct tril_error *err) {
    struct added_token *added = calloc(o->special_count + 1, sizeof *added);
    uint8_t *flags = calloc((size_t)t->token_count + 1, 1);
    tril_status st = TRIL_OK;
    if (!added || !flags) {
        st = no_memory(err);
        goto done;
    }
    for (uint32_t i = 0; i < t->token_count; i++)
        flags[i] = i < o->special_count ? 0 : TOKEN_EXISTS;
    for (size_t i = 0; i < o->special_count; i++)
        added[i] = (struct added_token){.id = (uint32_t)i,
                                        .content = (const unsigned char *)o->specials[i],
                                        .size = (uint32_t)strlen(o->specials[i]),
                                        .special = true};
    struct tokenizer_parts parts = {.vocab_size = t->token_count,
                                    .tokens = t->tokens,
                                    .flags = flags,
                                    .merges = t->merges,
                                    .merge_count = t->merge_count,
                                    .added = added,
                                    .added_count = (uint32_t)o->special_count,
                                    .unk_id = -1,
                                    .bos_id = -1};
    tokenizer_parts_set_pattern(&parts, pattern);
    st = tokenizer_build(out, &parts, "the trained tokenizer", err);
done:
    free(added);
    free(flags);
    return st;
}

static tril_status check_options(const struct bpe_train_options *o, const struct pattern *pattern,
                                 struct tril_error *err) {
    if (pattern->kind == SCAN_KINDS)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "a tokenizer is trained with a published pattern (gpt2, cl100k, qwen2, "
                         "o200k), not with an expression of your own");
    if (o->special_count > 100000 || o->vocab_size < 256 + o->special_count ||
        o->vocab_size > 1u << 24)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a vocabulary holds the 256 bytes and the %zu special tokens, so its size "
                         "is from %zu to %u, not %u",
                         o->special_count, 256 + o->special_count, 1u << 24, o->vocab_size);
    for (size_t i = 0; i < o->special_count; i++)
        if (!*o->specials[i])
            return error_set(err, TRIL_ERR_ARGUMENT, "a special token is empty");
    return TRIL_OK;
}

/* A text or a list of files: one of them is NULL. */
static tril_status train(struct tokenizer **out, const struct file_map *maps, size_t map_count,
                         const struct bpe_train_options *o, struct bpe_train_stats *stats,
                         struct tril_error *err) {
    struct bpe_train_stats ignored;
    struct pattern pattern = {0};
    struct matcher specials = {0};
    struct trie_string *contents = NULL;
    int workers = threads_count();
    struct counter *counters = calloc((size_t)workers, sizeof *counters);
    struct counting counting = {.specials = &specials, .workers = counters};
    struct trainer t = {0};
    unsigned char order[256];
    tril_status st = TRIL_OK;
    if (!stats)
        stats = &ignored;
    *stats = (struct bpe_train_stats){0};
    *out = NULL;
    unicode_prepare();
    if (!counters || !(contents = calloc(o->special_count + 1, sizeof *contents))) {
        st = no_memory(err);
        goto done;
    }
    TRY(pattern_named(&pattern, o->pattern ? o->pattern : "gpt2", err));
    TRY(check_options(o, &pattern, err));
    for (size_t i = 0; i < o->special_count; i++)
        contents[i] = (struct trie_string){(const unsigned char *)o->specials[i],
                                           (uint32_t)strlen(o->specials[i])};
    if (!matcher_build(&specials, contents, (uint32_t)o->special_count, err)) {
        st = TRIL_ERR_MEMORY;
        goto done;
    }
    counting.kind = pattern.kind;
    double begun = clock_seconds();
    for (size_t i = 0; i < map_count; i++) {
        TRY(count_text(&counting, maps[i].data, maps[i].size, err));
        stats->bytes += (int64_t)maps[i].size;
    }
    for (int i = 0; i < workers; i++)
        stats->pre_tokens += counters[i].pre_tokens;
    TRY(gather(counters, workers, err));
    if (counters[0].count == 0) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "there is no text to train a tokenizer on");
        goto done;
    }
    stats->unique_pre_tokens = (int64_t)counters[0].count;
    stats->count_seconds = clock_seconds() - begun;
    begun = clock_seconds();
    byte_order(order);
    TRY(trainer_create(&t, &counters[0], (uint32_t)o->special_count, o->vocab_size, order, err));
    TRY(train_merges(&t, o->min_count > 1 ? o->min_count : 1, o->quiet, err));
    stats->merge_seconds = clock_seconds() - begun;
    TRY(build(out, &t, o, &pattern, err));
done:
    trainer_free(&t);
    for (int i = 0; counters && i < workers; i++)
        counter_free(&counters[i]);
    free(counters);
    free(contents);
    matcher_free(&specials);
    pattern_free(&pattern);
    return st;
}

tril_status tokenizer_train(struct tokenizer **out, const char *const *paths, size_t path_count,
                            const struct bpe_train_options *options, struct bpe_train_stats *stats,
                            struct tril_error *err) {
    struct input_files files = {0};
    struct file_map *maps = NULL;
    size_t opened = 0;
    tril_status st = TRIL_OK;
    *out = NULL;
    TRY(input_files_find(&files, paths, path_count, err));
    maps = calloc(files.count + 1, sizeof *maps);
    if (!maps) {
        st = no_memory(err);
        goto done;
    }
    for (; opened < files.count; opened++)
        TRY(file_map_open(&maps[opened], files.paths[opened], err));
    st = train(out, maps, files.count, options, stats, err);
done:
    while (opened > 0)
        file_map_close(&maps[--opened]);
    free(maps);
    input_files_free(&files);
    return st;
}

tril_status tokenizer_train_text(struct tokenizer **out, const char *text, size_t size,
                                 const struct bpe_train_options *options,
                                 struct bpe_train_stats *stats, struct tril_error *err) {
    struct file_map map = {.data = (const unsigned char *)text, .size = size};
    return train(out, &map, 1, options, stats, err);
}
