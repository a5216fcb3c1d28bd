/* Memory: checked sizes and arenas. Every allocation of tril that depends on input goes through
 * size_mul / size_add first; big families of buffers live in one arena each, sized at creation.
 *
 *   arena:  [pad][ block 0 ][red zone][ block 1 ][red zone] ...      blocks 64-byte aligned
 *
 * Red zones exist (and are poisoned) only under AddressSanitizer. */
#ifndef BASE_MEMORY_H
#define BASE_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define MEMORY_ALIGN 64

/* false on overflow; *out is then untouched. */
static inline bool size_mul(size_t a, size_t b, size_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool size_add(size_t a, size_t b, size_t *out) {
    return !__builtin_add_overflow(a, b, out);
}

/* 64-byte aligned memory, uninitialised / zeroed. `what` is named in the message of a failure
 * ("the optimiser state"). Zero bytes gives a valid pointer. Large zeroed blocks come from fresh
 * pages, so they cost nothing until touched. */
tril_status mem_alloc(void **out, size_t bytes, const char *what, struct tril_error *err);
tril_status mem_alloc_zero(void **out, size_t bytes, const char *what, struct tril_error *err);
void mem_free(void *p); /* NULL is fine; only for mem_alloc* */

struct arena {
    char *base;
    size_t capacity, used;
    const char *what;
};

/* Bytes that one block of `bytes` takes in an arena (alignment and red zone included). */
size_t arena_block_size(size_t bytes);
/* Creates an arena; `zero` asks for zeroed memory. */
tril_status arena_create(struct arena *a, size_t capacity, bool zero, const char *what,
                         struct tril_error *err);
/* Next block, or NULL when the arena is full (a fault of the caller's sizing). */
void *arena_take(struct arena *a, size_t bytes);
void arena_reset(struct arena *a); /* forget all blocks, keep the memory */
void arena_free(struct arena *a);

#endif
