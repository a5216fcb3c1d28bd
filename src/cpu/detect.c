/* Which level this machine can run. A processor's feature bit is not enough: the operating system
 * must save the wider registers when it switches threads (XCR0), and Linux hands out AMX's tile
 * registers only to a process that asks. (Intel SDM vol. 1, 13.5, 14.3 and 15.2-15.4; Linux
 * Documentation/arch/x86/xstate.rst.) */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"

#ifdef TRIL_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const char *const level_names[CPU_LEVEL_COUNT] = {"generic", "avx2", "avx512", "amx",
                                                         "emu512"};

const char *cpu_level_name(enum cpu_level level) {
    return (unsigned)level < CPU_LEVEL_COUNT ? level_names[level] : "unknown";
}

#ifdef TRIL_X86

/* The register sets that the OS saves: XCR0 (only where CPUID says OSXSAVE). */
static unsigned long long os_saved_state(void) {
    unsigned eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (unsigned long long)edx << 32 | eax;
}

enum {
    STATE_SSE = 1 << 1,
    STATE_AVX = 1 << 2,
    STATE_AVX512 = 7 << 5, /* masks, upper halves of 0-15, registers 16-31 */
    STATE_AMX = 3 << 17    /* tile configuration, tile data */
};

static bool amx_permitted(void) {
    enum { REQUEST_PERMISSION = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static bool has(unsigned word, int bit) {
    return word >> bit & 1;
}

static enum cpu_level detect(void) {
    unsigned a, b, c, d, c1, b7, c7, d7;
    if (!__get_cpuid(1, &a, &b, &c1, &d))
        return CPU_GENERIC;
    if (!has(c1, 27) /* OSXSAVE */ || !has(c1, 28) /* AVX */ || !has(c1, 12) /* FMA */ ||
        !has(c1, 29) /* F16C */)
        return CPU_GENERIC;
    unsigned long long state = os_saved_state();
    if ((state & (STATE_SSE | STATE_AVX)) != (STATE_SSE | STATE_AVX))
        return CPU_GENERIC;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !has(b7, 5) /* AVX2 */)
        return CPU_GENERIC;
    if ((state & STATE_AVX512) != STATE_AVX512 || !has(b7, 16) /* F */ || !has(b7, 17) /* DQ */ ||
        !has(b7, 30) /* BW */ || !has(b7, 31) /* VL */)
        return CPU_AVX2;
    unsigned a71;
    if ((state & STATE_AMX) != STATE_AMX || !has(c7, 11) /* VNNI */ ||
        !has(d7, 22) /* AMX_BF16 */ || !has(d7, 24) /* AMX_TILE */ ||
        !__get_cpuid_count(7, 1, &a71, &b, &c, &d) || !has(a71, 5) /* AVX512_BF16 */)
        return CPU_AVX512;
    return amx_permitted() ? CPU_AMX : CPU_AVX512;
}

#else

static enum cpu_level detect(void) {
    return CPU_GENERIC;
}

#endif

static pthread_once_t once = PTHREAD_ONCE_INIT;
static enum cpu_level available, requested, active;

static void choose(void) {
    available = detect();
    requested = active = available;
    const char *asked = getenv("TRIL_CPU");
    if (!asked || !*asked)
        return;
    int level = 0;
    while (level < CPU_LEVEL_COUNT && strcmp(asked, level_names[level]) != 0)
        level++;
    if (level == CPU_LEVEL_COUNT) {
        fprintf(stderr, "tril: TRIL_CPU=%s is not a level (generic, avx2, avx512, amx): using %s\n",
                asked, level_names[available]);
        return;
    }
    requested = (enum cpu_level)level;
    bool emulated = false;
#ifdef TRIL_EMULATE_512
    emulated = requested == CPU_EMU512 && available >= CPU_AVX2;
#endif
    if (requested <= available || emulated)
        active = requested;
    else
        fprintf(stderr, "tril: TRIL_CPU=%s asks for more than %s: using %s\n", asked,
                requested == CPU_EMU512 ? "this build has" : "this machine has",
                level_names[available]);
}

enum cpu_level cpu_level_available(void) {
    pthread_once(&once, choose);
    return available;
}

enum cpu_level cpu_level_requested(void) {
    pthread_once(&once, choose);
    return requested;
}

enum cpu_level cpu_level_active(void) {
    pthread_once(&once, choose);
    return active;
}

bool cpu_level_supported(enum cpu_level level) {
#ifdef TRIL_EMULATE_512
    if (level == CPU_EMU512)
        return cpu_level_available() >= CPU_AVX2;
#endif
    return level <= cpu_level_available();
}
