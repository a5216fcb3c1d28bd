/* What the two benchmarks of attention share: whole sequences, and one token against a cache. */
#ifndef API_BENCH_ATTENTION_H
#define API_BENCH_ATTENTION_H

#include "ops/ops.h"
#include "tril/bench.h"

/* Allocations of a run, in the memory of the context's backend. */
struct bench_memory {
    const struct backend *backend;
    void *block[16];
    int count;
};
tril_status bench_take(struct bench_memory *m, void **out, double count, int64_t size,
                       const char *what, struct tril_error *err);
void bench_memory_free(struct bench_memory *m);

/* Fills with normal numbers, a megabyte of different ones again and again. */
tril_status bench_fill(struct op_context *ctx, void *data, enum dtype t, int64_t n, uint64_t seed,
                       struct tril_error *err);

/* Calls that take turns on `buffers` sets of tensors, so that none finds its own in a cache. */
struct bench_turns {
    struct op_context *ctx;
    tril_status (*call)(void *arg, int64_t turn, struct tril_error *err); /* turn < buffers */
    void *arg;
    int64_t buffers, warm, steps;
    void (*between)(void *arg, int64_t step); /* before each counted step; NULL: nothing */
};
/* seconds[0 .. steps): of a call. On the CPU each is one call. On a device each is the mean of many
 * that were launched together (recorded as a graph where that is possible) and waited for: all
 * buffers in turn, and at least a millisecond's, but no more than a tenth of a second's. */
tril_status bench_turns_run(const struct bench_turns *t, double *seconds, struct tril_error *err);

tril_status bench_cache(struct op_context *ctx, const struct tril_bench_attention_options *o,
                        struct tril_bench_attention_result *r, struct tril_error *err);

#endif
