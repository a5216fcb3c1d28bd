// ctest: timeout=120
/* Datasets: the stream of several files, its division, the cache of shards, and what is refused. */
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

#include "text/shard.h"
#include "text/stream.h"
#include "text/text_support.h"

static struct tril_error err;

/* What the stream should be, made the plain way. */
struct plain {
    uint32_t *ids;
    bool *begins;    /* [n] a document begins here */
    uint64_t *bytes; /* [n + 1] of text before each token */
    size_t n;
};

static struct plain plain_stream(const struct tokenizer *t, const char *const *paths, size_t count,
                                 bool special) {
    struct plain p = {.ids = calloc(1 << 20, sizeof *p.ids),
                      .begins = calloc(1 << 20, sizeof *p.begins),
                      .bytes = calloc(1 << 20, sizeof *p.bytes)};
    int64_t eos = tokenizer_eos(t);
    for (size_t f = 0; f < count; f++) {
        char *text;
        size_t size, n;
        uint32_t *ids;
        assert_int_equal(file_read(paths[f], 1 << 24, &text, &size, &err), TRIL_OK);
        assert_int_equal(tokenizer_encode(t, text, size, special, &ids, &n, &err), TRIL_OK);
        assert_true(p.n + n + 1 < 1 << 20);
        if (n) {
            if (p.n && eos >= 0 && p.ids[p.n - 1] != eos)
                p.ids[p.n++] = (uint32_t)eos;
            p.begins[p.n] = true;
        }
        for (size_t i = 0; i < n; i++) {
            p.begins[p.n] |= p.n && p.ids[p.n - 1] == eos;
            p.ids[p.n++] = ids[i];
        }
        free(ids);
        free(text);
    }
    for (size_t i = 0; i < p.n; i++) {
        size_t size = 0;
        if (!tokenizer_is_special(t, p.ids[i]))
            tokenizer_token_bytes(t, p.ids[i], &size);
        p.bytes[i + 1] = p.bytes[i] + size;
    }
    return p;
}

static void plain_free(struct plain *p) {
    free(p->ids);
    free(p->begins);
    free(p->bytes);
}

static struct dataset *open_dataset(const struct dataset_options *o) {
    struct dataset *d;
    if (dataset_open(&d, o, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    return d;
}

/* A split is tokens [begin, end) of the plain stream. */
static void check_split(const struct dataset *d, enum dataset_split split, const struct plain *p,
                        size_t begin, size_t end, struct dice *dice) {
    uint64_t documents = 0;
    size_t n = end - begin;
    assert_int_equal(dataset_tokens(d, split), n);
    assert_int_equal(dataset_bytes(d, split), p->bytes[end] - p->bytes[begin]);
    for (size_t i = begin; i < end; i++)
        documents += p->begins[i];
    assert_int_equal(dataset_documents(d, split), documents);
    int32_t *ids = calloc(n + 1, sizeof *ids);
    ids[n] = -7;
    dataset_read(d, split, 0, n, ids);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(ids[i], p->ids[begin + i]);
    assert_int_equal(ids[n], -7);
    for (int k = 0; k < 300 && n; k++) {
        size_t from = dice_below(dice, (uint32_t)n),
               m = dice_below(dice, (uint32_t)(n - from < 90 ? n - from + 1 : 90));
        memset(ids, 0xFF, n * sizeof *ids);
        dataset_read(d, split, from, m, ids);
        for (size_t i = 0; i < m; i++)
            assert_int_equal(ids[i], p->ids[begin + from + i]);
        uint64_t next = from;
        while (begin + next < p->n && !p->begins[begin + next])
            next++;
        assert_true(dataset_document_after(d, split, from) ==
                    (begin + next < p->n ? next : UINT64_MAX));
    }
    free(ids);
}

/* Files of many sizes, an empty one, one that ends with the end-of-text token, one that is it. */
static void streams(void **state) {
    (void)state;
    enum { FILES = 12 };
    static char names[FILES][64];
    const char *paths[FILES];
    struct dice dice = dice_make(51);
    for (int i = 0; i < FILES; i++) {
        char text[4200];
        snprintf(names[i], sizeof names[i], "%s/s%02d.txt", test_dir(), i);
        size_t n = i == 4 ? 0 : random_text(&dice, (unsigned char *)text, 4000, false);
        if (i == 6 || i == 11)
            n += (size_t)sprintf(text + n, "<|endoftext|>");
        if (i == 8)
            n = (size_t)sprintf(text, "<|endoftext|>");
        assert_int_equal(file_write_atomic(names[i], text, n, &err), TRIL_OK);
        paths[i] = names[i];
    }
    for (int round = 0; round < 4; round++) {
        struct tokenizer *t = round < 2 ? golden_tokenizer("gpt2.json", NULL)
                                        : golden_tokenizer("ranks.tiktoken", "gpt2");
        bool special = round % 2 == 0;
        struct plain p = plain_stream(t, paths, FILES, special);
        /* All files in one shard, a shard each, and between. */
        for (size_t group = 0; group < 3; group++) {
            static const size_t bytes[] = {0, 1, 3000};
            struct dataset_options o = {.paths = paths,
                                        .path_count = FILES,
                                        .tokenizer = t,
                                        .marker = special ? NULL : "",
                                        .cache_dir = test_path(group ? "parts" : "whole"),
                                        .group_bytes = bytes[group],
                                        .quiet = true};
            static const double fractions[] = {0, 0.1, 0.5, 0.999};
            for (size_t k = 0; k < sizeof fractions / sizeof *fractions; k++) {
                o.valid_fraction = fractions[k];
                struct dataset *d = open_dataset(&o);
                /* The document start nearest to the fraction, unless that is too far off or is
                 * the text's own. */
                size_t cut = p.n - (size_t)((double)p.n * fractions[k]), at = cut, off = p.n;
                for (size_t i = 0; fractions[k] > 0 && i < p.n; i++) {
                    size_t away = i > cut ? i - cut : cut - i;
                    if (p.begins[i] && away < off) {
                        at = i;
                        off = away;
                    }
                }
                if (at == 0 || (double)off > 0.5 * fractions[k] * (double)p.n)
                    at = cut;
                check_split(d, DATASET_TRAIN, &p, 0, at, &dice);
                check_split(d, DATASET_VALID, &p, at, p.n, &dice);
                dataset_free(d);
            }
        }
        plain_free(&p);
        tokenizer_free(t);
    }
}

static void own_validation(void **state) {
    (void)state;
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    struct dice dice = dice_make(52);
    const char *train = text_write("train.txt", "What is learnt.<|endoftext|>And more."),
               *valid = text_write("valid.txt", "What is asked.");
    const char *dir = test_path("folder");
    assert_int_equal(dir_make(dir, &err), TRIL_OK);
    text_write("folder/b.txt", "What is asked.");
    text_write("folder/ignored.md", "no text file");
    struct plain a = plain_stream(t, &train, 1, true), b = plain_stream(t, &valid, 1, true);
    for (int i = 0; i < 2; i++) {
        struct dataset_options o = {.paths = &train,
                                    .path_count = 1,
                                    .valid_path = i ? dir : valid,
                                    .valid_fraction = 0.5,
                                    .tokenizer = t,
                                    .cache_dir = test_path("cache"),
                                    .quiet = true};
        struct dataset *d = open_dataset(&o);
        check_split(d, DATASET_TRAIN, &a, 0, a.n, &dice);
        check_split(d, DATASET_VALID, &b, 0, b.n, &dice);
        dataset_free(d);
    }
    plain_free(&a);
    plain_free(&b);
    tokenizer_free(t);
}

/* The one shard in a cache directory. */
static char *only_shard(const char *dir, struct stat *info) {
    char **names;
    size_t count;
    assert_int_equal(dir_list(dir, &names, &count, &err), TRIL_OK);
    assert_int_equal(count, 1);
    char *path = path_join(dir, names[0]);
    assert_int_equal(stat(path, info), 0);
    dir_list_free(names, count);
    return path;
}

static uint64_t tokens_of(const struct dataset_options *o, uint64_t *hash) {
    struct dataset *d = open_dataset(o);
    uint64_t n = dataset_tokens(d, DATASET_TRAIN);
    *hash = dataset_hash(d);
    dataset_free(d);
    return n;
}

static void cache(void **state) {
    (void)state;
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    const char *path = text_write("cached.txt", "one two three"), *dir = test_path("cached");
    struct dataset_options o = {
        .paths = &path, .path_count = 1, .tokenizer = t, .cache_dir = dir, .quiet = true};
    struct stat first, second;
    uint64_t hash, again, n = tokens_of(&o, &hash);
    char *shard = only_shard(dir, &first);
    /* The same text: the same shard, also when it was only touched. */
    assert_int_equal(tokens_of(&o, &again), n);
    assert_true(hash == again);
    assert_int_equal(utime(path, &(struct utimbuf){1000000000, 1000000000}), 0);
    assert_int_equal(tokens_of(&o, &again), n);
    assert_true(hash == again);
    free(only_shard(dir, &second));
    assert_int_equal(first.st_ino, second.st_ino);
    assert_int_equal(first.st_mtim.tv_nsec, second.st_mtim.tv_nsec);
    /* A text of the same size with other words: made anew, and known to be another. */
    text_write("cached.txt", "six four five");
    tokens_of(&o, &again);
    assert_true(hash != again);
    text_write("cached.txt", "one two three");
    assert_int_equal(tokens_of(&o, &again), n);
    assert_true(hash == again);
    /* A damaged shard, a truncated one, something else in its place: made anew. */
    for (int i = 0; i < 4; i++) {
        char *data;
        size_t size;
        assert_int_equal(file_read(shard, 1 << 20, &data, &size, &err), TRIL_OK);
        if (i == 0)
            data[4100] ^= 1;
        const size_t sizes[] = {size, size - 3, 100, 0};
        assert_int_equal(file_write_atomic(shard, data, sizes[i], &err), TRIL_OK);
        free(data);
        assert_int_equal(tokens_of(&o, &again), n);
        assert_true(hash == again);
    }
    /* Another marker or tokenizer has a shard of its own. */
    char **names;
    size_t count;
    o.marker = "";
    tokens_of(&o, &again);
    assert_true(hash != again);
    struct tokenizer *other = golden_tokenizer("cl100k.json", NULL);
    o.marker = NULL;
    o.tokenizer = other;
    tokens_of(&o, &again);
    assert_true(hash != again);
    assert_int_equal(dir_list(dir, &names, &count, &err), TRIL_OK);
    assert_int_equal(count, 3);
    dir_list_free(names, count);
    free(shard);
    tokenizer_free(other);
    tokenizer_free(t);
}

/* Where shards go when no place is named. */
static void cache_places(void **state) {
    (void)state;
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    const char *path = text_write("place.txt", "some text");
    struct dataset_options o = {.paths = &path, .path_count = 1, .tokenizer = t, .quiet = true};
    static const char *const variables[] = {"TRIL_CACHE", "XDG_CACHE_HOME", "HOME"};
    static const char *const places[] = {"p0", "p1/tril", "p2/.cache/tril"};
    struct stat info;
    uint64_t hash;
    for (int i = 0; i < 3; i++) {
        char name[8];
        snprintf(name, sizeof name, "p%d", i);
        setenv(variables[i], test_path(name), 1);
    }
    for (int i = 0; i < 3; i++) {
        tokens_of(&o, &hash);
        free(only_shard(test_path(places[i]), &info));
        unsetenv(variables[i]);
    }
    tokenizer_free(t);
}

static void refused(const struct dataset_options *o, tril_status status, const char *says) {
    struct dataset *d;
    memset(&err, 0, sizeof err);
    tril_status st = dataset_open(&d, o, &err);
    if (st != status || d)
        fail_msg("status %d, \"%s\" where \"%s\" was due", st, err.message, says);
    if (!strstr(err.message, says) || strchr(err.message, '\n'))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

static void refusals(void **state) {
    (void)state;
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    char *good = path_join(test_dir(), "good.txt"), *folder = path_join(test_dir(), "refusals");
    const char *paths[2] = {text_write("good.txt", "good text")};
    struct dataset_options o = {
        .paths = paths, .path_count = 1, .tokenizer = t, .cache_dir = folder, .quiet = true};
    paths[0] = good;
    o.valid_fraction = 1;
    refused(&o, TRIL_ERR_ARGUMENT, "fraction");
    o.valid_fraction = -0.1;
    refused(&o, TRIL_ERR_ARGUMENT, "fraction");
    o.valid_fraction = NAN;
    refused(&o, TRIL_ERR_ARGUMENT, "fraction");
    o.valid_fraction = 0;
    o.path_count = 0;
    refused(&o, TRIL_ERR_ARGUMENT, "no text file");
    o.path_count = 2;
    paths[1] = test_path("missing.txt");
    refused(&o, TRIL_ERR_IO, "missing.txt");
    o.path_count = 1;
    paths[0] = text_write("empty.txt", "");
    refused(&o, TRIL_ERR_FORMAT, "empty.txt");
    paths[0] = test_path("bare");
    assert_int_equal(dir_make(paths[0], &err), TRIL_OK);
    refused(&o, TRIL_ERR_IO, "no .txt files");
    assert_int_equal(dir_make(test_path("odd/x.txt"), &err), TRIL_OK);
    paths[0] = test_path("odd");
    refused(&o, TRIL_ERR_IO, "x.txt");
    unsigned char junk[3000];
    struct dice dice = dice_make(6);
    for (size_t i = 0; i < sizeof junk; i++)
        junk[i] = (unsigned char)dice_below(&dice, 256);
    paths[0] = test_path("junk.txt");
    assert_int_equal(file_write_atomic(paths[0], junk, sizeof junk, &err), TRIL_OK);
    refused(&o, TRIL_ERR_FORMAT, "looks binary");
    paths[0] = good;
    o.valid_path = test_path("junk.txt");
    refused(&o, TRIL_ERR_FORMAT, "looks binary");
    o.valid_path = test_path("missing.txt");
    refused(&o, TRIL_ERR_IO, "missing.txt");
    o.valid_path = NULL;
    char *below = path_join(good, "cache"); /* a file where a folder is due */
    o.cache_dir = below;
    refused(&o, TRIL_ERR_IO, "good.txt");
    free(below);
    o.cache_dir = folder;
    if (geteuid() != 0) {
        assert_int_equal(chmod(good, 0), 0);
        refused(&o, TRIL_ERR_IO, "good.txt");
        assert_int_equal(chmod(good, 0600), 0);
    }
    /* Nothing half made is left in the cache; the good text works. */
    struct dataset *d = open_dataset(&o);
    char **names;
    size_t count;
    assert_int_equal(dir_list(folder, &names, &count, &err), TRIL_OK);
    for (size_t i = 0; i < count; i++)
        assert_true(!strstr(names[i], "junk") && !strstr(names[i], ".tmp"));
    dir_list_free(names, count);
    dataset_free(d);
    dataset_free(NULL);
    tokenizer_free(t);
    free(good);
    free(folder);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(streams), cmocka_unit_test(own_validation),
                                       cmocka_unit_test(cache), cmocka_unit_test(cache_places),
                                       cmocka_unit_test(refusals)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
