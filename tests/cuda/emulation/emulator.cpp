/* Fibers, barriers and warps of the emulated GPU. With EMULATED_RACES the thread sanitizer hears
 * what orders fibers; this file is not instrumented, as its own state is switched by hand. */
#include "emulator.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#if defined(EMULATED_RACES)
#include <sanitizer/tsan_interface.h>
#endif

emulated_dim emulated_thread, emulated_block, emulated_block_size, emulated_grid_size;

enum { STACK = 256 << 10, SLOT = 64, WARP = 32, NAMED = 16, MOST_THREADS = 1024 };
enum { SHARED_MOST = 228 << 10 };

struct fiber {
    ucontext_t context;
    jmp_buf jump;
    char *stack;
    bool started, done;
    emulated_dim thread;
    const char *what;     /* it waits for, or NULL */
    const unsigned *word; /* waits until *word is not `value`... */
    unsigned value;
    const std::function<bool()> *ready; /* ... or until this says so */
    void *race;                         /* the thread sanitizer's view of it */
    unsigned char got[WARP * SLOT];
};

/* Lanes that exchange together are known by their lowest lane. */
struct meeting {
    unsigned mask, arrived, generation;
    unsigned unread; /* lanes that have not fetched the last exchange yet */
    unsigned char slot[WARP * SLOT];
};
struct named_barrier {
    unsigned arrived, generation;
};

static std::deque<fiber> fibers;      /* (their contexts must not move) */
static std::vector<meeting> meetings; /* [warps * 32] */
static named_barrier block_barrier, named[NAMED];
static fiber *current;
#if defined(EMULATED_RACES) || defined(__SANITIZE_ADDRESS__)
static ucontext_t scheduler;
#else
static jmp_buf scheduler_jump;
#endif
#if defined(EMULATED_RACES)
static void *scheduler_race;
#endif
static const std::function<void()> *kernel_body;
static const char *kernel_name = "no kernel";
static unsigned char *shared;
static uint64_t progress;

void emulated_fault(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fflush(stdout);
    fprintf(stderr, "emulated GPU, kernel %s, block (%u, %u, %u): ", kernel_name, emulated_block.x,
            emulated_block.y, emulated_block.z);
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    abort();
}

/* ------------------------------------------------------------------ order, for the sanitizer */

void emulated_order(void *at, bool release) {
#if defined(EMULATED_RACES)
    if (release)
        __tsan_release(at);
    else
        __tsan_acquire(at);
#else
    (void)at;
    (void)release;
#endif
}

/* ------------------------------------------------------------------ switching
 *
 * setjmp and longjmp once a fiber runs: swapcontext asks the kernel for the signal mask each time.
 * The sanitizers want to be told, and follow swapcontext only. */

static void to_scheduler() {
    fiber *self = current;
#if defined(EMULATED_RACES)
    __tsan_switch_to_fiber(scheduler_race, __tsan_switch_to_fiber_no_sync);
    swapcontext(&self->context, &scheduler);
#elif defined(__SANITIZE_ADDRESS__)
    swapcontext(&self->context, &scheduler);
#else
    if (_setjmp(self->jump) == 0)
        _longjmp(scheduler_jump, 1);
#endif
}

static char kernel_begin, kernel_end; /* addresses of order */

/* A fiber is made once and runs the kernel for one block after the other. */
static void fiber_main() {
    for (;;) {
        emulated_order(&kernel_begin, false);
        (*kernel_body)();
        emulated_order(&kernel_end, true);
        current->done = true;
        current->what = nullptr;
        progress++;
        to_scheduler();
    }
}

static void resume(fiber *f) {
    current = f;
    emulated_thread = f->thread;
#if defined(EMULATED_RACES)
    scheduler_race = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(f->race, __tsan_switch_to_fiber_no_sync);
    swapcontext(&scheduler, &f->context);
#elif defined(__SANITIZE_ADDRESS__)
    swapcontext(&scheduler, &f->context);
#else
    if (_setjmp(scheduler_jump) == 0) {
        if (f->started)
            _longjmp(f->jump, 1);
        f->started = true;
        setcontext(&f->context);
    }
#endif
}

static void fiber_make(fiber *f) {
    f->stack = (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == (char *)MAP_FAILED)
        emulated_fault("no memory for a stack");
#if defined(EMULATED_RACES)
    f->race = __tsan_create_fiber(0);
#endif
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, fiber_main, 0);
}

static void fiber_reset(fiber *f, emulated_dim thread) {
    if (!f->stack)
        fiber_make(f);
    f->done = false;
    f->what = nullptr;
    f->word = nullptr;
    f->ready = nullptr;
    f->thread = thread;
}

/* ------------------------------------------------------------------ one block */

static void report_deadlock(size_t threads) {
    size_t said = 0, waiting = 0;
    for (size_t i = 0; i < threads; i++)
        waiting += !fibers[i].done;
    for (size_t i = 0; i < threads && said < 8; i++)
        if (!fibers[i].done) {
            fprintf(stderr, "thread (%u, %u, %u) waits at %s\n", fibers[i].thread.x,
                    fibers[i].thread.y, fibers[i].thread.z, fibers[i].what);
            said++;
        }
    emulated_fault("deadlock: %zu of %zu threads wait, the others have ended", waiting, threads);
}

static void run_block(size_t threads, size_t shared_bytes) {
    memset(shared, 0xff, shared_bytes); /* NaN in every float format */
    block_barrier = {};
    memset(named, 0, sizeof named);
    for (meeting &m : meetings)
        m.arrived = m.generation = m.mask = m.unread = 0;
    emulated_dim at(0, 0, 0);
    for (size_t i = 0; i < threads; i++) {
        fiber_reset(&fibers[i], at);
        if (++at.x == emulated_block_size.x) {
            at.x = 0;
            if (++at.y == emulated_block_size.y) {
                at.y = 0;
                at.z++;
            }
        }
    }
    emulated_order(&kernel_begin, true);
    for (size_t left = threads; left > 0;) {
        uint64_t before = progress;
        bool moved = false;
        for (size_t i = 0; i < threads; i++) {
            fiber *f = &fibers[i];
            if (f->done || (f->word && *f->word == f->value) || (f->ready && !(*f->ready)()))
                continue;
            moved = true;
            resume(f);
            left -= f->done;
        }
        if (!moved && progress == before)
            report_deadlock(threads);
    }
    emulated_order(&kernel_end, false);
}

void emulated_run(emulated_dim grid, emulated_dim block, size_t shared_bytes, const char *name,
                  const std::function<void()> &kernel) {
    kernel_name = name;
    size_t threads = (size_t)block.x * block.y * block.z;
    if (threads < 1 || threads > MOST_THREADS || block.z > 64)
        emulated_fault("a block of (%u, %u, %u) threads cannot be launched", block.x, block.y,
                       block.z);
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535)
        emulated_fault("a grid of (%u, %u, %u) blocks cannot be launched", grid.x, grid.y, grid.z);
    if (shared_bytes > SHARED_MOST - 1024)
        emulated_fault("%zu bytes of shared memory are more than a block can have", shared_bytes);
    if (!shared)
        shared = (unsigned char *)aligned_alloc(1024, SHARED_MOST);
    if (fibers.size() < threads)
        fibers.resize(threads);
    meetings.resize((threads + WARP - 1) / WARP * WARP);
    emulated_block_size = block;
    emulated_grid_size = grid;
    kernel_body = &kernel;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                emulated_block = emulated_dim(x, y, z);
                run_block(threads, shared_bytes);
            }
    kernel_name = "no kernel";
    current = nullptr;
}

/* ------------------------------------------------------------------ waiting */

static void wait_word(const char *what, const unsigned *word, unsigned value) {
    fiber *self = current;
    self->what = what;
    self->word = word;
    self->value = value;
    while (*word == value)
        to_scheduler();
    self->what = nullptr;
    self->word = nullptr;
}

void emulated_wait(const char *what, const std::function<bool()> &ready) {
    fiber *self = current;
    self->what = what;
    self->ready = &ready;
    while (!ready())
        to_scheduler();
    self->what = nullptr;
    self->ready = nullptr;
}

void emulated_progress() {
    progress++;
}

static void arrive(named_barrier *b, unsigned threads, bool wait, const char *what) {
    emulated_order(b, true);
    progress++;
    unsigned generation = b->generation;
    if (++b->arrived == threads) {
        b->arrived = 0;
        b->generation++;
    } else if (wait) {
        wait_word(what, &b->generation, generation);
    }
    if (wait)
        emulated_order(b, false);
}

void emulated_barrier(const char *what) {
    arrive(&block_barrier, emulated_block_size.x * emulated_block_size.y * emulated_block_size.z,
           true, what);
}

void emulated_barrier_named(int id, int threads, bool wait) {
    if (id < 0 || id >= NAMED || threads < WARP || threads % WARP)
        emulated_fault("barrier %d of %d threads does not exist", id, threads);
    arrive(id == 0 ? &block_barrier : &named[id], (unsigned)threads, wait, "a named barrier");
}

int emulated_thread_index() {
    return (int)(emulated_thread.x +
                 emulated_block_size.x *
                     (emulated_thread.y + emulated_block_size.y * emulated_thread.z));
}

unsigned emulated_lane() {
    return (unsigned)emulated_thread_index() % WARP;
}

void *emulated_shared() {
    return shared;
}

const unsigned char *emulated_exchange(unsigned mask, const void *value, size_t size,
                                       const char *what) {
    unsigned lane = emulated_lane();
    if (!(mask >> lane & 1))
        emulated_fault("thread %d calls %s with the mask %08x, in which it is not",
                       emulated_thread_index(), what, mask);
    if (size > SLOT)
        emulated_fault("%s of %zu bytes", what, size);
    size_t warp = (size_t)emulated_thread_index() / WARP;
    meeting *m = &meetings[warp * WARP + (size_t)__builtin_ctz(mask)];
    while (m->unread > 0)
        wait_word(what, &m->unread, m->unread);
    if (m->arrived == 0)
        m->mask = mask;
    else if (m->mask != mask)
        emulated_fault("thread %d calls %s with the mask %08x, another lane with %08x",
                       emulated_thread_index(), what, mask, m->mask);
    unsigned generation = m->generation, lanes = (unsigned)__builtin_popcount(mask);
    emulated_order(m, false); /* after the others' reading of what stood here */
    memcpy(m->slot + lane * SLOT, value, size);
    emulated_order(m, true);
    progress++;
    if (++m->arrived == lanes) {
        m->arrived = 0;
        m->unread = lanes;
        m->generation++;
    } else {
        wait_word(what, &m->generation, generation);
    }
    emulated_order(m, false);
    m->unread--;
    progress++;
    for (unsigned l = 0; l < WARP; l++)
        memcpy(current->got + l * SLOT, m->slot + l * SLOT, size);
    emulated_order(m, true);
    return current->got;
}
