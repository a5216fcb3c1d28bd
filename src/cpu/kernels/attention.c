/* Which implementation of attention computes a call: the flash kernels, which stand in the table
 * before this file's turn, or the one that the parameters ask for. */
#include "cpu/kernels/attention_implementations.h"

static op_fn *flash_forward, *flash_backward;

static tril_status forward(struct op_context *ctx, const struct tensor *args, const void *params,
                           struct tril_error *err) {
    switch (((const struct attention_params *)params)->implementation) {
    case ATTENTION_FUSED:
        return LEVEL(attention_fused_forward)(ctx, args, params, err);
    case ATTENTION_MATERIALISED:
        return LEVEL(attention_materialised_forward)(ctx, args, params, err);
    default:
        return flash_forward(ctx, args, params, err);
    }
}

static tril_status backward(struct op_context *ctx, const struct tensor *args, const void *params,
                            struct tril_error *err) {
    switch (((const struct attention_params *)params)->implementation) {
    case ATTENTION_FUSED:
        return LEVEL(attention_fused_backward)(ctx, args, params, err);
    case ATTENTION_MATERIALISED:
        return LEVEL(attention_materialised_backward)(ctx, args, params, err);
    default:
        return flash_backward(ctx, args, params, err);
    }
}

void LEVEL(register_attention)(struct backend *b) {
    flash_forward = b->table[OP_ATTENTION_FORWARD];
    flash_backward = b->table[OP_ATTENTION_BACKWARD];
    b->table[OP_ATTENTION_FORWARD] = forward;
    b->table[OP_ATTENTION_BACKWARD] = backward;
}
