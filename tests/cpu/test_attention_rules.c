// ctest: timeout=120 levels
/* The fast attention under visibility rules, biases and sinks, forward and backward: random
 * descriptions against the double reference with an explicit mask (a bias of -infinity where the
 * definition of the rule says so), by the tolerance rule; and the promises of equal bits. */
#include "attention_problem.h"

static void fail_seed(const char *what, int seed) {
    fail_msg("%s (TRIL_TEST_SEED=%d)", what, seed);
}

/* Numbers of one random case, drawn in order. */
struct dice {
    struct random_key key;
    uint64_t next;
};
static int64_t roll(struct dice *d, int64_t from, int64_t to) {
    return from + (int64_t)random_below(&d->key, d->next++, (uint64_t)(to - from + 1));
}
static bool chance(struct dice *d, int one_in) {
    return roll(d, 1, one_in) == 1;
}

/* What rules point to. */
struct tables {
    int32_t list[4][8];
    uint8_t blocks[64 * 64];
};

static void draw_rule(struct visible_rule *rule, struct tables *t, struct dice *d, int64_t rows,
                      int64_t keys) {
    *rule = (struct visible_rule){.causal = !chance(d, 3), .parts = (int32_t)roll(d, 0, 3)};
    for (int k = 0; k < rule->parts; k++) {
        struct visible_part *part = &rule->part[k];
        int64_t most = chance(d, 3) ? 4 : chance(d, 2) ? 30 : keys + 1;
        part->kind = (enum visible_kind)roll(d, VISIBLE_WINDOW, VISIBLE_BLOCKS);
        part->a = roll(d, 1, most);
        part->b = roll(d, 1, 9);
        if (part->kind == VISIBLE_FIXED)
            part->b = roll(d, 0, part->a);
        if (part->kind == VISIBLE_GLOBAL) {
            part->a = roll(d, 1, 8);
            for (int64_t g = 0, x = roll(d, 0, 20); g < part->a; g++, x += roll(d, 1, 60))
                t->list[k][g] = (int32_t)x;
            part->list = t->list[k];
        }
    }
    rule->block_q = rows / 20 + roll(d, 1, 30);
    rule->block_k = keys / 20 + roll(d, 1, 70);
    rule->block_rows = rows / rule->block_q + 1;
    rule->block_columns = keys / rule->block_k + 1;
    for (int64_t i = 0; i < rule->block_rows * rule->block_columns; i++)
        t->blocks[i] = chance(d, 3);
    rule->blocks = t->blocks;
}

static struct problem draw(struct tables t[4], struct dice *d, int seed) {
    static const int widths[] = {1, 3, 8, 16, 20, 24, 33, 64, 96, 130};
    static const int groups[][2] = {{1, 1}, {2, 2}, {3, 1}, {4, 2}, {5, 5}, {8, 2}};
    int shape = (int)roll(d, 0, 5);
    struct problem p = {.seed = seed};
    p.sequences = (int)roll(d, 1, 3);
    p.heads = groups[shape][0];
    p.kv_heads = groups[shape][1];
    p.width = widths[roll(d, 0, 9)];
    bool paged = chance(d, 5);
    int64_t most = p.width > 40 || p.heads > 4 ? 90 : 170, rows = 1, keys = 1;
    for (int s = 0; s < p.sequences; s++) {
        p.q_length[s] = (int)(chance(d, 4) ? roll(d, 1, 9) : roll(d, 1, most));
        p.kv_length[s] = (int)(chance(d, 2) ? p.q_length[s] : roll(d, 0, most));
        if (chance(d, 8) && p.q_length[s] < 10) /* several splits */
            p.kv_length[s] = (int)roll(d, 1000, 3000);
        rows = p.q_length[s] > rows ? p.q_length[s] : rows;
        keys = p.kv_length[s] > keys ? p.kv_length[s] : keys;
    }
    p.act = chance(d, 4) ? DT_BF16 : DT_F32;
    p.causal = !chance(d, 3);
    p.alibi = chance(d, 4);
    p.softcap = chance(d, 4) ? 3 : 0;
    p.dropout = chance(d, 4) ? 0.17f : 0;
    p.page_size = paged ? (int)roll(d, 1, 40) : 0;
    p.apart = chance(d, 2);
    p.cache_bf16 = chance(d, 3);
    p.rules = chance(d, 6) ? 0 : (int)roll(d, 1, 4);
    p.by_head = chance(d, 2);
    for (int k = 0; k < p.rules; k++)
        draw_rule(&p.rule[k], &t[k], d, rows, keys);
    p.bias_heads = !chance(d, 3) ? 0 : chance(d, 2) ? 1 : p.heads;
    p.bias_type = chance(d, 2) ? DT_BF16 : DT_F32;
    p.with_sink = chance(d, 3);
    return p;
}

/* Pages whose keys no query sees are taken away. */
static int evict(struct problem *p) {
    int32_t *pages = p->pages.data;
    int gone = 0;
    for (int64_t s = 0; s < p->sequences && pages; s++)
        for (int64_t page = 0; page * p->page_size < p->kv_length[s]; page++) {
            bool wanted = false;
            for (int64_t j = page * p->page_size;
                 j < (page + 1) * p->page_size && j < p->kv_length[s]; j++)
                for (int64_t h = 0; h < p->heads; h++)
                    for (int64_t i = 0; i < p->q_length[s]; i++)
                        wanted |= problem_sees(p, s, i, j, h);
            /* visible_any may be a little too careful with these kinds: see visible.h */
            for (int k = 0; k < p->rules; k++)
                for (int part = 0; part < p->rule[k].parts; part++)
                    wanted |= p->rule[k].causal && p->rule[k].part[part].kind >= VISIBLE_FIXED;
            if (!wanted) {
                pages[s * p->page_columns + page] = -1;
                gone++;
            }
        }
    return gone;
}

/* The reference sees the rule as a bias of its own for every head: only possible with one sequence,
 * as a bias has no sequences. */
static void reference_by_mask(struct problem *p, bool backward) {
    struct problem m = *p;
    int64_t A = p->q_length[0], U = p->kv_length[0] > 0 ? p->kv_length[0] : 1;
    size_t cells = (size_t)(p->heads * A * U);
    float *bias = malloc(cells * 8), *dbias = bias + cells;
    assert_non_null(bias);
    m.bias = tensor_3d(bias, DT_F32, p->heads, A, U);
    m.dbias = tensor_3d(dbias, DT_F32, p->heads, A, U);
    for (int64_t h = 0; h < p->heads; h++)
        for (int64_t i = 0; i < A; i++)
            for (int64_t j = 0; j < p->kv_length[0]; j++) {
                float b = 0;
                if (p->bias_heads)
                    b = (float)element_get(&p->bias, p->bias_heads == 1 ? 0 : h, i, j);
                bias[(h * A + i) * U + j] = problem_sees(p, 0, i, j, h) ? b : -INFINITY;
            }
    m.rules = 0;
    m.params.causal = false;
    problem_forward(&m, true);
    if (backward)
        problem_backward(&m, true);
    if (backward && p->bias_heads) {
        struct tensor *t = &p->dbias;
        for (int64_t h = 0; h < t->shape[0]; h++)
            for (int64_t i = 0; i < t->shape[1]; i++)
                for (int64_t j = 0; j < t->shape[2]; j++) {
                    double sum = 0;
                    for (int64_t k = 0; i < A && j < p->kv_length[0] && k < p->heads; k++)
                        if (t->shape[0] == 1 || k == h)
                            sum += (double)dbias[(k * A + i) * U + j];
                    element_set(t, h, i, j, (float)sum);
                }
    }
    free(bias);
}

enum { VALUES = 6 };
static const char *const value_names[VALUES] = {"o", "dq", "dk", "dv", "dbias", "dsink"};
static void values_of(const struct problem *p, double *out[VALUES], int64_t n[VALUES]) {
    struct tensor sink = p->dsink;
    if (sink.data) /* as [1, H] */
        sink = tensor_2d(sink.data, DT_F32, 1, p->heads);
    const struct tensor *t[VALUES] = {&p->o, &p->dq, &p->dk, &p->dv, &p->dbias, &sink};
    for (int k = 0; k < VALUES; k++) {
        out[k] = tensor_values(t[k]);
        n[k] = tensor_elements(t[k]);
    }
}
static void free_values(double *x[VALUES]) {
    for (int k = 0; k < VALUES; k++)
        free(x[k]);
}

/* Outputs of a run as one run of bytes, to compare bits. */
struct bits {
    size_t size[8];
    char *data[8];
};
static struct bits bits_of(const struct problem *p) {
    const struct tensor *t[8] = {&p->o,  &p->lse,   &p->dq,    &p->dk,
                                 &p->dv, &p->dbias, &p->dsink, NULL};
    struct bits b = {0};
    for (int k = 0; k < 7; k++) {
        if (!t[k]->data)
            continue;
        int64_t cells = 1;
        for (int r = 0; r < t[k]->rank; r++)
            cells += (t[k]->shape[r] - 1) * t[k]->stride[r];
        b.size[k] = (size_t)(cells > 0 ? cells : 0) * dtype_size(t[k]->dtype);
        b.data[k] = malloc(b.size[k] + 1);
        assert_non_null(b.data[k]);
        memcpy(b.data[k], t[k]->data, b.size[k]);
    }
    return b;
}
static void bits_compare_and_free(struct bits *a, struct bits *b, const char *what, int seed) {
    static const char *const names[] = {"o", "lse", "dq", "dk", "dv", "dbias", "dsink", ""};
    for (int k = 0; k < 8; k++) {
        if (a->size[k] != b->size[k] ||
            (a->size[k] && memcmp(a->data[k], b->data[k], a->size[k]) != 0))
            fail_msg("%s differs with %s (TRIL_TEST_SEED=%d)", names[k], what, seed);
        free(a->data[k]);
        free(b->data[k]);
    }
}

static void run_kernels(struct problem *p, bool backward) {
    problem_forward(p, false);
    if (backward)
        problem_backward(p, false);
}

/* The last rows of a sequence alone get the bits that they get among all. */
static void check_tail(struct problem *p, struct dice *d, int seed) {
    int s = (int)roll(d, 0, p->sequences - 1);
    int32_t *whole = p->offsets.data;
    int64_t begin = roll(d, 0, p->q_length[s] - 1), count = p->q_length[s] - begin;
    for (int k = 0; k < p->rules; k++)
        for (int part = 0; part < p->rule[k].parts; part++)
            if (p->rule[k].part[part].kind == VISIBLE_BLOCKS) /* goes by rows, not positions */
                return;
    if (p->dropout > 0)
        return;
    int32_t offsets[2] = {0, (int32_t)count}, length = p->kv_length[s];
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
    if (p->bias_heads) {
        part.bias.data =
            (char *)p->bias.data + begin * p->bias.stride[1] * (int64_t)dtype_size(p->bias.dtype);
        part.bias.shape[1] -= begin;
    }
    float *lse = malloc((size_t)(p->heads * count) * 4);
    assert_non_null(lse);
    part.lse = tensor_2d(lse, DT_F32, p->heads, count);
    double *expected = tensor_values(&part.o);
    for (int64_t n = 0; n < count; n++)
        for (int h = 0; h < p->heads; h++)
            for (int t = 0; t < p->width; t++)
                element_set(&part.o, n, h, t, NAN);
    problem_forward(&part, false);
    double *x = tensor_values(&part.o);
    for (int64_t e = 0; e < tensor_elements(&part.o); e++)
        if (x[e] != expected[e])
            fail_seed("the last rows alone get other bits", seed);
    for (int h = 0; h < p->heads; h++)
        for (int64_t i = 0; i < count; i++)
            if (lse[h * count + i] != ((float *)p->lse.data)[h * p->rows + first + i])
                fail_seed("the last rows alone get another lse", seed);
    free(x);
    free(expected);
    free(lse);
}

/* dsink is one sum over all rows of p_sink delta, delta = dO . o with o as it was stored: too few
 * elements for the rule's maxima, but an error that is known: d roundings of o a row, each of up to
 * u |o|, independent; 4 of their standard deviations (u / sqrt 3), and P rounded to bf16 may add as
 * much. */
static void check_sinks(const struct problem *p, const double *lse, const double *ref,
                        const double *textbook, const double *x) {
    double unit = p->act == DT_F32 ? 0x1p-24 : 0x1p-8;
    for (int h = 0; h < p->heads; h++) {
        double variance = 0, sum = 0;
        for (int64_t n = 0; n < p->rows; n++) {
            double weight = exp((double)((float *)p->sink.data)[h] - lse[h * p->rows + n]);
            double row = 0;
            for (int64_t t = 0; t < p->width; t++)
                row += pow(element_get(&p->o, n, h, t) * element_get(&p->dout, n, h, t), 2);
            variance += weight * weight * row / 3;
            sum += weight * sqrt(row * (double)p->width);
        }
        double allowed = 3 * fabs(textbook[h] - ref[h]) + 8 * unit * sqrt(variance) +
                         32 * 0x1p-24 * (sum + fabs(ref[h]));
        if (!(fabs(x[h] - ref[h]) <= allowed))
            fail_msg("dsink[%d] is %g, expected %g +- %g (TRIL_TEST_SEED=%d)", h, x[h], ref[h],
                     allowed, p->seed);
    }
}

static int evicted_pages, masked_cases;

static void check_case(int seed) {
    struct dice d = {.key = {.seed = (uint64_t)seed, .op = RANDOM_TEST}};
    struct tables t[4];
    struct problem p = draw(t, &d, seed);
    bool backward = p.page_size == 0, by_mask = p.sequences == 1 && p.rules > 0;
    double *ref[VALUES], *textbook[VALUES], *x[VALUES];
    int64_t n[VALUES];
    problem_make(&p);
    evicted_pages += evict(&p);
    masked_cases += by_mask;
    if (by_mask && !p.pages.data)
        reference_by_mask(&p, backward);
    else {
        problem_forward(&p, true);
        if (backward)
            problem_backward(&p, true);
    }
    values_of(&p, ref, n);
    double *ref_lse = tensor_values(&p.lse);
    plain(&p, backward);
    values_of(&p, textbook, n);
    for (int64_t k = 0; k < p.rows * p.heads; k++)
        ((float *)p.lse.data)[k] = NAN;
    threads_set(1);
    run_kernels(&p, backward);
    values_of(&p, x, n);
    if (backward && p.with_sink)
        check_sinks(&p, ref_lse, ref[VALUES - 1], textbook[VALUES - 1], x[VALUES - 1]);
    for (int k = 0; k < (backward ? VALUES - 1 : 1); k++)
        if (x[k])
            check_rule(value_names[k], &p, ref[k], textbook[k], x[k], n[k], k == 0 ? 2 : 3);
    for (int64_t k = 0; k < p.rows * p.heads; k++) {
        double lse = (double)((float *)p.lse.data)[k];
        if (!(isfinite(ref_lse[k])
                  ? fabs(lse - ref_lse[k]) <= 16 * sqrt(p.width) * p.width * 0x1p-24 + 1e-5
                  : lse == ref_lse[k]))
            fail_msg("lse %g, expected %g (TRIL_TEST_SEED=%d)", lse, ref_lse[k], seed);
    }
    struct bits one = bits_of(&p);
    int threads = (int)roll(&d, 2, 5);
    threads_set(threads);
    run_kernels(&p, backward);
    struct bits many = bits_of(&p);
    bits_compare_and_free(&one, &many, "more threads", seed);
    check_tail(&p, &d, seed);
    threads_set(0);
    free_values(ref);
    free_values(textbook);
    free_values(x);
    free(ref_lse);
    problem_free(&p);
}

static void test_random(void **state) {
    (void)state;
    const char *one = getenv("TRIL_TEST_SEED"), *count = getenv("TRIL_TEST_CASES");
    if (one) {
        check_case(atoi(one));
        return;
    }
    int cases = count ? atoi(count) : 150;
    for (int seed = 1; seed <= cases; seed++)
        check_case(seed);
    assert_true(cases < 100 || (evicted_pages > 0 && masked_cases > 10));
    printf("%d cases, %d with a mask, %d pages evicted\n", cases, masked_cases, evicted_pages);
}

/* Rules that single out one part, at lengths where blocks and splits are skipped: the backward's
 * wavefront must not wait for a block that never comes, with any number of threads. */
static void test_long(void **state) {
    (void)state;
    static const char *const rules[] = {"window:100",      "window:70+sinks:3",   "global:0,700",
                                        "strided:300",     "fixed:256,2",         "chunk:200",
                                        "dilated:3,400",   "full+dilated:2,1000", "full+window:65",
                                        "full+global:1299"};
    for (size_t k = 0; k < sizeof rules / sizeof *rules; k++) {
        struct visible_set set = {0};
        assert_int_equal(visible_parse(rules[k], &set, NULL), TRIL_OK);
        struct problem p = {.sequences = 1,
                            .q_length = {1300},
                            .kv_length = {1300},
                            .heads = 2,
                            .kv_heads = 1,
                            .width = 8,
                            .rules = 1,
                            .rule = {set.rules[0]},
                            .bias_heads = k % 2 ? 1 : 0,
                            .seed = (int)k};
        problem_make(&p);
        threads_set(1);
        run_kernels(&p, true);
        struct bits one = bits_of(&p);
        for (int threads = 2; threads <= 5; threads++) {
            threads_set(threads);
            run_kernels(&p, true);
        }
        struct bits many = bits_of(&p);
        bits_compare_and_free(&one, &many, rules[k], 0);
        threads_set(0);
        problem_free(&p);
        visible_set_free(&set);
    }
}

/* Few rows against many keys, split over the threads: splits that nobody sees are left out. */
static void test_splits(void **state) {
    (void)state;
    static const char *const rules[] = {"window:100", "window:1500", "sinks:3+dilated:2,1500",
                                        "global:1700", "full+chunk:1200"};
    for (int k = 0; k < 15; k++) {
        struct visible_set set = {0};
        assert_int_equal(visible_parse(rules[k % 5], &set, NULL), TRIL_OK);
        struct problem p = {.sequences = 1,
                            .q_length = {k < 5    ? 1
                                         : k < 10 ? 7
                                                  : 30},
                            .kv_length = {5000},
                            .heads = 2,
                            .kv_heads = 1,
                            .width = 16,
                            .rules = 1,
                            .rule = {set.rules[0]},
                            .seed = k};
        problem_make(&p);
        problem_forward(&p, true);
        double *ref = tensor_values(&p.o);
        plain(&p, false);
        double *textbook = tensor_values(&p.o);
        threads_set(1);
        problem_forward(&p, false);
        double *one = tensor_values(&p.o);
        check_rule("o", &p, ref, textbook, one, tensor_elements(&p.o), 2);
        for (int threads = 2; threads <= 5; threads++) {
            threads_set(threads);
            problem_forward(&p, false);
            double *many = tensor_values(&p.o);
            for (int64_t e = 0; e < tensor_elements(&p.o); e++)
                if (many[e] != one[e])
                    fail_msg("%s: %d threads give other bits", rules[k % 5], threads);
            free(many);
        }
        threads_set(0);
        free(ref);
        free(textbook);
        free(one);
        problem_free(&p);
        visible_set_free(&set);
    }
}

/* Time falls with what is excluded: the kernels must not look at what nobody sees. Keys there are
 * NaN, so looking at one shows. */
static void test_not_touched(void **state) {
    (void)state;
    struct problem p = {
        .sequences = 1,
        .q_length = {4},
        .kv_length = {5000},
        .heads = 2,
        .kv_heads = 1,
        .width = 16,
        .apart = true,
        .rules = 1,
        .rule = {{.causal = true,
                  .parts = 2,
                  .part = {{VISIBLE_WINDOW, 128, 0, NULL}, {VISIBLE_SINKS, 4, 0, NULL}}}}};
    for (int rows = 4; rows <= 100; rows += 96) { /* direct, packed */
        p.q_length[0] = rows;
        problem_make(&p);
        int first = 5000 - rows - 127; /* key blocks of 64 that hold a visible key stay */
        for (int64_t j = 64; j < first / 64 * 64; j++)
            for (int t = 0; t < 16; t++) {
                element_set(&p.k, j, 0, t, NAN);
                element_set(&p.v, j, 0, t, NAN);
            }
        problem_forward(&p, false);
        for (int64_t n = 0; n < rows; n++)
            for (int h = 0; h < 2; h++)
                for (int t = 0; t < 16; t++)
                    assert_true(isfinite(element_get(&p.o, n, h, t)));
        problem_backward(&p, false);
        for (int64_t n = 0; n < rows; n++)
            for (int h = 0; h < 2; h++)
                for (int t = 0; t < 16; t++)
                    assert_true(isfinite(element_get(&p.dq, n, h, t)));
        for (int64_t j = 64; j < first / 64 * 64; j++)
            assert_true(element_get(&p.dk, j, 0, 0) == 0 && element_get(&p.dv, j, 0, 3) == 0);
        problem_free(&p);
    }
}

static void test_refusals(void **state) {
    (void)state;
    struct problem p = {
        .sequences = 1,
        .q_length = {20},
        .kv_length = {20},
        .heads = 3,
        .kv_heads = 1,
        .width = 8,
        .bias_heads = 3,
        .with_sink = true,
        .rules = 1,
        .rule = {{.causal = true, .parts = 1, .part = {{VISIBLE_WINDOW, 128, 0, NULL}}}}};
    problem_make(&p);
    struct tril_error err = {0};
    assert_int_equal(problem_try_forward(&p, false, &err), TRIL_OK);
    p.rule[0].part[0].a = 0;
    assert_int_equal(problem_try_forward(&p, false, &err), TRIL_ERR_ARGUMENT);
    assert_int_equal(problem_try_backward(&p, false, &err), TRIL_ERR_ARGUMENT);
    p.rule[0].part[0].a = 5;
    p.by_head = true;
    p.head_rule[2] = 1; /* there is one rule */
    assert_int_equal(problem_try_forward(&p, false, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "head 2"));
    p.by_head = false;
    struct tensor bias = p.bias;
    p.bias.shape[0] = p.dbias.shape[0] = 2;
    assert_int_equal(problem_try_forward(&p, false, &err), TRIL_ERR_ARGUMENT);
    p.bias = bias;
    p.dbias.shape[0] = 3;
    p.bias.shape[1] = 19;
    assert_int_equal(problem_try_forward(&p, false, &err), TRIL_ERR_ARGUMENT);
    p.bias = tensor_none();
    assert_int_equal(problem_try_backward(&p, false, &err), TRIL_ERR_ARGUMENT);
    p.dbias = tensor_none();
    p.sink = tensor_none();
    assert_int_equal(problem_try_backward(&p, false, &err), TRIL_ERR_ARGUMENT);
    p.dsink = tensor_none();
    assert_int_equal(problem_try_backward(&p, false, &err), TRIL_OK);
    problem_free(&p);
    /* A missing page that somebody sees. */
    struct problem paged = {
        .sequences = 1,
        .q_length = {2},
        .kv_length = {100},
        .heads = 1,
        .kv_heads = 1,
        .width = 8,
        .page_size = 10,
        .rules = 1,
        .rule = {{.causal = true, .parts = 1, .part = {{VISIBLE_WINDOW, 10, 0, NULL}}}}};
    problem_make(&paged);
    int32_t *pages = paged.pages.data;
    pages[0] = pages[7] = -1;
    assert_int_equal(problem_try_forward(&paged, false, &err), TRIL_OK);
    pages[8] = -1; /* row 98 sees keys 89 .. 98 */
    assert_int_equal(problem_try_forward(&paged, false, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "page 8"));
    problem_free(&paged);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random),   cmocka_unit_test(test_long),
        cmocka_unit_test(test_splits),   cmocka_unit_test(test_not_touched),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
