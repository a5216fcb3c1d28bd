/* The same attention again and again on large matrices: step by step with every matrix in memory,
 * as one fused operation, and on a device replayed as a graph; the first call apart. */
#include <math.h>

#include "base/memory.h"
#include "base/progress.h"
#include "base/system.h"
#include "lab/attend.h"
#include "ops/replay.h"

enum { WIDTH = 64, VERSIONS = 4 };

struct version {
    const char *name, *published;
    lab_work *work;
    void *arg;
    bool there;
    double first, total, median; /* seconds: of the first call, of all later ones, of one */
    float *o;
};

struct replayed {
    struct attend *a;
    struct op_replay replay;
};

static tril_status replay(void *arg, struct tril_error *err) {
    struct replayed *r = arg;
    return op_replay_run(r->a->ctx, &r->replay, OP_REPLAY_KEY, attend_forward, r->a, err);
}

/* `runs` calls behind one another, waited for at the end; then some one by one. */
static tril_status measure(struct lab *l, struct version *v, struct attend *a, int64_t runs,
                           struct tril_error *err) {
    struct lab_timing alone = {.warm = 2, .runs = runs / 4 + 1, .seconds = 10, .wait = l->ctx};
    struct lab_times times;
    tril_status st = TRIL_OK;
    TRY(lab_time(&alone, v->work, v->arg, &times, err));
    v->first = times.cold;
    v->median = times.median;
    double begun = clock_seconds();
    for (int64_t i = 0; i < runs; i++)
        TRY(v->work(v->arg, err));
    TRY(l->ctx->backend->synchronise(l->ctx, err));
    v->total = clock_seconds() - begun;
    TRY(lab_fetch(l->ctx, a->o, a->dtype, a->B * a->T * a->H * WIDTH, &v->o, err));
done:
    return st;
}

static tril_status run(struct lab *l, struct tril_error *err) {
    static const char *const columns[] = {"version",      "published s", "here s",
                                          "calls",        "first ms",    "median ms, one by one",
                                          "beside manual"};
    const int64_t runs = lab_choose(l, 20, 200), T = lab_choose(l, 256, 1024);
    const int64_t B = lab_choose(l, 1, l->device ? 16 : 1),
                  H = lab_choose(l, 4, l->device ? 16 : 12);
    const enum dtype dtype = l->device ? DT_F16 : DT_F32;
    struct attend a = {0}, rows;
    struct standard standard = {0};
    struct replayed graph = {.a = &a};
    struct version v[VERSIONS] = {
        {"manual: product, mask, softmax, product", "4.5", standard_forward, &standard, true, 0, 0,
         0, NULL},
        {"fused, a row at a time", NULL, attend_forward, &rows, !l->device, 0, 0, 0, NULL},
        {"fused (flash)", "9.0", attend_forward, &a, true, 0, 0, 0, NULL},
        {"flash, replayed as a graph", "0.05", replay, &graph, l->device, 0, 0, 0, NULL},
    };
    const char *labels[VERSIONS];
    double ms[VERSIONS], difference = 0;
    struct table *t = NULL;
    struct progress progress;
    char title[160];
    int shown = 0;
    tril_status st = TRIL_OK;
    progress_start(&progress, "fusion", VERSIONS);
    TRY(attend_create(&a, l->ctx, B, T, H, WIDTH, dtype, false, 1, err));
    TRY(standard_create(&standard, &a, err));
    rows = a;
    rows.params.implementation = ATTENTION_FUSED;
    TRY(table_create(&t, columns, 7, err));
    for (int i = 0; i < VERSIONS; i++) {
        if (!v[i].there)
            continue;
        TRY(measure(l, &v[i], &a, runs, err));
        difference = fmax(difference, lab_difference(v[0].o, v[i].o, a.B * a.T * a.H * WIDTH));
        table_add_text(t, v[i].name);
        table_add_text(t, v[i].published);
        table_add_number(t, v[i].total, 3);
        table_add_int(t, runs);
        table_add_number(t, v[i].first * 1e3, 2);
        table_add_number(t, v[i].median * 1e3, 3);
        table_add_number(t, v[0].total / v[i].total, 2);
        labels[shown] = v[i].name;
        ms[shown++] = v[i].total / (double)runs * 1e3;
        progress_update(&progress, i + 1, v[i].name);
    }
    snprintf(title, sizeof title,
             "%lld calls of attention, B = %lld, T = %lld, %lld heads of %d, causal, %s",
             (long long)runs, (long long)B, (long long)T, (long long)H, WIDTH, dtype_name(dtype));
    st = lab_table(l, "calls", title, t, err);
    t = NULL;
    if (st != TRIL_OK)
        goto done;
    const struct bar_plot plot = {.title = "The same attention again and again",
                                  .subtitle = "a call of many, waited for at the end",
                                  .x_label = "ms",
                                  .names = labels,
                                  .values = ms,
                                  .count = shown,
                                  .decimals = 2,
                                  .marked = 0};
    TRY(lab_bars(l, "calls", &plot, err));
    const struct version *best = l->device ? &v[3] : &v[2];
    double fused = v[0].total / v[2].total, most = v[0].total / best->total;
    lab_claim(l, fused < 1, "fused (SDPA) beside manual", "9.0 s against 4.5 s: 0.5x",
              "%.2f s against %.2f s: %.1fx", v[2].total, v[0].total, fused);
    lab_claim(l, most > 80, "compiled beside manual", "0.05 s against 4.5 s: over 80x", "%s: %.1fx",
              best->name, most);
    lab_value(l, "difference", difference);
    lab_value(l, "manual_seconds", v[0].total);
    lab_value(l, "flash_seconds", v[2].total);
    lab_value(l, "speedup", most);
    lab_say(
        l,
        "%lld calls take %.2f s step by step and %.2f s as one operation (%.1f times as fast); the "
        "results differ by %.1e. The first calls took %.1f and %.1f times a later one.",
        (long long)runs, v[0].total, v[2].total, fused, difference, v[0].first / v[0].median,
        v[2].first / v[2].median);
    if (l->device)
        lab_say(
            l,
            "Replayed as a graph they take %.3f s, %.2f times as fast as launched one by one: what "
            "launching costs beside matrices this large.",
            v[3].total, v[2].total / v[3].total);
    else
        lab_say(
            l,
            "There are no graphs on the CPU: calling an operation costs a microsecond or two "
            "(by-hand), so there is nothing for them to save. Over 80 times cannot come from "
            "fusing: both ways do the same products. The published 0.05 s for 200 iterations are "
            "0.25 ms each, whatever was waited for; the sizes were not stated.");
done:
    for (int i = 0; i < VERSIONS; i++)
        mem_free(v[i].o);
    if (a.ctx)
        op_replay_free(a.ctx, &graph.replay);
    standard_free(&standard);
    attend_free(&a);
    progress_end(&progress);
    table_free(t);
    return st;
}

const struct lab_experiment lab_fusion = {
    {"fusion", "attention 200 times: step by step, fused, replayed as a graph", "E2", 2, 60, false,
     true},
    "Step by step, fused, replayed",
    run};
