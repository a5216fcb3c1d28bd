/* What every .cu of the backend begins with: tril's headers seen from C++, the state behind an op
 * context, checked runtime calls, and launching a kernel.
 *
 * An operation is a function OP_FN(name) of the table's type. It reads the tensors' shapes and
 * strides, never their data (that lies on the GPU; integers too: offsets and lengths are the
 * kernel's to read), launches on the context's stream and returns; it does not wait and does not
 * allocate (op_scratch gives device memory, and must be asked before the first launch that uses
 * it). Sums are made in an order that depends on the sizes only: no floating-point atomics. */
#ifndef CUDA_LAUNCH_CUH
#define CUDA_LAUNCH_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {
#include "base/error.h"
#include "ops/ops.h"
}

/* OP_FN(rmsnorm_forward) { ... }: row `rmsnorm_forward` of kernel_list.inc. */
#define OP_FN(name)                                                                                \
    extern "C" tril_status cuda_##name(struct op_context *ctx, const struct tensor *args,          \
                                       const void *params, struct tril_error *err)

struct cuda_state {              /* op_context.stream points to it */
    cudaStream_t stream, copies; /* the operations'; copies beside them (backend.cu) */
    cudaEvent_t copy_ready, copy_done[COPY_MARKS];
    int processors;          /* streaming multiprocessors */
    int capability;          /* 80, 89, 90, 100 */
    int shared_most;         /* bytes of dynamic shared memory that a block may ask for */
    void *blas;              /* cuBLASLt's functions, handle, workspace: blas.cu */
    void *blas_plans;        /* chosen algorithms by shape: blas.cu */
    bool tf32;               /* products of fp32 may round their factors to TF32 */
    bool round_bias;         /* biases may be rounded to a 16-bit output's dtype: linear.cu */
    struct staging *staging; /* pinned memory for uploads: backend.cu */
    bool recording;          /* launches go into a graph */
};

static inline struct cuda_state *cuda_state_of(const struct op_context *ctx) {
    return (struct cuda_state *)ctx->stream;
}

/* A status and a sentence for a failed runtime call: "rmsnorm_forward: CUDA says ...". */
tril_status cuda_failed(cudaError_t e, const char *what, struct tril_error *err);

static inline tril_status cuda_check(cudaError_t e, const char *what, struct tril_error *err) {
    return e == cudaSuccess ? TRIL_OK : cuda_failed(e, what, err);
}

/* Returns from the function on failure (launchers own nothing that would need to be released). */
#define CUDA_TRY(call)                                                                             \
    do {                                                                                           \
        tril_status status_ = (call);                                                              \
        if (status_ != TRIL_OK)                                                                    \
            return status_;                                                                        \
    } while (0)

/* A block's dynamic shared memory, 1024-byte aligned, as `T *name`. */
#ifdef TRIL_CUDA_EMULATED
#define CUDA_SHARED(T, name) T *name = (T *)emulated_shared()
#else
#define CUDA_SHARED(T, name)                                                                       \
    extern __shared__ __align__(1024) unsigned char cuda_shared_memory[];                          \
    T *name = (T *)cuda_shared_memory
#endif

/* Launches kernel<<<grid, block, shared>>>(args...) on the context's stream; nothing if the grid is
 * empty, or only scratch is asked about. `name` begins the message of a failure. Grids: x below
 * 2^31, y and z below 2^16. */
template <typename... P, typename... A>
static inline tril_status cuda_launch(struct op_context *ctx, const char *name,
                                      struct tril_error *err, void (*kernel)(P...), dim3 grid,
                                      dim3 block, size_t shared, A... args) {
    if (ctx->measuring || grid.x == 0 || grid.y == 0 || grid.z == 0)
        return TRIL_OK;
    cudaStream_t stream = cuda_state_of(ctx)->stream;
#ifdef TRIL_CUDA_EMULATED
    (void)err;
    emulated_launch(grid, block, shared, stream, name, [=] { kernel((P)args...); });
    return TRIL_OK;
#else
    if (shared > 48 << 10)
        CUDA_TRY(cuda_check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
            name, err));
    kernel<<<grid, block, shared, stream>>>((P)args...);
    return cuda_check(cudaGetLastError(), name, err);
#endif
}

/* Blocks of `size` that cover n, for the x of a grid. */
static inline unsigned cuda_blocks(int64_t n, int64_t size) {
    return (unsigned)((n + size - 1) / size);
}

/* Scratch of the context (device memory, 256-byte aligned), cast; fails with a sentence. */
template <typename T>
static inline tril_status cuda_scratch(struct op_context *ctx, const char *name, int64_t bytes,
                                       T **out, struct tril_error *err) {
    *out = (T *)op_scratch(ctx, bytes);
    return *out ? TRIL_OK : op_scratch_error(ctx, name, bytes, err);
}

#endif
