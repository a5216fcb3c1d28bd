/* The numbers of base/random.h, a vector of blocks at a time: Philox4x32-10 (Salmon et al. 2011).
 *
 * Every 64-bit lane works on one block, its four words in the lower halves of four vectors: that is
 * what the 32 x 32 -> 64 bit multiply of x86 wants, and a product's lower half needs no extraction.
 * The upper halves hold rubbish until the end. */
#ifndef CPU_KERNELS_PHILOX_H
#define CPU_KERNELS_PHILOX_H

#include "base/random.h"
#include "cpu/kernels/simd.h"

typedef uint64_t vq __attribute__((vector_size(4 * VF_WIDTH)));
enum { PHILOX_ELEMENTS = 2 * VF_WIDTH }; /* numbers made by one call: 4 per lane of a vq */

/* What stays the same for all blocks of a stream. */
struct philox {
    uint32_t step_low, step_high, key[2];
};

SIMD struct philox philox_begin(const struct random_key *k) {
    return (struct philox){
        .step_low = (uint32_t)k->step,
        .step_high = (uint32_t)(k->step >> 32) ^ k->op << 16,
        .key = {(uint32_t)k->seed ^ k->layer * 0x9E3779B9u, (uint32_t)(k->seed >> 32) ^ k->op},
    };
}

SIMD vq vq_set(uint64_t x) {
#if VF_WIDTH == 16
    return (vq){x, x, x, x, x, x, x, x};
#elif VF_WIDTH == 8
    return (vq){x, x, x, x};
#else
    return (vq){x, x};
#endif
}
/* The product of the lower halves. */
SIMD vq vq_multiply(vq a, uint32_t b) {
#if SIMD_AVX512
    return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)vq_set(b));
#elif SIMD_AVX2
    return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)vq_set(b));
#else
    return (a & vq_set(0xffffffffu)) * vq_set(b);
#endif
}

/* random_u32 of the elements 4 * block .. 4 * block + PHILOX_ELEMENTS - 1, in order. */
SIMD void philox_words(const struct philox *p, uint64_t block, vu out[2]) {
    /* Lanes 0, 1, 2, ... take the blocks in the order in which the last shuffle wants them:
     * lane 2i + j of 2n lanes is block j n + i. */
#if VF_WIDTH == 16
    vq c0 = vq_set(block) + (vq){0, 4, 1, 5, 2, 6, 3, 7};
#elif VF_WIDTH == 8
    vq c0 = vq_set(block) + (vq){0, 2, 1, 3};
#else
    vq c0 = vq_set(block) + (vq){0, 1};
#endif
    vq c1 = c0 >> 32, c2 = vq_set(p->step_low), c3 = vq_set(p->step_high);
    uint32_t k0 = p->key[0], k1 = p->key[1];
    for (int round = 0; round < 10; round++) {
        vq p0 = vq_multiply(c0, 0xD2511F53u), p1 = vq_multiply(c2, 0xCD9E8D57u);
        c0 = (p1 >> 32) ^ c1 ^ vq_set(k0);
        c2 = (p0 >> 32) ^ c3 ^ vq_set(k1);
        c1 = p1;
        c3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    vq low = vq_set(0xffffffffu), a = (c0 & low) | c1 << 32, b = (c2 & low) | c3 << 32;
#if VF_WIDTH == 16
    out[0] = (vu)__builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    out[1] = (vu)__builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#elif VF_WIDTH == 8
    out[0] = (vu)__builtin_shufflevector(a, b, 0, 4, 2, 6);
    out[1] = (vu)__builtin_shufflevector(a, b, 1, 5, 3, 7);
#else
    out[0] = (vu)__builtin_shufflevector(a, b, 0, 2);
    out[1] = (vu)__builtin_shufflevector(a, b, 1, 3);
#endif
}

/* random_uniform of the same elements: in [0, 1), 24 bits. */
SIMD void philox_uniform(const struct philox *p, uint64_t block, vf out[2]) {
    vu words[2];
    philox_words(p, block, words);
    for (int i = 0; i < 2; i++)
        out[i] = vf_from_vi((vi)(words[i] >> 8)) * vf_set(0x1p-24f);
}

#endif
