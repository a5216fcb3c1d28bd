/* Attention as the textbook has it, to compare with: every matrix of a sequence in memory, products
 * by cuBLASLt, a head each, mask and softmax in passes of their own.
 *
 *   forward    S = Q K'    P = softmax(S)    O = P V
 *   backward   S = Q K'    dP = dO V'    P, dS from both    dQ = dS K    dK = dS' Q    dV = P' dO
 *
 * S and dP are fp32, P and dS of the activations' dtype (fp32: where S and dP were). Nothing is
 * skipped: what a rule hides is computed and then set to -infinity. A head's product is a launch,
 * so the host must know the lengths: it fetches them, which waits, and a step with such a call is
 * not recorded. T x Tk matrices: 4 n m bytes a head forward and 8 backward, in 16 bits 6 and 12. */
#include "cuda/attention.cuh"
#include "cuda/linear.cuh"

#include <stdlib.h>

static const int THREADS = 128;

/* One sequence's matrices. */
struct matrices {
    float *s, *g;     /* [H, n, ld]: S; dP */
    char *p, *ds;     /* [H, n, ld]: P; dS */
    int64_t ld, head; /* elements from row to row, from head to head */
    enum dtype type;  /* of P and dS */
    float *dk, *dv;   /* [m, d]: sums over a group's heads; NULL where there is one */
    int n, m, heads;
};

/* ------------------------------------------------------------------ kernels */

/* A row and head: scores with all that changes them, softmax, lse. */
__global__ void __launch_bounds__(THREADS, 8) /* fewer registers than that spill */
    materialised_softmax_kernel(const __grid_constant__ attention_view a,
                                const __grid_constant__ attention_tile t,
                                const __grid_constant__ matrices x) {
    __shared__ float space[32];
    int i = blockIdx.x, h = blockIdx.y, n = t.begin + i, position = t.position + i;
    float *s = x.s + h * x.head + i * x.ld, slope = a.slopes ? a.slopes[h] : 0.0f;
    float most = -INFINITY, sum = 0.0f, lse, unused;
    visible_words rule = visible_of(a.rules(), h);
    struct random_key key = dropout_key(a);
    for (int j = threadIdx.x; j < x.m; j += THREADS) {
        float score = -INFINITY;
        if (visible_bits(rule, i, position, j, 1) != 0)
            score = attention_score_of(a, s[j], h, i, position, j, slope, &unused) * LOG2E;
        s[j] = score;
        most = fmaxf(most, score);
    }
    most = block_max(most, space);
    float base = most == -INFINITY ? 0.0f : most;
    for (int j = threadIdx.x; j < x.m; j += THREADS) {
        s[j] = exp2f(s[j] - base);
        sum += s[j];
    }
    sum = block_sum(sum, space);
    float factor = attention_finish(most, sum, a.sink ? a.sink + h : nullptr, &lse);
    for (int j = threadIdx.x; j < x.m; j += THREADS) {
        float p = s[j] * factor;
        if (a.dropout > 0.0f && p != 0.0f)
            p *= dropout_one(a, key, h, n, j);
        store_any(x.p, x.type, h * x.head + i * x.ld + j, p);
    }
    if (a.lse && threadIdx.x == 0)
        a.lse[(int64_t)h * a.rows + n] = lse;
}

/* P and dS of the backward from S and dP. */
__global__ void __launch_bounds__(THREADS)
    materialised_gradient_kernel(const __grid_constant__ attention_view a,
                                 const __grid_constant__ attention_tile t,
                                 const __grid_constant__ matrices x) {
    int i = blockIdx.x, h = blockIdx.y, n = t.begin + i, position = t.position + i;
    int64_t at = h * x.head + i * x.ld;
    float slope = a.slopes ? a.slopes[h] : 0.0f;
    float lse = a.lse[(int64_t)h * a.rows + n], delta = a.delta[(int64_t)h * a.rows + n];
    visible_words rule = visible_of(a.rules(), h);
    struct random_key key = dropout_key(a);
    for (int j = threadIdx.x; j < x.m; j += THREADS) {
        float p = 0.0f, ds = 0.0f;
        if (lse != -INFINITY && visible_bits(rule, i, position, j, 1) != 0) {
            float in, score = attention_score_of(a, x.s[at + j], h, i, position, j, slope, &in);
            float keep = a.dropout > 0.0f ? dropout_one(a, key, h, n, j) : 1.0f;
            p = exp2f((score - lse) * LOG2E);
            ds = p * (keep * x.g[at + j] - delta) * in;
            p *= keep;
        }
        store_any(x.p, x.type, at + j, p);
        store_any(x.ds, x.type, at + j, ds);
    }
}

/* A row of no sequence: zeros in `y`, and -infinity in lse. */
__global__ void materialised_rows_kernel(const __grid_constant__ attention_view a,
                                         const __grid_constant__ heads_view y, float *lse) {
    int n = blockIdx.x, h = blockIdx.y;
    if (sequence_of(a, n) >= 0)
        return;
    for (int e = threadIdx.x; e < a.width; e += 32)
        store_any(y.data, y.dtype, n * y.row + h * y.head + e, 0.0f);
    if (lse && threadIdx.x == 0)
        lse[(int64_t)h * a.rows + n] = -INFINITY;
}

__global__ void materialised_clear_kernel(const __grid_constant__ heads_view y, int width) {
    for (int e = threadIdx.x; e < width; e += 32)
        store_any(y.data, y.dtype, blockIdx.x * y.row + blockIdx.y * y.head + e, 0.0f);
}

/* A head's sums of fp32 into their place. */
__global__ void materialised_store_kernel(const __grid_constant__ heads_view y, const float *x,
                                          int start, int head, int width) {
    for (int e = threadIdx.x; e < width; e += 32)
        store_any(y.data, y.dtype, (start + blockIdx.x) * y.row + head * y.head + e,
                  x[(int64_t)blockIdx.x * width + e]);
}

/* ------------------------------------------------------------------ the host's side */

/* Rows and keys of the longest sequence: the most that there can be where they are not known. */
static void longest(const attention_view &a, const struct attention_params *p, int64_t *n,
                    int64_t *m) {
    *n = p->max_q > 0 ? p->max_q : a.rows;
    *m = p->max_kv > 0 ? p->max_kv : a.keys;
    *m = (*m + 7) / 8 * 8; /* 16 bytes of 16-bit elements */
}

int64_t attention_materialised_bytes(const attention_view &a, const struct attention_params *p,
                                     bool backward) {
    int64_t n, m;
    longest(a, p, &n, &m);
    int64_t each = a.q.dtype == DT_F32 ? 4 : 6;
    int64_t sums = backward && a.group > 1 ? 2 * m * a.width * 4 : 0;
    return a.heads * n * m * each * (backward ? 2 : 1) + sums;
}

static tril_status check(const attention_view &a, const char *name, struct tril_error *err) {
    if (!a.pages && !a.k_scale && a.q.dtype == a.k.dtype && a.q.dtype == a.v.dtype)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_UNSUPPORTED,
                     "%s: materialised attention on a GPU takes q, k and v of one dtype, without "
                     "pages; use flash",
                     name);
}

static char *element(const heads_view &v, int64_t row, int head) {
    return v.data + (row * v.row + head * v.head) * (int64_t)dtype_size((enum dtype)v.dtype);
}
/* A head's rows [.., d], and the same turned [d, ..]. */
static struct operand rows_of_head(const heads_view &v, int64_t row, int head) {
    return {element(v, row, head), (enum dtype)v.dtype, v.row, 1};
}
static struct operand turned(struct operand a) {
    return {a.data, a.type, a.inner, a.row};
}

/* Lengths on the host: [S + 1] offsets, [S] starts, [S] lengths. */
static tril_status fetch(struct op_context *ctx, const attention_view &a, int32_t **out,
                         struct tril_error *err) {
    const int64_t S = a.sequences;
    int32_t *host = (int32_t *)malloc((size_t)(3 * S + 1) * sizeof *host);
    *out = host;
    if (!host)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for lengths");
    CUDA_TRY(ctx->backend->download(ctx, host, a.q_offsets, (S + 1) * 4, err));
    CUDA_TRY(ctx->backend->download(ctx, host + S + 1, a.kv_start, S * 4, err));
    return ctx->backend->download(ctx, host + 2 * S + 1, a.kv_length, S * 4, err);
}

static tril_status forward_one(struct op_context *ctx, const attention_view &a,
                               const attention_tile &t, const matrices &x, struct tril_error *err) {
    const char *name = "attention_forward";
    for (int h = 0; h < a.heads; h++) {
        struct operand q = rows_of_head(a.q, t.begin, h);
        struct operand k = rows_of_head(a.k, t.start, h / a.group);
        CUDA_TRY(linear_product(ctx, name, &q, &k, x.n, x.m, a.width, x.s + h * x.head, DT_F32,
                                x.ld, false, err));
    }
    CUDA_TRY(cuda_launch(ctx, name, err, materialised_softmax_kernel,
                         dim3((unsigned)x.n, (unsigned)a.heads), dim3(THREADS), 0, a, t, x));
    for (int h = 0; h < a.heads; h++) {
        struct operand p = {x.p + h * x.head * (int64_t)dtype_size(x.type), x.type, x.ld, 1};
        struct operand v = turned(rows_of_head(a.v, t.start, h / a.group));
        CUDA_TRY(linear_product(ctx, name, &p, &v, x.n, a.width, x.m, element(a.o, t.begin, h),
                                (enum dtype)a.o.dtype, a.o.row, false, err));
    }
    return TRIL_OK;
}

/* dk or dv of head h: matrix' rows, where the heads of a group are summed in fp32. */
static tril_status of_keys(struct op_context *ctx, const attention_view &a, const attention_tile &t,
                           const matrices &x, int h, const char *matrix, const heads_view &rows,
                           const heads_view &out, float *sums, struct tril_error *err) {
    const char *name = "attention_backward";
    struct operand p = {matrix + h * x.head * (int64_t)dtype_size(x.type), x.type, 1, x.ld};
    struct operand r = turned(rows_of_head(rows, t.begin, h));
    int kh = h / a.group, member = h % a.group;
    if (!sums)
        return linear_product(ctx, name, &p, &r, x.m, a.width, x.n, element(out, t.start, kh),
                              (enum dtype)out.dtype, out.row, false, err);
    CUDA_TRY(linear_product(ctx, name, &p, &r, x.m, a.width, x.n, sums, DT_F32, a.width, member > 0,
                            err));
    if (member < a.group - 1)
        return TRIL_OK;
    return cuda_launch(ctx, name, err, materialised_store_kernel, dim3((unsigned)x.m), dim3(32), 0,
                       out, sums, t.start, kh, a.width);
}

static tril_status backward_one(struct op_context *ctx, const attention_view &a,
                                const attention_tile &t, const matrices &x,
                                struct tril_error *err) {
    const char *name = "attention_backward";
    for (int h = 0; h < a.heads; h++) {
        struct operand q = rows_of_head(a.q, t.begin, h), o = rows_of_head(a.dout, t.begin, h);
        struct operand k = rows_of_head(a.k, t.start, h / a.group);
        struct operand v = rows_of_head(a.v, t.start, h / a.group);
        CUDA_TRY(linear_product(ctx, name, &q, &k, x.n, x.m, a.width, x.s + h * x.head, DT_F32,
                                x.ld, false, err));
        CUDA_TRY(linear_product(ctx, name, &o, &v, x.n, x.m, a.width, x.g + h * x.head, DT_F32,
                                x.ld, false, err));
    }
    CUDA_TRY(cuda_launch(ctx, name, err, materialised_gradient_kernel,
                         dim3((unsigned)x.n, (unsigned)a.heads), dim3(THREADS), 0, a, t, x));
    for (int h = 0; h < a.heads; h++) {
        struct operand ds = {x.ds + h * x.head * (int64_t)dtype_size(x.type), x.type, x.ld, 1};
        struct operand k = turned(rows_of_head(a.k, t.start, h / a.group));
        CUDA_TRY(linear_product(ctx, name, &ds, &k, x.n, a.width, x.m, element(a.dq, t.begin, h),
                                (enum dtype)a.dq.dtype, a.dq.row, false, err));
        CUDA_TRY(of_keys(ctx, a, t, x, h, x.ds, a.q, a.dk, x.dk, err));
        CUDA_TRY(of_keys(ctx, a, t, x, h, x.p, a.dout, a.dv, x.dv, err));
    }
    return TRIL_OK;
}

/* Where the matrices lie in scratch. */
static matrices layout(const attention_view &a, const struct attention_params *p, bool backward,
                       char *scratch) {
    int64_t n, m;
    longest(a, p, &n, &m);
    int64_t all = a.heads * n * m, two = a.q.dtype == DT_F32 ? 0 : all * 2;
    matrices x = {};
    x.ld = m;
    x.head = n * m;
    x.type = (enum dtype)a.q.dtype;
    x.s = (float *)scratch;
    x.g = x.s + all;
    char *after = (char *)(backward ? x.g + all : x.g);
    x.p = two ? after : (char *)x.s;
    x.ds = two ? after + two : (char *)x.g;
    if (backward && a.group > 1) {
        x.dk = (float *)(after + 2 * two);
        x.dv = x.dk + m * a.width;
    }
    return x;
}

static tril_status sequences(struct op_context *ctx, const attention_view &a,
                             const struct attention_params *p, bool backward, char *scratch,
                             const int32_t *host, struct tril_error *err) {
    matrices x = layout(a, p, backward, scratch);
    for (int s = 0; s < a.sequences; s++) {
        attention_tile t = {};
        t.s = s;
        t.begin = host[s];
        t.own = host[s + 1] - host[s];
        t.start = host[a.sequences + 1 + s];
        t.length = host[2 * a.sequences + 1 + s];
        t.position = t.length - t.own;
        x.n = t.own;
        x.m = t.length;
        if (x.n > x.head / x.ld || x.m > x.ld)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "attention: sequence %d has %d rows and %d keys, more than max_q or "
                             "max_kv says",
                             s, x.n, x.m);
        CUDA_TRY((backward ? backward_one : forward_one)(ctx, a, t, x, err));
    }
    return TRIL_OK;
}

tril_status attention_materialised(struct op_context *ctx, const attention_view &a,
                                   const struct attention_params *p, bool backward, char *scratch,
                                   struct tril_error *err) {
    const char *name = backward ? "attention_backward" : "attention_forward";
    int32_t *host = NULL;
    const dim3 rows((unsigned)a.rows, (unsigned)a.heads),
        keys((unsigned)a.keys, (unsigned)a.kv_heads);
    CUDA_TRY(check(a, name, err));
    CUDA_TRY(cuda_launch(ctx, name, err, materialised_rows_kernel, rows, dim3(32), 0, a,
                         backward ? a.dq : a.o, backward ? (float *)NULL : a.lse));
    if (backward) { /* keys of no sequence */
        CUDA_TRY(cuda_launch(ctx, name, err, materialised_clear_kernel, keys, dim3(32), 0, a.dk,
                             a.width));
        CUDA_TRY(cuda_launch(ctx, name, err, materialised_clear_kernel, keys, dim3(32), 0, a.dv,
                             a.width));
    }
    tril_status st = fetch(ctx, a, &host, err);
    if (st == TRIL_OK)
        st = sequences(ctx, a, p, backward, scratch, host, err);
    free(host);
    return st;
}
