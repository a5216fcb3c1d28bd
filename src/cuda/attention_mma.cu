/* attention_forward on tensor cores, bf16 and fp16, every option of the contract (flash, two loops
 * turned inside out as in FlashAttention-2: Dao 2023).
 *
 * A block of 4 warps holds 64 MT query rows, 16 MT a warp, and walks over tiles of 64 keys (32 from
 * d = 129 on) that some row sees; K of the next tile is copied during the softmax and P V, V during
 * Q K. Scores stay in registers: their fragments, rounded, are P V's left factor. With MT = 2 a
 * fragment of K or V from shared memory serves 32 rows: 128 bytes a clock then feed the tensor
 * cores of sm_80 at twice their rate. Rows are queries, or query and head where a key/value head's
 * queries are few, so that decoding reads K and V once; and where blocks are few, keys are cut
 * too. */
#include "cuda/attention_mma.cuh"

template <typename T, int DP, int MT>
struct mma_forward_tile {
    static const int BM = 64 * MT, BN = DP > 128 ? 32 : 64, LD = DP + 8;
    T q[BM * LD], k[BN * LD], v[BN * LD];
};

/* EXTRA: softcap, slopes, bias, dropout, or a scale that is not above 0. */
template <typename T, int DP, int MT, bool EXTRA>
__global__ void __launch_bounds__(MMA_THREADS, 1)
    attention_forward_mma(const __grid_constant__ attention_view a,
                          const __grid_constant__ attention_cut cut, int aligned) {
    typedef mma_forward_tile<T, DP, MT> tile_t;
    const int BM = tile_t::BM, BN = tile_t::BN, NT = BN / 8, CT = DP / 8;
    CUDA_SHARED(tile_t, z);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, fold = cut.fold;
    int h0 = (int)blockIdx.y * fold, kh = h0 / a.group, per = BM / fold;
    int steps = (a.width + 15) / 16;
    attention_tile t;
    if (!find_rows(a, (int)(gridDim.x - 1 - blockIdx.x), per, &t))
        return;
    int i0 = t.first, i1 = min(i0 + per, t.own), count = (i1 - i0) * fold;
    int from = (int)blockIdx.z * cut.chunk, last = t.length;
    if (cut.splits > 1)
        last = min(last, from + cut.chunk);
    if (!visible_heads_differ(a.rules()) && visible_of(a.rules(), h0).causal())
        last = min(last, t.position + i1);
    struct random_key key = dropout_key(a);

    auto query = [&](int r) -> int { return i0 + (fold == 1 ? r : r / fold); };
    auto head = [&](int r) -> int { return h0 + (fold == 1 ? 0 : r % fold); };
    auto load_keys = [&](T *to, const heads_view &x, int j0) {
        mma_tile<T, BN, DP>(to, x.data, a.width, aligned & 2, [&](int j) -> int64_t {
            int row = j0 + j < t.length ? key_row(a, t, j0 + j) : -1;
            return row < 0 ? -1 : row * x.row + kh * x.head;
        });
    };

    float o[MT][CT][4] = {}, m[MT][2], l[MT][2] = {};
#pragma unroll
    for (int k = 0; k < MT; k++)
        m[k][0] = m[k][1] = -INFINITY;
    int j0 = next_keys(a, t, h0, fold, i0, i1, from, last, BN);
    if (j0 < last) {
        mma_tile<T, BM, DP>(z->q, a.q.data, a.width, aligned & 1, [&](int r) -> int64_t {
            return r < count ? (t.begin + query(r)) * a.q.row + head(r) * a.q.head : -1;
        });
        load_keys(z->k, a.k, j0);
        commit_copies();
    }
    while (j0 < last) {
        int next = next_keys(a, t, h0, fold, i0, i1, j0 + BN, last, BN);
        int keys = min(BN, t.length - j0), first = warp * 16 * MT; /* the warp's rows of the tile */
        wait_copies<0>();
        __syncthreads();
        load_keys(z->v, a.v, j0);
        commit_copies();
        float s[MT][NT][4];
        mma_scores<T, MT, NT, DP>(s, z->q + first * tile_t::LD, z->k, steps);
        wait_copies<0>();
        __syncthreads();
        if (next < last) {
            load_keys(z->k, a.k, next);
            commit_copies();
        }
        bool every = !EXTRA && keys == BN && first < count &&
                     heads_every(a, t, h0, fold, query(first),
                                 query(min(first + 16 * MT, count) - 1) + 1, j0, j0 + BN);
        uint64_t mask = 0;
        if (!every) {
            int r = first + lane % (16 * MT), i = query(r);
            if (r < count)
                mask = visible_bits(visible_of(a.rules(), head(r)), i, t.position + i, j0, keys);
        }
        float c = EXTRA ? 1.0f : a.scale * LOG2E;
#pragma unroll
        for (int k = 0; k < MT; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = first + 16 * k + 8 * half + g;
                uint64_t seen = __shfl_sync(0xffffffffu, mask, 16 * k + 8 * half + g);
                seen >>= 2 * (lane % 4);
                int i = query(r), h = head(r);
                float slope = EXTRA && a.slopes ? a.slopes[h] : 0.0f;
                if (!every)
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float &x = s[k][n][2 * half + e], unused;
                            bool in = seen >> (8 * n + e) & 1;
                            if (EXTRA && in)
                                x = LOG2E * attention_score_of(a, x, h, i, t.position + i,
                                                               j0 + 8 * n + 2 * (lane % 4) + e,
                                                               slope, &unused);
                            x = in ? x : -INFINITY;
                        }
                float top = m[k][half];
#pragma unroll
                for (int n = 0; n < NT; n++)
                    top = fmaxf(top, fmaxf(s[k][n][2 * half], s[k][n][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                float base = top == -INFINITY ? 0.0f : top * c;
                float shrink = exp2_fast(m[k][half] * c - base), sum = 0.0f;
                m[k][half] = top;
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &x = s[k][n][2 * half + e];
                        x = exp2_fast(fmaf(x, c, -base));
                        sum += x;
                    }
                l[k][half] = l[k][half] * shrink + sum;
#pragma unroll
                for (int n = 0; n < CT; n++) {
                    o[k][n][2 * half] *= shrink;
                    o[k][n][2 * half + 1] *= shrink;
                }
            }
            if (EXTRA && a.dropout > 0.0f) {
                int r = first + 16 * k + g, q0 = t.begin + query(r), q1 = t.begin + query(r + 8);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    float keep[4];
                    mma_dropout(a, key, head(r), q0, head(r + 8), q1, j0 + 8 * n, keep);
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[k][n][e] *= keep[e];
                }
            }
        }
        mma_weighted<T, MT, NT, DP, CT>(o, s, z->v, 0, steps);
        j0 = next;
    }
    float c = EXTRA ? 1.0f : a.scale * LOG2E;
#pragma unroll
    for (int k = 0; k < MT; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = warp * 16 * MT + 16 * k + 8 * half + g, h = head(r), n = t.begin + query(r);
            float sum = l[k][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (r >= count)
                continue;
            float most = m[k][half] == -INFINITY ? -INFINITY : m[k][half] * c;
            int64_t at = (int64_t)h * a.rows + n;
            if (cut.splits > 1) {
                at += (int64_t)blockIdx.z * a.heads * a.rows;
                if (lane % 4 == 0)
                    cut.part[at] = make_float2(most, sum);
#pragma unroll
                for (int b = 0; b < CT; b++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (8 * b + 2 * (lane % 4) + e < a.width)
                            cut.part_o[at * a.width + 8 * b + 2 * (lane % 4) + e] =
                                o[k][b][2 * half + e];
                continue;
            }
            float lse, factor = attention_finish(most, sum,
                                                 a.sink && t.s >= 0 ? a.sink + h : nullptr, &lse);
            T *row = (T *)a.o.data + n * a.o.row + h * a.o.head;
#pragma unroll
            for (int b = 0; b < CT; b++)
                mma_store(row, 8 * b + 2 * (lane % 4), a.width, aligned & 4,
                          o[k][b][2 * half] * factor, o[k][b][2 * half + 1] * factor);
            if (a.lse && lane % 4 == 0)
                a.lse[at] = lse;
        }
}

bool attention_mma_takes_forward(const attention_view &a) {
    return (a.q.dtype == DT_BF16 || a.q.dtype == DT_F16) && a.k.dtype == a.q.dtype &&
           a.v.dtype == a.q.dtype && a.o.dtype == a.q.dtype;
}

template <typename T, int DP, int MT, bool EXTRA>
static tril_status launch(struct op_context *ctx, const attention_view &a, const attention_cut &cut,
                          struct tril_error *err) {
    int aligned = mma_aligned(a.q, a.width);
    aligned |= 2 * (mma_aligned(a.k, a.width) && mma_aligned(a.v, a.width));
    aligned |= 4 * ((uintptr_t)a.o.data % 4 == 0 && a.o.row % 2 == 0 && a.o.head % 2 == 0);
    return cuda_launch(ctx, "attention_forward", err, attention_forward_mma<T, DP, MT, EXTRA>,
                       dim3(row_tiles(a, 64 * MT / cut.fold), (unsigned)(a.heads / cut.fold),
                            (unsigned)cut.splits),
                       dim3(MMA_THREADS), sizeof(mma_forward_tile<T, DP, MT>), a, cut, aligned);
}
template <typename T>
static tril_status forward(struct op_context *ctx, const attention_view &a,
                           const attention_cut &cut, struct tril_error *err) {
    bool extra = a.softcap > 0.0f || a.slopes || a.bias || a.dropout > 0.0f || !(a.scale > 0.0f);
    if (a.width > 128)
        return launch<T, 256, 1, true>(ctx, a, cut, err);
    if (cut.fold > 1 || cut.splits > 1)
        return a.width > 64 ? launch<T, 128, 1, true>(ctx, a, cut, err)
                            : launch<T, 64, 1, true>(ctx, a, cut, err);
    if (a.width > 64)
        return extra ? launch<T, 128, 1, true>(ctx, a, cut, err)
                     : launch<T, 128, 2, false>(ctx, a, cut, err);
    return extra ? launch<T, 64, 1, true>(ctx, a, cut, err)
                 : launch<T, 64, 2, false>(ctx, a, cut, err);
}

tril_status attention_mma_forward(struct op_context *ctx, const attention_view &a,
                                  const attention_cut &cut, struct tril_error *err) {
    return a.q.dtype == DT_BF16 ? forward<__nv_bfloat16>(ctx, a, cut, err)
                                : forward<__half>(ctx, a, cut, err);
}
