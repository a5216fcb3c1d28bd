/* cuBLASLt: loading it, and its plans (descriptors and the chosen algorithm) by shape. */
#include "cuda/blas.h"
#include "cuda/memory.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* ------------------------------------------------------------------ the library */

#define BLAS_FUNCTIONS(F)                                                                          \
    F(Create)                                                                                      \
    F(Destroy)                                                                                     \
    F(GetStatusString)                                                                             \
    F(Matmul)                                                                                      \
    F(MatmulAlgoGetHeuristic)                                                                      \
    F(MatmulDescCreate)                                                                            \
    F(MatmulDescDestroy)                                                                           \
    F(MatmulDescSetAttribute)                                                                      \
    F(MatmulPreferenceCreate)                                                                      \
    F(MatmulPreferenceDestroy)                                                                     \
    F(MatmulPreferenceSetAttribute)                                                                \
    F(MatrixLayoutCreate)                                                                          \
    F(MatrixLayoutDestroy)

struct blas {
    void *library;
    cublasLtHandle_t handle;
    void *workspace;
#define MEMBER(name) decltype(&cublasLt##name) name;
    BLAS_FUNCTIONS(MEMBER)
#undef MEMBER
};

static tril_status blas_load(struct blas *b, struct tril_error *err) {
#ifdef TRIL_CUDA_EMULATED
    (void)err;
#define TAKE(name) b->name = cublasLt##name;
    BLAS_FUNCTIONS(TAKE)
#undef TAKE
    return TRIL_OK;
#else
    /* First the version that the headers are of; then others with the same interface. */
    const int own = CUDART_VERSION / 1000;
    char first[32];
    snprintf(first, sizeof first, "libcublasLt.so.%d", own);
    const char *names[] = {first, own == 13 ? "libcublasLt.so.12" : "libcublasLt.so.13",
                           "libcublasLt.so", "/usr/local/cuda/lib64/libcublasLt.so"};
    for (const char *name : names)
        if (!b->library)
            b->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!b->library)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "--device cuda needs NVIDIA's library cuBLASLt, and %s was not found; "
                         "install it (it is part of CUDA %d) or add its folder to LD_LIBRARY_PATH",
                         first, own);
#define TAKE(name) *(void **)&b->name = dlsym(b->library, "cublasLt" #name);
    BLAS_FUNCTIONS(TAKE)
#undef TAKE
#define NAMED(name)                                                                                \
    if (!b->name)                                                                                  \
        return error_set(                                                                          \
            err, TRIL_ERR_UNSUPPORTED,                                                             \
            "the cuBLASLt installed here has no cublasLt" #name "; install that of CUDA %d", own);
    BLAS_FUNCTIONS(NAMED)
#undef NAMED
    return TRIL_OK;
#endif
}

/* ------------------------------------------------------------------ plans */

/* Everything an algorithm depends on. Zeroed before it is filled: compared by its bytes. */
struct plan_key {
    int64_t m, n, k, lda, ldb, ldc, ldd, aux_ld;
    int32_t type, type_out, transpose_a, transpose_b, finish, tf32, beta;
    int32_t align_a, align_b, align_c, align_d; /* bytes that the addresses are multiples of */
    int32_t unused;
};
struct plan {
    struct plan_key key;
    struct plan *next;
    bool works; /* cuBLASLt has an algorithm */
    cublasLtMatmulDesc_t what;
    cublasLtMatrixLayout_t a, b, c, d;
    cublasLtMatmulAlgo_t algorithm;
    size_t workspace;
};

/* Chains by hash. Batches of every length make new shapes: when MOST are there, all go. */
static const int BUCKETS = 1024, MOST = 8192;
struct plans {
    int count;
    struct plan *bucket[BUCKETS];
};

static void plan_free(const struct blas *b, struct plan *p) {
    if (p->what)
        b->MatmulDescDestroy(p->what);
    for (cublasLtMatrixLayout_t l : {p->a, p->b, p->c, p->d})
        if (l)
            b->MatrixLayoutDestroy(l);
    free(p);
}

static void plans_empty(const struct blas *b, struct plans *all) {
    for (struct plan *&first : all->bucket)
        while (first) {
            struct plan *p = first;
            first = p->next;
            plan_free(b, p);
        }
    all->count = 0;
}

static struct plan **plan_bucket(struct plans *all, const struct plan_key *key) {
    const unsigned char *bytes = (const unsigned char *)key;
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < sizeof *key; i++)
        hash = (hash ^ bytes[i]) * 16777619u;
    return &all->bucket[(hash ^ hash >> 16) % BUCKETS];
}

static cudaDataType_t data_type(enum dtype t) {
    return t == DT_F32 ? CUDA_R_32F : t == DT_BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

/* The largest power of two, at most 256, that the address is a multiple of. */
static int32_t alignment_of(const void *p) {
    uintptr_t low = (uintptr_t)p & (~(uintptr_t)p + 1);
    return low == 0 || low > 256 ? 256 : (int32_t)low;
}

static struct plan_key plan_key_of(const struct cuda_state *c, const struct blas_product *p) {
    struct plan_key key;
    memset(&key, 0, sizeof key);
    key.m = p->m;
    key.n = p->n;
    key.k = p->k;
    key.lda = p->a.ld;
    key.ldb = p->b.ld;
    key.ldd = p->d.ld;
    key.beta = p->c.data != NULL;
    key.ldc = key.beta ? p->c.ld : p->d.ld;
    key.aux_ld = p->aux_ld;
    key.type = p->a.type;
    key.type_out = p->d.type;
    key.transpose_a = p->transpose_a;
    key.transpose_b = p->transpose_b;
    key.finish = p->finish;
    key.tf32 = c->tf32 && p->a.type == DT_F32;
    key.align_a = alignment_of(p->a.data);
    key.align_b = alignment_of(p->b.data);
    key.align_c = alignment_of(key.beta ? p->c.data : p->d.data);
    key.align_d = alignment_of(p->d.data);
    return key;
}

/* Says in *st the first call that failed. */
static void note(const struct blas *b, tril_status *st, cublasStatus_t s, struct tril_error *err) {
    if (*st != TRIL_OK || s == CUBLAS_STATUS_SUCCESS)
        return;
    if (s == CUBLAS_STATUS_ALLOC_FAILED)
        *st = error_set(err, TRIL_ERR_MEMORY,
                        "not enough memory to multiply matrices on the GPU; use a smaller batch");
    else
        *st = error_set(err, TRIL_ERR_INTERNAL, "multiplying matrices: cuBLASLt says '%s'",
                        b->GetStatusString(s));
}

static cublasLtEpilogue_t epilogue_of(enum blas_finish f) {
    switch (f) {
    case BLAS_BIAS:
        return CUBLASLT_EPILOGUE_BIAS;
    case BLAS_GELU:
        return CUBLASLT_EPILOGUE_GELU;
    case BLAS_GELU_BIAS:
        return CUBLASLT_EPILOGUE_GELU_BIAS;
    case BLAS_GELU_AUX:
        return CUBLASLT_EPILOGUE_GELU_AUX;
    case BLAS_GELU_AUX_BIAS:
        return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    default:
        return CUBLASLT_EPILOGUE_DEFAULT;
    }
}

/* The addresses of a call that are attributes of the product. */
static tril_status plan_point(const struct blas *b, const struct plan *plan,
                              const struct blas_product *p, struct tril_error *err) {
    tril_status st = TRIL_OK;
    if (p->bias)
        note(b, &st,
             b->MatmulDescSetAttribute(plan->what, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias,
                                       sizeof p->bias),
             err);
    if (p->aux)
        note(b, &st,
             b->MatmulDescSetAttribute(plan->what, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                                       &p->aux, sizeof p->aux),
             err);
    return st;
}

/* Descriptors of the product and its matrices. */
static tril_status plan_describe(const struct blas *b, struct plan *plan,
                                 const struct blas_product *p, struct tril_error *err) {
    const struct plan_key *k = &plan->key;
    tril_status st = TRIL_OK;
    note(b, &st,
         b->MatmulDescCreate(
             &plan->what, k->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
         err);
    if (st != TRIL_OK)
        return st;
    int32_t transpose_a = p->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    int32_t transpose_b = p->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    uint32_t epilogue = epilogue_of(p->finish);
#define SET(attribute, value)                                                                      \
    note(b, &st,                                                                                   \
         b->MatmulDescSetAttribute(plan->what, CUBLASLT_MATMUL_DESC_##attribute, &(value),         \
                                   sizeof(value)),                                                 \
         err)
    SET(TRANSA, transpose_a);
    SET(TRANSB, transpose_b);
    SET(EPILOGUE, epilogue);
    if (p->aux)
        SET(EPILOGUE_AUX_LD, p->aux_ld);
#undef SET
#define LAYOUT(at, t, rows, columns, ld)                                                           \
    note(                                                                                          \
        b, &st,                                                                                    \
        b->MatrixLayoutCreate(&plan->at, data_type(t), (uint64_t)(rows), (uint64_t)(columns), ld), \
        err)
    LAYOUT(a, p->a.type, p->transpose_a ? p->k : p->m, p->transpose_a ? p->m : p->k, k->lda);
    LAYOUT(b, p->b.type, p->transpose_b ? p->n : p->k, p->transpose_b ? p->k : p->n, k->ldb);
    LAYOUT(c, p->d.type, p->m, p->n, k->ldc);
    LAYOUT(d, p->d.type, p->m, p->n, k->ldd);
#undef LAYOUT
    return st == TRIL_OK ? plan_point(b, plan, p, err) : st;
}

/* The heuristic's first choice that fits the workspace; plan->works says whether there is one. */
static tril_status plan_search(const struct blas *b, struct plan *plan, struct tril_error *err) {
    const struct plan_key *k = &plan->key;
    tril_status st = TRIL_OK;
    cublasLtMatmulPreference_t preference = NULL;
    note(b, &st, b->MatmulPreferenceCreate(&preference), err);
    if (st != TRIL_OK)
        return st;
    /* Not the schemes that add to the output in the order in which blocks end. */
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    size_t workspace = BLAS_WORKSPACE;
    uint32_t align_a = (uint32_t)k->align_a, align_b = (uint32_t)k->align_b;
    uint32_t align_c = (uint32_t)k->align_c, align_d = (uint32_t)k->align_d;
#define SET(attribute, value)                                                                      \
    note(b, &st,                                                                                   \
         b->MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_##attribute, &(value),   \
                                         sizeof(value)),                                           \
         err)
    SET(MAX_WORKSPACE_BYTES, workspace);
    SET(REDUCTION_SCHEME_MASK, schemes);
    SET(MIN_ALIGNMENT_A_BYTES, align_a);
    SET(MIN_ALIGNMENT_B_BYTES, align_b);
    SET(MIN_ALIGNMENT_C_BYTES, align_c);
    SET(MIN_ALIGNMENT_D_BYTES, align_d);
#undef SET
    if (st == TRIL_OK) {
        cublasLtMatmulHeuristicResult_t found[4];
        int count = 0;
        cublasStatus_t s =
            b->MatmulAlgoGetHeuristic(b->handle, plan->what, plan->a, plan->b, plan->c, plan->d,
                                      preference, 4, found, &count);
        /* It says INVALID_VALUE too of combinations that it does not know. */
        if (s != CUBLAS_STATUS_SUCCESS && s != CUBLAS_STATUS_NOT_SUPPORTED &&
            s != CUBLAS_STATUS_INVALID_VALUE)
            note(b, &st, s, err);
        for (int i = 0; s == CUBLAS_STATUS_SUCCESS && i < count && !plan->works; i++)
            if (found[i].state == CUBLAS_STATUS_SUCCESS &&
                found[i].workspaceSize <= (size_t)BLAS_WORKSPACE) {
                plan->works = true;
                plan->algorithm = found[i].algo;
                plan->workspace = found[i].workspaceSize;
            }
    }
    b->MatmulPreferenceDestroy(preference);
    return st;
}

static tril_status plan_get(struct cuda_state *c, const struct blas_product *p, struct plan **out,
                            struct tril_error *err) {
    const struct blas *b = (const struct blas *)c->blas;
    struct plans *all = (struct plans *)c->blas_plans;
    struct plan_key key = plan_key_of(c, p);
    struct plan **bucket = plan_bucket(all, &key);
    for (struct plan *plan = *bucket; plan; plan = plan->next)
        if (memcmp(&plan->key, &key, sizeof key) == 0) {
            *out = plan;
            return TRIL_OK;
        }
    if (all->count >= MOST)
        plans_empty(b, all);
    struct plan *plan = (struct plan *)calloc(1, sizeof *plan);
    if (!plan)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to multiply matrices");
    plan->key = key;
    tril_status st = plan_describe(b, plan, p, err);
    if (st == TRIL_OK)
        st = plan_search(b, plan, err);
    if (st != TRIL_OK) {
        plan_free(b, plan);
        return st;
    }
    plan->next = *bucket;
    *bucket = plan;
    all->count++;
    *out = plan;
    return TRIL_OK;
}

/* ------------------------------------------------------------------ multiplying */

tril_status blas_multiply(struct op_context *ctx, const struct blas_product *p, bool *done,
                          struct tril_error *err) {
    struct cuda_state *c = cuda_state_of(ctx);
    const struct blas *b = (const struct blas *)c->blas;
    struct plan *plan = NULL;
    *done = ctx->measuring;
    if (ctx->measuring)
        return TRIL_OK;
    /* Its fused vectors must be aligned (and its aux rows), its operands of one type. */
    if (p->a.type != p->b.type || (uintptr_t)p->bias % 16 || (uintptr_t)p->aux % 16 ||
        p->aux_ld % 8)
        return TRIL_OK;
    CUDA_TRY(plan_get(c, p, &plan, err));
    if (!plan->works)
        return TRIL_OK;
    CUDA_TRY(plan_point(b, plan, p, err));
    float alpha = 1, beta = p->c.data ? 1.0f : 0.0f;
    tril_status st = TRIL_OK;
    note(b, &st,
         b->Matmul(b->handle, plan->what, &alpha, p->a.data, plan->a, p->b.data, plan->b, &beta,
                   p->c.data ? p->c.data : p->d.data, plan->c, (void *)p->d.data, plan->d,
                   &plan->algorithm, b->workspace, plan->workspace, c->stream),
         err);
    *done = st == TRIL_OK;
    return st;
}

/* ------------------------------------------------------------------ opening */

tril_status blas_open(struct cuda_state *c, struct tril_error *err) {
    struct blas *b = (struct blas *)calloc(1, sizeof *b);
    c->blas = b;
    c->blas_plans = calloc(1, sizeof(struct plans));
    if (!b || !c->blas_plans)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to use the GPU");
    CUDA_TRY(blas_load(b, err));
    tril_status st = TRIL_OK;
    note(b, &st, b->Create(&b->handle), err);
    CUDA_TRY(st);
    return cuda_memory_alloc(&b->workspace, BLAS_WORKSPACE, false, "matrix products' workspace",
                             err);
}

void blas_close(struct cuda_state *c) {
    struct blas *b = (struct blas *)c->blas;
    if (b && c->blas_plans)
        plans_empty(b, (struct plans *)c->blas_plans);
    free(c->blas_plans);
    if (!b)
        return;
    cuda_memory_release(b->workspace);
    if (b->handle)
        b->Destroy(b->handle);
    free(b); /* the library stays loaded, for the next context */
}
