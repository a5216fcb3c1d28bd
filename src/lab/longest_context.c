/* The longest context within one memory budget: a whole model reads n tokens and then writes some,
 * n multiplied until memory or time is out. Peaks are the kernel's. */
#include <malloc.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/progress.h"
#include "base/system.h"
#include "lab/learner.h"
#include "lab/lens.h"

/* What is published, and two kinds of layers that recall. */
enum { PUBLISHED = 4, KINDS = 6, MOST = 14, CHUNK = 1024, WRITTEN = 16 };

struct reading {
    double bytes, seconds, decode_ms; /* peak, prefill, one token */
};

/* n tokens through the model, in one pass (standard) or in chunks through a cache, and WRITTEN
 * more one by one. */
static tril_status read_tokens(struct lens *lens, const struct model_config *c, int64_t n,
                               struct reading *out, struct tril_error *err) {
    struct model_options mo = {.dtype = DT_F32};
    int64_t chunk = lens->standard ? n : n < CHUNK ? n : CHUNK;
    struct workspace_options wo = {.max_tokens = chunk, .max_sequences = 1, .max_rows = 1};
    struct model *m = NULL;
    struct workspace *w = NULL;
    struct kv_cache *cache = NULL;
    struct random_key key = {.seed = 5, .op = RANDOM_TEST};
    struct progress progress;
    int32_t *ids = malloc((size_t)chunk * sizeof *ids), offsets[2] = {0}, slot = 0, row;
    float *logits = malloc((size_t)c->vocab * sizeof *logits);
    tril_status st = TRIL_OK;
    progress_start(&progress, "reading", n);
    malloc_trim(0);
    memory_reset_peak();
    double before = (double)memory_peak_rss();
    if (!ids || !logits) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(model_create(&m, c, &mo, &lens->ctx, err));
    TRY(model_init(m, 1, err));
    TRY(workspace_create(&w, m, &wo, err));
    if (!lens->standard)
        TRY(kv_cache_create(&cache, m, 1, c->context, chunk, DT_BF16, err));
    double begun = clock_seconds(), written = 0;
    for (int64_t at = 0; at < n + (lens->standard ? 0 : WRITTEN);) {
        bool writing = at >= n;
        int64_t some = writing ? 1 : n - at < chunk ? n - at : chunk;
        bool last = at + some >= n;
        for (int64_t i = 0; i < some; i++)
            ids[i] = (int32_t)random_below(&key, (uint64_t)(at + i), (uint64_t)c->vocab);
        offsets[1] = (int32_t)some;
        row = (int32_t)some - 1;
        struct batch b = {.tokens = some,
                          .sequences = 1,
                          .ids = ids,
                          .offsets = offsets,
                          .cache = cache,
                          .slots = cache ? &slot : NULL,
                          .rows = &row,
                          .row_count = 1};
        double start = clock_seconds();
        TRY(model_forward(m, w, &b, last ? logits : NULL, err));
        at += some;
        if (writing)
            written += clock_seconds() - start;
        else if (last)
            out->seconds = clock_seconds() - begun;
        progress_update(&progress, at < n ? at : n, NULL);
        if (signal_caught()) {
            st = error_set(err, TRIL_ERR_INTERRUPTED, "stopped by a signal");
            goto done;
        }
    }
    out->decode_ms = lens->standard ? NAN : written / WRITTEN * 1e3;
    out->bytes = (double)memory_peak_rss() - before;
    for (int64_t i = 0; i < c->vocab; i++)
        if (!isfinite(logits[i])) {
            st = error_set(err, TRIL_ERR_NUMERIC, "the logits after %lld tokens are not finite",
                           (long long)n);
            goto done;
        }
done:
    progress_end(&progress);
    free(ids);
    free(logits);
    kv_cache_free(cache);
    workspace_free(w);
    model_free(m);
    return st;
}

/* What n tokens will take at most, before they are tried. */
static double planned(const struct model_config *c, int64_t n, bool standard, double base) {
    double T = (double)n;
    if (standard)
        return base + (double)c->heads * T * T * 4 + T * (double)c->dim * 4 * 12;
    return base + (double)kv_cache_bytes(c, 1, n + WRITTEN, CHUNK, DT_BF16);
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"attention", "mixers",           "tokens",
                                          "peak MB",   "prefill tokens/s", "ms a new token",
                                          "ended by"};
    static const char *const summary_columns[] = {"attention",
                                                  "published memory, speed, length",
                                                  "longest here",
                                                  "peak MB",
                                                  "prefill tokens/s",
                                                  "ms a new token",
                                                  "memory alone would allow"};
    static const char *const names[KINDS] = {"standard", "flash",      "sparse",
                                             "hybrid",   "recurrence", "memory"};
    static const char *const published[KINDS] = {"high, low, ~4k",
                                                 "low, high, ~64k",
                                                 "medium, high, ~128k",
                                                 "low, very high, > 256k",
                                                 NULL,
                                                 NULL};
    static const double bars[PUBLISHED] = {4096, 65536, 131072, 1048576};
    /* Far enough to show the order; what memory alone would allow is said beside. */
    static const int64_t most[2][KINDS] = {{32768, 32768, 32768, 32768, 8192, 8192},
                                           {1 << 16, 1 << 17, 1 << 18, 1 << 20, 1 << 18, 1 << 18}};
    char mixers[KINDS][64];
    bool quick = l->size == TRIL_LAB_QUICK;
    double budget = quick ? 256e6 : 4e9, limit = quick ? 6 : 300;
    struct lens lens;
    struct table *t = NULL, *s = NULL;
    double x[KINDS][MOST], y[KINDS][MOST], longest[KINDS] = {0};
    int points[KINDS] = {0};
    struct reading last[KINDS] = {{0}};
    bool open = false;
    tril_status st = TRIL_OK;
    snprintf(mixers[0], 64, "causal");
    snprintf(mixers[1], 64, "causal");
    snprintf(mixers[2], 64, "window:%d+sinks:4", quick ? 256 : 1024);
    snprintf(mixers[3], 64, "linear/window:%d", quick ? 256 : 1024);
    snprintf(mixers[4], 64, "recurrence segment=%d keep=%d", quick ? 128 : 512, quick ? 128 : 512);
    snprintf(mixers[5], 64, "chunk:%d/memory segment=%d keep=%d top=%d", quick ? 128 : 512,
             quick ? 128 : 512, quick ? 1024 : 8192, quick ? 8 : 32);
    TRY(lens_open(&lens, l->ctx, err));
    open = true;
    TRY(table_create(&t, columns, 7, err));
    TRY(table_create(&s, summary_columns, 7, err));
    for (int k = 0; k < KINDS; k++) {
        struct model_config c =
            learner_config(false, quick ? 2 : 4, quick ? 128 : 256, 8, 4096, 1024);
        double allowed = 0, base = 0;
        const char *end = NULL;
        TRY(model_config_parse_mixers(&c, mixers[k], err));
        lens.standard = k == 0;
        for (int64_t n = 1024, step = k < 2 ? 2 : 4; !end; n *= step) {
            struct reading r = {0};
            c.context = n + WRITTEN;
            if (planned(&c, n, k == 0, base) > budget)
                break;
            TRY(read_tokens(&lens, &c, n, &r, err));
            if (n == 1024)
                base = r.bytes - (planned(&c, n, k == 0, 0));
            bool over = r.bytes > budget;
            if (!over) {
                last[k] = r;
                longest[k] = (double)n;
                x[k][points[k]] = (double)n;
                y[k][points[k]++] = r.bytes / 1e6;
            }
            /* Time grows with the square where all are seen, with the length where not. */
            double next = r.seconds * (double)(k < 2 ? step * step : step);
            end = over ? "memory" : n >= most[!quick][k] ? "enough" : next > limit ? "time" : NULL;
            c.context = step * n + WRITTEN;
            bool full = planned(&c, step * n, k == 0, base) > budget;
            table_add_text(t, names[k]);
            table_add_text(t, mixers[k]);
            table_add_int(t, n);
            table_add_number(t, r.bytes / 1e6, 1);
            table_add_number(t, (double)n / r.seconds, 0);
            table_add_number(t, r.decode_ms, 2);
            table_add_text(t, end ? end : full ? "memory" : NULL);
        }
        for (int64_t n = 1024; n <= (int64_t)1 << 28; n *= 2) {
            c.context = n + WRITTEN;
            if (planned(&c, n, k == 0, fmax(base, 0)) <= budget)
                allowed = (double)n;
        }
        table_add_text(s, names[k]);
        table_add_text(s, published[k]);
        table_add_number(s, longest[k], 0);
        table_add_number(s, last[k].bytes / 1e6, 1);
        table_add_number(s, longest[k] / last[k].seconds, 0);
        table_add_number(s, last[k].decode_ms, 2);
        char words[32];
        snprintf(words, sizeof words, "%.0f", allowed);
        table_add_text(s, allowed > 2e8 ? "any length" : words);
        char key[40];
        snprintf(key, sizeof key, "%s_longest", names[k]);
        lab_value(l, key, longest[k]);
        snprintf(key, sizeof key, "%s_allowed", names[k]);
        lab_value(l, key, allowed);
        snprintf(key, sizeof key, "%s_mb", names[k]);
        lab_value(l, key, last[k].bytes / 1e6);
        if (!quick && k < PUBLISHED)
            lab_claim(l, longest[k] >= bars[k], names[k], published[k],
                      "%.0f tokens in %.2f GB at %.0f tokens/s", longest[k], last[k].bytes / 1e9,
                      longest[k] / last[k].seconds);
    }
    char title[120];
    snprintf(title, sizeof title, "Reading n tokens and writing %d more, budget %.2g GB", WRITTEN,
             budget / 1e9);
    st = lab_table(l, "lengths", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    st = lab_table(l, "longest", "The longest context of each", s, err);
    s = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[KINDS];
    for (int k = 0; k < KINDS; k++)
        curves[k] = (struct curve){
            .label = names[k], .x = x[k], .y = y[k], .n = points[k], .style = CURVE_DOTTED_LINE};
    const struct curve_plot plot = {.title = "Peak memory by context",
                                    .x_label = "tokens",
                                    .y_label = "MB",
                                    .curves = curves,
                                    .curve_count = KINDS,
                                    .x_log = true,
                                    .y_log = true};
    TRY(lab_curves(l, "memory", &plot, err));
    lab_claim(l, longest[1] > longest[0] && longest[3] >= longest[1], "the order",
              "standard < flash < sparse < hybrid", "%.0f, %.0f, %.0f, %.0f", longest[0],
              longest[1], longest[2], longest[3]);
    lab_say(
        l,
        "Within %.2g GB the textbook's matrices allow %.0f tokens; flash with a bf16 cache read "
        "%.0f (its time grows with the square), windows with sinks %.0f in %.0f MB, linear "
        "attention and windows in turns %.0f in %.0f MB at %.0f tokens/s, and a new token then "
        "takes %.2f ms. The caches of the last two roll or are sums: what no later token may see "
        "is "
        "overwritten, and only the tables of positions grow with the text.",
        budget / 1e9, longest[0], longest[1], longest[2], last[2].bytes / 1e6, longest[3],
        last[3].bytes / 1e6, longest[3] / last[3].seconds, last[3].decode_ms);
    lab_say(l,
            "Layers that recall roll too: segment recurrence (Transformer-XL) read %.0f tokens in "
            "%.0f MB at %.0f tokens/s, an external memory of which every token searches the last "
            "keys exactly, in every other layer, %.0f in %.0f MB at %.0f tokens/s.",
            longest[4], last[4].bytes / 1e6, longest[4] / last[4].seconds, longest[5],
            last[5].bytes / 1e6, longest[5] / last[5].seconds);
done:
    if (open)
        lens_close(&lens);
    table_free(t);
    table_free(s);
    return st;
}

const struct lab_experiment lab_longest_context = {
    {"longest-context", "memory, speed and length within one budget: standard to hybrid", "E6", 15,
     600, false, false},
    "The longest context",
    run};
