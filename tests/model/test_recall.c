// ctest: timeout=120
/* Layers that recall earlier segments: segment by segment with what is carried, against the whole
 * text at once; gradients with a detached past against finite differences; what a batch may not be.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "model/carry.h"
#include "models.h"

static struct tril_error err;

enum { SEGMENT = 4, SEGMENTS = 5, ROWS = 2, LENGTH = SEGMENT * SEGMENTS };

static struct model_config config_of(const char *mixers) {
    struct model_config c = tiny_llama();
    c.context = LENGTH;
    OK(model_config_parse_mixers(&c, mixers, &err));
    return c;
}

/* Within its segment, the layer that is neither sees what the whole text's chunk does. */
static const char *const kinds[] = {
    "recurrence segment=4 keep=4/chunk:4",
    "recurrence segment=4 keep=7",
    "memory segment=4 keep=9 top=3",
    "memory segment=4 keep=64 top=32/recurrence segment=4 keep=6",
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

static int32_t token(int row, int i) {
    return (int32_t)((row * 7 + i * i + i / 3) % 19);
}

struct subject {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct carry *carry;
};

static void subject_open(struct subject *s, struct model_config c, const struct backend *backend,
                         enum dtype dtype, bool training, enum recompute recompute) {
    OK(op_context_init(&s->ctx, backend, &err));
    OK(model_create(&s->m, &c, &(struct model_options){.dtype = dtype, .training = training},
                    &s->ctx, &err));
    for (int i = 0; i < s->m->table.count; i++) { /* away from zeros and ones */
        const struct param_row *r = &s->m->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        float *v = malloc((size_t)n * sizeof *v);
        struct random_key key = {7, 0, (uint32_t)i, RANDOM_TEST};
        for (int64_t k = 0; k < n; k++)
            v[k] = (r->init == INIT_ONE) + 0.3f * random_normal(&key, (uint64_t)k);
        OK(model_row_upload(s->m, i, 0, n, v, DT_F32, &err));
        free(v);
    }
    OK(model_refresh(s->m, &err));
    struct workspace_options o = {.max_tokens = ROWS * LENGTH,
                                  .max_sequences = ROWS,
                                  .backward = training,
                                  .recompute = recompute,
                                  .carry = true};
    OK(workspace_create(&s->w, s->m, &o, &err));
    OK(carry_create(&s->carry, s->m, ROWS, &err));
}

static void subject_close(struct subject *s) {
    carry_free(s->carry);
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

/* Row r's tokens from `begin` on, `n` each. */
struct input {
    int32_t ids[ROWS * LENGTH], targets[ROWS * LENGTH], offsets[ROWS + 1];
};
static struct batch batch_of(struct input *in, int begin, int n) {
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < n; i++) {
            in->ids[r * n + i] = token(r, begin + i);
            in->targets[r * n + i] = token(r, begin + i + 1);
        }
    for (int r = 0; r <= ROWS; r++)
        in->offsets[r] = r * n;
    return (struct batch){.tokens = ROWS * n,
                          .sequences = ROWS,
                          .ids = in->ids,
                          .targets = in->targets,
                          .offsets = in->offsets};
}

/* A text at once, and in segments that carry: the same losses. */
static void check_segments(const struct backend *backend, enum dtype dtype, double tolerance) {
    for (int k = 0; k < KINDS; k++)
        for (int training = 0; training < 2; training++) {
            struct subject s;
            struct input in;
            float whole[ROWS * LENGTH], part[ROWS * SEGMENT];
            double sum;
            int64_t count;
            subject_open(&s, config_of(kinds[k]), backend, dtype, training, RECOMPUTE_NONE);
            struct batch b = batch_of(&in, 0, LENGTH);
            OK(model_loss(s.m, s.w, &b, &sum, &count, whole, &err));
            for (int round = 0; round < 2; round++) {
                double apart = 0;
                for (int g = 0; g < SEGMENTS; g++) {
                    b = batch_of(&in, g * SEGMENT, SEGMENT);
                    b.carry = s.carry;
                    OK(model_loss(s.m, s.w, &b, &sum, &count, part, &err));
                    for (int r = 0; r < ROWS; r++)
                        for (int i = 0; i < SEGMENT; i++) {
                            double x = (double)part[r * SEGMENT + i];
                            double y = (double)whole[r * LENGTH + g * SEGMENT + i];
                            if (!(fabs(x - y) <= tolerance))
                                fail_msg("%s: row %d, token %d: %.8g, at once %.8g", kinds[k], r,
                                         g * SEGMENT + i, x, y);
                            apart = fmax(apart, fabs(x - y));
                        }
                }
                carry_reset(s.carry, -1);
                assert_true(isfinite(apart));
            }
            subject_close(&s);
        }
}

/* fp32: some 2 layers of sums of up to 40 terms of size 1 to 10 in another order, each off by
 * 2^-24: far below 1e-4. bf16: roundings of 2^-9 of values up to 4 in a dozen places. */
static void test_segments(void **state) {
    (void)state;
    check_segments(backend_reference(), DT_F32, 1e-4);
    check_segments(backend_cpu(), DT_F32, 1e-4);
    check_segments(backend_cpu(), DT_BF16, 0.3);
}

/* What is forgotten changes the loss, what lies beyond `keep` does not. */
static void test_reach(void **state) {
    (void)state;
    struct subject s;
    struct input in;
    double kept, sum;
    int64_t count;
    subject_open(&s, config_of("recurrence segment=4 keep=4"), backend_reference(), DT_F32, false,
                 RECOMPUTE_NONE);
    struct batch b;
    for (int g = 0; g < 3; g++) {
        b = batch_of(&in, g * SEGMENT, SEGMENT);
        b.carry = s.carry;
        OK(model_loss(s.m, s.w, &b, &kept, &count, NULL, &err));
    }
    carry_reset(s.carry, 0);
    carry_reset(s.carry, 1);
    OK(model_loss(s.m, s.w, &b, &sum, &count, NULL, &err));
    assert_true(fabs(sum - kept) > 1e-3);
    subject_close(&s);
}

/* The gradient of a segment's loss with its past held still: the carry is put back before each
 * evaluation, so that differences see what the backward pass should. */
static void check_gradients(const char *mixers, enum recompute recompute) {
    struct subject s;
    struct input in;
    double loss, up, down;
    int64_t count;
    subject_open(&s, config_of(mixers), backend_reference(), DT_F64, true, recompute);
    const double h = 1e-5;
    double *p = (double *)(void *)s.m->master, *g = (double *)(void *)s.m->gradient;
    struct batch b;
    for (int part = 0; part < 3; part++) {
        b = batch_of(&in, part * SEGMENT, SEGMENT);
        b.carry = s.carry;
        OK(model_loss(s.m, s.w, &b, &loss, &count, NULL, &err));
    }
    const char *path = test_path("carry.safetensors");
    OK(carry_write(s.carry, path, &err));
    b = batch_of(&in, 3 * SEGMENT, SEGMENT);
    b.carry = s.carry;
    const struct train_call call = {.scale = 1, .overwrite = true};
    OK(model_forward_backward(s.m, s.w, &b, &call, &loss, &count, &err));
    double *gradient = malloc((size_t)s.m->table.elements * sizeof *gradient), largest = 0;
    memcpy(gradient, g, (size_t)s.m->table.elements * sizeof *g);
    for (int64_t k = 0; k < s.m->table.elements; k++)
        largest = fmax(largest, fabs(gradient[k]));
    for (int i = 0; i < s.m->table.count; i++) {
        const struct param_row *r = &s.m->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        for (int64_t k = 0; k<n; k += n> 40 ? 11 : 1) {
            double *x = &p[r->offset + k], before = *x;
            *x = before + h;
            OK(carry_read(s.carry, path, &err));
            OK(model_loss(s.m, s.w, &b, &up, &count, NULL, &err));
            *x = before - h;
            OK(carry_read(s.carry, path, &err));
            OK(model_loss(s.m, s.w, &b, &down, &count, NULL, &err));
            *x = before;
            double expected = (up - down) / (2 * h);
            /* As in test_gradients.c. */
            if (!(fabs(gradient[r->offset + k] - expected) <= 1e-6 * largest))
                fail_msg("%s: %s[%lld]: gradient %.9g, difference %.9g", mixers, r->parts[0].name,
                         (long long)k, gradient[r->offset + k], expected);
        }
    }
    free(gradient);
    subject_close(&s);
}

static void test_gradients(void **state) {
    (void)state;
    for (int k = 0; k < KINDS; k++)
        check_gradients(kinds[k], k == 1   ? RECOMPUTE_FULL
                                  : k == 2 ? RECOMPUTE_SELECTIVE
                                           : RECOMPUTE_NONE);
}

/* Every mode of recomputation gives the same bits. */
static void test_recompute(void **state) {
    (void)state;
    for (int k = 0; k < KINDS; k++) {
        float *first = NULL;
        for (int mode = RECOMPUTE_NONE; mode <= RECOMPUTE_FULL; mode++) {
            struct subject s;
            struct input in;
            double loss;
            int64_t count;
            subject_open(&s, config_of(kinds[k]), backend_cpu(), DT_BF16, true,
                         (enum recompute)mode);
            for (int g = 0; g < 3; g++) {
                struct batch b = batch_of(&in, g * SEGMENT, SEGMENT);
                b.carry = s.carry;
                const struct train_call call = {.scale = 1, .overwrite = true};
                OK(model_forward_backward(s.m, s.w, &b, &call, &loss, &count, &err));
            }
            size_t bytes = (size_t)s.m->table.elements * sizeof *first;
            if (!first) {
                first = malloc(bytes);
                memcpy(first, s.m->gradient, bytes);
            }
            assert_memory_equal(first, s.m->gradient, bytes);
            subject_close(&s);
        }
        free(first);
    }
}

static void test_refusals(void **state) {
    (void)state;
    struct subject s;
    struct input in;
    double loss;
    int64_t count;
    struct model_config c = tiny_gpt2(); /* learned positions */
    OK(model_config_parse_mixers(&c, "recurrence segment=4 keep=4", &err));
    assert_int_equal(model_config_check(&c, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "learned positions"));
    static const char *const bad[] = {
        "recurrence segment=4 keep=4/recurrence segment=8 keep=4",
        "recurrence segment=4 keep=4/recurrence segment=4 keep=8",
        "recurrence segment=4 keep=4 softcap=3",
        "memory segment=4 keep=4 top=2 window:3",
        "memory segment=4 keep=4 top=5000",
        "attention top=4",
        "linear segment=4",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        c = tiny_llama();
        OK(model_config_parse_mixers(&c, bad[i], &err));
        if (model_config_check(&c, &err) != TRIL_ERR_ARGUMENT)
            fail_msg("\"%s\" was taken", bad[i]);
    }
    struct mixer_config m, n;
    char text[MIXER_TEXT];
    assert_int_equal(mixer_parse(&m, "memory segment=x", &err), TRIL_ERR_ARGUMENT);
    OK(mixer_parse(&m, "memory", &err));
    assert_string_equal(mixer_print(&m, text), "memory segment=128 keep=8192 top=32");
    OK(mixer_parse(&n, text, &err));
    assert_true(mixer_equal(&m, &n));
    OK(mixer_parse(&m, "recurrence segment=64", &err));
    assert_string_equal(mixer_print(&m, text), "recurrence segment=64 keep=64");

    subject_open(&s, config_of(kinds[0]), backend_reference(), DT_F32, false, RECOMPUTE_NONE);
    struct batch b = batch_of(&in, 0, SEGMENT - 1);
    b.carry = s.carry;
    assert_int_equal(model_loss(s.m, s.w, &b, &loss, &count, NULL, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "--seq 4"));
    const int32_t twice[ROWS] = {1, 1};
    b = batch_of(&in, 0, SEGMENT);
    b.carry = s.carry;
    b.slots = twice;
    assert_int_equal(model_loss(s.m, s.w, &b, &loss, &count, NULL, &err), TRIL_ERR_ARGUMENT);
    subject_close(&s);
    subject_open(&s, config_of(kinds[1]), backend_reference(), DT_F32, false, RECOMPUTE_NONE);
    b = batch_of(&in, 0, SEGMENT);
    b.carry = s.carry;
    OK(model_loss(s.m, s.w, &b, &loss, &count, NULL, &err));
    const char *path = test_path("other.safetensors");
    OK(carry_write(s.carry, path, &err));
    subject_close(&s);
    subject_open(&s, config_of(kinds[2]), backend_reference(), DT_F32, false, RECOMPUTE_NONE);
    assert_int_equal(carry_read(s.carry, path, &err), TRIL_ERR_FORMAT);
    subject_close(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_segments),  cmocka_unit_test(test_reach),
        cmocka_unit_test(test_gradients), cmocka_unit_test(test_recompute),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
