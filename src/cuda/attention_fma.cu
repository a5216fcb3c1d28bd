/* attention_forward in fp32 arithmetic, for everything: any dtype of q and of the cache, any width
 * up to 256, every option (flash: Dao 2023; formulas: src/ops/attention.c).
 *
 * A block of 256 threads holds BM query rows in shared memory and walks over tiles of BN keys that
 * some of them sees. FLOPs: 4 d a visible pair; from shared memory a product of scores reads
 * (TM + TN) / (4 TM TN) floats an FMA: at 64 x 64 half a byte, so that fp32's rate is the bound. */
#include "cuda/attention_fma.cuh"

template <int BM, int BN, int DM>
struct forward_tile { /* in shared memory */
    static const int TM = BM / 16, TN = BN / 16;
    float q[BM * (DM + 4)], k[BN * (DM + 4)], v[BN * (DM + 4)], p[BM * (BN + 4)];
    uint64_t mask[BM];
    int row[BM], key[BN];
};

template <int BM, int BN, int DM>
__global__ void __launch_bounds__(FMA_THREADS, 1)
    attention_forward_fma(const __grid_constant__ attention_view a) {
    const int TM = BM / 16, TN = BN / 16;
    typedef forward_tile<BM, BN, DM> tile_t;
    CUDA_SHARED(tile_t, z);
    int tid = threadIdx.x, tx = tid % 16, ty = tid / 16, h = blockIdx.y, kh = h / a.group;
    attention_tile t;
    if (!find_rows(a, (int)(gridDim.x - 1 - blockIdx.x), BM, &t))
        return;
    int count = min(BM, t.own - t.first);
    visible_words rule = visible_of(a.rules(), h);
    struct random_key key = dropout_key(a);
    float slope = a.slopes ? a.slopes[h] : 0.0f;
    for (int r = tid; r < BM; r += FMA_THREADS)
        z->row[r] = r < count ? t.begin + t.first + r : -1;
    __syncthreads();
    fma_load<BM, DM>(z->q, a.q, h, z->row, a.width, nullptr, 0);
    float o[TM][DM / 16] = {}, m[TM], l[TM] = {};
#pragma unroll
    for (int r = 0; r < TM; r++)
        m[r] = -INFINITY;
    int last = rule.causal() ? min(t.length, t.position + t.first + count) : t.length;
    for (int j0 = next_keys(a, t, h, 1, t.first, t.first + count, 0, last, BN); j0 < last;
         j0 = next_keys(a, t, h, 1, t.first, t.first + count, j0 + BN, last, BN)) {
        int keys = min(BN, t.length - j0);
        for (int j = tid; j < BN; j += FMA_THREADS)
            z->key[j] = j < keys ? key_row(a, t, j0 + j) : -1;
        for (int r = tid; r < BM; r += FMA_THREADS) {
            int i = t.first + r;
            z->mask[r] = r < count ? visible_bits(rule, i, t.position + i, j0, keys) : 0;
        }
        __syncthreads();
        fma_load<BN, DM>(z->k, a.k, kh, z->key, a.width, a.k_scale, a.kv_heads);
        fma_load<BN, DM>(z->v, a.v, kh, z->key, a.width, a.v_scale, a.kv_heads);
        __syncthreads();
        float s[TM][TN];
        fma_scores<TM, TN, DM>(s, z->q, z->k, a.width);
#pragma unroll
        for (int r = 0; r < TM; r++) {
            int i = t.first + ty * TM + r;
            uint64_t mask = z->mask[ty * TM + r];
            float top = -INFINITY, sum = 0.0f;
#pragma unroll
            for (int c = 0; c < TN; c++) {
                int b = tx + 16 * c;
                float unused;
                s[r][c] = (mask >> b & 1)
                              ? LOG2E * attention_score_of(a, s[r][c], h, i, t.position + i, j0 + b,
                                                           slope, &unused)
                              : -INFINITY;
                top = fmaxf(top, s[r][c]);
            }
#pragma unroll
            for (int d = 8; d > 0; d /= 2)
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
            top = fmaxf(top, m[r]);
            float base = top == -INFINITY ? 0.0f : top, shrink = exp2f(m[r] - base);
            m[r] = top;
#pragma unroll
            for (int c = 0; c < TN; c++) {
                int b = tx + 16 * c;
                float p = exp2f(s[r][c] - base);
                sum += p;
                if (a.dropout > 0.0f && p != 0.0f)
                    p *= dropout_one(a, key, h, t.begin + i, j0 + b);
                z->p[(ty * TM + r) * (BN + 4) + b] = p;
            }
#pragma unroll
            for (int d = 8; d > 0; d /= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, d);
            l[r] = l[r] * shrink + sum;
#pragma unroll
            for (int c = 0; c < DM / 16; c++)
                o[r][c] *= shrink;
        }
        __syncwarp(); /* a row of p is written and read by one warp */
        fma_product<TM, BN, DM>(o, z->p, z->v);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < TM; r++) {
        int i = t.first + ty * TM + r, n = t.begin + i;
        if (ty * TM + r >= count)
            continue;
        float lse,
            factor = attention_finish(m[r], l[r], a.sink && t.s >= 0 ? a.sink + h : nullptr, &lse);
        fma_store<TM, DM>(a.o, n, h, a.width, o[r], factor);
        if (a.lse && tx == 0)
            a.lse[(int64_t)h * a.rows + n] = lse;
    }
}

template <int BM, int BN, int DM>
static tril_status launch(struct op_context *ctx, const attention_view &a, struct tril_error *err) {
    return cuda_launch(ctx, "attention_forward", err, attention_forward_fma<BM, BN, DM>,
                       dim3(row_tiles(a, BM), (unsigned)a.heads), dim3(FMA_THREADS),
                       sizeof(forward_tile<BM, BN, DM>), a);
}

tril_status attention_fma_forward(struct op_context *ctx, const attention_view &a,
                                  struct tril_error *err) {
    if (a.width <= 64)
        return launch<64, 64, 64>(ctx, a, err);
    if (a.width <= 128)
        return launch<64, 32, 128>(ctx, a, err);
    return launch<16, 32, 256>(ctx, a, err);
}
