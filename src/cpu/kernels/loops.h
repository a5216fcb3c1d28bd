/* What kernels share around their vector loops: chunks for parallel_for, rows of strided tensors,
 * and choosing the body that is compiled for the dtypes at hand. */
#ifndef CPU_KERNELS_LOOPS_H
#define CPU_KERNELS_LOOPS_H

#include "base/threads.h"
#include "cpu/kernels/simd.h"

/* The statement(s) in ... for every vector of elements begin <= i < end: `lanes` of them from i on,
 * a constant VF_WIDTH in the loop, what remains (if anything) after it. */
#define VF_FOR(i, begin, end, ...)                                                                 \
    do {                                                                                           \
        int64_t i = (begin), end_of_##i = (end);                                                   \
        for (; i + VF_WIDTH <= end_of_##i; i += VF_WIDTH) {                                        \
            const int lanes = VF_WIDTH;                                                            \
            __VA_ARGS__                                                                            \
        }                                                                                          \
        if (i < end_of_##i) {                                                                      \
            const int lanes = (int)(end_of_##i - i);                                               \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    } while (0)

/* The statement(s) in ... with T a constant equal to t: one of F32, BF16 (and F16). */
#define FOR_ACT(T, t, ...)                                                                         \
    do {                                                                                           \
        if ((t) == DT_F32) {                                                                       \
            const enum dtype T = DT_F32;                                                           \
            __VA_ARGS__                                                                            \
        } else {                                                                                   \
            const enum dtype T = DT_BF16;                                                          \
            __VA_ARGS__                                                                            \
        }                                                                                          \
    } while (0)
#define FOR_FLOAT(T, t, ...)                                                                       \
    do {                                                                                           \
        if ((t) == DT_F16) {                                                                       \
            const enum dtype T = DT_F16;                                                           \
            __VA_ARGS__                                                                            \
        } else {                                                                                   \
            FOR_ACT(T, t, __VA_ARGS__);                                                            \
        }                                                                                          \
    } while (0)

/* Items per chunk of parallel_for, for `items` of which each moves `bytes`: chunks of at least
 * CHUNK_BYTES, so that less than that runs at once on the calling thread, and at most some hundreds
 * of them. A function of the sizes only. */
enum { CHUNK_BYTES = 64 * 1024, CHUNK_LIMIT = 512 };
static inline int64_t chunk_items(int64_t items, int64_t bytes) {
    int64_t wanted = CHUNK_BYTES / (bytes > 0 ? bytes : 1) + 1;
    int64_t least = items / CHUNK_LIMIT + 1;
    return wanted > least ? wanted : least;
}
/* The same for single elements: whole cache lines. */
static inline int64_t chunk_elements(int64_t elements, int64_t bytes) {
    return (chunk_items(elements, bytes) + 63) / 64 * 64;
}

/* Rows of the last dimension of a tensor [N, D] or [N, H, D]. */
static inline int64_t row_count(const struct tensor *t) {
    return t->rank == 3 ? t->shape[0] * t->shape[1] : t->shape[0];
}
static inline int64_t row_width(const struct tensor *t) {
    return t->shape[t->rank - 1];
}
/* A row of such a tensor while one walks along them (divisions cost as much as a short row). */
struct row_cursor {
    int64_t n, h, H;
};
static inline struct row_cursor row_at(const struct tensor *t, int64_t r) {
    int64_t H = t->rank == 3 ? t->shape[1] : 1;
    return (struct row_cursor){r / H, r % H, H};
}
static inline void row_next(struct row_cursor *c) {
    if (++c->h == c->H) {
        c->h = 0;
        c->n++;
    }
}
/* Where the row begins in t, in elements. */
static inline int64_t row_offset(const struct tensor *t, struct row_cursor c) {
    return c.n * t->stride[0] + c.h * t->stride[1]; /* rank 2: h is 0 */
}

/* The address of element `at`. */
static inline void *element(const struct tensor *t, int64_t at) {
    return (char *)t->data + at * (int64_t)dtype_size(t->dtype);
}

#endif
