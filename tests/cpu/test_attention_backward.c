// ctest: timeout=240 levels
/* The fast attention backward: all gradients against the double reference by the tolerance rule,
 * and the promises of equal bits. */
#include "attention_problem.h"

static void check_backward(struct problem p) {
    problem_make(&p);
    problem_forward(&p, true);
    problem_backward(&p, true);
    const struct tensor *t[3] = {&p.dq, &p.dk, &p.dv};
    const char *name[3] = {"dq", "dk", "dv"};
    double *ref[3], *textbook[3];
    for (int i = 0; i < 3; i++)
        ref[i] = tensor_values(t[i]);
    plain(&p, true);
    for (int i = 0; i < 3; i++)
        textbook[i] = tensor_values(t[i]);
    problem_forward(&p, false);
    problem_backward(&p, false);
    for (int i = 0; i < 3; i++) {
        double *x = tensor_values(t[i]);
        check_rule(name[i], &p, ref[i], textbook[i], x, tensor_elements(t[i]), 3);
        free(x);
        free(ref[i]);
        free(textbook[i]);
    }
    problem_free(&p);
}

static void test_widths(void **state) {
    (void)state;
    each_width(check_backward, 67);
}

static void test_lengths(void **state) {
    (void)state;
    const int pairs[][2] = {{1, 1},     {113, 203}, {128, 217}, {239, 1}, {399, 3},
                            {3, 399},   {64, 64},   {65, 63},   {1, 500}, {5, 64},
                            {130, 300}, {20, 0},    {2, 0},     {48, 96}};
    each_length(check_backward, pairs, sizeof pairs / sizeof pairs[0]);
}

static void test_heads(void **state) {
    (void)state;
    each_grouping(check_backward);
}

static void test_scores(void **state) {
    (void)state;
    each_score(check_backward);
}

static void test_outliers(void **state) {
    (void)state;
    each_outlier(check_backward, 150);
}

/* ------------------------------------------------------------------ equal bits */

struct gradients {
    size_t bytes[3];
    void *data[3];
};
static struct gradients keep_gradients(const struct problem *p) {
    const struct tensor *t[3] = {&p->dq, &p->dk, &p->dv};
    struct gradients g;
    for (int i = 0; i < 3; i++) {
        /* In a fused buffer the last row ends with this tensor's own columns. */
        g.bytes[i] =
            (size_t)((t[i]->shape[0] - 1) * t[i]->stride[0] + t[i]->shape[1] * t[i]->shape[2]) *
            dtype_size(t[i]->dtype);
        g.data[i] = malloc(g.bytes[i]);
        assert_non_null(g.data[i]);
        memcpy(g.data[i], t[i]->data, g.bytes[i]);
    }
    return g;
}
static void assert_gradients(const char *what, const struct problem *p, const struct gradients *g) {
    const struct tensor *t[3] = {&p->dq, &p->dk, &p->dv};
    for (int i = 0; i < 3; i++)
        if (memcmp(t[i]->data, g->data[i], g->bytes[i]) != 0)
            fail_msg("%s: %s differs", what, i == 0 ? "dq" : i == 1 ? "dk" : "dv");
}
static void drop_gradients(struct gradients *g) {
    for (int i = 0; i < 3; i++)
        free(g->data[i]);
}

static void test_threads(void **state) {
    (void)state;
    for (int kind = 0; kind < 8; kind++) {
        struct problem p = {.sequences = kind & 2 ? 3 : 1,
                            .q_length = {500, 33, 70},
                            .kv_length = {500, 33, 70},
                            .heads = kind & 1 ? 3 : 1,
                            .kv_heads = 1,
                            .width = 40,
                            .causal = true,
                            .act = kind & 4 ? DT_BF16 : DT_F32,
                            .seed = kind};
        problem_make(&p);
        problem_forward(&p, false);
        threads_set(1);
        problem_backward(&p, false);
        struct gradients g = keep_gradients(&p);
        for (int threads = 2; threads <= 5; threads++) {
            threads_set(threads);
            problem_backward(&p, false);
            assert_gradients("more threads", &p, &g);
        }
        threads_set(0);
        drop_gradients(&g);
        problem_free(&p);
    }
}

static void test_repeats(void **state) {
    (void)state;
    for (int act = 0; act < 2; act++) {
        struct problem p = {.sequences = 2,
                            .q_length = {150, 33},
                            .kv_length = {150, 33},
                            .heads = 4,
                            .kv_heads = 2,
                            .width = 32,
                            .causal = true,
                            .act = act ? DT_BF16 : DT_F32,
                            .dropout = 0.1f};
        problem_make(&p);
        problem_forward(&p, false);
        problem_backward(&p, false);
        struct gradients g = keep_gradients(&p);
        for (int i = 0; i < 125; i++) {
            problem_backward(&p, false);
            assert_gradients("a repeat", &p, &g);
        }
        drop_gradients(&g);
        problem_free(&p);
    }
}

/* Where a bias's gradient is one sequence's alone it is stored on the way; an empty second sequence
 * makes it a pass of its own: the same bits, at any number of threads. */
static void test_bias_passes(void **state) {
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        double *once = NULL;
        int64_t cells = 0;
        for (int run = 0; run < 3; run++) {
            struct problem p = {.sequences = run == 1 ? 2 : 1,
                                .q_length = {130, 0},
                                .kv_length = {150, 0},
                                .heads = 4,
                                .kv_heads = 2,
                                .width = 24,
                                .causal = kind % 2,
                                .dropout = kind / 2 * 0.1f,
                                .bias_heads = 4,
                                .seed = kind};
            problem_make(&p);
            problem_forward(&p, false);
            threads_set(run == 2 ? 1 : 3);
            problem_backward(&p, false);
            threads_set(0);
            double *values = tensor_values(&p.dbias);
            cells = tensor_elements(&p.dbias);
            if (run == 0) {
                once = values;
            } else {
                assert_memory_equal(once, values, (size_t)cells * sizeof *once);
                free(values);
            }
            problem_free(&p);
        }
        double sum = 0;
        for (int64_t i = 0; i < cells; i++)
            sum += fabs(once[i]);
        assert_true(sum > 0);
        free(once);
    }
}

/* A packed batch gives each sequence the bits that it gets alone. */
static void test_alone(void **state) {
    (void)state;
    for (int act = 0; act < 2; act++) {
        struct problem p = {.sequences = 3,
                            .q_length = {140, 1, 90},
                            .kv_length = {140, 1, 90},
                            .heads = 2,
                            .kv_heads = 1,
                            .width = 20,
                            .causal = true,
                            .act = act ? DT_BF16 : DT_F32};
        problem_make(&p);
        problem_forward(&p, false);
        problem_backward(&p, false);
        struct gradients g = keep_gradients(&p);
        int32_t *whole = p.offsets.data;
        for (int s = 0; s < 3; s++) {
            int64_t first = whole[s], count = p.q_length[s];
            int32_t offsets[2] = {0, (int32_t)count}, start = 0, length = (int32_t)count;
            struct problem part = p;
            part.offsets = tensor_1d(offsets, DT_I32, 2);
            part.start = tensor_1d(&start, DT_I32, 1);
            part.length = tensor_1d(&length, DT_I32, 1);
            struct tensor *t[] = {&part.q,    &part.k,  &part.v,  &part.o,
                                  &part.dout, &part.dq, &part.dk, &part.dv};
            for (int i = 0; i < 8; i++)
                *t[i] = tensor_rows(*t[i], first, count);
            float *lse = malloc((size_t)(2 * count) * 4);
            for (int h = 0; h < 2; h++)
                memcpy(lse + h * count, (float *)p.lse.data + h * p.rows + first,
                       (size_t)count * 4);
            part.lse = tensor_2d(lse, DT_F32, 2, count);
            for (int64_t n = 0; n < count; n++)
                for (int t0 = 0; t0 < 20; t0++) {
                    element_set(&part.dq, n, 0, t0, NAN);
                    element_set(&part.dk, n, 0, t0, NAN);
                    element_set(&part.dv, n, 0, t0, NAN);
                }
            problem_backward(&part, false);
            free(lse);
        }
        assert_gradients("sequences alone", &p, &g);
        drop_gradients(&g);
        problem_free(&p);
    }
}

/* What a hand-made error of the mask would break: dropped elements have no share in dv, and the
 * forward's output is linear in v with exactly the weights that dv shows. */
static void test_dropout_mask(void **state) {
    (void)state;
    struct problem p = {.sequences = 1,
                        .q_length = {70},
                        .kv_length = {70},
                        .heads = 1,
                        .kv_heads = 1,
                        .width = 8,
                        .dropout = 0.5f,
                        .causal = true};
    problem_make(&p);
    for (int64_t j = 0; j < 70; j++)
        for (int t = 0; t < 8; t++) {
            element_set(&p.v, j, 0, t, j == 41 ? 1 : 0); /* o[n] = weight of key 41 */
            element_set(&p.dout, j, 0, t, 0);
        }
    problem_forward(&p, false);
    for (int n = 41; n < 70; n++) {
        element_set(&p.dout, n, 0, 0, 1);
        problem_backward(&p, false);
        double weight = element_get(&p.o, n, 0, 0), seen = element_get(&p.dv, 41, 0, 0);
        assert_true((weight == 0) == (seen == 0));
        assert_true(fabs(weight - seen) <= 1e-5 * weight); /* exp twice, lse once: a few ulp */
        element_set(&p.dout, n, 0, 0, 0);
    }
    problem_free(&p);
}

static void test_gaps(void **state) {
    (void)state;
    struct problem p = {.sequences = 2,
                        .q_length = {6, 9},
                        .kv_length = {6, 9},
                        .heads = 1,
                        .kv_heads = 1,
                        .width = 8,
                        .causal = true};
    problem_make(&p);
    int32_t *offsets = p.offsets.data, *start = p.start.data, *length = p.length.data;
    offsets[0] = start[0] = 2;
    length[0] = 4;
    offsets[2] = 13;
    length[1] = 7;
    problem_forward(&p, false);
    for (int n = 0; n < 15; n++)
        for (int t = 0; t < 8; t++) {
            element_set(&p.dq, n, 0, t, NAN);
            element_set(&p.dk, n, 0, t, NAN);
            element_set(&p.dv, n, 0, t, NAN);
        }
    problem_backward(&p, false);
    for (int n = 0; n < 15; n++)
        for (int t = 0; t < 8; t++) {
            bool gap = n < 2 || n >= 13;
            double x[3] = {element_get(&p.dq, n, 0, t), element_get(&p.dk, n, 0, t),
                           element_get(&p.dv, n, 0, t)};
            for (int i = 0; i < 3; i++)
                assert_true(gap ? x[i] == 0 : isfinite(x[i]));
        }
    start[1] = 5; /* overlaps the first sequence's keys 2 .. 5 */
    struct tril_error err = {0};
    assert_int_equal(problem_try_backward(&p, false, &err), TRIL_ERR_ARGUMENT);
    problem_free(&p);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_widths),       cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_heads),        cmocka_unit_test(test_scores),
        cmocka_unit_test(test_outliers),     cmocka_unit_test(test_threads),
        cmocka_unit_test(test_repeats),      cmocka_unit_test(test_alone),
        cmocka_unit_test(test_dropout_mask), cmocka_unit_test(test_gaps),
        cmocka_unit_test(test_bias_passes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
