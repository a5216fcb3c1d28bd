// ctest: timeout=300
/* What the lab's experiments are made of, in a device's memory (here: of the emulated GPU, which
 * the host's code cannot touch): attention and whole blocks give the CPU's results, allocations are
 * counted, and a lens changes what a model's layers do there too. */
#include "lab/attend.h"
#include "lab/layer.h"
#include "lab/lens.h"

#include <math.h>

#include "base/memory.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "support/support.h"

static struct tril_error err;
#define OK(call)                                                                                   \
    do {                                                                                           \
        if ((call) != TRIL_OK)                                                                     \
            fail_msg("%s", err.message);                                                           \
    } while (0)

enum { B = 2, T = 20, H = 2, D = 16, N = B * T * H * D };

/* o, or dq, of standard or flash attention on a backend. */
static float *attention(const struct backend *b, bool standard, bool gradient) {
    struct op_context ctx;
    struct attend a;
    struct standard s = {0};
    float *out;
    OK(op_context_init(&ctx, b, &err));
    OK(attend_create(&a, &ctx, B, T, H, D, DT_F32, true, 7, &err));
    if (standard)
        OK(standard_create(&s, &a, &err));
    OK(standard ? standard_forward(&s, &err) : attend_forward(&a, &err));
    if (gradient)
        OK(standard ? standard_backward(&s, &err) : attend_backward(&a, &err));
    OK(lab_fetch(&ctx, gradient ? a.dq : a.o, DT_F32, N, &out, &err));
    standard_free(&s);
    attend_free(&a);
    op_context_free(&ctx);
    return out;
}

static void test_attention(void **state) {
    (void)state;
    for (int gradient = 0; gradient < 2; gradient++) {
        float *cpu = attention(backend_cpu(), false, gradient);
        for (int standard = 0; standard < 2; standard++) {
            float *gpu = attention(backend_cuda(), standard, gradient);
            /* Sums of 16 and 20 products of numbers below 5, in fp32. */
            assert_true(lab_difference(cpu, gpu, N) <= 100 * 25 * 0x1p-23);
            mem_free(gpu);
        }
        mem_free(cpu);
    }
}

static float *block(const struct backend *b, enum layer_attention attention, enum dtype dtype) {
    struct op_context ctx;
    struct layer x;
    float *out;
    OK(op_context_init(&ctx, b, &err));
    OK(layer_create(&x, &ctx, B, T, 64, 4, dtype, attention, true, &err));
    OK(layer_forward_once(&x, &err));
    OK(lab_fetch(&ctx, x.y, DT_F32, B * T * 64, &out, &err));
    layer_free(&x);
    op_context_free(&ctx);
    return out;
}

static void test_block(void **state) {
    (void)state;
    float *cpu = block(backend_cpu(), LAYER_FLASH, DT_F32);
    for (int i = 0; i < 4; i++) {
        enum dtype dtype = i < 2 ? DT_F32 : DT_F16;
        float *gpu = block(backend_cuda(), i % 2 ? LAYER_STANDARD : LAYER_FLASH, dtype);
        /* Six roundings (norm, qkv, heads, norm, hidden, P) of numbers below 8, through weights
         * whose rows have norm 1; in fp32 sums of up to 256 products of them. */
        double eps = i < 2 ? 256 * 0x1p-23 : 0x1p-10;
        assert_true(lab_difference(cpu, gpu, B * T * 64) <= 6 * 8 * eps);
        if (i >= 2) /* it was computed in fp16 */
            assert_true(lab_difference(cpu, gpu, B * T * 64) > 0x1p-14);
        mem_free(gpu);
    }
    mem_free(cpu);
}

static tril_status hold(void *arg, struct tril_error *e) {
    struct op_context *ctx = arg;
    void *a, *b;
    OK(ctx->backend->alloc(&a, 1000, false, "a", e));
    ctx->backend->release(a);
    OK(ctx->backend->alloc(&a, 3000, true, "a", e));
    OK(ctx->backend->alloc(&b, 500, false, "b", e));
    ctx->backend->release(a);
    OK(ctx->backend->alloc(&a, 2000, false, "a", e));
    ctx->backend->release(a);
    ctx->backend->release(b);
    return TRIL_OK;
}

static void test_memory(void **state) {
    (void)state;
    struct op_context ctx;
    double bytes;
    void *before;
    OK(op_context_init(&ctx, backend_cuda(), &err));
    OK(ctx.backend->alloc(&before, 10000, false, "before", &err));
    OK(lab_peak_memory(&ctx, hold, &ctx, &bytes, &err));
    assert_true(bytes == 3500);
    ctx.backend->release(before);
    op_context_free(&ctx);
}

/* A product with GELU and one with a residual, through a lens and not: the same numbers. */
static void test_unfused(void **state) {
    (void)state;
    enum { ROWS = 12, IN = 24, OUT = 16 };
    struct lens lens;
    struct op_context ctx;
    float *y[2][2];
    OK(op_context_init(&ctx, backend_cuda(), &err));
    OK(lens_open(&lens, &ctx, &err));
    lens.unfused = true;
    for (int unfused = 0; unfused < 2; unfused++) {
        struct op_context *c = unfused ? &lens.ctx : &ctx;
        struct random_key key = {.seed = 1, .op = RANDOM_TEST};
        struct tensor x = tensor_2d(NULL, DT_F32, ROWS, IN), none = tensor_none();
        struct tensor out = tensor_2d(NULL, DT_F32, ROWS, OUT), pre = out;
        struct weight w = {.value = tensor_2d(NULL, DT_F32, OUT, IN)};
        OK(c->backend->alloc(&x.data, ROWS * IN * 4, false, "x", &err));
        OK(c->backend->alloc(&out.data, ROWS * OUT * 4, false, "y", &err));
        OK(c->backend->alloc(&pre.data, ROWS * OUT * 4, false, "pre", &err));
        OK(c->backend->alloc(&w.value.data, OUT * IN * 4, false, "w", &err));
        OK(lab_fill(c, x.data, DT_F32, ROWS * IN, 1, &key, &err));
        OK(lab_fill(c, w.value.data, DT_F32, OUT * IN, 0.2f, &key, &err));
        OK(c->backend->weight_prepare(c, &w, WEIGHT_FORWARD, &err));
        OK(linear_forward(c, x, &w, none, none, out, pre, ACT_GELU_TANH, &err));
        OK(lab_fetch(c, out.data, DT_F32, ROWS * OUT, &y[unfused][0], &err));
        OK(linear_forward(c, x, &w, none, out, out, none, ACT_NONE, &err)); /* onto itself */
        OK(lab_fetch(c, out.data, DT_F32, ROWS * OUT, &y[unfused][1], &err));
        c->backend->weight_release(&w);
        c->backend->release(x.data);
        c->backend->release(out.data);
        c->backend->release(pre.data);
        c->backend->release(w.value.data);
    }
    for (int i = 0; i < 2; i++) { /* one rounding more, of numbers below 8 */
        assert_true(lab_difference(y[0][i], y[1][i], ROWS * OUT) <= 8 * 0x1p-22);
        mem_free(y[0][i]);
        mem_free(y[1][i]);
    }
    assert_int_equal(lens.space_bytes, ROWS * OUT * 4); /* the second one was taken apart */
    lens_close(&lens);
    op_context_free(&ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_block),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_unfused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
