// ctest: timeout=300 levels
/* All implementations of attention against the double reference, over the registry's cases and over
 * random descriptions (whatever the contract allows together); the same bits for any number of
 * threads; and the weights of attention_probabilities against the output they make. */
#include "support/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/threads.h"
#include "cpu/cpu.h"
#include "ops/attention.h"
#include "support/op_harness.h"

static struct op_context cpu;
static const char *const names[] = {"flash", "fused", "materialised"};

static void call(struct op_run *r, int threads, const char *what) {
    struct tril_error err = {0};
    op_run_restore(r);
    threads_set(threads);
    tril_status st = op_run_call(r, &cpu, WEIGHT_PLAIN, &err);
    threads_set(0);
    if (st != TRIL_OK)
        fail_msg("%s: %s", what, err.message);
}

/* Number of faults of one case in all implementations. */
static int check(enum op_id id, int index, const struct op_case *given, const char *extra) {
    const struct op_info *info = op_info_get(id);
    struct op_case c = *given;
    struct op_run one, more;
    struct op_judge judge;
    int faults = 0;
    op_run_create(&one, info, &c, index % 2 ? PLACE_AFTER_START : PLACE_AT_END, false);
    if (!op_judge_create(&judge, &one))
        fail_msg("%s %s", op_case_describe(info, index, &c), extra);
    op_run_free(&one);
    for (int k = ATTENTION_FLASH; k <= ATTENTION_MATERIALISED; k++) {
        char what[1024];
        snprintf(what, sizeof what, "%s %s %s", names[k], op_case_describe(info, index, &c), extra);
        struct attention_params p;
        memcpy(&p, c.params, sizeof p);
        p.implementation = (enum attention_implementation)k;
        memcpy(c.params, &p, sizeof p);
        op_run_create(&one, info, &c, index % 2 ? PLACE_AFTER_START : PLACE_AT_END, false);
        op_run_create(&more, info, &c, index % 2 ? PLACE_AFTER_START : PLACE_AT_END, false);
        call(&one, 1, what);
        faults += op_judge_count(&judge, &one, what);
        for (int threads = 2; threads <= 5; threads += 3) {
            call(&more, threads, what);
            if (!op_run_same_bits(&one, &more)) {
                fprintf(stderr, "%s: %d threads give different bits\n", what, threads);
                faults++;
            }
        }
        op_run_free(&one);
        op_run_free(&more);
    }
    op_judge_free(&judge);
    return faults;
}

static void test_registry_cases(void **state) {
    (void)state;
    int faults = 0;
    for (int backward = 0; backward < 2; backward++) {
        enum op_id id = backward ? OP_ATTENTION_BACKWARD : OP_ATTENTION_FORWARD;
        struct op_case c;
        for (int index = 0; op_info_get(id)->test_case(index, &c); index++)
            faults += check(id, index, &c, "");
    }
    assert_int_equal(faults, 0);
}

/* ------------------------------------------------------------------ random descriptions */

struct dice {
    struct random_key key;
    uint64_t element;
};
static int64_t roll(struct dice *d, int64_t sides) {
    return (int64_t)random_below(&d->key, d->element++, (uint64_t)sides);
}

/* A rule of one to three parts, as text. */
static void random_rule(struct dice *d, char *text, size_t size) {
    size_t used = (size_t)snprintf(text, size, "%s", roll(d, 3) ? "causal" : "full");
    for (int64_t parts = roll(d, 4); parts > 0; parts--) {
        int a = (int)roll(d, 40) + 1, b = (int)roll(d, 6) + 1;
        switch (roll(d, 7)) {
        case 0:
            used += (size_t)snprintf(text + used, size - used, "+window:%d", a);
            break;
        case 1:
            used += (size_t)snprintf(text + used, size - used, "+sinks:%d", b);
            break;
        case 2:
            used += (size_t)snprintf(text + used, size - used, "+global:%d,%d", a, a + b);
            break;
        case 3:
            used += (size_t)snprintf(text + used, size - used, "+dilated:%d,%d", b, b);
            break;
        case 4:
            used += (size_t)snprintf(text + used, size - used, "+strided:%d", a);
            break;
        case 5:
            used += (size_t)snprintf(text + used, size - used, "+fixed:%d,%d", a + 6, b);
            break;
        default:
            used += (size_t)snprintf(text + used, size - used, "+chunk:%d", a);
            break;
        }
    }
}

static void drop_argument(struct op_case *c, const struct op_info *info, const char *name) {
    int i = op_arg_find(info, name);
    if (i >= 0)
        c->absent |= 1u << i;
}

static void check_random(enum op_id id, int seed) {
    const struct op_info *info = op_info_get(id);
    bool backward = id == OP_ATTENTION_BACKWARD;
    struct dice d = {.key = {.seed = (uint64_t)seed, .op = RANDOM_TEST, .layer = backward}};
    struct op_case c;
    info->test_case(0, &c);
    struct attention_params p;
    memcpy(&p, c.params, sizeof p);
    struct visible_set set = {0};
    char text[512] = "", rule[256];
    int64_t kv_heads = roll(&d, 3) + 1, heads = kv_heads * (roll(&d, 3) + 1);
    bool paged = !backward && roll(&d, 5) == 0;
    c.size['S'] = roll(&d, 3) + 1;
    c.size['K'] = kv_heads;
    c.size['H'] = heads;
    c.size['d'] = roll(&d, 4) ? roll(&d, 20) + 1 : roll(&d, 70) + 1;
    c.size['N'] = roll(&d, 3) ? roll(&d, 30) + 1 : roll(&d, 110) + 1;
    c.size['M'] = roll(&d, 3) ? roll(&d, 60) + 1 : roll(&d, 200) + 1;
    if (paged) {
        c.size['P'] = roll(&d, 5) + 1;
        c.size['M'] = 16 * c.size['S'] * c.size['P'];
        p.page_size = 16;
    } else
        drop_argument(&c, info, "pages");
    p.scale = 1 / sqrtf((float)c.size['d']);
    p.causal = roll(&d, 2);
    p.softcap = roll(&d, 3) ? 0 : 1.5f;
    p.dropout = roll(&d, 3) ? 0 : 0.2f;
    c.act = roll(&d, 3) ? DT_F32 : DT_BF16;
    c.absent = c.strided = 0;
    memset(c.dtype, 0, sizeof c.dtype);
    if (!paged)
        drop_argument(&c, info, "pages");
    if (roll(&d, 2))
        drop_argument(&c, info, "slopes");
    if (roll(&d, 2)) {
        drop_argument(&c, info, "sink");
        drop_argument(&c, info, "dsink");
    }
    if (roll(&d, 2)) {
        drop_argument(&c, info, "bias");
        drop_argument(&c, info, "dbias");
    }
    c.size['G'] = roll(&d, 2) ? heads : 1;
    c.size['A'] = c.size['N'] + roll(&d, 3);
    c.size['U'] = c.size['M'] + roll(&d, 3);
    if (!backward && roll(&d, 4) == 0)
        c.dtype[F_K] = c.dtype[F_V] = DT_I8 + 1;
    else {
        drop_argument(&c, info, "k_scale");
        drop_argument(&c, info, "v_scale");
    }
    for (int i = 0; i < info->arg_count; i++)
        if (info->args[i].strided && roll(&d, 3) == 0)
            c.strided |= 1u << i;
    if (roll(&d, 4)) {
        struct tril_error err = {0};
        if (heads > 1 && roll(&d, 2)) { /* two rules */
            random_rule(&d, rule, sizeof rule);
            int cut = (int)roll(&d, heads - 1);
            size_t used = (size_t)snprintf(text, sizeof text, "0-%d=%s ", cut, rule);
            random_rule(&d, rule, sizeof rule);
            snprintf(text + used, sizeof text - used, "%d-%d=%s", cut + 1, (int)heads - 1, rule);
        } else
            random_rule(&d, text, sizeof text);
        if (visible_parse(text, &set, &err) != TRIL_OK ||
            visible_set_heads(&set, heads, &err) != TRIL_OK)
            fail_msg("%s: %s", text, err.message);
        p.rules = set.rules;
        p.rule_count = set.rule_count;
        p.head_rule = set.head_rule;
    }
    c.label = "random";
    memcpy(c.params, &p, sizeof p);
    char extra[800];
    snprintf(extra, sizeof extra, "seed %d, rule %s, softcap %g, dropout %g, causal %d", seed, text,
             (double)p.softcap, (double)p.dropout, p.causal);
    int faults = check(id, seed, &c, extra);
    visible_set_free(&set);
    if (faults)
        fail_msg("%d faults with seed %d", faults, seed);
}

static int random_cases(int usual) {
    const char *s = getenv("TRIL_TEST_CASES"); /* more, by hand */
    return s ? atoi(s) : usual;
}

static void test_random_forward(void **state) {
    (void)state;
    for (int seed = 0; seed < random_cases(40); seed++)
        check_random(OP_ATTENTION_FORWARD, seed);
}
static void test_random_backward(void **state) {
    (void)state;
    for (int seed = 0; seed < random_cases(30); seed++)
        check_random(OP_ATTENTION_BACKWARD, seed);
}

/* ------------------------------------------------------------------ evicted pages */

/* Pages whose keys nobody sees may be gone: every implementation gives the same bits without. */
static void test_evicted_pages(void **state) {
    (void)state;
    const struct op_info *info = op_info_get(OP_ATTENTION_FORWARD);
    struct visible_rule rule = {
        .causal = true,
        .parts = 2,
        .part = {{VISIBLE_WINDOW, 20, 0, NULL}, {VISIBLE_SINKS, 3, 0, NULL}}};
    struct op_case c;
    info->test_case(0, &c);
    const char *const unused[] = {"slopes", "bias", "sink", "k_scale", "v_scale", "step"};
    c.absent = 0;
    for (int i = 0; i < 6; i++)
        drop_argument(&c, info, unused[i]);
    c.size['N'] = 5;
    c.size['S'] = 1;
    c.size['P'] = 9;
    c.size['M'] = 16 * 9;
    struct attention_params p;
    memcpy(&p, c.params, sizeof p);
    p.rules = &rule;
    p.rule_count = 1;
    p.page_size = 16;
    for (int k = ATTENTION_FLASH; k <= ATTENTION_MATERIALISED; k++) {
        p.implementation = (enum attention_implementation)k;
        memcpy(c.params, &p, sizeof p);
        struct op_run all, fewer;
        op_run_create(&all, info, &c, PLACE_AT_END, false);
        op_run_create(&fewer, info, &c, PLACE_AT_END, false);
        int32_t *pages = fewer.args[F_PAGES].data, length = *(int32_t *)fewer.args[F_LENGTH].data;
        int gone = 0;
        for (int64_t page = 0; page < 9; page++) {
            int64_t j0 = 16 * page, j1 = j0 + 16 < length ? j0 + 16 : length;
            if (!visible_any(&rule, 0, 5, length - 5, j0, j1)) {
                pages[page] = -1;
                gone++;
            }
        }
        assert_true(gone >= 5);
        op_run_keep(&fewer);
        call(&all, 2, names[k]);
        call(&fewer, 2, names[k]);
        assert_true(op_run_same_bits(&all, &fewer));
        op_run_free(&all);
        op_run_free(&fewer);
    }
}

/* ------------------------------------------------------------------ borrowed memory */

static bool untouched(const struct op_run *r) {
    for (int i = 0; i < r->info->arg_count; i++)
        if (r->memory[i].map &&
            memcmp(r->memory[i].begin, r->memory[i].initial, r->memory[i].bytes) != 0)
            return false;
    return true;
}

/* What a call says it needs is enough; less is refused before anything is written. */
static void check_lent(const struct op_info *info, int index, const struct op_case *c) {
    const char *what = op_case_describe(info, index, c);
    struct op_run own, lent;
    struct op_context ctx;
    struct tril_error err = {0};
    int64_t bytes = -1;
    op_run_create(&own, info, c, PLACE_AT_END, false);
    op_run_create(&lent, info, c, PLACE_AT_END, false);
    call(&own, 2, what);
    threads_set(2);
    assert_int_equal(op_context_init(&ctx, backend_cpu(), NULL), TRIL_OK);
    assert_int_equal(op_scratch_needed(&ctx, info->id, lent.args, c->params, &bytes, &err),
                     TRIL_OK);
    if (!untouched(&lent))
        fail_msg("%s: asking writes", what);
    char *memory = malloc((size_t)bytes + 1);
    assert_non_null(memory);
    if (bytes > 0) { /* else the reference computes this case */
        op_context_lend(&ctx, memory + 1, bytes - 64);
        tril_status st = op_call(&ctx, info->id, lent.args, c->params, &err);
        if (st != TRIL_ERR_MEMORY || !untouched(&lent))
            fail_msg("%s: with too little memory, status %d", what, st);
    }
    op_context_lend(&ctx, memory + 1, bytes);
    if (op_call(&ctx, info->id, lent.args, c->params, &err) != TRIL_OK)
        fail_msg("%s: %s", what, err.message);
    if (!op_run_same_bits(&own, &lent))
        fail_msg("%s: other bits in borrowed memory", what);
    threads_set(0);
    op_context_free(&ctx);
    free(memory);
    op_run_free(&own);
    op_run_free(&lent);
}

static void test_lent(void **state) {
    (void)state;
    int operations = 0;
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *info = op_info_get((enum op_id)id);
        bool chosen = id == OP_ATTENTION_FORWARD || id == OP_ATTENTION_BACKWARD;
        struct op_case c;
        operations += info->scratch_first;
        for (int index = 0; info->scratch_first && info->test_case(index, &c); index++)
            for (int k = ATTENTION_FLASH; k <= (chosen ? ATTENTION_MATERIALISED : 0); k++) {
                if (chosen) {
                    struct attention_params p;
                    memcpy(&p, c.params, sizeof p);
                    p.implementation = (enum attention_implementation)k;
                    memcpy(c.params, &p, sizeof p);
                }
                check_lent(info, index, &c);
            }
    }
    assert_true(operations >= 5);
}

/* ------------------------------------------------------------------ probabilities */

/* o = p v, every row of p adds up to 1 (less with a sink), and what is unseen is exactly 0. */
static void test_weights_make_output(void **state) {
    (void)state;
    enum { N = 150, H = 4, K = 2, D = 16 };
    static float q[N * H * D], k[N * K * D], v[N * K * D], o[N * H * D], lse[H * N], p[N * H * N];
    struct random_key key = {.seed = 4, .op = RANDOM_TEST};
    for (int e = 0; e < N * H * D; e++)
        q[e] = random_normal(&key, (uint64_t)e);
    for (int e = 0; e < N * K * D; e++) {
        k[e] = random_normal(&key, (uint64_t)e + (1u << 20));
        v[e] = random_normal(&key, (uint64_t)e + (1u << 21));
    }
    int32_t offsets[2] = {0, N}, start = 0, length = N, rows[N];
    for (int n = 0; n < N; n++)
        rows[n] = N - 1 - n;
    struct attention_inputs in = {.q = tensor_3d(q, DT_F32, N, H, D),
                                  .k = tensor_3d(k, DT_F32, N, K, D),
                                  .v = tensor_3d(v, DT_F32, N, K, D),
                                  .q_offsets = tensor_1d(offsets, DT_I32, 2),
                                  .kv_start = tensor_1d(&start, DT_I32, 1),
                                  .kv_length = tensor_1d(&length, DT_I32, 1)};
    struct visible_rule window = {
        .causal = true, .parts = 1, .part = {{VISIBLE_WINDOW, 70, 0, NULL}}};
    struct attention_params params = {.scale = 0.25f, .rules = &window, .rule_count = 1};
    struct tril_error err = {0};
    struct tensor to = tensor_3d(o, DT_F32, N, H, D), tl = tensor_2d(lse, DT_F32, H, N);
    params.implementation = ATTENTION_FUSED;
    if (attention_forward(&cpu, &in, to, tl, &params, &err) != TRIL_OK ||
        attention_probabilities(&cpu, &in, tensor_1d(rows, DT_I32, N), tl,
                                tensor_3d(p, DT_F32, N, H, N), &params, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    for (int r = 0; r < N; r++)
        for (int h = 0; h < H; h++) {
            int n = rows[r];
            double sum = 0, out[D] = {0};
            for (int j = 0; j < N; j++) {
                double w = (double)p[(r * H + h) * N + j];
                assert_true((w != 0) == (j <= n && n - j < 70));
                sum += w;
                for (int t = 0; t < D; t++)
                    out[t] += w * (double)v[(j * K + h / (H / K)) * D + t];
            }
            /* Two exponentials and a sum of up to 70 terms, each off by some 2^-24 (d + 8) parts.
             */
            double allowed = 4 * (70 + D + 8) * 0x1p-24;
            assert_true(fabs(sum - 1) <= allowed);
            for (int t = 0; t < D; t++)
                assert_true(fabs(out[t] - (double)o[(n * H + h) * D + t]) <= 5 * allowed);
        }
    rows[3] = N;
    assert_int_equal(attention_probabilities(&cpu, &in, tensor_1d(rows, DT_I32, N), tl,
                                             tensor_3d(p, DT_F32, N, H, N), &params, &err),
                     TRIL_ERR_ARGUMENT);
    rows[3] = 0;
    assert_int_equal(attention_probabilities(&cpu, &in, tensor_1d(rows, DT_I32, N), tl,
                                             tensor_3d(p, DT_F32, N, H, N - 1), &params, &err),
                     TRIL_ERR_ARGUMENT);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    if (op_context_init(&cpu, backend_cpu(), NULL) != TRIL_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_registry_cases),
        cmocka_unit_test(test_random_forward),
        cmocka_unit_test(test_random_backward),
        cmocka_unit_test(test_evicted_pages),
        cmocka_unit_test(test_lent),
        cmocka_unit_test(test_weights_make_output),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&cpu);
    return failed;
}
