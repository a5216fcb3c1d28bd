/* One parallel loop, twice: on OpenMP and on a small pthread pool. In both, threads take the next
 * chunk from a shared counter, and a thread-local worker number says whether we are inside a loop
 * (then a loop runs serially, chunk by chunk, under the enclosing worker's number). */
#include "base/threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "base/system.h"

#ifndef TRIL_PTHREADS
#include <omp.h>
#endif

static atomic_int chosen; /* by threads_set; 0 is the default */
static _Thread_local int inside = -1;

int threads_available(void) {
    int n = 1;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        n = CPU_COUNT(&set);
    double quota = cpu_quota();
    if (quota > 0 && quota < n)
        n = (int)(quota + 0.5);
    return n < 1 ? 1 : n;
}

/* The default is found once: OMP_NUM_THREADS where set (oneDNN obeys it too), else all there are.
 */
static int default_count;
static void default_find(void) {
    const char *s = getenv("OMP_NUM_THREADS");
    int n = s ? atoi(s) : 0;
    default_count = n >= 1 ? n : threads_available();
}

int threads_count(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int n = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (n == 0) {
        pthread_once(&once, default_find);
        n = default_count;
    }
#ifndef TRIL_PTHREADS
    /* OpenMP keeps the number per calling thread: pass it on, for the libraries we call. */
    static _Thread_local int told;
    if (told != n && inside < 0) {
        omp_set_num_threads(n);
        told = n;
    }
#endif
    return n;
}

void threads_set(int n) {
    atomic_store(&chosen, n < 0 ? 0 : n);
    threads_count();
}

struct loop {
    int64_t n, grain, chunks;
    parallel_fn *fn;
    void *arg;
    _Atomic int64_t next;
};

static void chunk_run(const struct loop *l, int64_t chunk, int worker) {
    int64_t begin = chunk * l->grain;
    l->fn(l->arg, begin, l->n - begin < l->grain ? l->n : begin + l->grain, worker);
}

/* What every thread of a loop does. */
static void loop_work(struct loop *l, int worker) {
    int before = inside;
    inside = worker;
    for (;;) {
        int64_t chunk = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (chunk >= l->chunks)
            break;
        chunk_run(l, chunk, worker);
    }
    inside = before;
}

#ifndef TRIL_PTHREADS

static void loop_run(struct loop *l, int threads) {
    if (omp_in_parallel()) {
        loop_work(l, 0);
        return;
    }
#pragma omp parallel num_threads(threads)
    loop_work(l, omp_get_thread_num());
}

#else

/* One pool; a caller that finds it busy works alone. Pool threads live as long as the process. */
static struct {
    pthread_mutex_t owner; /* held by the thread whose loop runs */
    pthread_mutex_t lock;
    pthread_cond_t start, finish;
    struct loop *loop;
    int size, wanted, running;
    uint64_t turn;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .start = PTHREAD_COND_INITIALIZER,
          .finish = PTHREAD_COND_INITIALIZER};

static void *pool_thread(void *arg) {
    int worker = (int)(intptr_t)arg;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.turn == seen || worker >= pool.wanted) {
            seen = pool.turn;
            pthread_cond_wait(&pool.start, &pool.lock);
        }
        seen = pool.turn;
        struct loop *l = pool.loop;
        pthread_mutex_unlock(&pool.lock);
        loop_work(l, worker);
        pthread_mutex_lock(&pool.lock);
        if (--pool.running == 0)
            pthread_cond_signal(&pool.finish);
    }
    return NULL;
}

static void loop_run(struct loop *l, int threads) {
    if (pthread_mutex_trylock(&pool.owner) != 0) {
        loop_work(l, 0);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    while (pool.size < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_thread, (void *)(intptr_t)(pool.size + 1)) != 0)
            break;
        pthread_detach(thread);
        pool.size++;
    }
    pool.loop = l;
    pool.running = threads - 1 < pool.size ? threads - 1 : pool.size;
    pool.wanted = pool.running + 1; /* workers 1 .. running; the caller is worker 0 */
    pool.turn++;
    pthread_cond_broadcast(&pool.start);
    pthread_mutex_unlock(&pool.lock);
    loop_work(l, 0);
    pthread_mutex_lock(&pool.lock);
    while (pool.running > 0)
        pthread_cond_wait(&pool.finish, &pool.lock);
    pool.wanted = 0;
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}

#endif

void parallel_for(int64_t n, int64_t grain, parallel_fn *fn, void *arg) {
    if (n <= 0)
        return;
    if (grain < 1)
        grain = 1;
    struct loop l = {.n = n, .grain = grain, .fn = fn, .arg = arg};
    l.chunks = n / grain + (n % grain != 0);
    int threads = inside >= 0 ? 1 : threads_count();
    if (threads > l.chunks)
        threads = (int)l.chunks;
    if (threads > 1)
        loop_run(&l, threads);
    else
        loop_work(&l, inside >= 0 ? inside : 0);
}
