#include "text/bpe_train.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/progress.h"
#include "base/system.h"
#include "text/bpe_merge.h"
#include "text/files.h"

#define VOCAB_LIMIT (1u << 24)
#define SPECIAL_LIMIT 1024 /* bytes of one */

/* The special tokens and the 256 bytes, in order of id. A special token is spelled in the file as
 * it is, so its string may coincide with a byte's (then they share the id, as elsewhere). */
static tril_status begin_vocab(struct bpe_vocab *v, uint8_t *flags, struct added_token *added,
                               const struct bpe_train_options *o, struct tril_error *err) {
    for (uint32_t i = 0; i < o->special_count; i++) {
        const unsigned char *s = (const unsigned char *)o->specials[i];
        size_t size = strlen(o->specials[i]), used = 0;
        unsigned n;
        if (size == 0 || size > SPECIAL_LIMIT)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "special token number %u is empty or longer than %d bytes", i + 1,
                             SPECIAL_LIMIT);
        unsigned char *bytes = bpe_vocab_bytes(v, size);
        if (!bytes)
            return error_set(err, TRIL_ERR_MEMORY, "not enough memory for special tokens");
        bool raw = false;
        for (size_t at = 0; at < size; at += n) {
            uint32_t c = utf8_next(s + at, s + size, &n);
            if (c == UTF8_INVALID || c < 0x20)
                return error_set(err, TRIL_ERR_ARGUMENT,
                                 "special token number %u is not UTF-8 text", i + 1);
            int byte = char_to_byte(c);
            raw |= byte < 0;
            bytes[used++] = (unsigned char)byte;
        }
        if (raw)
            memcpy(bytes, s, used = size);
        for (uint32_t j = 0; j < i; j++)
            if (strcmp(o->specials[j], o->specials[i]) == 0)
                return error_set(err, TRIL_ERR_ARGUMENT, "the special token %s is given twice",
                                 o->specials[i]);
        flags[i] = (uint8_t)(TOKEN_EXISTS | (raw ? TOKEN_RAW : 0));
        v->tokens[i] = (struct trie_string){bytes, (uint32_t)used};
        added[i] =
            (struct added_token){.id = i, .content = s, .size = (uint32_t)size, .special = true};
    }
    v->count = (uint32_t)o->special_count;
    unsigned char order[256];
    byte_alphabet_order(order);
    for (int k = 0; k < 256; k++) {
        uint32_t id = NO_TOKEN;
        for (uint32_t i = 0; i < o->special_count; i++)
            if (v->tokens[i].size == 1 && v->tokens[i].bytes[0] == order[k] &&
                !(flags[i] & TOKEN_RAW))
                id = i;
        if (id == NO_TOKEN) {
            unsigned char *byte = bpe_vocab_bytes(v, 1);
            if (!byte)
                return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a vocabulary");
            *byte = order[k];
            id = v->count++;
            v->tokens[id] = (struct trie_string){byte, 1};
            flags[id] = TOKEN_EXISTS;
        }
        v->byte_token[order[k]] = id;
    }
    return TRIL_OK;
}

struct training {
    const struct bpe_train_options *options;
    struct bpe_vocab vocab;
    uint8_t *flags;
    struct added_token *added;
    struct tokenizer_parts parts;
    struct tokenizer *cutter; /* bytes only: for its pattern and special tokens */
    struct pretoken_counter *counter;
    struct progress progress;
    struct bpe_train_stats stats;
    double started;
    int64_t before; /* bytes of the files before the present one */
};

static tril_status make_parts(struct training *t, struct tril_error *err) {
    struct pattern pattern;
    struct bpe_vocab *v = &t->vocab;
    tril_status st =
        pattern_named(&pattern, t->options->pattern ? t->options->pattern : "gpt2", err);
    if (st != TRIL_OK)
        return st;
    t->parts = (struct tokenizer_parts){.unk_id = -1, .bos_id = -1};
    tokenizer_parts_set_pattern(&t->parts, &pattern);
    t->parts.vocab_size = v->count;
    t->parts.tokens = v->tokens;
    t->parts.flags = t->flags;
    t->parts.merges = v->merges;
    t->parts.merge_count = v->merge_count;
    t->parts.added = t->added;
    t->parts.added_count = (uint32_t)t->options->special_count;
    return TRIL_OK;
}

static tril_status training_begin(struct training *t, const struct bpe_train_options *o,
                                  int64_t bytes, struct tril_error *err) {
    tril_status st = TRIL_OK;
    memset(t, 0, sizeof *t);
    t->options = o;
    t->started = clock_seconds();
    t->stats.bytes = bytes;
    if (o->special_count > VOCAB_LIMIT - 256 || o->vocab_size < 256 + o->special_count ||
        o->vocab_size > VOCAB_LIMIT)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a vocabulary of %u tokens cannot be trained: with %zu special tokens it "
                         "takes from %zu to %u",
                         o->vocab_size, o->special_count, 256 + o->special_count, VOCAB_LIMIT);
    t->vocab.capacity = o->vocab_size;
    t->vocab.tokens = calloc(o->vocab_size, sizeof *t->vocab.tokens);
    t->vocab.merges = calloc(o->vocab_size, sizeof *t->vocab.merges);
    t->flags = calloc(o->vocab_size, 1);
    t->added = calloc(o->special_count + 1, sizeof *t->added);
    if (!t->vocab.tokens || !t->vocab.merges || !t->flags || !t->added)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a vocabulary");
    TRY(begin_vocab(&t->vocab, t->flags, t->added, o, err));
    TRY(make_parts(t, err));
    TRY(tokenizer_build(&t->cutter, &t->parts, "the tokenizer", err));
    TRY(pretoken_counter_create(&t->counter, t->cutter, err));
    if (!o->quiet)
        progress_start(&t->progress, "counting words", bytes);
done:
    return st;
}

static void counted(void *arg, int64_t bytes) {
    struct training *t = arg;
    if (!t->options->quiet)
        progress_update(&t->progress, t->before + bytes, NULL);
}

static void learnt(void *arg, uint32_t count) {
    struct training *t = arg;
    if (!t->options->quiet && count % 64 == 0)
        progress_update(&t->progress, count, NULL);
}

static tril_status training_end(struct training *t, struct tokenizer **out,
                                struct tril_error *err) {
    const struct pretokens *words;
    struct bpe_vocab *v = &t->vocab;
    tril_status st = TRIL_OK;
    TRY(pretoken_counter_result(t->counter, &words, err));
    t->stats.pre_tokens = words->total;
    t->stats.unique_pre_tokens = (int64_t)(words->short_count + words->long_count);
    double now = clock_seconds();
    t->stats.count_seconds = now - t->started;
    if (!t->options->quiet) {
        progress_end(&t->progress);
        progress_start(&t->progress, "merging pairs", v->capacity);
    }
    int64_t least = t->options->min_count > 1 ? t->options->min_count : 1;
    TRY(bpe_learn(v, words, least, learnt, t, err));
    for (uint32_t i = 0; i < v->count; i++)
        t->flags[i] |= TOKEN_EXISTS;
    TRY(make_parts(t, err));
    TRY(tokenizer_build(out, &t->parts, "the trained tokenizer", err));
    t->stats.merge_seconds = clock_seconds() - now;
done:
    return st;
}

static void training_free(struct training *t, struct bpe_train_stats *stats) {
    if (t->options && !t->options->quiet && t->progress.what)
        progress_end(&t->progress);
    if (stats)
        *stats = t->stats;
    pretoken_counter_free(t->counter);
    tokenizer_free(t->cutter);
    tokenizer_parts_free_stages(&t->parts);
    bpe_vocab_free(&t->vocab);
    free(t->flags);
    free(t->added);
}

tril_status tokenizer_train_text(struct tokenizer **out, const char *text, size_t size,
                                 const struct bpe_train_options *options,
                                 struct bpe_train_stats *stats, struct tril_error *err) {
    struct training t;
    tril_status st;
    *out = NULL;
    TRY(training_begin(&t, options, (int64_t)size, err));
    TRY(pretoken_counter_add(t.counter, text, size, counted, &t, err));
    TRY(training_end(&t, out, err));
done:
    training_free(&t, stats);
    return st;
}

tril_status tokenizer_train(struct tokenizer **out, const char *const *paths, size_t path_count,
                            const struct bpe_train_options *options, struct bpe_train_stats *stats,
                            struct tril_error *err) {
    struct training t = {0};
    struct text_files files;
    struct file_map map;
    int64_t bytes = 0;
    tril_status st;
    *out = NULL;
    TRY(text_files_expand(&files, paths, path_count, err));
    for (size_t i = 0; i < files.count; i++) { /* sizes first: they also tell what cannot be read */
        TRY(file_map_open(&map, files.paths[i], err));
        bytes += (int64_t)map.size;
        file_map_close(&map);
    }
    if (bytes == 0) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s%s: there is no text to train a tokenizer on",
                       files.paths[0],
                       files.count > 1 ? " and the other files are empty" : " is empty");
        goto done;
    }
    TRY(training_begin(&t, options, bytes, err));
    for (size_t i = 0; i < files.count; i++) {
        TRY(file_map_open(&map, files.paths[i], err));
        st = text_check(files.paths[i], map.data, map.size, err);
        if (st == TRIL_OK)
            st = pretoken_counter_add(t.counter, map.data, map.size, counted, &t, err);
        t.before += (int64_t)map.size;
        file_map_close(&map);
        if (st != TRIL_OK)
            goto done;
    }
    TRY(training_end(&t, out, err));
done:
    training_free(&t, stats);
    text_files_free(&files);
    return st;
}
