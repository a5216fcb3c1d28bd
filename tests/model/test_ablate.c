// ctest: timeout=120 levels
/* A model with a part switched off computes what a model built without that part computes: to the
 * bit, since both make the same calls; where no configuration lacks the part, against the formula
 * in double. And being watched changes nothing. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "model/ablate.h"
#include "models.h"

static struct tril_error err;

#define T 11
static const int32_t text[T] = {3, 0, 18, 7, 3, 11, 5, 5, 9, 1, 16};

struct subject {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
};

static void subject_open(struct subject *s, const struct backend *b, struct model_config c,
                         enum dtype t, bool training, bool init) {
    OK(op_context_init(&s->ctx, b, &err));
    OK(model_create(&s->m, &c, &(struct model_options){.dtype = t, .training = training}, &s->ctx,
                    &err));
    if (init)
        OK(model_init(s->m, 5, &err));
    struct workspace_options o = {.max_tokens = T, .max_sequences = 2};
    OK(workspace_create(&s->w, s->m, &o, &err));
}

static void subject_close(struct subject *s) {
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

/* All logits, or those of the last row alone (the last layer then goes on with one row). */
static void logits_of(struct subject *s, bool last_alone, float *out) {
    const int32_t last = T - 1;
    struct batch b = {.tokens = T,
                      .sequences = 1,
                      .ids = text,
                      .offsets = (int32_t[]){0, T},
                      .rows = last_alone ? &last : NULL,
                      .row_count = 1};
    OK(model_forward(s->m, s->w, &b, out, &err));
}

typedef void change_fn(const struct model_config *c, const struct param_row *r, float *values);

/* A model of configuration c with the parameters of `from` (a training model), layer l taking those
 * of layer l + 1 from `gap` on, changed by `change`. */
static void build(struct subject *s, const struct subject *from, struct model_config c, int gap,
                  change_fn *change) {
    subject_open(s, from->ctx.backend, c, from->m->dtype, false, false);
    for (int i = 0; i < s->m->table.count; i++) {
        const struct param_row *r = &s->m->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        float *values = malloc((size_t)n * sizeof *values);
        int row = model_row(from->m, r->role, r->layer >= gap ? r->layer + 1 : r->layer);
        assert_true(row >= 0);
        OK(model_row_download(from->m, row, 0, n, values, &err));
        if (change)
            change(&c, r, values);
        OK(model_row_upload(s->m, i, 0, n, values, DT_F32, &err));
        OK(model_row_done(s->m, i, &err));
        free(values);
    }
    OK(model_refresh(s->m, &err));
}

static void fill(float *x, int64_t n, float value) {
    for (int64_t i = 0; i < n; i++)
        x[i] = value;
}

static void change_head(const struct model_config *c, const struct param_row *r, float *values) {
    if (r->role == PARAM_ATTENTION_OUT && r->layer == 1)
        for (int64_t o = 0; o < c->dim; o++)
            fill(values + (o * c->heads + 2) * c->head_dim, c->head_dim, 0);
}

static void change_q(const struct model_config *c, const struct param_row *r, float *values) {
    if (r->layer == 0 && r->role == PARAM_QKV)
        fill(values, c->heads * c->head_dim * c->dim, 0);
    if (r->layer == 0 && r->role == PARAM_QKV_BIAS)
        fill(values, c->heads * c->head_dim, 1);
}

static void change_branches(const struct model_config *c, const struct param_row *r,
                            float *values) {
    (void)c;
    if (r->role == PARAM_ATTENTION_OUT || r->role == PARAM_ATTENTION_OUT_BIAS)
        fill(values, r->shape[0] * r->shape[1], 0);
}

static void compare(struct subject *a, struct subject *b, const char *what) {
    float x[T * 19], y[T * 19];
    for (int last_alone = 0; last_alone < 2; last_alone++) {
        int64_t rows = last_alone ? 1 : T;
        logits_of(a, last_alone, x);
        logits_of(b, last_alone, y);
        for (int64_t i = 0; i < rows * 19; i++)
            if (!(x[i] == y[i])) /* but for the sign of zero, the same bits */
                fail_msg("%s, %s, %s%s: logit %lld is %.9g, not %.9g", what, a->ctx.backend->name,
                         dtype_name(a->m->dtype), last_alone ? ", last row" : "", (long long)i,
                         (double)x[i], (double)y[i]);
    }
}

/* `list` switched off in the model of `c` = the model of `without`. */
static void check(const struct backend *b, enum dtype t, struct model_config c, const char *list,
                  struct model_config without, int gap, change_fn *change) {
    struct subject from, off, built;
    float whole[T * 19], less[T * 19];
    subject_open(&from, b, c, t, true, true);
    build(&off, &from, c, INT32_MAX, NULL);
    build(&built, &from, without, gap, change);
    logits_of(&off, false, whole);
    OK(model_ablate(off.m, list, &err));
    logits_of(&off, false, less);
    assert_memory_not_equal(whole, less, sizeof whole);
    compare(&off, &built, list);
    OK(model_ablate(off.m, "", &err));
    logits_of(&off, false, less);
    assert_memory_equal(whole, less, sizeof whole);
    subject_close(&from);
    subject_close(&off);
    subject_close(&built);
}

static void check_all(const struct backend *b, enum dtype t) {
    struct model_config gpt = tiny_gpt2(), llama = tiny_llama(), c;
    gpt.layers = llama.layers = 3;
    const struct model_config both[] = {gpt, llama};
    for (int i = 0; i < 2; i++) {
        c = both[i];
        c.ffn_kind = FFN_NONE;
        c.ffn = 0;
        c.activation = ACT_NONE;
        c.ffn_bias = false;
        check(b, t, both[i], "mlp", c, INT32_MAX, NULL);
        check(b, t, both[i], "mlp:0 mlp:1-2", c, INT32_MAX, NULL);
        c = both[i];
        c.layers = 2;
        check(b, t, both[i], "layer:0", c, 0, NULL);
        check(b, t, both[i], "attention:1, mlp:1", c, 1, NULL);
        check(b, t, both[i], "layer:2", c, INT32_MAX, NULL);
        c = both[i];
        c.scale_attention = false;
        check(b, t, both[i], "scale", c, INT32_MAX, NULL);
        c = both[i];
        c.position = POSITION_NONE;
        c.rope_dim = 0;
        check(b, t, both[i], "position", c, INT32_MAX, NULL);
        check(b, t, both[i], "head:1.2", both[i], INT32_MAX, change_head);
        check(b, t, both[i], "attention", both[i], INT32_MAX, change_branches);
    }
    c = gpt;
    c.position = POSITION_ALIBI;
    struct model_config none = c;
    none.position = POSITION_NONE;
    check(b, t, c, "position", none, INT32_MAX, NULL);
    check(b, t, gpt, "q:0", gpt, INT32_MAX, change_q);
}

static void test_without(void **state) {
    (void)state;
    check_all(backend_reference(), DT_F32);
    check_all(backend_cpu(), DT_F32);
    check_all(backend_cpu(), DT_BF16);
}

/* ------------------------------------------------------------------ norm and residual, by hand */

static double *row_values(const struct subject *s, enum param_role role, int layer) {
    int row = model_row(s->m, role, layer);
    const struct param_row *r = &s->m->table.rows[row];
    int64_t n = r->shape[0] * r->shape[1];
    float *host = malloc((size_t)n * sizeof *host);
    double *out = malloc((size_t)n * sizeof *out);
    OK(model_row_download(s->m, row, 0, n, host, &err));
    for (int64_t i = 0; i < n; i++)
        out[i] = (double)host[i];
    free(host);
    return out;
}

/* y [O] = W x + b */
static void product(const double *w, const double *b, const double *x, int64_t O, int64_t I,
                    double *y) {
    for (int64_t o = 0; o < O; o++) {
        y[o] = b ? b[o] : 0;
        for (int64_t i = 0; i < I; i++)
            y[o] += w[o * I + i] * x[i];
    }
}

/* One layer, ReLU, attention off, no norms; with or without the residual addition. */
static void by_hand(const struct backend *b, bool residual) {
    struct model_config c = tiny_gpt2();
    struct subject from, off;
    float logits[T * 19];
    double x[12], h[20], y[12], z[19], worst = 0, largest = 0;
    c.layers = 1;
    c.activation = ACT_RELU;
    subject_open(&from, b, c, DT_F32, true, true);
    build(&off, &from, c, INT32_MAX, NULL);
    OK(model_ablate(off.m, residual ? "attention,norm" : "attention,norm,residual", &err));
    logits_of(&off, false, logits);
    double *wte = row_values(&from, PARAM_TOKEN_EMBEDDING, -1);
    double *wpe = row_values(&from, PARAM_POSITION_EMBEDDING, -1);
    double *up = row_values(&from, PARAM_FFN_UP, 0), *down = row_values(&from, PARAM_FFN_DOWN, 0);
    double *b1 = row_values(&from, PARAM_FFN_UP_BIAS, 0);
    double *b2 = row_values(&from, PARAM_FFN_DOWN_BIAS, 0);
    for (int64_t n = 0; n < T; n++) {
        for (int64_t i = 0; i < 12; i++)
            x[i] = wte[text[n] * 12 + i] + wpe[n * 12 + i];
        product(up, b1, x, 20, 12, h);
        for (int i = 0; i < 20; i++)
            h[i] = fmax(h[i], 0);
        product(down, b2, h, 12, 20, y);
        for (int i = 0; i < 12; i++)
            y[i] += residual ? x[i] : 0;
        product(wte, NULL, y, 19, 12, z);
        for (int64_t v = 0; v < 19; v++) {
            worst = fmax(worst, fabs(z[v] - (double)logits[n * 19 + v]));
            largest = fmax(largest, fabs(z[v]));
        }
    }
    /* Three products of at most 20 terms and an addition. */
    assert_true(worst <= (20 + 20 + 20 + 1) * FLT_EPSILON * fmax(largest, 1));
    double *all[] = {wte, wpe, up, down, b1, b2};
    for (int i = 0; i < 6; i++)
        free(all[i]);
    subject_close(&from);
    subject_close(&off);
}

static void test_by_hand(void **state) {
    (void)state;
    by_hand(backend_reference(), true);
    by_hand(backend_reference(), false);
    by_hand(backend_cpu(), true);
    by_hand(backend_cpu(), false);
}

/* ------------------------------------------------------------------ refusals, watching */

static void test_refusals(void **state) {
    (void)state;
    static const char *const wrong[] = {
        "mpl",      "mlp:2",     "layer",   "head:1",       "head",
        "head:2.0", "head:0.3",  "mlp:1-0", "mlp:x",        "q:0x",
        "mlp:-1",   "norm:last", "head:0.", "layer:0,none", "q:9999999999999999999999"};
    struct subject s;
    subject_open(&s, backend_reference(), tiny_gpt2(), DT_F32, false, true);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(model_ablate(s.m, wrong[i], &err), TRIL_ERR_ARGUMENT);
        assert_true(strlen(err.message) > 20);
        assert_null(s.m->ablation);
    }
    subject_close(&s);
    subject_open(&s, backend_reference(), tiny_gpt2(), DT_F32, true, true);
    struct workspace *w;
    struct workspace_options o = {.max_tokens = TINY_TOKENS, .max_sequences = 3, .backward = true};
    struct batch b = tiny_batch();
    double loss;
    int64_t count;
    OK(workspace_create(&w, s.m, &o, &err));
    OK(model_ablate(s.m, "mlp", &err));
    assert_int_equal(
        model_forward_backward(s.m, w, &b, &(struct train_call){.scale = 1}, &loss, &count, &err),
        TRIL_ERR_UNSUPPORTED);
    OK(model_ablate(s.m, NULL, &err));
    OK(model_forward_backward(s.m, w, &b, &(struct train_call){.scale = 1}, &loss, &count, &err));
    workspace_free(w);
    subject_close(&s);
}

static tril_status count_calls(void *arg, int layer, const struct attention_inputs *in,
                               struct tensor lse, const struct attention_params *params,
                               struct tril_error *e) {
    (void)e;
    int *calls = arg;
    assert_true(layer >= *calls);
    assert_int_equal(in->q.shape[0], T);
    assert_int_equal(lse.shape[1], T);
    assert_true(params->scale > 0);
    for (int64_t i = 0; i < tensor_count(&lse); i++)
        assert_true(isfinite(((const float *)lse.data)[i]));
    ++*calls;
    return TRIL_OK;
}

static void test_watching(void **state) {
    (void)state;
    const struct backend *const backends[] = {backend_reference(), backend_cpu(), backend_cpu()};
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < VARIANTS; i++) {
            struct subject s;
            const char *name;
            float before[T * 19], during[T * 19], after[T * 19];
            int calls = 0;
            subject_open(&s, backends[k], variant(i, &name), k == 2 ? DT_BF16 : DT_F32, false,
                         true);
            int attentions = 0;
            for (int64_t l = 0; l < s.m->config.layers; l++)
                attentions += model_mixer(&s.m->config, l)->kind == MIXER_ATTENTION ||
                              model_mixer(&s.m->config, l)->kind == MIXER_MEMORY;
            logits_of(&s, false, before);
            OK(workspace_watch_attention(s.w, count_calls, &calls, &err));
            logits_of(&s, false, during);
            assert_int_equal(calls, attentions);
            OK(workspace_watch_attention(s.w, NULL, NULL, &err));
            logits_of(&s, false, after);
            assert_int_equal(calls, attentions);
            assert_memory_equal(before, during, sizeof before);
            assert_memory_equal(before, after, sizeof before);
            subject_close(&s);
        }
}

int main(void) {
    if (level_missing())
        return TEST_SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_without),
        cmocka_unit_test(test_by_hand),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_watching),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
