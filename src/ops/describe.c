/* Reading the descriptions of operations. A shape is written as "N D", "S+1", "N 2F", "1", with
 * alternatives separated by '|'. */
#include "ops/describe.h"

#include <stdbool.h>
#include <string.h>

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

int op_shape_variants(const char *shape) {
    int n = 1;
    for (; *shape; shape++)
        n += *shape == '|';
    return n;
}

int op_shape_parse(const char *shape, int variant, struct op_dim dims[TENSOR_MAX_RANK]) {
    const char *bar;
    while (variant-- > 0 && (bar = strchr(shape, '|')))
        shape = bar + 1;
    int rank = 0;
    while (rank < TENSOR_MAX_RANK) {
        while (*shape == ' ')
            shape++;
        if (!*shape || *shape == '|')
            break;
        struct op_dim d = {0, 0, 0};
        bool digits = is_digit(*shape);
        int64_t number = 0;
        for (; is_digit(*shape); shape++)
            number = number * 10 + (*shape - '0');
        if ((*shape >= 'A' && *shape <= 'Z') || (*shape >= 'a' && *shape <= 'z')) {
            d.symbol = *shape++;
            d.scale = digits ? number : 1;
            if (*shape == '+')
                for (shape++; is_digit(*shape); shape++)
                    d.offset = d.offset * 10 + (*shape - '0');
        } else {
            d.offset = number;
        }
        dims[rank++] = d;
        while (*shape && *shape != ' ' && *shape != '|')
            shape++;
    }
    return rank;
}

int op_case_shape(const struct op_info *info, int i, const struct op_case *c,
                  int64_t shape[TENSOR_MAX_RANK]) {
    struct op_dim dims[TENSOR_MAX_RANK];
    int rank = op_shape_parse(info->args[i].shape, c->variant, dims);
    for (int k = 0; k < TENSOR_MAX_RANK; k++) {
        shape[k] = 1;
        if (k < rank)
            shape[k] = dims[k].offset +
                       (dims[k].symbol ? dims[k].scale * c->size[(int)dims[k].symbol] : 0);
    }
    return rank;
}

enum dtype op_case_dtype(const struct op_info *info, int i, const struct op_case *c) {
    unsigned mask = info->args[i].dtypes;
    if (c->dtype[i])
        return (enum dtype)(c->dtype[i] - 1);
    if (mask & DT_MASK(c->act))
        return c->act;
    int t = 0;
    while (t < DT_COUNT - 1 && !(mask & DT_MASK(t)))
        t++;
    return (enum dtype)t;
}

bool op_case_present(const struct op_info *info, int i, const struct op_case *c) {
    return !(info->args[i].optional && (c->absent >> i & 1));
}

enum op_role op_arg_role(const struct op_info *info, int i, const struct tensor *args,
                         const void *params) {
    return info->role ? info->role(i, args, params) : info->args[i].role;
}

double op_reduction(const struct op_info *info, const struct tensor *args, const void *params) {
    double n = info->reduction ? info->reduction(args, params) : 1;
    return n > 1 ? n : 1;
}
