/* ldmatrix, mma.sync and cp.async on the emulated GPU: the lanes' fragments as the PTX ISA lays
 * them out, through emulated_exchange. A copy's bytes appear when its thread waits for its group,
 * and shared memory holds NaNs until then: a missing wait is seen. */
#ifndef EMULATION_MMA_EMULATED_H
#define EMULATION_MMA_EMULATED_H

#include <deque>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

/* Lane l hands in the address of row l % 8 of matrix l / 8 and gets two elements of each matrix. */
template <bool trans>
static inline void emulated_fetch(unsigned char *slots) {
    uint16_t e[4][8][8];
    for (unsigned l = 0; l < 32; l++) {
        const void *row;
        memcpy(&row, slots + l * 64, sizeof row);
        memcpy(e[l / 8][l % 8], row, 16);
    }
    for (unsigned l = 0; l < 32; l++)
        for (unsigned m = 0; m < 4; m++) {
            unsigned y = l / 4, x = 2 * (l % 4);
            uint16_t two[2] = {trans ? e[m][x][y] : e[m][y][x],
                               trans ? e[m][x + 1][y] : e[m][y][x + 1]};
            memcpy(slots + l * 64 + 4 * m, two, 4);
        }
}
template <bool trans>
static inline void emulated_ldmatrix(uint32_t (&r)[4], const void *row) {
    if ((uintptr_t)row % 16)
        emulated_fault("ldmatrix from an address that is not a multiple of 16");
    const unsigned char *all =
        emulated_exchange(0xffffffffu, &row, sizeof row, "ldmatrix", emulated_fetch<trans>);
    memcpy(r, all + emulated_lane() * 64, sizeof r);
}
static inline void mma_load(uint32_t (&r)[4], const void *row) {
    emulated_ldmatrix<false>(r, row);
}
static inline void mma_load_trans(uint32_t (&r)[4], const void *row) {
    emulated_ldmatrix<true>(r, row);
}

template <typename T>
static inline float emulated_half_of(uint32_t r, unsigned half) {
    T x;
    x.bits = (uint16_t)(r >> 16 * half);
    if constexpr (sizeof(T) == 2 && std::is_same<T, __half>::value)
        return __half2float(x);
    else
        return __bfloat162float(x);
}
/* What a lane hands in, and gets back in its place. */
struct emulated_fragments {
    float c[4];
    uint32_t a[4], b[2];
};
template <typename T>
static inline void emulated_mma(unsigned char *slots) {
    float a[16][16], b[8][16]; /* [row][k], [column][k] */
    emulated_fragments f;
    for (unsigned l = 0; l < 32; l++) {
        memcpy(&f, slots + l * 64, sizeof f);
        unsigned g = l / 4, k = 2 * (l % 4);
        for (unsigned i = 0; i < 8; i++) { /* register i / 2, half i % 2 */
            a[g + i / 2 % 2 * 8][k + i / 4 * 8 + i % 2] = emulated_half_of<T>(f.a[i / 2], i % 2);
            if (i < 4)
                b[g][k + i / 2 * 8 + i % 2] = emulated_half_of<T>(f.b[i / 2], i % 2);
        }
    }
    for (unsigned l = 0; l < 32; l++) {
        memcpy(&f, slots + l * 64, sizeof f);
        for (unsigned i = 0; i < 4; i++) {
            const float *x = a[l / 4 + i / 2 * 8], *y = b[2 * (l % 4) + i % 2];
            double sum = f.c[i];
            for (unsigned k = 0; k < 16; k++)
                sum += (double)x[k] * (double)y[k];
            f.c[i] = (float)sum;
        }
        memcpy(slots + l * 64, f.c, sizeof f.c);
    }
}
template <typename T>
static inline void mma_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated_fragments f = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    const unsigned char *all =
        emulated_exchange(0xffffffffu, &f, sizeof f, "mma.sync", emulated_mma<T>);
    memcpy(c, all + emulated_lane() * 64, sizeof c);
}

static inline float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

/* A thread's copies under way: groups of (where to, what). */
struct emulated_async_copy {
    void *to;
    const void *from; /* NULL: zeros */
};
struct emulated_async {
    std::vector<emulated_async_copy> open;
    std::deque<std::vector<emulated_async_copy>> groups;
};
static inline emulated_async &emulated_my_async() {
    static std::vector<emulated_async> all(1024);
    return all[(size_t)emulated_thread_index()];
}
static inline void copy_async(void *shared, const void *global, bool zeros) {
    if ((uintptr_t)shared % 16 || (!zeros && (uintptr_t)global % 16))
        emulated_fault("cp.async of 16 bytes with an address that is not a multiple of 16");
    emulated_my_async().open.push_back({shared, zeros ? nullptr : global});
}
static inline void commit_copies() {
    emulated_async &c = emulated_my_async();
    c.groups.push_back(c.open);
    c.open.clear();
}
template <int open>
static inline void wait_copies() {
    emulated_async &c = emulated_my_async();
    for (; c.groups.size() > (size_t)open; c.groups.pop_front())
        for (const emulated_async_copy &k : c.groups.front()) {
            if (k.from)
                memcpy(k.to, k.from, 16);
            else
                memset(k.to, 0, 16);
        }
}

#endif
