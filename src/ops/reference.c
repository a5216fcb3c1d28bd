/* The out-of-line part of what the references share. */
#include "ops/reference.h"

tril_status ref_index(const char *op, const char *arg, const struct tensor *t, int64_t i,
                      int64_t limit, int64_t *out, struct tril_error *err) {
    *out = ref_int(t, i);
    if (*out >= 0 && *out < limit)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT,
                     "%s: %s[%lld] is %lld, but must be at least 0 and below %lld", op, arg,
                     (long long)i, (long long)*out, (long long)limit);
}
