/* Quality: one trained model under each exact implementation of attention; and models trained alike
 * with sparse and linear attention. Perplexity, and BLEU of what they write on from pieces of the
 * held-out text against how it went on. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "lab/bleu.h"
#include "lab/learner.h"
#include "lab/lens.h"

enum { KINDS = 6, EXACT = 4 };

/* The likeliest token after each of `rows` rows of logits. */
static void likeliest(const float *logits, int64_t rows, int64_t V, int32_t *out) {
    for (int64_t r = 0; r < rows; r++) {
        out[r] = 0;
        for (int64_t v = 1; v < V; v++)
            if (logits[r * V + v] > logits[r * V + out[r]])
                out[r] = (int32_t)v;
    }
}

/* What `m` writes after pieces of the held-out text, always the likeliest token, against how the
 * text goes on. */
struct writing {
    int64_t pieces, prompt, tokens; /* of the text, and in each */
};

static tril_status compare(const struct corpus *text, const int32_t *written, const int32_t *held,
                           int64_t n, struct bleu *b, struct tril_error *err) {
    char *mine = NULL, *theirs = NULL;
    size_t mine_size, theirs_size;
    tril_status st;
    TRY(tokenizer_decode(text->tokenizer, (const uint32_t *)written, (size_t)n, true, &mine,
                         &mine_size, err));
    TRY(tokenizer_decode(text->tokenizer, (const uint32_t *)held, (size_t)n, true, &theirs,
                         &theirs_size, err));
    st = bleu_add(b, mine, mine_size, theirs, theirs_size, err);
done:
    free(mine);
    free(theirs);
    return st;
}

static tril_status write_on(struct model *m, const struct corpus *text, const struct writing *how,
                            struct bleu *b, struct tril_error *err) {
    const int64_t S = how->pieces, P = how->prompt, n = how->tokens, V = text->vocab;
    const int64_t stride = (text->valid_count - P - n) / S;
    struct workspace_options wo = {.max_tokens = S * P, .max_sequences = S, .max_rows = S};
    struct workspace *w = NULL;
    struct kv_cache *cache = NULL;
    int32_t *ids = malloc((size_t)(S * (P + n + 4)) * sizeof *ids), *written = ids + S * P;
    int32_t *slots = written + S * n, *next = slots + S, *rows = next + S, *offsets = NULL;
    float *logits = malloc((size_t)(S * V) * sizeof *logits);
    tril_status st = TRIL_OK;
    *b = (struct bleu){0};
    offsets = malloc((size_t)(S + 1) * sizeof *offsets);
    if (!ids || !logits || !offsets) {
        st = lab_no_memory(err);
        goto done;
    }
    if (stride < 1) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "the text is too short to write on from it");
        goto done;
    }
    TRY(workspace_create(&w, m, &wo, err));
    TRY(kv_cache_create(&cache, m, S, P + n, P, DT_F32, err));
    for (int64_t s = 0; s < S; s++) {
        memcpy(ids + s * P, text->valid + s * stride, (size_t)P * sizeof *ids);
        slots[s] = (int32_t)s;
        rows[s] = (int32_t)((s + 1) * P - 1);
    }
    struct batch call = {.sequences = S,
                         .offsets = offsets,
                         .cache = cache,
                         .slots = slots,
                         .rows = rows,
                         .row_count = S};
    for (int64_t i = 0; i < n; i++) {
        int64_t each = i == 0 ? P : 1;
        for (int64_t s = 0; s <= S; s++)
            offsets[s] = (int32_t)(s * each);
        for (int64_t s = 0; s < S; s++)
            rows[s] = (int32_t)((s + 1) * each - 1);
        call.tokens = S * each;
        call.ids = i == 0 ? ids : next;
        TRY(model_forward(m, w, &call, logits, err));
        likeliest(logits, S, V, next);
        for (int64_t s = 0; s < S; s++)
            written[s * n + i] = next[s];
    }
    for (int64_t s = 0; s < S; s++)
        TRY(compare(text, written + s * n, text->valid + s * stride + P, n, b, err));
done:
    kv_cache_free(cache);
    workspace_free(w);
    free(offsets);
    free(logits);
    free(ids);
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const exact_columns[] = {"implementation", "loss",   "perplexity",
                                                "beside flash",   "BLEU-4", "BLEU-4, smoothed"};
    static const char *const columns[] = {
        "attention",     "mixer",  "train loss",       "valid loss", "perplexity",
        "beside full %", "BLEU-4", "BLEU-4, smoothed", "ms a step"};
    static const char *const exact_names[EXACT] = {"flash", "fused", "materialised", "reference"};
    int64_t T = lab_choose(l, 64, 256), dim = lab_choose(l, 64, 128), layers = lab_choose(l, 2, 4);
    int64_t W = T / 8;
    char mixers[KINDS][64];
    static const char *const names[KINDS] = {"full",  "window",  "dilated",
                                             "fixed", "strided", "linear"};
    struct corpus text = {0};
    struct lens lens;
    struct model *m = NULL;
    struct learned out[KINDS] = {{0}};
    struct table *t = NULL;
    double perplexity[EXACT], loss, ms[KINDS], quality[KINDS];
    const struct writing writing = {
        .pieces = lab_choose(l, 16, 64), .prompt = T * 3 / 4, .tokens = T / 4};
    struct bleu exact_bleu[EXACT] = {0}, bleu[KINDS] = {0};
    bool open = false;
    char what[40];
    tril_status st = TRIL_OK;
    snprintf(mixers[0], 64, "causal");
    snprintf(mixers[1], 64, "window:%lld", (long long)W);
    snprintf(mixers[2], 64, "dilated:%lld,2", (long long)W);
    snprintf(mixers[3], 64, "fixed:%lld,%lld", (long long)W, (long long)(W / 4));
    snprintf(mixers[4], 64, "strided:%lld", (long long)W);
    snprintf(mixers[5], 64, "linear");
    TRY(corpus_open(&text, l, lab_choose(l, 400, 1024), lab_choose(l, 1 << 19, 8 << 20), err));
    TRY(lens_open(&lens, l->ctx, err));
    open = true;
    struct model_config configs[KINDS];
    for (int i = 0; i < KINDS; i++) {
        configs[i] = learner_config(false, layers, dim, 4, text.vocab, T);
        TRY(model_config_parse_mixers(&configs[i], mixers[i], err));
    }
    TRY(learner_time(l->ctx, configs, KINDS, T, 8, lab_choose(l, 5, 8), ms, err));
    for (int i = 0; i < KINDS; i++) {
        struct learning how = {.config = &configs[i],
                               .seq = T,
                               .batch = 8,
                               .steps = lab_choose(l, 200, 600),
                               .lr = 3e-3,
                               .weight_decay = 0.1,
                               .seed = 1,
                               .what = what};
        snprintf(what, sizeof what, "quality: %s", names[i]);
        TRY(learn(&lens.ctx, &how, &text, &m, &out[i], err));
        quality[i] = exp(out[i].valid_loss);
        if (i == 0) {
            TRY(table_create(&t, exact_columns, 6, err));
            for (int k = 0; k < EXACT; k++) {
                lens.other = true;
                lens.implementation = k == 3 ? ATTENTION_FLASH : (enum attention_implementation)k;
                lens.ctx.reference = k == 3; /* every operation, in double */
                TRY(corpus_loss(m, text.valid, text.valid_count, T, k == 3 ? 4 * T : 40000, &loss,
                                err));
                if (k == 3) { /* it is slow: compared over fewer tokens */
                    double flash;
                    lens.ctx.reference = false;
                    TRY(corpus_loss(m, text.valid, text.valid_count, T, 4 * T, &flash, err));
                    loss += log(perplexity[0]) - flash;
                }
                perplexity[k] = exp(loss);
                table_add_text(t, exact_names[k]);
                table_add_number(t, loss, 8);
                table_add_number(t, perplexity[k], 6);
                table_add_number(t, perplexity[k] / perplexity[0] - 1, -1);
                if (k < 3)
                    TRY(write_on(m, &text, &writing, &exact_bleu[k], err));
                table_add_number(t, k < 3 ? bleu_score(&exact_bleu[k], BLEU_PLAIN) : NAN, 4);
                table_add_number(t, k < 3 ? bleu_score(&exact_bleu[k], BLEU_EXPONENTIAL) : NAN, 4);
            }
            lens.other = false;
            lens.ctx.reference = false;
            st = lab_table(l, "exact", "One model, evaluated under each exact implementation", t,
                           err);
            t = NULL;
            if (st != TRIL_OK)
                goto done;
        }
        TRY(write_on(m, &text, &writing, &bleu[i], err));
        model_free(m);
        m = NULL;
    }
    TRY(table_create(&t, columns, 9, err));
    for (int i = 0; i < KINDS; i++) {
        table_add_text(t, names[i]);
        table_add_text(t, mixers[i]);
        table_add_number(t, out[i].train_loss, 4);
        table_add_number(t, out[i].valid_loss, 4);
        table_add_number(t, quality[i], 3);
        table_add_number(t, 100 * (quality[i] / quality[0] - 1), 2);
        table_add_number(t, bleu_score(&bleu[i], BLEU_PLAIN), 2);
        table_add_number(t, bleu_score(&bleu[i], BLEU_EXPONENTIAL), 2);
        table_add_number(t, ms[i], 2);
    }
    char title[160];
    snprintf(title, sizeof title, "Models trained alike on %s: %lld layers, D = %lld, T = %lld",
             text.name, (long long)layers, (long long)dim, (long long)T);
    st = lab_table(l, "quality", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const struct bar_plot plot = {.title = "Trained alike",
                                  .subtitle = "by what the layers see",
                                  .x_label = "validation perplexity",
                                  .names = names,
                                  .values = quality,
                                  .count = KINDS,
                                  .decimals = 2};
    TRY(lab_bars(l, "quality", &plot, err));
    double worst = 0, sparse = -INFINITY, kindest = INFINITY;
    for (int k = 1; k < EXACT; k++)
        worst = fmax(worst, fabs(perplexity[k] - perplexity[0]));
    for (int i = 1; i < 5; i++) {
        sparse = fmax(sparse, quality[i] / quality[0] - 1);
        kindest = fmin(kindest, quality[i] / quality[0] - 1);
    }
    double linear = quality[5] / quality[0] - 1;
    double score = bleu_score(&exact_bleu[0], BLEU_EXPONENTIAL), apart = 0;
    for (int k = 1; k < 3; k++)
        apart = fmax(apart, fabs(bleu_score(&exact_bleu[k], BLEU_EXPONENTIAL) - score));
    lab_claim(l, worst / perplexity[0] < 1e-3, "flash changes perplexity by", "< 0.1%",
              "%.1e of %.3f", worst, perplexity[0]);
    lab_claim(l, apart <= 1e-3 * score, "flash changes BLEU by", "< 0.1%",
              "%.1e of %.3f (smoothed)", apart, score);
    lab_claim(l, worst < 1e-5 * fmax(1, perplexity[0]), "exact", "exact",
              "equal to %.1e (relative)", worst / perplexity[0]);
    lab_claim(l, kindest > 0 && sparse < 0.15, "sparse", "slightly lower",
              "perplexity %+.1f%% to %+.1f%%", 100 * kindest, 100 * sparse);
    lab_claim(l, linear > sparse && linear > 0.02, "linear", "clearly lower", "perplexity %+.1f%%",
              100 * linear);
    lab_value(l, "exact_difference", worst);
    lab_value(l, "perplexity", perplexity[0]);
    lab_value(l, "vocab", (double)text.vocab);
    lab_value(l, "bleu", score);
    lab_value(l, "bleu_difference", apart);
    for (int i = 0; i < KINDS; i++)
        lab_value(l, names[i], quality[i]);
    lab_say(l,
            "One trained model has perplexity %.6f under flash; fused, materialised and the scalar "
            "reference in double are within %.1e of it. Which implementation computes exact "
            "attention does not change what a model knows.",
            perplexity[0], worst);
    lab_say(l,
            "BLEU-4 over the words of %lld continuations of %lld tokens, each token the likeliest, "
            "against how the held-out text goes on (one reference each, brevity penalty; smoothed: "
            "the k-th order without a match has 2^-k of one): %.2f, smoothed %.2f under flash; the "
            "other implementations differ by %.1e. A continuation of prose is one of many that "
            "would do, so that values are low: they tell implementations apart, not good text.",
            (long long)writing.pieces, (long long)writing.tokens,
            bleu_score(&exact_bleu[0], BLEU_PLAIN), score, apart);
    lab_say(l,
            "Trained alike for the same steps, sparse attention changes perplexity by %+.1f%% to "
            "%+.1f%% and linear attention by %+.1f%% against full attention's %.2f. %s",
            100 * kindest, 100 * sparse, 100 * linear, quality[0],
            kindest < 0 ? "Where a sparse pattern does better than full attention, this text's "
                          "useful past is short, and seeing less is an easier problem for a small "
                          "model and few steps."
                        : "Seeing less costs something, everywhere.");
done:
    for (int i = 0; i < KINDS; i++)
        free(out[i].losses);
    model_free(m);
    if (open)
        lens_close(&lens);
    table_free(t);
    corpus_free(&text);
    return st;
}

const struct lab_experiment lab_quality = {
    {"quality", "one model under each exact implementation; trained alike: sparse, linear",
     "E7, E12", 20, 300, true, false},
    "Quality",
    run};
