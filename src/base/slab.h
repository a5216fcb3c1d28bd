/* Slabs: many long-lived blocks in few large stretches of memory, so that 2 MB pages serve blocks
 * which are too small for one of their own. Reading a model's weights is then faster by a few per
 * cent (docs/benchmarks.md). Any thread may call. */
#ifndef BASE_SLAB_H
#define BASE_SLAB_H

#include <stddef.h>

#include "base/error.h"

struct slab;

/* A block of `bytes`, 64-byte aligned, uninitialised, in *slab; `what` is named in the message of a
 * failure. */
tril_status slab_alloc(struct slab **slab, void **out, size_t bytes, const char *what,
                       struct tril_error *err);
/* Gives one block of the slab back; its memory goes with the last one. NULL is fine. */
void slab_release(struct slab *slab);

#endif
