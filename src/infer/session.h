/* A session: one timeline over a model. It takes whole token prefixes and decides itself what of
 * its cache to reuse; then it decodes one token at a time.
 *
 * At the context's end a session does not slide silently: session_step refuses, and the generator
 * stops with the reason "length" (or, with `roll`, drops the older half and recomputes). */
#ifndef INFER_SESSION_H
#define INFER_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "model/model.h"

struct session;

/* capacity: tokens it can hold, at most the model's context (0: the context). prefill: the longest
 * chunk computed at once (0: 512). */
tril_status session_create(struct session **out, struct model *m, int64_t capacity, int64_t prefill,
                           struct tril_error *err);
void session_free(struct session *s); /* NULL is fine */

/* Makes the timeline equal to tokens [0, n), n >= 1: keeps the longest common prefix, computes the
 * rest in chunks. Afterwards session_logits holds the logits after the last token. *reused (may be
 * NULL) says how many tokens were kept. */
tril_status session_sync(struct session *s, const int32_t *tokens, int64_t n, int64_t *reused,
                         struct tril_error *err);
/* Appends one token. */
tril_status session_step(struct session *s, int32_t token, struct tril_error *err);
/* fp32 [V], of the last token; valid until the next call. */
const float *session_logits(const struct session *s);
const int32_t *session_tokens(const struct session *s, int64_t *n);
int64_t session_capacity(const struct session *s);
int64_t session_vocab(const struct session *s);

#endif
