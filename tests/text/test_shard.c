// ctest: timeout=120
/* Shard files: what they hold, what another program would read, and every way to damage one. */
#include <sys/stat.h>
#include <unistd.h>

#include "base/threads.h"
#include "text/shard_make.h"
#include "text/text_support.h"
#include "text/tokenizer_impl.h"

static struct tril_error err;

static struct shard make_shard(const char *const *paths, size_t count, const struct tokenizer *t,
                               const char *marker, const char *out) {
    const struct shard_source source = {paths, count, t, marker};
    struct shard s = {0};
    int64_t done = 0;
    if (shard_make(&source, out, NULL, &done, &err) != TRIL_OK ||
        shard_open(&s, out, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    return s;
}

/* The shard's tokens are the encoding of `text`. */
static void check_tokens(const struct shard *s, const struct tokenizer *t, const char *text,
                         size_t size, bool special) {
    uint32_t *ids;
    size_t n;
    assert_int_equal(tokenizer_encode(t, text, size, special, &ids, &n, &err), TRIL_OK);
    assert_int_equal(s->header.token_count, n);
    for (size_t i = 0; i < n; i++)
        assert_int_equal(shard_token(s, i), ids[i]);
    free(ids);
}

/* Bytes before each document as the sum of its predecessors' tokens' bytes, special ones none. */
static void check_bytes(const struct shard *s, const struct tokenizer *t) {
    uint64_t bytes = 0, d = 0;
    for (uint64_t i = 0; i <= s->header.token_count; i++) {
        if (s->documents[d].token == i)
            assert_int_equal(s->documents[d++].byte, bytes);
        if (i < s->header.token_count && !tokenizer_is_special(t, shard_token(s, i))) {
            size_t size;
            tokenizer_token_bytes(t, shard_token(s, i), &size);
            bytes += size;
        }
    }
    assert_int_equal(d, s->header.document_count + 1);
    assert_int_equal(bytes, s->header.text_bytes);
}

static void one_file(void **state) {
    (void)state;
    static const char text[] = "First one.\n<|endoftext|>Second.<|endoftext|><|endoftext|>\nThird";
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    const char *path = text_write("one.txt", text), *out = test_path("one.shard");
    struct shard s = make_shard(&path, 1, t, NULL, out);
    const struct shard_header *h = &s.header;
    check_tokens(&s, t, text, strlen(text), true);
    check_bytes(&s, t);
    assert_int_equal(h->vocab_size, tokenizer_vocab_size(t));
    assert_int_equal(h->token_bytes, 2);
    assert_true(h->tokenizer_hash == tokenizer_hash(t));
    assert_int_equal(h->text_bytes, strlen(text) - 3 * strlen("<|endoftext|>"));
    /* A document begins behind each end-of-text token; the empty one between two is that token. */
    assert_int_equal(h->document_count, 4);
    assert_int_equal(s.documents[0].token, 0);
    for (int d = 1; d < 4; d++)
        assert_int_equal(shard_token(&s, s.documents[d].token - 1), tokenizer_eos(t));
    assert_int_equal(s.documents[3].token - s.documents[2].token, 1);
    /* What docs/tokenizer.md promises other programs: the offset, the width, the byte order. */
    unsigned char *file;
    size_t size;
    assert_int_equal(file_read(out, 1 << 20, (char **)&file, &size, &err), TRIL_OK);
    assert_memory_equal(file, "TRILSHRD\1\0\0\0\2\0\0\0", 16);
    for (uint64_t i = 0; i < h->token_count; i++)
        assert_int_equal(file[4096 + 2 * i] | file[4097 + 2 * i] << 8, shard_token(&s, i));
    free(file);
    shard_close(&s);
    tokenizer_free(t);
}

/* Documents by a marker line, and one document each; special strings are then ordinary text. */
static void markers(void **state) {
    (void)state;
    static const char text[] = "a b\n---\nc <|endoftext|>\r\n---\r\n---\n --- \n---";
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    const char *path = text_write("marked.txt", text);
    struct shard s = make_shard(&path, 1, t, "---", test_path("marked.shard"));
    static const char *const documents[] = {"a b\n", "c <|endoftext|>\r\n", " --- \n"};
    uint64_t at = 0;
    assert_int_equal(s.header.document_count, 3);
    for (uint64_t d = 0; d < 3; d++) {
        uint32_t *ids;
        size_t n;
        /* The end-of-text token stands in the marker's place and ends the document before it. */
        if (d)
            assert_int_equal(shard_token(&s, at++), tokenizer_eos(t));
        assert_int_equal(s.documents[d].token, at);
        assert_int_equal(
            tokenizer_encode(t, documents[d], strlen(documents[d]), false, &ids, &n, &err),
            TRIL_OK);
        for (size_t i = 0; i < n; i++)
            assert_int_equal(shard_token(&s, at++), ids[i]);
        free(ids);
    }
    assert_int_equal(s.header.token_count, at);
    check_bytes(&s, t);
    shard_close(&s);
    s = make_shard(&path, 1, t, "", test_path("whole.shard"));
    check_tokens(&s, t, text, strlen(text), false);
    assert_int_equal(s.header.document_count, 1);
    shard_close(&s);
    /* Two files are two documents, an empty one between them is none. */
    const char *three[] = {path, text_write("empty.txt", ""), text_write("b.txt", "the end\n")};
    s = make_shard(three, 3, t, "", test_path("three.shard"));
    assert_int_equal(s.header.document_count, 2);
    assert_int_equal(shard_token(&s, s.documents[1].token - 1), tokenizer_eos(t));
    check_bytes(&s, t);
    shard_close(&s);
    tokenizer_free(t);
    /* Without an end-of-text token nothing is put between. */
    t = golden_tokenizer("ranks.tiktoken", "gpt2");
    s = make_shard(three, 3, t, "", test_path("plain.shard"));
    assert_int_equal(s.header.document_count, 2);
    assert_int_equal(s.header.text_bytes, strlen(text) + 8);
    check_bytes(&s, t);
    shard_close(&s);
    tokenizer_free(t);
}

/* A text of many pieces: the encoding of the whole, with any number of threads the same file. */
static void long_text(void **state) {
    (void)state;
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    struct dice d = dice_make(41);
    const size_t room = 3 << 20;
    char *text = malloc(room + 4096), *files[2];
    size_t size = 0, sizes[2];
    while (size < room)
        size += random_text(&d, (unsigned char *)text + size, 4096, false);
    const char *path = test_path("long.txt");
    assert_int_equal(file_write_atomic(path, text, size, &err), TRIL_OK);
    for (int i = 0; i < 2; i++) {
        const char *out = test_path(i ? "long3.shard" : "long1.shard");
        threads_set(i ? 3 : 1);
        struct shard s = make_shard(&path, 1, t, NULL, out);
        check_tokens(&s, t, text, size, true);
        check_bytes(&s, t);
        shard_close(&s);
        assert_int_equal(file_read(out, 1 << 25, &files[i], &sizes[i], &err), TRIL_OK);
    }
    threads_set(0);
    assert_int_equal(sizes[0], sizes[1]);
    assert_memory_equal(files[0], files[1], sizes[0]);
    free(files[0]);
    free(files[1]);
    free(text);
    tokenizer_free(t);
}

/* More than 65536 ids take four bytes each. */
static void wide_ids(void **state) {
    (void)state;
    const uint32_t vocab = 70001;
    char *json = malloc(vocab * 40 + 4096);
    size_t n = (size_t)sprintf(json,
                               "{\"added_tokens\":[{\"id\":%u,\"content\":\"<|endoftext|>\","
                               "\"special\":true,\"normalized\":false}],\"pre_tokenizer\":{"
                               "\"type\":\"ByteLevel\",\"add_prefix_space\":false},\"model\":"
                               "{\"type\":\"BPE\",\"merges\":[],\"vocab\":{",
                               vocab - 1);
    for (uint32_t i = 0; i < vocab - 1; i++) {
        unsigned char c[5] = {0};
        if (i < 256 && (i == '"' || i == '\\'))
            n += (size_t)sprintf(json + n, "\"\\%c\":%u,", (char)i, i);
        else if (i < 256 && utf8_put(byte_to_char((unsigned char)i), c))
            n += (size_t)sprintf(json + n, "\"%s\":%u,", c, i);
        else
            n += (size_t)sprintf(json + n, "\"filler%u\":%u,", i, i);
    }
    n += (size_t)sprintf(json + n - 1, "}}}") - 1;
    struct tokenizer *t;
    if (tokenizer_parse(&t, json, n, "wide.json", &err) != TRIL_OK)
        fail_msg("%s", err.message);
    assert_int_equal(tokenizer_vocab_size(t), vocab);
    static const char text[] = "abc<|endoftext|>d";
    const char *path = text_write("wide.txt", text);
    struct shard s = make_shard(&path, 1, t, NULL, test_path("wide.shard"));
    assert_int_equal(s.header.token_bytes, 4);
    check_tokens(&s, t, text, strlen(text), true);
    check_bytes(&s, t);
    assert_int_equal(shard_token(&s, 3), vocab - 1);
    shard_close(&s);
    tokenizer_free(t);
    free(json);
}

/* A shard in memory of exactly its size, so that the sanitizer sees a byte read too far. */
static unsigned char *shard_bytes(size_t *size) {
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    const char *path = text_write("d.txt", "some words<|endoftext|>and more<|endoftext|>end"),
               *out = test_path("d.shard");
    struct shard s = make_shard(&path, 1, t, NULL, out);
    shard_close(&s);
    tokenizer_free(t);
    char *data;
    assert_int_equal(file_read(out, 1 << 20, &data, size, &err), TRIL_OK);
    unsigned char *exact = malloc(*size);
    memcpy(exact, data, *size);
    free(data);
    return exact;
}

static void refused(const unsigned char *data, size_t size, tril_status status, const char *says) {
    struct shard s;
    memset(&err, 0, sizeof err);
    memset(&s, 0, sizeof s);
    tril_status st = shard_check(&s, data, size, "x.shard", &err);
    if (st != status)
        fail_msg("status %d, \"%s\" where \"%s\" was due", st, err.message, says);
    if (!strstr(err.message, says) || !strstr(err.message, "x.shard") || strchr(err.message, '\n'))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

static void damage(void **state) {
    (void)state;
    size_t size;
    unsigned char *data = shard_bytes(&size);
    struct shard s;
    assert_int_equal(shard_check(&s, data, size, "x.shard", &err), TRIL_OK);
    /* Any byte that means something, changed. */
    for (size_t i = 0; i < size; i = i == sizeof(struct shard_header) - 1 ? 4096 : i + 1)
        for (int bit = 0; bit < 8; bit += 3) {
            data[i] ^= (unsigned char)(1 << bit);
            refused(data, size, i >= 8 && i < 12 ? TRIL_ERR_UNSUPPORTED : TRIL_ERR_FORMAT, "shard");
            data[i] ^= (unsigned char)(1 << bit);
        }
    /* Cut short anywhere, and with something behind it. */
    for (size_t n = 0; n<size; n = n> 128 && n < 4000 ? n + 97 : n + 1) {
        unsigned char *part = malloc(n + !n);
        memcpy(part, data, n);
        refused(part, n, TRIL_ERR_FORMAT, "shard");
        free(part);
    }
    unsigned char *more = calloc(1, size + 16);
    memcpy(more, data, size);
    for (size_t n = size + 1; n <= size + 16; n++)
        refused(more, n, TRIL_ERR_FORMAT, "longer than its header says");
    free(more);
    free(data);
}

/* A header whose hash is right but whose fields lie: refused before anything is read by them. */
static void forged(void **state) {
    (void)state;
    size_t size;
    unsigned char *data = shard_bytes(&size);
    struct shard_header good, h;
    memcpy(&good, data, sizeof good);
    static const uint64_t wild[] = {0,
                                    1,
                                    2,
                                    3,
                                    255,
                                    1u << 16,
                                    UINT32_MAX,
                                    (uint64_t)1 << 32,
                                    (uint64_t)1 << 61,
                                    (uint64_t)1 << 63,
                                    UINT64_MAX - 7,
                                    UINT64_MAX};
    const size_t fields[] = {
        offsetof(struct shard_header, token_count), offsetof(struct shard_header, document_count),
        offsetof(struct shard_header, text_bytes), offsetof(struct shard_header, vocab_size),
        offsetof(struct shard_header, data_hash)};
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++)
        for (size_t w = 0; w < sizeof wild / sizeof *wild; w++)
            for (uint32_t width = 0; width < 6; width++) {
                struct shard s;
                h = good;
                memcpy((char *)&h + fields[f], &wild[w], sizeof wild[w]);
                h.token_bytes = width;
                if (memcmp(&h, &good, sizeof h) == 0)
                    continue;
                h.header_hash = hash_bytes(&h, offsetof(struct shard_header, header_hash), 0);
                memcpy(data, &h, sizeof h);
                memset(&err, 0, sizeof err);
                tril_status st = shard_check(&s, data, size, "x.shard", &err);
                /* A greater vocabulary than the tokenizer's is no contradiction within the file. */
                if (st == TRIL_OK)
                    assert_true(h.token_bytes == 2 && h.vocab_size == 65536);
                else
                    assert_int_equal(st, TRIL_ERR_FORMAT);
            }
    /* Ids out of the vocabulary, under a hash that is right: a header that states a smaller one. */
    h = good;
    h.vocab_size = 3;
    h.header_hash = hash_bytes(&h, offsetof(struct shard_header, header_hash), 0);
    memcpy(data, &h, sizeof h);
    refused(data, size, TRIL_ERR_FORMAT, "ids outside its vocabulary");
    free(data);
}

static void bad_files(void **state) {
    (void)state;
    struct shard s;
    assert_int_equal(shard_open(&s, test_path("no.shard"), &err), TRIL_ERR_IO);
    assert_non_null(strstr(err.message, "no.shard"));
    assert_int_equal(shard_open(&s, test_dir(), &err), TRIL_ERR_IO);
    assert_int_equal(shard_open(&s, text_write("e.shard", ""), &err), TRIL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "e.shard"));
    /* Sources that cannot be had: nothing is left where the shard would be. */
    struct tokenizer *t = golden_tokenizer("gpt2.json", NULL);
    unsigned char junk[2000];
    struct dice d = dice_make(3);
    for (size_t i = 0; i < sizeof junk; i++)
        junk[i] = (unsigned char)dice_below(&d, 256);
    const char *binary = test_path("junk.bin"), *missing = test_path("missing.txt"),
               *out = test_path("never.shard");
    assert_int_equal(file_write_atomic(binary, junk, sizeof junk, &err), TRIL_OK);
    const char *const sources[] = {binary, missing, test_dir()};
    static const char *const says[] = {"looks binary", "missing.txt", "directory"};
    for (int i = 0; i < 3; i++) {
        const struct shard_source source = {&sources[i], 1, t, NULL};
        int64_t done = 0;
        assert_int_equal(shard_make(&source, out, NULL, &done, &err),
                         i ? TRIL_ERR_IO : TRIL_ERR_FORMAT);
        if (!strstr(err.message, says[i]) || !strstr(err.message, sources[i]))
            fail_msg("\"%s\" does not say \"%s\"", err.message, says[i]);
        assert_false(path_exists(out));
    }
    /* A shard cannot be written: said, with its name. */
    const char *good = text_write("good.txt", "text");
    const struct shard_source source = {&good, 1, t, NULL};
    int64_t done = 0;
    assert_int_equal(shard_make(&source, test_path("no/folder.shard"), NULL, &done, &err),
                     TRIL_ERR_IO);
    assert_non_null(strstr(err.message, "folder.shard"));
    if (access("/dev/full", W_OK) == 0) { /* a full disk */
        assert_int_equal(shard_make(&source, "/dev/full", NULL, &done, &err), TRIL_ERR_IO);
        assert_non_null(strstr(err.message, "/dev/full"));
    }
    if (geteuid() != 0) {
        assert_int_equal(chmod(good, 0), 0);
        assert_int_equal(shard_make(&source, out, NULL, &done, &err), TRIL_ERR_IO);
        assert_non_null(strstr(err.message, "good.txt"));
    }
    tokenizer_free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(one_file),  cmocka_unit_test(markers),
                                       cmocka_unit_test(long_text), cmocka_unit_test(wide_ids),
                                       cmocka_unit_test(damage),    cmocka_unit_test(forged),
                                       cmocka_unit_test(bad_files)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
