/* What every experiment stands on: where it runs, what it may use, and how it tells its results.
 *
 * An experiment is one file src/lab/<name>.c that defines `const struct lab_experiment lab_<name>`
 * and is listed in experiments.inc. Its run function fills tables, states claims (what was
 * published beside what was measured, and whether they agree), names values that tests and other
 * programs read, draws plots, and says in words what came out: words made from the numbers, never
 * before them. */
#ifndef LAB_LAB_H
#define LAB_LAB_H

#include <jansson.h>
#include <stdio.h>

#include "ops/ops.h"
#include "plot/bars.h"
#include "plot/curve.h"
#include "plot/heat.h"
#include "plot/table.h"
#include "tril/lab.h"

/* What the caller of the lab opens for it (the lab knows no backend by name). */
struct lab_environment {
    struct op_context *ctx;
    const char *isa; /* "avx2", "NVIDIA H200" */
    int threads;
    /* measured now; may take some tenths of a second */
    double (*peak_flops)(struct op_context *ctx, enum dtype t);
};

struct lab {
    const struct lab_environment *env;
    struct op_context *ctx; /* env's */
    enum tril_lab_size size;
    const char *const *data;
    int data_count;
    char *dir;      /* OUT/NAME */
    FILE *print;    /* NULL: quiet */
    bool device;    /* ctx is a device's */
    json_t *result; /* machine, tables, claims, findings, values, plots */
    bool failed;    /* out of memory while collecting: reported at the end */
};

struct lab_experiment {
    struct tril_lab_experiment about;
    const char *title;
    tril_status (*run)(struct lab *l, struct tril_error *err);
};

#define EXPERIMENT(name) extern const struct lab_experiment lab_##name;
#include "lab/experiments.inc"
#undef EXPERIMENT

/* By name, or NULL. By index, or NULL behind the last. */
const struct lab_experiment *lab_find(const char *name);
const struct lab_experiment *lab_at(int index);

/* Runs `e` with the options of the request; *json (may be NULL) receives the result's text. */
tril_status lab_run(const struct lab_environment *env, const struct tril_lab_options *o,
                    char **json, struct tril_error *err);
/* As tril_lab_report. */
tril_status lab_report(const char *out, int *count, struct tril_error *err);

/* quick, or (full and papers) full. */
static inline int64_t lab_choose(const struct lab *l, int64_t quick, int64_t full) {
    return l->size == TRIL_LAB_QUICK ? quick : full;
}

/* Prints the table under its title, writes NAME.csv and NAME.json, keeps it. Frees t, always. */
tril_status lab_table(struct lab *l, const char *name, const char *title, struct table *t,
                      struct tril_error *err);
/* One line of "published beside measured". `holds` is what the numbers say. */
void lab_claim(struct lab *l, bool holds, const char *claim, const char *published,
               const char *format, ...) __attribute__((format(printf, 5, 6)));
/* A number under a name, for tests and programs. */
void lab_value(struct lab *l, const char *name, double value);
/* A paragraph of what was found. */
void lab_say(struct lab *l, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Plots into NAME.svg (and .png). */
tril_status lab_curves(struct lab *l, const char *name, const struct curve_plot *p,
                       struct tril_error *err);
tril_status lab_bars(struct lab *l, const char *name, const struct bar_plot *p,
                     struct tril_error *err);
tril_status lab_heat(struct lab *l, const char *name, const struct heat_map *h,
                     struct tril_error *err);

/* ------------------------------------------------------------------ measuring */

/* Seconds of repeated calls. */
struct lab_times {
    double cold;                 /* the very first call */
    double mean, median, spread; /* after warm-ups and without outliers; spread: std. deviation */
    double fastest;
    int64_t runs, dropped; /* counted, and left out as outliers */
};
struct lab_timing {
    int64_t warm, runs;      /* at most so many; at least one each */
    double seconds;          /* limit for the runs; a tenth of it for warming up. 0: none */
    struct op_context *wait; /* whose work is waited for after every run; NULL: the host's */
};
typedef tril_status lab_work(void *arg, struct tril_error *err);
/* Outliers lie more than 3 scaled median absolute deviations (1.4826 MAD) from the median. */
tril_status lab_time(const struct lab_timing *how, lab_work *work, void *arg, struct lab_times *out,
                     struct tril_error *err);

/* The most memory that a piece of work adds to what was there before it. On the CPU: resident, as
 * the kernel measures it from a trimmed heap; 0 where it does not tell. On a device: allocated. */
tril_status lab_peak_memory(const struct op_context *ctx, lab_work *work, void *arg, double *bytes,
                            struct tril_error *err);

/* Tensors in the backend's memory: filled with normal numbers times `scale`, and fetched as floats
 * (mem_free). */
tril_status lab_fill(struct op_context *ctx, void *data, enum dtype t, int64_t n, float scale,
                     const struct random_key *key, struct tril_error *err);
tril_status lab_fetch(struct op_context *ctx, const void *data, enum dtype t, int64_t n,
                      float **out, struct tril_error *err);

/* Least squares y = a + b x, and r^2 (the share of the variance it explains). */
struct lab_line {
    double a, b, r2;
};
struct lab_line lab_fit(const double *x, const double *y, int64_t n);

tril_status lab_no_memory(struct tril_error *err);
/* fp32 standard normal numbers of a stream. */
void lab_normal(float *out, int64_t n, uint64_t seed);
/* Largest |a - b|. */
double lab_difference(const float *a, const float *b, int64_t n);

#endif
