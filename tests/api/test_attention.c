// ctest: timeout=120
/* tril/attention.h: every layout gives the bits of the dense one, scratch is as large as promised,
 * malformed descriptions get a sentence, and the small cases that oracle/check_attention.py wrote
 * come out of `tril attention` as PyTorch computed them in double. (tests/cpu checks the kernels.)
 */
#include "api/attention_calls.h"
#include "tril/tril.h"

/* ------------------------------------------------------------------ tests */

static void test_against_reference(void **state) {
    (void)state;
    const enum tril_attention_implementation kinds[] = {TRIL_ATTENTION_FLASH, TRIL_ATTENTION_FUSED,
                                                        TRIL_ATTENTION_MATERIALISED};
    for (int i = 0; i < 24; i++) {
        struct problem ref, x;
        bool sink, alibi;
        float bound;
        struct tril_attention a = random_call(i, &sink, &alibi, &bound);
        a.implementation = TRIL_ATTENTION_REFERENCE;
        problem_make(&ref, &a, sink, alibi, (uint64_t)i);
        solve(&ref);
        for (int k = 0; k < 3; k++) {
            char what[64];
            a.implementation = kinds[k];
            snprintf(what, sizeof what, "case %d, implementation %d", i, k);
            problem_make(&x, &a, sink, alibi, (uint64_t)i);
            solve(&x);
            near(&x, &ref, bound, what);
            problem_free(&x);
        }
        problem_free(&ref);
    }
}

static void test_layouts(void **state) {
    (void)state;
    for (int i = 0; i < 12; i++) {
        struct tril_attention a = describe(3, 4, 2, 37, 70, 24);
        a.dtype = (enum tril_dtype)(i % 3);
        a.visible = i % 2 ? "0-1=window:9 2-3=full+chunk:8" : NULL;
        a.dropout = i >= 6 ? 0.2 : 0;
        struct problem dense, other;
        problem_make(&dense, &a, i % 4 == 0, i % 4 == 1, 3);
        solve(&dense);
        interleave(&a, i);
        problem_make(&other, &a, i % 4 == 0, i % 4 == 1, 3);
        solve(&other);
        same(&dense, &other);
        problem_free(&other);
        problem_free(&dense);
    }
    /* A gap between batch elements: one call each. */
    struct tril_attention a = describe(2, 2, 1, 9, 11, 8);
    struct problem dense, other;
    problem_make(&dense, &a, true, true, 4);
    solve(&dense);
    int64_t of_q[3] = {200, 72, 8}, of_k[3] = {100, 88, 8};
    memcpy(a.q_stride, of_q, sizeof of_q);
    memcpy(a.k_stride, of_k, sizeof of_k);
    problem_make(&other, &a, true, true, 4);
    solve(&other);
    same(&dense, &other);
    for (int h = 0; h < 2; h++) /* two sums of two halves */
        assert_true(fabsf(dense.b.dsink[h] - other.b.dsink[h]) <= 0x1p-20f);
    problem_free(&other);
    problem_free(&dense);
}

/* Lengths and packed batches: each sequence as if it were alone. */
static void test_lengths(void **state) {
    (void)state;
    const int32_t queries[] = {5, 0, 17, 9}, keys[] = {12, 3, 17, 0};
    struct tril_attention a = describe(4, 2, 2, 17, 17, 16);
    struct problem p, alone;
    a.query_lengths = queries;
    a.key_lengths = keys;
    a.visible = "window:6";
    problem_make(&p, &a, false, true, 8);
    solve(&p);
    for (int64_t b = 0; b < 4; b++) {
        for (int64_t h = 0; h < 2; h++)
            for (int64_t r = 0; r < 17; r++)
                for (int64_t c = 0; c < 16; c++) {
                    if (r >= queries[b]) {
                        assert_true(get(&p, O, offset(&a, O, b, h, r) + c) == 0);
                        assert_true(get(&p, DQ, offset(&a, DQ, b, h, r) + c) == 0);
                    }
                    if (r >= keys[b])
                        assert_true(get(&p, DK, offset(&a, DK, b, h, r) + c) == 0);
                }
        if (!queries[b] || !keys[b])
            continue;
        struct tril_attention one = describe(1, 2, 2, queries[b], keys[b], 16);
        one.visible = a.visible;
        problem_make(&alone, &one, false, true, 8);
        for (int t = 0; t < TENSORS; t++)
            for (int64_t h = 0; (t < O || t == DOUT) && h < 2; h++)
                for (int64_t r = 0; r < (of_keys(t) ? keys[b] : queries[b]); r++)
                    for (int64_t c = 0; c < 16; c++)
                        put(&alone, t, offset(&one, t, 0, h, r) + c,
                            get(&p, t, offset(&a, t, b, h, r) + c));
        solve(&alone);
        for (int64_t h = 0; h < 2; h++)
            for (int64_t r = 0; r < queries[b]; r++)
                for (int64_t c = 0; c < 16; c++) {
                    assert_true(get(&p, O, offset(&a, O, b, h, r) + c) ==
                                get(&alone, O, offset(&one, O, 0, h, r) + c));
                    assert_true(get(&p, DQ, offset(&a, DQ, b, h, r) + c) ==
                                get(&alone, DQ, offset(&one, DQ, 0, h, r) + c));
                }
        problem_free(&alone);
    }
    problem_free(&p);
    /* Packed: three sequences of one row of 40. */
    const int32_t offsets[] = {0, 11, 12, 40};
    struct tril_attention packed = describe(3, 2, 1, 40, 40, 16);
    packed.query_offsets = packed.key_offsets = offsets;
    problem_make(&p, &packed, true, false, 9);
    solve(&p);
    struct tril_attention last = describe(1, 2, 1, 28, 28, 16);
    problem_make(&alone, &last, true, false, 9);
    for (int t = 0; t < TENSORS; t++)
        for (int64_t h = 0; (t < O || t == DOUT) && h < (of_keys(t) ? 1 : 2); h++)
            for (int64_t r = 0; r < 28; r++)
                for (int64_t c = 0; c < 16; c++)
                    put(&alone, t, offset(&last, t, 0, h, r) + c,
                        get(&p, t, offset(&packed, t, 0, h, r + 12) + c));
    solve(&alone);
    for (int64_t h = 0; h < 2; h++)
        for (int64_t r = 0; r < 28; r++) {
            assert_true(p.b.lse[h * 40 + r + 12] == alone.b.lse[h * 28 + r]);
            for (int64_t c = 0; c < 16; c++) {
                assert_true(get(&p, O, offset(&packed, O, 0, h, r + 12) + c) ==
                            get(&alone, O, offset(&last, O, 0, h, r) + c));
                assert_true(get(&p, DQ, offset(&packed, DQ, 0, h, r + 12) + c) ==
                            get(&alone, DQ, offset(&last, DQ, 0, h, r) + c));
            }
        }
    problem_free(&alone);
    problem_free(&p);
}

static void test_threads(void **state) {
    (void)state;
    for (int kind = TRIL_ATTENTION_FLASH; kind <= TRIL_ATTENTION_LINEAR; kind++) {
        if (kind == TRIL_ATTENTION_REFERENCE)
            continue;
        struct tril_attention a = describe(2, 4, 2, 150, 150, 40);
        struct problem one, two;
        a.implementation = (enum tril_attention_implementation)kind;
        a.threads = 1;
        problem_make(&one, &a, kind != TRIL_ATTENTION_LINEAR, false, 5);
        solve(&one);
        a.threads = 2;
        problem_make(&two, &a, kind != TRIL_ATTENTION_LINEAR, false, 5);
        solve(&two);
        same(&one, &two);
        problem_free(&one);
        problem_free(&two);
    }
}

static void test_scratch(void **state) {
    (void)state;
    const int32_t offsets[] = {0, 30, 90};
    for (int i = 0; i < 16; i++) {
        struct tril_attention a = describe(2, 4, 2, 90, 90, 33);
        struct tril_error err = {0};
        struct problem free_run, lent;
        size_t forward, backward;
        a.implementation = (enum tril_attention_implementation[]){
            TRIL_ATTENTION_FLASH, TRIL_ATTENTION_FUSED, TRIL_ATTENTION_MATERIALISED,
            TRIL_ATTENTION_LINEAR}[i % 4];
        bool linear = a.implementation == TRIL_ATTENTION_LINEAR;
        a.dtype = (enum tril_dtype)(i % 3);
        a.dropout = i % 5 == 1 && !linear ? 0.1 : 0;
        a.bias_heads = i % 3 == 0 && !linear ? 4 : 0;
        a.visible = i % 2 && !linear ? "0-2=window:20+sinks:2 3=causal" : NULL;
        if (i > 11)
            a.query_offsets = a.key_offsets = offsets;
        problem_make(&free_run, &a, i % 2 == 0 && !linear, false, 6);
        solve(&free_run);
        problem_make(&lent, &a, i % 2 == 0 && !linear, false, 6);
        good(tril_attention_scratch(&a, &forward, &backward, &err), &err);
        for (int shift = 0; shift < 2; shift++) { /* any alignment; the bytes behind stay */
            size_t bytes = shift ? backward : forward;
            unsigned char *scratch = memory(bytes + 64 + (size_t)shift);
            memset(scratch + shift + bytes, 0x5a, 64);
            good((shift ? tril_attention_backward
                        : tril_attention_forward)(&a, &lent.b, scratch + shift, bytes, &err),
                 &err);
            for (int k = 0; k < 64; k++)
                assert_int_equal(scratch[(size_t)shift + bytes + (size_t)k], 0x5a);
            /* Far too little is refused. (What is asked for allows for the worst alignment.) */
            assert_int_equal((shift ? tril_attention_backward : tril_attention_forward)(
                                 &a, &lent.b, scratch + shift, bytes / 2, &err),
                             TRIL_ERR_MEMORY);
            assert_true(strlen(err.message) > 0);
            free(scratch);
        }
        if (!a.query_offsets)
            same(&free_run, &lent);
        problem_free(&free_run);
        problem_free(&lent);
    }
}

static void test_probabilities(void **state) {
    (void)state;
    struct tril_attention a = describe(2, 4, 2, 21, 40, 8);
    struct tril_error err = {0};
    struct problem p;
    a.visible = "window:12";
    a.dropout = 0.25;
    a.seed = 99;
    problem_make(&p, &a, true, false, 2);
    float *all = memory((size_t)(2 * 4 * 21 * 40) * 4),
          *some = memory((size_t)(2 * 4 * 3 * 40) * 4);
    const int32_t rows[] = {20, 0, 7};
    good(tril_attention_forward(&p.a, &p.b, NULL, 0, &err), &err);
    good(tril_attention_probabilities(&p.a, &p.b, NULL, 21, all, &err), &err);
    good(tril_attention_probabilities(&p.a, &p.b, rows, 3, some, &err), &err);
    for (int64_t bh = 0; bh < 8; bh++) {
        for (int64_t r = 0; r < 3; r++)
            assert_memory_equal(some + (bh * 3 + r) * 40, all + (bh * 21 + rows[r]) * 40, 160);
        for (int64_t i = 0; i < 21; i++)
            for (int64_t c = 0; c < 8; c++) { /* o = p v: 40 terms of at most 4/3 */
                double sum = 0;
                for (int64_t j = 0; j < 40; j++)
                    sum += (double)all[(bh * 21 + i) * 40 + j] *
                           (double)get(&p, V, offset(&a, V, bh / 4, bh % 4 / 2, j) + c);
                assert_true(fabs(sum - (double)get(&p, O, offset(&a, O, bh / 4, bh % 4, i) + c)) <
                            40 * 4.0 / 3 * 0x1p-23);
            }
    }
    const int32_t outside[] = {21};
    assert_int_equal(tril_attention_probabilities(&p.a, &p.b, outside, 1, some, &err),
                     TRIL_ERR_ARGUMENT);
    free(all);
    free(some);
    problem_free(&p);
}

/* A sequence in two halves, the state carried: as in one pass, but for the order of sums. */
static void test_linear_state(void **state) {
    (void)state;
    struct tril_attention a = describe(2, 4, 2, 60, 60, 16), half = describe(2, 4, 2, 30, 30, 16);
    struct tril_error err = {0};
    struct problem whole;
    a.implementation = half.implementation = TRIL_ATTENTION_LINEAR;
    problem_make(&whole, &a, false, false, 12);
    good(tril_attention_forward(&whole.a, &whole.b, NULL, 0, &err), &err);
    float *between = memory((size_t)(2 * 2 * 16 * 17) * 4);
    float *o = memory((size_t)(2 * 4 * 60 * 16) * 4);
    for (int part = 0; part < 2; part++) {
        int64_t of_q[3] = {4 * 60 * 16, 60 * 16, 16}, of_k[3] = {2 * 60 * 16, 60 * 16, 16};
        int64_t first = part * 30 * 16;
        memcpy(half.q_stride, of_q, sizeof of_q);
        memcpy(half.o_stride, of_q, sizeof of_q);
        memcpy(half.k_stride, of_k, sizeof of_k);
        memcpy(half.v_stride, of_k, sizeof of_k);
        struct tril_attention_buffers b = {.q = (float *)whole.data[Q] + first,
                                           .k = (float *)whole.data[K] + first,
                                           .v = (float *)whole.data[V] + first,
                                           .o = o + first,
                                           .state = part ? between : NULL,
                                           .state_out = between};
        good(tril_attention_forward(&half, &b, NULL, 0, &err), &err);
    }
    for (int64_t i = 0; i < 2 * 4 * 60 * 16; i++) /* weighted means of |v| <= 1, over 60 rows */
        assert_true(fabsf(o[i] - ((float *)whole.data[O])[i]) < 60 * 16 * 0x1p-23f);
    free(between);
    free(o);
    problem_free(&whole);
}

static void refuse(const struct tril_attention *a, const char *words) {
    static float nothing[8];
    struct tril_attention_buffers b = {.q = nothing,
                                       .k = nothing,
                                       .v = nothing,
                                       .o = nothing,
                                       .lse = nothing,
                                       .dout = nothing,
                                       .dq = nothing,
                                       .dk = nothing,
                                       .dv = nothing};
    struct tril_error err = {0};
    size_t bytes;
    b.bias = a->bias_heads ? nothing : NULL;
    assert_int_equal(tril_attention_forward(a, &b, NULL, 0, &err), TRIL_ERR_ARGUMENT);
    if (!strstr(err.message, words) || strchr(err.message, '\n'))
        fail_msg("'%s' does not say '%s'", err.message, words);
    assert_int_equal(tril_attention_backward(a, &b, NULL, 0, NULL), TRIL_ERR_ARGUMENT);
    assert_int_equal(tril_attention_scratch(a, &bytes, &bytes, &err), TRIL_ERR_ARGUMENT);
}

static void test_refusals(void **state) {
    (void)state;
#define REFUSE(words, ...)                                                                         \
    do {                                                                                           \
        struct tril_attention a = describe(1, 2, 2, 2, 2, 2);                                      \
        __VA_ARGS__;                                                                               \
        refuse(&a, words);                                                                         \
    } while (0)
    static const int32_t wrong[] = {3}, falling[] = {0, 2, 1};
    REFUSE("batch is 0", a.batch = 0);
    REFUSE("heads is -1", a.heads = -1);
    REFUSE("queries is 0", a.queries = 0);
    REFUSE("keys is", a.keys = INT64_MAX);
    REFUSE("width is 257", a.width = 257);
    REFUSE("not a multiple", a.heads = 3);
    REFUSE("overflow", a.batch = 1 << 15, a.heads = a.kv_heads = 1 << 15, a.queries = INT32_MAX,
           a.width = 256, a.keys = INT32_MAX);
    REFUSE("batch times heads", a.batch = INT32_MAX, a.heads = a.kv_heads = INT32_MAX);
    REFUSE("scale", a.scale = NAN);
    REFUSE("scale", a.scale = 1e300);
    REFUSE("softcap", a.softcap = -1);
    REFUSE("softcap", a.softcap = NAN);
    REFUSE("dropout", a.dropout = 1);
    REFUSE("dropout", a.dropout = NAN);
    REFUSE("dtype", a.dtype = (enum tril_dtype)7);
    REFUSE("implementation", a.implementation = (enum tril_attention_implementation)9);
    REFUSE("threads", a.threads = -1);
    REFUSE("q_stride is 1", a.q_stride[0] = a.q_stride[1] = 4, a.q_stride[2] = 1);
    REFUSE("strides are positive", a.k_stride[1] = -4, a.k_stride[2] = 2);
    REFUSE("overflows", a.v_stride[1] = INT64_MAX / 2 + 9, a.v_stride[2] = 2);
    REFUSE("overlap", a.o_stride[1] = 2, a.o_stride[2] = 2);
    REFUSE("query_lengths[0]", a.query_lengths = wrong);
    REFUSE("both", a.query_offsets = falling);
    REFUSE("offsets ascend", a.batch = 2, a.query_offsets = a.key_offsets = falling);
    REFUSE("no visibility rule", a.visible = "windows:3");
    REFUSE("window", a.visible = "window:0");
    REFUSE("empty", a.visible = "");
    REFUSE("given for head", a.visible = "0-3=causal");
    REFUSE("head 1 has no", a.visible = "0=causal");
    REFUSE("list of blocks", a.visible = "blocks");
    REFUSE("bias", a.bias_heads = 3);
    REFUSE("bias_stride", a.bias_heads = 2, a.bias_stride[0] = -1, a.bias_stride[1] = 2);
    REFUSE("linear", a.implementation = TRIL_ATTENTION_LINEAR, a.visible = "window:3");
    REFUSE("linear", a.implementation = TRIL_ATTENTION_LINEAR, a.keys = 3);
    REFUSE("linear", a.implementation = TRIL_ATTENTION_LINEAR, a.softcap = 3);
    /* Missing tensors. */
    struct tril_attention a = describe(1, 1, 1, 1, 1, 1);
    struct tril_attention_buffers b = {0};
    struct tril_error err = {0};
    assert_int_equal(tril_attention_forward(&a, &b, NULL, 0, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "q is missing"));
}

/* NaN and infinity go where the formulas send them: rows that see them, and no others. */
static void test_not_finite(void **state) {
    (void)state;
    for (int kind = TRIL_ATTENTION_FLASH; kind <= TRIL_ATTENTION_REFERENCE; kind++) {
        struct tril_attention a = describe(1, 1, 1, 40, 40, 8);
        struct problem p;
        a.implementation = (enum tril_attention_implementation)kind;
        problem_make(&p, &a, false, false, 1);
        ((float *)p.data[K])[20 * 8 + 3] = NAN;
        struct tril_error err = {0};
        good(tril_attention_forward(&p.a, &p.b, NULL, 0, &err), &err);
        for (int64_t i = 0; i < 20; i++)
            assert_true(isfinite(((float *)p.data[O])[i * 8]) && isfinite(p.b.lse[i]));
        assert_false(isfinite(p.b.lse[20]));
        good(tril_attention_backward(&p.a, &p.b, NULL, 0, &err), &err);
        problem_free(&p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_reference), cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_lengths),           cmocka_unit_test(test_threads),
        cmocka_unit_test(test_scratch),           cmocka_unit_test(test_probabilities),
        cmocka_unit_test(test_linear_state),      cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
