/* Hopper's own instructions (sm_90a): barriers that count bytes, bulk tensor copies, warpgroup
 * matrix products, and the registers handed between warpgroups; each as one small function. This is
 * the only place with their PTX. On the emulated GPU tests/cuda/emulation/hopper_emulated.h takes
 * its place.
 *
 * Tiles in shared memory are [rows][64 elements of 2 bytes], 128 bytes a row, in 128-byte swizzle:
 * of every address, bits 4-6 are xored with bits 7-9. They begin at multiples of 1024 bytes. A
 * tile of 128 channels is two such halves, one after the other.
 *
 * Source: PTX ISA 8.x (asynchronous warpgroup matrix instructions, mbarrier, cp.async.bulk). */
#ifndef CUDA_HOPPER_CUH
#define CUDA_HOPPER_CUH

#include "cuda/device.cuh"

#if defined(TRIL_CUDA_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE 1 /* elsewhere the kernels' bodies are empty */
#endif

#ifdef TRIL_CUDA_EMULATED
#include <hopper_emulated.h>
#else
#include <cuda.h>

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* ------------------------------------------------------------------ barriers in shared memory
 *
 * A phase ends when `count` threads have arrived and all expected bytes have come.
 * barrier_wait(b, parity) returns when the phase of that parity has ended (of a fresh barrier the
 * phase before counts as parity 1). */
__device__ __forceinline__ void barrier_init(uint64_t *b, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count)
                 : "memory");
}
/* After the inits, before the __syncthreads that tells the others. */
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *b) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                     shared_address(b))
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint64_t *b, unsigned bytes) {
    asm volatile(
        "{\n.reg .b64 state;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(shared_address(b)),
        "r"(bytes)
        : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *b, unsigned parity) {
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(shared_address(b)), "r"(parity)
                     : "memory");
    } while (!done);
}

/* ------------------------------------------------------------------ copies to shared memory */

/* One thread's order: the box of `map` at element x, head y, row z to `to`; `b` counts its bytes.
 * What lies outside the tensor becomes zeros. */
__device__ __forceinline__ void copy_tensor(void *to, const CUtensorMap *map, uint64_t *b, int x,
                                            int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
/* `bytes`, both addresses: multiples of 16. */
__device__ __forceinline__ void copy_bulk(void *to, const void *from, unsigned bytes, uint64_t *b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}
__device__ __forceinline__ void copy_prepare(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/* Orders this thread's ordinary stores to shared memory before later reads of it by copies and
 * products (of whoever a barrier tells afterwards). */
__device__ __forceinline__ void fence_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ------------------------------------------------------------------ warpgroups */

/* Barrier `id` (1 to 15) of `threads`: wait for all, or only be counted. */
__device__ __forceinline__ void group_wait(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void group_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* All threads of a warpgroup: from now on `count` registers each. */
template <int count>
__device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

/* 2^x, to about 2 units in the last place. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ------------------------------------------------------------------ products
 *
 * product_begin; products; product_commit; product_wait<n> until at most n committed groups are
 * under way. Accumulators and A registers of a group under way must not be touched; product_hold
 * keeps the compiler from moving their uses across. */
__device__ __forceinline__ void product_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void product_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int left>
__device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
/* x (never below 0) is computed before what follows waits: ptxas would move a product_wait up over
 * arithmetic that does not need it, and the product would no longer run beside it. */
__device__ __forceinline__ void product_after(float x) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p nanosleep.u32 1;\n}" ::"f"(x)
                 : "memory");
}
template <int count>
__device__ __forceinline__ void product_hold(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; i++)
        asm volatile("" : "+f"(d[i])::"memory");
}
template <int count>
__device__ __forceinline__ void product_hold(uint32_t (&a)[count][4]) {
#pragma unroll
    for (int i = 0; i < count; i++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            asm volatile("" : "+r"(a[i][k])::"memory");
}

#define HOPPER_LIST_32                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HOPPER_REGISTERS_32(d)                                                                     \
    "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3]), "+f"((d)[4]), "+f"((d)[5]),            \
        "+f"((d)[6]), "+f"((d)[7]), "+f"((d)[8]), "+f"((d)[9]), "+f"((d)[10]), "+f"((d)[11]),      \
        "+f"((d)[12]), "+f"((d)[13]), "+f"((d)[14]), "+f"((d)[15]), "+f"((d)[16]), "+f"((d)[17]),  \
        "+f"((d)[18]), "+f"((d)[19]), "+f"((d)[20]), "+f"((d)[21]), "+f"((d)[22]), "+f"((d)[23]),  \
        "+f"((d)[24]), "+f"((d)[25]), "+f"((d)[26]), "+f"((d)[27]), "+f"((d)[28]), "+f"((d)[29]),  \
        "+f"((d)[30]), "+f"((d)[31])
#define HOPPER_LIST_64                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HOPPER_REGISTERS_64(d)                                                                     \
    "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3]), "+f"((d)[4]), "+f"((d)[5]),            \
        "+f"((d)[6]), "+f"((d)[7]), "+f"((d)[8]), "+f"((d)[9]), "+f"((d)[10]), "+f"((d)[11]),      \
        "+f"((d)[12]), "+f"((d)[13]), "+f"((d)[14]), "+f"((d)[15]), "+f"((d)[16]), "+f"((d)[17]),  \
        "+f"((d)[18]), "+f"((d)[19]), "+f"((d)[20]), "+f"((d)[21]), "+f"((d)[22]), "+f"((d)[23]),  \
        "+f"((d)[24]), "+f"((d)[25]), "+f"((d)[26]), "+f"((d)[27]), "+f"((d)[28]), "+f"((d)[29]),  \
        "+f"((d)[30]), "+f"((d)[31]), "+f"((d)[32]), "+f"((d)[33]), "+f"((d)[34]), "+f"((d)[35]),  \
        "+f"((d)[36]), "+f"((d)[37]), "+f"((d)[38]), "+f"((d)[39]), "+f"((d)[40]), "+f"((d)[41]),  \
        "+f"((d)[42]), "+f"((d)[43]), "+f"((d)[44]), "+f"((d)[45]), "+f"((d)[46]), "+f"((d)[47]),  \
        "+f"((d)[48]), "+f"((d)[49]), "+f"((d)[50]), "+f"((d)[51]), "+f"((d)[52]), "+f"((d)[53]),  \
        "+f"((d)[54]), "+f"((d)[55]), "+f"((d)[56]), "+f"((d)[57]), "+f"((d)[58]), "+f"((d)[59]),  \
        "+f"((d)[60]), "+f"((d)[61]), "+f"((d)[62]), "+f"((d)[63])

/* d += or = a b for the 64 rows of a warpgroup, 16 channels deep, fp32 from elements of type T;
 * d[4 j + 2 r + e] is row 16 warp + lane / 4 + 8 r, column 8 j + 2 (lane % 4) + e. a: a matrix
 * [64, 16] in shared memory, or in registers as two elements each (rows lane / 4 and + 8; channels
 * 2 (lane % 4) and, for a[2] and a[3], 8 more). b: [columns, 16] in shared memory, or with `across`
 * [16, columns]. */
#define HOPPER_PRODUCTS(T, type, n, count, r0, r1, r2, r3, r4, r5, r6)                             \
    template <bool across>                                                                         \
    __device__ __forceinline__ void product(float(&d)[count], uint64_t a, uint64_t b, bool add,    \
                                            T) {                                                   \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r2 ", 0;\n"                             \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " "           \
                     "{" HOPPER_LIST_##count "}, %" #r0 ", %" #r1 ", p, 1, 1, 0, %" #r3 ";\n}"     \
                     : HOPPER_REGISTERS_##count(d)                                                 \
                     : "l"(a), "l"(b), "r"((int)add), "n"(across ? 1 : 0)                          \
                     : "memory");                                                                  \
    }                                                                                              \
    template <bool across>                                                                         \
    __device__ __forceinline__ void product(float(&d)[count], const uint32_t(&a)[4], uint64_t b,   \
                                            bool add, T) {                                         \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #r5 ", 0;\n"                             \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " "           \
                     "{" HOPPER_LIST_##count "}, {%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, "       \
                                             "%" #r4 ", p, 1, 1, %" #r6 ";\n}"                     \
                     : HOPPER_REGISTERS_##count(d)                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),          \
                       "n"(across ? 1 : 0)                                                         \
                     : "memory");                                                                  \
    }
HOPPER_PRODUCTS(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
HOPPER_PRODUCTS(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
HOPPER_PRODUCTS(__half, "f16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
HOPPER_PRODUCTS(__half, "f16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
#undef HOPPER_PRODUCTS
#endif /* TRIL_CUDA_EMULATED */

/* A matrix of a product in a tile: 128-byte swizzle, groups of 8 rows 1024 bytes apart; `halves`:
 * bytes between the tile's halves of 64 channels (looked at only where columns are channels). */
__device__ __forceinline__ uint64_t product_matrix(const void *p, unsigned halves) {
    uint64_t address = (shared_address(p) & 0x3ffff) >> 4;
    return address | (uint64_t)(halves >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

/* Two elements as one register: `low` at the lower address. */
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *(uint32_t *)&v;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
    __half2 v = __floats2half2_rn(low, high);
    return *(uint32_t *)&v;
}

/* ------------------------------------------------------------------ host */

/* The map of a tensor [rows, heads, width] (2-byte elements) for boxes of 64 channels, one head and
 * `box` rows. False where it cannot be made. hopper.cu */
bool tensor_map_make(CUtensorMap *map, const struct tensor *t, int box);

#endif
