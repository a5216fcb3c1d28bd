/* The part of the CUDA runtime and of its device functions that tril uses, on the emulated GPU
 * (emulator.h). */
#ifndef EMULATION_CUDA_RUNTIME_H
#define EMULATION_CUDA_RUNTIME_H

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using dim3 = emulated_dim;
#define threadIdx emulated_thread
#define blockIdx emulated_block
#define blockDim emulated_block_size
#define gridDim emulated_grid_size
static const int warpSize = 32;

#define VECTOR(T, name, bytes)                                                                     \
    struct alignas(2 * sizeof(T)) name##2 {                                                        \
        T x, y;                                                                                    \
    };                                                                                             \
    struct alignas(bytes) name##4 {                                                                \
        T x, y, z, w;                                                                              \
    };                                                                                             \
    static inline name##2 make_##name##2(T x, T y) {                                               \
        return {x, y};                                                                             \
    }                                                                                              \
    static inline name##4 make_##name##4(T x, T y, T z, T w) {                                     \
        return {x, y, z, w};                                                                       \
    }
VECTOR(float, float, 16)
VECTOR(double, double, 16)
VECTOR(int, int, 16)
VECTOR(unsigned, uint, 16)
VECTOR(unsigned short, ushort, 8)
#undef VECTOR

/* ------------------------------------------------------------------ barriers, warps */

static inline void __syncthreads() {
    emulated_barrier("__syncthreads");
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
    char nothing = 0;
    emulated_exchange(mask, &nothing, 1, "__syncwarp", nullptr, true);
}
template <typename T>
static inline T emulated_from(unsigned mask, T value, unsigned lane, bool inside,
                              const char *what) {
    const unsigned char *all = emulated_exchange(mask, &value, sizeof value, what);
    if (!inside)
        return value;
    if (!(mask >> lane & 1))
        emulated_fault("%s reads lane %u, which is not in its mask %08x", what, lane, mask);
    T out;
    memcpy(&out, all + lane * 64, sizeof out);
    return out;
}
template <typename T>
static inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
    unsigned base = emulated_lane() / (unsigned)width * (unsigned)width;
    return emulated_from(mask, v, base + (unsigned)lane % (unsigned)width, true, "__shfl_sync");
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
    (void)width;
    return emulated_from(mask, v, emulated_lane() ^ (unsigned)bits, true, "__shfl_xor_sync");
}
template <typename T>
static inline T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32) {
    unsigned at = emulated_lane() % (unsigned)width + d;
    return emulated_from(mask, v, emulated_lane() + d, at < (unsigned)width, "__shfl_down_sync");
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32) {
    unsigned at = emulated_lane() % (unsigned)width;
    return emulated_from(mask, v, emulated_lane() - d, at >= d, "__shfl_up_sync");
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const unsigned char *all =
        emulated_exchange(mask, &predicate, sizeof predicate, "__ballot_sync");
    unsigned out = 0;
    for (unsigned l = 0; l < 32; l++) {
        int p = 0;
        if (mask >> l & 1)
            memcpy(&p, all + l * 64, sizeof p);
        out |= (unsigned)(p != 0) << l;
    }
    return out;
}
static inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
static inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}
int emulated_count_all(int predicate); /* over the block */
static inline int __syncthreads_count(int predicate) {
    return emulated_count_all(predicate != 0);
}
static inline int __syncthreads_or(int predicate) {
    return __syncthreads_count(predicate) != 0;
}
static inline int __syncthreads_and(int predicate) {
    return __syncthreads_count(predicate) == (int)(blockDim.x * blockDim.y * blockDim.z);
}

/* ------------------------------------------------------------------ memory */

/* Atomics order nothing but themselves, as on a GPU; fences order, and both sides need one. */
static inline void __threadfence() {
    static char order;
    emulated_order(&order, false);
    emulated_order(&order, true);
}
static inline void __threadfence_block() {
    __threadfence();
}
template <typename T>
static inline T __ldg(const T *p) {
    return *p;
}
template <typename T, typename F>
static inline T emulated_atomic(T *p, F change) { /* (fibers do not preempt each other) */
    T old, now;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    now = change(old);
    __atomic_store(p, &now, __ATOMIC_RELAXED);
    emulated_progress();
    return old;
}
template <typename T>
static inline T emulated_add(T *p, T v) {
    return emulated_atomic(p, [v](T old) { return old + v; });
}
static inline float atomicAdd(float *p, float v) {
    return emulated_add(p, v);
}
static inline double atomicAdd(double *p, double v) {
    return emulated_add(p, v);
}
static inline int atomicAdd(int *p, int v) {
    return emulated_add(p, v);
}
static inline unsigned atomicAdd(unsigned *p, unsigned v) {
    return emulated_add(p, v);
}
static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long v) {
    return emulated_add(p, v);
}
static inline int atomicMax(int *p, int v) {
    return emulated_atomic(p, [v](int old) { return old > v ? old : v; });
}
static inline unsigned atomicInc(unsigned *p, unsigned most) {
    return emulated_atomic(p, [most](unsigned old) { return old >= most ? 0 : old + 1; });
}

/* ------------------------------------------------------------------ arithmetic */

#define __expf expf
#define __logf logf
#define __log2f log2f
static inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
static inline double rsqrt(double x) {
    return 1.0 / sqrt(x);
}
static inline float __frcp_rn(float x) {
    return 1.0f / x;
}
static inline float __fdividef(float a, float b) {
    return a / b;
}
static inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
static inline float __fmul_rn(float a, float b) {
    return a * b;
}
static inline float __fadd_rn(float a, float b) {
    return a + b;
}
static inline float __int_as_float(int x) {
    float f;
    memcpy(&f, &x, sizeof f);
    return f;
}
static inline int __float_as_int(float f) {
    int x;
    memcpy(&x, &f, sizeof x);
    return x;
}
static inline float __uint_as_float(unsigned x) {
    return __int_as_float((int)x);
}
static inline unsigned __float_as_uint(float f) {
    return (unsigned)__float_as_int(f);
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
static inline int __clz(int x) {
    return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __clzll(long long x) {
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}
#define EMULATED_MIN_MAX(T)                                                                        \
    static inline T min(T a, T b) {                                                                \
        return a < b ? a : b;                                                                      \
    }                                                                                              \
    static inline T max(T a, T b) {                                                                \
        return a > b ? a : b;                                                                      \
    }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(float)
EMULATED_MIN_MAX(double)

/* ------------------------------------------------------------------ the runtime */

#define CUDART_VERSION 13000

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorStreamCaptureUnjoined = 904
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrL2CacheSize = 38
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaEventDefault = 0 };
enum { cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
typedef struct emulated_stream *cudaStream_t;
typedef struct emulated_event *cudaEvent_t;
typedef struct emulated_graph *cudaGraph_t;
typedef struct emulated_graph *cudaGraphExec_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
};

const char *cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int device);
cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
cudaError_t cudaMalloc(void **, size_t);
cudaError_t cudaFree(void *);
cudaError_t cudaMallocHost(void **, size_t);
cudaError_t cudaHostAlloc(void **, size_t, unsigned flags);
cudaError_t cudaHostGetDevicePointer(void **, void *host, unsigned flags);
cudaError_t cudaFreeHost(void *);
cudaError_t cudaMemcpyAsync(void *, const void *, size_t, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);
template <typename F>
static inline cudaError_t cudaFuncSetAttribute(F *, cudaFuncAttribute, int) {
    return cudaSuccess;
}

#endif
