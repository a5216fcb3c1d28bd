/* The GPU's memory and the host's pinned memory, with a list of what was given out: what is in use,
 * and the most at once, are known without asking the driver (whose answer holds other programs'
 * memory and its own: some hundred megabytes for kernels and stacks, which are not counted here).
 * Bytes are counted as asked for; the driver rounds large blocks up to 2 MB.
 *
 * Pinned memory is mapped: a kernel reads and writes it at the host's address, over the bus. */
#include <pthread.h>
#include <stdlib.h>

#include "cuda/memory.h"

struct block {
    void *at;
    int64_t bytes;
    bool host;
};
static struct {
    pthread_mutex_t lock;
    struct block *block;
    int64_t count, room;
    struct backend_memory use;
} list = {PTHREAD_MUTEX_INITIALIZER, NULL, 0, 0, {0, 0, 0, 0}};

static void count(int64_t bytes, bool host) {
    struct backend_memory *u = &list.use;
    int64_t *now = host ? &u->host : &u->device, *peak = host ? &u->host_peak : &u->device_peak;
    *now += bytes;
    *peak = *now > *peak ? *now : *peak;
}

static tril_status remember(void *at, int64_t bytes, bool host, struct tril_error *err) {
    tril_status st = TRIL_OK;
    pthread_mutex_lock(&list.lock);
    if (list.count == list.room) {
        int64_t room = 2 * list.room + 64;
        void *more = realloc(list.block, (size_t)room * sizeof *list.block);
        if (more) {
            list.block = (struct block *)more;
            list.room = room;
        } else {
            st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to use the GPU");
        }
    }
    if (st == TRIL_OK) {
        list.block[list.count++] = {at, bytes, host};
        count(bytes, host);
    }
    pthread_mutex_unlock(&list.lock);
    return st;
}

static void forget(const void *at) {
    pthread_mutex_lock(&list.lock);
    for (int64_t i = list.count - 1; i >= 0; i--)
        if (list.block[i].at == at) {
            count(-list.block[i].bytes, list.block[i].host);
            list.block[i] = list.block[--list.count];
            break;
        }
    pthread_mutex_unlock(&list.lock);
}

void cuda_memory_in_use(struct backend_memory *out) {
    pthread_mutex_lock(&list.lock);
    *out = list.use;
    pthread_mutex_unlock(&list.lock);
}

void cuda_memory_reset(void) {
    pthread_mutex_lock(&list.lock);
    list.use.device_peak = list.use.device;
    list.use.host_peak = list.use.host;
    pthread_mutex_unlock(&list.lock);
}

/* On a stream of its own: whatever stream uses the memory comes after. */
static tril_status clear(void *at, size_t bytes, const char *what, struct tril_error *err) {
    CUDA_TRY(cuda_check(cudaMemsetAsync(at, 0, bytes, NULL), what, err));
    return cuda_check(cudaStreamSynchronize(NULL), what, err);
}

static tril_status check_bytes(int64_t bytes, const char *what, struct tril_error *err) {
    if (bytes >= 0)
        return TRIL_OK;
    return error_set(err, TRIL_ERR_ARGUMENT, "%s: %lld bytes cannot be allocated", what,
                     (long long)bytes);
}

tril_status cuda_memory_alloc(void **out, int64_t bytes, bool zero, const char *what,
                              struct tril_error *err) {
    *out = NULL;
    CUDA_TRY(check_bytes(bytes, what, err));
    size_t size = bytes > 0 ? (size_t)bytes : 1; /* zero bytes give a valid pointer */
    cudaError_t e = cudaMalloc(out, size);
    if (e == cudaErrorMemoryAllocation) {
        size_t available = 0, total = 0;
        (void)cudaGetLastError(); /* or the next call would report it again */
        cudaMemGetInfo(&available, &total);
        return error_set(err, TRIL_ERR_MEMORY,
                         "%s needs %.1f MB of the GPU's memory, of which %.1f MB of %.1f are free; "
                         "use a smaller batch, context or model; in training also --recompute "
                         "full or --offload all",
                         what, (double)bytes / 1e6, (double)available / 1e6, (double)total / 1e6);
    }
    CUDA_TRY(cuda_check(e, what, err));
    tril_status st = zero ? clear(*out, size, what, err) : TRIL_OK;
    if (st == TRIL_OK)
        st = remember(*out, bytes, false, err);
    if (st == TRIL_OK)
        return TRIL_OK;
    cudaFree(*out);
    *out = NULL;
    return st;
}

void cuda_memory_release(void *p) {
    if (!p)
        return;
    forget(p);
    cudaFree(p);
}

tril_status cuda_host_alloc(void **out, int64_t bytes, bool zero, const char *what,
                            struct tril_error *err) {
    void *seen = NULL;
    *out = NULL;
    CUDA_TRY(check_bytes(bytes, what, err));
    size_t size = bytes > 0 ? (size_t)bytes : 1;
    cudaError_t e = cudaHostAlloc(out, size, cudaHostAllocMapped | cudaHostAllocPortable);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return error_set(err, TRIL_ERR_MEMORY,
                         "%s needs %.1f MB of the host's memory that stay in place (pinned), which "
                         "the system does not give; leave out --offload, or free memory",
                         what, (double)bytes / 1e6);
    }
    CUDA_TRY(cuda_check(e, what, err));
    tril_status st = cuda_check(cudaHostGetDevicePointer(&seen, *out, 0), what, err);
    if (st == TRIL_OK && seen != *out)
        st = error_set(err, TRIL_ERR_UNSUPPORTED,
                       "%s cannot lie in the host's memory: this GPU sees it at another address",
                       what);
    if (st == TRIL_OK && zero)
        st = clear(*out, size, what, err);
    if (st == TRIL_OK)
        st = remember(*out, bytes, true, err);
    if (st == TRIL_OK)
        return TRIL_OK;
    cudaFreeHost(*out);
    *out = NULL;
    return st;
}

void cuda_host_release(void *p) {
    if (!p)
        return;
    forget(p);
    cudaFreeHost(p);
}
