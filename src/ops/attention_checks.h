/* What attention of any kind checks of its arguments. */
#ifndef OPS_ATTENTION_CHECKS_H
#define OPS_ATTENTION_CHECKS_H

#include <stdint.h>

#include "base/error.h"

/* Query heads a multiple of the key/value heads, head
 * width 1 to 256; and query rows of sequence s ascending within `rows`. `name` begins the message.
 */
tril_status attention_check_heads(int64_t heads, int64_t kv_heads, int64_t width, const char *name,
                                  struct tril_error *err);
tril_status attention_check_span(const int32_t *q_offsets, int64_t s, int64_t rows,
                                 const char *name, struct tril_error *err);

#endif
