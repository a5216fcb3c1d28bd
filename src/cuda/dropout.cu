/* Dropout, fused with the residual addition (contracts: ops.h; formulas: src/ops/dropout.c).
 *
 * A thread owns blocks of 4 elements and draws one Philox block for each, so that the mask is the
 * CPU's and is never stored: about 20 instructions an element, hidden behind the bytes, of which
 * every argument's pass once. The step, where it changes from run to run, is read from the GPU's
 * memory. */
#include "cuda/device.cuh"

static const int THREADS = 256;

struct dropout_rule {
    struct random_key key;
    float p, scale; /* scale = 1 / (1 - p) */
};
static struct dropout_rule rule_of(const void *params) {
    const struct dropout_params *p = (const struct dropout_params *)params;
    return {p->key, p->p, (float)(1 / (1 - (double)p->p))};
}

/* y = keep(x) scale (+ residual); `count` (4 or 8) elements a thread, moved `width` at a time. */
template <typename X, typename Y, int count, int width>
__global__ void dropout_kernel(const X *x, const float *residual, const int64_t *step, Y *y,
                               int64_t n, struct dropout_rule rule) {
    int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * count;
    if (i >= n)
        return;
    if (step)
        rule.key.step = (uint64_t)*step;
    float factor[count];
#pragma unroll
    for (int b = 0; b < count; b += 4) {
        uint32_t u[4];
        philox_block(rule.key, (uint64_t)(i + b) / 4, u);
#pragma unroll
        for (int k = 0; k < 4; k++)
            factor[b + k] = philox_uniform(u[k]) >= rule.p ? rule.scale : 0.0f;
    }
#pragma unroll
    for (int b = 0; b < count; b += width) {
        if (i + b + width > n) {
            if (width > 1) /* the last, shorter than a pack */
                for (int k = b; k < count && i + k < n; k++)
                    y[i + k] = from_float<Y>(to_float(x[i + k]) * factor[k] +
                                             (residual ? residual[i + k] : 0.0f));
            return;
        }
        float v[width], r[width];
        load_packed<X, width>(x + i + b, v);
        if (residual)
            load_packed<float, width>(residual + i + b, r);
#pragma unroll
        for (int k = 0; k < width; k++)
            v[k] = residual ? v[k] * factor[b + k] + r[k] : v[k] * factor[b + k];
        store_packed<Y, width>(y + i + b, v);
    }
}

template <typename X, typename Y>
static tril_status dropout_launch(struct op_context *ctx, const char *name, const struct tensor *x,
                                  const struct tensor *residual, const struct tensor *step,
                                  const struct tensor *y, const void *params,
                                  struct tril_error *err) {
    const X *px = (const X *)x->data;
    Y *py = (Y *)y->data;
    const float *pr = residual ? (const float *)residual->data : NULL;
    const int count = sizeof(X) + sizeof(Y) == 4 ? 8 : 4;
    int64_t n = tensor_count(x);
    bool packs = (uintptr_t)px % (count * sizeof(X)) == 0 &&
                 (uintptr_t)py % (count * sizeof(Y)) == 0 && (uintptr_t)pr % 16 == 0;
    bool wide = packs && !pr;
    auto *kernel = wide    ? dropout_kernel<X, Y, count, count>
                   : packs ? dropout_kernel<X, Y, count, 4>
                           : dropout_kernel<X, Y, count, 1>;
    return cuda_launch(ctx, name, err, kernel, dim3(cuda_blocks(n, count * THREADS)), dim3(THREADS),
                       0, px, pr, (const int64_t *)step->data, py, n, rule_of(params));
}

OP_FN(dropout_forward) {
    enum { X, RESIDUAL, STEP, Y };
    FOR_DTYPE(args[X].dtype, S, {
        FOR_DTYPE(args[Y].dtype, T, {
            return (dropout_launch<S, T>(ctx, "dropout_forward", &args[X], &args[RESIDUAL],
                                         &args[STEP], &args[Y], params, err));
        });
    });
}

OP_FN(dropout_backward) {
    enum { DY, STEP, DX };
    FOR_DTYPE(args[DY].dtype, S, {
        FOR_DTYPE(args[DX].dtype, T, {
            return (dropout_launch<S, T>(ctx, "dropout_backward", &args[DY], NULL, &args[STEP],
                                         &args[DX], params, err));
        });
    });
}
