/* The CPU backend: the reference backend's table, overridden by the kernels of the active level. */
#include <pthread.h>

#include "cpu/cpu.h"

typedef void register_fn(struct backend *);

/* kernels/register.c, once per level. */
register_fn register_kernels_generic, register_kernels_avx2, register_kernels_avx512,
    register_kernels_amx, register_kernels_emu512;

static register_fn *const levels[CPU_LEVEL_COUNT] = {
    [CPU_GENERIC] = register_kernels_generic,
#ifdef TRIL_X86
    [CPU_AVX2] = register_kernels_avx2,       [CPU_AVX512] = register_kernels_avx512,
    [CPU_AMX] = register_kernels_amx,
#endif
#ifdef TRIL_EMULATE_512
    [CPU_EMU512] = register_kernels_emu512,
#endif
};

static struct backend cpu;

static void fill(void) {
    cpu = *backend_reference();
    cpu.name = "cpu";
    levels[cpu_level_active()](&cpu);
}

const struct backend *backend_cpu(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, fill);
    return &cpu;
}
