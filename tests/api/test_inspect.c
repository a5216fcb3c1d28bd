// ctest: timeout=60
/* Looking inside through the public interface: weights whose figures are known, and over-smoothing
 * against its definition, pair by pair. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/device.h"
#include "formats/safetensors.h"
#include "model/model.h"
#include "support/support.h"
#include "tril/inspect.h"

static struct tril_error err;

#define OK(call)                                                                                   \
    do {                                                                                           \
        if ((call) != TRIL_OK)                                                                     \
            fail_msg("%s: %s", #call, err.message);                                                \
    } while (0)

static const struct tril_weight_row *row_named(const struct tril_weights *w, const char *name) {
    for (int64_t i = 0; i < w->count; i++)
        if (strcmp(w->rows[i].name, name) == 0)
            return &w->rows[i];
    fail_msg("no row %s", name);
    return NULL;
}

static void test_weights(void **state) {
    (void)state;
    enum { R = 7, C = 5 };
    /* diagonal: singular values 3, 2, 1, 1/2, 0; outer: u v^T; two: +-1. */
    float diagonal[R * C] = {0}, outer[R * C], two[64], vector[4] = {1, 2, 3, 6};
    uint16_t layers[2][4];
    const float values[C] = {1, 3, 0.5f, 2, 0};
    double u2 = 0, v2 = 0;
    for (int i = 0; i < C; i++)
        diagonal[i * C + i] = values[i];
    for (int i = 0; i < R; i++)
        u2 += (i + 1.0) * (i + 1.0);
    for (int j = 0; j < C; j++)
        v2 += (2.0 - j) * (2.0 - j);
    for (int i = 0; i < R * C; i++)
        outer[i] = (float)((i / C + 1) * (2 - i % C));
    for (int i = 0; i < 64; i++)
        two[i] = i % 2 ? 1.0f : -1.0f;
    for (int l = 0; l < 2; l++)
        for (int i = 0; i < 4; i++)
            layers[l][i] = f32_to_bf16((float)(i % 2 ? l + 1 : -l - 1));
    const struct st_declare d[] = {{"h.10.w", DT_BF16, 2, {2, 2}},  {"h.9.w", DT_BF16, 2, {2, 2}},
                                   {"diagonal", DT_F32, 2, {R, C}}, {"outer", DT_F32, 2, {R, C}},
                                   {"two", DT_F32, 2, {8, 8}},      {"vector", DT_F32, 1, {4}}};
    struct st_writer *writer;
    struct tril_weights w;
    const char *path = test_path("w.safetensors");
    OK(st_writer_open(&writer, path, d, 6, NULL, 0, &err));
    OK(st_writer_write(writer, layers[1], sizeof layers[1], &err));
    OK(st_writer_write(writer, layers[0], sizeof layers[0], &err));
    OK(st_writer_write(writer, diagonal, sizeof diagonal, &err));
    OK(st_writer_write(writer, outer, sizeof outer, &err));
    OK(st_writer_write(writer, two, sizeof two, &err));
    OK(st_writer_write(writer, vector, sizeof vector, &err));
    OK(st_writer_finish(writer, &err));
    OK(tril_inspect_weights(path, test_path("w.csv"), test_path("w.svg"), &w, &err));
    assert_int_equal(w.count, 6);
    assert_string_equal(w.rows[4].name, "h.9.w"); /* layers in order, not names */
    assert_string_equal(w.rows[5].name, "h.10.w");
    assert_int_equal(w.rows[5].layer, 10);
    for (int64_t i = 0; i < w.count; i++) {
        int64_t all = 0;
        for (int b = 0; b < TRIL_WEIGHT_BINS; b++)
            all += w.rows[i].bins[b];
        assert_int_equal(all, w.rows[i].rows * w.rows[i].cols);
    }
    /* The iteration stops when a step changes the value by 1e-5 of it; the next singular value is
     * 2/3, so that what is left is less than as much again. */
    const struct tril_weight_row *r = row_named(&w, "diagonal");
    assert_true(fabs(r->spectral - 3) <= 3 * 2e-5);
    assert_true(fabs(r->stable_rank - (9 + 4 + 1 + 0.25) / 9) <= 1e-4);
    r = row_named(&w, "outer");
    assert_true(fabs(r->spectral - sqrt(u2 * v2)) <= 1e-5 * r->spectral);
    assert_true(fabs(r->stable_rank - 1) <= 1e-4);
    assert_true(fabs(r->mean) <= 1e-12 && r->min == -14 && r->max == 14);
    r = row_named(&w, "two");
    assert_true(r->mean == 0 && r->std == 1 && r->kurtosis == 1 && r->near_zero == 0);
    assert_int_equal(r->bins[TRIL_WEIGHT_BINS * 3 / 8], 32); /* -1 of [-4, 4] */
    r = row_named(&w, "vector");
    assert_true(r->mean == 3 && isnan(r->spectral) && r->rows == 1 && r->cols == 4);
    assert_true(fabs(r->std - sqrt(3.5)) <= 1e-12);
    /* One reach for all layers of a matrix: that of the widest. */
    assert_true(w.rows[4].reach == 8 && w.rows[5].reach == 8);
    tril_weights_free(&w);
    assert_int_equal(tril_inspect_weights(test_path("none"), NULL, NULL, &w, &err), TRIL_ERR_IO);
    assert_int_equal(tril_inspect_weights(NULL, NULL, NULL, &w, &err), TRIL_ERR_ARGUMENT);
}

#define MODEL TEST_GOLDEN_DIR "/models/llama-tiny"
enum { T = 12, MOST = 512 };

struct stream {
    double x[8][T * MOST];
    int64_t D;
};

static void keep(void *arg, int layer, const char *name, const struct tensor *t) {
    struct stream *s = arg;
    if (strcmp(name, "x") != 0 && strncmp(name, "x after", 7) != 0)
        return;
    s->D = t->shape[1];
    assert_true(layer + 1 < 8 && s->D <= MOST);
    for (int64_t i = 0; i < T * s->D; i++)
        s->x[layer + 1][i] = (double)((const float *)t->data)[i];
}

static void test_smoothing(void **state) {
    (void)state;
    static struct stream stream;
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct tril_smoothing s;
    int32_t ids[2 * T];
    OK(device_open(&ctx, "cpu", &err));
    OK(model_load(&m, MODEL, &(struct model_options){.dtype = DT_F32}, &ctx, &err));
    for (int i = 0; i < 2 * T; i++)
        ids[i] = (int32_t)((i * 29 + i * i) % m->config.vocab);
    OK(workspace_create(&w, m, &(struct workspace_options){.max_tokens = T, .max_sequences = 1},
                        &err));
    workspace_set_hook(w, keep, &stream);
    const struct tril_model_source source = {.model = MODEL,
                                             .overrides = tril_model_overrides_none()};
    const struct tril_look_options o = {
        .source = &source, .ids = ids, .id_count = 2 * T, .seq = T, .layer = -1, .head = -1};
    const int64_t V = m->config.vocab, L = m->config.layers;
    float *logits = malloc((size_t)(T * V) * sizeof *logits);
    double due[8] = {0}, residual[8] = {0};
    for (int k = 0; k < 2; k++) { /* two windows, whose means it gives */
        const struct batch b = {
            .tokens = T, .sequences = 1, .ids = ids + k * T, .offsets = (const int32_t[]){0, T}};
        OK(model_forward(m, w, &b, logits, &err));
        for (int64_t l = 0; l <= L; l++) {
            const double *x = stream.x[l];
            const int64_t D = stream.D;
            double left = 0, all = 0;
            for (int i = 0; i < T; i++)
                for (int j = 0; j < T; j++) {
                    double dot = 0, a = 0, c = 0;
                    for (int64_t n = 0; n < D; n++) {
                        dot += x[i * D + n] * x[j * D + n];
                        a += x[i * D + n] * x[i * D + n];
                        c += x[j * D + n] * x[j * D + n];
                    }
                    due[l] += i == j ? 0 : dot / sqrt(a * c) / (T * (T - 1)) / 2;
                }
            for (int64_t n = 0; n < D; n++) {
                double mean = 0;
                for (int i = 0; i < T; i++)
                    mean += x[i * D + n] / T;
                for (int i = 0; i < T; i++) {
                    left += (x[i * D + n] - mean) * (x[i * D + n] - mean);
                    all += x[i * D + n] * x[i * D + n];
                }
            }
            residual[l] += sqrt(left / all) / 2;
        }
    }
    OK(tril_smoothing(&o, 8, NULL, &s, &err));
    assert_int_equal(s.count, L + 1);
    assert_int_equal(s.windows, 2);
    for (int64_t l = 0; l <= L; l++) { /* the same sums in another order, in double */
        assert_true(fabs(s.rows[l].similarity - due[l]) <= 1e-12);
        assert_true(fabs(s.rows[l].residual - residual[l]) <= 1e-7); /* a difference, then a root */
        assert_true(l == 0 ? isnan(s.rows[l].entropy)
                           : s.rows[l].entropy > 0 && s.rows[l].entropy <= s.rows[l].uniform);
    }
    tril_smoothing_free(&s);
    free(logits);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_weights),
        cmocka_unit_test(test_smoothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
