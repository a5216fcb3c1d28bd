/* A session: one timeline over a model. It takes whole token prefixes and decides itself what of
 * its cache to reuse; then it decodes one token at a time.
 *
 * At the context's end a session that is no stream does not slide silently: session_step refuses,
 * and the generator stops with the reason "length" (or, with `roll`, drops the older half and
 * recomputes). */
#ifndef INFER_SESSION_H
#define INFER_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "infer/sampler.h"
#include "model/model.h"

struct session;

/* capacity: tokens it can hold, at most the model's context (0: the context). prefill: the longest
 * chunk computed at once (0: 512). */
tril_status session_create(struct session **out, struct model *m, int64_t capacity, int64_t prefill,
                           struct tril_error *err);
/* The same with keys and values in another dtype than the model's (kv_cache_create). */
tril_status session_create_as(struct session **out, struct model *m, int64_t capacity,
                              int64_t prefill, enum dtype cache, struct tril_error *err);
/* A stream (Xiao et al. 2023) never fills up: it holds its first `sinks` tokens and the last ones,
 * at most `window`; when these are full, the oldest `stride` of them leave at once, so that between
 * window - stride + 1 and window tokens are seen beside the sinks. Positions are places in the
 * cache. stride 1 is the paper's; with more, keys are rotated anew only that often. Whatever the
 * chunks in which tokens come, the result is the same. */
struct session_stream {
    int64_t window; /* 1 or more; sinks + window at most the model's context */
    int64_t sinks;
    int64_t stride; /* 1 to window; 0: a sixteenth of the window */
};
/* Layers that recall earlier segments need a window of keep + segment + stride, whole segments of
 * stride and no sinks: then their segments stay where they are. */
tril_status session_create_stream(struct session **out, struct model *m,
                                  const struct session_stream *stream, int64_t prefill,
                                  struct tril_error *err);
/* A session that decodes over the blocks of its cache that can matter (model.h, kv_retrieve);
 * prompts are computed in full. */
tril_status session_create_retrieve(struct session **out, struct model *m, int64_t capacity,
                                    int64_t prefill, const struct kv_retrieve *r,
                                    struct tril_error *err);
/* The mean part of full attention's probability that retrieval found so far; NAN if not measured.
 */
double session_found(const struct session *s);
void session_free(struct session *s); /* NULL is fine */
/* From now on session_sync and session_step end in a draw by this sampler of the session's context
 * (session_context) instead of logits: sampler_read gives the token. NULL: logits again. */
void session_set_sampler(struct session *s, struct sampler *sampler);
struct op_context *session_context(const struct session *s);

/* Makes the timeline equal to tokens [0, n), n >= 1: keeps the longest common prefix, computes the
 * rest in chunks. Afterwards session_logits holds the logits after the last token. *reused (may be
 * NULL) says how many tokens were kept. */
tril_status session_sync(struct session *s, const int32_t *tokens, int64_t n, int64_t *reused,
                         struct tril_error *err);
/* Appends one token. A stream takes any number of them. */
tril_status session_step(struct session *s, int32_t token, struct tril_error *err);
/* fp32 [V], of the last token, where no sampler is set; valid until the next call. */
const float *session_logits(const struct session *s);
/* What it holds: of a stream, the sinks and the last tokens. */
const int32_t *session_tokens(const struct session *s, int64_t *n);
/* Tokens that fit; of a stream INT64_MAX. */
int64_t session_capacity(const struct session *s);
int64_t session_vocab(const struct session *s);

#endif
