/* Visibility rules: which keys a query of attention may see.
 *
 * A query is row i of its sequence and stands at position p = i + keys - rows (aligned with the
 * last key; p may be negative); keys are columns j >= 0. A rule may cut the future (causal: j <= p)
 * and is otherwise a union of parts; without parts everything is seen.
 *
 *   window:N     |p - j| < N
 *   sinks:N      j < N                                            (Xiao et al. 2023)
 *   global:a,b   p or j is one of the listed positions            (Longformer: Beltagy et al. 2020)
 *   dilated:N,s  (p - j) mod s = 0 and |p - j| < N s              (the same)
 *   strided:L    |p - j| < L or (p - j) mod L = 0                 (Child et al. 2019)
 *   fixed:L,C    floor(p / L) = floor(j / L) or j mod L >= L - C  (the same)
 *   chunk:N      floor(p / N) = floor(j / N)
 *   blocks       blocks[i / block_q][j / block_k], any list of blocks, by rows and not by positions
 *
 * mod and floor are the mathematical ones, so that negative positions work. */
#ifndef OPS_VISIBLE_H
#define OPS_VISIBLE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

enum visible_kind {
    VISIBLE_WINDOW,
    VISIBLE_SINKS,
    VISIBLE_GLOBAL,
    VISIBLE_DILATED,
    VISIBLE_STRIDED,
    VISIBLE_FIXED,
    VISIBLE_CHUNK,
    VISIBLE_BLOCKS
};

/* a and b are the part's numbers in the order of the text; GLOBAL: a positions in `list`, ascending
 * (owned by whoever made the rule). */
struct visible_part {
    enum visible_kind kind;
    int64_t a, b;
    const int32_t *list;
};

#define VISIBLE_MOST_PARTS 8

struct visible_rule {
    bool causal;
    int32_t parts;
    struct visible_part part[VISIBLE_MOST_PARTS];
    const uint8_t *blocks; /* [block_rows, block_columns], 1: visible; of VISIBLE_BLOCKS */
    int64_t block_rows, block_columns, block_q, block_k;
};

extern const struct visible_rule visible_causal, visible_full; /* without parts */

/* Checks a rule's numbers, and that a list of blocks covers `rows` query rows and `keys` keys.
 * `name` begins the message. ERR_ARGUMENT otherwise. */
tril_status visible_check(const struct visible_rule *rule, int64_t rows, int64_t keys,
                          const char *name, struct tril_error *err);

/* Whether row i at position p sees key j: the definition, for the reference and the tests. */
bool visible(const struct visible_rule *rule, int64_t i, int64_t p, int64_t j);

/* Bit b says whether key j0 + b is seen, b < count <= 64; higher bits are 0. */
uint64_t visible_mask(const struct visible_rule *rule, int64_t i, int64_t p, int64_t j0, int count);

/* Whether some row of [i0, i1) (the first at position p0) may see some key of [j0, j1). Never wrong
 * when it says no; monotone: if it says yes, it says so of every range of rows and keys around.
 * Exact, but that fixed, chunk and blocks forget the causal rule inside a block where some row of
 * the range comes after some key. */
bool visible_any(const struct visible_rule *rule, int64_t i0, int64_t i1, int64_t p0, int64_t j0,
                 int64_t j1);
/* Whether all these rows see all these keys; never wrong when it says yes. */
bool visible_all(const struct visible_rule *rule, int64_t i0, int64_t i1, int64_t p0, int64_t j0,
                 int64_t j1);

/* ------------------------------------------------------------------ text */

/* Rules read from text, with all that they point to. Zero-initialise before the first
 * visible_parse. */
struct visible_set {
    struct visible_rule *rules;
    int32_t rule_count;
    uint8_t *head_rule; /* [heads], after visible_set_heads; NULL: rule 0 for all */
    struct visible_heads {
        int64_t first, last; /* last -1: all heads */
    } * heads;               /* which heads each rule was given for */
};

#define VISIBLE_MOST_RULES 64

/* Adds the rules of `text` to the set: parts joined by '+', of them at most one `causal` (the
 * default) or `full`: "causal+window:256+sinks:4". A rule for some heads is written "0-3=RULE" or
 * "5=RULE"; several are separated by blanks, or come by several calls. ERR_ARGUMENT when malformed;
 * the set stays valid to free. */
tril_status visible_parse(const char *text, struct visible_set *set, struct tril_error *err);
/* Assigns the rules to `heads` heads: each must have been given exactly one. An empty set becomes
 * `causal`. */
tril_status visible_set_heads(struct visible_set *set, int64_t heads, struct tril_error *err);
/* Whether some rule has a `blocks` part; and giving all of these their list (not copied). */
bool visible_set_wants_blocks(const struct visible_set *set);
void visible_set_blocks(struct visible_set *set, const uint8_t *blocks, int64_t block_rows,
                        int64_t block_columns, int64_t block_q, int64_t block_k);
void visible_set_free(struct visible_set *set);

#endif
