/* The activations of ops.h, of one fp32 value. */
#ifndef CUDA_ACTIVATE_CUH
#define CUDA_ACTIVATE_CUH

#include "cuda/launch.cuh"

__device__ __forceinline__ float activate(enum activation a, float x) {
    switch (a) {
    case ACT_RELU:
        return fmaxf(x, 0.0f);
    case ACT_GELU_ERF:
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case ACT_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case ACT_SILU:
        return x / (1.0f + expf(-x));
    default:
        return x;
    }
}

#endif
