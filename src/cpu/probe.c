/* Probing: each worker runs the level's loop; the slowest worker's time counts. */
#include "cpu/probe.h"

#include <stdlib.h>

#include "base/memory.h"
#include "base/system.h"
#include "base/threads.h"
#include "cpu/cpu.h"

#define DECLARE(level)                                                                             \
    double probe_fma_##level(int64_t rounds);                                                      \
    double probe_bf16_##level(int64_t rounds);                                                     \
    float probe_read_##level(const float *p, int64_t n, int streams);
DECLARE(generic)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(amx)
DECLARE(emu512)
#undef DECLARE

static const struct {
    double (*fma)(int64_t);
    double (*bf16)(int64_t);
    float (*read)(const float *, int64_t, int);
} levels[CPU_LEVEL_COUNT] = {
    [CPU_GENERIC] = {probe_fma_generic, probe_bf16_generic, probe_read_generic},
#ifdef TRIL_X86
    [CPU_AVX2] = {probe_fma_avx2, probe_bf16_avx2, probe_read_avx2},
    [CPU_AVX512] = {probe_fma_avx512, probe_bf16_avx512, probe_read_avx512},
    [CPU_AMX] = {probe_fma_amx, probe_bf16_amx, probe_read_amx},
#endif
#ifdef TRIL_EMULATE_512
    [CPU_EMU512] = {probe_fma_emu512, probe_bf16_emu512, probe_read_emu512},
#endif
};

/* ------------------------------------------------------------------ arithmetic */

enum { MOST_THREADS = 256 };

struct flops_job {
    double (*loop)(int64_t);
    int64_t rounds;
    double operations[MOST_THREADS], begun[MOST_THREADS], ended[MOST_THREADS];
};

static void flops_work(void *arg, int64_t begin, int64_t end, int worker) {
    struct flops_job *job = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        job->begun[i] = clock_seconds();
        job->operations[i] = job->loop(job->rounds);
        job->ended[i] = clock_seconds();
    }
}

double cpu_probe_peak_flops(enum dtype t, int threads) {
    enum cpu_level level = cpu_level_active();
    struct flops_job job = {.loop = t == DT_BF16 ? levels[level].bf16 : levels[level].fma,
                            .rounds = 1 << 12};
    double best = 0;
    int before = threads_count();
    if (threads < 1)
        threads = before;
    if (threads > MOST_THREADS)
        threads = MOST_THREADS;
    threads_set(threads);
    /* Rounds that take about 10 ms; then the best of twelve tries. */
    for (double seconds = 0; seconds < 5e-3; job.rounds *= 2) {
        double begun = clock_seconds();
        job.loop(job.rounds);
        seconds = clock_seconds() - begun;
    }
    for (int attempt = 0; attempt < 12; attempt++) {
        double operations = 0, first = 1e300, last = 0;
        parallel_for(threads, 1, flops_work, &job);
        for (int i = 0; i < threads; i++) {
            operations += job.operations[i];
            first = job.begun[i] < first ? job.begun[i] : first;
            last = job.ended[i] > last ? job.ended[i] : last;
        }
        if (operations / (last - first) > best)
            best = operations / (last - first);
    }
    threads_set(before == threads_available() ? 0 : before);
    return best;
}

/* ------------------------------------------------------------------ memory */

struct read_job {
    float (*loop)(const float *, int64_t, int);
    const float *data;
    int64_t chunk;
    int streams;
    float sums[1024];
};

static void read_work(void *arg, int64_t begin, int64_t end, int worker) {
    struct read_job *job = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++)
        job->sums[i] = job->loop(job->data + i * job->chunk, job->chunk, job->streams);
}

static void touch_work(void *arg, int64_t begin, int64_t end, int worker) {
    struct read_job *job = arg;
    float *data = (float *)job->data;
    (void)worker;
    for (int64_t i = begin * job->chunk; i < end * job->chunk; i++)
        data[i] = 1;
}

#define READ_CHUNKS 256

struct bandwidth_probe {
    struct read_job job;
    void *data;
    size_t bytes;
    double best;
};

double bandwidth_probe_pass(struct bandwidth_probe *p) {
    double begun = clock_seconds();
    parallel_for(READ_CHUNKS, 1, read_work, &p->job);
    double rate = (double)p->bytes / (clock_seconds() - begun);
    p->best = rate > p->best ? rate : p->best;
    return rate;
}

struct bandwidth_probe *bandwidth_probe_open(void) {
    static const int streams[] = {1, 2, 4, 8};
    struct bandwidth_probe *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->bytes = memory_total() < ((size_t)4 << 30) ? (size_t)256 << 20 : (size_t)1 << 30;
    if (mem_alloc(&p->data, p->bytes, "the bandwidth probe", NULL) != TRIL_OK) {
        free(p);
        return NULL;
    }
    p->job = (struct read_job){.loop = levels[cpu_level_active()].read,
                               .data = p->data,
                               .chunk = (int64_t)(p->bytes / sizeof(float)) / READ_CHUNKS};
    parallel_for(READ_CHUNKS, 1, touch_work, &p->job);
    int best_form = 1;
    for (int form = 0; form < 4; form++)
        for (int attempt = 0; attempt < 2; attempt++) {
            double before = p->best;
            p->job.streams = streams[form];
            bandwidth_probe_pass(p);
            best_form = p->best > before ? streams[form] : best_form;
        }
    p->job.streams = best_form;
    return p;
}

double bandwidth_probe_best(const struct bandwidth_probe *p) {
    return p->best;
}

double bandwidth_probe_bytes(const struct bandwidth_probe *p) {
    return (double)p->bytes;
}

void bandwidth_probe_close(struct bandwidth_probe *p) {
    if (p)
        mem_free(p->data);
    free(p);
}
