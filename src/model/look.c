/* Looking at attention: what the hook keeps, and the matrices computed from it. */
#include "model/look.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY,
                     "not enough memory to keep what attention does: look at fewer tokens");
}

/* ------------------------------------------------------------------ keeping */

static void layer_clear(struct look_layer *l) {
    mem_free(l->q);
    mem_free(l->k);
    free(l->lse);
    free(l->slopes);
    free(l->sink);
    free(l->bias);
    free(l->position_q);
    free(l->position_r);
    free(l->rules);
    free(l->head_rule);
    *l = (struct look_layer){0};
}

tril_status look_create(struct look **out, const struct model *m, struct tril_error *err) {
    struct look *k = calloc(1, sizeof *k);
    *out = NULL;
    if (!k)
        return no_memory(err);
    k->ctx = m->ctx;
    k->layers = m->config.layers;
    k->layer = calloc((size_t)k->layers, sizeof *k->layer);
    if (!k->layer) {
        free(k);
        return no_memory(err);
    }
    *out = k;
    return TRIL_OK;
}

void look_free(struct look *k) {
    if (!k)
        return;
    for (int64_t l = 0; l < k->layers; l++)
        layer_clear(&k->layer[l]);
    free(k->layer);
    free(k);
}

/* Rows [begin, begin + rows) of t [N, heads, d] into *out [heads, rows, d] of the same dtype. */
static tril_status heads_keep(struct op_context *ctx, const struct tensor *t, int64_t begin,
                              int64_t rows, char **out, struct tril_error *err) {
    const int64_t heads = t->shape[1], d = t->shape[2], size = (int64_t)dtype_size(t->dtype);
    /* The rows with the gaps between them, without what would follow the last. */
    const int64_t span = (rows - 1) * t->stride[0] + (heads - 1) * t->stride[1] + d;
    char *stage = NULL;
    tril_status st;
    TRY(mem_alloc((void **)&stage, (size_t)(span * size), "queries and keys", err));
    TRY(mem_alloc((void **)out, (size_t)(heads * rows * d * size), "queries and keys", err));
    TRY(ctx->backend->download(ctx, stage, (char *)t->data + begin * t->stride[0] * size,
                               span * size, err));
    for (int64_t h = 0; h < heads; h++)
        for (int64_t n = 0; n < rows; n++)
            memcpy(*out + (h * rows + n) * d * size,
                   stage + (n * t->stride[0] + h * t->stride[1]) * size, (size_t)(d * size));
done:
    mem_free(stage);
    return st;
}

/* A dense fp32 or double tensor as floats; *out stays NULL where there is none. */
static tril_status floats_keep(struct op_context *ctx, struct tensor t, float **out,
                               struct tril_error *err) {
    tril_status st = TRIL_OK;
    void *stage = NULL;
    if (!t.data)
        return TRIL_OK;
    stage = malloc((size_t)tensor_bytes(&t) + 1);
    *out = malloc((size_t)tensor_count(&t) * sizeof **out + 1);
    if (!stage || !*out)
        TRY(no_memory(err));
    TRY(ctx->backend->download(ctx, stage, t.data, tensor_bytes(&t), err));
    dtype_convert(*out, DT_F32, stage, t.dtype, (size_t)tensor_count(&t));
done:
    free(stage);
    return st;
}

/* bias [G, A, U], strided, to [G, rows, keys]. */
static tril_status bias_keep(struct op_context *ctx, const struct tensor *t, struct look_layer *l,
                             struct tril_error *err) {
    const int64_t size = (int64_t)dtype_size(t->dtype);
    char *stage = NULL;
    tril_status st = TRIL_OK;
    if (!t->data)
        return TRIL_OK;
    l->bias_heads = t->shape[0];
    l->bias = malloc((size_t)(l->bias_heads * l->rows * l->keys) * sizeof *l->bias);
    stage = malloc((size_t)(l->keys * size));
    if (!l->bias || !stage)
        TRY(no_memory(err));
    for (int64_t n = 0; n < l->bias_heads * l->rows; n++) {
        int64_t from = n / l->rows * t->stride[0] + n % l->rows * t->stride[1];
        TRY(ctx->backend->download(ctx, stage, (char *)t->data + from * size, l->keys * size, err));
        dtype_convert(l->bias + n * l->keys, DT_F32, stage, t->dtype, (size_t)l->keys);
    }
done:
    free(stage);
    return st;
}

static tril_status rules_keep(const struct attention_params *p, struct look_layer *l,
                              struct tril_error *err) {
    if (!p->rules)
        return TRIL_OK;
    l->rule_count = p->rule_count;
    l->rules = malloc((size_t)p->rule_count * sizeof *l->rules);
    l->head_rule = calloc((size_t)l->heads, 1);
    if (!l->rules || !l->head_rule)
        return no_memory(err);
    memcpy(l->rules, p->rules, (size_t)p->rule_count * sizeof *l->rules);
    if (p->head_rule)
        memcpy(l->head_rule, p->head_rule, (size_t)l->heads);
    return TRIL_OK;
}

tril_status look_hook(void *arg, int layer, const struct attention_inputs *in, struct tensor lse,
                      const struct attention_params *p, struct tril_error *err) {
    struct look *k = arg;
    struct look_layer *l = &k->layer[layer];
    struct op_context *ctx = k->ctx;
    int32_t start, length;
    tril_status st;
    layer_clear(l);
    if (in->kv_start.shape[0] != 1 || in->pages.data || in->k.dtype == DT_I8 ||
        in->k.dtype != in->q.dtype)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "attention is looked at in one sequence at a time, without pages or a "
                         "cache of another dtype");
    TRY(ctx->backend->download(ctx, &start, in->kv_start.data, sizeof start, err));
    TRY(ctx->backend->download(ctx, &length, in->kv_length.data, sizeof length, err));
    *l = (struct look_layer){.seen = true,
                             .rows = in->q.shape[0],
                             .keys = length,
                             .heads = in->q.shape[1],
                             .kv_heads = in->k.shape[1],
                             .width = in->q.shape[2],
                             .dtype = in->q.dtype,
                             .scale = p->scale,
                             .softcap = p->softcap,
                             .causal = p->causal};
    TRY(heads_keep(ctx, &in->q, 0, l->rows, &l->q, err));
    TRY(heads_keep(ctx, &in->k, start, l->keys, &l->k, err));
    TRY(floats_keep(ctx, lse, &l->lse, err));
    TRY(floats_keep(ctx, in->slopes, &l->slopes, err));
    TRY(floats_keep(ctx, in->sink, &l->sink, err));
    TRY(bias_keep(ctx, &in->bias, l, err));
    TRY(rules_keep(p, l, err));
done:
    if (st != TRIL_OK)
        layer_clear(l);
    return st;
}

/* t [N, H, d], strided, as floats [H, N, d], each with add [H, d] (NULL: nothing) added. */
static tril_status sum_keep(struct op_context *ctx, const struct tensor *t, const float *add,
                            float **out, struct tril_error *err) {
    const int64_t H = t->shape[1], N = t->shape[0], d = t->shape[2];
    char *kept = NULL;
    tril_status st;
    TRY(heads_keep(ctx, t, 0, N, &kept, err));
    *out = malloc((size_t)(H * N * d) * sizeof **out);
    if (!*out)
        TRY(no_memory(err));
    dtype_convert(*out, DT_F32, kept, t->dtype, (size_t)(H * N * d));
    for (int64_t i = 0; add && i < H * N * d; i++)
        (*out)[i] += add[i / (N * d) * d + i % d];
done:
    mem_free(kept);
    return st;
}

tril_status look_relative_hook(void *arg, int layer, const struct relative_attention_inputs *in,
                               struct tensor lse, const struct relative_attention_params *p,
                               struct tril_error *err) {
    struct look *k = arg;
    struct look_layer *l = &k->layer[layer];
    struct op_context *ctx = k->ctx;
    float *u = NULL, *w = NULL, *q = NULL;
    tril_status st;
    layer_clear(l);
    if (in->past_k.data || in->q_offsets.shape[0] != 2)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "recurrent attention is looked at in one whole text at a time");
    *l = (struct look_layer){.seen = true,
                             .rows = in->q.shape[0],
                             .keys = in->k.shape[0],
                             .heads = in->q.shape[1],
                             .kv_heads = in->k.shape[1],
                             .width = in->q.shape[2],
                             .dtype = DT_F32,
                             .scale = p->scale,
                             .causal = true,
                             .distances = in->r.shape[0],
                             .segment = p->segment,
                             .memory = p->memory};
    TRY(floats_keep(ctx, in->u, &u, err));
    TRY(floats_keep(ctx, in->w, &w, err));
    TRY(sum_keep(ctx, &in->q, u, &q, err)); /* from here on q is q + u, in fp32 */
    TRY(mem_alloc((void **)&l->q, (size_t)(l->heads * l->rows * l->width) * sizeof *q,
                  "queries and keys", err));
    memcpy(l->q, q, (size_t)(l->heads * l->rows * l->width) * sizeof *q);
    free(q);
    q = NULL;
    TRY(sum_keep(ctx, &in->k, NULL, &q, err));
    TRY(mem_alloc((void **)&l->k, (size_t)(l->kv_heads * l->keys * l->width) * sizeof *q,
                  "queries and keys", err));
    memcpy(l->k, q, (size_t)(l->kv_heads * l->keys * l->width) * sizeof *q);
    TRY(sum_keep(ctx, &in->q, w, &l->position_q, err));
    TRY(sum_keep(ctx, &in->r, NULL, &l->position_r, err));
    TRY(floats_keep(ctx, lse, &l->lse, err));
done:
    free(u);
    free(w);
    free(q);
    if (st != TRIL_OK)
        layer_clear(l);
    return st;
}

/* ------------------------------------------------------------------ one head */

enum { CHUNK_BYTES = 1 << 25 }; /* of weights in the backend's memory at a time */

struct look_head {
    const struct look_layer *l;
    struct op_context *ctx;
    int64_t head;
    float *own;         /* the bias that relative positions make, [T, M], or NULL */
    const float *bias;  /* [T, M] of this head, or NULL */
    float *q, *k, *k_t; /* [T, d], [M, d], [d, M] */
    char *device;       /* what attention_probabilities takes, one block */
    struct tensor p;    /* [chunk, 1, M] in it */
    struct tensor rows; /* [chunk] */
    struct tensor lse;  /* [1, T] */
    struct attention_inputs in;
    struct attention_params params;
};

static int64_t round_up(int64_t x) {
    return (x + MEMORY_ALIGN - 1) / MEMORY_ALIGN * MEMORY_ALIGN;
}

void look_head_close(struct look_head *h) {
    if (!h)
        return;
    h->ctx->backend->release(h->device);
    mem_free(h->q);
    mem_free(h->k);
    mem_free(h->k_t);
    mem_free(h->own);
    free(h);
}

/* Takes `bytes` of the block, filled from `host` (NULL: as it is). */
static tril_status take(struct look_head *h, int64_t *at, void **out, const void *host,
                        int64_t bytes, struct tril_error *err) {
    *out = h->device + *at;
    *at += round_up(bytes);
    return host ? h->ctx->backend->upload(h->ctx, *out, host, bytes, err) : TRIL_OK;
}

static tril_status device_fill(struct look_head *h, struct tril_error *err) {
    const struct look_layer *l = h->l;
    const int64_t T = l->rows, M = l->keys, d = l->width, size = (int64_t)dtype_size(l->dtype);
    const int64_t chunk = CHUNK_BYTES / 4 / M < 1   ? 1
                          : CHUNK_BYTES / 4 / M < T ? CHUNK_BYTES / 4 / M
                                                    : T;
    const int64_t group = l->heads / l->kv_heads;
    const int32_t offsets[2] = {0, (int32_t)T}, start = 0, length = (int32_t)M;
    const float *bias = h->bias;
    int64_t at = round_up(T * d * size) + round_up(M * d * size) + round_up(T * 4) +
                 round_up(chunk * M * 4) + round_up(chunk * 4) + 4 * MEMORY_ALIGN +
                 (bias ? round_up(T * M * 4) : 0);
    tril_status st;
    void *p;
    TRY(h->ctx->backend->alloc((void **)&h->device, at, false, "a look at a head", err));
    at = 0;
    TRY(take(h, &at, &p, l->q + h->head * T * d * size, T * d * size, err));
    h->in.q = tensor_3d(p, l->dtype, T, 1, d);
    TRY(take(h, &at, &p, l->k + h->head / group * M * d * size, M * d * size, err));
    h->in.k = h->in.v = tensor_3d(p, l->dtype, M, 1, d);
    TRY(take(h, &at, &p, offsets, sizeof offsets, err));
    h->in.q_offsets = tensor_1d(p, DT_I32, 2);
    TRY(take(h, &at, &p, &start, sizeof start, err));
    h->in.kv_start = tensor_1d(p, DT_I32, 1);
    TRY(take(h, &at, &p, &length, sizeof length, err));
    h->in.kv_length = tensor_1d(p, DT_I32, 1);
    TRY(take(h, &at, &p, l->lse + h->head * T, T * 4, err));
    h->lse = tensor_2d(p, DT_F32, 1, T);
    if (l->slopes) {
        TRY(take(h, &at, &p, l->slopes + h->head, 4, err));
        h->in.slopes = tensor_1d(p, DT_F32, 1);
    }
    if (bias) {
        TRY(take(h, &at, &p, bias, T * M * 4, err));
        h->in.bias = tensor_3d(p, DT_F32, 1, T, M);
    }
    TRY(take(h, &at, &p, NULL, chunk * M * 4, err));
    h->p = tensor_3d(p, DT_F32, chunk, 1, M);
    TRY(take(h, &at, &p, NULL, chunk * 4, err));
    h->rows = tensor_1d(p, DT_I32, chunk);
    h->params =
        (struct attention_params){.scale = l->scale,
                                  .softcap = l->softcap,
                                  .causal = l->causal,
                                  .max_q = (int32_t)T,
                                  .max_kv = (int32_t)M,
                                  .rules = l->rules ? &l->rules[l->head_rule[h->head]] : NULL,
                                  .rule_count = l->rules != NULL};
done:
    return st;
}

/* Relative positions as a bias: scale (q_i + w).r_(i-j) where i sees j, -inf elsewhere. */
static tril_status positions_bias(struct look_head *h, struct tril_error *err) {
    const struct look_layer *l = h->l;
    const int64_t T = l->rows, M = l->keys, d = l->width;
    tril_status st;
    TRY(mem_alloc((void **)&h->own, (size_t)(T * M) * sizeof *h->own, "relative positions", err));
    for (int64_t i = 0; i < T; i++) {
        const float *q = l->position_q + (h->head * T + i) * d;
        int64_t first = l->segment > 0 ? i / l->segment * l->segment - l->memory : 0;
        for (int64_t j = 0; j < M; j++) {
            const bool sees = j <= i && j >= first && i - j < l->distances;
            const float *r = l->position_r + (h->head * l->distances + (sees ? i - j : 0)) * d;
            float sum = 0;
            for (int64_t c = 0; sees && c < d; c++)
                sum += q[c] * r[c];
            h->own[i * M + j] = sees ? l->scale * sum : -INFINITY;
        }
    }
    h->bias = h->own;
done:
    return st;
}

tril_status look_head_open(struct look_head **out, const struct look *k, int layer, int64_t head,
                           struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct look_head *h = NULL;
    *out = NULL;
    if (layer < 0 || layer >= k->layers || !k->layer[layer].seen)
        return error_set(err, TRIL_ERR_ARGUMENT, "layer %d has no softmax attention to look at",
                         layer);
    const struct look_layer *l = &k->layer[layer];
    if (head < 0 || head >= l->heads)
        return error_set(err, TRIL_ERR_ARGUMENT, "layer %d has heads 0 to %lld, not %lld", layer,
                         (long long)l->heads - 1, (long long)head);
    h = calloc(1, sizeof *h);
    if (!h)
        return no_memory(err);
    h->l = l;
    h->ctx = k->ctx;
    h->head = head;
    const int64_t T = l->rows, M = l->keys, d = l->width, size = (int64_t)dtype_size(l->dtype);
    const int64_t kv = head / (l->heads / l->kv_heads);
    TRY(mem_alloc((void **)&h->q, (size_t)(T * d) * sizeof *h->q, "a head's queries", err));
    TRY(mem_alloc((void **)&h->k, (size_t)(M * d) * sizeof *h->k, "a head's keys", err));
    TRY(mem_alloc((void **)&h->k_t, (size_t)(M * d) * sizeof *h->k, "a head's keys", err));
    dtype_convert(h->q, DT_F32, l->q + head * T * d * size, l->dtype, (size_t)(T * d));
    dtype_convert(h->k, DT_F32, l->k + kv * M * d * size, l->dtype, (size_t)(M * d));
    for (int64_t j = 0; j < M; j++)
        for (int64_t c = 0; c < d; c++)
            h->k_t[c * M + j] = h->k[j * d + c];
    if (l->position_r)
        TRY(positions_bias(h, err));
    else if (l->bias)
        h->bias = l->bias_heads > 1 ? l->bias + head * T * M : l->bias;
    TRY(device_fill(h, err));
    *out = h;
    h = NULL;
done:
    look_head_close(h);
    return st;
}

const float *look_head_q(const struct look_head *h) {
    return h->q;
}

const float *look_head_k(const struct look_head *h) {
    return h->k;
}

struct score_rows {
    const struct look_head *h;
    int64_t row;
    float *out;
};

static void score_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    const struct score_rows *s = arg;
    const struct look_layer *l = s->h->l;
    (void)worker;
    for (int64_t r = begin; r < end; r++) {
        const float *q = s->h->q + (s->row + r) * l->width;
        float *restrict out = s->out + r * l->keys;
        memset(out, 0, (size_t)l->keys * sizeof *out);
        for (int64_t c = 0; c < l->width; c++) {
            const float *restrict k = s->h->k_t + c * l->keys;
            const float x = q[c];
            for (int64_t j = 0; j < l->keys; j++)
                out[j] += x * k[j];
        }
        for (int64_t j = 0; j < l->keys; j++)
            out[j] *= l->scale;
    }
}

void look_head_scores(const struct look_head *h, int64_t row, int64_t rows, float *scores) {
    struct score_rows s = {h, row, scores};
    parallel_for(rows, 8, score_chunk, &s);
}

void look_head_added(const struct look_head *h, int64_t row, int64_t rows, float *scores) {
    const struct look_layer *l = h->l;
    const float *bias = h->bias;
    for (int64_t i = row; i < row + rows; i++, scores += l->keys)
        for (int64_t j = 0; j < l->keys; j++) {
            if (l->softcap > 0)
                scores[j] = l->softcap * tanhf(scores[j] / l->softcap);
            if (l->slopes)
                scores[j] -= l->slopes[h->head] * fabsf((float)(i + l->keys - l->rows - j));
            if (bias)
                scores[j] += bias[i * l->keys + j];
        }
}

void look_head_mask(const struct look_head *h, int64_t row, int64_t rows, uint8_t *mask) {
    const struct look_layer *l = h->l;
    const float *bias = h->bias;
    const struct visible_rule *rule = l->rules    ? &l->rules[l->head_rule[h->head]]
                                      : l->causal ? &visible_causal
                                                  : &visible_full;
    for (int64_t i = row; i < row + rows; i++, mask += l->keys) {
        const int64_t position = i + l->keys - l->rows;
        for (int64_t j = 0; j < l->keys; j += 64) {
            int count = l->keys - j < 64 ? (int)(l->keys - j) : 64;
            uint64_t bits = visible_mask(rule, i, position, j, count);
            for (int b = 0; b < count; b++)
                mask[j + b] = bits >> b & 1;
        }
        for (int64_t j = 0; bias && j < l->keys; j++)
            mask[j] &= bias[i * l->keys + j] != -INFINITY;
    }
}

tril_status look_head_weights(struct look_head *h, int64_t row, int64_t rows, float *weights,
                              struct tril_error *err) {
    const int64_t M = h->l->keys, most = h->p.shape[0];
    const struct backend *b = h->ctx->backend;
    tril_status st = TRIL_OK;
    int32_t *list = malloc((size_t)most * sizeof *list);
    if (!list)
        return no_memory(err);
    for (int64_t at = 0; at < rows; at += most) {
        int64_t n = rows - at < most ? rows - at : most;
        struct tensor p = tensor_rows(h->p, 0, n), chosen = tensor_rows(h->rows, 0, n);
        for (int64_t i = 0; i < n; i++)
            list[i] = (int32_t)(row + at + i);
        TRY(b->upload(h->ctx, chosen.data, list, n * 4, err));
        TRY(attention_probabilities(h->ctx, &h->in, chosen, h->lse, p, &h->params, err));
        TRY(b->download(h->ctx, weights + at * M, p.data, n * M * 4, err));
    }
done:
    free(list);
    return st;
}

/* ------------------------------------------------------------------ summaries */

static void summarise_row(struct look_summary *s, const float *p, int64_t keys, int64_t position,
                          const uint8_t *mask, int64_t *rows) {
    int64_t visible = 0;
    double sum = 0, entropy = 0, distance = 0, largest = 0;
    for (int64_t j = 0; j < keys; j++) {
        const double x = (double)p[j];
        visible += mask[j];
        if (!(x > 0))
            continue;
        sum += x;
        entropy -= x * log(x);
        distance += x * fabs((double)(position - j));
        largest = x > largest ? x : largest;
    }
    if (!(sum > 0))
        return;
    ++*rows;
    s->entropy += entropy;
    s->distance += distance;
    s->largest += largest;
    s->uniform += log((double)visible);
    s->sink += 1 - sum;
    s->first += (double)p[0];
    s->previous += position > 0 && position <= keys ? (double)p[position - 1] : 0;
    s->self += position >= 0 && position < keys ? (double)p[position] : 0;
}

tril_status look_summarise(const struct look *k, int layer, int64_t head,
                           struct look_summary *summary, float *thumb, int64_t size,
                           struct tril_error *err) {
    struct look_head *h = NULL;
    float *p = NULL;
    uint8_t *mask = NULL;
    int64_t counted = 0;
    tril_status st;
    *summary = (struct look_summary){0};
    TRY(look_head_open(&h, k, layer, head, err));
    const int64_t T = h->l->rows, M = h->l->keys, chunk = h->p.shape[0];
    TRY(mem_alloc((void **)&p, (size_t)(chunk * M) * sizeof *p, "a head's weights", err));
    TRY(mem_alloc((void **)&mask, (size_t)M, "a row's mask", err));
    if (thumb)
        memset(thumb, 0, (size_t)(size * size) * sizeof *thumb);
    for (int64_t at = 0; at < T; at += chunk) {
        int64_t n = T - at < chunk ? T - at : chunk;
        TRY(look_head_weights(h, at, n, p, err));
        for (int64_t i = 0; i < n; i++) {
            const float *row = p + i * M;
            look_head_mask(h, at + i, 1, mask);
            summarise_row(summary, row, M, at + i + M - T, mask, &counted);
            float *cells = thumb ? thumb + (at + i) * size / T * size : NULL;
            for (int64_t j = 0; cells && j < M; j++)
                if (row[j] > cells[j * size / M])
                    cells[j * size / M] = row[j];
        }
    }
    double *const means[] = {&summary->entropy,  &summary->distance, &summary->first,
                             &summary->previous, &summary->self,     &summary->sink,
                             &summary->largest,  &summary->uniform};
    for (size_t i = 0; counted && i < sizeof means / sizeof *means; i++)
        *means[i] /= (double)counted;
    if (!k->layer[layer].sink)
        summary->sink = 0; /* what is left is rounding */
done:
    mem_free(p);
    mem_free(mask);
    look_head_close(h);
    return st;
}
