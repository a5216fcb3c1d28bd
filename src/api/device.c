/* Backends by name. (A file of its own: the tests build it a second time, with the emulated GPU.)
 */
#include "api/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/system.h"
#include "base/threads.h"
#include "cpu/cpu.h"
#include "cpu/probe.h"
#include "tril/tril.h"
#ifdef TRIL_CUDA
#include "cuda/cuda.h"
#endif

tril_status device_backend(const struct backend **out, const char *name, struct tril_error *err) {
    *out = !name || strcmp(name, "cpu") == 0 ? backend_cpu()
           : strcmp(name, "reference") == 0  ? backend_reference()
                                             : NULL;
    if (*out)
        return TRIL_OK;
    if (strcmp(name, "cuda") != 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "there is no device '%s': cpu, cuda or reference",
                         name);
#ifdef TRIL_CUDA
    *out = backend_cuda();
    return TRIL_OK;
#else
    return error_set(err, TRIL_ERR_UNSUPPORTED,
                     "this tril was built without CUDA: install the CUDA toolkit (nvcc 12.4 or "
                     "newer) and build it again, or use --device cpu");
#endif
}

tril_status device_open(struct op_context *ctx, const char *name, struct tril_error *err) {
    const struct backend *backend;
    *ctx = (struct op_context){0};
    tril_status st = device_backend(&backend, name, err);
    return st == TRIL_OK ? op_context_init(ctx, backend, err) : st;
}

tril_status device_dtype(enum dtype *out, const char *name, struct tril_error *err) {
    enum dtype t = *out;
    if (name && (!dtype_parse(name, &t) || (t != DT_F32 && t != DT_BF16 && t != DT_F16)))
        return error_set(err, TRIL_ERR_ARGUMENT, "the dtype is bf16, fp32 or fp16, not '%.40s'",
                         name);
    *out = t;
    return TRIL_OK;
}

tril_status device_open_as(struct op_context *ctx, const char *device, const char *dtype,
                           enum dtype *out, struct tril_error *err) {
    const bool tf32 = dtype && strcmp(dtype, "tf32") == 0;
    tril_status st = device_dtype(out, tf32 ? "fp32" : dtype, err);
    *ctx = (struct op_context){0};
    if (st != TRIL_OK)
        return st;
    if (tf32 && (!device || strcmp(device, "cuda") != 0))
        return error_set(
            err, TRIL_ERR_ARGUMENT,
            "tf32 is how a GPU multiplies (--device cuda); on --device %s give bf16 or "
            "fp32",
            device ? device : "cpu");
    st = device_open(ctx, device, err);
#ifdef TRIL_CUDA
    if (st == TRIL_OK && tf32)
        cuda_rounding(ctx, true, false);
#endif
    return st;
}

const char *device_name(const struct op_context *ctx) {
#ifdef TRIL_CUDA
    static struct cuda_device device;
    if (ctx->backend->device && cuda_device_get(&device, NULL) == TRIL_OK)
        return device.name;
#endif
    return ctx->backend == backend_reference() ? "reference" : cpu_level_name(cpu_level_active());
}

const char *tril_cuda_info(void) {
#ifdef TRIL_CUDA
    static char text[400];
    struct cuda_device d;
    struct tril_error err = {0};
    if (cuda_device_get(&d, &err) == TRIL_OK)
        snprintf(text, sizeof text, "%d.%d, %s (sm_%d%d, %d processors, %.0f GB)", d.runtime / 1000,
                 d.runtime % 1000 / 10, d.name, d.major, d.minor, d.processors,
                 (double)d.memory / 1e9);
    else
        snprintf(text, sizeof text, "%d.%d, no GPU in use: %.300s", d.runtime / 1000,
                 d.runtime % 1000 / 10, err.message);
    return text;
#else
    return NULL;
#endif
}

/* ------------------------------------------------------------------ limits */

/* The best rate of a matrix product of n^3, over and over; *seconds: of the first. */
static double product_flops(struct op_context *ctx, enum dtype t, int64_t n, double *seconds) {
    enum { TRIES = 5 };
    const struct backend *b = ctx->backend;
    const int64_t bytes = n * n * (int64_t)dtype_size(t);
    struct tensor x = tensor_2d(NULL, t, n, n), y = x, none = tensor_none();
    struct weight w = {.value = x};
    double best = 0;
    int times = 1;
    tril_status st;
    TRY(b->alloc(&x.data, bytes, true, "a product", NULL));
    TRY(b->alloc(&y.data, bytes, true, "a product", NULL));
    TRY(b->alloc(&w.value.data, bytes, true, "a product", NULL));
    TRY(b->weight_prepare(ctx, &w, WEIGHT_FORWARD, NULL));
    for (int at = -2; at < TRIES; at++) { /* two to warm up */
        TRY(b->synchronise(ctx, NULL));
        double begun = clock_seconds();
        for (int i = 0; i < times; i++)
            TRY(linear_forward(ctx, x, &w, none, none, y, none, ACT_NONE, NULL));
        TRY(b->synchronise(ctx, NULL));
        double took = clock_seconds() - begun, cube = (double)n * (double)n * (double)n;
        best = fmax(best, 2 * times * cube / took);
        if (at == -2)
            *seconds = took;
        if (*seconds > 0.05)
            break; /* once is enough of something so slow */
        times = 8;
    }
done:
    b->weight_release(&w);
    b->release(x.data);
    b->release(y.data);
    b->release(w.value.data);
    return st == TRIL_OK ? best : 0;
}

/* Of products that grow while they are quick (on a GPU that is emulated they never are). */
static double device_flops(struct op_context *ctx, enum dtype t) {
    double best = 0, seconds = 0;
    for (int64_t n = 32; n <= 8192 && seconds < 0.02; n *= 4)
        best = fmax(best, product_flops(ctx, t, n, &seconds));
    return best;
}

double device_peak_flops(struct op_context *ctx, enum dtype t) {
    return ctx->backend->device ? device_flops(ctx, t) : cpu_probe_peak_flops(t, threads_count());
}

struct device_reader {
    struct bandwidth_probe *probe; /* the CPU's; or */
    struct op_context *ctx;        /* copies on this device */
    struct tensor from, to;
    double best;
};

double device_reader_pass(void *reader) {
    enum { TIMES = 4 };
    struct device_reader *r = reader;
    if (r->probe)
        return bandwidth_probe_pass(r->probe);
    const struct backend *b = r->ctx->backend;
    b->synchronise(r->ctx, NULL);
    double begun = clock_seconds();
    for (int i = 0; i < TIMES; i++)
        cast(r->ctx, r->from, r->to, NULL);
    b->synchronise(r->ctx, NULL);
    double rate = 2.0 * TIMES * (double)tensor_bytes(&r->from) / (clock_seconds() - begun);
    r->best = rate > r->best ? rate : r->best;
    return rate;
}

static bool buffers_make(struct device_reader *r, int64_t count) {
    const struct backend *b = r->ctx->backend;
    b->release(r->from.data);
    b->release(r->to.data);
    r->from = r->to = tensor_1d(NULL, DT_F32, count);
    b->alloc(&r->from.data, count * 4, true, "copying memory", NULL);
    b->alloc(&r->to.data, count * 4, true, "copying memory", NULL);
    return r->from.data && r->to.data;
}

struct device_reader *device_reader_open(struct op_context *ctx) {
    struct device_reader *r = calloc(1, sizeof *r);
    bool ready = r != NULL;
    if (!r)
        return NULL;
    r->ctx = ctx;
    if (!ctx->backend->device) {
        r->probe = bandwidth_probe_open();
        ready = r->probe != NULL;
    }
    /* Two buffers of 1 GB, but smaller ones where even those take long. */
    double seconds = 0;
    for (int64_t count = 1 << 16; !r->probe && ready && count <= 1 << 28 && seconds < 0.02;
         count *= 16) {
        ready = buffers_make(r, count);
        r->best = 0;
        double begun = clock_seconds();
        for (int i = 0; i < 5 && ready; i++)
            device_reader_pass(r);
        seconds = clock_seconds() - begun;
    }
    if (ready)
        return r;
    device_reader_close(r);
    return NULL;
}

double device_reader_best(const struct device_reader *r) {
    return r->probe ? bandwidth_probe_best(r->probe) : r->best;
}

double device_reader_bytes(const struct device_reader *r) {
    return r->probe ? bandwidth_probe_bytes(r->probe) : 0;
}

void device_reader_close(struct device_reader *r) {
    if (!r)
        return;
    bandwidth_probe_close(r->probe);
    r->ctx->backend->release(r->from.data);
    r->ctx->backend->release(r->to.data);
    free(r);
}
