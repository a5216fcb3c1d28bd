/* The optimiser's passes over all parameters (contracts and formulas: src/ops/optimiser.c). They
 * are limited by memory: 4 bytes read per element here, 28 to 30 moved per element in adamw. */
#include "cpu/kernels/loops.h"

/* ------------------------------------------------------------------ sum_squares */

struct squares {
    const float *x;
    double *sums; /* one per chunk */
    int64_t grain;
};

/* In doubles: a gradient's square overflows fp32 long before its norm is not finite. A chunk is
 * read as four streams side by side, since one does not fill the memory's pipeline (measured on Zen
 * 3: 15 against 24 GB/s). */
static void sum_squares_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    enum { STREAMS = 4, STEP = VF_WIDTH };
    const struct squares *q = arg;
    int64_t part = (end - begin) / STREAMS / STEP * STEP;
    vd s[2 * STREAMS] = {{0}};
    for (int64_t i = 0; i < part; i += STEP) {
        for (int k = 0; k < 2 * STREAMS; k++) {
            vd a = vd_load_f32(q->x + begin + k / 2 * part + i + k % 2 * (STEP / 2));
            s[k] += a * a;
        }
    }
    vd t = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    double sum = 0;
    for (int k = 0; k < VF_WIDTH / 2; k++)
        sum += t[k];
    for (int64_t i = begin + STREAMS * part; i < end; i++)
        sum += (double)q->x[i] * (double)q->x[i];
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
