/* Timing the operations of the registry: arguments are made from each description, as the tests
 * make theirs, but at the sizes of a real step. See bench_ops.h. */
#include "lab/bench_ops.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/system.h"
#include "lab/bench.h"
#include "ops/describe.h"

/* Sizes by symbol, "N1024 D768"; an operation may stand here several times. */
static const struct shape {
    enum op_id id;
    const char *sizes;
} shapes[] = {
    {OP_EMBED_FORWARD, "N1024 D768 V50257 C1024"},
    {OP_EMBED_BACKWARD, "N1024 D768 V50257 C1024"},
    {OP_LAYERNORM_FORWARD, "N1024 D768"},
    {OP_LAYERNORM_BACKWARD, "N1024 D768"},
    {OP_RMSNORM_FORWARD, "N1024 D768"},
    {OP_RMSNORM_BACKWARD, "N1024 D768"},
    {OP_LINEAR_FORWARD, "N1024 I768 O2304"},
    {OP_LINEAR_FORWARD, "N1024 I768 O768"},
    {OP_LINEAR_FORWARD, "N1024 I768 O3072"},
    {OP_LINEAR_FORWARD, "N1024 I3072 O768"},
    {OP_LINEAR_FORWARD, "N256 I768 O50257"},
    {OP_LINEAR_FORWARD, "N1 I768 O3072"},
    {OP_LINEAR_BACKWARD_INPUT, "N1024 I768 O2304"},
    {OP_LINEAR_BACKWARD_INPUT, "N1024 I768 O3072"},
    {OP_LINEAR_BACKWARD_INPUT, "N1024 I3072 O768"},
    {OP_LINEAR_BACKWARD_INPUT, "N256 I768 O50257"},
    {OP_LINEAR_BACKWARD_WEIGHT, "N1024 I768 O2304"},
    {OP_LINEAR_BACKWARD_WEIGHT, "N1024 I768 O3072"},
    {OP_LINEAR_BACKWARD_WEIGHT, "N1024 I3072 O768"},
    {OP_LINEAR_BACKWARD_WEIGHT, "N256 I768 O50257"},
    {OP_ROPE_FORWARD, "N1024 H12 d64 R32 C1024"},
    {OP_ROPE_BACKWARD, "N1024 H12 d64 R32 C1024"},
    {OP_ATTENTION_FORWARD, "N1024 M1024 H12 K12 d64 S1 P1"},
    {OP_ATTENTION_FORWARD, "N1024 M1024 H12 K12 d64 S4 P1"},
    {OP_ATTENTION_BACKWARD, "N1024 M1024 H12 K12 d64 S1 P1"},
    {OP_ATTENTION_BACKWARD, "N1024 M1024 H12 K12 d64 S4 P1"},
    {OP_LINEAR_ATTENTION_FORWARD, "N1024 H12 K12 d64 S1"},
    {OP_LINEAR_ATTENTION_BACKWARD, "N1024 H12 K12 d64 S1"},
    {OP_ACTIVATION_FORWARD, "N1024 F3072"},
    {OP_ACTIVATION_BACKWARD, "N1024 F3072"},
    {OP_GATED_FORWARD, "N1024 F2048"},
    {OP_GATED_BACKWARD, "N1024 F2048"},
    {OP_DROPOUT_FORWARD, "N1024 D768"},
    {OP_DROPOUT_BACKWARD, "N1024 D768"},
    {OP_CROSS_ENTROPY_FORWARD, "N256 V50257"},
    {OP_CROSS_ENTROPY_LOSS, "N1024"},
    {OP_CROSS_ENTROPY_BACKWARD, "N256 V50257"},
    {OP_CACHE_STORE, "N1024 K12 d64 M4096"},
    {OP_GATHER_ROWS, "N1024 D768 R256"},
    {OP_SCATTER_ROWS, "N1024 D768 R256"},
    {OP_CAST, "N8388608"},
    {OP_ACCUMULATE, "N8388608"},
    {OP_SUM_SQUARES, "N8388608"},
    {OP_CLIP_FACTOR, ""},
    {OP_ADAMW, "N8388608"},
};
enum { SHAPE_COUNT = sizeof shapes / sizeof *shapes, CALLS_MAX = 1000 };

/* The first test case with these activations and no special placement: it brings valid parameters.
 * False: the operation has none (fp32 only). */
static bool base_case(const struct op_info *info, enum dtype act, struct op_case *c) {
    for (int index = 0; info->test_case(index, c); index++)
        if (c->act == act && c->variant == 0 && c->strided == 0)
            return true;
    return false;
}

static void set_sizes(struct op_case *c, const char *sizes, char *label, size_t label_size) {
    memset(c->size, 0, sizeof c->size);
    memset(c->alias, 0, sizeof c->alias);
    size_t used = 0;
    label[0] = 0;
    while (*sizes) {
        unsigned char symbol = (unsigned char)*sizes;
        char *end;
        c->size[symbol & 127] = strtoll(sizes + 1, &end, 10);
        if (used < label_size)
            used += (size_t)snprintf(label + used, label_size - used, "%s%c=%lld", used ? " " : "",
                                     symbol, (long long)c->size[symbol & 127]);
        for (sizes = end; *sizes == ' '; sizes++)
            ;
    }
}

/* ------------------------------------------------------------------ arguments */

struct bench {
    struct op_context ctx;
    const struct op_info *info;
    struct op_case c;
    struct tensor host[OP_MAX_ARGS], args[OP_MAX_ARGS];
    struct weight weight;
    bool linear, prepared;
    double times[CALLS_MAX];
};

/* Values that keep every operation in its normal range; the same on every run. */
static void fill(const struct op_arg *a, const struct op_case *c, struct tensor *t) {
    int64_t limit = a->index_of ? c->size[(unsigned char)a->index_of[0] & 127] : 1;
    uint64_t state = 88172645463325252u;
    float *floats = t->data;
    for (int64_t e = 0; e < tensor_count(t); e++) {
        state ^= state << 13; /* xorshift64 (Marsaglia 2003) */
        state ^= state >> 7;
        state ^= state << 17;
        float value = (float)(state >> 40) * 0x1p-23f - 1.0f;
        switch (t->dtype) {
        case DT_F32:
            floats[e] = value;
            break;
        case DT_BF16:
            ((uint16_t *)t->data)[e] = f32_to_bf16(value);
            break;
        case DT_F16:
            ((uint16_t *)t->data)[e] = f32_to_f16(value);
            break;
        case DT_I32:
            ((int32_t *)t->data)[e] = (int32_t)(state % (uint64_t)(limit > 0 ? limit : 1));
            break;
        default:
            memset((char *)t->data + e * (int64_t)dtype_size(t->dtype), 0, dtype_size(t->dtype));
            break;
        }
    }
}

static tril_status make_arguments(struct bench *b, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct backend *backend = b->ctx.backend;
    struct random_key key = {.seed = 1, .op = RANDOM_TEST};
    for (int i = 0; i < b->info->arg_count; i++) {
        if (!op_case_present(b->info, i, &b->c))
            continue;
        struct tensor t = {.dtype = op_case_dtype(b->info, i, &b->c)};
        t.rank = op_case_shape(b->info, i, &b->c, t.shape);
        size_t bytes = dtype_size(t.dtype);
        for (int k = TENSOR_MAX_RANK - 1; k >= 0; k--) {
            t.stride[k] = k == TENSOR_MAX_RANK - 1 ? 1 : t.stride[k + 1] * t.shape[k + 1];
            bytes *= (size_t)t.shape[k];
        }
        TRY(mem_alloc(&t.data, bytes, "an argument of the benchmark", err));
        b->host[i] = t;
        fill(&b->info->args[i], &b->c, &b->host[i]);
    }
    if (b->info->test_fill)
        b->info->test_fill(&b->c, b->host, &key);
    for (int i = 0; i < b->info->arg_count; i++) {
        if (!b->host[i].data)
            continue;
        int64_t bytes = tensor_bytes(&b->host[i]);
        b->args[i] = b->host[i];
        b->args[i].data = NULL;
        TRY(backend->alloc(&b->args[i].data, bytes, false, "an argument of the benchmark", err));
        TRY(backend->upload(&b->ctx, b->args[i].data, b->host[i].data, bytes, err));
        if (!b->info->flops && !b->info->bytes) { /* counted from shapes alone: not needed again */
            mem_free(b->host[i].data);
            b->host[i].data = NULL;
        }
    }
done:
    return st;
}

static tril_status prepare_weight(struct bench *b, struct tril_error *err) {
    b->linear = b->info->id == OP_LINEAR_FORWARD || b->info->id == OP_LINEAR_BACKWARD_INPUT;
    if (!b->linear)
        return TRIL_OK;
    unsigned use = b->info->id == OP_LINEAR_FORWARD ? WEIGHT_FORWARD : WEIGHT_BACKWARD;
    for (int i = 0; i < b->info->arg_count; i++)
        if (strcmp(b->info->args[i].name, "w") == 0)
            b->weight.value = b->args[i];
    struct linear_params p = {.activation = ACT_NONE, .weight = &b->weight};
    memcpy(b->c.params, &p, sizeof p);
    tril_status st = b->ctx.backend->weight_prepare(&b->ctx, &b->weight, use, err);
    b->prepared = st == TRIL_OK;
    return st;
}

static void release(struct bench *b) {
    if (b->prepared)
        b->ctx.backend->weight_release(&b->weight);
    for (int i = 0; i < OP_MAX_ARGS; i++) {
        mem_free(b->host[i].data);
        if (b->args[i].data)
            b->ctx.backend->release(b->args[i].data);
    }
    op_context_free(&b->ctx);
}

/* ------------------------------------------------------------------ timing */

static tril_status time_calls(struct bench *b, double seconds, struct bench_op_result *r,
                              struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct backend *backend = b->ctx.backend;
    double begin = 0, now = 0;
    int n = -1; /* the first call is not counted: it may set things up */
    while (n < 3 || (now - begin < seconds && n < CALLS_MAX)) {
        double start = clock_seconds();
        TRY(op_call(&b->ctx, b->info->id, b->args, b->c.params, err));
        TRY(backend->synchronise(&b->ctx, err));
        now = clock_seconds();
        if (n >= 0)
            b->times[n] = now - start;
        else
            begin = now;
        n++;
    }
    r->calls = n;
    r->seconds = bench_median(b->times, n);
    r->best = b->times[0];
done:
    return st;
}

/* The arguments in host memory where counting needs their content (offsets), else their shapes. */
static const struct tensor *countable(const struct bench *b) {
    return b->info->flops || b->info->bytes ? b->host : b->args;
}

static tril_status bench_shape(struct bench *b, const struct backend *backend,
                               const struct shape *shape, enum dtype act, double seconds,
                               bench_op_fn *report, void *arg, struct tril_error *err) {
    tril_status st;
    char label[128];
    memset(b, 0, sizeof *b);
    b->info = op_info_get(shape->id);
    if (!base_case(b->info, act, &b->c))
        return TRIL_OK;
    set_sizes(&b->c, shape->sizes, label, sizeof label);
    TRY(op_context_init(&b->ctx, backend, err));
    TRY(make_arguments(b, err));
    TRY(prepare_weight(b, err));
    struct bench_op_result r = {.op = b->info->name,
                                .label = label,
                                .dtype = dtype_name(act),
                                .overridden = backend->table[shape->id] != b->info->reference};
    TRY(time_calls(b, seconds, &r, err));
    const struct tensor *args = countable(b);
    r.bytes = op_bytes(shape->id, args, b->c.params);
    r.flops = b->info->flops ? b->info->flops(args, b->c.params) : 0;
    report(arg, &r);
done:
    if (st != TRIL_OK)
        error_prefix(err, "%s", b->info->name);
    release(b);
    return st;
}

tril_status bench_ops(const struct backend *backend, const char *filter, double seconds,
                      bool references, bench_op_fn *report, void *arg, struct tril_error *err) {
    static const enum dtype acts[] = {DT_BF16, DT_F32};
    tril_status st;
    void *bench = NULL;
    TRY(mem_alloc(&bench, sizeof(struct bench), "the benchmark", err));
    for (int s = 0; s < SHAPE_COUNT; s++) {
        const struct op_info *info = op_info_get(shapes[s].id);
        bool reference = backend->table[shapes[s].id] == info->reference;
        if ((filter && !strstr(info->name, filter)) || (reference && !references))
            continue;
        for (int a = 0; a < 2; a++)
            TRY(bench_shape(bench, backend, &shapes[s], acts[a], seconds, report, arg, err));
    }
done:
    mem_free(bench);
    return st;
}
