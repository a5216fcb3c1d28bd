// ctest: timeout=60 levels
/* Attention in borrowed memory: what a call says it needs is enough, less is refused before
 * anything is written, and asking writes nothing. */
#include "attention_problem.h"

static void check(struct problem p) {
    problem_make(&p);
    problem_forward(&p, false);
    problem_backward(&p, false);
    double *o = tensor_values(&p.o), *dk = tensor_values(&p.dk);
    int64_t n_o = tensor_elements(&p.o), n_dk = tensor_elements(&p.dk);
    for (int backward = 0; backward < 2; backward++) {
        const struct tensor *out = backward ? &p.dk : &p.o;
        double *expected = backward ? dk : o;
        int64_t n = backward ? n_dk : n_o, bytes = -1;
        struct op_context ctx;
        struct tril_error err = {0};
        assert_int_equal(op_context_init(&ctx, backend_cpu(), &err), TRIL_OK);
        if (problem_scratch(&p, &ctx, backward, &bytes, &err) != TRIL_OK)
            fail_msg("%s", err.message);
        assert_true(bytes > 0);
        assert_null(ctx.scratch);
        for (int64_t r = 0; r < out->shape[0]; r++)
            for (int64_t h = 0; h < out->shape[1]; h++)
                for (int64_t t = 0; t < out->shape[2]; t++)
                    element_set(out, r, h, t, 12345);
        char *memory = malloc((size_t)bytes + 1);
        assert_non_null(memory);
        /* At an odd address, one byte short of it and then with all. */
        op_context_lend(&ctx, memory + 1, bytes - 64);
        assert_int_equal(problem_run(&p, &ctx, backward, &err), TRIL_ERR_MEMORY);
        assert_non_null(strstr(err.message, "lent"));
        for (int64_t r = 0; r < out->shape[0]; r++)
            assert_true(element_get(out, r, 0, 0) == element_get(out, 0, 0, 0));
        op_context_lend(&ctx, memory + 1, bytes);
        if (problem_run(&p, &ctx, backward, &err) != TRIL_OK)
            fail_msg("%s", err.message);
        double *x = tensor_values(out);
        for (int64_t e = 0; e < n; e++)
            assert_true(x[e] == expected[e]);
        free(x);
        op_context_free(&ctx);
        free(memory);
    }
    free(o);
    free(dk);
    problem_free(&p);
}

static void test_lent(void **state) {
    (void)state;
    check((struct problem){.sequences = 2,
                           .q_length = {100, 3},
                           .kv_length = {100, 3},
                           .heads = 4,
                           .kv_heads = 2,
                           .width = 20,
                           .causal = true});
    check((struct problem){.sequences = 1,
                           .q_length = {9},
                           .kv_length = {2300},
                           .heads = 1,
                           .kv_heads = 1,
                           .width = 64});
}

static void test_nothing_needed(void **state) {
    (void)state;
    struct op_context ctx;
    int64_t bytes = 77;
    assert_int_equal(op_context_init(&ctx, backend_cpu(), NULL), TRIL_OK);
    struct problem p = {
        .sequences = 1, .q_length = {5}, .kv_length = {5}, .heads = 1, .kv_heads = 1, .width = 4};
    problem_make(&p);
    ctx.reference = true;
    assert_int_equal(problem_scratch(&p, &ctx, false, &bytes, NULL), TRIL_OK);
    assert_int_equal(bytes, 0);
    /* Another operation cannot say. */
    struct tensor none[OP_MAX_ARGS] = {0};
    assert_int_equal(op_scratch_needed(&ctx, OP_CAST, none, NULL, &bytes, NULL), TRIL_ERR_ARGUMENT);
    /* A wrong call is refused as ever. */
    p.params.dropout = 2;
    assert_int_equal(problem_scratch(&p, &ctx, false, &bytes, NULL), TRIL_ERR_ARGUMENT);
    op_context_free(&ctx);
    problem_free(&p);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_lent),
                                       cmocka_unit_test(test_nothing_needed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
