/* The machine's own limits, measured: what every benchmark's fractions are fractions of. */
#ifndef CPU_PROBE_H
#define CPU_PROBE_H

#include "base/dtype.h"

/* Floating-point operations per second of `threads` threads that do nothing but multiply-add in
 * registers (a multiply-add counts two), the best of several tries: AMX tile products for bf16
 * where the active level has them, else fp32 FMA (bf16 is then storage only). Takes about 0.15 s.
 */
double cpu_probe_peak_flops(enum dtype t, int threads);

/* Bytes per second at which `threads` threads read a buffer of 1 GB (256 MB on machines with less
 * than 4 GB), the best of several passes of several forms of loop. Takes about a second; 0 when the
 * buffer cannot be had. */
double cpu_probe_bandwidth(int threads);

#endif
