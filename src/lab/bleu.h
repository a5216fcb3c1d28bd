/* BLEU (Papineni et al. 2002): how many runs of one to four words a text shares with a reference.
 *
 *   p_n  = (runs of n words of the candidates that their references hold, each counted at most as
 *          often as its reference holds it) / (all runs of n words of the candidates)
 *   BP   = 1 if c > r, else exp(1 - r / c)       c, r: words of all candidates, of all references
 *   BLEU = 100 BP (p_1 p_2 p_3 p_4)^(1/4)
 *
 * Over a whole corpus: counts are summed before they are divided. One reference per candidate.
 * Words are runs of letters, digits and bytes above 127; every other visible character is a word of
 * its own; case counts. */
#ifndef LAB_BLEU_H
#define LAB_BLEU_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

enum { BLEU_ORDER = 4 };

struct bleu {
    int64_t match[BLEU_ORDER], total[BLEU_ORDER];
    int64_t candidate, reference; /* words */
};

enum bleu_smoothing {
    BLEU_PLAIN,      /* 0 where an order has no match */
    BLEU_EXPONENTIAL /* the k-th order without a match has 2^-k of one (mteval-v13a, sacreBLEU) */
};

/* Adds a candidate and its reference, each `size` bytes. ERR_MEMORY. */
tril_status bleu_add(struct bleu *b, const char *candidate, size_t candidate_size,
                     const char *reference, size_t reference_size, struct tril_error *err);
/* 0 to 100. 0 where nothing matches, and where no candidate has as many as four words. */
double bleu_score(const struct bleu *b, enum bleu_smoothing smoothing);

#endif
