/* Linear layers: the kernels of one level, handed to the driver. */
#include "cpu/linear.h"

#include "cpu/kernels/gemm_amx.h"
#include "cpu/kernels/gemm_fma.h"

static const struct gemm_kernels kernels = {
    .fma = &fma_path,
#if AMX_TILES
    .amx = &amx_path,
#endif
    .pack_b = pack_b,
    .widen = widen,
    .epilogue = epilogue,
    .row_sums = row_sums,
};

static tril_status forward(struct op_context *ctx, const struct tensor *args, const void *params,
                           struct tril_error *err) {
    return linear_forward_with(&kernels, ctx, args, params, err);
}
static tril_status backward_input(struct op_context *ctx, const struct tensor *args,
                                  const void *params, struct tril_error *err) {
    return linear_backward_input_with(&kernels, ctx, args, params, err);
}
static tril_status backward_weight(struct op_context *ctx, const struct tensor *args,
                                   const void *params, struct tril_error *err) {
    return linear_backward_weight_with(&kernels, ctx, args, params, err);
}
static tril_status prepare(struct op_context *ctx, struct weight *w, unsigned uses,
                           struct tril_error *err) {
    (void)ctx;
    return linear_weight_prepare(&kernels, w, uses, err);
}
static tril_status refresh(struct op_context *ctx, struct weight *w, struct tril_error *err) {
    (void)ctx;
    (void)err;
    return linear_weight_refresh(&kernels, w);
}

void LEVEL(register_linear)(struct backend *b) {
    b->table[OP_LINEAR_FORWARD] = forward;
    b->table[OP_LINEAR_BACKWARD_INPUT] = backward_input;
    b->table[OP_LINEAR_BACKWARD_WEIGHT] = backward_weight;
    b->weight_prepare = prepare;
    b->weight_refresh = refresh;
    b->weight_release = linear_weight_release;
    b->weight_bytes = linear_weight_bytes;
}
