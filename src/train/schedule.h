/* Learning-rate schedules: linear warm-up, then cosine, linear or no decay. */
#ifndef TRAIN_SCHEDULE_H
#define TRAIN_SCHEDULE_H

#include <stdint.h>

#include "base/error.h"

enum schedule_kind { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT };

struct schedule {
    enum schedule_kind kind;
    double lr, min_lr;
    int64_t warmup; /* steps */
    int64_t steps;  /* of the whole run */
};

tril_status schedule_parse(enum schedule_kind *out, const char *name, struct tril_error *err);

/* The rate of step t = 0 .. steps-1. With w = warmup and u = (t - w) / max(1, steps - w):
 *   t < w:     lr (t + 1) / w
 *   cosine:    min_lr + (lr - min_lr) (1 + cos(pi u)) / 2
 *   linear:    lr + (min_lr - lr) u
 *   constant:  lr */
double schedule_rate(const struct schedule *s, int64_t t);

#endif
