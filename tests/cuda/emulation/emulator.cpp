/* Fibers, barriers and warps of the emulated GPU. With EMULATED_RACES the thread sanitizer hears
 * what orders fibers; this file is not instrumented, as its own state is switched by hand. */
#include "emulator.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <vector>

#if defined(EMULATED_RACES)
#include <sanitizer/tsan_interface.h>
#endif
/* The sanitizers want to be told of switches, and follow swapcontext only; it asks the kernel for
 * the signal mask each time. */
#if !defined(__x86_64__) || defined(EMULATED_RACES) || defined(__SANITIZE_ADDRESS__)
#define EMULATED_SWAPCONTEXT
#include <ucontext.h>
#endif

emulated_dim emulated_thread, emulated_block, emulated_block_size, emulated_grid_size;

enum { STACK = 256 << 10, SLOT = 64, WARP = 32, NAMED = 16, MOST_THREADS = 1024 };
enum { SHARED_MOST = 228 << 10 };

#if defined(EMULATED_SWAPCONTEXT)
typedef ucontext_t place; /* where a fiber stopped */
#else
typedef void *place; /* its stack pointer; the registers lie there */
#endif

struct fiber {
    const unsigned *word;               /* waits until *word is not `value`... */
    const std::function<bool()> *ready; /* ... or until this says so */
    unsigned value;
    bool done;
    unsigned index;
    emulated_dim thread;
    place at;
    char *stack;
    const char *what; /* it waits for, or NULL */
#if defined(EMULATED_RACES)
    void *race; /* the thread sanitizer's view of it */
    unsigned char got[WARP * SLOT];
#endif
};

/* Lanes that exchange together are known by their lowest lane. What they exchange lies in one of
 * two places in turn: lanes that are ahead by one exchange overwrite nothing that others have yet
 * to read. */
struct meeting {
    unsigned mask, arrived, generation;
    unsigned unread[2]; /* lanes that have not fetched an exchange yet */
    uint64_t block;     /* of which all this is true; otherwise: nothing has happened */
    unsigned char slot[2][WARP * SLOT];
};
struct named_barrier {
    unsigned arrived, generation;
};

static std::vector<fiber> fibers;     /* MOST_THREADS, as their contexts must not move */
static size_t fiber_count;            /* of this block */
static size_t left;                   /* that have not ended */
static size_t turn;                   /* the last that went on */
static std::vector<meeting> meetings; /* [warps * 32] */
static named_barrier block_barrier, named[NAMED];
static fiber host; /* where fibers are started from */
static fiber *current = &host;
static const std::function<void()> *kernel_body;
static const char *kernel_name = "no kernel";
static unsigned char *shared;
static uint64_t progress, block_number;

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

#if defined(EMULATED_RACES)
/* memcpy of which the sanitizer does not hear: its loops must not become calls. */
#if defined(__clang__)
__attribute__((no_builtin("memcpy")))
#else
__attribute__((optimize("no-tree-loop-distribute-patterns")))
#endif
static void
copy(void *to, const void *from, size_t size) {
    size_t i = 0;
    for (uint64_t word; i + sizeof word <= size; i += sizeof word) {
        __builtin_memcpy(&word, (const char *)from + i, sizeof word);
        __builtin_memcpy((char *)to + i, &word, sizeof word);
    }
    for (; i < size; i++)
        ((char *)to)[i] = ((const char *)from)[i];
}
#else
#define copy memcpy
#endif

/* ------------------------------------------------------------------ switching */

#if !defined(EMULATED_SWAPCONTEXT)
/* Leaves the registers that a function must keep on the stack, its place in *from, and goes on at
 * `to`. (Rounding modes are never changed.) */
extern "C" void emulated_switch(place *from, place to);
__asm__(".text\n"
        ".type emulated_switch, @function\n"
        "emulated_switch:\n"
        "    push %rbp\n    push %rbx\n    push %r12\n    push %r13\n    push %r14\n    push %r15\n"
        "    mov %rsp, (%rdi)\n"
        "    mov %rsi, %rsp\n"
        "    pop %r15\n    pop %r14\n    pop %r13\n    pop %r12\n    pop %rbx\n    pop %rbp\n"
        "    ret\n"
        ".size emulated_switch, . - emulated_switch\n");
#endif

static void switch_to(fiber *to) {
    fiber *from = current;
    if (from == to)
        return;
    current = to;
    emulated_thread = to->thread;
#if defined(EMULATED_RACES)
    __tsan_switch_to_fiber(to->race, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMULATED_SWAPCONTEXT)
    swapcontext(&from->at, &to->at);
#else
    emulated_switch(&from->at, to->at);
#endif
}

static void report_deadlock() {
    size_t said = 0;
    for (size_t i = 0; i < fiber_count && said < 8; i++)
        if (!fibers[i].done) {
            fprintf(stderr, "thread (%u, %u, %u) waits at %s\n", fibers[i].thread.x,
                    fibers[i].thread.y, fibers[i].thread.z, fibers[i].what);
            said++;
        }
    emulated_fault("deadlock: %zu of %zu threads wait, the others have ended", left, fiber_count);
}

/* The next thread that can go on, in their order. */
static fiber *next_ready() {
    for (;;) {
        uint64_t before = progress;
        for (size_t n = 0; n < fiber_count; n++) {
            turn = turn + 1 < fiber_count ? turn + 1 : 0;
            fiber *f = &fibers[turn];
            if (f->done || (f->word && *f->word == f->value) || (f->ready && !(*f->ready)()))
                continue;
#if !defined(EMULATED_SWAPCONTEXT)
            /* Likely the next: a thousand stacks do not stay in the nearest cache. */
            const char *soon = (const char *)fibers[turn + 1 < fiber_count ? turn + 1 : 0].at;
            for (int line = 0; line < 4; line++)
                __builtin_prefetch(soon + 64 * line);
#endif
            return f;
        }
        if (progress == before) /* or asking has made a thread ready */
            report_deadlock();
    }
}

/* Lets the others go on until this thread can. The sanitizer's order must not be mixed up by one
 * thread asking for another: there the host asks. */
static void go_on() {
#if defined(EMULATED_RACES)
    switch_to(&host);
#else
    switch_to(left > 0 ? next_ready() : &host);
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
        left--;
        go_on();
    }
}

static void fiber_make(fiber *f, unsigned index) {
    f->stack = (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == (char *)MAP_FAILED)
        emulated_fault("no memory for a stack");
    f->index = index;
    /* Stacks begin at different places of their pages: or all would share a few lines of the
     * caches. */
    size_t bytes = STACK - index % 64 * 320;
#if defined(EMULATED_RACES)
    f->race = __tsan_create_fiber(0);
#endif
#if defined(EMULATED_SWAPCONTEXT)
    getcontext(&f->at);
    f->at.uc_stack.ss_sp = f->stack;
    f->at.uc_stack.ss_size = bytes;
    f->at.uc_link = nullptr;
    makecontext(&f->at, fiber_main, 0);
#else
    void **top =
        (void **)(void *)(f->stack + bytes); /* as after a call of fiber_main, aligned to 16 */
    top[-2] = (void *)fiber_main;
    f->at = top - 8; /* six registers */
#endif
}

/* ------------------------------------------------------------------ one block */

static void run_block(size_t shared_bytes) {
    memset(shared, 0xff, shared_bytes); /* NaN in every float format */
    block_number++;
    block_barrier = {};
    memset(named, 0, sizeof named);
    emulated_dim at(0, 0, 0);
    for (size_t i = 0; i < fiber_count; i++) {
        fiber *f = &fibers[i];
        if (!f->stack)
            fiber_make(f, (unsigned)i);
        f->done = false;
        f->what = nullptr;
        f->word = nullptr;
        f->ready = nullptr;
        f->thread = at;
        if (++at.x == emulated_block_size.x) {
            at.x = 0;
            if (++at.y == emulated_block_size.y) {
                at.y = 0;
                at.z++;
            }
        }
    }
    left = fiber_count;
    turn = fiber_count - 1;
    emulated_order(&kernel_begin, true);
#if defined(EMULATED_RACES)
    host.race = __tsan_get_current_fiber();
#endif
    while (left > 0)
        switch_to(next_ready());
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
    fibers.resize(MOST_THREADS);
    fiber_count = threads;
    if (meetings.size() < (threads + WARP - 1) / WARP * WARP)
        meetings.resize((threads + WARP - 1) / WARP * WARP);
    emulated_block_size = block;
    emulated_grid_size = grid;
    kernel_body = &kernel;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                emulated_block = emulated_dim(x, y, z);
                run_block(shared_bytes);
            }
    kernel_name = "no kernel";
}

/* ------------------------------------------------------------------ waiting */

static void wait_word(const char *what, const unsigned *word, unsigned value) {
    fiber *self = current;
    self->what = what;
    self->word = word;
    self->value = value;
    while (*word == value)
        go_on();
    self->what = nullptr;
    self->word = nullptr;
}

void emulated_wait(const char *what, const std::function<bool()> &ready) {
    fiber *self = current;
    self->what = what;
    self->ready = &ready;
    while (!ready())
        go_on();
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
    return (int)current->index;
}

unsigned emulated_lane() {
    return current->index % WARP;
}

void *emulated_shared() {
    return shared;
}

const unsigned char *emulated_exchange(unsigned mask, const void *value, size_t size,
                                       const char *what, void (*combine)(unsigned char *slots),
                                       bool orders) {
    unsigned lane = emulated_lane();
    if (!(mask >> lane & 1))
        emulated_fault("thread %d calls %s with the mask %08x, in which it is not",
                       emulated_thread_index(), what, mask);
    if (size > SLOT)
        emulated_fault("%s of %zu bytes", what, size);
    size_t warp = current->index / WARP;
    meeting *m = &meetings[warp * WARP + (size_t)__builtin_ctz(mask)];
    if (m->block != block_number) {
        m->arrived = m->unread[0] = m->unread[1] = 0;
        m->block = block_number;
    }
    unsigned *unread = &m->unread[m->generation & 1];
    while (m->arrived == 0 && *unread > 0) {
        wait_word(what, unread, *unread);
        unread = &m->unread[m->generation & 1];
    }
    if (m->arrived == 0)
        m->mask = mask;
    else if (m->mask != mask)
        emulated_fault("thread %d calls %s with the mask %08x, another lane with %08x",
                       emulated_thread_index(), what, mask, m->mask);
    unsigned generation = m->generation, lanes = (unsigned)__builtin_popcount(mask);
    unsigned char *slot = m->slot[generation & 1];
    copy(slot + lane * SLOT, value, size);
    if (orders)
        emulated_order(m, true);
    progress++;
    if (++m->arrived == lanes) {
        if (combine) {
            emulated_order(slot, false);
            combine(slot);
            emulated_order(slot, true);
        }
        m->arrived = 0;
        *unread = lanes;
        m->generation++;
    } else {
        wait_word(what, &m->generation, generation);
    }
    if (orders)
        emulated_order(m, false);
    --*unread;
    progress++;
#if defined(EMULATED_RACES)
    copy(current->got, slot, WARP * SLOT);
    return current->got;
#else
    return slot;
#endif
}
