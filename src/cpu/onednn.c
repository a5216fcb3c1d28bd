/* Matrix products by oneDNN. fp32 goes through its BLAS call; bf16 through the matmul primitive,
 * whose description changed between versions 2 (structures) and 3 (opaque handles): the two #if
 * below are all that differs. Primitives are kept in a small cache, oldest out; the library's
 * scratch is ours and only grows. */
#include "cpu/onednn.h"

#ifndef TRIL_ONEDNN

bool onednn_gemm(const struct gemm_operand *a, const struct gemm_operand *b, float *c, int64_t ldc,
                 bool accumulate) {
    (void)a, (void)b, (void)c, (void)ldc, (void)accumulate;
    return false;
}

#else

#include <dnnl.h>
#include <omp.h>
#include <pthread.h>

#include "base/memory.h"
#include "base/threads.h"
#include "cpu/cpu.h"

#define CACHE_SIZE 64

struct shape {
    int64_t m, n, k, lda, ldb, ldc;
    int threads;
    bool a_transposed, b_transposed, accumulate;
};

struct entry {
    struct shape shape;
    dnnl_primitive_t primitive; /* NULL: a shape that the library refused */
    dnnl_memory_t a, b, c, scratch;
    int64_t scratch_bytes;
    uint64_t used;
};

/* One thread at a time calls the backend of an engine, but a process may have several engines. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static dnnl_engine_t engine;
static dnnl_stream_t stream;
static struct entry cache[CACHE_SIZE];
static int cached;
static uint64_t now;
static void *scratch;
static int64_t scratch_bytes;

static void library_init(void) {
    /* Must come before anything else of the library; it may have been said already. */
    switch (cpu_level_active()) {
    case CPU_GENERIC:
        dnnl_set_max_cpu_isa(dnnl_cpu_isa_sse41);
        break;
    case CPU_AVX2:
    case CPU_EMU512:
        dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx2);
        break;
    case CPU_AVX512:
        dnnl_set_max_cpu_isa(dnnl_cpu_isa_avx512_core);
        break;
    case CPU_AMX:
    case CPU_LEVEL_COUNT:
        break;
    }
    if (dnnl_engine_create(&engine, dnnl_cpu, 0) != dnnl_success)
        engine = NULL;
    if (engine && dnnl_stream_create(&stream, engine, dnnl_stream_default_flags) != dnnl_success)
        stream = NULL;
}

static void library(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, library_init);
}

/* ---------------------------------------------------------------- bf16 */

static void entry_free(struct entry *e) {
    if (e->primitive)
        dnnl_primitive_destroy(e->primitive);
    dnnl_memory_t all[] = {e->a, e->b, e->c, e->scratch};
    for (int i = 0; i < 4; i++)
        if (all[i])
            dnnl_memory_destroy(all[i]);
    *e = (struct entry){0};
}

/* Creates the primitive and the memory objects (without memory) of e->shape. */
static bool entry_create(struct entry *e) {
    const struct shape *s = &e->shape;
    const dnnl_dims_t a_dims = {s->m, s->k}, b_dims = {s->k, s->n}, c_dims = {s->m, s->n};
    const dnnl_dims_t a_strides = {s->a_transposed ? 1 : s->lda, s->a_transposed ? s->lda : 1};
    const dnnl_dims_t b_strides = {s->b_transposed ? s->ldb : 1, s->b_transposed ? 1 : s->ldb};
    const dnnl_dims_t c_strides = {s->ldc, 1};
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t sum = NULL;
    dnnl_primitive_desc_t pd = NULL;
    bool good =
        dnnl_primitive_attr_create(&attr) == dnnl_success &&
        dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user) == dnnl_success;
    if (good && s->accumulate) {
        good = dnnl_post_ops_create(&sum) == dnnl_success;
#if DNNL_VERSION_MAJOR >= 3
        good = good && dnnl_post_ops_append_sum(sum, 1.0f, 0, dnnl_data_type_undef) == dnnl_success;
#else
        good = good && dnnl_post_ops_append_sum(sum, 1.0f) == dnnl_success;
#endif
        good = good && dnnl_primitive_attr_set_post_ops(attr, sum) == dnnl_success;
    }
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_t a = NULL, b = NULL, c = NULL;
    good =
        good &&
        dnnl_memory_desc_create_with_strides(&a, 2, a_dims, dnnl_bf16, a_strides) == dnnl_success &&
        dnnl_memory_desc_create_with_strides(&b, 2, b_dims, dnnl_bf16, b_strides) == dnnl_success &&
        dnnl_memory_desc_create_with_strides(&c, 2, c_dims, dnnl_f32, c_strides) == dnnl_success &&
        dnnl_matmul_primitive_desc_create(&pd, engine, a, b, NULL, c, attr) == dnnl_success;
    const_dnnl_memory_desc_t a_md = a, b_md = b, c_md = c, scratch_md = NULL;
#else
    dnnl_memory_desc_t a, b, c;
    dnnl_matmul_desc_t op;
    good = good &&
           dnnl_memory_desc_init_by_strides(&a, 2, a_dims, dnnl_bf16, a_strides) == dnnl_success &&
           dnnl_memory_desc_init_by_strides(&b, 2, b_dims, dnnl_bf16, b_strides) == dnnl_success &&
           dnnl_memory_desc_init_by_strides(&c, 2, c_dims, dnnl_f32, c_strides) == dnnl_success &&
           dnnl_matmul_desc_init(&op, &a, &b, NULL, &c) == dnnl_success &&
           dnnl_primitive_desc_create(&pd, &op, attr, engine, NULL) == dnnl_success;
    const dnnl_memory_desc_t *a_md = &a, *b_md = &b, *c_md = &c, *scratch_md = NULL;
#endif
    if (good) {
        scratch_md = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
        e->scratch_bytes = scratch_md ? (int64_t)dnnl_memory_desc_get_size(scratch_md) : 0;
        good = dnnl_primitive_create(&e->primitive, pd) == dnnl_success &&
               dnnl_memory_create(&e->a, a_md, engine, DNNL_MEMORY_NONE) == dnnl_success &&
               dnnl_memory_create(&e->b, b_md, engine, DNNL_MEMORY_NONE) == dnnl_success &&
               dnnl_memory_create(&e->c, c_md, engine, DNNL_MEMORY_NONE) == dnnl_success &&
               (e->scratch_bytes == 0 || dnnl_memory_create(&e->scratch, scratch_md, engine,
                                                            DNNL_MEMORY_NONE) == dnnl_success);
    }
    if (pd)
        dnnl_primitive_desc_destroy(pd);
    if (sum)
        dnnl_post_ops_destroy(sum);
    if (attr)
        dnnl_primitive_attr_destroy(attr);
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_t all[] = {a, b, c};
    for (int i = 0; i < 3; i++)
        if (all[i])
            dnnl_memory_desc_destroy(all[i]);
#endif
    return good;
}

static bool shape_same(const struct shape *a, const struct shape *b) {
    return a->m == b->m && a->n == b->n && a->k == b->k && a->lda == b->lda && a->ldb == b->ldb &&
           a->ldc == b->ldc && a->threads == b->threads && a->a_transposed == b->a_transposed &&
           a->b_transposed == b->b_transposed && a->accumulate == b->accumulate;
}

static struct entry *entry_get(const struct shape *s) {
    struct entry *oldest = &cache[0];
    for (int i = 0; i < cached; i++) {
        if (shape_same(&cache[i].shape, s))
            return &cache[i];
        if (cache[i].used < oldest->used)
            oldest = &cache[i];
    }
    struct entry *e = cached < CACHE_SIZE ? &cache[cached++] : oldest;
    entry_free(e);
    e->shape = *s;
    if (!entry_create(e)) {
        entry_free(e);
        e->shape = *s; /* remembered: refused */
    }
    return e;
}

static bool matmul(const struct gemm_operand *a, const struct gemm_operand *b, float *c,
                   int64_t ldc, bool accumulate) {
    bool good = false;
    pthread_mutex_lock(&lock);
    if (!stream)
        goto done;
    struct shape s = {.m = a->rows,
                      .n = b->rows,
                      .k = a->k,
                      .lda = a->ld,
                      .ldb = b->ld,
                      .ldc = ldc,
                      .threads = threads_count(),
                      .a_transposed = a->transposed,
                      .b_transposed = b->transposed,
                      .accumulate = accumulate};
    struct entry *e = entry_get(&s);
    e->used = ++now;
    if (!e->primitive)
        goto done;
    if (e->scratch_bytes > scratch_bytes) {
        mem_free(scratch);
        scratch = NULL;
        scratch_bytes = 0;
        if (mem_alloc(&scratch, (size_t)e->scratch_bytes, "oneDNN's scratch", NULL) != TRIL_OK)
            goto done;
        scratch_bytes = e->scratch_bytes;
    }
    union { /* the library writes through neither of the two inputs */
        const void *in;
        void *out;
    } ap = {.in = a->data}, bp = {.in = b->data};
    dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, e->a},
                              {DNNL_ARG_WEIGHTS, e->b},
                              {DNNL_ARG_DST, e->c},
                              {DNNL_ARG_SCRATCHPAD, e->scratch}};
    good = dnnl_memory_set_data_handle(e->a, ap.out) == dnnl_success &&
           dnnl_memory_set_data_handle(e->b, bp.out) == dnnl_success &&
           dnnl_memory_set_data_handle(e->c, c) == dnnl_success &&
           (!e->scratch || dnnl_memory_set_data_handle(e->scratch, scratch) == dnnl_success) &&
           dnnl_primitive_execute(e->primitive, stream, e->scratch ? 4 : 3, args) == dnnl_success &&
           dnnl_stream_wait(stream) == dnnl_success;
done:
    pthread_mutex_unlock(&lock);
    return good;
}

/* ---------------------------------------------------------------- any */

bool onednn_gemm(const struct gemm_operand *a, const struct gemm_operand *b, float *c, int64_t ldc,
                 bool accumulate) {
    library();
    if (a->rows == 0 || b->rows == 0 || a->k == 0 || !a->data || !b->data)
        return false;
    omp_set_num_threads(threads_count()); /* of the calling thread; the library asks OpenMP */
    if (a->type == DT_F32 && b->type == DT_F32)
        return dnnl_sgemm(a->transposed ? 'T' : 'N', b->transposed ? 'N' : 'T', a->rows, b->rows,
                          a->k, 1.0f, a->data, a->ld, b->data, b->ld, accumulate ? 1.0f : 0.0f, c,
                          ldc) == dnnl_success;
    if (a->type == DT_BF16 && b->type == DT_BF16)
        return matmul(a, b, c, ldc, accumulate);
    return false;
}

#endif
