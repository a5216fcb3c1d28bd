/* Encoding: added tokens, normalisation, pre-tokens, and a cache of short ones.
 *
 * The cache maps a pre-token of up to 15 bytes (kept whole, so a hit is exact) to its ids. Two
 * words share a cache line; a new one takes the place of the older. Words of a language are few, so
 * nearly every pre-token of prose is one look-up; longer and rare ones run the merges. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"
#include "text/pretokens.h"
#include "text/tokenizer_impl.h"

#define CACHE_BITS 16
#define CACHE_SIZE (1u << CACHE_BITS)
#define CACHE_KEY 15   /* bytes */
#define CACHE_INLINE 3 /* ids beside the key; more of them lie in the pool */
#define POOL_SIZE (1u << 17)

struct cache_entry {
    uint64_t key[2]; /* the bytes, zero-padded; the last byte is their count */
    uint32_t ids[CACHE_INLINE];
    uint32_t count; /* above CACHE_INLINE: ids[0] is their place in the pool */
};

struct encoder {
    struct encoder *next;
    struct cache_entry *cache;
    uint32_t *pool, pool_used;
    uint32_t *ids; /* the output */
    size_t count, capacity;
    struct bpe_scratch bpe;
    struct pattern_scratch pattern;
    pretoken_visit *visit; /* instead of encoding: pretokenize's caller */
    void *visit_arg;
};

struct encoder_pool {
    pthread_mutex_t lock;
    struct encoder *free;
};

static void encoder_free(struct encoder *e) {
    if (!e)
        return;
    free(e->cache);
    free(e->pool);
    free(e->ids);
    free(e->bpe.memory);
    pattern_scratch_free(&e->pattern);
    free(e);
}

struct encoder_pool *encoder_pool_create(void) {
    struct encoder_pool *pool = calloc(1, sizeof *pool);
    if (pool)
        pthread_mutex_init(&pool->lock, NULL);
    return pool;
}

void encoder_pool_free(struct encoder_pool *pool) {
    if (!pool)
        return;
    while (pool->free) {
        struct encoder *e = pool->free;
        pool->free = e->next;
        encoder_free(e);
    }
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

struct encoder *encoder_acquire(const struct tokenizer *t) {
    pthread_mutex_lock(&t->pool->lock);
    struct encoder *e = t->pool->free;
    if (e)
        t->pool->free = e->next;
    pthread_mutex_unlock(&t->pool->lock);
    if (e)
        return e;
    e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->cache = aligned_alloc(64, CACHE_SIZE * sizeof *e->cache);
    e->pool = malloc(POOL_SIZE * sizeof *e->pool);
    if (!e->cache || !e->pool) {
        encoder_free(e);
        return NULL;
    }
    memset(e->cache, 0, CACHE_SIZE * sizeof *e->cache);
    return e;
}

void encoder_release(const struct tokenizer *t, struct encoder *e) {
    if (!e)
        return;
    if (e->bpe.size > 1u << 24) { /* after a giant pre-token: do not keep its memory */
        free(e->bpe.memory);
        e->bpe = (struct bpe_scratch){0};
    }
    pthread_mutex_lock(&t->pool->lock);
    e->next = t->pool->free;
    t->pool->free = e;
    pthread_mutex_unlock(&t->pool->lock);
}

static bool reserve(struct encoder *e, size_t n) {
    if (e->capacity - e->count >= n)
        return true;
    size_t capacity, bytes;
    if (!size_add(e->count + e->count / 2, n + 64, &capacity) ||
        !size_mul(capacity, sizeof *e->ids, &bytes))
        return false;
    uint32_t *ids = realloc(e->ids, bytes);
    if (!ids)
        return false;
    e->ids = ids;
    e->capacity = capacity;
    return true;
}

/* The merges on n bytes, onto the output, in which n places are free. */
static bool run_bpe(struct encoder *e, const struct tokenizer *t, const unsigned char *p,
                    size_t n) {
    if (t->whole_first) {
        uint32_t id = tokenizer_find(t, p, n);
        if (id != NO_TOKEN) {
            e->ids[e->count++] = id;
            return true;
        }
    }
    size_t count = bpe_encode(&t->bpe, p, n, e->ids + e->count, &e->bpe);
    if (count == SIZE_MAX)
        return false;
    e->count += count;
    return true;
}

/* A vocabulary without some bytes: the unknown token, or a refusal. */
static tril_status run_incomplete(struct encoder *e, const struct tokenizer *t,
                                  const unsigned char *p, size_t n, struct tril_error *err) {
    for (size_t i = 0; i < n;) {
        size_t known = i;
        while (known < n && t->bpe.byte_token[p[known]] != NO_TOKEN)
            known++;
        if (known > i && !run_bpe(e, t, p + i, known - i))
            return error_set(err, TRIL_ERR_MEMORY, "not enough memory to encode a text");
        if (known < n && t->unk_id < 0)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "the text has the byte 0x%02X, which this tokenizer's vocabulary does "
                             "not have (and it names no unknown token)",
                             p[known]);
        for (bool first = true; known < n && t->bpe.byte_token[p[known]] == NO_TOKEN; known++) {
            if (first || !t->fuse_unk)
                e->ids[e->count++] = (uint32_t)t->unk_id;
            first = false;
        }
        i = known;
    }
    return TRIL_OK;
}

/* A pre-token that the cache does not hold; `entry` is where it goes, or NULL. */
static __attribute__((noinline)) tril_status word_slow(struct encoder *e, const struct tokenizer *t,
                                                       const unsigned char *p, size_t n,
                                                       struct cache_entry *entry, uint64_t key0,
                                                       uint64_t key1, struct tril_error *err) {
    if (!reserve(e, n + 16))
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the ids of a text");
    size_t before = e->count;
    if (t->bytes_missing) {
        tril_status st = run_incomplete(e, t, p, n, err);
        if (st != TRIL_OK)
            return st;
    } else if (!run_bpe(e, t, p, n)) {
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to encode a text");
    }
    if (!entry)
        return TRIL_OK;
    size_t count = e->count - before;
    if (count > CACHE_INLINE) {
        if (count > POOL_SIZE - e->pool_used) { /* the pool is full: begin anew */
            memset(e->cache, 0, CACHE_SIZE * sizeof *e->cache);
            e->pool_used = 0;
        }
        memcpy(e->pool + e->pool_used, e->ids + before, count * sizeof *e->ids);
        entry->ids[0] = e->pool_used;
        e->pool_used += (uint32_t)count;
    } else {
        memcpy(entry->ids, e->ids + before, count * sizeof *e->ids);
    }
    entry->count = (uint32_t)count;
    entry->key[0] = key0;
    entry->key[1] = key1;
    return TRIL_OK;
}

/* One pre-token of n >= 1 bytes; `limit` is the end of readable memory. */
static inline tril_status word(struct encoder *e, const struct tokenizer *t, const unsigned char *p,
                               size_t n, const unsigned char *limit, struct tril_error *err) {
    if (n > CACHE_KEY)
        return word_slow(e, t, p, n, NULL, 0, 0, err);
    uint64_t key0, key1;
    if (limit - p >= 16) {
        key0 = load64_little(p);
        key1 = load64_little(p + 8);
        if (n < 8) {
            key0 &= ((uint64_t)1 << 8 * n) - 1;
            key1 = 0;
        } else {
            key1 &= ((uint64_t)1 << 8 * (n - 8)) - 1;
        }
    } else {
        unsigned char copy[16] = {0};
        memcpy(copy, p, n);
        key0 = load64_little(copy);
        key1 = load64_little(copy + 8);
    }
    key1 |= (uint64_t)n << 56;
    uint64_t h = (key0 ^ (key1 * 0x9E3779B97F4A7C15u)) * 0xD6E8FEB86659FD93u;
    struct cache_entry *entry = &e->cache[h >> (64 - CACHE_BITS) & ~(uint64_t)1];
    if (entry->key[0] != key0 || entry->key[1] != key1) {
        if (entry[1].key[0] != key0 || entry[1].key[1] != key1) {
            entry[1] = entry[0];
            return word_slow(e, t, p, n, entry, key0, key1, err);
        }
        entry++;
    }
    if (e->capacity - e->count < 16 && !reserve(e, 16))
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the ids of a text");
    uint32_t *out = e->ids + e->count;
    e->count += entry->count;
    if (entry->count <= CACHE_INLINE)
        memcpy(out, entry->ids, sizeof entry->ids); /* all three: cheaper than asking how many */
    else
        memcpy(out, e->pool + entry->ids[0], entry->count * sizeof *out);
    return TRIL_OK;
}

/* The whole of a text by one published pattern; compiled once per pattern. */
static inline tril_status scan_words(struct encoder *e, const struct tokenizer *t,
                                     const unsigned char *p, size_t size, enum scan_kind kind,
                                     struct tril_error *err) {
    const unsigned char *end = p + size;
    while (p < end) {
        const unsigned char *q = scan_next(kind, p, end);
        tril_status st = word(e, t, p, (size_t)(q - p), end, err);
        if (st != TRIL_OK)
            return st;
        p = q;
    }
    return TRIL_OK;
}

static tril_status run_fast(struct encoder *e, const struct tokenizer *t, const unsigned char *p,
                            size_t size, struct tril_error *err) {
    switch (t->fast) {
    case SCAN_GPT2:
        return scan_words(e, t, p, size, SCAN_GPT2, err);
    case SCAN_CL100K:
        return scan_words(e, t, p, size, SCAN_CL100K, err);
    case SCAN_LLAMA3:
        return scan_words(e, t, p, size, SCAN_LLAMA3, err);
    case SCAN_QWEN2:
        return scan_words(e, t, p, size, SCAN_QWEN2, err);
    default:
        return scan_words(e, t, p, size, SCAN_O200K, err);
    }
}

static tril_status run_stages(struct encoder *e, const struct tokenizer *t, int index,
                              const unsigned char *p, size_t size, struct tril_error *err);

/* Pieces that a regular expression makes of a text. Invalid bytes match nothing: they are pieces of
 * their own, and the valid text between them is matched alone. */
static tril_status run_regex(struct encoder *e, const struct tokenizer *t, int index,
                             const unsigned char *text, size_t size, struct tril_error *err) {
    const struct stage *stage = &t->stages[index];
    size_t at = 0;
    tril_status st = TRIL_OK;
    while (at < size && st == TRIL_OK) {
        size_t valid = at, invalid;
        unsigned n;
        while (valid < size && utf8_next(text + valid, text + size, &n) != UTF8_INVALID)
            valid += n;
        for (invalid = valid; invalid < size; invalid++)
            if (utf8_next(text + invalid, text + size, &n) != UTF8_INVALID)
                break;
        size_t done = at;
        while (done < valid && st == TRIL_OK) {
            size_t begin = valid, end = valid;
            bool found;
            st = pattern_match(&stage->pattern, &e->pattern, text + at, valid - at, done - at,
                               &begin, &end, &found, err);
            if (st == TRIL_OK && found) {
                begin += at;
                end += at;
            } else {
                begin = end = valid;
            }
            if (st == TRIL_OK && begin > done && stage->keep_others)
                st = run_stages(e, t, index + 1, text + done, begin - done, err);
            if (st == TRIL_OK && end > begin && stage->keep_matches)
                st = run_stages(e, t, index + 1, text + begin, end - begin, err);
            done = end;
        }
        if (st == TRIL_OK && invalid > valid)
            st = run_stages(e, t, index + 1, text + valid, invalid - valid, err);
        at = invalid;
    }
    return st;
}

static tril_status run_pattern(struct encoder *e, const struct tokenizer *t, int index,
                               const unsigned char *p, size_t size, struct tril_error *err) {
    const struct stage *stage = &t->stages[index];
    if (stage->pattern.kind == SCAN_KINDS)
        return run_regex(e, t, index, p, size, err);
    const unsigned char *end = p + size;
    tril_status st = TRIL_OK;
    while (p < end && st == TRIL_OK && stage->keep_matches) { /* its matches are the whole text */
        const unsigned char *q = scan_next(stage->pattern.kind, p, end);
        st = run_stages(e, t, index + 1, p, (size_t)(q - p), err);
        p = q;
    }
    return st;
}

static tril_status run_digits(struct encoder *e, const struct tokenizer *t, int index,
                              const unsigned char *p, size_t size, struct tril_error *err) {
    const unsigned char *end = p + size;
    tril_status st = TRIL_OK;
    while (p < end && st == TRIL_OK) {
        unsigned n;
        bool number = (utf8_class(p, end, &n) & CHAR_NUMBER) != 0;
        const unsigned char *q = p + n;
        if (!number || !t->stages[index].individual)
            q = skip_class(q, end, CHAR_NUMBER, number);
        st = run_stages(e, t, index + 1, p, (size_t)(q - p), err);
        p = q;
    }
    return st;
}

/* The text with a space in front, malloc'ed. */
static unsigned char *with_space(const unsigned char *p, size_t size) {
    unsigned char *copy = malloc(size + 1);
    if (copy) {
        copy[0] = ' ';
        memcpy(copy + 1, p, size);
    }
    return copy;
}

static tril_status run_stages(struct encoder *e, const struct tokenizer *t, int index,
                              const unsigned char *p, size_t size, struct tril_error *err) {
    tril_status st;
    unsigned char *copy = NULL;
    if (index == t->stage_count) {
        if (!e->visit)
            return word(e, t, p, size, p + size, err);
        return e->visit(e->visit_arg, p, size)
                   ? TRIL_OK
                   : error_set(err, TRIL_ERR_INTERRUPTED, "stopped between two pre-tokens");
    }
    const struct stage *stage = &t->stages[index];
    if (stage->kind == STAGE_DIGITS)
        return run_digits(e, t, index, p, size, err);
    if (stage->prefix_space && *p != ' ') {
        p = copy = with_space(p, size++);
        if (!copy)
            return error_set(err, TRIL_ERR_MEMORY, "not enough memory to encode a text");
    }
    st = stage->has_pattern ? run_pattern(e, t, index, p, size, err)
                            : run_stages(e, t, index + 1, p, size, err);
    free(copy);
    return st;
}

/* A text without added tokens, normalised. */
static tril_status run_plain(struct encoder *e, const struct tokenizer *t, const unsigned char *p,
                             size_t size, struct tril_error *err) {
    if (size == 0)
        return TRIL_OK;
    if (t->fast == SCAN_KINDS)
        return run_stages(e, t, 0, p, size, err);
    if (!t->fast_prefix_space || *p == ' ')
        return run_fast(e, t, p, size, err);
    unsigned char *copy = with_space(p, size);
    if (!copy)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to encode a text");
    tril_status st = run_fast(e, t, copy, size + 1, err);
    free(copy);
    return st;
}

static tril_status run_raw(struct encoder *e, const struct tokenizer *t, const unsigned char *p,
                           size_t size, bool allow_special, struct tril_error *err);

/* Cuts added tokens out of a text and gives what lies between to run_raw or run_plain. */
static tril_status run_added(struct encoder *e, const struct tokenizer *t,
                             const unsigned char *text, size_t size, bool normalized,
                             struct tril_error *err) {
    const struct matcher *m = normalized ? &t->normalized : &t->raw;
    const unsigned char *end = text + size;
    struct added_match match;
    size_t done = 0, from = 0;
    tril_status st = TRIL_OK;
    while (st == TRIL_OK && matcher_find(m, text, size, from, &match)) {
        const struct added_token *a = &t->added[match.index];
        unsigned n;
        from = match.end;
        if (a->single_word &&
            ((match.begin > 0 && utf8_class_before(text, text + match.begin, &n) & CHAR_WORD) ||
             (match.end < size && utf8_class(text + match.end, end, &n) & CHAR_WORD)))
            continue;
        while (a->lstrip && match.begin > done &&
               utf8_class_before(text + done, text + match.begin, &n) & CHAR_SPACE)
            match.begin -= n;
        while (a->rstrip && match.end < size && utf8_class(text + match.end, end, &n) & CHAR_SPACE)
            match.end += n;
        if (match.begin > done)
            st = normalized ? run_plain(e, t, text + done, match.begin - done, err)
                            : run_raw(e, t, text + done, match.begin - done, true, err);
        if (st == TRIL_OK && !reserve(e, 1))
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the ids of a text");
        if (st == TRIL_OK)
            e->ids[e->count++] = a->id;
        done = match.end;
    }
    if (st != TRIL_OK || done >= size)
        return st;
    return normalized ? run_plain(e, t, text + done, size - done, err)
                      : run_raw(e, t, text + done, size - done, true, err);
}

/* A text in which the added tokens of the first kind have been found: normalise, then the second.
 */
static tril_status run_raw(struct encoder *e, const struct tokenizer *t, const unsigned char *p,
                           size_t size, bool allow_special, struct tril_error *err) {
    unsigned char *normal = NULL;
    if (t->nfc) {
        size_t normal_size;
        if (!unicode_nfc(p, size, &normal, &normal_size))
            return error_set(err, TRIL_ERR_MEMORY, "not enough memory to normalise a text");
        if (normal) {
            p = normal;
            size = normal_size;
        }
    }
    tril_status st = allow_special && t->normalized.any ? run_added(e, t, p, size, true, err)
                                                        : run_plain(e, t, p, size, err);
    free(normal);
    return st;
}

tril_status encoder_run(struct encoder *e, const struct tokenizer *t, const void *text, size_t size,
                        bool allow_special, const uint32_t **ids, size_t *n,
                        struct tril_error *err) {
    e->count = 0;
    *ids = NULL;
    *n = 0;
    if (!reserve(e, size / 4 + 16))
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the ids of a text");
    tril_status st = allow_special && t->raw.any ? run_added(e, t, text, size, false, err)
                                                 : run_raw(e, t, text, size, allow_special, err);
    if (st == TRIL_OK) {
        *ids = e->ids;
        *n = e->count;
    }
    return st;
}

tril_status pretokenize(const struct tokenizer *t, const void *text, size_t size,
                        pretoken_visit *visit, void *arg, struct tril_error *err) {
    struct encoder *e = encoder_acquire(t);
    if (!e)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to cut a text");
    e->visit = visit;
    e->visit_arg = arg;
    tril_status st = size ? run_stages(e, t, 0, text, size, err) : TRIL_OK;
    e->visit = NULL;
    encoder_release(t, e);
    return st == TRIL_ERR_INTERRUPTED ? TRIL_OK : st;
}

tril_status tokenizer_encode(const struct tokenizer *t, const char *text, size_t size,
                             bool allow_special, uint32_t **ids, size_t *n,
                             struct tril_error *err) {
    const uint32_t *result;
    *ids = NULL;
    *n = 0;
    struct encoder *e = encoder_acquire(t);
    if (!e)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to encode a text");
    tril_status st = encoder_run(e, t, text, size, allow_special, &result, n, err);
    if (st == TRIL_OK) { /* the caller takes the buffer over */
        uint32_t *shrunk = realloc(e->ids, (*n + 1) * sizeof *e->ids);
        *ids = shrunk ? shrunk : e->ids;
        e->ids = NULL;
        e->capacity = 0;
    }
    encoder_release(t, e);
    return st;
}

static bool is_ascii_letter(unsigned char c) {
    return (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
}

/* Between a letter or digit and a space before a letter every published pattern ends a pre-token,
 * and what it matches on either side does not depend on the other. */
size_t pattern_safe_cut(const unsigned char *text, size_t size, size_t from) {
    for (size_t i = from ? from : 1; i + 1 < size; i++)
        if (text[i] == ' ' && is_ascii_letter(text[i + 1]) &&
            (is_ascii_letter(text[i - 1]) || (text[i - 1] >= '0' && text[i - 1] <= '9')))
            return i;
    return size;
}

/* Whether added tokens are told by their first byte, which none has in its inside: then any place
 * where one's string stands is one. */
static bool added_stand_alone(const struct tokenizer *t) {
    if (t->raw.only_first < 0 || t->normalized.any)
        return false;
    for (uint32_t i = 0; i < t->added_count; i++) {
        const struct added_token *a = &t->added[i];
        if (a->lstrip || a->rstrip || a->single_word ||
            memchr(a->content + 1, t->raw.only_first, a->size - 1))
            return false;
    }
    return true;
}

size_t tokenizer_safe_cut(const struct tokenizer *t, const void *text, size_t size, size_t from,
                          bool allow_special) {
    struct added_match match;
    if (t->fast ==
        SCAN_KINDS) /* a pattern about which nothing is known: only behind added tokens */
        return allow_special && added_stand_alone(t) &&
                       matcher_find(&t->raw, text, size, from, &match)
                   ? match.end
                   : size;
    for (uint32_t i = 0; allow_special && i < t->added_count; i++)
        if (t->added[i].rstrip || memchr(t->added[i].content, ' ', t->added[i].size))
            return size;
    return pattern_safe_cut(text, size, from);
}

#define PARALLEL_CHUNK ((size_t)1 << 19)

struct parallel_encode {
    const struct tokenizer *t;
    const char *text;
    const size_t *cuts;
    bool allow_special;
    struct parallel_part {
        uint32_t *ids;
        size_t n;
        tril_status st;
        struct tril_error err;
    } * parts;
};

static void encode_part(void *arg, int64_t begin, int64_t end, int worker) {
    struct parallel_encode *a = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        struct parallel_part *p = &a->parts[i];
        p->st = tokenizer_encode(a->t, a->text + a->cuts[i], a->cuts[i + 1] - a->cuts[i],
                                 a->allow_special, &p->ids, &p->n, &p->err);
    }
}

tril_status tokenizer_encode_parallel(const struct tokenizer *t, const char *text, size_t size,
                                      bool allow_special, uint32_t **ids, size_t *n,
                                      struct tril_error *err) {
    if (size < 2 * PARALLEL_CHUNK || threads_count() < 2)
        return tokenizer_encode(t, text, size, allow_special, ids, n, err);
    tril_status st = TRIL_OK;
    size_t most = size / PARALLEL_CHUNK + 1, count = 0, total = 0;
    size_t *cuts = malloc((most + 1) * sizeof *cuts);
    struct parallel_encode a = {t, text, cuts, allow_special, calloc(most, sizeof *a.parts)};
    *ids = NULL;
    *n = 0;
    if (!cuts || !a.parts) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to encode a text");
        goto done;
    }
    cuts[0] = 0;
    while (cuts[count] < size) {
        size_t target = cuts[count] + PARALLEL_CHUNK;
        cuts[count + 1] =
            target >= size ? size : tokenizer_safe_cut(t, text, size, target, allow_special);
        count++;
    }
    parallel_for((int64_t)count, 1, encode_part, &a);
    for (size_t i = 0; i < count; i++) {
        if (a.parts[i].st != TRIL_OK) {
            if (err)
                *err = a.parts[i].err;
            st = a.parts[i].st;
            goto done;
        }
        total += a.parts[i].n;
    }
    *ids = malloc((total + 1) * sizeof **ids);
    if (!*ids) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the ids of a text");
        goto done;
    }
    for (size_t i = 0; i < count; i++) {
        memcpy(*ids + *n, a.parts[i].ids, a.parts[i].n * sizeof **ids);
        *n += a.parts[i].n;
    }
done:
    for (size_t i = 0; a.parts && i < count; i++)
        free(a.parts[i].ids);
    free(a.parts);
    free(cuts);
    return st;
}
