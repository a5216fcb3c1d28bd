/* Sums of exponentials of a row of logits. */
#ifndef CPU_KERNELS_SOFTMAX_H
#define CPU_KERNELS_SOFTMAX_H

#include "cpu/kernels/loops.h"

/* Of exp(x - maximum), n of them from `at` on. A NaN comes out. */
SIMD float exp_sum(const void *x, enum dtype t, int64_t at, int64_t n, float maximum) {
    vf m = vf_set(maximum), s[2] = {vf_zero(), vf_zero()};
    int64_t i = 0;
    for (; i + 2 * VF_WIDTH <= n; i += 2 * VF_WIDTH) {
        for (int k = 0; k < 2; k++)
            s[k] += vf_exp(vf_load_as(x, t, at + i + k * VF_WIDTH, VF_WIDTH) - m);
    }
    VF_FOR(j, i, n, {
        vf e = vf_exp(vf_load_as(x, t, at + j, lanes) - m);
        if (lanes < VF_WIDTH)
            e = vf_select(vi_first(lanes), e, vf_zero());
        s[0] += e;
    });
    return vf_sum(s[0] + s[1]);
}

#endif
