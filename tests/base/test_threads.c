/* The parallel loop: every item once, fixed chunks, workers that do not collide, nesting. */
#include "base/threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "support/support.h"

enum { MAX_ITEMS = 10000, MAX_WORKERS = 64 };

struct record {
    int64_t n, grain;
    atomic_int visits[MAX_ITEMS];
    atomic_int busy[MAX_WORKERS];
    atomic_int faults; /* cmocka's asserts may not be used off the main thread */
};

static void visit(void *arg, int64_t begin, int64_t end, int worker) {
    struct record *r = arg;
    if (worker < 0 || worker >= threads_count() || atomic_fetch_add(&r->busy[worker], 1) != 0)
        atomic_fetch_add(&r->faults, 1);
    if (begin % r->grain != 0 || (end != begin + r->grain && end != r->n) || begin >= end)
        atomic_fetch_add(&r->faults, 1);
    for (int64_t i = begin; i < end; i++)
        atomic_fetch_add(&r->visits[i], 1);
    atomic_fetch_sub(&r->busy[worker], 1);
}

static void check(int64_t n, int64_t grain) {
    struct record *r = calloc(1, sizeof *r);
    assert_non_null(r);
    r->n = n;
    r->grain = grain;
    parallel_for(n, grain, visit, r);
    for (int64_t i = 0; i < MAX_ITEMS; i++)
        assert_int_equal(r->visits[i], i < n);
    assert_int_equal(r->faults, 0);
    free(r);
}

static void test_every_item_once(void **state) {
    (void)state;
    const int64_t sizes[] = {0, 1, 2, 7, 64, 1000, MAX_ITEMS}, grains[] = {1, 3, 64, 1 << 20};
    for (int threads = 1; threads <= 5; threads++) {
        threads_set(threads);
        assert_int_equal(threads_count(), threads);
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            for (size_t j = 0; j < sizeof grains / sizeof *grains; j++)
                check(sizes[i], grains[j]);
    }
    threads_set(0);
}

static void test_counts(void **state) {
    (void)state;
    assert_true(threads_available() >= 1);
    assert_true(threads_count() >= 1);
    threads_set(3);
    assert_int_equal(threads_count(), 3);
    threads_set(0);
    if (!getenv("OMP_NUM_THREADS"))
        assert_int_equal(threads_count(), threads_available());
}

struct nested {
    struct record *inner;
    atomic_int faults;
};

struct inner_call {
    struct nested *outer;
    int worker, chunks;
};

static void inner_visit(void *arg, int64_t begin, int64_t end, int worker) {
    struct inner_call *call = arg;
    if (worker != call->worker || begin != 4 * call->chunks || end > 10 || end - begin > 4)
        atomic_fetch_add(&call->outer->faults, 1);
    call->chunks++; /* not atomic: a nested loop is serial */
}

static void outer_visit(void *arg, int64_t begin, int64_t end, int worker) {
    struct inner_call call = {.outer = arg, .worker = worker};
    (void)begin, (void)end;
    parallel_for(10, 4, inner_visit, &call);
    if (call.chunks != 3)
        atomic_fetch_add(&call.outer->faults, 1);
}

static void test_nested_loops_are_serial(void **state) {
    (void)state;
    struct nested n = {0};
    threads_set(4);
    parallel_for(100, 1, outer_visit, &n);
    assert_int_equal(n.faults, 0);
    threads_set(0);
}

struct sum {
    const float *x;
    double parts[MAX_ITEMS / 100];
};

static void sum_chunk(void *arg, int64_t begin, int64_t end, int worker) {
    struct sum *s = arg;
    (void)worker;
    double part = 0;
    for (int64_t i = begin; i < end; i++)
        part += (double)s->x[i];
    s->parts[begin / 100] = part;
}

static void test_sums_by_chunk_do_not_depend_on_threads(void **state) {
    (void)state;
    static float x[MAX_ITEMS];
    static struct sum first, again;
    for (int i = 0; i < MAX_ITEMS; i++)
        x[i] = 1.0f / (float)(i + 1);
    first.x = again.x = x;
    threads_set(1);
    parallel_for(MAX_ITEMS, 100, sum_chunk, &first);
    threads_set(4);
    parallel_for(MAX_ITEMS, 100, sum_chunk, &again);
    assert_memory_equal(first.parts, again.parts, sizeof first.parts);
    threads_set(0);
}

/* Several threads of the program may run loops at the same time. */
static void *caller(void *arg) {
    atomic_long *total = arg;
    for (int i = 0; i < 50; i++) {
        struct record *r = calloc(1, sizeof *r);
        if (!r)
            break;
        r->n = 1000;
        r->grain = 10;
        parallel_for(r->n, r->grain, visit, r);
        for (int j = 0; j < 1000; j++)
            atomic_fetch_add(total, r->visits[j] == 1);
        atomic_fetch_sub(total, r->faults);
        free(r);
    }
    return NULL;
}

static void test_concurrent_callers(void **state) {
    (void)state;
    pthread_t threads[3];
    atomic_long total = 0;
    threads_set(2);
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, caller, &total), 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(total, 3 * 50 * 1000);
    threads_set(0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_nested_loops_are_serial),
        cmocka_unit_test(test_sums_by_chunk_do_not_depend_on_threads),
        cmocka_unit_test(test_concurrent_callers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
