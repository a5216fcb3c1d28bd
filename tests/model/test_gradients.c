// ctest: timeout=120
/* Gradients of whole models against finite differences, and what must not change them. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models.h"

static struct tril_error err;

/* Moves every parameter away from the special values of initialisation (zero biases, unit gains).
 */
static void perturb(struct model *m) {
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        float *v = malloc((size_t)n * sizeof *v);
        struct random_key key = {7, 0, (uint32_t)i, RANDOM_TEST};
        OK(model_row_download(m, i, 0, n, v, &err));
        for (int64_t k = 0; k < n; k++)
            v[k] += 0.1f * random_normal(&key, (uint64_t)k);
        OK(model_row_upload(m, i, 0, n, v, DT_F32, &err));
        free(v);
    }
    OK(model_refresh(m, &err));
}

static double loss_of(struct model *m, struct workspace *w, const struct train_call *call) {
    struct batch b = tiny_batch();
    double sum;
    int64_t count;
    OK(model_forward_backward(m, w, &b, call, &sum, &count, &err));
    assert_int_equal(count, 11);
    return sum;
}

/* Central differences in double: with step h the error is about h^2/6 f''' + 2 eps |f| / h. At
 * h = 1e-5, |f| about 40 and f''' up to some 1e3: 2e-8 + 2e-9, so 1e-6 of the largest gradient is
 * ample for true agreement and far below any wrong formula. */
static void check_variant(struct model_config c, const char *name) {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    OK(op_context_init(&ctx, backend_reference(), &err));
    OK(model_create(&m, &c, &(struct model_options){.dtype = DT_F64, .training = true}, &ctx,
                    &err));
    OK(model_init(m, 1, &err));
    perturb(m);
    struct workspace_options o = {.max_tokens = 16, .max_sequences = 4, .backward = true};
    OK(workspace_create(&w, m, &o, &err));
    const double scale = 0.25, h = 1e-5;
    struct train_call call = {.scale = (float)scale, .seed = 11, .step = 3};
    double *p = (double *)(void *)m->master, *g = (double *)(void *)m->gradient;
    double loss = loss_of(m, w, &call);
    double *gradient = malloc((size_t)m->table.elements * sizeof *gradient);
    memcpy(gradient, g, (size_t)m->table.elements * sizeof *g);
    double again = loss_of(m, w, &call); /* accumulates */
    assert_true(again == loss);
    double largest = 0;
    for (int64_t k = 0; k < m->table.elements; k++) {
        assert_true(fabs(g[k] - 2 * gradient[k]) <= 1e-13 * fabs(gradient[k]) + 1e-14);
        largest = fmax(largest, fabs(gradient[k]));
    }
    assert_true(largest > 1e-3);
    for (int64_t k = 0; k < m->table.elements; k++) /* replacing, whatever was there */
        g[k] = NAN;
    struct train_call fresh = call;
    fresh.overwrite = true;
    assert_true(loss_of(m, w, &fresh) == loss);
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        assert_memory_equal(g + r->offset, gradient + r->offset,
                            (size_t)(r->shape[0] * r->shape[1]) * sizeof *g);
    }
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        for (int64_t k = 0; k<n; k += n> 60 ? 7 : 1) {
            double *x = &p[r->offset + k], before = *x;
            *x = before + h;
            double up = loss_of(m, w, &call);
            *x = before - h;
            double down = loss_of(m, w, &call);
            *x = before;
            double expected = scale * (up - down) / (2 * h);
            double error = fabs(gradient[r->offset + k] - expected);
            if (!(error <= 1e-6 * largest))
                fail_msg("%s: %s[%lld]: gradient %.9g, difference %.9g", name, r->parts[0].name,
                         (long long)k, gradient[r->offset + k], expected);
        }
    }
    free(gradient);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
}

static void test_finite_differences(void **state) {
    (void)state;
    for (int i = 0; i < VARIANTS; i++) {
        const char *name;
        struct model_config c = variant(i, &name);
        if (!model_recalls(&c, MIXER_MEMORY)) /* detached: test_recall.c */
            check_variant(c, name);
    }
}

static void test_finite_differences_dropout(void **state) {
    (void)state;
    const char *name;
    for (int i = 0; i < VARIANTS; i += 6) {
        struct model_config c = variant(i, &name);
        c.dropout_embedding = 0.1f;
        c.dropout_attention = 0.3f;
        c.dropout_residual = 0.2f;
        check_variant(c, "with dropout");
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_finite_differences),
        cmocka_unit_test(test_finite_differences_dropout),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
