/* Linear layers (contracts: ops.h; formulas: src/ops/linear.c).
 *
 * All three products are y [R, C] = finish(a b^T), a [R, K], b [C, K], where the finish adds a
 * bias, keeps `pre`, takes the activation and adds the residual. In this order of preference:
 *
 *   few rows (decoding)  our kernel: every weight is read once, 16 bytes a thread, and the finish
 *                        is its last step. Bound by memory: 2 C K bytes in bf16.
 *   cuBLASLt, fused      where it does the whole finish as exactly as we: an fp32 output with bias
 *                        and residual, or a 16-bit output with nothing. With round_bias also
 *                        a 16-bit output with bias and tanh-GELU (bias rounded to its dtype).
 *   cuBLASLt, two passes the product in fp32, then one elementwise pass for the whole finish. Into
 *                        y itself if that is fp32; else in pieces of at most PIECE bytes, which
 *                        stay in the L2 cache between the passes.
 *   tiles                our plain kernel in fp32, for what cuBLASLt refuses: addresses that are
 *                        aligned to less than it needs, operands of two dtypes, K = 0.
 *
 * The bias's gradient: column sums, by blocks of rows, then over the blocks. All sums have an order
 * that depends on the sizes and the GPU only; that of few rows does not depend on how many they
 * are. On sm_80 few rows take 36 to 150 registers, tiles 96, the others at most 48; nothing is
 * spilled. */
#include "cuda/activate.cuh"
#include "cuda/blas.h"
#include "cuda/device.cuh"
#include "cuda/linear.cuh"

struct finish {
    const float *bias, *residual; /* [C], [R, C]; or NULL */
    enum activation activation;
    void *pre; /* [R, C] dense, or NULL */
    void *y;
    enum dtype pre_type, y_type;
    int64_t residual_row, pre_row, y_row;
};

/* ------------------------------------------------------------------ the finish */

__device__ __forceinline__ float get(const void *p, enum dtype t, int64_t i) {
    if (t == DT_F32)
        return ((const float *)p)[i];
    return t == DT_BF16 ? to_float(((const __nv_bfloat16 *)p)[i])
                        : to_float(((const __half *)p)[i]);
}
__device__ __forceinline__ void put(void *p, enum dtype t, int64_t i, float v) {
    if (t == DT_F32)
        ((float *)p)[i] = v;
    else if (t == DT_BF16)
        ((__nv_bfloat16 *)p)[i] = from_float<__nv_bfloat16>(v);
    else
        ((__half *)p)[i] = from_float<__half>(v);
}

/* Not inlined: in a kernel's last step its code would be most of the kernel. */
static __device__ __attribute__((noinline)) float activate_called(enum activation a, float x) {
    return activate(a, x);
}

__device__ __forceinline__ void finish_at(const struct finish &f, int64_t r, int64_t c, float v) {
    if (f.bias)
        v += f.bias[c];
    if (f.pre)
        put(f.pre, f.pre_type, r * f.pre_row + c, v);
    if (f.activation != ACT_NONE)
        v = activate_called(f.activation, v);
    if (f.residual)
        v += f.residual[r * f.residual_row + c];
    put(f.y, f.y_type, r * f.y_row + c, v);
}

/* The second of two passes: sum [R, C] (may be y itself), a thread for one element of any dtypes or
 * for `count` neighbours. Y and P: dtypes of y and pre. */
static const int FINISH_THREADS = 128;
__global__ void finish_each_kernel(const float *sum, int64_t sum_row, int64_t R, int64_t C,
                                   struct finish f) {
    int64_t c = (int64_t)blockIdx.x * FINISH_THREADS + threadIdx.x;
    if (c < C)
        for (int64_t r = blockIdx.y; r < R; r += gridDim.y)
            finish_at(f, r, c, sum[r * sum_row + c]);
}
template <typename Y, typename P, int count>
__global__ void finish_kernel(const float *sum, int64_t sum_row, int64_t R, int64_t C,
                              struct finish f) {
    int64_t c = ((int64_t)blockIdx.x * FINISH_THREADS + threadIdx.x) * count;
    if (c >= C)
        return;
    float bias[count] = {}, v[count], more[count];
    if (f.bias)
        load_packed<float, count>(f.bias + c, bias);
    for (int64_t r = blockIdx.y; r < R; r += gridDim.y) {
        load_packed<float, count>(sum + r * sum_row + c, v);
#pragma unroll
        for (int k = 0; k < count; k++)
            v[k] += bias[k];
        if (f.pre)
            store_packed<P, count>((P *)f.pre + r * f.pre_row + c, v);
#pragma unroll
        for (int k = 0; k < count; k++)
            v[k] = activate(f.activation, v[k]);
        if (f.residual) {
            load_packed<float, count>(f.residual + r * f.residual_row + c, more);
#pragma unroll
            for (int k = 0; k < count; k++)
                v[k] += more[k];
        }
        store_packed<Y, count>((Y *)f.y + r * f.y_row + c, v);
    }
}

static bool packable(const void *p, size_t size, int64_t row, int count) {
    return (uintptr_t)p % (size * (size_t)count) == 0 && row % count == 0;
}

template <typename Y, typename P>
static tril_status finish_packed(struct op_context *ctx, const char *name, const float *sum,
                                 int64_t sum_row, int64_t R, int64_t C, const struct finish *f,
                                 unsigned rows, struct tril_error *err) {
    const int count = 4;
    return cuda_launch(ctx, name, err, finish_kernel<Y, P, count>,
                       dim3(cuda_blocks(C, count * FINISH_THREADS), rows), dim3(FINISH_THREADS), 0,
                       sum, sum_row, R, C, *f);
}

static tril_status finish_launch(struct op_context *ctx, const char *name, const float *sum,
                                 int64_t sum_row, int64_t R, int64_t C, const struct finish *f,
                                 struct tril_error *err) {
    const int most = 4;
    enum dtype p_type = f->pre ? f->pre_type : f->y_type;
    bool wide = f->y_type == DT_F32;
    bool packs = C % most == 0 && packable(sum, 4, sum_row, most) &&
                 packable(f->bias, 4, 0, most) && packable(f->residual, 4, f->residual_row, most) &&
                 packable(f->pre, dtype_size(p_type), f->pre_row, most) &&
                 packable(f->y, dtype_size(f->y_type), f->y_row, most);
    unsigned rows = (unsigned)(R < 4096 ? R : 4096);
    if (!packs || (!wide && p_type != f->y_type))
        return cuda_launch(ctx, name, err, finish_each_kernel,
                           dim3(cuda_blocks(C, FINISH_THREADS), rows), dim3(FINISH_THREADS), 0, sum,
                           sum_row, R, C, *f);
    FOR_DTYPE(p_type, P, {
        if (wide)
            return (finish_packed<float, P>(ctx, name, sum, sum_row, R, C, f, rows, err));
        return (finish_packed<P, P>(ctx, name, sum, sum_row, R, C, f, rows, err));
    });
}

/* ------------------------------------------------------------------ few rows
 *
 * A block of FEW_WARPS warps; `split` of them share the sums of OUT columns (1, or all where the
 * columns are too few to fill the GPU), and walk along K together. A thread asks for AHEAD * OUT
 * packs of weights before it uses the first: memory's latency is hidden by what is on its way, also
 * where K is so short that a thread walks only a few steps. */
static const int FEW_WARPS = 4, FEW_ROWS = 8;

template <typename W, int ROWS, int OUT>
__global__ void few_rows_kernel(const W *a, int64_t a_row, const W *b, int64_t b_row, int R,
                                int64_t C, int64_t K, int split, struct finish f) {
    __shared__ float space[FEW_WARPS][ROWS * OUT];
    const int count = 16 / sizeof(W), AHEAD = OUT == 1 ? 4 : ROWS == 1 ? 2 : 1;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % split;
    int64_t c0 = ((int64_t)blockIdx.x * (FEW_WARPS / split) + warp / split) * OUT;
    int64_t step = split * 32 * count;
    float sum[ROWS][OUT] = {};
    if (c0 < C)
        for (int64_t k0 = (part * 32 + lane) * count; k0 < K; k0 += AHEAD * step) {
            packed<W, count> w[AHEAD][OUT] = {};
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (k0 + j * step < K)
#pragma unroll
                    for (int o = 0; o < OUT; o++) { /* the last block repeats the last column */
                        int64_t c = c0 + o < C ? c0 + o : C - 1;
                        w[j][o] = *(const packed<W, count> *)(b + c * b_row + k0 + j * step);
                    }
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (k0 + j * step < K)
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        float x[count];
                        load_packed<W, count>(a + (r < R ? r : 0) * a_row + k0 + j * step, x);
#pragma unroll
                        for (int o = 0; o < OUT; o++)
#pragma unroll
                            for (int i = 0; i < count; i++)
                                sum[r][o] += x[i] * to_float(w[j][o].at[i]);
                    }
        }
    float mine = 0; /* lane r * OUT + o keeps the sum of row r, column c0 + o */
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int o = 0; o < OUT; o++) {
            float all = warp_sum(sum[r][o]);
            mine = lane == r * OUT + o ? all : mine;
        }
    if (split > 1) {
        if (lane < ROWS * OUT)
            space[warp][lane] = mine;
        __syncthreads();
        if (part > 0)
            return;
        mine = 0;
        if (lane < ROWS * OUT)
            for (int p = 0; p < split; p++)
                mine += space[warp + p][lane];
    }
    int r = lane / OUT;
    int64_t c = c0 + lane % OUT;
    if (r < ROWS && r < R && c < C)
        finish_at(f, r, c, mine);
}

template <typename W, int ROWS>
static tril_status few_rows_launch(struct op_context *ctx, const char *name,
                                   const struct operand *a, const struct operand *b, int64_t R,
                                   int64_t C, int64_t K, const struct finish *f,
                                   struct tril_error *err) {
    int64_t processors = cuda_state_of(ctx)->processors;
    bool many = C >= 32 * processors;
    int out = many ? 4 : 1;
    int split = C / out < 16 * processors ? FEW_WARPS : 1;
    dim3 grid(cuda_blocks(C, out * (FEW_WARPS / split))), block(32 * FEW_WARPS);
    const W *x = (const W *)a->data, *w = (const W *)b->data;
    if (many)
        return cuda_launch(ctx, name, err, few_rows_kernel<W, ROWS, 4>, grid, block, 0, x, a->row,
                           w, b->row, (int)R, C, K, split, *f);
    return cuda_launch(ctx, name, err, few_rows_kernel<W, ROWS, 1>, grid, block, 0, x, a->row, w,
                       b->row, (int)R, C, K, split, *f);
}

static bool few_rows_serves(const struct operand *a, const struct operand *b, int64_t R,
                            int64_t K) {
    int count = (int)(16 / dtype_size(b->type));
    return R <= FEW_ROWS && K > 0 && K % count == 0 && a->inner == 1 && b->inner == 1 &&
           a->type == b->type && packable(a->data, dtype_size(a->type), a->row, count) &&
           packable(b->data, dtype_size(b->type), b->row, count);
}

static tril_status few_rows(struct op_context *ctx, const char *name, const struct operand *a,
                            const struct operand *b, int64_t R, int64_t C, int64_t K,
                            const struct finish *f, struct tril_error *err) {
    FOR_DTYPE(b->type, W, {
        if (R == 1)
            return (few_rows_launch<W, 1>(ctx, name, a, b, R, C, K, f, err));
        if (R <= 4)
            return (few_rows_launch<W, 4>(ctx, name, a, b, R, C, K, f, err));
        return (few_rows_launch<W, FEW_ROWS>(ctx, name, a, b, R, C, K, f, err));
    });
}

/* ------------------------------------------------------------------ tiles */

static const int TILE = 64, STEP = 16, TILE_THREADS = 256;

/* Elements [k0, k0 + STEP) of rows [r0, r0 + TILE) to tile[k][r]; zeros outside. */
__device__ __forceinline__ void tile_load(const struct operand &a, int64_t r0, int64_t k0,
                                          int64_t R, int64_t K, float (*tile)[TILE + 4]) {
    for (int e = (int)threadIdx.x; e < TILE * STEP; e += TILE_THREADS) {
        /* neighbouring threads along the stride of 1 */
        int r = a.inner == 1 ? e / STEP : e % TILE, k = a.inner == 1 ? e % STEP : e / TILE;
        bool inside = r0 + r < R && k0 + k < K;
        tile[k][r] = inside ? get(a.data, a.type, (r0 + r) * a.row + (k0 + k) * a.inner) : 0.0f;
    }
}

__global__ void tile_kernel(struct operand a, struct operand b, int64_t R, int64_t C, int64_t K,
                            struct finish f) {
    __shared__ __align__(16) float at[STEP][TILE + 4], bt[STEP][TILE + 4];
    int64_t columns = (C + TILE - 1) / TILE;
    int64_t r0 = blockIdx.x / columns * TILE, c0 = blockIdx.x % columns * TILE;
    int y = (int)threadIdx.x / 16 * 4, x = (int)threadIdx.x % 16 * 4;
    float sum[4][4] = {};
    for (int64_t k0 = 0; k0 < K; k0 += STEP) {
        tile_load(a, r0, k0, R, K, at);
        tile_load(b, c0, k0, C, K, bt);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STEP; k++) {
            float av[4], bv[4];
            load_packed<float, 4>(&at[k][y], av);
            load_packed<float, 4>(&bt[k][x], bv);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[i][j] += av[i] * bv[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (r0 + y + i < R && c0 + x + j < C)
                finish_at(f, r0 + y + i, c0 + x + j, sum[i][j]);
}

static tril_status tiles(struct op_context *ctx, const char *name, const struct operand *a,
                         const struct operand *b, int64_t R, int64_t C, int64_t K,
                         const struct finish *f, struct tril_error *err) {
    return cuda_launch(ctx, name, err, tile_kernel,
                       dim3(cuda_blocks(R, TILE) * cuda_blocks(C, TILE)), dim3(TILE_THREADS), 0, *a,
                       *b, R, C, K, *f);
}

/* ------------------------------------------------------------------ choosing */

/* An fp32 product between two passes: bytes, and what its rows are a multiple of. */
#ifdef TRIL_CUDA_EMULATED
static const int64_t PIECE = 16 << 10, PIECE_ROWS = 16; /* so that small tests see several */
#else
static const int64_t PIECE = 32 << 20, PIECE_ROWS = 256;
#endif

/* Of a factor of `rows` rows: the stride that is not 1; a single row's does not matter, but
 * cuBLASLt wants it as large as the row. */
static int64_t leading(const struct operand *a, int64_t rows, int64_t K) {
    int64_t ld = a->inner == 1 ? a->row : a->inner, least = a->inner == 1 ? K : rows;
    return ld > least ? ld : least;
}

/* What cuBLASLt is asked for: it sees columns as rows, so y^T [C, R] = b a^T. */
static struct blas_product product_of(const struct operand *a, const struct operand *b, int64_t R,
                                      int64_t C, int64_t K, void *y, enum dtype type, int64_t row) {
    struct blas_product p = {};
    p.m = C;
    p.n = R;
    p.k = K;
    p.transpose_a = b->inner == 1;
    p.transpose_b = a->inner != 1;
    p.a = {b->data, b->type, leading(b, C, K)};
    p.b = {a->data, a->type, leading(a, R, K)};
    p.d = {y, type, row};
    return p;
}

/* One call of cuBLASLt for everything, where that is exact or allowed; `rounded`: space for the
 * bias in y's dtype, or NULL. */
static tril_status fused(struct op_context *ctx, struct blas_product *p, const struct finish *f,
                         void *rounded, bool *done, struct tril_error *err) {
    bool wide = f->y_type == DT_F32, gelu = f->activation == ACT_GELU_TANH && !wide && rounded;
    if ((f->activation != ACT_NONE && !gelu) || (f->pre && (!gelu || f->pre_type != f->y_type)) ||
        (f->residual && (!wide || gelu)) || (f->bias && !wide && !rounded))
        return TRIL_OK;
    p->bias = f->bias;
    if (f->residual)
        p->c = {f->residual, DT_F32, f->residual_row};
    if (gelu) {
        p->aux = f->pre;
        p->aux_ld = f->pre ? f->pre_row : 0;
        p->finish = f->pre    ? f->bias ? BLAS_GELU_AUX_BIAS : BLAS_GELU_AUX
                    : f->bias ? BLAS_GELU_BIAS
                              : BLAS_GELU;
    } else {
        p->finish = f->bias ? BLAS_BIAS : BLAS_PLAIN;
    }
    if (f->bias && !wide) {
        CUDA_TRY(cast(ctx, tensor_1d((void *)f->bias, DT_F32, p->m),
                      tensor_1d(rounded, f->y_type, p->m), err));
        p->bias = rounded;
    }
    return blas_multiply(ctx, p, done, err);
}

/* y = finish(a b^T). */
static tril_status multiply(struct op_context *ctx, const char *name, const struct operand *a,
                            const struct operand *b, int64_t R, int64_t C, int64_t K,
                            const struct finish *f, struct tril_error *err) {
    if (R == 0 || C == 0)
        return TRIL_OK;
    if (few_rows_serves(a, b, R, K))
        return few_rows(ctx, name, a, b, R, C, K, f, err);
    if (K == 0 || a->type != b->type)
        return tiles(ctx, name, a, b, R, C, K, f, err);

    /* Whether y is where the product can go first, and whether cuBLASLt can do everything. */
    bool wide = f->y_type == DT_F32;
    bool in_place = wide && f->residual != f->y;
    bool direct =
        f->activation == ACT_NONE && !f->pre &&
        (wide ? (uintptr_t)f->bias % 16 == 0 : a->type == f->y_type && !f->bias && !f->residual);
    bool round = cuda_state_of(ctx)->round_bias && a->type == f->y_type && !wide && !direct;

    /* Space for a rounded bias and for a piece of the fp32 product. */
    int64_t rows = PIECE / (C * (int64_t)sizeof(float)) / PIECE_ROWS * PIECE_ROWS;
    rows = rows < PIECE_ROWS ? PIECE_ROWS : rows;
    rows = rows < R ? rows : R;
    int64_t bias_bytes = round ? (C * 2 + 255) / 256 * 256 : 0;
    int64_t bytes = bias_bytes + (in_place ? 0 : rows * C * (int64_t)sizeof(float));
    if (direct)
        bytes = 0;
    char *space = NULL;
    if (bytes > 0)
        CUDA_TRY(cuda_scratch(ctx, name, bytes, &space, err));

    bool done = false;
    struct blas_product p = product_of(a, b, R, C, K, f->y, f->y_type, f->y_row);
    CUDA_TRY(fused(ctx, &p, f, round ? space : NULL, &done, err));
    if (done)
        return TRIL_OK;
    if (in_place)
        rows = R;
    else if (bytes == 0)
        return tiles(ctx, name, a, b, R, C, K, f, err);
    for (int64_t r = 0; r < R; r += rows) {
        struct operand piece = *a;
        struct finish g = *f;
        int64_t n = R - r < rows ? R - r : rows;
        piece.data = (const char *)a->data + r * a->row * (int64_t)dtype_size(a->type);
        g.y = (char *)f->y + r * f->y_row * (int64_t)dtype_size(f->y_type);
        g.residual = f->residual ? f->residual + r * f->residual_row : NULL;
        g.pre = f->pre ? (char *)f->pre + r * f->pre_row * (int64_t)dtype_size(f->pre_type) : NULL;
        float *sum = in_place ? (float *)g.y : (float *)(space + bias_bytes);
        int64_t sum_row = in_place ? f->y_row : C;
        p = product_of(&piece, b, n, C, K, sum, DT_F32, sum_row);
        CUDA_TRY(blas_multiply(ctx, &p, &done, err));
        if (!done)
            CUDA_TRY(tiles(ctx, name, &piece, b, n, C, K, &g, err));
        else
            CUDA_TRY(finish_launch(ctx, name, sum, sum_row, n, C, &g, err));
    }
    return TRIL_OK;
}

tril_status linear_product(struct op_context *ctx, const char *name, const struct operand *a,
                           const struct operand *b, int64_t R, int64_t C, int64_t K, void *y,
                           enum dtype type, int64_t row, bool add, struct tril_error *err) {
    struct finish f = {};
    f.y = y;
    f.y_type = type;
    f.y_row = f.residual_row = row;
    f.residual = add ? (const float *)y : NULL;
    return multiply(ctx, name, a, b, R, C, K, &f, err);
}

static struct operand rows_operand(const struct tensor *t) {
    return {t->data, t->dtype, t->stride[0], 1};
}
static struct operand columns_operand(const struct tensor *t) {
    return {t->data, t->dtype, 1, t->stride[0]};
}

/* ------------------------------------------------------------------ the operations */

OP_FN(linear_forward) {
    enum { X, W, BIAS, RESIDUAL, Y, PRE };
    const struct linear_params *p = (const struct linear_params *)params;
    struct operand a = rows_operand(&args[X]), b = rows_operand(&args[W]);
    struct finish f = {};
    f.bias = (const float *)args[BIAS].data;
    f.residual = (const float *)args[RESIDUAL].data;
    f.activation = p->activation;
    f.pre = args[PRE].data;
    f.y = args[Y].data;
    f.pre_type = args[PRE].dtype;
    f.y_type = args[Y].dtype;
    f.residual_row = f.pre_row = args[Y].shape[1];
    f.y_row = args[Y].stride[0];
    return multiply(ctx, "linear_forward", &a, &b, args[Y].shape[0], args[Y].shape[1],
                    args[X].shape[1], &f, err);
}

OP_FN(linear_backward_input) {
    enum { DY, W, DX };
    (void)params;
    struct operand a = rows_operand(&args[DY]), b = columns_operand(&args[W]);
    struct finish f = {};
    f.y = args[DX].data;
    f.y_type = args[DX].dtype;
    f.y_row = args[DX].stride[0];
    return multiply(ctx, "linear_backward_input", &a, &b, args[DX].shape[0], args[DX].shape[1],
                    args[DY].shape[1], &f, err);
}

/* ------------------------------------------------------------------ column sums
 *
 * A block of SUM_WARPS warps sums SUM_ROWS rows (or more: at most SUM_PARTS parts) of 32 * count
 * columns; then a thread for every column sums the parts. */
static const int SUM_WARPS = 8, SUM_ROWS = 64, SUM_PARTS = 256;

template <typename T, int count>
__global__ void column_sums_kernel(const T *x, int64_t row, int64_t R, int64_t C, int64_t rows,
                                   float *part) {
    __shared__ float space[SUM_WARPS][32 * count];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t c = ((int64_t)blockIdx.x * 32 + lane) * count;
    int64_t begin = blockIdx.y * rows, end = begin + rows < R ? begin + rows : R;
    float sum[count] = {};
    if (c < C)
        for (int64_t r = begin + warp; r < end; r += SUM_WARPS) {
            float v[count];
            load_packed<T, count>(x + r * row + c, v);
#pragma unroll
            for (int k = 0; k < count; k++)
                sum[k] += v[k];
        }
#pragma unroll
    for (int k = 0; k < count; k++)
        space[warp][k * 32 + lane] = sum[k];
    __syncthreads();
    for (int e = (int)threadIdx.x; e < 32 * count; e += 32 * SUM_WARPS) {
        int64_t at = (int64_t)blockIdx.x * 32 * count + e % 32 * count + e / 32;
        float all = 0;
        for (int w = 0; w < SUM_WARPS; w++)
            all += space[w][e];
        if (at < C)
            part[blockIdx.y * C + at] = all;
    }
}

__global__ void column_parts_kernel(const float *part, int parts, int64_t C, float *out) {
    int64_t c = (int64_t)blockIdx.x * 128 + threadIdx.x;
    if (c >= C)
        return;
    float sum = 0;
    for (int p = 0; p < parts; p++)
        sum += part[p * C + c];
    out[c] += sum;
}

static tril_status column_sums(struct op_context *ctx, const char *name, const struct tensor *x,
                               float *out, struct tril_error *err) {
    int64_t R = x->shape[0], C = x->shape[1];
    if (R == 0 || C == 0)
        return TRIL_OK;
    int64_t rows = (R + SUM_PARTS - 1) / SUM_PARTS;
    rows = rows < SUM_ROWS ? SUM_ROWS : rows;
    unsigned parts = cuda_blocks(R, rows);
    float *part;
    CUDA_TRY(cuda_scratch(ctx, name, parts * C * (int64_t)sizeof *part, &part, err));
    FOR_DTYPE(x->dtype, T, {
        const int most = 16 / sizeof(T);
        const T *data = (const T *)x->data;
        if (C % most == 0 && packable(data, sizeof(T), x->stride[0], most))
            CUDA_TRY(cuda_launch(ctx, name, err, column_sums_kernel<T, most>,
                                 dim3(cuda_blocks(C, 32 * most), parts), dim3(32 * SUM_WARPS), 0,
                                 data, x->stride[0], R, C, rows, part));
        else
            CUDA_TRY(cuda_launch(ctx, name, err, column_sums_kernel<T, 1>,
                                 dim3(cuda_blocks(C, 32), parts), dim3(32 * SUM_WARPS), 0, data,
                                 x->stride[0], R, C, rows, part));
    });
    return cuda_launch(ctx, name, err, column_parts_kernel, dim3(cuda_blocks(C, 128)), dim3(128), 0,
                       part, (int)parts, C, out);
}

OP_FN(linear_backward_weight) {
    enum { DY, X, DW, DBIAS };
    const struct linear_params *p = (const struct linear_params *)params;
    struct operand a = columns_operand(&args[DY]), b = columns_operand(&args[X]);
    struct finish f = {};
    f.y = args[DW].data;
    f.y_type = DT_F32;
    f.y_row = args[DW].stride[0];
    f.residual = p->overwrite ? NULL : (const float *)args[DW].data;
    f.residual_row = f.y_row;
    CUDA_TRY(multiply(ctx, "linear_backward_weight", &a, &b, args[DW].shape[0], args[DW].shape[1],
                      args[DY].shape[0], &f, err));
    if (!args[DBIAS].data)
        return TRIL_OK;
    return column_sums(ctx, "linear_backward_weight", &args[DY], (float *)args[DBIAS].data, err);
}
