/* Merging: the linear algorithm, the heap and the definition, carried out naively, agree on random
 * lists of merges, proper and improper, and on random strings; the trie against a search. */
#include "text/bpe.h"
#include "text/text_support.h"

static struct tril_error err;

struct rules {
    struct trie_string tokens[512];
    unsigned char blob[8192];
    struct bpe_merge merges[512];
    uint32_t count, merge_count;
};

static uint32_t token_of(const struct rules *r, const unsigned char *bytes, size_t size) {
    for (uint32_t i = 0; i < r->count; i++)
        if (r->tokens[i].size == size && memcmp(r->tokens[i].bytes, bytes, size) == 0)
            return i;
    return NO_TOKEN;
}

/* 256 bytes, then random concatenations of tokens over the first `letters` letters. `proper`:
 * merges in the order in which tokens come about; otherwise shuffled, which makes most lists
 * improper. Some tokens get a second merge. */
static void random_rules(struct rules *r, struct dice *d, uint32_t letters, uint32_t merges,
                         bool proper) {
    size_t used = 256;
    r->count = 256;
    r->merge_count = 0;
    for (int b = 0; b < 256; b++) {
        r->blob[b] = (unsigned char)b;
        r->tokens[b] = (struct trie_string){r->blob + b, 1};
    }
    for (uint32_t k = 0; k < merges; k++) {
        uint32_t pick[2];
        for (int i = 0; i < 2; i++)
            pick[i] = r->count == 256 || dice_below(d, 3) == 0
                          ? 'a' + dice_below(d, letters)
                          : 256 + dice_below(d, r->count - 256);
        size_t n = r->tokens[pick[0]].size, m = r->tokens[pick[1]].size;
        if (n + m > 24 || used + n + m > sizeof r->blob)
            continue;
        bool twice = false;
        for (uint32_t i = 0; i < r->merge_count; i++)
            twice |= r->merges[i].left == pick[0] && r->merges[i].right == pick[1];
        if (twice)
            continue;
        memcpy(r->blob + used, r->tokens[pick[0]].bytes, n);
        memcpy(r->blob + used + n, r->tokens[pick[1]].bytes, m);
        uint32_t made = token_of(r, r->blob + used, n + m);
        if (made == NO_TOKEN) {
            made = r->count++;
            r->tokens[made] = (struct trie_string){r->blob + used, (uint32_t)(n + m)};
            used += n + m;
        }
        r->merges[r->merge_count++] = (struct bpe_merge){pick[0], pick[1], made};
    }
    for (uint32_t i = 0; !proper && i + 1 < r->merge_count; i++) {
        uint32_t j = i + dice_below(d, r->merge_count - i);
        struct bpe_merge swap = r->merges[i];
        r->merges[i] = r->merges[j];
        r->merges[j] = swap;
    }
}

/* The definition: the pair of lowest rank, the leftmost of equals, until none is left. */
static size_t naive(const struct rules *r, const unsigned char *text, size_t n, uint32_t *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = text[i];
    for (;;) {
        uint32_t best = r->merge_count;
        size_t where = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (uint32_t k = 0; k < best; k++)
                if (r->merges[k].left == out[i] && r->merges[k].right == out[i + 1]) {
                    best = k;
                    where = i;
                }
        if (best == r->merge_count)
            return n;
        out[where] = r->merges[best].result;
        memmove(out + where + 1, out + where + 2, (n - where - 2) * sizeof *out);
        n--;
    }
}

static void agree(void **state) {
    (void)state;
    struct dice d = dice_make(3);
    struct rules *r = malloc(sizeof *r);
    struct bpe_scratch scratch = {0};
    int linear = 0;
    for (int round = 0; round < 400; round++) {
        struct bpe b;
        uint32_t letters = 1 + dice_below(&d, 4);
        random_rules(r, &d, letters, 1 + dice_below(&d, 60), round % 2 == 0);
        assert_int_equal(bpe_build(&b, r->tokens, r->count, r->merges, r->merge_count, &err),
                         TRIL_OK);
        linear += b.linear;
        for (int i = 0; i < 60; i++) {
            unsigned char text[400];
            uint32_t want[400], fast[400], heap[400];
            size_t n = 1 + dice_below(&d, i % 10 ? 30 : 399);
            for (size_t k = 0; k < n; k++)
                text[k] = (unsigned char)('a' + dice_below(&d, letters + (k % 7 == 0)));
            size_t count = naive(r, text, n, want);
            assert_int_equal(bpe_encode_heap(&b, text, n, heap, &scratch), count);
            assert_memory_equal(heap, want, count * sizeof *want);
            assert_int_equal(bpe_encode(&b, text, n, fast, &scratch), count);
            assert_memory_equal(fast, want, count * sizeof *want);
        }
        bpe_free(&b);
    }
    assert_in_range(linear, 150, 399); /* both ways were tested */
    free(scratch.memory);
    free(r);
}

/* Tokens of up to 24 KB, on texts that lead the walk astray: the heap takes over, the ids stay. */
static void giant_tokens(void **state) {
    (void)state;
    enum { DOUBLINGS = 13, N = 1 << 17 };
    static unsigned char blob[1 << 16], text[N];
    static uint32_t fast[N], heap[N];
    struct trie_string tokens[256 + 2 + DOUBLINGS];
    struct bpe_merge merges[2 + DOUBLINGS] = {{'a', 'a', 256}, {256, 'b', 257}};
    struct bpe_scratch scratch = {0};
    struct bpe b;
    static unsigned char bytes[256];
    for (int i = 0; i < 256; i++) {
        bytes[i] = (unsigned char)i;
        tokens[i] = (struct trie_string){bytes + i, 1};
    }
    for (size_t i = 0; i < sizeof blob; i++)
        blob[i] = (unsigned char)("aab"[i % 3]);
    tokens[256] = (struct trie_string){blob, 2};
    tokens[257] = (struct trie_string){blob, 3};
    for (uint32_t k = 0; k < DOUBLINGS; k++) { /* aabaab, twice that, ... */
        tokens[258 + k] = (struct trie_string){blob, 6u << k};
        merges[2 + k] = (struct bpe_merge){257 + k, 257 + k, 258 + k};
    }
    assert_int_equal(bpe_build(&b, tokens, 258 + DOUBLINGS, merges, 2 + DOUBLINGS, &err), TRIL_OK);
    assert_true(b.linear);
    for (size_t odd = 0; odd < 3; odd++) {
        for (size_t i = 0; i < N; i++)
            text[i] = i % 4099 == 4098 * (odd > 0) ? 'a' : (unsigned char)"aab"[(i + odd) % 3];
        size_t n = bpe_encode(&b, text, N, fast, &scratch);
        assert_int_equal(n, bpe_encode_heap(&b, text, N, heap, &scratch));
        assert_memory_equal(fast, heap, n * sizeof *fast);
    }
    bpe_free(&b);
    free(scratch.memory);
}

static void trie(void **state) {
    (void)state;
    struct dice d = dice_make(5);
    struct rules *r = malloc(sizeof *r);
    for (int round = 0; round < 50; round++) {
        struct trie t;
        random_rules(r, &d, 3, 100, true);
        for (uint32_t i = 0; i < r->count; i += 3)
            r->tokens[i].size = 0; /* not in the set */
        assert_int_equal(trie_build(&t, r->tokens, r->count, &err), TRIL_OK);
        for (int i = 0; i < 200; i++) {
            unsigned char text[32];
            size_t n = dice_below(&d, 32);
            for (size_t k = 0; k < n; k++)
                text[k] = (unsigned char)('a' + dice_below(&d, 3));
            uint32_t got = trie_longest(&t, text, text + n);
            for (size_t size = n; size > 0; size--) {
                uint32_t want = token_of(r, text, size);
                if (want == NO_TOKEN)
                    continue;
                assert_int_equal(got, want);
                got = t.shorter[got];
            }
            assert_int_equal(got, TRIE_NONE);
        }
        trie_free(&t);
    }
    free(r);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(agree), cmocka_unit_test(giant_tokens),
                                       cmocka_unit_test(trie)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
