/* Running cases of operations: memory between guard pages, filling, judging. See op_harness.h. */
#include "support/op_harness.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/error.h"

enum { TRIALS = 3, GAP_ROWS = 5, GAP_HEADS = 3 };
/* Operations of a case from which one trial must do: P then errs on the small side by a third,
 * where sums are long and their bound is wide. */
#define LARGE 2e5

static void *must(void *p, const char *what) {
    if (p && p != MAP_FAILED)
        return p;
    fprintf(stderr, "the test is out of memory for %s\n", what);
    exit(1);
}

/* ------------------------------------------------------------------ elements */

static int64_t count(const struct tensor *t) {
    int64_t n = 1;
    for (int k = 0; k < t->rank; k++)
        n *= t->shape[k];
    return t->data ? n : 0;
}

/* A hash of (stream, e): the tests need many numbers, not good ones (splitmix64, Steele et al.
 * 2014).
 */
static uint64_t hash(uint64_t stream, int64_t e) {
    uint64_t z = stream * 0xD1342543DE82EF95u + (uint64_t)(e + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Nearly normal: four uniforms added, variance 1, with every ninth number three times as large. */
static double sample(uint64_t stream, int64_t e) {
    uint64_t h = hash(stream, e);
    double sum = (double)(h & 0xffff) + (double)(h >> 16 & 0xffff) + (double)(h >> 32 & 0xffff) +
                 (double)(h >> 48);
    double x = (sum / 65536 - 2) * 1.7320508;
    return h % 9 ? x : 3 * x;
}

/* Offset in elements of row-major element e. */
static int64_t offset(const struct tensor *t, int64_t e) {
    int64_t at = 0, size = 1;
    bool gaps = false;
    for (int k = t->rank - 1; k >= 0; k--) {
        gaps |= t->stride[k] != size;
        size *= t->shape[k];
    }
    if (!gaps) /* quicker than divisions */
        return e;
    for (int k = t->rank - 1; k >= 0; k--) {
        at += e % t->shape[k] * t->stride[k];
        e /= t->shape[k];
    }
    return at;
}

static double load(const struct tensor *t, int64_t at) {
    double v = 0;
    switch (t->dtype) {
    case DT_F64:
        return ((const double *)t->data)[at];
    case DT_F32:
        return ((const float *)t->data)[at];
    case DT_BF16:
    case DT_F16:
        dtype_convert(&v, DT_F64, (const char *)t->data + at * (int64_t)dtype_size(t->dtype),
                      t->dtype, 1);
        return v;
    case DT_I64:
        return (double)((const int64_t *)t->data)[at];
    case DT_I32:
        return ((const int32_t *)t->data)[at];
    case DT_I8:
        return ((const int8_t *)t->data)[at];
    default:
        return NAN;
    }
}

static void store(const struct tensor *t, int64_t at, double v) {
    if (t->dtype == DT_F64)
        ((double *)t->data)[at] = v;
    else if (t->dtype == DT_I64)
        ((int64_t *)t->data)[at] = (int64_t)v;
    else if (t->dtype == DT_I32)
        ((int32_t *)t->data)[at] = (int32_t)v;
    else if (t->dtype == DT_I8)
        ((int8_t *)t->data)[at] = (int8_t)v;
    else
        dtype_convert((char *)t->data + at * (int64_t)dtype_size(t->dtype), t->dtype, &v, DT_F64,
                      1);
}

double op_run_get(const struct op_run *r, int i, int64_t e) {
    return load(&r->args[i], r->doubles ? e : offset(&r->args[i], e));
}

void op_run_set(struct op_run *r, int i, int64_t e, double value) {
    store(&r->args[i], r->doubles ? e : offset(&r->args[i], e), value);
}

enum op_role op_run_role(const struct op_run *r, int i) {
    return op_arg_role(r->info, i, r->args, r->c.params);
}

int op_arg_find(const struct op_info *info, const char *name) {
    for (int i = 0; i < info->arg_count; i++)
        if (strcmp(info->args[i].name, name) == 0)
            return i;
    return -1;
}

const char *op_case_describe(const struct op_info *info, int index, const struct op_case *c) {
    static char text[512];
    size_t n = (size_t)snprintf(text, sizeof text, "%s %d [%s]", info->name, index,
                                c->label ? c->label : "");
    for (int s = 0; s < 128 && n < sizeof text; s++) {
        bool used = false;
        for (int i = 0; i < info->arg_count; i++)
            used |= isalpha(s) && strchr(info->args[i].shape, s) != NULL;
        if (used)
            n += (size_t)snprintf(text + n, sizeof text - n, " %c=%lld", s, (long long)c->size[s]);
    }
    for (int i = 0; i < info->arg_count && n < sizeof text; i++)
        if (op_case_present(info, i, c))
            n += (size_t)snprintf(text + n, sizeof text - n, " %s:%s%s", info->args[i].name,
                                  dtype_name(op_case_dtype(info, i, c)),
                                  c->strided >> i & 1 ? "/strided" : "");
    return text;
}

/* ------------------------------------------------------------------ memory */

static void shape_arg(struct op_run *r, int i) {
    struct tensor *t = &r->args[i];
    *t = (struct tensor){.dtype = op_case_dtype(r->info, i, &r->c)};
    if (r->doubles && dtype_is_float(t->dtype))
        t->dtype = DT_F64;
    t->rank = op_case_shape(r->info, i, &r->c, t->shape);
    bool gaps = !r->doubles && (r->c.strided >> i & 1);
    int64_t stride = 1;
    for (int k = t->rank - 1; k >= 0; k--) {
        t->stride[k] = stride;
        stride *= t->shape[k];
        if (gaps && k > 0)
            stride += k == 1 ? GAP_ROWS : GAP_HEADS;
    }
    for (int k = t->rank; k < TENSOR_MAX_RANK; k++)
        t->stride[k] = 1;
}

static void place_arg(struct op_run *r, int i, enum op_placement placement) {
    struct tensor *t = &r->args[i];
    struct op_memory *m = &r->memory[i];
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = dtype_size(t->dtype);
    int64_t last = 0, n = 1;
    for (int k = 0; k < t->rank; k++) {
        last += (t->shape[k] - 1) * t->stride[k];
        n *= t->shape[k];
    }
    size_t bytes = n > 0 ? (size_t)(last + 1) * size : 0;
    m->bytes = (bytes + size + page - 1) / page * page;
    m->map_bytes = m->bytes + 2 * page;
    m->map = must(mmap(NULL, m->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                  "an argument");
    m->begin = m->map + page;
    if (mprotect(m->begin, m->bytes, PROT_READ | PROT_WRITE) != 0)
        must(NULL, "an argument");
    memset(m->begin, 0xA5, m->bytes);
    t->data = m->begin + (placement == PLACE_AT_END ? m->bytes - bytes : size);
}

static void fill_arg(struct op_run *r, int i) {
    const struct op_arg *a = &r->info->args[i];
    struct tensor *t = &r->args[i];
    uint64_t stream = 42 + (uint64_t)i;
    bool poison = op_run_role(r, i) == ARG_OUT && !r->c.alias[i];
    for (int64_t e = 0; e < count(t); e++) {
        if (poison && r->doubles)
            op_run_set(r, i, e, 0);
        else if (poison)
            memset((char *)t->data + offset(t, e) * (int64_t)dtype_size(t->dtype), 0xFF,
                   dtype_size(t->dtype));
        else if (dtype_is_float(t->dtype))
            op_run_set(r, i, e, sample(stream, e));
        else if (a->index_of && r->c.size[(int)a->index_of[0]] > 0)
            op_run_set(r, i, e,
                       (double)(hash(stream, e) % (uint64_t)r->c.size[(int)a->index_of[0]]));
        else
            op_run_set(r, i, e, 0);
    }
}

void op_run_keep(struct op_run *r) {
    for (int i = 0; i < r->info->arg_count; i++) {
        struct op_memory *m = &r->memory[i];
        if (!m->map)
            continue;
        if (!m->initial)
            m->initial = must(malloc(m->bytes), "a copy");
        memcpy(m->initial, m->begin, m->bytes);
    }
}

void op_run_restore(struct op_run *r) {
    for (int i = 0; i < r->info->arg_count; i++)
        if (r->memory[i].map)
            memcpy(r->memory[i].begin, r->memory[i].initial, r->memory[i].bytes);
}

static void allocate(struct op_run *r, const struct op_info *info, const struct op_case *c,
                     enum op_placement placement, bool doubles) {
    memset(r, 0, sizeof *r);
    r->info = info;
    r->c = *c;
    r->doubles = doubles;
    if (doubles)
        memset(r->c.alias, 0, sizeof r->c.alias);
    for (int i = 0; i < info->arg_count; i++)
        if (op_case_present(info, i, c)) {
            shape_arg(r, i);
            if (!r->c.alias[i])
                place_arg(r, i, placement);
        }
    for (int i = 0; i < info->arg_count; i++)
        if (r->c.alias[i] && r->args[i].rank)
            r->args[i].data = r->args[r->c.alias[i] - 1].data;
}

void op_run_create(struct op_run *r, const struct op_info *info, const struct op_case *c,
                   enum op_placement placement, bool doubles) {
    allocate(r, info, c, placement, doubles);
    for (int i = 0; i < info->arg_count; i++)
        if (!r->c.alias[i])
            fill_arg(r, i);
    struct random_key key = {.seed = 43, .op = RANDOM_TEST};
    if (info->test_fill)
        info->test_fill(c, r->args, &key);
    op_run_keep(r);
}

void op_run_create_doubles(struct op_run *r, const struct op_run *src) {
    allocate(r, src->info, &src->c, PLACE_AT_END, true);
    for (int i = 0; i < r->info->arg_count; i++) {
        bool output = op_run_role(src, i) == ARG_OUT;
        for (int64_t e = 0; e < count(&r->args[i]); e++)
            op_run_set(r, i, e, output ? 0 : op_run_get(src, i, e));
    }
    op_run_keep(r);
}

void op_run_free(struct op_run *r) {
    if (!r->info)
        return;
    for (int i = 0; i < r->info->arg_count; i++) {
        if (r->memory[i].map)
            munmap(r->memory[i].map, r->memory[i].map_bytes);
        free(r->memory[i].initial);
    }
    memset(r, 0, sizeof *r);
}

bool op_run_same_bits(const struct op_run *a, const struct op_run *b) {
    for (int i = 0; i < a->info->arg_count; i++) {
        if (!a->args[i].data || a->info->args[i].role == ARG_IN)
            continue;
        size_t size = dtype_size(a->args[i].dtype);
        for (int64_t e = 0; e < count(&a->args[i]); e++) {
            int64_t at = offset(&a->args[i], e) * (int64_t)size;
            if (memcmp((char *)a->args[i].data + at, (char *)b->args[i].data + at, size) != 0)
                return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------ calling */

static tril_status call_linear(struct op_run *r, struct op_context *ctx, enum op_weight_mode mode,
                               struct tril_error *err) {
    int w = op_arg_find(r->info, "w");
    struct tensor args[OP_MAX_ARGS];
    memcpy(args, r->args, sizeof args);
    struct linear_params p;
    memcpy(&p, r->c.params, sizeof p);
    struct weight weight = {.value = args[w]};
    unsigned uses = r->info->id == OP_LINEAR_FORWARD ? WEIGHT_FORWARD : WEIGHT_BACKWARD;
    size_t bytes = (size_t)tensor_bytes(&args[w]);
    char *values = must(malloc(bytes + 1), "a weight");
    memcpy(values, args[w].data, bytes);
    tril_status st;
    if (mode == WEIGHT_KEPT)
        uses |= WEIGHT_STATIC;
    if (mode == WEIGHT_REFRESHED)
        memset(args[w].data, 0, bytes);
    TRY(ctx->backend->weight_prepare(ctx, &weight, uses, err));
    if (mode == WEIGHT_REFRESHED) {
        memcpy(args[w].data, values, bytes);
        TRY(ctx->backend->weight_refresh(ctx, &weight, err));
    }
    if (mode == WEIGHT_KEPT && !weight.value.data) {
        args[w].data = NULL;
        memset(r->args[w].data, 0, bytes);
    }
    p.weight = &weight;
    st = op_call(ctx, r->info->id, args, &p, err);
done:
    if (bytes)
        memcpy(r->args[w].data, values, bytes);
    ctx->backend->weight_release(&weight);
    free(values);
    return st;
}

tril_status op_run_call(struct op_run *r, struct op_context *ctx, enum op_weight_mode mode,
                        struct tril_error *err) {
    bool linear = r->info->id == OP_LINEAR_FORWARD || r->info->id == OP_LINEAR_BACKWARD_INPUT;
    if (linear && !r->doubles)
        return call_linear(r, ctx, mode, err);
    return op_call(ctx, r->info->id, r->args, r->c.params, err);
}

tril_status op_run_call_there(struct op_run *r, struct op_context *ctx, enum op_weight_mode mode,
                              struct tril_error *err) {
    const struct backend *b = ctx->backend;
    struct op_run there = *r;
    void *memory[OP_MAX_ARGS] = {NULL};
    tril_status st = TRIL_OK;
    for (int i = 0; i < r->info->arg_count; i++) {
        const struct op_memory *m = &r->memory[i];
        if (!m->map)
            continue;
        TRY(b->alloc(&memory[i], (int64_t)m->bytes, false, "an argument", err));
        TRY(b->upload(ctx, memory[i], m->begin, (int64_t)m->bytes, err));
        for (int a = 0; a < r->info->arg_count; a++) { /* those that share it too */
            char *data = r->args[a].data;
            if (data && data >= m->begin && data < m->begin + m->bytes)
                there.args[a].data = (char *)memory[i] + (data - m->begin);
        }
    }
    TRY(op_run_call(&there, ctx, mode, err));
    for (int i = 0; i < r->info->arg_count; i++)
        if (memory[i])
            TRY(b->download(ctx, r->memory[i].begin, memory[i], (int64_t)r->memory[i].bytes, err));
done:
    for (int i = 0; i < r->info->arg_count; i++)
        b->release(memory[i]);
    return st;
}

/* ------------------------------------------------------------------ judging */

static double unit_roundoff(enum dtype t) {
    switch (t) {
    case DT_BF16:
        return 0x1p-8;
    case DT_F16:
        return 0x1p-11;
    case DT_F64:
        return 0x1p-53;
    default:
        return 0x1p-24;
    }
}

/* Half of the smallest number that must be kept; subnormals of fp32 and bf16 may be flushed. */
static double tiny(enum dtype t) {
    return t == DT_F16 ? 0x1p-25 : 0x1p-126;
}

static bool call_reference(struct op_run *r) {
    struct op_context ctx;
    struct tril_error err = {0};
    tril_status st = op_context_init(&ctx, backend_reference(), &err);
    if (st == TRIL_OK)
        st = op_run_call(r, &ctx, WEIGHT_PLAIN, &err);
    op_context_free(&ctx);
    if (st != TRIL_OK)
        fprintf(stderr, "the reference of %s fails: %s\n", r->info->name, err.message);
    return st == TRIL_OK;
}

/* Multiplies every element of argument i (doubles) by 1 + t u, u random in +-[0.5, 1.5]. */
static void perturb(struct op_run *r, int i, int trial, double t) {
    uint64_t stream = 1000 + 100 * (uint64_t)trial + (uint64_t)i;
    double *x = r->args[i].data;
    for (int64_t e = 0, n = count(&r->args[i]); e < n; e++) {
        uint64_t h = hash(stream, e);
        double u = 0.5 + (double)(h >> 40) * 0x1p-24;
        x[e] *= 1 + t * (h & 1 ? u : -u);
    }
}

/* largest[e] becomes |moved - reference| / t where that is more, or always. */
static void keep_largest(const struct op_run *moved, const struct op_run *reference, int i,
                         bool always, double t, double *largest) {
    const double *x = moved->args[i].data, *y = reference->args[i].data;
    bool direct = moved->args[i].dtype == DT_F64;
    for (int64_t e = 0, n = count(&moved->args[i]); e < n; e++) {
        double d = direct ? x[e] - y[e] : op_run_get(moved, i, e) - op_run_get(reference, i, e);
        d = fabs(d) / t;
        if (always || d > largest[e])
            largest[e] = d;
    }
}

/* Adds to every tolerance the largest change that moving argument `moved_arg` made. */
static bool add_sensitivity_to(struct op_judge *j, const struct op_run *src, struct op_run *moved,
                               int moved_arg, double *largest[OP_MAX_ARGS]) {
    const double t = 0x1p-20; /* large against the doubles' roundoff, small against 1 */
    bool large = src->info->flops && src->info->flops(src->args, src->c.params) > LARGE;
    for (int trial = 0; trial < (large ? 1 : TRIALS); trial++) {
        op_run_restore(moved);
        perturb(moved, moved_arg, trial, t);
        if (!call_reference(moved))
            return false;
        for (int i = 0; i < src->info->arg_count; i++)
            if (largest[i])
                keep_largest(moved, &j->reference, i, trial == 0, t, largest[i]);
    }
    for (int i = 0; i < src->info->arg_count; i++)
        for (int64_t e = 0, n = count(&src->args[i]); largest[i] && e < n; e++)
            j->tolerance[i][e] += largest[i][e];
    return true;
}

static bool add_sensitivity(struct op_judge *j, const struct op_run *src) {
    struct op_run moved;
    double *largest[OP_MAX_ARGS] = {NULL};
    bool ok = true;
    op_run_create_doubles(&moved, src);
    for (int i = 0; i < src->info->arg_count; i++)
        if (j->tolerance[i])
            largest[i] = must(malloc(((size_t)count(&src->args[i]) + 1) * sizeof(double)),
                              "the sensitivities");
    for (int i = 0; i < src->info->arg_count && ok; i++)
        if (op_run_role(src, i) != ARG_OUT && moved.args[i].dtype == DT_F64)
            ok = add_sensitivity_to(j, src, &moved, i, largest);
    for (int i = 0; i < src->info->arg_count; i++)
        free(largest[i]);
    op_run_free(&moved);
    return ok;
}

bool op_judge_create(struct op_judge *j, const struct op_run *r) {
    memset(j, 0, sizeof *j);
    op_run_create_doubles(&j->reference, r);
    for (int i = 0; i < r->info->arg_count; i++)
        if (op_run_role(r, i) != ARG_IN && r->args[i].data)
            j->tolerance[i] =
                must(calloc((size_t)count(&r->args[i]) + 1, sizeof(double)), "the tolerances");
    if (!call_reference(&j->reference) || !add_sensitivity(j, r)) {
        op_judge_free(j);
        return false;
    }
    double n = op_reduction(r->info, r->args, r->c.params);
    double rounded = r->info->rounds_intermediates ? 4 * unit_roundoff(r->c.act) * sqrt(n) : 0;
    for (int i = 0; i < r->info->arg_count; i++) {
        if (!j->tolerance[i])
            continue;
        double largest = 0, typical = 0, u = unit_roundoff(r->args[i].dtype);
        int64_t elements = count(&r->args[i]);
        for (int64_t e = 0; e < elements; e++) {
            double v = fabs(op_run_get(&j->reference, i, e));
            if (isfinite(v) && v > largest)
                largest = v;
            if (isfinite(j->tolerance[i][e]))
                typical += j->tolerance[i][e] / (double)elements;
        }
        for (int64_t e = 0; e < elements; e++) {
            double p = fmax(j->tolerance[i][e], typical), ref = op_run_get(&j->reference, i, e);
            double inner = 4 * 0x1p-24 * (n * p + largest) + rounded * p;
            j->tolerance[i][e] = u * fabs(ref) + inner * (1 + u) + tiny(r->args[i].dtype);
        }
    }
    return true;
}

void op_judge_free(struct op_judge *j) {
    for (int i = 0; i < OP_MAX_ARGS; i++)
        free(j->tolerance[i]);
    op_run_free(&j->reference);
    memset(j, 0, sizeof *j);
}

/* Bytes of memory m that changed without belonging to an output. */
static int64_t stray_bytes(const struct op_run *r, int m) {
    const struct op_memory *memory = &r->memory[m];
    char *expected = must(malloc(memory->bytes), "a copy");
    memcpy(expected, memory->initial, memory->bytes);
    for (int i = 0; i < r->info->arg_count; i++) {
        const struct tensor *t = &r->args[i];
        int owner = r->c.alias[i] ? r->c.alias[i] - 1 : i;
        if (owner != m || !t->data || op_run_role(r, i) == ARG_IN)
            continue;
        size_t size = dtype_size(t->dtype);
        for (int64_t e = 0; e < count(t); e++) {
            const char *at = (const char *)t->data + offset(t, e) * (int64_t)size;
            memcpy(expected + (at - memory->begin), at, size);
        }
    }
    int64_t stray = 0;
    for (size_t b = 0; b < memory->bytes; b++)
        stray += expected[b] != memory->begin[b];
    free(expected);
    return stray;
}

int op_judge_count(const struct op_judge *j, const struct op_run *r, const char *what) {
    enum { SHOWN = 3 };
    int faults = 0;
    for (int i = 0; i < r->info->arg_count; i++) {
        const char *name = r->info->args[i].name;
        int64_t bad = 0;
        for (int64_t e = 0; j->tolerance[i] && e < count(&r->args[i]); e++) {
            double out = op_run_get(r, i, e), ref = op_run_get(&j->reference, i, e);
            double tolerance = j->tolerance[i][e];
            bool good = isfinite(ref) ? fabs(out - ref) <= tolerance
                                      : (isnan(ref) ? isnan(out) : out == ref);
            if (good)
                continue;
            if (bad++ < SHOWN)
                fprintf(stderr, "%s: %s[%lld] is %.9g, should be %.9g +- %.2g\n", what, name,
                        (long long)e, out, ref, tolerance);
        }
        if (bad > SHOWN)
            fprintf(stderr, "%s: %lld elements of %s differ in all\n", what, (long long)bad, name);
        int64_t stray = r->memory[i].map ? stray_bytes(r, i) : 0;
        if (stray)
            fprintf(stderr, "%s: %lld bytes around or in %s changed that are no output\n", what,
                    (long long)stray, name);
        faults += (int)(bad < 1000000 ? bad : 1000000) + (stray != 0);
    }
    return faults;
}
