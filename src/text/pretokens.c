#include "text/pretokens.h"

#include <stdlib.h>
#include <string.h>

#include "base/threads.h"

#define CHUNK ((size_t)1 << 20)
#define CHUNKS_AT_ONCE 64
#define SHORT 15

static uint64_t short_hash(uint64_t a, uint64_t b) {
    uint64_t h = (a ^ (b * 0x9E3779B97F4A7C15u)) * 0xD6E8FEB86659FD93u;
    return h ^ h >> 29;
}

static bool grow_shorts(struct pretokens *s) {
    size_t slots = s->short_slots ? s->short_slots * 2 : 4096;
    struct short_word *words = calloc(slots, sizeof *words);
    if (!words)
        return false;
    for (size_t i = 0; i < s->short_slots; i++) {
        const struct short_word *w = &s->shorts[i];
        if (!w->count)
            continue;
        uint64_t h = short_hash(w->key[0], w->key[1]);
        while (words[h & (slots - 1)].count)
            h++;
        words[h & (slots - 1)] = *w;
    }
    free(s->shorts);
    s->shorts = words;
    s->short_slots = slots;
    return true;
}

static void add_short(struct pretokens *s, uint64_t key0, uint64_t key1, int64_t count) {
    if (s->short_count * 2 >= s->short_slots && !grow_shorts(s)) {
        s->failed = true;
        return;
    }
    for (uint64_t h = short_hash(key0, key1);; h++) {
        struct short_word *w = &s->shorts[h & (s->short_slots - 1)];
        if (!w->count) {
            w->key[0] = key0;
            w->key[1] = key1;
            s->short_count++;
        } else if (w->key[0] != key0 || w->key[1] != key1) {
            continue;
        }
        w->count += count;
        return;
    }
}

static bool grow_longs(struct pretokens *s) {
    size_t slots = s->long_slots ? s->long_slots * 2 : 1024;
    struct long_word *words = calloc(slots, sizeof *words);
    if (!words)
        return false;
    for (size_t i = 0; i < s->long_slots; i++) {
        if (!s->longs[i].size)
            continue;
        size_t h = s->longs[i].hash;
        while (words[h & (slots - 1)].size)
            h++;
        words[h & (slots - 1)] = s->longs[i];
    }
    free(s->longs);
    s->longs = words;
    s->long_slots = slots;
    return true;
}

static void add_long(struct pretokens *s, const unsigned char *p, size_t size, int64_t count) {
    if (size > UINT32_MAX || (s->long_count * 2 >= s->long_slots && !grow_longs(s))) {
        s->failed = true;
        return;
    }
    uint32_t hash = (uint32_t)(hash_bytes(p, size, 3) >> 8);
    for (size_t h = hash;; h++) {
        struct long_word *w = &s->longs[h & (s->long_slots - 1)];
        if (w->size == size && w->hash == hash && memcmp(s->bytes + w->at, p, size) == 0) {
            w->count += count;
            return;
        }
        if (w->size)
            continue;
        if (size > s->capacity - s->size) {
            size_t capacity = (s->size + size) * 2 + 4096;
            unsigned char *bytes = realloc(s->bytes, capacity);
            if (!bytes) {
                s->failed = true;
                return;
            }
            s->bytes = bytes;
            s->capacity = capacity;
        }
        memcpy(s->bytes + s->size, p, size);
        *w = (struct long_word){s->size, (uint32_t)size, hash, count};
        s->size += size;
        s->long_count++;
        return;
    }
}

static inline void add_word(struct pretokens *s, const unsigned char *p, size_t size,
                            const unsigned char *limit) {
    s->total++;
    if (size > SHORT) {
        add_long(s, p, size, 1);
        return;
    }
    unsigned char copy[16] = {0};
    const unsigned char *from = p;
    if (limit - p < 16) {
        memcpy(copy, p, size);
        from = copy;
    }
    uint64_t key0 = load64_little(from), key1 = load64_little(from + 8);
    if (size < 8) {
        key0 &= ((uint64_t)1 << 8 * size) - 1;
        key1 = 0;
    } else {
        key1 &= ((uint64_t)1 << 8 * (size - 8)) - 1;
    }
    add_short(s, key0, key1 | (uint64_t)size << 56, 1);
}

static void pretokens_free(struct pretokens *s) {
    free(s->shorts);
    free(s->longs);
    free(s->bytes);
    memset(s, 0, sizeof *s);
}

struct pretoken_counter {
    const struct tokenizer *t;
    int workers;
    struct pretokens *sets; /* one per worker */
    struct tril_error *errors;
    const unsigned char *chunks[CHUNKS_AT_ONCE + 1];
};

tril_status pretoken_counter_create(struct pretoken_counter **out, const struct tokenizer *t,
                                    struct tril_error *err) {
    struct pretoken_counter *c = *out = calloc(1, sizeof *c);
    if (c) {
        c->t = t;
        c->workers = threads_count();
        c->sets = calloc((size_t)c->workers, sizeof *c->sets);
        c->errors = calloc((size_t)c->workers, sizeof *c->errors);
    }
    if (!c || !c->sets || !c->errors) {
        pretoken_counter_free(c);
        *out = NULL;
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to count pre-tokens");
    }
    return TRIL_OK;
}

void pretoken_counter_free(struct pretoken_counter *c) {
    if (!c)
        return;
    for (int i = 0; c->sets && i < c->workers; i++)
        pretokens_free(&c->sets[i]);
    free(c->sets);
    free(c->errors);
    free(c);
}

static inline void count_scanned(struct pretokens *s, const unsigned char *p, size_t size,
                                 enum scan_kind kind) {
    const unsigned char *end = p + size;
    while (p < end) {
        const unsigned char *q = scan_next(kind, p, end);
        add_word(s, p, (size_t)(q - p), end);
        p = q;
    }
}

static bool count_visited(void *arg, const unsigned char *p, size_t size) {
    struct pretokens *s = arg;
    add_word(s, p, size, p + size);
    return !s->failed;
}

static void count_segment(const struct tokenizer *t, struct pretokens *s, const unsigned char *p,
                          size_t size, struct tril_error *err) {
    switch (t->fast) {
    case SCAN_GPT2:
        count_scanned(s, p, size, SCAN_GPT2);
        break;
    case SCAN_CL100K:
        count_scanned(s, p, size, SCAN_CL100K);
        break;
    case SCAN_LLAMA3:
        count_scanned(s, p, size, SCAN_LLAMA3);
        break;
    case SCAN_QWEN2:
        count_scanned(s, p, size, SCAN_QWEN2);
        break;
    case SCAN_O200K:
        count_scanned(s, p, size, SCAN_O200K);
        break;
    default:
        pretokenize(t, p, size, count_visited, s, err);
    }
}

static void count_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    struct pretoken_counter *c = arg;
    for (int64_t i = begin; i < end; i++) {
        const unsigned char *p = c->chunks[i];
        size_t size = (size_t)(c->chunks[i + 1] - p), at = 0;
        struct added_match m;
        while (at < size && matcher_find(&c->t->raw, p, size, at, &m)) {
            if (m.begin > at)
                count_segment(c->t, &c->sets[worker], p + at, m.begin - at, &c->errors[worker]);
            at = m.end;
        }
        if (at < size)
            count_segment(c->t, &c->sets[worker], p + at, size - at, &c->errors[worker]);
    }
}

tril_status pretoken_counter_add(struct pretoken_counter *c, const void *text, size_t size,
                                 void (*done)(void *arg, int64_t bytes), void *arg,
                                 struct tril_error *err) {
    const unsigned char *p = text, *end = p + size;
    while (p < end) {
        int64_t n = 0;
        while (p < end && n < CHUNKS_AT_ONCE) {
            size_t left = (size_t)(end - p);
            c->chunks[n++] = p;
            p += left <= CHUNK ? left : tokenizer_safe_cut(c->t, p, left, CHUNK, true);
        }
        c->chunks[n] = p;
        parallel_for(n, 1, count_chunk, c);
        for (int i = 0; i < c->workers; i++) {
            if (c->sets[i].failed)
                return error_set(err, TRIL_ERR_MEMORY,
                                 "not enough memory for the distinct pre-tokens of the text");
            if (c->errors[i].code != TRIL_OK) {
                if (err)
                    *err = c->errors[i];
                return c->errors[i].code;
            }
        }
        if (done)
            done(arg, p - (const unsigned char *)text);
    }
    return TRIL_OK;
}

tril_status pretoken_counter_result(struct pretoken_counter *c, const struct pretokens **result,
                                    struct tril_error *err) {
    struct pretokens *all = c->sets;
    for (int i = 1; i < c->workers; i++) {
        struct pretokens *s = &c->sets[i];
        for (size_t k = 0; k < s->short_slots; k++)
            if (s->shorts[k].count)
                add_short(all, s->shorts[k].key[0], s->shorts[k].key[1], s->shorts[k].count);
        for (size_t k = 0; k < s->long_slots; k++)
            if (s->longs[k].size)
                add_long(all, s->bytes + s->longs[k].at, s->longs[k].size, s->longs[k].count);
        all->total += s->total;
        pretokens_free(s);
    }
    *result = all;
    if (all->failed)
        return error_set(err, TRIL_ERR_MEMORY,
                         "not enough memory for the distinct pre-tokens of the text");
    return TRIL_OK;
}
