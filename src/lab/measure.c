/* Measuring: times with cold calls and outliers apart, peaks of memory, straight lines. */
#include <malloc.h>
#include <math.h>
#include <stdlib.h>

#include "base/system.h"
#include "lab/bench.h"
#include "lab/lab.h"

static double sum(const double *x, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++)
        s += x[i];
    return s;
}

/* Drops what lies far from the median; x is sorted. */
static void summarise(struct lab_times *t, double *x, int64_t n, double *scratch) {
    double median = bench_median(x, n);
    for (int64_t i = 0; i < n; i++)
        scratch[i] = fabs(x[i] - median);
    double reach = 3 * 1.4826 * bench_median(scratch, n);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (fabs(x[i] - median) <= reach)
            x[kept++] = x[i];
    t->dropped = n - kept;
    t->runs = kept;
    t->fastest = x[0];
    t->median = bench_median(x, kept);
    t->mean = sum(x, kept) / (double)kept;
    double squares = 0;
    for (int64_t i = 0; i < kept; i++)
        squares += (x[i] - t->mean) * (x[i] - t->mean);
    t->spread = kept > 1 ? sqrt(squares / (double)(kept - 1)) : 0;
}

static tril_status work_done(const struct lab_timing *how, lab_work *work, void *arg,
                             struct tril_error *err) {
    tril_status st = work(arg, err);
    return st == TRIL_OK && how->wait ? how->wait->backend->synchronise(how->wait, err) : st;
}

tril_status lab_time(const struct lab_timing *how, lab_work *work, void *arg, struct lab_times *out,
                     struct tril_error *err) {
    int64_t most = how->runs > 0 ? how->runs : 1, runs = 0;
    double *x = malloc(2 * (size_t)most * sizeof *x), limit = how->seconds;
    tril_status st = TRIL_OK;
    *out = (struct lab_times){0};
    if (!x)
        return lab_no_memory(err);
    double begun = clock_seconds();
    TRY(work_done(how, work, arg, err));
    out->cold = clock_seconds() - begun;
    for (int64_t i = 1; i < how->warm && !(limit > 0 && clock_seconds() - begun > limit / 10); i++)
        TRY(work_done(how, work, arg, err));
    begun = clock_seconds();
    while (runs < most && !(limit > 0 && runs > 0 && clock_seconds() - begun > limit)) {
        double start = clock_seconds();
        TRY(work_done(how, work, arg, err));
        x[runs++] = clock_seconds() - start;
    }
    summarise(out, x, runs, x + most);
done:
    free(x);
    return st;
}

tril_status lab_peak_memory(const struct op_context *ctx, lab_work *work, void *arg, double *bytes,
                            struct tril_error *err) {
    if (ctx->backend->device) {
        struct backend_memory in_use, most;
        ctx->backend->memory_reset();
        ctx->backend->memory(&in_use);
        tril_status st = work(arg, err);
        ctx->backend->memory(&most);
        *bytes = (double)(most.device_peak - in_use.device);
        return st;
    }
    malloc_trim(0);
    memory_reset_peak();
    double before = (double)memory_peak_rss();
    tril_status st = work(arg, err);
    double after = (double)memory_peak_rss();
    *bytes = after > before ? after - before : 0;
    return st;
}

struct lab_line lab_fit(const double *x, const double *y, int64_t n) {
    double mx = sum(x, n) / (double)n, my = sum(y, n) / (double)n, xx = 0, xy = 0, yy = 0;
    for (int64_t i = 0; i < n; i++) {
        xx += (x[i] - mx) * (x[i] - mx);
        xy += (x[i] - mx) * (y[i] - my);
        yy += (y[i] - my) * (y[i] - my);
    }
    double b = xx > 0 ? xy / xx : 0;
    return (struct lab_line){my - b * mx, b, yy > 0 && xx > 0 ? xy * xy / (xx * yy) : 1};
}

void lab_normal(float *out, int64_t n, uint64_t seed) {
    struct random_key key = {.seed = seed, .op = RANDOM_TEST};
    random_normal_fill(&key, 0, n, out);
}

double lab_difference(const float *a, const float *b, int64_t n) {
    double most = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        most = d > most || isnan(d) ? d : most;
    }
    return most;
}
