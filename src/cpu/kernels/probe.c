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

#if SIMD_AMX
/* Four sums of 16 x 16 hide the latency of a product (52 cycles; one can start every 16). */
double LEVEL(probe_bf16)(int64_t rounds) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = 16;
    }
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 4 * 2.0 * 16 * 16 * 32 * (double)rounds;
}
#else
double LEVEL(probe_bf16)(int64_t rounds) {
    return LEVEL(probe_fma)(rounds);
}
#endif

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
