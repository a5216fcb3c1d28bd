// ctest: timeout=240 levels
/* The fast attention forward: against the double reference by the tolerance rule, and the promises
 * of equal bits. */
#include "attention_problem.h"

static void check_forward(struct problem p) {
    problem_make(&p);
    problem_forward(&p, true);
    double *ref = tensor_values(&p.o), *ref_lse = tensor_values(&p.lse);
    plain(&p, false);
    double *textbook = tensor_values(&p.o);
    problem_forward(&p, false);
    double *out = tensor_values(&p.o), *lse = tensor_values(&p.lse);
    check_rule("o", &p, ref, textbook, out, tensor_elements(&p.o), 2);
    for (int64_t i = 0; i < tensor_elements(&p.lse); i++) {
        if (!isfinite(ref_lse[i]))
            assert_true(lse[i] == ref_lse[i]);
        /* A score sums width products of magnitude up to |q||k| <= width * 16 (4 sigma): */
        else if (fabs(lse[i] - ref_lse[i]) > 16 * sqrt(p.width) * p.width * 0x1p-24 + 1e-5)
            fail_msg("lse %g, expected %g (width %d)", lse[i], ref_lse[i], p.width);
    }
    free(ref);
    free(ref_lse);
    free(textbook);
    free(out);
    free(lse);
    problem_free(&p);
}

static void test_widths(void **state) {
    (void)state;
    each_width(check_forward, 67);
    each_width(check_forward, 3); /* the direct path */
}

static void test_lengths(void **state) {
    (void)state;
    const int pairs[][2] = {{1, 1},   {113, 203}, {128, 217}, {239, 1}, {799, 3},   {3, 799},
                            {64, 64}, {65, 63},   {1, 1023},  {5, 64},  {1, 2049},  {130, 1100},
                            {20, 0},  {2, 0},     {12, 1500}, {8, 8},   {96, 1025}, {9, 128}};
    each_length(check_forward, pairs, sizeof pairs / sizeof pairs[0]);
}

static void test_heads(void **state) {
    (void)state;
    each_grouping(check_forward);
}

static void test_scores(void **state) {
    (void)state;
    each_score(check_forward);
}

static void test_pages(void **state) {
    (void)state;
    const int sizes[] = {1, 4, 128, 256};
    for (int i = 0; i < 4; i++)
        check_forward((struct problem){.sequences = 3,
                                       .q_length = {1, 20, 3},
                                       .kv_length = {300, 150, 77},
                                       .heads = 4,
                                       .kv_heads = 2,
                                       .width = 32,
                                       .causal = true,
                                       .page_size = sizes[i],
                                       .seed = i});
}

/* Tiles of the caller's sizes: what was asked for, as near as the level can, and the same results.
 */
static void test_blocks(void **state) {
    (void)state;
    const int32_t wanted[][2] = {{1, 1},   {24, 16},   {30, 32}, {64, 64},
                                 {96, 48}, {500, 500}, {0, 32},  {48, 0}};
    for (int i = 0; i < 16; i++) {
        struct problem p = {.sequences = 2,
                            .q_length = {i < 8 ? 130 : 3, 70},
                            .kv_length = {1100, 75},
                            .heads = 4,
                            .kv_heads = 2,
                            .width = 40,
                            .causal = i % 3 != 2,
                            .alibi = i % 4 == 1,
                            .act = i % 2 ? DT_BF16 : DT_F32,
                            .block_q = wanted[i % 8][0],
                            .block_k = wanted[i % 8][1],
                            .seed = i};
        check_forward(p);
        struct op_context *ctx = problem_context(false);
        int64_t rows = ctx->block_rows, keys = ctx->block_keys;
        if (p.block_q) {
            assert_true(rows >= (p.block_q < 96 ? p.block_q : 96) && rows <= 96);
            assert_true(p.block_q >= 96 || rows < p.block_q + 32);
        }
        if (p.block_k) {
            assert_true(64 % keys == 0 && keys >= (p.block_k < 64 ? p.block_k : 64));
            assert_true(keys / 2 < p.block_k || keys <= 32);
        } else
            assert_int_equal(keys, 64);
    }
}

static void test_outliers(void **state) {
    (void)state;
    each_outlier(check_forward, 200);
}

/* ------------------------------------------------------------------ equal bits */

static void *copy_bytes(const struct tensor *t) { /* rows with their gaps */
    size_t bytes = (size_t)(t->shape[0] * t->stride[0]) * dtype_size(t->dtype);
    void *m = malloc(bytes + 1);
    assert_non_null(m);
    memcpy(m, t->data, bytes);
    return m;
}
static void assert_same(const char *what, const struct tensor *t, const void *bytes) {
    const char *a = t->data, *b = bytes;
    size_t n = (size_t)(t->shape[0] * t->stride[0]) * dtype_size(t->dtype);
    for (size_t i = 0; i < n; i++)
        if (a[i] != b[i])
            fail_msg("%s: byte %zu of %zu differs", what, i, n);
}

static void test_threads(void **state) {
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        struct problem p = {.sequences = 2,
                            .q_length = {kind == 0 ? 1 : 150, kind == 2 ? 300 : 1},
                            .kv_length = {3100, 300},
                            .heads = 2,
                            .kv_heads = 1,
                            .width = 40,
                            .causal = true,
                            .seed = kind};
        problem_make(&p);
        threads_set(1);
        problem_forward(&p, false);
        void *o = copy_bytes(&p.o), *lse = copy_bytes(&p.lse);
        for (int threads = 2; threads <= 5; threads++) {
            threads_set(threads);
            problem_forward(&p, false);
            assert_same("o with more threads", &p.o, o);
            assert_same("lse with more threads", &p.lse, lse);
        }
        threads_set(0);
        free(o);
        free(lse);
        problem_free(&p);
    }
}

static void test_repeats(void **state) {
    (void)state;
    struct problem p = {.sequences = 2,
                        .q_length = {50, 33},
                        .kv_length = {1100, 33},
                        .heads = 4,
                        .kv_heads = 2,
                        .width = 32,
                        .causal = true,
                        .dropout = 0.1f};
    problem_make(&p);
    problem_forward(&p, false);
    void *o = copy_bytes(&p.o);
    for (int i = 0; i < 250; i++) {
        problem_forward(&p, false);
        assert_same("o when repeated", &p.o, o);
    }
    free(o);
    problem_free(&p);
}

/* Rows [begin, begin + count) of sequence s alone, seeing the same keys; dropout is off, as its
 * mask names the row of the call. */
static void assert_alone(struct problem *p, int s, int begin, int count, const void *expected) {
    int32_t *whole = p->offsets.data;
    int32_t offsets[2] = {0, count};
    int32_t length = p->kv_length[s] - (p->causal ? p->q_length[s] - begin - count : 0);
    int32_t start = ((int32_t *)p->start.data)[s];
    struct problem part = *p;
    int64_t first = whole[s] + begin;
    part.offsets = tensor_1d(offsets, DT_I32, 2);
    part.start = tensor_1d(&start, DT_I32, 1);
    part.length = tensor_1d(&length, DT_I32, 1);
    if (p->pages.data)
        part.pages = tensor_rows(p->pages, s, 1);
    part.q = tensor_rows(p->q, first, count);
    part.o = tensor_rows(p->o, first, count);
    float *lse = malloc((size_t)(p->heads * count) * 4);
    part.lse = tensor_2d(lse, DT_F32, p->heads, count);
    for (int64_t n = 0; n < count; n++)
        for (int h = 0; h < p->heads; h++)
            for (int t = 0; t < p->width; t++)
                element_set(&part.o, n, h, t, NAN);
    problem_forward(&part, false);
    assert_same("rows alone", &p->o, expected);
    for (int h = 0; h < p->heads; h++)
        for (int i = 0; i < count; i++)
            assert_true(lse[h * count + i] == ((float *)p->lse.data)[h * p->rows + first + i]);
    free(lse);
}

/* Decoding = prefill in chunks = one pass; packed sequences = separate calls; paged = contiguous.
 */
static void test_alone(void **state) {
    (void)state;
    for (int i = 0; i < 24; i++) {
        struct problem p = {.sequences = 3,
                            .q_length = {140, 1, 1090},
                            .kv_length = {140, 5, 1500},
                            .heads = i & 1 ? 3 : 2,
                            .kv_heads = i & 1 ? 1 : 2,
                            .width = i & 2 ? 64 : 20,
                            .causal = i % 3 != 2,
                            .act = i & 4 ? DT_BF16 : DT_F32,
                            .alibi = (i & 8) && i % 3 != 2,
                            .softcap = i & 8 ? 5 : 0,
                            .page_size = i & 16 ? 64 : 0,
                            .seed = i};
        if (i % 5)
            p.q_length[2] = p.kv_length[2] = 200;
        problem_make(&p);
        problem_forward(&p, false);
        void *o = copy_bytes(&p.o);
        const int cuts[][2] = {{139, 1}, {0, 1},  {0, 140}, {0, 64},
                               {64, 76}, {77, 2}, {30, 9},  {100, 8}};
        for (size_t k = 0; k < sizeof cuts / sizeof cuts[0]; k++) {
            assert_alone(&p, 0, cuts[k][0], cuts[k][1], o);
            assert_alone(&p, 2, cuts[k][0] + p.q_length[2] - 140, cuts[k][1], o);
        }
        assert_alone(&p, 1, 0, 1, o);
        free(o);
        problem_free(&p);
    }
}

static void test_pages_same(void **state) {
    (void)state;
    const int sizes[] = {1, 4, 128, 256};
    for (int i = 0; i < 8; i++) {
        int size = sizes[i % 4];
        struct problem p = {.sequences = 1,
                            .q_length = {i < 4 ? 2 : 40},
                            .kv_length = {1200},
                            .heads = 4,
                            .kv_heads = 2,
                            .width = 64,
                            .causal = true,
                            .apart = true,
                            .page_size = size,
                            .seed = i};
        problem_make(&p);
        problem_forward(&p, false);
        void *o = copy_bytes(&p.o);
        struct problem flat = p;
        flat.page_size = 0;
        problem_make(&flat);
        const int32_t *pages = p.pages.data;
        for (int j = 0; j < 1200; j++) /* the pages' keys in order */
            for (int g = 0; g < 2; g++)
                for (int t = 0; t < 64; t++) {
                    int64_t row = (int64_t)pages[j / size] * size + j % size;
                    element_set(&flat.k, j, g, t, (float)element_get(&p.k, row, g, t));
                    element_set(&flat.v, j, g, t, (float)element_get(&p.v, row, g, t));
                }
        problem_forward(&flat, false);
        assert_same("contiguous keys", &flat.o, o);
        free(o);
        problem_free(&flat);
        problem_free(&p);
    }
}

static void test_dropout_rate(void **state) {
    (void)state;
    /* Equal keys and values of ones: o is the kept share of the keys over 1 - p. */
    struct problem p = {.sequences = 1,
                        .q_length = {200},
                        .kv_length = {2000},
                        .heads = 2,
                        .kv_heads = 2,
                        .width = 8,
                        .dropout = 0.25f};
    problem_make(&p);
    for (int64_t j = 0; j < p.keys; j++)
        for (int g = 0; g < 2; g++)
            for (int t = 0; t < 8; t++) {
                element_set(&p.k, j, g, t, 0);
                element_set(&p.v, j, g, t, 1);
            }
    problem_forward(&p, false);
    double sum = 0;
    for (int64_t n = 0; n < 200; n++)
        for (int h = 0; h < 2; h++)
            sum += element_get(&p.o, n, h, 0) / 400;
    /* Mean of 800,000 draws of variance p / (1 - p): six standard errors. */
    assert_true(fabs(sum - 1) < 6 * sqrt(0.25 / 0.75 / 800000));
    problem_free(&p);
}

static void test_gaps(void **state) {
    (void)state;
    /* Rows of no sequence are zero with lse = -inf; negative, descending, too long are refused. */
    struct problem p = {.sequences = 2,
                        .q_length = {6, 9},
                        .kv_length = {6, 9},
                        .heads = 1,
                        .kv_heads = 1,
                        .width = 8,
                        .causal = true};
    problem_make(&p);
    int32_t *offsets = p.offsets.data;
    offsets[0] = 2;
    offsets[2] = 13;
    memset(p.o.data, 0xff, (size_t)(p.rows * p.o.stride[0]) * 4);
    problem_forward(&p, false);
    for (int n = 0; n < 15; n++)
        if (n < 2 || n >= 13)
            for (int t = 0; t < 8; t++) {
                assert_true(element_get(&p.o, n, 0, t) == 0);
                assert_true(((float *)p.lse.data)[n] == -INFINITY);
            }
    struct tril_error err = {0};
    offsets[2] = 16;
    assert_int_equal(problem_try_forward(&p, false, &err), TRIL_ERR_ARGUMENT);
    offsets[2] = 3;
    assert_int_equal(problem_try_forward(&p, false, &err), TRIL_ERR_ARGUMENT);
    problem_free(&p);
}

static void test_not_finite(void **state) {
    (void)state;
    /* A NaN in a key reaches every row that sees it and no other row of another tile. */
    struct problem p = {.sequences = 1,
                        .q_length = {128},
                        .kv_length = {128},
                        .heads = 1,
                        .kv_heads = 1,
                        .width = 8,
                        .causal = true};
    problem_make(&p);
    element_set(&p.k, 100, 0, 3, NAN);
    problem_forward(&p, false);
    for (int n = 0; n < 128; n++)
        assert_true(n < 100 ? isfinite(element_get(&p.o, n, 0, 0))
                            : isnan(element_get(&p.o, n, 0, 0)));
    problem_free(&p);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_widths),     cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_heads),      cmocka_unit_test(test_scores),
        cmocka_unit_test(test_pages),      cmocka_unit_test(test_outliers),
        cmocka_unit_test(test_blocks),     cmocka_unit_test(test_threads),
        cmocka_unit_test(test_repeats),    cmocka_unit_test(test_alone),
        cmocka_unit_test(test_pages_same), cmocka_unit_test(test_dropout_rate),
        cmocka_unit_test(test_gaps),       cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
