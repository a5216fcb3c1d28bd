/* The fast CPU backend: which instruction-set level runs, and the backend that uses it.
 *
 * Kernels (the *.c of src/cpu/kernels) are one body each over kernels/simd.h, compiled once per
 * level with a suffix; backend.c fills its table with the references and then lets the chosen
 * level's registration functions (kernel_list.inc) override what they do better. */
#ifndef CPU_CPU_H
#define CPU_CPU_H

#include <stdbool.h>

#include "ops/ops.h"

enum cpu_level {
    CPU_GENERIC, /* any processor: vectors of 4, as the compiler lowers them */
    CPU_AVX2,    /* AVX2, FMA, F16C */
    CPU_AVX512,  /* AVX-512 F, BW, DQ, VL */
    CPU_AMX,     /* AVX-512, its BF16 and VNNI, and AMX tiles with bf16 products */
    CPU_EMU512,  /* for tests: the 16-wide bodies of avx512, lowered by the compiler to AVX2 */
    CPU_LEVEL_COUNT
};

/* "generic", "avx2", "avx512", "amx", "emu512": as TRIL_CPU spells them. */
const char *cpu_level_name(enum cpu_level level);

/* The highest level that the processor has, the operating system has enabled and this build
 * contains (never CPU_EMU512). The first call may ask the kernel for permission to use AMX. */
enum cpu_level cpu_level_available(void);

/* What the environment's TRIL_CPU asks for; cpu_level_available() if it is unset or unknown. A test
 * that wants a level calls cpu_level_supported(cpu_level_requested()) to know whether to skip. */
enum cpu_level cpu_level_requested(void);

/* Whether kernels of this level can run here: at most the available level, and for CPU_EMU512 also
 * built in. */
bool cpu_level_supported(enum cpu_level level);

/* The level in use: the requested one, or the available one where more was requested than the
 * machine has (said once, on stderr). Fixed at the first call. */
enum cpu_level cpu_level_active(void);

/* The CPU backend at cpu_level_active(). The same pointer on every call; never NULL. */
const struct backend *backend_cpu(void);

#endif
