/* The emulated CUDA runtime: memory that the host's code cannot touch, streams that run at once,
 * and graphs that remember what was launched while they were captured. */
#include "cuda_runtime.h"

#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

void emulated_run(emulated_dim grid, emulated_dim block, size_t shared_bytes, const char *name,
                  const std::function<void()> &kernel);

struct emulated_graph {
    std::vector<std::function<void()>> work;
};
struct emulated_stream {
    bool capturing;
    emulated_graph *graph;
};
struct emulated_event {
    int recorded;
};

/* One kernel at a time, whoever launches it. */
static std::recursive_mutex lock;

/* ------------------------------------------------------------------ memory
 *
 * [page: inaccessible][ pages of the allocation, its end at the next page ][page: inaccessible].
 * The pages are accessible while a kernel or a copy runs. */

struct block {
    size_t bytes, pages; /* pages: bytes of the pages */
};
static std::map<char *, block> blocks; /* by the first page */
static size_t used, most = (size_t)2 << 30;
static int opened; /* nested kernels and copies */

static size_t page() {
    return (size_t)sysconf(_SC_PAGESIZE);
}

static void protect(int how) {
    for (auto &b : blocks)
        mprotect(b.first, b.second.pages, how);
}

struct device_open_for_now {
    std::lock_guard<std::recursive_mutex> guard{lock};
    device_open_for_now() {
        if (opened++ == 0)
            protect(PROT_READ | PROT_WRITE);
    }
    ~device_open_for_now() {
        if (--opened == 0)
            protect(PROT_NONE);
    }
};

void emulated_memory_limit(size_t bytes) {
    most = bytes;
}
size_t emulated_memory_used() {
    return used;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    size_t pages = (bytes + page() - 1) / page() * page();
    if (pages == 0)
        pages = page();
    if (bytes > most || used + pages > most)
        return cudaErrorMemoryAllocation;
    char *p = (char *)mmap(nullptr, pages + 2 * page(), PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == (char *)MAP_FAILED)
        return cudaErrorMemoryAllocation;
    p += page();
    blocks[p] = {bytes, pages};
    used += pages;
    {
        device_open_for_now open;
        if (bytes < (64u << 20)) /* what nobody has written is NaN */
            memset(p, 0xff, pages);
    }
    /* The end at the next page, as far as 256-byte alignment lets it. */
    *out = p + (pages - bytes) / 256 * 256;
    return cudaSuccess;
}

cudaError_t cudaFree(void *at) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!at)
        return cudaSuccess;
    auto found = blocks.upper_bound((char *)at);
    if (found == blocks.begin())
        return cudaErrorInvalidValue;
    --found;
    if ((char *)at >= found->first + found->second.pages)
        return cudaErrorInvalidValue;
    munmap(found->first - page(), found->second.pages + 2 * page());
    used -= found->second.pages;
    blocks.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = most - used;
    *total = most;
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **out, size_t bytes) {
    *out = aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *p) {
    free(p);
    return cudaSuccess;
}

/* ------------------------------------------------------------------ work in a stream */

static cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
    if (stream && stream->capturing) {
        stream->graph->work.push_back(std::move(work));
        return cudaSuccess;
    }
    device_open_for_now open;
    work();
    return cudaSuccess;
}

void emulated_launch(emulated_dim grid, emulated_dim block, size_t shared_bytes, void *stream,
                     const char *name, std::function<void()> kernel) {
    std::string called = name;
    enqueue((cudaStream_t)stream,
            [=] { emulated_run(grid, block, shared_bytes, called.c_str(), kernel); });
}

void emulated_host_work(void *stream, std::function<void()> work) {
    enqueue((cudaStream_t)stream, std::move(work));
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
    return enqueue(stream, [=] { memmove(to, from, bytes); });
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    return enqueue(stream, [=] { memset(to, value, bytes); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
    *out = new emulated_stream{};
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    return s && s->capturing ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) {
    *out = new emulated_event{};
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    e->recorded++;
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0;
    return cudaSuccess;
}

/* ------------------------------------------------------------------ graphs */

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (s->capturing)
        return cudaErrorInvalidValue;
    s->capturing = true;
    s->graph = new emulated_graph;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out) {
    if (!s->capturing)
        return cudaErrorInvalidValue;
    s->capturing = false;
    *out = s->graph;
    s->graph = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long) {
    *out = new emulated_graph(*g);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s) {
    for (auto &work : g->work)
        enqueue(s, work);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) {
    delete g;
    return cudaSuccess;
}

/* ------------------------------------------------------------------ the device */

const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    default:
        return "invalid argument";
    }
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = {};
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->totalGlobalMem = most;
    const char *capability = getenv("TRIL_EMULATED_CAPABILITY"); /* 90 where nothing is said */
    p->major = capability ? atoi(capability) / 10 : 9;
    p->minor = capability ? atoi(capability) % 10 : 0;
    p->multiProcessorCount = 4;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    switch (what) {
    case cudaDevAttrMultiProcessorCount:
        *value = 4;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = 9;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = 0;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = 227 << 10;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = 228 << 10;
        break;
    case cudaDevAttrL2CacheSize:
        *value = 50 << 20;
        break;
    }
    return cudaSuccess;
}

int emulated_count_all(int predicate) {
    static int count;
    __syncthreads();
    if (emulated_thread_index() == 0)
        count = 0;
    __syncthreads();
    count += predicate; /* fibers do not preempt each other */
    __syncthreads();
    return count;
}
