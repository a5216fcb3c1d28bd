/* tril/bench.h: one new token against a cache, through the operation, because only that knows of
 * pages and of 8-bit keys. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/attention.h"
#include "api/bench_attention.h"
#include "api/device.h"
#include "api/source.h"
#include "lab/bench.h"

#define COLD_BYTES 1e9 /* of caches that take turns */
enum {
    MOST_ON_DEVICE = 256, /* of them */
    PASSES = 12           /* of reading memory, spread among the steps */
};

struct decoding {
    struct op_context *ctx;
    struct attention_params params;
    struct attention_inputs in; /* of the first cache */
    struct tensor out;
    int32_t *start, *pages; /* of all caches, in the backend's memory */
    int64_t batch, columns, steps;
    struct device_reader *reader;
    double passes[PASSES];
    int64_t passed;
};

static struct attention_inputs inputs(const struct decoding *x, int64_t turn) {
    struct attention_inputs in = x->in;
    in.kv_start = tensor_1d(x->start + turn * x->batch, DT_I32, x->batch);
    if (x->pages)
        in.pages = tensor_2d(x->pages + turn * x->batch * x->columns, DT_I32, x->batch, x->columns);
    return in;
}

static tril_status decode(void *arg, int64_t turn, struct tril_error *err) {
    const struct decoding *x = arg;
    struct attention_inputs in = inputs(x, turn);
    return attention_forward(x->ctx, &in, x->out, tensor_none(), &x->params, err);
}

static void read_memory(void *arg, int64_t step) {
    struct decoding *x = arg;
    if (x->reader && step * PASSES / x->steps >= x->passed)
        x->passes[x->passed++] = device_reader_pass(x->reader);
}

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

/* Offsets, lengths, starts and pages of S = caches B sequences, N keys on `rows` rows each. */
static tril_status integers(struct decoding *x, struct bench_memory *m, int64_t S, int64_t N,
                            int64_t rows, bool paged, struct tril_error *err) {
    int64_t B = x->batch, tables = paged ? S * x->columns : 0, count = 2 * B + 1 + S + tables;
    int32_t *host = malloc((size_t)count * sizeof *host), *there;
    tril_status st = TRIL_OK;
    if (!host)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the page tables");
    for (int64_t i = 0; i <= B; i++)
        host[i] = (int32_t)i;
    for (int64_t i = 0; i < B; i++)
        host[B + 1 + i] = (int32_t)N;
    for (int64_t s = 0; s < S; s++)
        host[2 * B + 1 + s] = (int32_t)(s * rows);
    if (paged)
        shuffle_pages(host + 2 * B + 1 + S, S, x->columns);
    TRY(bench_take(m, (void **)&there, (double)count, 4, "the page tables", err));
    TRY(x->ctx->backend->upload(x->ctx, there, host, count * 4, err));
    x->in.q_offsets = tensor_1d(there, DT_I32, B + 1);
    x->in.kv_length = tensor_1d(there + B + 1, DT_I32, B);
    x->start = there + 2 * B + 1;
    x->pages = paged ? x->start + S : NULL;
done:
    free(host);
    return st;
}

/* The same scale for every row and head, as the integers' spread wants it. */
static tril_status scales(struct decoding *x, struct bench_memory *m, int64_t rows, int64_t heads,
                          struct tensor *out, struct tril_error *err) {
    enum { PIECE = 4096 };
    float piece[PIECE], *there;
    tril_status st = TRIL_OK;
    for (int64_t i = 0; i < PIECE; i++)
        piece[i] = 1 / 40.0f;
    TRY(bench_take(m, (void **)&there, (double)rows * (double)heads, 4, "the scales", err));
    for (int64_t at = 0, n = rows * heads; at < n; at += PIECE)
        TRY(x->ctx->backend->upload(x->ctx, there + at, piece,
                                    (n - at < PIECE ? n - at : PIECE) * 4, err));
    *out = tensor_2d(there, DT_F32, rows, heads);
done:
    return st;
}

tril_status bench_cache(struct op_context *ctx, const struct tril_bench_attention_options *o,
                        struct tril_bench_attention_result *r, struct tril_error *err) {
    int64_t B = o->batch, H = o->heads, K = o->kv_heads > 0 ? o->kv_heads : H, d = o->head_dim;
    int64_t N = o->cache, page = o->page > 0 ? o->page : 1;
    struct bench_memory m = {.backend = ctx->backend};
    struct visible_set rules = {0};
    double *seconds = NULL;
    int64_t hidden = 0, scratch;
    void *q, *k, *v, *out;
    enum dtype act, kv;
    tril_status st = TRIL_OK;
    struct decoding x = {.ctx = ctx,
                         .batch = B,
                         .steps = o->steps,
                         .params = {.scale = 1 / sqrtf((float)d),
                                    .softcap = (float)o->softcap,
                                    .causal = true,
                                    .page_size = o->page > 0 ? (int32_t)page : 0,
                                    .max_q = 1,
                                    .max_kv = (int32_t)N,
                                    .block_q = (int32_t)o->block_q,
                                    .block_k = (int32_t)o->block_k}};
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
        x.params.implementation = ATTENTION_FUSED;
    x.columns = (N + page - 1) / page;
    int64_t rows = x.columns * page; /* of a sequence's cache */
    int64_t size = (int64_t)dtype_size(kv);
    double one = 2.0 * (double)(B * rows) * (double)(K * d) * (double)size;
    int64_t caches = (int64_t)ceil(COLD_BYTES / one);
    caches = caches < 2 ? 2 : caches;
    if (ctx->backend->device && caches > MOST_ON_DEVICE)
        caches = MOST_ON_DEVICE;
    int64_t M = caches * B * rows;
    if ((double)caches * (double)B * (double)rows > 2e9 || one * (double)caches > 1e12)
        return error_set(err, TRIL_ERR_ARGUMENT, "--batch times --cache is too large to time");
    TRY(bench_take(&m, &q, (double)(B * H * d), (int64_t)dtype_size(act), "q", err));
    TRY(bench_take(&m, &out, (double)(B * H * d), (int64_t)dtype_size(act), "o", err));
    TRY(bench_take(&m, &k, (double)M * (double)(K * d), size, "the keys", err));
    TRY(bench_take(&m, &v, (double)M * (double)(K * d), size, "the values", err));
    TRY(bench_fill(ctx, q, act, B * H * d, 1, err));
    TRY(bench_fill(ctx, k, kv, M * K * d, 2, err));
    TRY(bench_fill(ctx, v, kv, M * K * d, 3, err));
    x.in.q = tensor_3d(q, act, B, H, d);
    x.in.k = tensor_3d(k, kv, M, K, d);
    x.in.v = tensor_3d(v, kv, M, K, d);
    x.out = tensor_3d(out, act, B, H, d);
    if (q8) {
        TRY(scales(&x, &m, M, K, &x.in.k_scale, err));
        TRY(scales(&x, &m, M, K, &x.in.v_scale, err));
    }
    TRY(integers(&x, &m, caches * B, N, rows, o->page > 0, err));
    if (o->visible) {
        struct tril_attention a = tril_attention_defaults(1, H, 1, d);
        bool given;
        a.keys = N;
        a.visible = o->visible;
        TRY(attention_rules(&a, &rules, &given, &x.params.causal, err));
        x.params.rules = given ? rules.rules : NULL;
        x.params.rule_count = rules.rule_count;
        x.params.head_rule = given ? rules.head_rule : NULL;
        for (int64_t j = 0; given && j < N * H; j++)
            hidden += !visible(&rules.rules[rules.head_rule[j / N]], 0, N - 1, j % N);
    }
    double seen = (double)N - (double)hidden / (double)H; /* keys, of a head */
    seconds = malloc((size_t)o->steps * sizeof *seconds);
    if (!seconds) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the times");
        goto done;
    }
    x.reader = device_reader_open(ctx);
    struct bench_turns turns = {.ctx = ctx,
                                .call = decode,
                                .arg = &x,
                                .buffers = caches,
                                .warm = caches, /* once round */
                                .steps = o->steps,
                                .between = read_memory};
    TRY(bench_turns_run(&turns, seconds, err));
    struct attention_inputs first = inputs(&x, 0);
    TRY(attention_scratch(ctx, &first, x.out, tensor_none(), tensor_none(), NULL, &x.params,
                          &scratch, err));
    r->forward_ms = bench_median(seconds, o->steps) * 1e3;
    r->forward_ms_min = seconds[0] * 1e3;
    r->caches = caches;
    r->bandwidth = x.passed ? bench_median(x.passes, x.passed) : 0;
    r->extra_bytes = r->forward_extra_bytes = (double)scratch;
    r->block_q = ctx->block_rows;
    r->block_k = ctx->block_keys;
    r->pairs = (double)(B * H) * seen;
    r->forward_flops_per_s = 4 * (double)d * r->pairs / (r->forward_ms * 1e-3);
    r->bytes_moved = 2 * (double)(B * K) * seen * ((double)(d * size) + (q8 ? 4 : 0)) +
                     2 * (double)(B * H * d) * (double)dtype_size(act);
    r->bandwidth_fraction =
        r->bandwidth > 0 ? r->bytes_moved / (r->forward_ms * 1e-3) / r->bandwidth : 0;
done:
    device_reader_close(x.reader);
    free(seconds);
    visible_set_free(&rules);
    bench_memory_free(&m);
    return st;
}
