/* The loops behind cpu/probe.h: multiply-adds in registers, and reading memory. */
#include "cpu/kernels/probe.h"

#include "cpu/kernels/simd.h"

/* Enough independent sums to hide the latency of two FMA units (4 to 5 cycles each). */
enum { SUMS = 12 };

double LEVEL(probe_fma)(int64_t rounds) {
    vf sum[SUMS], a = vf_set(1.0000001f), b = vf_set(1e-9f), total = vf_set(0);
    for (int i = 0; i < SUMS; i++)
        sum[i] = vf_set((float)i);
    for (int64_t r = 0; r < rounds; r++) /* in order: floating point is not reassociated */
        for (int i = 0; i < SUMS; i++)
            sum[i] = vf_fma(sum[i], a, b);
    for (int i = 0; i < SUMS; i++)
        total += sum[i];
    volatile float keep = vf_sum(total);
    (void)keep;
    return 2.0 * VF_WIDTH * SUMS * (double)rounds;
}

/* `streams` parts of the buffer are read side by side: what is fastest differs by processor. */
float LEVEL(probe_read)(const float *p, int64_t n, int streams) {
    int64_t part = n / streams / (4 * VF_WIDTH) * (4 * VF_WIDTH);
    vf sum[4] = {vf_set(0), vf_set(0), vf_set(0), vf_set(0)};
    for (int64_t i = 0; i < part; i += 4 * VF_WIDTH)
        for (int s = 0; s < streams; s++) {
            const float *at = p + s * part + i;
            for (int k = 0; k < 4; k++)
                sum[k] += vf_load(at + k * VF_WIDTH);
        }
    return vf_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
