/* The machine's own limits, measured: what every benchmark's fractions are fractions of. */
#ifndef CPU_PROBE_H
#define CPU_PROBE_H

#include "base/dtype.h"

/* Floating-point operations per second of `threads` threads that do nothing but multiply-add in
 * registers (a multiply-add counts two), the best of several tries: AMX tile products for bf16
 * where the active level has them, else fp32 FMA (bf16 is then storage only). Takes about 0.15 s.
 */
double cpu_probe_peak_flops(enum dtype t, int threads);

/* Reading memory: all threads read a buffer of 1 GB (256 MB on machines with less than 4 GB), in
 * the form of loop that was the fastest of several when it was opened. On a shared machine the rate
 * drifts, so a pass can be repeated next to whatever it is compared with. */
struct bandwidth_probe;
/* Takes about a second. NULL when the buffer cannot be had. */
struct bandwidth_probe *bandwidth_probe_open(void);
double bandwidth_probe_best(const struct bandwidth_probe *p);  /* bytes per second, of all passes */
double bandwidth_probe_pass(struct bandwidth_probe *p);        /* of one pass more (tens of ms) */
double bandwidth_probe_bytes(const struct bandwidth_probe *p); /* that it occupies */
void bandwidth_probe_close(struct bandwidth_probe *p);

#endif
