/* The lens: one shim per operation, made from the list of operations. */
#include "lab/lens.h"

#include <string.h>

#include "base/system.h"
#include "lab/attend.h"
#include "ops/attention.h"

/* The model's attention answered by linear attention. There is no log-sum-exp: its buffer keeps
 * whatever it holds, and the backward does not look at it. */
static tril_status linear_forward_answer(struct op_context *ctx, const struct tensor *args,
                                         struct tril_error *err) {
    struct tensor none = tensor_none();
    return linear_attention_forward(ctx, args[F_Q], args[F_K], args[F_V], args[F_OFFSETS], none,
                                    args[F_O], none,
                                    (struct linear_attention_params){.causal = true}, err);
}

static tril_status linear_backward_answer(struct op_context *ctx, const struct tensor *args,
                                          struct tril_error *err) {
    struct tensor none = tensor_none();
    return linear_attention_backward(ctx, args[B_Q], args[B_K], args[B_V], args[B_OFFSETS], none,
                                     args[B_O], args[B_DO], none, args[B_DQ], args[B_DK],
                                     args[B_DV], none,
                                     (struct linear_attention_params){.causal = true}, err);
}

/* q, k and v lie in one fused buffer, as the model's do. */
static tril_status standard_answer(struct op_context *ctx, const struct tensor *args,
                                   const struct attention_params *p, struct tril_error *err) {
    struct attend a = {.ctx = ctx,
                       .B = 1,
                       .T = args[F_Q].shape[0],
                       .H = args[F_Q].shape[1],
                       .d = args[F_Q].shape[2],
                       .dtype = DT_F32,
                       .row = args[F_Q].stride[0],
                       .q = args[F_Q].data,
                       .k = args[F_K].data,
                       .v = args[F_V].data,
                       .o = args[F_O].data,
                       .params = *p};
    struct standard s;
    if (args[F_Q].dtype != DT_F32 || args[F_OFFSETS].shape[0] != 2 ||
        args[F_K].stride[0] != a.row || args[F_K].shape[0] != a.T || args[F_K].shape[1] != a.H ||
        args[F_O].stride[0] != a.H * a.d)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the textbook's attention takes one whole sequence in fp32, without a "
                         "cache and with as many key heads as query heads");
    tril_status st = standard_create(&s, &a, err);
    if (st == TRIL_OK)
        st = standard_forward(&s, err);
    standard_free(&s);
    return st;
}

/* Memory for a product whose residual is its output. */
static tril_status lens_space(struct lens *lens, int64_t bytes, struct tril_error *err) {
    if (bytes <= lens->space_bytes)
        return TRIL_OK;
    lens->inner->release(lens->space);
    lens->space_bytes = 0;
    tril_status st = lens->inner->alloc(&lens->space, bytes, false, "an unfused product", err);
    if (st == TRIL_OK)
        lens->space_bytes = bytes;
    return st;
}

static struct tensor flat(struct tensor t) {
    return tensor_1d(t.data, t.dtype, tensor_count(&t));
}

/* The product (with its bias, as frameworks have it), then the activation or the residual. */
static tril_status unfused_linear(struct lens *lens, struct op_context *ctx,
                                  const struct tensor *args, const struct linear_params *p,
                                  struct tril_error *err) {
    enum { X, W, BIAS, RESIDUAL, Y, PRE, COUNT };
    struct tensor plain[COUNT], y = args[Y], residual = args[RESIDUAL];
    struct linear_params alone = *p;
    op_fn *linear = lens->inner->table[OP_LINEAR_FORWARD];
    bool activated = p->activation != ACT_NONE, dense = tensor_is_dense(&y);
    tril_status st = TRIL_OK;
    memcpy(plain, args, sizeof plain);
    if (activated == (residual.data != NULL) || !dense || (activated && y.dtype != args[X].dtype) ||
        (!activated && y.dtype != DT_F32))
        return linear(ctx, args, p, err);
    plain[RESIDUAL] = plain[PRE] = tensor_none();
    alone.activation = ACT_NONE;
    if (activated) {
        if (args[PRE].data)
            plain[Y] = args[PRE];
        TRY(linear(ctx, plain, &alone, err));
        return activation_forward(ctx, plain[Y], y, p->activation, err);
    }
    if (residual.data == y.data) {
        TRY(lens_space(lens, tensor_bytes(&y), err));
        plain[Y].data = lens->space;
        residual = plain[Y];
    }
    TRY(linear(ctx, plain, &alone, err));
    st = accumulate(ctx, flat(residual), flat(y), 1, err);
done:
    return st;
}

/* Counting may look into integers, lengths among them, which a device's memory does not show. */
static bool countable(const struct lens *lens, const struct op_info *info,
                      const struct tensor *args) {
    bool shown = info->flops != NULL;
    for (int i = 0; lens->inner->device && i < info->arg_count; i++)
        shown = shown && !(args[i].data && args[i].dtype == DT_I32);
    return shown;
}

static tril_status through(struct op_context *ctx, enum op_id id, const struct tensor *args,
                           const void *params, struct tril_error *err) {
    struct lens *lens = (struct lens *)ctx->backend;
    const struct op_info *info = op_info_get(id);
    bool forward = id == OP_ATTENTION_FORWARD, backward = id == OP_ATTENTION_BACKWARD;
    struct attention_params changed;
    tril_status st;
    if (forward || backward) {
        changed = *(const struct attention_params *)params;
        if (lens->other)
            changed.implementation = lens->implementation;
        if (lens->rules) {
            changed.rules = lens->rules->rules;
            changed.rule_count = lens->rules->rule_count;
            changed.head_rule = lens->rules->head_rule;
        }
        params = &changed;
    }
    if (!ctx->measuring) {
        lens->calls[id]++;
        if (countable(lens, info, args))
            lens->flops[id] += info->flops(args, params);
    }
    double begun = clock_seconds();
    ctx->backend = lens->inner;
    if (lens->standard && forward)
        st = standard_answer(ctx, args, params, err);
    else if (lens->unfused && id == OP_LINEAR_FORWARD)
        st = unfused_linear(lens, ctx, args, params, err);
    else if (lens->linear && forward)
        st = linear_forward_answer(ctx, args, err);
    else if (lens->linear && backward)
        st = linear_backward_answer(ctx, args, err);
    else
        st = op_call(ctx, id, args, params, err); /* (the host's where a device has no kernel) */
    ctx->backend = &lens->shim;
    lens->seconds[id] += clock_seconds() - begun;
    return st;
}

#define OP(id, name)                                                                               \
    static tril_status through_##name(struct op_context *ctx, const struct tensor *args,           \
                                      const void *params, struct tril_error *err) {                \
        return through(ctx, OP_##id, args, params, err);                                           \
    }
#include "ops/op_list.inc"
#undef OP

tril_status lens_open(struct lens *lens, const struct op_context *ctx, struct tril_error *err) {
    static op_fn *const shims[OP_COUNT] = {
#define OP(id, name) [OP_##id] = through_##name,
#include "ops/op_list.inc"
#undef OP
    };
    *lens = (struct lens){.inner = ctx->backend, .shim = *ctx->backend};
    memcpy(lens->shim.table, shims, sizeof shims);
    return op_context_init(&lens->ctx, &lens->shim, err);
}

void lens_close(struct lens *lens) {
    lens->inner->release(lens->space);
    op_context_free(&lens->ctx);
}

void lens_reset(struct lens *lens) {
    memset(lens->flops, 0, sizeof lens->flops);
    memset(lens->seconds, 0, sizeof lens->seconds);
    memset(lens->calls, 0, sizeof lens->calls);
}

double lens_flops(const struct lens *lens) {
    double total = 0;
    for (int i = 0; i < OP_COUNT; i++)
        total += lens->flops[i];
    return total;
}
