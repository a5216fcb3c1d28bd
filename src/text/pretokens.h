/* Counting the distinct pre-tokens of texts, on all threads. */
#ifndef TEXT_PRETOKENS_H
#define TEXT_PRETOKENS_H

#include "text/tokenizer_impl.h"

/* A multiset of byte strings: those of up to 15 bytes in a table with their bytes in place, longer
 * ones in a table that points into a growing block. */
struct pretokens {
    struct short_word {
        uint64_t key[2]; /* the bytes, the last one their count; count 0: an empty slot */
        int64_t count;
    } * shorts;
    struct long_word {
        size_t at;
        uint32_t size, hash; /* size 0: an empty slot */
        int64_t count;
    } * longs;
    size_t short_slots, short_count, long_slots, long_count;
    unsigned char *bytes;
    size_t size, capacity;
    int64_t total; /* counted, with repetitions */
    bool failed;   /* out of memory */
};

struct pretoken_counter;

/* A counter for one tokenizer's pre-tokens (its pattern and its added tokens, which are cut out and
 * not counted; only they and the stages of `t` matter). */
tril_status pretoken_counter_create(struct pretoken_counter **out, const struct tokenizer *t,
                                    struct tril_error *err);
/* Adds a text. `done` is called now and then with the bytes counted so far; may be NULL. */
tril_status pretoken_counter_add(struct pretoken_counter *c, const void *text, size_t size,
                                 void (*done)(void *arg, int64_t bytes), void *arg,
                                 struct tril_error *err);
/* All counts in one set, which the counter keeps owning. */
tril_status pretoken_counter_result(struct pretoken_counter *c, const struct pretokens **result,
                                    struct tril_error *err);
void pretoken_counter_free(struct pretoken_counter *c);

/* Calls `visit` for each pre-token of a text without added tokens, by the tokenizer's stages; stops
 * when it returns false. */
typedef bool pretoken_visit(void *arg, const unsigned char *p, size_t size);
tril_status pretokenize(const struct tokenizer *t, const void *text, size_t size,
                        pretoken_visit *visit, void *arg, struct tril_error *err);

#endif
