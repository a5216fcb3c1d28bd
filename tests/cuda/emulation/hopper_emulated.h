/* Hopper's instructions (src/cuda/hopper.cuh) on the emulated GPU, as late and as strict as a GPU
 * may be: a copy poisons its destination at once and writes it only when somebody waits for its
 * barrier; a product poisons its accumulators at once, reads its operands and writes its result
 * only in product_wait. So a buffer given back too early, or a result used too early, shows.
 * Descriptors are decoded bit by bit, for every swizzle. */
#ifndef EMULATION_HOPPER_EMULATED_H
#define EMULATION_HOPPER_EMULATED_H

#include <cmath>
#include <deque>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

#define __grid_constant__

/* Shared memory begins at 1024, so that an address forgotten is not 0. */
static const uint32_t EMULATED_SHARED_BASE = 1024, EMULATED_SHARED_END = 1024 + (228 << 10);
static inline uint32_t shared_address(const void *p) {
    ptrdiff_t at = (const char *)p - (const char *)emulated_shared();
    if (at < 0 || at >= 228 << 10)
        emulated_fault("an address outside shared memory");
    return EMULATED_SHARED_BASE + (uint32_t)at;
}
static inline char *emulated_shared_at(uint32_t address, uint32_t bytes) {
    if (address < EMULATED_SHARED_BASE || address + bytes > EMULATED_SHARED_END)
        emulated_fault("shared address %u does not exist", address);
    return (char *)emulated_shared() + (address - EMULATED_SHARED_BASE);
}
/* Bits 4-6 (128), 4-5 (64) or 4 (32 bytes) xored with those 3 above. */
static inline uint32_t emulated_swizzle(uint32_t address, uint32_t width) {
    return address ^ ((address >> 3) & (width - 1) & ~15u);
}

/* ------------------------------------------------------------------ barriers */

struct emulated_barrier_state {
    uint64_t phase : 1, count : 15, pending : 16;
    int64_t bytes : 32;
};
static_assert(sizeof(emulated_barrier_state) == 8, "an mbarrier has 8 bytes");
struct emulated_copy {
    uint64_t *barrier;
    std::function<void()> work;
};
inline std::vector<emulated_copy> emulated_copies;

static inline emulated_barrier_state emulated_barrier_get(const uint64_t *b) {
    emulated_barrier_state s;
    memcpy(&s, b, sizeof s);
    if (s.count == 0 || s.count == 0x7fff || (uintptr_t)b % 8)
        emulated_fault("an mbarrier that nobody has initialised");
    return s;
}
static inline void emulated_barrier_put(uint64_t *b, emulated_barrier_state s) {
    if (s.pending == 0 && s.bytes == 0) {
        s.phase ^= 1;
        s.pending = s.count;
    }
    memcpy(b, &s, sizeof s);
    emulated_progress();
}
static inline void barrier_init(uint64_t *b, unsigned count) {
    if (!emulated_copies.empty())
        emulated_fault("a copy for which nobody waited");
    shared_address(b);
    emulated_barrier_state s = {0, count, count, 0};
    memcpy(b, &s, sizeof s);
}
static inline void barrier_init_fence() {
}
static inline void barrier_arrive_expect(uint64_t *b, unsigned bytes) {
    emulated_order(b, true);
    emulated_barrier_state s = emulated_barrier_get(b);
    if (s.pending == 0)
        emulated_fault("more arrivals at an mbarrier than it counts");
    s.bytes += bytes;
    s.pending--;
    emulated_barrier_put(b, s);
}
static inline void barrier_arrive(uint64_t *b) {
    barrier_arrive_expect(b, 0);
}
static inline void barrier_wait(uint64_t *b, unsigned parity) {
    emulated_wait("an mbarrier", [=] {
        for (size_t i = 0; i < emulated_copies.size();)
            if (emulated_copies[i].barrier == b) {
                auto work = std::move(emulated_copies[i].work);
                emulated_copies.erase(emulated_copies.begin() + (long)i);
                emulated_order(b, false);
                work();
                emulated_order(b, true);
            } else {
                i++;
            }
        return emulated_barrier_get(b).phase != parity;
    });
    emulated_order(b, false);
}

/* ------------------------------------------------------------------ tensor maps and copies */

typedef int CUresult;
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
#define CUDART_VERSION 13000

struct alignas(64) CUtensorMap {
    char *base;
    uint64_t size[3], stride[2];
    uint32_t box[3];
};

static inline CUresult emulated_tensor_map(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank,
                                           void *base, const cuuint64_t *size,
                                           const cuuint64_t *stride, const cuuint32_t *box,
                                           const cuuint32_t *step, CUtensorMapInterleave,
                                           CUtensorMapSwizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
    bool right = rank == 3 && (uintptr_t)base % 16 == 0 && (uintptr_t)map % 64 == 0 &&
                 box[0] * 2 <= 128 && box[0] * 2 % 16 == 0;
    for (int i = 0; i < 3; i++)
        right = right && size[i] > 0 && size[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256 &&
                step[i] == 1;
    for (int i = 0; i < 2; i++)
        right = right && stride[i] % 16 == 0 && stride[i] < 1ull << 40;
    if (!right)
        return CUDA_ERROR_INVALID_VALUE;
    map->base = (char *)base;
    memcpy(map->size, size, sizeof map->size);
    memcpy(map->stride, stride, sizeof map->stride);
    memcpy(map->box, box, sizeof map->box);
    return CUDA_SUCCESS;
}
static inline cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned,
                                                           int,
                                                           cudaDriverEntryPointQueryResult *r) {
    if (strcmp(name, "cuTensorMapEncodeTiled") != 0)
        return cudaErrorInvalidValue;
    *f = (void *)&emulated_tensor_map;
    *r = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

static inline void emulated_copied(uint64_t *b, uint32_t bytes) {
    emulated_barrier_state s = emulated_barrier_get(b);
    s.bytes -= bytes;
    emulated_barrier_put(b, s);
}
static inline void emulated_copy_later(uint64_t *b, void *to, uint32_t bytes,
                                       std::function<void(char *)> write) {
    uint32_t address = shared_address(to);
    emulated_barrier_get(b);
    emulated_order(b, true);
    memset(emulated_shared_at(address, bytes), 0xff, bytes);
    emulated_copies.push_back({b, [=] {
                                   write((char *)to);
                                   emulated_copied(b, bytes);
                               }});
    emulated_progress();
}
static inline void copy_tensor(void *to, const CUtensorMap *map, uint64_t *b, int x, int y, int z) {
    uint32_t address = shared_address(to), line = map->box[0] * 2;
    if (address % 1024)
        emulated_fault("a swizzled tile at shared address %u: not a multiple of 1024", address);
    CUtensorMap m = *map;
    emulated_copy_later(b, to, line * m.box[1] * m.box[2], [=](char *) {
        for (uint32_t k = 0; k < m.box[2]; k++)
            for (uint32_t j = 0; j < m.box[1]; j++)
                for (uint32_t i = 0; i < m.box[0]; i++) {
                    int64_t c = x + (int64_t)i, h = y + (int64_t)j, r = z + (int64_t)k;
                    bool inside = c >= 0 && c < (int64_t)m.size[0] && h >= 0 &&
                                  h < (int64_t)m.size[1] && r >= 0 && r < (int64_t)m.size[2];
                    uint16_t v = 0;
                    if (inside)
                        memcpy(&v,
                               m.base + c * 2 + h * (int64_t)m.stride[0] + r * (int64_t)m.stride[1],
                               2);
                    uint32_t at = address + (k * m.box[1] + j) * line + i * 2;
                    memcpy(emulated_shared_at(emulated_swizzle(at, 128), 2), &v, 2);
                }
    });
}
static inline void copy_bulk(void *to, const void *from, unsigned bytes, uint64_t *b) {
    if (shared_address(to) % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes == 0)
        emulated_fault("a bulk copy of %u bytes, or its addresses, not multiples of 16", bytes);
    emulated_copy_later(b, to, bytes, [=](char *at) { memcpy(at, from, bytes); });
}
static inline void copy_prepare(const CUtensorMap *) {
}
static inline void fence_stores() {
}

/* ------------------------------------------------------------------ warpgroups */

static inline void group_wait(int id, int threads) {
    emulated_barrier_named(id, threads, true);
}
static inline void group_arrive(int id, int threads) {
    emulated_barrier_named(id, threads, false);
}
template <int count>
static inline void registers_give() {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "setmaxnreg takes no such number");
}
template <int count>
static inline void registers_take() {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "setmaxnreg takes no such number");
}
static inline float exp2_fast(float x) {
    return exp2f(x);
}

/* ------------------------------------------------------------------ products */

struct emulated_product {
    float *d;
    int columns;
    bool add, across;
    uint64_t a, b;
    const uint32_t *registers; /* a, or NULL */
    float (*value)(uint16_t);
    int group;
};
struct emulated_accumulators {
    float *at;
    float value[64];
};
struct emulated_products { /* of one thread */
    std::deque<emulated_product> under_way;
    std::vector<emulated_accumulators> accumulators;
    bool begun;
    int group, oldest; /* the group being made; the oldest not waited for */
};
inline emulated_products emulated_products_of[1024];

static inline emulated_products &emulated_mine() {
    return emulated_products_of[emulated_thread_index()];
}
static inline void product_begin() {
    __syncwarp();
    emulated_mine().begun = true;
}
static inline void product_commit() {
    emulated_mine().group++;
}

/* Element (row, k) of a matrix with k neighbouring (K-major), or with rows neighbouring. PTX ISA,
 * "Shared Memory Matrix Layout" and "Matrix Descriptor Format". */
static inline uint32_t emulated_element(uint64_t descriptor, int row, int k, bool across) {
    uint32_t start = (uint32_t)(descriptor & 0x3fff) << 4;
    uint32_t leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
    uint32_t stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    int layout = (int)(descriptor >> 62);
    uint32_t width = layout == 1 ? 128 : layout == 2 ? 64 : layout == 3 ? 32 : 16;
    if (descriptor >> 49 & 7)
        emulated_fault("a matrix with a base offset");
    if ((start & (width * 8 - 1)) >= width && width > 16)
        emulated_fault("a matrix at %u, not in the first line of its swizzle pattern", start);
    uint32_t r = (uint32_t)row, c = (uint32_t)k, at;
    if (!across) {
        at = r / 8 * stride + r % 8 * width + (layout ? c * 2 : c / 8 * leading + c % 8 * 2);
    } else {
        uint32_t group = width / 2; /* rows that lie side by side */
        at = r / group * (layout ? leading : stride) + r % group * 2 +
             c / 8 * (layout ? stride : leading) + c % 8 * width;
    }
    return emulated_swizzle(start + at, width);
}
static inline uint16_t emulated_load(uint64_t descriptor, int row, int k, bool across) {
    uint16_t v;
    memcpy(&v, emulated_shared_at(emulated_element(descriptor, row, k, across), 2), 2);
    return v;
}

/* A warp's 16 rows of a product: every lane hands in where its part is. */
struct emulated_part {
    const emulated_product *product;
    float *d;
};
inline void emulated_compute_warp(unsigned char *slots) {
    emulated_part part[32];
    for (int l = 0; l < 32; l++)
        memcpy(&part[l], slots + l * 64, sizeof part[l]);
    const emulated_product &p = *part[0].product;
    int warp = emulated_thread_index() / 32 % 4;
    float a[16][16], b[256][16]; /* [row][k], [column][k] */
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) {
            const emulated_product &q = *part[row % 8 * 4 + k % 8 / 2].product;
            a[row][k] =
                p.value(q.registers ? (uint16_t)(q.registers[row / 8 + k / 8 * 2] >> 16 * (k % 2))
                                    : emulated_load(p.a, 16 * warp + row, k, false));
        }
    for (int j = 0; j < p.columns; j++)
        for (int k = 0; k < 16; k++)
            b[j][k] = p.value(emulated_load(p.b, j, k, p.across));
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < p.columns / 2; i++) {
            const float *x = a[l / 4 + 8 * (i / 2 % 2)], *y = b[8 * (i / 4) + 2 * (l % 4) + i % 2];
            float sum = p.add ? part[l].d[i] : 0;
            for (int k = 0; k < 16; k++)
                sum += x[k] * y[k];
            part[l].d[i] = sum;
        }
}
static inline void emulated_compute(const emulated_product &p, float *d) {
    emulated_part mine = {&p, d};
    emulated_exchange(0xffffffffu, &mine, sizeof mine, "a product", emulated_compute_warp);
}

static inline void emulated_finish(int left) {
    emulated_products &q = emulated_mine();
    q.begun = false;
    __syncwarp();
    while (!q.under_way.empty() && q.under_way.front().group < q.group - left) {
        emulated_product p = q.under_way.front();
        q.under_way.pop_front();
        size_t i = 0;
        while (q.accumulators[i].at != p.d)
            i++;
        emulated_compute(p, q.accumulators[i].value);
        bool again = false;
        for (const emulated_product &o : q.under_way)
            again = again || o.d == p.d;
        if (again)
            continue;
        for (int k = 0; k < p.columns / 2; k++)
            if (p.d[k] == p.d[k]) /* poisoned by product */
                emulated_fault("accumulators written while a product was under way");
        memcpy(p.d, q.accumulators[i].value, (size_t)p.columns / 2 * sizeof(float));
        q.accumulators.erase(q.accumulators.begin() + (long)i);
    }
    __syncwarp();
}
template <int left>
static inline void product_wait() {
    emulated_finish(left);
}
static inline void product_after(float x) {
    if (x < 0)
        emulated_fault("product_after of a negative number");
}
template <typename A>
static inline void product_hold(A &) {
}

template <typename T>
static inline float emulated_value(uint16_t bits) {
    T v;
    memcpy(&v, &bits, 2);
    return sizeof(v) == 2 && std::is_same<T, __half>::value ? f16_to_f32(bits) : bf16_to_f32(bits);
}
static inline void emulated_issue(emulated_product p) {
    emulated_products &q = emulated_mine();
    uint64_t same[3] = {p.a, p.b, (uint64_t)p.add};
    emulated_exchange(0xffffffffu, same, sizeof same, "a product", [](unsigned char *slots) {
        for (int l = 1; l < 32; l++)
            if (memcmp(slots + l * 64, slots, sizeof same) != 0)
                emulated_fault("a product whose matrices differ within a warp");
    });
    if (!q.begun)
        emulated_fault("a product without product_begin after the last product_wait");
    p.group = q.group;
    bool known = false;
    for (const emulated_accumulators &a : q.accumulators)
        known = known || a.at == p.d;
    if (!known) {
        emulated_accumulators a = {p.d, {}};
        memcpy(a.value, p.d, (size_t)p.columns / 2 * sizeof(float));
        q.accumulators.push_back(a);
        memset((void *)p.d, 0xff, (size_t)p.columns / 2 * sizeof(float));
    }
    q.under_way.push_back(p);
}
template <bool across, int count, typename T>
static inline void product(float (&d)[count], uint64_t a, uint64_t b, bool add, T) {
    emulated_issue({d, 2 * count, add, across, a, b, nullptr, emulated_value<T>, 0});
}
template <bool across, int count, typename T>
static inline void product(float (&d)[count], const uint32_t (&a)[4], uint64_t b, bool add, T) {
    emulated_issue({d, 2 * count, add, across, 0, b, a, emulated_value<T>, 0});
}

#endif
