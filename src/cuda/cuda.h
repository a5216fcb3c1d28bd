/* The CUDA backend: every operation of the table on an NVIDIA GPU.
 *
 * One .cu for an operation or a family, named as in src/ops; kernel_list.inc says which it serves.
 * What has no kernel runs through the host's reference (ops/host_fallback.h): slowly, but rightly.
 * Only src/api includes this header. docs/cuda.md is the map. */
#ifndef CUDA_CUDA_H
#define CUDA_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "ops/ops.h"

struct cuda_device {
    char name[128];
    int major, minor;     /* compute capability */
    int processors;       /* streaming multiprocessors */
    int64_t memory, free; /* bytes */
    int driver, runtime;  /* CUDA versions: 1000 * major + 10 * minor */
};

/* The GPU that --device cuda means (the first visible one: CUDA_VISIBLE_DEVICES chooses).
 * ERR_UNSUPPORTED with one sentence where there is none, or its driver is too old. */
tril_status cuda_device_get(struct cuda_device *out, struct tril_error *err);

/* What the products of a context's linear layers may round beyond their contract (nothing, when a
 * context opens): `tf32`: the factors of fp32 products to TF32's 11 significant bits; `bias`:
 * biases to the dtype of a 16-bit output, and GELU as cuBLASLt approximates it, which saves a pass
 * over the output. */
void cuda_rounding(struct op_context *ctx, bool tf32, bool bias);

/* The backend; the same pointer on every call. Using it needs cuda_device_get to succeed: opening
 * an op context with it says why not. */
const struct backend *backend_cuda(void);

#ifdef __cplusplus
}
#endif

#endif
