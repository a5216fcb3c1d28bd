/* Why the mask is -inf and not 0: e^0 = 1 lets the future in. The mass that leaks, row by row; the
 * ways to mask, timed; and one masked pass against a loop over prefixes. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/system.h"
#include "base/threads.h"
#include "lab/attend.h"
#include "lab/bench.h"

/* ------------------------------------------------------------------ the leak */

/* softmax of a row whose hidden scores became `hidden`; the mass that falls on j > i. */
static double leaked(const float *scores, int64_t T, int64_t i, double hidden, double *total) {
    double most = -INFINITY, sum = 0, beyond = 0;
    for (int64_t j = 0; j < T; j++)
        most = fmax(most, j <= i ? (double)scores[j] : hidden);
    for (int64_t j = 0; j < T; j++) {
        double e = exp((j <= i ? (double)scores[j] : hidden) - most);
        sum += e;
        beyond += j > i ? e : 0;
    }
    *total = 0;
    for (int64_t j = 0; j < T; j++)
        *total += exp((j <= i ? (double)scores[j] : hidden) - most) / sum;
    return beyond / sum;
}

struct leak {
    double zero, infinite, finite, row_error; /* means over rows; largest |sum - 1| */
};

static tril_status measure_leak(struct lab *l, struct leak *out, struct tril_error *err) {
    enum { T = 64, D = 32 };
    static const char *const columns[] = {"row", "keys seen", "leak with 0", "leak with -inf",
                                          "leak with -1e9"};
    float *x = malloc((2 * T * D + T * T) * sizeof *x), *q = x, *k = x + T * D, *s = k + T * D;
    double row[T], zero[T], infinite[T], total;
    struct table *t = NULL;
    tril_status st = TRIL_OK;
    *out = (struct leak){0};
    if (!x)
        return lab_no_memory(err);
    lab_normal(x, 2 * T * D, 5);
    for (int i = 0; i < T; i++)
        for (int j = 0; j < T; j++) {
            double dot = 0;
            for (int c = 0; c < D; c++)
                dot += (double)q[i * D + c] * (double)k[j * D + c];
            s[i * T + j] = (float)(dot / sqrt(D));
        }
    TRY(table_create(&t, columns, 5, err));
    for (int i = 0; i < T; i++) {
        row[i] = i + 1;
        zero[i] = leaked(s + i * T, T, i, 0, &total);
        out->row_error = fmax(out->row_error, fabs(total - 1));
        infinite[i] = leaked(s + i * T, T, i, -INFINITY, &total);
        out->row_error = fmax(out->row_error, fabs(total - 1));
        double finite = leaked(s + i * T, T, i, -1e9, &total);
        out->zero += zero[i] / T;
        out->infinite += infinite[i] / T;
        out->finite += finite / T;
        if ((i & (i + 1)) == 0 || i == T - 2) { /* rows 1, 2, 4, 8, ... */
            table_add_int(t, i + 1);
            table_add_int(t, i + 1);
            table_add_number(t, zero[i], 4);
            table_add_number(t, infinite[i], 4);
            table_add_number(t, finite, 4);
        }
    }
    st = lab_table(l, "leak", "Probability on the future, 64 tokens, random q and k", t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const struct curve curves[] = {
        {.label = "hidden scores set to 0", .x = row, .y = zero, .n = T, .style = CURVE_LINE},
        {.label = "hidden scores set to -inf",
         .x = row,
         .y = infinite,
         .n = T,
         .style = CURVE_LINE}};
    const struct curve_plot plot = {.title = "What leaks from the future",
                                    .x_label = "row",
                                    .y_label = "probability on j > i",
                                    .curves = curves,
                                    .curve_count = 2,
                                    .y_from_zero = true};
    TRY(lab_curves(l, "leak", &plot, err));
done:
    table_free(t);
    free(x);
    return st;
}

/* ------------------------------------------------------------------ ways to mask */

enum mask { MASK_NONE, MASK_FILL, MASK_ADD, MASK_FINITE, MASK_SKIP, MASKS };
static const char *const mask_names[] = {"none (wrong)", "masked fill", "additive -inf",
                                         "additive -1e9", "implicit skip"};

struct passes {
    enum mask kind;
    int64_t T, matrices;
    const float *scores, *bias;
    const unsigned char *hidden;
    float *p;
};

/* The softmax of the textbook over whole matrices, with the mask as the frameworks apply it. */
static void softmax_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct passes *m = arg;
    int64_t T = m->T;
    (void)worker;
    for (int64_t r = begin; r < end; r++) {
        int64_t i = r % T, n = m->kind == MASK_SKIP ? i + 1 : T;
        const float *s = m->scores + r * T, *bias = m->bias + i * T;
        const unsigned char *hidden = m->hidden + i * T;
        float *p = m->p + r * T, most = -INFINITY, sum = 0;
        if (m->kind == MASK_FILL)
            for (int64_t j = 0; j < n; j++)
                p[j] = hidden[j] ? -INFINITY : s[j];
        else if (m->kind == MASK_ADD || m->kind == MASK_FINITE)
            for (int64_t j = 0; j < n; j++)
                p[j] = s[j] + bias[j];
        else
            memcpy(p, s, (size_t)n * sizeof *p);
        for (int64_t j = 0; j < n; j++)
            most = p[j] > most ? p[j] : most;
        for (int64_t j = 0; j < n; j++) {
            p[j] = expf(p[j] - most);
            sum += p[j];
        }
        for (int64_t j = 0; j < n; j++)
            p[j] /= sum;
        if (n < T)
            memset(p + n, 0, (size_t)(T - n) * sizeof *p);
    }
}

static tril_status softmax_pass(void *arg, struct tril_error *err) {
    struct passes *m = arg;
    (void)err;
    parallel_for(m->matrices * m->T, 16, softmax_rows, m);
    return TRIL_OK;
}

struct masks {
    double softmax[MASKS], whole[MASKS]; /* seconds; whole: attention with it, NAN where not */
    double difference;                   /* largest between the right ones */
};

static tril_status time_masks(struct lab *l, struct masks *out, struct tril_error *err) {
    static const char *const columns[] = {"mask", "softmax over T x T ms", "beside masked fill",
                                          "flash attention ms"};
    int64_t T = lab_choose(l, 512, 1024), H = 8;
    struct lab_timing how = {
        .warm = 3, .runs = lab_choose(l, 15, 60), .seconds = (double)lab_choose(l, 1, 6)};
    struct passes m = {.T = T, .matrices = H};
    size_t all = (size_t)(H * T * T), one = (size_t)(T * T);
    float *memory = malloc((2 * all + 3 * one) * sizeof *memory), *right = NULL;
    unsigned char *hidden = malloc(one);
    struct lab_times times;
    struct attend a = {0};
    struct table *t = NULL;
    tril_status st = TRIL_OK;
    *out = (struct masks){0};
    if (!memory || !hidden) {
        st = lab_no_memory(err);
        goto done;
    }
    m.scores = memory;
    m.p = memory + all;
    m.hidden = hidden;
    float *infinite = memory + 2 * all, *finite = infinite + one;
    right = finite + one;
    lab_normal(memory, (int64_t)all, 6);
    for (size_t i = 0; i < one; i++) {
        hidden[i] = (int64_t)i % T > (int64_t)i / T;
        infinite[i] = hidden[i] ? -INFINITY : 0;
        finite[i] = hidden[i] ? -1e9f : 0;
    }
    TRY(attend_create(&a, l->ctx, 1, T, H, 64, DT_F32, false, 7, err));
    TRY(table_create(&t, columns, 4, err));
    for (int kind = 0; kind < MASKS; kind++) {
        m.kind = (enum mask)kind;
        m.bias = kind == MASK_FINITE ? finite : infinite;
        TRY(lab_time(&how, softmax_pass, &m, &times, err));
        out->softmax[kind] = times.median;
        if (kind == MASK_FILL)
            memcpy(right, m.p, one * sizeof *right);
        if (kind >= MASK_FILL)
            out->difference = fmax(out->difference, lab_difference(right, m.p, (int64_t)one));
        out->whole[kind] = NAN;
        a.params.causal = kind == MASK_SKIP;
        a.bias = kind == MASK_ADD || kind == MASK_FINITE
                     ? tensor_3d((void *)m.bias, DT_F32, 1, T, T)
                     : tensor_none();
        if (kind != MASK_FILL) {
            TRY(lab_time(&how, attend_forward, &a, &times, err));
            out->whole[kind] = times.median;
        }
    }
    for (int kind = 0; kind < MASKS; kind++) {
        table_add_text(t, mask_names[kind]);
        table_add_number(t, out->softmax[kind] * 1e3, 3);
        table_add_number(t, out->softmax[kind] / out->softmax[MASK_FILL], 2);
        table_add_number(t, out->whole[kind] * 1e3, 3);
    }
    st = lab_table(l, "masks", "Masks: 8 heads, the textbook's softmax and whole flash attention",
                   t, err);
    t = NULL;
done:
    table_free(t);
    attend_free(&a);
    free(memory);
    free(hidden);
    return st;
}

/* ------------------------------------------------------------------ a loop over prefixes */

struct prefixes {
    struct attend *a;
    float *last; /* [T, H d]: each prefix's last row */
    int64_t T;
};

/* What a masked pass replaces: T passes over longer and longer prefixes, of each the last row. */
static tril_status prefix_loop(void *arg, struct tril_error *err) {
    struct prefixes *p = arg;
    struct attend *a = p->a;
    size_t row = (size_t)(a->H * a->d);
    tril_status st = TRIL_OK;
    for (int64_t n = 1; n <= p->T; n++) {
        a->offsets[1] = a->length[0] = (int32_t)n;
        TRY(attend_forward(a, err));
        memcpy(p->last + (size_t)(n - 1) * row, (float *)a->o + (size_t)(n - 1) * row,
               row * sizeof(float));
    }
done:
    a->offsets[1] = a->length[0] = (int32_t)p->T;
    return st;
}

static tril_status compare_prefixes(struct lab *l, double *speedup, double *difference,
                                    struct tril_error *err) {
    static const char *const columns[] = {"T", "one masked pass ms", "loop over prefixes ms",
                                          "times faster", "largest difference"};
    struct attend a = {0};
    struct table *t = NULL;
    float *last = NULL;
    struct lab_times one, loop;
    tril_status st = TRIL_OK;
    TRY(table_create(&t, columns, 5, err));
    *difference = 0;
    for (int64_t T = 64; T <= lab_choose(l, 256, 1024); T *= 2) {
        struct lab_timing how = {.warm = 2, .runs = 9, .seconds = 2},
                          slow = {.warm = 1, .runs = 3, .seconds = 4};
        TRY(attend_create(&a, l->ctx, 1, T, 4, 32, DT_F32, false, 8, err));
        last = malloc((size_t)(T * 4 * 32) * sizeof *last);
        if (!last) {
            st = lab_no_memory(err);
            goto done;
        }
        struct prefixes p = {&a, last, T};
        TRY(lab_time(&slow, prefix_loop, &p, &loop, err));
        TRY(lab_time(&how, attend_forward, &a, &one, err));
        double d = lab_difference(last, a.o, T * 4 * 32);
        *difference = fmax(*difference, d);
        *speedup = loop.median / one.median;
        table_add_int(t, T);
        table_add_number(t, one.median * 1e3, 3);
        table_add_number(t, loop.median * 1e3, 3);
        table_add_number(t, *speedup, 1);
        table_add_number(t, d, -1);
        attend_free(&a);
        free(last);
        last = NULL;
    }
    st = lab_table(l, "prefixes", "One masked pass against a pass per prefix (4 heads of 32)", t,
                   err);
    t = NULL;
done:
    table_free(t);
    attend_free(&a);
    free(last);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    struct leak leak;
    struct masks masks;
    double speedup = 0, difference = 0;
    tril_status st = TRIL_OK;
    TRY(measure_leak(l, &leak, err));
    TRY(time_masks(l, &masks, err));
    TRY(compare_prefixes(l, &speedup, &difference, err));
    lab_claim(l, leak.zero > 0 && leak.infinite == 0, "0 leaks, -inf does not",
              "e^0 = 1, e^-inf = 0", "%.1f%% of the probability leaks with 0, %.1g%% with -inf",
              100 * leak.zero, 100 * leak.infinite);
    lab_claim(l, leak.row_error < 1e-12, "rows sum to 1", "1", "within %.0e", leak.row_error);
    double mask_cost = masks.softmax[MASK_FILL] / masks.softmax[MASK_NONE] - 1;
    double spread = fmax(masks.softmax[MASK_ADD], masks.softmax[MASK_FINITE]) /
                    fmin(masks.softmax[MASK_ADD], masks.softmax[MASK_FINITE]);
    lab_claim(l, mask_cost < 0.5, "the kind of mask", "not the bottleneck",
              "masked fill costs %+.0f%% of an unmasked softmax, additive masks %+.0f%%, skipping "
              "%+.0f%%",
              100 * mask_cost, 100 * (masks.softmax[MASK_ADD] / masks.softmax[MASK_NONE] - 1),
              100 * (masks.softmax[MASK_SKIP] / masks.softmax[MASK_NONE] - 1));
    lab_claim(l, difference < 1e-5, "one masked pass equals a loop over prefixes", "equal, faster",
              "differs by %.1g, %.0f times faster", difference, speedup);
    lab_value(l, "leak_zero", leak.zero);
    lab_value(l, "leak_infinite", leak.infinite);
    lab_value(l, "leak_finite", leak.finite);
    lab_value(l, "row_error", leak.row_error);
    lab_value(l, "mask_difference", masks.difference);
    lab_value(l, "prefix_difference", difference);
    lab_value(l, "prefix_speedup", speedup);
    lab_say(l,
            "Hidden scores set to 0 put %.0f%% of a row's probability on the future on average "
            "(the first rows nearly all of it); -inf puts %.2g there and -1e9 %.2g. The right "
            "masks give the same weights to %.1g.",
            100 * leak.zero, leak.infinite, leak.finite, masks.difference);
    lab_say(
        l,
        "In the textbook's softmax the masks cost between %.2f and %.2f times an unmasked "
        "softmax; the two additive ones are within a factor of %.2f of each other. What pays is "
        "not to compute what is hidden: %.2f times. In whole flash attention reading a mask "
        "from memory takes %.2f times the unmasked pass, and skipping hidden tiles %.2f times.",
        fmin(masks.softmax[MASK_FILL], masks.softmax[MASK_ADD]) / masks.softmax[MASK_NONE],
        fmax(masks.softmax[MASK_FILL], masks.softmax[MASK_ADD]) / masks.softmax[MASK_NONE], spread,
        masks.softmax[MASK_SKIP] / masks.softmax[MASK_NONE],
        masks.whole[MASK_ADD] / masks.whole[MASK_NONE],
        masks.whole[MASK_SKIP] / masks.whole[MASK_NONE]);
done:
    return st;
}

const struct lab_experiment lab_leak = {
    {"leak", "masks of 0 and of -inf; ways to mask, timed; one pass against prefixes", "A2, E13", 8,
     45, false, false},
    "Why the mask is -inf and not 0",
    run};
