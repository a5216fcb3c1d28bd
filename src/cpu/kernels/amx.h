/* AMX tiles (Intel SDM, chapter on Intel AMX): eight registers of 16 rows of 64 bytes.
 *
 *   amx_begin()            loads the one configuration that tril uses (all tiles 16 x 64 bytes)
 *   AMX_ZERO(t)            tile t = 0
 *   AMX_LOAD(t, p, bytes)  row i of t from p + i * bytes
 *   AMX_STORE(t, p, bytes)
 *   AMX_DOT_BF16(c, a, b)  c[m][n] += sum over 16 pairs of a[m][pair] . b[pair][n]   (fp32 +=
 * bf16^2) amx_end()              gives the tiles back
 *
 * Tile numbers are literal digits 0 .. 7. Configuration is per thread and other libraries change
 * it, so every piece of work on every thread stands between its own amx_begin and amx_end; tiles in
 * use also make each context switch save 8 KB. The compiler's intrinsics of GCC 12 do not tell it
 * that they touch memory; these do.
 *
 * Without AMX (SIMD_EMULATED) the same names run in plain C and die loudly of what the processor
 * would fault on: use without configuration or after release, a bad configuration, tiles whose
 * shapes do not fit. The caller must have been granted AMX by the operating system
 * (cpu/detect.c). */
#ifndef CPU_KERNELS_AMX_H
#define CPU_KERNELS_AMX_H

#include <stdint.h>
#include <string.h>

#include "cpu/kernels/level.h"

/* Whether this level has tiles, real or emulated. */
#define AMX_TILES (SIMD_AMX || SIMD_EMULATED)

struct amx_config {
    uint8_t palette, start_row;
    uint8_t reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
};
_Static_assert(sizeof(struct amx_config) == 64, "LDTILECFG reads 64 bytes");

static inline struct amx_config amx_full_tiles(void) {
    struct amx_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = 64;
        c.rows[i] = 16;
    }
    return c;
}

#if SIMD_AMX

static inline void amx_configure(const struct amx_config *c) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*c) : "memory");
}
static inline void amx_end(void) {
    __asm__ volatile("tilerelease" : : : "memory");
}
#define AMX_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : : : "memory")
#define AMX_LOAD(t, p, bytes)                                                                      \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t                                               \
                     :                                                                             \
                     : "r"((const void *)(p)), "r"((int64_t)(bytes))                               \
                     : "memory")
#define AMX_STORE(t, p, bytes)                                                                     \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)"                                           \
                     :                                                                             \
                     : "r"((void *)(p)), "r"((int64_t)(bytes))                                     \
                     : "memory")
#define AMX_DOT_BF16(c, a, b)                                                                      \
    __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : : : "memory")

#elif SIMD_EMULATED

#include <stdio.h>

#include "cpu/kernels/simd.h"

static _Thread_local struct {
    struct amx_config config; /* palette 0: not configured */
    _Alignas(64) uint8_t data[8][16][64];
} amx_state;

/* What #UD or #GP is on the processor. */
static inline void amx_check(int ok, const char *what) {
    if (!ok) {
        fprintf(stderr, "emulated AMX: %s\n", what);
        __builtin_trap();
    }
}
static inline void amx_check_tile(int t) {
    amx_check(amx_state.config.palette == 1, "no tile configuration on this thread");
    amx_check(t >= 0 && t < 8, "no such tile");
    amx_check(amx_state.config.rows[t] != 0 && amx_state.config.bytes[t] != 0,
              "a tile that the configuration leaves out");
}

static inline void amx_configure(const struct amx_config *c) {
    int good = c->palette <= 1;
    for (int i = 0; i < 14; i++)
        good = good && c->reserved[i] == 0;
    for (int i = 0; i < 16; i++) {
        good = good && c->bytes[i] <= 64 && c->rows[i] <= 16;
        good = good && (c->bytes[i] == 0) == (c->rows[i] == 0);
        good = good && (i < 8 || c->rows[i] == 0);
    }
    amx_check(good, "a configuration that the processor rejects");
    memset(&amx_state, 0, sizeof amx_state);
    amx_state.config = *c;
}
static inline void amx_end(void) {
    memset(&amx_state, 0, sizeof amx_state);
}
static inline void amx_zero(int t) {
    amx_check_tile(t);
    memset(amx_state.data[t], 0, sizeof amx_state.data[t]);
}
static inline void amx_load(int t, const void *p, int64_t bytes) {
    amx_check_tile(t);
    memset(amx_state.data[t], 0, sizeof amx_state.data[t]);
    for (int r = 0; r < amx_state.config.rows[t]; r++)
        memcpy(amx_state.data[t][r], (const char *)p + r * bytes, amx_state.config.bytes[t]);
}
static inline void amx_store(int t, void *p, int64_t bytes) {
    amx_check_tile(t);
    for (int r = 0; r < amx_state.config.rows[t]; r++)
        memcpy((char *)p + r * bytes, amx_state.data[t][r], amx_state.config.bytes[t]);
}
/* Vectors that the processor has: the compiler makes poor code of wider ones. */
enum { AMX_PART = 8, AMX_PARTS = 2 };
typedef float amx_floats __attribute__((vector_size(4 * AMX_PART)));
typedef uint32_t amx_words __attribute__((vector_size(4 * AMX_PART)));

/* In the manual's order: even and odd products summed apart, then together, then onto c. */
static inline void amx_dot_bf16(int c, int a, int b) {
    amx_check_tile(a);
    amx_check_tile(b);
    amx_check_tile(c);
    amx_check(a != b && a != c && b != c, "one tile as two operands");
    const struct amx_config *g = &amx_state.config;
    amx_check(g->rows[c] == g->rows[a] && g->bytes[c] == g->bytes[b] &&
                  g->bytes[a] == 4 * g->rows[b] && g->bytes[c] % 4 == 0,
              "tiles whose shapes do not fit a product");
    const int K = g->bytes[a] / 4;
    amx_floats even_b[16][AMX_PARTS], odd_b[16][AMX_PARTS];
    for (int k = 0; k < K; k++) {
        amx_words unit[AMX_PARTS];
        memcpy(unit, amx_state.data[b][k], sizeof unit);
        for (int h = 0; h < AMX_PARTS; h++) {
            even_b[k][h] = (amx_floats)(unit[h] << 16);
            odd_b[k][h] = (amx_floats)(unit[h] & 0xffff0000u);
        }
    }
    for (int m = 0; m < g->rows[c]; m++) {
        amx_floats even[AMX_PARTS] = {{0}}, odd[AMX_PARTS] = {{0}}, sum[AMX_PARTS];
        for (int k = 0; k < K; k++) {
            uint16_t pair[2];
            memcpy(pair, amx_state.data[a][m] + 4 * k, sizeof pair);
            for (int h = 0; h < AMX_PARTS; h++) {
                even[h] += bf16_to_f32(pair[0]) * even_b[k][h];
                odd[h] += bf16_to_f32(pair[1]) * odd_b[k][h];
            }
        }
        memcpy(sum, amx_state.data[c][m], sizeof sum);
        for (int h = 0; h < AMX_PARTS; h++)
            sum[h] += even[h] + odd[h];
        memcpy(amx_state.data[c][m], sum, g->bytes[c]);
    }
}
#define AMX_ZERO(t) amx_zero(t)
#define AMX_LOAD(t, p, bytes) amx_load(t, p, bytes)
#define AMX_STORE(t, p, bytes) amx_store(t, p, bytes)
#define AMX_DOT_BF16(c, a, b) amx_dot_bf16(c, a, b)

#endif

#if AMX_TILES
static inline void amx_begin(void) {
    struct amx_config c = amx_full_tiles();
    amx_configure(&c);
}
#endif

#endif
