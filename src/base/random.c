/* Philox4x32-10: ten rounds of two 32 x 32 -> 64 bit products, the key bumped by Weyl constants.
 * Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. */
#include "base/random.h"

#include <math.h>
#include <stdbool.h>

void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

void random_block(const struct random_key *key, uint64_t block, uint32_t out[4]) {
    const uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)key->step,
                                 (uint32_t)(key->step >> 32) ^ key->op << 16};
    const uint32_t words[2] = {(uint32_t)key->seed ^ key->layer * 0x9E3779B9u,
                               (uint32_t)(key->seed >> 32) ^ key->op};
    philox4x32(counter, words, out);
}

uint32_t random_u32(const struct random_key *key, uint64_t element) {
    uint32_t out[4];
    random_block(key, element / 4, out);
    return out[element % 4];
}

float random_uniform(const struct random_key *key, uint64_t element) {
    return (float)(random_u32(key, element) >> 8) * 0x1p-24f;
}

/* The two normal numbers that a pair of words gives. */
static void box_muller(const uint32_t pair[2], bool first, bool second, float out[2]) {
    const double two_pi = 6.283185307179586;
    double radius = sqrt(-2.0 * log(((double)pair[0] + 1.0) * 0x1p-32)); /* of (0, 1] */
    double angle = two_pi * ((double)pair[1] * 0x1p-32);
    if (first)
        out[0] = (float)(radius * cos(angle));
    if (second)
        out[1] = (float)(radius * sin(angle));
}

float random_normal(const struct random_key *key, uint64_t element) {
    uint32_t words[4];
    float out[2];
    random_block(key, element / 4, words);
    box_muller(words + (element % 4 / 2) * 2, element % 2 == 0, element % 2 == 1, out);
    return out[element % 2];
}

void random_normal_fill(const struct random_key *key, uint64_t first, int64_t n, float *out) {
    int64_t i = 0;
    while (i < n) {
        uint64_t element = first + (uint64_t)i;
        if (element % 4 || n - i < 4) {
            out[i++] = random_normal(key, element);
            continue;
        }
        uint32_t words[4];
        random_block(key, element / 4, words);
        box_muller(words, true, true, out + i);
        box_muller(words + 2, true, true, out + i + 2);
        i += 4;
    }
}

/* Lemire's method: the high half of x * n is below n; it is unbiased if the low half is at least
 * 2^64 mod n. The rare rejected tries take further blocks, under ops of their own. */
uint64_t random_below(const struct random_key *key, uint64_t element, uint64_t n) {
    if (n <= 1)
        return 0;
    uint64_t least = (0 - n) % n;
    struct random_key k = *key;
    for (;; k.op += 256) {
        uint32_t out[4];
        random_block(&k, element, out);
        for (int i = 0; i < 4; i += 2) {
            unsigned __int128 product =
                (unsigned __int128)((uint64_t)out[i + 1] << 32 | out[i]) * n;
            if ((uint64_t)product >= least)
                return (uint64_t)(product >> 64);
        }
    }
}
