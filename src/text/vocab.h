/* A vocabulary as files spell it: token strings in GPT-2's byte alphabet, and merges of such
 * strings. */
#ifndef TEXT_VOCAB_H
#define TEXT_VOCAB_H

#include "base/json.h"
#include "text/tokenizer_impl.h"

struct vocab {
    uint32_t count;             /* tokens, with ids 0 .. count - 1 all distinct (gaps: size 0) */
    uint32_t id_limit;          /* ids are below this */
    struct trie_string *tokens; /* [id_limit] their bytes */
    uint8_t *flags;             /* [id_limit] TOKEN_EXISTS, TOKEN_RAW */
    unsigned char *blob;
    struct trie_string *keys; /* [id_limit] the strings of the file; borrowed from its JSON */
    uint32_t *slots, mask;    /* hash table of ids by key */
    struct bpe_merge *merges;
    uint32_t merge_count, merge_capacity;
};

/* Reads {"token": id, ...}. `room`: how many ids beyond the object's own there may be (added
 * tokens): every id must be below entries + room. `object` must outlive v. Refuses empty tokens and
 * negative, repeated or too great ids. */
tril_status vocab_read(struct vocab *v, const json_t *object, uint32_t room, const char *name,
                       struct tril_error *err);
void vocab_free(struct vocab *v);
/* The id of a token by its string, or NO_TOKEN. */
uint32_t vocab_find(const struct vocab *v, const char *key, size_t size);
/* Adds the merge of two strings; `where` ("merges[7]", "line 8") is named when a string is unknown.
 */
tril_status vocab_merge(struct vocab *v, const char *left, size_t left_size, const char *right,
                        size_t right_size, const char *name, const char *where, size_t number,
                        struct tril_error *err);
/* The same from "left right". */
tril_status vocab_merge_line(struct vocab *v, const char *line, size_t size, const char *name,
                             const char *where, size_t number, struct tril_error *err);

#endif
