/* bf16 on the emulated GPU: the conversions, and what arithmetic tril's kernels do in it (none but
 * through fp32). */
#ifndef EMULATION_CUDA_BF16_H
#define EMULATION_CUDA_BF16_H

#include "cuda_runtime.h"

extern "C" {
#include "base/dtype.h"
}

struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
static inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    return {f32_to_bf16(f)};
}
static inline __nv_bfloat16 __float2bfloat16(float f) {
    return {f32_to_bf16(f)};
}
static inline float __bfloat162float(__nv_bfloat16 b) {
    return bf16_to_f32(b.bits);
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {{f32_to_bf16(x)}, {f32_to_bf16(y)}};
}
static inline float2 __bfloat1622float2(__nv_bfloat162 b) {
    return {bf16_to_f32(b.x.bits), bf16_to_f32(b.y.bits)};
}

#endif
