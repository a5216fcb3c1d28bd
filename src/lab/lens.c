/* The lens: one shim per operation, made from the list of operations. */
#include "lab/lens.h"

#include <string.h>

#include "base/system.h"
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
        if (info->flops)
            lens->flops[id] += info->flops(args, params);
    }
    double begun = clock_seconds();
    ctx->backend = lens->inner;
    if (lens->linear && forward)
        st = linear_forward_answer(ctx, args, err);
    else if (lens->linear && backward)
        st = linear_backward_answer(ctx, args, err);
    else
        st = lens->inner->table[id](ctx, args, params, err);
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
