/* A GPU on the processor, for tests: the blocks, warps, shuffles, barriers and streams that tril's
 * CUDA sources use, so that the same sources run (slowly) where there is no GPU.
 *
 * The sources of src/cuda are compiled by the host's C++ compiler with this folder first on the
 * include path, so that <cuda_runtime.h>, <cuda_bf16.h>, <cuda_fp16.h> and <cublasLt.h> are the
 * headers here. Every thread of a block is a fiber with a stack of its own; blocks run one after
 * the other. Shared memory is one static block's. Stricter than a GPU:
 *   - a barrier or shuffle that some thread never reaches is a deadlock, reported with every
 *     waiting thread, and ends the program;
 *   - shared memory begins as NaNs and is poisoned again before every block;
 *   - memory of the "device" is inaccessible to the host's code (it faults), and the host's memory
 *     that was not registered is not checked; every allocation ends at an inaccessible page;
 *   - with the thread sanitizer fibers are threads to it, and only barriers and fences order them:
 *     a missing __syncthreads or __syncwarp is a reported race. */
#ifndef EMULATION_EMULATOR_H
#define EMULATION_EMULATOR_H

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct emulated_dim {
    unsigned x, y, z;
    constexpr emulated_dim(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
        : x(x_), y(y_), z(z_) {
    }
};

extern emulated_dim emulated_thread, emulated_block, emulated_block_size, emulated_grid_size;

/* Runs `kernel` for every thread of every block of the grid, or, while a stream is captured,
 * records it. */
void emulated_launch(emulated_dim grid, emulated_dim block, size_t shared_bytes, void *stream,
                     const char *name, std::function<void()> kernel);

void *emulated_shared(); /* the block's dynamic shared memory, 1024-byte aligned */
[[noreturn]] void emulated_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- waiting. `what` is said when nobody can go on. */
void emulated_barrier(const char *what);                     /* all threads of the block */
void emulated_barrier_named(int id, int threads, bool wait); /* bar.sync, bar.arrive */
void emulated_wait(const char *what, const std::function<bool()> &ready);
void emulated_progress();                    /* what others wait for may have changed */
void emulated_order(void *at, bool release); /* thread sanitizer: a release or acquire at `at` */
unsigned emulated_lane();
int emulated_thread_index(); /* within the block */

/* All lanes of `mask` hand in `size` bytes and get everybody's: entry of lane l at l * 64 bytes.
 * Valid until the lane waits again. The last lane to come first calls `combine`, which may put in
 * their place what follows from all of them. Only with `orders` does what a lane wrote come before
 * what the others do then: a shuffle is no barrier of memory, __syncwarp is. */
const unsigned char *emulated_exchange(unsigned mask, const void *value, size_t size,
                                       const char *what,
                                       void (*combine)(unsigned char *slots) = nullptr,
                                       bool orders = false);

#endif
