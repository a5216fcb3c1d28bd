/* Ten optimiser steps against PyTorch's in double (tests/golden/models/.../steps.safetensors,
 * written by oracle/make_goldens.py): warm-up and cosine, clipping in some steps and not in others,
 * AdamW with decay on matrices alone. Losses, norms and the final parameters.
 *
 * AdamW's step is lr m / sqrt(v): about lr whatever the size of a gradient, so an element whose
 * gradient is near zero follows its rounding error. A relative error e of the gradients therefore
 * shows as e in most elements and as up to 2 lr in a fraction of about e of them: the root mean
 * square over a tensor is held to sqrt(10 steps * e) of what the tensor moved by, single elements
 * to twice the sum of the rates. Gradients carry e <= sqrt(n) u each way through 22 operations (see
 * tests/model/golden.h), n at most 83: e = 2 * sqrt(22) * 9 * 2^-24 = 5e-6. The losses, first
 * order in the parameters, average the errors over all elements: e per step. */
#ifndef TESTS_TRAIN_STEPS_H
#define TESTS_TRAIN_STEPS_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "formats/safetensors.h"
#include "model/models.h"
#include "train/optimiser.h"
#include "train/schedule.h"

static struct tril_error err;

#define STEPS 10
#define GRADIENT_ERROR 5e-6

static inline const struct st_tensor *find(const struct safetensors *s, const char *name) {
    const struct st_tensor *t = safetensors_find(s, name);
    if (!t)
        fail_msg("no tensor %s", name);
    return t;
}

/* The bias of the keys adds the same number to all scores of a query (with learned positions): its
 * gradient is zero but for rounding, and AdamW makes steps of that. */
static inline bool is_noise(const struct model *m, const struct param_row *r, int64_t element) {
    const struct model_config *c = &m->config;
    int64_t q = c->heads * c->head_dim, k = c->kv_heads * c->head_dim;
    return r->role == PARAM_QKV_BIAS && c->position == POSITION_LEARNED && element >= q &&
           element < q + k;
}

/* What a row moved by and how far from PyTorch's it ended. */
static inline void row_check(const struct model *m, int row, const struct safetensors *begin,
                             const struct safetensors *golden, double rates, double *worst) {
    const struct param_row *r = &m->table.rows[row];
    int64_t n = r->shape[0] * r->shape[1];
    float *ours = malloc((size_t)n * sizeof *ours);
    OK(model_row_download(m, row, 0, n, ours, &err));
    for (int k = 0; k < r->part_count; k++) {
        const struct param_part *p = &r->parts[k];
        char name[128];
        snprintf(name, sizeof name, "final.%s", p->name);
        const float *due = find(golden, name)->data, *from = find(begin, p->name)->data;
        double error = 0, moved = 0;
        int64_t count = p->row_count * r->shape[1];
        for (int64_t i = 0; i < count; i++) {
            int64_t out = i / r->shape[1], in = i % r->shape[1];
            int64_t at = p->transposed ? in * p->row_count + out : i;
            int64_t element = p->row_begin * r->shape[1] + i;
            double e = fabs((double)ours[element] - (double)due[at]);
            assert_true(e <= 2 * rates);
            if (is_noise(m, r, element))
                continue;
            error += e * e;
            moved += ((double)due[at] - from[at]) * ((double)due[at] - from[at]);
        }
        double ratio = sqrt(error) / sqrt(STEPS * GRADIENT_ERROR * moved);
        assert_true(moved > 0);
        if (!(ratio <= 1))
            fail_msg("%s ended %g of its way off", p->name, sqrt(error / moved));
        *worst = fmax(*worst, ratio);
    }
    free(ours);
}

static inline void ten_steps(const char *name, const struct backend *backend, enum dtype t) {
    char dir[512], path[600];
    snprintf(dir, sizeof dir, "%s/models/%s", TEST_GOLDEN_DIR, name);
    snprintf(path, sizeof path, "%s/steps.safetensors", dir);
    struct safetensors *golden, *begin;
    OK(safetensors_open(&golden, path, &err));
    OK(safetensors_open(&begin, dir, &err));
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct optimiser o;
    OK(op_context_init(&ctx, backend, &err));
    OK(model_load(&m, dir, &(struct model_options){.dtype = t, .training = true}, &ctx, &err));
    struct model_config *c = &m->config;
    c->dropout_embedding = c->dropout_attention = c->dropout_residual = 0;
    const struct workspace_options options = {
        .max_tokens = 64, .max_sequences = 4, .backward = true};
    OK(workspace_create(&w, m, &options, &err));
    const struct adamw_params params = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f};
    const double *losses = find(golden, "loss")->data, *norms = find(golden, "norm")->data;
    const double *rates = find(golden, "rate")->data, *clip = find(golden, "clip")->data;
    OK(optimiser_create(&o, m, &params, (float)clip[0], &err));
    const struct st_tensor *ids = find(golden, "ids");
    const int64_t S = ids->shape[1], T = ids->shape[2];
    const struct schedule schedule = {
        .kind = SCHEDULE_COSINE, .lr = 3e-3, .min_lr = 3e-4, .warmup = 2, .steps = STEPS};
    double total = 0, worst_loss = 0, worst = 0;
    /* bf16 rounds activations and weights: 2^-9 in place of 2^-24 sqrt(n). */
    const double e = t == DT_BF16 ? 2 * sqrt(22) * 0x1p-9 : GRADIENT_ERROR;
    for (int step = 0; step < STEPS; step++) {
        int32_t targets[64], offsets[8];
        const int32_t *batch_ids = (const int32_t *)ids->data + step * S * T;
        for (int64_t i = 0; i < S * T; i++)
            targets[i] = (i + 1) % T ? batch_ids[i + 1] : -1;
        for (int64_t s = 0; s <= S; s++)
            offsets[s] = (int32_t)(s * T);
        struct batch b = {.tokens = S * T,
                          .sequences = S,
                          .ids = batch_ids,
                          .offsets = offsets,
                          .targets = targets};
        double loss, norm, lr = schedule_rate(&schedule, step), n = (double)(S * (T - 1));
        int64_t count;
        bool applied;
        assert_true(fabs(lr - rates[step]) <= 1e-15);
        total += lr;
        struct train_call call = {
            .scale = (float)(1 / n), .step = (uint64_t)step, .overwrite = true};
        OK(model_forward_backward(m, w, &b, &call, &loss, &count, &err));
        OK(optimiser_step(&o, step + 1, lr, &norm, &applied, &err));
        assert_true(applied);
        double q = fabs(loss / n - losses[step]) / (e * (step + 1));
        worst_loss = fmax(worst_loss, q);
        assert_true(q <= 1);
        assert_true(fabs(norm - norms[step]) <= e * (step + 1) * norms[step]);
    }
    for (int i = 0; i < m->table.count && t == DT_F32; i++)
        row_check(m, i, begin, golden, total, &worst);
    print_message("%-12s %-9s %-4s losses %.2f, parameters %.2f of what is allowed\n", name,
                  backend->name, dtype_name(t), worst_loss, worst);
    optimiser_free(&o);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
    safetensors_close(golden);
    safetensors_close(begin);
}

#endif
