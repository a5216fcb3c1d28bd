/* LayerNorm and RMSNorm, one body (contracts: ops.h; formulas: src/ops/layernorm.c, rmsnorm.c).
 *
 * A row belongs to a power of two of lanes, a warp, or several: as few as can hold it in registers,
 * HELD values a thread (held_backward of x and of dy), so that memory is read once. A block works
 * on several rows side by side. Elements of an fp32 x and act y (2 bytes) then move 6 bytes
 * forward, and 14 backward where dx accumulates (x 4, dy 2, dx 4 + 4): every argument once, the
 * floor.
 *
 * dgain and dbias: a thread owns the same columns of every row that its block takes, sums them in
 * registers, and a block writes one row of sums; 2 blocks for every processor write 16 D bytes
 * each, below 2% of the rest from 8192 rows on. A second kernel adds the blocks' rows in their
 * order. */
#include "cuda/device.cuh"

extern "C" {
#include "ops/host_fallback.h"
}

static const int THREADS = 256, MOST_THREADS = 512, HELD = 32;
/* Single elements need more registers for addresses. */
static constexpr int held_backward(int count) {
    return count > 1 ? 16 : 8;
}

/* Sums over the row's threads (blockDim.x of them; the block's rows are its y). Everybody calls it;
 * `space`: sums * 16 floats. */
template <int sums>
__device__ __forceinline__ void row_sums(float (&x)[sums], float *space) {
    int lanes = (int)blockDim.x;
#pragma unroll
    for (int s = 0; s < sums; s++)
        for (int d = (lanes < 32 ? lanes : 32) / 2; d > 0; d /= 2)
            x[s] += __shfl_xor_sync(0xffffffffu, x[s], d);
    if (lanes <= 32)
        return;
    int warps = lanes / 32;
    float *mine = space + (int)threadIdx.y * warps * sums;
    __syncthreads();
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int s = 0; s < sums; s++)
            mine[(int)threadIdx.x / 32 * sums + s] = x[s];
    __syncthreads();
#pragma unroll
    for (int s = 0; s < sums; s++) {
        x[s] = 0.0f;
        for (int w = 0; w < warps; w++)
            x[s] += mine[w * sums + s];
    }
}

/* Lanes for a row of `packs` packs of which a thread holds `most`; 0: too wide. */
static unsigned row_lanes(int64_t packs, int most) {
    unsigned lanes = 1;
    while (lanes < 32 && lanes < packs)
        lanes *= 2;
    if (packs > 32 * most)
        lanes = cuda_blocks(cuda_blocks(packs, most), 32) * 32;
    return lanes <= MOST_THREADS ? lanes : 0;
}
static dim3 row_block(unsigned lanes) {
    return dim3(lanes, lanes < THREADS ? THREADS / lanes : 1);
}

/* What both directions take. */
struct norm_sizes {
    int64_t rows;
    int D;
    float eps, offset;
};

/* ------------------------------------------------------------------ forward */

template <bool layer, typename X, typename Y, int count>
__global__ void __launch_bounds__(MOST_THREADS)
    norm_forward_kernel(rows<const X> x, const float *gain, const float *bias, rows<Y> y,
                        float *mean, float *rstd, struct norm_sizes n) {
    const int packs = HELD / count;
    __shared__ float space[16];
    int64_t r = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    int D = r < n.rows ? n.D : 0; /* beyond the last row: nothing, but for the barriers */
    const X *in = x.row(D ? r : 0);
    float v[packs][count], sum[1] = {0.0f}, centre = 0.0f;
#pragma unroll
    for (int k = 0; k < packs; k++) {
        int i = (k * (int)blockDim.x + (int)threadIdx.x) * count;
        if (i < D)
            load_packed<X, count>(in + i, v[k]);
    }
    if (layer) {
#pragma unroll
        for (int k = 0; k < packs; k++)
            if ((k * (int)blockDim.x + (int)threadIdx.x) * count < D)
#pragma unroll
                for (int j = 0; j < count; j++)
                    sum[0] += v[k][j];
        row_sums(sum, space);
        centre = sum[0] / (float)n.D;
        sum[0] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < packs; k++)
        if ((k * (int)blockDim.x + (int)threadIdx.x) * count < D)
#pragma unroll
            for (int j = 0; j < count; j++) {
                v[k][j] -= centre;
                sum[0] += v[k][j] * v[k][j];
            }
    row_sums(sum, space);
    if (D == 0)
        return;
    float scale = rsqrtf(sum[0] / (float)D + n.eps);
    Y *out = y.row(r);
#pragma unroll
    for (int k = 0; k < packs; k++) {
        int i = (k * (int)blockDim.x + (int)threadIdx.x) * count;
        if (i >= D)
            break;
        float g[count], b[count];
        load_floats<count>(gain + i, g);
        if (bias)
            load_floats<count>(bias + i, b);
#pragma unroll
        for (int j = 0; j < count; j++) {
            v[k][j] *= scale * (g[j] + n.offset);
            if (bias)
                v[k][j] += b[j];
        }
        store_packed<Y, count>(out + i, v[k]);
    }
    if (threadIdx.x == 0) {
        if (layer && mean)
            mean[r] = centre;
        if (rstd)
            rstd[r] = scale;
    }
}

struct norm_forward_args {
    const struct tensor *x, *gain, *bias, *y, *mean, *rstd; /* bias, mean NULL: rmsnorm */
};

static float *floats(const struct tensor *t) {
    return t ? (float *)t->data : NULL;
}
static bool aligned(const struct tensor *t) {
    return (uintptr_t)floats(t) % 16 == 0;
}

template <bool layer, typename X, typename Y>
static tril_status norm_forward(struct op_context *ctx, const struct op_info *info,
                                const struct norm_forward_args &a, const struct tensor *args,
                                const void *params, struct tril_error *err) {
    const int most = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
    const struct norm_params *p = (const struct norm_params *)params;
    struct norm_sizes n = {row_count(*a.x), (int)row_width(*a.x), p->eps, p->gain_offset};
    bool packs = rows_packable(*a.x, most) && rows_packable(*a.y, most) && aligned(a.gain) &&
                 aligned(a.bias);
    int count = packs ? most : 1;
    unsigned lanes = row_lanes(cuda_blocks(n.D, count), HELD / count);
    if (lanes == 0)
        return op_host_fallback(ctx, info, args, params, err);
    dim3 block = row_block(lanes);
    return cuda_launch(
        ctx, info->name, err,
        packs ? norm_forward_kernel<layer, X, Y, most> : norm_forward_kernel<layer, X, Y, 1>,
        dim3(cuda_blocks(n.rows, block.y)), block, 0, rows_of<const X>(*a.x), floats(a.gain),
        floats(a.bias), rows_of<Y>(*a.y), floats(a.mean), floats(a.rstd), n);
}

template <bool layer>
static tril_status norm_forward_any(struct op_context *ctx, enum op_id id,
                                    const struct norm_forward_args &a, const struct tensor *args,
                                    const void *params, struct tril_error *err) {
    const struct op_info *info = op_info_get(id);
    FOR_DTYPE(a.x->dtype, X, {
        FOR_DTYPE(a.y->dtype, Y,
                  { return (norm_forward<layer, X, Y>(ctx, info, a, args, params, err)); });
    });
}

OP_FN(layernorm_forward) {
    enum { X, GAIN, BIAS, Y, MEAN, RSTD };
    struct norm_forward_args a = {&args[X], &args[GAIN], &args[BIAS],
                                  &args[Y], &args[MEAN], &args[RSTD]};
    return norm_forward_any<true>(ctx, OP_LAYERNORM_FORWARD, a, args, params, err);
}

OP_FN(rmsnorm_forward) {
    enum { X, GAIN, Y, RSTD };
    struct norm_forward_args a = {&args[X], &args[GAIN], NULL, &args[Y], NULL, &args[RSTD]};
    return norm_forward_any<false>(ctx, OP_RMSNORM_FORWARD, a, args, params, err);
}

/* ------------------------------------------------------------------ backward */

/* part: [gridDim.x][D] of dgain, then as many of dbias. Dynamic shared memory: D floats, where a
 * block has several rows. */
template <bool layer, typename X, typename Y, int count>
__global__ void __launch_bounds__(MOST_THREADS)
    norm_backward_kernel(rows<const Y> dy, rows<const X> x, const float *gain, const float *mean,
                         const float *rstd, rows<X> dx, struct norm_sizes n, bool add,
                         float *part) {
    const int packs = held_backward(count) / count;
    __shared__ float space[2 * 16];
    CUDA_SHARED(float, column);
    float dgain[packs][count] = {}, dbias[packs][count] = {};
    for (int64_t first = (int64_t)blockIdx.x * blockDim.y; first < n.rows;
         first += (int64_t)gridDim.x * blockDim.y) {
        int64_t r = first + threadIdx.y;
        int D = r < n.rows ? n.D : 0;
        int64_t at = D ? r : 0;
        const X *in = x.row(at);
        const Y *slope = dy.row(at);
        float v[packs][count], d[packs][count], sum[2] = {0.0f, 0.0f};
        float centre = layer ? mean[at] : 0.0f, scale = rstd[at];
#pragma unroll
        for (int k = 0; k < packs; k++) {
            int i = (k * (int)blockDim.x + (int)threadIdx.x) * count;
            if (i < D) {
                load_packed<X, count>(in + i, v[k]);
                load_packed<Y, count>(slope + i, d[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < packs; k++) {
            int i = (k * (int)blockDim.x + (int)threadIdx.x) * count;
            if (i >= D)
                break;
            float g[count];
            load_floats<count>(gain + i, g);
#pragma unroll
            for (int j = 0; j < count; j++) {
                v[k][j] = (v[k][j] - centre) * scale;
                dgain[k][j] += d[k][j] * v[k][j];
                if (layer)
                    dbias[k][j] += d[k][j];
                d[k][j] *= g[j] + n.offset;
                sum[0] += d[k][j] * v[k][j];
                if (layer)
                    sum[1] += d[k][j];
            }
        }
        if (layer) {
            row_sums(sum, space);
        } else {
            float one[1] = {sum[0]};
            row_sums(one, space);
            sum[0] = one[0];
        }
        float dot = sum[0] / (float)n.D, average = sum[1] / (float)n.D;
        X *out = dx.row(at);
#pragma unroll
        for (int k = 0; k < packs; k++) {
            int i = (k * (int)blockDim.x + (int)threadIdx.x) * count;
            if (i >= D)
                break;
            float old[count];
            if (add)
                load_packed<X, count>(out + i, old);
#pragma unroll
            for (int j = 0; j < count; j++) {
                v[k][j] = scale * (d[k][j] - average - v[k][j] * dot);
                if (add)
                    v[k][j] += old[j];
            }
            store_packed<X, count>(out + i, v[k]);
        }
    }
    /* The block's rows together, in their order, into its row of sums. */
#pragma unroll
    for (int which = 0; which < (layer ? 2 : 1); which++) {
        float *to = part + ((int64_t)which * gridDim.x + blockIdx.x) * n.D;
        for (int y = 0; y < (int)blockDim.y; y++) {
            if ((int)threadIdx.y == y)
#pragma unroll
                for (int k = 0; k < packs; k++)
#pragma unroll
                    for (int j = 0; j < count; j++) {
                        int i = (k * (int)blockDim.x + (int)threadIdx.x) * count + j;
                        float mine = which ? dbias[k][j] : dgain[k][j];
                        if (i >= n.D)
                            continue;
                        if (y > 0)
                            mine += column[i];
                        if (y + 1 < (int)blockDim.y)
                            column[i] = mine;
                        else
                            to[i] = mine;
                    }
            __syncthreads();
        }
    }
}

/* out[i] += the sum over the parts of column i; blockIdx.y: dgain, dbias. */
static const int SUM_COLUMNS = 32, SUM_SLICES = 16;
__global__ void norm_parameters_kernel(const float *part, int parts, int D, float *dgain,
                                       float *dbias) {
    __shared__ float space[SUM_SLICES][SUM_COLUMNS];
    int i = (int)(blockIdx.x * SUM_COLUMNS + threadIdx.x);
    float sum = 0.0f;
    part += (int64_t)blockIdx.y * parts * D;
    if (i < D)
        for (int b = (int)threadIdx.y; b < parts; b += SUM_SLICES)
            sum += part[(int64_t)b * D + i];
    space[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= D)
        return;
    sum = 0.0f;
    for (int s = 0; s < SUM_SLICES; s++)
        sum += space[s][threadIdx.x];
    (blockIdx.y ? dbias : dgain)[i] += sum;
}

struct norm_backward_args {
    const struct tensor *dy, *x, *gain, *mean, *rstd, *dx, *dgain, *dbias;
};

template <bool layer, typename X, typename Y>
static tril_status norm_backward(struct op_context *ctx, const struct op_info *info,
                                 const struct norm_backward_args &a, const struct tensor *args,
                                 const void *params, struct tril_error *err) {
    const int most = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
    const struct norm_params *p = (const struct norm_params *)params;
    struct norm_sizes n = {row_count(*a.x), (int)row_width(*a.x), p->eps, p->gain_offset};
    bool packs = rows_packable(*a.x, most) && rows_packable(*a.dy, most) &&
                 rows_packable(*a.dx, most) && aligned(a.gain);
    int count = packs ? most : 1;
    unsigned lanes = row_lanes(cuda_blocks(n.D, count), held_backward(count) / count);
    if (lanes == 0 || a.dx->dtype != a.x->dtype)
        return op_host_fallback(ctx, info, args, params, err);
    if (n.rows == 0)
        return TRIL_OK;
    dim3 block = row_block(lanes);
    int64_t parts = cuda_blocks(n.rows, block.y), most_parts = 2 * cuda_state_of(ctx)->processors;
    bool biased = layer && floats(a.dbias);
    float *part;
    if (parts > most_parts)
        parts = most_parts;
    CUDA_TRY(cuda_scratch(ctx, info->name, (layer ? 2 : 1) * parts * n.D * (int64_t)sizeof *part,
                          &part, err));
    CUDA_TRY(cuda_launch(
        ctx, info->name, err,
        packs ? norm_backward_kernel<layer, X, Y, most> : norm_backward_kernel<layer, X, Y, 1>,
        dim3((unsigned)parts), block, block.y > 1 ? (size_t)n.D * sizeof *part : 0,
        rows_of<const Y>(*a.dy), rows_of<const X>(*a.x), floats(a.gain), floats(a.mean),
        floats(a.rstd), rows_of<X>(*a.dx), n, a.dx->dtype == DT_F32 && !p->overwrite, part));
    return cuda_launch(ctx, info->name, err, norm_parameters_kernel,
                       dim3(cuda_blocks(n.D, SUM_COLUMNS), biased ? 2 : 1),
                       dim3(SUM_COLUMNS, SUM_SLICES), 0, part, (int)parts, n.D, floats(a.dgain),
                       floats(a.dbias));
}

template <bool layer>
static tril_status norm_backward_any(struct op_context *ctx, enum op_id id,
                                     const struct norm_backward_args &a, const struct tensor *args,
                                     const void *params, struct tril_error *err) {
    const struct op_info *info = op_info_get(id);
    FOR_DTYPE(a.x->dtype, X, {
        FOR_DTYPE(a.dy->dtype, Y,
                  { return (norm_backward<layer, X, Y>(ctx, info, a, args, params, err)); });
    });
}

OP_FN(layernorm_backward) {
    enum { DY, X, GAIN, MEAN, RSTD, DX, DGAIN, DBIAS };
    struct norm_backward_args a = {&args[DY],   &args[X],  &args[GAIN],  &args[MEAN],
                                   &args[RSTD], &args[DX], &args[DGAIN], &args[DBIAS]};
    return norm_backward_any<true>(ctx, OP_LAYERNORM_BACKWARD, a, args, params, err);
}

OP_FN(rmsnorm_backward) {
    enum { DY, X, GAIN, RSTD, DX, DGAIN };
    struct norm_backward_args a = {&args[DY],   &args[X],  &args[GAIN],  NULL,
                                   &args[RSTD], &args[DX], &args[DGAIN], NULL};
    return norm_backward_any<false>(ctx, OP_RMSNORM_BACKWARD, a, args, params, err);
}
