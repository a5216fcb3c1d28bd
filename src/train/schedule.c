/* Learning-rate schedules. */
#include "train/schedule.h"

#include <math.h>
#include <string.h>

tril_status schedule_parse(enum schedule_kind *out, const char *name, struct tril_error *err) {
    static const char *const names[] = {"cosine", "linear", "constant"};
    for (int i = 0; i < 3; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (enum schedule_kind)i;
            return TRIL_OK;
        }
    return error_set(err, TRIL_ERR_ARGUMENT, "the schedule is cosine, linear or constant, not '%s'",
                     name);
}

double schedule_rate(const struct schedule *s, int64_t t) {
    if (t < s->warmup)
        return s->lr * (double)(t + 1) / (double)s->warmup;
    int64_t rest = s->steps - s->warmup;
    double u = (double)(t - s->warmup) / (double)(rest > 1 ? rest : 1);
    if (u > 1)
        u = 1;
    switch (s->kind) {
    case SCHEDULE_COSINE:
        return s->min_lr + (s->lr - s->min_lr) * 0.5 * (1 + cos(M_PI * u));
    case SCHEDULE_LINEAR:
        return s->lr + (s->min_lr - s->lr) * u;
    case SCHEDULE_CONSTANT:
        break;
    }
    return s->lr;
}
