// ctest: timeout=120 levels
/* A cache of 8-bit integers under a model: close to the exact one by what rounding keys and values
 * does, the same bits however tokens come, what lies in rolling pages included; and what it is
 * refused for. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "infer/session.h"
#include "model/models.h"

static struct tril_error err;

enum { T = 700, MOST = 50 };

struct subject {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    int32_t ids[T];
    int64_t V;
};

static void subject_open(struct subject *s, const char *mixers, enum dtype dtype) {
    struct model_config c = tiny_llama();
    c.context = T;
    c.layers = 3;
    OK(model_config_parse_mixers(&c, mixers, &err));
    OK(op_context_init(&s->ctx, backend_cpu(), &err));
    OK(model_create(&s->m, &c, &(struct model_options){.dtype = dtype}, &s->ctx, &err));
    OK(model_init(s->m, 5, &err));
    OK(workspace_create(&s->w, s->m,
                        &(struct workspace_options){.max_tokens = T, .max_sequences = 1}, &err));
    s->V = c.vocab;
    struct random_key key = {.seed = 9, .op = RANDOM_TEST};
    for (int n = 0; n < T; n++)
        s->ids[n] = (int32_t)(random_uniform(&key, (uint64_t)n) * (float)s->V);
}

static void subject_close(struct subject *s) {
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

/* Logits [T, V] of all tokens through a new cache, `step` at a time; most as kv_cache_create. */
static float *through(struct subject *s, enum dtype dtype, int64_t most, int step, bool *rolls) {
    struct kv_cache *cache;
    float *out = malloc((size_t)(T * s->V) * sizeof *out);
    assert_non_null(out);
    OK(kv_cache_create(&cache, s->m, 2, T, most, dtype, &err));
    if (rolls)
        *rolls = cache->rolls;
    for (int at = 0; at < T; at += step) {
        int n = T - at < step ? T - at : step;
        struct batch b = {.tokens = n,
                          .sequences = 1,
                          .ids = s->ids + at,
                          .offsets = (int32_t[]){0, n},
                          .cache = cache,
                          .slots = (int32_t[]){1}};
        OK(model_forward(s->m, s->w, &b, out + at * s->V, &err));
    }
    kv_cache_free(cache);
    return out;
}

static const char *const mixers[] = {"causal", "window:100", "window:90+sinks:3/causal/chunk:64",
                                     "linear/window:60 no-position/causal"};

/* The relative error of a head's channels: the largest of d normal numbers is about 3 of their
 * deviations at most 5; steps of largest / 127, evenly distributed errors of step / sqrt(12). Keys
 * and values each bring that to every layer, at most; sums of independent errors. */
static void test_close(void **state) {
    (void)state;
    for (int i = 0; i < (int)(sizeof mixers / sizeof *mixers); i++) {
        struct subject s;
        subject_open(&s, mixers[i], DT_F32);
        float *exact = through(&s, DT_F32, 0, T, NULL), *near = through(&s, DT_I8, 0, T, NULL);
        double sum = 0, size = 0, most = 5 / (127 * sqrt(12)) * sqrt(2 * 3);
        for (int64_t k = 0; k < T * s.V; k++) {
            double e = (double)near[k] - (double)exact[k];
            sum += e * e;
            size += (double)exact[k] * (double)exact[k];
        }
        double error = sqrt(sum / size);
        printf("%s: relative error of the logits %.2g, at most %.2g\n", mixers[i], error, most);
        assert_true(error > 0 && error <= most);
        free(exact);
        free(near);
        subject_close(&s);
    }
}

/* A key's integers do not depend on the call that brings it, nor on where it lies. */
static void test_same(void **state) {
    (void)state;
    for (int i = 0; i < (int)(sizeof mixers / sizeof *mixers); i++) {
        struct subject s;
        bool rolls;
        subject_open(&s, mixers[i], i % 2 ? DT_BF16 : DT_F32);
        float *whole = through(&s, DT_I8, 0, MOST, NULL);
        float *rolled = through(&s, DT_I8, MOST, MOST, &rolls);
        assert_true(rolls == (i > 0));
        assert_memory_equal(whole, rolled, (size_t)(T * s.V) * sizeof *whole);
        free(whole);
        free(rolled);
        subject_close(&s);
    }
}

/* A session that goes back and on has the logits of a fresh one. */
static void test_session(void **state) {
    (void)state;
    struct subject s;
    struct session *one, *fresh;
    subject_open(&s, "causal", DT_F32);
    OK(session_create_as(&one, s.m, 0, MOST, DT_I8, &err));
    OK(session_create_as(&fresh, s.m, 0, MOST, DT_I8, &err));
    OK(session_sync(one, s.ids, 300, NULL, &err));
    int64_t reused;
    OK(session_sync(one, s.ids, 100, &reused, &err));
    assert_int_equal(reused, 99);
    for (int i = 100; i < 120; i++)
        OK(session_step(one, s.ids[i], &err));
    OK(session_sync(fresh, s.ids, 120, NULL, &err));
    for (int64_t v = 0; v < s.V; v++) /* other chunks: as in test_forward.c, not in the cache */
        assert_true(fabs((double)(session_logits(one)[v] - session_logits(fresh)[v])) <=
                    0.02 * (1 + fabs((double)session_logits(fresh)[v])));
    session_free(one);
    session_free(fresh);
    subject_close(&s);
}

static void refused(const char *mixers_, bool retrieve) {
    struct subject s;
    struct kv_cache *c;
    const struct kv_retrieve r = {2, 16, 1, 1, false};
    subject_open(&s, mixers_, DT_F32);
    tril_status st = retrieve ? kv_cache_create_retrieve(&c, s.m, 1, 64, DT_I8, &r, &err)
                     : strcmp(mixers_, "causal") == 0
                         ? kv_cache_create_stream(&c, s.m, 1, 64, DT_I8, &err)
                         : kv_cache_create(&c, s.m, 1, 64, 0, DT_I8, &err);
    assert_int_equal(st, TRIL_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "8 bits"));
    assert_null(c);
    subject_close(&s);
}

static void test_refused(void **state) {
    (void)state;
    refused("causal", true);
    refused("causal", false);
    refused("recurrence segment=48 keep=70", false);
    refused("memory segment=64 keep=150 top=5", false);
}

static void test_size(void **state) {
    (void)state;
    struct model_config c = tiny_llama();
    int64_t d = c.head_dim, four = kv_cache_bytes(&c, 1, 1024, 0, DT_F32);
    assert_true(kv_cache_bytes(&c, 1, 1024, 0, DT_I8) * 4 * d == four * (d + 4));
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_close),   cmocka_unit_test(test_same), cmocka_unit_test(test_session),
        cmocka_unit_test(test_refused), cmocka_unit_test(test_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
