// ctest: timeout=120
/* Every operation of the registry: its description is enforced, its reference writes all of its
 * outputs and nothing else, and its backward is the derivative of its forward. */
#include "support/support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "support/op_harness.h"

static struct op_context context;

static int64_t elements(const struct op_run *r, int i) {
    int64_t n = 1;
    for (int k = 0; k < r->args[i].rank; k++)
        n *= r->args[i].shape[k];
    return r->args[i].data ? n : 0;
}

/* ------------------------------------------------------------------ descriptions */

static void test_descriptions(void **state) {
    (void)state;
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *info = op_info_get((enum op_id)id);
        assert_int_equal(info->id, id);
        assert_true(info->arg_count > 0 && info->arg_count <= OP_MAX_ARGS);
        assert_non_null(info->reference);
        int outputs = 0;
        for (int i = 0; i < info->arg_count; i++) {
            outputs += info->args[i].role != ARG_IN;
            assert_true(info->args[i].dtypes != 0);
        }
        assert_true(outputs > 0);
        struct op_case c;
        if (!info->test_case(0, &c))
            fail_msg("%s has no test case", info->name);
    }
}

/* ------------------------------------------------------------------ argument checks */

/* The call must be refused with a sentence that names the operation and the argument. */
static void refuse(struct op_run *r, int i, const char *why) {
    struct tril_error err = {0};
    tril_status st = op_call(&context, r->info->id, r->args, r->c.params, &err);
    if (st != TRIL_ERR_ARGUMENT)
        fail_msg("%s took %s with %s (status %d)", r->info->name, r->info->args[i].name, why, st);
    if (!strstr(err.message, r->info->name) || !strstr(err.message, r->info->args[i].name))
        fail_msg("%s: the message about %s with %s names them not: %s", r->info->name,
                 r->info->args[i].name, why, err.message);
}

static void check_argument(struct op_run *r, int i) {
    const struct op_arg *a = &r->info->args[i];
    struct tensor good = r->args[i];
    struct tensor *t = &r->args[i];
    if (!a->optional && elements(r, i) > 0) {
        t->data = NULL;
        refuse(r, i, "no data");
    }
    *t = good;
    t->rank = good.rank == TENSOR_MAX_RANK ? 1 : TENSOR_MAX_RANK;
    refuse(r, i, "the wrong rank");
    *t = good;
    t->dtype = DT_U8;
    refuse(r, i, "dtype u8");
    t->dtype = (enum dtype)99;
    refuse(r, i, "an unknown dtype");
    *t = good;
    t->shape[0] = -1;
    refuse(r, i, "a negative size");
    *t = good;
    if (elements(r, i) == 0)
        return;
    if (t->shape[0] > 1 && t->rank > 1) {
        t->stride[0] = a->strided ? 0 : good.stride[0] + 1;
        refuse(r, i, "a bad stride");
    }
    *t = good;
    if (t->shape[t->rank - 1] > 1) {
        t->stride[t->rank - 1] = 2;
        refuse(r, i, "stride 2 in the last dimension");
    }
    *t = good;
}

/* A size that another argument fixes already. */
static void check_sizes(struct op_run *r, int i) {
    struct op_dim mine[TENSOR_MAX_RANK], other[TENSOR_MAX_RANK];
    int rank = op_shape_parse(r->info->args[i].shape, r->c.variant, mine);
    for (int k = 0; k < rank; k++) {
        bool bound = !mine[k].symbol || mine[k].scale > 1;
        for (int o = 0; o < i && !bound; o++)
            for (int n = op_shape_parse(r->info->args[o].shape, r->c.variant, other); n-- > 0;)
                bound |= r->args[o].data && other[n].symbol == mine[k].symbol;
        if (!bound)
            continue;
        struct tensor good = r->args[i];
        r->args[i].shape[k]++;
        for (int d = rank - 2; d >= 0; d--)
            r->args[i].stride[d] = r->args[i].stride[d + 1] * r->args[i].shape[d + 1];
        refuse(r, i, "a size that does not fit");
        r->args[i] = good;
    }
}

static void test_arguments(void **state) {
    (void)state;
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *info = op_info_get((enum op_id)id);
        struct op_case c;
        for (int index = 0; index < 4 && info->test_case(index, &c); index++) {
            c.strided = 0;
            struct op_run r;
            op_run_create(&r, info, &c, PLACE_AT_END, false);
            for (int i = 0; i < info->arg_count; i++)
                if (r.args[i].data) {
                    check_argument(&r, i);
                    check_sizes(&r, i);
                }
            op_run_free(&r);
        }
    }
}

/* Doubles belong to the references: a backend's own kernel must never see them. */
static tril_status own_kernel(struct op_context *ctx, const struct tensor *args, const void *params,
                              struct tril_error *err) {
    (void)ctx;
    (void)args;
    (void)params;
    (void)err;
    return TRIL_OK;
}

static void test_doubles_only_for_references(void **state) {
    (void)state;
    struct backend other = *backend_reference();
    other.table[OP_CAST] = own_kernel;
    struct op_context ctx = {.backend = &other};
    double x[3] = {1, 2, 3}, y[3];
    struct tensor tx = tensor_1d(x, DT_F64, 3), ty = tensor_1d(y, DT_F64, 3);
    assert_int_equal(cast(&ctx, tx, ty, NULL), TRIL_ERR_ARGUMENT);
    ctx.reference = true;
    assert_int_equal(cast(&ctx, tx, ty, NULL), TRIL_OK);
    float z[3];
    assert_int_equal(cast(&ctx, tx, tensor_1d(z, DT_F32, 3), NULL), TRIL_ERR_ARGUMENT);
}

static void test_indices(void **state) {
    (void)state;
    int32_t tokens[2] = {0, 5};
    float wte[4 * 2] = {0}, x[4] = {0};
    struct tril_error err;
    tril_status st = embed_forward(&context, tensor_1d(tokens, DT_I32, 2), tensor_none(),
                                   tensor_2d(wte, DT_F32, 4, 2), tensor_none(),
                                   tensor_2d(x, DT_F32, 2, 2), &err);
    assert_int_equal(st, TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "tokens[1] is 5"));
}

/* ------------------------------------------------------------------ references */

/* The reference in the case's own dtypes against itself on doubles: everything is written, nothing
 * beside it, in every dtype, with gaps, aliases and empty sizes. */
static void test_references(void **state) {
    (void)state;
    int cases = 0;
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *info = op_info_get((enum op_id)id);
        struct op_case c;
        for (int index = 0; info->test_case(index, &c); index++, cases++) {
            const char *what = op_case_describe(info, index, &c);
            struct op_run r;
            struct op_judge j;
            struct tril_error err = {0};
            op_run_create(&r, info, &c, index % 2 ? PLACE_AT_END : PLACE_AFTER_START, false);
            assert_true(op_judge_create(&j, &r));
            if (op_run_call(&r, &context, WEIGHT_PLAIN, &err) != TRIL_OK)
                fail_msg("%s: %s", what, err.message);
            if (op_judge_count(&j, &r, what))
                fail_msg("%s: the reference in its own dtypes is wrong", what);
            op_judge_free(&j);
            op_run_free(&r);
        }
    }
    printf("%d cases\n", cases);
}

/* out = f(inputs) + initial where it accumulates; f(inputs) alone where it overwrites. */
static void test_accumulation(void **state) {
    (void)state;
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *info = op_info_get((enum op_id)id);
        struct op_case c;
        for (int index = 0; index < 40 && info->test_case(index, &c); index++) {
            struct op_run native, a, b;
            op_run_create(&native, info, &c, PLACE_AT_END, false);
            op_run_create_doubles(&a, &native);
            op_run_create_doubles(&b, &native);
            for (int i = 0; i < info->arg_count; i++)
                for (int64_t e = 0; e < elements(&a, i); e++)
                    if (op_run_role(&a, i) == ARG_OUT)
                        op_run_set(&a, i, e, 1e30);
                    else if (op_run_role(&a, i) == ARG_ACCUMULATE)
                        op_run_set(&a, i, e, op_run_get(&b, i, e) + 2);
            assert_int_equal(op_run_call(&a, &context, WEIGHT_PLAIN, NULL), TRIL_OK);
            assert_int_equal(op_run_call(&b, &context, WEIGHT_PLAIN, NULL), TRIL_OK);
            for (int i = 0; i < info->arg_count; i++)
                for (int64_t e = 0; e < elements(&a, i); e++) {
                    double extra = op_run_role(&a, i) == ARG_ACCUMULATE ? 2 : 0;
                    double x = op_run_get(&a, i, e), y = op_run_get(&b, i, e) + extra;
                    if (!(x == y || (isnan(x) && isnan(y)) || fabs(x - y) <= 1e-11 * (1 + fabs(y))))
                        fail_msg("%s: %s[%d] depends on what was there: %g, %g",
                                 op_case_describe(info, index, &c), info->args[i].name, (int)e, x,
                                 y);
                }
            op_run_free(&native);
            op_run_free(&a);
            op_run_free(&b);
        }
    }
}

/* ------------------------------------------------------------------ gradients */

/* The forward and backward of one operation, on doubles, tied together by their arguments' names:
 * equal names are the same tensor; dNAME is the gradient of NAME. The loss is sum y * dy over the
 * forward's outputs y whose dy the backward takes. */
struct pair {
    struct op_run forward, backward;
};

/* Index of the backward's "d" + name, or -1. */
static int gradient_of(const struct op_info *backward, const char *name) {
    char d[32];
    snprintf(d, sizeof d, "d%s", name);
    return op_arg_find(backward, d);
}

static void pair_create(struct pair *p, const struct op_info *f, const struct op_info *b,
                        const struct op_case *c) {
    struct op_case fc = *c;
    fc.absent = fc.strided = 0;
    memset(fc.alias, 0, sizeof fc.alias);
    memset(fc.dtype, 0, sizeof fc.dtype);
    for (int i = 0; i < f->arg_count; i++) {
        int same = op_arg_find(b, f->args[i].name), d = gradient_of(b, f->args[i].name);
        bool used =
            (same >= 0 && op_case_present(b, same, c)) || (d >= 0 && op_case_present(b, d, c));
        if (!used)
            fc.absent |= 1u << i;
    }
    op_run_create(&p->forward, f, &fc, PLACE_AT_END, true);
    op_run_create(&p->backward, b, c, PLACE_AT_END, true);
}

static void run(struct op_run *r) {
    struct tril_error err = {0};
    if (op_call(&context, r->info->id, r->args, r->c.params, &err) != TRIL_OK)
        fail_msg("%s: %s", r->info->name, err.message);
}

static double loss(struct pair *p) {
    run(&p->forward);
    double sum = 0;
    for (int i = 0; i < p->forward.info->arg_count; i++) {
        int d = gradient_of(p->backward.info, p->forward.info->args[i].name);
        if (d < 0 || op_run_role(&p->forward, i) == ARG_IN)
            continue;
        size_t bytes = (size_t)tensor_bytes(&p->backward.args[d]); /* as filled, that is dy */
        const struct op_memory *m = &p->backward.memory[d];
        const double *dy =
            (const double *)(const void *)(m->initial +
                                           ((char *)p->backward.args[d].data - m->begin));
        for (size_t e = 0; e < bytes / sizeof *dy; e++)
            sum += dy[e] * op_run_get(&p->forward, i, (int64_t)e);
    }
    return sum;
}

/* Derivative of the loss along `direction` of input i (one element if it is NULL), with the
 * five-point formula: error O(h^4). */
static double derivative(struct pair *p, int i, int64_t element, const double *direction) {
    const double h = 0x1p-12;
    static const double at[4] = {-2, -1, 1, 2}, weight[4] = {1, -8, 8, -1};
    double sum = 0;
    for (int k = 0; k < 4; k++) {
        op_run_restore(&p->forward);
        for (int64_t e = 0; e < elements(&p->forward, i); e++) {
            double step = direction ? direction[e] : e == element;
            if (step != 0)
                op_run_set(&p->forward, i, e, op_run_get(&p->forward, i, e) + at[k] * h * step);
        }
        sum += weight[k] * loss(p);
    }
    return sum / (12 * h);
}

static void compare_gradient(struct pair *p, int i, int d, const char *what) {
    enum { ELEMENTS = 12 };
    int64_t n = elements(&p->backward, d);
    assert_int_equal(n, elements(&p->forward, i));
    if (n == 0)
        return;
    double largest = 0, norm = 0;
    for (int64_t e = 0; e < n; e++) {
        double g = fabs(op_run_get(&p->backward, d, e));
        largest = g > largest ? g : largest;
        norm += g;
    }
    /* h^4 f''''' / 30 is below 1e-8 for |f'''''| < 80 000; roundoff is 1e-16 |loss| / h. */
    double allowed = 1e-7 * (1 + largest);
    struct random_key key = {.seed = 45, .op = RANDOM_TEST};
    for (int k = 0; k < ELEMENTS && k < n; k++) {
        int64_t e = n <= ELEMENTS ? k : (int64_t)random_below(&key, (uint64_t)k, (uint64_t)n);
        double g = op_run_get(&p->backward, d, e), fd = derivative(p, i, e, NULL);
        if (!(fabs(g - fd) <= allowed))
            fail_msg("%s: %s[%d] is %.12g, finite differences say %.12g", what,
                     p->backward.info->args[d].name, (int)e, g, fd);
    }
    double *direction = malloc((size_t)n * sizeof *direction), dot = 0;
    assert_non_null(direction);
    for (int64_t e = 0; e < n; e++) {
        direction[e] = random_normal(&key, 1000 + (uint64_t)e) / sqrt((double)n);
        dot += direction[e] * op_run_get(&p->backward, d, e);
    }
    double fd = derivative(p, i, 0, direction);
    free(direction);
    if (!(fabs(dot - fd) <= 1e-7 * (1 + norm)))
        fail_msg("%s: %s along a random direction is %.12g, finite differences say %.12g", what,
                 p->backward.info->args[d].name, dot, fd);
}

/* Copies what the forward got and made into the backward's arguments, and clears its gradients. */
static void connect(struct pair *p) {
    struct op_run *f = &p->forward, *b = &p->backward;
    run(f);
    for (int i = 0; i < b->info->arg_count; i++) {
        int same = op_arg_find(f->info, b->info->args[i].name);
        if (op_run_role(b, i) == ARG_OUT || op_run_role(b, i) == ARG_ACCUMULATE)
            for (int64_t e = 0; e < elements(b, i); e++)
                op_run_set(b, i, e, 0);
        else if (same >= 0)
            for (int64_t e = 0; e < elements(b, i); e++)
                op_run_set(b, i, e, op_run_get(f, same, e));
    }
    op_run_keep(b);
    run(b);
}

static int check_gradients(const struct op_info *f, const struct op_info *b) {
    int checked = 0;
    struct op_case c;
    for (int index = 0; b->test_case(index, &c); index++) {
        struct pair p;
        pair_create(&p, f, b, &c);
        double size = 0;
        for (int i = 0; i < f->arg_count; i++)
            size += (double)elements(&p.forward, i);
        double flops = f->flops ? f->flops(p.forward.args, p.forward.c.params) : size;
        if (size < 4000 && flops < 2e5) {
            connect(&p);
            const char *what = op_case_describe(b, index, &c);
            for (int i = 0; i < f->arg_count; i++) {
                int d = gradient_of(b, f->args[i].name);
                if (d >= 0 && p.backward.args[d].data && op_run_role(&p.forward, i) != ARG_OUT) {
                    compare_gradient(&p, i, d, what);
                    checked++;
                }
            }
        }
        op_run_free(&p.forward);
        op_run_free(&p.backward);
    }
    return checked;
}

static void test_gradients(void **state) {
    (void)state;
    for (int id = 0; id < OP_COUNT; id++) {
        const struct op_info *b = op_info_get((enum op_id)id), *f = NULL;
        const char *at = strstr(b->name, "_backward");
        if (!at || id == OP_CROSS_ENTROPY_BACKWARD)
            continue;
        char name[64];
        snprintf(name, sizeof name, "%.*s_forward", (int)(at - b->name), b->name);
        for (int k = 0; k < OP_COUNT; k++)
            if (strcmp(op_info_get((enum op_id)k)->name, name) == 0)
                f = op_info_get((enum op_id)k);
        assert_non_null(f);
        int checked = check_gradients(f, b);
        printf("%s: %d gradients\n", b->name, checked);
        assert_true(checked > 0);
    }
}

/* The loss as its three phases compute it, times the scale of the backward. */
static double total_loss(const struct op_run *b, double scale) {
    enum { N_MAX = 64 };
    int64_t n = b->args[0].shape[0];
    assert_true(n <= N_MAX);
    double maximum[N_MAX], sum[N_MAX], target[N_MAX], row[N_MAX], total[2] = {0, 0};
    struct tensor m = tensor_1d(maximum, DT_F64, n), s = tensor_1d(sum, DT_F64, n);
    struct tensor t = tensor_1d(target, DT_F64, n), r = tensor_1d(row, DT_F64, n);
    assert_int_equal(cross_entropy_forward(&context, b->args[0], b->args[1], m, s, t, NULL),
                     TRIL_OK);
    assert_int_equal(
        cross_entropy_loss(&context, b->args[1], m, s, t, r, tensor_1d(total, DT_F64, 2), NULL),
        TRIL_OK);
    int64_t counted = 0;
    for (int64_t i = 0; i < n; i++)
        counted += op_run_get(b, 1, i) >= 0;
    assert_true(total[1] == (double)counted);
    return scale * total[0];
}

static void test_cross_entropy_gradient(void **state) {
    (void)state;
    const struct op_info *info = op_info_get(OP_CROSS_ENTROPY_BACKWARD);
    struct op_case c;
    const double h = 0x1p-12;
    for (int index = 0; info->test_case(index, &c); index++) {
        if (c.size['N'] * c.size['V'] > 600)
            continue;
        struct op_run r;
        op_run_create(&r, info, &c, PLACE_AT_END, true);
        run(&r);
        float scale;
        memcpy(&scale, r.c.params, sizeof scale);
        for (int64_t e = 0; e < elements(&r, 0); e += 1 + e / 5) {
            double x = op_run_get(&r, 0, e), sum = 0;
            static const double at[4] = {-2, -1, 1, 2}, weight[4] = {1, -8, 8, -1};
            for (int k = 0; k < 4; k++) {
                op_run_set(&r, 0, e, x + at[k] * h);
                sum += weight[k] * total_loss(&r, scale);
            }
            op_run_set(&r, 0, e, x);
            double fd = sum / (12 * h), g = op_run_get(&r, 4, e);
            if (!(fabs(fd - g) <= 1e-8))
                fail_msg("cross_entropy_backward: dlogits[%d] is %.12g, finite differences say "
                         "%.12g",
                         (int)e, g, fd);
        }
        op_run_free(&r);
    }
}

/* ------------------------------------------------------------------ the optimiser's corners */

static void test_clipping(void **state) {
    (void)state;
    float hyper[HYPER_COUNT] = {[HYPER_LR] = 0.5f};
    double total = 16;
    struct tensor tt = tensor_1d(&total, DT_F64, 1), th = tensor_1d(hyper, DT_F32, HYPER_COUNT);
    assert_int_equal(clip_factor(&context, tt, th, 1.0f, 0.5f, NULL), TRIL_OK);
    assert_true(hyper[HYPER_GRAD_NORM] == 2.0f && hyper[HYPER_FOUND_INF] == 0.0f);
    assert_true(fabs(hyper[HYPER_GRAD_SCALE] - 0.25) < 1e-6);
    assert_true(hyper[HYPER_LR] == 0.5f);
    total = INFINITY;
    assert_int_equal(clip_factor(&context, tt, th, 1.0f, 1.0f, NULL), TRIL_OK);
    assert_true(hyper[HYPER_FOUND_INF] == 1.0f);
    total = NAN;
    assert_int_equal(clip_factor(&context, tt, th, 0.0f, 1.0f, NULL), TRIL_OK);
    assert_true(hyper[HYPER_FOUND_INF] == 1.0f);
}

static void test_adamw_stops_at_infinity(void **state) {
    (void)state;
    float hyper[HYPER_COUNT] = {[HYPER_LR] = 1, [HYPER_FOUND_INF] = 1, [HYPER_GRAD_SCALE] = 1};
    float p[2] = {1, 2}, g[2] = {INFINITY, 1}, m[2] = {0.5f, 0.5f}, v[2] = {1, 1};
    uint16_t copy[2] = {7, 7};
    struct adamw_params o = {0.9f, 0.95f, 1e-8f, 0.1f};
    assert_int_equal(adamw(&context, tensor_1d(p, DT_F32, 2), tensor_1d(g, DT_F32, 2),
                           tensor_1d(m, DT_F32, 2), tensor_1d(v, DT_F32, 2),
                           tensor_1d(copy, DT_BF16, 2), tensor_1d(hyper, DT_F32, HYPER_COUNT), o,
                           NULL),
                     TRIL_OK);
    assert_true(p[0] == 1 && p[1] == 2 && m[0] == 0.5f && v[1] == 1 && copy[0] == 7);
}

/* ------------------------------------------------------------------ the harness itself */

static tril_status forgets_last(struct op_context *ctx, const struct tensor *args,
                                const void *params, struct tril_error *err) {
    struct tensor a[4];
    memcpy(a, args, sizeof a);
    if (a[2].rank == 2 && a[2].shape[0] > 1) { /* leaves the last row out */
        a[0].shape[0]--;
        a[2].shape[0]--;
        a[3].shape[0]--;
    }
    return op_info_get(OP_RMSNORM_FORWARD)->reference(ctx, a, params, err);
}

static tril_status slightly_wrong(struct op_context *ctx, const struct tensor *args,
                                  const void *params, struct tril_error *err) {
    struct norm_params p = *(const struct norm_params *)params;
    p.eps *= 1 + 1e-1f;
    p.gain_offset += 2e-6f; /* 17 times fp32's unit roundoff */
    return op_info_get(OP_RMSNORM_FORWARD)->reference(ctx, args, &p, err);
}

static tril_status writes_beside(struct op_context *ctx, const struct tensor *args,
                                 const void *params, struct tril_error *err) {
    if (args[2].rank == 3 && args[2].shape[0] > 1)
        memset((char *)args[2].data + args[2].shape[2] * (int64_t)dtype_size(args[2].dtype), 0, 1);
    return op_info_get(OP_RMSNORM_FORWARD)->reference(ctx, args, params, err);
}

static int faults_of(op_fn *fn, bool only_fp32) {
    const struct op_info *info = op_info_get(OP_RMSNORM_FORWARD);
    struct backend broken = *backend_reference();
    broken.table[OP_RMSNORM_FORWARD] = fn;
    struct op_context ctx = {.backend = &broken};
    struct op_case c;
    int faults = 0;
    if (freopen("/dev/null", "w", stderr) == NULL) /* the faults are wanted: not shown */
        fail();
    for (int index = 0; info->test_case(index, &c); index++) {
        if (only_fp32 && (c.act != DT_F32 || c.size['D'] > 100))
            continue;
        struct op_run r;
        struct op_judge j;
        op_run_create(&r, info, &c, PLACE_AT_END, false);
        assert_true(op_judge_create(&j, &r));
        assert_int_equal(op_run_call(&r, &ctx, WEIGHT_PLAIN, NULL), TRIL_OK);
        faults += op_judge_count(&j, &r, "expected") > 0;
        op_judge_free(&j);
        op_run_free(&r);
    }
    return faults;
}

static void test_harness_finds_faults(void **state) {
    (void)state;
    assert_int_equal(faults_of(op_info_get(OP_RMSNORM_FORWARD)->reference, false), 0);
    assert_true(faults_of(forgets_last, false) > 10);
    assert_true(faults_of(slightly_wrong, true) > 5);
    assert_true(faults_of(writes_beside, false) > 5);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_descriptions),
        cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_doubles_only_for_references),
        cmocka_unit_test(test_indices),
        cmocka_unit_test(test_references),
        cmocka_unit_test(test_accumulation),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_cross_entropy_gradient),
        cmocka_unit_test(test_clipping),
        cmocka_unit_test(test_adamw_stops_at_infinity),
        cmocka_unit_test(test_harness_finds_faults), /* last: it silences stderr */
    };
    if (op_context_init(&context, backend_reference(), NULL) != TRIL_OK)
        return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_context_free(&context);
    return failed;
}
