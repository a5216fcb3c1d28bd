/* Linear attention in chunks (Katharopoulos et al. 2020; chunks: Hua et al. 2022), forward and
 * backward.
 *
 * With Q = phi(q), K = phi(k) of a chunk of CHUNK rows, S the state before it (sum of phi(k) v^T
 * over all earlier rows) and tril keeping what a row may see:
 *
 *   numerator = Q S + tril(Q K^T) V       S of the next chunk = S + K^T V
 *
 * so nearly all work is products of matrices, and chunks are independent once their states are
 * known. Three parallel loops: the sum K^T V of every chunk; a running sum over the chunks, each
 * thread with its own slice of the matrix; the outputs of every chunk. A unit is one sequence and
 * one key/value head; the heads of its group share its states. The backward is the same thing
 * backward in time: with G = do / denominator and R the sum of phi(q) g^T over all later rows,
 *
 *   dQ = G S^T + tril(G V^T) K     dK = V R^T + tril(G V^T)^T Q     dV = K R + tril(Q K^T)^T G
 *
 * Normaliser: z is the row sums' state, kept beside S as one row of its own; in the backward the
 * same place holds the sum of -delta phi(q), delta = g.o, which is what dK gets beyond V R^T.
 *
 * Units of at most RECURRENT_ROWS rows (decoding) run the recurrence itself. Sums run over fixed
 * chunks in a fixed order: the bits do not depend on the threads. */
#include <math.h>

#include "base/threads.h"
#include "cpu/kernels/attention_matrix.h"
#include "ops/linear_attention.h"

#define CHUNK 96 /* a multiple of every TILE_ROWS and PANEL */
#define RECURRENT_ROWS 4
#define WAVE_UNITS 256
#define WAVE_BYTES (4 << 20) /* of states: near the processor while they are used */
#define WAVE_CHUNKS 8        /* but at least so many chunks for every thread */
#define SLICE 1024           /* floats of a state that one task of the running sum takes */
#define SERIAL_FLOPS 4e5     /* below this a thread costs more than it brings */

struct unit {
    int64_t sequence, kv_head, first, rows; /* rows of q, k and v: [first, first + rows) */
    int64_t chunks, first_chunk;            /* first_chunk: within the wave */
    bool begins, ends;                      /* the first, the last part of its sequence */
    float *s, *r; /* [chunks + 1] states; r (backward): after each chunk, and of the whole */
    float *inverse, *delta; /* backward: [group, rows]: 1 / denominator, and g.o */
};

struct linear {
    struct linear_attention_call c;
    bool backward;
    int64_t group;
    int64_t ld; /* floats from row to row of all matrices: the width, rounded up for all tiles */
    int64_t state_floats; /* [ld + 1, ld]: S, padded with zeros, and z as the last row */
    struct unit unit[WAVE_UNITS];
    int64_t units, chunks; /* of this wave */
    int64_t next_sequence, next_head, next_chunk;
    float *carry; /* the state between two parts of a unit */
    char *worker, *memory;
    int64_t worker_bytes, memory_bytes;
    bool serial;
};

/* A worker's memory. Rows beyond the chunk's and columns beyond the width are zeros in what
 * products read. */
struct chunk {
    float *q, *k, *v, *g; /* [CHUNK, ld]: phi(q), phi(k), v, g */
    float *k_t, *v_t;     /* [d, CHUNK] */
    float *a, *b;         /* [CHUNK, CHUNK]: tril(Q K^T), tril(G V^T - delta) */
    float *state_t;       /* [ld + 1, ld]: S^T or R^T, or the recurrence's state */
    float *out, *dk, *dv; /* [CHUNK, ld]: numerators or dQ; dK, dV of the group */
    float *z;             /* [ld] */
    int64_t rows, padded; /* padded to TILE_ROWS */
};

static int64_t worker_floats(int64_t ld) {
    return 7 * CHUNK * ld + 2 * ld * CHUNK + 2 * CHUNK * CHUNK + (ld + 2) * ld;
}

static struct chunk chunk_at(char *memory, int64_t ld) {
    struct chunk b = {0};
    b.q = (float *)(void *)memory;
    b.k = b.q + CHUNK * ld;
    b.v = b.k + CHUNK * ld;
    b.g = b.v + CHUNK * ld;
    b.out = b.g + CHUNK * ld;
    b.dk = b.out + CHUNK * ld;
    b.dv = b.dk + CHUNK * ld;
    b.k_t = b.dv + CHUNK * ld;
    b.v_t = b.k_t + ld * CHUNK;
    b.a = b.v_t + ld * CHUNK;
    b.b = b.a + CHUNK * CHUNK;
    b.state_t = b.b + CHUNK * CHUNK;
    b.z = b.state_t + (ld + 1) * ld;
    return b;
}

static float *state_at(const struct linear *f, float *states, int64_t chunk) {
    return states + chunk * f->state_floats;
}

/* ------------------------------------------------------------------ vectors of one row */

/* phi(x) = elu(x) + 1. */
SIMD vf feature(vf x) {
    vf low = vf_exp(vf_min(vf_zero(), x));
    return vf_select(vf_less(vf_zero(), x), x + vf_set(1.0f), low);
}

/* phi of a row in place; zeros from column d on. */
static void feature_row(float *x, int64_t d, int64_t ld) {
    for (int64_t t = 0; t < ld; t += VF_WIDTH) {
        int n = (int)min_i64(VF_WIDTH, max_i64(0, d - t));
        vf_store(x + t, vf_select(vi_first(n), feature(vf_load(x + t)), vf_zero()));
    }
}

/* x *= phi'(x), given phi(x): phi' is 1 where phi is above 1, else phi. */
static void slope_row(float *x, const float *phi, int64_t d) {
    for (int64_t t = 0; t < d; t += VF_WIDTH)
        vf_store(x + t, vf_load(x + t) * vf_min(vf_set(1.0f), vf_load(phi + t)));
}

/* y += factor x */
static void row_add(float *y, float factor, const float *x, int64_t ld) {
    for (int64_t t = 0; t < ld; t += VF_WIDTH)
        vf_store(y + t, vf_fma(vf_set(factor), vf_load(x + t), vf_load(y + t)));
}

/* ------------------------------------------------------------------ matrices */

/* Rows [first, first + count) of head h as fp32, zeros up to `padded` rows and ld columns. */
static void load_rows(const struct linear *f, float *out, const struct tensor *x, int64_t first,
                      int64_t h, const struct chunk *b) {
    matrix_load(out, f->ld, x, first, h, b->rows, b->padded, 1);
}

static void load_features(const struct linear *f, float *out, const struct tensor *x, int64_t first,
                          int64_t h, const struct chunk *b) {
    load_rows(f, out, x, first, h, b);
    for (int64_t i = 0; i < b->rows; i++)
        feature_row(out + i * f->ld, f->c.width, f->ld);
}

/* a = tril(x y_t - shift) within a chunk; tile by tile up to the diagonal, zeros beyond it there.
 * What lies right of a row's tile is not written. */
static void lower_scores(const struct linear *f, const struct chunk *b, const float *x,
                         const float *y_t, const float *shift, float *a) {
    for (int64_t r = 0; r < b->padded; r += TILE_ROWS) {
        multiply(TILE_ROWS, r + TILE_ROWS, f->c.width, x + r * f->ld, f->ld, y_t, CHUNK,
                 a + r * CHUNK, CHUNK);
        for (int64_t i = r; i < r + TILE_ROWS; i++)
            for (int64_t j = 0; j < r + TILE_ROWS; j += VF_WIDTH) {
                vi seen = vi_iota() <= vi_set((int32_t)(i - j));
                vf y = vf_load(a + i * CHUNK + j) - vf_set(shift && i < b->rows ? shift[i] : 0);
                vf_store(a + i * CHUNK + j, vf_select(seen, y, vf_zero()));
            }
    }
}

/* out += a x, a lower triangular as lower_scores leaves it. */
static void lower_product(const struct linear *f, const struct chunk *b, const float *a,
                          const float *x, float *out) {
    for (int64_t r = 0; r < b->padded; r += TILE_ROWS)
        multiply_add(TILE_ROWS, f->c.width, r + TILE_ROWS, a + r * CHUNK, CHUNK, x, f->ld,
                     out + r * f->ld, f->ld);
}
/* out += a^T x */
static void lower_product_transposed(const struct linear *f, const struct chunk *b, const float *a,
                                     const float *x, float *out) {
    for (int64_t r = 0; r < b->padded; r += TILE_ROWS)
        multiply_transposed_add(TILE_ROWS, f->c.width, b->padded - r, a + r * CHUNK + r, CHUNK,
                                x + r * f->ld, f->ld, out + r * f->ld, f->ld);
}

/* ------------------------------------------------------------------ states */

static float *normaliser(const struct linear *f, float *state) {
    return state + f->ld * f->ld;
}

/* A matrix of a [S, K, d, d+1] tensor (zeros if it is absent) to a state, and back. */
static void state_read(const struct linear *f, const struct unit *u, const struct tensor *t,
                       float *state) {
    int64_t d = f->c.width;
    memset(state, 0, (size_t)f->state_floats * 4);
    if (!t->data)
        return;
    const float *from = (const float *)t->data;
    from += (u->sequence * f->c.kv_heads + u->kv_head) * d * (d + 1);
    for (int64_t i = 0; i < d; i++) {
        memcpy(state + i * f->ld, from + i * (d + 1), (size_t)d * 4);
        normaliser(f, state)[i] = from[i * (d + 1) + d];
    }
}
static void state_write(const struct linear *f, const struct unit *u, const struct tensor *t,
                        float *state) {
    int64_t d = f->c.width;
    if (!t->data)
        return;
    float *to = (float *)t->data + (u->sequence * f->c.kv_heads + u->kv_head) * d * (d + 1);
    for (int64_t i = 0; i < d; i++) {
        memcpy(to + i * (d + 1), state + i * f->ld, (size_t)d * 4);
        to[i * (d + 1) + d] = normaliser(f, state)[i];
    }
}

static const struct unit *find_unit(const struct linear *f, int64_t chunk) {
    int64_t low = 0, high = f->units - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (f->unit[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle - 1;
    }
    return &f->unit[low];
}

/* Chunk `i` of a unit in worker memory; rows are loaded by the caller. */
static struct chunk chunk_begin(const struct linear *f, const struct unit *u, int64_t i,
                                int worker) {
    struct chunk b = chunk_at(f->worker + worker * f->worker_bytes, f->ld);
    b.rows = min_i64(CHUNK, u->rows - i * CHUNK);
    b.padded = round_up(b.rows, TILE_ROWS);
    return b;
}

/* State i + 1 of a unit = K^T V of chunk i; state 0 = the state carried in. */
static void sum_keys(void *arg, int64_t begin, int64_t end, int worker) {
    const struct linear *f = arg;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = find_unit(f, item);
        int64_t i = item - u->first_chunk, first = u->first + i * CHUNK;
        if (!u->s)
            continue;
        if (i == 0 && u->begins)
            state_read(f, u, &f->c.state, u->s);
        else if (i == 0)
            memcpy(u->s, f->carry, (size_t)f->state_floats * 4);
        if (u->rows == 0)
            continue;
        struct chunk b = chunk_begin(f, u, i, worker);
        load_features(f, b.k, &f->c.k, first, u->kv_head, &b);
        load_rows(f, b.v, &f->c.v, first, u->kv_head, &b);
        float *state = state_at(f, u->s, i + 1), *z = normaliser(f, state);
        memset(state, 0, (size_t)f->state_floats * 4);
        multiply_transposed_add(f->c.width, f->c.width, b.rows, b.k, f->ld, b.v, f->ld, state,
                                f->ld);
        for (int64_t j = 0; j < b.rows; j++)
            row_add(z, 1, b.k + j * f->ld, f->ld);
    }
}

/* Chunk sums to running sums: S forward in time, or R backward in time. Item: a slice of a unit's
 * states. */
static void running_sums(const struct linear *f, int64_t begin, int64_t end, bool later) {
    int64_t slices = (f->state_floats + SLICE - 1) / SLICE;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = &f->unit[item / slices];
        int64_t from = item % slices * SLICE, to = min_i64(from + SLICE, f->state_floats);
        for (int64_t i = 0; i < u->chunks && u->s; i++) {
            float *x = later ? state_at(f, u->r, u->chunks - i) : state_at(f, u->s, i);
            float *y = later ? state_at(f, u->r, u->chunks - i - 1) : state_at(f, u->s, i + 1);
            for (int64_t t = from; t < to; t += VF_WIDTH)
                vf_store(y + t, vf_load(x + t) + vf_load(y + t));
        }
    }
}
static void sum_forward(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    running_sums(arg, begin, end, false);
}
static void sum_backward(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    running_sums(arg, begin, end, true);
}

/* ------------------------------------------------------------------ forward */

/* x = 1 / x, and 0 for 0. */
static float inverse_of(float x) {
    return x == 0 ? 0 : 1 / x;
}

static void forward_chunk(const struct linear *f, const struct unit *u, int64_t i, int worker) {
    const struct linear_attention_call *c = &f->c;
    struct chunk b = chunk_begin(f, u, i, worker);
    int64_t first = u->first + i * CHUNK, d = c->width, ld = f->ld;
    float *state = state_at(f, u->s, c->causal ? i : u->chunks);
    if (c->causal) {
        load_features(f, b.k, &c->k, first, u->kv_head, &b);
        load_rows(f, b.v, &c->v, first, u->kv_head, &b);
        transpose_matrix(b.k_t, CHUNK, b.k, ld, b.padded, d);
    }
    for (int64_t h = u->kv_head * f->group; h < (u->kv_head + 1) * f->group; h++) {
        load_features(f, b.q, &c->q, first, h, &b);
        multiply(b.padded, d, d, b.q, ld, state, ld, b.out, ld);
        if (c->causal) {
            lower_scores(f, &b, b.q, b.k_t, NULL, b.a);
            lower_product(f, &b, b.a, b.v, b.out);
        }
        memcpy(b.z, normaliser(f, state), (size_t)ld * 4);
        for (int64_t n = 0; n < b.rows; n++) {
            if (c->causal)
                row_add(b.z, 1, b.k + n * ld, ld); /* z of this very row */
            float inverse = inverse_of(row_dot(b.q + n * ld, b.z, ld));
            row_from_float((void *)(uintptr_t)element(&c->o, first + n, h), c->o.dtype,
                           b.out + n * ld, d, inverse);
        }
    }
    if (i == u->chunks - 1 && u->ends)
        state_write(f, u, &c->next, state_at(f, u->s, u->chunks));
}

/* The recurrence, for a unit of few rows: the state is the worker's. */
static void forward_rows(const struct linear *f, const struct unit *u, int worker) {
    const struct linear_attention_call *c = &f->c;
    struct chunk b = chunk_begin(f, u, 0, worker);
    int64_t d = c->width, ld = f->ld;
    float *state = b.state_t, *z = normaliser(f, state);
    state_read(f, u, &c->state, state);
    load_features(f, b.k, &c->k, u->first, u->kv_head, &b);
    load_rows(f, b.v, &c->v, u->first, u->kv_head, &b);
    for (int64_t seen = 0, n = 0; n < u->rows; n++) {
        for (int64_t end = c->causal ? n + 1 : u->rows; seen < end; seen++) {
            for (int64_t a = 0; a < d; a++)
                row_add(state + a * ld, b.k[seen * ld + a], b.v + seen * ld, ld);
            row_add(z, 1, b.k + seen * ld, ld);
        }
        for (int64_t h = u->kv_head * f->group; h < (u->kv_head + 1) * f->group; h++) {
            row_to_float(b.q, element(&c->q, u->first + n, h), c->q.dtype, d, ld, 1);
            feature_row(b.q, d, ld);
            memset(b.out, 0, (size_t)ld * 4);
            for (int64_t a = 0; a < d; a++)
                row_add(b.out, b.q[a], state + a * ld, ld);
            row_from_float((void *)(uintptr_t)element(&c->o, u->first + n, h), c->o.dtype, b.out, d,
                           inverse_of(row_dot(b.q, z, ld)));
        }
    }
    state_write(f, u, &c->next, state);
}

static void run_forward(void *arg, int64_t begin, int64_t end, int worker) {
    const struct linear *f = arg;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = find_unit(f, item);
        if (u->s)
            forward_chunk(f, u, item - u->first_chunk, worker);
        else
            forward_rows(f, u, worker);
    }
}

/* ------------------------------------------------------------------ backward */

/* Loads g = do / denominator of head h's rows. */
static void load_gradients(const struct linear *f, const struct unit *u, int64_t first, int64_t h,
                           struct chunk *b) {
    int64_t at = (h - u->kv_head * f->group) * u->rows + first - u->first;
    load_rows(f, b->g, &f->c.dout, first, h, b);
    for (int64_t n = 0; n < b->rows; n++) {
        vf inverse = vf_set(u->inverse[at + n]);
        for (int64_t t = 0; t < f->ld; t += VF_WIDTH)
            vf_store(b->g + n * f->ld + t, vf_load(b->g + n * f->ld + t) * inverse);
    }
}

/* Denominators and delta of chunk i, and state i of R = Q^T G of the chunk; the last state is
 * dnext, what comes after all chunks. */
static void sum_queries(void *arg, int64_t begin, int64_t end, int worker) {
    const struct linear *f = arg;
    const struct linear_attention_call *c = &f->c;
    int64_t d = c->width, ld = f->ld;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = find_unit(f, item);
        int64_t i = item - u->first_chunk, first = u->first + i * CHUNK;
        if (i == 0)
            state_read(f, u, &c->dnext, state_at(f, u->r, u->chunks));
        if (u->rows == 0)
            continue;
        struct chunk b = chunk_begin(f, u, i, worker);
        float *state = state_at(f, u->r, i), *z = normaliser(f, state);
        memset(state, 0, (size_t)f->state_floats * 4);
        if (c->causal)
            load_features(f, b.k, &c->k, first, u->kv_head, &b);
        for (int64_t h = u->kv_head * f->group; h < (u->kv_head + 1) * f->group; h++) {
            int64_t at = (h - u->kv_head * f->group) * u->rows + i * CHUNK;
            load_features(f, b.q, &c->q, first, h, &b);
            load_rows(f, b.g, &c->o, first, h, &b);
            load_rows(f, b.out, &c->dout, first, h, &b);
            memcpy(b.z, normaliser(f, state_at(f, u->s, c->causal ? i : u->chunks)),
                   (size_t)ld * 4);
            for (int64_t n = 0; n < b.rows; n++) {
                if (c->causal)
                    row_add(b.z, 1, b.k + n * ld, ld);
                float inverse = inverse_of(row_dot(b.q + n * ld, b.z, ld));
                u->inverse[at + n] = inverse;
                u->delta[at + n] = inverse * row_dot(b.g + n * ld, b.out + n * ld, ld);
                row_add(z, -u->delta[at + n], b.q + n * ld, ld);
            }
            load_gradients(f, u, first, h, &b);
            multiply_transposed_add(d, d, b.rows, b.q, ld, b.g, ld, state, ld);
        }
    }
}

/* out [rows, d] = x state^T. */
static void times_transposed(const struct linear *f, const struct chunk *b, const float *x,
                             const float *state, float *out) {
    transpose_matrix(b->state_t, f->ld, state, f->ld, f->c.width, f->c.width);
    multiply(b->padded, f->c.width, f->c.width, x, f->ld, b->state_t, f->ld, out, f->ld);
}

static void backward_chunk(const struct linear *f, const struct unit *u, int64_t i, int worker) {
    const struct linear_attention_call *c = &f->c;
    struct chunk b = chunk_begin(f, u, i, worker);
    int64_t first = u->first + i * CHUNK, d = c->width, ld = f->ld;
    float *s = state_at(f, u->s, c->causal ? i : u->chunks);
    float *r = state_at(f, u->r, c->causal ? i + 1 : 0);
    load_features(f, b.k, &c->k, first, u->kv_head, &b);
    load_rows(f, b.v, &c->v, first, u->kv_head, &b);
    if (c->causal) {
        transpose_matrix(b.k_t, CHUNK, b.k, ld, b.padded, d);
        transpose_matrix(b.v_t, CHUNK, b.v, ld, b.padded, d);
    }
    multiply(b.padded, d, d, b.k, ld, r, ld, b.dv, ld);
    times_transposed(f, &b, b.v, r, b.dk);
    for (int64_t n = 0; n < b.rows; n++)
        row_add(b.dk + n * ld, 1, normaliser(f, r), ld);
    for (int64_t h = u->kv_head * f->group; h < (u->kv_head + 1) * f->group; h++) {
        const float *delta = u->delta + (h - u->kv_head * f->group) * u->rows + i * CHUNK;
        load_features(f, b.q, &c->q, first, h, &b);
        load_gradients(f, u, first, h, &b);
        times_transposed(f, &b, b.g, s, b.out);
        for (int64_t n = 0; n < b.rows; n++)
            row_add(b.out + n * ld, -delta[n], normaliser(f, s), ld);
        if (c->causal) {
            lower_scores(f, &b, b.q, b.k_t, NULL, b.a);
            lower_scores(f, &b, b.g, b.v_t, delta, b.b);
            lower_product(f, &b, b.b, b.k, b.out);
            lower_product_transposed(f, &b, b.b, b.q, b.dk);
            lower_product_transposed(f, &b, b.a, b.g, b.dv);
        }
        for (int64_t n = 0; n < b.rows; n++)
            slope_row(b.out + n * ld, b.q + n * ld, d);
        matrix_store(&c->dq, first, h, b.out, ld, b.rows, 1);
    }
    for (int64_t n = 0; n < b.rows; n++)
        slope_row(b.dk + n * ld, b.k + n * ld, d);
    matrix_store(&c->dk, first, u->kv_head, b.dk, ld, b.rows, 1);
    matrix_store(&c->dv, first, u->kv_head, b.dv, ld, b.rows, 1);
}

static void run_backward(void *arg, int64_t begin, int64_t end, int worker) {
    const struct linear *f = arg;
    for (int64_t item = begin; item < end; item++) {
        const struct unit *u = find_unit(f, item);
        int64_t i = item - u->first_chunk;
        if (u->rows > 0)
            backward_chunk(f, u, i, worker);
        if (i == 0)
            state_write(f, u, &f->c.dstate, u->r);
    }
}

/* ------------------------------------------------------------------ waves */

/* Chunks of states that a wave may hold. */
static int64_t wave_chunks(const struct linear *f) {
    return max_i64(WAVE_BYTES / (f->state_floats * 4), WAVE_CHUNKS * threads_count());
}

/* Takes the next units until their states fill a wave; false when none are left. Every unit has at
 * least one item of the loops over chunks, also without rows: its state passes through. A long unit
 * of the causal forward is taken in parts, each of which begins where the one before ended; the
 * others need all of their states at once. */
static bool wave_next(struct linear *f) {
    const struct linear_attention_call *c = &f->c;
    int64_t used = 0, room = wave_chunks(f);
    f->units = f->chunks = 0;
    while (f->next_sequence < c->sequences && f->units < WAVE_UNITS && room > 0) {
        int64_t s = f->next_sequence, begin = c->q_offsets[s] + f->next_chunk * CHUNK;
        int64_t rows = c->q_offsets[s + 1] - begin, chunks = (rows + CHUNK - 1) / CHUNK;
        if (f->next_head == c->kv_heads) {
            f->next_sequence++;
            f->next_head = 0;
            continue;
        }
        bool whole = chunks <= room, split = !whole && c->causal && !f->backward;
        if (!whole && !split && f->units)
            break;
        if (split)
            rows = (chunks = room) * CHUNK;
        struct unit *u = &f->unit[f->units++];
        *u = (struct unit){.sequence = s,
                           .kv_head = f->next_head,
                           .first = begin,
                           .rows = rows,
                           .chunks = chunks,
                           .first_chunk = f->chunks,
                           .begins = f->next_chunk == 0,
                           .ends = !split};
        bool recurrent = !f->backward && rows <= RECURRENT_ROWS && u->begins;
        int64_t states = recurrent ? 0 : (chunks + 1) * f->state_floats * 4;
        int64_t per_row = f->backward ? round_up(f->group * rows * 4, 64) : 0;
        uintptr_t memory = (uintptr_t)f->memory + (uintptr_t)used;
        if (!recurrent) {
            u->s = (float *)memory;
            u->r = (float *)(memory + (uintptr_t)states);
            u->inverse = (float *)(memory + (uintptr_t)(2 * states));
            u->delta = (float *)(memory + (uintptr_t)(2 * states + per_row));
        }
        used += (f->backward ? 2 : 1) * states + 2 * per_row;
        room -= chunks;
        f->chunks += max_i64(chunks, 1);
        f->next_chunk = split ? f->next_chunk + chunks : 0;
        f->next_head += !split;
    }
    f->memory_bytes = max_i64(f->memory_bytes, used);
    return f->units > 0;
}

static void loop(const struct linear *f, int64_t items, parallel_fn *fn) {
    if (f->serial)
        fn((void *)(uintptr_t)f, 0, items, 0);
    else
        parallel_for(items, 1, fn, (void *)(uintptr_t)f);
}

static void wave_run(const struct linear *f) {
    int64_t slices = f->units * ((f->state_floats + SLICE - 1) / SLICE);
    loop(f, f->chunks, sum_keys);
    loop(f, slices, sum_forward);
    if (!f->backward) {
        loop(f, f->chunks, run_forward);
        const struct unit *u = &f->unit[f->units - 1];
        if (!u->ends)
            memcpy(f->carry, state_at(f, u->s, u->chunks), (size_t)f->state_floats * 4);
        return;
    }
    loop(f, f->chunks, sum_queries);
    loop(f, slices, sum_backward);
    loop(f, f->chunks, run_backward);
}

/* Rows of x that belong to no sequence get zeros. */
static void clear_gaps(const struct linear *f, const struct tensor *x) {
    int64_t next = 0;
    for (int64_t s = 0; s < f->c.sequences; s++) {
        matrix_clear(x, next, f->c.q_offsets[s]);
        next = f->c.q_offsets[s + 1];
    }
    matrix_clear(x, next, f->c.rows);
}

static tril_status run(struct linear *f, struct op_context *ctx, const char *name, double flops,
                       struct tril_error *err) {
    f->group = f->c.heads / f->c.kv_heads;
    f->ld = matrix_columns(f->c.width);
    f->state_floats = round_up((f->ld + 1) * f->ld, 16);
    f->serial = threads_count() == 1 || flops < SERIAL_FLOPS;
    f->memory = NULL;
    f->memory_bytes = 0;
    f->next_sequence = f->next_head = f->next_chunk = 0;
    while (wave_next(f)) /* once without memory, for the sizes; then for good */
        ;
    f->worker_bytes = round_up(worker_floats(f->ld) * 4, 4096) + 64 * 9;
    int64_t workers = f->worker_bytes * threads_count() + f->state_floats * 4;
    f->worker = op_scratch(ctx, workers + f->memory_bytes);
    if (!f->worker)
        return op_scratch_error(ctx, name, workers + f->memory_bytes, err);
    if (f->backward) {
        clear_gaps(f, &f->c.dq);
        clear_gaps(f, &f->c.dk);
        clear_gaps(f, &f->c.dv);
    } else
        clear_gaps(f, &f->c.o);
    f->memory = f->worker + workers;
    f->carry = (float *)(void *)(f->memory - f->state_floats * 4);
    f->next_sequence = f->next_head = f->next_chunk = 0;
    while (wave_next(f))
        wave_run(f);
    return TRIL_OK;
}

static tril_status forward(struct op_context *ctx, const struct tensor *args, const void *params,
                           struct tril_error *err) {
    struct linear f = {.backward = false};
    tril_status st = linear_attention_unpack_forward(&f.c, args, params, err);
    if (st != TRIL_OK)
        return st;
    double flops = op_info_get(OP_LINEAR_ATTENTION_FORWARD)->flops(args, params);
    return run(&f, ctx, "linear_attention_forward", flops, err);
}

static tril_status backward(struct op_context *ctx, const struct tensor *args, const void *params,
                            struct tril_error *err) {
    struct linear f = {.backward = true};
    tril_status st = linear_attention_unpack_backward(&f.c, args, params, err);
    if (st != TRIL_OK)
        return st;
    double flops = op_info_get(OP_LINEAR_ATTENTION_BACKWARD)->flops(args, params);
    return run(&f, ctx, "linear_attention_backward", flops, err);
}

void LEVEL(register_attention_linear)(struct backend *b) {
    b->table[OP_LINEAR_ATTENTION_FORWARD] = forward;
    b->table[OP_LINEAR_ATTENTION_BACKWARD] = backward;
}
