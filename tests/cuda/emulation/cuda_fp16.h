/* fp16 on the emulated GPU: conversions only, as cuda_bf16.h. */
#ifndef EMULATION_CUDA_FP16_H
#define EMULATION_CUDA_FP16_H

#include "cuda_runtime.h"

extern "C" {
#include "base/dtype.h"
}

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
static inline __half __float2half_rn(float f) {
    return {f32_to_f16(f)};
}
static inline float __half2float(__half h) {
    return f16_to_f32(h.bits);
}
static inline __half2 __floats2half2_rn(float x, float y) {
    return {{f32_to_f16(x)}, {f32_to_f16(y)}};
}
static inline float2 __half22float2(__half2 h) {
    return {f16_to_f32(h.x.bits), f16_to_f32(h.y.bits)};
}

#endif
