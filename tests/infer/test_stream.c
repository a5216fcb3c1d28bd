// ctest: timeout=120
/* Streams: against what they are defined as, computed anew for every token; chunks that change
 * nothing; an end that never comes. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "infer/session.h"
#include "model/models.h"

static struct tril_error err;

enum { TOKENS = 90, V = 19 };

static int32_t token(int i) {
    return (int32_t)((i * i + 3 * i + i / 5) % V);
}

static void model_open(struct model **m, struct op_context *ctx, struct model_config c,
                       const struct backend *backend, enum dtype dtype) {
    OK(op_context_init(ctx, backend, &err));
    OK(model_create(m, &c, &(struct model_options){.dtype = dtype}, ctx, &err));
    OK(model_init(*m, 9, &err));
}

/* The tokens that are held once token i is in: the definition, by counting. */
static int held_after(int i, const struct session_stream *t, int32_t *out) {
    int n = 0, full = (int)(t->sinks + t->window);
    for (int k = 0; k <= i; k++) {
        if (n == full) {
            memmove(out + t->sinks, out + t->sinks + t->stride,
                    (size_t)(n - t->sinks - t->stride) * sizeof *out);
            n -= (int)t->stride;
        }
        out[n++] = token(k);
    }
    return n;
}

static const struct session_stream streams[] = {
    {6, 2, 1}, {6, 0, 1}, {9, 3, 4}, {12, 4, 12}, {1, 0, 1},
};
enum { STREAMS = sizeof streams / sizeof streams[0] };

/* In a model of one layer, keys and values depend on nothing but their token (without learned
 * positions): each token's logits are those of a fresh text of what the stream holds, at positions
 * 0, 1, ... */
static void test_one_layer(void **state) {
    (void)state;
    static const enum position_kind positions[] = {POSITION_ROPE, POSITION_ALIBI, POSITION_NONE};
    for (int p = 0; p < 3; p++)
        for (int k = 0; k < STREAMS; k++) {
            struct op_context ctx;
            struct model *m;
            struct session *s, *fresh;
            struct model_config c = tiny_llama();
            c.layers = 1;
            c.position = positions[p];
            model_open(&m, &ctx, c, backend_cpu(), DT_F32);
            OK(session_create_stream(&s, m, &streams[k], 0, &err));
            OK(session_create(&fresh, m, 0, 0, &err));
            for (int i = 0; i < TOKENS; i++) {
                int32_t held[32];
                int64_t n;
                if (i == 0)
                    OK(session_sync(s, &(int32_t){token(0)}, 1, NULL, &err));
                else
                    OK(session_step(s, token(i), &err));
                const int32_t *own = session_tokens(s, &n);
                assert_int_equal(n, held_after(i, &streams[k], held));
                assert_memory_equal(own, held, (size_t)n * sizeof *held);
                OK(session_sync(fresh, held, n, NULL, &err));
                /* A dozen sums of some 20 terms up to 5: errors of 2^-24 each. */
                for (int v = 0; v < V; v++)
                    if (!(fabsf(session_logits(s)[v] - session_logits(fresh)[v]) <= 1e-4f))
                        fail_msg("position %d, stream %d, token %d: %g, by definition %g", p, k, i,
                                 (double)session_logits(s)[v], (double)session_logits(fresh)[v]);
            }
            session_free(s);
            session_free(fresh);
            model_free(m);
            op_context_free(&ctx);
        }
}

/* With several layers: a cache from which this test removes the rows itself, and rotates keys anew
 * from its own formula. */
static void evict_by_hand(struct kv_cache *c, const struct model *m, float *raw[2], int first,
                          int count, int length) {
    const int d = (int)m->config.head_dim, K = (int)m->config.kv_heads, width = K * d;
    const int R = (int)m->config.rope_dim / 2;
    for (int l = 0; l < 2; l++) {
        float *k = c->layer[l].k, *v = c->layer[l].v;
        for (int j = first; j < length - count; j++) {
            memcpy(v + j * width, v + (j + count) * width, (size_t)width * sizeof *v);
            memcpy(raw[l] + j * width, raw[l] + (j + count) * width, (size_t)width * sizeof *v);
            for (int h = 0; h < K; h++)
                for (int i = 0; i < R; i++) {
                    double angle = j * pow((double)m->config.rope_theta, -(double)i / R);
                    const float *x = raw[l] + j * width + h * d;
                    float *y = k + j * width + h * d;
                    y[i] = (float)((double)x[i] * cos(angle) - (double)x[i + R] * sin(angle));
                    y[i + R] = (float)((double)x[i + R] * cos(angle) + (double)x[i] * sin(angle));
                }
        }
    }
    c->length[0] = length - count;
}

struct grab {
    const struct model *m;
    float *raw[2];
    int at;
};
/* Keys before their rotation, out of the pass itself. */
static void grab_keys(void *arg, int layer, const char *name, const struct tensor *t) {
    struct grab *g = arg;
    const struct model_config *c = &g->m->config;
    int width = (int)(c->kv_heads * c->head_dim), skip = (int)(c->heads * c->head_dim);
    if (strcmp(name, "attention / qkv") == 0)
        memcpy(g->raw[layer] + g->at * width, (const float *)t->data + skip,
               (size_t)width * sizeof(float));
}

static void test_layers(void **state) {
    (void)state;
    for (int k = 0; k < STREAMS; k++) {
        const struct session_stream *t = &streams[k];
        struct op_context ctx;
        struct model *m;
        struct session *s;
        struct kv_cache *cache;
        struct workspace *w;
        float raw[2][32 * 12], logits[V];
        model_open(&m, &ctx, tiny_llama(), backend_cpu(), DT_F32);
        struct grab grab = {m, {raw[0], raw[1]}, 0};
        struct workspace_options o = {.max_tokens = 1, .max_sequences = 1};
        OK(session_create_stream(&s, m, t, 0, &err));
        OK(kv_cache_create(&cache, m, 1, 16, 0, DT_F32, &err));
        OK(workspace_create(&w, m, &o, &err));
        workspace_set_hook(w, grab_keys, &grab);
        for (int i = 0; i < TOKENS; i++) {
            int32_t id = token(i), offsets[2] = {0, 1}, slot = 0;
            if (cache->length[0] == t->sinks + t->window)
                evict_by_hand(cache, m, grab.raw, (int)t->sinks, (int)t->stride, cache->length[0]);
            grab.at = cache->length[0];
            struct batch b = {.tokens = 1,
                              .sequences = 1,
                              .ids = &id,
                              .offsets = offsets,
                              .cache = cache,
                              .slots = &slot};
            OK(model_forward(m, w, &b, logits, &err));
            if (i == 0)
                OK(session_sync(s, &id, 1, NULL, &err));
            else
                OK(session_step(s, id, &err));
            for (int v = 0; v < V; v++) /* as above, over two layers */
                if (!(fabsf(session_logits(s)[v] - logits[v]) <= 2e-4f))
                    fail_msg("stream %d, token %d: %g, by hand %g", k, i,
                             (double)session_logits(s)[v], (double)logits[v]);
        }
        session_free(s);
        workspace_free(w);
        kv_cache_free(cache);
        model_free(m);
        op_context_free(&ctx);
    }
}

/* A prompt in any chunks, or token by token: the same held, the same logits; 10 times the context
 * and no end. Learned positions too. */
static void test_chunks(void **state) {
    (void)state;
    static const char *const mixers[] = {
        NULL, NULL, "window:5/causal", "linear/causal",
        "recurrence segment=2 keep=4/memory segment=2 keep=4 top=2"};
    for (int k = 0; k < 5; k++) {
        struct session_stream t = {9, 3, 4};
        struct op_context ctx;
        struct model *m;
        struct session *step, *chunked;
        int32_t ids[160];
        struct model_config c = k == 1 ? tiny_gpt2() : tiny_llama();
        if (mixers[k])
            OK(model_config_parse_mixers(&c, mixers[k], &err));
        if (k == 4)
            t = (struct session_stream){10, 0, 4};
        for (int i = 0; i < 160; i++)
            ids[i] = token(i);
        model_open(&m, &ctx, c, backend_cpu(), DT_F32);
        OK(session_create_stream(&step, m, &t, 0, &err));
        OK(session_create_stream(&chunked, m, &t, 5, &err));
        OK(session_sync(step, ids, 1, NULL, &err));
        for (int i = 1; i < 160; i++) {
            OK(session_step(step, ids[i], &err));
            if (i % 13 && i < 150)
                continue;
            int64_t n, held;
            OK(session_sync(chunked, ids, i + 1, NULL, &err));
            const int32_t *a = session_tokens(step, &held), *b = session_tokens(chunked, &n);
            assert_int_equal(held, n);
            assert_memory_equal(a, b, (size_t)n * sizeof *a);
            for (int v = 0; v < V; v++)
                if (!(fabsf(session_logits(step)[v] - session_logits(chunked)[v]) <= 2e-4f))
                    fail_msg("model %d, token %d: %g in steps, %g in chunks", k, i,
                             (double)session_logits(step)[v], (double)session_logits(chunked)[v]);
        }
        session_free(step);
        session_free(chunked);
        model_free(m);
        op_context_free(&ctx);
    }
}

/* Layers that recall lose nothing in a stream that is wide enough: the same as the whole text. */
static void test_recall_without_loss(void **state) {
    (void)state;
    struct op_context ctx;
    struct model *m;
    struct session *s, *whole;
    struct model_config c = tiny_llama();
    c.context = TOKENS;
    OK(model_config_parse_mixers(&c, "recurrence segment=2 keep=4/memory segment=2 keep=6 top=3",
                                 &err));
    const struct session_stream t = {12, 0, 4};
    model_open(&m, &ctx, c, backend_cpu(), DT_F32);
    OK(session_create_stream(&s, m, &t, 0, &err));
    OK(session_create(&whole, m, 0, 0, &err));
    for (int i = 0; i < TOKENS; i++) {
        int32_t id = token(i);
        if (i == 0) {
            OK(session_sync(s, &id, 1, NULL, &err));
            OK(session_sync(whole, &id, 1, NULL, &err));
        } else {
            OK(session_step(s, id, &err));
            OK(session_step(whole, id, &err));
        }
        for (int v = 0; v < V; v++)
            if (!(fabsf(session_logits(s)[v] - session_logits(whole)[v]) <= 2e-4f))
                fail_msg("token %d: %g streamed, %g whole", i, (double)session_logits(s)[v],
                         (double)session_logits(whole)[v]);
    }
    session_free(s);
    session_free(whole);
    model_free(m);
    op_context_free(&ctx);
}

static void test_refusals(void **state) {
    (void)state;
    struct op_context ctx;
    struct model *m;
    struct session *s;
    static const struct session_stream bad[] = {
        {13, 4, 1}, {8, -1, 1}, {8, 0, 9}, {-1, 0, 1}, {INT64_MAX, 4, 1}};
    model_open(&m, &ctx, tiny_llama(), backend_cpu(), DT_F32);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_int_equal(session_create_stream(&s, m, &bad[i], 0, &err), TRIL_ERR_ARGUMENT);
    model_free(m);
    struct model_config c = tiny_llama();
    OK(model_config_parse_mixers(&c, "recurrence segment=2 keep=4", &err));
    OK(model_create(&m, &c, &(struct model_options){.dtype = DT_F32}, &ctx, &err));
    static const struct session_stream odd[] = {{10, 2, 2}, {10, 0, 3}, {6, 0, 2}, {9, 0, 2}};
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) {
        assert_int_equal(session_create_stream(&s, m, &odd[i], 0, &err), TRIL_ERR_ARGUMENT);
        assert_non_null(strstr(err.message, "segments"));
    }
    model_free(m);
    op_context_free(&ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_layer), cmocka_unit_test(test_layers),
        cmocka_unit_test(test_chunks),    cmocka_unit_test(test_recall_without_loss),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
