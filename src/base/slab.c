/* Blocks are taken one after another from the current slab; a slab counts its blocks and is freed
 * with the last of them. Nothing is reused within a slab: blocks come and go with their model. */
#include "base/slab.h"

#include <pthread.h>
#include <stdlib.h>

#include "base/memory.h"

#define SLAB_BYTES ((size_t)64 << 20) /* of addresses: untouched pages cost nothing */

struct slab {
    void *memory;
    size_t used, capacity;
    int blocks;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct slab *current;

static void free_unused(struct slab *s) {
    if (s == current)
        current = NULL;
    mem_free(s->memory);
    free(s);
}

tril_status slab_alloc(struct slab **slab, void **out, size_t bytes, const char *what,
                       struct tril_error *err) {
    tril_status st = TRIL_OK;
    size_t size = arena_block_size(bytes);
    pthread_mutex_lock(&lock);
    struct slab *s = current;
    if (!s || size > s->capacity - s->used) {
        s = calloc(1, sizeof *s);
        if (!s) {
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for %s", what);
            goto done;
        }
        s->capacity = size > SLAB_BYTES ? size : SLAB_BYTES;
        st = mem_alloc(&s->memory, s->capacity, what, err);
        if (st != TRIL_OK) {
            free(s);
            goto done;
        }
        if (size < SLAB_BYTES)
            current = s; /* an emptied predecessor was freed with its last block */
    }
    *out = (char *)s->memory + s->used;
    s->used += size;
    s->blocks++;
    *slab = s;
done:
    pthread_mutex_unlock(&lock);
    return st;
}

void slab_release(struct slab *s) {
    if (!s)
        return;
    pthread_mutex_lock(&lock);
    if (--s->blocks == 0)
        free_unused(s);
    pthread_mutex_unlock(&lock);
}
