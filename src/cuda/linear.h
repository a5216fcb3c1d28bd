/* What the backend's frame needs of linear.cu: cuBLASLt's handle and the plans chosen with it. */
#ifndef CUDA_LINEAR_H
#define CUDA_LINEAR_H

#include "cuda/launch.cuh"

tril_status linear_open(struct cuda_state *c, struct tril_error *err);
void linear_close(struct cuda_state *c);

#endif
