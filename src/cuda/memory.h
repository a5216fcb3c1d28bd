/* The GPU's memory, and pinned memory of the host: given out, taken back and counted. */
#ifndef CUDA_MEMORY_H
#define CUDA_MEMORY_H

#include "cuda/launch.cuh"

/* As the backend's functions of these names (ops.h). */
tril_status cuda_memory_alloc(void **out, int64_t bytes, bool zero, const char *what,
                              struct tril_error *err);
void cuda_memory_release(void *p);
tril_status cuda_host_alloc(void **out, int64_t bytes, bool zero, const char *what,
                            struct tril_error *err);
void cuda_host_release(void *p);
void cuda_memory_in_use(struct backend_memory *out);
void cuda_memory_reset(void);

#endif
