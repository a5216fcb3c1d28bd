/* A transformer block with standard, fused and flash attention. */
#include <math.h>

#include "base/memory.h"
#include "base/progress.h"
#include "lab/layer.h"

static const double published[] = {9.8, 4.1, 1.6};

struct timing {
    double block, spread, attention; /* ms: median, spread, median of attention alone */
};

static tril_status measure(struct lab *l, int64_t T, int64_t D, enum dtype dtype,
                           enum layer_attention attention, struct timing *out, float **y,
                           struct tril_error *err) {
    struct lab_timing how = {
        .warm = 3, .runs = 50, .seconds = l->size == TRIL_LAB_QUICK ? 0.5 : 5, .wait = l->ctx};
    struct layer x = {0};
    struct lab_times times;
    tril_status st = TRIL_OK;
    TRY(layer_create(&x, l->ctx, 1, T, D, D / 64, dtype, attention, true, err));
    TRY(lab_time(&how, layer_forward_once, &x, &times, err));
    out->block = times.median * 1e3;
    out->spread = times.spread * 1e3;
    TRY(lab_fetch(l->ctx, x.y, DT_F32, T * D, y, err));
    TRY(lab_time(&how, layer_attention, &x, &times, err));
    out->attention = times.median * 1e3;
done:
    layer_free(&x);
    return st;
}

/* Standard, fused and flash, then fused and flash in bf16. A device has no "fused", and begins in
 * fp16. */
enum { CELLS = LAYER_ATTENTIONS + 2 };

static enum layer_attention attention_of(int cell) {
    return (enum layer_attention)(cell < LAYER_ATTENTIONS ? cell : cell - 2);
}

static bool there(const struct lab *l, int cell) {
    return !l->device || attention_of(cell) != LAYER_FUSED;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {
        "T",        "attention", "dtype",        "published ms (GPU, fp16)",
        "block ms", "spread ms", "beside flash", "attention alone ms"};
    int64_t D = lab_choose(l, 384, 768), last = lab_choose(l, 512, 2048);
    const enum dtype first = l->device ? DT_F16 : DT_F32;
    struct timing x[CELLS] = {{0}};
    double lengths[8], ms[LAYER_ATTENTIONS][8], difference = 0;
    int64_t points = 0;
    struct table *t = NULL;
    struct progress progress;
    char title[64];
    tril_status st = TRIL_OK;
    float *y[CELLS] = {0};
    progress_start(&progress, "block-time", 0);
    TRY(table_create(&t, columns, 8, err));
    for (int64_t T = last / 4; T <= last; T *= 2, points++) {
        lengths[points] = (double)T;
        for (int i = 0; i < CELLS; i++) {
            enum layer_attention a = attention_of(i);
            enum dtype dtype = i < LAYER_ATTENTIONS ? first : DT_BF16;
            if (!there(l, i))
                continue;
            mem_free(y[i]);
            y[i] = NULL;
            TRY(measure(l, T, D, dtype, a, &x[i], &y[i], err));
            if (i < LAYER_ATTENTIONS)
                ms[i][points] = x[i].block;
            progress_update(&progress, points, layer_attention_names[a]);
        }
        for (int i = 0; i < CELLS; i++) {
            if (!there(l, i))
                continue;
            if (i < LAYER_ATTENTIONS)
                difference = fmax(difference, lab_difference(y[0], y[i], T * D));
            table_add_int(t, T);
            table_add_text(t, layer_attention_names[attention_of(i)]);
            table_add_text(t, dtype_name(i < LAYER_ATTENTIONS ? first : DT_BF16));
            table_add_number(t, T == 2048 && i < LAYER_ATTENTIONS ? published[i] : NAN, 1);
            table_add_number(t, x[i].block, 2);
            table_add_number(t, x[i].spread, 2);
            table_add_number(t, x[i].block / x[i < LAYER_ATTENTIONS ? 2 : 4].block, 2);
            table_add_number(t, x[i].attention, 2);
        }
    }
    st = lab_table(l, "block", "One block, forward, B = 1, head width 64, causal", t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    struct curve curves[LAYER_ATTENTIONS];
    int shown = 0;
    for (int i = 0; i < LAYER_ATTENTIONS; i++)
        if (there(l, i))
            curves[shown++] = (struct curve){.label = layer_attention_names[i],
                                             .x = lengths,
                                             .y = ms[i],
                                             .n = points,
                                             .style = CURVE_DOTTED_LINE};
    snprintf(title, sizeof title, "A block's time by its attention (%s)", dtype_name(first));
    const struct curve_plot plot = {.title = title,
                                    .x_label = "T",
                                    .y_label = "ms",
                                    .curves = curves,
                                    .curve_count = shown,
                                    .x_log = true,
                                    .y_log = true};
    TRY(lab_curves(l, "block", &plot, err));
    double flash = x[0].block / x[2].block, alone = x[0].attention / x[2].attention;
    lab_claim(l, flash > 1.05, "flash over standard, the block", "9.8 / 1.6 = 6.1x",
              "%.2fx (T = %lld)", flash, (long long)last);
    lab_value(l, "difference", difference);
    lab_value(l, "block_speedup", flash);
    lab_value(l, "attention_speedup", alone);
    lab_value(l, "standard_ms", x[0].block);
    lab_value(l, "flash_ms", x[2].block);
    if (l->device) {
        lab_say(
            l,
            "At T = %lld and D = %lld the block takes %.3f ms with standard attention and %.3f "
            "with flash: %.2fx. Attention alone is %.1fx faster with flash; it is %.0f%% of the "
            "standard block and %.0f%% of the flash one. The outputs differ by %.1e. In bf16 the "
            "flash block takes %.3f ms.",
            (long long)last, (long long)D, x[0].block, x[2].block, flash, alone,
            100 * x[0].attention / x[0].block, 100 * x[2].attention / x[2].block, difference,
            x[4].block);
        goto done;
    }
    double fused = x[0].block / x[1].block;
    lab_claim(l, fused > 1.05, "fused over standard, the block", "9.8 / 4.1 = 2.4x", "%.2fx",
              fused);
    lab_value(l, "fused_ms", x[1].block);
    lab_say(
        l,
        "At T = %lld and D = %lld the block takes %.1f ms with standard attention, %.1f with "
        "rows computed one at a time, %.1f with flash: %.2fx and %.2fx. Attention alone is %.1fx "
        "faster with flash; but on a processor that does arithmetic slowly and has caches, the "
        "block's matrix products are most of its time (attention is %.0f%% of the standard "
        "block, %.0f%% of the flash one), where on the papers' GPU reading and writing T x T "
        "matrices was.",
        (long long)last, (long long)D, x[0].block, x[1].block, x[2].block, fused, flash, alone,
        100 * x[0].attention / x[0].block, 100 * x[2].attention / x[2].block);
    lab_say(l,
            "The three give the same output to %.1e. In bf16 (which this processor %s) the flash "
            "block takes %.1f ms.",
            difference, x[4].block < 0.8 * x[2].block ? "multiplies faster" : "only stores",
            x[4].block);
done:
    for (int i = 0; i < CELLS; i++)
        mem_free(y[i]);
    progress_end(&progress);
    table_free(t);
    return st;
}

const struct lab_experiment lab_block_time = {
    {"block-time", "a block with standard, fused and flash attention", "E4", 8, 100, false, true},
    "A block's time by its attention",
    run};
