/* Blocks come from malloc or calloc (whose large blocks are fresh, untouched pages), aligned by
 * hand; the word before a block remembers what to free:
 *
 *   raw ...[raw pointer] | block, 64-byte aligned | slack, poisoned under AddressSanitizer */
#include "base/memory.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "base/progress.h"
#include "base/system.h"

#if defined(__SANITIZE_ADDRESS__)
#define HAVE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAVE_ASAN 1
#endif
#endif

#ifdef HAVE_ASAN
#include <sanitizer/asan_interface.h>
#define RED_ZONE MEMORY_ALIGN
#define poison(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define unpoison(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define RED_ZONE 0
#define poison(p, n) ((void)(p), (void)(n))
#define unpoison(p, n) ((void)(p), (void)(n))
#endif

/* From this size on, a request is compared with the machine before malloc, which may promise more
 * than there is, is asked. */
#define LARGE ((size_t)1 << 30)

/* Large blocks ask for 2 MB pages: on a fresh stretch of memory a processor that reads ahead within
 * pages reads 1.4 times as fast, and look-ups in tables miss the address cache less. A refusal
 * changes nothing. */
#define HUGE_PAGES ((size_t)4 << 20)
static void ask_for_huge_pages(char *p, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)2 << 20;
    uintptr_t begin = ((uintptr_t)p + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)p + bytes) / page * page;
    if (begin < end)
        (void)madvise(p + (begin - (uintptr_t)p), end - begin, MADV_HUGEPAGE);
#else
    (void)p;
    (void)bytes;
#endif
}

static tril_status allocate(void **out, size_t bytes, bool zero, const char *what,
                            struct tril_error *err) {
    size_t total;
    char *raw = NULL;
    *out = NULL;
    size_t limit = bytes >= LARGE ? memory_total() : 0;
    if (size_add(bytes, MEMORY_ALIGN + sizeof raw, &total) && (limit == 0 || bytes <= limit))
        raw = zero ? calloc(1, total) : malloc(total);
    if (!raw) {
        char size[32], has[32];
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for %s: it needs %s%s%s", what,
                         format_bytes((double)bytes, size), limit ? ", the machine has " : "",
                         limit ? format_bytes((double)limit, has) : "");
    }
    uintptr_t start = (uintptr_t)raw + sizeof raw;
    start = (start + MEMORY_ALIGN - 1) / MEMORY_ALIGN * MEMORY_ALIGN;
    char *p = raw + (start - (uintptr_t)raw);
    ((void **)p)[-1] = raw;
    if (bytes >= HUGE_PAGES)
        ask_for_huge_pages(p, bytes);
    poison(p + bytes, total - bytes - (size_t)(p - raw));
    *out = p;
    return TRIL_OK;
}

tril_status mem_alloc(void **out, size_t bytes, const char *what, struct tril_error *err) {
    return allocate(out, bytes, false, what, err);
}

tril_status mem_alloc_zero(void **out, size_t bytes, const char *what, struct tril_error *err) {
    return allocate(out, bytes, true, what, err);
}

void mem_free(void *p) {
    if (p)
        free(((void **)p)[-1]);
}

size_t arena_block_size(size_t bytes) {
    size_t total;
    if (bytes == 0)
        bytes = 1; /* blocks are distinct */
    if (!size_add(bytes, MEMORY_ALIGN - 1, &total))
        return SIZE_MAX;
    total -= total % MEMORY_ALIGN;
    return size_add(total, RED_ZONE, &total) ? total : SIZE_MAX;
}

tril_status arena_create(struct arena *a, size_t capacity, bool zero, const char *what,
                         struct tril_error *err) {
    void *base;
    *a = (struct arena){.what = what};
    tril_status st = allocate(&base, capacity, zero, what, err);
    if (st != TRIL_OK)
        return st;
    a->base = base;
    a->capacity = capacity;
    poison(a->base, capacity);
    return TRIL_OK;
}

void *arena_take(struct arena *a, size_t bytes) {
    size_t block = arena_block_size(bytes);
    if (!a->base || block > a->capacity - a->used)
        return NULL;
    char *p = a->base + a->used;
    a->used += block;
    unpoison(p, bytes);
    return p;
}

void arena_reset(struct arena *a) {
    a->used = 0;
    if (a->base)
        poison(a->base, a->capacity);
}

void arena_free(struct arena *a) {
    if (a->base)
        unpoison(a->base, a->capacity);
    mem_free(a->base);
    *a = (struct arena){0};
}
