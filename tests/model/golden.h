/* Judging whole models by PyTorch's results (tests/golden/models, written by oracle/make_goldens.py
 * in double precision): logits, loss, and every gradient under its checkpoint name.
 *
 * How large an error may be follows from how sensitive a result is. P is the largest change of the
 * result, over a few trials, when every parameter is multiplied by (1 +- t), divided by t. Rounding
 * after an operation is such a perturbation with t about sqrt(n) u, n its longest sum and u the
 * unit roundoff. There are about ten operations to a layer and two more, as many again in the
 * backward pass; their roundings are independent, so that their squares add:
 *
 *     |result - golden| <= sqrt(10 L + 2) sqrt(n) u P    (gradients: twice that; bf16: n = 1,
 *                                                         because sums are kept in fp32)
 *
 * In double the only errors are of what is kept as floats: cos and sin, 1/sqrt(d), eps, and the
 * goldens themselves: 2 * 2^-24 P. */
#ifndef TESTS_MODEL_GOLDEN_H
#define TESTS_MODEL_GOLDEN_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "formats/safetensors.h"
#include "model/models.h"

static struct tril_error err;

struct golden {
    char dir[512];
    struct safetensors *file;
    const float *logits;
    double loss;
    int64_t vocab, tokens, sequences;
    int32_t ids[64], targets[64], offsets[8];
};

static inline const struct st_tensor *tensor_of(const struct golden *g, const char *name) {
    const struct st_tensor *t = safetensors_find(g->file, name);
    if (!t)
        fail_msg("%s: no tensor %s", g->dir, name);
    return t;
}

static inline void golden_open(struct golden *g, const char *name) {
    char path[600];
    snprintf(g->dir, sizeof g->dir, "%s/models/%s", TEST_GOLDEN_DIR, name);
    snprintf(path, sizeof path, "%s/golden.safetensors", g->dir);
    OK(safetensors_open(&g->file, path, &err));
    const struct st_tensor *ids = tensor_of(g, "ids"), *logits = tensor_of(g, "logits");
    g->sequences = ids->shape[0];
    g->tokens = ids->shape[0] * ids->shape[1];
    g->vocab = logits->shape[2];
    g->logits = logits->data;
    memcpy(&g->loss, tensor_of(g, "loss")->data, dtype_size(tensor_of(g, "loss")->dtype));
    assert_int_equal(tensor_of(g, "loss")->dtype, DT_F64);
    memcpy(g->ids, ids->data, ids->bytes);
    for (int64_t s = 0; s <= g->sequences; s++)
        g->offsets[s] = (int32_t)(s * ids->shape[1]);
    for (int64_t i = 0; i < g->tokens; i++)
        g->targets[i] = (i + 1) % ids->shape[1] ? g->ids[i + 1] : -1;
}

/* What a model makes of it. */
struct outcome {
    float *logits;    /* [tokens, vocab]; NULL in double */
    double loss;      /* mean */
    double *gradient; /* [table.elements], of the mean loss */
};

static inline void outcome_free(struct outcome *o) {
    free(o->logits);
    free(o->gradient);
}

struct subject {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
};

static inline void subject_open(struct subject *s, const struct golden *g,
                                const struct backend *backend, enum dtype t,
                                enum recompute recompute) {
    OK(op_context_init(&s->ctx, backend, &err));
    OK(model_load(&s->m, g->dir, &(struct model_options){.dtype = t, .training = true}, &s->ctx,
                  &err));
    struct model_config *c = &s->m->config;
    c->dropout_embedding = c->dropout_attention = c->dropout_residual = 0;
    struct workspace_options o = {
        .max_tokens = 64, .max_sequences = 4, .backward = true, .recompute = recompute};
    OK(workspace_create(&s->w, s->m, &o, &err));
}

static inline void subject_close(struct subject *s) {
    workspace_free(s->w);
    model_free(s->m);
    op_context_free(&s->ctx);
}

static inline struct outcome compute(struct subject *s, const struct golden *g) {
    struct outcome o = {0};
    struct batch b = {.tokens = g->tokens,
                      .sequences = g->sequences,
                      .ids = g->ids,
                      .offsets = g->offsets,
                      .targets = g->targets};
    int64_t n = s->m->table.elements, count;
    const struct backend *backend = s->ctx.backend;
    size_t wide = dtype_size(model_wide(s->m));
    OK(backend->fill_zero(&s->ctx, s->m->gradient, n * (int64_t)wide, &err));
    double targets = (double)(g->tokens - g->sequences);
    struct train_call call = {.scale = (float)(1 / targets)};
    OK(model_forward_backward(s->m, s->w, &b, &call, &o.loss, &count, &err));
    assert_int_equal(count, g->tokens - g->sequences);
    o.loss /= targets;
    void *raw = malloc((size_t)n * wide);
    OK(backend->download(&s->ctx, raw, s->m->gradient, n * (int64_t)wide, &err));
    o.gradient = malloc((size_t)n * sizeof *o.gradient);
    dtype_convert(o.gradient, DT_F64, raw, model_wide(s->m), (size_t)n);
    free(raw);
    for (int64_t i = 0; i < n; i++) /* the call's scale is a float */
        o.gradient[i] /= (double)call.scale * targets;
    if (wide == sizeof(float)) {
        o.logits = malloc((size_t)(g->tokens * g->vocab) * sizeof *o.logits);
        OK(model_forward(s->m, s->w, &b, o.logits, &err));
    }
    return o;
}

/* Multiplies every parameter by 1 + t or 1 - t. */
static inline void perturb(struct model *m, uint64_t trial, double t) {
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        int64_t n = r->shape[0] * r->shape[1];
        float *v = malloc((size_t)n * sizeof *v);
        struct random_key key = {trial, 0, (uint32_t)i, RANDOM_TEST};
        OK(model_row_download(m, i, 0, n, v, &err));
        for (int64_t k = 0; k < n; k++)
            v[k] *= (float)(random_u32(&key, (uint64_t)k) & 1 ? 1 + t : 1 - t);
        OK(model_row_upload(m, i, 0, n, v, DT_F32, &err));
        free(v);
    }
    OK(model_refresh(m, &err));
}

/* P of the logits, of the loss, and of the gradient of each row of the table. */
struct sensitivity {
    double logits, loss, rows[64];
};

static inline struct sensitivity measure(const struct golden *g) {
    struct sensitivity p = {0};
    struct subject s;
    const double t = 1e-3; /* far above fp32's rounding, small enough for a linear answer */
    subject_open(&s, g, backend_reference(), DT_F32, RECOMPUTE_NONE);
    struct outcome base = compute(&s, g);
    subject_close(&s);
    for (uint64_t trial = 0; trial < 3; trial++) {
        subject_open(&s, g, backend_reference(), DT_F32, RECOMPUTE_NONE);
        perturb(s.m, trial, t);
        struct outcome o = compute(&s, g);
        p.loss = fmax(p.loss, fabs(o.loss - base.loss) / t);
        for (int64_t i = 0; i < g->tokens * g->vocab; i++)
            p.logits = fmax(p.logits, fabs((double)o.logits[i] - base.logits[i]) / t);
        for (int i = 0; i < s.m->table.count; i++) {
            const struct param_row *r = &s.m->table.rows[i];
            for (int64_t k = r->offset; k < r->offset + r->shape[0] * r->shape[1]; k++)
                p.rows[i] = fmax(p.rows[i], fabs(o.gradient[k] - base.gradient[k]) / t);
        }
        outcome_free(&o);
        subject_close(&s);
    }
    outcome_free(&base);
    return p;
}

/* The largest error as a multiple of `unit` * P, over logits, loss and gradients. Gradients go
 * through the file that `eval --grads` writes, so that names and layouts are held too. */
static inline double judge(const struct subject *s, const struct golden *g, const struct outcome *o,
                           const struct sensitivity *p, double unit, const char **worst) {
    double ratio = 0;
#define WORST(error, allowed, what)                                                                \
    do {                                                                                           \
        double q_ = (error) / (allowed);                                                           \
        if (!(q_ <= ratio)) {                                                                      \
            ratio = q_;                                                                            \
            *worst = (what);                                                                       \
        }                                                                                          \
    } while (0)
    WORST(fabs(o->loss - g->loss), unit * fmax(p->loss, p->logits / sqrt((double)g->tokens)),
          "the loss");
    if (o->logits) {
        double error = 0;
        for (int64_t i = 0; i < g->tokens * g->vocab; i++)
            error = fmax(error, fabs((double)o->logits[i] - (double)g->logits[i]));
        WORST(error, unit * p->logits, "the logits");
    }
    const struct param_table *t = &s->m->table;
    float *narrow = calloc((size_t)t->elements, sizeof *narrow);
    dtype_convert(narrow, DT_F32, o->gradient, DT_F64, (size_t)t->elements);
    const char *path = test_path("gradients.safetensors");
    const float *const arenas[] = {narrow};
    OK(model_arena_write(s->m, arenas, (const char *const[]){"grad."}, 1, path, DT_F32, &err));
    struct safetensors *written;
    OK(safetensors_open(&written, path, &err));
    assert_int_equal(safetensors_count(written) + 3, safetensors_count(g->file));
    for (int i = 0; i < t->count; i++) {
        for (int k = 0; k < t->rows[i].part_count; k++) {
            char name[128];
            snprintf(name, sizeof name, "grad.%s", t->rows[i].parts[k].name);
            const struct st_tensor *a = safetensors_find(written, name), *b = tensor_of(g, name);
            assert_non_null(a);
            assert_int_equal(a->bytes, b->bytes);
            assert_int_equal(a->rank, b->rank);
            for (int d = 0; d < a->rank; d++)
                assert_int_equal(a->shape[d], b->shape[d]);
            double error = 0, largest = 0;
            for (size_t e = 0; e < a->bytes / sizeof(float); e++) {
                double due = ((const float *)b->data)[e];
                error = fmax(error, fabs((double)((const float *)a->data)[e] - due));
                largest = fmax(largest, fabs(due));
            }
            WORST(error, 2 * unit * fmax(p->rows[i], largest), t->rows[i].parts[k].name);
        }
    }
    safetensors_close(written);
    free(narrow);
    return ratio;
}

static inline double unit_of(const struct model_config *c, enum dtype t) {
    double operations = sqrt(10.0 * (double)c->layers + 2);
    double longest = (double)(c->ffn > c->vocab ? c->ffn : c->vocab);
    if (t == DT_F64)
        return 2 * 0x1p-24;
    return operations * (t == DT_BF16 ? 0x1p-9 : sqrt(longest) * 0x1p-24);
}

static inline void check(const struct golden *g, const struct sensitivity *p,
                         const struct backend *backend, enum dtype t, enum recompute recompute) {
    struct subject s;
    const char *worst = "nothing";
    subject_open(&s, g, backend, t, recompute);
    struct outcome o = compute(&s, g);
    double ratio = judge(&s, g, &o, p, unit_of(&s.m->config, t), &worst);
    print_message("%-18s %-9s %-4s %4.2f of what is allowed, in %s\n", strrchr(g->dir, '/') + 1,
                  backend->name, dtype_name(t), ratio, worst);
    assert_true(ratio <= 1);
    outcome_free(&o);
    subject_close(&s);
}

/* What is held against a golden does notice: parameters off by 3 parts in 100,000. */
static inline void check_notices(const char *name, const struct backend *backend) {
    struct golden g;
    struct subject s;
    const char *worst;
    golden_open(&g, name);
    struct sensitivity p = measure(&g);
    subject_open(&s, &g, backend, DT_F32, RECOMPUTE_NONE);
    perturb(s.m, 99, 3e-5);
    struct outcome o = compute(&s, &g);
    assert_true(judge(&s, &g, &o, &p, unit_of(&s.m->config, DT_F32), &worst) > 1);
    outcome_free(&o);
    subject_close(&s);
    safetensors_close(g.file);
}

#endif
