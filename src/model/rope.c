/* Position tables: RoPE with its scalings, and ALiBi's slopes. All in double, rounded once. */
#include <math.h>

#include "base/threads.h"
#include "model/config.h"

/* YaRN's correction dimension: the (fractional) pair that turns `rotations` times over the original
 * context; pair i turns original / (2 pi theta^(i / R)) times. */
static double yarn_dimension(double rotations, double R, double theta, double original) {
    return R * log(original / (rotations * 2.0 * M_PI)) / log(theta);
}

/* The angle per position of pair i of R. */
static double rope_frequency(const struct model_config *c, int64_t positions, int64_t i,
                             int64_t R) {
    double theta = c->rope_theta, factor = c->rope_factor, d = 2.0 * (double)R;
    double original = (double)c->rope_original_context;
    if (c->rope_scaling == ROPE_NTK)
        theta *= pow(factor, d / (d - 2.0));
    if (c->rope_scaling == ROPE_DYNAMIC && (double)positions > original)
        theta *= pow(factor * (double)positions / original - (factor - 1.0), d / (d - 2.0));
    double frequency = pow(theta, -(double)i / (double)R);
    switch (c->rope_scaling) {
    case ROPE_LINEAR:
        return frequency / factor;
    case ROPE_YARN: {
        double low = floor(yarn_dimension(c->rope_beta_fast, (double)R, theta, original));
        double high = ceil(yarn_dimension(c->rope_beta_slow, (double)R, theta, original));
        low = fmax(low, 0.0);
        high = fmin(high, d - 1.0);
        if (low == high)
            high += 0.001;
        double ramp = fmin(fmax(((double)i - low) / (high - low), 0.0), 1.0);
        return frequency / factor * ramp + frequency * (1.0 - ramp);
    }
    case ROPE_LLAMA3: {
        double turns = original * frequency / (2.0 * M_PI); /* over the original context */
        if (turns > c->rope_high)
            return frequency;
        if (turns < c->rope_low)
            return frequency / factor;
        double smooth = (turns - c->rope_low) / ((double)c->rope_high - c->rope_low);
        return (1.0 - smooth) * frequency / factor + smooth * frequency;
    }
    default:
        return frequency;
    }
}

double model_yarn_scale(double s, double m) {
    return s <= 1 ? 1.0 : 0.1 * m * log(s) + 1.0;
}

struct rope_job {
    const struct model_config *c;
    int64_t positions;
    double theta; /* > 0: this base, unscaled */
    float *cos_table, *sin_table;
};

static void rope_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct rope_job *j = arg;
    const int64_t R = j->c->rope_dim / 2;
    const double scale = j->theta > 0 ? 1.0 : j->c->rope_attention_factor;
    (void)worker;
    for (int64_t i = 0; i < R; i++) {
        double frequency = j->theta > 0 ? pow(j->theta, -(double)i / (double)R)
                                        : rope_frequency(j->c, j->positions, i, R);
        double sine, cosine;
        for (int64_t p = begin; p < end; p++) {
            sincos((double)p * frequency, &sine, &cosine);
            j->cos_table[p * R + i] = (float)(scale * cosine);
            j->sin_table[p * R + i] = (float)(scale * sine);
        }
    }
}

void model_rope_table(const struct model_config *c, int64_t positions, float *cos_table,
                      float *sin_table) {
    struct rope_job job = {c, positions, 0, cos_table, sin_table};
    parallel_for(positions, 1024, rope_rows, &job);
}

void model_rope_table_plain(const struct model_config *c, double theta, int64_t positions,
                            float *cos_table, float *sin_table) {
    struct rope_job job = {c, positions, theta, cos_table, sin_table};
    parallel_for(positions, 1024, rope_rows, &job);
}

void model_alibi_slopes(int64_t heads, float *slopes) {
    int64_t power = 1;
    while (2 * power <= heads)
        power *= 2;
    /* The heads beyond a power of two take every other slope of twice that power. */
    for (int64_t h = 0; h < heads; h++) {
        double exponent = h < power ? 8.0 * (double)(h + 1) / (double)power
                                    : 8.0 * (double)(2 * (h - power) + 1) / (2.0 * (double)power);
        slopes[h] = (float)exp2(-exponent);
    }
}
