// ctest: timeout=600
/* Offloading on the emulated GPU: what waits in the host's memory changes no bit of a loss, a norm
 * or a parameter, whether copies run as early or as late as they may; the GPU's memory falls as
 * predicted; and what a run takes is what was predicted, within 5%. */
#include "cuda/cuda.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "infer/session.h"
#include "model/models.h"
#include "train/optimiser.h"

extern void emulated_streams_early(bool yes); /* tests/cuda/emulation/runtime.cpp */

static struct tril_error err;

/* ------------------------------------------------------------------ the same bits */

/* Two layers stay, two travel. Few tokens and heads: emulated attention costs the same for a few
 * tokens as for 64, and each head and sequence anew. */
enum { LAYERS = 4, STEPS = 10, ACCUMULATED = 2, TOKENS = 9 };

struct run {
    double loss[STEPS], norm[STEPS];
    float *parameters;
    size_t bytes;
    int64_t peak, pinned;
};

struct mode {
    enum recompute recompute;
    bool moments, activations, early;
    int steps; /* 0: STEPS */
};

static void train(struct run *r, const struct model_config *c, enum dtype t, struct mode mode) {
    const struct backend *gpu = backend_cuda();
    const struct adamw_params params = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f};
    struct workspace_options o = {.max_tokens = TOKENS,
                                  .max_sequences = 1,
                                  .backward = true,
                                  .recompute = mode.recompute,
                                  .offload = mode.activations};
    struct backend_memory memory;
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct optimiser adamw;
    emulated_streams_early(mode.early);
    OK(op_context_init(&ctx, gpu, &err));
    gpu->memory_reset();
    OK(model_create(&m, c, &(struct model_options){.dtype = t, .training = true}, &ctx, &err));
    OK(model_init(m, 5, &err));
    OK(workspace_create(&w, m, &o, &err));
    OK((mode.moments ? optimiser_create_offloaded : optimiser_create)(&adamw, m, &params, 0.5f,
                                                                      &err));
    *r = (struct run){.bytes = 0};
    for (int step = 0; step < (mode.steps ? mode.steps : STEPS); step++) {
        double loss;
        int64_t count;
        bool applied;
        r->loss[step] = 0;
        for (int a = 0; a < ACCUMULATED; a++) {
            int32_t ids[TOKENS];
            const int32_t offsets[] = {0, TOKENS};
            struct batch b = {.tokens = TOKENS,
                              .sequences = 1,
                              .ids = ids,
                              .offsets = offsets,
                              .targets = tiny_targets};
            for (int i = 0; i < TOKENS; i++)
                ids[i] = (tiny_ids[i] + 3 * step + a) % (int32_t)c->vocab;
            struct train_call call = {.scale = 0.05f,
                                      .seed = 3,
                                      .step = (uint64_t)(step * ACCUMULATED + a),
                                      .overwrite = a == 0};
            OK(model_forward_backward(m, w, &b, &call, &loss, &count, &err));
            r->loss[step] += loss;
        }
        OK(optimiser_step(&adamw, step + 1, 1e-2, &r->norm[step], &applied, &err));
        assert_true(applied);
    }
    r->bytes = (size_t)m->table.elements * sizeof(float);
    r->parameters = test_malloc(r->bytes);
    OK(gpu->download(&ctx, r->parameters, m->master, (int64_t)r->bytes, &err));
    gpu->memory(&memory);
    r->peak = memory.device_peak;
    r->pinned = memory.host_peak;
    assert_int_equal(ctx.host_falls, 0); /* or nothing would have been recorded and replayed */
    optimiser_free(&adamw);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
    emulated_streams_early(false);
}

static void same(struct run *r, const struct run *plain, const char *what) {
    if (memcmp(r->loss, plain->loss, sizeof r->loss) != 0 ||
        memcmp(r->norm, plain->norm, sizeof r->norm) != 0 ||
        memcmp(r->parameters, plain->parameters, r->bytes) != 0)
        fail_msg("%s: other bits than without offloading", what);
    test_free(r->parameters);
}

static void compare(struct model_config c, enum dtype t) {
    struct run plain, r;
    char what[96];
    c.layers = LAYERS;
    c.dropout_embedding = c.dropout_attention = c.dropout_residual = 0.1f;
    train(&plain, &c, t, (struct mode){.recompute = RECOMPUTE_NONE});
    assert_true(plain.loss[0] != plain.loss[STEPS - 1]);
    for (int recompute = 0; recompute < 3; recompute++)
        for (int early = 0; early < 2; early++) {
            struct mode mode = {(enum recompute)recompute, early, true, early, 0};
            snprintf(what, sizeof what, "%s, recompute %d, %s, copies %s", dtype_name(t), recompute,
                     early ? "all" : "activations", early ? "early" : "late");
            train(&r, &c, t, mode);
            assert_true(r.peak < plain.peak && r.pinned > plain.pinned);
            same(&r, &plain, what);
        }
    train(&r, &c, t, (struct mode){.recompute = RECOMPUTE_NONE, .moments = true});
    same(&r, &plain, "the optimiser alone");
    test_free(plain.parameters);
}

static void test_gpt2(void **state) {
    (void)state;
    struct model_config c = tiny_gpt2();
    c.heads = c.kv_heads = 2;
    compare(c, DT_F32);
}
static void test_llama(void **state) {
    (void)state;
    struct model_config c = tiny_llama();
    c.heads = 2;
    c.kv_heads = 1;
    compare(c, DT_BF16);
}

/* Layers that recall keep more, and are never recorded. */
static void test_recalling(void **state) {
    (void)state;
    struct run plain, r;
    const char *name;
    struct model_config c = variant(VARIANTS - 1, &name); /* memory, then recurrence */
    c.layers = LAYERS;
    for (int l = 0; l < LAYERS; l++)
        c.layer_mixer[l] = c.layer_mixer[l % 2];
    train(&plain, &c, DT_F32, (struct mode){.recompute = RECOMPUTE_NONE, .steps = 2});
    for (int full = 0; full < 2; full++) {
        train(&r, &c, DT_F32,
              (struct mode){.recompute = full ? RECOMPUTE_FULL : RECOMPUTE_NONE,
                            .activations = true,
                            .early = full,
                            .steps = 2});
        same(&r, &plain, name);
    }
    test_free(plain.parameters);
}

/* Two layers and fewer: nothing leaves. */
static void test_few_layers(void **state) {
    (void)state;
    struct run plain, r;
    struct model_config c = tiny_model3();
    train(&plain, &c, DT_F32, (struct mode){.recompute = RECOMPUTE_FULL});
    train(&r, &c, DT_F32, (struct mode){.recompute = RECOMPUTE_FULL, .activations = true});
    assert_int_equal(r.peak, plain.peak);
    same(&r, &plain, "one layer");
    test_free(plain.parameters);
}

static void test_refused(void **state) {
    (void)state;
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct optimiser o;
    struct model_config c = tiny_gpt2();
    const struct adamw_params params = {.beta1 = 0.9f};
    const struct workspace_options wo = {
        .max_tokens = 20, .max_sequences = 4, .backward = true, .offload = true};
    OK(op_context_init(&ctx, backend_reference(), &err));
    OK(model_create(&m, &c, &(struct model_options){.dtype = DT_F32, .training = true}, &ctx,
                    &err));
    assert_int_equal(workspace_create(&w, m, &wo, &err), TRIL_ERR_UNSUPPORTED);
    assert_int_equal(optimiser_create_offloaded(&o, m, &params, 0, &err), TRIL_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "moments cannot be offloaded from reference"));
    model_free(m);
    op_context_free(&ctx);
}

/* ------------------------------------------------------------------ what was predicted */

/* Wide enough that activations, not cuBLASLt's workspace alone, are what is predicted: that, and
 * what stood before, are left out of both numbers. */
static struct model_config wider(bool llama) {
    struct model_config c = llama ? tiny_llama() : tiny_gpt2();
    c.layers = 4;
    c.dim = 64;
    c.heads = 4;
    c.kv_heads = llama ? 2 : 4;
    c.head_dim = 16;
    c.rope_dim = llama ? 16 : 0;
    c.ffn = 160;
    c.vocab = 300;
    c.context = 64;
    return c;
}

static void judge(const char *what, double predicted, const struct backend_memory *before) {
    struct backend_memory now;
    const double workspace = 32 << 20;
    backend_cuda()->memory(&now);
    double measured = (double)(now.device_peak - before->device);
    predicted -= workspace;
    print_message("%-40s predicted %9.0f, measured %9.0f bytes (%+.2f%%)\n", what, predicted,
                  measured, 100 * (predicted / measured - 1));
    assert_true(fabs(predicted - measured) <= 0.05 * measured);
}

static void predict_training(bool llama, enum dtype t, struct mode mode) {
    const struct backend *gpu = backend_cuda();
    const struct model_config c = wider(llama);
    const struct model_options options = {.dtype = t, .training = true};
    const struct workspace_options wo = {.max_tokens = 64,
                                         .max_sequences = 2,
                                         .backward = true,
                                         .recompute = mode.recompute,
                                         .offload = mode.activations};
    const struct adamw_params params = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f};
    struct memory_plan plan;
    struct backend_memory before, now;
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct optimiser o;
    int32_t ids[64] = {0}, offsets[3] = {0, 32, 64};
    struct batch b = {.tokens = 64, .sequences = 2, .ids = ids, .targets = ids, .offsets = offsets};
    double loss, norm;
    int64_t count;
    bool applied;
    char what[64];
    OK(model_memory_plan(&c, &options, &wo, 0, 0, t, gpu, &plan, &err));
    if (mode.moments)
        memory_plan_offload_moments(&plan);
    OK(op_context_init(&ctx, gpu, &err));
    gpu->memory_reset();
    gpu->memory(&before);
    OK(model_create(&m, &c, &options, &ctx, &err));
    OK(model_init(m, 1, &err));
    OK(workspace_create(&w, m, &wo, &err));
    OK((mode.moments ? optimiser_create_offloaded : optimiser_create)(&o, m, &params, 1, &err));
    struct train_call call = {.scale = 1.0f / 64, .overwrite = true};
    OK(model_forward_backward(m, w, &b, &call, &loss, &count, &err));
    OK(optimiser_step(&o, 1, 1e-3, &norm, &applied, &err));
    snprintf(what, sizeof what, "%s, %s, recompute %d%s%s", llama ? "llama" : "gpt2", dtype_name(t),
             (int)mode.recompute, mode.moments ? ", moments" : "",
             mode.activations ? ", activations" : "");
    judge(what, plan.total, &before);
    gpu->memory(&now);
    assert_int_equal(now.host_peak - before.host, (int64_t)plan.host);
    optimiser_free(&o);
    workspace_free(w);
    model_free(m);
    op_context_free(&ctx);
}

static void predict_generation(bool llama, enum dtype t) {
    enum { CAPACITY = 64, CHUNK = 32 };
    const struct backend *gpu = backend_cuda();
    const struct model_config c = wider(llama);
    const struct model_options options = {.dtype = t};
    const struct workspace_options wo = {.max_tokens = CHUNK, .max_sequences = 1, .max_rows = 1};
    struct memory_plan plan;
    struct backend_memory before;
    struct op_context ctx;
    struct model *m;
    struct session *s;
    struct sampler *sampler;
    const struct sampler_options filters = {
        .temperature = 1, .top_k = 40, .top_p = 0.9, .repetition_penalty = 1};
    int32_t ids[CAPACITY] = {0};
    char what[64];
    OK(model_memory_plan(&c, &options, &wo, 1, CAPACITY, t, gpu, &plan, &err));
    OK(op_context_init(&ctx, gpu, &err));
    gpu->memory_reset();
    gpu->memory(&before);
    OK(model_create(&m, &c, &options, &ctx, &err));
    OK(model_init(m, 1, &err));
    OK(session_create(&s, m, CAPACITY, CHUNK, &err));
    OK(sampler_create(&sampler, &ctx, &filters, c.vocab, &err));
    session_set_sampler(s, sampler);
    OK(session_sync(s, ids, CAPACITY - 2, NULL, &err));
    OK(session_step(s, 1, &err));
    OK(session_step(s, 1, &err));
    snprintf(what, sizeof what, "%s, %s, generation", llama ? "llama" : "gpt2", dtype_name(t));
    judge(what, plan.total, &before);
    session_free(s);
    sampler_free(sampler);
    model_free(m);
    op_context_free(&ctx);
}

static void test_predictions(void **state) {
    (void)state;
    for (int llama = 0; llama < 2; llama++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            const enum dtype t = bf16 ? DT_BF16 : DT_F32;
            predict_training(llama, t, (struct mode){.recompute = RECOMPUTE_NONE});
            predict_training(llama, t,
                             (struct mode){.recompute = bf16 ? RECOMPUTE_FULL : RECOMPUTE_SELECTIVE,
                                           .moments = true,
                                           .activations = true});
            predict_generation(llama, t);
        }
}

/* Models that fit nowhere are predicted all the same, at once. */
static void test_large(void **state) {
    (void)state;
    struct model_config c = tiny_gpt2();
    struct memory_plan all, kept;
    c.layers = 96;
    c.dim = 12288;
    c.heads = c.kv_heads = 96;
    c.head_dim = 128;
    c.ffn = 4 * c.dim;
    c.vocab = 50257;
    c.context = 2048;
    const struct model_options options = {.dtype = DT_BF16, .training = true};
    struct workspace_options w = {.max_tokens = 32768, .max_sequences = 16, .backward = true};
    OK(model_memory_plan(&c, &options, &w, 0, 0, DT_BF16, backend_cuda(), &all, &err));
    assert_true(all.scratch >= 32 << 20 && all.scratch < 1e9 && all.host == 0);
    w.offload = true;
    OK(model_memory_plan(&c, &options, &w, 0, 0, DT_BF16, backend_cuda(), &kept, &err));
    double token = 36.0 * 12288 + 96 * 4 + 4 * 4; /* offload.c; lse; the norms' statistics */
    assert_true(kept.host == 94 * 32768 * token);
    assert_true(all.total - kept.total == kept.host);
    memory_plan_offload_moments(&kept);
    assert_true(all.total - kept.total == kept.host && kept.optimiser == 0);
}

int main(void) {
    struct op_context ctx;
    if (op_context_init(&ctx, backend_cuda(), &err) != TRIL_OK) {
        print_message("skipped: %s\n", err.message);
        return TEST_SKIP;
    }
    op_context_free(&ctx);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gpt2),      cmocka_unit_test(test_llama),
        cmocka_unit_test(test_recalling), cmocka_unit_test(test_few_layers),
        cmocka_unit_test(test_refused),   cmocka_unit_test(test_predictions),
        cmocka_unit_test(test_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
