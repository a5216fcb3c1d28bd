// ctest: timeout=60 levels
/* A key-value cache of 8-bit integers: attention over it against the reference over the same
 * integers, against the exact result by a derived bound, and equal bits however it is laid out. */
#include "attention_problem.h"

/* p's keys and values, in fp32, and the same quantised by the backend. */
struct cache {
    struct tensor k, v, k_scale, v_scale;
    void *memory;
};

static void cache_make(struct cache *c, const struct problem *p) {
    int64_t rows = p->keys, K = p->kv_heads, d = p->width;
    size_t bytes = (size_t)(rows * K * d);
    char *m = calloc(1, 2 * bytes + (size_t)(rows * K) * 8 + (size_t)rows * 4 + 64);
    assert_non_null(m);
    float *scale = (float *)(void *)m;
    int32_t *index = (int32_t *)(void *)(scale + 2 * rows * K);
    int8_t *values = (int8_t *)(index + rows);
    for (int64_t r = 0; r < rows; r++)
        index[r] = (int32_t)r;
    c->memory = m;
    c->k_scale = tensor_2d(scale, DT_F32, rows, K);
    c->v_scale = tensor_2d(scale + rows * K, DT_F32, rows, K);
    c->k = tensor_3d(values, DT_I8, rows, K, d);
    c->v = tensor_3d(values + bytes, DT_I8, rows, K, d);
    struct tril_error err = {0};
    struct tensor list = tensor_1d(index, DT_I32, rows);
    if (cache_store_quantised(problem_context(false), p->k, list, c->k, c->k_scale, &err) ||
        cache_store_quantised(problem_context(false), p->v, list, c->v, c->v_scale, &err))
        fail_msg("%s", err.message);
}

static void forward(struct problem *p, const struct cache *c, bool reference) {
    struct attention_inputs in = problem_inputs(p);
    struct attention_params params = problem_params(p);
    struct tril_error err = {0};
    in.k = c->k;
    in.v = c->v;
    in.k_scale = c->k_scale;
    in.v_scale = c->v_scale;
    if (attention_forward(problem_context(reference), &in, p->o, p->lse, &params, &err))
        fail_msg("%s", err.message);
}

static struct problem draw(int i) {
    static const int widths[] = {1, 5, 16, 24, 33, 64, 128, 256};
    struct problem p = {.sequences = 1 + i % 3,
                        .q_length = {i % 2 ? 1 : 40, 3, 9},
                        .kv_length = {i % 5 == 0 ? 2500 : 150, 77, 64},
                        .heads = 4,
                        .kv_heads = i % 3 ? 2 : 1,
                        .width = widths[i % 8],
                        .causal = i % 4 != 0,
                        .act = i % 3 == 2 ? DT_BF16 : DT_F32,
                        .page_size = i % 3 == 1 ? 1 + 5 * i : 0,
                        .apart = true,
                        .outliers = i % 7 == 0,
                        .seed = i};
    if (i % 4 == 3) {
        p.rules = 1;
        p.rule[0] = (struct visible_rule){
            .causal = true,
            .parts = 2,
            .part = {{VISIBLE_WINDOW, 50, 0, NULL}, {VISIBLE_SINKS, 3, 0, NULL}}};
    }
    return p;
}

/* The kernels against the reference on the same integers. */
static void test_reference(void **state) {
    (void)state;
    for (int i = 0; i < 24; i++) {
        struct problem p = draw(i);
        struct cache c;
        problem_make(&p);
        cache_make(&c, &p);
        forward(&p, &c, true);
        double *ref = tensor_values(&p.o);
        forward(&p, &c, false);
        double *x = tensor_values(&p.o);
        for (int64_t e = 0; e < tensor_elements(&p.o); e++) {
            /* Values dequantised in fp32 (half a unit), scores of |q||k| <= 16 d summed in fp32,
             * values to 4 sigma (outliers to 40), both stored in the activations' type. */
            double unit = p.act == DT_F32 ? 0x1p-24 : 0x1p-8;
            double largest = p.outliers ? 40 : 5;
            double allowed =
                2 * unit * fabs(ref[e]) + 4 * largest * largest * sqrt(p.width) * 0x1p-24;
            if (!(fabs(x[e] - ref[e]) <= allowed))
                fail_msg("case %d: o is %g, expected %g +- %g", i, x[e], ref[e], allowed);
        }
        free(ref);
        free(x);
        free(c.memory);
        problem_free(&p);
    }
}

/* Against the exact result: every key is off by half its scale at most, so a score by
 * E = scale sum|q| scale_k / 2, a weight by a factor within e^(+-2E), and an output by
 * scale_v / 2 + (e^(2E) - 1) 2 max|v|. */
static void test_error(void **state) {
    (void)state;
    for (int i = 0; i < 24; i++) {
        struct problem p = draw(i);
        p.act = DT_F32;
        struct cache c;
        problem_make(&p);
        cache_make(&c, &p);
        double scale_k = 0, scale_v = 0, largest = 0, sum_q = 0, worst = 0;
        for (int64_t r = 0; r < p.keys; r++)
            for (int64_t g = 0; g < p.kv_heads; g++) {
                double k = (double)((float *)c.k_scale.data)[r * p.kv_heads + g];
                double v = (double)((float *)c.v_scale.data)[r * p.kv_heads + g];
                scale_k = fmax(scale_k, k);
                scale_v = fmax(scale_v, v);
                for (int64_t t = 0; t < p.width; t++) {
                    double x = element_get(&p.k, r, g, t), y = element_get(&p.v, r, g, t);
                    double qx = k * ((int8_t *)c.k.data)[(r * p.kv_heads + g) * p.width + t];
                    double qy = v * ((int8_t *)c.v.data)[(r * p.kv_heads + g) * p.width + t];
                    assert_true(fabs(x - qx) <= k * (0.5 + 1e-4));
                    assert_true(fabs(y - qy) <= v * (0.5 + 1e-4));
                    largest = fmax(largest, fabs(y));
                }
            }
        for (int64_t n = 0; n < p.rows; n++)
            for (int h = 0; h < p.heads; h++) {
                double sum = 0;
                for (int64_t t = 0; t < p.width; t++)
                    sum += fabs(element_get(&p.q, n, h, t));
                sum_q = fmax(sum_q, sum);
            }
        problem_forward(&p, true);
        double *exact = tensor_values(&p.o);
        forward(&p, &c, false);
        double *x = tensor_values(&p.o);
        double E = (double)p.params.scale * sum_q * scale_k / 2;
        double allowed = scale_v / 2 + (exp(2 * E) - 1) * 2 * largest + 1e-4;
        for (int64_t e = 0; e < tensor_elements(&p.o); e++)
            worst = fmax(worst, fabs(x[e] - exact[e]));
        if (!(worst <= allowed))
            fail_msg("case %d: error %g, at most %g", i, worst, allowed);
        free(exact);
        free(x);
        free(c.memory);
        problem_free(&p);
    }
}

/* Paged = contiguous, and any number of threads, bit for bit. */
static void test_layouts(void **state) {
    (void)state;
    static const int sizes[] = {1, 4, 128, 256};
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
        struct cache c;
        problem_make(&p);
        cache_make(&c, &p);
        threads_set(1);
        forward(&p, &c, false);
        double *paged = tensor_values(&p.o);
        struct problem flat = p;
        flat.page_size = 0;
        problem_make(&flat);
        const int32_t *pages = p.pages.data;
        for (int j = 0; j < 1200; j++)
            for (int g = 0; g < 2; g++)
                for (int t = 0; t < 64; t++) {
                    int64_t row = (int64_t)pages[j / size] * size + j % size;
                    element_set(&flat.k, j, g, t, (float)element_get(&p.k, row, g, t));
                    element_set(&flat.v, j, g, t, (float)element_get(&p.v, row, g, t));
                }
        struct cache other;
        cache_make(&other, &flat);
        for (int threads = 1; threads <= 4; threads++) {
            threads_set(threads);
            forward(&flat, &other, false);
            double *x = tensor_values(&flat.o);
            for (int64_t e = 0; e < tensor_elements(&flat.o); e++)
                assert_true(x[e] == paged[e]);
            free(x);
        }
        threads_set(0);
        free(paged);
        free(c.memory);
        free(other.memory);
        problem_free(&flat);
        problem_free(&p);
    }
}

static void test_not_finite(void **state) {
    (void)state;
    float x[4 * 8];
    for (int i = 0; i < 32; i++)
        x[i] = (float)i - 7;
    x[8 + 3] = NAN;
    x[16 + 5] = -INFINITY;
    for (int i = 24; i < 32; i++)
        x[i] = 0;
    int8_t q[32];
    float scale[4];
    int32_t rows[4] = {0, 1, 2, 3};
    for (int reference = 0; reference < 2; reference++) {
        memset(q, 77, sizeof q);
        assert_int_equal(
            cache_store_quantised(problem_context(reference), tensor_3d(x, DT_F32, 4, 1, 8),
                                  tensor_1d(rows, DT_I32, 4), tensor_3d(q, DT_I8, 4, 1, 8),
                                  tensor_2d(scale, DT_F32, 4, 1), NULL),
            TRIL_OK);
        assert_true(scale[0] == 7.0f / 127 && q[0] == -127 && q[7] == 0);
        assert_true(isnan(scale[1]) && q[8] == 0 && q[15] == 0);
        assert_true(isinf(scale[2]) && q[16] == 0);
        assert_true(scale[3] == 0 && q[24] == 0);
    }
}

static void test_refusals(void **state) {
    (void)state;
    struct problem p = draw(0);
    struct cache c;
    struct tril_error err = {0};
    problem_make(&p);
    cache_make(&c, &p);
    struct attention_inputs in = problem_inputs(&p);
    in.k = c.k;
    in.v = c.v;
    in.k_scale = c.k_scale; /* v_scale is missing */
    assert_int_equal(attention_forward(problem_context(false), &in, p.o, p.lse, &p.params, &err),
                     TRIL_ERR_ARGUMENT);
    in.v_scale = c.v_scale;
    in.v = p.v; /* k and v differ */
    assert_int_equal(attention_forward(problem_context(false), &in, p.o, p.lse, &p.params, &err),
                     TRIL_ERR_ARGUMENT);
    struct attention_gradients g = problem_gradients(&p);
    in.v = c.v;
    assert_int_equal(
        attention_backward(problem_context(false), &in, p.o, p.lse, p.dout, &g, &p.params, &err),
        TRIL_ERR_ARGUMENT);
    int32_t row = 0;
    assert_int_equal(cache_store(problem_context(false), tensor_rows(p.k, 0, 1),
                                 tensor_1d(&row, DT_I32, 1), c.k, &err),
                     TRIL_ERR_ARGUMENT);
    free(c.memory);
    problem_free(&p);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference), cmocka_unit_test(test_error),
        cmocka_unit_test(test_layouts),   cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
