/* Linear layers on the CPU: arguments to matrix products, weights and their packings, and who
 * multiplies.
 *
 * A weight that will not be updated (or is never differentiated) is packed once: panels for the
 * forward product, and of the transpose if a backward product was announced. A weight in training
 * is not: each product packs the panels it needs, block by block, while they are in the cache that
 * will be read next. That costs less than repacking all of a weight after every update (which would
 * write it to memory and read it back, twice), and no memory. */
#include "cpu/linear.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/slab.h"
#include "base/threads.h"
#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/onednn.h"

struct packed_weight {
    int64_t outputs, inputs;
    enum dtype type;          /* of the panels */
    void *forward, *backward; /* panels of w and of its transpose; NULL: not packed */
    struct slab *forward_slab, *backward_slab;
};

/* ---------------------------------------------------------------- weights */

static bool packs_forward(unsigned uses) {
    return (uses & WEIGHT_FORWARD) && ((uses & WEIGHT_STATIC) || !(uses & WEIGHT_BACKWARD));
}
static bool packs_backward(unsigned uses) {
    return (uses & WEIGHT_BACKWARD) && (uses & WEIGHT_STATIC);
}
static enum dtype panel_type(enum dtype t) {
    return t == DT_BF16 ? DT_BF16 : DT_F32;
}

static struct gemm_operand operand(const struct tensor *t, bool transposed) {
    return (struct gemm_operand){.data = t->data,
                                 .type = t->dtype,
                                 .ld = t->stride[0],
                                 .rows = t->shape[transposed ? 1 : 0],
                                 .k = t->shape[transposed ? 0 : 1],
                                 .transposed = transposed};
}

/* Whether panels answer every product that was announced, for good. oneDNN wants plain values. */
static bool values_unneeded(unsigned uses) {
    return (uses & WEIGHT_STATIC) && (!(uses & WEIGHT_FORWARD) || packs_forward(uses)) &&
           (!(uses & WEIGHT_BACKWARD) || packs_backward(uses)) &&
           linear_engine_get() != LINEAR_ONEDNN;
}

tril_status linear_weight_prepare(const struct gemm_kernels *kernels, struct weight *w,
                                  unsigned uses, struct tril_error *err) {
    static const char what[] = "the packed weights";
    tril_status st = TRIL_OK;
    linear_weight_release(w);
    w->uses = uses;
    if (!packs_forward(uses) && !packs_backward(uses))
        return TRIL_OK;
    const struct tensor *v = &w->value;
    if (v->rank != 2 || !(v->dtype == DT_F32 || v->dtype == DT_BF16 || v->dtype == DT_F16))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a linear weight is a matrix of fp32, bf16 or fp16, not %s of rank %d",
                         dtype_name(v->dtype), v->rank);
    struct packed_weight *p;
    void *memory;
    TRY(mem_alloc_zero(&memory, sizeof *p, "a weight", err));
    p = w->state = memory;
    *p = (struct packed_weight){
        .outputs = v->shape[0], .inputs = v->shape[1], .type = panel_type(v->dtype)};
    if (packs_forward(uses))
        TRY(slab_alloc(&p->forward_slab, &p->forward,
                       (size_t)gemm_panels_bytes(p->outputs, p->inputs, p->type), what, err));
    if (packs_backward(uses))
        TRY(slab_alloc(&p->backward_slab, &p->backward,
                       (size_t)gemm_panels_bytes(p->inputs, p->outputs, p->type), what, err));
    TRY(linear_weight_refresh(kernels, w));
    if (values_unneeded(uses))
        w->value.data = NULL;
done:
    if (st != TRIL_OK)
        linear_weight_release(w);
    return st;
}

tril_status linear_weight_refresh(const struct gemm_kernels *kernels, struct weight *w) {
    struct packed_weight *p = w->state;
    if (!p || !w->value.data)
        return TRIL_OK;
    struct gemm_operand straight = operand(&w->value, false);
    struct gemm_operand transposed = operand(&w->value, true);
    if (p->forward)
        gemm_panels_pack(kernels, &straight, p->type, p->forward);
    if (p->backward)
        gemm_panels_pack(kernels, &transposed, p->type, p->backward);
    return TRIL_OK;
}

void linear_weight_release(struct weight *w) {
    struct packed_weight *p = w->state;
    if (!p)
        return;
    slab_release(p->forward_slab);
    slab_release(p->backward_slab);
    mem_free(p);
    w->state = NULL;
}

int64_t linear_weight_bytes(int64_t outputs, int64_t inputs, enum dtype t, unsigned uses) {
    int64_t bytes = 0;
    if (packs_forward(uses))
        bytes += gemm_panels_bytes(outputs, inputs, panel_type(t));
    if (packs_backward(uses))
        bytes += gemm_panels_bytes(inputs, outputs, panel_type(t));
    return values_unneeded(uses) ? bytes - outputs * inputs * (int64_t)dtype_size(t) : bytes;
}

/* ---------------------------------------------------------------- who multiplies */

static _Atomic int engine = -1;

enum linear_engine linear_engine_get(void) {
    int e = atomic_load_explicit(&engine, memory_order_relaxed);
    if (e < 0) {
        static const char *const names[] = {"own", "fma", "onednn"};
        const char *s = getenv("TRIL_GEMM");
        e = LINEAR_OWN;
        for (int i = 0; s && i < (int)(sizeof names / sizeof *names); i++)
            if (strcmp(s, names[i]) == 0)
                e = i;
        atomic_store(&engine, e);
    }
    return (enum linear_engine)e;
}

void linear_engine_set(enum linear_engine e) {
    atomic_store(&engine, e);
}

/* Our own product is the default everywhere: its order of summation depends on no batch and on no
 * number of threads, and its loops share our pool. oneDNN's fp32 is 3 to 5% faster at GPT-2's
 * shapes on AVX2 while its own threads have the processors to themselves, and slower where they
 * meet ours (docs/benchmarks.md); TRIL_GEMM=onednn asks for it. */
struct finish {
    const struct gemm_kernels *kernels;
    const struct gemm *g;
    const float *c;
};
static void epilogue_job(void *arg, int64_t begin, int64_t end, int worker) {
    const struct finish *f = arg;
    (void)worker;
    int64_t n = f->g->b.rows;
    f->kernels->epilogue(&f->g->out, f->c + begin * n, n, begin, end - begin, 0, n);
}
static void sums_job(void *arg, int64_t begin, int64_t end, int worker) {
    const struct finish *f = arg;
    (void)worker;
    f->kernels->row_sums(&f->g->a, begin, end, 0, f->g->a.k, f->g->row_sums);
}

/* The product by oneDNN; false if it has none (nothing is changed then). */
static bool run_onednn(const struct gemm_kernels *kernels, struct op_context *ctx,
                       const struct gemm *g) {
    const struct gemm_output *o = &g->out;
    struct finish f = {.kernels = kernels, .g = g};
    bool adds = o->residual && o->residual == o->y && o->residual_ld == o->ld;
    if (o->type == DT_F32 && !o->bias && !o->pre && o->activation == ACT_NONE &&
        (adds || !o->residual)) {
        if (!onednn_gemm(&g->a, &g->b, o->y, o->ld, adds))
            return false;
    } else {
        float *c = op_scratch(ctx, g->a.rows * g->b.rows * 4);
        if (!c || !onednn_gemm(&g->a, &g->b, c, g->b.rows, false))
            return false;
        f.c = c;
        parallel_for(g->a.rows, 16, epilogue_job, &f);
    }
    if (g->row_sums)
        parallel_for(g->a.rows, 64, sums_job, &f);
    return true;
}

static tril_status run(const struct gemm_kernels *kernels, struct op_context *ctx,
                       const struct gemm *g, struct tril_error *err) {
    struct gemm_kernels fma;
    enum linear_engine e = linear_engine_get();
    if (e == LINEAR_ONEDNN && g->b.data && run_onednn(kernels, ctx, g))
        return TRIL_OK;
    if (e == LINEAR_FMA) {
        fma = *kernels;
        fma.amx = NULL;
        kernels = &fma;
    }
    return gemm_run(kernels, ctx, g, err);
}

/* ---------------------------------------------------------------- the operations */

/* B: packed if the weight was, else the values. */
static void weight_operand(struct gemm *g, const struct tensor *w, const struct linear_params *p,
                           bool transposed) {
    const struct packed_weight *state = p && p->weight ? p->weight->state : NULL;
    g->b = operand(w, transposed);
    if (state) {
        g->panels = transposed ? state->backward : state->forward;
        g->panel_type = state->type;
    }
}

static tril_status check_values(const struct gemm *g, const char *op, struct tril_error *err) {
    if (g->panels || g->b.data || g->b.rows == 0 || g->b.k == 0)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT,
                     "%s: the values of this static weight were released and it was not prepared "
                     "for this product: ask weight_prepare for it",
                     op);
}

tril_status linear_forward_with(const struct gemm_kernels *kernels, struct op_context *ctx,
                                const struct tensor *args, const void *params,
                                struct tril_error *err) {
    enum { X, W, BIAS, RESIDUAL, Y, PRE };
    const struct linear_params *p = params;
    const struct tensor *y = &args[Y], *pre = &args[PRE];
    struct gemm g = {.a = operand(&args[X], false),
                     .out = {.y = y->data,
                             .type = y->dtype,
                             .ld = y->stride[0],
                             .bias = args[BIAS].data,
                             .residual = args[RESIDUAL].data,
                             .residual_ld = args[RESIDUAL].stride[0],
                             .pre = pre->data,
                             .pre_type = pre->dtype,
                             .pre_ld = pre->stride[0],
                             .activation = p ? p->activation : ACT_NONE}};
    weight_operand(&g, &args[W], p, false);
    tril_status st = check_values(&g, "linear_forward", err);
    return st == TRIL_OK ? run(kernels, ctx, &g, err) : st;
}

tril_status linear_backward_input_with(const struct gemm_kernels *kernels, struct op_context *ctx,
                                       const struct tensor *args, const void *params,
                                       struct tril_error *err) {
    enum { DY, W, DX };
    const struct tensor *dx = &args[DX];
    struct gemm g = {.a = operand(&args[DY], false),
                     .out = {.y = dx->data, .type = dx->dtype, .ld = dx->stride[0]}};
    weight_operand(&g, &args[W], params, true);
    tril_status st = check_values(&g, "linear_backward_input", err);
    return st == TRIL_OK ? run(kernels, ctx, &g, err) : st;
}

tril_status linear_backward_weight_with(const struct gemm_kernels *kernels, struct op_context *ctx,
                                        const struct tensor *args, const void *params,
                                        struct tril_error *err) {
    enum { DY, X, DW, DBIAS };
    const struct linear_params *p = params;
    const struct tensor *dw = &args[DW];
    struct gemm g = {.a = operand(&args[DY], true),
                     .b = operand(&args[X], true),
                     .out = {.y = dw->data,
                             .type = DT_F32,
                             .ld = dw->stride[0],
                             .residual = p->overwrite ? NULL : dw->data,
                             .residual_ld = dw->stride[0]},
                     .row_sums = args[DBIAS].data};
    return run(kernels, ctx, &g, err);
}
