/* The activations of ops.h and their slopes, of fp32 values.
 *
 * sigmoid uses __expf, whose relative error, about |z| 2^-24 + 2^-22, is what a rounding of z costs
 * as well. The tanh form of GELU is x sigmoid(2u), which keeps its relative accuracy where 1 + tanh
 * cancels. */
#ifndef CUDA_ACTIVATE_CUH
#define CUDA_ACTIVATE_CUH

#include "cuda/launch.cuh"

__device__ __forceinline__ float sigmoid(float z) {
    return __fdividef(1.0f, 1.0f + __expf(-z));
}
/* 2u of GELU's tanh form. */
__device__ __forceinline__ float gelu_argument(float x) {
    return x * (1.59576912160573071f + 0.0713548162726009f * x * x);
}

__device__ __forceinline__ float activate(enum activation a, float x) {
    switch (a) {
    case ACT_RELU:
        return x < 0.0f ? 0.0f : x; /* NaN stays NaN */
    case ACT_GELU_ERF:
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case ACT_GELU_TANH:
        return x * sigmoid(gelu_argument(x));
    case ACT_SILU:
        return x * sigmoid(x);
    default:
        return x;
    }
}

/* act'(x), with act(x) in *y. */
__device__ __forceinline__ float activate_slope(enum activation a, float x, float *y) {
    switch (a) {
    case ACT_RELU:
        *y = x < 0.0f ? 0.0f : x;
        return x > 0.0f ? 1.0f : x == x ? 0.0f : x;
    case ACT_GELU_ERF: {
        float phi = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
        *y = x * phi;
        return phi + x * 0.39894228040143268f * __expf(-0.5f * x * x);
    }
    case ACT_GELU_TANH: {
        float s = sigmoid(gelu_argument(x));
        *y = x * s;
        return s + *y * (1.0f - s) * (1.59576912160573071f + 0.2140644488178027f * x * x);
    }
    case ACT_SILU: {
        float s = sigmoid(x);
        *y = x * s;
        return s + *y * (1.0f - s);
    }
    default:
        *y = x;
        return 1.0f;
    }
}

#endif
