/* What LayerNorm and RMSNorm share: the shapes of their test cases and the role of dx. */
#ifndef OPS_NORMS_H
#define OPS_NORMS_H

#include "ops/reference.h"

/* x, y: [N, D], or [N, H, D] for qk-norm; statistics: one per row. */
#define NORM_X "N D|N H D"
#define NORM_ROWS "N|N H"

/* Sizes, dtypes (x fp32 or act, the activation side `act`), the variant, and whether the arguments
 * in `strided` have gaps. False when index is used up; the rest of the digits stays in *index. */
static inline void norm_case(int *index, struct op_case *c, int x, unsigned strided) {
    static const int64_t sizes[][3] = {/* N, H, D */
                                       {1, 1, 1},   {3, 2, 7}, {5, 3, 17},  {4, 2, 64},  {7, 1, 65},
                                       {3, 5, 257}, {0, 2, 8}, {9, 1, 768}, {1, 1, 2049}};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    *c = (struct op_case){.act = DT_F32, .label = "rows"};
    int s = case_pick(index, COUNT);
    c->size['N'] = sizes[s][0];
    c->size['H'] = sizes[s][1];
    c->size['D'] = sizes[s][2];
    switch (case_pick(index, 3)) { /* x and the activation side */
    case 0:
        c->act = DT_BF16;
        break;
    case 1:
        c->act = DT_BF16;
        c->dtype[x] = case_dtype(DT_F32);
        break;
    default:
        break;
    }
    if (case_pick(index, 2)) {
        c->variant = 1;
        c->strided = strided;
        c->label = "heads, strided";
    }
    struct norm_params p = {.eps = s % 2 ? 1e-5f : 1e-6f, .gain_offset = s % 3 == 2 ? 1.0f : 0.0f};
    case_params(c, &p, sizeof p);
}

/* Backward: an fp32 dx is the residual stream's and accumulates, unless told otherwise. */
static inline bool norm_accumulates(const struct tensor *dx, const struct norm_params *p) {
    return dx->dtype != DT_BF16 && dx->dtype != DT_F16 && !p->overwrite;
}

#endif
