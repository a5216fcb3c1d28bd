/* tril/bench.h: attention by itself, through the public calls; and one token against a cache,
 * through the operation, because only that knows of pages and of 8-bit keys. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/attention.h"
#include "api/device.h"
#include "api/source.h"
#include "base/memory.h"
#include "base/system.h"
#include "base/threads.h"
#include "cpu/cpu.h"
#include "cpu/probe.h"
#include "lab/bench.h"
#include "ops/attention.h"
#include "tril/bench.h"

#define COLD_BYTES 1e9 /* of caches that take turns */
#define MOST_BLOCKS 12 /* allocations of a run */

struct memory {
    void *block[MOST_BLOCKS];
    int count;
};

static tril_status take(struct memory *m, void **out, double count, int64_t size, const char *what,
                        struct tril_error *err) {
    if (count * (double)size > 1e15)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s would take %g bytes: beyond what can be timed",
                         what, count * (double)size);
    tril_status st = mem_alloc(out, (size_t)count * (size_t)size, what, err);
    if (st == TRIL_OK)
        m->block[m->count++] = *out;
    return st;
}

static void memory_free(struct memory *m) {
    for (int i = 0; i < m->count; i++)
        mem_free(m->block[i]);
}

/* ------------------------------------------------------------------ random tensors */

struct filling {
    void *data;
    enum dtype dtype;
    int64_t n;
    uint64_t seed;
};

/* A megabyte of different numbers, again and again, keeps anything from being special. */
enum { PIECE = 4096, PIECES = 64 };

static void fill_piece(void *arg, int64_t begin, int64_t end, int worker) {
    const struct filling *f = arg;
    struct random_key key = {.seed = f->seed, .op = RANDOM_TEST};
    int64_t size = (int64_t)dtype_size(f->dtype);
    float piece[PIECE];
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        int64_t first = i * PIECE, n = f->n - first < PIECE ? f->n - first : PIECE;
        random_normal_fill(&key, (uint64_t)first, n, piece);
        if (f->dtype == DT_I8)
            for (int64_t k = 0; k < n; k++)
                ((int8_t *)f->data)[first + k] = (int8_t)fmaxf(-127, fminf(127, piece[k] * 40));
        else
            dtype_convert((char *)f->data + first * size, f->dtype, piece, DT_F32, (size_t)n);
    }
}

static void copy_piece(void *arg, int64_t begin, int64_t end, int worker) {
    const struct filling *f = arg;
    int64_t size = (int64_t)dtype_size(f->dtype);
    (void)worker;
    for (int64_t i = begin + PIECES; i < end + PIECES; i++) {
        int64_t first = i * PIECE, n = f->n - first < PIECE ? f->n - first : PIECE;
        memcpy((char *)f->data + first * size, (char *)f->data + i % PIECES * PIECE * size,
               (size_t)(n * size));
    }
}

static void fill(void *data, enum dtype dtype, int64_t n, uint64_t seed) {
    struct filling f = {data, dtype, n, seed};
    int64_t pieces = (n + PIECE - 1) / PIECE;
    parallel_for(pieces < PIECES ? pieces : PIECES, 1, fill_piece, &f);
    parallel_for(pieces - PIECES, 16, copy_piece, &f);
}

/* ------------------------------------------------------------------ whole sequences */

static double count_pairs(const struct tril_attention *a, struct tril_error *err) {
    struct visible_set rules = {0};
    struct attention_params params = {0};
    int32_t offsets[2] = {0, (int32_t)a->queries}, start = 0, length = (int32_t)a->keys;
    bool given;
    double pairs = -1;
    if (attention_rules(a, &rules, &given, &params.causal, err) == TRIL_OK) {
        if (given) {
            params.rules = rules.rules;
            params.rule_count = rules.rule_count;
            params.head_rule = rules.head_rule;
        }
        struct attention_call c = {.q_offsets = offsets,
                                   .kv_start = &start,
                                   .kv_length = &length,
                                   .sequences = 1,
                                   .rows = a->queries,
                                   .keys = a->keys,
                                   .heads = a->heads,
                                   .kv_heads = a->kv_heads,
                                   .width = a->width,
                                   .longest_q = a->queries,
                                   .longest_kv = a->keys,
                                   .params = &params};
        pairs = attention_pairs(&c) * (double)a->batch;
    }
    visible_set_free(&rules);
    return pairs;
}

static tril_status describe(const struct tril_bench_attention_options *o, struct tril_attention *a,
                            struct tril_error *err) {
    enum dtype t = DT_F32;
    if (o->dtype && (!dtype_parse(o->dtype, &t) || (t != DT_F32 && t != DT_BF16 && t != DT_F16)))
        return error_set(err, TRIL_ERR_ARGUMENT, "the dtype is fp32, bf16 or fp16, not '%.40s'",
                         o->dtype);
    *a = tril_attention_defaults(o->batch, o->heads, o->seq, o->head_dim);
    a->kv_heads = o->kv_heads > 0 ? o->kv_heads : o->heads;
    a->keys = o->keys > 0 ? o->keys : o->seq;
    a->dtype = t == DT_F32 ? TRIL_FP32 : t == DT_BF16 ? TRIL_BF16 : TRIL_FP16;
    a->visible = o->visible;
    a->softcap = o->softcap;
    a->dropout = o->dropout;
    a->tile_q = o->block_q;
    a->tile_k = o->block_k;
    a->seed = 1;
    tril_status st = attention_implementation_parse(o->implementation, &a->implementation, err);
    return st == TRIL_OK ? attention_check(a, err) : st;
}

static tril_status time_direction(const struct tril_attention *a,
                                  const struct tril_attention_buffers *b, bool backward,
                                  int64_t steps, void *scratch, size_t bytes, double *ms,
                                  double *fastest, struct tril_error *err) {
    double *seconds = malloc((size_t)steps * sizeof *seconds);
    tril_status st =
        seconds ? TRIL_OK : error_set(err, TRIL_ERR_MEMORY, "not enough memory for the times");
    for (int64_t i = -1; i < steps && st == TRIL_OK; i++) { /* -1 warms up */
        double begun = clock_seconds();
        st = (backward ? tril_attention_backward : tril_attention_forward)(a, b, scratch, bytes,
                                                                           err);
        if (i >= 0)
            seconds[i] = clock_seconds() - begun;
    }
    if (st == TRIL_OK) {
        *ms = bench_median(seconds, steps) * 1e3;
        *fastest = seconds[0] * 1e3;
    }
    free(seconds);
    return st;
}

static tril_status bench_sequences(const struct tril_bench_attention_options *o,
                                   struct tril_bench_attention_result *r, struct tril_error *err) {
    struct tril_attention a;
    struct tril_attention_buffers b = {0};
    struct memory m = {0};
    size_t forward = 0, backward = 0;
    void *scratch, *p[8] = {0};
    tril_status st = TRIL_OK;
    TRY(describe(o, &a, err));
    bool linear = a.implementation == TRIL_ATTENTION_LINEAR;
    double d = (double)a.width, of_q = (double)(a.batch * a.heads * a.queries) * d;
    double of_k = (double)(a.batch * a.kv_heads * a.keys) * d;
    enum dtype t = attention_dtype(a.dtype);
    int64_t size = (int64_t)dtype_size(t);
    const char *const what[] = {"q", "k", "v", "o", "the gradient of o", "dq", "dk", "dv"};
    const double count[] = {of_q, of_k, of_k, of_q, of_q, of_q, of_k, of_k};
    for (int i = 0; i < (o->forward_only ? 4 : 8); i++) {
        TRY(take(&m, &p[i], count[i], size, what[i], err));
        fill(p[i], t, (int64_t)count[i], (uint64_t)i + 1);
    }
    b = (struct tril_attention_buffers){.q = p[0],
                                        .k = p[1],
                                        .v = p[2],
                                        .o = p[3],
                                        .dout = p[4],
                                        .dq = p[5],
                                        .dk = p[6],
                                        .dv = p[7]};
    if (!linear)
        TRY(take(&m, (void **)&b.lse, of_q / d, 4, "lse", err));
    if (o->alibi) {
        float *slopes;
        TRY(take(&m, (void **)&slopes, (double)a.heads, 4, "the slopes", err));
        tril_attention_alibi(a.heads, slopes);
        b.slopes = slopes;
    }
    TRY(attention_measure(&a, &forward, o->forward_only ? NULL : &backward, &r->block_q,
                          &r->block_k, err));
    size_t most = forward > backward ? forward : backward;
    TRY(take(&m, &scratch, (double)most, 1, "scratch", err));
    r->forward_extra_bytes = (double)forward;
    r->backward_extra_bytes = (double)backward;
    r->extra_bytes = (double)most;
    double pairs = linear ? 0 : count_pairs(&a, err);
    if (pairs < 0) {
        st = err ? err->code : TRIL_ERR_ARGUMENT;
        goto done;
    }
    r->pairs = pairs;
    double rows = (double)(a.batch * a.queries), H = (double)a.heads, K = (double)a.kv_heads;
    double flops = linear ? 2 * d * d * rows * (H + K) : 4 * d * pairs;
    TRY(time_direction(&a, &b, false, o->steps, scratch, most, &r->forward_ms, &r->forward_ms_min,
                       err));
    r->forward_flops_per_s = flops / (r->forward_ms * 1e-3);
    r->bytes_moved = (2 * of_q + 2 * of_k) * (double)size + (linear ? 0 : of_q / d * 4);
    if (!o->forward_only) {
        flops = linear ? 2 * d * d * rows * (2 * H + 3 * K) : 10 * d * pairs;
        TRY(time_direction(&a, &b, true, o->steps, scratch, most, &r->backward_ms,
                           &r->backward_ms_min, err));
        r->backward_flops_per_s = flops / (r->backward_ms * 1e-3);
        r->backward_bytes_moved =
            (4 * of_q + 4 * of_k) * (double)size + (linear ? 0 : of_q / d * 4);
    }
done:
    memory_free(&m);
    return st;
}

/* ------------------------------------------------------------------ one token and a cache */

/* The page tables of every cache: its own pages, in an order that no prefetcher guesses. */
static void shuffle_pages(int32_t *pages, int64_t sequences, int64_t columns) {
    struct random_key key = {.seed = 3, .op = RANDOM_TEST};
    for (int64_t s = 0; s < sequences; s++) {
        int32_t *row = pages + s * columns;
        for (int64_t i = 0; i < columns; i++)
            row[i] = (int32_t)(s * columns + i);
        for (int64_t i = columns - 1; i > 0; i--) {
            int64_t k = (int64_t)random_below(&key, (uint64_t)(s * columns + i), (uint64_t)i + 1);
            int32_t other = row[k];
            row[k] = row[i];
            row[i] = other;
        }
    }
}

static tril_status bench_cache(const struct tril_bench_attention_options *o,
                               struct tril_bench_attention_result *r, struct tril_error *err) {
    enum { PASSES = 12 }; /* of reading memory, spread among the steps */
    double passes[PASSES];
    int64_t passed = 0;
    struct bandwidth_probe *probe = NULL;
    int64_t B = o->batch, H = o->heads, K = o->kv_heads > 0 ? o->kv_heads : H, d = o->head_dim;
    int64_t N = o->cache, page = o->page > 0 ? o->page : 1;
    struct op_context ctx = {0};
    struct memory m = {0};
    struct attention_inputs in = {0};
    struct visible_set rules = {0};
    double *seconds = NULL;
    int64_t hidden = 0;
    enum dtype act, kv;
    tril_status st = TRIL_OK;
    struct attention_params params = {.scale = 1 / sqrtf((float)d),
                                      .softcap = (float)o->softcap,
                                      .page_size = o->page > 0 ? (int32_t)page : 0,
                                      .max_q = 1,
                                      .max_kv = (int32_t)N,
                                      .block_q = (int32_t)o->block_q,
                                      .block_k = (int32_t)o->block_k};
    if (B < 1 || H < 1 || K < 1 || d < 1 || d > 256 || N < 1 || H % K != 0 || B > 65536 ||
        H > 65536 || N > 1 << 28 || page > 1 << 20)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "decoding takes 1 to 65536 sequences and heads (a multiple of the "
                         "key/value heads), widths to 256, --cache of 1 to 2^28 keys");
    if (!dtype_parse(o->dtype ? o->dtype : "bf16", &act) || (act != DT_F32 && act != DT_BF16))
        return error_set(err, TRIL_ERR_ARGUMENT, "decoding takes fp32 or bf16 queries");
    st = cache_dtype_parse(&kv, o->kv_dtype, act, err);
    if (st != TRIL_OK)
        return st;
    bool q8 = kv == DT_I8;
    if (o->implementation && strcmp(o->implementation, "flash") != 0 &&
        strcmp(o->implementation, "fused") != 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "decoding is timed for flash or fused, not %s",
                         o->implementation);
    if (o->implementation && strcmp(o->implementation, "fused") == 0)
        params.implementation = ATTENTION_FUSED;
    int64_t columns = (N + page - 1) / page, rows = columns * page; /* of a sequence's cache */
    int64_t size = (int64_t)dtype_size(kv);
    double one = 2.0 * (double)(B * rows) * (double)(K * d) * (double)size;
    int64_t caches = (int64_t)ceil(COLD_BYTES / one);
    caches = caches < 2 ? 2 : caches;
    int64_t M = caches * B * rows, S = caches * B;
    if ((double)caches * (double)B * (double)rows > 2e9 || one * (double)caches > 1e12)
        return error_set(err, TRIL_ERR_ARGUMENT, "--batch times --cache is too large to time");
    void *q, *k, *v, *out, *ks = NULL, *vs = NULL, *offsets, *start, *length, *pages = NULL;
    TRY(take(&m, &q, (double)(B * H * d), (int64_t)dtype_size(act), "q", err));
    TRY(take(&m, &out, (double)(B * H * d), (int64_t)dtype_size(act), "o", err));
    TRY(take(&m, &k, (double)M * (double)(K * d), size, "the keys", err));
    TRY(take(&m, &v, (double)M * (double)(K * d), size, "the values", err));
    TRY(take(&m, &offsets, (double)(B + 1), 4, "offsets", err));
    TRY(take(&m, &start, (double)S, 4, "starts", err));
    TRY(take(&m, &length, (double)B, 4, "lengths", err));
    fill(q, act, B * H * d, 1);
    fill(k, kv, M * K * d, 2);
    fill(v, kv, M * K * d, 3);
    if (q8) {
        TRY(take(&m, &ks, (double)M * (double)K, 4, "the keys' scales", err));
        TRY(take(&m, &vs, (double)M * (double)K, 4, "the values' scales", err));
        for (int64_t i = 0; i < M * K; i++)
            ((float *)ks)[i] = ((float *)vs)[i] = 1 / 40.0f;
        in.k_scale = tensor_2d(ks, DT_F32, M, K);
        in.v_scale = tensor_2d(vs, DT_F32, M, K);
    }
    if (o->page > 0) {
        TRY(take(&m, &pages, (double)(S * columns), 4, "the page tables", err));
        shuffle_pages(pages, S, columns);
    }
    for (int64_t i = 0; i <= B; i++)
        ((int32_t *)offsets)[i] = (int32_t)i;
    for (int64_t s = 0; s < S; s++)
        ((int32_t *)start)[s] = (int32_t)(s * rows);
    for (int64_t i = 0; i < B; i++)
        ((int32_t *)length)[i] = (int32_t)N;
    if (o->visible) {
        struct tril_attention a = tril_attention_defaults(1, H, 1, d);
        bool given;
        a.keys = N;
        a.visible = o->visible;
        TRY(attention_rules(&a, &rules, &given, &params.causal, err));
        params.rules = given ? rules.rules : NULL;
        params.rule_count = rules.rule_count;
        params.head_rule = given ? rules.head_rule : NULL;
        for (int64_t j = 0; given && j < N * H; j++)
            hidden += !visible(&rules.rules[rules.head_rule[j / N]], 0, N - 1, j % N);
    } else
        params.causal = true;
    double seen = (double)N - (double)hidden / (double)H; /* keys, of a head */
    in.q = tensor_3d(q, act, B, H, d);
    in.k = tensor_3d(k, kv, M, K, d);
    in.v = tensor_3d(v, kv, M, K, d);
    in.q_offsets = tensor_1d(offsets, DT_I32, B + 1);
    in.kv_length = tensor_1d(length, DT_I32, B);
    TRY(device_open(&ctx, "cpu", err));
    seconds = malloc((size_t)o->steps * sizeof *seconds);
    if (!seconds) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the times");
        goto done;
    }
    probe = bandwidth_probe_open();
    for (int64_t step = -caches; step < o->steps; step++) { /* once round to warm up */
        int64_t turn = (step + caches) % caches;
        if (probe && step >= 0 && step * PASSES / o->steps >= passed)
            passes[passed++] = bandwidth_probe_pass(probe);
        in.kv_start = tensor_1d((int32_t *)start + turn * B, DT_I32, B);
        if (pages)
            in.pages = tensor_2d((int32_t *)pages + turn * B * columns, DT_I32, B, columns);
        double begun = clock_seconds();
        TRY(attention_forward(&ctx, &in, tensor_3d(out, act, B, H, d), tensor_none(), &params,
                              err));
        if (step >= 0)
            seconds[step] = clock_seconds() - begun;
    }
    r->forward_ms = bench_median(seconds, o->steps) * 1e3;
    r->forward_ms_min = seconds[0] * 1e3;
    r->caches = caches;
    r->bandwidth = passed ? bench_median(passes, passed) : 0;
    r->extra_bytes = r->forward_extra_bytes = (double)ctx.scratch_bytes;
    r->block_q = ctx.block_rows;
    r->block_k = ctx.block_keys;
    r->pairs = (double)(B * H) * seen;
    r->forward_flops_per_s = 4 * (double)d * r->pairs / (r->forward_ms * 1e-3);
    r->bytes_moved = 2 * (double)(B * K) * seen * ((double)(d * size) + (q8 ? 4 : 0)) +
                     2 * (double)(B * H * d) * (double)dtype_size(act);
    r->bandwidth_fraction =
        r->bandwidth > 0 ? r->bytes_moved / (r->forward_ms * 1e-3) / r->bandwidth : 0;
done:
    bandwidth_probe_close(probe);
    free(seconds);
    visible_set_free(&rules);
    op_context_free(&ctx);
    memory_free(&m);
    return st;
}

/* ------------------------------------------------------------------ */

tril_status tril_bench_attention(const struct tril_bench_attention_options *options,
                                 struct tril_bench_attention_result *r, struct tril_error *err) {
    struct tril_bench_attention_options o = *options;
    enum dtype t = DT_F32;
    tril_status st = TRIL_OK;
    o.steps = o.steps > 0 ? o.steps : 5;
    *r = (struct tril_bench_attention_result){.isa = cpu_level_name(cpu_level_active()),
                                              .threads = threads_count()};
    if (o.steps > 1000000)
        return error_set(err, TRIL_ERR_ARGUMENT, "--steps is beyond what can be measured");
    if (o.dtype)
        dtype_parse(o.dtype, &t);
    r->peak_flops = cpu_probe_peak_flops(t, threads_count());
    TRY((o.decode ? bench_cache : bench_sequences)(&o, r, err));
    /* The machine may have been slowed by others at the first look. */
    double again = cpu_probe_peak_flops(t, threads_count());
    r->peak_flops = again > r->peak_flops ? again : r->peak_flops;
    r->peak_rss_bytes = (double)memory_peak_rss();
done:
    return st;
}
