/* Timing every operation of the registry at the shapes of a GPT-2 (124M) training step: 1024
 * tokens, width 768, 12 heads, vocabulary 50257; vectors of the optimiser have 8 million elements.
 */
#ifndef LAB_BENCH_OPS_H
#define LAB_BENCH_OPS_H

#include "ops/ops.h"

struct bench_op_result {
    const char *op;    /* "linear_forward" */
    const char *label; /* "N=1024 I=768 O=2304"; valid during the callback */
    const char *dtype; /* of the activations: "bf16", "fp32" */
    bool overridden;   /* the backend has a kernel of its own for it */
    int calls;         /* timed, after one that is not */
    double seconds;    /* median of a call */
    double best;       /* fastest call */
    double bytes;      /* that a call must at least move */
    double flops;      /* useful floating-point operations; 0: bytes are the measure */
};
typedef void bench_op_fn(void *arg, const struct bench_op_result *result);

/* Times the operations whose name contains `filter` (NULL: all) on `backend`, each for about
 * `seconds`, in bf16 and in fp32, and reports every one through `report`. Operations for which the
 * backend has only the scalar reference are left out unless `references` is set (they are slow). */
tril_status bench_ops(const struct backend *backend, const char *filter, double seconds,
                      bool references, bench_op_fn *report, void *arg, struct tril_error *err);

#endif
