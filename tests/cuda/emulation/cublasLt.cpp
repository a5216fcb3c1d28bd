/* cuBLASLt on the emulated GPU: products in the order of the formula, in fp32.
 *
 * An algorithm carries a digest of everything it was searched for, and the alignments that it was
 * promised; a call that does not keep to them ends the program, as on a GPU it could read wrong
 * memory. The workspace is overwritten. */
#include "cublasLt.h"

#include "cuda_bf16.h"
#include "cuda_fp16.h"

#include <cstdint>
#include <cstring>
#include <vector>

struct emulated_blas {
    int opened;
};
struct emulated_matmul {
    cublasComputeType_t compute;
    int32_t transpose_a, transpose_b;
    uint32_t epilogue;
    const void *bias;
    void *aux;
    int64_t aux_ld;
};
struct emulated_layout {
    cudaDataType_t type;
    int64_t rows, columns, ld;
};
struct emulated_preference {
    uint64_t workspace;
    uint32_t schemes, align[4];
};

struct emulated_blas_counts emulated_blas_counts;
int emulated_blas_refuses;
static const size_t WORKSPACE = 4096;
static const uint32_t BIASED = CUBLASLT_EPILOGUE_BIAS, GELU = CUBLASLT_EPILOGUE_GELU, AUX = 128;

/* ------------------------------------------------------------------ descriptors */

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out) {
    *out = new emulated_blas{1};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}
const char *cublasLtGetStatusString(cublasStatus_t s) {
    switch (s) {
    case CUBLAS_STATUS_SUCCESS:
        return "the library was successful";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "the requested function is not supported";
    default:
        return "an unsupported value or parameter was passed";
    }
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    if (scale != CUDA_R_32F)
        return CUBLAS_STATUS_INVALID_VALUE;
    *out = new emulated_matmul{compute, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, 0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t m) {
    delete m;
    return CUBLAS_STATUS_SUCCESS;
}
static cublasStatus_t set(void *at, size_t size, const void *value, size_t bytes) {
    if (bytes != size || !value)
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(at, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t m,
                                              cublasLtMatmulDescAttributes_t what,
                                              const void *value, size_t bytes) {
    switch (what) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return set(&m->transpose_a, sizeof m->transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return set(&m->transpose_b, sizeof m->transpose_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return set(&m->epilogue, sizeof m->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return set(&m->bias, sizeof m->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
        return set(&m->aux, sizeof m->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
        return set(&m->aux_ld, sizeof m->aux_ld, value, bytes);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type,
                                          uint64_t rows, uint64_t columns, int64_t ld) {
    *out = new emulated_layout{type, (int64_t)rows, (int64_t)columns, ld};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    *out = new emulated_preference{0, 7, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t what,
                                                    const void *value, size_t bytes) {
    switch (what) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        return set(&p->workspace, sizeof p->workspace, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
        return set(&p->schemes, sizeof p->schemes, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: {
        int which = what - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
        return set(&p->align[which], sizeof p->align[which], value, bytes);
    }
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

/* ------------------------------------------------------------------ what is supported */

static int64_t size_of(cudaDataType_t t) {
    return t == CUDA_R_32F ? 4 : 2;
}

/* Sizes that fit each other and leading dimensions that hold their columns. */
static bool shapes_fit(const emulated_matmul *m, const emulated_layout *a, const emulated_layout *b,
                       const emulated_layout *c, const emulated_layout *d) {
    int64_t M = m->transpose_a ? a->columns : a->rows, K = m->transpose_a ? a->rows : a->columns;
    int64_t N = m->transpose_b ? b->rows : b->columns;
    for (const emulated_layout *l : {a, b, c, d})
        if (l->rows < 1 || l->columns < 1 || l->ld < l->rows)
            return false;
    return (m->transpose_b ? b->columns : b->rows) == K && d->rows == M && d->columns == N &&
           c->rows == M && c->columns == N;
}

/* Types: both factors alike; fp32 gives fp32, 16-bit gives itself or fp32; c as d; TF32 of fp32
 * alone. A bias and aux are of d's type here (the default; tril never sets another). */
static bool types_fit(const emulated_matmul *m, const emulated_layout *a, const emulated_layout *b,
                      const emulated_layout *c, const emulated_layout *d) {
    return a->type == b->type && c->type == d->type &&
           (d->type == CUDA_R_32F || d->type == a->type) &&
           (m->compute == CUBLAS_COMPUTE_32F || a->type == CUDA_R_32F);
}

/* 16-bit factors in columns that begin at multiples of 4 bytes; fused vectors at 16. */
static bool aligned(const emulated_matmul *m, const emulated_preference *p,
                    const emulated_layout *const (&all)[4]) {
    for (int i = 0; i < 4; i++) {
        uint32_t least = i < 2 ? 4 : (uint32_t)size_of(all[i]->type);
        if (p->align[i] < least || all[i]->ld * size_of(all[i]->type) % least)
            return false;
    }
    if ((m->epilogue & BIASED) && (!m->bias || (uintptr_t)m->bias % 16))
        return false;
    return !(m->epilogue & AUX) || (m->aux && (uintptr_t)m->aux % 16 == 0 && m->aux_ld % 8 == 0 &&
                                    m->aux_ld >= all[3]->rows);
}

static uint64_t digest(const emulated_matmul *m, const emulated_layout *const (&all)[4]) {
    uint64_t h = 1469598103934665603u;
    auto add = [&](uint64_t v) { h = (h ^ v) * 1099511628211u; };
    add(m->compute);
    add((uint64_t)m->transpose_a);
    add((uint64_t)m->transpose_b);
    add(m->epilogue);
    add((uint64_t)m->aux_ld);
    for (const emulated_layout *l : all) {
        add(l->type);
        add((uint64_t)l->rows);
        add((uint64_t)l->columns);
        add((uint64_t)l->ld);
    }
    return h;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t m,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t p, int most,
                                              cublasLtMatmulHeuristicResult_t *found, int *count) {
    const emulated_layout *const all[4] = {a, b, c, d};
    *count = 0;
    if (!h || most < 1)
        return CUBLAS_STATUS_INVALID_VALUE;
    emulated_blas_counts.searches++;
    if (p->schemes & ~(uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)
        emulated_fault("cublasLt: schemes %u allow sums in any order", p->schemes);
    if (!shapes_fit(m, a, b, c, d))
        emulated_fault("cublasLt: layouts that do not fit each other");
    if (!types_fit(m, a, b, c, d) || !aligned(m, p, all) || p->workspace < WORKSPACE ||
        emulated_blas_refuses > (m->epilogue == CUBLASLT_EPILOGUE_DEFAULT))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    cublasLtMatmulHeuristicResult_t r = {};
    r.algo.data[0] = digest(m, all);
    for (int i = 0; i < 4; i++)
        r.algo.data[1 + i] = p->align[i];
    r.workspaceSize = WORKSPACE;
    found[0] = r;
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

/* ------------------------------------------------------------------ products */

static float element(const void *p, cudaDataType_t t, int64_t i) {
    if (t == CUDA_R_32F)
        return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return t == CUDA_R_16BF ? bf16_to_f32(bits) : f16_to_f32(bits);
}
static void put(void *p, cudaDataType_t t, int64_t i, float v) {
    if (t == CUDA_R_32F)
        ((float *)p)[i] = v;
    else
        ((uint16_t *)p)[i] = t == CUDA_R_16BF ? f32_to_bf16(v) : f32_to_f16(v);
}
static float tf32(float x) { /* 10 bits after the leading one */
    int bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x1000) & ~0x1fff;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Element (row, k) of a factor at out[k * rows + row]. */
static std::vector<float> factor(const void *p, const emulated_layout &l, bool by_row, int64_t rows,
                                 int64_t K, bool rounds) {
    std::vector<float> out((size_t)(rows * K));
    for (int64_t k = 0; k < K; k++)
        for (int64_t i = 0; i < rows; i++) {
            float x = element(p, l.type, by_row ? k + i * l.ld : i + k * l.ld);
            out[(size_t)(k * rows + i)] = rounds ? tf32(x) : x;
        }
    return out;
}

static void multiply(const emulated_matmul &m, float alpha, const void *a,
                     const emulated_layout &la, const void *b, const emulated_layout &lb,
                     float beta, const void *c, const emulated_layout &lc, void *d,
                     const emulated_layout &ld) {
    int64_t K = m.transpose_a ? la.rows : la.columns;
    bool rounds = m.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    const std::vector<float> x = factor(a, la, m.transpose_a, ld.rows, K, rounds);
    const std::vector<float> y = factor(b, lb, !m.transpose_b, ld.columns, K, rounds);
    std::vector<float> column((size_t)ld.rows);
    for (int64_t j = 0; j < ld.columns; j++) {
        column.assign(column.size(), 0);
        for (int64_t k = 0; k < K; k++) {
            const float *from = &x[(size_t)(k * ld.rows)], by = y[(size_t)(k * ld.columns + j)];
            for (size_t i = 0; i < column.size(); i++)
                column[i] += from[i] * by;
        }
        for (int64_t i = 0; i < ld.rows; i++) {
            float sum = alpha * column[(size_t)i];
            if (beta != 0)
                sum += beta * element(c, lc.type, i + j * lc.ld);
            if (m.epilogue & BIASED)
                sum += element(m.bias, ld.type, i);
            if (m.epilogue & AUX)
                put(m.aux, ld.type, i + j * m.aux_ld, sum);
            if (m.epilogue & GELU)
                sum = 0.5f * sum * (1 + tanhf(0.79788456f * (sum + 0.044715f * sum * sum * sum)));
            put(d, ld.type, i + j * ld.ld, sum);
        }
    }
}

void emulated_host_work(void *stream, std::function<void()> work);

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t m, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t la, const void *b,
                              cublasLtMatrixLayout_t lb, const void *beta, const void *c,
                              cublasLtMatrixLayout_t lc, void *d, cublasLtMatrixLayout_t ld,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t bytes,
                              cudaStream_t stream) {
    const emulated_layout *const all[4] = {la, lb, lc, ld};
    const void *const data[4] = {a, b, c, d};
    if (algorithm->data[0] != digest(m, all))
        emulated_fault("cublasLtMatmul: an algorithm that was chosen for another product");
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)data[i] % algorithm->data[1 + i])
            emulated_fault("cublasLtMatmul: matrix %c is not aligned to the promised %d bytes",
                           "ABCD"[i], (int)algorithm -> data[1 + i]);
    if (c == d && lc->ld != ld->ld)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!workspace || bytes < WORKSPACE || (uintptr_t)workspace % 256)
        emulated_fault("cublasLtMatmul: no workspace");
    if (((m->epilogue & BIASED) && (uintptr_t)m->bias % 16) ||
        ((m->epilogue & AUX) && (uintptr_t)m->aux % 16))
        emulated_fault("cublasLtMatmul: a fused vector that is not aligned to 16 bytes");
    emulated_blas_counts.products++;
    emulated_blas_counts.epilogues += m->epilogue != CUBLASLT_EPILOGUE_DEFAULT;
    /* Descriptors are read now, as the library does; matrices when the stream gets here. */
    emulated_matmul what = *m;
    emulated_layout A = *la, B = *lb, C = *lc, D = *ld;
    float scale_ab = *(const float *)alpha, scale_c = *(const float *)beta;
    emulated_host_work(stream, [=] {
        memset(workspace, 0xff, bytes);
        multiply(what, scale_ab, a, A, b, B, scale_c, c, C, d, D);
    });
    return CUBLAS_STATUS_SUCCESS;
}
