/* Loading: every name and shape is checked against the table before the model is allocated; then
 * the model is filled row by row, in pieces, transposed and converted on the way.
 *
 *   file (mapped, any float dtype, maybe transposed, maybe unaligned)
 *     -> stage (host, a few MB, logical layout) -> the backend's memory */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "base/threads.h"
#include "formats/safetensors.h"
#include "model/internal.h"

/* Bytes staged at a time. */
#define STAGE_BYTES ((int64_t)4 << 20)

/* Takes elements begin .. begin + count of a row, in the logical layout. */
typedef tril_status row_sink(void *arg, int row, int64_t begin, int64_t count, const void *data,
                             enum dtype t, struct tril_error *err);

/* ------------------------------------------------------------------ names */

/* The tensor of a part, or NULL. A base model saved without its head lacks the first component of
 * its names ("wte.weight", "layers.0. ..."), as do OpenAI's GPT-2 files. */
static const struct st_tensor *tensor_find(const struct safetensors *s, const char *name) {
    const struct st_tensor *t = safetensors_find(s, name);
    const char *dot = strchr(name, '.');
    if (!t && dot && (strncmp(name, "transformer.", 12) == 0 || strncmp(name, "model.", 6) == 0))
        t = safetensors_find(s, dot + 1);
    return t;
}

/* The tied head may stand in for the embedding. */
static const struct st_tensor *part_find(const struct safetensors *s, const struct param_table *t,
                                         const struct param_row *r, const struct param_part *p) {
    const struct st_tensor *found = tensor_find(s, p->name);
    if (!found && r->role == PARAM_TOKEN_EMBEDDING && !param_find(t, PARAM_HEAD, -1))
        found = safetensors_find(s, "lm_head.weight");
    return found;
}

static void shape_text(char *out, size_t size, const int64_t *shape, int rank) {
    size_t used = (size_t)snprintf(out, size, "[");
    for (int i = 0; i < rank && used < size; i++)
        used +=
            (size_t)snprintf(out + used, size - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (used < size)
        snprintf(out + used, size - used, "]");
}

static tril_status part_check(const struct st_tensor *t, const struct param_row *r,
                              const struct param_part *p, struct tril_error *err) {
    int64_t due[2] = {p->row_count, r->shape[1]};
    if (p->transposed) {
        due[0] = r->shape[1];
        due[1] = p->row_count;
    }
    bool same =
        t->rank == r->rank && t->shape[0] == due[0] && (r->rank == 1 || t->shape[1] == due[1]);
    if (!same) {
        char is[128], must[64];
        shape_text(is, sizeof is, t->shape, t->rank);
        shape_text(must, sizeof must, due, r->rank);
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: tensor \"%s\" has the shape %s, but the configuration asks for %s",
                         t->file, t->name, is, must);
    }
    if (t->dtype != DT_F32 && t->dtype != DT_BF16 && t->dtype != DT_F16 && t->dtype != DT_F64)
        return error_set(err, TRIL_ERR_UNSUPPORTED,
                         "%s: tensor \"%s\" holds %s; weights must be F32, BF16 or F16", t->file,
                         t->name, dtype_safetensors_name(t->dtype));
    return TRIL_OK;
}

/* Tensors that `transformers` wrote at some time and that hold no parameter: GPT-2's causal masks,
 * rotary frequencies, and the head of a tied model. */
static bool surplus_is_harmless(const struct st_tensor *t, const struct model_config *c) {
    static const char *const tails[] = {".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"};
    size_t n = strlen(t->name);
    for (size_t i = 0; i < sizeof tails / sizeof *tails; i++) {
        size_t k = strlen(tails[i]);
        if (n > k && strcmp(t->name + n - k, tails[i]) == 0)
            return true;
    }
    return c->tied && strcmp(t->name, "lm_head.weight") == 0 && t->rank == 2 &&
           t->shape[0] == c->vocab && t->shape[1] == c->dim;
}

/* Every parameter is there in its shape, and nothing else. `what` is the directory. */
static tril_status names_check(const struct safetensors *s, const struct param_table *t,
                               const struct model_config *c, const char *what,
                               struct tril_error *err) {
    tril_status st = TRIL_OK;
    size_t count = safetensors_count(s);
    bool *used = calloc(count + 1, sizeof *used);
    if (!used)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", what);
    for (int i = 0; i < t->count; i++) {
        const struct param_row *r = &t->rows[i];
        for (int k = 0; k < r->part_count; k++) {
            const struct st_tensor *found = part_find(s, t, r, &r->parts[k]);
            if (!found) {
                st = error_set(err, TRIL_ERR_FORMAT,
                               "%s: tensor \"%s\" is missing, which config.json asks for", what,
                               r->parts[k].name);
                goto done;
            }
            TRY(part_check(found, r, &r->parts[k], err));
            used[found - safetensors_at(s, 0)] = true;
        }
    }
    for (size_t i = 0; i < count; i++) {
        const struct st_tensor *extra = safetensors_at(s, i);
        if (!used[i] && !surplus_is_harmless(extra, c)) {
            st = error_set(err, TRIL_ERR_FORMAT,
                           "%s: tensor \"%.200s\" belongs to no parameter of the model that "
                           "config.json describes",
                           extra->file, extra->name);
            goto done;
        }
    }
done:
    free(used);
    return st;
}

/* ------------------------------------------------------------------ data */

struct transposition {
    char *to;         /* [rows, columns] of this piece */
    const char *from; /* [columns, stride]: the tensor, at the piece's first row */
    int64_t columns, stride;
    size_t size; /* of an element */
};

/* Rows [r0, r1) and columns [c0, c1) of the result, at most TILE each: whole runs are read, and the
 * turning happens in the first-level cache. `size` is a constant where it is inlined, so that the
 * compiler makes moves of the copies; the file's data may be unaligned. */
#define TILE 32
static inline __attribute__((always_inline)) void transpose_tile(const struct transposition *t,
                                                                 const size_t size, int64_t r0,
                                                                 int64_t r1, int64_t c0,
                                                                 int64_t c1) {
    char tile[TILE * TILE * 8];
    for (int64_t c = c0; c < c1; c++)
        memcpy(tile + (size_t)(c - c0) * TILE * size, t->from + (size_t)(c * t->stride + r0) * size,
               (size_t)(r1 - r0) * size);
    for (int64_t r = r0; r < r1; r++)
        for (int64_t c = c0; c < c1; c++)
            memcpy(t->to + (size_t)(r * t->columns + c) * size,
                   tile + (size_t)((c - c0) * TILE + r - r0) * size, size);
}

/* Rows [begin, end) of the result, TILE at most. */
static void transpose_rows(void *arg, int64_t begin, int64_t end, int worker) {
    const struct transposition *t = arg;
    (void)worker;
    for (int64_t c0 = 0; c0 < t->columns; c0 += TILE) {
        int64_t c1 = c0 + TILE < t->columns ? c0 + TILE : t->columns;
        if (t->size == 4)
            transpose_tile(t, 4, begin, end, c0, c1);
        else if (t->size == 2)
            transpose_tile(t, 2, begin, end, c0, c1);
        else
            transpose_tile(t, 8, begin, end, c0, c1);
    }
}

/* Gives one part's elements to the sink, through `stage` (STAGE_BYTES and at least a row). */
static tril_status part_read(const struct st_tensor *t, const struct param_row *r, int row,
                             const struct param_part *p, char *stage, int64_t stage_bytes,
                             row_sink *sink, void *arg, struct tril_error *err) {
    const size_t size = dtype_size(t->dtype);
    const int64_t columns = r->shape[1], base = p->row_begin * columns;
    tril_status st = TRIL_OK;
    if (!p->transposed && (uintptr_t)t->data % size == 0)
        return sink(arg, row, base, p->row_count * columns, t->data, t->dtype, err);
    int64_t rows = stage_bytes / (columns * (int64_t)size);
    for (int64_t at = 0; at < p->row_count; at += rows) {
        int64_t n = p->row_count - at < rows ? p->row_count - at : rows;
        if (p->transposed) {
            struct transposition w = {stage, (const char *)t->data + (size_t)at * size, columns,
                                      p->row_count, size};
            parallel_for(n, TILE, transpose_rows, &w);
        } else {
            memcpy(stage, (const char *)t->data + (size_t)(at * columns) * size,
                   (size_t)(n * columns) * size);
        }
        TRY(sink(arg, row, base + at * columns, n * columns, stage, t->dtype, err));
    }
done:
    return st;
}

/* A stage for the largest row of any part (8 bytes an element). */
static tril_status stage_create(const struct param_table *t, char **stage, int64_t *bytes,
                                struct tril_error *err) {
    *bytes = STAGE_BYTES;
    for (int i = 0; i < t->count; i++)
        if (t->rows[i].shape[1] * 8 > *bytes)
            *bytes = t->rows[i].shape[1] * 8;
    return mem_alloc((void **)stage, (size_t)*bytes, "reading weights", err);
}

static tril_status model_sink(void *arg, int row, int64_t begin, int64_t count, const void *data,
                              enum dtype t, struct tril_error *err) {
    return model_row_upload(arg, row, begin, count, data, t, err);
}

/* The file's row of the same parameter as the model's row r, which has the same shape. */
static tril_status row_of_file(const struct param_table *file, const struct param_row *r,
                               const char *dir, const struct param_row **out,
                               struct tril_error *err) {
    const struct param_row *f = param_find(file, r->role, r->layer);
    if (!f)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s has no %s, which the options given with it ask for", dir,
                         r->parts[0].name);
    if (f->rank != r->rank || f->shape[0] != r->shape[0] || f->shape[1] != r->shape[1])
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "%s: %s is [%lld, %lld], and the options given with it would make it "
                         "[%lld, %lld]; give none that change a parameter's shape",
                         dir, f->parts[0].name, (long long)f->shape[0], (long long)f->shape[1],
                         (long long)r->shape[0], (long long)r->shape[1]);
    *out = f;
    return TRIL_OK;
}

/* Overrides apply after the names are settled: they may change the model type, and with it names.
 */
tril_status model_load(struct model **out, const char *dir, const struct model_options *options,
                       struct op_context *ctx, struct tril_error *err) {
    tril_status st;
    struct model_config config;
    struct param_table table = {0};
    struct safetensors *s = NULL;
    struct model *m = NULL;
    char *stage = NULL;
    int64_t stage_bytes;
    *out = NULL;
    TRY(model_config_read(&config, dir, err));
    st = param_table_create(&table, &config, err);
    if (st != TRIL_OK) {
        error_prefix(err, "%s", dir);
        goto done;
    }
    TRY(safetensors_open(&s, dir, err));
    TRY(names_check(s, &table, &config, dir, err));
    if (options->overrides)
        TRY(model_config_override(&config, options->overrides, err));
    TRY(model_create(&m, &config, options, ctx, err));
    if (m->table.count < table.count)
        TRY(error_set(err, TRIL_ERR_ARGUMENT,
                      "%s has parameters that a model with the options given with it has not; give "
                      "none that drop parameters",
                      dir));
    TRY(stage_create(&table, &stage, &stage_bytes, err));
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = NULL;
        TRY(row_of_file(&table, &m->table.rows[i], dir, &r, err));
        for (int k = 0; k < r->part_count; k++) {
            const struct st_tensor *t = part_find(s, &table, r, &r->parts[k]);
            TRY(part_read(t, r, i, &r->parts[k], stage, stage_bytes, model_sink, m, err));
            safetensors_forget(s, t);
        }
        TRY(model_row_done(m, i, err));
    }
    *out = m;
    m = NULL;
done:
    mem_free(stage);
    model_free(m);
    safetensors_close(s);
    param_table_free(&table);
    return st;
}

/* ------------------------------------------------------------------ arenas */

struct arena_sink {
    const struct model *m;
    float *arena; /* the backend's memory */
    float *wide;  /* host, for conversion to fp32 */
};

#define WIDE_ELEMENTS ((int64_t)1 << 18)

static tril_status arena_sink_take(void *arg, int row, int64_t begin, int64_t count,
                                   const void *data, enum dtype t, struct tril_error *err) {
    struct arena_sink *a = arg;
    tril_status st = TRIL_OK;
    const struct backend *b = a->m->ctx->backend;
    float *to = a->arena + a->m->table.rows[row].offset + begin;
    if (t == DT_F32)
        return b->upload(a->m->ctx, to, data, count * (int64_t)sizeof *to, err);
    for (int64_t i = 0; i < count; i += WIDE_ELEMENTS) {
        int64_t n = count - i < WIDE_ELEMENTS ? count - i : WIDE_ELEMENTS;
        dtype_convert(a->wide, DT_F32, (const char *)data + (size_t)i * dtype_size(t), t,
                      (size_t)n);
        TRY(b->upload(a->m->ctx, to + i, a->wide, n * (int64_t)sizeof *to, err));
    }
done:
    return st;
}

tril_status model_arena_read(const struct model *m, float *const *arenas,
                             const char *const *prefixes, int count, const char *path,
                             struct tril_error *err) {
    tril_status st;
    struct safetensors *s = NULL;
    char *stage = NULL, name[192];
    int64_t stage_bytes;
    struct arena_sink sink = {.m = m};
    size_t found = 0;
    TRY(safetensors_open(&s, path, err));
    TRY(stage_create(&m->table, &stage, &stage_bytes, err));
    TRY(mem_alloc((void **)&sink.wide, WIDE_ELEMENTS * sizeof *sink.wide, "reading weights", err));
    /* First all checks, so that a bad file changes nothing. */
    for (int fill = 0; fill < 2; fill++) {
        for (int a = 0; a < count; a++) {
            sink.arena = arenas[a];
            for (int i = 0; i < m->table.count; i++) {
                const struct param_row *r = &m->table.rows[i];
                for (int k = 0; k < r->part_count; k++) {
                    snprintf(name, sizeof name, "%s%s", prefixes[a], r->parts[k].name);
                    const struct st_tensor *t = safetensors_find(s, name);
                    if (!t) {
                        st = error_set(err, TRIL_ERR_FORMAT, "%s: tensor \"%s\" is missing", path,
                                       name);
                        goto done;
                    }
                    if (fill) {
                        TRY(part_read(t, r, i, &r->parts[k], stage, stage_bytes, arena_sink_take,
                                      &sink, err));
                        safetensors_forget(s, t);
                    } else {
                        TRY(part_check(t, r, &r->parts[k], err));
                        found++;
                    }
                }
            }
        }
        if (found != safetensors_count(s)) {
            st = error_set(err, TRIL_ERR_FORMAT,
                           "%s holds %zu tensors, but the model has %zu; it belongs to another one",
                           path, safetensors_count(s), found);
            goto done;
        }
    }
done:
    mem_free(sink.wide);
    mem_free(stage);
    safetensors_close(s);
    return st;
}
