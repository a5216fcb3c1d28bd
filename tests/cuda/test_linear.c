// ctest: timeout=300
/* Linear layers on the emulated GPU: every way by which a product can go (few rows, cuBLASLt fused
 * and in two passes, tiles), plans searched once, rounding that must be asked for, replays. */
#include "support/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda.h"
#include "ops/reference.h"
#include "ops/replay.h"
#include "support/op_harness.h"

/* tests/cuda/emulation/cublasLt.h */
extern struct emulated_blas_counts { int searches, products, epilogues; } emulated_blas_counts;
extern int emulated_blas_refuses; /* 1: epilogues, 2: everything */

static struct op_context context;

static int open_context(void **state) {
    (void)state;
    return op_context_init(&context, backend_cuda(), NULL) != TRIL_OK;
}
static int close_context(void **state) {
    (void)state;
    op_context_free(&context);
    return 0;
}
static int allow_all(void **state) {
    (void)state;
    emulated_blas_refuses = 0;
    cuda_rounding(&context, false, false);
    return 0;
}

/* ------------------------------------------------------------------ the registry's cases */

static int faults(const struct op_info *info, int index, const struct op_case *c) {
    char what[512];
    struct op_run r;
    struct op_judge judge;
    struct tril_error err = {0};
    snprintf(what, sizeof what, "%s", op_case_describe(info, index, c));
    op_run_create(&r, info, c, PLACE_AT_END, false);
    int count = !op_judge_create(&judge, &r);
    if (count == 0) {
        count = op_run_call(&r, &context, WEIGHT_PLAIN, &err) != TRIL_OK ||
                context.backend->synchronise(&context, &err) != TRIL_OK;
        if (count)
            fprintf(stderr, "%s: %s\n", what, err.message);
        count += op_judge_count(&judge, &r, what);
    }
    op_judge_free(&judge);
    op_run_free(&r);
    return count;
}

static const enum op_id ids[] = {OP_LINEAR_FORWARD, OP_LINEAR_BACKWARD_INPUT,
                                 OP_LINEAR_BACKWARD_WEIGHT};

/* What cuBLASLt may refuse on some GPU or in some version: the results must stand all the same. */
static void test_refused(void **state) {
    (void)state;
    for (int refuse = 1; refuse <= 2; refuse++)
        for (int which = 0; which < 3; which++) {
            const struct op_info *info = op_info_get(ids[which]);
            struct op_case c;
            /* (a context of its own: plans remember what was refused) */
            op_context_free(&context);
            assert_int_equal(op_context_init(&context, backend_cuda(), NULL), TRIL_OK);
            emulated_blas_refuses = refuse;
            int bad = 0, before = emulated_blas_counts.products;
            int fused = emulated_blas_counts.epilogues;
            for (int i = refuse; info->test_case(i, &c) && bad < 20; i += 5)
                bad += faults(info, i, &c);
            assert_int_equal(bad, 0);
            assert_int_equal(emulated_blas_counts.epilogues, fused);
            assert_true((emulated_blas_counts.products == before) == (refuse == 2));
        }
}

/* Weights of another dtype than the activations. */
static void test_mixed(void **state) {
    (void)state;
    static const enum dtype types[][2] = {
        {DT_F32, DT_BF16}, {DT_F32, DT_F16}, {DT_BF16, DT_F16}, {DT_BF16, DT_F32}};
    static const int64_t sizes[][3] = {{3, 64, 40}, {70, 24, 66}};
    const struct op_info *info = op_info_get(OP_LINEAR_FORWARD);
    for (int t = 0; t < 4; t++)
        for (int s = 0; s < 2; s++) {
            struct op_case c = {.act = types[t][0], .label = "mixed"};
            struct linear_params p = {.activation = ACT_SILU};
            c.dtype[op_arg_find(info, "w")] = case_dtype(types[t][1]);
            c.size['N'] = sizes[s][0];
            c.size['I'] = sizes[s][1];
            c.size['O'] = sizes[s][2];
            case_params(&c, &p, sizeof p);
            assert_int_equal(faults(info, t, &c), 0);
        }
}

/* ------------------------------------------------------------------ one layer */

enum { N = 48, I = 64, O = 136 };
struct layer {
    struct tensor x, bias, y, pre, none, residual;
    struct weight w;
    double *wide; /* x w^T + bias in double */
};

static struct tensor tensor_new(enum dtype t, int64_t rows, int64_t columns) {
    size_t bytes = ((size_t)(rows * columns) * dtype_size(t) + 63) / 64 * 64;
    return tensor_2d(aligned_alloc(64, bytes), t, rows, columns);
}
static void fill(struct tensor *t, double scale, unsigned seed) {
    for (int64_t i = 0; i < tensor_count(t); i++) {
        seed = seed * 1664525u + 1013904223u;
        ref_put(t, i, scale * ((double)(seed >> 8) / (1 << 23) - 1));
    }
}
static void layer_create(struct layer *l, enum dtype act, enum dtype out) {
    *l = (struct layer){.x = tensor_new(act, N, I), .bias = tensor_new(DT_F32, 1, O)};
    l->bias = tensor_1d(l->bias.data, DT_F32, O);
    l->w = (struct weight){.value = tensor_new(act, O, I), .uses = WEIGHT_FORWARD};
    l->y = tensor_new(out, N, O);
    l->pre = tensor_new(act, N, O);
    l->residual = tensor_new(DT_F32, N, O);
    l->none = tensor_none();
    fill(&l->x, 1, 1);
    fill(&l->w.value, 0.3, 2);
    fill(&l->bias, 1, 3);
    fill(&l->residual, 1, 4);
    l->wide = malloc(sizeof(double) * N * O);
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < O; o++) {
            double sum = ref_at(&l->bias, o);
            for (int64_t i = 0; i < I; i++)
                sum += ref_at(&l->x, n * I + i) * ref_at(&l->w.value, o * I + i);
            l->wide[n * O + o] = sum;
        }
}
static void layer_free(struct layer *l) {
    free(l->x.data);
    free(l->bias.data);
    free(l->w.value.data);
    free(l->y.data);
    free(l->pre.data);
    free(l->residual.data);
    free(l->wide);
}

/* fp32 with bias and residual is one fused product, and its algorithm is searched for once; so is
 * that of another alignment. */
/* linear_forward, and waiting for it. */
static tril_status layer_run(struct tensor x, const struct weight *w, struct tensor bias,
                             struct tensor residual, struct tensor y, struct tensor pre,
                             enum activation a) {
    tril_status st = linear_forward(&context, x, w, bias, residual, y, pre, a, NULL);
    return st == TRIL_OK ? context.backend->synchronise(&context, NULL) : st;
}

static void test_plans(void **state) {
    (void)state;
    struct layer l;
    layer_create(&l, DT_BF16, DT_F32);
    struct emulated_blas_counts before = emulated_blas_counts;
    for (int again = 0; again < 3; again++)
        assert_int_equal(layer_run(l.x, &l.w, l.bias, l.residual, l.y, l.none, ACT_NONE), TRIL_OK);
    assert_int_equal(emulated_blas_counts.searches - before.searches, 1);
    assert_int_equal(emulated_blas_counts.products - before.products, 3);
    assert_int_equal(emulated_blas_counts.epilogues - before.epilogues, 3);
    struct tensor moved = tensor_rows(l.x, 1, N - 1), y = tensor_rows(l.y, 0, N - 1);
    moved.data = (char *)l.x.data + 16;
    moved.shape[0] = y.shape[0];
    struct tensor residual = tensor_rows(l.residual, 0, N - 1);
    for (int again = 0; again < 2; again++)
        assert_int_equal(layer_run(moved, &l.w, l.bias, residual, y, l.none, ACT_NONE), TRIL_OK);
    assert_int_equal(emulated_blas_counts.searches - before.searches, 2);
    layer_free(&l);
}

static double worst_error(const struct layer *l, const struct tensor *t, enum activation a) {
    double worst = 0;
    for (int64_t i = 0; i < (int64_t)N * O; i++) {
        double want = ref_activation(a, l->wide[i]);
        worst = fmax(worst, fabs(ref_at(t, i) - want));
    }
    return worst;
}

/* With rounding allowed GELU, its bias and `pre` are one product's epilogue; the bias's rounding
 * (|bias| <= 1, |slope of GELU| < 1.13) and the output's (|pre| < 64 0.3 + 1) bound the error. */
static void test_rounded_bias(void **state) {
    (void)state;
    struct layer l;
    layer_create(&l, DT_BF16, DT_BF16);
    for (int with = 0; with < 2; with++) {
        struct emulated_blas_counts before = emulated_blas_counts;
        cuda_rounding(&context, false, with);
        assert_int_equal(layer_run(l.x, &l.w, l.bias, l.none, l.y, l.pre, ACT_GELU_TANH), TRIL_OK);
        assert_int_equal(emulated_blas_counts.epilogues - before.epilogues, with);
        double largest = 0, u = ldexp(1, -8);
        for (int64_t i = 0; i < (int64_t)N * O; i++)
            largest = fmax(largest, fabs(l.wide[i]));
        double bound = u * largest + with * 1.13 * u / 2 + 1e-5;
        assert_true(worst_error(&l, &l.pre, ACT_NONE) <= bound);
        assert_true(worst_error(&l, &l.y, ACT_GELU_TANH) <= bound);
    }
    /* An activation that cuBLASLt lacks, and a bias that it cannot fetch: our own pass. */
    struct emulated_blas_counts before = emulated_blas_counts;
    assert_int_equal(layer_run(l.x, &l.w, l.bias, l.none, l.y, l.pre, ACT_SILU), TRIL_OK);
    assert_int_equal(emulated_blas_counts.epilogues, before.epilogues);
    assert_true(emulated_blas_counts.products > before.products);
    layer_free(&l);
}

/* TF32 only where it is allowed: then with errors near 2^-11 of the terms, else of 2^-24. */
static void test_tf32(void **state) {
    (void)state;
    struct layer l;
    layer_create(&l, DT_F32, DT_F32);
    for (int with = 0; with < 2; with++) {
        cuda_rounding(&context, with, false);
        assert_int_equal(layer_run(l.x, &l.w, l.bias, l.none, l.y, l.none, ACT_NONE), TRIL_OK);
        double worst = worst_error(&l, &l.y, ACT_NONE);
        assert_true(worst <= (with ? 2 * ldexp(1, -11) * I * 0.3 : ldexp(1, -24) * I * I * 0.3));
        assert_true(!with || worst > ldexp(1, -20));
    }
    layer_free(&l);
}

/* A sequence decoded alone gets the bits that it gets among seven others. */
static void test_few_rows(void **state) {
    (void)state;
    struct layer l;
    layer_create(&l, DT_BF16, DT_BF16);
    uint16_t first[O];
    int products = emulated_blas_counts.products;
    for (int64_t n = 1; n <= 8; n++) {
        struct tensor x = tensor_rows(l.x, 0, n), y = tensor_rows(l.y, 0, n);
        assert_int_equal(layer_run(x, &l.w, l.bias, l.none, y, l.none, ACT_NONE), TRIL_OK);
        if (n == 1)
            memcpy(first, l.y.data, sizeof first);
        assert_memory_equal(first, l.y.data, sizeof first);
    }
    assert_int_equal(emulated_blas_counts.products, products);
    layer_free(&l);
}

/* ------------------------------------------------------------------ recorded */

static tril_status run_layer(void *arg, struct tril_error *err) {
    struct layer *l = arg;
    return linear_forward(&context, l->x, &l->w, l->bias, l->none, l->y, l->pre, ACT_SILU, err);
}

static void test_replay(void **state) {
    (void)state;
    struct layer l;
    layer_create(&l, DT_BF16, DT_BF16);
    struct op_replay r = {0};
    uint16_t *plain = malloc((size_t)N * O * 2);
    int products = 0;
    for (int round = 0; round < 5; round++) {
        fill(&l.x, 1, 100 + (unsigned)round);
        assert_int_equal(run_layer(&l, NULL), TRIL_OK);
        assert_int_equal(context.backend->synchronise(&context, NULL), TRIL_OK);
        memcpy(plain, l.y.data, (size_t)N * O * 2);
        fill(&l.y, 1, 7);
        products = emulated_blas_counts.products;
        assert_int_equal(op_replay_run(&context, &r, 1, run_layer, &l, NULL), TRIL_OK);
        assert_int_equal(context.backend->synchronise(&context, NULL), TRIL_OK);
        assert_memory_equal(plain, l.y.data, (size_t)N * O * 2);
    }
    assert_int_equal(emulated_blas_counts.products, products); /* the last was a replay */
    op_replay_free(&context, &r);
    free(plain);
    layer_free(&l);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_refused, allow_all),
        cmocka_unit_test(test_mixed),
        cmocka_unit_test(test_plans),
        cmocka_unit_test_teardown(test_rounded_bias, allow_all),
        cmocka_unit_test_teardown(test_tf32, allow_all),
        cmocka_unit_test(test_few_rows),
        cmocka_unit_test(test_replay),
    };
    return cmocka_run_group_tests(tests, open_context, close_context);
}
