/* attention_backward in fp32 arithmetic, for everything (formulas: src/ops/attention.c).
 *
 * Nothing is atomic: one kernel holds a tile of keys and walks over the query rows that see it, for
 * dK and dV; one holds a tile of query rows and walks over keys, for dQ; a third, where a bias
 * wants its gradient, holds a tile of the bias and walks over sequences and heads. Scores are made
 * again in each: 4 + 3 (+ 2) products of d a visible pair instead of 5. */
#include "cuda/attention_fma.cuh"

/* Four tiles of d columns, a product's left factor, and what is known of rows and keys. */
template <int BM, int BN, int DM>
struct backward_tile {
    float q[BM * (DM + 4)], dout[BM * (DM + 4)], k[BN * (DM + 4)], v[BN * (DM + 4)];
    float p[BM > BN ? BM *(BN + 4) : BN *(BM + 4)];
    float lse[BM], delta[BM];
    uint64_t mask[BM];
    int row[BM], key[BN];
};

/* Rows [i0, i0 + BM) of the tile's sequence, head h. */
template <int BM, int BN, int DM>
__device__ __forceinline__ void load_rows(backward_tile<BM, BN, DM> *z, const attention_view &a,
                                          const attention_tile &t, int i0, int h) {
    for (int r = threadIdx.x; r < BM; r += FMA_THREADS) {
        bool in = i0 + r < t.own;
        int n = t.begin + i0 + r;
        z->row[r] = in ? n : -1;
        z->lse[r] = in ? a.lse[(int64_t)h * a.rows + n] : -INFINITY;
        z->delta[r] = in ? a.delta[(int64_t)h * a.rows + n] : 0.0f;
    }
    __syncthreads();
    fma_load<BM, DM>(z->q, a.q, h, z->row, a.width, nullptr, 0);
    fma_load<BM, DM>(z->dout, a.dout, h, z->row, a.width, nullptr, 0);
}
template <int BM, int BN, int DM>
__device__ __forceinline__ void load_keys(backward_tile<BM, BN, DM> *z, const attention_view &a,
                                          const attention_tile &t, int j0, int kh) {
    for (int j = threadIdx.x; j < BN; j += FMA_THREADS)
        z->key[j] = j0 + j < t.length ? t.start + j0 + j : -1;
    __syncthreads();
    fma_load<BN, DM>(z->k, a.k, kh, z->key, a.width, nullptr, 0);
    fma_load<BN, DM>(z->v, a.v, kh, z->key, a.width, nullptr, 0);
}
template <int BM, int BN, int DM>
__device__ __forceinline__ void load_masks(backward_tile<BM, BN, DM> *z, const attention_view &a,
                                           const attention_tile &t, int i0, int j0, int h) {
    visible_words rule = visible_of(a.rules(), h);
    for (int r = threadIdx.x; r < BM; r += FMA_THREADS) {
        int i = i0 + r, keys = min(BN, t.length - j0);
        bool counts = i < t.own && z->lse[r] != -INFINITY; /* written by this very thread */
        z->mask[r] = counts ? visible_bits(rule, i, t.position + i, j0, keys) : 0;
    }
}

struct pair_gradient {
    float p, ds, dot; /* probability after dropout; d loss / d score, / d (q.k) */
};
/* Of row r of the tile at i0 and key c of the tile at j0, from q.k and dO.v. */
template <typename Tile>
__device__ __forceinline__ pair_gradient backward_pair(const attention_view &a,
                                                       const attention_tile &t, const Tile *z,
                                                       const struct random_key &key, int h,
                                                       float slope, int i0, int r, int j0, int c,
                                                       float s, float dp) {
    pair_gradient g = {0.0f, 0.0f, 0.0f};
    if (!(z->mask[r] >> c & 1))
        return g;
    int i = i0 + r, j = j0 + c;
    float in, x = attention_score_of(a, s, h, i, t.position + i, j, slope, &in);
    float p = exp2f((x - z->lse[r]) * LOG2E), keep = 1.0f;
    if (a.dropout > 0.0f)
        keep = dropout_one(a, key, h, t.begin + i, j);
    g.p = p * keep;
    g.ds = p * (keep * dp - z->delta[r]);
    g.dot = g.ds * in;
    return g;
}

/* ------------------------------------------------------------------ dK, dV */

template <int BM, int BN, int DM>
__global__ void __launch_bounds__(FMA_THREADS, 1)
    attention_dkv_fma(const __grid_constant__ attention_view a) {
    const int TM = BM / 16, TN = BN / 16;
    typedef backward_tile<BM, BN, DM> tile_t;
    CUDA_SHARED(tile_t, z);
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, kh = blockIdx.y;
    attention_tile t;
    if (!find_keys(a, (int)blockIdx.x, BN, &t))
        return;
    int j0 = t.first, keys = min(BN, t.length - j0);
    struct random_key key = dropout_key(a);
    float dk[TN][DM / 16] = {}, dv[TN][DM / 16] = {};
    load_keys(z, a, t, j0, kh);
    for (int h = kh * a.group; h < (kh + 1) * a.group; h++) {
        float slope = a.slopes ? a.slopes[h] : 0.0f;
        for (int i0 = next_rows(a, t, h, 0, j0, j0 + keys, BM); i0 < t.own;
             i0 = next_rows(a, t, h, i0 + BM, j0, j0 + keys, BM)) {
            __syncthreads();
            load_rows(z, a, t, i0, h);
            load_masks(z, a, t, i0, j0, h);
            __syncthreads();
            float s[TN][TM], dp[TN][TM];
            fma_scores<TN, TM, DM>(s, z->k, z->q, a.width);
            fma_scores<TN, TM, DM>(dp, z->v, z->dout, a.width);
#pragma unroll
            for (int c = 0; c < TN; c++)
#pragma unroll
                for (int r = 0; r < TM; r++) {
                    pair_gradient g = backward_pair(a, t, z, key, h, slope, i0, tx + 16 * r, j0,
                                                    ty * TN + c, s[c][r], dp[c][r]);
                    z->p[(ty * TN + c) * (BM + 4) + tx + 16 * r] = g.p;
                    dp[c][r] = g.dot;
                }
            __syncwarp();
            fma_product<TN, BM, DM>(dv, z->p, z->dout);
            __syncwarp();
#pragma unroll
            for (int c = 0; c < TN; c++)
#pragma unroll
                for (int r = 0; r < TM; r++)
                    z->p[(ty * TN + c) * (BM + 4) + tx + 16 * r] = dp[c][r];
            __syncwarp();
            fma_product<TN, BM, DM>(dk, z->p, z->q);
        }
    }
#pragma unroll
    for (int c = 0; c < TN; c++) {
        if (ty * TN + c >= keys)
            continue;
        int64_t row = t.start + j0 + ty * TN + c;
        fma_store<TN, DM>(a.dk, row, kh, a.width, dk[c], 1.0f);
        fma_store<TN, DM>(a.dv, row, kh, a.width, dv[c], 1.0f);
    }
}

/* ------------------------------------------------------------------ dQ */

template <int BM, int BN, int DM>
__global__ void __launch_bounds__(FMA_THREADS, 1)
    attention_dq_fma(const __grid_constant__ attention_view a) {
    const int TM = BM / 16, TN = BN / 16;
    typedef backward_tile<BM, BN, DM> tile_t;
    CUDA_SHARED(tile_t, z);
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, h = blockIdx.y, kh = h / a.group;
    attention_tile t;
    if (!find_rows(a, (int)(gridDim.x - 1 - blockIdx.x), BM, &t))
        return;
    int i0 = t.first, count = min(BM, t.own - i0);
    struct random_key key = dropout_key(a);
    float slope = a.slopes ? a.slopes[h] : 0.0f;
    float dq[TM][DM / 16] = {};
    load_rows(z, a, t, i0, h);
    for (int j0 = next_keys(a, t, h, 1, i0, i0 + count, 0, t.length, BN); j0 < t.length;
         j0 = next_keys(a, t, h, 1, i0, i0 + count, j0 + BN, t.length, BN)) {
        __syncthreads();
        load_keys(z, a, t, j0, kh);
        load_masks(z, a, t, i0, j0, h);
        __syncthreads();
        float s[TM][TN], dp[TM][TN];
        fma_scores<TM, TN, DM>(s, z->q, z->k, a.width);
        fma_scores<TM, TN, DM>(dp, z->dout, z->v, a.width);
#pragma unroll
        for (int r = 0; r < TM; r++)
#pragma unroll
            for (int c = 0; c < TN; c++)
                z->p[(ty * TM + r) * (BN + 4) + tx + 16 * c] =
                    backward_pair(a, t, z, key, h, slope, i0, ty * TM + r, j0, tx + 16 * c, s[r][c],
                                  dp[r][c])
                        .dot;
        __syncwarp();
        fma_product<TM, BN, DM>(dq, z->p, z->k);
    }
#pragma unroll
    for (int r = 0; r < TM; r++)
        if (ty * TM + r < count)
            fma_store<TM, DM>(a.dq, t.begin + i0 + ty * TM + r, h, a.width, dq[r], 1.0f);
}

/* ------------------------------------------------------------------ the bias's gradient */

template <int BM, int BN, int DM>
__global__ void __launch_bounds__(FMA_THREADS, 1)
    attention_dbias_fma(const __grid_constant__ attention_view a) {
    const int TM = BM / 16, TN = BN / 16;
    typedef backward_tile<BM, BN, DM> tile_t;
    CUDA_SHARED(tile_t, z);
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int j0 = (int)blockIdx.x * BN, i0 = (int)blockIdx.y * BM, g = blockIdx.z;
    int h0 = a.bias_heads == 1 ? 0 : g, h1 = a.bias_heads == 1 ? a.heads : g + 1;
    struct random_key key = dropout_key(a);
    float sum[TM][TN] = {};
    for (int s0 = 0; s0 < a.sequences; s0++) {
        attention_tile t;
        tile_sequence(a, s0, &t);
        if (i0 >= t.own || j0 >= t.length)
            continue;
        for (int h = h0; h < h1; h++) {
            if (!heads_some(a, t, h, 1, i0, min(i0 + BM, t.own), j0, min(j0 + BN, t.length)))
                continue;
            __syncthreads();
            load_rows(z, a, t, i0, h);
            load_keys(z, a, t, j0, h / a.group);
            load_masks(z, a, t, i0, j0, h);
            __syncthreads();
            float s[TM][TN], dp[TM][TN], slope = a.slopes ? a.slopes[h] : 0.0f;
            fma_scores<TM, TN, DM>(s, z->q, z->k, a.width);
            fma_scores<TM, TN, DM>(dp, z->dout, z->v, a.width);
#pragma unroll
            for (int r = 0; r < TM; r++)
#pragma unroll
                for (int c = 0; c < TN; c++)
                    sum[r][c] += backward_pair(a, t, z, key, h, slope, i0, ty * TM + r, j0,
                                               tx + 16 * c, s[r][c], dp[r][c])
                                     .ds;
        }
    }
#pragma unroll
    for (int r = 0; r < TM; r++)
#pragma unroll
        for (int c = 0; c < TN; c++) {
            int i = i0 + ty * TM + r, j = j0 + tx + 16 * c;
            if (i < a.bias_rows && j < a.bias_columns)
                a.dbias[g * a.dbias_head + i * a.dbias_row + j] = sum[r][c];
        }
}

/* ------------------------------------------------------------------ launching */

template <int BM, int BN, int DM>
static tril_status dbias(struct op_context *ctx, const attention_view &a, struct tril_error *err) {
    if (!a.dbias)
        return TRIL_OK;
    return cuda_launch(
        ctx, "attention_backward", err, attention_dbias_fma<BM, BN, DM>,
        dim3(cuda_blocks(a.bias_columns, BN), cuda_blocks(a.bias_rows, BM), (unsigned)a.bias_heads),
        dim3(FMA_THREADS), sizeof(backward_tile<BM, BN, DM>), a);
}
template <int BM, int BN, int DM>
static tril_status both(struct op_context *ctx, const attention_view &a, struct tril_error *err) {
    const size_t shared = sizeof(backward_tile<BM, BN, DM>);
    CUDA_TRY(cuda_launch(ctx, "attention_backward", err, attention_dkv_fma<BM, BN, DM>,
                         dim3(key_tiles(a, BN), (unsigned)a.kv_heads), dim3(FMA_THREADS), shared,
                         a));
    return cuda_launch(ctx, "attention_backward", err, attention_dq_fma<BM, BN, DM>,
                       dim3(row_tiles(a, BM), (unsigned)a.heads), dim3(FMA_THREADS), shared, a);
}

tril_status attention_fma_dbias(struct op_context *ctx, const attention_view &a,
                                struct tril_error *err) {
    if (a.width <= 64)
        return dbias<64, 64, 64>(ctx, a, err);
    return a.width <= 128 ? dbias<32, 32, 128>(ctx, a, err) : dbias<16, 16, 256>(ctx, a, err);
}
tril_status attention_fma_backward(struct op_context *ctx, const attention_view &a,
                                   struct tril_error *err) {
    if (a.width <= 64)
        return both<64, 64, 64>(ctx, a, err);
    return a.width <= 128 ? both<32, 32, 128>(ctx, a, err) : both<16, 16, 256>(ctx, a, err);
}
