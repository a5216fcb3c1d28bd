/* Attention of a device on tensors in host memory. Every argument gets a dense copy of its own on
 * the device (all in one allocation), so that nothing is assumed of how the caller's lie; the
 * integers, which kernels trust, are checked here as the CPU's operation checks them. */
#include "api/staged.h"

#include <string.h>

#include "api/device.h"
#include "base/memory.h"
#include "ops/attention_probabilities.h"
#include "ops/describe.h"

/* Between a tensor as it lies and its elements without gaps, by runs that are dense. */
static void pack(const struct tensor *t, char *dense, bool in) {
    int64_t size = (int64_t)dtype_size(t->dtype), run = 1, outer = 1;
    int axis = t->rank;
    while (axis > 0 && (t->shape[axis - 1] == 1 || t->stride[axis - 1] == run))
        run *= t->shape[--axis];
    for (int k = 0; k < axis; k++)
        outer *= t->shape[k];
    for (int64_t i = 0; i < outer; i++, dense += run * size) {
        int64_t rest = i, at = 0;
        for (int k = axis - 1; k >= 0; k--) {
            at += rest % t->shape[k] * t->stride[k];
            rest /= t->shape[k];
        }
        char *own = (char *)t->data + at * size;
        memcpy(in ? dense : own, in ? own : dense, (size_t)(run * size));
    }
}

/* Through `space` (as many bytes as the tensor has) where there are gaps. */
static tril_status copy_in(struct op_context *device, const struct tensor *t, void *to, void *space,
                           struct tril_error *err) {
    bool dense = tensor_is_dense(t);
    if (!dense)
        pack(t, space, true);
    return device->backend->upload(device, to, dense ? t->data : space, tensor_bytes(t), err);
}

static tril_status copy_out(struct op_context *device, const struct tensor *t, const void *from,
                            void *space, struct tril_error *err) {
    bool dense = tensor_is_dense(t);
    tril_status st =
        device->backend->download(device, dense ? t->data : space, from, tensor_bytes(t), err);
    if (st == TRIL_OK && !dense)
        pack(t, space, false);
    return st;
}

static struct tensor dense_at(const struct tensor *t, void *data) {
    struct tensor d = *t;
    int64_t stride = 1;
    d.data = data;
    for (int k = t->rank - 1; k >= 0; k--) {
        d.stride[k] = stride;
        stride *= t->shape[k];
    }
    return d;
}

static tril_status run(struct op_context *ctx, enum op_id id, const struct tensor *args,
                       const void *params, struct tril_error *err) {
    struct op_context *device = &((struct staged *)ctx->backend)->device;
    const struct backend *b = device->backend;
    const struct op_info *info = op_info_get(id);
    struct tensor there[OP_MAX_ARGS];
    int64_t total = 0, most = 0;
    void *memory = NULL, *space = NULL;
    tril_status st = TRIL_OK;
    for (int i = 0; i < info->arg_count; i++) {
        int64_t bytes = tensor_bytes(&args[i]);
        total += (bytes + 255) / 256 * 256;
        if (args[i].data && !tensor_is_dense(&args[i]) && bytes > most)
            most = bytes;
    }
    TRY(b->alloc(&memory, total, false, "attention's tensors", err));
    if (most > 0)
        TRY(mem_alloc(&space, (size_t)most, "attention's tensors", err));
    char *at = memory;
    for (int i = 0; i < info->arg_count; i++) {
        there[i] = args[i];
        if (!args[i].data)
            continue;
        there[i] = dense_at(&args[i], at);
        at += (tensor_bytes(&args[i]) + 255) / 256 * 256;
        if (op_arg_role(info, i, args, params) != ARG_OUT)
            TRY(copy_in(device, &args[i], there[i].data, space, err));
    }
    TRY(op_call(device, id, there, params, err));
    for (int i = 0; i < info->arg_count; i++)
        if (args[i].data && op_arg_role(info, i, args, params) != ARG_IN)
            TRY(copy_out(device, &args[i], there[i].data, space, err));
done:
    mem_free(space);
    b->release(memory);
    return st;
}

/* Runs it, or says that the host's scratch is not needed where that is the question. */
static tril_status run_or_measure(struct op_context *ctx, enum op_id id, const struct tensor *args,
                                  const void *params, struct tril_error *err) {
    if (!ctx->measuring)
        return run(ctx, id, args, params, err);
    op_scratch(ctx, 0);
    return op_scratch_error(ctx, op_info_get(id)->name, 0, err);
}

static tril_status staged_attention_forward(struct op_context *ctx, const struct tensor *args,
                                            const void *params, struct tril_error *err) {
    struct attention_call c;
    tril_status st = attention_unpack_forward(&c, args, params, err);
    return st == TRIL_OK ? run_or_measure(ctx, OP_ATTENTION_FORWARD, args, params, err) : st;
}

static tril_status staged_attention_backward(struct op_context *ctx, const struct tensor *args,
                                             const void *params, struct tril_error *err) {
    struct attention_call c;
    tril_status st = attention_unpack_backward(&c, args, params, err);
    return st == TRIL_OK ? run_or_measure(ctx, OP_ATTENTION_BACKWARD, args, params, err) : st;
}

static tril_status staged_attention_probabilities(struct op_context *ctx, const struct tensor *args,
                                                  const void *params, struct tril_error *err) {
    struct probabilities_call c;
    tril_status st = attention_unpack_probabilities(&c, args, params, err);
    return st == TRIL_OK ? run(ctx, OP_ATTENTION_PROBABILITIES, args, params, err) : st;
}

/* (Their one kind of integers, offsets, tril/attention.h has checked.) */
static tril_status staged_linear_forward(struct op_context *ctx, const struct tensor *args,
                                         const void *params, struct tril_error *err) {
    return run_or_measure(ctx, OP_LINEAR_ATTENTION_FORWARD, args, params, err);
}

static tril_status staged_linear_backward(struct op_context *ctx, const struct tensor *args,
                                          const void *params, struct tril_error *err) {
    return run_or_measure(ctx, OP_LINEAR_ATTENTION_BACKWARD, args, params, err);
}

tril_status staged_open(struct staged *s, struct op_context *ctx, const char *name,
                        struct tril_error *err) {
    tril_status st = TRIL_OK;
    TRY(device_open(&s->device, name, err));
    s->shim = *backend_reference();
    s->shim.name = s->device.backend->name;
    s->shim.table[OP_ATTENTION_FORWARD] = staged_attention_forward;
    s->shim.table[OP_ATTENTION_BACKWARD] = staged_attention_backward;
    s->shim.table[OP_ATTENTION_PROBABILITIES] = staged_attention_probabilities;
    s->shim.table[OP_LINEAR_ATTENTION_FORWARD] = staged_linear_forward;
    s->shim.table[OP_LINEAR_ATTENTION_BACKWARD] = staged_linear_backward;
    TRY(op_context_init(ctx, &s->shim, err));
done:
    return st;
}

void staged_close(struct staged *s) {
    op_context_free(&s->device);
    *s = (struct staged){0};
}
