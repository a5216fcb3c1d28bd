// ctest: timeout=600
/* tril/attention.h and `tril attention` with --device cuda, on the emulated GPU: against the
 * reference and PyTorch's results, in every layout, beside a cache, and what is refused. */
#include "api/attention_calls.h"
#include "api/attention_golden.h"

static void test_goldens(void **state) {
    static const char *const impls[] = {"flash", "materialised", NULL};
    (void)state;
    check_goldens(TEST_TRIL_EMULATED, impls, "--device cuda");
}

static void test_against_reference(void **state) {
    (void)state;
    for (int i = 0; i < 16; i++) {
        struct problem ref, x;
        bool sink, alibi;
        float bound;
        char what[32];
        struct tril_attention a = random_call(i, &sink, &alibi, &bound);
        a.device = "cuda";
        a.implementation = TRIL_ATTENTION_REFERENCE; /* the host's */
        problem_make(&ref, &a, sink, alibi, (uint64_t)i);
        solve(&ref);
        a.implementation = TRIL_ATTENTION_FLASH;
        snprintf(what, sizeof what, "case %d", i);
        problem_make(&x, &a, sink, alibi, (uint64_t)i);
        solve(&x);
        near(&x, &ref, bound, what);
        problem_free(&x);
        problem_free(&ref);
    }
}

/* What lies between the rows of a result keeps its bytes (problem_make's 0xff). */
static void check_gaps(const struct problem *p, int t) {
    char *written = memory(p->count[t]);
    for (int64_t b = 0; b < p->a.batch; b++)
        for (int64_t h = 0; h < (of_keys(t) ? p->a.kv_heads : p->a.heads); h++)
            for (int64_t r = 0; r < (of_keys(t) ? p->a.keys : p->a.queries); r++)
                memset(written + offset(&p->a, t, b, h, r), 1, (size_t)p->a.width);
    for (size_t i = 0; i < p->count[t]; i++)
        for (size_t k = 0; !written[i] && k < p->size; k++)
            assert_int_equal(((unsigned char *)p->data[t])[i * p->size + k], 0xff);
    free(written);
}

static void test_layouts(void **state) {
    (void)state;
    for (int i = 0; i < 6; i++) {
        struct tril_attention a = describe(2, 4, 2, 19, 37, 24);
        struct problem dense, other;
        a.device = "cuda";
        a.dtype = (enum tril_dtype)(i % 3);
        a.visible = i % 2 ? "0-1=window:9 2-3=full+chunk:8" : NULL;
        problem_make(&dense, &a, i % 4 == 0, i % 4 == 1, 3);
        solve(&dense);
        if (i < 4) {
            interleave(&a, i);
        } else { /* a gap between batch elements: a call each */
            int64_t of_q[3] = {2000, 19 * 24, 24}, of_k[3] = {1800, 37 * 24, 24};
            memcpy(a.q_stride, of_q, sizeof of_q);
            memcpy(a.o_stride, of_q, sizeof of_q);
            memcpy(a.k_stride, of_k, sizeof of_k);
            memcpy(a.v_stride, of_k, sizeof of_k);
        }
        problem_make(&other, &a, i % 4 == 0, i % 4 == 1, 3);
        solve(&other);
        same(&dense, &other);
        for (int t = O; t < TENSORS; t++)
            if (t != DOUT)
                check_gaps(&other, t);
        problem_free(&other);
        problem_free(&dense);
    }
}

/* Padded and packed batches; scratch that is lent; probabilities. fp32's bound as in random_call.
 */
static void test_lengths(void **state) {
    (void)state;
    const int32_t queries[] = {5, 0, 17, 9}, keys[] = {12, 3, 17, 0}, offsets[] = {0, 11, 12, 40};
    for (int packed = 0; packed < 2; packed++) {
        struct tril_attention a =
            packed ? describe(3, 2, 1, 40, 40, 16) : describe(4, 2, 2, 17, 17, 16);
        struct problem ref, x;
        struct tril_error err = {0};
        float bound = 8 * 0x1p-23f * 16 * (float)(a.keys + 8 * a.queries) * 30;
        size_t forward, backward;
        a.scale = 1 / (double)a.width;
        a.bias_heads = packed ? 0 : a.heads;
        if (packed) {
            a.query_offsets = a.key_offsets = offsets;
        } else {
            a.query_lengths = queries;
            a.key_lengths = keys;
        }
        a.implementation = TRIL_ATTENTION_REFERENCE;
        problem_make(&ref, &a, packed, !packed, 8);
        solve(&ref);
        a.implementation = TRIL_ATTENTION_FLASH;
        a.device = "cuda";
        problem_make(&x, &a, packed, !packed, 8);
        good(tril_attention_scratch(&a, &forward, &backward, &err), &err);
        char *scratch = memory(forward > backward ? forward : backward);
        good(tril_attention_forward(&a, &x.b, scratch, forward, &err), &err);
        good(tril_attention_backward(&a, &x.b, scratch, backward, &err), &err);
        near(&x, &ref, bound, packed ? "packed" : "padded");
        free(scratch);
        if (!packed) {
            const int32_t rows[] = {16, 3};
            float *want = memory(4 * 2 * 2 * 17 * 4), *is = memory(4 * 2 * 2 * 17 * 4);
            good(tril_attention_probabilities(&ref.a, &ref.b, rows, 2, want, &err), &err);
            good(tril_attention_probabilities(&x.a, &x.b, rows, 2, is, &err), &err);
            for (int k = 0; k < 4 * 2 * 2 * 17; k++)
                assert_true(fabsf(want[k] - is[k]) <= bound);
            free(want);
            free(is);
        }
        problem_free(&ref);
        problem_free(&x);
    }
}

/* Two sequences decode against pages of fp32 and of 8 bits: the CPU's results within fp32's
 * rounding (scores below 1 in size, |v| <= 2). */
static void test_cached(void **state) {
    (void)state;
    enum { B = 2, H = 4, HK = 2, D = 16, PAGE = 4, COLUMNS = 5, ROWS = B * PAGE * COLUMNS };
    static float k[ROWS * HK * D], v[ROWS * HK * D], scale[ROWS * HK], q[B * H * D],
        o[2][B * H * D];
    static int8_t k8[ROWS * HK * D], v8[ROWS * HK * D];
    int32_t lengths[] = {18, 7}, pages[] = {9, 2, 7, 0, 5, 1, 8, 3, 4, 6};
    struct tril_error err = {0};
    for (int i = 0; i < ROWS * HK * D; i++) {
        k[i] = value(1, 0, 0, 0, i / 256, i % 256);
        v[i] = value(1, 1, 0, 0, i / 256, i % 256);
        k8[i] = (int8_t)(127 * k[i]);
        v8[i] = (int8_t)(127 * v[i]);
        scale[i / D] = 1 / 127.0f;
    }
    for (int i = 0; i < B * H * D; i++)
        q[i] = value(1, 2, 0, 0, 0, i);
    for (int eight = 0; eight < 2; eight++) {
        struct tril_attention a = describe(B, H, HK, 1, PAGE * COLUMNS, D);
        struct tril_attention_cache c = {.k = eight ? (void *)k8 : k,
                                         .v = eight ? (void *)v8 : v,
                                         .dtype = eight ? TRIL_CACHE_INT8 : TRIL_CACHE_FP32,
                                         .k_scale = eight ? scale : NULL,
                                         .v_scale = eight ? scale : NULL,
                                         .rows = ROWS,
                                         .lengths = lengths,
                                         .pages = pages,
                                         .page_size = PAGE,
                                         .page_columns = COLUMNS};
        a.scale = 1.0 / D;
        for (int device = 0; device < 2; device++) {
            struct tril_attention_buffers b = {.q = q, .o = o[device]};
            a.device = device ? "cuda" : NULL;
            good(tril_attention_cached(&a, &c, &b, NULL, 0, &err), &err);
        }
        for (int i = 0; i < B * H * D; i++)
            assert_true(fabsf(o[0][i] - o[1][i]) <= 64 * 0x1p-23f);
        pages[1] = ROWS; /* beyond the cache: refused, not read */
        struct tril_attention_buffers b = {.q = q, .o = o[1]};
        assert_int_equal(tril_attention_cached(&a, &c, &b, NULL, 0, &err), TRIL_ERR_ARGUMENT);
        pages[1] = 2;
    }
}

static void test_linear(void **state) {
    (void)state;
    struct tril_attention a = describe(2, 2, 1, 33, 33, 8);
    struct problem cpu, x;
    a.implementation = TRIL_ATTENTION_LINEAR;
    problem_make(&cpu, &a, false, false, 5);
    solve(&cpu);
    a.device = "cuda";
    problem_make(&x, &a, false, false, 5);
    solve(&x);
    /* phi is in [1/e, 2], |v|, |do| <= 1: sums of 33 x 8 products of up to 4, over at least 1. */
    near(&x, &cpu, 4 * 33 * 8 * 4 * 0x1p-23f, "linear");
    problem_free(&cpu);
    problem_free(&x);
}

static void refused(struct tril_attention *a, tril_status status, const char *words) {
    struct tril_error err = {0};
    struct problem p;
    problem_make(&p, a, false, false, 1);
    assert_int_equal(tril_attention_forward(a, &p.b, NULL, 0, &err), status);
    if (!strstr(err.message, words))
        fail_msg("'%s' does not say '%s'", err.message, words);
    problem_free(&p);
}

static void test_refusals(void **state) {
    (void)state;
    struct tril_attention a = describe(1, 1, 1, 4, 4, 4);
    a.device = "cuda";
    a.implementation = TRIL_ATTENTION_FUSED;
    refused(&a, TRIL_ERR_UNSUPPORTED, "flash, materialised and linear");
    a.implementation = TRIL_ATTENTION_FLASH;
    a.device = "gpu";
    refused(&a, TRIL_ERR_ARGUMENT, "no device 'gpu'");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),  cmocka_unit_test(test_against_reference),
        cmocka_unit_test(test_layouts),  cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_cached),   cmocka_unit_test(test_linear),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
