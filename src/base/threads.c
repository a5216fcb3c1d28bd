/* One parallel loop on a pool of threads. Threads take the next chunk from a shared counter; a
 * thread-local worker number says whether we are inside a loop (then a loop runs serially, chunk by
 * chunk, under the enclosing worker's number).
 *
 * The caller never waits for a thread that has not begun: it opens the gate, works itself until no
 * chunk is left, closes the gate and waits for those who came in. So on a busy machine a loop takes
 * at most about as long as on one thread, where a barrier would wait for the scheduler each time.
 *
 *   gate:  | turn (which loop) | threads inside | open |
 *
 * Between loops threads spin for some microseconds, since the next loop usually follows at once,
 * then sleep. */
#include "base/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "base/system.h"

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

/* The default is found once: OMP_NUM_THREADS where set, as users of numerical programs expect, else
 * all there are. */
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
    return n;
}

void threads_set(int n) {
    atomic_store(&chosen, n < 0 ? 0 : n);
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

/* ------------------------------------------------------------------ the pool */

#define SPINS 2000 /* pauses before sleeping: 20 to 80 microseconds, by processor */
#define OPEN UINT64_C(1)
#define INSIDE UINT64_C(2) /* one thread */
#define TURN (UINT64_C(1) << 24)
#define INSIDE_MASK (TURN - INSIDE)

/* Pool threads live as long as the process. One loop at a time has the pool: `owner` is held by the
 * thread whose loop it is, and another that finds it taken works alone. */
static struct {
    pthread_mutex_t owner, lock;
    pthread_cond_t start, finish;
    struct loop *loop;     /* valid while the gate is open or somebody is inside */
    atomic_int wanted;     /* workers 1 .. wanted - 1 may come in; the caller is worker 0 */
    _Atomic uint64_t gate; /* see above */
    atomic_int sleepers;   /* pool threads that wait for `start` */
    atomic_bool waiting;   /* the caller waits for `finish` */
    int size;              /* pool threads; guarded by owner */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .start = PTHREAD_COND_INITIALIZER,
          .finish = PTHREAD_COND_INITIALIZER};

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* Waits until the gate shows another turn than `seen`. */
static uint64_t await_turn(uint64_t seen) {
    uint64_t gate;
    for (int i = 0; i < SPINS; i++) {
        gate = atomic_load_explicit(&pool.gate, memory_order_acquire);
        if (gate / TURN != seen)
            return gate;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleepers, 1); /* before the gate is read: the opener reads it after */
    while ((gate = atomic_load(&pool.gate)) / TURN == seen)
        pthread_cond_wait(&pool.start, &pool.lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.lock);
    return gate;
}

static void leave(void) {
    uint64_t gate = atomic_fetch_sub(&pool.gate, INSIDE) - INSIDE;
    if ((gate & INSIDE_MASK) == 0 && atomic_load(&pool.waiting)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.finish);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void *pool_thread(void *arg) {
    int worker = (int)(intptr_t)arg;
    for (uint64_t gate = 0;;) {
        gate = await_turn(gate / TURN);
        uint64_t turn = gate / TURN;
        while ((gate & OPEN) && gate / TURN == turn && worker < atomic_load(&pool.wanted))
            if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + INSIDE)) {
                loop_work(pool.loop, worker);
                leave();
                break;
            }
        gate = turn * TURN;
    }
    return NULL;
}

static void pool_grow(int threads) {
    while (pool.size < threads - 1) {
        pthread_t thread;
        sigset_t all, before;
        sigfillset(&all); /* signals are for the program's own threads */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int failed = pthread_create(&thread, NULL, pool_thread, (void *)(intptr_t)(pool.size + 1));
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (failed)
            break;
        pthread_detach(thread);
        pool.size++;
    }
}

static void await_leaving(void) {
    for (int i = 0; i < SPINS; i++) {
        if ((atomic_load_explicit(&pool.gate, memory_order_acquire) & INSIDE_MASK) == 0)
            return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.waiting, true); /* before the gate is read: leavers read it after */
    while (atomic_load(&pool.gate) & INSIDE_MASK)
        pthread_cond_wait(&pool.finish, &pool.lock);
    atomic_store(&pool.waiting, false);
    pthread_mutex_unlock(&pool.lock);
}

static void loop_run(struct loop *l, int threads) {
    if (pthread_mutex_trylock(&pool.owner) != 0) {
        loop_work(l, 0);
        return;
    }
    pool_grow(threads);
    pool.loop = l;
    atomic_store(&pool.wanted, threads);
    atomic_fetch_add(&pool.gate, TURN + OPEN);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.start);
        pthread_mutex_unlock(&pool.lock);
    }
    loop_work(l, 0);
    atomic_fetch_sub(&pool.gate, OPEN);
    await_leaving();
    pthread_mutex_unlock(&pool.owner);
}

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
