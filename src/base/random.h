/* Randomness: Philox4x32-10 (Salmon et al. 2011), counter-based. A number is a pure function of
 * (seed, step, layer, op, element), so masks and initial weights do not depend on threads, tiles,
 * shards or the order of calls, and a backward pass regenerates what its forward pass drew. */
#ifndef BASE_RANDOM_H
#define BASE_RANDOM_H

#include <stdint.h>

/* out = Philox4x32-10(counter, key). */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* Identifies a stream of random numbers. */
struct random_key {
    uint64_t seed;
    uint64_t step;  /* optimiser step (micro-batches fold into `op`'s high bits) */
    uint32_t layer; /* layer index, or 0 */
    uint32_t op;    /* which use within the layer: enum random_use */
};

enum random_use {
    RANDOM_INIT = 1,
    RANDOM_DROPOUT_EMBED,
    RANDOM_DROPOUT_ATTENTION,
    RANDOM_DROPOUT_RESIDUAL_ATTENTION,
    RANDOM_DROPOUT_RESIDUAL_FFN,
    RANDOM_SHUFFLE,
    RANDOM_SAMPLE,
    RANDOM_TEST
};

/* Four numbers for elements 4*block .. 4*block+3: counter = (block lo, block hi, step lo, step hi
 * ^ op << 16), key = (seed lo ^ layer * 0x9E3779B9, seed hi ^ op). */
void random_block(const struct random_key *key, uint64_t block, uint32_t out[4]);
uint32_t random_u32(const struct random_key *key, uint64_t element);
/* Uniform in [0, 1) with 24 bits: (u32 >> 8) * 2^-24. */
float random_uniform(const struct random_key *key, uint64_t element);
/* Standard normal, Box-Muller on the pair of block numbers that holds `element`. */
float random_normal(const struct random_key *key, uint64_t element);
/* out[i] = random_normal(key, first + i) for i < n: the same bits, a block drawn once for its four.
 */
void random_normal_fill(const struct random_key *key, uint64_t first, int64_t n, float *out);
/* Unbiased integer in [0, n), n >= 1. Draws from block `element`: give it a key of its own. */
uint64_t random_below(const struct random_key *key, uint64_t element, uint64_t n);

#endif
