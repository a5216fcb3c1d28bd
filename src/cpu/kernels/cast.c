/* Conversion and scaled addition (contracts: src/ops/cast.c). */
#include "cpu/kernels/convert.h"

struct call {
    struct tensor x, y;
    float alpha;
};

static void cast_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    FOR_FLOAT(tx, c->x.dtype, FOR_FLOAT(ty, c->y.dtype, {
                  convert_run(element(&c->y, begin), ty, element(&c->x, begin), tx, end - begin);
              }););
}

static void accumulate_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct call *c = arg;
    float *y = c->y.data;
    vf alpha = vf_set(c->alpha);
    FOR_FLOAT(tx, c->x.dtype, {
        VF_FOR(i, begin, end, {
            vf x = vf_load_as(c->x.data, tx, i, lanes);
            vf_store_n(y + i, vf_fma(alpha, x, vf_load_n(y + i, lanes)), lanes);
        });
    });
}

static tril_status cast_kernel(struct op_context *ctx, const struct tensor *a, const void *params,
                               struct tril_error *err) {
    (void)ctx;
    (void)params;
    (void)err;
    struct call c = {.x = a[0], .y = a[1]};
    int64_t n = tensor_count(&c.x);
    int64_t bytes = (int64_t)(dtype_size(c.x.dtype) + dtype_size(c.y.dtype));
    parallel_for(n, chunk_elements(n, bytes), cast_chunk, &c);
    return TRIL_OK;
}

static tril_status accumulate_kernel(struct op_context *ctx, const struct tensor *a,
                                     const void *params, struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct accumulate_params *p = params;
    struct call c = {a[0], a[1], p->alpha};
    int64_t n = tensor_count(&c.x);
    parallel_for(n, chunk_elements(n, 8 + (int64_t)dtype_size(c.x.dtype)), accumulate_chunk, &c);
    return TRIL_OK;
}

void LEVEL(register_cast)(struct backend *b) {
    b->table[OP_CAST] = cast_kernel;
    b->table[OP_ACCUMULATE] = accumulate_kernel;
}
