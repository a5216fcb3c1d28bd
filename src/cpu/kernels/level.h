/* What a kernel file needs to be compiled once per instruction-set level: names with the level's
 * suffix, and which instructions it may use.
 *
 *   static tril_status thing_forward(struct op_context *ctx, const struct tensor *args, ...) {...}
 *   void LEVEL(register_things)(struct backend *b) { b->table[OP_THING_FORWARD] = thing_forward; }
 *
 * Everything else in a kernel file is static (the files of all levels are linked together).
 *
 *   level     VF_WIDTH   macros defined to 1 (else 0)
 *   generic   4          -
 *   avx2      8          SIMD_AVX2
 *   avx512    16         SIMD_AVX2, SIMD_AVX512
 *   amx       16         SIMD_AVX2, SIMD_AVX512, SIMD_AVX512_BF16, SIMD_AMX
 *   emu512    16         SIMD_EMULATED  (vectors of 16 on a machine with AVX2: the compiler halves
 * them)
 */
#ifndef CPU_KERNELS_LEVEL_H
#define CPU_KERNELS_LEVEL_H

#include "ops/ops.h"

#define LEVEL_PASTE2(name, level) name##_##level
#define LEVEL_PASTE(name, level) LEVEL_PASTE2(name, level)
#define LEVEL(name) LEVEL_PASTE(name, TRIL_LEVEL)

#ifdef TRIL_LEVEL_EMU512
#define SIMD_EMULATED 1
#define SIMD_AVX2 0
#else
#define SIMD_EMULATED 0
#if defined(TRIL_LEVEL_AVX2) || defined(TRIL_LEVEL_AVX512) || defined(TRIL_LEVEL_AMX)
#define SIMD_AVX2 1
#else
#define SIMD_AVX2 0
#endif
#endif

#if defined(TRIL_LEVEL_AVX512) || defined(TRIL_LEVEL_AMX)
#define SIMD_AVX512 1
#else
#define SIMD_AVX512 0
#endif

#ifdef TRIL_LEVEL_AMX
#define SIMD_AVX512_BF16 1
#define SIMD_AMX 1
#else
#define SIMD_AVX512_BF16 0
#define SIMD_AMX 0
#endif

#define KERNELS(name) void LEVEL(register_##name)(struct backend *);
#include "cpu/kernel_list.inc"
#undef KERNELS
void LEVEL(register_kernels)(struct backend *);

#endif
