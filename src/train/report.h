/* What a training run tells: the live line on stderr, the JSON-lines log, and the numbers behind
 * the loss curve. */
#ifndef TRAIN_REPORT_H
#define TRAIN_REPORT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/error.h"

struct step_report {
    int64_t step, steps, tokens; /* updates done, of how many; tokens so far */
    double epoch;
    double loss, lr, grad_norm, tokens_per_second, mfu; /* NaN: unknown */
    double valid_loss;                                  /* NaN: not measured at this step */
    double elapsed;                                     /* seconds, over all runs */
    int64_t device_peak, pinned_peak; /* bytes of a device's and of pinned memory; 0: none */
};

/* Points of a curve. */
struct series {
    double *step, *value;
    int64_t count;
};

struct report {
    FILE *log;
    char *log_path;
    bool quiet, terminal, line_open;
    double started, last_line, last_valid;
    int64_t first_step; /* steps done before this run */
    struct series train, valid;
};

/* Opens the log. When a run resumes at step > 0, lines of later steps (of the run that was killed)
 * are dropped and earlier ones feed the curve. */
tril_status report_open(struct report *r, const char *log_path, int64_t step, bool quiet,
                        struct tril_error *err);
void report_close(struct report *r);
/* One step: a line in the log (flushed), the live line now and then. */
tril_status report_step(struct report *r, const struct step_report *s, struct tril_error *err);
/* Draws the loss curve: OUT/loss.svg, and loss.png where a converter is installed. */
tril_status report_draw(const struct report *r, const char *out, struct tril_error *err);
/* A sentence on its own line on stderr (nothing if quiet). */
void report_note(struct report *r, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
