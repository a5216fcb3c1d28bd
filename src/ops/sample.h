/* Drawing a token from every row of logits: the decoding step's last operation.
 *
 * Row n, of V logits x:
 *   1. y = x, but of tokens seen before x / penalty where x > 0, else x * penalty (Keskar et al.
 *      2019). Where some x is NaN or the greatest y is not finite: status 1, token 0,
 *      log_probability NaN; index and seen stay.
 *   2. temperature 0: the greatest y; of equal ones the lowest id.
 *   3. Otherwise tokens are ordered by y, the greatest first, equal ones by id, and weigh w =
 *      exp((y - max y) / temperature). Of this order are kept: the first top_k (0 or less: all);
 *      of these, as few as weigh top_p times what they weigh together, at least one (1: all); of
 *      these, those with w >= min_p.
 *   4. The draw: u in [0, 1) is random_u32 / 2^32 of (seed, index), which depends on nothing else;
 *      going through the kept tokens in the order of their ids, the first at which the sum of the
 *      weights exceeds u times the sum of all. index += 1, and the token is marked as seen.
 * The filters thus come to a threshold, and the draw needs no sorting. Backends may take weights as
 * whole multiples of 2^-30: their sums are then exact, in whatever order they are made.
 * log_probability is natural, of the token under softmax(x): neither filtered nor at temperature.
 */
#ifndef OPS_SAMPLE_H
#define OPS_SAMPLE_H

#include "ops/ops.h"

/* Columns of `options`. What is out of range counts as its nearest end. */
enum { SAMPLE_TEMPERATURE, SAMPLE_TOP_P, SAMPLE_MIN_P, SAMPLE_PENALTY, SAMPLE_OPTIONS };

/* Arguments in the order of the description. */
enum {
    SAMPLE_ARG_LOGITS,
    SAMPLE_ARG_OPTIONS,
    SAMPLE_ARG_TOP_K,
    SAMPLE_ARG_SEED,
    SAMPLE_ARG_INDEX,
    SAMPLE_ARG_SEEN,
    SAMPLE_ARG_TOKEN,
    SAMPLE_ARG_STATUS,
    SAMPLE_ARG_LOG_PROBABILITY,
    SAMPLE_ARGS
};

struct sample_params {
    bool greedy; /* the caller knows that every temperature is 0 */
};

/* Everything but the logits, in the backend's memory: rows of one call may be of different
 * sequences, with options of their own. */
struct sample_rows {
    struct tensor options;         /* fp32 [N, SAMPLE_OPTIONS] */
    struct tensor top_k;           /* i32 [N] */
    struct tensor seed, index;     /* i64 [N]; index: the number of the draw, counted on */
    struct tensor seen;            /* i32 [N, W], 32 W >= V, or absent: token t is bit t % 32 of
                                      word t / 32; the token drawn is added */
    struct tensor token, status;   /* i32 [N] */
    struct tensor log_probability; /* fp32 [N], or absent */
    struct sample_params params;
};
/* logits fp32 [N, V], V >= 1. */
tril_status sample(struct op_context *ctx, struct tensor logits, const struct sample_rows *rows,
                   struct tril_error *err);

static inline bool sample_seen(const int32_t *words, int64_t token) {
    return (uint32_t)words[token / 32] >> (token % 32) & 1;
}
static inline void sample_mark(int32_t *words, int64_t token) {
    words[token / 32] = (int32_t)((uint32_t)words[token / 32] | 1u << (token % 32));
}

#endif
