/* Dropout (contract: src/ops/dropout.c): the mask is made again wherever it is needed, a vector of
 * blocks of random numbers at a time. */
#include "cpu/kernels/loops.h"
#include "cpu/kernels/philox.h"

struct dropout {
    struct tensor x, residual, y; /* residual: absent in the backward */
    struct random_key key;
    float p;
};

/* Elements from i on: `lanes` of the vector `k` of the two that a call of philox makes. */
SIMD void dropout_vector(const struct dropout *d, enum dtype tx, enum dtype ty, int64_t i,
                         int lanes, vf uniform) {
    vf x = vf_load_as(d->x.data, tx, i, lanes);
    /* As the reference: x times 0 where dropped, so that NaN and infinity show. */
    vf factor = vf_select(vf_less(uniform, vf_set(d->p)), vf_zero(), vf_set(1.0f / (1.0f - d->p)));
    vf y = x * factor;
    if (d->residual.data)
        y = vf_fma(x, factor, vf_load_n((const float *)d->residual.data + i, lanes));
    vf_store_as(d->y.data, ty, i, y, lanes);
}

SIMD void dropout_elements(const struct dropout *d, enum dtype tx, enum dtype ty, int64_t begin,
                           int64_t end) {
    struct philox random = philox_begin(&d->key);
    vf uniform[2];
    int64_t i = begin; /* a multiple of PHILOX_ELEMENTS */
    for (; i + PHILOX_ELEMENTS <= end; i += PHILOX_ELEMENTS) {
        philox_uniform(&random, (uint64_t)i / 4, uniform);
        dropout_vector(d, tx, ty, i, VF_WIDTH, uniform[0]);
        dropout_vector(d, tx, ty, i + VF_WIDTH, VF_WIDTH, uniform[1]);
    }
    if (i < end) {
        philox_uniform(&random, (uint64_t)i / 4, uniform);
        for (int k = 0; k < 2 && i < end; k++, i += VF_WIDTH)
            dropout_vector(d, tx, ty, i, end - i < VF_WIDTH ? (int)(end - i) : VF_WIDTH,
                           uniform[k]);
    }
}

static void dropout_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct dropout *d = arg;
    FOR_ACT(tx, d->x.dtype, FOR_ACT(ty, d->y.dtype, dropout_elements(d, tx, ty, begin, end);););
}

static tril_status dropout_run(struct dropout *d, const struct tensor *step) {
    if (step->data)
        d->key.step = (uint64_t) * (const int64_t *)step->data;
    int64_t n = tensor_count(&d->x);
    int64_t bytes = (int64_t)dtype_size(d->x.dtype) + (int64_t)dtype_size(d->y.dtype) +
                    (d->residual.data ? 4 : 0);
    parallel_for(n, chunk_elements(n, bytes), dropout_chunk, d);
    return TRIL_OK;
}

static tril_status dropout_forward_kernel(struct op_context *ctx, const struct tensor *a,
                                          const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct dropout_params *p = params;
    struct dropout d = {.x = a[0], .residual = a[1], .y = a[3], .key = p->key, .p = p->p};
    return dropout_run(&d, &a[2]);
}

static tril_status dropout_backward_kernel(struct op_context *ctx, const struct tensor *a,
                                           const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct dropout_params *p = params;
    struct dropout d = {.x = a[0], .y = a[2], .key = p->key, .p = p->p};
    return dropout_run(&d, &a[1]);
}

void LEVEL(register_dropout)(struct backend *b) {
    b->table[OP_DROPOUT_FORWARD] = dropout_forward_kernel;
    b->table[OP_DROPOUT_BACKWARD] = dropout_backward_kernel;
}
