/* What the files behind tril/attention.h share. */
#ifndef API_ATTENTION_H
#define API_ATTENTION_H

#include "api/staged.h"
#include "base/dtype.h"
#include "ops/visible.h"
#include "tril/attention.h"

/* Sizes, strides, numbers, lengths: ERR_ARGUMENT with a sentence, or all later arithmetic on them
 * is safe. attention_check_written: dk and dv do not overlap themselves, either. */
tril_status attention_check(const struct tril_attention *a, struct tril_error *err);
tril_status attention_check_written(const struct tril_attention *a, struct tril_error *err);

/* The rules of `visible` (NULL: causal), checked against the heads and sizes; false in *given where
 * plain causal or full says it all, with *causal. Free the set with visible_set_free. */
tril_status attention_rules(const struct tril_attention *a, struct visible_set *set, bool *given,
                            bool *causal, struct tril_error *err);

/* tril_attention_scratch, and the rows and keys that flash will work in (0 elsewhere). */
tril_status attention_measure(const struct tril_attention *a, size_t *forward, size_t *backward,
                              int64_t *block_rows, int64_t *block_keys, struct tril_error *err);

/* "flash", ...; NULL means it. */
tril_status attention_implementation_parse(const char *name,
                                           enum tril_attention_implementation *out,
                                           struct tril_error *err);

/* Is `a` computed on a device? (Its name may still be one that there is not.) */
bool attention_on_device(const struct tril_attention *a);
/* ERR_UNSUPPORTED where a device has no such implementation. */
tril_status attention_check_device(const struct tril_attention *a, struct tril_error *err);
/* Opens what computes it on host memory: a backend of the host's, or through `staged` a device. */
tril_status attention_open(const struct tril_attention *a, struct op_context *ctx,
                           struct staged *staged, struct tril_error *err);

/* Threads as a call wants them; gives what attention_threads_restore needs. */
int attention_threads_set(const struct tril_attention *a);
void attention_threads_restore(const struct tril_attention *a, int threads);

static inline enum dtype attention_dtype(enum tril_dtype t) {
    return t == TRIL_FP32 ? DT_F32 : t == TRIL_BF16 ? DT_BF16 : DT_F16;
}

#endif
