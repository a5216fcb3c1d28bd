/* Running one case of an operation on a backend and judging the result.
 *
 * Arguments lie in memory of their own between inaccessible pages, aligned only to their elements;
 * the tests either end exactly at the next page (reading too far faults) or begin one element into
 * a page (assumed alignment faults or differs). Everything else on those pages, gaps between rows
 * included, must keep its bytes.
 *
 * A result is judged against the reference run on doubles that hold the same values. Per element
 *
 *     |out - ref| <= u_out |ref| + 4 u32 (reduction * P + max|ref|) (+ 4 u_act sqrt(reduction) * P)
 *
 * where u is a dtype's unit roundoff and P the element's sensitivity: summed over the inputs, the
 * largest change of the reference, over a few trials, when that input's elements are multiplied by
 * 1 + t u (u random, about +-1), divided by t; at least its mean over the tensor, as a random sum
 * may come out small by chance. P is sum |df/dx x| with random signs: what relative errors of the
 * inputs, and so those of well-ordered arithmetic, do to the element; `reduction` roundings in a
 * row multiply it at most by their number. max|ref| over the tensor forgives absolute errors of a
 * few u32 of the largest element (tails of GELU, softmax). The last term is for operations that
 * round intermediate factors to the activations' dtype. */
#ifndef TESTS_OP_HARNESS_H
#define TESTS_OP_HARNESS_H

#include "ops/describe.h"

struct op_memory {
    char *map; /* with its two inaccessible pages; NULL: this argument has none of its own */
    size_t map_bytes;
    char *begin; /* the accessible part */
    size_t bytes;
    char *initial; /* copy of it as it was filled */
};

struct op_run {
    const struct op_info *info;
    struct op_case c;
    bool doubles; /* float arguments are fp64; outputs start as zeros instead of NaN */
    struct tensor args[OP_MAX_ARGS];
    struct op_memory memory[OP_MAX_ARGS];
};

enum op_placement { PLACE_AT_END, PLACE_AFTER_START };
enum op_weight_mode {
    WEIGHT_PLAIN,     /* prepare, run */
    WEIGHT_REFRESHED, /* prepare on other values, write the right ones, refresh, run */
    WEIGHT_KEPT       /* prepare as WEIGHT_STATIC; the values are gone if the backend says so */
};

/* Allocates and fills the arguments of a case. Exits the test program when memory is short. */
void op_run_create(struct op_run *r, const struct op_info *info, const struct op_case *c,
                   enum op_placement placement, bool doubles);
void op_run_free(struct op_run *r);
/* The values of `src` (any dtypes) in a new run on doubles. */
void op_run_create_doubles(struct op_run *r, const struct op_run *src);
/* Back to the values as filled. */
void op_run_restore(struct op_run *r);
/* Makes the present values those that op_run_restore restores. */
void op_run_keep(struct op_run *r);

/* Calls the operation (for linear layers: with a prepared weight). */
tril_status op_run_call(struct op_run *r, struct op_context *ctx, enum op_weight_mode mode,
                        struct tril_error *err);

/* The same for a backend whose memory is its own (ctx->backend->device): the arguments' memory
 * travels there and back, gaps and neighbours included. */
tril_status op_run_call_there(struct op_run *r, struct op_context *ctx, enum op_weight_mode mode,
                              struct tril_error *err);

/* The role of argument i. */
enum op_role op_run_role(const struct op_run *r, int i);
/* Element e of argument i in row-major order, as a double; and setting it. */
double op_run_get(const struct op_run *r, int i, int64_t e);
void op_run_set(struct op_run *r, int i, int64_t e, double value);
/* Index of the argument with this name, or -1. */
int op_arg_find(const struct op_info *info, const char *name);

/* "rmsnorm_forward 12 [in place] N=3 D=7 x=fp32 ..." */
const char *op_case_describe(const struct op_info *info, int index, const struct op_case *c);

/* What a result is judged by: the reference on doubles, and the allowed error of every element of
 * every output. */
struct op_judge {
    struct op_run reference;
    double *tolerance[OP_MAX_ARGS]; /* NULL for inputs */
};
/* `r` must hold its initial values. False (and a line on stderr) if the reference fails. */
bool op_judge_create(struct op_judge *j, const struct op_run *r);
void op_judge_free(struct op_judge *j);

/* Number of faults of a run after its call: elements out of tolerance, bytes changed that are none
 * of the outputs'. The first few are described on stderr after `what`. */
int op_judge_count(const struct op_judge *j, const struct op_run *r, const char *what);

/* Whether two runs of one case have the same bits in every byte of every argument. */
bool op_run_same_bits(const struct op_run *a, const struct op_run *b);

#endif
