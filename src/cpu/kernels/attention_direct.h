/* The forward of flash attention for few query rows: decoding against a cache, which is read once,
 * as it lies, whatever its storage.
 *
 * A task is a split of a sequence's keys with the rows of several key/value heads, so that whole
 * rows of the cache are read together. It goes in steps of GRANULE keys, one step of K and, a block
 * of KEY_BLOCK keys behind it, one of V, for every head:
 *
 *   K   a panel of keys is transposed in the first-level cache (bf16 as pairs of channels), times
 *       all rows of the group; after a block's last step: its softmax
 *   V   converted in registers, times the probabilities of all rows of the group
 *
 * While a step is computed, the rows of the next one are fetched in the order of their addresses,
 * K and V as two streams, a few lines at a time: heads' pieces of rows, fetched by themselves,
 * reach two thirds of the bandwidth only. Rows that are a multiple of 1 KB apart expel each other
 * from the first-level cache, and rows of pages lie anywhere: pieces of those are copied before
 * use. The sums are those of attention_tile.h. */
#ifndef CPU_KERNELS_ATTENTION_DIRECT_H
#define CPU_KERNELS_ATTENTION_DIRECT_H

#include "cpu/kernels/attention_step.h"
#include "cpu/kernels/units.h"

#define SPLIT_KEYS 1024
#define LEAST_RUN 8         /* values of a page that are not copied */
#define GROUP_KEYS VF_WIDTH /* keys transposed together */
#define MOST_TILE (TILE_ROWS < 6 ? 4 : 6)

/* ------------------------------------------------------------------ the cache's rows */

/* k or v: its rows, and those of the next step that are being fetched. */
struct stream {
    const struct tensor *x, *scales;
    const char *base; /* row 0 of the unit's first head */
    int64_t step;     /* bytes from row to row */
    int64_t head_step, head_bytes;
    int64_t bytes;        /* of the unit's heads */
    int64_t first, count; /* keys being fetched, counted from the split's first */
};

struct direct {
    const struct forward *f;
    const struct unit *u;
    struct rows *b;
    int64_t first, end; /* keys of the split */
    struct stream k, v;
    uintptr_t at; /* being fetched: an address, and bytes left of its row */
    int64_t left, next;
    char *copy;              /* [GRANULE] pieces of rows */
    float scale[GRANULE];    /* of the pieces in use, of 8-bit integers */
    int64_t row[SPLIT_KEYS]; /* of k and v, with pages; -1: on one that is gone */
};

SIMD int64_t direct_row(const struct direct *t, int64_t j) {
    const struct attention_call *c = &t->f->c;
    return c->pages ? t->row[j - t->first] : c->kv_start[t->u->sequence] + j;
}

/* Begins with the next row of either stream; false: there is none. */
static __attribute__((noinline)) bool fetch_row(struct direct *t) {
    while (t->next < 2 * GRANULE) {
        int64_t i = t->next / 2;
        struct stream *s = t->next++ & 1 ? &t->v : &t->k;
        int64_t row = i < s->count ? direct_row(t, s->first + i) : -1;
        if (row >= 0) {
            t->at = (uintptr_t)(s->base + row * s->step);
            t->left = s->bytes;
            return true;
        }
    }
    return false;
}

/* Fetches some lines of what the next step reads. */
SIMD void fetch(struct direct *t, int lines) {
    if (t->left <= 0 && !fetch_row(t))
        return;
#pragma GCC unroll 16
    for (int i = 0; i < lines; i++) /* the last may lie behind the row */
        __builtin_prefetch((const void *)(t->at + 64 * (uintptr_t)i));
    t->at += 64 * (uintptr_t)lines;
    t->left -= 64 * lines;
}

/* Lines that a group of keys and two vectors of channels take up. */
SIMD int group_lines(enum dtype type) {
    int lines = (int)(GROUP_KEYS * PANEL * dtype_bytes(type) / 64);
    return lines > 0 ? lines : 1;
}

static void stream_open(struct direct *t, struct stream *s, const struct tensor *x,
                        const struct tensor *scales) {
    int64_t size = dtype_bytes(x->dtype), d = t->f->c.width;
    s->x = x;
    s->scales = scales;
    s->base = element(x, 0, t->u->kv_head);
    s->step = x->stride[0] * size;
    s->head_step = x->stride[1] * size;
    s->head_bytes = d * size;
    s->bytes = ((t->u->heads - 1) * x->stride[1] + d) * size;
    s->count = 0;
}

static void direct_open(struct direct *t, const struct forward *f, const struct unit *u,
                        struct rows *b, int64_t begin, int64_t end) {
    const struct attention_call *c = &f->c;
    int64_t s = u->sequence, size = c->params->page_size, *row = t->row;
    t->f = f;
    t->u = u;
    t->b = b;
    t->copy = b->copy;
    t->first = begin;
    t->end = end;
    for (int64_t j = begin, n; j < end && c->pages; j += n) {
        int64_t page = c->pages[s * c->page_columns + j / size], first = j % size;
        n = min_i64(size - first, end - j);
        for (int64_t i = first; i < first + n; i++)
            *row++ = page < 0 ? -1 : page * size + i;
    }
    stream_open(t, &t->k, &c->k, &c->k_scale);
    stream_open(t, &t->v, &c->v, &c->v_scale);
}

/* Lets the fetching of a step begin: keys from `k` on and values from `v` on (-1: none). */
static void direct_next(struct direct *t, int64_t k, int64_t v) {
    t->k.first = k;
    t->k.count = k < 0 ? 0 : min_i64(GRANULE, t->end - k);
    t->v.first = v;
    t->v.count = v < 0 ? 0 : min_i64(GRANULE, t->end - v);
    t->next = 0;
    t->left = 0;
}

/* Pieces of rows that belong to one head: key i at row + i step. */
struct pieces {
    const char *row;
    int64_t step;
    const float *scale; /* of 8-bit integers */
};

SIMD void piece_copy(char *to, const char *from, int64_t bytes) {
    int64_t i = 0;
    for (; i + 4 * VF_WIDTH <= bytes; i += 4 * VF_WIDTH)
        *(vi_memory *)(void *)(to + i) = *(const vi_memory *)(const void *)(from + i);
    if (i < bytes)
        memcpy(to + i, from + i, (size_t)(bytes - i));
}

/* How many of the keys [j, j + n) lie behind one another. */
static int64_t direct_run(const struct direct *t, int64_t j, int64_t n) {
    if (!t->f->c.pages)
        return n;
    const int64_t *row = t->row + (j - t->first);
    int64_t i = 0;
    while (i < n && row[i] >= 0 && row[i] == row[0] + i)
        i++;
    return i;
}

/* Keys [j, j + n) of a head of the unit: at most GRANULE. Beyond the split's end there is anything
 * (nobody sees it, and there are no values of it); missing keys, which nobody sees, are zeros. */
static struct pieces direct_pieces(struct direct *t, const struct stream *s, int64_t head,
                                   int64_t j, int64_t n) {
    const float *scales = s->scales->data;
    int64_t there = min_i64(n, t->end - j), heads = t->f->c.kv_heads;
    const char *base = s->base + head * s->head_step;
    for (int64_t i = 0; scales && i < there; i++) {
        int64_t row = direct_row(t, j + i);
        t->scale[i] = row < 0 ? 0 : scales[row * heads + t->u->kv_head + head];
    }
    if (there == n && direct_run(t, j, n) == n)
        return (struct pieces){base + direct_row(t, j) * s->step, s->step, t->scale};
    for (int64_t i = 0; i < there; i++) {
        int64_t row = direct_row(t, j + i);
        char *to = t->copy + i * s->head_bytes;
        if (row < 0)
            memset(to, 0, (size_t)s->head_bytes);
        else
            piece_copy(to, base + row * s->step, s->head_bytes);
    }
    return (struct pieces){t->copy, s->head_bytes, t->scale};
}

/* ------------------------------------------------------------------ one task */

/* A block of keys under way, and what some row of head k sees of it: [from, to). */
struct direct_block {
    int64_t j0;
    float *s;
    int64_t from[ROW_BLOCK], to[ROW_BLOCK];
    bool masked[ROW_BLOCK];
    uint64_t words[ROW_BLOCK];
    float correction[ROW_BLOCK];
};

/* ------------------------------------------------------------------ K */

/* Transposes `keys` keys (a multiple of GROUP_KEYS) into a panel [d][keys] of fp32, or of bf16 in
 * [d / 2][keys] pairs of channels, the last one filled up with a zero. */
SIMD void direct_panel_as(float *out, struct pieces p, int64_t keys, int64_t d, struct direct *w,
                          enum dtype type) {
    for (int64_t j = 0; j < keys; j += GROUP_KEYS) {
        vf factor = type == DT_I8 ? vf_load(p.scale + j) : vf_zero(), x[VF_WIDTH];
        const char *row[VF_WIDTH];
        float *to = out + j;
        int64_t t = 0;
        for (int i = 0; i < VF_WIDTH; i++)
            row[i] = p.row + (j + i) * p.step;
        for (; t + PANEL <= d; t += PANEL) {
            fetch(w, group_lines(type));
            if (type == DT_BF16) {
                load_transposed_units(row, 2 * t, x);
#pragma GCC unroll 16
                for (int c = 0; c < VF_WIDTH; c++, to += keys)
                    vf_store(to, x[c]);
            } else {
                transpose_channels(to, keys, row, t, factor, type);
                to += PANEL * keys;
            }
        }
        if (type == DT_BF16 && t < d) {
            int n = (int)(d - t);
            for (int i = 0; i < VF_WIDTH; i++)
                x[i] = (vf)vu_load_bytes(row[i] + 2 * t, 2 * n);
            transpose(x);
            for (int c = 0; c < (n + 1) / 2; c++, to += keys)
                vf_store(to, x[c]);
            continue;
        }
        for (; t < d; t += VF_WIDTH, to += VF_WIDTH * keys) {
            int n = (int)min_i64(VF_WIDTH, d - t);
            load_transposed(row, type, t, n, x);
            for (int c = 0; c < n; c++)
                vf_store(to + c * keys, type == DT_I8 ? x[c] * factor : x[c]);
        }
    }
}
static __attribute__((noinline)) void direct_panel(float *out, struct pieces p, int64_t keys,
                                                   int64_t d, struct direct *w, enum dtype type) {
    PACK_AS(direct_panel_as, type, out, p, keys, d, w);
}

SIMD vf bf16_first(vf pair) {
    return (vf)((vu)pair << 16);
}
SIMD vf bf16_second(vf pair) {
    return (vf)((vu)pair & (vu)vi_set((int32_t)0xffff0000u));
}

/* s [rows, vectors VF_WIDTH] = q k^T for a panel of as many keys; as tile(), which serves where the
 * panel is fp32. */
SIMD void direct_tile_scores(int rows, int vectors, bool pairs, const float *q, int64_t width,
                             int64_t d, const float *panel, float *s) {
    const int64_t keys = vectors * VF_WIDTH;
    vf acc[MOST_TILE][4];
    if (!pairs) {
        tile(rows, vectors, START_ZERO, d, q, width, 1, panel, keys, s, KEY_BLOCK, NULL);
        return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            acc[r][v] = vf_zero();
    for (int64_t t = 0; t + 2 <= d; t += 2, panel += keys)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vf x[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                vf pair = vf_load(panel + v * VF_WIDTH);
                x[v] = half ? bf16_second(pair) : bf16_first(pair);
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                vf y = vf_set(q[r * width + t + half]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    acc[r][v] = vf_fma(y, x[v], acc[r][v]);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            if (d % 2)
                acc[r][v] = vf_fma(vf_set(q[r * width + d - 1]),
                                   bf16_first(vf_load(panel + v * VF_WIDTH)), acc[r][v]);
            vf_store(s + r * KEY_BLOCK + v * VF_WIDTH, acc[r][v]);
        }
}

/* Rows of a head go in tiles of 6, 4, 2 or 1. */
SIMD int64_t direct_tile(int64_t rows) {
    return MOST_TILE == 6 && (rows >= 6 && rows != 8) ? 6 : rows >= 4 ? 4 : rows;
}

#define FEW_ROWS 2 /* up to here wider panels, to have enough sums under way */
#define WIDE (VF_WIDTH < 16 ? 4 : 2)

SIMD void direct_products_as(const float *q, int64_t rows, int64_t width, int64_t d,
                             const float *panel, float *s, bool pairs) {
    if (rows == 1)
        direct_tile_scores(1, WIDE, pairs, q, width, d, panel, s);
    else if (rows == 2)
        direct_tile_scores(2, WIDE, pairs, q, width, d, panel, s);
    for (int64_t n, left = rows > FEW_ROWS ? rows : 0; left > 0; left -= n) {
        n = direct_tile(left);
        if (n == 6)
            direct_tile_scores(MOST_TILE, 2, pairs, q, width, d, panel, s);
        else if (n == 4)
            direct_tile_scores(4, 2, pairs, q, width, d, panel, s);
        else
            direct_tile_scores(2, 2, pairs, q, width, d, panel, s);
        q += n * width;
        s += n * KEY_BLOCK;
    }
}
static __attribute__((noinline)) void direct_products(const float *q, int64_t rows, int64_t width,
                                                      int64_t d, const float *panel, float *s,
                                                      bool pairs) {
    if (pairs)
        direct_products_as(q, rows, width, d, panel, s, true);
    else
        direct_products_as(q, rows, width, d, panel, s, false);
}

/* Scores of a head's rows with the keys of a step from j on. */
static void direct_scores(struct direct *t, const struct direct_block *k, int64_t head,
                          int64_t rows, int64_t j) {
    const struct forward *f = t->f;
    float *s = k->s + head * rows * KEY_BLOCK, *panel = t->b->block;
    int64_t keys = rows <= FEW_ROWS ? WIDE * VF_WIDTH : PANEL, d = f->c.width;
    int64_t from = (k->j0 + k->from[head]) / keys * keys, to = k->j0 + k->to[head];
    enum dtype type = f->c.k.dtype;
    for (int64_t i = max_i64(from, j); i < j + GRANULE && i < to; i += keys) {
        direct_panel(panel, direct_pieces(t, &t->k, head, i, keys), keys, d, t, type);
        direct_products(t->b->q + head * rows * f->width, rows, f->width, d, panel, s + (i - k->j0),
                        type == DT_BF16);
    }
}

/* ------------------------------------------------------------------ V */

/* Two vectors of values: of bf16 the even and the odd channels, else in order. */
SIMD void direct_pair(const char *row, enum dtype type, int64_t c, vf factor, vf x[2]) {
    if (type == DT_BF16) {
        vf both = vf_load((const float *)(const void *)(row + 2 * c));
        x[0] = bf16_first(both);
        x[1] = bf16_second(both);
        return;
    }
    x[0] = load_scaled(row, type, c, VF_WIDTH, factor);
    x[1] = load_scaled(row, type, c + VF_WIDTH, VF_WIDTH, factor);
}

/* o = correction o + p V (correction NULL: 1) for n keys and the channels from c on: two vectors,
 * or the first `lanes` of one. */
SIMD void direct_tile_values(int rows, int vectors, int lanes, int64_t n, const float *p,
                             struct pieces list, int64_t c, float *o, int64_t width,
                             const float *correction, enum dtype type) {
    vf acc[MOST_TILE][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            acc[r][v] = vf_load(o + r * width + c + v * VF_WIDTH);
            if (correction)
                acc[r][v] *= vf_set(correction[r]);
        }
    for (int64_t j = 0; j < n; j++) {
        vf x[2], factor = vf_set(type == DT_I8 ? list.scale[j] : 1.0f);
        const char *row = list.row + j * list.step;
        if (vectors == 2)
            direct_pair(row, type, c, factor, x);
        else
            x[0] = load_scaled(row, type, c, lanes, factor);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vf y = vf_set(p[r * KEY_BLOCK + j]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                acc[r][v] = vf_fma(y, x[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            vf_store(o + r * width + c + v * VF_WIDTH, acc[r][v]);
}

SIMD void direct_tile_rows(int rows, int64_t d, int64_t n, const float *p, struct pieces list,
                           float *o, int64_t width, const float *correction, struct direct *w,
                           enum dtype type) {
    int64_t c = 0;
    for (; c + PANEL <= d; c += PANEL) {
        for (int64_t j = 0; j < n; j += GROUP_KEYS)
            fetch(w, group_lines(type));
        direct_tile_values(rows, 2, VF_WIDTH, n, p, list, c, o, width, correction, type);
    }
    for (; c < d; c += VF_WIDTH) {
        int lanes = (int)min_i64(VF_WIDTH, d - c);
        if (lanes == VF_WIDTH)
            direct_tile_values(rows, 1, VF_WIDTH, n, p, list, c, o, width, correction, type);
        else
            direct_tile_values(rows, 1, lanes, n, p, list, c, o, width, correction, type);
    }
}

SIMD void direct_values_as(int64_t rows, int64_t d, int64_t n, const float *p, struct pieces list,
                           float *o, int64_t width, const float *correction, struct direct *w,
                           enum dtype type) {
    for (int64_t k; rows > 0; rows -= k, p += k * KEY_BLOCK, o += k * width) {
        k = direct_tile(rows);
        if (k == 6)
            direct_tile_rows(MOST_TILE, d, n, p, list, o, width, correction, w, type);
        else if (k == 4)
            direct_tile_rows(4, d, n, p, list, o, width, correction, w, type);
        else if (k == 2)
            direct_tile_rows(2, d, n, p, list, o, width, correction, w, type);
        else
            direct_tile_rows(1, d, n, p, list, o, width, correction, w, type);
        if (correction)
            correction += k;
    }
}
static __attribute__((noinline)) void direct_values(int64_t rows, int64_t d, int64_t n,
                                                    const float *p, struct pieces list, float *o,
                                                    int64_t width, const float *correction,
                                                    struct direct *w, enum dtype type) {
    PACK_AS(direct_values_as, type, rows, d, n, p, list, o, width, correction, w);
}

/* The outputs of a head's rows and the values of a step from j on. */
static void direct_outputs(struct direct *t, const struct direct_block *k, int64_t head,
                           int64_t rows, int64_t j) {
    const struct forward *f = t->f;
    int64_t from = k->j0 + k->from[head], to = min_i64(k->j0 + k->to[head], j + GRANULE);
    const float *correction = from < j ? NULL : k->correction + head * rows;
    from = max_i64(from, j);
    if (from < to)
        direct_values(rows, f->c.width, to - from, k->s + head * rows * KEY_BLOCK + from - k->j0,
                      direct_pieces(t, &t->v, head, from, to - from),
                      t->b->part.o + head * rows * f->width, f->width, correction, t, f->c.v.dtype);
}

/* Where bf16 values left the even and the odd channels of o apart, puts them in order. */
static void direct_order(const struct forward *f, float *o) {
    float both[PANEL];
    for (int64_t c = 0; c + PANEL <= f->c.width && f->c.v.dtype == DT_BF16; c += PANEL) {
        for (int i = 0; i < VF_WIDTH; i++) {
            both[2 * i] = o[c + i];
            both[2 * i + 1] = o[c + VF_WIDTH + i];
        }
        memcpy(o + c, both, sizeof both);
    }
}

/* ------------------------------------------------------------------ a split */

/* The rows of one head. */
static struct rows direct_head(const struct rows *b, int64_t head, int64_t width) {
    struct rows h = *b;
    int64_t r = head * b->padded_each;
    h.count = b->each;
    h.padded = b->padded_each;
    h.seen += r;
    h.row += r;
    h.position += r;
    h.head += r;
    h.index += r;
    h.range.kv_head += head;
    h.part.o += r * width;
    h.part.m += r;
    h.part.l += r * VF_WIDTH;
    return h;
}

/* Keys [begin, end) of a split, at most SPLIT_KEYS, into b->part. */
static void direct_split(const struct forward *f, const struct unit *u, struct rows *b,
                         int64_t begin, int64_t end) {
    struct direct t;
    struct direct_block block[2];
    int64_t visited[SPLIT_KEYS / KEY_BLOCK], blocks = 0, rows = b->padded_each;
    block[0].s = b->scores;
    block[1].s = b->scores + ROW_BLOCK * KEY_BLOCK;
    state_clear(&b->part, b->count, f->width);
    direct_open(&t, f, u, b, begin, end);
    for (int64_t j0 = begin; j0 < end; j0 += KEY_BLOCK)
        if (rows_any(f, b, j0, min_i64(j0 + KEY_BLOCK, end)))
            visited[blocks++] = j0;
    for (int64_t n = 0; n <= blocks; n++) {
        struct direct_block *k = &block[n & 1];
        const struct direct_block *v = &block[(n & 1) ^ 1];
        for (int64_t head = 0; n < blocks && head < b->heads; head++) {
            struct rows h = direct_head(b, head, f->width);
            const uint64_t *mask;
            k->j0 = visited[n];
            if (!tile_keys(f, &h, 0, rows, k->j0, end, &k->from[head], &k->to[head],
                           k->words + head * rows, &mask))
                k->from[head] = k->to[head] = 0;
            k->masked[head] = mask != NULL;
        }
        for (int64_t g = 0; g < KEY_BLOCK; g += GRANULE) {
            bool last = g + GRANULE == KEY_BLOCK;
            int64_t next = n + last, at = last ? 0 : g + GRANULE;
            direct_next(&t, next < blocks ? visited[next] + at : -1,
                        next > 0 && next <= blocks ? visited[next - 1] + at : -1);
            for (int64_t head = 0; n < blocks && head < b->heads; head++)
                direct_scores(&t, k, head, rows, k->j0 + g);
            for (int64_t head = 0; n > 0 && head < b->heads; head++)
                direct_outputs(&t, v, head, rows, v->j0 + g);
        }
        for (int64_t head = 0; n < blocks && head < b->heads; head++) {
            struct rows h = direct_head(b, head, f->width);
            int64_t panel = rows <= FEW_ROWS ? WIDE * VF_WIDTH : PANEL;
            if (k->to[head] == 0)
                continue;
            h.s = k->s + head * rows * KEY_BLOCK;
            softmax_step(f, &h, 0, rows, k->j0, k->from[head] / panel * (panel / VF_WIDTH),
                         round_up(k->to[head], panel) / VF_WIDTH,
                         k->masked[head] ? k->words + head * rows : NULL,
                         k->correction + head * rows);
        }
    }
}

#endif
