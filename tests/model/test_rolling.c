// ctest: timeout=120 levels
/* A cache whose layers keep only what their rules still show computes what a whole pass computes,
 * at any length, and takes no more memory for it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "models.h"

static struct tril_error err;

enum { T = 1500, MOST = 40, SLOTS = 3 };

struct subject {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct kv_cache *cache;
    int32_t ids[T];
    float *whole; /* [T, V], of one pass without a cache */
    int64_t V;
    double tol;
};

static void subject_open(struct subject *s, const char *mixers) {
    struct model_config c = tiny_llama();
    c.context = T;
    c.layers = 3;
    c.rope_theta = 10000;
    OK(model_config_parse_mixers(&c, mixers, &err));
    OK(op_context_init(&s->ctx, backend_cpu(), &err));
    OK(model_create(&s->m, &c, &(struct model_options){.dtype = DT_F32}, &s->ctx, &err));
    OK(model_init(s->m, 5, &err));
    struct workspace_options o = {.max_tokens = T, .max_sequences = SLOTS};
    OK(workspace_create(&s->w, s->m, &o, &err));
    OK(kv_cache_create(&s->cache, s->m, SLOTS, T, MOST, DT_F32, &err));
    s->V = c.vocab;
    s->whole = malloc((size_t)(T * s->V) * sizeof *s->whole);
    struct random_key key = {.seed = 9, .op = RANDOM_TEST};
    for (int64_t n = 0; n < T; n++)
        s->ids[n] = (int32_t)(random_uniform(&key, (uint64_t)n) * (float)s->V);
    struct batch b = {.tokens = T, .sequences = 1, .ids = s->ids, .offsets = (int32_t[]){0, T}};
    OK(model_forward(s->m, s->w, &b, s->whole, &err));
    double largest = 0;
    for (int64_t i = 0; i < T * s->V; i++)
        largest = fmax(largest, fabs((double)s->whole[i]));
    /* As in test_forward.c: about ten operations a layer, sums of up to T terms in fp32. */
    s->tol = 32 * sqrt(T) * 0x1p-24 * largest;
}

static void subject_close(struct subject *s) {
    free(s->whole);
    kv_cache_free(s->cache);
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

/* Feeds tokens up to `end` in calls of `step`, comparing each row. */
static void feed(struct subject *s, int32_t slot, int32_t end, int32_t step) {
    float *out = malloc((size_t)(MOST * s->V) * sizeof *out);
    while (s->cache->length[slot] < end) {
        int32_t at = s->cache->length[slot], n = end - at < step ? end - at : step;
        struct batch b = {.tokens = n,
                          .sequences = 1,
                          .ids = s->ids + at,
                          .offsets = (int32_t[]){0, n},
                          .cache = s->cache,
                          .slots = &slot};
        OK(model_forward(s->m, s->w, &b, out, &err));
        for (int64_t i = 0; i < n * s->V; i++)
            if (!(fabs((double)(out[i] - s->whole[at * s->V + i])) <= s->tol))
                fail_msg("token %lld, step %d: %g, not %g", (long long)(at + i / s->V), step,
                         (double)out[i], (double)s->whole[at * s->V + i]);
    }
    free(out);
}

/* Two sequences in slots that do not adjoin, in one call. */
static void feed_two(struct subject *s, int32_t n) {
    float *out = malloc((size_t)(2 * n * s->V) * sizeof *out);
    const int32_t slots[2] = {2, 0};
    int32_t at[2] = {s->cache->length[2], s->cache->length[0]}, *ids = malloc(2 * (size_t)n * 4);
    for (int k = 0; k < 2; k++)
        memcpy(ids + k * n, s->ids + at[k], (size_t)n * sizeof *ids);
    struct batch b = {.tokens = 2 * n,
                      .sequences = 2,
                      .ids = ids,
                      .offsets = (int32_t[]){0, n, 2 * n},
                      .cache = s->cache,
                      .slots = slots};
    OK(model_forward(s->m, s->w, &b, out, &err));
    for (int k = 0; k < 2; k++)
        for (int64_t i = 0; i < n * s->V; i++)
            assert_true(fabs((double)(out[k * n * s->V + i] - s->whole[at[k] * s->V + i])) <=
                        s->tol);
    free(out);
    free(ids);
}

static const char *const mixers[] = {
    "window:100",
    "window:90+sinks:3/causal/chunk:64",
    "linear/0-1=window:60 2-3=dilated:8,9/window:1 no-position",
    "recurrence segment=48 keep=70/causal",
    "memory segment=64 keep=150 top=5/window:30",
    "memory segment=40 keep=33 top=9/recurrence segment=40 keep=40"};

static void test_rolls(void **state) {
    (void)state;
    for (int i = 0; i < (int)(sizeof mixers / sizeof *mixers); i++) {
        struct subject s;
        subject_open(&s, mixers[i]);
        assert_true(s.cache->rolls);
        feed(&s, 0, 700, MOST);
        feed(&s, 0, 760, 1);
        feed(&s, 2, 130, 7);
        feed_two(&s, 13);
        feed(&s, 2, T, MOST);
        feed(&s, 0, T - 20, 31);
        subject_close(&s);
    }
}

/* Going back a little is free; going back to what was given up starts over. */
static void rewind_with(const char *mixer) {
    struct subject s;
    subject_open(&s, mixer);
    feed(&s, 1, 1000, MOST);
    assert_int_equal(kv_cache_rewind(s.cache, 1, 990), 990);
    feed(&s, 1, 1010, 3);
    assert_int_equal(kv_cache_rewind(s.cache, 1, 300), 0);
    feed(&s, 1, 80, MOST);
    assert_int_equal(kv_cache_rewind(s.cache, 1, 10), 10);
    feed(&s, 1, 400, MOST);
    for (int32_t back = 400; back > 0; back -= 23) { /* whatever it says it keeps is there */
        int64_t kept = kv_cache_rewind(s.cache, 1, back);
        assert_true(kept == back || kept == 0);
        feed(&s, 1, 400, MOST);
    }
    struct batch b = {.tokens = MOST + 1,
                      .sequences = 1,
                      .ids = s.ids,
                      .offsets = (int32_t[]){0, MOST + 1},
                      .cache = s.cache,
                      .slots = (int32_t[]){0}};
    assert_int_equal(model_forward(s.m, s.w, &b, NULL, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "several calls"));
    subject_close(&s);
}

static void test_rewind(void **state) {
    (void)state;
    rewind_with("window:100+sinks:2");
    rewind_with("recurrence segment=32 keep=64");
    rewind_with("memory segment=32 keep=70 top=4");
}

/* Greedy generation of as many tokens as the context holds: *out [T]. */
static void generate(struct subject *s, struct kv_cache *cache, int32_t *out) {
    float *logits = malloc((size_t)s->V * sizeof *logits);
    out[0] = 1;
    for (int32_t n = 0; n + 1 < T; n++) {
        struct batch b = {.tokens = 1,
                          .sequences = 1,
                          .ids = out + n,
                          .offsets = (int32_t[]){0, 1},
                          .cache = cache,
                          .slots = (int32_t[]){1}};
        OK(model_forward(s->m, s->w, &b, logits, &err));
        out[n + 1] = 0;
        for (int32_t v = 1; v < s->V; v++)
            if (logits[v] > logits[out[n + 1]])
                out[n + 1] = v;
    }
    free(logits);
}

/* A cache that forgets what no layer sees writes what one that holds everything writes. */
static void test_generation(void **state) {
    (void)state;
    static const char *const recalling[] = {"recurrence segment=48 keep=70",
                                            "memory segment=64 keep=150 top=5"};
    for (int i = 0; i < 2; i++) {
        struct subject s;
        struct kv_cache *whole;
        static int32_t mine[T], theirs[T];
        subject_open(&s, recalling[i]);
        OK(kv_cache_create(&whole, s.m, SLOTS, T, 0, DT_F32, &err));
        assert_true(s.cache->rolls && !whole->rolls);
        generate(&s, s.cache, mine);
        generate(&s, whole, theirs);
        assert_memory_equal(mine, theirs, sizeof mine);
        kv_cache_free(whole);
        subject_close(&s);
    }
}

static void test_size(void **state) {
    (void)state;
    struct model_config c = tiny_llama();
    OK(model_config_parse_mixers(&c, "window:256", &err));
    int64_t short_one = kv_cache_bytes(&c, 1, 4096, 512, DT_F32);
    assert_true(kv_cache_bytes(&c, 1, 1 << 20, 512, DT_F32) == short_one);
    assert_true(kv_cache_bytes(&c, 1, 1 << 20, 0, DT_F32) > 100 * short_one);
    static const char *const recalling[] = {"recurrence segment=128 keep=128",
                                            "memory segment=128 keep=512 top=8"};
    for (int i = 0; i < 2; i++) {
        OK(model_config_parse_mixers(&c, recalling[i], &err));
        assert_true(kv_cache_bytes(&c, 1, 1 << 20, 128, DT_F32) ==
                    kv_cache_bytes(&c, 1, 1 << 13, 128, DT_F32));
        assert_true(kv_cache_bytes(&c, 1, 1 << 20, 0, DT_F32) >
                    100 * kv_cache_bytes(&c, 1, 1 << 20, 128, DT_F32));
    }
    OK(model_config_parse_mixers(&c, "window:256/causal", &err));
    int64_t all = kv_cache_bytes(&c, 1, 1 << 20, 512, DT_F32);
    OK(model_config_parse_mixers(&c, "causal", &err));
    assert_true(all > short_one && all < kv_cache_bytes(&c, 1, 1 << 20, 512, DT_F32) * 51 / 100);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rolls),
        cmocka_unit_test(test_rewind),
        cmocka_unit_test(test_generation),
        cmocka_unit_test(test_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
