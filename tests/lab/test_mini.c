// ctest: timeout=120
/* The lab's small transformer: its gradients against finite differences, whatever is left out. */
#include "support/support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cpu/cpu.h"
#include "lab/mini.h"

static void check(struct mini_config c, const char *what) {
    struct tril_error err = {0};
    struct op_context ctx;
    struct mini *m;
    double loss, up, down, worst = 0;
    assert_int_equal(op_context_init(&ctx, backend_reference(), &err), TRIL_OK);
    assert_int_equal(mini_create(&m, &c, &ctx, 3, &err), TRIL_OK);
    for (int64_t i = 0; i < c.batch * c.seq; i++) {
        m->ids[i] = (int32_t)(i * 7 % c.vocab);
        m->targets[i] = (int32_t)((i * 5 + 1) % c.vocab);
    }
    /* Larger embeddings than at the start, so that nothing is near a norm's epsilon. */
    for (int64_t i = 0; i < c.vocab * c.dim; i++)
        m->embedding[i] *= 20;
    assert_int_equal(m->ctx->backend->weight_refresh(m->ctx, &m->head, &err), TRIL_OK);
    assert_int_equal(mini_forward(m, true, 5, &loss, &err), TRIL_OK);
    assert_int_equal(mini_backward(m, true, 5, &err), TRIL_OK);
    double norm = 0;
    for (int64_t i = 0; i < m->count; i++)
        norm += (double)m->gradients[i] * (double)m->gradients[i];
    norm = sqrt(norm);
    assert_true(norm > 1e-3);
    /* Along random directions: the loss is summed in double from fp32 activations, so a central
     * difference with step h is good to about 1e-6 / h + h^2. */
    const double h = 3e-3;
    for (int trial = 0; trial < 6; trial++) {
        static float direction[1 << 16], kept[1 << 16];
        assert_true(m->count <= 1 << 16);
        struct random_key key = {.seed = (uint64_t)trial, .op = RANDOM_TEST};
        double along = 0, size = 0;
        random_normal_fill(&key, 0, m->count, direction);
        for (int64_t i = 0; i < m->count; i++) /* half noise, half the gradient itself */
            direction[i] = direction[i] / sqrtf((float)m->count) +
                           m->gradients[i] / (float)norm * (trial % 2 ? 1.0f : 0.0f);
        for (int64_t i = 0; i < m->count; i++) {
            along += (double)direction[i] * (double)m->gradients[i];
            size += (double)direction[i] * (double)direction[i];
        }
        memcpy(kept, m->parameters, (size_t)m->count * sizeof *kept);
        for (int side = 0; side < 2; side++) {
            for (int64_t i = 0; i < m->count; i++)
                m->parameters[i] = kept[i] + (float)(side ? -h : h) * direction[i];
            for (int64_t l = 0; l < c.layers; l++)
                for (int p = 0; p < (c.no_mlp ? 2 : MINI_PARTS); p++)
                    ctx.backend->weight_refresh(&ctx, &m->layer[l].w[p], &err);
            ctx.backend->weight_refresh(&ctx, &m->head, &err);
            assert_int_equal(mini_forward(m, true, 5, side ? &down : &up, &err), TRIL_OK);
        }
        memcpy(m->parameters, kept, (size_t)m->count * sizeof *kept);
        double measured = (up - down) / (2 * h), off = fabs(measured - along);
        double allowed = 2e-3 * norm * sqrt(size) + 5e-4;
        if (off > allowed)
            fail_msg("%s, direction %d: %g measured, %g computed (norm %g)", what, trial, measured,
                     along, norm);
        worst = fmax(worst, off / allowed);
    }
    printf("%-24s gradient norm %.3f, worst %.2f of what is allowed\n", what, norm, worst);
    mini_free(m);
    op_context_free(&ctx);
}

static void test_gradients(void **state) {
    (void)state;
    const struct mini_config base = {.layers = 2,
                                     .dim = 16,
                                     .heads = 2,
                                     .vocab = 23,
                                     .seq = 9,
                                     .batch = 2,
                                     .activation = ACT_GELU_TANH};
    struct mini_config c = base;
    check(c, "everything");
    c.no_mlp = true;
    check(c, "no MLP");
    c = base;
    c.no_residual = true;
    check(c, "no residual");
    c = base;
    c.no_norm = true;
    check(c, "no norm");
    c = base;
    c.no_q = true;
    check(c, "no Q");
    c = base;
    c.no_scale = true;
    check(c, "no scale");
    c = base;
    c.untied = true;
    check(c, "untied");
    c = base;
    c.dropout = 0.3f;
    check(c, "dropout");
    c.no_residual = c.no_norm = c.no_q = c.untied = true;
    check(c, "much left out");
}

static void test_similarity(void **state) {
    (void)state;
    struct tril_error err = {0};
    struct op_context ctx;
    struct mini *m;
    struct mini_config c = {.layers = 1, .dim = 4, .heads = 1, .vocab = 5, .seq = 3, .batch = 1};
    assert_int_equal(op_context_init(&ctx, backend_reference(), &err), TRIL_OK);
    assert_int_equal(mini_create(&m, &c, &ctx, 3, &err), TRIL_OK);
    const float alike[12] = {1, 2, 3, 4, 2, 4, 6, 8, 3, 6, 9, 12};
    memcpy(m->x, alike, sizeof alike);
    assert_true(fabs(mini_similarity(m, 1) - 1) < 1e-9);
    const float across[12] = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0};
    memcpy(m->x, across, sizeof across);
    assert_true(fabs(mini_similarity(m, 1)) < 1e-9);
    mini_free(m);
    op_context_free(&ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_similarity),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
