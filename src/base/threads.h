/* Threads: one parallel loop. Work is cut into fixed chunks of `grain` items, whatever the number
 * of threads, so that anything reduced per chunk is reproducible; threads take chunks as they come.
 *
 * A pool of plain pthreads. A loop called from inside a loop runs serially, as does one that finds
 * the pool taken by another thread's loop. */
#ifndef BASE_THREADS_H
#define BASE_THREADS_H

#include <stdint.h>

/* fn handles items [begin, end); `worker` is in 0 .. threads_count() - 1 and unique among the
 * calls running at the same time (index per-thread scratch with it). */
typedef void parallel_fn(void *arg, int64_t begin, int64_t end, int worker);

/* Runs fn over [0, n) in chunks of `grain` (>= 1) items; returns when all are done. */
void parallel_for(int64_t n, int64_t grain, parallel_fn *fn, void *arg);

int threads_count(void);     /* threads that parallel_for uses; default: processors available */
void threads_set(int n);     /* n >= 1; 0 restores the default */
int threads_available(void); /* processors this process may run on */

#endif
