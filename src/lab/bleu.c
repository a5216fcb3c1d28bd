/* BLEU: words are found in place; a run of words is looked up by comparing it with the reference's
 * runs, which suits texts of a few hundred words. */
#include "lab/bleu.h"

#include <ctype.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

struct word {
    const char *text;
    size_t size;
};

static bool in_word(unsigned char c) {
    return isalnum(c) || c > 127;
}

/* At most one word a byte. */
static int64_t words_find(const char *text, size_t size, struct word *out) {
    int64_t n = 0;
    for (size_t i = 0; i < size;) {
        size_t begin = i++;
        unsigned char c = (unsigned char)text[begin];
        if (in_word(c))
            while (i < size && in_word((unsigned char)text[i]))
                i++;
        else if (!isgraph(c))
            continue;
        out[n++] = (struct word){text + begin, i - begin};
    }
    return n;
}

static bool run_equal(const struct word *a, const struct word *b, int order) {
    for (int i = 0; i < order; i++)
        if (a[i].size != b[i].size || memcmp(a[i].text, b[i].text, a[i].size) != 0)
            return false;
    return true;
}

/* Every run of the candidate takes one run of the reference that nobody took: that is counting each
 * at most as often as the reference holds it. */
static void order_add(struct bleu *b, int order, const struct word *c, int64_t cn,
                      const struct word *r, int64_t rn, bool *taken) {
    memset(taken, 0, (size_t)rn * sizeof *taken);
    for (int64_t i = 0; i + order <= cn; i++) {
        b->total[order - 1]++;
        for (int64_t j = 0; j + order <= rn; j++)
            if (!taken[j] && run_equal(c + i, r + j, order)) {
                taken[j] = true;
                b->match[order - 1]++;
                break;
            }
    }
}

tril_status bleu_add(struct bleu *b, const char *candidate, size_t candidate_size,
                     const char *reference, size_t reference_size, struct tril_error *err) {
    struct word *words = malloc((candidate_size + reference_size + 1) * sizeof *words);
    bool *taken = malloc(reference_size + 1);
    tril_status st = TRIL_OK;
    if (!words || !taken) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to compare two texts");
        goto done;
    }
    int64_t cn = words_find(candidate, candidate_size, words);
    struct word *theirs = words + cn;
    int64_t rn = words_find(reference, reference_size, theirs);
    for (int order = 1; order <= BLEU_ORDER; order++)
        order_add(b, order, words, cn, theirs, rn, taken);
    b->candidate += cn;
    b->reference += rn;
done:
    free(taken);
    free(words);
    return st;
}

double bleu_score(const struct bleu *b, enum bleu_smoothing smoothing) {
    double logs = 0, part = 1;
    if (b->match[0] == 0 || b->total[BLEU_ORDER - 1] == 0)
        return 0;
    for (int k = 0; k < BLEU_ORDER; k++) {
        double match = (double)b->match[k];
        if (match == 0 && smoothing == BLEU_PLAIN)
            return 0;
        if (match == 0)
            match = part /= 2;
        logs += log(match / (double)b->total[k]) / BLEU_ORDER;
    }
    double brevity =
        b->candidate > b->reference ? 1 : exp(1 - (double)b->reference / (double)b->candidate);
    return 100 * brevity * exp(logs);
}
