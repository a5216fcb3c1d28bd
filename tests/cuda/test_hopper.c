// ctest: timeout=300
/* Hopper's attention on the emulated GPU, against double loops: odd lengths, several tiles of rows
 * and of keys, grouped heads, causal, full and windows, sequences with gaps between them that hold
 * NaNs. And its instructions against plain loops (emulation/hopper_checks.cpp).
 *
 * Tolerances: with u the dtype's unit roundoff (2^-8, 2^-11) and w = 2^-24, a score is wrong by at
 * most e = 2 (d + 2) w sum|q k| scale, a probability by the factor 1 + 2 e, and products round it
 * to the dtype: out by (2 e + u) sum p |v|, then u |out| for writing it. The gradients likewise:
 * dp is wrong by 2 (d + 2) w sum|do v|, D, the sum of do o, by as much of sum|do o|, so ds by p
 * times both and by the factor 1 + 4 e + u. */
#include "support/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/random.h"
#include "cuda/attention_hopper.h"
#include "cuda/cuda.h"
#include "ops/attention.h"

int hopper_check_swizzle(void), hopper_check_shared(void), hopper_check_registers(void),
    hopper_check_descriptors(void);

static struct op_context context;

struct hopper_case {
    const char *label;
    int width, heads, kv_heads;
    int n[4], m[4]; /* rows and keys of the sequences; ends with m 0 */
    bool causal;
    int window; /* 0: none */
    enum dtype dtype;
    int gap; /* NaN rows before every sequence, of q and of k */
};

struct problem {
    struct hopper_case c;
    int sequences, rows, keys;
    int32_t offsets[8], start[8], length[8];
    uint16_t *q, *k, *v, *o, *dout, *dq, *dk, *dv; /* q, k, v: one fused row [heads + 2 kv_heads] */
    float *lse;
    double *in[5]; /* q, k, v, dout, o in double, dense [rows][heads][width] */
    struct visible_rule rule;
    struct attention_params params;
    struct tensor args[B_ARGS];
};

static double value_of(enum dtype t, uint16_t x) {
    return t == DT_BF16 ? (double)bf16_to_f32(x) : (double)f16_to_f32(x);
}
static uint16_t bits_of(enum dtype t, double x) {
    return t == DT_BF16 ? f32_to_bf16((float)x) : f32_to_f16((float)x);
}

static void *filled(size_t count, size_t size) {
    void *p = aligned_alloc(256, (count * size + 255) / 256 * 256);
    assert_non_null(p);
    memset(p, 0xff, count * size); /* NaN */
    return p;
}

/* Values, about N(0, 1), of the sequences' rows; all others stay NaN. */
static double *fill(struct problem *p, uint16_t *to, int64_t row, int heads, const int32_t *start,
                    const int32_t *length, int rows, uint64_t seed) {
    struct random_key key = {.seed = seed};
    int d = p->c.width;
    double *out = calloc((size_t)rows * (size_t)heads * (size_t)d, sizeof *out);
    for (int s = 0; s < p->sequences; s++)
        for (int r = start[s]; r < start[s] + length[s]; r++)
            for (int e = 0; e < heads * d; e++) {
                double x = 0;
                for (int k = 0; k < 3; k++)
                    x += 2 * (double)random_uniform(&key, ((uint64_t)r * 4096 + (uint64_t)e) * 4 +
                                                              (uint64_t)k) -
                         1;
                uint16_t bits = bits_of(p->c.dtype, x);
                to[r * row + e] = bits;
                out[(int64_t)r * heads * d + e] = value_of(p->c.dtype, bits);
            }
    return out;
}

static struct tensor heads_of(uint16_t *data, enum dtype t, int rows, int heads, int d,
                              int64_t row) {
    struct tensor out = tensor_3d(data, t, rows, heads, d);
    out.stride[0] = row;
    return out;
}

static void problem_make(struct problem *p, const struct hopper_case *c) {
    memset(p, 0, sizeof *p);
    p->c = *c;
    int32_t own[8];
    for (int s = 0; s < 4 && c->m[s] > 0; s++) {
        p->offsets[s] = s == 0 ? c->gap : p->offsets[s];
        own[s] = c->n[s];
        p->offsets[s + 1] = p->offsets[s] + c->n[s];
        p->start[s] = p->keys + c->gap;
        p->length[s] = c->m[s];
        p->keys = p->start[s] + c->m[s];
        p->sequences++;
    }
    p->rows = p->offsets[p->sequences] + c->gap;
    p->keys += c->gap;
    int d = c->width;
    int64_t row = (int64_t)(c->heads + 2 * c->kv_heads) * d, wide = (int64_t)c->heads * d;
    size_t most = (size_t)(p->rows > p->keys ? p->rows : p->keys);
    p->q = filled(most * (size_t)row, 2);
    p->k = p->q + wide;
    p->v = p->k + (int64_t)c->kv_heads * d;
    p->o = filled((size_t)p->rows * (size_t)wide, 2);
    p->dout = filled((size_t)p->rows * (size_t)wide, 2);
    p->dq = filled(most * (size_t)row, 2);
    p->dk = p->dq + wide;
    p->dv = p->dk + (int64_t)c->kv_heads * d;
    p->lse = filled((size_t)p->rows * (size_t)c->heads, 4);
    p->in[0] = fill(p, p->q, row, c->heads, p->offsets, own, p->rows, 1);
    p->in[1] = fill(p, p->k, row, c->kv_heads, p->start, p->length, p->keys, 2);
    p->in[2] = fill(p, p->v, row, c->kv_heads, p->start, p->length, p->keys, 3);
    p->in[3] = fill(p, p->dout, wide, c->heads, p->offsets, own, p->rows, 4);
    p->params = (struct attention_params){.scale = 1.0f / sqrtf((float)d), .causal = c->causal};
    if (c->window) {
        p->rule = (struct visible_rule){.causal = c->causal, .parts = 1};
        p->rule.part[0] = (struct visible_part){VISIBLE_WINDOW, c->window, 0, NULL};
        p->params.rules = &p->rule;
        p->params.rule_count = 1;
    }
    enum dtype t = c->dtype;
    memset(p->args, 0, sizeof p->args);
    p->args[F_Q] = heads_of(p->q, t, p->rows, c->heads, d, row);
    p->args[F_K] = heads_of(p->k, t, p->keys, c->kv_heads, d, row);
    p->args[F_V] = heads_of(p->v, t, p->keys, c->kv_heads, d, row);
    p->args[F_OFFSETS] = tensor_1d(p->offsets, DT_I32, p->sequences + 1);
    p->args[F_START] = tensor_1d(p->start, DT_I32, p->sequences);
    p->args[F_LENGTH] = tensor_1d(p->length, DT_I32, p->sequences);
}

static void problem_free(struct problem *p) {
    free(p->q);
    free(p->o);
    free(p->dout);
    free(p->dq);
    free(p->lse);
    for (int i = 0; i < 5; i++)
        free(p->in[i]);
}

static bool sees(const struct hopper_case *c, int position, int j) {
    if (c->causal && j > position)
        return false;
    return !c->window || abs(position - j) < c->window;
}

/* |a| of an output and what it may differ by, summed over an output's elements. */
struct verdict {
    const char *label, *what;
    int faults;
    double worst; /* error / tolerance */
};
static void judge(struct verdict *v, double got, double want, double tolerance, int row, int head,
                  int channel) {
    double error = fabs(got - want);
    if (isinf(want) && got == want)
        error = 0;
    if (error / tolerance > v->worst)
        v->worst = error / tolerance;
    if (error <= tolerance)
        return;
    if (v->faults++ < 4)
        fprintf(stderr, "%s: %s row %d head %d channel %d is %g, should be %g +- %g\n", v->label,
                v->what, row, head, channel, got, want, tolerance);
}

static const double W = 0x1p-24;
/* Half the step of the subnormal numbers. */
static double tiny(enum dtype t) {
    return t == DT_BF16 ? 0x1p-134 : 0x1p-25;
}

/* A row's probabilities in double, its lse, and the bound e of its scores' errors. */
static double row_scores(const struct problem *p, int s, int row, int head, double *probability,
                         double *bound) {
    const struct hopper_case *c = &p->c;
    int d = c->width, group = c->heads / c->kv_heads;
    int position = row - p->offsets[s] + p->length[s] - c->n[s];
    const double *q = p->in[0] + ((int64_t)row * c->heads + head) * d;
    double most = -INFINITY, sum = 0, scale = (double)p->params.scale;
    *bound = 0;
    for (int j = 0; j < p->length[s]; j++) {
        const double *k = p->in[1] + ((int64_t)(p->start[s] + j) * c->kv_heads + head / group) * d;
        double x = 0, a = 0;
        for (int t = 0; t < d; t++) {
            x += q[t] * k[t];
            a += fabs(q[t] * k[t]);
        }
        *bound = fmax(*bound, 2 * (d + 2) * W * a * scale);
        probability[j] = sees(c, position, j) ? x * scale : -INFINITY;
        most = fmax(most, probability[j]);
    }
    if (most == -INFINITY)
        return -INFINITY;
    for (int j = 0; j < p->length[s]; j++)
        sum += exp(probability[j] - most);
    double lse = most + log(sum);
    for (int j = 0; j < p->length[s]; j++)
        probability[j] = exp(probability[j] - lse);
    return lse;
}

static void check_forward(struct problem *p) {
    const struct hopper_case *c = &p->c;
    int d = c->width, group = c->heads / c->kv_heads;
    double u = c->dtype == DT_BF16 ? 0x1p-8 : 0x1p-11;
    double *probability = calloc((size_t)p->keys + 1, sizeof *probability), bound = 0;
    p->in[4] = calloc((size_t)p->rows * (size_t)c->heads * (size_t)d, sizeof(double));
    struct verdict of_o = {c->label, "o", 0, 0}, of_lse = {c->label, "lse", 0, 0};
    for (int row = 0; row < p->rows; row++)
        for (int head = 0; head < c->heads; head++) {
            int s = -1;
            for (int i = 0; i < p->sequences; i++)
                if (row >= p->offsets[i] && row < p->offsets[i + 1])
                    s = i;
            double lse = s < 0 ? -INFINITY : row_scores(p, s, row, head, probability, &bound);
            int keys = lse == -INFINITY ? 0 : p->length[s];
            judge(&of_lse, (double)p->lse[(int64_t)head * p->rows + row], lse,
                  lse == -INFINITY ? 1e-30 : 2 * bound + (keys + 8) * W * (1 + fabs(lse)), row,
                  head, 0);
            for (int t = 0; t < d; t++) {
                double want = 0, size = 0, ones = 0;
                for (int j = 0; j < keys; j++) {
                    double v =
                        p->in[2][((int64_t)(p->start[s] + j) * c->kv_heads + head / group) * d + t];
                    want += probability[j] * v;
                    size += probability[j] * fabs(v);
                    ones += probability[j] > 0 ? fabs(v) : 0;
                }
                int64_t at = ((int64_t)row * c->heads + head) * d + t;
                double got = value_of(c->dtype, p->o[at]);
                p->in[4][at] = s < 0 ? 0 : got;
                judge(&of_o, got, want,
                      (2 * bound + u + 2 * (keys + 8) * W) * size + u * fabs(want) +
                          tiny(c->dtype) * (1 + ones),
                      row, head, t);
            }
        }
    free(probability);
    if (getenv("TRIL_TEST_SAY"))
        fprintf(stderr, "%s: o %.2f, lse %.2f of the tolerance\n", c->label, of_o.worst,
                of_lse.worst);
    assert_int_equal(of_o.faults + of_lse.faults, 0);
}

static void run_forward(struct problem *p) {
    const struct hopper_case *c = &p->c;
    struct tril_error err = {0};
    p->args[F_O] = tensor_3d(p->o, c->dtype, p->rows, c->heads, c->width);
    p->args[F_LSE] = tensor_2d(p->lse, DT_F32, c->heads, p->rows);
    assert_true(attention_hopper_takes_forward(&context, p->args, &p->params));
    if (attention_hopper_forward(&context, p->args, &p->params, &err) != TRIL_OK ||
        context.backend->synchronise(&context, &err) != TRIL_OK)
        fail_msg("%s: %s", c->label, err.message);
}

/* Values of a gradient and what each may differ by. */
struct gradient {
    double *want, *wrong;
};
static struct gradient gradient_make(int64_t count) {
    struct gradient g = {calloc((size_t)count, 8), calloc((size_t)count, 8)};
    assert_non_null(g.want);
    assert_non_null(g.wrong);
    return g;
}
static int gradient_check(struct gradient g, const struct problem *p, const char *what,
                          const uint16_t *got, int64_t stride, int rows, int heads) {
    double u = p->c.dtype == DT_BF16 ? 0x1p-8 : 0x1p-11;
    int d = p->c.width;
    struct verdict v = {p->c.label, what, 0, 0};
    for (int row = 0; row < rows; row++)
        for (int e = 0; e < heads * d; e++) {
            int64_t at = (int64_t)row * heads * d + e;
            judge(&v, value_of(p->c.dtype, got[row * stride + e]), g.want[at],
                  g.wrong[at] + u * fabs(g.want[at]) + tiny(p->c.dtype), row, e / d, e % d);
        }
    if (getenv("TRIL_TEST_SAY"))
        fprintf(stderr, "%s: %s %.2f of the tolerance\n", p->c.label, what, v.worst);
    free(g.want);
    free(g.wrong);
    return v.faults;
}

static void check_backward(const struct problem *p) {
    const struct hopper_case *c = &p->c;
    int d = c->width, group = c->heads / c->kv_heads;
    int64_t stride = (int64_t)(c->heads + 2 * c->kv_heads) * d;
    double u = c->dtype == DT_BF16 ? 0x1p-8 : 0x1p-11, scale = (double)p->params.scale;
    double *probability = calloc((size_t)p->keys + 1, sizeof *probability), bound = 0;
    struct gradient dq = gradient_make((int64_t)p->rows * c->heads * d);
    struct gradient dk = gradient_make((int64_t)p->keys * c->kv_heads * d);
    struct gradient dv = gradient_make((int64_t)p->keys * c->kv_heads * d);
    for (int s = 0; s < p->sequences; s++)
        for (int row = p->offsets[s]; row < p->offsets[s + 1]; row++)
            for (int head = 0; head < c->heads; head++) {
                double lse = row_scores(p, s, row, head, probability, &bound);
                if (lse == -INFINITY)
                    continue;
                int64_t at_q = ((int64_t)row * c->heads + head) * d;
                const double *q = p->in[0] + at_q, *g = p->in[3] + at_q, *o = p->in[4] + at_q;
                double delta = 0, delta_size = 0;
                for (int t = 0; t < d; t++) {
                    delta += g[t] * o[t];
                    delta_size += fabs(g[t] * o[t]);
                }
                /* Sums of so many terms in fp32. */
                double sums = 2 * ((p->keys + p->rows) * group + 8) * W;
                double of_p = 4 * bound + sums * (1 + fabs(lse));
                for (int j = 0; j < p->length[s]; j++) {
                    if (probability[j] == 0)
                        continue;
                    int64_t at_k = ((int64_t)(p->start[s] + j) * c->kv_heads + head / group) * d;
                    const double *k = p->in[1] + at_k, *v = p->in[2] + at_k;
                    double dp = 0, dp_size = 0, x = probability[j];
                    for (int t = 0; t < d; t++) {
                        dp += g[t] * v[t];
                        dp_size += fabs(g[t] * v[t]);
                    }
                    double ds = x * (dp - delta);
                    double wrong =
                        x * 2 * (d + 2) * W * (dp_size + delta_size) + fabs(ds) * (of_p + u + sums);
                    for (int t = 0; t < d; t++) {
                        dv.want[at_k + t] += x * g[t];
                        dv.wrong[at_k + t] += (x * (of_p + u + sums) + tiny(c->dtype)) * fabs(g[t]);
                        dk.want[at_k + t] += ds * scale * q[t];
                        dk.wrong[at_k + t] += wrong * scale * fabs(q[t]);
                        dq.want[at_q + t] += ds * scale * k[t];
                        dq.wrong[at_q + t] += wrong * scale * fabs(k[t]);
                    }
                }
            }
    free(probability);
    int faults = gradient_check(dq, p, "dq", p->dq, stride, p->rows, c->heads);
    faults += gradient_check(dk, p, "dk", p->dk, stride, p->keys, c->kv_heads);
    faults += gradient_check(dv, p, "dv", p->dv, stride, p->keys, c->kv_heads);
    assert_int_equal(faults, 0);
}

static void run_backward(struct problem *p) {
    const struct hopper_case *c = &p->c;
    struct tril_error err = {0};
    int d = c->width;
    int64_t row = p->args[F_Q].stride[0];
    struct tensor args[B_ARGS] = {0};
    for (int i = 0; i <= F_LENGTH; i++)
        args[i] = p->args[i];
    args[B_O] = p->args[F_O];
    args[B_LSE] = p->args[F_LSE];
    args[B_DO] = tensor_3d(p->dout, c->dtype, p->rows, c->heads, d);
    args[B_DQ] = heads_of(p->dq, c->dtype, p->rows, c->heads, d, row);
    args[B_DK] = heads_of(p->dk, c->dtype, p->keys, c->kv_heads, d, row);
    args[B_DV] = heads_of(p->dv, c->dtype, p->keys, c->kv_heads, d, row);
    assert_true(attention_hopper_takes_backward(&context, args, &p->params));
    if (attention_hopper_backward(&context, args, &p->params, &err) != TRIL_OK ||
        context.backend->synchronise(&context, &err) != TRIL_OK)
        fail_msg("%s: %s", c->label, err.message);
}

#define BF DT_BF16
#define HF DT_F16
static const struct hopper_case cases[] = {
    {"one row", 64, 1, 1, {1}, {1}, true, 0, BF, 0},
    {"one key, wide", 128, 1, 1, {3}, {1}, false, 0, HF, 0},
    {"seven", 128, 2, 1, {7}, {7}, true, 0, BF, 1},
    {"full blocks", 128, 1, 1, {128}, {256}, true, 0, BF, 0},
    {"causal", 128, 1, 1, {257}, {257}, true, 0, BF, 0},
    {"full", 128, 1, 1, {130}, {301}, false, 0, HF, 3},
    {"narrow causal", 64, 2, 2, {193}, {193}, true, 0, BF, 0},
    {"narrow full", 64, 1, 1, {65}, {400}, false, 0, BF, 5},
    {"longest", 64, 1, 1, {399}, {399}, true, 0, HF, 0},
    {"grouped", 64, 4, 2, {100}, {129}, true, 0, BF, 0},
    {"sequences", 128, 2, 1, {33, 0, 140, 9}, {33, 5, 177, 130}, true, 0, BF, 2},
    {"narrow sequences", 64, 2, 1, {200, 1, 64, 191}, {200, 127, 64, 192}, false, 0, HF, 7},
    {"fewer keys than rows", 128, 1, 1, {150}, {37}, true, 0, BF, 1},
    {"window", 128, 1, 1, {300}, {300}, true, 70, BF, 0},
    {"window both ways", 64, 1, 1, {210}, {330}, false, 50, BF, 4},
};

static void check_case(const struct hopper_case *c) {
    struct problem p;
    problem_make(&p, c);
    run_forward(&p);
    check_forward(&p);
    run_backward(&p);
    check_backward(&p);
    problem_free(&p);
}

static void test_attention(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_case(&cases[i]);
}

/* TRIL_TEST_RANDOM=N: so many cases more. */
static void test_random(void **state) {
    (void)state;
    struct random_key key = {.seed = 7};
    const char *wanted = getenv("TRIL_TEST_RANDOM");
    int count = wanted ? atoi(wanted) : 3;
    for (uint64_t i = 0; i < (uint64_t)count; i++) {
        char label[32];
        snprintf(label, sizeof label, "random %d", (int)i);
        unsigned draw[16];
        for (uint64_t k = 0; k < 16; k++)
            draw[k] = (unsigned)(random_uniform(&key, i * 16 + k) * 65536);
        struct hopper_case c = {label, draw[0] % 2 ? 64 : 128, 1, 1, {0}, {0}, false, 0, BF, 0};
        c.kv_heads = 1 + (int)(draw[1] % 2);
        c.heads = c.kv_heads * (1 + (int)(draw[2] % 2));
        c.causal = draw[3] % 4 > 0;
        c.window = draw[4] % 3 ? 0 : 1 + (int)(draw[5] % 200);
        c.dtype = draw[6] % 2 ? BF : HF;
        c.gap = (int)(draw[7] % 5);
        for (unsigned s = 0; s < 1 + draw[8] % 3; s++) {
            c.n[s] = (int)(draw[9 + s] % 200);
            c.m[s] = draw[12 + s] % 2 && c.n[s] ? c.n[s] : 1 + (int)(draw[12 + s] % 300);
        }
        check_case(&c);
    }
}

static void test_instructions(void **state) {
    (void)state;
    assert_int_equal(hopper_check_swizzle(), 0);
    assert_int_equal(hopper_check_descriptors(), 0);
    assert_int_equal(hopper_check_shared(), 0);
    assert_int_equal(hopper_check_registers(), 0);
}

int main(void) {
    struct tril_error err;
    if (op_context_init(&context, backend_cuda(), &err) != TRIL_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_instructions),
                                       cmocka_unit_test(test_attention),
                                       cmocka_unit_test(test_random)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
