/* All kernels of one level, in the order of kernel_list.inc. */
#include "cpu/kernels/level.h"

void LEVEL(register_kernels)(struct backend *b) {
    (void)b;
#define KERNELS(name) LEVEL(register_##name)(b);
#include "cpu/kernel_list.inc"
#undef KERNELS
}
