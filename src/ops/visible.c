/* Visibility rules: the definition, and the same for 64 keys or for a rectangle at a time. */
#include "ops/visible.h"

const struct visible_rule visible_causal = {.causal = true}, visible_full = {.causal = false};

/* b >= 1 */
static int64_t floor_div(int64_t a, int64_t b) {
    int64_t q = a / b;
    return q - (a % b < 0);
}
static int64_t floor_mod(int64_t a, int64_t b) {
    int64_t r = a % b;
    return r < 0 ? r + b : r;
}
static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* ------------------------------------------------------------------ checking */

static tril_status check_part(const struct visible_part *part, const char *name,
                              struct tril_error *err) {
    static const char *const words[] = {"window",  "sinks", "global", "dilated",
                                        "strided", "fixed", "chunk",  "blocks"};
    if ((unsigned)part->kind > VISIBLE_BLOCKS)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: visibility part of the unknown kind %d", name,
                         (int)part->kind);
    const char *word = words[part->kind];
    if (part->kind == VISIBLE_BLOCKS)
        return TRIL_OK;
    if (part->kind == VISIBLE_GLOBAL) {
        if (part->a < 1 || !part->list)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: the visibility part global needs at least one position", name);
        for (int64_t k = 0; k < part->a; k++)
            if (part->list[k] < 0 || (k > 0 && part->list[k] <= part->list[k - 1]))
                return error_set(err, TRIL_ERR_ARGUMENT,
                                 "%s: position %lld of the visibility part global is %d; they must "
                                 "be 0 or more and ascend",
                                 name, (long long)k, (int)part->list[k]);
        return TRIL_OK;
    }
    if (part->a < 1 || part->a > INT32_MAX)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the visibility part %s has the size %lld; it must be 1 to 2^31 - 1",
                         name, word, (long long)part->a);
    if (part->kind == VISIBLE_DILATED && (part->b < 1 || part->b > INT32_MAX))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the visibility part dilated has the step %lld; it must be 1 to "
                         "2^31 - 1",
                         name, (long long)part->b);
    if (part->kind == VISIBLE_FIXED && (part->b < 0 || part->b > part->a))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: the visibility part fixed has %lld columns in blocks of %lld; they "
                         "must be 0 to the block's size",
                         name, (long long)part->b, (long long)part->a);
    return TRIL_OK;
}

tril_status visible_check(const struct visible_rule *rule, int64_t rows, int64_t keys,
                          const char *name, struct tril_error *err) {
    if (rule->parts < 0 || rule->parts > VISIBLE_MOST_PARTS)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: a visibility rule has %d parts; at most %d",
                         name, (int)rule->parts, VISIBLE_MOST_PARTS);
    for (int k = 0; k < rule->parts; k++) {
        tril_status st = check_part(&rule->part[k], name, err);
        if (st != TRIL_OK)
            return st;
        if (rule->part[k].kind != VISIBLE_BLOCKS)
            continue;
        if (!rule->blocks || rule->block_q < 1 || rule->block_k < 1 || rule->block_rows < 0 ||
            rule->block_columns < 0)
            return error_set(
                err, TRIL_ERR_ARGUMENT,
                "%s: the visibility part blocks needs a list of blocks and the blocks' "
                "sizes, 1 or more",
                name);
        /* ceil(rows / block_q) without overflow */
        if (rows / rule->block_q + (rows % rule->block_q > 0) > rule->block_rows ||
            keys / rule->block_k + (keys % rule->block_k > 0) > rule->block_columns)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "%s: %lld x %lld blocks of %lld rows and %lld keys do not cover %lld "
                             "rows and %lld keys",
                             name, (long long)rule->block_rows, (long long)rule->block_columns,
                             (long long)rule->block_q, (long long)rule->block_k, (long long)rows,
                             (long long)keys);
    }
    return TRIL_OK;
}

/* ------------------------------------------------------------------ the definition */

static bool listed(const struct visible_part *part, int64_t x) {
    for (int64_t k = 0; k < part->a; k++)
        if (part->list[k] == x)
            return true;
    return false;
}

static bool part_sees(const struct visible_rule *rule, const struct visible_part *part, int64_t i,
                      int64_t p, int64_t j) {
    int64_t distance = p > j ? p - j : j - p;
    switch (part->kind) {
    case VISIBLE_WINDOW:
        return distance < part->a;
    case VISIBLE_SINKS:
        return j < part->a;
    case VISIBLE_GLOBAL:
        return listed(part, p) || listed(part, j);
    case VISIBLE_DILATED:
        return floor_mod(p - j, part->b) == 0 && distance < part->a * part->b;
    case VISIBLE_STRIDED:
        return distance < part->a || floor_mod(p - j, part->a) == 0;
    case VISIBLE_FIXED:
        return floor_div(p, part->a) == floor_div(j, part->a) ||
               floor_mod(j, part->a) >= part->a - part->b;
    case VISIBLE_CHUNK:
        return floor_div(p, part->a) == floor_div(j, part->a);
    case VISIBLE_BLOCKS:
        return i / rule->block_q < rule->block_rows && j / rule->block_k < rule->block_columns &&
               rule->blocks[i / rule->block_q * rule->block_columns + j / rule->block_k] != 0;
    }
    return false;
}

bool visible(const struct visible_rule *rule, int64_t i, int64_t p, int64_t j) {
    if (rule->causal && j > p)
        return false;
    for (int k = 0; k < rule->parts; k++)
        if (part_sees(rule, &rule->part[k], i, p, j))
            return true;
    return rule->parts == 0;
}

/* ------------------------------------------------------------------ 64 keys at a time */

/* Bits b of a word with low <= b < high. */
static uint64_t bits_between(int64_t low, int64_t high) {
    low = larger(low, 0);
    high = smaller(high, 64);
    if (low >= high)
        return 0;
    return (high == 64 ? ~UINT64_C(0) : (UINT64_C(1) << high) - 1) & (~UINT64_C(0) << low);
}

/* Repeats the word's low `period` bits; the others must be 0. */
static uint64_t bits_repeat(uint64_t word, int64_t period) {
    for (; period < 64; period *= 2)
        word |= word << period;
    return word;
}

/* Bits first, first + step, ...; 0 <= first < step. */
static uint64_t bits_every(int64_t first, int64_t step) {
    return first >= 64 ? 0 : bits_repeat(UINT64_C(1) << first, step);
}

/* Bits b with (j0 + b) mod length >= length - count; j0 >= 0. */
static uint64_t bits_last_columns(int64_t length, int64_t count, int64_t j0) {
    if (count == 0)
        return 0;
    if (count == length)
        return ~UINT64_C(0);
    int64_t phase = j0 % length, first = length - count - phase;
    if (length >= 64)
        return bits_between(first, length - phase) |
               bits_between(first + length, 2 * length - phase);
    uint64_t all = (UINT64_C(1) << length) - 1, word = all & ~(all >> count);
    return bits_repeat(((word >> phase) | (word << (length - phase))) & all, length);
}

/* Index of the first listed position >= x. */
static int64_t list_find(const struct visible_part *part, int64_t x) {
    int64_t low = 0, high = part->a;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (part->list[middle] < x)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}
static bool list_has_between(const struct visible_part *part, int64_t low, int64_t high) {
    int64_t k = list_find(part, low);
    return k < part->a && part->list[k] < high;
}

static uint64_t mask_of_blocks(const struct visible_rule *rule, int64_t i, int64_t j0, int count) {
    if (i / rule->block_q >= rule->block_rows)
        return 0;
    const uint8_t *row = rule->blocks + i / rule->block_q * rule->block_columns;
    uint64_t mask = 0;
    for (int64_t c = j0 / rule->block_k; c < rule->block_columns; c++) {
        int64_t begin = c * rule->block_k - j0;
        if (begin >= count)
            break;
        if (row[c])
            mask |= bits_between(begin, begin + rule->block_k);
    }
    return mask;
}

static uint64_t mask_of_part(const struct visible_rule *rule, const struct visible_part *part,
                             int64_t i, int64_t p, int64_t j0, int count) {
    int64_t x = p - j0, a = part->a, b = part->b;
    uint64_t mask = 0;
    switch (part->kind) {
    case VISIBLE_WINDOW:
        return bits_between(x - a + 1, x + a);
    case VISIBLE_SINKS:
        return bits_between(0, a - j0);
    case VISIBLE_GLOBAL:
        if (list_has_between(part, p, p + 1))
            return ~UINT64_C(0);
        for (int64_t k = list_find(part, j0); k < a && part->list[k] < j0 + count; k++)
            mask |= UINT64_C(1) << (part->list[k] - j0);
        return mask;
    case VISIBLE_DILATED:
        if (x - a * b >= 64 || x + a * b <= 0)
            return 0;
        return bits_between(x - a * b + 1, x + a * b) & bits_every(floor_mod(x, b), b);
    case VISIBLE_STRIDED:
        return bits_between(x - a + 1, x + a) | bits_every(floor_mod(x, a), a);
    case VISIBLE_FIXED:
        mask = bits_last_columns(a, b, j0);
        /* fall through */
    case VISIBLE_CHUNK: {
        int64_t begin = p - floor_mod(p, a) - j0;
        return mask | bits_between(begin, begin + a);
    }
    case VISIBLE_BLOCKS:
        return mask_of_blocks(rule, i, j0, count);
    }
    return 0;
}

uint64_t visible_mask(const struct visible_rule *rule, int64_t i, int64_t p, int64_t j0,
                      int count) {
    uint64_t allowed = bits_between(0, count), mask = 0;
    if (rule->causal)
        allowed &= bits_between(0, p - j0 + 1);
    if (rule->parts == 0 || allowed == 0)
        return allowed;
    for (int k = 0; k < rule->parts; k++)
        mask |= mask_of_part(rule, &rule->part[k], i, p, j0, count);
    return mask & allowed;
}

/* ------------------------------------------------------------------ rectangles */

/* Rows [i0, i1) at positions [p0, p1) against keys [j0, j1), none empty; p - j takes all values of
 * [least, most], with `causal` none below 0. */
struct rectangle {
    int64_t i0, i1, p0, p1, j0, j1, least, most;
    bool causal;
};

static bool multiple_between(int64_t step, int64_t low, int64_t high) {
    return floor_div(high, step) * step >= low;
}

static bool global_any(const struct visible_part *part, const struct rectangle *r) {
    /* A listed row sees keys from j0 on, the first of them if it comes late enough; a listed key is
     * seen from the last row if from any. */
    if (list_has_between(part, r->causal ? larger(r->p0, r->j0) : r->p0, r->p1))
        return true;
    return list_has_between(part, r->j0, r->causal ? smaller(r->j1, r->p1) : r->j1);
}

static bool columns_any(const struct visible_part *part, const struct rectangle *r) {
    if (part->b == 0)
        return false;
    int64_t phase = r->j0 % part->a, first = part->a - part->b;
    int64_t j = phase >= first ? r->j0 : r->j0 - phase + first;
    return j < r->j1 && (!r->causal || j < r->p1);
}

static bool same_block_any(const struct visible_part *part, const struct rectangle *r) {
    return floor_div(r->p0, part->a) <= floor_div(r->j1 - 1, part->a) &&
           floor_div(r->j0, part->a) <= floor_div(r->p1 - 1, part->a);
}

/* The truth of `wanted` for all or some blocks that the rectangle touches. */
static bool blocks_any(const struct visible_rule *rule, const struct rectangle *r, bool wanted) {
    for (int64_t y = r->i0 / rule->block_q; y <= (r->i1 - 1) / rule->block_q; y++)
        for (int64_t x = r->j0 / rule->block_k; x <= (r->j1 - 1) / rule->block_k; x++) {
            bool inside = y < rule->block_rows && x < rule->block_columns;
            if ((inside && rule->blocks[y * rule->block_columns + x]) == wanted)
                return true;
        }
    return false;
}

static bool part_any(const struct visible_rule *rule, const struct visible_part *part,
                     const struct rectangle *r) {
    int64_t a = part->a, reach = a * part->b;
    bool near = r->least < a && r->most > -a;
    switch (part->kind) {
    case VISIBLE_WINDOW:
        return near;
    case VISIBLE_SINKS:
        return r->j0 < a;
    case VISIBLE_GLOBAL:
        return global_any(part, r);
    case VISIBLE_DILATED:
        return multiple_between(part->b, larger(r->least, -reach + 1), smaller(r->most, reach - 1));
    case VISIBLE_STRIDED:
        return near || multiple_between(a, r->least, r->most);
    case VISIBLE_FIXED:
        return same_block_any(part, r) || columns_any(part, r);
    case VISIBLE_CHUNK:
        return same_block_any(part, r);
    case VISIBLE_BLOCKS:
        return blocks_any(rule, r, true);
    }
    return true;
}

static bool rectangle_make(struct rectangle *r, const struct visible_rule *rule, int64_t i0,
                           int64_t i1, int64_t p0, int64_t j0, int64_t j1) {
    int64_t p1 = p0 + i1 - i0;
    *r = (struct rectangle){i0, i1, p0, p1, j0, j1, p0 - (j1 - 1), p1 - 1 - j0, rule->causal};
    return i0 < i1 && j0 < j1;
}

bool visible_any(const struct visible_rule *rule, int64_t i0, int64_t i1, int64_t p0, int64_t j0,
                 int64_t j1) {
    struct rectangle r;
    if (!rectangle_make(&r, rule, i0, i1, p0, j0, j1))
        return false;
    if (rule->causal) {
        r.least = larger(r.least, 0);
        if (r.least > r.most)
            return false;
    }
    for (int k = 0; k < rule->parts; k++)
        if (part_any(rule, &rule->part[k], &r))
            return true;
    return rule->parts == 0;
}

bool visible_all(const struct visible_rule *rule, int64_t i0, int64_t i1, int64_t p0, int64_t j0,
                 int64_t j1) {
    struct rectangle r;
    if (!rectangle_make(&r, rule, i0, i1, p0, j0, j1))
        return true;
    if (rule->causal && r.least < 0)
        return false;
    for (int k = 0; k < rule->parts; k++) {
        const struct visible_part *part = &rule->part[k];
        int64_t a = part->a;
        bool near = r.least > -a && r.most < a, all = false;
        switch (part->kind) {
        case VISIBLE_WINDOW:
        case VISIBLE_STRIDED:
            all = near;
            break;
        case VISIBLE_SINKS:
            all = j1 <= a;
            break;
        case VISIBLE_GLOBAL:
            break;
        case VISIBLE_DILATED:
            all = near && part->b == 1;
            break;
        case VISIBLE_FIXED:
        case VISIBLE_CHUNK:
            all = floor_div(smaller(r.p0, j0), a) == floor_div(larger(r.p1, j1) - 1, a);
            break;
        case VISIBLE_BLOCKS:
            all = !blocks_any(rule, &r, false);
            break;
        }
        if (all)
            return true;
    }
    return rule->parts == 0;
}
