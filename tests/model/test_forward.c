// ctest: timeout=120 levels
/* One computation, many ways to ask for it: whole, in pieces over a cache, alone or in company. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/threads.h"
#include "cpu/cpu.h"
#include "models.h"

static struct tril_error err;

struct bench {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct kv_cache *cache;
};

#define SLOTS 5

static void setup(struct bench *s, const struct backend *backend, struct model_config c,
                  enum dtype t) {
    OK(op_context_init(&s->ctx, backend, &err));
    OK(model_create(&s->m, &c, &(struct model_options){.dtype = t, .training = false}, &s->ctx,
                    &err));
    OK(model_init(s->m, 21, &err));
    struct workspace_options o = {.max_tokens = 64, .max_sequences = SLOTS, .max_rows = 9};
    OK(workspace_create(&s->w, s->m, &o, &err));
    OK(kv_cache_create(&s->cache, s->m, SLOTS, 16, 0, t, &err));
}

static void teardown(struct bench *s) {
    kv_cache_free(s->cache);
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

/* The models that both tests run over: every variant, and a wider one with odd sizes. */
#define MODELS (VARIANTS + 2)
static struct model_config model_number(int i) {
    const char *name;
    struct model_config c = variant(i < VARIANTS ? i : i == VARIANTS ? 0 : 6, &name);
    if (i >= VARIANTS) {
        c.dim = 72;
        c.head_dim = c.rope_dim = 24;
        if (c.position != POSITION_ROPE)
            c.rope_dim = 0;
        c.ffn = 200;
        c.vocab = 131;
        c.init_std = 0.1f;
    }
    return c;
}

/* Ten operations in a layer and two after; each adds a relative error of about sqrt(n) eps, n its
 * longest sum, to what is at most of the logits' size. */
static double tolerance(const struct model_config *c, enum dtype t, double largest) {
    double eps = t == DT_BF16 ? 0x1p-8 : FLT_EPSILON;
    double longest = (double)(c->ffn > c->dim ? c->ffn : c->dim);
    double accumulated = t == DT_BF16 ? 1 : sqrt(longest); /* sums are in fp32 */
    return (10.0 * (double)c->layers + 2) * accumulated * eps * largest;
}

static const int32_t text[20] = {3, 0, 18, 7, 3, 11, 5, 5, 9, 1, 16, 2, 18, 4, 4, 12, 8, 0, 1, 6};

static float *full_logits(struct bench *s, int32_t T) {
    int64_t V = s->m->config.vocab;
    float *out = malloc((size_t)(T * V) * sizeof *out);
    struct batch b = {.tokens = T, .sequences = 1, .ids = text, .offsets = (int32_t[]){0, T}};
    OK(model_forward(s->m, s->w, &b, out, &err));
    return out;
}

static double largest_of(const float *x, int64_t n) {
    double largest = 0;
    for (int64_t i = 0; i < n; i++) {
        assert_true(isfinite(x[i]));
        largest = fmax(largest, fabs((double)x[i]));
    }
    return largest;
}

static void compare(const float *a, const float *b, int64_t n, double tol, bool bits,
                    const char *what, int model) {
    for (int64_t i = 0; i < n; i++)
        if (bits ? memcmp(&a[i], &b[i], sizeof *a) != 0 : !(fabs((double)(a[i] - b[i])) <= tol))
            fail_msg("model %d, %s: element %lld is %.9g, not %.9g (tolerance %g)", model, what,
                     (long long)i, (double)a[i], (double)b[i], bits ? 0 : tol);
}

/* Full forward = prefill in pieces = one token at a time. On the reference backend, which adds in
 * one order always, to the bit; elsewhere a kernel may cut its sums differently. */
static void check_decode(const struct backend *backend, enum dtype t) {
    for (int i = 0; i < MODELS; i++) {
        struct bench s;
        struct model_config c = model_number(i);
        setup(&s, backend, c, t);
        /* Sums pass from call to call in fp32, not in double. */
        const bool bits = backend == backend_reference() && !s.cache->sums;
        int64_t V = c.vocab;
        float *full = full_logits(&s, 16), *out = malloc((size_t)(16 * V) * sizeof *out);
        double tol = tolerance(&c, t, largest_of(full, 16 * V));
        /* one by one in slot 0 */
        for (int32_t n = 0; n < 16; n++) {
            struct batch b = {.tokens = 1,
                              .sequences = 1,
                              .ids = text + n,
                              .offsets = (int32_t[]){0, 1},
                              .cache = s.cache,
                              .slots = (int32_t[]){0}};
            OK(model_forward(s.m, s.w, &b, out, &err));
            compare(out, full + n * V, V, tol, bits, "decode", i);
        }
        assert_int_equal(s.cache->length[0], 16);
        /* 7 + 1 + 8 in slot 3; only the last row is wanted, then two in reverse order */
        const int32_t cuts[] = {0, 7, 8, 16};
        for (int k = 0; k < 3; k++) {
            int32_t n = cuts[k + 1] - cuts[k], wanted[2] = {n - 1, 0};
            struct batch b = {.tokens = n,
                              .sequences = 1,
                              .ids = text + cuts[k],
                              .offsets = (int32_t[]){0, n},
                              .cache = s.cache,
                              .slots = (int32_t[]){3},
                              .rows = wanted,
                              .row_count = k == 2 ? 2 : 1};
            OK(model_forward(s.m, s.w, &b, out, &err));
            compare(out, full + (cuts[k + 1] - 1) * V, V, tol, bits, "prefill", i);
            if (k == 2)
                compare(out + V, full + cuts[k] * V, V, tol, bits, "prefill, first row", i);
        }
        /* filling the cache without logits, then going back and on */
        struct batch b = {.tokens = 12,
                          .sequences = 1,
                          .ids = text,
                          .offsets = (int32_t[]){0, 12},
                          .cache = s.cache,
                          .slots = (int32_t[]){1}};
        OK(model_forward(s.m, s.w, &b, NULL, &err));
        int32_t kept = (int32_t)kv_cache_rewind(s.cache, 1, 5);
        assert_int_equal(kept, s.cache->sums ? 0 : 5);
        assert_int_equal(s.cache->length[1], kept);
        if (kept < 5) { /* sums cannot be undone */
            b.tokens = 5;
            b.offsets = (int32_t[]){0, 5};
            OK(model_forward(s.m, s.w, &b, NULL, &err));
        }
        b.ids = text + 5;
        b.tokens = 1;
        b.offsets = (int32_t[]){0, 1};
        OK(model_forward(s.m, s.w, &b, out, &err));
        compare(out, full + 5 * V, V, tol, bits, "after going back", i);
        free(full);
        free(out);
        teardown(&s);
    }
}

static void test_decode_reference(void **state) {
    (void)state;
    check_decode(backend_reference(), DT_F32);
    check_decode(backend_reference(), DT_BF16);
}

static void test_decode_cpu(void **state) {
    (void)state;
    check_decode(backend_cpu(), DT_F32);
    check_decode(backend_cpu(), DT_BF16);
}

/* Four sequences at different stages in one call: each gets the bits that it gets alone. */
static void check_company(const struct backend *backend, enum dtype t) {
    for (int i = 0; i < MODELS; i++) {
        struct bench s;
        setup(&s, backend, model_number(i), t);
        int64_t V = s.m->config.vocab;
        const int32_t past[4] = {9, 0, 3, 1}, now[4] = {1, 7, 1, 13};
        float *alone[4], *out = malloc((size_t)(22 * V) * sizeof *out);
        struct batch b = {.sequences = 1, .cache = s.cache};
        for (int32_t k = 0; k < 4; k++) {
            alone[k] = malloc((size_t)(now[k] * V) * sizeof *out);
            for (int run = 0; run < 2; run++) {
                int32_t slot = run ? k : 4; /* the first time in slot 4, alone to the end */
                assert_int_equal(kv_cache_rewind(s.cache, slot, 0), 0);
                b.slots = &slot;
                if (past[k]) {
                    b.tokens = past[k];
                    b.ids = text + k;
                    b.offsets = (int32_t[]){0, past[k]};
                    OK(model_forward(s.m, s.w, &b, NULL, &err));
                }
                if (run)
                    continue;
                b.tokens = now[k];
                b.ids = text + 1 + k;
                b.offsets = (int32_t[]){0, now[k]};
                OK(model_forward(s.m, s.w, &b, alone[k], &err));
            }
        }
        int32_t ids[22], offsets[5] = {0}, slots[4] = {0, 1, 2, 3};
        for (int k = 0; k < 4; k++) {
            memcpy(ids + offsets[k], text + 1 + k, (size_t)now[k] * sizeof *ids);
            offsets[k + 1] = offsets[k] + now[k];
        }
        struct batch all = {.tokens = 22,
                            .sequences = 4,
                            .ids = ids,
                            .offsets = offsets,
                            .cache = s.cache,
                            .slots = slots};
        OK(model_forward(s.m, s.w, &all, out, &err));
        for (int k = 0; k < 4; k++) {
            compare(out + offsets[k] * V, alone[k], now[k] * V, 0, true, "in company", i);
            free(alone[k]);
        }
        free(out);
        teardown(&s);
    }
}

static void test_company(void **state) {
    (void)state;
    check_company(backend_reference(), DT_F32);
    check_company(backend_cpu(), DT_F32);
    check_company(backend_cpu(), DT_BF16);
}

/* Sequences packed into one call without a cache do not see each other either. */
static void test_packed(void **state) {
    (void)state;
    for (int i = 0; i < MODELS; i++) {
        struct bench s;
        setup(&s, backend_cpu(), model_number(i), DT_F32);
        int64_t V = s.m->config.vocab;
        float *packed = malloc((size_t)(TINY_TOKENS * V) * sizeof *packed);
        float *alone = malloc((size_t)(TINY_TOKENS * V) * sizeof *alone);
        struct batch b = tiny_batch();
        OK(model_forward(s.m, s.w, &b, packed, &err));
        for (int k = 0; k < 3; k++) {
            int32_t n = tiny_offsets[k + 1] - tiny_offsets[k];
            struct batch one = {.tokens = n,
                                .sequences = 1,
                                .ids = tiny_ids + tiny_offsets[k],
                                .offsets = (int32_t[]){0, n}};
            OK(model_forward(s.m, s.w, &one, alone, &err));
            compare(packed + tiny_offsets[k] * V, alone, n * V, 0, true, "packed", i);
        }
        free(packed);
        free(alone);
        teardown(&s);
    }
}

/* The loss is that of the logits, whatever the workspace, and its rows add up to it. */
static void test_loss(void **state) {
    (void)state;
    for (int i = 0; i < MODELS; i++) {
        struct bench s;
        struct model_config c = model_number(i);
        setup(&s, backend_cpu(), c, DT_F32);
        int64_t V = c.vocab, count;
        struct batch b = tiny_batch();
        float *logits = malloc((size_t)(TINY_TOKENS * V) * sizeof *logits), rows[TINY_TOKENS];
        double sum, expected = 0, sum_of_rows = 0;
        OK(model_forward(s.m, s.w, &b, logits, &err));
        OK(model_loss(s.m, s.w, &b, &sum, &count, rows, &err));
        assert_int_equal(count, 11);
        double tol = 0x1p-22 * (1 + largest_of(logits, TINY_TOKENS * V)); /* of one row */
        for (int n = 0; n < TINY_TOKENS; n++) {
            double total = 0, loss = 0;
            for (int64_t v = 0; v < V; v++)
                total += exp((double)logits[n * V + v]);
            if (tiny_targets[n] >= 0)
                loss = log(total) - (double)logits[n * V + tiny_targets[n]];
            assert_true(fabs(rows[n] - loss) <= tol * (1 + fabs(loss)));
            expected += loss;
            sum_of_rows += (double)rows[n];
        }
        assert_true(fabs(sum - expected) <= 11 * tol * (1 + fabs(expected)));
        assert_true(fabs(sum - sum_of_rows) <= 1e-6 * (1 + fabs(sum)));
        free(logits);
        teardown(&s);
    }
}

static void test_threads(void **state) {
    (void)state;
    for (int i = VARIANTS; i < MODELS; i++)
        for (enum dtype t = DT_F32; t <= DT_BF16; t++) {
            struct bench s;
            setup(&s, backend_cpu(), model_number(i), t);
            threads_set(1);
            float *one = full_logits(&s, 16);
            threads_set(2);
            float *two = full_logits(&s, 16);
            float *again = full_logits(&s, 16);
            threads_set(0);
            compare(two, one, 16 * s.m->config.vocab, 0, true, "two threads", i);
            compare(again, two, 16 * s.m->config.vocab, 0, true, "again", i);
            free(one);
            free(two);
            free(again);
            teardown(&s);
        }
}

/* ------------------------------------------------------------------ refusals */

static void refused(tril_status st, tril_status expected, const char *part) {
    assert_int_equal(st, expected);
    if (!strstr(err.message, part))
        fail_msg("the message does not say \"%s\": %s", part, err.message);
}

static void test_refusals(void **state) {
    (void)state;
    struct bench s;
    float *out = malloc(64 * 19 * sizeof *out);
    double sum;
    int64_t count;
    int32_t ids[32] = {0}, targets[32] = {0}, positions[32] = {0};
    setup(&s, backend_cpu(), tiny_gpt2(), DT_F32);
    struct batch good = {.tokens = 8,
                         .sequences = 2,
                         .ids = ids,
                         .offsets = (int32_t[]){0, 3, 8},
                         .targets = targets};
    struct batch b = good;
    OK(model_forward(s.m, s.w, &b, out, &err));

    ids[5] = 19;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "token id 19");
    ids[5] = -1;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "token id -1");
    ids[5] = 0;
    targets[2] = 19;
    refused(model_loss(s.m, s.w, &b, &sum, &count, NULL, &err), TRIL_ERR_ARGUMENT, "target id 19");
    targets[2] = 0;
    b.offsets = (int32_t[]){0, 17};
    b.sequences = 1;
    b.tokens = 17;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "context of 16");
    b = good;
    b.offsets = (int32_t[]){0, 0, 8};
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "empty");
    b.offsets = (int32_t[]){0, 3, 7};
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "offsets");
    b = good;
    b.tokens = 0;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "empty");
    b = good;
    b.tokens = 65;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "workspace");
    b = good;
    positions[4] = 16;
    b.positions = positions;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "position 16");
    b = good;
    b.rows = (int32_t[]){8};
    b.row_count = 1;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "row 8");
    b = good;
    b.cache = s.cache;
    b.slots = (int32_t[]){2, 2};
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "two sequences");
    b.slots = (int32_t[]){2, SLOTS};
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "slot 5");
    b.slots = (int32_t[]){2, 0};
    s.cache->length[0] = 12;
    refused(model_forward(s.m, s.w, &b, out, &err), TRIL_ERR_ARGUMENT, "12 of 16");
    assert_int_equal(s.cache->length[0], 12); /* nothing moved */
    assert_int_equal(s.cache->length[2], 0);
    s.cache->length[0] = 0;
    OK(model_forward(s.m, s.w, &b, out, &err));
    assert_int_equal(s.cache->length[0], 5);

    struct workspace *w;
    struct workspace_options o = {.max_tokens = 8, .max_sequences = 1, .backward = true};
    refused(workspace_create(&w, s.m, &o, &err), TRIL_ERR_ARGUMENT, "inference");
    o.backward = false;
    o.max_tokens = (int64_t)1 << 40;
    refused(workspace_create(&w, s.m, &o, &err), TRIL_ERR_ARGUMENT, "not possible");
    struct train_call call = {.scale = 1};
    assert_int_not_equal(model_forward_backward(s.m, s.w, &good, &call, &sum, &count, &err), 0);
    struct kv_cache *c;
    refused(kv_cache_create(&c, s.m, 1 << 20, 1 << 20, 0, DT_F32, &err), TRIL_ERR_ARGUMENT,
            "not possible");
    struct model *m;
    refused(model_create(&m, &s.m->config,
                         &(struct model_options){.dtype = DT_I8, .training = false}, &s.ctx, &err),
            TRIL_ERR_UNSUPPORTED, "i8");
    free(out);
    teardown(&s);
}

/* ------------------------------------------------------------------ hooks */

struct seen {
    int count, layers;
    bool logits;
};

static void on_tensor(void *arg, int layer, const char *name, const struct tensor *t) {
    struct seen *seen = arg;
    seen->count++;
    seen->layers = layer + 1 > seen->layers ? layer + 1 : seen->layers;
    if (strcmp(name, "logits") == 0) {
        seen->logits = true;
        assert_int_equal(t->shape[0], 8);
        assert_int_equal(t->shape[1], 19);
    }
    if (strcmp(name, "attention / q") == 0) {
        assert_int_equal(t->rank, 3);
        assert_int_equal(t->shape[1], 3);
        assert_int_equal(t->shape[2], 4);
    }
}

static void test_hook(void **state) {
    (void)state;
    struct bench s;
    struct seen seen = {0};
    float out[8 * 19];
    setup(&s, backend_cpu(), tiny_gpt2(), DT_F32);
    struct batch b = {.tokens = 8, .sequences = 1, .ids = text, .offsets = (int32_t[]){0, 8}};
    workspace_set_hook(s.w, on_tensor, &seen);
    OK(model_forward(s.m, s.w, &b, out, &err));
    assert_true(seen.logits);
    assert_int_equal(seen.layers, 2);
    assert_true(seen.count >= 2 * 8 + 3);
    teardown(&s);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decode_reference),
        cmocka_unit_test(test_decode_cpu),
        cmocka_unit_test(test_company),
        cmocka_unit_test(test_packed),
        cmocka_unit_test(test_loss),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_hook),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
