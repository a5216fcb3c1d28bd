/* Attention's other implementations, at one level (attention.c chooses among them and flash). */
#ifndef CPU_KERNELS_ATTENTION_IMPLEMENTATIONS_H
#define CPU_KERNELS_ATTENTION_IMPLEMENTATIONS_H

#include "cpu/kernels/level.h"

op_fn LEVEL(attention_fused_forward), LEVEL(attention_fused_backward);
op_fn LEVEL(attention_materialised_forward), LEVEL(attention_materialised_backward);

#endif
