// ctest: timeout=120
/* tril_attention_cached: the bits of tril_attention_forward on the same keys, whether they lie in
 * one piece, on pages or as 8-bit integers; scratch as large as promised; refusals. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "base/random.h"
#include "support/support.h"
#include "tril/attention.h"

enum { B = 3, H = 4, HK = 2, KEYS = 90, D = 20, PAGE = 8, COLUMNS = (KEYS + PAGE - 1) / PAGE };
static const int32_t lengths[B] = {70, 90, 33};

static void fill(float *x, size_t n, uint32_t layer) {
    struct random_key key = {.seed = 5, .layer = layer, .op = RANDOM_TEST};
    for (size_t i = 0; i < n; i++)
        x[i] = 2 * random_uniform(&key, i) - 1;
}

struct caches {
    int64_t rows;
    float *k, *v; /* [rows, HK, D] */
    uint16_t *k16, *v16;
    int8_t *k8, *v8;
    float *k_scale, *v_scale;
    int32_t start[B], pages[B * COLUMNS];
};

static void *memory(size_t n) {
    void *p = calloc(1, n);
    assert_non_null(p);
    return p;
}

/* Every element's keys in a row (order 0) or on pages dealt out from the last to the first. */
static void caches_make(struct caches *c) {
    c->rows = B * COLUMNS * PAGE;
    size_t n = (size_t)c->rows * HK * D;
    c->k = memory(4 * n);
    c->v = memory(4 * n);
    c->k16 = memory(2 * n);
    c->v16 = memory(2 * n);
    c->k8 = memory(n);
    c->v8 = memory(n);
    c->k_scale = memory((size_t)c->rows * HK * 4);
    c->v_scale = memory((size_t)c->rows * HK * 4);
    fill(c->k, n, 1);
    fill(c->v, n, 2);
    fill(c->k_scale, (size_t)c->rows * HK, 3);
    fill(c->v_scale, (size_t)c->rows * HK, 4);
    for (size_t i = 0; i < n; i++) {
        c->k[i] = bf16_to_f32(f32_to_bf16(c->k[i])); /* exact in bf16, too */
        c->v[i] = bf16_to_f32(f32_to_bf16(c->v[i]));
        c->k16[i] = f32_to_bf16(c->k[i]);
        c->v16[i] = f32_to_bf16(c->v[i]);
        c->k8[i] = (int8_t)(c->k[i] * 100);
        c->v8[i] = (int8_t)(c->v[i] * 100);
    }
    for (int b = 0; b < B; b++) {
        c->start[b] = b * COLUMNS * PAGE;
        for (int i = 0; i < COLUMNS; i++)
            c->pages[b * COLUMNS + i] = B * COLUMNS - 1 - (b * COLUMNS + i);
    }
}
static void caches_free(struct caches *c) {
    void *all[] = {c->k, c->v, c->k16, c->v16, c->k8, c->v8, c->k_scale, c->v_scale};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

enum { WITH_PAGES = 1, IN_BF16 = 2, IN_INT8 = 4, PACKED = 8, ALIBI_SINK = 16, LENT = 32 };

/* `queries` rows for every element against what tril_attention_forward gives one by one. */
static void check_same(const struct caches *c, int queries, int how, const char *visible) {
    struct tril_attention a = tril_attention_defaults(B, H, queries, D);
    struct tril_error err = {0};
    size_t n = (size_t)B * H * (size_t)queries;
    float *q = memory(n * D * 4), *o = memory(n * D * 4), *lse = memory(n * 4);
    float slopes[H], sink[H] = {0.5f, -1, 2, 0};
    int32_t offsets[B + 1];
    void *scratch = NULL;
    size_t bytes = 0;
    fill(q, n * D, 7);
    a.kv_heads = HK;
    a.keys = KEYS;
    a.visible = visible;
    tril_attention_alibi(H, slopes);
    struct tril_attention_buffers b = {.q = q, .o = o, .lse = lse};
    struct tril_attention_cache cache = {
        .k = how & IN_BF16   ? (void *)c->k16
             : how & IN_INT8 ? (void *)c->k8
                             : (void *)c->k,
        .v = how & IN_BF16   ? (void *)c->v16
             : how & IN_INT8 ? (void *)c->v8
                             : (void *)c->v,
        .dtype = how & IN_BF16   ? TRIL_CACHE_BF16
                 : how & IN_INT8 ? TRIL_CACHE_INT8
                                 : TRIL_CACHE_FP32,
        .k_scale = c->k_scale,
        .v_scale = c->v_scale,
        .rows = c->rows,
        .lengths = lengths,
    };
    if (how & WITH_PAGES) {
        cache.pages = c->pages;
        cache.page_size = PAGE;
        cache.page_columns = COLUMNS;
    } else
        cache.start = c->start;
    if (how & ALIBI_SINK) {
        b.slopes = slopes;
        b.sink = sink;
    }
    if (how & PACKED) { /* q and o [H, B T, d] */
        for (int i = 0; i <= B; i++)
            offsets[i] = i * queries;
        a.query_offsets = offsets;
        a.queries = (int64_t)B * queries;
    }
    if (how & LENT) {
        assert_int_equal(tril_attention_cached_scratch(&a, &cache, &bytes, &err), TRIL_OK);
        scratch = memory(bytes);
    }
    if (tril_attention_cached(&a, &cache, &b, scratch, bytes, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    for (int e = 0; e < B; e++) {
        struct tril_attention one = tril_attention_defaults(1, H, queries, D);
        size_t rows = (size_t)H * (size_t)queries, of_k = (size_t)HK * KEYS * D;
        float *k = memory(of_k * 4), *v = memory(of_k * 4), *q1 = memory(rows * D * 4);
        float *o1 = memory(rows * D * 4), *lse1 = memory(rows * 4);
        one.kv_heads = HK;
        one.keys = lengths[e];
        one.visible = visible;
        for (int64_t j = 0; j < lengths[e]; j++)
            for (int g = 0; g < HK; g++)
                for (int t = 0; t < D; t++) {
                    int64_t row = c->start[e] + j;
                    if (how & WITH_PAGES)
                        row = (int64_t)c->pages[e * COLUMNS + j / PAGE] * PAGE + j % PAGE;
                    int64_t from = (row * HK + g) * D + t, to = (g * lengths[e] + j) * D + t;
                    k[to] = how & IN_INT8 ? c->k_scale[row * HK + g] * c->k8[from] : c->k[from];
                    v[to] = how & IN_INT8 ? c->v_scale[row * HK + g] * c->v8[from] : c->v[from];
                }
                /* Element, head, row: where it stands in what was given. */
#define AT(h, r)                                                                                   \
    (how & PACKED ? (int64_t)(h)*B * queries + e * queries + (r)                                   \
                  : ((int64_t)e * H + (h)) * queries + (r))
        for (int h = 0; h < H; h++)
            for (int r = 0; r < queries; r++)
                memcpy(q1 + (h * queries + r) * D, q + AT(h, r) * D, D * 4);
        struct tril_attention_buffers b1 = b;
        b1.q = q1;
        b1.k = k;
        b1.v = v;
        b1.o = o1;
        b1.lse = lse1;
        assert_int_equal(tril_attention_forward(&one, &b1, NULL, 0, &err), TRIL_OK);
        for (int h = 0; h < H; h++)
            for (int r = 0; r < queries; r++) {
                if (memcmp(o1 + (h * queries + r) * D, o + AT(h, r) * D, D * 4) != 0)
                    fail_msg("o of element %d, head %d, row %d differs (queries %d, how %d)", e, h,
                             r, queries, how);
                if (lse1[h * queries + r] != lse[AT(h, r)])
                    fail_msg("lse of element %d, head %d, row %d differs (queries %d, how %d)", e,
                             h, r, queries, how);
            }
        void *all[] = {k, v, q1, o1, lse1};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            free(all[i]);
    }
    free(q);
    free(o);
    free(lse);
    free(scratch);
}

static void test_same_bits(void **state) {
    (void)state;
    struct caches c;
    caches_make(&c);
    for (int queries = 1; queries <= 7; queries += 3)
        for (int how = 0; how < 64; how++)
            if ((how & (IN_BF16 | IN_INT8)) != (IN_BF16 | IN_INT8))
                check_same(&c, queries, how, how & 1 ? "causal+window:40+sinks:2" : NULL);
    caches_free(&c);
}

static void test_evicted(void **state) {
    (void)state;
    /* Pages before the window may be gone. */
    struct caches c;
    caches_make(&c);
    struct tril_attention a = tril_attention_defaults(B, H, 1, D);
    float q[B * H * D], first[B * H * D], second[B * H * D];
    struct tril_attention_buffers b = {.q = q, .o = first};
    struct tril_attention_cache cache = {.k = c.k,
                                         .v = c.v,
                                         .rows = c.rows,
                                         .lengths = lengths,
                                         .pages = c.pages,
                                         .page_size = PAGE,
                                         .page_columns = COLUMNS};
    struct tril_error err = {0};
    fill(q, B * H * D, 9);
    a.kv_heads = HK;
    a.keys = KEYS;
    a.visible = "causal+window:9";
    assert_int_equal(tril_attention_cached(&a, &cache, &b, NULL, 0, &err), TRIL_OK);
    for (int e = 0; e < B; e++)
        for (int i = 0; (i + 1) * PAGE <= lengths[e] - 9; i++)
            c.pages[e * COLUMNS + i] = -1;
    b.o = second;
    assert_int_equal(tril_attention_cached(&a, &cache, &b, NULL, 0, &err), TRIL_OK);
    assert_memory_equal(first, second, sizeof first);
    a.visible = NULL; /* but not where they are seen */
    assert_int_equal(tril_attention_cached(&a, &cache, &b, NULL, 0, &err), TRIL_ERR_ARGUMENT);
    caches_free(&c);
}

static void test_refusals(void **state) {
    (void)state;
    struct caches c;
    caches_make(&c);
    float q[B * H * D] = {0}, o[B * H * D];
    int32_t beyond[B] = {0, 0, COLUMNS * PAGE}, negative[B] = {-1, 0, 0}, all[B] = {90, 90, 91};
    char small[8];
    struct tril_error err = {0};
    for (int i = 0; i < 15; i++) {
        struct tril_attention a = tril_attention_defaults(B, H, 1, D);
        struct tril_attention_buffers b = {.q = q, .o = o};
        struct tril_attention_cache cache = {
            .k = c.k, .v = c.v, .rows = c.rows, .lengths = lengths, .start = c.start};
        void *scratch = NULL;
        a.kv_heads = HK;
        a.keys = KEYS;
        enum tril_status expected = TRIL_ERR_ARGUMENT;
        switch (i) {
        case 0:
            a.dtype = TRIL_FP16;
            break;
        case 1:
            a.implementation = TRIL_ATTENTION_LINEAR;
            break;
        case 2:
            a.dropout = 0.1;
            break;
        case 3:
            cache.dtype = (enum tril_cache_dtype)7;
            break;
        case 4:
            a.dtype = TRIL_BF16;
            break;
        case 5:
            cache.rows = 0;
            break;
        case 6:
            cache.row_stride = HK * D - 1;
            break;
        case 7:
            cache.start = NULL;
            break;
        case 8:
            cache.pages = c.pages;
            break;
        case 9:
            cache.lengths = all;
            break;
        case 10:
            cache.lengths = negative;
            break;
        case 11:
            cache.rows = 50;
            break; /* starts lie behind */
        case 12:
            cache.start = beyond;
            cache.rows = COLUMNS * PAGE + 30;
            break;
        case 13:
            cache.dtype = TRIL_CACHE_INT8;
            cache.k_scale = NULL;
            break;
        default:
            scratch = small;
            expected = TRIL_ERR_MEMORY;
            break;
        }
        err.message[0] = 0;
        tril_status st = tril_attention_cached(&a, &cache, &b, scratch, sizeof small, &err);
        if (st != expected || !err.message[0])
            fail_msg("case %d: status %d, '%s'", i, (int)st, err.message);
    }
    caches_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_evicted),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
