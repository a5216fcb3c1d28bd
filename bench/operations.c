/* Speed of the CPU backend's operations, one by one, against the machine's memory bandwidth
 * (measured beside each, since neighbours come and go).
 *
 *   bench_operations [PART OF A NAME]...     the rows whose operation or case contains a part
 *
 * A row's GB/s counts what the operation must at least move (op_bytes); sizes are far beyond the
 * caches. TRIL_CPU chooses the level, OMP_NUM_THREADS the threads. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/system.h"
#include "base/threads.h"
#include "cpu/cpu.h"
#include "cpu/probe.h"
#include "ops/describe.h"

struct row {
    enum op_id id;
    const char *label;
    const char *sizes; /* "N=4096 D=768" */
    enum dtype act;
    unsigned wide; /* bit i: argument i is fp32 though act is bf16 */
    unsigned absent, strided;
    int variant;
    union {
        struct norm_params norm;
        struct rope_params rope;
        struct activation_params activation;
        struct dropout_params dropout;
        struct cross_entropy_params cross_entropy;
        struct accumulate_params accumulate;
        struct adamw_params adamw;
    } params;
};

#define NORM .params.norm = {.eps = 1e-5f}
#define ACT(a) .params.activation = {a}
#define DROP .params.dropout = {.p = 0.1f, .key = {.seed = 1, .op = RANDOM_DROPOUT_RESIDUAL_FFN}}
#define ADAMW .params.adamw = {0.9f, 0.95f, 1e-8f, 0.1f}

#define ROW(op, label_, sizes_, act_, ...)                                                         \
    { .id = OP_##op, .label = label_, .sizes = sizes_, .act = act_, __VA_ARGS__ }
static const struct row rows[] = {
    ROW(EMBED_FORWARD, "bf16 table", "N=65536 D=768 V=50257 C=1024", DT_BF16, ),
    ROW(EMBED_FORWARD, "fp32 table", "N=65536 D=768 V=50257 C=1024", DT_F32, ),
    ROW(EMBED_BACKWARD, "", "N=32768 D=768 V=50257 C=1024", DT_F32, ),
    ROW(LAYERNORM_FORWARD, "fp32 to bf16", "N=65536 D=768", DT_BF16, .wide = 1, NORM),
    ROW(LAYERNORM_FORWARD, "fp32", "N=65536 D=768", DT_F32, NORM),
    ROW(LAYERNORM_BACKWARD, "dy bf16, dx fp32", "N=65536 D=768", DT_BF16, .wide = 2 | 32, NORM),
    ROW(LAYERNORM_BACKWARD, "fp32", "N=65536 D=768", DT_F32, NORM),
    ROW(RMSNORM_FORWARD, "fp32 to bf16", "N=16384 D=4096", DT_BF16, .wide = 1, NORM),
    ROW(RMSNORM_FORWARD, "bf16, heads of 64, strided", "N=65536 H=12 D=64", DT_BF16, .variant = 1,
        .strided = 1 | 4, NORM),
    ROW(RMSNORM_BACKWARD, "dy bf16, dx fp32", "N=16384 D=4096", DT_BF16, .wide = 2 | 16, NORM),
    ROW(RMSNORM_BACKWARD, "bf16, heads of 64, strided", "N=65536 H=12 D=64", DT_BF16, .variant = 1,
        .strided = 1 | 2 | 16, NORM),
    ROW(ROPE_FORWARD, "bf16, halves", "N=65536 H=12 d=64 R=32 C=1024", DT_BF16, ),
    ROW(ROPE_FORWARD, "bf16, interleaved", "N=65536 H=12 d=64 R=32 C=1024", DT_BF16,
        .params.rope = {true}),
    ROW(ROPE_BACKWARD, "fp32, halves", "N=65536 H=12 d=64 R=32 C=1024", DT_F32, ),
    ROW(ACTIVATION_FORWARD, "GELU (tanh), bf16", "N=16384 F=3072", DT_BF16, ACT(ACT_GELU_TANH)),
    ROW(ACTIVATION_FORWARD, "GELU (tanh), fp32", "N=16384 F=3072", DT_F32, ACT(ACT_GELU_TANH)),
    ROW(ACTIVATION_FORWARD, "GELU (erf), bf16", "N=16384 F=3072", DT_BF16, ACT(ACT_GELU_ERF)),
    ROW(ACTIVATION_FORWARD, "SiLU, bf16", "N=16384 F=3072", DT_BF16, ACT(ACT_SILU)),
    ROW(ACTIVATION_FORWARD, "ReLU, bf16", "N=16384 F=3072", DT_BF16, ACT(ACT_RELU)),
    ROW(ACTIVATION_BACKWARD, "GELU (tanh), bf16", "N=16384 F=3072", DT_BF16, ACT(ACT_GELU_TANH)),
    ROW(ACTIVATION_BACKWARD, "GELU (tanh), fp32", "N=16384 F=3072", DT_F32, ACT(ACT_GELU_TANH)),
    ROW(ACTIVATION_BACKWARD, "GELU (erf), bf16", "N=16384 F=3072", DT_BF16, ACT(ACT_GELU_ERF)),
    ROW(GATED_FORWARD, "SiLU, bf16", "N=16384 F=2048", DT_BF16, ACT(ACT_SILU)),
    ROW(GATED_BACKWARD, "SiLU, bf16", "N=16384 F=2048", DT_BF16, ACT(ACT_SILU)),
    ROW(GATED_BACKWARD, "SiLU, fp32", "N=16384 F=2048", DT_F32, ACT(ACT_SILU)),
    ROW(DROPOUT_FORWARD, "bf16 onto fp32", "N=65536 D=768", DT_BF16, .wide = 8, .absent = 4, DROP),
    ROW(DROPOUT_FORWARD, "fp32", "N=65536 D=768", DT_F32, .absent = 4, DROP),
    ROW(DROPOUT_BACKWARD, "fp32 to bf16", "N=65536 D=768", DT_BF16, .wide = 1, .absent = 2, DROP),
    ROW(CROSS_ENTROPY_FORWARD, "bf16", "N=1024 V=50257", DT_BF16, ),
    ROW(CROSS_ENTROPY_FORWARD, "fp32", "N=1024 V=50257", DT_F32, ),
    ROW(CROSS_ENTROPY_BACKWARD, "bf16", "N=1024 V=50257", DT_BF16, .params.cross_entropy = {1}),
    ROW(CROSS_ENTROPY_BACKWARD, "fp32", "N=1024 V=50257", DT_F32, .params.cross_entropy = {1}),
    ROW(CROSS_ENTROPY_LOSS, "", "N=4096", DT_F32, ),
    ROW(CACHE_STORE, "fp32 to bf16", "N=65536 K=12 d=64 M=65536", DT_BF16, .wide = 1),
    ROW(CACHE_STORE, "bf16", "N=65536 K=12 d=64 M=65536", DT_BF16, ),
    ROW(GATHER_ROWS, "fp32", "N=65536 D=768 R=65536", DT_F32, ),
    ROW(SCATTER_ROWS, "fp32", "N=65536 D=768 R=65536", DT_F32, ),
    ROW(CAST, "fp32 to bf16", "N=100000000", DT_BF16, .wide = 1),
    ROW(CAST, "bf16 to fp32", "N=100000000", DT_BF16, .wide = 2),
    ROW(CAST, "fp32 to fp32", "N=100000000", DT_F32, ),
    ROW(ACCUMULATE, "bf16", "N=100000000", DT_BF16, .wide = 2, .params.accumulate = {0.5f}),
    ROW(ACCUMULATE, "fp32", "N=100000000", DT_F32, .params.accumulate = {0.5f}),
    ROW(SUM_SQUARES, "", "N=100000000", DT_F32, ),
    ROW(ADAMW, "no copy", "N=40000000", DT_F32, .absent = 16, ADAMW),
    ROW(ADAMW, "bf16 copy", "N=40000000", DT_BF16, ADAMW),
};

static void stop(const char *why) {
    fprintf(stderr, "bench_operations: %s\n", why);
    exit(1);
}

static void case_of(const struct row *r, const struct op_info *info, struct op_case *c) {
    *c = (struct op_case){.label = r->label,
                          .absent = r->absent,
                          .strided = r->strided,
                          .variant = r->variant,
                          .act = r->act};
    for (const char *at = r->sizes; at; at = strchr(at, ' ') ? strchr(at, ' ') + 1 : NULL)
        c->size[(int)at[0]] = atoll(at + 2);
    for (int i = 0; i < info->arg_count; i++)
        if (r->wide >> i & 1)
            c->dtype[i] = DT_F32 + 1;
    memcpy(c->params, &r->params, sizeof r->params);
}

static void fill(struct tensor *t, const struct op_arg *a, const struct op_case *c, int64_t count) {
    uint64_t state = 88172645463325252u;
    int64_t limit = a->index_of ? c->size[(int)a->index_of[0]] : 1;
    for (int64_t i = 0; i < count; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        float f = (float)(int32_t)(state >> 32) * 0x1p-30f; /* [-2, 2) */
        switch (t->dtype) {
        case DT_F32:
            ((float *)t->data)[i] = f;
            break;
        case DT_BF16:
            ((uint16_t *)t->data)[i] = f32_to_bf16(f);
            break;
        case DT_F16:
            ((uint16_t *)t->data)[i] = f32_to_f16(f);
            break;
        case DT_F64:
            ((double *)t->data)[i] = f;
            break;
        case DT_I32:
            ((int32_t *)t->data)[i] = (int32_t)((state >> 32) % (uint64_t)limit);
            break;
        default:
            ((int64_t *)t->data)[i] = 0;
        }
    }
}

/* Arguments as the description says; strided ones have room for two more tensors in every row, as
 * q, k and v side by side. */
static void make_args(const struct op_info *info, const struct op_case *c, struct tensor *args) {
    struct random_key key = {.seed = 1, .op = RANDOM_TEST};
    for (int i = 0; i < info->arg_count; i++) {
        struct tensor *t = &args[i];
        *t = (struct tensor){0};
        if (!op_case_present(info, i, c))
            continue;
        t->dtype = op_case_dtype(info, i, c);
        t->rank = op_case_shape(info, i, c, t->shape);
        int64_t count = 1;
        for (int k = t->rank - 1; k >= 0; k--) {
            t->stride[k] = count;
            count *= t->shape[k];
            if (k == 1 && (c->strided >> i & 1))
                count *= 3;
        }
        if (mem_alloc(&t->data, (size_t)count * dtype_size(t->dtype), "an argument", NULL))
            stop("not enough memory");
        fill(t, &info->args[i], c, count);
    }
    if (info->test_fill)
        info->test_fill(c, args, &key);
}

static void measure(const struct row *r, struct op_context *ctx, double bandwidth_before) {
    const struct op_info *info = op_info_get(r->id);
    struct op_case c;
    struct tensor args[OP_MAX_ARGS];
    case_of(r, info, &c);
    make_args(info, &c, args);
    double best = 1e30, begun = clock_seconds(), now = begun;
    int runs = 0;
    for (; runs < 3 || (now - begun < 1.0 && runs < 50); runs++) {
        struct tril_error err;
        double start = now;
        if (op_call(ctx, r->id, args, c.params, &err) != TRIL_OK)
            stop(err.message);
        now = clock_seconds();
        best = now - start < best ? now - start : best;
    }
    double rate = op_bytes(r->id, args, c.params) / best, after = cpu_probe_bandwidth(0);
    double bandwidth = after > bandwidth_before ? after : bandwidth_before;
    printf("%-24s %-28s %-30s %9.3f ms %7.2f GB/s %5.0f%% of %.1f\n", info->name, r->label,
           r->sizes, best * 1e3, rate / 1e9, 100 * rate / bandwidth, bandwidth / 1e9);
    fflush(stdout);
    for (int i = 0; i < info->arg_count; i++)
        mem_free(args[i].data);
}

int main(int argc, char **argv) {
    struct op_context ctx;
    if (op_context_init(&ctx, backend_cpu(), NULL) != TRIL_OK)
        stop("no backend");
    printf("%s, %s, %d threads\n", cpu_model_name(), cpu_level_name(cpu_level_active()),
           threads_count());
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        bool wanted = argc < 2;
        for (int k = 1; k < argc; k++)
            wanted |= strstr(op_info_get(rows[i].id)->name, argv[k]) != NULL ||
                      strstr(rows[i].label, argv[k]) != NULL;
        if (wanted)
            measure(&rows[i], &ctx, cpu_probe_bandwidth(0));
    }
    op_context_free(&ctx);
    return 0;
}
