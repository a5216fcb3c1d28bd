/* Copying runs of elements with conversion between float dtypes. */
#ifndef CPU_KERNELS_CONVERT_H
#define CPU_KERNELS_CONVERT_H

#include "cpu/kernels/loops.h"

/* y[0 .. n) = x[0 .. n) rounded to ty; the dtypes are constants after inlining. */
SIMD void convert_run(void *y, enum dtype ty, const void *x, enum dtype tx, int64_t n) {
    if (tx == ty) {
        memcpy(y, x, (size_t)n * dtype_size(tx));
        return;
    }
    VF_FOR(i, 0, n, vf_store_as(y, ty, i, vf_load_as(x, tx, i, lanes), lanes););
}

#endif
