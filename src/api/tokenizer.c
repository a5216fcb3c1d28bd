/* tril/tokenizer.h, in terms of the text room. */
#include "tril/tokenizer.h"

#include "text/bpe_train.h"

tril_status tril_tokenizer_load(tril_tokenizer **out, const char *path, const char *pattern,
                                struct tril_error *err) {
    return tokenizer_load(out, path, pattern, err);
}

void tril_tokenizer_free(tril_tokenizer *t) {
    tokenizer_free(t);
}

tril_status tril_tokenizer_encode(const tril_tokenizer *t, const char *text, size_t size,
                                  bool special, uint32_t **ids, size_t *count,
                                  struct tril_error *err) {
    return tokenizer_encode_parallel(t, text, size, special, ids, count, err);
}

tril_status tril_tokenizer_decode(const tril_tokenizer *t, const uint32_t *ids, size_t count,
                                  bool skip_special, char **text, size_t *size,
                                  struct tril_error *err) {
    return tokenizer_decode(t, ids, count, skip_special, text, size, err);
}

tril_status tril_tokenizer_write(const tril_tokenizer *t, const char *path,
                                 struct tril_error *err) {
    return tokenizer_write(t, path, err);
}

tril_status tril_tokenizer_write_dir(const tril_tokenizer *t, const char *directory,
                                     struct tril_error *err) {
    return tokenizer_write_hf(t, directory, 0, err);
}

void tril_tokenizer_info_get(const tril_tokenizer *t, struct tril_tokenizer_info *info) {
    *info = (struct tril_tokenizer_info){.vocab_size = tokenizer_vocab_size(t),
                                         .merges = tokenizer_merge_count(t),
                                         .specials = tokenizer_added_count(t),
                                         .pattern = tokenizer_pattern(t),
                                         .bos = tokenizer_bos(t),
                                         .eos = tokenizer_eos(t)};
}

uint32_t tril_tokenizer_special(const tril_tokenizer *t, uint32_t i, const char **text,
                                size_t *size) {
    uint32_t id = tokenizer_added_id(t, i);
    *text = (const char *)tokenizer_token_bytes(t, id, size);
    return id;
}

tril_status tril_tokenizer_train(tril_tokenizer **out, const struct tril_tokenizer_train_options *o,
                                 struct tril_tokenizer_train_stats *stats, struct tril_error *err) {
    struct bpe_train_stats s = {0};
    tril_status st = tokenizer_train(out, o->files, o->file_count,
                                     &(struct bpe_train_options){.vocab_size = o->vocab_size,
                                                                 .pattern = o->pattern,
                                                                 .specials = o->specials,
                                                                 .special_count = o->special_count,
                                                                 .min_count = o->min_count,
                                                                 .quiet = o->quiet},
                                     &s, err);
    if (stats)
        *stats = (struct tril_tokenizer_train_stats){s.bytes, s.pre_tokens, s.unique_pre_tokens,
                                                     s.count_seconds, s.merge_seconds};
    return st;
}
