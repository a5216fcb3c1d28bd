// ctest: timeout=120 levels
/* What recomputation, accumulation and a second run must not change: a single bit. */
#include <string.h>

#include "cpu/cpu.h"
#include "models.h"

static struct tril_error err;

struct result {
    double loss;
    float *gradient;
    size_t bytes;
    int64_t workspace;
};

static struct result run(const struct backend *backend, struct model_config c, enum dtype t,
                         enum recompute recompute) {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct result r;
    OK(op_context_init(&ctx, backend, &err));
    OK(model_create(&m, &c, &(struct model_options){.dtype = t, .training = true}, &ctx, &err));
    OK(model_init(m, 5, &err));
    struct workspace_options o = {
        .max_tokens = 20, .max_sequences = 4, .backward = true, .recompute = recompute};
    OK(workspace_create(&w, m, &o, &err));
    struct batch b = tiny_batch();
    struct train_call call = {.scale = 0.5f, .seed = 3, .step = 9};
    int64_t count;
    OK(model_forward_backward(m, w, &b, &call, &r.loss, &count, &err));
    r.bytes = (size_t)m->table.elements * sizeof(float);
    r.gradient = test_malloc(r.bytes);
    OK(backend->download(&ctx, r.gradient, m->gradient, (int64_t)r.bytes, &err));
    r.workspace = workspace_bytes(w);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
    return r;
}

static void compare(const struct backend *backend, enum dtype t, float dropout) {
    for (int i = 0; i < VARIANTS; i++) {
        const char *name;
        struct model_config c = variant(i, &name);
        c.layers = 3;
        c.dropout_embedding = c.dropout_attention = c.dropout_residual = dropout;
        struct result none = run(backend, c, t, RECOMPUTE_NONE);
        for (enum recompute mode = RECOMPUTE_NONE; mode <= RECOMPUTE_FULL; mode++) {
            struct result r = run(backend, c, t, mode);
            if (r.loss != none.loss || memcmp(r.gradient, none.gradient, r.bytes) != 0)
                fail_msg("%s, %s, dropout %g, recompute mode %d: other bits", name, dtype_name(t),
                         (double)dropout, (int)mode);
            assert_true(mode == RECOMPUTE_NONE || r.workspace < none.workspace);
            test_free(r.gradient);
        }
        test_free(none.gradient);
    }
}

static void test_reference(void **state) {
    (void)state;
    compare(backend_reference(), DT_F32, 0);
    compare(backend_reference(), DT_BF16, 0.2f);
}

static void test_cpu_fp32(void **state) {
    (void)state;
    compare(backend_cpu(), DT_F32, 0);
    compare(backend_cpu(), DT_F32, 0.2f);
}

static void test_cpu_bf16(void **state) {
    (void)state;
    compare(backend_cpu(), DT_BF16, 0);
    compare(backend_cpu(), DT_BF16, 0.2f);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_cpu_fp32),
        cmocka_unit_test(test_cpu_bf16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
