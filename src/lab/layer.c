/* One block, forward, over the operations. */
#include "lab/layer.h"

#include <math.h>
#include <stdlib.h>

const char *const layer_attention_names[] = {"standard", "fused", "flash"};

static tril_status take(const struct layer *b, void **out, int64_t n, enum dtype t,
                        struct tril_error *err) {
    return b->ctx->backend->alloc(out, n * (int64_t)dtype_size(t), true, "a block's tensors", err);
}

static tril_status fill(struct layer *b, void *data, enum dtype t, int64_t n, float scale,
                        uint64_t seed, struct tril_error *err) {
    struct random_key key = {.seed = seed, .op = RANDOM_TEST};
    return lab_fill(b->ctx, data, t, n, scale, &key, err);
}

static tril_status make_weight(struct layer *b, struct weight *w, int64_t o, int64_t i,
                               uint64_t seed, struct tril_error *err) {
    void *data = NULL;
    tril_status st = TRIL_OK;
    TRY(take(b, &data, o * i, b->dtype, err));
    w->value = tensor_2d(data, b->dtype, o, i);
    TRY(fill(b, data, b->dtype, o * i, (float)(1 / sqrt((double)i)), seed, err));
    TRY(b->ctx->backend->weight_prepare(b->ctx, w, WEIGHT_FORWARD, err));
done:
    return st;
}

static tril_status make_ones(struct layer *b, int64_t n, struct tril_error *err) {
    float *ones = malloc((size_t)n * sizeof *ones);
    tril_status st = TRIL_OK;
    if (!ones)
        return lab_no_memory(err);
    for (int64_t i = 0; i < n; i++)
        ones[i] = 1;
    TRY(take(b, (void **)&b->gain, n, DT_F32, err));
    TRY(b->ctx->backend->upload(b->ctx, b->gain, ones, n * 4, err));
done:
    free(ones);
    return st;
}

tril_status layer_create(struct layer *b, struct op_context *ctx, int64_t B, int64_t T, int64_t D,
                         int64_t H, enum dtype dtype, enum layer_attention attention, bool mlp,
                         struct tril_error *err) {
    int64_t n = B * T;
    bool half = dtype == DT_F16 && !ctx->backend->device;
    tril_status st = TRIL_OK;
    dtype = half ? DT_F32 : dtype;
    *b = (struct layer){
        .ctx = ctx, .B = B, .T = T, .D = D, .H = H, .dtype = dtype, .attention = attention};
    TRY(make_weight(b, &b->qkv, 3 * D, D, 1, err));
    TRY(make_weight(b, &b->out, D, D, 2, err));
    if (mlp) {
        TRY(make_weight(b, &b->up, 4 * D, D, 3, err));
        TRY(make_weight(b, &b->down, D, 4 * D, 4, err));
        TRY(take(b, &b->hidden, n * 4 * D, dtype, err));
    }
    TRY(make_ones(b, 4 * D, err));
    TRY(take(b, (void **)&b->bias, 4 * D, DT_F32, err));
    TRY(take(b, (void **)&b->x, n * D, DT_F32, err));
    TRY(take(b, (void **)&b->y, n * D, DT_F32, err));
    TRY(take(b, &b->norm, n * D, dtype, err));
    TRY(take(b, &b->fused, n * 3 * D, dtype, err));
    TRY(take(b, &b->heads, n * D, dtype, err));
    TRY(fill(b, b->x, DT_F32, n * D, 1, 5, err));
    TRY(fill(b, b->norm, dtype, n * D, 1, 6, err));
    if (half) {
        TRY(take(b, &b->half, 2 * n * D, DT_F16, err));
        TRY(fill(b, b->half, DT_F16, n * D, 1, 6, err));
    }
    struct attend *a = &b->attend;
    TRY(attend_describe(a, ctx, B, T, H, D / H, dtype, err));
    a->row = 3 * D;
    a->q = b->fused;
    a->k = (char *)b->fused + (size_t)D * dtype_size(dtype);
    a->v = (char *)b->fused + 2 * (size_t)D * dtype_size(dtype);
    a->o = b->heads;
    a->params.implementation = attention == LAYER_FUSED ? ATTENTION_FUSED : ATTENTION_FLASH;
    if (attention == LAYER_STANDARD)
        TRY(standard_create(&b->standard, a, err));
done:
    if (st != TRIL_OK)
        layer_free(b);
    return st;
}

void layer_free(struct layer *b) {
    struct weight *const weights[] = {&b->qkv, &b->out, &b->up, &b->down};
    void *const blocks[] = {b->gain,  b->bias,  b->x,      b->y,   b->norm,
                            b->fused, b->heads, b->hidden, b->half};
    for (int i = 0; b->ctx && i < 4; i++)
        if (weights[i]->value.data) {
            b->ctx->backend->weight_release(weights[i]);
            b->ctx->backend->release(weights[i]->value.data);
        }
    standard_free(&b->standard);
    b->attend.q = b->attend.k = b->attend.v = b->attend.o = NULL;
    attend_free(&b->attend);
    for (int i = 0; b->ctx && i < 9; i++)
        b->ctx->backend->release(blocks[i]);
    *b = (struct layer){0};
}

/* fused -> heads */
tril_status layer_attention(void *arg, struct tril_error *err) {
    struct layer *b = arg;
    b->standard.a = &b->attend; /* the struct may have moved */
    return b->attention == LAYER_STANDARD ? standard_forward(&b->standard, err)
                                          : attend_forward(&b->attend, err);
}

static tril_status projections(struct layer *b, struct tensor residual, struct tensor y,
                               struct tril_error *err) {
    int64_t n = b->B * b->T, D = b->D;
    struct tensor none = tensor_none();
    tril_status st = TRIL_OK;
    TRY(linear_forward(b->ctx, tensor_2d(b->norm, b->dtype, n, D), &b->qkv, none, none,
                       tensor_2d(b->fused, b->dtype, n, 3 * D), none, ACT_NONE, err));
    TRY(layer_attention(b, err));
    TRY(linear_forward(b->ctx, tensor_2d(b->heads, b->dtype, n, D), &b->out, none, residual, y,
                       none, ACT_NONE, err));
done:
    return st;
}

tril_status layer_mha(void *arg, struct tril_error *err) {
    struct layer *b = arg;
    int64_t n = b->B * b->T;
    struct tensor half = tensor_1d(b->half, DT_F16, n * b->D), out = half;
    tril_status st = TRIL_OK;
    out.data = b->half ? (uint16_t *)b->half + n * b->D : NULL;
    if (b->half)
        TRY(cast(b->ctx, half, tensor_1d(b->norm, DT_F32, n * b->D), err));
    TRY(projections(b, tensor_none(), tensor_2d(b->y, DT_F32, n, b->D), err));
    if (b->half)
        TRY(cast(b->ctx, tensor_1d(b->y, DT_F32, n * b->D), out, err));
done:
    return st;
}

static tril_status normalise(struct layer *b, float *x, struct tril_error *err) {
    struct norm_params p = {.eps = 1e-5f};
    int64_t n = b->B * b->T, D = b->D;
    return layernorm_forward(b->ctx, tensor_2d(x, DT_F32, n, D), tensor_1d(b->gain, DT_F32, D),
                             tensor_1d(b->bias, DT_F32, D), tensor_2d(b->norm, b->dtype, n, D),
                             tensor_none(), tensor_none(), p, err);
}

tril_status layer_forward_once(void *arg, struct tril_error *err) {
    struct layer *b = arg;
    int64_t n = b->B * b->T, D = b->D;
    struct tensor none = tensor_none(), x = tensor_2d(b->x, DT_F32, n, D),
                  y = tensor_2d(b->y, DT_F32, n, D);
    tril_status st = TRIL_OK;
    TRY(normalise(b, b->x, err));
    TRY(projections(b, x, y, err));
    TRY(normalise(b, b->y, err));
    TRY(linear_forward(b->ctx, tensor_2d(b->norm, b->dtype, n, D), &b->up, none, none,
                       tensor_2d(b->hidden, b->dtype, n, 4 * D), none, ACT_GELU_TANH, err));
    TRY(linear_forward(b->ctx, tensor_2d(b->hidden, b->dtype, n, 4 * D), &b->down, none, y, y, none,
                       ACT_NONE, err));
done:
    return st;
}
