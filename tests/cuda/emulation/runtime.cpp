/* The emulated CUDA runtime: memory that the host's code cannot touch, streams whose work is done
 * when somebody waits for it, and graphs that remember what was launched while they were captured.
 */
#include "cuda_runtime.h"

#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

void emulated_run(emulated_dim grid, emulated_dim block, size_t shared_bytes, const char *name,
                  const std::function<void()> &kernel);

/* An event that was recorded: the place in a stream, or in a lane of a graph. */
struct recorded {
    bool done;
    emulated_stream *stream;
    int number;                  /* captured: of the graph's events */
    std::map<int, size_t> after; /* and how many nodes of each lane are before it */
};
struct item { /* one of the three */
    std::function<void()> work;
    std::shared_ptr<recorded> wait, record;
};
/* Lanes of a captured graph: 0 the stream it began in, the others those that joined it. */
struct emulated_graph {
    struct node {
        int lane;
        std::function<void()> work;
        int wait, record; /* numbers of events within the graph, or -1 */
    };
    std::vector<node> nodes;
    std::vector<size_t> count;                /* nodes of each lane */
    std::vector<std::map<int, size_t>> after; /* what the end of each lane comes after */
    int events;
    bool ended;
    std::vector<emulated_stream *>
        joined;                          /* while it is captured: the streams of lanes 1, 2, ... */
    std::vector<emulated_stream *> side; /* executable: streams of their own for these lanes */
};
struct emulated_stream {
    std::deque<item> queue;
    std::shared_ptr<emulated_graph> graph; /* while it is captured */
    int lane;
};
struct emulated_event {
    std::shared_ptr<recorded> last;
    std::weak_ptr<emulated_graph> graph; /* that it was captured in; */
    bool captured;                       /* if it was */
};

/* One kernel at a time, whoever launches it. */
static std::recursive_mutex lock;

/* ------------------------------------------------------------------ memory
 *
 * [page: inaccessible][ pages of the allocation, its end at the next page ][page: inaccessible].
 * The pages are accessible while a kernel or a copy runs. */

struct block {
    size_t bytes, pages; /* pages: bytes of the pages */
    bool host;           /* pinned and mapped: not the GPU's, but not for the host's code either */
};
static std::map<char *, block> blocks; /* by the first page */
static size_t used, most = (size_t)2 << 30;
static int opened;        /* nested kernels and copies */
static void finish_all(); /* all streams' work */

static size_t page() {
    return (size_t)sysconf(_SC_PAGESIZE);
}

#define FILLED ((size_t)1 << 20)

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

static cudaError_t block_make(void **out, size_t bytes, bool host) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    size_t pages = (bytes + page() - 1) / page() * page();
    if (pages == 0)
        pages = page();
    if (!host && (bytes > most || used + pages > most))
        return cudaErrorMemoryAllocation;
    char *p = (char *)mmap(nullptr, pages + 2 * page(), PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == (char *)MAP_FAILED)
        return cudaErrorMemoryAllocation;
    p += page();
    used += host ? 0 : pages;
    /* What nobody has written is NaN; not all of what is large: pages that nobody touched cost
     * nothing to protect. */
    mprotect(p, pages, PROT_READ | PROT_WRITE);
    memset(p, 0xff, pages < FILLED ? pages : FILLED);
    if (opened == 0)
        mprotect(p, pages, PROT_NONE);
    blocks[p] = {bytes, pages, host};
    /* The end at the next page, as far as 256-byte alignment lets it. */
    *out = p + (pages - bytes) / 256 * 256;
    return cudaSuccess;
}

static cudaError_t block_free(void *at, bool host) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!at)
        return cudaSuccess;
    auto found = blocks.upper_bound((char *)at);
    if (found == blocks.begin())
        return cudaErrorInvalidValue;
    --found;
    if ((char *)at >= found->first + found->second.pages || found->second.host != host)
        return cudaErrorInvalidValue;
    finish_all();
    munmap(found->first - page(), found->second.pages + 2 * page());
    used -= host ? 0 : found->second.pages;
    blocks.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    return block_make(out, bytes, false);
}
cudaError_t cudaFree(void *at) {
    return block_free(at, false);
}

/* Mapped memory: the backend's contract gives it to the GPU's work alone, so the host's code is
 * kept out of it here. Memory of cudaMallocHost is the host's too. */
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
    return block_make(out, bytes, true);
}
cudaError_t cudaHostGetDevicePointer(void **out, void *host, unsigned) {
    *out = host;
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
    if (block_free(p, true) == cudaSuccess)
        return cudaSuccess;
    finish_all();
    free(p);
    return cudaSuccess;
}

/* ------------------------------------------------------------------ work in a stream
 *
 * Work waits in its stream until somebody waits for it, and is then done in one of two orders that
 * a GPU may choose, the most different ones: late, where another stream's work is done only when an
 * event of it is waited for, and early, where other streams go on as soon as their events allow.
 * What is right in both does not depend on how the streams happen to run. */

static std::set<emulated_stream *> streams;
static bool early;

extern "C" void emulated_streams_early(bool yes) {
    finish_all();
    early = yes;
}

static bool ready(const emulated_stream *s) {
    return !s->queue.empty() && (!s->queue.front().wait || s->queue.front().wait->done);
}

static void run(emulated_stream *s, const recorded *until);

static void step(emulated_stream *s) {
    item i = std::move(s->queue.front());
    s->queue.pop_front();
    if (i.wait && !i.wait->done)
        run(i.wait->stream, i.wait.get());
    if (i.work)
        i.work();
    if (i.record)
        i.record->done = true;
}

/* All of a stream's work, or until an event is reached. */
static void run(emulated_stream *s, const recorded *until) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (s->queue.empty())
        return;
    device_open_for_now open; /* once for all of it: that is slow */
    while (!s->queue.empty() && !(until && until->done)) {
        for (emulated_stream *other : streams)
            while (early && other != s && ready(other))
                step(other);
        step(s);
    }
}

static void finish_all() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    for (emulated_stream *s : streams)
        run(s, nullptr);
}

static emulated_stream *stream_make() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    emulated_stream *s = new emulated_stream{};
    streams.insert(s);
    return s;
}
static void stream_free(emulated_stream *s) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    run(s, nullptr);
    streams.erase(s);
    delete s;
}
static emulated_stream *stream_of(cudaStream_t s) {
    static emulated_stream *none = stream_make(); /* the default stream */
    return s ? s : none;
}

static void node_add(emulated_stream *s, std::function<void()> work, int wait, int record) {
    s->graph->nodes.push_back({s->lane, std::move(work), wait, record});
    s->graph->count[(size_t)s->lane]++;
}

static cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    emulated_stream *s = stream_of(stream);
    if (s->graph)
        node_add(s, std::move(work), -1, -1);
    else
        s->queue.push_back({std::move(work), nullptr, nullptr});
    return cudaSuccess;
}

static int capability() { /* 90 where nothing is said */
    const char *said = getenv("TRIL_EMULATED_CAPABILITY");
    return said ? atoi(said) : 90;
}
/* Of a block; what a kernel declares itself comes on top of what its launch asks for, unseen here:
 * STATIC bytes are left for it. */
static size_t shared_most() {
    const int c = capability();
    return (size_t)(c == 80 || c == 87 ? 163 : c < 90 ? 99 : 227) << 10;
}
enum { STATIC = 2 << 10 };

void emulated_launch(emulated_dim grid, emulated_dim block, size_t shared_bytes, void *stream,
                     const char *name, std::function<void()> kernel) {
    if (shared_bytes + STATIC > shared_most())
        emulated_fault("%s asks for %zu bytes of shared memory, which are more than a block has",
                       name, shared_bytes);
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
    *out = stream_make();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    stream_free(s);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (stream_of(s)->graph)
        return cudaErrorInvalidValue;
    run(stream_of(s), nullptr);
    return cudaSuccess;
}

/* ------------------------------------------------------------------ events */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) {
    *out = new emulated_event{};
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    emulated_stream *s = stream_of(stream);
    e->last = std::make_shared<recorded>();
    e->last->stream = s;
    e->captured = s->graph != nullptr;
    e->graph = s->graph;
    if (!s->graph) {
        s->queue.push_back({nullptr, nullptr, e->last});
        return cudaSuccess;
    }
    emulated_graph &g = *s->graph;
    e->last->number = g.events++;
    node_add(s, nullptr, -1, e->last->number);
    e->last->after = g.after[(size_t)s->lane];
    e->last->after[s->lane] = g.count[(size_t)s->lane];
    return cudaSuccess;
}
/* A stream that waits for a captured event joins the recording. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t e, unsigned) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    emulated_stream *s = stream_of(stream);
    if (!e->last)
        return cudaSuccess; /* nothing to wait for */
    if (!e->captured && !s->graph) {
        s->queue.push_back({nullptr, e->last, nullptr});
        return cudaSuccess;
    }
    std::shared_ptr<emulated_graph> g = e->graph.lock();
    if (!e->captured || !g || g->ended || (s->graph && s->graph != g))
        return cudaErrorInvalidValue; /* from without, or from a recording that is over */
    if (!s->graph) {
        s->graph = g;
        s->lane = (int)g->count.size();
        g->count.push_back(0);
        g->after.emplace_back();
        g->joined.push_back(s);
    }
    node_add(s, nullptr, e->last->number, -1);
    for (auto &a : e->last->after) {
        size_t &mine = g->after[(size_t)s->lane][a.first];
        mine = mine > a.second ? mine : a.second;
    }
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (e->captured)
        return cudaErrorInvalidValue;
    if (e->last)
        run(e->last->stream, e->last.get());
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) {
    *ms = 0;
    return cudaSuccess;
}

/* ------------------------------------------------------------------ graphs */

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (s->graph)
        return cudaErrorInvalidValue;
    s->graph = std::make_shared<emulated_graph>();
    s->lane = 0;
    s->graph->count.push_back(0);
    s->graph->after.emplace_back();
    return cudaSuccess;
}
/* Whatever joined must have been waited for to its end. */
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out) {
    if (!s->graph || s->lane != 0)
        return cudaErrorInvalidValue;
    std::shared_ptr<emulated_graph> g = s->graph;
    bool whole = true;
    for (size_t lane = 1; lane < g->count.size(); lane++)
        whole = whole && g->after[0][(int)lane] == g->count[lane];
    for (emulated_stream *j : g->joined)
        j->graph = nullptr;
    s->graph = nullptr;
    g->ended = true;
    *out = whole ? new emulated_graph(*g) : nullptr;
    return whole ? cudaSuccess : cudaErrorStreamCaptureUnjoined;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t g, unsigned long long) {
    *out = new emulated_graph(*g);
    for (size_t lane = 1; lane < g->count.size(); lane++)
        (*out)->side.push_back(stream_make());
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    std::vector<std::shared_ptr<recorded>> events((size_t)g->events);
    for (auto &n : g->nodes) {
        emulated_stream *in = n.lane == 0 ? stream_of(s) : g->side[(size_t)n.lane - 1];
        item i = {n.work, n.wait >= 0 ? events[(size_t)n.wait] : nullptr, nullptr};
        if (n.record >= 0) {
            i.record = events[(size_t)n.record] = std::make_shared<recorded>();
            i.record->stream = in;
        }
        in->queue.push_back(i);
    }
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete g;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) {
    finish_all();
    for (emulated_stream *side : g->side)
        stream_free(side);
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
    case cudaErrorStreamCaptureUnjoined:
        return "capturing stream has unjoined work";
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
    p->major = capability() / 10;
    p->minor = capability() % 10;
    p->multiProcessorCount = 4;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    switch (what) {
    case cudaDevAttrMultiProcessorCount:
        *value = 4;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = capability() / 10;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = capability() % 10;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)shared_most();
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
    __atomic_fetch_add(&count, predicate, __ATOMIC_RELAXED);
    __syncthreads();
    return count;
}
