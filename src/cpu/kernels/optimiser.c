/* The optimiser's passes over all parameters (contracts and formulas: src/ops/optimiser.c). They
 * are limited by memory: 4 bytes read per element here, 28 to 30 moved per element in adamw. */
#include "cpu/kernels/loops.h"

/* ------------------------------------------------------------------ sum_squares */

typedef double vd __attribute__((vector_size(4 * VF_WIDTH))); /* VF_WIDTH / 2 doubles */
typedef float vf_half __attribute__((vector_size(2 * VF_WIDTH)));

#if VF_WIDTH == 16
#define LOW_HALF 0, 1, 2, 3, 4, 5, 6, 7
#define HIGH_HALF 8, 9, 10, 11, 12, 13, 14, 15
#elif VF_WIDTH == 8
#define LOW_HALF 0, 1, 2, 3
#define HIGH_HALF 4, 5, 6, 7
#else
#define LOW_HALF 0, 1
#define HIGH_HALF 2, 3
#endif

/* In doubles: a gradient's square overflows fp32 long before its norm is not finite. */
SIMD void add_squares(vf x, vd *low, vd *high) {
    vd a = __builtin_convertvector((vf_half)__builtin_shufflevector(x, x, LOW_HALF), vd);
    vd b = __builtin_convertvector((vf_half)__builtin_shufflevector(x, x, HIGH_HALF), vd);
    *low += a * a;
    *high += b * b;
}

struct squares {
    const float *x;
    double *sums; /* one per chunk */
    int64_t grain;
};

static void sum_squares_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct squares *q = arg;
    vd s[4] = {{0}, {0}, {0}, {0}};
    int64_t i = begin;
    for (; i + 2 * VF_WIDTH <= end; i += 2 * VF_WIDTH) {
        add_squares(vf_load(q->x + i), &s[0], &s[1]);
        add_squares(vf_load(q->x + i + VF_WIDTH), &s[2], &s[3]);
    }
    VF_FOR(j, i, end, add_squares(vf_load_n(q->x + j, lanes), &s[0], &s[1]););
    vd t = (s[0] + s[1]) + (s[2] + s[3]);
    double sum = 0;
    for (int k = 0; k < VF_WIDTH / 2; k++)
        sum += t[k];
    q->sums[begin / q->grain] = sum;
}

static tril_status sum_squares_kernel(struct op_context *ctx, const struct tensor *a,
                                      const void *params, struct tril_error *err) {
    (void)params;
    int64_t n = tensor_count(&a[0]);
    struct squares q = {.x = a[0].data, .grain = chunk_elements(n, 4)};
    int64_t chunks = (n + q.grain - 1) / q.grain;
    q.sums = op_scratch(ctx, chunks * (int64_t)sizeof *q.sums);
    if (!q.sums)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the sums of sum_squares");
    parallel_for(n, q.grain, sum_squares_chunk, &q);
    double total = 0;
    for (int64_t c = 0; c < chunks; c++)
        total += q.sums[c];
    *(double *)a[1].data += total;
    return TRIL_OK;
}

/* ------------------------------------------------------------------ adamw */

struct adamw {
    float *p, *m, *v;
    const float *g;
    void *copy;
    enum dtype copy_type; /* F32: no copy */
    float beta1, beta2, eps, lr, shrink /* 1 - lr decay */, c1, c2, scale;
};

SIMD void adamw_elements(const struct adamw *o, enum dtype copy, int64_t begin, int64_t end) {
    vf b1 = vf_set(o->beta1), b2 = vf_set(o->beta2), rest1 = vf_set(1.0f - o->beta1);
    vf rest2 = vf_set(1.0f - o->beta2), eps = vf_set(o->eps), shrink = vf_set(o->shrink);
    vf step = vf_set(-o->lr * o->c1), c2 = vf_set(o->c2), scale = vf_set(o->scale);
    VF_FOR(i, begin, end, {
        vf g = vf_load_n(o->g + i, lanes) * scale;
        vf m = vf_fma(b1, vf_load_n(o->m + i, lanes), rest1 * g);
        vf v = vf_fma(b2, vf_load_n(o->v + i, lanes), rest2 * g * g);
        vf move = step * m / (vf_sqrt(v * c2) + eps);
        vf p = vf_fma(shrink, vf_load_n(o->p + i, lanes), move);
        vf_store_n(o->m + i, m, lanes);
        vf_store_n(o->v + i, v, lanes);
        vf_store_n(o->p + i, p, lanes);
        if (copy != DT_F32)
            vf_store_as(o->copy, copy, i, p, lanes);
    });
}

static void adamw_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const struct adamw *o = arg;
    FOR_FLOAT(copy, o->copy_type, adamw_elements(o, copy, begin, end););
}

static tril_status adamw_kernel(struct op_context *ctx, const struct tensor *a, const void *params,
                                struct tril_error *err) {
    (void)ctx;
    (void)err;
    const struct adamw_params *p = params;
    const float *hyper = a[5].data;
    if (hyper[HYPER_FOUND_INF] != 0)
        return TRIL_OK;
    struct adamw o = {.p = a[0].data,
                      .g = a[1].data,
                      .m = a[2].data,
                      .v = a[3].data,
                      .copy = a[4].data,
                      .copy_type = a[4].data ? a[4].dtype : DT_F32,
                      .beta1 = p->beta1,
                      .beta2 = p->beta2,
                      .eps = p->eps,
                      .lr = hyper[HYPER_LR],
                      .shrink = 1.0f - hyper[HYPER_LR] * p->decay,
                      .c1 = hyper[HYPER_CORRECTION1],
                      .c2 = hyper[HYPER_CORRECTION2],
                      .scale = hyper[HYPER_GRAD_SCALE]};
    int64_t n = tensor_count(&a[0]);
    parallel_for(n, chunk_elements(n, 30), adamw_chunk, &o);
    return TRIL_OK;
}

/* clip_factor is a few scalars: the reference serves. */
void LEVEL(register_optimiser)(struct backend *b) {
    b->table[OP_SUM_SQUARES] = sum_squares_kernel;
    b->table[OP_ADAMW] = adamw_kernel;
}
