/* Building a tokenizer from what a loader or the trainer gathered, and asking it. */
#include "text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "text/tokenizer_impl.h"

/* Multiply and fold, eight bytes at a time (after wyhash); not for hostile keys. */
uint64_t hash_bytes(const void *data, size_t size, uint64_t seed) {
    const unsigned char *p = data;
    uint64_t h = seed ^ (size * 0x9E3779B97F4A7C15u);
    while (size) {
        unsigned char last[8] = {0};
        size_t n = size < 8 ? size : 8;
        uint64_t x;
        if (n == 8) {
            x = load64_little(p);
        } else {
            memcpy(last, p, n);
            x = load64_little(last);
        }
        unsigned __int128 m =
            (unsigned __int128)(h ^ x ^ 0xA0761D6478BD642Fu) * (x ^ 0xE7037ED1A0B428DBu);
        h = (uint64_t)m ^ (uint64_t)(m >> 64) ^ (h << 1 | h >> 63);
        p += n;
        size -= n;
    }
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return h ^ h >> 32;
}

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a tokenizer");
}

static int by_id(const void *a, const void *b) {
    const struct added_token *x = a, *y = b;
    return x->id < y->id ? -1 : x->id > y->id;
}

static const struct added_token *added_find(const struct tokenizer *t, uint32_t id) {
    struct added_token key = {.id = id};
    return t->added_count ? bsearch(&key, t->added, t->added_count, sizeof key, by_id) : NULL;
}

/* Copies tokens and added tokens into t; checks that added tokens are distinct and ids have no gap.
 */
static tril_status take_tokens(struct tokenizer *t, const struct tokenizer_parts *parts,
                               const char *name, struct tril_error *err) {
    size_t bytes = 1;
    for (uint32_t i = 0; i < parts->vocab_size; i++)
        bytes += parts->tokens[i].size;
    for (uint32_t i = 0; i < parts->added_count; i++)
        bytes += parts->added[i].size;
    unsigned char *p = t->blob = malloc(bytes);
    t->tokens = calloc((size_t)t->vocab_size + 1, sizeof *t->tokens);
    t->flags = calloc((size_t)t->vocab_size + 1, 1);
    t->added = calloc((size_t)parts->added_count + 1, sizeof *t->added);
    if (!t->blob || !t->tokens || !t->flags || !t->added)
        return no_memory(err);
    for (uint32_t i = 0; i < t->vocab_size; i++) {
        uint32_t size = parts->tokens[i].size;
        t->flags[i] = parts->flags[i];
        t->tokens[i] = (struct trie_string){p, size};
        if (size)
            memcpy(p, parts->tokens[i].bytes, size);
        p += size;
    }
    for (uint32_t i = 0; i < parts->added_count; i++) {
        struct added_token *a = &t->added[t->added_count++];
        *a = parts->added[i];
        memcpy(p, a->content, a->size);
        a->content = p;
        p += a->size;
        t->flags[a->id] |= (uint8_t)(TOKEN_EXISTS | TOKEN_ADDED | (a->special ? TOKEN_SPECIAL : 0));
    }
    qsort(t->added, t->added_count, sizeof *t->added, by_id);
    for (uint32_t i = 1; i < t->added_count; i++)
        if (t->added[i].id == t->added[i - 1].id)
            return error_set(err, TRIL_ERR_FORMAT, "%s: two added tokens have the id %u", name,
                             t->added[i].id);
    for (uint32_t i = 0; i < t->vocab_size; i++)
        if (!(t->flags[i] & TOKEN_EXISTS) && !parts->allow_gap)
            return error_set(err, TRIL_ERR_FORMAT,
                             "%s: no token has the id %u, though ids go up to %u", name, i,
                             t->vocab_size - 1);
    return TRIL_OK;
}

/* The two matchers: contents that are looked for before, and after, normalisation. */
static tril_status take_added(struct tokenizer *t, const char *name, struct tril_error *err) {
    tril_status st = TRIL_OK;
    size_t n = t->added_count;
    struct trie_string *contents = calloc(2 * n + 1, sizeof *contents);
    unsigned char **normal = calloc(n + 1, sizeof *normal);
    if (!contents || !normal) {
        st = no_memory(err);
        goto done;
    }
    for (uint32_t i = 0; i < n; i++) {
        const struct added_token *a = &t->added[i];
        struct trie_string *s = &contents[a->normalized ? n + i : i];
        size_t size = a->size;
        if (a->normalized && t->nfc && !unicode_nfc(a->content, a->size, &normal[i], &size)) {
            st = no_memory(err);
            goto done;
        }
        *s = (struct trie_string){normal[i] ? normal[i] : a->content, (uint32_t)size};
        for (uint32_t j = 0; j < i && n < 4096; j++)
            if (t->added[j].normalized == a->normalized && t->added[j].size == a->size &&
                memcmp(t->added[j].content, a->content, a->size) == 0) {
                st = error_set(err, TRIL_ERR_FORMAT, "%s: the added token \"%.*s\" appears twice",
                               name, (int)(a->size < 100 ? a->size : 100), a->content);
                goto done;
            }
    }
    if (!matcher_build(&t->raw, contents, (uint32_t)n, err) ||
        !matcher_build(&t->normalized, contents + n, (uint32_t)n, err))
        st = err && err->code != TRIL_OK ? err->code : TRIL_ERR_MEMORY;
done:
    for (uint32_t i = 0; normal && i < n; i++)
        free(normal[i]);
    free(normal);
    free(contents);
    return st;
}

static tril_status take_merges(struct tokenizer *t, const struct tokenizer_parts *parts,
                               struct tril_error *err) {
    struct trie_string *usable = malloc(((size_t)t->vocab_size + 1) * sizeof *usable);
    size_t slots = 16;
    while (slots < 2 * (size_t)t->vocab_size)
        slots *= 2;
    t->merges = malloc(((size_t)parts->merge_count + 1) * sizeof *t->merges);
    t->by_bytes = malloc(slots * sizeof *t->by_bytes);
    if (!usable || !t->merges || !t->by_bytes) {
        free(usable);
        return no_memory(err);
    }
    t->merge_count = parts->merge_count;
    if (t->merge_count)
        memcpy(t->merges, parts->merges, t->merge_count * sizeof *t->merges);
    t->by_bytes_mask = (uint32_t)(slots - 1);
    memset(t->by_bytes, 0xFF, slots * sizeof *t->by_bytes);
    for (uint32_t i = 0; i < t->vocab_size; i++) {
        usable[i] = t->tokens[i];
        if (t->flags[i] & TOKEN_RAW)
            usable[i].size = 0;
        if (!usable[i].size)
            continue;
        uint64_t h = hash_bytes(usable[i].bytes, usable[i].size, 0);
        while (t->by_bytes[h & t->by_bytes_mask] != NO_TOKEN)
            h++;
        t->by_bytes[h & t->by_bytes_mask] = i;
    }
    tril_status st = bpe_build(&t->bpe, usable, t->vocab_size, t->merges, t->merge_count, err);
    free(usable);
    for (int b = 0; st == TRIL_OK && b < 256; b++)
        t->bytes_missing |= t->bpe.byte_token[b] == NO_TOKEN;
    return st;
}

/* Whether all stages together are one published pattern. */
static void find_fast_path(struct tokenizer *t) {
    const struct stage *s = t->stages;
    t->fast = SCAN_KINDS;
    if (t->stage_count == 1 && s[0].kind == STAGE_BYTE_LEVEL && s[0].has_pattern) {
        t->fast = s[0].pattern.kind;
        t->fast_prefix_space = s[0].prefix_space;
    } else if (t->stage_count == 2 && s[0].kind == STAGE_SPLIT && s[0].keep_matches &&
               s[1].kind == STAGE_BYTE_LEVEL && !s[1].has_pattern && !s[1].prefix_space) {
        t->fast = s[0].pattern.kind;
    }
}

static uint64_t mix(uint64_t h, const void *data, size_t size) {
    return hash_bytes(data, size, h);
}

static uint64_t identity(const struct tokenizer *t) {
    uint64_t h = mix(0x7472696C, &t->vocab_size, sizeof t->vocab_size);
    h = mix(h, t->flags, t->vocab_size);
    for (uint32_t i = 0; i < t->vocab_size; i++)
        h = mix(h, t->tokens[i].bytes, t->tokens[i].size);
    for (uint32_t i = 0; i < t->merge_count; i++) {
        uint32_t pair[2] = {t->merges[i].left, t->merges[i].right};
        h = mix(h, pair, sizeof pair);
    }
    for (uint32_t i = 0; i < t->added_count; i++) {
        const struct added_token *a = &t->added[i];
        unsigned char bits[] = {a->single_word, a->lstrip, a->rstrip, a->normalized, a->special};
        h = mix(h, &a->id, sizeof a->id);
        h = mix(h, a->content, a->size);
        h = mix(h, bits, sizeof bits);
    }
    for (int i = 0; i < t->stage_count; i++) {
        const struct stage *s = &t->stages[i];
        unsigned char bits[] = {(unsigned char)s->kind, s->has_pattern, s->keep_matches,
                                s->keep_others,         s->individual,  s->prefix_space};
        h = mix(h, bits, sizeof bits);
        if (s->has_pattern)
            h = mix(h, s->pattern.source, strlen(s->pattern.source));
    }
    int64_t rest[] = {t->ignore_merges, t->unk_id, t->fuse_unk, t->nfc};
    return mix(h, rest, sizeof rest);
}

tril_status tokenizer_build(struct tokenizer **out, struct tokenizer_parts *parts, const char *name,
                            struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct tokenizer *t = calloc(1, sizeof *t);
    struct tril_error own = {0};
    *out = NULL;
    unicode_prepare();
    if (!t) {
        tokenizer_parts_free_stages(parts);
        return no_memory(err);
    }
    t->vocab_size = parts->vocab_size;
    t->ignore_merges = parts->ignore_merges;
    t->fuse_unk = parts->fuse_unk;
    t->nfc = parts->nfc;
    t->unk_id = parts->unk_id;
    t->bos_id = parts->bos_id;
    memcpy(t->stages, parts->stages, sizeof t->stages);
    t->stage_count = parts->stage_count;
    parts->stage_count = 0;
    t->pool = encoder_pool_create();
    if (!t->pool) {
        st = no_memory(&own);
        goto done;
    }
    TRY(take_tokens(t, parts, name, &own));
    TRY(take_added(t, name, &own));
    TRY(take_merges(t, parts, &own));
    find_fast_path(t);
    for (uint32_t i = 0; i < t->vocab_size && t->ignore_merges; i++)
        t->whole_first |= !t->bpe.linear || (t->tokens[i].size && !(t->flags[i] & TOKEN_RAW) &&
                                             !t->bpe.splits[i].size);
    t->eos_id = -1;
    static const char *const ends[] = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
                                       "<|im_end|>"};
    for (size_t i = 0; i < sizeof ends / sizeof *ends && t->eos_id < 0; i++)
        t->eos_id = tokenizer_special_id(t, ends[i]);
    t->hash = identity(t);
    *out = t;
    t = NULL;
done:
    if (st != TRIL_OK && err)
        *err = own;
    tokenizer_free(t);
    return st;
}

void tokenizer_free(struct tokenizer *t) {
    if (!t)
        return;
    free(t->tokens);
    free(t->flags);
    free(t->blob);
    free(t->by_bytes);
    bpe_free(&t->bpe);
    free(t->merges);
    free(t->added);
    matcher_free(&t->raw);
    matcher_free(&t->normalized);
    for (int i = 0; i < t->stage_count; i++)
        pattern_free(&t->stages[i].pattern);
    free(t->json);
    encoder_pool_free(t->pool);
    free(t);
}

void tokenizer_parts_set_pattern(struct tokenizer_parts *parts, struct pattern *pattern) {
    struct stage *s = parts->stages;
    memset(s, 0, sizeof parts->stages);
    parts->stage_count = pattern->kind == SCAN_GPT2 ? 1 : 2;
    s[0].kind = pattern->kind == SCAN_GPT2 ? STAGE_BYTE_LEVEL : STAGE_SPLIT;
    s[0].has_pattern = s[0].keep_matches = s[0].keep_others = true;
    s[0].pattern = *pattern;
    s[1].kind = STAGE_BYTE_LEVEL;
    s[1].keep_matches = s[1].keep_others = true;
    memset(pattern, 0, sizeof *pattern);
}

void tokenizer_parts_free_stages(struct tokenizer_parts *parts) {
    for (int i = 0; i < parts->stage_count; i++)
        pattern_free(&parts->stages[i].pattern);
    parts->stage_count = 0;
}

uint32_t tokenizer_find(const struct tokenizer *t, const unsigned char *bytes, size_t size) {
    uint64_t h = hash_bytes(bytes, size, 0);
    for (;; h++) {
        uint32_t id = t->by_bytes[h & t->by_bytes_mask];
        if (id == NO_TOKEN)
            return NO_TOKEN;
        if (t->tokens[id].size == size && memcmp(t->tokens[id].bytes, bytes, size) == 0)
            return id;
    }
}

uint32_t tokenizer_vocab_size(const struct tokenizer *t) {
    return t->vocab_size;
}

tril_status tokenizer_check_model(const struct tokenizer *t, int64_t embeddings, const char *name,
                                  struct tril_error *err) {
    if (embeddings >= (int64_t)t->vocab_size)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT,
                     "%s has %lld embeddings but the tokenizer has %u tokens: the model was made "
                     "with another tokenizer; give the one that belongs to it",
                     name, (long long)embeddings, t->vocab_size);
}

uint32_t tokenizer_merge_count(const struct tokenizer *t) {
    return t->merge_count;
}

uint32_t tokenizer_added_count(const struct tokenizer *t) {
    return t->added_count;
}

const char *tokenizer_pattern(const struct tokenizer *t) {
    for (int i = 0; i < t->stage_count; i++)
        if (t->stages[i].has_pattern)
            return pattern_name(&t->stages[i].pattern);
    return "none";
}

uint64_t tokenizer_hash(const struct tokenizer *t) {
    return t->hash;
}

int64_t tokenizer_special_id(const struct tokenizer *t, const char *content) {
    size_t size = strlen(content);
    for (uint32_t i = 0; i < t->added_count; i++)
        if (t->added[i].size == size && memcmp(t->added[i].content, content, size) == 0)
            return t->added[i].id;
    return -1;
}

uint32_t tokenizer_added_id(const struct tokenizer *t, uint32_t i) {
    return t->added[i].id;
}

bool tokenizer_is_special(const struct tokenizer *t, uint32_t id) {
    return id < t->vocab_size && t->flags[id] & TOKEN_SPECIAL;
}

int64_t tokenizer_eos(const struct tokenizer *t) {
    return t->eos_id;
}

int64_t tokenizer_bos(const struct tokenizer *t) {
    return t->bos_id;
}

int64_t tokenizer_token_id(const struct tokenizer *t, const void *bytes, size_t size) {
    for (uint32_t i = 0; i < t->added_count; i++)
        if (t->added[i].size == size && memcmp(t->added[i].content, bytes, size) == 0)
            return t->added[i].id;
    uint32_t id = size ? tokenizer_find(t, bytes, size) : NO_TOKEN;
    return id == NO_TOKEN ? -1 : (int64_t)id;
}

const unsigned char *tokenizer_token_bytes(const struct tokenizer *t, uint32_t id, size_t *size) {
    *size = 0;
    if (id >= t->vocab_size || !(t->flags[id] & TOKEN_EXISTS))
        return NULL;
    /* An added token whose string is one of the model's tokens in the byte alphabet ("é" is the
     * byte 0xE9) stays that: such a vocabulary is at odds with itself, but every byte survives. */
    if (t->flags[id] & TOKEN_ADDED && (t->tokens[id].size == 0 || t->flags[id] & TOKEN_RAW)) {
        const struct added_token *a = added_find(t, id);
        *size = a->size;
        return a->content;
    }
    *size = t->tokens[id].size;
    return t->tokens[id].bytes;
}
