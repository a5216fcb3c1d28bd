/* Drawing tokens from logits (contract: ops/sample.h), a thread for a row.
 *
 * Passes over a row: the greatest logit; the weights, as whole multiples of 2^-30, and with filters
 * a histogram of the tokens' distances from the greatest; the tokens of the bins in which the
 * filters' threshold can lie, which alone are sorted; what is kept, in sums of BLOCK tokens. The
 * draw then looks for its block, and within it. Sums are of integers, so exact. */
#include <stdlib.h>

#include "cpu/kernels/softmax.h"
#include "ops/sample.h"

enum {
    BINS_PER_UNIT = 64,        /* bins of distance max y - y over the temperature */
    BINS = 22 * BINS_PER_UNIT, /* from 22 on weights are less than 2^-31: the last bin is never
                                  looked at */
    BLOCK = 4096
};
#define WEIGHT_ONE 0x1p30f

struct row {
    int64_t V;
    const float *y; /* penalised */
    float greatest, scale;
    int32_t top_k;
    float top_p, min_p;
    int32_t *weight; /* [room], V in whole vectors; at last of what is kept alone */
    uint64_t *found; /* [V] order numbers */
    uint64_t *sums;  /* [room / BLOCK + 1] */
    uint32_t *count; /* [BINS] */
    uint64_t *mass;  /* [BINS] */
    bool cut;        /* whether anything is to be cut off at ... */
    uint64_t last;   /* ... this order number, the last that is kept */
};

/* Greater logits first, then lower ids, as ascending integers. */
static inline uint64_t order_number(float y, int64_t id) {
    uint32_t u;
    y += 0.0f; /* -0 is 0 */
    memcpy(&u, &y, sizeof u);
    u = u & 0x80000000u ? u : ~u & 0x7fffffffu;
    return (uint64_t)u << 32 | (uint64_t)id;
}
static inline float order_logit(uint64_t number) {
    uint32_t u = (uint32_t)(number >> 32);
    float y;
    u = u & 0x80000000u ? u : ~u & 0x7fffffffu;
    memcpy(&y, &u, sizeof y);
    return y;
}
static int ascending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* ------------------------------------------------------------------ passes */

/* NaN if there is one, else the greatest. */
SIMD float greatest_of(const float *x, int64_t n) {
    vf m[4];
    vi bad = vi_set(0);
    int64_t i = 0;
    for (int k = 0; k < 4; k++)
        m[k] = vf_set(-INFINITY);
    for (; i + 4 * VF_WIDTH <= n; i += 4 * VF_WIDTH) {
        for (int k = 0; k < 4; k++) {
            vf v = vf_load(x + i + k * VF_WIDTH);
            bad |= vf_is_nan(v);
            m[k] = vf_max(v, m[k]);
        }
    }
    VF_FOR(j, i, n, {
        vf v = vf_load_n(x + j, lanes);
        if (lanes < VF_WIDTH)
            v = vf_select(vi_first(lanes), v, vf_set(-INFINITY));
        bad |= vf_is_nan(v);
        m[0] = vf_max(v, m[0]);
    });
    for (int k = 0; k < VF_WIDTH; k++)
        if (bad[k])
            return NAN;
    return vf_max_lanes(vf_max(vf_max(m[0], m[1]), vf_max(m[2], m[3])));
}

/* Where the greatest, `value`, comes first. */
static int64_t find(const float *x, int64_t n, float value) {
    enum { STEP = 512 };
    int64_t i = 0;
    while (i + STEP < n && greatest_of(x + i, STEP) != value)
        i += STEP;
    while (x[i] != value)
        i++;
    return i;
}

static double log_sum_exp(const float *x, int64_t n, float greatest) {
    double total = 0;
    for (int64_t at = 0; at < n; at += BLOCK)
        total += (double)exp_sum(x, DT_F32, at, at + BLOCK < n ? BLOCK : n - at, greatest);
    return (double)greatest + log(total);
}

/* Distance from the greatest, in units of the temperature. */
SIMD vf distance(const struct row *r, vf y) {
    return (vf_set(r->greatest) - y) * vf_set(r->scale);
}
SIMD vi bin_of(vf z) {
    return vi_from_vf(vf_min(z * vf_set(BINS_PER_UNIT), vf_set(BINS - 1)));
}

SIMD void weigh(const struct row *r, bool histogram) {
    VF_FOR(i, 0, r->V, {
        vf z = distance(r, vf_load_n(r->y + i, lanes));
        vi w = vi_from_vf(vf_exp(-z) * vf_set(WEIGHT_ONE) + vf_set(0.5f));
        if (lanes < VF_WIDTH)
            w &= vi_first(lanes);
        *(vi_memory *)(r->weight + i) = (vi_memory)w;
        if (histogram) {
            vi b = bin_of(z);
            for (int k = 0; k < lanes; k++)
                if (b[k] < BINS - 1) {
                    r->count[b[k]]++;
                    r->mass[b[k]] += (uint64_t)w[k];
                }
        }
    });
}

/* Order numbers of the tokens in bins low .. high; returns how many. */
SIMD int64_t collect(const struct row *r, int low, int high) {
    int64_t n = 0;
    VF_FOR(i, 0, r->V, {
        vi b = bin_of(distance(r, vf_load_n(r->y + i, lanes)));
        vi hit = (b >= vi_set(low)) & (b <= vi_set(high));
        int any = 0;
        for (int k = 0; k < VF_WIDTH; k++)
            any |= hit[k];
        for (int k = 0; any && k < lanes; k++)
            if (hit[k])
                r->found[n++] = order_number(r->y[i + k], i + k);
    });
    return n;
}

/* Clears the weights of what is not kept; returns the sum of the others. */
SIMD uint64_t sum_kept(const struct row *r) {
    const vi least = vi_set((int32_t)(r->min_p * WEIGHT_ONE));
    const vf y_last = vf_set(r->cut ? order_logit(r->last) : -INFINITY);
    const vi id_last = vi_set((int32_t)(uint32_t)r->last);
    uint64_t total = 0;
    for (int64_t at = 0; at < r->V; at += BLOCK) {
        vi low = vi_set(0), high = vi_set(0);
        VF_FOR(i, at, at + BLOCK < r->V ? at + BLOCK : r->V, {
            vi w = (vi) * (const vi_memory *)(r->weight + i);
            vi kept = w >= least;
            if (r->cut) {
                vf y = vf_load_n(r->y + i, lanes);
                vi id = vi_iota() + vi_set((int32_t)i);
                kept &= vf_less(y_last, y) | ((y == y_last) & (id <= id_last));
            }
            w &= kept;
            *(vi_memory *)(r->weight + i) = (vi_memory)w;
            low += w & vi_set(0x7fff);
            high += w >> 15;
        });
        uint64_t sum = 0;
        for (int k = 0; k < VF_WIDTH; k++)
            sum += (uint64_t)low[k] + ((uint64_t)high[k] << 15);
        r->sums[at / BLOCK] = sum;
        total += sum;
    }
    return total;
}

/* ------------------------------------------------------------------ a row */

static inline uint64_t weight_of(const struct row *r, uint64_t number) {
    return (uint64_t)r->weight[(uint32_t)number];
}
/* What top_p of `total` comes to. */
static uint64_t part_of(float p, uint64_t total) {
    return p > 0 ? (uint64_t)ceil((double)p * (double)total) : 0;
}

/* Finds what top_k and top_p keep: sets cut and last. */
static void filter(struct row *r) {
    uint64_t count = 0, mass = 0, wanted = 0; /* count, mass: of the bins passed */
    bool by_count = r->top_k > 0, by_mass = r->top_p < 1;
    int high = 0, low;
    for (; high < BINS - 1; high++) { /* the bin of the top_k-th token */
        if (by_count && count + r->count[high] >= (uint64_t)r->top_k)
            break;
        count += r->count[high];
        mass += r->mass[high];
    }
    by_count &= high < BINS - 1; /* else all that weigh anything are fewer */
    r->cut = by_count || by_mass;
    if (!r->cut)
        return;
    low = high;
    if (by_mass) { /* the first bin in which top_p may be reached, of the least that is kept */
        wanted = part_of(r->top_p, mass);
        count = mass = 0;
        for (low = 0; low < high && mass + r->mass[low] < wanted; low++) {
            count += r->count[low];
            mass += r->mass[low];
        }
    }
    int64_t n = collect(r, low, by_count ? high : low), at = 0;
    qsort(r->found, (size_t)n, sizeof *r->found, ascending);
    if (by_count) {
        uint64_t total = mass;
        n = r->top_k - (int64_t)count;
        for (int64_t i = 0; i < n; i++)
            total += weight_of(r, r->found[i]);
        wanted = by_mass ? part_of(r->top_p, total) : total;
    }
    if (by_mass) {
        while (at < n - 1 && mass + weight_of(r, r->found[at]) < wanted)
            mass += weight_of(r, r->found[at++]);
        n = at + 1;
    }
    r->last = r->found[n - 1];
}

/* The token at which the sum of what is kept exceeds u / 2^32 of all of it. */
static int64_t draw(const struct row *r, uint64_t total, uint32_t u) {
    uint64_t target = (total >> 32) * u + ((total & 0xffffffffu) * u >> 32); /* < total */
    int64_t block = 0, i;
    while (target >= r->sums[block])
        target -= r->sums[block++];
    for (i = block * BLOCK; target >= (uint64_t)r->weight[i]; i++)
        target -= (uint64_t)r->weight[i];
    return i;
}

struct call {
    const struct tensor *args;
    bool greedy;
    int64_t V, room, worker_bytes;
    char *worker;
};

/* y = x but for the tokens seen. */
static void penalise(float *y, const float *x, int64_t V, const int32_t *words, float penalty) {
    memcpy(y, x, (size_t)V * sizeof *y);
    for (int64_t w = 0; w < (V + 31) / 32; w++)
        for (uint32_t bits = (uint32_t)words[w]; bits; bits &= bits - 1) {
            int64_t i = 32 * w + __builtin_ctz(bits);
            if (i < V)
                y[i] = x[i] > 0 ? x[i] / penalty : x[i] * penalty;
        }
}

static void row_begin(struct row *r, const struct call *c, int worker, float **copy) {
    char *at = c->worker + worker * c->worker_bytes;
    *r = (struct row){.V = c->V};
    r->found = (uint64_t *)(void *)at;
    r->sums = r->found + c->V;
    r->mass = r->sums + c->room / BLOCK + 1;
    r->count = (uint32_t *)(r->mass + BINS);
    r->weight = (int32_t *)(r->count + BINS);
    *copy = (float *)(r->weight + c->room);
}

static int64_t choose(struct row *r, const struct call *c, int64_t n) {
    const float *options = (const float *)c->args[SAMPLE_ARG_OPTIONS].data + n * SAMPLE_OPTIONS;
    const float temperature = options[SAMPLE_TEMPERATURE];
    if (c->greedy || !(temperature > 0))
        return find(r->y, r->V, r->greatest);
    r->scale = fminf(1 / temperature, 1e38f); /* times 0 it stays 0 */
    r->top_k = ((const int32_t *)c->args[SAMPLE_ARG_TOP_K].data)[n];
    r->top_k = r->top_k < r->V ? r->top_k : 0;
    r->top_p = options[SAMPLE_TOP_P];
    r->min_p = fminf(fmaxf(options[SAMPLE_MIN_P], 0), 1);
    bool filters = r->top_k > 0 || r->top_p < 1;
    if (filters) {
        memset(r->count, 0, BINS * sizeof *r->count);
        memset(r->mass, 0, BINS * sizeof *r->mass);
    }
    weigh(r, filters);
    if (filters)
        filter(r);
    struct random_key key = {.seed = (uint64_t)((const int64_t *)c->args[SAMPLE_ARG_SEED].data)[n],
                             .op = RANDOM_SAMPLE};
    uint64_t index = (uint64_t)((const int64_t *)c->args[SAMPLE_ARG_INDEX].data)[n];
    return draw(r, sum_kept(r), random_u32(&key, index));
}

static void sample_row(const struct call *c, int64_t n, int worker) {
    const struct tensor *a = c->args, *seen = &a[SAMPLE_ARG_SEEN];
    const float *x = (const float *)a[SAMPLE_ARG_LOGITS].data + n * c->V;
    const float penalty =
        ((const float *)a[SAMPLE_ARG_OPTIONS].data)[n * SAMPLE_OPTIONS + SAMPLE_PENALTY];
    int32_t *words = seen->data ? (int32_t *)seen->data + n * seen->shape[1] : NULL;
    float *copy, *log_probability = a[SAMPLE_ARG_LOG_PROBABILITY].data;
    int64_t token = 0;
    struct row r;
    row_begin(&r, c, worker, &copy);
    r.y = x;
    if (words && penalty != 1) {
        penalise(copy, x, c->V, words, penalty);
        r.y = copy;
    }
    r.greatest = greatest_of(r.y, c->V);
    const bool fine = isfinite(r.greatest);
    if (fine) {
        token = choose(&r, c, n);
        ((int64_t *)a[SAMPLE_ARG_INDEX].data)[n]++;
        if (words)
            sample_mark(words, token);
    }
    ((int32_t *)a[SAMPLE_ARG_TOKEN].data)[n] = (int32_t)token;
    ((int32_t *)a[SAMPLE_ARG_STATUS].data)[n] = !fine;
    if (log_probability) {
        float most = r.y == x ? r.greatest : greatest_of(x, c->V);
        log_probability[n] =
            fine ? (float)((double)x[token] - log_sum_exp(x, c->V, most)) : (float)NAN;
    }
}

static void sample_rows(void *arg, int64_t begin, int64_t end, int worker) {
    for (int64_t n = begin; n < end; n++)
        sample_row(arg, n, worker);
}

static tril_status sample_kernel(struct op_context *ctx, const struct tensor *args,
                                 const void *params, struct tril_error *err) {
    const int64_t N = args[SAMPLE_ARG_LOGITS].shape[0], V = args[SAMPLE_ARG_LOGITS].shape[1];
    struct call c = {
        .args = args, .greedy = ((const struct sample_params *)params)->greedy, .V = V};
    c.room = (V + VF_WIDTH - 1) / VF_WIDTH * VF_WIDTH;
    c.worker_bytes = (V + c.room / BLOCK + 1 + BINS) * 8 + (BINS + 2 * c.room) * 4;
    c.worker_bytes = (c.worker_bytes + 63) / 64 * 64;
    const int64_t workers = N > 1 ? threads_count() : 1;
    c.worker = op_scratch(ctx, workers * c.worker_bytes);
    if (!c.worker)
        return op_scratch_error(ctx, "sample", workers * c.worker_bytes, err);
    if (N == 1)
        sample_rows(&c, 0, 1, 0);
    else
        parallel_for(N, chunk_items(N, 8 * V), sample_rows, &c);
    return TRIL_OK;
}

void LEVEL(register_sample)(struct backend *b) {
    b->table[OP_SAMPLE] = sample_kernel;
}
