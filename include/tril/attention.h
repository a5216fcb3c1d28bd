/* Attention by itself: forward and backward on the caller's own buffers, for programs that want
 * nothing else of tril (docs/examples/attention.c is one).
 *
 * For query i of head h and the keys j that its visibility rule shows it,
 *
 *   score_ij = softcap(scale q_i.k_j) - slope_h |p_i - j| + bias_hij
 *   p_ij     = exp(score_ij - lse_i)      lse_i = ln(exp(sink_h) + sum_j exp(score_ij))
 *   o_i      = sum_j keep_ij / (1 - dropout) p_ij v_j
 *
 * with softcap(x) = c tanh(x / c), or x where c is 0; p_i = i + Tk - T the position of query i
 * (aligned at the last row and column); slope (ALiBi: Press et al. 2022), bias and sink only where
 * they are given. A row that sees nothing gives o = 0, and lse = -inf (with a sink: lse = sink).
 * Flash attention: Dao 2023; online softmax: Milakov and Gimelshein 2018; linear attention:
 * Katharopoulos et al. 2020. docs/attention.md has the rules, the cost and the measurements.
 *
 * Every call checks its description first: what is wrong is ERR_ARGUMENT with one sentence, and
 * nothing has been written. NaN and infinity in the tensors are no errors: they go where the
 * formulas send them. Pointers are borrowed for the call. Calls of different threads may run at the
 * same time on different outputs; the number of threads (`threads`) is one for the process. */
#ifndef TRIL_ATTENTION_H
#define TRIL_ATTENTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum tril_dtype { TRIL_FP32, TRIL_BF16, TRIL_FP16 };

enum tril_attention_implementation {
    TRIL_ATTENTION_FLASH,        /* tiles, online softmax, O(T d) memory: the fast one */
    TRIL_ATTENTION_FUSED,        /* a row of scores at a time: O(T) memory a thread */
    TRIL_ATTENTION_MATERIALISED, /* the textbook: the whole matrix of a head, O(T Tk) */
    TRIL_ATTENTION_REFERENCE,    /* scalar, in double; one thread, slow, for checking */
    TRIL_ATTENTION_LINEAR        /* phi(q) . phi(k) with phi = elu + 1 instead of softmax */
};

/* What is computed. Start from tril_attention_defaults and change fields. */
struct tril_attention {
    /* Sizes, each at least 1: B, H, Hk (a divisor of H: query head h reads key/value head
     * h / (H / Hk)), T, Tk, and d (at most 256). */
    int64_t batch, heads, kv_heads, queries, keys, width;
    enum tril_dtype dtype; /* of q, k, v, o and their gradients; arithmetic is fp32 or better */

    /* Strides of [B, H, T, d] in elements, for B, H, T; the last dimension is contiguous. All three
     * zero: dense. do, dq have the strides of o, q; dk, dv those of k, v. Strides are positive;
     * rows of q, o, k and v must not overlap where gradients or o are written. */
    int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];

    /* Batches of sequences of different lengths: element b has query_lengths[b] <= T queries and
     * key_lengths[b] <= Tk keys, the first ones; the other rows of o and of the gradients become 0
     * (lse: -inf). [B] each, or NULL. */
    const int32_t *query_lengths, *key_lengths;
    /* Or packed behind one another: element b owns the queries query_offsets[b] ..
     * query_offsets[b + 1] of the T, and the keys key_offsets[b] .. key_offsets[b + 1] of the Tk;
     * [B + 1] each, both or neither. The tensors are then [H, T, d] (the stride of B is not used),
     * lse is [H, T]; `bias` and the rules count rows and keys from each sequence's first. */
    const int32_t *query_offsets, *key_offsets;

    double scale;   /* finite; tril_attention_defaults: 1 / sqrt(d) */
    double softcap; /* 0: none */
    double dropout; /* in [0, 1): a probability is dropped unless uniform >= dropout, where the
                     * uniform is number ((h T + i) 2^32 + j) of the Philox stream (seed, b): the
                     * same in both directions, whatever the implementation, tiles and threads */
    uint64_t seed;

    /* Which keys a query sees: parts joined by '+', see docs/attention.md. "causal" (NULL means
     * it), "full", "window:256", "causal+window:256+sinks:4", "strided:64", "blocks", ...; or heads
     * with rules of their own: "0-3=window:256 4-7=causal". Linear attention takes "causal" and
     * "full" only. */
    const char *visible;
    const uint8_t *blocks;    /* with the part "blocks": [ceil(T / block_q), ceil(Tk / block_k)] */
    int64_t block_q, block_k; /* 1 = visible */

    /* 0: no bias; 1: one matrix for all heads; H: one a head. [bias_heads, T, Tk], fp32 or bf16,
     * strides for the head and the row (both zero: dense). The same for every batch element. */
    int64_t bias_heads;
    enum tril_dtype bias_dtype;
    int64_t bias_stride[2];

    enum tril_attention_implementation implementation;
    int threads; /* 0: as they are set for the process */
    /* Where: "cpu" (NULL means it) or "cuda", a GPU: it gets copies of the tensors, which stay host
     * memory, and gives the results back; opened anew by every call. There is no
     * `fused`; the reference is the host's, whatever is said here. fp16 is computed as it is. */
    const char *device;

    /* Query rows and keys that flash's forward takes at a time; 0: chosen. Both are rounded up
     * to what the kernels can: at most 96 rows, and 16, 32 or 64 keys;
     * tril_bench_attention says what was used. Other sizes give results that differ in rounding.
     * A device chooses for itself. */
    int64_t tile_q, tile_k;
};

/* Causal self-attention, dense, fp32, flash: B, H = Hk, T = Tk, d, scale 1 / sqrt(d). */
struct tril_attention tril_attention_defaults(int64_t batch, int64_t heads, int64_t length,
                                              int64_t width);

/* The tensors. Not every call uses all of them. */
struct tril_attention_buffers {
    const void *q;       /* [B, H, T, d] */
    const void *k, *v;   /* [B, Hk, Tk, d] */
    const float *slopes; /* [H]: ALiBi; NULL: none */
    const void *bias;    /* as described by bias_heads */
    const float *sink;   /* [H]: one more logit in each row's denominator; NULL: none */

    void *o;    /* [B, H, T, d]: written by forward, read by backward */
    float *lse; /* [B, H, T]: the natural log-sum-exp; forward: may be NULL. Linear has none */

    const void *dout;   /* [B, H, T, d]: the gradient of o */
    void *dq, *dk, *dv; /* overwritten by backward */
    float *dbias;       /* dense [bias_heads, T, Tk], overwritten, summed over the batch; or NULL */
    float *dsink;       /* [H], overwritten, summed over the batch; may be NULL */

    /* Linear attention's state after the sequence: per batch element and key/value head the matrix
     * S = sum phi(k_j) v_j^T beside the column z = sum phi(k_j): [B, Hk, d, d + 1]. `state` is
     * where the sequence starts from (NULL: zeros), state_out receives where it ends (NULL: not
     * wanted; may be `state`). Forward and causal only. */
    const float *state;
    float *state_out;
};

/* Bytes of scratch that the calls need (forward; backward), without running them.
 * Either pointer may be NULL. The size depends on the description, the machine's instruction set
 * and the number of threads. Of a device it is what the host needs: the device's own memory is
 * taken and given back inside the calls. */
tril_status tril_attention_scratch(const struct tril_attention *a, size_t *forward,
                                   size_t *backward, struct tril_error *err);

/* o and lse. `scratch` (any alignment): at least as many bytes as tril_attention_scratch says, then
 * the call allocates nothing but what parsing `visible` needs; or NULL: memory is taken and given
 * back inside the call (ERR_MEMORY where there is none). */
tril_status tril_attention_forward(const struct tril_attention *a,
                                   const struct tril_attention_buffers *b, void *scratch,
                                   size_t scratch_bytes, struct tril_error *err);

/* dq, dk, dv (dbias, dsink where given) from q, k, v, o, lse and dout. Deterministic: the same bits
 * for any number of threads. */
tril_status tril_attention_backward(const struct tril_attention *a,
                                    const struct tril_attention_buffers *b, void *scratch,
                                    size_t scratch_bytes, struct tril_error *err);

/* The weights that multiply v (after dropout; 0 where unseen), out of whichever implementation
 * computed lse: p fp32 [B, H, row_count, Tk] for the queries rows[0 .. row_count), each in [0, T).
 * rows NULL: the first row_count. Takes memory of its own. Not for packed batches or linear
 * attention. */
tril_status tril_attention_probabilities(const struct tril_attention *a,
                                         const struct tril_attention_buffers *b,
                                         const int32_t *rows, int64_t row_count, float *p,
                                         struct tril_error *err);

/* A key/value cache in place of k and v, for decoding and for prefill in chunks: rows of tokens
 * [rows, Hk, d]. Element b has lengths[b] keys, those of its queries included; its key j is row
 * start[b] + j, or, with pages, row pages[b][j / page_size] * page_size + j % page_size. A page
 * whose keys no query sees may be -1 (evicted). */
enum tril_cache_dtype { TRIL_CACHE_FP32, TRIL_CACHE_BF16, TRIL_CACHE_INT8 };
struct tril_attention_cache {
    const void *k, *v;
    enum tril_cache_dtype dtype;    /* bf16 under fp32 queries, too */
    const float *k_scale, *v_scale; /* [rows, Hk], with 8-bit integers: value = scale * integer */
    int64_t rows;
    int64_t row_stride;     /* elements from row to row; 0: Hk d */
    const int32_t *lengths; /* [B] */
    const int32_t *start;   /* [B]; NULL with pages */
    const int32_t *pages;   /* [B, page_columns]; NULL without */
    int64_t page_size, page_columns;
};

/* tril_attention_forward with the keys of a cache. Of `a` the keys' strides, lengths and offsets
 * are not used; `keys` is at least the longest length (bias and blocks have so many columns). T is
 * the number of new queries (1 to decode; elements' may differ: query_lengths, query_offsets);
 * queries are fp32 or bf16; no dropout, not linear. Buffers: q, o, and as wanted lse, slopes, bias,
 * sink. A cache with pages and one without give the same bits, and so do a whole sequence at once
 * and its tokens one by one. */
tril_status tril_attention_cached(const struct tril_attention *a,
                                  const struct tril_attention_cache *cache,
                                  const struct tril_attention_buffers *b, void *scratch,
                                  size_t scratch_bytes, struct tril_error *err);
/* Bytes of scratch that it needs; they depend on the lengths, too. */
tril_status tril_attention_cached_scratch(const struct tril_attention *a,
                                          const struct tril_attention_cache *cache, size_t *bytes,
                                          struct tril_error *err);

/* The slopes of ALiBi for any number of heads: 2^(-8h/n), h = 1 .. n; n no power of two: those of
 * the next smaller power p, then every second of those of 2p. */
void tril_attention_alibi(int64_t heads, float *slopes);

/* ------------------------------------------------------------------ files and pictures */

/* `tril attention`: tensors from one safetensors file into another. */
struct tril_attention_file {
    const char
        *in; /* q [B, H, T, d], k, v [B, Hk, Tk, d]; do [B, H, T, d] for gradients; optionally
              * bias [1 or H, T, Tk], sink [H], blocks; fp32, bf16, fp16 or fp64 */
    const char *out; /* another file: o, lse [B, H, T] fp32; p [B, H, T, Tk] fp32; dq, dk, dv;
                        dbias, dsink fp32 */
    const char *implementation; /* "flash" (NULL), "fused", "materialised", ... */
    const char *dtype;          /* "fp32" | "bf16" | "fp16"; NULL: that of q */
    const char *device;         /* as in struct tril_attention; NULL: "cpu" */
    const char *visible;        /* as in struct tril_attention; NULL: causal */
    bool alibi;                 /* the usual slopes */
    double scale;               /* NaN: 1 / sqrt(d) */
    double softcap, dropout;
    uint64_t seed;
    int64_t block_q, block_k; /* sizes of `blocks` (0: 64), and tile_q, tile_k */
    bool gradients, probabilities;
    int threads; /* 0: as set */
};
struct tril_attention_file_result {
    int64_t batch, heads, kv_heads, queries, keys, width;
    const char *dtype;
    double forward_seconds, backward_seconds; /* of the calls: a device's with its transfers */
    double scratch_bytes;                     /* the larger of the two directions'; the host's */
    int64_t block_q, block_k;                 /* rows and keys of flash's tiles as used; 0: none */
};
tril_status tril_attention_file(const struct tril_attention_file *f,
                                struct tril_attention_file_result *result, struct tril_error *err);

/* Draws what a rule lets each of `queries` rows see of `keys` columns (at most 256 each; SVG).
 * `visible` as in struct tril_attention, without "blocks"; of several heads' rules, head's. */
tril_status tril_attention_draw(const char *visible, int64_t head, int64_t queries, int64_t keys,
                                const char *path, struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
