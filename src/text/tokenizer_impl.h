/* Inside a tokenizer: shared by the files that load, build, encode, decode and write it. */
#ifndef TEXT_TOKENIZER_IMPL_H
#define TEXT_TOKENIZER_IMPL_H

#include "text/bpe.h"
#include "text/pattern.h"
#include "text/tokenizer.h"

struct added_token {
    uint32_t id;
    const unsigned char *content;
    uint32_t size;
    bool single_word, lstrip, rstrip, normalized, special;
};

/* Finds added tokens in a text: leftmost, then longest. */
struct matcher {
    struct trie trie;     /* numbers are indices into the tokenizer's added tokens */
    bool any, first[256]; /* bytes with which one begins */
    int only_first;       /* the one such byte, or -1 */
};

enum stage_kind {
    STAGE_SPLIT,     /* a pattern; pieces between matches are pieces too, unless removed */
    STAGE_DIGITS,    /* numbers apart from the rest, each alone if `individual` */
    STAGE_BYTE_LEVEL /* a space in front where none is, if prefix_space; then the pattern, if any */
};

struct stage {
    enum stage_kind kind;
    struct pattern pattern;
    bool has_pattern, keep_matches, keep_others, individual, prefix_space;
};

#define MAX_STAGES 8

/* Bits of a token. */
enum {
    TOKEN_EXISTS = 1,
    TOKEN_ADDED = 2,
    TOKEN_SPECIAL = 4,
    TOKEN_RAW =
        8 /* its string is outside the byte alphabet: its bytes are the string's own UTF-8 */
};

struct encoder_pool;

struct tokenizer {
    uint32_t vocab_size;
    struct trie_string *tokens; /* [vocab_size] the model's tokens; added ones lie in `added` */
    uint8_t *flags;             /* [vocab_size] */
    unsigned char *blob;        /* all their bytes */
    uint32_t *by_bytes;         /* hash table of ids by bytes (tokens of the model, not raw) */
    uint32_t by_bytes_mask;
    struct bpe bpe;
    struct bpe_merge *merges;
    uint32_t merge_count;
    bool ignore_merges; /* a pre-token that is a token becomes it at once */
    bool whole_first;   /* and some token does not come about by merges: it must be looked up */
    int64_t unk_id;     /* for bytes without a token; -1: they are refused */
    bool fuse_unk, bytes_missing;
    struct added_token *added; /* in order of id */
    uint32_t added_count;
    struct matcher raw, normalized; /* added tokens found before and after normalisation */
    bool nfc;
    struct stage stages[MAX_STAGES];
    int stage_count;
    enum scan_kind fast; /* all stages together are this pattern, or SCAN_KINDS */
    bool fast_prefix_space;
    int64_t bos_id, eos_id;
    uint64_t hash;
    char *json; /* the tokenizer.json it was read from, or NULL */
    size_t json_size;
    struct encoder_pool *pool;
};

/* What a loader or the trainer has gathered; tokenizer_build makes a tokenizer of it. */
struct tokenizer_parts {
    uint32_t vocab_size;
    /* [vocab_size]: bytes of the model's tokens; size 0 where there is none. Copied. */
    const struct trie_string *tokens;
    const uint8_t *flags; /* [vocab_size] TOKEN_EXISTS and TOKEN_RAW, of the model's tokens */
    const struct bpe_merge *merges; /* copied */
    uint32_t merge_count;
    const struct added_token *added; /* contents copied */
    uint32_t added_count;
    bool ignore_merges, fuse_unk, nfc, allow_gap;
    int64_t unk_id, bos_id;
    struct stage stages[MAX_STAGES]; /* the patterns move into the tokenizer, also on failure */
    int stage_count;
};

/* Checks (gaps, duplicate added tokens, ids) and builds. `name` is used in messages. */
tril_status tokenizer_build(struct tokenizer **out, struct tokenizer_parts *parts, const char *name,
                            struct tril_error *err);
/* The stage that a published or own pattern makes: [Split, ByteLevel] or, for gpt2, [ByteLevel].
 * The pattern moves into the parts. */
void tokenizer_parts_set_pattern(struct tokenizer_parts *parts, struct pattern *pattern);
void tokenizer_parts_free_stages(struct tokenizer_parts *parts);

/* The model's token with these bytes, or NO_TOKEN. */
uint32_t tokenizer_find(const struct tokenizer *t, const unsigned char *bytes, size_t size);

struct encoder_pool *encoder_pool_create(void); /* NULL: out of memory */
void encoder_pool_free(struct encoder_pool *pool);

/* An encoder is one thread's working memory and word cache. */
struct encoder;
struct encoder *encoder_acquire(const struct tokenizer *t); /* NULL: out of memory */
void encoder_release(const struct tokenizer *t, struct encoder *e);
/* Encodes and keeps the ids in the encoder: they are valid until its next call. */
tril_status encoder_run(struct encoder *e, const struct tokenizer *t, const void *text, size_t size,
                        bool allow_special, const uint32_t **ids, size_t *n,
                        struct tril_error *err);
/* The first place at or after `from` where the text may be cut such that its two parts, encoded
 * alone, give the ids of the whole; `size` if there is none. */
size_t tokenizer_safe_cut(const struct tokenizer *t, const void *text, size_t size, size_t from,
                          bool allow_special);
/* A place to cut for patterns whose name is all that is known (the trainer's). */
size_t pattern_safe_cut(const unsigned char *text, size_t size, size_t from);

/* Where an added token of `m` stands at or after `from`. */
struct added_match {
    size_t begin, end;
    uint32_t index;
};
bool matcher_build(struct matcher *m, const struct trie_string *contents, uint32_t count,
                   struct tril_error *err);
void matcher_free(struct matcher *m);
bool matcher_find(const struct matcher *m, const unsigned char *text, size_t size, size_t from,
                  struct added_match *match);

uint64_t hash_bytes(const void *data, size_t size, uint64_t seed);

/* Loaders of the single formats. */
tril_status tokenizer_load_json(struct tokenizer **out, const char *path, struct tril_error *err);
tril_status tokenizer_load_gpt2(struct tokenizer **out, const char *vocab, const char *merges,
                                struct tril_error *err);
tril_status tokenizer_load_tiktoken(struct tokenizer **out, const char *path, const char *pattern,
                                    struct tril_error *err);

#endif
