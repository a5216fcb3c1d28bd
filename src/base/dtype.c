/* Names and sizes come from one table; fp16 is converted in software, so that the result is the
 * same on every machine (the fast paths live with the CPU kernels). */
#include "base/dtype.h"

static const struct {
    size_t size;
    const char *name, *safetensors, *alias;
} table[DT_COUNT] = {
    [DT_F32] = {4, "fp32", "F32", "float32"},   [DT_BF16] = {2, "bf16", "BF16", "bfloat16"},
    [DT_F16] = {2, "fp16", "F16", "float16"},   [DT_F64] = {8, "fp64", "F64", "float64"},
    [DT_I8] = {1, "i8", "I8", "int8"},          [DT_U8] = {1, "u8", "U8", "uint8"},
    [DT_I16] = {2, "i16", "I16", "int16"},      [DT_U16] = {2, "u16", "U16", "uint16"},
    [DT_I32] = {4, "i32", "I32", "int32"},      [DT_U32] = {4, "u32", "U32", "uint32"},
    [DT_I64] = {8, "i64", "I64", "int64"},      [DT_U64] = {8, "u64", "U64", "uint64"},
    [DT_BOOL] = {1, "bool", "BOOL", "boolean"},
};

size_t dtype_size(enum dtype t) {
    return (unsigned)t < DT_COUNT ? table[t].size : 0;
}

const char *dtype_name(enum dtype t) {
    return (unsigned)t < DT_COUNT ? table[t].name : "unknown";
}

const char *dtype_safetensors_name(enum dtype t) {
    return (unsigned)t < DT_COUNT ? table[t].safetensors : "unknown";
}

bool dtype_parse(const char *name, enum dtype *out) {
    if (!name)
        return false;
    for (int t = 0; t < DT_COUNT; t++) {
        if (strcmp(name, table[t].name) == 0 || strcmp(name, table[t].safetensors) == 0 ||
            strcmp(name, table[t].alias) == 0) {
            *out = (enum dtype)t;
            return true;
        }
    }
    return false;
}

static uint32_t f32_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static float f32_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

float f16_to_f32(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16, exponent = (x >> 10) & 0x1fu;
    uint32_t fraction = x & 0x3ffu;
    if (exponent == 0x1f) /* infinity, or NaN (made quiet) */
        return f32_from_bits(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0));
    if (exponent == 0) { /* zero, or a subnormal: fraction * 2^-24 is exact in fp32 */
        float f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    return f32_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t f32_to_f16(float f) {
    uint32_t bits = f32_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520 and up round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: adding 0.5 leaves f * 2^24, rounded, below */
        float shifted = f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (f32_bits(shifted) - 0x3f000000u));
    }
    magnitude += 0xfffu + ((magnitude >> 13) & 1u); /* to nearest, ties to even */
    return (uint16_t)(sign | ((magnitude - 0x38000000u) >> 13));
}

/* fp64 to fp32 rounded to odd: toward zero, with the last bit set if anything was lost. Rounding
 * that to 16 bits gives what rounding the fp64 once would (no double rounding). */
static float f64_to_f32_odd(double d) {
    float f = (float)d;
    if ((double)f == d || d != d)
        return f;
    uint32_t bits = f32_bits(f);
    if ((f < 0 ? -(double)f : (double)f) > (d < 0 ? -d : d))
        bits--;
    return f32_from_bits(bits | 1u);
}

static float load_f32(const void *src, enum dtype t, size_t i) {
    switch (t) {
    case DT_F32:
        return ((const float *)src)[i];
    case DT_BF16:
        return bf16_to_f32(((const uint16_t *)src)[i]);
    default:
        return f16_to_f32(((const uint16_t *)src)[i]);
    }
}

static void narrow_bf16(uint16_t *restrict dst, const float *restrict src, size_t n) {
    for (size_t i = 0; i < n; i++)
        dst[i] = f32_to_bf16(src[i]);
}

void dtype_convert(void *dst, enum dtype dst_type, const void *src, enum dtype src_type, size_t n) {
    if (dst_type == src_type) {
        if (dst != src && n > 0)
            memmove(dst, src, n * dtype_size(src_type));
        return;
    }
    const double *wide = src;
    if (dst_type == DT_BF16 && src_type == DT_F32) { /* loading weights: worth loops of their own */
        narrow_bf16(dst, src, n);
        return;
    }
    if (dst_type == DT_F32 && src_type == DT_BF16) {
        for (size_t i = 0; i < n; i++)
            ((float *)dst)[i] = bf16_to_f32(((const uint16_t *)src)[i]);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        if (dst_type == DT_F64) {
            ((double *)dst)[i] = load_f32(src, src_type, i);
        } else if (dst_type == DT_F32) {
            ((float *)dst)[i] = src_type == DT_F64 ? (float)wide[i] : load_f32(src, src_type, i);
        } else {
            float f = src_type == DT_F64 ? f64_to_f32_odd(wide[i]) : load_f32(src, src_type, i);
            ((uint16_t *)dst)[i] = dst_type == DT_BF16 ? f32_to_bf16(f) : f32_to_f16(f);
        }
    }
}
