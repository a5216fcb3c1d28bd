// ctest: timeout=240 levels
/* Linear attention on the CPU: every width against the reference by the harness's rule; the chunked
 * form against the recurrence with its state carried along, outputs, states and all gradients; and
 * the promises of equal bits. */
#include "support/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/threads.h"
#include "cpu/cpu.h"
#include "support/op_harness.h"

static struct op_context cpu;

/* ------------------------------------------------------------------ against the reference */

static int judge_case(enum op_id id, const struct op_case *c, enum op_placement placement) {
    const struct op_info *info = op_info_get(id);
    struct op_run r;
    struct op_judge j;
    struct tril_error err = {0};
    const char *what = op_case_describe(info, 0, c);
    op_run_create(&r, info, c, placement, false);
    assert_true(op_judge_create(&j, &r));
    if (op_run_call(&r, &cpu, WEIGHT_PLAIN, &err) != TRIL_OK)
        fail_msg("%s: %s", what, err.message);
    int faults = op_judge_count(&j, &r, what);
    op_judge_free(&j);
    op_run_free(&r);
    return faults;
}

/* The registry's case number `index` with other sizes. */
static void check(int index, enum dtype act, int n, int heads, int kv_heads, int d) {
    int faults = 0;
    for (int backward = 0; backward < 2; backward++) {
        enum op_id id = backward ? OP_LINEAR_ATTENTION_BACKWARD : OP_LINEAR_ATTENTION_FORWARD;
        struct op_case c;
        assert_true(op_info_get(id)->test_case(index, &c));
        c.act = act;
        c.size['N'] = n;
        c.size['H'] = heads;
        c.size['K'] = kv_heads;
        c.size['d'] = d;
        faults += judge_case(id, &c, d % 2 ? PLACE_AFTER_START : PLACE_AT_END);
    }
    assert_int_equal(faults, 0);
}

static void test_widths(void **state) {
    (void)state;
    const int widths[] = {1,  2,  7,  8,   10,  16,  31,  32,  40,  59,
                          64, 80, 96, 111, 128, 160, 192, 224, 255, 256};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++)
        for (int act = 0; act < 2; act++) {
            int d = widths[i], n = d <= 40 ? 120 : d <= 64 ? 98 : 7; /* the reference is slow */
            check(i % 2 ? 2 : 0, act ? DT_BF16 : DT_F32, n, 2, 1, d);
        }
}

static void test_heads(void **state) {
    (void)state;
    const int heads[][2] = {{1, 1}, {3, 1}, {4, 2}, {5, 5}, {6, 2}, {7, 1}};
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++)
        for (int index = 3; index < 6; index++) /* full, full with state, packed */
            check(index, DT_F32, 131, heads[i][0], heads[i][1], 8);
}

static void test_lengths(void **state) {
    (void)state;
    for (int n = 1; n < 12; n++)
        check(2, DT_F32, n, 2, 1, 5);
    for (int n = 90; n < 104; n++)
        check(2, DT_F32, n, 2, 1, 5);
    check(2, DT_F32, 192, 2, 1, 6);
    check(2, DT_F32, 193, 2, 1, 6);
}

/* ------------------------------------------------------------------ one pass and pieces */

struct problem {
    int64_t n, heads, kv_heads, d;
    enum dtype act;
    bool causal;
    struct tensor q, k, v, o, dout, dq, dk, dv, next, dstate;
    void *memory[16];
    int memories;
};

static struct tensor take(struct problem *p, enum dtype t, int64_t heads) {
    size_t bytes = (size_t)(p->n * heads * p->d) * dtype_size(t);
    void *m = calloc(1, bytes + 64);
    assert_non_null(m);
    p->memory[p->memories++] = m;
    return tensor_3d(m, t, p->n, heads, p->d);
}
static struct tensor take_state(struct problem *p) {
    int64_t d = p->d;
    float *m = calloc((size_t)(p->kv_heads * d * (d + 1)), 4);
    assert_non_null(m);
    p->memory[p->memories++] = m;
    struct tensor t = tensor_3d(m, DT_F32, p->kv_heads, d, d + 1);
    t.rank = 4;
    t.shape[0] = 1;
    t.shape[1] = p->kv_heads;
    t.shape[2] = d;
    t.shape[3] = d + 1;
    t.stride[0] = p->kv_heads * d * (d + 1);
    t.stride[1] = d * (d + 1);
    t.stride[2] = d + 1;
    t.stride[3] = 1;
    return t;
}

static double get(const struct tensor *t, int64_t e) {
    if (t->dtype == DT_F64)
        return ((const double *)t->data)[e];
    return t->dtype == DT_F32 ? (double)((const float *)t->data)[e]
                              : (double)bf16_to_f32(((const uint16_t *)t->data)[e]);
}
static void set(const struct tensor *t, int64_t e, double x) {
    if (t->dtype == DT_F64)
        ((double *)t->data)[e] = x;
    else if (t->dtype == DT_F32)
        ((float *)t->data)[e] = (float)x;
    else
        ((uint16_t *)t->data)[e] = f32_to_bf16((float)x);
}
static void randomise(const struct tensor *t, uint32_t op) {
    struct random_key key = {.seed = 3, .op = op};
    for (int64_t e = 0; e < tensor_count(t); e++)
        set(t, e, (double)random_normal(&key, (uint64_t)e));
}

static void problem_make(struct problem *p) {
    p->memories = 0;
    p->q = take(p, p->act, p->heads);
    p->k = take(p, p->act, p->kv_heads);
    p->v = take(p, p->act, p->kv_heads);
    p->o = take(p, p->act, p->heads);
    p->dout = take(p, p->act, p->heads);
    p->dq = take(p, p->act, p->heads);
    p->dk = take(p, p->act, p->kv_heads);
    p->dv = take(p, p->act, p->kv_heads);
    p->next = take_state(p);
    p->dstate = take_state(p);
    randomise(&p->q, 1);
    randomise(&p->k, 2);
    randomise(&p->v, 3);
    randomise(&p->dout, 4);
}
static void problem_free(struct problem *p) {
    for (int i = 0; i < p->memories; i++)
        free(p->memory[i]);
}

/* Rows [begin, begin + count) as one sequence: from `state` to p->next, and back from `dnext` to
 * p->dstate. */
static void part_forward(struct problem *p, int64_t begin, int64_t count, struct tensor state) {
    int32_t offsets[2] = {0, (int32_t)count};
    struct linear_attention_params params = {p->causal};
    struct tril_error err = {0};
    if (linear_attention_forward(&cpu, tensor_rows(p->q, begin, count),
                                 tensor_rows(p->k, begin, count), tensor_rows(p->v, begin, count),
                                 tensor_1d(offsets, DT_I32, 2), state,
                                 tensor_rows(p->o, begin, count), p->next, params, &err) != TRIL_OK)
        fail_msg("%s", err.message);
}
static void part_backward(struct problem *p, int64_t begin, int64_t count, struct tensor state,
                          struct tensor dnext) {
    int32_t offsets[2] = {0, (int32_t)count};
    struct linear_attention_params params = {p->causal};
    struct tril_error err = {0};
    if (linear_attention_backward(
            &cpu, tensor_rows(p->q, begin, count), tensor_rows(p->k, begin, count),
            tensor_rows(p->v, begin, count), tensor_1d(offsets, DT_I32, 2), state,
            tensor_rows(p->o, begin, count), tensor_rows(p->dout, begin, count), dnext,
            tensor_rows(p->dq, begin, count), tensor_rows(p->dk, begin, count),
            tensor_rows(p->dv, begin, count), p->dstate, params, &err) != TRIL_OK)
        fail_msg("%s", err.message);
}
static void whole(struct problem *p) {
    part_forward(p, 0, p->n, tensor_none());
    part_backward(p, 0, p->n, tensor_none(), tensor_none());
}

static double *values(const struct tensor *t) {
    double *x = malloc((size_t)(tensor_count(t) + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t e = 0; e < tensor_count(t); e++)
        x[e] = get(t, e);
    return x;
}
static double most(const double *x, int64_t n) {
    double m = 0;
    for (int64_t e = 0; e < n; e++)
        m = fmax(m, fabs(x[e]));
    return m;
}

/* o is a mean of v with positive weights. A sum of n positive terms, each the product of factors
 * with a few roundings, has a relative error of at most (n + 8) u however it is ordered, so o is
 * off by at most 2 (T + d + 8) u max|v|; two such results by twice that, and their roundings. */
static void compare_outputs(const struct problem *p, const double *a, const char *what) {
    double *v = values(&p->v), u = 0x1p-24;
    double allowed = 4 * (double)(p->n + p->d + 8) * u * most(v, tensor_count(&p->v));
    double rounding = p->act == DT_BF16 ? 2 * 0x1p-8 : 2 * u;
    for (int64_t e = 0; e < tensor_count(&p->o); e++) {
        double b = get(&p->o, e);
        if (!(fabs(a[e] - b) <= allowed + rounding * fabs(b)))
            fail_msg("%s: o[%lld] of %lld rows, width %lld is %g and %g", what, (long long)e,
                     (long long)p->n, (long long)p->d, a[e], b);
    }
    free(v);
}

/* A row at a time is the recurrence; at once, the chunks; in pieces, either. */
static void test_recurrence(void **state) {
    (void)state;
    const struct {
        int n, heads, kv_heads, d;
    } cases[] = {{300, 4, 2, 64}, {200, 3, 1, 33}, {130, 1, 1, 256},
                 {500, 2, 2, 16}, {97, 6, 1, 1},   {100, 1, 1, 201}};
    for (size_t i = 0; i < 2 * sizeof cases / sizeof cases[0]; i++) {
        struct problem p = {.n = cases[i / 2].n,
                            .heads = cases[i / 2].heads,
                            .kv_heads = cases[i / 2].kv_heads,
                            .d = cases[i / 2].d,
                            .act = i % 2 ? DT_BF16 : DT_F32,
                            .causal = true};
        problem_make(&p);
        part_forward(&p, 0, p.n, tensor_none());
        double *at_once = values(&p.o), *end = values(&p.next);
        for (int pieces = 0; pieces < 2; pieces++) {
            memset(p.o.data, 0, (size_t)tensor_bytes(&p.o));
            int64_t at = 0;
            for (int k = 0; at < p.n; k++) {
                static const int lengths[] = {7, 96, 1, 4, 60, 5, 111, 3};
                int64_t count = pieces ? lengths[k % 8] : 1;
                count = count < p.n - at ? count : p.n - at;
                part_forward(&p, at, count, at ? p.next : tensor_none());
                at += count;
            }
            compare_outputs(&p, at_once, pieces ? "in pieces" : "row by row");
            /* The state sums n terms of about 1: twice (n + 8) u times their absolute sum, for
             * which z (their sum without v) times max|v| stands. */
            double *v = values(&p.v), top = fmax(1, most(v, tensor_count(&p.v)));
            for (int64_t e = 0; e < tensor_count(&p.next); e++) {
                double z = end[e / (p.d + 1) * (p.d + 1) + p.d];
                if (!(fabs(end[e] - get(&p.next, e)) <= 2 * (double)(p.n + 8) * 0x1p-24 * z * top))
                    fail_msg("the state after %s: %g and %g", pieces ? "pieces" : "single rows",
                             end[e], get(&p.next, e));
            }
            free(v);
        }
        free(at_once);
        free(end);
        problem_free(&p);
    }
}

/* The reference on doubles, one pass: dq, dk, dv. */
static void reference_gradients(const struct problem *p, double *out[3]) {
    struct problem x = *p;
    x.act = DT_F64;
    x.memories = 0;
    struct tensor *to[] = {&x.q, &x.k, &x.v, &x.o, &x.dout, &x.dq, &x.dk, &x.dv};
    const struct tensor *from[] = {&p->q, &p->k, &p->v, &p->o, &p->dout, &p->dq, &p->dk, &p->dv};
    for (int i = 0; i < 8; i++) {
        *to[i] = take(&x, DT_F64, from[i]->shape[1]);
        for (int64_t e = 0; i != 3 && e < tensor_count(from[i]); e++)
            set(to[i], e, get(from[i], e));
    }
    int32_t offsets[2] = {0, (int32_t)p->n};
    struct tensor none = tensor_none(), rows = tensor_1d(offsets, DT_I32, 2);
    struct linear_attention_params params = {p->causal};
    struct op_context ref = {.backend = backend_cpu(), .reference = true};
    assert_int_equal(
        linear_attention_forward(&ref, x.q, x.k, x.v, rows, none, x.o, none, params, NULL),
        TRIL_OK);
    assert_int_equal(linear_attention_backward(&ref, x.q, x.k, x.v, rows, none, x.o, x.dout, none,
                                               x.dq, x.dk, x.dv, none, params, NULL),
                     TRIL_OK);
    out[0] = values(&x.dq);
    out[1] = values(&x.dk);
    out[2] = values(&x.dv);
    problem_free(&x);
}

static double distance(const double *a, const struct tensor *b) {
    double m = 0;
    for (int64_t e = 0; e < tensor_count(b); e++) {
        double x = fabs(a[e] - get(b, e));
        m = x > m || isnan(x) ? x : m;
    }
    return m;
}

/* Pieces with the state carried forward and its gradient carried back give the gradients of one
 * pass: judged by the double reference, they may be three times as far from it as one pass is (the
 * rule for gradients in other tests), and as far as roundings of the largest one are. */
static void test_gradients_through_state(void **state) {
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        struct problem p = {.n = 230,
                            .heads = kind & 1 ? 4 : 1,
                            .kv_heads = kind & 1 ? 2 : 1,
                            .d = kind & 1 ? 20 : 41,
                            .act = kind & 2 ? DT_BF16 : DT_F32,
                            .causal = true};
        problem_make(&p);
        double *ref[3], one_pass[3], u = p.act == DT_BF16 ? 0x1p-8 : 0x1p-24;
        const struct tensor *t[3] = {&p.dq, &p.dk, &p.dv};
        reference_gradients(&p, ref);
        whole(&p);
        for (int i = 0; i < 3; i++)
            one_pass[i] = distance(ref[i], t[i]);
        const int64_t cut[] = {0, 100, 103, 104, 230};
        struct tensor states[4];
        for (int k = 0; k < 4; k++) { /* what piece k starts from */
            states[k] = k ? take_state(&p) : tensor_none();
            if (k)
                memcpy(states[k].data, p.next.data, (size_t)tensor_bytes(&p.next));
            part_forward(&p, cut[k], cut[k + 1] - cut[k], states[k]);
        }
        for (int k = 3; k >= 0; k--)
            part_backward(&p, cut[k], cut[k + 1] - cut[k], states[k],
                          k < 3 ? p.dstate : tensor_none());
        for (int i = 0; i < 3; i++) {
            double d = distance(ref[i], t[i]);
            double floor = 4 * u * most(ref[i], tensor_count(t[i]));
            if (!(d <= 3 * one_pass[i] + floor))
                fail_msg("gradient %d in pieces is %g off, in one pass %g", i, d, one_pass[i]);
            /* And both are near: an error of 1e-3 of the largest would be a wrong formula. */
            assert_true(one_pass[i] <= (p.act == DT_BF16 ? 2e-2 : 1e-4) *
                                           fmax(1, most(ref[i], tensor_count(t[i]))));
            free(ref[i]);
        }
        problem_free(&p);
    }
}

/* ------------------------------------------------------------------ equal bits */

struct bits {
    void *data[6];
};
static const struct tensor *output(const struct problem *p, int i) {
    const struct tensor *t[6] = {&p->o, &p->dq, &p->dk, &p->dv, &p->next, &p->dstate};
    return t[i];
}
static struct bits keep_bits(const struct problem *p) {
    struct bits b;
    for (int i = 0; i < 6; i++) {
        size_t bytes = (size_t)tensor_bytes(output(p, i));
        b.data[i] = malloc(bytes);
        assert_non_null(b.data[i]);
        memcpy(b.data[i], output(p, i)->data, bytes);
    }
    return b;
}
static void assert_bits(const struct problem *p, const struct bits *b, const char *what) {
    for (int i = 0; i < 6; i++)
        if (memcmp(b->data[i], output(p, i)->data, (size_t)tensor_bytes(output(p, i))) != 0)
            fail_msg("%s: output %d differs", what, i);
}
static void drop_bits(struct bits *b) {
    for (int i = 0; i < 6; i++)
        free(b->data[i]);
}

static void test_threads(void **state) {
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        struct problem p = {.n = kind & 1 ? 1000 : 333,
                            .heads = kind & 1 ? 1 : 6,
                            .kv_heads = kind & 1 ? 1 : 3,
                            .d = 40,
                            .act = kind & 1 ? DT_BF16 : DT_F32,
                            .causal = kind < 2};
        problem_make(&p);
        threads_set(1);
        whole(&p);
        struct bits b = keep_bits(&p);
        for (int threads = 2; threads <= 5; threads++)
            for (int again = 0; again < 5; again++) {
                threads_set(threads);
                whole(&p);
                assert_bits(&p, &b, "more threads");
            }
        threads_set(0);
        drop_bits(&b);
        problem_free(&p);
    }
}

/* A long sequence of wide states is taken in parts, whose size depends on the threads: not so the
 * bits. Five threads take this one at once. */
static void test_parts(void **state) {
    (void)state;
    struct problem p = {.n = 3300, .heads = 1, .kv_heads = 1, .d = 200, .causal = true};
    p.act = DT_BF16;
    problem_make(&p);
    threads_set(5);
    part_forward(&p, 0, p.n, tensor_none());
    struct bits b = keep_bits(&p);
    for (int threads = 1; threads <= 4; threads++) {
        threads_set(threads);
        part_forward(&p, 0, p.n, tensor_none());
        assert_bits(&p, &b, "parts");
    }
    threads_set(0);
    drop_bits(&b);
    problem_free(&p);
}

/* A packed batch gives each sequence the bits that it gets alone; sequences of one row and of none
 * in between. */
static void test_alone(void **state) {
    (void)state;
    struct problem p = {
        .n = 300, .heads = 4, .kv_heads = 2, .d = 24, .act = DT_BF16, .causal = true};
    problem_make(&p);
    int32_t cut[5] = {0, 140, 141, 141, 300};
    for (int s = 0; s < 4; s++) {
        part_forward(&p, cut[s], cut[s + 1] - cut[s], tensor_none());
        part_backward(&p, cut[s], cut[s + 1] - cut[s], tensor_none(), tensor_none());
    }
    struct bits b = keep_bits(&p);
    for (int i = 0; i < 4; i++)
        memset(output(&p, i)->data, 0xff, (size_t)tensor_bytes(output(&p, i)));
    struct tensor none = tensor_none(), rows = tensor_1d(cut, DT_I32, 5);
    struct linear_attention_params params = {true};
    assert_int_equal(
        linear_attention_forward(&cpu, p.q, p.k, p.v, rows, none, p.o, none, params, NULL),
        TRIL_OK);
    assert_int_equal(linear_attention_backward(&cpu, p.q, p.k, p.v, rows, none, p.o, p.dout, none,
                                               p.dq, p.dk, p.dv, none, params, NULL),
                     TRIL_OK);
    assert_bits(&p, &b, "packed"); /* next and dstate: still those of the last one alone */
    drop_bits(&b);
    problem_free(&p);
}

static void test_repeats(void **state) {
    (void)state;
    struct problem p = {.n = 500, .heads = 2, .kv_heads = 1, .d = 16, .causal = true};
    p.act = DT_F32;
    problem_make(&p);
    whole(&p);
    struct bits b = keep_bits(&p);
    for (int i = 0; i < 100; i++) {
        whole(&p);
        assert_bits(&p, &b, "a repeat");
    }
    drop_bits(&b);
    problem_free(&p);
}

/* ------------------------------------------------------------------ corners */

static void test_corners(void **state) {
    (void)state;
    struct problem p = {.n = 200, .heads = 1, .kv_heads = 1, .d = 8, .causal = true};
    p.act = DT_F32;
    struct tensor none = tensor_none();
    struct linear_attention_params params = {true};
    problem_make(&p);
    /* A NaN in a key reaches all later rows and no earlier chunk. */
    set(&p.k, 150 * 8 + 3, NAN);
    part_forward(&p, 0, p.n, none);
    for (int64_t n = 0; n < 200; n++)
        assert_true(n >= 150 ? isnan(get(&p.o, n * 8)) : n >= 96 || isfinite(get(&p.o, n * 8)));
    /* Rows of no sequence get zeros, everywhere; and features that vanish give zeros, not NaN. */
    set(&p.k, 150 * 8 + 3, 0);
    for (int t = 0; t < 8; t++)
        set(&p.q, 60 * 8 + t, -1e30);
    int32_t offsets[3] = {5, 105, 190};
    struct tensor rows = tensor_1d(offsets, DT_I32, 3), *outs[] = {&p.o, &p.dq, &p.dk, &p.dv};
    for (int i = 0; i < 4; i++)
        memset(outs[i]->data, 0xff, (size_t)tensor_bytes(outs[i]));
    assert_int_equal(
        linear_attention_forward(&cpu, p.q, p.k, p.v, rows, none, p.o, none, params, NULL),
        TRIL_OK);
    assert_int_equal(linear_attention_backward(&cpu, p.q, p.k, p.v, rows, none, p.o, p.dout, none,
                                               p.dq, p.dk, p.dv, none, params, NULL),
                     TRIL_OK);
    for (int i = 0; i < 4; i++)
        for (int64_t e = 0; e < 200 * 8; e++) {
            bool zero = e / 8 < 5 || e / 8 >= 190 || (i < 2 && e / 8 == 60);
            assert_true(zero ? get(outs[i], e) == 0 : isfinite(get(outs[i], e)));
        }
    /* Refusals. */
    struct tril_error err = {0};
    offsets[1] = 4;
    assert_int_equal(
        linear_attention_forward(&cpu, p.q, p.k, p.v, rows, none, p.o, none, params, &err),
        TRIL_ERR_ARGUMENT);
    offsets[1] = 201;
    offsets[2] = 201;
    assert_int_equal(
        linear_attention_forward(&cpu, p.q, p.k, p.v, rows, none, p.o, none, params, &err),
        TRIL_ERR_ARGUMENT);
    problem_free(&p);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    if (op_context_init(&cpu, backend_cpu(), NULL) != TRIL_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_widths),
        cmocka_unit_test(test_heads),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_recurrence),
        cmocka_unit_test(test_gradients_through_state),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_parts),
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_repeats),
        cmocka_unit_test(test_corners),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&cpu);
    return failed;
}
