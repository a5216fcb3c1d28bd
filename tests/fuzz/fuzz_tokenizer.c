/* tokenizer.json (bytes that begin with '{') or a rank file (all others): refused in one sentence,
 * or a tokenizer that encodes any text or says why not, the same way twice, whose two algorithms of
 * merging agree, whose ids decode, and which keeps its meaning when written and read again. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "text/tokenizer_impl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool good) {
    if (!good)
        abort();
}

/* The bytes as a file. */
static const char *as_file(const void *data, size_t size) {
    static int fd = -1;
    static char path[64];
    if (fd < 0) {
        fd = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    check(fd >= 0 && ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    return path;
}

static tril_status load(struct tokenizer **t, const uint8_t *data, size_t size,
                        struct tril_error *err) {
    return size && data[0] == '{' ? tokenizer_parse(t, (const char *)data, size, "fuzz", err)
                                  : tokenizer_load_tiktoken(t, as_file(data, size), "gpt2", err);
}

static void check_text(const struct tokenizer *t, const unsigned char *text, size_t size,
                       bool special) {
    struct tril_error err = {.message = ""};
    uint32_t *ids, *again;
    size_t n, m, length, streamed = 0;
    char *back;
    tril_status st = tokenizer_encode(t, (const char *)text, size, special, &ids, &n, &err);
    if (st != TRIL_OK) {
        check(ids == NULL && err.message[0] && !strchr(err.message, '\n'));
        return;
    }
    check(tokenizer_encode(t, (const char *)text, size, special, &again, &m, NULL) == TRIL_OK);
    check(n == m && memcmp(ids, again, n * sizeof *ids) == 0);
    check(tokenizer_decode(t, ids, n, false, &back, &length, &err) == TRIL_OK);
    struct tokenizer_stream s;
    const char *piece;
    tokenizer_stream_begin(&s, t, false);
    for (size_t i = 0; i <= n; i++) {
        if (i < n)
            check(tokenizer_stream_next(&s, ids[i], &piece, &m, &err) == TRIL_OK);
        else
            tokenizer_stream_end(&s, &piece, &m);
        check(streamed + m <= length && memcmp(piece, back + streamed, m) == 0);
        streamed += m;
    }
    check(streamed == length);
    tokenizer_stream_free(&s);
    free(back);
    free(ids);
    free(again);
    if (size && !t->bytes_missing) {
        struct bpe_scratch scratch = {0};
        uint32_t *one = malloc(size * sizeof *one), *two = malloc(size * sizeof *two);
        n = bpe_encode(&t->bpe, text, size, one, &scratch);
        m = bpe_encode_heap(&t->bpe, text, size, two, &scratch);
        check(n == m && memcmp(one, two, n * sizeof *one) == 0);
        free(one);
        free(two);
        free(scratch.memory);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const unsigned char text[] = "It's 12:30 \xE2\x80\x94 caf\xC3\xA9, cafe\xCC\x81\r\n\n  "
                                        "<x> aab abab <|endoftext|>\xFF\xE4";
    struct tokenizer *t, *again;
    struct tril_error err = {.message = ""};
    tril_status st = load(&t, data, size, &err);
    if (st != TRIL_OK) {
        check(t == NULL && err.code == st && err.message[0] && !strchr(err.message, '\n'));
        check(load(&t, data, size, NULL) == st);
        return 0;
    }
    check_text(t, text, sizeof text - 1, true);
    check_text(t, text, sizeof text - 1, false);
    check_text(t, data, size < 300 ? size : 300, true);
    check_text(t, data, 0, true);
    for (uint32_t id = 0; id < tokenizer_vocab_size(t); id++) {
        size_t length;
        check(!tokenizer_token_bytes(t, id, &length) || length > 0);
    }
    check(tokenizer_eos(t) < (int64_t)tokenizer_vocab_size(t));
    check(tokenizer_bos(t) < (int64_t)tokenizer_vocab_size(t));
    char written[64]; /* one that was read from a tokenizer.json is written byte for byte */
    snprintf(written, sizeof written, "/dev/shm/tril-fuzz-%d.json", (int)getpid());
    if (!t->json && tokenizer_write(t, written, &err) == TRIL_OK) {
        check(tokenizer_load(&again, written, NULL, &err) == TRIL_OK);
        check(tokenizer_hash(again) == tokenizer_hash(t));
        tokenizer_free(again);
        unlink(written);
    }
    tokenizer_free(t);
    return 0;
}
