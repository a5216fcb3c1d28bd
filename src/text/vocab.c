#include "text/vocab.h"

#include <stdlib.h>
#include <string.h>

/* The bytes that a token's string stands for, at out (room for size); false if it has a character
 * outside the byte alphabet: then its own UTF-8 is copied. */
static bool unmap(const unsigned char *key, size_t size, unsigned char *out, uint32_t *out_size) {
    const unsigned char *p = key, *end = key + size;
    uint32_t n = 0;
    while (p < end) {
        unsigned length;
        uint32_t c = utf8_next(p, end, &length);
        int byte = c == UTF8_INVALID ? -1 : char_to_byte(c);
        if (byte < 0) {
            memcpy(out, key, size);
            *out_size = (uint32_t)size;
            return false;
        }
        out[n++] = (unsigned char)byte;
        p += length;
    }
    *out_size = n;
    return true;
}

static tril_status no_memory(const char *name, struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the vocabulary of %s", name);
}

tril_status vocab_read(struct vocab *v, const json_t *object, uint32_t room, const char *name,
                       struct tril_error *err) {
    size_t entries = json_object_size(object), bytes = 1, slots = 16;
    memset(v, 0, sizeof *v);
    if (entries > UINT32_MAX / 4 - room)
        return error_set(err, TRIL_ERR_UNSUPPORTED, "%s: the vocabulary has %zu tokens", name,
                         entries);
    v->id_limit = (uint32_t)entries + room;
    while (slots < 2 * entries)
        slots *= 2;
    void *at;
    json_t *root = (json_t *)(uintptr_t)object; /* Jansson's iterators ask for it */
    for (at = json_object_iter(root); at; at = json_object_iter_next(root, at))
        bytes += json_object_iter_key_len(at);
    v->mask = (uint32_t)(slots - 1);
    v->tokens = calloc((size_t)v->id_limit + 1, sizeof *v->tokens);
    v->keys = calloc((size_t)v->id_limit + 1, sizeof *v->keys);
    v->flags = calloc((size_t)v->id_limit + 1, 1);
    v->slots = malloc(slots * sizeof *v->slots);
    unsigned char *blob = v->blob = malloc(bytes);
    if (!v->tokens || !v->keys || !v->flags || !v->slots || !blob)
        return no_memory(name, err);
    memset(v->slots, 0xFF, slots * sizeof *v->slots);
    for (at = json_object_iter(root); at; at = json_object_iter_next(root, at)) {
        const unsigned char *key = (const unsigned char *)json_object_iter_key(at);
        size_t size = json_object_iter_key_len(at);
        const json_t *value = json_object_iter_value(at);
        json_int_t id = json_integer_value(value);
        int shown = (int)(size < 100 ? size : 100);
        if (size == 0)
            return error_set(err, TRIL_ERR_FORMAT, "%s: the vocabulary has an empty token", name);
        if (!json_is_integer(value) || id < 0)
            return error_set(err, TRIL_ERR_FORMAT,
                             "%s: the id of the token \"%.*s\" is not a whole number from 0 up",
                             name, shown, key);
        if (id >= v->id_limit)
            return error_set(err, TRIL_ERR_FORMAT,
                             "%s: the token \"%.*s\" has the id %lld, but there are only %u tokens",
                             name, shown, key, (long long)id, v->id_limit);
        if (v->flags[id])
            return error_set(
                err, TRIL_ERR_FORMAT, "%s: two tokens have the id %lld: \"%.*s\" and \"%.*s\"",
                name, (long long)id, shown, key,
                (int)(v->keys[id].size < 100 ? v->keys[id].size : 100), v->keys[id].bytes);
        bool mapped = unmap(key, size, blob, &v->tokens[id].size);
        v->flags[id] = (uint8_t)(TOKEN_EXISTS | (mapped ? 0 : TOKEN_RAW));
        v->tokens[id].bytes = blob;
        blob += v->tokens[id].size;
        v->keys[id] = (struct trie_string){key, (uint32_t)size};
        uint64_t h = hash_bytes(key, size, 1);
        while (v->slots[h & v->mask] != NO_TOKEN)
            h++;
        v->slots[h & v->mask] = (uint32_t)id;
        v->count++;
    }
    return TRIL_OK;
}

void vocab_free(struct vocab *v) {
    free(v->tokens);
    free(v->keys);
    free(v->flags);
    free(v->slots);
    free(v->blob);
    free(v->merges);
    memset(v, 0, sizeof *v);
}

uint32_t vocab_find(const struct vocab *v, const char *key, size_t size) {
    uint64_t h = hash_bytes(key, size, 1);
    for (;; h++) {
        uint32_t id = v->slots[h & v->mask];
        if (id == NO_TOKEN ||
            (v->keys[id].size == size && memcmp(v->keys[id].bytes, key, size) == 0))
            return id;
    }
}

static tril_status unknown(const char *what, const char *token, size_t size, const char *name,
                           const char *where, size_t number, struct tril_error *err) {
    return error_set(err, TRIL_ERR_FORMAT, "%s: %s %zu: %s \"%.*s\" is not in the vocabulary", name,
                     where, number, what, (int)(size < 100 ? size : 100), token);
}

tril_status vocab_merge(struct vocab *v, const char *left, size_t left_size, const char *right,
                        size_t right_size, const char *name, const char *where, size_t number,
                        struct tril_error *err) {
    char small[256], *both = small;
    struct bpe_merge m = {vocab_find(v, left, left_size), vocab_find(v, right, right_size),
                          NO_TOKEN};
    if (m.left == NO_TOKEN)
        return unknown("the merged token", left, left_size, name, where, number, err);
    if (m.right == NO_TOKEN)
        return unknown("the merged token", right, right_size, name, where, number, err);
    if (left_size + right_size > sizeof small && !(both = malloc(left_size + right_size)))
        return no_memory(name, err);
    memcpy(both, left, left_size);
    memcpy(both + left_size, right, right_size);
    m.result = vocab_find(v, both, left_size + right_size);
    tril_status st = TRIL_OK;
    if (m.result == NO_TOKEN)
        st = unknown("the merge's result", both, left_size + right_size, name, where, number, err);
    if (both != small)
        free(both);
    if (st != TRIL_OK)
        return st;
    if (v->flags[m.left] & TOKEN_RAW || v->flags[m.right] & TOKEN_RAW)
        return TRIL_OK; /* such tokens never come about: pre-tokens are in the byte alphabet */
    if (v->merge_count == v->merge_capacity) {
        uint32_t capacity = v->merge_capacity ? v->merge_capacity * 2 : 1024;
        struct bpe_merge *merges = realloc(v->merges, capacity * sizeof *merges);
        if (!merges)
            return no_memory(name, err);
        v->merges = merges;
        v->merge_capacity = capacity;
    }
    v->merges[v->merge_count++] = m;
    return TRIL_OK;
}

tril_status vocab_merge_line(struct vocab *v, const char *line, size_t size, const char *name,
                             const char *where, size_t number, struct tril_error *err) {
    const char *space = memchr(line, ' ', size);
    if (!space || space == line || space == line + size - 1 ||
        memchr(space + 1, ' ', size - 1 - (size_t)(space - line)))
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: %s %zu: \"%.*s\" is not a merge of two tokens with a space between",
                         name, where, number, (int)(size < 100 ? size : 100), line);
    size_t left = (size_t)(space - line);
    return vocab_merge(v, line, left, space + 1, size - left - 1, name, where, number, err);
}
