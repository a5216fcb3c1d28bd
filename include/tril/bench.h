/* Benchmarks: whole training steps, prefill, decoding and single matrix products, with the
 * machine's own limits measured in the same run. */
#ifndef TRIL_BENCH_H
#define TRIL_BENCH_H

#include <stdbool.h>
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
    const char *dtype;  /* "bf16" | "fp32"; on a GPU "fp16", "tf32" too */
    const char *recompute;
    const char *device;
    const char *kv_dtype; /* decode: of the cache, "fp32" | "bf16" | "q8"; NULL: as dtype */
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

/* Attention by itself on random tensors: on the CPU through tril_attention_forward and _backward.
 */
struct tril_bench_attention_options {
    int64_t batch, heads, kv_heads; /* kv_heads 0: heads */
    int64_t seq, keys, head_dim;    /* keys 0: seq */
    int64_t steps;                  /* counted repetitions, after a warm-up */
    const char *dtype;              /* "fp32" | "bf16" | "fp16" */
    const char *visible;            /* tril/attention.h; NULL: causal; without blocks */
    const char *implementation;     /* NULL: flash */
    bool alibi, forward_only;
    double softcap, dropout;
    int64_t block_q, block_k; /* tile_q, tile_k of tril/attention.h; 0: chosen */
    const char *device;       /* "cpu" (NULL) | "cuda": tensors that are there, several sets of them
                               * taking turns; a time is the mean of many launches waited for */
    /* One new token for each of `batch` sequences against their caches of `cache` keys, laid out
     * [row, kv_heads, head_dim], in pages of `page` rows in shuffled order (0: contiguous). As many
     * caches take turns as fill a gigabyte, so that every byte comes from memory. */
    bool decode;
    int64_t cache, page;
    const char *kv_dtype; /* "fp32" | "bf16" | "q8" (8 bits with a scale for each row and head) */
};

struct tril_bench_attention_result {
    double forward_ms, backward_ms;                   /* medians; decoding: forward only */
    double forward_ms_min, backward_ms_min;           /* fastest */
    double forward_flops_per_s, backward_flops_per_s; /* useful: 4 d and 10 d for each query and
                                                       * key that sees it (linear: see docs) */
    double pairs;       /* of queries and visible keys, all heads; linear: 0 */
    double peak_flops;  /* measured, as in tril_bench_result */
    double extra_bytes; /* scratch beside inputs and outputs (on a device: its memory): the larger
                         * of the directions' */
    double forward_extra_bytes, backward_extra_bytes;
    double bytes_moved; /* that a forward call must move: each argument once; decoding: the
                         * keys and values (with scales), q and o */
    double backward_bytes_moved;
    double bandwidth, bandwidth_fraction; /* decoding: bytes/s, the median of passes of reading a
                                           * gigabyte between the steps; bytes_moved of it */
    int64_t caches;                       /* decoding: how many took turns */
    int64_t block_q, block_k;             /* rows and keys of a tile step as chosen; 0: none */
    double peak_rss_bytes;
    const char *isa;
    int threads;
};

tril_status tril_bench_attention(const struct tril_bench_attention_options *options,
                                 struct tril_bench_attention_result *result,
                                 struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
