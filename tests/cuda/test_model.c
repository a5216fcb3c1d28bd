// ctest: timeout=600
/* Small models whole on the CUDA backend (here: on the emulated GPU): logits, losses and gradients
 * of every kind of layer against PyTorch's, ten steps of AdamW against PyTorch's, token by token
 * the same as all at once, and greedily the same tokens as on the CPU. Device memory is not the
 * host's: code of the model, the trainer or a session that looked into a tensor would fault. */
#include "cuda/cuda.h"

#include "cpu/cpu.h"
#include "infer/session.h"
#include "model/golden.h"
#include "train/steps.h"

static const char *const names[] = {"gpt2-tiny",       "llama-gqa-untied", "qwen3-window",
                                    "mixed-tiny",      "mixers-tiny",      "alibi-hybrid",
                                    "recurrence-tiny", "memory-tiny"};
#define MODELS ((int)(sizeof names / sizeof *names))

static void test_goldens(void **state) {
    (void)state;
    for (int i = 0; i < MODELS; i++) {
        struct golden g;
        golden_open(&g, names[i]);
        struct sensitivity p = measure(&g);
        check(&g, &p, backend_cuda(), DT_F32, RECOMPUTE_NONE);
        check(&g, &p, backend_cuda(), DT_BF16, RECOMPUTE_NONE);
        if (i < 2)
            check(&g, &p, backend_cuda(), DT_F32, RECOMPUTE_FULL);
        safetensors_close(g.file);
    }
}

/* What is held against the goldens does notice: parameters off by 3 parts in 100,000. */
static void test_notices(void **state) {
    (void)state;
    for (int i = 0; i < 2; i++)
        check_notices(names[i], backend_cuda());
}

static void test_ten_steps(void **state) {
    (void)state;
    ten_steps("gpt2-tiny", backend_cuda(), DT_F32);
    ten_steps("llama-tiny", backend_cuda(), DT_BF16);
}

/* The first sequence of a golden token by token, after a prompt in chunks: the logits at each are
 * held to the golden's as those of the whole are. */
static void test_decode(void **state) {
    (void)state;
    for (int i = 0; i < MODELS; i += i == 0 ? 4 : 1) { /* without those most like the first */
        struct golden g;
        struct op_context ctx;
        struct model *m;
        struct session *s;
        golden_open(&g, names[i]);
        struct sensitivity p = measure(&g);
        OK(op_context_init(&ctx, backend_cuda(), &err));
        OK(model_load(&m, g.dir, &(struct model_options){.dtype = DT_F32}, &ctx, &err));
        OK(session_create(&s, m, 0, 3, &err));
        const double allowed = unit_of(&m->config, DT_F32) * p.logits;
        const int64_t tokens = g.offsets[1], prompt = tokens / 2;
        double worst = 0;
        for (int64_t n = prompt; n <= tokens; n++) {
            if (n == prompt)
                OK(session_sync(s, g.ids, n, NULL, &err));
            else
                OK(session_step(s, g.ids[n - 1], &err));
            for (int64_t v = 0; v < g.vocab; v++)
                worst = fmax(worst, fabs((double)session_logits(s)[v] -
                                         (double)g.logits[(n - 1) * g.vocab + v]));
        }
        print_message("%-18s decoding: %4.2f of what is allowed\n", names[i], worst / allowed);
        assert_true(worst <= allowed);
        session_free(s);
        model_free(m);
        op_context_free(&ctx);
        safetensors_close(g.file);
    }
}

/* The best token, again and again; returns how many. */
static int64_t greedy(const char *dir, const struct backend *backend, const int32_t *prompt,
                      int64_t n, int32_t *out, int64_t most) {
    struct op_context ctx;
    struct model *m;
    struct session *s;
    OK(op_context_init(&ctx, backend, &err));
    OK(model_load(&m, dir, &(struct model_options){.dtype = DT_F32}, &ctx, &err));
    OK(session_create(&s, m, 0, 0, &err));
    OK(session_sync(s, prompt, n, NULL, &err));
    most = most < session_capacity(s) - n ? most : session_capacity(s) - n;
    for (int64_t i = 0; i < most; i++) {
        const float *logits = session_logits(s);
        out[i] = 0;
        for (int64_t v = 1; v < session_vocab(s); v++)
            out[i] = logits[v] > logits[out[i]] ? (int32_t)v : out[i];
        OK(session_step(s, out[i], &err));
    }
    session_free(s);
    model_free(m);
    op_context_free(&ctx);
    return most;
}

static void test_greedy(void **state) {
    (void)state;
    for (int i = 1; i < MODELS; i += 3) {
        struct golden g;
        int32_t cpu[8], cuda[8];
        golden_open(&g, names[i]);
        int64_t n = greedy(g.dir, backend_cpu(), g.ids, 3, cpu, 8);
        assert_int_equal(greedy(g.dir, backend_cuda(), g.ids, 3, cuda, 8), n);
        assert_true(n > 4);
        assert_memory_equal(cpu, cuda, (size_t)n * sizeof *cpu);
        safetensors_close(g.file);
    }
}

int main(void) {
    struct op_context ctx;
    if (op_context_init(&ctx, backend_cuda(), &err) != TRIL_OK) {
        print_message("skipped: %s\n", err.message);
        return TEST_SKIP;
    }
    op_context_free(&ctx);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),   cmocka_unit_test(test_notices),
        cmocka_unit_test(test_ten_steps), cmocka_unit_test(test_decode),
        cmocka_unit_test(test_greedy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
