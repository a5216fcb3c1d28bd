/* Reading the descriptions of operations: for op_call, the tests and the benchmarks. */
#ifndef OPS_DESCRIBE_H
#define OPS_DESCRIBE_H

#include "ops/ops.h"

/* Every operation's description, each in its own file. */
#define OP(id, name) extern const struct op_info op_info_##name;
#include "ops/op_list.inc"
#undef OP

/* One dimension of a shape: scale * size[symbol] + offset; symbol 0: the constant `offset`. */
struct op_dim {
    char symbol;
    int64_t scale, offset;
};

/* Parses alternative `variant` of a shape (the last one if there are fewer); returns its rank. */
int op_shape_parse(const char *shape, int variant, struct op_dim dims[TENSOR_MAX_RANK]);
/* Number of alternatives of a shape. */
int op_shape_variants(const char *shape);

/* Shape, dtype and presence of argument i in a case. */
int op_case_shape(const struct op_info *info, int i, const struct op_case *c,
                  int64_t shape[TENSOR_MAX_RANK]);
enum dtype op_case_dtype(const struct op_info *info, int i, const struct op_case *c);
bool op_case_present(const struct op_info *info, int i, const struct op_case *c);

/* The role of argument i in this call. */
enum op_role op_arg_role(const struct op_info *info, int i, const struct tensor *args,
                         const void *params);
/* The longest sum behind an output of this call (at least 1). */
double op_reduction(const struct op_info *info, const struct tensor *args, const void *params);

static inline bool dtype_is_float(enum dtype t) {
    return t == DT_F32 || t == DT_BF16 || t == DT_F16 || t == DT_F64;
}

#endif
