/* tril/bench.h: attention of whole sequences, on the CPU through the public calls, on a device
 * through the operations, since those know tensors that are there already. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/attention.h"
#include "api/bench_attention.h"
#include "api/device.h"
#include "base/system.h"
#include "base/threads.h"
#include "lab/bench.h"
#include "ops/attention.h"

/* Tensors that take turns on a device: several times as many bytes as its caches hold. */
#define COLD_BYTES 256e6
enum { MOST_BUFFERS = 64 };

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
    tril_status st = device_dtype(&t, o->dtype, err);
    if (st != TRIL_OK)
        return st;
    *a = tril_attention_defaults(o->batch, o->heads, o->seq, o->head_dim);
    a->kv_heads = o->kv_heads > 0 ? o->kv_heads : o->heads;
    a->keys = o->keys > 0 ? o->keys : o->seq;
    a->dtype = t == DT_F32 ? TRIL_FP32 : t == DT_BF16 ? TRIL_BF16 : TRIL_FP16;
    a->visible = o->visible;
    a->softcap = o->softcap;
    a->dropout = o->dropout;
    a->tile_q = o->block_q;
    a->tile_k = o->block_k;
    a->device = o->device;
    a->seed = 1;
    st = attention_implementation_parse(o->implementation, &a->implementation, err);
    return st == TRIL_OK ? attention_check(a, err) : st;
}

/* Useful FLOPs; `pairs` of queries and the keys they see, 0 for linear attention. */
static double count_flops(const struct tril_attention *a, double pairs, bool backward) {
    double d = (double)a->width, rows = (double)(a->batch * a->queries);
    double H = (double)a->heads, K = (double)a->kv_heads;
    if (a->implementation == TRIL_ATTENTION_LINEAR)
        return 2 * d * d * rows * (backward ? 2 * H + 3 * K : H + K);
    return (backward ? 10 : 4) * d * pairs;
}

/* q, k, v, o, and as the backward wants them do, dq, dk, dv. */
enum { TENSORS = 8 };
static const char *const what[TENSORS] = {"q",  "k",  "v", "o", "the gradient of o",
                                          "dq", "dk", "dv"};
static double elements(const struct tril_attention *a, int tensor) {
    bool of_keys = tensor == 1 || tensor == 2 || tensor >= 6;
    return (double)(a->batch * a->width) *
           (double)(of_keys ? a->kv_heads * a->keys : a->heads * a->queries);
}

static tril_status time_direction(const struct bench_turns *t, const struct tril_attention *a,
                                  bool backward, struct tril_bench_attention_result *r,
                                  struct tril_error *err) {
    double *seconds = malloc((size_t)t->steps * sizeof *seconds), median;
    double of_q = elements(a, 0), of_k = elements(a, 1);
    double size = (double)dtype_size(attention_dtype(a->dtype));
    double lse = a->implementation == TRIL_ATTENTION_LINEAR ? 0 : of_q / (double)a->width * 4;
    tril_status st = TRIL_OK;
    if (!seconds)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the times");
    TRY(bench_turns_run(t, seconds, err));
    median = bench_median(seconds, t->steps);
    if (backward) {
        r->backward_ms = median * 1e3;
        r->backward_ms_min = seconds[0] * 1e3;
        r->backward_flops_per_s = count_flops(a, r->pairs, true) / median;
        r->backward_bytes_moved = 4 * (of_q + of_k) * size + lse;
    } else {
        r->forward_ms = median * 1e3;
        r->forward_ms_min = seconds[0] * 1e3;
        r->forward_flops_per_s = count_flops(a, r->pairs, false) / median;
        r->bytes_moved = 2 * (of_q + of_k) * size + lse;
    }
done:
    free(seconds);
    return st;
}

/* ------------------------------------------------------------------ on the CPU */

struct on_host {
    const struct tril_attention *a;
    const struct tril_attention_buffers *b;
    void *scratch;
    size_t bytes;
};

static tril_status host_forward(void *arg, int64_t turn, struct tril_error *err) {
    const struct on_host *x = arg;
    (void)turn;
    return tril_attention_forward(x->a, x->b, x->scratch, x->bytes, err);
}

static tril_status host_backward(void *arg, int64_t turn, struct tril_error *err) {
    const struct on_host *x = arg;
    (void)turn;
    return tril_attention_backward(x->a, x->b, x->scratch, x->bytes, err);
}

static tril_status bench_on_host(struct op_context *ctx,
                                 const struct tril_bench_attention_options *o,
                                 const struct tril_attention *a,
                                 struct tril_bench_attention_result *r, struct tril_error *err) {
    struct tril_attention_buffers b = {0};
    struct bench_memory m = {.backend = ctx->backend};
    struct on_host x = {.a = a, .b = &b};
    struct bench_turns turns = {
        .ctx = ctx, .call = host_forward, .arg = &x, .buffers = 1, .warm = 1, .steps = o->steps};
    size_t forward = 0, backward = 0;
    void *p[TENSORS] = {0};
    enum dtype t = attention_dtype(a->dtype);
    tril_status st = TRIL_OK;
    for (int i = 0; i < (o->forward_only ? 4 : TENSORS); i++) {
        double count = elements(a, i);
        TRY(bench_take(&m, &p[i], count, (int64_t)dtype_size(t), what[i], err));
        TRY(bench_fill(ctx, p[i], t, (int64_t)count, (uint64_t)i + 1, err));
    }
    b = (struct tril_attention_buffers){.q = p[0],
                                        .k = p[1],
                                        .v = p[2],
                                        .o = p[3],
                                        .dout = p[4],
                                        .dq = p[5],
                                        .dk = p[6],
                                        .dv = p[7]};
    if (a->implementation != TRIL_ATTENTION_LINEAR)
        TRY(bench_take(&m, (void **)&b.lse, elements(a, 0) / (double)a->width, 4, "lse", err));
    if (o->alibi) {
        float *slopes;
        TRY(bench_take(&m, (void **)&slopes, (double)a->heads, 4, "the slopes", err));
        tril_attention_alibi(a->heads, slopes);
        b.slopes = slopes;
    }
    TRY(attention_measure(a, &forward, o->forward_only ? NULL : &backward, &r->block_q, &r->block_k,
                          err));
    x.bytes = forward > backward ? forward : backward;
    TRY(bench_take(&m, &x.scratch, (double)x.bytes, 1, "scratch", err));
    r->forward_extra_bytes = (double)forward;
    r->backward_extra_bytes = (double)backward;
    TRY(time_direction(&turns, a, false, r, err));
    turns.call = host_backward;
    if (!o->forward_only)
        TRY(time_direction(&turns, a, true, r, err));
done:
    bench_memory_free(&m);
    return st;
}

/* ------------------------------------------------------------------ on a device */

/* The batch as sequences behind one another, [B T, H, d], in several buffers. */
struct on_device {
    struct op_context *ctx;
    const struct tril_attention *a;
    struct attention_params params;
    char *data[TENSORS];
    float *lse;
    struct tensor slopes, q_offsets, kv_start, kv_length;
};

static struct tensor device_tensor(const struct on_device *x, int i, int64_t turn) {
    const struct tril_attention *a = x->a;
    enum dtype t = attention_dtype(a->dtype);
    bool of_keys = i == 1 || i == 2 || i >= 6;
    int64_t bytes = (int64_t)elements(a, i) * (int64_t)dtype_size(t);
    return tensor_3d(x->data[i] ? x->data[i] + turn * bytes : NULL, t,
                     a->batch * (of_keys ? a->keys : a->queries), of_keys ? a->kv_heads : a->heads,
                     a->width);
}

static struct attention_inputs device_inputs(const struct on_device *x, int64_t turn,
                                             struct tensor *lse) {
    const struct tril_attention *a = x->a;
    int64_t rows = a->batch * a->queries;
    *lse =
        x->lse ? tensor_2d(x->lse + turn * a->heads * rows, DT_F32, a->heads, rows) : tensor_none();
    return (struct attention_inputs){.q = device_tensor(x, 0, turn),
                                     .k = device_tensor(x, 1, turn),
                                     .v = device_tensor(x, 2, turn),
                                     .q_offsets = x->q_offsets,
                                     .kv_start = x->kv_start,
                                     .kv_length = x->kv_length,
                                     .slopes = x->slopes};
}

static tril_status device_forward(void *arg, int64_t turn, struct tril_error *err) {
    const struct on_device *x = arg;
    struct tensor lse, o = device_tensor(x, 3, turn), none = tensor_none();
    struct attention_inputs in = device_inputs(x, turn, &lse);
    if (x->a->implementation == TRIL_ATTENTION_LINEAR)
        return linear_attention_forward(
            x->ctx, in.q, in.k, in.v, x->q_offsets, none, o, none,
            (struct linear_attention_params){.causal = x->params.causal}, err);
    return attention_forward(x->ctx, &in, o, lse, &x->params, err);
}

static tril_status device_backward(void *arg, int64_t turn, struct tril_error *err) {
    const struct on_device *x = arg;
    struct tensor lse, o = device_tensor(x, 3, turn), dout = device_tensor(x, 4, turn);
    struct tensor none = tensor_none();
    struct attention_inputs in = device_inputs(x, turn, &lse);
    struct attention_gradients g = {.dq = device_tensor(x, 5, turn),
                                    .dk = device_tensor(x, 6, turn),
                                    .dv = device_tensor(x, 7, turn)};
    if (x->a->implementation == TRIL_ATTENTION_LINEAR)
        return linear_attention_backward(
            x->ctx, in.q, in.k, in.v, x->q_offsets, none, o, dout, none, g.dq, g.dk, g.dv, none,
            (struct linear_attention_params){.causal = x->params.causal}, err);
    return attention_backward(x->ctx, &in, o, lse, dout, &g, &x->params, err);
}

/* Scratch that a call asks for, without running it. */
static double device_scratch(struct on_device *x,
                             tril_status (*call)(void *, int64_t, struct tril_error *)) {
    x->ctx->measuring = true;
    x->ctx->measured = 0;
    call(x, 0, NULL);
    x->ctx->measuring = false;
    return (double)x->ctx->measured;
}

static tril_status device_integers(struct on_device *x, struct bench_memory *m,
                                   struct tril_error *err) {
    const struct tril_attention *a = x->a;
    int32_t *host = malloc((size_t)(3 * a->batch + 1) * sizeof *host), *there;
    tril_status st = TRIL_OK;
    if (!host)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for lengths");
    for (int64_t b = 0; b <= a->batch; b++) {
        host[b] = (int32_t)(b * a->queries);
        if (b < a->batch) {
            host[a->batch + 1 + b] = (int32_t)(b * a->keys);
            host[2 * a->batch + 1 + b] = (int32_t)a->keys;
        }
    }
    TRY(bench_take(m, (void **)&there, (double)(3 * a->batch + 1), 4, "lengths", err));
    TRY(x->ctx->backend->upload(x->ctx, there, host, (3 * a->batch + 1) * 4, err));
    x->q_offsets = tensor_1d(there, DT_I32, a->batch + 1);
    x->kv_start = tensor_1d(there + a->batch + 1, DT_I32, a->batch);
    x->kv_length = tensor_1d(there + 2 * a->batch + 1, DT_I32, a->batch);
done:
    free(host);
    return st;
}

static tril_status device_slopes(struct on_device *x, struct bench_memory *m,
                                 struct tril_error *err) {
    const int64_t heads = x->a->heads;
    float *host = malloc((size_t)heads * sizeof *host), *there;
    tril_status st = TRIL_OK;
    if (!host)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the slopes");
    tril_attention_alibi(heads, host);
    TRY(bench_take(m, (void **)&there, (double)heads, 4, "the slopes", err));
    TRY(x->ctx->backend->upload(x->ctx, there, host, heads * 4, err));
    x->slopes = tensor_1d(there, DT_F32, heads);
done:
    free(host);
    return st;
}

static tril_status bench_on_device(struct op_context *ctx,
                                   const struct tril_bench_attention_options *o,
                                   const struct tril_attention *a,
                                   struct tril_bench_attention_result *r, struct tril_error *err) {
    struct bench_memory m = {.backend = ctx->backend};
    struct visible_set rules = {0};
    struct on_device x = {.ctx = ctx, .a = a};
    struct bench_turns turns = {
        .ctx = ctx, .call = device_forward, .arg = &x, .buffers = 1, .steps = o->steps};
    enum dtype t = attention_dtype(a->dtype);
    double size = (double)dtype_size(t), one = 0;
    int tensors = o->forward_only ? 4 : TENSORS;
    bool given;
    tril_status st = TRIL_OK;
    x.params = (struct attention_params){
        .scale = (float)a->scale,
        .softcap = (float)a->softcap,
        .max_q = (int32_t)a->queries,
        .max_kv = (int32_t)a->keys,
        .dropout = (float)a->dropout,
        .implementation = a->implementation == TRIL_ATTENTION_MATERIALISED ? ATTENTION_MATERIALISED
                                                                           : ATTENTION_FLASH,
        .key = {.seed = a->seed, .op = RANDOM_DROPOUT_ATTENTION}};
    TRY(attention_rules(a, &rules, &given, &x.params.causal, err));
    if (given) {
        x.params.rules = rules.rules;
        x.params.rule_count = rules.rule_count;
        x.params.head_rule = rules.head_rule;
    }
    for (int i = 0; i < tensors; i++)
        one += elements(a, i) * size;
    turns.buffers = (int64_t)fmin(fmax(1, ceil(COLD_BYTES / one)), MOST_BUFFERS);
    for (int i = 0; i < tensors; i++) {
        double count = elements(a, i) * (double)turns.buffers;
        TRY(bench_take(&m, (void **)&x.data[i], count, (int64_t)size, what[i], err));
        TRY(bench_fill(ctx, x.data[i], t, (int64_t)count, (uint64_t)i + 1, err));
    }
    if (a->implementation != TRIL_ATTENTION_LINEAR)
        TRY(bench_take(&m, (void **)&x.lse,
                       elements(a, 0) / (double)a->width * (double)turns.buffers, 4, "lse", err));
    TRY(device_integers(&x, &m, err));
    if (o->alibi)
        TRY(device_slopes(&x, &m, err));
    r->forward_extra_bytes = device_scratch(&x, device_forward);
    TRY(time_direction(&turns, a, false, r, err));
    turns.call = device_backward;
    if (!o->forward_only) {
        r->backward_extra_bytes = device_scratch(&x, device_backward);
        TRY(time_direction(&turns, a, true, r, err));
    }
done:
    bench_memory_free(&m);
    visible_set_free(&rules);
    return st;
}

/* ------------------------------------------------------------------ */

static tril_status bench_sequences(struct op_context *ctx,
                                   const struct tril_bench_attention_options *o,
                                   struct tril_bench_attention_result *r, struct tril_error *err) {
    struct tril_attention a;
    tril_status st = TRIL_OK;
    TRY(describe(o, &a, err));
    r->pairs = a.implementation == TRIL_ATTENTION_LINEAR ? 0 : count_pairs(&a, err);
    if (r->pairs < 0)
        return err ? err->code : TRIL_ERR_ARGUMENT;
    TRY((attention_on_device(&a) ? bench_on_device : bench_on_host)(ctx, o, &a, r, err));
    r->extra_bytes = fmax(r->forward_extra_bytes, r->backward_extra_bytes);
done:
    return st;
}

tril_status tril_bench_attention(const struct tril_bench_attention_options *options,
                                 struct tril_bench_attention_result *r, struct tril_error *err) {
    struct tril_bench_attention_options o = *options;
    struct tril_attention a = {.device = o.device};
    struct op_context ctx = {0};
    enum dtype t = DT_F32;
    tril_status st = TRIL_OK;
    o.steps = o.steps > 0 ? o.steps : 5;
    *r = (struct tril_bench_attention_result){.threads = threads_count()};
    if (o.steps > 1000000)
        return error_set(err, TRIL_ERR_ARGUMENT, "--steps is beyond what can be measured");
    TRY(attention_implementation_parse(o.implementation, &a.implementation, err));
    TRY(attention_check_device(&a, err));
    TRY(device_dtype(&t, o.dtype, err));
    TRY(device_open(&ctx, a.implementation == TRIL_ATTENTION_REFERENCE ? "cpu" : o.device, err));
    r->isa = device_name(&ctx);
    r->peak_flops = device_peak_flops(&ctx, t);
    TRY((o.decode ? bench_cache : bench_sequences)(&ctx, &o, r, err));
    /* The machine may have been slowed by others at the first look. */
    r->peak_flops = fmax(r->peak_flops, device_peak_flops(&ctx, t));
    r->peak_rss_bytes = (double)memory_peak_rss();
done:
    op_context_free(&ctx);
    return st;
}
