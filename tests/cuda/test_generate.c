// ctest: timeout=300
/* Generation on the (emulated) GPU: the tokens that the CPU draws, greedily and at random; and a
 * decoding step is a recorded one that ends in a token there: the host waits for nothing but that.
 */
#include "cuda/cuda.h"

#include "cpu/cpu.h"
#include "infer/generator.h"
#include "model/golden.h"

/* The CUDA backend, with its transfers counted. */
static struct { int64_t downloads, bytes, waits, recorded, replayed; } seen;

static tril_status download(struct op_context *ctx, void *host, const void *src, int64_t bytes,
                            struct tril_error *e) {
    seen.downloads++;
    seen.bytes += bytes;
    return backend_cuda()->download(ctx, host, src, bytes, e);
}
static tril_status synchronise(struct op_context *ctx, struct tril_error *e) {
    seen.waits++;
    return backend_cuda()->synchronise(ctx, e);
}
static tril_status graph_end(struct op_context *ctx, void **graph, struct tril_error *e) {
    seen.recorded++;
    return backend_cuda()->graph_end(ctx, graph, e);
}
static tril_status graph_run(struct op_context *ctx, void *graph, struct tril_error *e) {
    seen.replayed++;
    return backend_cuda()->graph_run(ctx, graph, e);
}

static struct backend counting(void) {
    struct backend b = *backend_cuda();
    b.download = download;
    b.synchronise = synchronise;
    b.graph_end = graph_end;
    b.graph_run = graph_run;
    return b;
}

enum { PROMPT = 3 };

static void generate(const char *dir, const struct backend *backend, struct op_context *ctx,
                     struct tril_generate_options *o, struct tril_generation *g) {
    struct model *m;
    struct session *s;
    OK(op_context_init(ctx, backend, &err));
    OK(model_load(&m, dir, &(struct model_options){.dtype = DT_F32}, ctx, &err));
    OK(session_create(&s, m, 0, 0, &err));
    memset(&seen, 0, sizeof seen);
    OK(generator_run(s, NULL, -1, o, g, &err));
    session_free(s);
    model_free(m);
    op_context_free(ctx);
}

static const struct tril_generate_options choices[] = {
    {.temperature = 0, .top_p = 1, .repetition_penalty = 1},
    {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 3},
    {.temperature = 0.8f, .top_k = 5, .top_p = 0.9f, .repetition_penalty = 1.2f, .seed = 4},
    {.temperature = 2, .top_p = 1, .min_p = 0.05f, .repetition_penalty = 1, .seed = 5},
    {.temperature = 0, .top_p = 1, .repetition_penalty = 1.5f},
};

static void test_as_cpu(void **state) {
    static const char *const names[] = {"gpt2-tiny", "llama-gqa-untied"};
    const struct backend gpu = counting();
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct golden gold;
        golden_open(&gold, names[i]);
        for (size_t c = 0; c < sizeof choices / sizeof *choices; c += i == 0 ? 1 : 2) {
            struct tril_generate_options o = choices[c];
            struct tril_generation cpu, cuda;
            struct op_context ctx;
            o.prompt_ids = gold.ids;
            o.prompt_id_count = PROMPT;
            o.ignore_eos = true;
            o.max_tokens = 10;
            generate(gold.dir, backend_cpu(), &ctx, &o, &cpu);
            generate(gold.dir, &gpu, &ctx, &o, &cuda);
            const int64_t tokens = cuda.token_count;
            assert_int_equal(tokens, o.max_tokens);
            assert_int_equal(cpu.token_count, tokens);
            assert_memory_equal(cpu.tokens, cuda.tokens, (size_t)tokens * sizeof *cpu.tokens);
            /* Every token is read, and nothing else. The first of the tokens - 1 decoding steps
             * runs plainly, the second is recorded, all from there on are replayed. */
            assert_int_equal(seen.downloads, tokens);
            assert_true(seen.bytes <= 16 * tokens);
            assert_int_equal(seen.waits, 1); /* for the prompt */
            assert_int_equal(seen.recorded, 1);
            assert_int_equal(seen.replayed, tokens - 2);
            tril_generation_free(&cpu);
            tril_generation_free(&cuda);
        }
        safetensors_close(gold.file);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_as_cpu)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
