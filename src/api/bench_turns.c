/* Random tensors and timed turns for the benchmarks of attention. */
#include <math.h>
#include <string.h>

#include "api/bench_attention.h"
#include "base/memory.h"
#include "base/system.h"
#include "base/threads.h"
#include "ops/replay.h"

/* ------------------------------------------------------------------ memory */

tril_status bench_take(struct bench_memory *m, void **out, double count, int64_t size,
                       const char *what, struct tril_error *err) {
    if (count * (double)size > 1e15)
        return error_set(err, TRIL_ERR_ARGUMENT, "%s would take %g bytes: beyond what can be timed",
                         what, count * (double)size);
    tril_status st = m->backend->alloc(out, (int64_t)count * size, false, what, err);
    if (st == TRIL_OK)
        m->block[m->count++] = *out;
    return st;
}

void bench_memory_free(struct bench_memory *m) {
    for (int i = 0; i < m->count; i++)
        m->backend->release(m->block[i]);
}

/* ------------------------------------------------------------------ random tensors */

struct filling {
    void *data;
    enum dtype dtype;
    int64_t n;
    uint64_t seed;
};

/* Some hundred thousand different numbers, again and again, keep anything from being special. */
enum { PIECE = 4096, PIECES = 64 };

static void fill_piece(void *arg, int64_t begin, int64_t end, int worker) {
    const struct filling *f = arg;
    struct random_key key = {.seed = f->seed, .op = RANDOM_TEST};
    int64_t size = (int64_t)dtype_size(f->dtype);
    float piece[PIECE];
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        int64_t first = i * PIECE, n = f->n - first < PIECE ? f->n - first : PIECE;
        random_normal_fill(&key, (uint64_t)first, n, piece);
        if (f->dtype == DT_I8)
            for (int64_t k = 0; k < n; k++)
                ((int8_t *)f->data)[first + k] = (int8_t)fmaxf(-127, fminf(127, piece[k] * 40));
        else
            dtype_convert((char *)f->data + first * size, f->dtype, piece, DT_F32, (size_t)n);
    }
}

static void copy_piece(void *arg, int64_t begin, int64_t end, int worker) {
    const struct filling *f = arg;
    int64_t size = (int64_t)dtype_size(f->dtype);
    (void)worker;
    for (int64_t i = begin + PIECES; i < end + PIECES; i++) {
        int64_t first = i * PIECE, n = f->n - first < PIECE ? f->n - first : PIECE;
        memcpy((char *)f->data + first * size, (char *)f->data + i % PIECES * PIECE * size,
               (size_t)(n * size));
    }
}

tril_status bench_fill(struct op_context *ctx, void *data, enum dtype t, int64_t n, uint64_t seed,
                       struct tril_error *err) {
    const int64_t size = (int64_t)dtype_size(t), most = PIECE * PIECES;
    struct filling f = {data, t, n, seed};
    tril_status st = TRIL_OK;
    if (!ctx->backend->device) {
        int64_t pieces = (n + PIECE - 1) / PIECE;
        parallel_for(pieces < PIECES ? pieces : PIECES, 1, fill_piece, &f);
        parallel_for(pieces - PIECES, 16, copy_piece, &f);
        return TRIL_OK;
    }
    f.data = NULL;
    f.n = n < most ? n : most;
    TRY(mem_alloc(&f.data, (size_t)(f.n * size), "random numbers", err));
    parallel_for((f.n + PIECE - 1) / PIECE, 1, fill_piece, &f);
    for (int64_t at = 0; at < n; at += f.n)
        TRY(ctx->backend->upload(ctx, (char *)data + at * size, f.data,
                                 (n - at < f.n ? n - at : f.n) * size, err));
done:
    mem_free(f.data);
    return st;
}

/* ------------------------------------------------------------------ turns */

static tril_status run_on_host(const struct bench_turns *t, double *seconds,
                               struct tril_error *err) {
    tril_status st = TRIL_OK;
    for (int64_t step = -t->warm; step < t->steps; step++) {
        if (t->between && step >= 0)
            t->between(t->arg, step);
        double begun = clock_seconds();
        TRY(t->call(t->arg, (step + t->warm) % t->buffers, err));
        if (step >= 0)
            seconds[step] = clock_seconds() - begun;
    }
done:
    return st;
}

struct launched {
    const struct bench_turns *turns;
    int64_t count;
};

static tril_status launch(void *arg, struct tril_error *err) {
    const struct launched *l = arg;
    const struct bench_turns *t = l->turns;
    tril_status st = TRIL_OK;
    for (int64_t i = 0; i < l->count && st == TRIL_OK; i++)
        st = t->call(t->arg, i % t->buffers, err);
    return st;
}

static tril_status run_on_device(const struct bench_turns *t, double *seconds,
                                 struct tril_error *err) {
    const double least = 1e-3, most = 0.1; /* seconds that are waited for at once */
    struct op_replay replay = {0};
    struct launched l = {t, 1};
    double begun = 0;
    tril_status st = TRIL_OK;
    for (int i = 0; i < 2; i++) { /* the first call's time says nothing */
        TRY(t->ctx->backend->synchronise(t->ctx, err));
        begun = clock_seconds();
        TRY(t->call(t->arg, 0, err));
    }
    TRY(t->ctx->backend->synchronise(t->ctx, err));
    double one = clock_seconds() - begun;
    l.count = (int64_t)fmax(1, fmin(fmax((double)t->buffers, ceil(least / one)), most / one));
    for (int64_t step = -2; step < t->steps; step++) { /* once plainly, once recorded */
        if (t->between && step >= 0)
            t->between(t->arg, step);
        TRY(t->ctx->backend->synchronise(t->ctx, err));
        begun = clock_seconds();
        TRY(op_replay_run(t->ctx, &replay, OP_REPLAY_KEY, launch, &l, err));
        TRY(t->ctx->backend->synchronise(t->ctx, err));
        if (step >= 0)
            seconds[step] = (clock_seconds() - begun) / (double)l.count;
    }
done:
    op_replay_free(t->ctx, &replay);
    return st;
}

tril_status bench_turns_run(const struct bench_turns *t, double *seconds, struct tril_error *err) {
    return (t->ctx->backend->device ? run_on_device : run_on_host)(t, seconds, err);
}
