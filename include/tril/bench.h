/* Benchmarks: whole training steps, prefill, decoding and single matrix products, with the
 * machine's own limits measured in the same run. */
#ifndef TRIL_BENCH_H
#define TRIL_BENCH_H

#include <stdint.h>

#include "tril/error.h"
#include "tril/inspect.h"

#ifdef __cplusplus
extern "C" {
#endif

struct tril_bench_options {
    const char *what; /* "train" | "prefill" | "decode" | "gemm" */
    struct tril_model_source source;
    int64_t batch, seq; /* rows, tokens a row (decode: tokens in the cache) */
    int64_t steps;      /* counted repetitions, after a warm-up */
    const char *dtype;  /* "bf16" | "fp32" */
    const char *recompute;
    const char *device;
};

#define TRIL_BENCH_MAX_PRODUCTS 32

struct tril_bench_product {
    char name[48];   /* "qkv forward" */
    int64_t n, o, i; /* rows, outputs, inputs */
    double seconds, flops_per_s, fraction;
};

struct tril_bench_result {
    int64_t batch, seq, steps;                /* as measured, defaults filled in */
    double tokens_per_s;                      /* from the median step */
    double step_ms, step_ms_min, step_ms_max; /* median, fastest, slowest */
    double mfu;                               /* train, prefill: useful FLOPs of the peak */
    double peak_flops;                        /* measured, at this dtype (fp32 arithmetic where the
                                               * processor has no bf16 products) */
    double bandwidth;                         /* bytes/s, measured by reading 1 GB: the best of
                                               * several passes; decode: the median of passes
                                               * between the steps */
    double bandwidth_fraction;                /* decode: bytes of weights and cache that a step
                                               * must read, of what reads next to it reached */
    double peak_rss_bytes, anonymous_bytes;   /* anonymous: after the steps */
    double parameters;
    const char *isa;
    int threads;
    struct tril_bench_product products[TRIL_BENCH_MAX_PRODUCTS]; /* gemm */
    int product_count;
};

tril_status tril_bench(const struct tril_bench_options *options, struct tril_bench_result *result,
                       struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
