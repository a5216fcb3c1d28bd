/* Which kind of file it is; GPT-2's pair of files; tiktoken's rank files. */
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "text/vocab.h"

#define VOCAB_FILE_LIMIT ((size_t)256 << 20)
#define CONFIG_FILE_LIMIT ((size_t)16 << 20)

tril_status tokenizer_load_gpt2(struct tokenizer **out, const char *vocab, const char *merges,
                                struct tril_error *err) {
    tril_status st = TRIL_OK;
    json_t *root = NULL;
    char *text = NULL;
    size_t size = 0;
    struct vocab v = {0};
    struct pattern pattern = {0};
    struct tokenizer_parts parts = {.unk_id = -1, .bos_id = -1};
    *out = NULL;
    TRY(json_read(&root, vocab, VOCAB_FILE_LIMIT, err));
    if (!json_is_object(root) || json_object_size(root) == 0) {
        st =
            error_set(err, TRIL_ERR_FORMAT, "%s: it is not a JSON object of tokens and ids", vocab);
        goto done;
    }
    TRY(vocab_read(&v, root, 0, vocab, err));
    TRY(file_read(merges, VOCAB_FILE_LIMIT, &text, &size, err));
    size_t number = 1;
    for (const char *p = text, *end = text + size, *eol; p < end; p = eol + 1, number++) {
        eol = memchr(p, '\n', (size_t)(end - p));
        if (!eol)
            eol = end;
        size_t length = (size_t)(eol - p);
        if (length && p[length - 1] == '\r')
            length--;
        if (length == 0 || (number == 1 && length >= 8 && memcmp(p, "#version", 8) == 0))
            continue;
        TRY(vocab_merge_line(&v, p, length, merges, "line", number, err));
    }
    struct added_token eos = {.content = (const unsigned char *)"<|endoftext|>",
                              .size = 13,
                              .special = true,
                              .id = vocab_find(&v, "<|endoftext|>", 13)};
    TRY(pattern_published(&pattern, SCAN_GPT2, err));
    tokenizer_parts_set_pattern(&parts, &pattern);
    parts.vocab_size = v.count; /* ids are distinct and below the count */
    parts.tokens = v.tokens;
    parts.flags = v.flags;
    parts.merges = v.merges;
    parts.merge_count = v.merge_count;
    parts.added = &eos;
    parts.added_count = eos.id != NO_TOKEN;
    TRY(tokenizer_build(out, &parts, vocab, err));
done:
    tokenizer_parts_free_stages(&parts);
    vocab_free(&v);
    json_decref(root);
    free(text);
    return st;
}

/* Decodes base64 of n characters to out (room for 3 n / 4); false if it is none. */
static bool base64_decode(const char *text, size_t n, unsigned char *out, uint32_t *size) {
    *size = 0;
    if (n == 0 || n % 4)
        return false;
    for (size_t i = 0; i < n; i += 4) {
        uint32_t bits = 0;
        unsigned padding = 0;
        for (size_t j = i; j < i + 4; j++) {
            char c = text[j];
            uint32_t x = c >= 'A' && c <= 'Z'   ? (uint32_t)(c - 'A')
                         : c >= 'a' && c <= 'z' ? (uint32_t)(c - 'a' + 26)
                         : c >= '0' && c <= '9' ? (uint32_t)(c - '0' + 52)
                         : c == '+'             ? 62
                         : c == '/'             ? 63
                                                : 64;
            if (c == '=' && j >= i + 2 && i + 4 == n) {
                padding++;
                x = 0;
            } else if (x == 64 || padding) {
                return false;
            }
            bits = bits << 6 | x;
        }
        for (unsigned k = 0; k < 3 - padding; k++)
            out[(*size)++] = (unsigned char)(bits >> (16 - 8 * k));
    }
    return true;
}

/* A rank file, its lines read: tokens[rank], and the merges that make each token. */
struct ranks {
    struct trie_string *tokens;
    uint8_t *flags;
    unsigned char *blob;
    uint32_t count, limit; /* tokens; 1 + the greatest rank */
    uint32_t *slots, mask;
    struct bpe_merge *merges;
    uint32_t merge_count;
};

static uint32_t rank_of(const struct ranks *r, const unsigned char *bytes, size_t size) {
    uint64_t h = hash_bytes(bytes, size, 0);
    for (;; h++) {
        uint32_t id = r->slots[h & r->mask];
        if (id == NO_TOKEN ||
            (r->tokens[id].size == size && memcmp(r->tokens[id].bytes, bytes, size) == 0))
            return id;
    }
}

/* tiktoken merges any two neighbours whose bytes together are a token, lowest rank first. Inside a
 * longer text the last step that makes a token is the last step of encoding it alone (nothing
 * crosses its ends before), so one merge for each token says the same. A token that its own
 * encoding does not lead to comes about only as a whole pre-token. */
static bool find_merge(const struct ranks *r, uint32_t id, struct bpe_merge *m) {
    enum { LONGEST = 512 }; /* bytes; published vocabularies have up to 128 */
    const unsigned char *bytes = r->tokens[id].bytes;
    uint32_t size = r->tokens[id].size, n = size;
    uint32_t start[LONGEST + 1], rank[LONGEST];
    if (size < 2 || size > LONGEST)
        return false;
    for (uint32_t i = 0; i <= n; i++)
        start[i] = i;
    for (uint32_t i = 0; i + 1 < n; i++)
        rank[i] = rank_of(r, bytes + i, 2);
    while (n > 2) {
        uint32_t best = 0;
        for (uint32_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best])
                best = i;
        if (rank[best] == NO_TOKEN)
            return false;
        memmove(start + best + 1, start + best + 2, (n - best - 1) * sizeof *start);
        memmove(rank + best, rank + best + 1, (n - best - 2) * sizeof *rank);
        n--;
        if (best + 1 < n)
            rank[best] = rank_of(r, bytes + start[best], start[best + 2] - start[best]);
        if (best > 0)
            rank[best - 1] = rank_of(r, bytes + start[best - 1], start[best + 1] - start[best - 1]);
    }
    *m = (struct bpe_merge){rank_of(r, bytes, start[1]),
                            rank_of(r, bytes + start[1], size - start[1]), id};
    return m->left != NO_TOKEN && m->right != NO_TOKEN;
}

static tril_status read_ranks(struct ranks *r, const char *text, size_t size, const char *path,
                              struct tril_error *err) {
    size_t lines = 0, slots = 16, number = 1;
    for (size_t i = 0; i < size; i++)
        lines += text[i] == '\n';
    uint32_t room = (uint32_t)lines + 2; /* a last line without newline, and p50k's gap */
    while (slots < 2 * (size_t)room)
        slots *= 2;
    r->mask = (uint32_t)(slots - 1);
    r->tokens = calloc(room, sizeof *r->tokens);
    r->flags = calloc(room, 1);
    r->merges = malloc(room * sizeof *r->merges);
    r->slots = malloc(slots * sizeof *r->slots);
    unsigned char *blob = r->blob = malloc(size + 1);
    if (!r->tokens || !r->flags || !r->merges || !r->slots || !blob)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", path);
    memset(r->slots, 0xFF, slots * sizeof *r->slots);
    for (const char *p = text, *end = text + size, *eol; p < end; p = eol + 1, number++) {
        eol = memchr(p, '\n', (size_t)(end - p));
        if (!eol)
            eol = end;
        const char *last = eol > p && eol[-1] == '\r' ? eol - 1 : eol;
        if (last == p)
            continue;
        const char *space = memchr(p, ' ', (size_t)(last - p));
        uint32_t bytes = 0;
        uint64_t rank = 0;
        bool good = space && space + 1 < last && last - space <= 10 &&
                    base64_decode(p, (size_t)(space - p), blob, &bytes);
        for (const char *d = space ? space + 1 : last; good && d < last; d++) {
            good = *d >= '0' && *d <= '9';
            rank = rank * 10 + (uint64_t)(*d - '0');
        }
        if (!good)
            return error_set(err, TRIL_ERR_FORMAT,
                             "%s: line %zu is not a token in base64, a space and its rank", path,
                             number);
        if (rank >= room)
            return error_set(err, TRIL_ERR_FORMAT,
                             "%s: line %zu has rank %llu, but there are only %u tokens", path,
                             number, (unsigned long long)rank, room - 1);
        if (r->flags[rank])
            return error_set(err, TRIL_ERR_FORMAT, "%s: line %zu repeats the rank %llu", path,
                             number, (unsigned long long)rank);
        if (rank_of(r, blob, bytes) != NO_TOKEN)
            return error_set(err, TRIL_ERR_FORMAT, "%s: line %zu repeats a token", path, number);
        r->tokens[rank] = (struct trie_string){blob, bytes};
        r->flags[rank] = TOKEN_EXISTS;
        blob += bytes;
        uint64_t h = hash_bytes(r->tokens[rank].bytes, bytes, 0);
        while (r->slots[h & r->mask] != NO_TOKEN)
            h++;
        r->slots[h & r->mask] = (uint32_t)rank;
        r->count++;
        if (rank >= r->limit)
            r->limit = (uint32_t)rank + 1;
    }
    for (int b = 0; b < 256; b++) {
        unsigned char byte = (unsigned char)b;
        if (rank_of(r, &byte, 1) == NO_TOKEN)
            return error_set(err, TRIL_ERR_FORMAT, "%s: no token is the single byte 0x%02X", path,
                             b);
    }
    for (uint32_t i = 0; i < r->limit; i++)
        r->merge_count += find_merge(r, i, &r->merges[r->merge_count]);
    return TRIL_OK;
}

tril_status tokenizer_load_tiktoken(struct tokenizer **out, const char *path, const char *pattern,
                                    struct tril_error *err) {
    static const struct {
        uint32_t count, gap;
        enum scan_kind kind;
    } known[] = {{50256, NO_TOKEN, SCAN_GPT2},    /* r50k_base */
                 {50280, 50256, SCAN_GPT2},       /* p50k_base: <|endoftext|> lies in between */
                 {100256, NO_TOKEN, SCAN_CL100K}, /* cl100k_base */
                 {128000, NO_TOKEN, SCAN_LLAMA3}, /* Llama 3 */
                 {199998, NO_TOKEN, SCAN_O200K}}; /* o200k_base */
    tril_status st = TRIL_OK;
    char *text = NULL;
    size_t size = 0, i = 0;
    struct ranks r = {0};
    struct pattern p = {0};
    struct tokenizer_parts parts = {.unk_id = -1, .bos_id = -1, .ignore_merges = true};
    *out = NULL;
    TRY(file_read(path, VOCAB_FILE_LIMIT, &text, &size, err));
    if (size == 0) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s is empty", path);
        goto done;
    }
    TRY(read_ranks(&r, text, size, path, err));
    while (i < sizeof known / sizeof *known && known[i].count != r.count)
        i++;
    if (pattern) {
        TRY(pattern_named(&p, pattern, err));
    } else if (i < sizeof known / sizeof *known) {
        TRY(pattern_published(&p, known[i].kind, err));
    } else {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s has %u ranks, which is no published vocabulary: name its pattern "
                       "(gpt2, cl100k, o200k, llama3, qwen2 or a regular expression)",
                       path, r.count);
        goto done;
    }
    parts.allow_gap = i < sizeof known / sizeof *known && known[i].gap != NO_TOKEN &&
                      r.limit == r.count + 1 && !r.flags[known[i].gap];
    tokenizer_parts_set_pattern(&parts, &p);
    parts.vocab_size = r.limit;
    parts.tokens = r.tokens;
    parts.flags = r.flags;
    parts.merges = r.merges;
    parts.merge_count = r.merge_count;
    TRY(tokenizer_build(out, &parts, path, err));
done:
    tokenizer_parts_free_stages(&parts);
    pattern_free(&p);
    free(r.tokens);
    free(r.flags);
    free(r.blob);
    free(r.slots);
    free(r.merges);
    free(text);
    return st;
}

/* What tokenizer_config.json beside a tokenizer.json says ends a text. */
static tril_status read_config(struct tokenizer *t, const char *dir, struct tril_error *err) {
    json_t *root = NULL;
    char *path = path_join(dir, "tokenizer_config.json");
    tril_status st = TRIL_OK;
    if (!path)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to load a tokenizer");
    if (path_exists(path)) {
        st = json_read(&root, path, CONFIG_FILE_LIMIT, err);
        const json_t *eos = json_object_get(root, "eos_token");
        const char *text =
            json_string_value(json_is_object(eos) ? json_object_get(eos, "content") : eos);
        int64_t id = text ? tokenizer_special_id(t, text) : -1;
        if (id >= 0)
            t->eos_id = id;
        json_decref(root);
    }
    free(path);
    return st;
}

static tril_status load_dir(struct tokenizer **out, const char *dir, struct tril_error *err) {
    tril_status st;
    char *json = path_join(dir, "tokenizer.json"), *vocab = path_join(dir, "vocab.json"),
         *merges = path_join(dir, "merges.txt");
    if (!json || !vocab || !merges)
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to load a tokenizer");
    else if (path_exists(json))
        st = tokenizer_load_json(out, json, err);
    else if (path_exists(vocab) && path_exists(merges))
        st = tokenizer_load_gpt2(out, vocab, merges, err);
    else
        st = error_set(
            err, TRIL_ERR_IO,
            "%s holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt", dir);
    if (st == TRIL_OK)
        st = read_config(*out, dir, err);
    free(json);
    free(vocab);
    free(merges);
    return st;
}

/* A file named like `path` in the same directory, malloc'ed; name "" gives the directory. */
static char *beside(const char *path, const char *name) {
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) + 1 : 0;
    char *out = malloc(length + strlen(name) + 3);
    if (out) {
        memcpy(out, path, length);
        strcpy(out + length, *name || length ? name : "./");
    }
    return out;
}

enum file_kind { FILE_JSON, FILE_VOCAB, FILE_MERGES, FILE_RANKS };

/* By name, else by the first bytes. */
static tril_status kind_of(const char *path, enum file_kind *kind, struct tril_error *err) {
    struct file_map map;
    size_t n = strlen(path);
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    *kind = FILE_JSON;
    if (strcmp(name, "vocab.json") == 0 || (n > 11 && strcmp(path + n - 11, "-vocab.json") == 0)) {
        *kind = FILE_VOCAB;
    } else if (strcmp(name, "merges.txt") == 0) {
        *kind = FILE_MERGES;
    } else if (n > 9 && strcmp(path + n - 9, ".tiktoken") == 0) {
        *kind = FILE_RANKS;
    } else if (n < 5 || strcmp(path + n - 5, ".json") != 0) {
        tril_status st = file_map_open(&map, path, err);
        if (st != TRIL_OK)
            return st;
        size_t i = 0;
        while (i < map.size && strchr(" \t\r\n", map.data[i]) && map.data[i])
            i++;
        if (map.size >= 8 && memcmp(map.data, "#version", 8) == 0)
            *kind = FILE_MERGES;
        else if (i < map.size && map.data[i] != '{' && map.data[i] != '[')
            *kind = FILE_RANKS;
        file_map_close(&map);
    }
    return TRIL_OK;
}

tril_status tokenizer_load(struct tokenizer **out, const char *path, const char *pattern,
                           struct tril_error *err) {
    enum file_kind kind = FILE_JSON;
    char *other = NULL;
    tril_status st = TRIL_OK;
    *out = NULL;
    bool dir = path_is_dir(path);
    if (!dir)
        TRY(kind_of(path, &kind, err));
    if (pattern && kind != FILE_RANKS) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s carries its own pattern; name one for tiktoken rank files only", path);
        goto done;
    }
    if (dir) {
        st = load_dir(out, path, err);
    } else if (kind == FILE_RANKS) {
        st = tokenizer_load_tiktoken(out, path, pattern, err);
    } else {
        other = beside(path, kind == FILE_VOCAB    ? "merges.txt"
                             : kind == FILE_MERGES ? "vocab.json"
                                                   : "");
        if (!other)
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to load a tokenizer");
        else if (kind == FILE_VOCAB)
            st = tokenizer_load_gpt2(out, path, other, err);
        else if (kind == FILE_MERGES)
            st = tokenizer_load_gpt2(out, other, path, err);
        else if ((st = tokenizer_load_json(out, path, err)) == TRIL_OK)
            st = read_config(*out, other, err);
    }
done:
    free(other);
    if (st != TRIL_OK) {
        tokenizer_free(*out);
        *out = NULL;
    }
    return st;
}
