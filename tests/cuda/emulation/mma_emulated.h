/* ldmatrix, mma.sync and cp.async on the emulated GPU: the lanes' fragments as the PTX ISA lays
 * them out, through emulated_exchange. A copy's bytes appear when its thread waits for its group,
 * and shared memory holds NaNs until then: a missing wait is seen. */
#ifndef EMULATION_MMA_EMULATED_H
#define EMULATION_MMA_EMULATED_H

#include <deque>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

static inline void emulated_ldmatrix(uint32_t (&r)[4], const void *row, bool trans) {
    if ((uintptr_t)row % 16)
        emulated_fault("ldmatrix from an address that is not a multiple of 16");
    unsigned lane = emulated_lane();
    const unsigned char *all = emulated_exchange(0xffffffffu, &row, sizeof row, "ldmatrix");
    const unsigned char *rows[32];
    for (unsigned l = 0; l < 32; l++)
        memcpy(&rows[l], all + l * 64, sizeof rows[l]);
    for (unsigned m = 0; m < 4; m++)
        for (unsigned half = 0; half < 2; half++) {
            unsigned y = lane / 4, x = 2 * (lane % 4) + half;
            uint16_t e;
            memcpy(&e, trans ? rows[8 * m + x] + 2 * y : rows[8 * m + y] + 2 * x, 2);
            r[m] = half ? r[m] | (uint32_t)e << 16 : e;
        }
    __syncwarp(); /* others may write these rows only when all have read them */
}
static inline void mma_load(uint32_t (&r)[4], const void *row) {
    emulated_ldmatrix(r, row, false);
}
static inline void mma_load_trans(uint32_t (&r)[4], const void *row) {
    emulated_ldmatrix(r, row, true);
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
template <typename T>
static inline void mma_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    unsigned lane = emulated_lane(), g = lane / 4, t = lane % 4;
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned char *all = emulated_exchange(0xffffffffu, mine, sizeof mine, "mma.sync");
    auto reg = [&](unsigned l, unsigned i) {
        uint32_t r;
        memcpy(&r, all + l * 64 + 4 * i, 4);
        return r;
    };
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
        double sum = c[i];
        for (unsigned k = 0; k < 16; k++) {
            unsigned from = row % 8 * 4 + k % 8 / 2;
            float x = emulated_half_of<T>(reg(from, row / 8 + k / 8 * 2), k % 2);
            float y = emulated_half_of<T>(reg(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
            sum += (double)x * (double)y;
        }
        c[i] = (float)sum;
    }
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
