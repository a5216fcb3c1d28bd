/* Timing whole steps and single products of a model; the machine's limits are the caller's. */
#ifndef LAB_BENCH_H
#define LAB_BENCH_H

#include "model/model.h"
#include "tril/bench.h"

struct bench_call {
    struct op_context *ctx;
    const struct model_config *config;
    int64_t batch, seq, steps;
    enum dtype dtype, cache; /* cache: of keys and values */
    enum recompute recompute;
    double (*read_pass)(void *probe); /* bytes/s of reading memory once more, now; decoding only */
    void *probe;
    double probe_bytes; /* of memory that the probe holds meanwhile */
};

/* Sorts x. */
double bench_median(double *x, int64_t n);

/* Each fills the timing fields of *r (see tril/bench.h); r->peak_flops is set already. Tokens and
 * weights are random. */
tril_status bench_train(const struct bench_call *c, struct tril_bench_result *r,
                        struct tril_error *err);
tril_status bench_prefill(const struct bench_call *c, struct tril_bench_result *r,
                          struct tril_error *err);
tril_status bench_decode(const struct bench_call *c, struct tril_bench_result *r,
                         struct tril_error *err);
/* The model's linear layers at batch * seq rows: forward, input and weight gradients. */
tril_status bench_products(const struct bench_call *c, struct tril_bench_result *r,
                           struct tril_error *err);

#endif
