/* The CUDA backend's frame: finding the GPU, a stream for every op context, memory and transfers.
 *
 * All work of a context goes to its one stream, in order. Uploads pass through pinned memory that
 * belongs to the context, so that the caller's buffer is free at once and nobody waits; downloads
 * wait, as their caller wants the values. */
#include <stdio.h>
#include <string.h>

#include "cuda/blas.h"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"

#define CUDA_OP(id, name) OP_FN(name);
#include "cuda/kernel_list.inc"
#undef CUDA_OP

/* ------------------------------------------------------------------ errors */

tril_status cuda_failed(cudaError_t e, const char *what, struct tril_error *err) {
    if (e == cudaErrorMemoryAllocation)
        return error_set(err, TRIL_ERR_MEMORY,
                         "the GPU has not enough memory for %s; use a smaller batch or context",
                         what);
    return error_set(err, TRIL_ERR_INTERNAL, "%s: CUDA says '%s'", what, cudaGetErrorString(e));
}

tril_status cuda_device_get(struct cuda_device *out, struct tril_error *err) {
    int count = 0, driver = 0;
    const int runtime = CUDART_VERSION;
    struct cudaDeviceProp p;
    size_t available = 0, total = 0;
    memset(out, 0, sizeof *out);
    out->runtime = runtime;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return error_set(
            err, TRIL_ERR_UNSUPPORTED,
            "--device cuda needs an NVIDIA GPU and its driver; none is installed here");
    if (driver / 1000 < runtime / 1000)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "the NVIDIA driver here serves CUDA %d.%d, but tril was built with CUDA "
                         "%d.%d; install a newer driver",
                         driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess || count < 1)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "--device cuda needs an NVIDIA GPU; there is none here that CUDA can use "
                         "(%s)",
                         cudaGetErrorString(e == cudaSuccess ? cudaErrorNoDevice : e));
    CUDA_TRY(cuda_check(cudaSetDevice(0), "choosing the GPU", err));
    CUDA_TRY(cuda_check(cudaGetDeviceProperties(&p, 0), "asking the GPU what it is", err));
    if (p.major < 8)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "%s has compute capability %d.%d; tril's kernels need 8.0 or newer",
                         p.name, p.major, p.minor);
    CUDA_TRY(cuda_check(cudaMemGetInfo(&available, &total), "asking for the GPU's memory", err));
    snprintf(out->name, sizeof out->name, "%.127s", p.name);
    out->major = p.major;
    out->minor = p.minor;
    out->processors = p.multiProcessorCount;
    out->memory = (int64_t)total;
    out->free = (int64_t)available;
    out->driver = driver;
    return TRIL_OK;
}

/* ------------------------------------------------------------------ graphs */

static tril_status graph_begin(struct op_context *ctx, struct tril_error *err) {
    struct cuda_state *c = cuda_state_of(ctx);
    CUDA_TRY(cuda_check(cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal),
                        "recording", err));
    c->recording = true;
    return TRIL_OK;
}

static tril_status graph_end(struct op_context *ctx, void **graph, struct tril_error *err) {
    struct cuda_state *c = cuda_state_of(ctx);
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t ready = NULL;
    *graph = NULL;
    c->recording = false;
    cudaError_t e = cudaStreamEndCapture(c->stream, &recorded);
    if (e == cudaSuccess)
        e = cudaGraphInstantiate(&ready, recorded, 0);
    if (recorded)
        cudaGraphDestroy(recorded);
    (void)cudaGetLastError(); /* a recording that failed is not the next call's fault */
    *graph = ready;
    return cuda_check(e, "recording", err);
}

static tril_status graph_run(struct op_context *ctx, void *graph, struct tril_error *err) {
    return cuda_check(cudaGraphLaunch((cudaGraphExec_t)graph, cuda_state_of(ctx)->stream),
                      "a recorded step", err);
}

static void graph_free(struct op_context *ctx, void *graph) {
    (void)ctx;
    cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

/* What would wait, or read memory that is only right now right, cannot be recorded. */
static tril_status check_not_recording(struct op_context *ctx, struct tril_error *err) {
    if (!cuda_state_of(ctx)->recording)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_INTERNAL, "transfers cannot be part of a recorded step");
}

/* ------------------------------------------------------------------ uploads
 *
 * A ring of pinned pieces; before a piece is written again its last copy must be done. */

static const int PIECES = 8;
static const int64_t PIECE_BYTES = 1 << 20;
struct staging {
    char *memory;
    cudaEvent_t done[PIECES];
    bool busy[PIECES];
    int next;
};

static void staging_free(struct staging *s) {
    if (!s)
        return;
    for (int i = 0; i < PIECES; i++)
        if (s->done[i])
            cudaEventDestroy(s->done[i]);
    cudaFreeHost(s->memory);
    free(s);
}

static tril_status staging_create(struct staging **out, struct tril_error *err) {
    struct staging *s = (struct staging *)calloc(1, sizeof *s);
    *out = s;
    if (!s)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for uploads to the GPU");
    CUDA_TRY(cuda_check(cudaMallocHost((void **)&s->memory, (size_t)PIECES * PIECE_BYTES),
                        "pinned memory for uploads", err));
    for (int i = 0; i < PIECES; i++)
        CUDA_TRY(cuda_check(cudaEventCreateWithFlags(&s->done[i], cudaEventDisableTiming),
                            "an event", err));
    return TRIL_OK;
}

static tril_status upload(struct op_context *ctx, void *dst, const void *host, int64_t bytes,
                          struct tril_error *err) {
    struct cuda_state *c = cuda_state_of(ctx);
    struct staging *s = c->staging;
    CUDA_TRY(check_not_recording(ctx, err));
    for (int64_t at = 0; at < bytes; at += PIECE_BYTES) {
        size_t n = (size_t)(bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES);
        int k = s->next;
        char *piece = s->memory + (size_t)k * PIECE_BYTES;
        s->next = (k + 1) % PIECES;
        if (s->busy[k])
            CUDA_TRY(cuda_check(cudaEventSynchronize(s->done[k]), "an upload", err));
        memcpy(piece, (const char *)host + at, n);
        CUDA_TRY(cuda_check(
            cudaMemcpyAsync((char *)dst + at, piece, n, cudaMemcpyHostToDevice, c->stream),
            "an upload", err));
        CUDA_TRY(cuda_check(cudaEventRecord(s->done[k], c->stream), "an upload", err));
        s->busy[k] = true;
    }
    return TRIL_OK;
}

/* ------------------------------------------------------------------ memory */

static tril_status synchronise(struct op_context *ctx, struct tril_error *err) {
    return cuda_check(cudaStreamSynchronize(cuda_state_of(ctx)->stream), "the GPU's work", err);
}

static tril_status download(struct op_context *ctx, void *host, const void *src, int64_t bytes,
                            struct tril_error *err) {
    CUDA_TRY(check_not_recording(ctx, err));
    if (bytes > 0)
        CUDA_TRY(cuda_check(cudaMemcpyAsync(host, src, (size_t)bytes, cudaMemcpyDeviceToHost,
                                            cuda_state_of(ctx)->stream),
                            "a download", err));
    return synchronise(ctx, err);
}

static tril_status fill_zero(struct op_context *ctx, void *dst, int64_t bytes,
                             struct tril_error *err) {
    if (bytes < 1)
        return TRIL_OK;
    return cuda_check(cudaMemsetAsync(dst, 0, (size_t)bytes, cuda_state_of(ctx)->stream),
                      "filling with zeros", err);
}

static tril_status alloc(void **out, int64_t bytes, bool zero, const char *what,
                         struct tril_error *err) {
    *out = NULL;
    if (bytes < 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s: %lld bytes cannot be allocated", what,
                         (long long)bytes);
    size_t size = bytes > 0 ? (size_t)bytes : 1; /* zero bytes give a valid pointer */
    cudaError_t e = cudaMalloc(out, size);
    if (e == cudaErrorMemoryAllocation) {
        size_t available = 0, total = 0;
        (void)cudaGetLastError(); /* or the next call would report it again */
        cudaMemGetInfo(&available, &total);
        return error_set(err, TRIL_ERR_MEMORY,
                         "%s needs %.1f MB of the GPU's memory, of which %.1f MB of %.1f are free; "
                         "use a smaller batch, context or model",
                         what, (double)bytes / 1e6, (double)available / 1e6, (double)total / 1e6);
    }
    CUDA_TRY(cuda_check(e, what, err));
    if (zero) {
        /* On a stream of its own: whatever stream uses the memory comes after. */
        CUDA_TRY(cuda_check(cudaMemsetAsync(*out, 0, size, NULL), what, err));
        CUDA_TRY(cuda_check(cudaStreamSynchronize(NULL), what, err));
    }
    return TRIL_OK;
}

static void release(void *p) {
    if (p)
        cudaFree(p);
}

/* ------------------------------------------------------------------ contexts */

static void close_context(struct op_context *ctx) {
    struct cuda_state *c = cuda_state_of(ctx);
    if (c->stream)
        cudaStreamSynchronize(c->stream);
    blas_close(c);
    staging_free(c->staging);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    free(c);
    ctx->stream = NULL;
}

static tril_status open_parts(struct cuda_state *c, const struct cuda_device *d,
                              struct tril_error *err) {
    c->processors = d->processors;
    c->capability = 10 * d->major + d->minor;
    CUDA_TRY(cuda_check(
        cudaDeviceGetAttribute(&c->shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
        "asking for shared memory", err));
    CUDA_TRY(
        cuda_check(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "a stream", err));
    CUDA_TRY(staging_create(&c->staging, err));
    return blas_open(c, err);
}

static tril_status open_context(struct op_context *ctx, struct tril_error *err) {
    struct cuda_device d;
    CUDA_TRY(cuda_device_get(&d, err));
    struct cuda_state *c = (struct cuda_state *)calloc(1, sizeof *c);
    if (!c)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to use the GPU");
    ctx->stream = c;
    tril_status st = open_parts(c, &d, err);
    if (st != TRIL_OK)
        close_context(ctx);
    return st;
}

void cuda_rounding(struct op_context *ctx, bool tf32, bool bias) {
    cuda_state_of(ctx)->tf32 = tf32;
    cuda_state_of(ctx)->round_bias = bias;
}

/* ------------------------------------------------------------------ the table */

static struct backend make() {
    struct backend b = *backend_reference();
    b.name = "cuda";
    b.device = true;
    b.open = open_context;
    b.close = close_context;
    b.alloc = alloc;
    b.release = release;
    b.upload = upload;
    b.download = download;
    b.fill_zero = fill_zero;
    b.synchronise = synchronise;
    b.graph_begin = graph_begin;
    b.graph_end = graph_end;
    b.graph_run = graph_run;
    b.graph_free = graph_free;
#define CUDA_OP(id, name) b.table[OP_##id] = cuda_##name;
#include "cuda/kernel_list.inc"
#undef CUDA_OP
    return b;
}

const struct backend *backend_cuda(void) {
    static const struct backend cuda = make();
    return &cuda;
}
