/* From logits to the next token: greedy, or temperature, top-k, top-p, min-p, repetition penalty.
 *
 * The order is llama.cpp's and transformers': penalty, top-k, top-p, min-p on the probabilities at
 * temperature, then one draw. Draws are counter-based: the n-th token of a sequence depends on
 * (seed, n) and its logits only, never on what else is being generated. */
#ifndef INFER_SAMPLER_H
#define INFER_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

struct sampler_options {
    double temperature; /* 0: greedy */
    int64_t top_k;      /* 0: all */
    double top_p;       /* 1: all; the smallest set of tokens whose probability reaches it */
    double min_p;       /* 0: all; tokens with at least min_p times the greatest probability */
    double repetition_penalty; /* 1: none (Keskar et al. 2019): seen tokens' logits divided by it if
                                * positive, multiplied if negative */
    uint64_t seed;
};

struct sampler;

/* Temperature 1, everything else off. */
struct sampler_options sampler_defaults(void);
tril_status sampler_create(struct sampler **out, const struct sampler_options *options,
                           int64_t vocab, struct tril_error *err);
void sampler_free(struct sampler *s); /* NULL is fine */
/* Tells of a token of the prompt or one that was generated (for the repetition penalty). */
void sampler_accept(struct sampler *s, int32_t token);
/* The next token from logits [V]. `index` counts the tokens drawn for this
 * sequence. Logits that are not finite are refused. *log_probability (may be NULL) is the token's
 * natural log probability under the unfiltered distribution at temperature 1. */
tril_status sampler_next(struct sampler *s, const float *logits, uint64_t index, int32_t *token,
                         double *log_probability, struct tril_error *err);

#endif
