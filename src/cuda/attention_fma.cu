/* attention_forward in fp32 arithmetic, for everything: any dtype of q and of the cache, any width
 * up to 256, every option (flash: Dao 2023; formulas: src/ops/attention.c).
 *
 * A block of 256 threads holds BM query rows in shared memory and walks over tiles of BN keys that
 * some of them sees. FLOPs: 4 d a visible pair; from shared memory a product of scores reads
 * (TM + TN) / (4 TM TN) floats an FMA: at 64 x 64 half a byte, so that fp32's rate is the bound. */
#include "cuda/attention_fma.cuh"

template <int BM, int BN, int DM>
struct fma_forward_tile { /* in shared memory */
    float q[BM * (DM + 4)], k[BN * (DM + 4)], v[BN * (DM + 4)], p[BM * (BN + 4)];
    uint64_t mask[BM];
    int key[BN];
};

template <int BM, int BN, int DM>
__global__ void __launch_bounds__(FMA_THREADS, 1)
    attention_forward_fma(const __grid_constant__ attention_view a,
                          const __grid_constant__ attention_cut cut) {
    const int TM = BM / 16, TN = BN / 16;
    typedef fma_forward_tile<BM, BN, DM> tile_t;
    CUDA_SHARED(tile_t, z);
    int tid = threadIdx.x, tx = tid % 16, ty = tid / 16, fold = cut.fold;
    int h0 = (int)blockIdx.y * fold, kh = h0 / a.group, per = BM / fold;
    attention_tile t;
    if (!find_rows(a, (int)(gridDim.x - 1 - blockIdx.x), per, &t))
        return;
    int i0 = t.first, i1 = min(i0 + per, t.own), count = (i1 - i0) * fold;
    int from = (int)blockIdx.z * cut.chunk, last = t.length;
    if (cut.splits > 1)
        last = min(last, from + cut.chunk);
    if (!visible_heads_differ(a.rules()) && visible_of(a.rules(), h0).causal())
        last = min(last, t.position + i1);
    auto query = [&](int r) -> int { return i0 + (fold == 1 ? r : r / fold); };
    auto head = [&](int r) -> int { return h0 + (fold == 1 ? 0 : r % fold); };
    struct random_key key = dropout_key(a);
    for (int e = tid; e < BM * DM; e += FMA_THREADS) {
        int r = e / DM, x = e % DM;
        int64_t at = (t.begin + query(r)) * a.q.row + head(r) * a.q.head;
        z->q[r * (DM + 4) + x] =
            r < count && x < a.width ? load_any(a.q.data, a.q.dtype, at + x) : 0.0f;
    }
    float o[TM][DM / 16] = {}, m[TM], l[TM] = {};
#pragma unroll
    for (int r = 0; r < TM; r++)
        m[r] = -INFINITY;
    for (int j0 = next_keys(a, t, h0, fold, i0, i1, from, last, BN); j0 < last;
         j0 = next_keys(a, t, h0, fold, i0, i1, j0 + BN, last, BN)) {
        int keys = min(BN, t.length - j0);
        for (int j = tid; j < BN; j += FMA_THREADS)
            z->key[j] = j < keys ? key_row(a, t, j0 + j) : -1;
        for (int r = tid; r < BM; r += FMA_THREADS) {
            int i = query(r);
            z->mask[r] = 0;
            if (r < count)
                z->mask[r] =
                    visible_bits(visible_of(a.rules(), head(r)), i, t.position + i, j0, keys);
        }
        __syncthreads();
        fma_load<BN, DM>(z->k, a.k, kh, z->key, a.width, a.k_scale, a.kv_heads);
        fma_load<BN, DM>(z->v, a.v, kh, z->key, a.width, a.v_scale, a.kv_heads);
        __syncthreads();
        float s[TM][TN];
        fma_scores<TM, TN, DM>(s, z->q, z->k, a.width);
#pragma unroll
        for (int r = 0; r < TM; r++) {
            int i = query(ty * TM + r), h = head(ty * TM + r);
            uint64_t mask = z->mask[ty * TM + r];
            float top = -INFINITY, sum = 0.0f, slope = a.slopes ? a.slopes[h] : 0.0f;
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
        int n = t.begin + query(ty * TM + r), h = head(ty * TM + r);
        int64_t at = (int64_t)h * a.rows + n;
        if (ty * TM + r >= count)
            continue;
        if (cut.splits > 1) {
            at += (int64_t)blockIdx.z * a.heads * a.rows;
            if (tx == 0)
                cut.part[at] = make_float2(m[r], l[r]);
            heads_view part = {(char *)cut.part_o, a.width, 0, DT_F32};
            fma_store<TM, DM>(part, at, 0, a.width, o[r], 1.0f);
            continue;
        }
        float lse,
            factor = attention_finish(m[r], l[r], a.sink && t.s >= 0 ? a.sink + h : nullptr, &lse);
        fma_store<TM, DM>(a.o, n, h, a.width, o[r], factor);
        if (a.lse && tx == 0)
            a.lse[at] = lse;
    }
}

template <int BM, int BN, int DM>
static tril_status launch(struct op_context *ctx, const attention_view &a, const attention_cut &cut,
                          struct tril_error *err) {
    return cuda_launch(
        ctx, "attention_forward", err, attention_forward_fma<BM, BN, DM>,
        dim3(row_tiles(a, BM / cut.fold), (unsigned)(a.heads / cut.fold), (unsigned)cut.splits),
        dim3(FMA_THREADS), sizeof(fma_forward_tile<BM, BN, DM>), a, cut);
}

tril_status attention_fma_forward(struct op_context *ctx, const attention_view &a,
                                  const attention_cut &cut, struct tril_error *err) {
    bool few = cut.fold > 1 || cut.splits > 1;
    if (a.width <= 64)
        return few ? launch<16, 64, 64>(ctx, a, cut, err) : launch<64, 64, 64>(ctx, a, cut, err);
    if (a.width <= 128)
        return few ? launch<16, 32, 128>(ctx, a, cut, err) : launch<64, 32, 128>(ctx, a, cut, err);
    return launch<16, 32, 256>(ctx, a, cut, err);
}
