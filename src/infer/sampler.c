/* Sampling. Candidates are kept as (logit, id); only as many as the filters need are sorted. */
#include "infer/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/random.h"

struct candidate {
    float logit;
    int32_t id;
    double p; /* unnormalised probability at temperature */
};

struct sampler {
    struct sampler_options o;
    int64_t vocab;
    bool *seen;
    struct candidate *candidates; /* [V] */
};

struct sampler_options sampler_defaults(void) {
    return (struct sampler_options){
        .temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .repetition_penalty = 1};
}

static tril_status check(const char *name, double value, double min, double max,
                         struct tril_error *err) {
    if (value >= min && value <= max)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT, "%s must be from %g to %g, not %g", name, min, max,
                     value);
}

tril_status sampler_create(struct sampler **out, const struct sampler_options *o, int64_t vocab,
                           struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct sampler *s = NULL;
    *out = NULL;
    TRY(check("temperature", o->temperature, 0, 100, err));
    TRY(check("top_k", (double)o->top_k, 0, 1e9, err));
    TRY(check("top_p", o->top_p, 0, 1, err));
    TRY(check("min_p", o->min_p, 0, 1, err));
    TRY(check("repetition_penalty", o->repetition_penalty, 0.01, 100, err));
    s = calloc(1, sizeof *s);
    if (s) {
        s->seen = calloc((size_t)vocab, sizeof *s->seen);
        s->candidates = malloc((size_t)vocab * sizeof *s->candidates);
    }
    if (!s || !s->seen || !s->candidates) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory for the sampler");
        goto done;
    }
    s->o = *o;
    s->vocab = vocab;
    *out = s;
done:
    if (st != TRIL_OK)
        sampler_free(s);
    return st;
}

void sampler_free(struct sampler *s) {
    if (!s)
        return;
    free(s->seen);
    free(s->candidates);
    free(s);
}

void sampler_accept(struct sampler *s, int32_t token) {
    if (token >= 0 && token < s->vocab)
        s->seen[token] = true;
}

/* Greater logits first; equal ones by id, so that the order is total. */
static int by_logit(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit < y->logit ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

/* Moves the k greatest candidates to the front (quickselect), sorted. */
static void select_top(struct candidate *c, int64_t n, int64_t k) {
    int64_t lo = 0, hi = n - 1;
    while (lo < hi) {
        struct candidate pivot = c[lo + (hi - lo) / 2];
        int64_t i = lo, j = hi;
        while (i <= j) {
            while (by_logit(&c[i], &pivot) < 0)
                i++;
            while (by_logit(&c[j], &pivot) > 0)
                j--;
            if (i <= j) {
                struct candidate t = c[i];
                c[i++] = c[j];
                c[j--] = t;
            }
        }
        if (k - 1 <= j)
            hi = j;
        else if (k - 1 >= i)
            lo = i;
        else
            break;
    }
    qsort(c, (size_t)k, sizeof *c, by_logit);
}

/* Keeps the shortest prefix (in order of probability) whose mass reaches top_p. Sorting everything
 * is rarely needed: ever larger prefixes are sorted until one holds the mass. */
static int64_t cut_top_p(struct sampler *s, int64_t n, bool sorted, double total) {
    double wanted = s->o.top_p * total, mass = 0;
    int64_t front = sorted ? n : n < 256 ? n : 256;
    for (int64_t i = 0;;) {
        if (!sorted)
            select_top(s->candidates + i, n - i, front - i);
        for (; i < front; i++) {
            mass += s->candidates[i].p;
            if (mass >= wanted)
                return i + 1;
        }
        if (front == n)
            return n;
        front = 4 * front < n ? 4 * front : n;
    }
}

/* Refuses what no softmax can be taken of; returns the greatest logit. */
static tril_status check_logits(const float *logits, int64_t n, float *greatest,
                                struct tril_error *err) {
    float top = logits[0];
    bool bad = false;
    for (int64_t i = 0; i < n; i++) {
        bad |= isnan(logits[i]);
        top = logits[i] > top ? logits[i] : top;
    }
    *greatest = top;
    if (!bad && isfinite(top))
        return TRIL_OK;
    return error_set(err, TRIL_ERR_NUMERIC,
                     "the model's logits are not finite: its weights are damaged, or overflow in "
                     "this dtype");
}

static double log_sum_exp(const float *logits, int64_t n, float greatest) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += exp((double)(logits[i] - greatest));
    return greatest + log(sum);
}

static float penalised(const struct sampler *s, int64_t id, float logit) {
    float r = (float)s->o.repetition_penalty;
    if (!s->seen[id])
        return logit;
    return logit > 0 ? logit / r : logit * r;
}

/* One draw from the candidates that the filters leave. */
static struct candidate draw(struct sampler *s, const float *logits, uint64_t index) {
    struct candidate *c = s->candidates, picked;
    int64_t n = s->vocab;
    double scale = 1 / s->o.temperature, total = 0, kept = 0;
    float greatest = -INFINITY;
    bool sorted = s->o.top_k > 0 && s->o.top_k < n;
    for (int64_t i = 0; i < n; i++) {
        c[i] = (struct candidate){.logit = penalised(s, i, logits[i]), .id = (int32_t)i};
        greatest = c[i].logit > greatest ? c[i].logit : greatest;
    }
    if (sorted) {
        n = s->o.top_k;
        select_top(c, s->vocab, n);
    }
    for (int64_t i = 0; i < n; i++) {
        c[i].p = exp((double)(c[i].logit - greatest) * scale);
        total += c[i].p;
    }
    if (s->o.top_p < 1)
        n = cut_top_p(s, n, sorted, total);
    for (int64_t i = 0; i < n; i++)
        kept += c[i].p >= s->o.min_p ? c[i].p : 0;
    struct random_key key = {.seed = s->o.seed, .op = RANDOM_SAMPLE};
    double u = (double)random_uniform(&key, index) * kept;
    picked = c[0];
    for (int64_t i = 0; i < n && u >= 0; i++) {
        if (c[i].p < s->o.min_p)
            continue;
        picked = c[i];
        u -= c[i].p;
    }
    return picked;
}

tril_status sampler_next(struct sampler *s, const float *logits, uint64_t index, int32_t *token,
                         double *log_probability, struct tril_error *err) {
    float greatest;
    tril_status st = check_logits(logits, s->vocab, &greatest, err);
    if (st != TRIL_OK)
        return st;
    if (s->o.temperature > 0) {
        *token = draw(s, logits, index).id;
    } else {
        float best = -INFINITY;
        for (int64_t i = 0; i < s->vocab; i++) {
            float x = penalised(s, i, logits[i]);
            if (x > best) {
                best = x;
                *token = (int32_t)i;
            }
        }
    }
    if (log_probability)
        *log_probability = (double)logits[*token] - log_sum_exp(logits, s->vocab, greatest);
    return TRIL_OK;
}
