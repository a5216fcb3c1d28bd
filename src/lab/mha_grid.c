/* Multi-head attention over a grid of batch, length, heads and dtype, with the papers' protocol:
 * warm-ups, many runs, outliers dropped, mean, median and spread. */
#include <math.h>

#include "base/progress.h"
#include "lab/layer.h"

enum { WIDTH = 512 };

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"B",       "T",         "H",         "dtype",
                                          "mean ms", "median ms", "spread ms", "fastest ms",
                                          "cold ms", "runs",      "outliers",  "GFLOP/s"};
    static const int64_t batches[] = {1, 8, 32}, lengths[] = {128, 512, 1024}, heads[] = {4, 8, 16};
    static const enum dtype dtypes[] = {DT_F32, DT_F16, DT_BF16};
    bool quick = l->size == TRIL_LAB_QUICK;
    struct lab_timing how = {.warm = 50,
                             .runs = 500,
                             .seconds = quick                      ? 0.1
                                        : l->size == TRIL_LAB_FULL ? 1.5
                                                                   : 60,
                             .wait = l->ctx};
    /* The medians that the plots and findings use: [dtype][B][T] at H 8, and over heads. */
    double by_length[3][3] = {{0}}, by_heads[3] = {0}, by_batch[3] = {0}, by_dtype[3] = {0};
    double cells = 0, spread = 0, flops_best = 0;
    int64_t nb = quick ? 2 : 3, nt = quick ? 2 : 3, total = nb * nt * 9, at = 0;
    struct progress progress;
    struct table *t = NULL;
    tril_status st = TRIL_OK;
    progress_start(&progress, "mha-grid", total);
    TRY(table_create(&t, columns, 12, err));
    for (int64_t b = 0; b < nb; b++)
        for (int64_t s = 0; s < nt; s++)
            for (int64_t h = 0; h < 3; h++)
                for (int64_t e = 0; e < 3; e++) {
                    double B = (double)batches[b], T = (double)lengths[s], D = WIDTH;
                    struct layer x;
                    struct lab_times y;
                    TRY(layer_create(&x, l->ctx, batches[b], lengths[s], WIDTH, heads[h], dtypes[e],
                                     LAYER_FLASH, false, err));
                    st = lab_time(&how, layer_mha, &x, &y, err);
                    layer_free(&x);
                    if (st != TRIL_OK)
                        goto done;
                    double flops = B * T * (8 * D * D + 2 * D * (T + 1)) / y.median;
                    table_add_int(t, batches[b]);
                    table_add_int(t, lengths[s]);
                    table_add_int(t, heads[h]);
                    table_add_text(t, dtype_name(dtypes[e]));
                    table_add_number(t, y.mean * 1e3, 3);
                    table_add_number(t, y.median * 1e3, 3);
                    table_add_number(t, y.spread * 1e3, 3);
                    table_add_number(t, y.fastest * 1e3, 3);
                    table_add_number(t, y.cold * 1e3, 3);
                    table_add_int(t, y.runs);
                    table_add_int(t, y.dropped);
                    table_add_number(t, flops * 1e-9, 1);
                    if (b == 0 && h == 1)
                        by_length[e][s] = y.median * 1e3;
                    if (s == nt - 1 && b == 0 && e == 0)
                        by_heads[h] = y.median * 1e3;
                    if (s == 0 && h == 1 && e == 0)
                        by_batch[b] = y.median * 1e3;
                    by_dtype[e] += y.median;
                    spread += y.spread / y.mean;
                    cells++;
                    flops_best = fmax(flops_best, flops);
                    progress_update(&progress, ++at, NULL);
                }
    st = lab_table(l, "grid", "Multi-head attention with projections, D = 512, causal, forward", t,
                   err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    double x[] = {128, 512, 1024};
    const struct curve curves[] = {
        {.label = "fp32", .x = x, .y = by_length[0], .n = nt, .style = CURVE_DOTTED_LINE},
        {.label = "fp16", .x = x, .y = by_length[1], .n = nt, .style = CURVE_DOTTED_LINE},
        {.label = "bf16", .x = x, .y = by_length[2], .n = nt, .style = CURVE_DOTTED_LINE}};
    const struct curve_plot plot = {.title = "Multi-head attention, B = 1, H = 8",
                                    .x_label = "T",
                                    .y_label = "median ms",
                                    .curves = curves,
                                    .curve_count = 3,
                                    .x_log = true,
                                    .y_log = true};
    TRY(lab_curves(l, "length", &plot, err));
    lab_value(l, "cells", cells);
    lab_value(l, "mean_spread", spread / cells);
    lab_value(l, "bf16_over_fp32", by_dtype[2] / by_dtype[0]);
    lab_value(l, "fp16_over_fp32", by_dtype[1] / by_dtype[0]);
    lab_claim(l, cells == (double)total, "the grid", "a design without figures",
              "%.0f cells, spread %.1f%% of the mean on average", cells, 100 * spread / cells);
    lab_say(l,
            "%.0f cells; over all of them fp16 takes %.2f and bf16 %.2f times the time of fp32. %s",
            cells, by_dtype[1] / by_dtype[0], by_dtype[2] / by_dtype[0],
            by_dtype[2] < 0.8 * by_dtype[0]
                ? "This processor multiplies bf16 faster than fp32."
                : "This processor multiplies in fp32 either way: 16 bits save memory, not time.");
    lab_say(l,
            "At the longest T and B = 1, 4, 8 and 16 heads take %.2f, %.2f and %.2f ms: the same "
            "products, cut differently. B = %lld takes %.1f times B = 1 at T = 128. The best cell "
            "reaches %.0f GFLOP/s.",
            by_heads[0], by_heads[1], by_heads[2], (long long)batches[nb - 1],
            by_batch[nb - 1] / by_batch[0], flops_best * 1e-9);
done:
    progress_end(&progress);
    table_free(t);
    return st;
}

const struct lab_experiment lab_mha_grid = {
    {"mha-grid", "multi-head attention over batch, length, heads and dtype", "E3", 6, 170, false,
     true},
    "The multi-head attention grid",
    run};
