/* Driver of the CPU's matrix products (kernels/gemm.h), Goto's blocking:
 *
 *   for blocks of A's rows and of k                   sized so that packed A stays in the last
 * cache all threads: pack that block of A into strips all threads: jobs = (some strips) x (some
 * panels of B) pack, widen or point to the job's panels      they stay in the thread's second cache
 *       for each strip, for chunks of k, for groups of panels: tile
 *       after the last block of k: epilogue
 *
 * When k takes several blocks, the sums wait in fp32 scratch and go on in the same order. */
#include "cpu/gemm.h"

#include "base/threads.h"

#define A_BYTES ((int64_t)16 << 20) /* of packed A at a time */
#define C_BYTES ((int64_t)64 << 20) /* of sums that wait for the next block of k */
#define K_BLOCK_F32 2048            /* of k at a time where B is fp32 ... */
#define K_BLOCK_BF16 6144           /* ... or bf16 */

#define SERIAL 3e5 /* multiply-adds: a few microseconds */

/* Where a job's panels come from. */
enum panels { PANELS_READY, PANELS_WIDEN, PANELS_PACK };

struct plan {
    const struct gemm *g;
    const struct gemm_kernels *kernels;
    const struct gemm_path *path;
    enum panels source;
    enum dtype tile_type;          /* of the panels that tile reads */
    int64_t m, n_panels, k;        /* k as packed */
    int64_t m_block, k_block;      /* rows of A and k at a time */
    int64_t job_rows, job_panels;  /* of a job; job_rows a multiple of the strip */
    int64_t strip_bytes;           /* of a packed strip of A */
    int64_t b_bytes, worker_bytes; /* per thread: panels, then c */
    char *a, *workers;
    float *c; /* waiting sums [m_block, 16 n_panels], if k takes several blocks */

    int64_t first, last, k0, k1; /* the block being done; k1 without padding */
    int64_t panel_jobs;
    bool serial; /* too little work to wake threads for */
};

static int64_t at_most(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static int64_t at_least(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* k of the current block, as packed. */
static int64_t depth(const struct plan *p) {
    return gemm_round_up(p->k1 - p->k0, p->path->k_multiple);
}

static void pack_job(void *arg, int64_t begin, int64_t end, int worker) {
    const struct plan *p = arg;
    (void)worker;
    p->path->pack_a(&p->g->a, p->first, p->last, begin, end, p->k0, p->k1,
                    p->a + begin * p->strip_bytes, p->strip_bytes);
    if (p->g->row_sums) {
        int64_t from = p->first + begin * p->path->strip;
        int64_t to = at_most(p->first + end * p->path->strip, p->last);
        p->kernels->row_sums(&p->g->a, from, to, p->k0, p->k1, p->g->row_sums);
    }
}

/* The panels [begin, end) of the current block of k, as the tile reads them; *stride between them.
 */
static const char *job_panels(const struct plan *p, int64_t begin, int64_t end, char *buffer,
                              int64_t *stride) {
    const struct gemm *g = p->g;
    int64_t k = p->k1 - p->k0;
    if (p->source == PANELS_PACK) {
        p->kernels->pack_b(&g->b, begin, end, p->k0, p->k1, p->tile_type, buffer);
        *stride = gemm_panel_bytes(k, p->tile_type);
        return buffer;
    }
    int64_t whole = gemm_panel_bytes(g->b.k, g->panel_type);
    const char *from = (const char *)g->panels + begin * whole +
                       p->k0 * GEMM_PANEL * (int64_t)dtype_size(g->panel_type);
    if (p->source == PANELS_READY) {
        *stride = whole;
        return from;
    }
    *stride = depth(p) * GEMM_PANEL * 4;
    for (int64_t i = begin; i < end; i++)
        p->kernels->widen(from + (i - begin) * whole, depth(p),
                          (float *)(buffer + (i - begin) * *stride));
    return buffer;
}

/* Strip s (of the block of rows) times `panels` panels. */
static void strip_times_panels(const struct plan *p, int64_t s, const char *b, int64_t stride,
                               int64_t first_panel, int64_t panels, float *own) {
    const struct gemm_path *path = p->path;
    int64_t row = p->first + s * path->strip;
    int64_t count = at_most(p->last - row, path->strip);
    int rows = path->strip_rows(count);
    int group = path->strip_panels(rows);
    /* fp32 panels have no padding of k: A's own zeros are not asked for. */
    int64_t k = p->tile_type == DT_F32 && p->source != PANELS_WIDEN ? p->k1 - p->k0 : depth(p);
    int64_t chunk = count <= path->strip && p->m <= path->strip ? at_least(k, 1) : path->k_chunk;
    int64_t b_size = (int64_t)dtype_size(p->tile_type) * GEMM_PANEL;
    int64_t a_size = (int64_t)dtype_size(path->a_type) * rows;
    const char *a = p->a + s * p->strip_bytes;
    float *c = own;
    int64_t ldc = panels * GEMM_PANEL;
    if (p->c) {
        ldc = p->n_panels * GEMM_PANEL;
        c = p->c + s * path->strip * ldc + first_panel * GEMM_PANEL;
    }
    int64_t k_at = 0;
    do {
        int64_t n = at_most(chunk, k - k_at);
        bool load = p->k0 > 0 || k_at > 0;
        for (int64_t j = 0; j < panels;) {
            int now = j + group <= panels ? group : 1;
            path->tile(rows, now, n, a + k_at * a_size, b + j * stride + k_at * b_size,
                       p->tile_type, stride, c + j * GEMM_PANEL, ldc, load);
            j += now;
        }
        k_at += n;
    } while (k_at < k);
    if (p->k1 == p->g->a.k) {
        int64_t column = first_panel * GEMM_PANEL;
        p->kernels->epilogue(&p->g->out, c, ldc, row, count, column,
                             at_most(p->g->b.rows - column, panels * GEMM_PANEL));
    }
}

static void tile_job(void *arg, int64_t begin, int64_t end, int worker) {
    const struct plan *p = arg;
    char *buffer = p->workers + worker * p->worker_bytes;
    float *c = (float *)(buffer + p->b_bytes);
    p->path->begin();
    for (int64_t job = begin; job < end; job++) {
        int64_t panel = job % p->panel_jobs * p->job_panels;
        int64_t panels = at_most(p->n_panels - panel, p->job_panels);
        int64_t row = p->first + job / p->panel_jobs * p->job_rows;
        int64_t last = at_most(row + p->job_rows, p->last);
        int64_t stride;
        const char *b = job_panels(p, panel, panel + panels, buffer, &stride);
        for (int64_t s = (row - p->first) / p->path->strip; s * p->path->strip < last - p->first;
             s++)
            strip_times_panels(p, s, b, stride, panel, panels, c);
    }
    p->path->end();
}

static void plan_make(struct plan *p, const struct gemm_kernels *kernels, const struct gemm *g) {
    *p = (struct plan){.g = g, .kernels = kernels, .m = g->a.rows, .k = g->a.k};
    enum dtype b_type = g->panels ? g->panel_type : g->b.type;
    bool tiles = kernels->amx && g->a.type == DT_BF16 && b_type == DT_BF16;
    const struct gemm_path *path = p->path = tiles ? kernels->amx : kernels->fma;
    bool one_strip = p->m <= path->strip;
    p->tile_type = tiles ? DT_BF16 : DT_F32;
    p->source = PANELS_PACK;
    if (g->panels) {
        p->source = PANELS_READY;
        if (b_type == DT_BF16 && !tiles) {
            if (one_strip)
                p->tile_type = DT_BF16;
            else
                p->source = PANELS_WIDEN;
        }
    }
    p->n_panels = gemm_round_up(g->b.rows, GEMM_PANEL) / GEMM_PANEL;
    p->serial = (double)p->m * (double)g->b.rows * (double)p->k < SERIAL;
    int threads = p->serial ? 1 : threads_count();

    /* k: equal blocks. */
    int64_t most = p->tile_type == DT_BF16 ? K_BLOCK_BF16 : K_BLOCK_F32;
    int64_t blocks = one_strip && p->source == PANELS_READY ? 1 : (p->k + most - 1) / most;
    blocks = at_least(blocks, 1);
    p->k_block = gemm_round_up((p->k + blocks - 1) / blocks, GEMM_K_BF16);
    p->strip_bytes = gemm_strip_bytes(path, at_most(p->k, p->k_block));

    /* Rows. */
    int64_t rows = at_least(A_BYTES / p->strip_bytes, 8) * path->strip;
    if (p->k > p->k_block)
        rows = at_most(rows, at_least(C_BYTES / (p->n_panels * GEMM_PANEL * 4) / path->strip, 8) *
                                 path->strip);
    p->m_block = at_most(rows, gemm_round_up(p->m, path->strip));

    /* Jobs: the panels fit the second cache, and there are a few jobs for each thread. */
    int64_t panel_bytes = gemm_panel_bytes(at_most(p->k, p->k_block), p->tile_type) + 64;
    int group = path->strip_panels(one_strip ? path->strip_rows(p->m) : path->strip);
    int64_t panels = one_strip && p->source == PANELS_READY
                         ? 32
                         : at_least(path->panel_bytes / panel_bytes, group);
    panels = at_most(panels, (p->n_panels + 4 * threads - 1) / (4 * threads));
    p->job_panels = at_least(gemm_round_up(panels, group), group);
    p->panel_jobs = (p->n_panels + p->job_panels - 1) / p->job_panels;
    int64_t splits = threads == 1 ? 1 : (4 * threads + p->panel_jobs - 1) / p->panel_jobs;
    int64_t strips = p->m_block / path->strip;
    splits = at_least(at_most(splits, strips / 8), 1);
    p->job_rows = (strips + splits - 1) / splits * path->strip;

    p->b_bytes = p->source == PANELS_READY
                     ? 0
                     : gemm_round_up(p->job_panels * gemm_round_up(panel_bytes, 64), 64);
    p->worker_bytes = p->b_bytes + path->strip * p->job_panels * GEMM_PANEL * 4 + 64;
    p->worker_bytes = gemm_round_up(p->worker_bytes, 64);
}

tril_status gemm_run(const struct gemm_kernels *kernels, struct op_context *ctx,
                     const struct gemm *g, struct tril_error *err) {
    if (g->a.rows == 0 || g->b.rows == 0)
        return TRIL_OK;
    struct plan p;
    plan_make(&p, kernels, g);
    int64_t a_bytes = gemm_round_up(p.m_block / p.path->strip * p.strip_bytes, 64);
    int64_t c_bytes = p.k > p.k_block ? p.m_block * p.n_panels * GEMM_PANEL * 4 : 0;
    int64_t total = a_bytes + c_bytes + threads_count() * p.worker_bytes;
    char *scratch = op_scratch(ctx, total);
    if (!scratch)
        return error_set(err, TRIL_ERR_MEMORY,
                         "a matrix product of %lld x %lld x %lld needs %lld bytes of scratch",
                         (long long)g->a.rows, (long long)g->b.rows, (long long)p.k,
                         (long long)total);
    p.a = scratch;
    p.c = c_bytes > 0 ? (float *)(scratch + a_bytes) : NULL;
    p.workers = scratch + a_bytes + c_bytes;
    for (p.first = 0; p.first < p.m; p.first = p.last) {
        p.last = at_most(p.first + p.m_block, p.m);
        int64_t strips = gemm_round_up(p.last - p.first, p.path->strip) / p.path->strip;
        p.k0 = 0;
        do {
            p.k1 = at_most(p.k0 + p.k_block, p.k);
            /* A few strips at a time: neighbours share lines of a transposed A. */
            int64_t grain = (p.last - p.first) * (p.k1 - p.k0) < 65536 ? strips : 8;
            parallel_for(strips, grain, pack_job, &p);
            int64_t jobs = (p.last - p.first + p.job_rows - 1) / p.job_rows * p.panel_jobs;
            parallel_for(jobs, p.serial ? jobs : 1, tile_job, &p);
            p.k0 = p.k1;
        } while (p.k0 < p.k);
    }
    return TRIL_OK;
}

/* ---------------------------------------------------------------- whole operands */

struct pack_all {
    const struct gemm_kernels *kernels;
    const struct gemm_operand *b;
    enum dtype type;
    char *out;
};

static void pack_all_job(void *arg, int64_t begin, int64_t end, int worker) {
    const struct pack_all *p = arg;
    (void)worker;
    p->kernels->pack_b(p->b, begin, end, 0, p->b->k, p->type,
                       p->out + begin * gemm_panel_bytes(p->b->k, p->type));
}

int64_t gemm_panels_bytes(int64_t rows, int64_t k, enum dtype type) {
    return gemm_round_up(rows, GEMM_PANEL) / GEMM_PANEL * gemm_panel_bytes(k, type);
}

void gemm_panels_pack(const struct gemm_kernels *kernels, const struct gemm_operand *b,
                      enum dtype type, void *out) {
    struct pack_all p = {kernels, b, type, out};
    parallel_for(gemm_round_up(b->rows, GEMM_PANEL) / GEMM_PANEL, 8, pack_all_job, &p);
}
