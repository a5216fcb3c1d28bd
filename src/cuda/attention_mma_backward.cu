/* attention_backward on tensor cores, bf16 and fp16, deterministic: nothing is atomic.
 *
 * One kernel holds 64 (d <= 64: 128) keys, 16 or 32 a warp, and walks over the query rows that see
 * them. It makes the scores transposed, K Q' and V dO', so that P' and dS' are in the registers
 * where the products with dO and Q want them. The other holds 64 query rows and walks over keys for
 * dQ. Scores are made in both: 7 products of d a visible pair instead of 5, and no sums in memory.
 * From d = 129 on, dK and dV are made in two halves of the columns, by blocks of their own. */
#include "cuda/attention_mma.cuh"

template <typename T, int DP, int BM, int BN>
struct mma_backward_tile {
    static const int LD = DP + 8;
    T q[BM * LD], dout[BM * LD], k[BN * LD], v[BN * LD];
    float lse[BM], delta[BM]; /* lse in powers of 2; infinite where a row does not count */
};

/* Which of q and dO, of k and v, of dq, of dk and dv lie so that they can be moved in pieces. */
enum { ALIGNED_ROWS = 1, ALIGNED_KEYS = 2, PAIRS_DQ = 4, PAIRS_DKV = 8 };

/* Rows from i0 on of head h into shared memory; a group of copies is left open. */
template <typename T, int DP, int BM, int BN>
__device__ __forceinline__ void load_rows(mma_backward_tile<T, DP, BM, BN> *z,
                                          const attention_view &a, const attention_tile &t, int i0,
                                          int h, int aligned) {
    auto load = [&](T *to, const heads_view &x) {
        mma_tile<T, BM, DP>(to, x.data, a.width, aligned & ALIGNED_ROWS, [&](int r) -> int64_t {
            return i0 + r < t.own ? (int64_t)(t.begin + i0 + r) * x.row + h * x.head : -1;
        });
    };
    load(z->q, a.q);
    load(z->dout, a.dout);
    commit_copies();
    for (int r = threadIdx.x; r < BM; r += MMA_THREADS) {
        int64_t at = (int64_t)h * a.rows + t.begin + i0 + r;
        bool in = i0 + r < t.own;
        float lse = in ? a.lse[at] : -INFINITY;
        z->lse[r] = lse == -INFINITY ? INFINITY : lse * LOG2E;
        z->delta[r] = in ? a.delta[at] : 0.0f;
    }
}
template <typename T, int DP, int BM, int BN>
__device__ __forceinline__ void load_keys(mma_backward_tile<T, DP, BM, BN> *z,
                                          const attention_view &a, const attention_tile &t, int j0,
                                          int kh, int aligned) {
    auto load = [&](T *to, const heads_view &x) {
        mma_tile<T, BN, DP>(to, x.data, a.width, aligned & ALIGNED_KEYS, [&](int j) -> int64_t {
            return j0 + j < t.length ? (int64_t)(t.start + j0 + j) * x.row + kh * x.head : -1;
        });
    };
    load(z->k, a.k);
    load(z->v, a.v);
    commit_copies();
}

/* From q.k and dO.v: *s becomes the probability after dropout, *dp the gradient of q.k (without
 * EXTRA yet to be multiplied by the scale). */
template <bool EXTRA>
__device__ __forceinline__ void backward_pair(const attention_view &a, bool seen, float *s,
                                              float *dp, float lse, float delta, float keep, int h,
                                              int i, int p, int j, float slope) {
    float in = 1.0f, e = 0.0f;
    if (seen) {
        if (EXTRA)
            e = exp2_fast(LOG2E * attention_score_of(a, *s, h, i, p, j, slope, &in) - lse);
        else
            e = exp2_fast(fmaf(*s, a.scale * LOG2E, -lse));
    }
    *s = e * keep;
    *dp = seen ? e * (keep * *dp - delta) * in : 0.0f;
}

/* Dropout's factors of a transposed fragment: rows are keys j16 + g and j16 + 8 + g, columns the
 * rows n and n + 1 of q. Four lanes whose keys share their numbers draw one block each and turn the
 * 4 x 4 numbers around. */
__device__ __forceinline__ void mma_dropout_turned(const attention_view &a,
                                                   const struct random_key &key, int h, int n,
                                                   int j16, float (&out)[4]) {
    int g = threadIdx.x % 32 / 4;
    bool high = g & 2, odd = g & 1;
    float w[4];
    dropout_four(a, key, h, n + odd, j16 + 8 * high + (g & 4), w);
    float x = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 8);
    float y = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 8);
    float u[4] = {high ? x : w[0], high ? y : w[1], high ? w[2] : x, high ? w[3] : y};
    x = __shfl_xor_sync(0xffffffffu, odd ? u[0] : u[1], 4);
    y = __shfl_xor_sync(0xffffffffu, odd ? u[2] : u[3], 4);
    out[0] = odd ? x : u[0];
    out[1] = odd ? u[1] : x;
    out[2] = odd ? y : u[2];
    out[3] = odd ? u[3] : y;
}

/* ------------------------------------------------------------------ dK, dV */

template <typename T, int DP, int MT, int BM, bool EXTRA>
__global__ void __launch_bounds__(MMA_THREADS, 1)
    attention_dkv_mma(const __grid_constant__ attention_view a, int aligned) {
    const int BN = 64 * MT, NT = BM / 8, CT = (DP > 128 ? 128 : DP) / 8;
    typedef mma_backward_tile<T, DP, BM, BN> tile_t;
    CUDA_SHARED(tile_t, z);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q2 = 2 * (lane % 4);
    int kh = blockIdx.y, steps = (a.width + 15) / 16, column = (int)blockIdx.z * (CT / 2);
    attention_tile t;
    if (!find_keys(a, (int)blockIdx.x, BN, &t))
        return;
    int j0 = t.first, keys = min(BN, t.length - j0), first = warp * 16 * MT;
    struct random_key key = dropout_key(a);
    float dk[MT][CT][4] = {}, dv[MT][CT][4] = {};
    load_keys(z, a, t, j0, kh, aligned);
    for (int h = kh * a.group; h < (kh + 1) * a.group; h++) {
        visible_words rule = visible_of(a.rules(), h);
        float slope = EXTRA && a.slopes ? a.slopes[h] : 0.0f;
        for (int i0 = next_rows(a, t, h, 0, j0, j0 + keys, BM); i0 < t.own;
             i0 = next_rows(a, t, h, i0 + BM, j0, j0 + keys, BM)) {
            __syncthreads();
            load_rows(z, a, t, i0, h, aligned);
            wait_copies<0>();
            __syncthreads();
            float s[MT][NT][4], dp[MT][NT][4];
            mma_scores<T, MT, NT, DP>(s, z->k + first * tile_t::LD, z->q, steps);
            mma_scores<T, MT, NT, DP>(dp, z->v + first * tile_t::LD, z->dout, steps);
            int own = min(16 * MT, keys - first); /* keys of this warp */
            bool every = own == 16 * MT && (!EXTRA || i0 + BM <= t.own) &&
                         visible_every(rule, i0, min(i0 + BM, t.own), t.position + i0, j0 + first,
                                       j0 + first + own);
            uint32_t mask[BM > 32 ? BM / 32 : 1]; /* of query i0 + 32 b + lane: its keys */
#pragma unroll
            for (int b = 0; b < (BM > 32 ? BM / 32 : 1); b++) {
                int i = i0 + 32 * b + lane;
                mask[b] = every ? 0xffffffffu : 0;
                if (!every && own > 0 && i < t.own)
                    mask[b] = (uint32_t)visible_bits(rule, i, t.position + i, j0 + first, own);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float2 lse = *(const float2 *)(z->lse + 8 * n + q2);
                float2 delta = *(const float2 *)(z->delta + 8 * n + q2);
                uint32_t seen[2];
#pragma unroll
                for (int e = 0; e < 2; e++)
                    seen[e] = __shfl_sync(0xffffffffu, mask[8 * n / 32], (8 * n + q2 + e) % 32);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    int i = i0 + 8 * n + q2, j = j0 + first + 16 * m;
                    float keep[4] = {1.0f, 1.0f, 1.0f, 1.0f};
                    if (EXTRA && a.dropout > 0.0f)
                        mma_dropout_turned(a, key, h, t.begin + i, j, keep);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int bit = 16 * m + 8 * (e / 2) + g;
                        backward_pair<EXTRA>(a, seen[e % 2] >> bit & 1, &s[m][n][e], &dp[m][n][e],
                                             e % 2 ? lse.y : lse.x, e % 2 ? delta.y : delta.x,
                                             keep[e], h, i + e % 2, t.position + i + e % 2,
                                             j + 8 * (e / 2) + g, slope);
                    }
                }
            }
            mma_weighted<T, MT, NT, DP, CT>(dv, s, z->dout, column, steps);
            mma_weighted<T, MT, NT, DP, CT>(dk, dp, z->q, column, steps);
        }
    }
    wait_copies<0>();
    float factor = EXTRA ? 1.0f : a.scale;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = first + 16 * m + 8 * half + g;
            if (r >= keys)
                continue;
            int64_t row = t.start + j0 + r;
            T *k = (T *)a.dk.data + row * a.dk.row + kh * a.dk.head;
            T *v = (T *)a.dv.data + row * a.dv.row + kh * a.dv.head;
#pragma unroll
            for (int b = 0; b < CT; b++) {
                int c = 16 * column + 8 * b + q2;
                mma_store(k, c, a.width, aligned & PAIRS_DKV, dk[m][b][2 * half] * factor,
                          dk[m][b][2 * half + 1] * factor);
                mma_store(v, c, a.width, aligned & PAIRS_DKV, dv[m][b][2 * half],
                          dv[m][b][2 * half + 1]);
            }
        }
}

/* ------------------------------------------------------------------ dQ */

template <typename T, int DP, int BN, bool EXTRA>
__global__ void __launch_bounds__(MMA_THREADS, 1)
    attention_dq_mma(const __grid_constant__ attention_view a, int aligned) {
    const int BM = 64, NT = BN / 8, CT = DP / 8;
    typedef mma_backward_tile<T, DP, BM, BN> tile_t;
    CUDA_SHARED(tile_t, z);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q2 = 2 * (lane % 4);
    int h = blockIdx.y, kh = h / a.group, steps = (a.width + 15) / 16, first = warp * 16;
    attention_tile t;
    if (!find_rows(a, (int)(gridDim.x - 1 - blockIdx.x), BM, &t))
        return;
    int i0 = t.first, i1 = min(i0 + BM, t.own), last = t.length;
    visible_words rule = visible_of(a.rules(), h);
    if (rule.causal())
        last = min(last, t.position + i1);
    struct random_key key = dropout_key(a);
    float dq[1][CT][4] = {}, slope = EXTRA && a.slopes ? a.slopes[h] : 0.0f;
    load_rows(z, a, t, i0, h, aligned);
    for (int j0 = next_keys(a, t, h, 1, i0, i1, 0, last, BN); j0 < last;
         j0 = next_keys(a, t, h, 1, i0, i1, j0 + BN, last, BN)) {
        int keys = min(BN, t.length - j0);
        __syncthreads();
        load_keys(z, a, t, j0, kh, aligned);
        wait_copies<0>();
        __syncthreads();
        float s[1][NT][4], dp[1][NT][4];
        mma_scores<T, 1, NT, DP>(s, z->q + first * tile_t::LD, z->k, steps);
        mma_scores<T, 1, NT, DP>(dp, z->dout + first * tile_t::LD, z->v, steps);
        int w0 = i0 + first, w1 = min(w0 + 16, i1); /* this warp's rows */
        bool every = keys == BN && (EXTRA ? w1 - w0 == 16 : w0 < w1) &&
                     visible_every(rule, w0, w1, t.position + w0, j0, j0 + BN);
        uint64_t mask = every ? ~(uint64_t)0 : 0;
        if (!every && w0 + lane < w1)
            mask = visible_bits(rule, w0 + lane, t.position + w0 + lane, j0, keys);
        uint64_t seen[2];
        float lse[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            seen[half] = __shfl_sync(0xffffffffu, mask, 8 * half + g) >> q2;
            lse[half] = z->lse[first + 8 * half + g];
            delta[half] = z->delta[first + 8 * half + g];
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int i = w0 + g, j = j0 + 8 * n;
            float keep[4] = {1.0f, 1.0f, 1.0f, 1.0f};
            if (EXTRA && a.dropout > 0.0f)
                mma_dropout(a, key, h, t.begin + i, h, t.begin + i + 8, j, keep);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int half = e / 2;
                backward_pair<EXTRA>(a, seen[half] >> (8 * n + e % 2) & 1, &s[0][n][e],
                                     &dp[0][n][e], lse[half], delta[half], keep[e], h, i + 8 * half,
                                     t.position + i + 8 * half, j + q2 + e % 2, slope);
            }
        }
        mma_weighted<T, 1, NT, DP, CT>(dq, dp, z->k, 0, steps);
    }
    wait_copies<0>();
    float factor = EXTRA ? 1.0f : a.scale;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int i = i0 + first + 8 * half + g;
        if (i >= i1)
            continue;
        T *row = (T *)a.dq.data + (int64_t)(t.begin + i) * a.dq.row + h * a.dq.head;
#pragma unroll
        for (int b = 0; b < CT; b++)
            mma_store(row, 8 * b + q2, a.width, aligned & PAIRS_DQ, dq[0][b][2 * half] * factor,
                      dq[0][b][2 * half + 1] * factor);
    }
}

/* ------------------------------------------------------------------ launching */

bool attention_mma_takes_backward(const attention_view &a) {
    const heads_view *all[] = {&a.k, &a.v, &a.dout, &a.dq, &a.dk, &a.dv};
    if (a.q.dtype != DT_BF16 && a.q.dtype != DT_F16)
        return false;
    for (const heads_view *x : all)
        if (x->dtype != a.q.dtype)
            return false;
    return true;
}

static int pairs(const heads_view &x) {
    return (uintptr_t)x.data % 4 == 0 && x.row % 2 == 0 && x.head % 2 == 0;
}
/* MT, BM: of dK and dV; BN: keys at a time for dQ. */
template <typename T, int DP, int MT, int BM, int BN, bool EXTRA>
static tril_status both(struct op_context *ctx, const attention_view &a, struct tril_error *err) {
    int aligned = ALIGNED_ROWS * (mma_aligned(a.q, a.width) && mma_aligned(a.dout, a.width)) +
                  ALIGNED_KEYS * (mma_aligned(a.k, a.width) && mma_aligned(a.v, a.width)) +
                  PAIRS_DQ * pairs(a.dq) + PAIRS_DKV * (pairs(a.dk) && pairs(a.dv));
    CUDA_TRY(cuda_launch(ctx, "attention_backward", err, attention_dkv_mma<T, DP, MT, BM, EXTRA>,
                         dim3(key_tiles(a, 64 * MT), (unsigned)a.kv_heads, DP > 128 ? 2 : 1),
                         dim3(MMA_THREADS), sizeof(mma_backward_tile<T, DP, BM, 64 * MT>), a,
                         aligned));
    return cuda_launch(ctx, "attention_backward", err, attention_dq_mma<T, DP, BN, EXTRA>,
                       dim3(row_tiles(a, 64), (unsigned)a.heads), dim3(MMA_THREADS),
                       sizeof(mma_backward_tile<T, DP, 64, BN>), a, aligned);
}
template <typename T>
static tril_status backward(struct op_context *ctx, const attention_view &a,
                            struct tril_error *err) {
    bool extra = a.softcap > 0.0f || a.slopes || a.bias || a.dropout > 0.0f;
    if (a.width > 128)
        return both<T, 256, 1, 16, 16, true>(ctx, a, err);
    if (a.width > 64)
        return extra ? both<T, 128, 1, 32, 64, true>(ctx, a, err)
                     : both<T, 128, 1, 64, 64, false>(ctx, a, err);
    return extra ? both<T, 64, 1, 64, 64, true>(ctx, a, err)
                 : both<T, 64, 2, 32, 64, false>(ctx, a, err);
}

tril_status attention_mma_backward(struct op_context *ctx, const attention_view &a,
                                   struct tril_error *err) {
    return a.q.dtype == DT_BF16 ? backward<__nv_bfloat16>(ctx, a, err)
                                : backward<__half>(ctx, a, err);
}
