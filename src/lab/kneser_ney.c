/* Hash tables of the n-grams that occur. A 3-gram's key is its first two tokens' number and its
 * last token; the continuation counts of the lower orders are counted from the tables above them.
 */
#include "lab/kneser_ney.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* A map from pairs of 32-bit numbers to counts, by open addressing; a count of 0 is a free place.
 */
struct counts {
    uint64_t *keys;
    uint32_t *values;
    size_t room, used; /* room: a power of two, or 0 */
};

static uint64_t pair(uint32_t a, uint32_t b) {
    return (uint64_t)a << 32 | b;
}

/* Where a key stands, or would stand. */
static size_t counts_place(const struct counts *c, uint64_t key) {
    uint64_t h = key * 0x9E3779B97F4A7C15u;
    size_t i = (h ^ h >> 32) & (c->room - 1);
    while (c->values[i] && c->keys[i] != key)
        i = (i + 1) & (c->room - 1);
    return i;
}

static uint32_t counts_get(const struct counts *c, uint64_t key) {
    return c->room ? c->values[counts_place(c, key)] : 0;
}

static void counts_free(struct counts *c) {
    free(c->keys);
    free(c->values);
    *c = (struct counts){0};
}

static bool counts_grow(struct counts *c) {
    struct counts grown = {.room = c->room ? 2 * c->room : 1024, .used = c->used};
    grown.keys = malloc(grown.room * sizeof *grown.keys);
    grown.values = calloc(grown.room, sizeof *grown.values);
    if (!grown.keys || !grown.values) {
        counts_free(&grown);
        return false;
    }
    for (size_t i = 0; i < c->room; i++) {
        if (!c->values[i])
            continue;
        size_t at = counts_place(&grown, c->keys[i]);
        grown.keys[at] = c->keys[i];
        grown.values[at] = c->values[i];
    }
    counts_free(c);
    *c = grown;
    return true;
}

/* The value of a key, for changing it; a new key's is 0 and must be set. NULL: out of memory. */
static uint32_t *counts_at(struct counts *c, uint64_t key) {
    if (c->used * 4 >= c->room * 3 && !counts_grow(c))
        return NULL;
    size_t i = counts_place(c, key);
    if (!c->values[i]) {
        c->keys[i] = key;
        c->used++;
    }
    return &c->values[i];
}

/* What a context needs: the sum of the counts of its n-grams, and how many of them have a count of
 * 1, 2, and 3 or more. */
struct context {
    uint32_t total, with[3];
};

static void context_add(struct context *h, uint32_t count) {
    h->total += count;
    h->with[count < 3 ? count - 1 : 2]++;
}

struct discounts {
    double of[4]; /* of counts 0, 1, 2, 3 and more */
};

struct kneser_ney {
    uint32_t vocab;
    struct counts pairs;    /* u v: number of the context u v, from 1 */
    struct counts trigrams; /* number of u v, w: count */
    struct counts bigrams;  /* v w: N1+(. v w) */
    uint32_t *unigrams;     /* w: N1+(. w) */
    struct context *after2; /* by the number of u v */
    struct context *after1; /* by v */
    struct context after0;
    struct discounts d3, d2, d1;
};

void kneser_ney_free(struct kneser_ney *m) {
    if (!m)
        return;
    counts_free(&m->pairs);
    counts_free(&m->trigrams);
    counts_free(&m->bigrams);
    free(m->unigrams);
    free(m->after2);
    free(m->after1);
    free(m);
}

/* Chen and Goodman's estimates, from n[k] n-grams with a count of k. */
static struct discounts discounts_estimate(const int64_t n[5]) {
    struct discounts d = {{0, 0.5, 1, 1.5}};
    if (!n[1] || !n[2] || !n[3] || !n[4])
        return d;
    double y = (double)n[1] / (double)(n[1] + 2 * n[2]);
    for (int k = 1; k <= 3; k++) {
        double estimate = k - (k + 1) * y * (double)n[k + 1] / (double)n[k];
        d.of[k] = fmin(fmax(estimate, 0), k); /* odd data may give nonsense */
    }
    return d;
}

static struct discounts discounts_of(const uint32_t *counts, size_t room) {
    int64_t n[5] = {0};
    for (size_t i = 0; i < room; i++)
        if (counts[i] <= 4)
            n[counts[i]]++;
    return discounts_estimate(n);
}

static bool count_trigrams(struct kneser_ney *m, const uint32_t *tokens, int64_t n) {
    uint32_t contexts = 0;
    for (int64_t i = 2; i < n; i++) {
        uint32_t *number = counts_at(&m->pairs, pair(tokens[i - 2], tokens[i - 1]));
        if (!number)
            return false;
        if (!*number)
            *number = ++contexts;
        uint32_t *count = counts_at(&m->trigrams, pair(*number, tokens[i]));
        if (!count)
            return false;
        ++*count;
    }
    return true;
}

/* The lower orders: what stands before v w, and before w, how often as different tokens. */
static bool count_continuations(struct kneser_ney *m) {
    const struct counts *c = &m->trigrams;
    uint32_t *middle = malloc((m->pairs.used + 1) * sizeof *middle); /* v of the context u v */
    if (!middle)
        return false;
    for (size_t i = 0; i < m->pairs.room; i++)
        if (m->pairs.values[i])
            middle[m->pairs.values[i]] = (uint32_t)m->pairs.keys[i];
    for (size_t i = 0; i < c->room; i++) {
        if (!c->values[i])
            continue;
        uint32_t number = (uint32_t)(c->keys[i] >> 32), w = (uint32_t)c->keys[i];
        uint32_t *count = counts_at(&m->bigrams, pair(middle[number], w));
        if (!count) {
            free(middle);
            return false;
        }
        ++*count;
        context_add(&m->after2[number], c->values[i]);
    }
    free(middle);
    c = &m->bigrams;
    for (size_t i = 0; i < c->room; i++) {
        if (!c->values[i])
            continue;
        m->unigrams[(uint32_t)c->keys[i]]++;
        context_add(&m->after1[c->keys[i] >> 32], c->values[i]);
    }
    for (uint32_t w = 0; w < m->vocab; w++)
        if (m->unigrams[w])
            context_add(&m->after0, m->unigrams[w]);
    return true;
}

tril_status kneser_ney_train(struct kneser_ney **out, const uint32_t *tokens, int64_t n,
                             uint32_t vocab, struct tril_error *err) {
    struct kneser_ney *m = NULL;
    tril_status st = TRIL_OK;
    *out = NULL;
    if (vocab == 0 || n < 0 || n > UINT32_MAX / 2)
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "the 3-gram baseline takes up to 2^31 tokens of a vocabulary of at least 1");
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] >= vocab)
            return error_set(err, TRIL_ERR_ARGUMENT, "token %u is outside the vocabulary of %u",
                             tokens[i], vocab);
    bool good = (m = calloc(1, sizeof *m)) != NULL;
    if (good) {
        m->vocab = vocab;
        m->unigrams = calloc(vocab, sizeof *m->unigrams);
        m->after1 = calloc(vocab, sizeof *m->after1);
        good = m->unigrams && m->after1 && count_trigrams(m, tokens, n) &&
               (m->after2 = calloc(m->pairs.used + 1, sizeof *m->after2)) && count_continuations(m);
    }
    if (!good) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the 3-gram baseline");
        goto done;
    }
    m->d3 = discounts_of(m->trigrams.values, m->trigrams.room);
    m->d2 = discounts_of(m->bigrams.values, m->bigrams.room);
    m->d1 = discounts_of(m->unigrams, vocab);
    *out = m;
    m = NULL;
done:
    kneser_ney_free(m);
    return st;
}

/* One line of the formula: what is left of `count`, and the mass taken from the context, given to
 * the distribution below. */
static double interpolate(const struct context *h, const struct discounts *d, uint32_t count,
                          double below) {
    if (h->total == 0)
        return below;
    double taken = 0;
    for (int k = 1; k <= 3; k++)
        taken += d->of[k] * h->with[k - 1];
    return (count - d->of[count < 3 ? count : 3] + taken * below) / h->total;
}

double kneser_ney_probability(const struct kneser_ney *m, const uint32_t *context, int64_t length,
                              uint32_t token) {
    double p = interpolate(&m->after0, &m->d1, m->unigrams[token], 1.0 / m->vocab);
    if (length < 1)
        return p;
    uint32_t v = context[length - 1];
    p = interpolate(&m->after1[v], &m->d2, counts_get(&m->bigrams, pair(v, token)), p);
    if (length < 2)
        return p;
    uint32_t number = counts_get(&m->pairs, pair(context[length - 2], v));
    if (number)
        p = interpolate(&m->after2[number], &m->d3, counts_get(&m->trigrams, pair(number, token)),
                        p);
    return p;
}

tril_status kneser_ney_loss(const struct kneser_ney *m, const uint32_t *tokens, int64_t n,
                            double *loss, struct tril_error *err) {
    double sum = 0;
    if (n < 2)
        return error_set(err, TRIL_ERR_ARGUMENT, "the 3-gram baseline needs two tokens to judge");
    for (int64_t i = 0; i < n; i++) {
        if (tokens[i] >= m->vocab)
            return error_set(err, TRIL_ERR_ARGUMENT, "token %u is outside the vocabulary of %u",
                             tokens[i], m->vocab);
        if (i > 0)
            sum -= log(kneser_ney_probability(m, tokens, i, tokens[i]));
    }
    *loss = sum / (double)(n - 1);
    return TRIL_OK;
}
