/* Attention on the GPU: the call unpacked, the body chosen, and the small kernels around it
 * (contracts: ops.h; formulas: src/ops/attention.c, src/ops/attention_probabilities.c). */
#include "cuda/attention.cuh"
#include "cuda/attention_hopper.h"

#include <stdlib.h>

extern "C" {
#include "ops/attention_probabilities.h"
}

/* ------------------------------------------------------------------ the call */

static heads_view heads_of(const struct tensor &t) {
    heads_view v = {(char *)t.data, t.stride[0], t.stride[1], (int)t.dtype};
    return v;
}

/* All but the rules, the backward's tensors and what lies in scratch. */
static tril_status view_make(const struct attention_call *c, const struct tensor *step,
                             const char *name, attention_view *a, struct tril_error *err) {
    const struct attention_params *p = c->params;
    int64_t keys = c->pages ? c->page_columns * p->page_size : c->keys;
    if (c->rows + keys >= VISIBLE_LIMIT || c->heads > 65535)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: %lld rows, %lld keys and %lld heads are more than the GPU's kernels "
                         "serve; rows and keys must be fewer than 2^30, heads fewer than 2^16",
                         name, (long long)c->rows, (long long)keys, (long long)c->heads);
    a->q = heads_of(c->q);
    a->k = heads_of(c->k);
    a->v = heads_of(c->v);
    a->o = heads_of(c->o);
    a->lse = (float *)c->lse.data;
    a->slopes = (const float *)c->slopes.data;
    a->sink = (const float *)c->sink.data;
    a->k_scale = (const float *)c->k_scale.data;
    a->v_scale = (const float *)c->v_scale.data;
    a->step = (const int64_t *)step->data;
    a->q_offsets = c->q_offsets;
    a->kv_start = c->kv_start;
    a->kv_length = c->kv_length;
    a->pages = c->pages;
    a->bias = (const char *)c->bias.data;
    if (a->bias) {
        a->bias_head = c->bias.stride[0];
        a->bias_row = c->bias.stride[1];
        a->bias_dtype = (int)c->bias.dtype;
        a->bias_heads = (int)c->bias.shape[0];
        a->bias_rows = (int)c->bias.shape[1];
        a->bias_columns = (int)c->bias.shape[2];
    }
    a->rows = (int)c->rows;
    a->keys = (int)c->keys;
    a->heads = (int)c->heads;
    a->kv_heads = (int)c->kv_heads;
    a->group = (int)(c->heads / c->kv_heads);
    a->width = (int)c->width;
    a->sequences = (int)c->sequences;
    a->page_columns = (int)c->page_columns;
    a->page_size = p->page_size;
    a->scale = p->scale;
    a->softcap = p->softcap;
    a->dropout = p->dropout;
    a->key = p->key;
    return TRIL_OK;
}

/* Bytes of scratch that the rules need; 0 where they travel with the call. */
static int64_t rules_bytes(const struct attention_call *c) {
    int64_t words = visible_pack(c->params, c->heads, NULL);
    return words <= NEAR_RULES ? 0 : (words * 4 + 255) / 256 * 256;
}
static tril_status rules_put(struct op_context *ctx, const struct attention_call *c, void *scratch,
                             attention_view *a, struct tril_error *err) {
    int64_t bytes = rules_bytes(c);
    if (!bytes) {
        visible_pack(c->params, c->heads, a->near_rules);
        return TRIL_OK;
    }
    int32_t *words = (int32_t *)calloc(1, (size_t)bytes);
    if (!words)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for visibility rules");
    visible_pack(c->params, c->heads, words);
    tril_status st = ctx->backend->upload(ctx, scratch, words, bytes, err);
    free(words);
    a->far_rules = (const int32_t *)scratch;
    return st;
}

/* ------------------------------------------------------------------ forward */

static const int MOST_FOLD = 16; /* the smallest tile's rows */
static const int FEW_ROWS = 16, MOST_SPLITS = 64, LEAST_CHUNK = 256;

/* Heads into one tile where a key/value head has few query rows. Keys are cut for few rows by the
 * longest sequence alone, so that a sequence decoded by itself has the bits that it has among
 * others; for more rows where the blocks would not fill the GPU. Of sizes known on the host only:
 * what is right does not depend on them. */
static attention_cut cut_make(const attention_view &a, const struct attention_params *p,
                              int processors) {
    attention_cut cut = {1, 0, 1, NULL, NULL};
    if (a.rows < 1 || a.sequences < 1)
        return cut;
    int64_t own = p->max_q > 0 ? p->max_q : (a.rows + a.sequences - 1) / a.sequences;
    int64_t keys = p->max_kv > 0 ? p->max_kv
                   : a.pages     ? (int64_t)a.page_columns * a.page_size
                                 : a.keys;
    if (a.group <= MOST_FOLD && own * a.group <= 64)
        cut.fold = a.group;
    int64_t tiles = a.sequences + (int64_t)a.rows * cut.fold / 64, chunk = LEAST_CHUNK;
    if (own > FEW_ROWS && tiles * a.heads / cut.fold >= processors)
        return cut;
    while (chunk * MOST_SPLITS < keys)
        chunk *= 2;
    if (chunk >= keys)
        return cut;
    cut.chunk = (int)chunk;
    cut.splits = (int)((keys + chunk - 1) / chunk);
    return cut;
}
static int64_t cut_bytes(const attention_view &a, const attention_cut &cut) {
    return cut.splits > 1 ? (int64_t)cut.splits * a.heads * a.rows * (a.width + 2) * 4 : 0;
}

/* The pieces of every row put together, in their order: a block of 64 threads a row and head. */
__global__ void attention_combine_kernel(const __grid_constant__ attention_view a,
                                         const __grid_constant__ attention_cut cut) {
    int n = blockIdx.x, h = blockIdx.y;
    int64_t at = (int64_t)h * a.rows + n, stride = (int64_t)a.heads * a.rows;
    float m = -INFINITY, l = 0.0f, lse;
    for (int s = 0; s < cut.splits; s++)
        m = fmaxf(m, cut.part[s * stride + at].x);
    float base = m == -INFINITY ? 0.0f : m;
    for (int s = 0; s < cut.splits; s++)
        l += cut.part[s * stride + at].y * exp2f(cut.part[s * stride + at].x - base);
    bool sink = a.sink && sequence_of(a, n) >= 0;
    float factor = attention_finish(m, l, sink ? a.sink + h : nullptr, &lse);
    for (int t = threadIdx.x; t < a.width; t += 64) {
        float sum = 0.0f;
        for (int s = 0; s < cut.splits; s++)
            if (cut.part[s * stride + at].y != 0.0f)
                sum += cut.part_o[(s * stride + at) * a.width + t] *
                       exp2f(cut.part[s * stride + at].x - base);
        store_any(a.o.data, a.o.dtype, n * a.o.row + h * a.o.head + t, sum * factor);
    }
    if (a.lse && threadIdx.x == 0)
        a.lse[at] = lse;
}

OP_FN(attention_forward) {
    const struct attention_params *p = (const struct attention_params *)params;
    struct attention_call c = {};
    c.q = args[F_Q], c.k = args[F_K], c.v = args[F_V], c.o = args[F_O], c.lse = args[F_LSE];
    c.slopes = args[F_SLOPES], c.bias = args[F_BIAS], c.sink = args[F_SINK];
    c.k_scale = args[F_K_SCALE], c.v_scale = args[F_V_SCALE];
    c.q_offsets = (const int32_t *)args[F_OFFSETS].data;
    c.kv_start = (const int32_t *)args[F_START].data;
    c.kv_length = (const int32_t *)args[F_LENGTH].data;
    c.pages = (const int32_t *)args[F_PAGES].data;
    c.sequences = args[F_START].shape[0];
    c.page_columns = c.pages ? args[F_PAGES].shape[1] : 0;
    c.params = p;
    attention_view a = {};
    CUDA_TRY(attention_check_unread(&c, "attention_forward", err));
    bool plainly = p->implementation == ATTENTION_MATERIALISED;
    if (!plainly && attention_hopper_takes_forward(ctx, args, p))
        return attention_hopper_forward(ctx, args, p, err);
    CUDA_TRY(view_make(&c, &args[F_STEP], "attention_forward", &a, err));
    attention_cut cut = cut_make(a, p, cuda_state_of(ctx)->processors);
    int64_t rules = rules_bytes(&c), space = cut_bytes(a, cut);
    char *scratch = NULL;
    if (plainly)
        space = attention_materialised_bytes(a, p, false);
    CUDA_TRY(cuda_scratch(ctx, "attention_forward", rules + space, &scratch, err));
    CUDA_TRY(rules_put(ctx, &c, scratch, &a, err));
    if (plainly)
        return attention_materialised(ctx, a, p, false, scratch + rules, err);
    cut.part = (float2 *)(scratch + rules);
    cut.part_o = (float *)(cut.part + cut.splits * c.heads * c.rows);
    CUDA_TRY(attention_mma_takes_forward(a) ? attention_mma_forward(ctx, a, cut, err)
                                            : attention_fma_forward(ctx, a, cut, err));
    if (cut.splits < 2)
        return TRIL_OK;
    return cuda_launch(ctx, "attention_forward", err, attention_combine_kernel,
                       dim3((unsigned)c.rows, (unsigned)c.heads), dim3(64), 0, a, cut);
}

/* ------------------------------------------------------------------ backward */

/* delta[h][n] = dO . O of a row: a warp each. */
__global__ void attention_delta_kernel(const __grid_constant__ attention_view a) {
    int64_t at = (int64_t)blockIdx.x * 8 + threadIdx.x / 32; /* n H + h: memory's order */
    int lane = threadIdx.x % 32;
    if (at >= (int64_t)a.rows * a.heads)
        return;
    int64_t n = at / a.heads, h = at % a.heads, o = n * a.o.row + h * a.o.head;
    int64_t dout = n * a.dout.row + h * a.dout.head;
    float sum = 0.0f;
    for (int t = lane; t < a.width; t += 32)
        sum += load_any(a.o.data, a.o.dtype, o + t) * load_any(a.dout.data, a.dout.dtype, dout + t);
    sum = warp_sum(sum);
    if (lane == 0)
        a.delta[h * a.rows + n] = sum;
}

/* dsink[h] = - sum over the sequences' rows of exp(sink - lse) delta: a block a head. */
__global__ void attention_dsink_kernel(const __grid_constant__ attention_view a) {
    __shared__ float space[32];
    int h = blockIdx.x;
    int64_t row = (int64_t)h * a.rows;
    float sum = 0.0f, s = a.sink[h];
    int end = a.sequences ? a.q_offsets[a.sequences] : 0;
    for (int n = a.q_offsets[0] + (int)threadIdx.x; n < end; n += 256)
        if (a.lse[row + n] != -INFINITY)
            sum += exp2f((s - a.lse[row + n]) * LOG2E) * a.delta[row + n];
    sum = block_sum(sum, space);
    if (threadIdx.x == 0)
        a.dsink[h] = -sum;
}

OP_FN(attention_backward) {
    const char *name = "attention_backward";
    const struct attention_params *p = (const struct attention_params *)params;
    struct attention_call c = {};
    c.q = args[B_Q], c.k = args[B_K], c.v = args[B_V], c.o = args[B_O], c.lse = args[B_LSE];
    c.slopes = args[B_SLOPES], c.bias = args[B_BIAS], c.sink = args[B_SINK];
    c.dbias = args[B_DBIAS], c.dsink = args[B_DSINK];
    c.q_offsets = (const int32_t *)args[B_OFFSETS].data;
    c.kv_start = (const int32_t *)args[B_START].data;
    c.kv_length = (const int32_t *)args[B_LENGTH].data;
    c.sequences = args[B_START].shape[0];
    c.params = p;
    attention_view a = {};
    CUDA_TRY(attention_check_unread(&c, name, err));
    bool plainly = p->implementation == ATTENTION_MATERIALISED;
    if (!plainly && attention_hopper_takes_backward(ctx, args, p))
        return attention_hopper_backward(ctx, args, p, err);
    CUDA_TRY(view_make(&c, &args[B_STEP], name, &a, err));
    a.dout = heads_of(args[B_DO]);
    a.dq = heads_of(args[B_DQ]);
    a.dk = heads_of(args[B_DK]);
    a.dv = heads_of(args[B_DV]);
    a.dsink = (float *)c.dsink.data;
    a.dbias = (float *)c.dbias.data;
    a.dbias_head = c.dbias.stride[0];
    a.dbias_row = c.dbias.stride[1];
    int64_t rules = rules_bytes(&c), deltas = (c.heads * c.rows * 4 + 255) / 256 * 256;
    int64_t space = plainly ? attention_materialised_bytes(a, p, true) : 0;
    char *scratch = NULL;
    CUDA_TRY(cuda_scratch(ctx, name, rules + deltas + space, &scratch, err));
    CUDA_TRY(rules_put(ctx, &c, scratch, &a, err));
    a.delta = (float *)(scratch + rules);
    CUDA_TRY(cuda_launch(ctx, name, err, attention_delta_kernel,
                         dim3(cuda_blocks(c.rows * c.heads, 8)), dim3(256), 0, a));
    CUDA_TRY(plainly ? attention_materialised(ctx, a, p, true, scratch + rules + deltas, err)
             : attention_mma_takes_backward(a) ? attention_mma_backward(ctx, a, err)
                                               : attention_fma_backward(ctx, a, err));
    if (a.dbias)
        CUDA_TRY(attention_fma_dbias(ctx, a, err));
    if (a.dsink)
        CUDA_TRY(cuda_launch(ctx, name, err, attention_dsink_kernel, dim3((unsigned)c.heads),
                             dim3(256), 0, a));
    return TRIL_OK;
}

/* ------------------------------------------------------------------ probabilities */

/* p[r][h][j]: a warp a key, 8 keys of one row and head a block at a time. */
__global__ void attention_probabilities_kernel(const __grid_constant__ attention_view a,
                                               const int32_t *rows, int64_t columns, float *p) {
    int64_t r = blockIdx.x;
    int h = blockIdx.y, kh = h / a.group, lane = threadIdx.x % 32, n = rows[r];
    int s = sequence_of(a, n);
    attention_tile t = {};
    if (s >= 0)
        tile_sequence(a, s, &t);
    float lse = a.lse[(int64_t)h * a.rows + n], slope = a.slopes ? a.slopes[h] : 0.0f;
    int i = n - t.begin, position = t.position + i;
    visible_words rule = visible_of(a.rules(), h);
    for (int64_t j = blockIdx.z * 8 + threadIdx.x / 32; j < columns; j += 8 * gridDim.z) {
        bool seen =
            j < t.length && lse != -INFINITY && visible_bits(rule, i, position, (int)j, 1) != 0;
        float x = 0.0f, unused;
        if (seen) {
            int64_t row = key_row(a, t, (int)j), q = n * a.q.row + h * a.q.head;
            int64_t k = row * a.k.row + kh * a.k.head;
            for (int e = lane; e < a.width; e += 32)
                x += load_any(a.q.data, a.q.dtype, q + e) * load_any(a.k.data, a.k.dtype, k + e);
            x = warp_sum(x);
            if (a.k_scale)
                x *= a.k_scale[row * a.kv_heads + kh];
            x = attention_score_of(a, x, h, i, position, (int)j, slope, &unused);
            x = exp2f((x - lse) * LOG2E);
        }
        if (lane == 0)
            p[(r * a.heads + h) * columns + j] = x;
    }
}

OP_FN(attention_probabilities) {
    const char *name = "attention_probabilities";
    struct attention_call c = {};
    c.q = c.o = args[P_Q], c.k = c.v = args[P_K], c.lse = args[P_LSE];
    c.slopes = args[P_SLOPES], c.bias = args[P_BIAS];
    c.k_scale = c.v_scale = args[P_K_SCALE];
    c.q_offsets = (const int32_t *)args[P_OFFSETS].data;
    c.kv_start = (const int32_t *)args[P_START].data;
    c.kv_length = (const int32_t *)args[P_LENGTH].data;
    c.pages = (const int32_t *)args[P_PAGES].data;
    c.sequences = args[P_START].shape[0];
    c.page_columns = c.pages ? args[P_PAGES].shape[1] : 0;
    c.params = (const struct attention_params *)params;
    attention_view a = {};
    CUDA_TRY(attention_check_unread(&c, name, err));
    struct tensor no_step = {};
    CUDA_TRY(view_make(&c, &no_step, name, &a, err));
    char *scratch = NULL;
    CUDA_TRY(cuda_scratch(ctx, name, rules_bytes(&c), &scratch, err));
    CUDA_TRY(rules_put(ctx, &c, scratch, &a, err));
    int64_t columns = args[P_P].shape[2], z = (columns + 63) / 64;
    return cuda_launch(
        ctx, name, err, attention_probabilities_kernel,
        dim3((unsigned)args[P_ROWS].shape[0], (unsigned)c.heads, (unsigned)(z < 1024 ? z : 1024)),
        dim3(256), 0, a, (const int32_t *)args[P_ROWS].data, columns, (float *)args[P_P].data);
}
