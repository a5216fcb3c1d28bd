/* The op registry: descriptions by identifier, and op_call, the one door to every operation. */
#include <stdio.h>
#include <string.h>

#include "ops/describe.h"
#include "ops/host_fallback.h"

static const struct op_info *const infos[OP_COUNT] = {
#define OP(id, name) [OP_##id] = &op_info_##name,
#include "ops/op_list.inc"
#undef OP
};

const struct op_info *op_info_get(enum op_id id) {
    return infos[id];
}

double op_bytes(enum op_id id, const struct tensor *args, const void *params) {
    const struct op_info *info = infos[id];
    if (info->bytes)
        return info->bytes(args, params);
    double bytes = 0;
    for (int i = 0; i < info->arg_count; i++) {
        enum op_role role = op_arg_role(info, i, args, params);
        double times = role == ARG_ACCUMULATE || role == ARG_INOUT ? 2 : 1;
        bytes += times * (double)tensor_bytes(&args[i]);
    }
    return bytes;
}

/* ------------------------------------------------------------------ checking */

static bool is_empty(const struct tensor *t) {
    for (int k = 0; k < t->rank; k++)
        if (t->shape[k] == 0)
            return true;
    return false;
}

static bool is_absent(const struct tensor *t) {
    return !t->data && (t->rank == 0 || !is_empty(t));
}

/* "[3, 7]" */
static const char *print_shape(const struct tensor *t, char *out, size_t size) {
    size_t used = (size_t)snprintf(out, size, "[");
    for (int k = 0; k < t->rank && k < TENSOR_MAX_RANK && used < size; k++)
        used += (size_t)snprintf(out + used, size - used, "%s%lld", k ? ", " : "",
                                 (long long)t->shape[k]);
    if (used < size)
        snprintf(out + used, size - used, "]");
    return out;
}

/* "fp32 or bf16" */
static const char *print_dtypes(unsigned mask, char *out, size_t size) {
    size_t used = 0;
    out[0] = 0;
    for (int t = 0; t < DT_COUNT; t++)
        if ((mask & DT_MASK(t)) && used < size)
            used += (size_t)snprintf(out + used, size - used, "%s%s", used ? " or " : "",
                                     dtype_name((enum dtype)t));
    return out;
}

/* Which formats of activations a backend knows: the CPU's kernels fp32 and bf16, the others fp16
 * too. */
static unsigned allowed_dtypes(const struct op_arg *a, const struct backend *b) {
    bool fp16 = (a->dtypes & DT_ACT) == DT_ACT && strcmp(b->name, "cpu") != 0;
    return a->dtypes | (fp16 ? DT_MASK(DT_F16) : 0);
}

static tril_status check_dtype(const struct op_info *info, int i, const struct tensor *args,
                               const struct backend *b, bool all_double, struct tril_error *err) {
    const struct op_arg *a = &info->args[i];
    const struct tensor *t = &args[i];
    if ((unsigned)t->dtype >= DT_COUNT)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: argument %s has the unknown dtype %d",
                         info->name, a->name, (int)t->dtype);
    bool exempt = all_double && t->dtype == DT_F64;
    const unsigned dtypes = allowed_dtypes(a, b);
    if (!exempt && !(dtypes & DT_MASK(t->dtype))) {
        char allowed[128];
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: argument %s is %s, but must be %s",
                         info->name, a->name, dtype_name(t->dtype),
                         print_dtypes(dtypes, allowed, sizeof allowed));
    }
    for (int k = 0; a->act && k < i; k++)
        if (info->args[k].act && !is_absent(&args[k]) && args[k].dtype != t->dtype)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: argument %s is %s, but %s is %s: give both the same dtype",
                             info->name, a->name, dtype_name(t->dtype), info->args[k].name,
                             dtype_name(args[k].dtype));
    return TRIL_OK;
}

static tril_status check_strides(const struct op_info *info, int i, const struct tensor *t,
                                 struct tril_error *err) {
    const struct op_arg *a = &info->args[i];
    if (is_empty(t))
        return TRIL_OK;
    if (!a->strided && !tensor_is_dense(t))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument %s has gaps between its rows, but must be dense: copy it "
                         "first",
                         info->name, a->name);
    for (int k = 0; k < t->rank; k++) {
        bool last = k == t->rank - 1;
        if (t->shape[k] > 1 && (last ? t->stride[k] != 1 : t->stride[k] < 1))
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: argument %s has stride %lld in dimension %d; it must be %s",
                             info->name, a->name, (long long)t->stride[k], k,
                             last ? "1" : "at least 1");
    }
    return TRIL_OK;
}

/* What each symbol stands for in this call, and which argument said so. */
struct binding {
    int64_t size[128];
    int from[128]; /* argument + 1; 0: not bound yet */
};

static tril_status bind_shape(const struct op_info *info, int i, const struct tensor *t,
                              int variant, struct binding *b, struct tril_error *err) {
    const struct op_arg *a = &info->args[i];
    struct op_dim dims[TENSOR_MAX_RANK];
    char shape[128];
    int rank = op_shape_parse(a->shape, variant, dims);
    if (t->rank != rank)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: argument %s has the shape %s, but must have %d dimension%s, [%s]",
                         info->name, a->name, print_shape(t, shape, sizeof shape), rank,
                         rank == 1 ? "" : "s", a->shape);
    for (int k = 0; k < rank; k++) {
        const struct op_dim *d = &dims[k];
        int64_t rest = t->shape[k] - d->offset;
        if (t->shape[k] < 0 || rest < 0 || (!d->symbol && rest != 0) ||
            (d->symbol && d->scale > 1 && rest % d->scale != 0))
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: argument %s has the shape %s, but must be [%s]", info->name,
                             a->name, print_shape(t, shape, sizeof shape), a->shape);
        if (!d->symbol)
            continue;
        int64_t size = d->scale > 1 ? rest / d->scale : rest;
        int s = (unsigned char)d->symbol;
        if (!b->from[s]) {
            b->from[s] = i + 1;
            b->size[s] = size;
        } else if (b->size[s] != size) {
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: argument %s has the shape %s, but must be [%s] where %c = %lld "
                             "(from %s)",
                             info->name, a->name, print_shape(t, shape, sizeof shape), a->shape, s,
                             (long long)b->size[s], info->args[b->from[s] - 1].name);
        }
    }
    return TRIL_OK;
}

/* The alternative that the first argument with alternatives and the right rank selects. */
static int choose_variant(const struct op_info *info, const struct tensor *args) {
    struct op_dim dims[TENSOR_MAX_RANK];
    for (int i = 0; i < info->arg_count; i++) {
        int variants = op_shape_variants(info->args[i].shape);
        if (variants == 1 || is_absent(&args[i]))
            continue;
        for (int v = 0; v < variants; v++)
            if (op_shape_parse(info->args[i].shape, v, dims) == args[i].rank)
                return v;
        return 0;
    }
    return 0;
}

static tril_status check_args(const struct op_info *info, const struct tensor *args,
                              const void *params, const struct backend *backend, bool reference,
                              struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct binding b;
    memset(b.from, 0, sizeof b.from);
    bool all_double = reference;
    for (int i = 0; i < info->arg_count; i++)
        if (!is_absent(&args[i]) && dtype_is_float(args[i].dtype) && args[i].dtype != DT_F64)
            all_double = false;
    int variant = choose_variant(info, args);
    for (int i = 0; i < info->arg_count; i++) {
        const struct tensor *t = &args[i];
        if (is_absent(t)) {
            if (info->args[i].optional)
                continue;
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: argument %s is missing (its data is "
                             "NULL), but the operation needs it",
                             info->name, info->args[i].name);
        }
        TRY(bind_shape(info, i, t, variant, &b, err));
        TRY(check_dtype(info, i, args, backend, all_double, err));
        TRY(check_strides(info, i, t, err));
    }
    if (info->check)
        TRY(info->check(args, params, err));
done:
    return st;
}

/* A call that only asks for scratch, and ends where it gets none; fn NULL: one for the host. */
static tril_status planned_call(struct op_context *ctx, op_fn *fn, const struct tensor *args,
                                const void *params, struct tril_error *err) {
    tril_status st = TRIL_OK;
    ctx->measured = -1;
    if (fn)
        st = fn(ctx, args, params, err);
    if (ctx->measured > ctx->planned)
        ctx->planned = ctx->measured;
    return ctx->measured >= 0 ? TRIL_OK : st;
}

tril_status op_call(struct op_context *ctx, enum op_id id, const struct tensor *args,
                    const void *params, struct tril_error *err) {
    if ((unsigned)id >= OP_COUNT)
        return error_set(err, TRIL_ERR_INTERNAL, "there is no operation number %d", (int)id);
    const struct op_info *info = infos[id];
    op_fn *fn = ctx->reference ? info->reference : ctx->backend->table[id];
    tril_status st = check_args(info, args, params, ctx->backend, fn == info->reference, err);
    if (st != TRIL_OK)
        return st;
    if (ctx->planning)
        return planned_call(ctx, fn == info->reference ? NULL : fn, args, params, err);
    return fn == info->reference && ctx->backend->device
               ? op_host_fallback(ctx, info, args, params, err)
               : fn(ctx, args, params, err);
}
