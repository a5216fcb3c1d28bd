// ctest: timeout=120
/* Decoding over retrieved blocks: all blocks are full attention; fewer find less, but the best. */
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"
#include "infer/session.h"
#include "model/models.h"

static struct tril_error err;

enum { TOKENS = 150, V = 19 };

static int32_t token(int i) {
    return (int32_t)((i * i + 5 * i + i / 7) % V);
}

/* Logits of every token from `prompt` on, one after the other; returns what was found. */
static double run(const char *mixers, const struct kv_retrieve *r, int prompt,
                  float out[TOKENS][V]) {
    struct op_context ctx;
    struct model *m;
    struct session *s;
    struct model_config c = tiny_llama();
    int32_t ids[TOKENS];
    c.context = TOKENS;
    if (mixers)
        OK(model_config_parse_mixers(&c, mixers, &err));
    OK(op_context_init(&ctx, backend_cpu(), &err));
    OK(model_create(&m, &c, &(struct model_options){.dtype = DT_F32}, &ctx, &err));
    OK(model_init(m, 9, &err));
    if (r)
        OK(session_create_retrieve(&s, m, 0, 0, r, &err));
    else
        OK(session_create(&s, m, 0, 0, &err));
    for (int i = 0; i < TOKENS; i++)
        ids[i] = token(i);
    OK(session_sync(s, ids, prompt, NULL, &err));
    for (int i = prompt; i < TOKENS; i++) {
        OK(session_step(s, ids[i], &err));
        memcpy(out[i], session_logits(s), sizeof out[i]);
    }
    double found = session_found(s);
    session_free(s);
    model_free(m);
    op_context_free(&ctx);
    return found;
}

static double apart(float a[TOKENS][V], float b[TOKENS][V], int prompt) {
    double most = 0;
    for (int i = prompt; i < TOKENS; i++)
        for (int v = 0; v < V; v++)
            most = fmax(most, fabs((double)a[i][v] - (double)b[i][v]));
    return most;
}

static void test_all_blocks(void **state) {
    (void)state;
    static const char *const mixers[] = {NULL, "causal/window:20", "linear/causal"};
    static float full[TOKENS][V], part[TOKENS][V];
    for (int k = 0; k < 3; k++)
        for (int prompt = 1; prompt < 100; prompt += 60) {
            const struct kv_retrieve all = {
                .top = 40, .block = 4, .first = 1, .last = 2, .measure = true};
            assert_true(isnan(run(mixers[k], NULL, prompt, full)));
            double found = run(mixers[k], &all, prompt, part);
            /* Sums of up to 150 terms in another order, twice: 2^-24 each of values up to 10. */
            assert_true(apart(full, part, prompt) <= 2e-4);
            assert_true(fabs(found - 1) <= 1e-5);
        }
}

/* More blocks find more; few of them already find more than their share of the keys. */
static void test_fewer_blocks(void **state) {
    (void)state;
    static float full[TOKENS][V], part[TOKENS][V];
    double before = 0, distance = INFINITY;
    run(NULL, NULL, 60, full);
    for (int64_t top = 1; top <= 32; top *= 2) {
        const struct kv_retrieve r = {
            .top = top, .block = 4, .first = 1, .last = 1, .measure = true};
        double found = run(NULL, &r, 60, part), now = apart(full, part, 60);
        assert_true(found > before && found <= 1 + 1e-5);
        assert_true(found > 4.0 * (double)(top + 1) / TOKENS);
        before = found;
        if (top == 1)
            distance = now;
    }
    assert_true(distance > 1e-3 && apart(full, part, 60) < distance);
}

/* What is measured does not change what is computed. */
static void test_measuring(void **state) {
    (void)state;
    static float a[TOKENS][V], b[TOKENS][V];
    struct kv_retrieve r = {.top = 3, .block = 8, .first = 1, .last = 1};
    assert_true(isnan(run(NULL, &r, 30, a)));
    r.measure = true;
    assert_true(run(NULL, &r, 30, b) > 0);
    for (int i = 30; i < TOKENS; i++)
        assert_memory_equal(a[i], b[i], sizeof a[i]);
}

static void test_refusals(void **state) {
    (void)state;
    struct op_context ctx;
    struct model *m;
    struct kv_cache *c;
    struct model_config config = tiny_llama();
    static const struct kv_retrieve bad[] = {
        {.top = 0, .block = 4, .last = 1},
        {.top = 1, .block = 0, .last = 1},
        {.top = 1, .block = 4, .last = 0},
        {.top = 1, .block = 40, .last = 1},
        {.top = 1, .block = 5, .last = 1} /* two slots of 16 */
    };
    OK(op_context_init(&ctx, backend_cpu(), &err));
    OK(model_create(&m, &config, &(struct model_options){.dtype = DT_F32}, &ctx, &err));
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_int_equal(kv_cache_create_retrieve(&c, m, 2, 16, DT_F32, &bad[i], &err),
                         TRIL_ERR_ARGUMENT);
    model_free(m);
    op_context_free(&ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_blocks),
        cmocka_unit_test(test_fewer_blocks),
        cmocka_unit_test(test_measuring),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
