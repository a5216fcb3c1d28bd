/* Number formats: names, sizes, and the scalar conversions that every room shares. */
#ifndef BASE_DTYPE_H
#define BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum dtype {
    DT_F32,
    DT_BF16, /* upper half of an fp32 */
    DT_F16,
    DT_F64,
    DT_I8,
    DT_U8,
    DT_I16,
    DT_U16,
    DT_I32,
    DT_U32,
    DT_I64,
    DT_U64,
    DT_BOOL,
    DT_COUNT
};

/* Bytes of one element; 0 for an unknown dtype. */
size_t dtype_size(enum dtype t);
/* "fp32", "bf16", "fp16", "i32", ... as the command line spells them. */
const char *dtype_name(enum dtype t);
/* As safetensors spells them: "F32", "BF16", "F16", ... */
const char *dtype_safetensors_name(enum dtype t);
/* Accepts either spelling and "float32", "bfloat16", "float16"; false if unknown. */
bool dtype_parse(const char *name, enum dtype *out);

static inline float bf16_to_f32(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Round to nearest even; NaN stays NaN (quiet), infinities stay. Without a branch, so that the
 * compiler makes vectors of loops over it. */
static inline uint16_t f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint32_t nan = 0u - (uint32_t)((bits & 0x7fffffffu) > 0x7f800000u);
    uint32_t quiet = (bits >> 16) | 0x40u;
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((quiet & nan) | (rounded & ~nan));
}

float f16_to_f32(uint16_t x);
uint16_t f32_to_f16(float f); /* round to nearest even, subnormals kept, overflow to infinity */

/* Converts n elements between float dtypes (F32, BF16, F16, F64). The buffers must not overlap
 * unless they are the same buffer with the same dtype. */
void dtype_convert(void *dst, enum dtype dst_type, const void *src, enum dtype src_type, size_t n);

#endif
