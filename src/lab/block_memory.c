/* The memory of attention at growing T, standard and flash, as the kernel saw it: the peak that
 * the tensors, the forward and the backward add to the process. */
#include <math.h>

#include "base/progress.h"
#include "base/system.h"
#include "lab/attend.h"

enum { HEADS = 12, WIDTH = 64 };

struct weigh {
    struct op_context *ctx;
    int64_t T;
    enum dtype dtype;
    bool standard, backward;
};

static tril_status work(void *arg, struct tril_error *err) {
    struct weigh *w = arg;
    struct attend a = {0};
    struct standard s = {0};
    tril_status st = TRIL_OK;
    TRY(attend_create(&a, w->ctx, 1, w->T, HEADS, WIDTH, w->dtype, w->backward, 1, err));
    if (w->standard) {
        TRY(standard_create(&s, &a, err));
        TRY(standard_forward(&s, err));
        if (w->backward)
            TRY(standard_backward(&s, err));
    } else {
        TRY(attend_forward(&a, err));
        if (w->backward)
            TRY(attend_backward(&a, err));
    }
done:
    standard_free(&s);
    attend_free(&a);
    return st;
}

/* What the standard version will take, to refuse before the machine does. */
static double wanted(int64_t T) {
    return ((double)HEADS + 1) * (double)T * (double)T * 4 + 10 * (double)T * HEADS * WIDTH * 4;
}

static tril_status measure(struct lab *l, struct weigh *w, double *bytes, struct tril_error *err) {
    struct op_context fresh;
    tril_status st;
    if (!l->device && w->standard && wanted(w->T) > 0.8 * (double)memory_total()) {
        *bytes = INFINITY;
        return TRIL_OK;
    }
    /* A context of its own, so that scratch of an earlier, larger call does not hide this one's. */
    st = op_context_init(&fresh, l->ctx->backend, err);
    if (st != TRIL_OK)
        return st;
    w->ctx = &fresh;
    st = lab_peak_memory(l->ctx, work, w, bytes, err);
    op_context_free(&fresh);
    if (l->device && st == TRIL_ERR_MEMORY) {
        *bytes = INFINITY;
        return TRIL_OK;
    }
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"T",
                                          "attention",
                                          "published GB",
                                          "tensors MB",
                                          "forward peak MB",
                                          "forward and backward peak MB",
                                          "standard / flash"};
    static const char *const published[2][3] = {{"1.2", "8.5", "out of memory"},
                                                {"0.4", "1.9", "3.6"}};
    bool quick = l->size == TRIL_LAB_QUICK;
    const enum dtype dtype = l->device ? DT_F16 : DT_F32;
    const int64_t lengths[] = {quick ? 256 : 1024, quick ? 512 : 4096, quick ? 1024 : 8192};
    double peak[2][2][3], x[3];
    struct table *t = NULL;
    struct progress progress;
    char words[64];
    tril_status st = TRIL_OK;
    progress_start(&progress, "block-memory", 3);
    TRY(table_create(&t, columns, 7, err));
    for (int i = 0; i < 3; i++) {
        int64_t T = lengths[i];
        x[i] = (double)T;
        for (int flash = 1; flash >= 0; flash--)
            for (int backward = 0; backward < 2; backward++) {
                struct weigh w = {.T = T, .dtype = dtype, .standard = !flash, .backward = backward};
                TRY(measure(l, &w, &peak[flash][backward][i], err));
            }
        for (int flash = 0; flash < 2; flash++) {
            double tensors =
                (double)T * HEADS * (WIDTH * 4 * (double)dtype_size(dtype) + sizeof(float));
            table_add_int(t, T);
            table_add_text(t, flash ? "flash" : "standard");
            table_add_text(t, quick ? NULL : published[flash][i]);
            table_add_number(t, tensors / 1e6, 1);
            for (int backward = 0; backward < 2; backward++) {
                double bytes = peak[flash][backward][i];
                if (isfinite(bytes))
                    table_add_number(t, bytes / 1e6, 1);
                else
                    table_add_text(t, "out of memory");
            }
            snprintf(words, sizeof words, "%.1f", peak[0][1][i] / peak[1][1][i]);
            table_add_text(t, flash || !isfinite(peak[0][1][i]) ? NULL : words);
        }
        progress_update(&progress, i + 1, NULL);
    }
    st = lab_table(l, "memory",
                   l->device ? "Peak memory of attention, B = 1, 12 heads of 64, fp16, as allocated"
                             : "Peak memory of attention, B = 1, 12 heads of 64, fp32, measured",
                   t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    double mb[2][3];
    for (int i = 0; i < 3; i++)
        for (int flash = 0; flash < 2; flash++)
            mb[flash][i] = peak[flash][1][i] / 1e6;
    const struct curve curves[] = {
        {.label = "standard", .x = x, .y = mb[0], .n = 3, .style = CURVE_DOTTED_LINE},
        {.label = "flash", .x = x, .y = mb[1], .n = 3, .style = CURVE_DOTTED_LINE}};
    const struct curve_plot plot = {.title = "Attention's peak memory, forward and backward",
                                    .x_label = "T",
                                    .y_label = "MB",
                                    .curves = curves,
                                    .curve_count = 2,
                                    .x_log = true,
                                    .y_log = true};
    TRY(lab_curves(l, "memory", &plot, err));
    /* The exponent of growth over the two last lengths. */
    double growth[2], octaves = log2(x[2] / x[1]);
    for (int flash = 0; flash < 2; flash++)
        growth[flash] = log2(peak[flash][1][2] / peak[flash][1][1]) / octaves;
    int middle = 1;
    double saved = 1 - peak[1][1][middle] / peak[0][1][middle];
    lab_claim(l, saved > 0.5, "flash saves memory at the middle length", "8.5 vs 1.9 GB: 78%",
              "%.0f%% at T = %lld (%.0f against %.0f MB)", 100 * saved, (long long)lengths[middle],
              peak[0][1][middle] / 1e6, peak[1][1][middle] / 1e6);
    bool out = !isfinite(peak[0][1][2]);
    if (!quick)
        lab_claim(l, out, "standard attention at T = 8k", "out of memory (a GPU's)", "%s",
                  out ? "out of memory"
                      : "fits: this machine has more memory than the papers' GPU had left");
    lab_value(l, "standard_growth", growth[0]);
    lab_value(l, "flash_growth", growth[1]);
    lab_value(l, "saved", saved);
    for (int i = 0; i < 3; i++) {
        char name[40];
        snprintf(name, sizeof name, "standard_mb_%lld", (long long)lengths[i]);
        lab_value(l, name, mb[0][i]);
        snprintf(name, sizeof name, "flash_mb_%lld", (long long)lengths[i]);
        lab_value(l, name, mb[1][i]);
    }
    lab_say(l,
            "Doubling T multiplies the standard version's peak by %.1f and flash's by %.1f: T x T "
            "matrices against rows. At T = %lld forward and backward together take %.0f MB with "
            "standard attention and %.0f MB with flash.",
            exp2(growth[0]), exp2(growth[1]), (long long)lengths[2], mb[0][2], mb[1][2]);
    if (!quick)
        lab_say(
            l,
            "The published figures are of a model on a GPU whose sizes are not stated; these "
            "are of one attention layer (B = 1, 12 heads of 64, %s), so only the growth and "
            "the ratio can be compared: there 3.0x and 4.5x at 1k and 4k, here %.1fx and %.1fx.",
            dtype_name(dtype), peak[0][1][0] / peak[1][1][0], peak[0][1][1] / peak[1][1][1]);
done:
    progress_end(&progress);
    table_free(t);
    return st;
}

const struct lab_experiment lab_block_memory = {
    {"block-memory", "attention's peak memory by length, standard and flash", "E5", 2, 30, false,
     true},
    "Attention's memory by length",
    run};
