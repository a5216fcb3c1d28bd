/* The generator: prompt -> ids -> prefill -> (sample, decode)* -> text, one token computed at a
 * time. Stop strings, end-of-text, the context's end and the caller's callback end it. */
#ifndef INFER_GENERATOR_H
#define INFER_GENERATOR_H

#include "infer/session.h"
#include "text/tokenizer.h"
#include "tril/generate.h"

/* The ids that a text is continued from: the tokenizer's beginning-of-text token if it has one,
 * then the text's. An empty text becomes the beginning- or end-of-text token. *ids is malloc'ed. */
tril_status prompt_encode(const struct tokenizer *t, const char *text, size_t size, int32_t **ids,
                          int64_t *n, struct tril_error *err);

/* tokenizer may be NULL if options->prompt_ids are given: the text is then empty. On success free
 * *out with tril_generation_free. */
tril_status generator_run(struct session *s, const struct tokenizer *tokenizer, int64_t eos,
                          const struct tril_generate_options *options, struct tril_generation *out,
                          struct tril_error *err);

#endif
