/* The yardstick of counting: an interpolated 3-gram model with modified Kneser-Ney smoothing, the
 * strongest of the classical n-gram models (Chen and Goodman, "An empirical study of smoothing
 * techniques for language modeling", Computer Speech and Language 13, 1999, equations 23 to 26; the
 * method is Kneser and Ney's, ICASSP 1995). A language model that does not beat it on the same
 * tokens has learnt less than a table of counts.
 *
 * With c the counts, `.` any token, and N1+(. v w) = |{u : c(u v w) > 0}|, the number of different
 * tokens seen before v w:
 *
 *   p(w | u v) = (c(u v w) - D3(c(u v w))) / c(u v .)           + g(u v) p(w | v)
 *   p(w | v)   = (N1+(. v w) - D2(N1+(. v w))) / N1+(. v .)     + g(v)   p(w)
 *   p(w)       = (N1+(. w) - D1(N1+(. w))) / N1+(. .)           + g()    1 / V
 *
 * g(h) is what the discounts took from h, divided by its total, so that every distribution sums to
 * one; it is 1 for a context that was never seen. Each order has three discounts, for counts of 1,
 * 2, and 3 or more, estimated from n_k, the number of its n-grams with a count of exactly k:
 *
 *   Y = n1 / (n1 + 2 n2),   D(1) = 1 - 2Y n2/n1,   D(2) = 2 - 3Y n3/n2,   D(3+) = 3 - 4Y n4/n3
 *
 * (1/2, 1 and 3/2 where one of n1..n4 is zero, as in tiny vocabularies). */
#ifndef LAB_KNESER_NEY_H
#define LAB_KNESER_NEY_H

#include <stdint.h>

#include "base/error.h"

struct kneser_ney;

/* Counts `n` tokens, all below `vocab`, as one stream. Memory: some 24 bytes for each different
 * 3-gram and 50 for each 2-gram. Free with kneser_ney_free (NULL is fine). */
tril_status kneser_ney_train(struct kneser_ney **out, const uint32_t *tokens, int64_t n,
                             uint32_t vocab, struct tril_error *err);
void kneser_ney_free(struct kneser_ney *m);

/* p(token | context), context being the `length` tokens before it, the nearest last; the last two
 * count. */
double kneser_ney_probability(const struct kneser_ney *m, const uint32_t *context, int64_t length,
                              uint32_t token);

/* Mean negative log-likelihood, in nats, of tokens[1..n-1], each given those before it (n at least
 * 2): what a GPT's loss on the same tokens is compared with. */
tril_status kneser_ney_loss(const struct kneser_ney *m, const uint32_t *tokens, int64_t n,
                            double *loss, struct tril_error *err);

#endif
