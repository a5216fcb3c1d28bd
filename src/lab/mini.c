/* The small transformer: parameters in one arena, forward, backward, update. */
#include "lab/mini.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"

enum part { QKV, OUT, UP, DOWN };

static tril_status take(struct mini *m, void *out, int64_t n, int64_t size,
                        struct tril_error *err) {
    void *p;
    tril_status st = mem_alloc_zero(&p, (size_t)n * (size_t)size, "a small transformer", err);
    if (st == TRIL_OK) {
        m->blocks[m->block_count++] = p;
        memcpy(out, &p, sizeof p);
    }
    return st;
}

/* A piece of the parameters' arena and of the gradients'. */
static float *carve(struct mini *m, int64_t n, float **gradient, int64_t *at) {
    float *p = m->parameters + *at;
    *gradient = m->gradients + *at;
    *at += (n + 15) / 16 * 16;
    return p;
}

static void normal(float *out, int64_t n, double std, uint64_t seed, uint32_t layer) {
    struct random_key key = {.seed = seed, .layer = layer, .op = RANDOM_INIT};
    random_normal_fill(&key, 0, n, out);
    for (int64_t i = 0; i < n; i++)
        out[i] *= (float)std;
}

static void shape_of(const struct mini_config *c, int part, int64_t *o, int64_t *i) {
    const int64_t D = c->dim, shape[MINI_PARTS][2] = {{3 * D, D}, {D, D}, {4 * D, D}, {D, 4 * D}};
    *o = shape[part][0];
    *i = shape[part][1];
}

static tril_status make_parameters(struct mini *m, uint64_t seed, struct tril_error *err) {
    const struct mini_config *c = &m->c;
    int64_t D = c->dim, at = 0, o, i;
    tril_status st = TRIL_OK;
    m->count = (c->vocab * D + 15) / 16 * 32 + c->seq * D + 16 + (c->layers * 2 + 1) * (D + 16) +
               c->layers * (12 * D * D + 64);
    TRY(take(m, &m->parameters, m->count, 4, err));
    TRY(take(m, &m->gradients, m->count, 4, err));
    TRY(take(m, &m->mean, m->count, 4, err));
    TRY(take(m, &m->square, m->count, 4, err));
    m->embedding = carve(m, c->vocab * D, &m->dembedding, &at);
    m->position = carve(m, c->seq * D, &m->dposition, &at);
    normal(m->embedding, c->vocab * D, 0.02, seed, 1000);
    normal(m->position, c->seq * D, 0.02, seed, 1001);
    m->dhead = m->dembedding;
    m->head.value = tensor_2d(m->embedding, DT_F32, c->vocab, D);
    if (c->untied) {
        m->head.value.data = carve(m, c->vocab * D, &m->dhead, &at);
        normal(m->head.value.data, c->vocab * D, 0.02, seed, 1002);
    }
    TRY(m->ctx->backend->weight_prepare(m->ctx, &m->head, WEIGHT_FORWARD | WEIGHT_BACKWARD, err));
    m->final_gain = carve(m, D, &m->dfinal_gain, &at);
    for (int64_t k = 0; k < D; k++)
        m->final_gain[k] = 1;
    for (int64_t l = 0; l < c->layers; l++) {
        struct mini_layer *y = &m->layer[l];
        for (int n = 0; n < 2; n++) {
            y->gain[n] = carve(m, D, &y->dgain[n], &at);
            for (int64_t k = 0; k < D; k++)
                y->gain[n][k] = 1;
        }
        for (int p = 0; p < (c->no_mlp ? 2 : MINI_PARTS); p++) {
            shape_of(c, p, &o, &i);
            /* Variance is kept (1 / inputs), so that depth alone decides what grows or dies; the
             * branches' ends are scaled as GPT-2 scales them where there is a residual. */
            double std = 1 / sqrt((double)i);
            if ((p == OUT || p == DOWN) && !c->no_residual)
                std /= sqrt(2.0 * (double)c->layers);
            y->w[p].value = tensor_2d(carve(m, o * i, &y->dw[p], &at), DT_F32, o, i);
            normal(y->w[p].value.data, o * i, std, seed, (uint32_t)(l * 8 + p));
            TRY(m->ctx->backend->weight_prepare(m->ctx, &y->w[p], WEIGHT_FORWARD | WEIGHT_BACKWARD,
                                                err));
        }
    }
done:
    return st;
}

static tril_status make_activations(struct mini *m, struct tril_error *err) {
    const struct mini_config *c = &m->c;
    int64_t N = c->batch * c->seq, D = c->dim;
    tril_status st = TRIL_OK;
    for (int64_t l = 0; l < c->layers; l++) {
        struct mini_layer *y = &m->layer[l];
        TRY(take(m, &y->x, N * D, 4, err));
        TRY(take(m, &y->mid, N * D, 4, err));
        for (int n = 0; n < 2; n++) {
            TRY(take(m, &y->norm[n], N * D, 4, err));
            TRY(take(m, &y->mean[n], N, 4, err));
            TRY(take(m, &y->rstd[n], N, 4, err));
        }
        TRY(take(m, &y->qkv, N * 3 * D, 4, err));
        TRY(take(m, &y->lse, N * c->heads, 4, err));
        TRY(take(m, &y->heads, N * D, 4, err));
        TRY(take(m, &y->pre, N * 4 * D, 4, err));
        TRY(take(m, &y->hidden, N * 4 * D, 4, err));
    }
    float **const wide[] = {&m->x, &m->final, &m->dx, &m->dy, &m->dn, &m->dheads};
    for (int k = 0; k < 6; k++)
        TRY(take(m, wide[k], N * D, 4, err));
    TRY(take(m, &m->dqkv, N * 3 * D, 4, err));
    TRY(take(m, &m->dhidden, N * 4 * D, 4, err));
    TRY(take(m, &m->logits, N * c->vocab, 4, err));
    float **const rows[] = {&m->maximum,    &m->sum,        &m->target,
                            &m->final_mean, &m->final_rstd, &m->row_loss};
    for (int k = 0; k < 6; k++)
        TRY(take(m, rows[k], N, 4, err));
    TRY(take(m, &m->zero, D, 4, err));
    TRY(take(m, &m->total, 2, 8, err));
    TRY(take(m, &m->hyper, HYPER_COUNT, 4, err));
    int32_t **const ints[] = {&m->ids, &m->targets, &m->positions};
    for (int k = 0; k < 3; k++)
        TRY(take(m, ints[k], N, 4, err));
    TRY(take(m, &m->offsets, c->batch + 1, 4, err));
    TRY(take(m, &m->start, c->batch, 4, err));
    TRY(take(m, &m->length, c->batch, 4, err));
    for (int64_t n = 0; n < N; n++)
        m->positions[n] = (int32_t)(n % c->seq);
    for (int64_t b = 0; b <= c->batch; b++) {
        m->offsets[b] = (int32_t)(b * c->seq);
        if (b < c->batch) {
            m->start[b] = m->offsets[b];
            m->length[b] = (int32_t)c->seq;
        }
    }
done:
    return st;
}

tril_status mini_create(struct mini **out, const struct mini_config *c, struct op_context *ctx,
                        uint64_t seed, struct tril_error *err) {
    struct mini *m = calloc(1, sizeof *m);
    tril_status st = TRIL_OK;
    *out = NULL;
    if (!m)
        return lab_no_memory(err);
    m->c = *c;
    m->ctx = ctx;
    m->blocks = calloc((size_t)(64 + 16 * MINI_MOST_LAYERS), sizeof *m->blocks);
    if (!m->blocks || c->layers > MINI_MOST_LAYERS) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(make_parameters(m, seed, err));
    TRY(make_activations(m, err));
done:
    if (st == TRIL_OK)
        *out = m;
    else
        mini_free(m);
    return st;
}

void mini_free(struct mini *m) {
    if (!m)
        return;
    const struct backend *b = m->ctx->backend;
    for (int64_t l = 0; l < m->c.layers && l < MINI_MOST_LAYERS; l++)
        for (int p = 0; p < MINI_PARTS; p++)
            if (m->layer[l].w[p].value.data)
                b->weight_release(&m->layer[l].w[p]);
    if (m->head.value.data)
        b->weight_release(&m->head);
    for (int i = 0; i < m->block_count; i++)
        mem_free(m->blocks[i]);
    free(m->blocks);
    free(m);
}

double mini_parameters(const struct mini *m) {
    const struct mini_config *c = &m->c;
    double D = (double)c->dim, L = (double)c->layers, V = (double)c->vocab;
    return V * D * (c->untied ? 2 : 1) + (double)c->seq * D +
           L * D * D * ((c->no_q ? 3 : 4) + (c->no_mlp ? 0 : 8)) +
           (c->no_norm ? 0 : D * (1 + L * (c->no_mlp ? 1 : 2)));
}

/* ------------------------------------------------------------------ forward */

static struct tensor rows(const struct mini *m, float *data, int64_t width) {
    return tensor_2d(data, DT_F32, m->c.batch * m->c.seq, width);
}

static struct tensor line(const struct mini *m, float *data) {
    return tensor_1d(data, DT_F32, m->c.batch * m->c.seq);
}

static tril_status normalise(struct mini *m, float *x, float *gain, float *y, float *mean,
                             float *rstd, struct tril_error *err) {
    struct norm_params p = {.eps = 1e-5f};
    int64_t D = m->c.dim;
    if (m->c.no_norm) {
        memcpy(y, x, (size_t)(m->c.batch * m->c.seq * D) * sizeof *x);
        return TRIL_OK;
    }
    return layernorm_forward(m->ctx, rows(m, x, D), tensor_1d(gain, DT_F32, D),
                             tensor_1d(m->zero, DT_F32, D), rows(m, y, D), line(m, mean),
                             line(m, rstd), p, err);
}

static struct tensor heads_of(const struct mini *m, float *qkv, int which) {
    struct tensor t = tensor_3d(qkv + which * m->c.dim, DT_F32, m->c.batch * m->c.seq, m->c.heads,
                                m->c.dim / m->c.heads);
    t.stride[0] = 3 * m->c.dim;
    return t;
}

static void attention_arguments(const struct mini *m, struct mini_layer *y,
                                struct attention_inputs *in, struct attention_params *p) {
    double d = (double)(m->c.dim / m->c.heads);
    *in = (struct attention_inputs){.q = heads_of(m, y->qkv, 0),
                                    .k = heads_of(m, y->qkv, 1),
                                    .v = heads_of(m, y->qkv, 2),
                                    .q_offsets = tensor_1d(m->offsets, DT_I32, m->c.batch + 1),
                                    .kv_start = tensor_1d(m->start, DT_I32, m->c.batch),
                                    .kv_length = tensor_1d(m->length, DT_I32, m->c.batch)};
    *p = (struct attention_params){.scale = m->c.no_scale ? 1.0f : (float)(1 / sqrt(d)),
                                   .causal = true,
                                   .max_q = (int32_t)m->c.seq,
                                   .max_kv = (int32_t)m->c.seq};
}

/* Without W_q the normalised input itself asks. */
static void copy_columns(const struct mini *m, const float *from, int64_t from_width, float *to,
                         int64_t to_width, bool add) {
    for (int64_t n = 0; n < m->c.batch * m->c.seq; n++)
        for (int64_t k = 0; k < m->c.dim; k++)
            if (add)
                to[n * to_width + k] += from[n * from_width + k];
            else
                to[n * to_width + k] = from[n * from_width + k];
}

static struct dropout_params drop(const struct mini *m, int64_t l, int half, bool train,
                                  uint64_t step) {
    return (struct dropout_params){
        .p = train ? m->c.dropout : 0,
        .key = {.seed = 77,
                .step = step,
                .layer = (uint32_t)l,
                .op = half ? RANDOM_DROPOUT_RESIDUAL_FFN : RANDOM_DROPOUT_RESIDUAL_ATTENTION}};
}

/* out = dropout(in w^T) [+ x] */
static tril_status branch(struct mini *m, int64_t l, int half, struct tensor in, float *x,
                          float *out, bool train, uint64_t step, struct tril_error *err) {
    struct tensor none = tensor_none(), y = rows(m, out, m->c.dim);
    struct tensor residual = m->c.no_residual ? none : rows(m, x, m->c.dim);
    struct dropout_params p = drop(m, l, half, train, step);
    const struct weight *w = &m->layer[l].w[half ? DOWN : OUT];
    tril_status st = TRIL_OK;
    if (!(p.p > 0))
        return linear_forward(m->ctx, in, w, none, residual, y, none, ACT_NONE, err);
    struct tensor b = rows(m, m->dy, m->c.dim); /* free during a forward */
    TRY(linear_forward(m->ctx, in, w, none, none, b, none, ACT_NONE, err));
    TRY(dropout_forward(m->ctx, b, residual, none, y, p, err));
done:
    return st;
}

tril_status mini_forward(struct mini *m, bool train, uint64_t step, double *loss,
                         struct tril_error *err) {
    const struct mini_config *c = &m->c;
    int64_t N = c->batch * c->seq, D = c->dim;
    struct tensor none = tensor_none();
    tril_status st = TRIL_OK;
    TRY(embed_forward(m->ctx, tensor_1d(m->ids, DT_I32, N), tensor_1d(m->positions, DT_I32, N),
                      tensor_2d(m->embedding, DT_F32, c->vocab, D),
                      tensor_2d(m->position, DT_F32, c->seq, D), rows(m, m->layer[0].x, D), err));
    for (int64_t l = 0; l < c->layers; l++) {
        struct mini_layer *y = &m->layer[l];
        float *next = l + 1 < c->layers ? m->layer[l + 1].x : m->x;
        float *mid = c->no_mlp ? next : y->mid;
        struct attention_inputs in;
        struct attention_params p;
        TRY(normalise(m, y->x, y->gain[0], y->norm[0], y->mean[0], y->rstd[0], err));
        TRY(linear_forward(m->ctx, rows(m, y->norm[0], D), &y->w[QKV], none, none,
                           rows(m, y->qkv, 3 * D), none, ACT_NONE, err));
        if (c->no_q)
            copy_columns(m, y->norm[0], D, y->qkv, 3 * D, false);
        attention_arguments(m, y, &in, &p);
        TRY(attention_forward(m->ctx, &in, tensor_3d(y->heads, DT_F32, N, c->heads, D / c->heads),
                              tensor_2d(y->lse, DT_F32, c->heads, N), &p, err));
        TRY(branch(m, l, 0, rows(m, y->heads, D), y->x, mid, train, step, err));
        if (c->no_mlp)
            continue;
        TRY(normalise(m, y->mid, y->gain[1], y->norm[1], y->mean[1], y->rstd[1], err));
        TRY(linear_forward(m->ctx, rows(m, y->norm[1], D), &y->w[UP], none, none,
                           rows(m, y->pre, 4 * D), none, ACT_NONE, err));
        TRY(activation_forward(m->ctx, rows(m, y->pre, 4 * D), rows(m, y->hidden, 4 * D),
                               c->activation, err));
        TRY(branch(m, l, 1, rows(m, y->hidden, 4 * D), y->mid, next, train, step, err));
    }
    TRY(normalise(m, m->x, m->final_gain, m->final, m->final_mean, m->final_rstd, err));
    TRY(linear_forward(m->ctx, rows(m, m->final, D), &m->head, none, none,
                       rows(m, m->logits, c->vocab), none, ACT_NONE, err));
    struct tensor targets = tensor_1d(m->targets, DT_I32, N);
    TRY(cross_entropy_forward(m->ctx, rows(m, m->logits, c->vocab), targets, line(m, m->maximum),
                              line(m, m->sum), line(m, m->target), err));
    m->total[0] = m->total[1] = 0;
    TRY(cross_entropy_loss(m->ctx, targets, line(m, m->maximum), line(m, m->sum),
                           line(m, m->target), line(m, m->row_loss), tensor_1d(m->total, DT_F64, 2),
                           err));
    *loss = m->total[0] / m->total[1];
done:
    return st;
}

/* ------------------------------------------------------------------ backward */

static double length_of(const float *x, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++)
        total += (double)x[i] * (double)x[i];
    return sqrt(total);
}

/* dx += the gradient through a norm (or through nothing) of dn. */
static tril_status normalise_backward(struct mini *m, float *x, float *gain, float *mean,
                                      float *rstd, float *dgain, struct tril_error *err) {
    struct norm_params p = {.eps = 1e-5f};
    int64_t D = m->c.dim;
    if (m->c.no_norm) {
        copy_columns(m, m->dn, D, m->dx, D, true);
        return TRIL_OK;
    }
    return layernorm_backward(m->ctx, rows(m, m->dn, D), rows(m, x, D), tensor_1d(gain, DT_F32, D),
                              line(m, mean), line(m, rstd), rows(m, m->dx, D),
                              tensor_1d(dgain, DT_F32, D), tensor_none(), p, err);
}

/* dy = gradient of a branch's product; dx then holds only what goes on beside the branch. */
static tril_status branch_backward(struct mini *m, int64_t l, int half, bool train, uint64_t step,
                                   struct tril_error *err) {
    int64_t N = m->c.batch * m->c.seq, D = m->c.dim;
    struct dropout_params p = drop(m, l, half, train, step);
    tril_status st = TRIL_OK;
    if (p.p > 0)
        TRY(dropout_backward(m->ctx, rows(m, m->dx, D), tensor_none(), rows(m, m->dy, D), p, err));
    else
        memcpy(m->dy, m->dx, (size_t)(N * D) * sizeof *m->dy);
    if (m->c.no_residual)
        memset(m->dx, 0, (size_t)(N * D) * sizeof *m->dx);
done:
    return st;
}

static tril_status attention_half(struct mini *m, int64_t l, bool train, uint64_t step,
                                  struct tril_error *err) {
    const struct mini_config *c = &m->c;
    struct mini_layer *y = &m->layer[l];
    int64_t N = c->batch * c->seq, D = c->dim;
    struct tensor none = tensor_none();
    struct attention_inputs in;
    struct attention_params p;
    tril_status st = TRIL_OK;
    TRY(branch_backward(m, l, 0, train, step, err));
    TRY(linear_backward_weight(m->ctx, rows(m, m->dy, D), rows(m, y->heads, D),
                               tensor_2d(y->dw[OUT], DT_F32, D, D), none, true, err));
    TRY(linear_backward_input(m->ctx, rows(m, m->dy, D), &y->w[OUT], rows(m, m->dheads, D), err));
    attention_arguments(m, y, &in, &p);
    struct attention_gradients g = {.dq = heads_of(m, m->dqkv, 0),
                                    .dk = heads_of(m, m->dqkv, 1),
                                    .dv = heads_of(m, m->dqkv, 2)};
    TRY(attention_backward(m->ctx, &in, tensor_3d(y->heads, DT_F32, N, c->heads, D / c->heads),
                           tensor_2d(y->lse, DT_F32, c->heads, N),
                           tensor_3d(m->dheads, DT_F32, N, c->heads, D / c->heads), &g, &p, err));
    if (c->no_q) { /* q's gradient goes straight to the input; W_q's is nothing */
        copy_columns(m, m->dqkv, 3 * D, m->dy, D, false);
        for (int64_t n = 0; n < N; n++)
            memset(m->dqkv + n * 3 * D, 0, (size_t)D * sizeof *m->dqkv);
    }
    TRY(linear_backward_weight(m->ctx, rows(m, m->dqkv, 3 * D), rows(m, y->norm[0], D),
                               tensor_2d(y->dw[QKV], DT_F32, 3 * D, D), none, true, err));
    TRY(linear_backward_input(m->ctx, rows(m, m->dqkv, 3 * D), &y->w[QKV], rows(m, m->dn, D), err));
    if (c->no_q)
        copy_columns(m, m->dy, D, m->dn, D, true);
    TRY(normalise_backward(m, y->x, y->gain[0], y->mean[0], y->rstd[0], y->dgain[0], err));
done:
    return st;
}

static tril_status mlp_half(struct mini *m, int64_t l, bool train, uint64_t step,
                            struct tril_error *err) {
    struct mini_layer *y = &m->layer[l];
    int64_t D = m->c.dim;
    struct tensor none = tensor_none();
    tril_status st = TRIL_OK;
    TRY(branch_backward(m, l, 1, train, step, err));
    TRY(linear_backward_weight(m->ctx, rows(m, m->dy, D), rows(m, y->hidden, 4 * D),
                               tensor_2d(y->dw[DOWN], DT_F32, D, 4 * D), none, true, err));
    TRY(linear_backward_input(m->ctx, rows(m, m->dy, D), &y->w[DOWN], rows(m, m->dhidden, 4 * D),
                              err));
    TRY(activation_backward(m->ctx, rows(m, m->dhidden, 4 * D), rows(m, y->pre, 4 * D),
                            rows(m, m->dhidden, 4 * D), m->c.activation, err));
    TRY(linear_backward_weight(m->ctx, rows(m, m->dhidden, 4 * D), rows(m, y->norm[1], D),
                               tensor_2d(y->dw[UP], DT_F32, 4 * D, D), none, true, err));
    TRY(linear_backward_input(m->ctx, rows(m, m->dhidden, 4 * D), &y->w[UP], rows(m, m->dn, D),
                              err));
    TRY(normalise_backward(m, y->mid, y->gain[1], y->mean[1], y->rstd[1], y->dgain[1], err));
done:
    return st;
}

tril_status mini_backward(struct mini *m, bool train, uint64_t step, struct tril_error *err) {
    const struct mini_config *c = &m->c;
    int64_t N = c->batch * c->seq, D = c->dim;
    struct tensor none = tensor_none(), logits = rows(m, m->logits, c->vocab);
    tril_status st = TRIL_OK;
    memset(m->gradients, 0, (size_t)m->count * sizeof *m->gradients);
    memset(m->dx, 0, (size_t)(N * D) * sizeof *m->dx);
    TRY(cross_entropy_backward(m->ctx, logits, tensor_1d(m->targets, DT_I32, N),
                               line(m, m->maximum), line(m, m->sum), logits,
                               (float)(1 / m->total[1]), err));
    TRY(linear_backward_weight(m->ctx, logits, rows(m, m->final, D),
                               tensor_2d(m->dhead, DT_F32, c->vocab, D), none, true, err));
    TRY(linear_backward_input(m->ctx, logits, &m->head, rows(m, m->dn, D), err));
    TRY(normalise_backward(m, m->x, m->final_gain, m->final_mean, m->final_rstd, m->dfinal_gain,
                           err));
    m->gradient_norm[c->layers] = length_of(m->dx, N * D);
    for (int64_t l = c->layers - 1; l >= 0; l--) {
        if (!c->no_mlp)
            TRY(mlp_half(m, l, train, step, err));
        TRY(attention_half(m, l, train, step, err));
        m->gradient_norm[l] = length_of(m->dx, N * D);
    }
    TRY(embed_backward(m->ctx, tensor_1d(m->ids, DT_I32, N), tensor_1d(m->positions, DT_I32, N),
                       rows(m, m->dx, D), tensor_2d(m->dembedding, DT_F32, c->vocab, D),
                       tensor_2d(m->dposition, DT_F32, c->seq, D), err));
done:
    return st;
}

tril_status mini_update(struct mini *m, int64_t t, double lr, struct tril_error *err) {
    struct adamw_params p = {0.9f, 0.95f, 1e-8f, 0};
    struct tensor hyper = tensor_1d(m->hyper, DT_F32, HYPER_COUNT);
    struct tensor g = tensor_1d(m->gradients, DT_F32, m->count);
    tril_status st = TRIL_OK;
    m->total[0] = 0;
    TRY(sum_squares(m->ctx, g, tensor_1d(m->total, DT_F64, 1), err));
    m->hyper[HYPER_LR] = (float)lr;
    m->hyper[HYPER_CORRECTION1] = (float)(1 / (1 - pow(0.9, (double)t)));
    m->hyper[HYPER_CORRECTION2] = (float)(1 / (1 - pow(0.95, (double)t)));
    TRY(clip_factor(m->ctx, tensor_1d(m->total, DT_F64, 1), hyper, 1.0f, 1.0f, err));
    TRY(adamw(m->ctx, tensor_1d(m->parameters, DT_F32, m->count), g,
              tensor_1d(m->mean, DT_F32, m->count), tensor_1d(m->square, DT_F32, m->count),
              tensor_none(), hyper, p, err));
    for (int64_t l = 0; l < m->c.layers; l++)
        for (int k = 0; k < (m->c.no_mlp ? 2 : MINI_PARTS); k++)
            TRY(m->ctx->backend->weight_refresh(m->ctx, &m->layer[l].w[k], err));
    TRY(m->ctx->backend->weight_refresh(m->ctx, &m->head, err));
done:
    return st;
}

double mini_similarity(const struct mini *m, int64_t l) {
    const struct mini_config *c = &m->c;
    const float *x = l < c->layers ? m->layer[l].x : m->x;
    int64_t T = c->seq, D = c->dim;
    double total = 0, *mean = malloc((size_t)D * sizeof *mean);
    /* The mean over pairs i != j of u_i . u_j is (|sum u|^2 - T) / (T (T - 1)). */
    for (int64_t b = 0; mean && b < c->batch; b++) {
        double square = 0;
        memset(mean, 0, (size_t)D * sizeof *mean);
        for (int64_t t = 0; t < T; t++) {
            const float *row = x + (b * T + t) * D;
            double size = length_of(row, D);
            for (int64_t k = 0; k < D; k++)
                mean[k] += size > 0 ? (double)row[k] / size : 0;
        }
        for (int64_t k = 0; k < D; k++)
            square += mean[k] * mean[k];
        total += (square - (double)T) / ((double)T * (double)(T - 1));
    }
    free(mean);
    return total / (double)c->batch;
}
