// ctest: timeout=120 levels
/* From the first loss, which is known, down to a batch known by heart. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/threads.h"
#include "cpu/cpu.h"
#include "models.h"

static struct tril_error err;

/* Model 3 with small random weights knows nothing: ln V. Logits are sums over D of a residual of
 * size about std (two embeddings) times std: standard deviation sqrt(2 D) std^2, and the expected
 * loss is above ln V by about half their variance; four standard errors cover the sample. */
static void test_initial_loss(void **state) {
    (void)state;
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct model_config c;
    OK(model_config_preset(&c, "model3", &err));
    OK(op_context_init(&ctx, backend_cpu(), &err));
    OK(model_create(&m, &c, &(struct model_options){.dtype = DT_F32, .training = false}, &ctx,
                    &err));
    OK(model_init(m, 1, &err));
    struct workspace_options o = {.max_tokens = 40, .max_sequences = 5};
    OK(workspace_create(&w, m, &o, &err));
    int32_t ids[40], targets[40];
    struct random_key key = {4, 0, 0, RANDOM_TEST};
    for (uint64_t n = 0; n < 40; n++) {
        ids[n] = (int32_t)random_below(&key, 2 * n, (uint64_t)c.vocab);
        targets[n] = (int32_t)random_below(&key, 2 * n + 1, (uint64_t)c.vocab);
    }
    struct batch b = {.tokens = 40,
                      .sequences = 5,
                      .ids = ids,
                      .offsets = (int32_t[]){0, 8, 16, 24, 32, 40},
                      .targets = targets};
    double sum;
    int64_t count;
    OK(model_loss(m, w, &b, &sum, &count, NULL, &err));
    /* the attention's branch adds less than the embeddings: twice their variance bounds all */
    double sd = sqrt(2 * 2 * (double)c.dim) * c.init_std * c.init_std;
    assert_true(fabs(sum / 40 - log((double)c.vocab)) < sd * sd / 2 + 4 * sd / sqrt(40));
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
}

/* Plain gradient descent on one batch; returns the last loss, and the parameters' bytes. */
static double descend(struct model_config c, enum dtype t, int steps, float rate, float *first,
                      float **parameters, size_t *bytes) {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    OK(op_context_init(&ctx, backend_cpu(), &err));
    OK(model_create(&m, &c, &(struct model_options){.dtype = t, .training = true}, &ctx, &err));
    OK(model_init(m, 2, &err));
    struct workspace_options o = {.max_tokens = 16, .max_sequences = 3, .backward = true};
    OK(workspace_create(&w, m, &o, &err));
    struct batch b = tiny_batch();
    double sum = 0;
    int64_t count, n = m->table.elements;
    for (int k = 0; k < steps; k++) {
        struct train_call call = {.scale = 1.0f / 11, .seed = 1, .step = (uint64_t)k};
        OK(ctx.backend->fill_zero(&ctx, m->gradient, n * (int64_t)sizeof(float), &err));
        OK(model_forward_backward(m, w, &b, &call, &sum, &count, &err));
        if (k == 0)
            *first = (float)(sum / (double)count);
        OK(accumulate(&ctx, tensor_1d(m->gradient, DT_F32, n), tensor_1d(m->master, DT_F32, n),
                      -rate, &err));
        OK(model_cast_masters(m, &err));
        OK(model_refresh(m, &err));
    }
    *bytes = (size_t)n * sizeof(float);
    *parameters = malloc(*bytes);
    OK(ctx.backend->download(&ctx, *parameters, m->master, (int64_t)*bytes, &err));
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
    return sum / (double)count;
}

static void test_overfit(void **state) {
    (void)state;
    for (int i = 0; i < VARIANTS; i++) {
        const char *name;
        struct model_config c = variant(i, &name);
        for (enum dtype t = DT_F32; t <= DT_BF16; t++) {
            float first, *p;
            size_t bytes;
            double last = descend(c, t, 400, 0.2f, &first, &p, &bytes);
            /* model 3 has a single layer to do it with */
            if (!(last < (c.ffn_kind == FFN_NONE ? 0.5 : 0.1) * (double)first))
                fail_msg("%s, %s: the loss goes from %g to %g only", name, dtype_name(t),
                         (double)first, last);
            free(p);
        }
    }
}

static void test_same_bits(void **state) {
    (void)state;
    for (int i = 0; i < VARIANTS; i += 6)
        for (enum dtype t = DT_F32; t <= DT_BF16; t++) {
            const char *name;
            struct model_config c = variant(i, &name);
            c.dropout_attention = c.dropout_residual = 0.1f;
            float first, *p[3];
            size_t bytes;
            double loss[3];
            for (int k = 0; k < 3; k++) {
                threads_set(k == 2 ? 1 : 2);
                loss[k] = descend(c, t, 10, 0.1f, &first, &p[k], &bytes);
            }
            threads_set(0);
            assert_true(loss[0] == loss[1]);
            assert_memory_equal(p[0], p[1], bytes);
            /* Chunks of work are fixed, so even another number of threads changes nothing. */
            assert_true(loss[0] == loss[2]);
            assert_memory_equal(p[0], p[2], bytes);
            for (int k = 0; k < 3; k++)
                free(p[k]);
        }
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_initial_loss),
        cmocka_unit_test(test_overfit),
        cmocka_unit_test(test_same_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
