/* From logits to the next token: greedy, or temperature, top-k, top-p, min-p, repetition penalty.
 *
 * What the options mean is the operation's to say (ops/sample.h); a sampler is one sequence's row
 * of its arguments, in the backend's memory, so that a decoding step ends in a token there and the
 * logits never leave. Draws are counter-based: the n-th token of a sequence depends on (seed, n)
 * and its logits only, never on what else is being generated. */
#ifndef INFER_SAMPLER_H
#define INFER_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "ops/sample.h"

struct sampler_options {
    double temperature; /* 0: greedy */
    int64_t top_k;      /* 0: all */
    double top_p;       /* 1: all; the smallest set of tokens whose probability reaches it */
    double min_p;       /* 0: all; tokens with at least min_p times the greatest probability */
    double repetition_penalty; /* 1: none (Keskar et al. 2019): seen tokens' logits divided by it if
                                * positive, multiplied if negative */
    uint64_t seed;
    bool log_probability; /* sampler_read gives it */
};

struct sampler;

/* Temperature 1, everything else off. */
struct sampler_options sampler_defaults(void);
tril_status sampler_create(struct sampler **out, struct op_context *ctx,
                           const struct sampler_options *options, int64_t vocab,
                           struct tril_error *err);
void sampler_free(struct sampler *s); /* NULL is fine */
/* Tells of a token of the prompt (for the repetition penalty); of those that it drew and that were
 * read it knows. */
void sampler_accept(struct sampler *s, int32_t token);
/* The arguments of the next draw, whose row it is: to be used before anything else is done with the
 * sampler. */
tril_status sampler_rows(struct sampler *s, const struct sample_rows **out, struct tril_error *err);
/* The next token from logits fp32 [1, V] in the backend's memory. */
tril_status sampler_draw(struct sampler *s, struct tensor logits, struct tril_error *err);
/* Waits for the last draw. Logits that are not finite are refused. *log_probability (may be NULL;
 * NAN if the options do not ask for it) is the token's natural log probability under the unfiltered
 * distribution at temperature 1. */
tril_status sampler_read(struct sampler *s, int32_t *token, double *log_probability,
                         struct tril_error *err);

#endif
