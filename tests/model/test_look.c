// ctest: timeout=120 levels
/* What a look says of a pass = the formulas in double, from the queries and keys of the same pass.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "model/ablate.h"
#include "model/look.h"
#include "models.h"

static struct tril_error err;

enum { T = 13, LAYERS = 3, MOST = 4 * 12 };

/* The queries and keys of every layer, as the other hook shows them. */
struct record {
    double q[LAYERS][T][MOST], k[LAYERS][T][MOST];
};

static void record_hook(void *arg, int layer, const char *name, const struct tensor *t) {
    struct record *r = arg;
    const bool q = strcmp(name, "attention / q") == 0;
    if (!q && strcmp(name, "attention / k") != 0)
        return;
    for (int64_t n = 0; n < t->shape[0]; n++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t c = 0; c < t->shape[2]; c++) {
                int64_t from = n * t->stride[0] + h * t->stride[1] + c;
                double value = t->dtype == DT_F32
                                   ? (double)((const float *)t->data)[from]
                                   : (double)bf16_to_f32(((const uint16_t *)t->data)[from]);
                (q ? r->q : r->k)[layer][n][h * t->shape[2] + c] = value;
            }
}

struct subject {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct look *look;
};

static void subject_open(struct subject *s, const struct backend *b, struct model_config c,
                         enum dtype t, int64_t tokens) {
    OK(op_context_init(&s->ctx, b, &err));
    OK(model_create(&s->m, &c, &(struct model_options){.dtype = t}, &s->ctx, &err));
    OK(model_init(s->m, 5, &err));
    struct workspace_options o = {.max_tokens = tokens, .max_sequences = 2};
    OK(workspace_create(&s->w, s->m, &o, &err));
    OK(look_create(&s->look, s->m, &err));
    OK(workspace_watch_attention(s->w, look_hook, s->look, &err));
    workspace_watch_relative(s->w, look_relative_hook);
}

static void subject_close(struct subject *s) {
    look_free(s->look);
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

/* Of a weight under relative positions: two products of d terms; in bf16 the kernels round q + u
 * and q + w to it first. */
static double relative_error(const struct subject *s, int64_t d, double size) {
    double eps = s->m->dtype == DT_BF16 ? 0x1p-8 : FLT_EPSILON * (double)(4 * d + T + 8);
    return 2 * eps * (size + 1);
}

/* One head against the formulas. */
static void check_head(const struct subject *s, const struct record *r, int l, int64_t head,
                       const char *name) {
    const struct model_config *c = &s->m->config;
    const int64_t d = c->head_dim, kv = head / (c->heads / c->kv_heads);
    float scores[T * T], added[T * T], weights[T * T], part[2 * T], slopes[8];
    uint8_t mask[T * T];
    struct look_head *h;
    struct look_summary due = {0}, got;
    const struct mixer_config *mixer = model_mixer(c, l);
    struct visible_set rules = {0};
    const float *sink = s->look->layer[l].sink;
    assert_int_equal(sink != NULL, mixer->learned_sinks);
    OK(mixer_rules(mixer, c->heads, &rules, &err));
    const struct visible_rule *rule = &rules.rules[rules.head_rule ? rules.head_rule[head] : 0];
    OK(look_head_open(&h, s->look, l, head, &err));
    look_head_scores(h, 0, T, scores);
    memcpy(added, scores, sizeof added);
    look_head_added(h, 0, T, added);
    look_head_mask(h, 0, T, mask);
    OK(look_head_weights(h, 0, T, weights, &err));
    OK(look_head_weights(h, 5, 2, part, &err)); /* some rows alone */
    assert_memory_equal(part, weights + 5 * T, sizeof part);
    model_alibi_slopes(c->heads, slopes);
    double scale = c->scale_attention ? 1 / sqrt((double)d) : 1;
    if (c->scale_by_layer)
        scale /= l + 1;
    for (int i = 0; i < T; i++) {
        double s_ij[T], size = 0, total = sink ? exp((double)sink[head]) : 0, sum = 0;
        bool sees[T];
        for (int j = 0; j < T; j++) {
            double x = 0;
            for (int64_t k = 0; k < d; k++) {
                double term = r->q[l][i][head * d + k] * r->k[l][j][kv * d + k] * scale;
                x += term;
                size += fabs(term);
            }
            /* d products and sums, the scale */
            double allowed = (double)(d + 2) * FLT_EPSILON * (size + 1);
            assert_true(fabs(x - (double)scores[i * T + j]) <= allowed);
            if (mixer->softcap > 0)
                x = (double)mixer->softcap * tanh(x / (double)mixer->softcap);
            if (c->position == POSITION_ALIBI && !mixer->no_position)
                x -= (double)slopes[head] * abs(i - j);
            assert_true(fabs(x - (double)added[i * T + j]) <= allowed + T * FLT_EPSILON);
            sees[j] = visible(rule, i, i, j);
            assert_int_equal(mask[i * T + j], sees[j]);
            s_ij[j] = x;
            total += sees[j] ? exp(x) : 0;
        }
        double entropy = 0, distance = 0, largest = 0, due_sum = 0;
        for (int j = 0; j < T; j++) {
            double p = sees[j] ? exp(s_ij[j]) / total : 0, w = (double)weights[i * T + j];
            /* Errors of the score and of the log-sum-exp of T of them, twice over for kernels that
             * scale by log2(e) first. */
            double relative = 2 * (double)(2 * d + T + 8) * FLT_EPSILON * (size + 1);
            if (!(fabs(p - w) <= relative * p))
                fail_msg("%s, %s, layer %d, head %d: weight %d, %d is %.9g, not %.9g", name,
                         s->ctx.backend->name, l, (int)head, i, j, w, p);
            sum += w;
            due_sum += p;
            entropy -= p > 0 ? p * log(p) : 0;
            distance += p * abs(i - j);
            largest = fmax(largest, p);
        }
        assert_true(sink || fabs(due_sum - 1) < 1e-12);
        assert_true(fabs(sum - due_sum) <= 2 * (double)(2 * d + T + 8) * FLT_EPSILON * (size + 1));
        double seen = 0;
        for (int j = 0; j < T; j++)
            seen += sees[j];
        due.uniform += log(seen) / T;
        due.entropy += entropy / T;
        due.distance += distance / T;
        due.largest += largest / T;
        due.first += sees[0] ? exp(s_ij[0]) / total / T : 0;
        due.self += sees[i] ? exp(s_ij[i]) / total / T : 0;
        due.previous += i && sees[i - 1] ? exp(s_ij[i - 1]) / total / T : 0;
        due.sink += sink ? (1 - due_sum) / T : 0;
    }
    float thumb[25];
    OK(look_summarise(s->look, l, head, &got, thumb, 5, &err));
    const double *a = (const double *)&due, *b = (const double *)&got;
    for (size_t i = 0; i < sizeof due / sizeof *a; i++)
        if (!(fabs(a[i] - b[i]) <= 1e-4 * (1 + fabs(a[i])))) /* means of the above */
            fail_msg("%s: summary %zu is %g, not %g", name, i, b[i], a[i]);
    for (int y = 0; y < 5; y++)
        for (int x = 0; x < 5; x++) {
            float most = 0;
            for (int i = 0; i < T; i++)
                for (int j = 0; j < T; j++)
                    if (i * 5 / T == y && j * 5 / T == x)
                        most = fmaxf(most, weights[i * T + j]);
            assert_true(thumb[y * 5 + x] == most);
        }
    look_head_close(h);
    visible_set_free(&rules);
}

/* Relative positions: the content's part against the formula; and since the log-sum-exp is the
 * pass's own, rows add up to 1 only where the position's part is right too. */
static void check_relative(const struct subject *s, const struct record *r, int l, int64_t head,
                           const char *name) {
    const struct model_config *c = &s->m->config;
    const struct mixer_config *mixer = model_mixer(c, l);
    const int64_t d = c->head_dim, kv = head / (c->heads / c->kv_heads);
    const double scale = 1 / sqrt((double)d);
    const float *u = s->m->vectors[model_row(s->m, PARAM_CONTENT_BIAS, l)] + head * d;
    float scores[T * T], added[T * T], weights[T * T];
    uint8_t mask[T * T];
    struct look_head *h;
    bool differs = false;
    OK(look_head_open(&h, s->look, l, head, &err));
    look_head_scores(h, 0, T, scores);
    memcpy(added, scores, sizeof added);
    look_head_added(h, 0, T, added);
    look_head_mask(h, 0, T, mask);
    OK(look_head_weights(h, 0, T, weights, &err));
    for (int i = 0; i < T; i++) {
        double sum = 0, total = 0, size = 0;
        for (int j = 0; j < T; j++) {
            double x = 0;
            for (int64_t k = 0; k < d; k++) {
                double term =
                    (r->q[l][i][head * d + k] + (double)u[k]) * r->k[l][j][kv * d + k] * scale;
                x += term;
                size += fabs(term);
            }
            assert_true(fabs(x - (double)scores[i * T + j]) <=
                        (double)(d + 3) * FLT_EPSILON * (size + 1));
            const bool sees = j <= i && j >= i / mixer->segment * mixer->segment - mixer->keep;
            assert_int_equal(mask[i * T + j], sees);
            assert_true(sees || (weights[i * T + j] == 0.0f && added[i * T + j] == -INFINITY));
            differs |= sees && fabsf(added[i * T + j] - scores[i * T + j]) > 1e-6f;
            total += sees ? exp((double)added[i * T + j]) : 0;
            sum += (double)weights[i * T + j];
        }
        for (int j = 0; j < T; j++)
            assert_true(!mask[i * T + j] ||
                        fabs(exp((double)added[i * T + j]) / total - (double)weights[i * T + j]) <=
                            relative_error(s, d, size));
        if (!(fabs(sum - 1) <= relative_error(s, d, size)))
            fail_msg("%s, %s: row %d of layer %d, head %d adds up to %.9g", name,
                     s->ctx.backend->name, i, l, (int)head, sum);
    }
    assert_true(differs);
    look_head_close(h);
}

static void test_formulas(void **state) {
    (void)state;
    static struct record r;
    static const int32_t text[T] = {3, 0, 18, 7, 3, 11, 5, 5, 9, 1, 16, 2, 2};
    const struct backend *const backends[] = {backend_reference(), backend_cpu(), backend_cpu()};
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < VARIANTS; i++) {
            struct subject s;
            const char *name;
            float logits[19];
            const int32_t last = T - 1;
            subject_open(&s, backends[k], variant(i, &name), k == 2 ? DT_BF16 : DT_F32, T);
            workspace_set_hook(s.w, record_hook, &r);
            struct batch b = {.tokens = T,
                              .sequences = 1,
                              .ids = text,
                              .offsets = (int32_t[]){0, T},
                              .rows = &last,
                              .row_count = 1};
            OK(model_forward(s.m, s.w, &b, logits, &err));
            for (int l = 0; l < s.m->config.layers; l++) {
                enum mixer_kind kind = model_mixer(&s.m->config, l)->kind;
                /* Of an external memory the attention within the segment is seen. */
                bool shown = kind != MIXER_LINEAR;
                assert_int_equal(s.look->layer[l].seen, shown);
                if (!shown)
                    continue;
                for (int64_t h = 0; h < s.m->config.heads; h++)
                    if (kind == MIXER_RECURRENCE)
                        check_relative(&s, &r, l, h, name);
                    else
                        check_head(&s, &r, l, h, name);
            }
            subject_close(&s);
        }
}

/* Rules, sinks, softcap and a bias, given to the hook by hand. */
static void test_rules(void **state) {
    (void)state;
    enum { N = 9, H = 2, D = 4 };
    struct subject s;
    float q[N * H * D], k[N * D], v[N * D] = {0}, o[N * H * D], lse[H * N], bias[N * N];
    float sink[H] = {0.5f, -1}, weights[N * N];
    uint8_t mask[N * N], head_rule[H] = {1, 0};
    int32_t offsets[2] = {0, N}, start = 0, length = N;
    for (int i = 0; i < N * H * D; i++)
        q[i] = (float)((i * 37 % 23) - 11) / 7;
    for (int i = 0; i < N * D; i++)
        k[i] = (float)((i * 29 % 19) - 9) / 5;
    for (int i = 0; i < N * N; i++)
        bias[i] = i % 11 == 3 ? -INFINITY : (float)(i % 5) / 4;
    struct visible_rule rules[2] = {
        {.causal = true, .parts = 1, .part = {{.kind = VISIBLE_WINDOW, .a = 3}}},
        {.causal = false, .parts = 1, .part = {{.kind = VISIBLE_CHUNK, .a = 4}}}};
    const struct attention_inputs in = {.q = tensor_3d(q, DT_F32, N, H, D),
                                        .k = tensor_3d(k, DT_F32, N, 1, D),
                                        .v = tensor_3d(v, DT_F32, N, 1, D),
                                        .q_offsets = tensor_1d(offsets, DT_I32, 2),
                                        .kv_start = tensor_1d(&start, DT_I32, 1),
                                        .kv_length = tensor_1d(&length, DT_I32, 1),
                                        .bias = tensor_3d(bias, DT_F32, 1, N, N),
                                        .sink = tensor_1d(sink, DT_F32, H)};
    const struct attention_params params = {.scale = 0.7f,
                                            .softcap = 2,
                                            .max_q = N,
                                            .max_kv = N,
                                            .rules = rules,
                                            .rule_count = 2,
                                            .head_rule = head_rule};
    subject_open(&s, backend_cpu(), tiny_gpt2(), DT_F32, T);
    struct tensor l = tensor_2d(lse, DT_F32, H, N);
    OK(attention_forward(&s.ctx, &in, tensor_3d(o, DT_F32, N, H, D), l, &params, &err));
    OK(look_hook(s.look, 0, &in, l, &params, &err));
    assert_false(s.look->layer[1].seen);
    for (int h = 0; h < H; h++) {
        struct look_head *head;
        struct look_summary summary;
        double left = 0;
        int rows = 0;
        OK(look_head_open(&head, s.look, 0, h, &err));
        look_head_mask(head, 0, N, mask);
        OK(look_head_weights(head, 0, N, weights, &err));
        for (int i = 0; i < N; i++) {
            double e[N], total = exp((double)sink[h]), sum = 0;
            for (int j = 0; j < N; j++) {
                bool sees = visible(&rules[head_rule[h]], i, i, j) && bias[i * N + j] > -INFINITY;
                double x = 0;
                for (int c = 0; c < D; c++)
                    x += (double)q[(i * H + h) * D + c] * (double)k[j * D + c];
                x = 2 * tanh(x * (double)0.7f / 2) + (double)bias[i * N + j];
                assert_int_equal(mask[i * N + j], sees);
                e[j] = sees ? exp(x) : 0;
                total += e[j];
            }
            for (int j = 0; j < N; j++) {
                assert_true(fabs(e[j] / total - (double)weights[i * N + j]) <= 100 * FLT_EPSILON);
                sum += e[j] / total;
            }
            rows += sum > 0;
            left += sum > 0 ? 1 - sum : 0;
        }
        OK(look_summarise(s.look, 0, h, &summary, NULL, 0, &err));
        assert_true(fabs(summary.sink - left / rows) <= 100 * FLT_EPSILON);
        look_head_close(head);
    }
    struct look_head *head;
    assert_int_equal(look_head_open(&head, s.look, 1, 0, &err), TRIL_ERR_ARGUMENT);
    assert_int_equal(look_head_open(&head, s.look, 0, 2, &err), TRIL_ERR_ARGUMENT);
    assert_int_equal(look_head_open(&head, s.look, 2, 0, &err), TRIL_ERR_ARGUMENT);
    subject_close(&s);
}

/* More rows than are computed at once, and several sequences refused. */
static void test_long(void **state) {
    (void)state;
    enum { N = 3100 };
    struct subject s;
    struct model_config c = tiny_model3();
    int32_t *ids = calloc(N, sizeof *ids);
    float *logits = malloc(19 * sizeof *logits), *weights = malloc(sizeof(float) * N * N);
    const int32_t last = N - 1;
    struct look_head *h;
    c.context = N;
    c.position = POSITION_NONE;
    subject_open(&s, backend_cpu(), c, DT_F32, N);
    for (int i = 0; i < N; i++)
        ids[i] = i * 7 % 19;
    struct batch b = {.tokens = N,
                      .sequences = 1,
                      .ids = ids,
                      .offsets = (int32_t[]){0, N},
                      .rows = &last,
                      .row_count = 1};
    OK(model_forward(s.m, s.w, &b, logits, &err));
    OK(look_head_open(&h, s.look, 0, 0, &err));
    OK(look_head_weights(h, 0, N, weights, &err));
    for (int i = 0; i < N; i++) {
        double sum = 0;
        for (int j = 0; j < N; j++)
            sum += (double)weights[(int64_t)i * N + j];
        assert_true(fabs(sum - 1) <= N * FLT_EPSILON);
        for (int j = i + 1; j < N; j++)
            assert_true(weights[(int64_t)i * N + j] == 0.0f);
    }
    look_head_close(h);
    struct batch several = tiny_batch();
    several.sequences = 2;
    several.tokens = 6;
    several.rows = (const int32_t[]){5};
    several.row_count = 1;
    assert_int_equal(model_forward(s.m, s.w, &several, logits, &err), TRIL_ERR_UNSUPPORTED);
    subject_close(&s);
    free(ids);
    free(logits);
    free(weights);
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formulas),
        cmocka_unit_test(test_rules),
        cmocka_unit_test(test_long),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
