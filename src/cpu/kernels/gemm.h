/* Matrix products of the CPU backend: what a level's kernels offer to the driver (cpu/gemm.c).
 *
 *   C[m, n] = sum over k of A[m, k] B[n, k]      then the epilogue
 *
 * All three products of a linear layer are this one with other operands:
 *
 *   forward           A = x    [N, I]   B = w    [O, I]   k = I
 *   backward, input   A = dy   [N, O]   B = w^T  [I, O]   k = O
 *   backward, weight  A = dy^T [O, N]   B = x^T  [I, N]   k = N
 *
 * so an operand is a matrix in memory and whether k runs along its memory rows. Packed, they are
 *
 *   B: panels of 16 rows (outputs):  fp32 [rows/16][k][16],  bf16 [rows/16][k/2][16][2]
 *   A: strips of `strip` rows, in the layout of the path that will read it.
 *
 * Packing pads rows and k with zeros (bf16 panels always to k % 32 == 0, an AMX tile's depth, so
 * that one format serves every level). An output is summed over k in one order, whatever m, n, the
 * blocking, the threads and the number of rows computed together: partial sums only ever wait in
 * fp32 memory. Rows do not see each other, so a row alone gives the same bits as in a batch. */
#ifndef CPU_KERNELS_GEMM_H
#define CPU_KERNELS_GEMM_H

#include "ops/ops.h"

#define GEMM_PANEL 16  /* rows of B in a panel */
#define GEMM_K_BF16 32 /* multiple to which k is padded in bf16 panels */

struct gemm_operand {
    const void *data;
    enum dtype type; /* F32, BF16 or F16 */
    int64_t ld;      /* elements from one row of memory to the next */
    int64_t rows, k;
    bool transposed; /* false: (row, k) lies at data[row * ld + k]; true: at data[k * ld + row] */
};

/* y = act(sum + bias) + residual; pre = sum + bias. Absent parts are NULL; y may be residual. */
struct gemm_output {
    void *y;
    enum dtype type; /* F32 or BF16 */
    int64_t ld;
    const float *bias;     /* per column */
    const float *residual; /* fp32 */
    int64_t residual_ld;
    void *pre;
    enum dtype pre_type;
    int64_t pre_ld;
    enum activation activation;
};

/* One way to multiply: what it reads and how much of it at once. */
struct gemm_path {
    enum dtype a_type;  /* of packed A */
    int strip;          /* rows of a full strip of A */
    int64_t k_multiple; /* k is padded to this in A (and in B where the panels are bf16) */
    int64_t k_chunk; /* k that one call of `tile` takes, so that its A stays in the first cache */
    int64_t panel_bytes; /* of B that a job may hold in the second cache */

    /* Rows that a strip of 1 .. strip rows is computed with, and panels that `tile` can take beside
     * them (it can always take 1). */
    int (*strip_rows)(int64_t rows);
    int (*strip_panels)(int rows);

    /* Strips [begin, end) of A's rows [first, last), k in [k0, k1): strip s goes to out + (s -
     * begin) * strip_bytes. */
    void (*pack_a)(const struct gemm_operand *a, int64_t first, int64_t last, int64_t begin,
                   int64_t end, int64_t k0, int64_t k1, void *out, int64_t strip_bytes);

    /* c[rows, 16 panels] (+)= the strip at `a` times the panels at b, b + panel_stride, ...
     * k is a multiple of k_multiple (fp32 panels: any). b is of b_type. */
    void (*tile)(int rows, int panels, int64_t k, const void *a, const void *b, enum dtype b_type,
                 int64_t panel_stride, float *c, int64_t ldc, bool load);

    void (*begin)(void), (*end)(void); /* around tiles, on the thread that runs them */
};

struct gemm_kernels {
    const struct gemm_path *fma; /* any dtypes, fp32 arithmetic */
    const struct gemm_path *amx; /* bf16 A and bf16 panels; NULL where there are no tiles */

    /* Panels [begin, end) of B, columns [k0, k1), as `type` (F32 from anything, BF16 from BF16). */
    void (*pack_b)(const struct gemm_operand *b, int64_t begin, int64_t end, int64_t k0, int64_t k1,
                   enum dtype type, void *out);
    /* One bf16 panel of depth k (even) to fp32. */
    void (*widen)(const void *panel, int64_t k, float *out);
    /* Rows [0, rows) and columns [0, columns) of c to the output's (row, column) on. */
    void (*epilogue)(const struct gemm_output *out, const float *c, int64_t ldc, int64_t row,
                     int64_t rows, int64_t column, int64_t columns);
    /* sum[j] += a's sum over k of row j, for rows [begin, end) of a transposed operand, in order.
     */
    void (*row_sums)(const struct gemm_operand *a, int64_t begin, int64_t end, int64_t k0,
                     int64_t k1, float *sum);
};

static inline int64_t gemm_round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
/* Bytes of a panel of depth k. */
static inline int64_t gemm_panel_bytes(int64_t k, enum dtype type) {
    return type == DT_BF16 ? gemm_round_up(k, GEMM_K_BF16) * GEMM_PANEL * 2 : k * GEMM_PANEL * 4;
}
/* Bytes of a strip of A of depth k; the slack lets packing store whole vectors. */
static inline int64_t gemm_strip_bytes(const struct gemm_path *path, int64_t k) {
    k = gemm_round_up(k, path->k_multiple);
    return gemm_round_up(k * path->strip * (int64_t)dtype_size(path->a_type), 64) + 64;
}

#endif
