/* The CUDA backend's frame: finding the GPU, a stream for every op context, memory and transfers.
 *
 * All work of a context goes to its one stream, in order. Uploads pass through pinned memory that
 * belongs to the context, so that the caller's buffer is free at once and nobody waits; downloads
 * wait, as their caller wants the values. */
#include <stdio.h>
#include <string.h>

#include "cuda/blas.h"
#include "cuda/cuda.h"
#include "cuda/memory.h"

extern "C" {
#include "ops/imaginary.h"
}

#define CUDA_OP(id, name) OP_FN(name);
#include "cuda/kernel_list.inc"
#undef CUDA_OP

/* ------------------------------------------------------------------ errors */

tril_status cuda_failed(cudaError_t e, const char *what, struct tril_error *err) {
    (void)cudaGetLastError(); /* or the next launch would report it again */
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
        CUDA_TRY(
            cuda_check(cudaMemcpyAsync((char *)dst + at, piece, n, cudaMemcpyDefault, c->stream),
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
        CUDA_TRY(cuda_check(cudaMemcpyAsync(host, src, (size_t)bytes, cudaMemcpyDefault,
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

/* ------------------------------------------------------------------ copies beside the work
 *
 * One stream for both directions. With layers that leave and come back they never meet: the last
 * copy out of a forward pass has ended before its last layers begin, the first copy in begins when
 * the first of these has gone backward. Events order the two streams; within a recording they fork
 * and join it. */

static tril_status copy_begin(struct op_context *ctx, int mark, void *dst, const void *src,
                              int64_t bytes, struct tril_error *err) {
    static const char *const what = "a copy between the GPU and the host";
    struct cuda_state *c = cuda_state_of(ctx);
    CUDA_TRY(cuda_check(cudaEventRecord(c->copy_ready, c->stream), what, err));
    CUDA_TRY(cuda_check(cudaStreamWaitEvent(c->copies, c->copy_ready, 0), what, err));
    if (bytes > 0)
        CUDA_TRY(cuda_check(cudaMemcpyAsync(dst, src, (size_t)bytes, cudaMemcpyDefault, c->copies),
                            what, err));
    return cuda_check(cudaEventRecord(c->copy_done[mark], c->copies), what, err);
}

static tril_status copy_wait(struct op_context *ctx, int mark, struct tril_error *err) {
    struct cuda_state *c = cuda_state_of(ctx);
    return cuda_check(cudaStreamWaitEvent(c->stream, c->copy_done[mark], 0),
                      "waiting for a copy between the GPU and the host", err);
}

/* ------------------------------------------------------------------ contexts */

static void close_context(struct op_context *ctx) {
    struct cuda_state *c = cuda_state_of(ctx);
    if (c->stream)
        cudaStreamSynchronize(c->stream);
    if (c->copies)
        cudaStreamSynchronize(c->copies);
    blas_close(c);
    staging_free(c->staging);
    if (c->copy_ready)
        cudaEventDestroy(c->copy_ready);
    for (int i = 0; i < COPY_MARKS; i++)
        if (c->copy_done[i])
            cudaEventDestroy(c->copy_done[i]);
    if (c->copies)
        cudaStreamDestroy(c->copies);
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
    CUDA_TRY(
        cuda_check(cudaStreamCreateWithFlags(&c->copies, cudaStreamNonBlocking), "a stream", err));
    CUDA_TRY(cuda_check(cudaEventCreateWithFlags(&c->copy_ready, cudaEventDisableTiming),
                        "an event", err));
    for (int i = 0; i < COPY_MARKS; i++)
        CUDA_TRY(cuda_check(cudaEventCreateWithFlags(&c->copy_done[i], cudaEventDisableTiming),
                            "an event", err));
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

static tril_status plan(struct op_context *out, int64_t *fixed, struct tril_error *err);

static struct backend make() {
    struct backend b = *backend_reference();
    b.name = "cuda";
    b.device = true;
    b.open = open_context;
    b.close = close_context;
    b.alloc = cuda_memory_alloc;
    b.release = cuda_memory_release;
    b.upload = upload;
    b.download = download;
    b.fill_zero = fill_zero;
    b.synchronise = synchronise;
    b.host_alloc = cuda_host_alloc;
    b.host_release = cuda_host_release;
    b.copy_begin = copy_begin;
    b.copy_wait = copy_wait;
    b.memory = cuda_memory_in_use;
    b.memory_reset = cuda_memory_reset;
    b.plan = plan;
    b.graph_begin = graph_begin;
    b.graph_end = graph_end;
    b.graph_run = graph_run;
    b.graph_free = graph_free;
#define CUDA_OP(id, name) b.table[OP_##id] = cuda_##name;
#include "cuda/kernel_list.inc"
#undef CUDA_OP
    return b;
}

static void close_plan(struct op_context *ctx) {
    free(ctx->stream);
}

static struct backend make_imaginary() {
    struct backend b = make();
    backend_imagine(&b);
    b.open = NULL;
    b.close = close_plan;
    return b;
}

/* For the GPU that is here, or for an H200: scratch depends on the number of its processors. */
static tril_status plan(struct op_context *out, int64_t *fixed, struct tril_error *err) {
    static const struct backend imaginary = make_imaginary();
    struct cuda_device d;
    struct cuda_state *c = (struct cuda_state *)calloc(1, sizeof *c);
    if (!c)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a prediction");
    const bool here = cuda_device_get(&d, NULL) == TRIL_OK;
    c->processors = here ? d.processors : 132;
    c->capability = here ? 10 * d.major + d.minor : 90;
    c->shared_most = 227 << 10;
    if (here)
        cudaDeviceGetAttribute(&c->shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    op_context_imagine(out, &imaginary, c);
    *fixed = BLAS_WORKSPACE;
    return TRIL_OK;
}

const struct backend *backend_cuda(void) {
    static const struct backend cuda = make();
    return &cuda;
}
