/* One level's probing loops. */
#ifndef CPU_KERNELS_PROBE_H
#define CPU_KERNELS_PROBE_H

#include "cpu/kernels/level.h"

/* Multiply-adds in registers; returns the floating-point operations done. */
double LEVEL(probe_fma)(int64_t rounds);
/* The same with AMX's products of bf16 tiles; levels without them have probe_fma in its place. */
double LEVEL(probe_bf16)(int64_t rounds);
/* Reads n floats as `streams` (1 to 8) parallel streams; returns their sum, so that they are read.
 */
float LEVEL(probe_read)(const float *p, int64_t n, int streams);

#endif
