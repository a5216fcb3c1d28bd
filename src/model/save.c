/* Saving: the table's parts under their names, from the backend's memory, a few MB at a time;
 * GPT-2's transposed matrices one at a time in whole. Weights first and config.json last, each
 * under a temporary name until complete. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/memory.h"
#include "formats/safetensors.h"
#include "model/internal.h"

/* Elements converted and written at a time. */
#define PIECE ((int64_t)1 << 20)

/* Where the elements of a row come from: fp32 into host memory. */
struct source {
    const struct model *m;
    const float *arena; /* in the backend's memory; NULL: the masters, through model_row_download */
};

static tril_status source_read(const struct source *s, int row, int64_t begin, int64_t count,
                               float *host, struct tril_error *err) {
    if (!s->arena)
        return model_row_download(s->m, row, begin, count, host, err);
    return s->m->ctx->backend->download(s->m->ctx, host,
                                        s->arena + s->m->table.rows[row].offset + begin,
                                        count * (int64_t)sizeof *host, err);
}

struct buffers {
    float *wide;   /* [PIECE] */
    char *narrow;  /* [PIECE] of the file's dtype */
    float *matrix; /* the largest transposed part, or NULL */
};

/* Writes `n` <= PIECE floats. */
static tril_status write_piece(struct st_writer *w, const struct buffers *b, const float *data,
                               int64_t n, enum dtype t, struct tril_error *err) {
    if (t == DT_F32)
        return st_writer_write(w, data, (size_t)n * sizeof *data, err);
    dtype_convert(b->narrow, t, data, DT_F32, (size_t)n);
    return st_writer_write(w, b->narrow, (size_t)n * dtype_size(t), err);
}

static tril_status write_part(struct st_writer *w, const struct buffers *b, const struct source *s,
                              int row, const struct param_part *p, enum dtype t,
                              struct tril_error *err) {
    tril_status st = TRIL_OK;
    const int64_t columns = s->m->table.rows[row].shape[1];
    const int64_t base = p->row_begin * columns, count = p->row_count * columns;
    if (!p->transposed) {
        for (int64_t at = 0; at < count; at += PIECE) {
            int64_t n = count - at < PIECE ? count - at : PIECE;
            TRY(source_read(s, row, base + at, n, b->wide, err));
            TRY(write_piece(w, b, b->wide, n, t, err));
        }
        goto done;
    }
    TRY(source_read(s, row, base, count, b->matrix, err));
    for (int64_t at = 0; at < count; at += PIECE) { /* element (i, o) is matrix[o, i] */
        int64_t n = count - at < PIECE ? count - at : PIECE;
        int64_t i = at / p->row_count, o = at % p->row_count;
        for (int64_t k = 0; k < n; k++) {
            b->wide[k] = b->matrix[o * columns + i];
            if (++o == p->row_count) {
                o = 0;
                i++;
            }
        }
        TRY(write_piece(w, b, b->wide, n, t, err));
    }
done:
    return st;
}

/* All parts of all sources, in the table's order. */
static tril_status write_file(const struct model *m, const struct source *sources,
                              const char *const *prefixes, int count, const char *path,
                              enum dtype t, struct tril_error *err) {
    static const char *const metadata[] = {"format", "pt"};
    tril_status st = TRIL_OK;
    struct st_declare *tensors = NULL;
    char(*names)[192] = NULL;
    struct st_writer *w = NULL;
    struct buffers b = {0};
    size_t parts = 0, at = 0;
    int64_t largest = 0;
    for (int i = 0; i < m->table.count; i++) {
        const struct param_row *r = &m->table.rows[i];
        parts += (size_t)r->part_count;
        for (int k = 0; k < r->part_count; k++)
            if (r->parts[k].transposed && r->parts[k].row_count * r->shape[1] > largest)
                largest = r->parts[k].row_count * r->shape[1];
    }
    parts *= (size_t)count;
    tensors = calloc(parts + 1, sizeof *tensors);
    names = calloc(parts + 1, sizeof *names);
    if (!tensors || !names) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path);
        goto done;
    }
    TRY(mem_alloc((void **)&b.wide, PIECE * sizeof *b.wide, "writing weights", err));
    TRY(mem_alloc((void **)&b.narrow, PIECE * dtype_size(t), "writing weights", err));
    if (largest)
        TRY(mem_alloc((void **)&b.matrix, (size_t)largest * sizeof *b.matrix, "writing weights",
                      err));
    for (int a = 0; a < count; a++) {
        for (int i = 0; i < m->table.count; i++) {
            const struct param_row *r = &m->table.rows[i];
            for (int k = 0; k < r->part_count; k++, at++) {
                const struct param_part *p = &r->parts[k];
                snprintf(names[at], sizeof names[at], "%s%s", prefixes[a], p->name);
                tensors[at] = (struct st_declare){.name = names[at], .dtype = t, .rank = r->rank};
                tensors[at].shape[0] = p->transposed ? r->shape[1] : p->row_count;
                tensors[at].shape[1] = p->transposed ? p->row_count : r->shape[1];
            }
        }
    }
    TRY(st_writer_open(&w, path, tensors, parts, metadata, 1, err));
    for (int a = 0; a < count; a++)
        for (int i = 0; i < m->table.count; i++)
            for (int k = 0; k < m->table.rows[i].part_count; k++)
                TRY(write_part(w, &b, &sources[a], i, &m->table.rows[i].parts[k], t, err));
    st = st_writer_finish(w, err);
    w = NULL;
done:
    st_writer_abort(w);
    mem_free(b.wide);
    mem_free(b.narrow);
    mem_free(b.matrix);
    free(tensors);
    free(names);
    return st;
}

#define ARENAS_MAX 8

tril_status model_arena_write(const struct model *m, const float *const *arenas,
                              const char *const *prefixes, int count, const char *path,
                              enum dtype dtype, struct tril_error *err) {
    struct source sources[ARENAS_MAX];
    if (count < 1 || count > ARENAS_MAX)
        return error_set(err, TRIL_ERR_INTERNAL, "%d arenas cannot be written at once", count);
    for (int i = 0; i < count; i++)
        sources[i] = (struct source){m, arenas[i]};
    return write_file(m, sources, prefixes, count, path, dtype, err);
}

/* What `transformers` generates with by default. */
static json_t *generation_json(const struct model_config *c) {
    json_t *o = json_object();
    json_object_set_new(o, "_from_model_config", json_true());
    if (c->bos_id >= 0)
        json_object_set_new(o, "bos_token_id", json_integer(c->bos_id));
    if (c->eos_id >= 0)
        json_object_set_new(o, "eos_token_id", json_integer(c->eos_id));
    return o;
}

tril_status model_save(struct model *m, const char *dir, enum dtype saved, struct tril_error *err) {
    static const char *const prefixes[] = {""};
    tril_status st = TRIL_OK;
    const struct source masters = {m, NULL};
    char *weights = path_join(dir, "model.safetensors"), *config = path_join(dir, "config.json");
    char *generation = path_join(dir, "generation_config.json");
    json_t *c = model_config_to_json(&m->config, saved), *g = generation_json(&m->config);
    if (!weights || !config || !generation || !c || !g) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", dir);
        goto done;
    }
    if (!m->training) {
        st = error_set(err, TRIL_ERR_INTERNAL, "a model opened for inference cannot be saved");
        goto done;
    }
    TRY(write_file(m, &masters, prefixes, 1, weights, saved, err));
    TRY(json_write(g, generation, err));
    TRY(json_write(c, config, err));
done:
    json_decref(c);
    json_decref(g);
    free(weights);
    free(config);
    free(generation);
    return st;
}
