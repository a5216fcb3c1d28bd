/* Drawing tokens from logits (contract and meaning: ops/sample.h).
 *
 * Rows are cut into parts of 2048 tokens, a block each; the last block of a row to end does what
 * needs all of them:
 *
 *   maximum    greatest penalised logit and its lowest id, as one integer; with log_probability
 *              also the part's sum of exponentials
 *   histogram  (rows with top_k or top_p) counts and weights of the tokens by their distance from
 *              the greatest, in bins of 1/64 temperature; the last block finds the bins between
 *              which the filters' threshold lies
 *   draw       the weight of what is certainly kept in each part, and a list of the tokens of those
 *              bins; the last block finds the threshold among the list, adds what it keeps to the
 *              parts' weights, finds the draw's part and then its token
 *   greedy     takes the place of the last two where every temperature is 0
 *
 * Weights are whole multiples of 2^-30, so that sums of them are exact whatever the order in which
 * atomics come; a threshold is an order number (greater logits first, then lower ids), found digit
 * by digit. A list that is too long for its memory (several thousand nearly equal logits) is not
 * needed: the last block then reads the row again instead.
 *
 * Bytes: 4 V a kernel, from L2 (the head has just written the logits); 16 V / 2048 + 17 k of
 * scratch a row. At V = 128k a row's 63 blocks read 8 KB each: what counts are launches and the
 * dozen barriers of a last block, 2 to 4 us a kernel. */
#include "cuda/softmax.cuh"
#include "cuda/tile.cuh"

extern "C" {
#include "ops/sample.h"
}

static const int THREADS = 256;
static const int EACH = 8;                     /* tokens of a thread */
static const int PART_TOKENS = THREADS * EACH; /* of a block */
static const int BINS_PER_UNIT = 64;
static const int BINS =
    22 * BINS_PER_UNIT; /* from 22 on weights are 0: the last is never counted */
static const int LISTED = 4096;
static const int DIGITS = 256;
#define WEIGHT_ONE 0x1p30f

typedef unsigned long long wide; /* as atomics want it */

struct sample_part {
    wide best; /* float_order of the greatest y (NaN: all bits), then the id's complement */
    struct running all;
};
struct sample_state {
    unsigned counted, drawn; /* blocks that have ended */
    unsigned listed;
    int low, high;    /* the bins that are listed */
    int by_count;     /* top_k cuts something off */
    wide count, mass; /* of the bins below `low` */
    wide wanted;      /* of the mass, where top_k cuts nothing off */
};

struct sample_call {
    const float *logits, *options;
    const int32_t *top_k;
    const int64_t *seed;
    int64_t *index;
    int32_t *seen, *token, *status;
    float *log_probability;
    int64_t V, words;
    int parts; /* of a row */
    /* Scratch: */
    struct sample_part *part;   /* [N, parts] */
    wide *kept;                 /* [N, parts]: weights */
    wide *mass;                 /* [N, BINS] */
    unsigned *count;            /* [N, BINS] */
    wide *list;                 /* [N, LISTED]: order numbers */
    struct sample_state *state; /* [N] */
};

/* ------------------------------------------------------------------ a row, a token */

struct sample_row {
    int64_t n;
    const float *x;
    const int32_t *seen; /* NULL: none, or no penalty */
    float greatest, scale, top_p, penalty;
    int top_k; /* 0: all */
    unsigned least;
    bool greedy;
};
__device__ __forceinline__ struct sample_row row_of(const struct sample_call &c, int64_t n) {
    const float *o = c.options + n * SAMPLE_OPTIONS;
    const float temperature = o[SAMPLE_TEMPERATURE], min_p = o[SAMPLE_MIN_P];
    const int top_k = c.top_k[n];
    struct sample_row r;
    r.n = n;
    r.x = c.logits + n * c.V;
    r.penalty = o[SAMPLE_PENALTY];
    r.seen = c.seen && r.penalty != 1.0f ? c.seen + n * c.words : NULL;
    r.greatest = 0.0f;
    r.scale = fminf(1.0f / temperature, 1e38f); /* times 0 it stays 0 */
    r.top_p = o[SAMPLE_TOP_P];
    r.top_k = top_k > 0 && top_k < c.V ? top_k : 0;
    r.least = (unsigned)(fminf(fmaxf(min_p, 0.0f), 1.0f) * WEIGHT_ONE);
    r.greedy = !(temperature > 0.0f);
    return r;
}
__device__ __forceinline__ float penalised(const struct sample_row &r, float x, int64_t id) {
    if (!r.seen || !((unsigned)r.seen[id / 32] >> (id % 32) & 1u))
        return x;
    return x > 0.0f ? x / r.penalty : __fmul_rn(x, r.penalty); /* (never fused: y has one value) */
}
/* Greater logits first, then lower ids, ascending; the logit again. */
__device__ __forceinline__ wide order_number(float y, int64_t id) {
    return (wide)~float_order(y) << 32 | (wide)id;
}
__device__ __forceinline__ float order_logit(wide number) {
    unsigned u = ~(unsigned)(number >> 32);
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}
__device__ __forceinline__ float distance(const struct sample_row &r, float y) {
    return __fmul_rn(r.greatest - y, r.scale);
}
__device__ __forceinline__ int bin_of(const struct sample_row &r, float y) {
    return (int)fminf(distance(r, y) * BINS_PER_UNIT, (float)(BINS - 1));
}
__device__ __forceinline__ unsigned weight_of(const struct sample_row &r, float y) {
    return (unsigned)(__expf(-distance(r, y)) * WEIGHT_ONE + 0.5f);
}

/* The block's tokens: x of thread t's k-th one, id its place in the row (V or more: there is none).
 * `count` neighbours are read at once. */
template <int count>
__device__ __forceinline__ int64_t id_of(int64_t begin, int k) {
    return begin + k / count * (THREADS * count) + (int)threadIdx.x * count + k % count;
}
template <int count>
__device__ __forceinline__ void load_part(const float *row, int64_t begin, int64_t V,
                                          float (&x)[EACH]) {
#pragma unroll
    for (int k = 0; k < EACH; k += count) {
        const int64_t id = id_of<count>(begin, k);
        float v[count];
#pragma unroll
        for (int j = 0; j < count; j++)
            v[j] = -INFINITY;
        if (id < V)
            load_packed<float, count>(row + id, v);
#pragma unroll
        for (int j = 0; j < count; j++)
            x[k + j] = v[j];
    }
}

/* ------------------------------------------------------------------ a block together */

/* Whether this block is the last of its row's; if so, it sees what the others wrote. */
__device__ __forceinline__ bool last_of_row(unsigned *ended, int parts) {
    __shared__ unsigned before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        before = atomicAdd(ended, 1u);
    __syncthreads();
    const bool last = before == (unsigned)parts - 1;
    __threadfence();
    return last;
}

struct crossing {
    int64_t item; /* the first at which the sum so far reaches what is wanted */
    wide before;  /* the sum up to it */
    wide total;   /* of all */
};
/* wanted: 1 or more; where the sum of all is less, item is their number. Every thread calls it and
 * gets the result; get(i), the i-th of `items` numbers, may be asked twice. */
template <typename F>
__device__ struct crossing block_find(int64_t items, wide wanted, F get) {
    const int WARPS = THREADS / 32;
    __shared__ wide sums[WARPS], found[2];
    const int64_t each = (items + THREADS - 1) / THREADS, begin = threadIdx.x * each;
    const int64_t end = begin + each < items ? begin + each : items;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    wide own = 0, sum, before = 0, total = 0;
    for (int64_t i = begin; i < end; i++)
        own += get(i);
    sum = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const wide lower = __shfl_up_sync(0xffffffffu, sum, d);
        sum += lane >= d ? lower : 0;
    }
    __syncthreads(); /* what an earlier call left has been read */
    if (lane == 31)
        sums[warp] = sum;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        before += w < warp ? sums[w] : 0;
        total += sums[w];
    }
    before += sum - own;
    if (before < wanted && wanted <= before + own) {
        for (int64_t i = begin; i < end; i++) {
            const wide v = get(i);
            if (before + v >= wanted) {
                found[0] = (wide)i;
                found[1] = before;
                break;
            }
            before += v;
        }
    }
    __syncthreads();
    if (total < wanted)
        return {items, total, total};
    return {(int64_t)found[0], found[1], total};
}
template <typename F>
__device__ __forceinline__ wide block_total(int64_t items, F get) {
    return block_find(items, ~(wide)0, get).total;
}

/* The greatest of the block's numbers, for every thread. */
__device__ __forceinline__ wide block_greatest(wide x) {
    __shared__ wide space[THREADS / 32];
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        const wide other = __shfl_xor_sync(0xffffffffu, x, d);
        x = other > x ? other : x;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        space[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; w++)
        x = space[w] > x ? space[w] : x;
    return x;
}

/* The row's greatest logit by its parts; false where it is not finite. */
__device__ __forceinline__ bool greatest_of(const struct sample_call &c, struct sample_row &r,
                                            int64_t *id) {
    wide best = 0;
    for (int p = threadIdx.x; p < c.parts; p += THREADS) {
        const wide other = c.part[r.n * c.parts + p].best;
        best = other > best ? other : best;
    }
    best = block_greatest(best);
    const unsigned order = (unsigned)(best >> 32);
    r.greatest = order_logit((wide)~order << 32);
    *id = (int64_t)(~(unsigned)best);
    return order > float_order(-INFINITY) && order < float_order(INFINITY);
}

/* ------------------------------------------------------------------ the greatest */

template <int count, bool filters>
__global__ void __launch_bounds__(THREADS) sample_maximum_kernel(struct sample_call c) {
    __shared__ struct running space[THREADS / 32];
    const int64_t n = blockIdx.x / c.parts;
    const int p = (int)(blockIdx.x % c.parts);
    const struct sample_row r = row_of(c, n);
    if (filters) { /* what the next kernels count in */
        for (int b = p * THREADS + threadIdx.x; b < BINS; b += c.parts * THREADS) {
            c.count[n * BINS + b] = 0;
            c.mass[n * BINS + b] = 0;
        }
        if (p == 0 && threadIdx.x == 0)
            c.state[n].counted = c.state[n].drawn = c.state[n].listed = 0;
    }
    float x[EACH];
    wide best = 0;
    load_part<count>(r.x, (int64_t)p * PART_TOKENS, c.V, x);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        const int64_t id = id_of<count>((int64_t)p * PART_TOKENS, k);
        if (id >= c.V)
            continue;
        const float y = penalised(r, x[k], id);
        const wide order = y == y ? float_order(y) : 0xffffffffu;
        const wide own = order << 32 | (unsigned)~(unsigned)id;
        best = own > best ? own : best;
    }
    best = block_greatest(best);
    struct sample_part *out = &c.part[n * c.parts + p];
    if (threadIdx.x == 0)
        out->best = best;
    if (!c.log_probability)
        return;
    struct running all = {-INFINITY, 0.0f};
    all = warp_merge(include(all, x));
    if (threadIdx.x % 32 == 0)
        space[threadIdx.x / 32] = all;
    __syncthreads();
    if (threadIdx.x > 0)
        return;
    for (int w = 1; w < THREADS / 32; w++)
        all = merge(all, space[w]);
    out->all = all;
}

/* Row n has its token: thread 0 writes it. Warps 0 as a whole call it. */
__device__ __forceinline__ void finish(const struct sample_call &c, const struct sample_row &r,
                                       bool fine, int64_t token) {
    if (threadIdx.x >= 32)
        return;
    if (c.log_probability) {
        struct running all = {-INFINITY, 0.0f};
        for (int p = threadIdx.x; p < c.parts; p += 32)
            all = merge(all, c.part[r.n * c.parts + p].all);
        all = warp_merge(all);
        if (threadIdx.x == 0)
            c.log_probability[r.n] = fine ? (r.x[token] - all.m) - logf(all.s) : NAN;
    }
    if (threadIdx.x > 0)
        return;
    c.token[r.n] = fine ? (int32_t)token : 0;
    c.status[r.n] = !fine;
    if (!fine)
        return;
    c.index[r.n]++;
    if (c.seen) {
        int32_t *word = c.seen + r.n * c.words + token / 32;
        *word = (int32_t)((unsigned)*word | 1u << (token % 32));
    }
}

__global__ void __launch_bounds__(THREADS) sample_greedy_kernel(struct sample_call c) {
    struct sample_row r = row_of(c, blockIdx.x);
    int64_t id;
    const bool fine = greatest_of(c, r, &id);
    finish(c, r, fine, id);
}

/* ------------------------------------------------------------------ the histogram */

/* What top_p of `total` comes to: 1 at least. */
__device__ __forceinline__ wide part_of(float p, wide total) {
    const double part = ceil((double)p * (double)total);
    return part > 1.0 ? (wide)part : 1;
}

/* The bins between which the threshold lies, from the whole row's histogram. */
__device__ void find_bins(const struct sample_call &c, const struct sample_row &r) {
    const volatile unsigned *count = c.count + r.n * BINS;
    const volatile wide *mass = c.mass + r.n * BINS;
    auto count_of = [=](int64_t b) { return (wide)count[b]; };
    auto mass_of = [=](int64_t b) { return (wide)mass[b]; };
    struct sample_state s = {};
    int64_t high = BINS - 1;
    if (r.top_k) { /* the top_k-th token's bin; none: all that weigh anything are fewer */
        high = block_find(BINS - 1, (wide)r.top_k, count_of).item;
        s.by_count = high < BINS - 1;
    }
    int64_t low = high;
    if (r.top_p < 1.0f) { /* the first in which top_p may be reached, of the least that is kept */
        s.wanted = part_of(r.top_p, block_total(high, mass_of));
        low = block_find(high, s.wanted, mass_of).item;
        if (!s.by_count)
            high = low;
    }
    s.count = block_total(low, count_of);
    s.mass = block_total(low, mass_of);
    s.low = (int)low;
    s.high = (int)high;
    if (threadIdx.x > 0)
        return;
    struct sample_state *out = &c.state[r.n];
    out->low = s.low;
    out->high = s.high;
    out->by_count = s.by_count;
    out->count = s.count;
    out->mass = s.mass;
    out->wanted = s.wanted;
}

template <int count>
__global__ void __launch_bounds__(THREADS) sample_histogram_kernel(struct sample_call c) {
    /* A block's weights in a bin are less than 2^42: two sums of 32 bits. */
    __shared__ unsigned counts[BINS], lower[BINS], upper[BINS];
    const int64_t n = blockIdx.x / c.parts, begin = blockIdx.x % c.parts * (int64_t)PART_TOKENS;
    struct sample_row r = row_of(c, n);
    int64_t id;
    if (r.greedy || (!r.top_k && !(r.top_p < 1.0f)) || !greatest_of(c, r, &id))
        return; /* the same for all blocks of the row */
    for (int b = threadIdx.x; b < BINS; b += THREADS)
        counts[b] = lower[b] = upper[b] = 0;
    __syncthreads();
    float x[EACH];
    load_part<count>(r.x, begin, c.V, x);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        id = id_of<count>(begin, k);
        if (id >= c.V)
            continue;
        const float y = penalised(r, x[k], id);
        const int b = bin_of(r, y);
        if (b == BINS - 1)
            continue;
        const unsigned w = weight_of(r, y);
        atomicAdd(&counts[b], 1u);
        atomicAdd(&lower[b], w & 0x7fffu);
        atomicAdd(&upper[b], w >> 15);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += THREADS)
        if (counts[b]) {
            atomicAdd(&c.count[n * BINS + b], counts[b]);
            atomicAdd(&c.mass[n * BINS + b], ((wide)upper[b] << 15) + lower[b]);
        }
    if (last_of_row(&c.state[n].counted, c.parts))
        find_bins(c, r);
}

/* ------------------------------------------------------------------ the draw */

/* What may or may not be kept: f(order number) by all threads together. */
struct candidates {
    const struct sample_call &c;
    const struct sample_row &r;
    int low, high;
    unsigned listed;
    template <typename F>
    __device__ void each(F f) const {
        if (listed <= (unsigned)LISTED) {
            const volatile wide *list = c.list + r.n * LISTED;
            for (unsigned i = threadIdx.x; i < listed; i += THREADS)
                f((wide)list[i]);
            return;
        }
        for (int64_t id = threadIdx.x; id < c.V; id += THREADS) {
            const float y = penalised(r, r.x[id], id);
            const int b = bin_of(r, y);
            if (b >= low && b <= high)
                f(order_number(y, id));
        }
    }
    __device__ __forceinline__ wide weight(wide number) const {
        return weight_of(r, order_logit(number));
    }
};

/* The candidate at which their number, or with `by_mass` their weight, in order reaches what is
 * wanted: digit by digit, a range of order numbers is narrowed to a single one. */
__device__ wide select(const struct candidates &all, bool by_mass, wide wanted) {
    __shared__ wide sum[DIGITS];
    wide first = ~(wide)0, last = 0;
    all.each([&](wide number) {
        first = number < first ? number : first;
        last = number > last ? number : last;
    });
    first = ~block_greatest(~first);
    last = block_greatest(last);
    while (first < last) {
        const int bits = 64 - __clzll((long long)(last - first)), shift = bits > 8 ? bits - 8 : 0;
        for (int d = threadIdx.x; d < DIGITS; d += THREADS)
            sum[d] = 0;
        __syncthreads();
        all.each([&](wide number) {
            if (number >= first && number <= last)
                atomicAdd(&sum[(number - first) >> shift], by_mass ? all.weight(number) : 1);
        });
        __syncthreads();
        const struct crossing at = block_find(DIGITS, wanted, [&](int64_t d) { return sum[d]; });
        if (at.item == DIGITS) /* (it has less than that: rounding never lets it) */
            break;
        wanted -= at.before;
        first += (wide)at.item << shift;
        const wide end = first + (((wide)1 << shift) - 1);
        last = end < last ? end : last;
    }
    return last;
}

/* The weight of the candidates up to `last`. */
__device__ wide mass_up_to(const struct candidates &all, wide last) {
    wide own = 0;
    all.each([&](wide number) { own += number <= last ? all.weight(number) : 0; });
    return block_total(THREADS, [=](int64_t) { return own; });
}

/* The last order number that top_k and top_p keep; adds the candidates that are kept to the parts'
 * weights. */
__device__ wide cut(const struct sample_call &c, const struct sample_row &r) {
    const struct sample_state s = c.state[r.n];
    const volatile unsigned *listed = &c.state[r.n].listed; /* (other blocks counted) */
    const struct candidates all = {c, r, s.low, s.high, *listed};
    wide last = ~(wide)0, wanted = s.wanted;
    if (s.by_count)
        last = select(all, false, (wide)r.top_k - s.count);
    if (r.top_p < 1.0f) {
        if (s.by_count)
            wanted = part_of(r.top_p, s.mass + mass_up_to(all, last));
        last = select(all, true, wanted - s.mass);
    }
    all.each([&](wide number) {
        const wide w = all.weight(number);
        if (number <= last && w >= r.least)
            atomicAdd(&c.kept[r.n * c.parts + (unsigned)number / PART_TOKENS], w);
    });
    __threadfence();
    __syncthreads();
    return last;
}

/* The token at which the sum of the kept weights exceeds u of all of it. */
__device__ int64_t draw(const struct sample_call &c, const struct sample_row &r, wide last) {
    __shared__ unsigned weights[PART_TOKENS];
    const volatile wide *kept = c.kept + r.n * c.parts;
    auto kept_of = [=](int64_t p) { return (wide)kept[p]; };
    const struct random_key key = {(uint64_t)c.seed[r.n], 0, 0, RANDOM_SAMPLE};
    const uint64_t index = (uint64_t)c.index[r.n];
    uint32_t random[4];
    philox_block(key, index / 4, random);
    const wide u = random[index % 4], total = block_total(c.parts, kept_of);
    const wide target = (total >> 32) * u + ((total & 0xffffffffu) * u >> 32); /* < total */
    const struct crossing part = block_find(c.parts, target + 1, kept_of);
    const int64_t begin = part.item * PART_TOKENS;
    for (int i = threadIdx.x; i < PART_TOKENS; i += THREADS) {
        const int64_t id = begin + i;
        unsigned w = 0;
        if (id < c.V) {
            const float y = penalised(r, r.x[id], id);
            w = order_number(y, id) <= last ? weight_of(r, y) : 0;
        }
        weights[i] = w >= r.least ? w : 0;
    }
    __syncthreads();
    return begin + block_find(PART_TOKENS, target + 1 - part.before, [&](int64_t i) {
                       return (wide)weights[i];
                   }).item;
}

template <int count>
__global__ void __launch_bounds__(THREADS, 2) sample_draw_kernel(struct sample_call c) {
    const int64_t n = blockIdx.x / c.parts;
    const int p = (int)(blockIdx.x % c.parts);
    struct sample_row r = row_of(c, n);
    int64_t id;
    const bool fine = greatest_of(c, r, &id);
    if (!fine || r.greedy) {
        if (p == 0)
            finish(c, r, fine, id);
        return;
    }
    const bool filters = r.top_k || r.top_p < 1.0f;
    const int low = filters ? c.state[n].low : BINS, high = filters ? c.state[n].high : BINS;
    float x[EACH];
    wide own = 0;
    load_part<count>(r.x, (int64_t)p * PART_TOKENS, c.V, x);
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        id = id_of<count>((int64_t)p * PART_TOKENS, k);
        if (id >= c.V)
            continue;
        const float y = penalised(r, x[k], id);
        const int b = bin_of(r, y);
        const unsigned w = weight_of(r, y);
        if (b < low)
            own += w >= r.least ? w : 0;
        else if (b <= high && b < BINS - 1) {
            const unsigned at = atomicAdd(&c.state[n].listed, 1u);
            if (at < (unsigned)LISTED)
                c.list[n * LISTED + at] = order_number(y, id);
        }
    }
    own = block_total(THREADS, [=](int64_t) { return own; });
    if (threadIdx.x == 0)
        c.kept[n * c.parts + p] = own;
    if (!last_of_row(&c.state[n].drawn, c.parts))
        return;
    const bool cuts = filters && low < BINS - 1;
    const wide last = cuts ? cut(c, r) : ~(wide)0;
    finish(c, r, true, draw(c, r, last));
}

/* ------------------------------------------------------------------ the operation */

template <int count>
static tril_status sample_run(struct op_context *ctx, const struct sample_call &c, int64_t N,
                              bool greedy, struct tril_error *err) {
    static const char name[] = "sample";
    const dim3 grid((unsigned)(N * c.parts)), block(THREADS);
    if (greedy) {
        CUDA_TRY(
            cuda_launch(ctx, name, err, sample_maximum_kernel<count, false>, grid, block, 0, c));
        return cuda_launch(ctx, name, err, sample_greedy_kernel, dim3((unsigned)N), block, 0, c);
    }
    CUDA_TRY(cuda_launch(ctx, name, err, sample_maximum_kernel<count, true>, grid, block, 0, c));
    CUDA_TRY(cuda_launch(ctx, name, err, sample_histogram_kernel<count>, grid, block, 0, c));
    return cuda_launch(ctx, name, err, sample_draw_kernel<count>, grid, block, 0, c);
}

OP_FN(sample) {
    const struct tensor *seen = &args[SAMPLE_ARG_SEEN];
    const bool greedy = ((const struct sample_params *)params)->greedy;
    const int64_t N = args[SAMPLE_ARG_LOGITS].shape[0], V = args[SAMPLE_ARG_LOGITS].shape[1];
    struct sample_call c = {};
    c.logits = (const float *)args[SAMPLE_ARG_LOGITS].data;
    c.options = (const float *)args[SAMPLE_ARG_OPTIONS].data;
    c.top_k = (const int32_t *)args[SAMPLE_ARG_TOP_K].data;
    c.seed = (const int64_t *)args[SAMPLE_ARG_SEED].data;
    c.index = (int64_t *)args[SAMPLE_ARG_INDEX].data;
    c.seen = (int32_t *)seen->data;
    c.token = (int32_t *)args[SAMPLE_ARG_TOKEN].data;
    c.status = (int32_t *)args[SAMPLE_ARG_STATUS].data;
    c.log_probability = (float *)args[SAMPLE_ARG_LOG_PROBABILITY].data;
    c.V = V;
    c.words = seen->data ? seen->shape[1] : 0;
    c.parts = (int)cuda_blocks(V, PART_TOKENS);
    if (N * c.parts >= (int64_t)1 << 31)
        return error_set(err, TRIL_ERR_ARGUMENT, "sample: %lld rows of %lld logits are too many",
                         (long long)N, (long long)V);
    const int64_t parts = N * c.parts;
    int64_t bytes = parts * (int64_t)(sizeof *c.part + sizeof *c.kept);
    if (!greedy)
        bytes += N * (int64_t)(BINS * (sizeof *c.mass + sizeof *c.count) + LISTED * sizeof *c.list +
                               sizeof *c.state);
    char *memory;
    CUDA_TRY(cuda_scratch(ctx, "sample", bytes, &memory, err));
    c.part = (struct sample_part *)memory;
    c.kept = (wide *)(c.part + parts);
    c.mass = c.kept + parts;
    c.list = c.mass + N * BINS;
    c.state = (struct sample_state *)(c.list + N * LISTED);
    c.count = (unsigned *)(c.state + N);
    return rows_packable(args[SAMPLE_ARG_LOGITS], 4) ? sample_run<4>(ctx, c, N, greedy, err)
                                                     : sample_run<1>(ctx, c, N, greedy, err);
}
