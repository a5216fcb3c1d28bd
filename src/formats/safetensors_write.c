/* Writing: the header first, padded with blanks so that the data begin at a multiple of 64; then
 * the tensors in the order declared; all of it under a temporary name until it is complete. */
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/memory.h"
#include "formats/safetensors.h"

#define HEADER_LIMIT 100000000
#define DATA_ALIGN 64

struct st_writer {
    struct file_writer *file;
    char *path;
    size_t expected, written;
};

static void writer_free(struct st_writer *w) {
    file_writer_abort(w->file);
    free(w->path);
    free(w);
}

/* Adds the tensor at byte *at of the data; moves *at behind it. */
static tril_status declare(json_t *header, const struct st_declare *t, const char *path, size_t *at,
                           struct tril_error *err) {
    size_t bytes = dtype_size(t->dtype), end;
    bool good = bytes > 0 && t->rank >= 0 && t->rank <= ST_MAX_RANK && *at % bytes == 0 &&
                strcmp(t->name, "__metadata__") != 0 && !json_object_get(header, t->name);
    for (int i = 0; good && i < t->rank; i++)
        good = t->shape[i] >= 0 && size_mul(bytes, (size_t)t->shape[i], &bytes);
    if (!good || !size_add(*at, bytes, &end) || end > INT64_MAX)
        return error_set(
            err, TRIL_ERR_INTERNAL,
            "cannot write %s: tensor \"%.60s\" is declared twice, unaligned or with an "
            "impossible shape",
            path, t->name);
    json_t *shape = json_array();
    for (int i = 0; i < t->rank; i++)
        json_array_append_new(shape, json_integer(t->shape[i]));
    json_t *o = json_pack("{s:s, s:o, s:[I,I]}", "dtype", dtype_safetensors_name(t->dtype), "shape",
                          shape, "data_offsets", (json_int_t)*at, (json_int_t)end);
    if (!o || json_object_set_new(header, t->name, o) != 0)
        return error_set(err, TRIL_ERR_INTERNAL,
                         "cannot write %s: the name of tensor \"%.60s\" is not valid UTF-8", path,
                         t->name);
    *at = end;
    return TRIL_OK;
}

tril_status st_writer_open(struct st_writer **out, const char *path,
                           const struct st_declare *tensors, size_t count,
                           const char *const *metadata, size_t pairs, struct tril_error *err) {
    static const char blanks[DATA_ALIGN] = "                                                      "
                                           "          ";
    tril_status st = TRIL_OK;
    char *text = NULL;
    unsigned char length[8];
    json_t *header = json_object();
    struct st_writer *w = calloc(1, sizeof *w);
    *out = NULL;
    if (!w || !header || !(w->path = strdup(path))) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path);
        goto done;
    }
    if (pairs > 0) {
        json_t *meta = json_object();
        for (size_t i = 0; i < pairs; i++)
            json_object_set_new(meta, metadata[2 * i], json_string(metadata[2 * i + 1]));
        json_object_set_new(header, "__metadata__", meta);
    }
    for (size_t i = 0; i < count; i++)
        TRY(declare(header, &tensors[i], path, &w->expected, err));
    text = json_dumps(header, JSON_COMPACT);
    size_t used = text ? strlen(text) : 0;
    size_t padding = (2 * DATA_ALIGN - (used + 8) % DATA_ALIGN) % DATA_ALIGN;
    if (!text || used + padding > HEADER_LIMIT) {
        st = error_set(err, text ? TRIL_ERR_UNSUPPORTED : TRIL_ERR_MEMORY,
                       text ? "cannot write %s: its header would exceed 100 MB"
                            : "not enough memory to write %s",
                       path);
        goto done;
    }
    for (int i = 0; i < 8; i++)
        length[i] = (unsigned char)((uint64_t)(used + padding) >> (8 * i));
    TRY(file_writer_open(&w->file, path, err));
    TRY(file_writer_write(w->file, length, sizeof length, err));
    TRY(file_writer_write(w->file, text, used, err));
    TRY(file_writer_write(w->file, blanks, padding, err));
    *out = w;
    w = NULL;
done:
    if (w)
        writer_free(w);
    free(text);
    json_decref(header);
    return st;
}

tril_status st_writer_write(struct st_writer *w, const void *data, size_t bytes,
                            struct tril_error *err) {
    if (bytes > w->expected - w->written)
        return error_set(err, TRIL_ERR_INTERNAL, "cannot write %s: more data than declared",
                         w->path);
    w->written += bytes;
    return file_writer_write(w->file, data, bytes, err);
}

tril_status st_writer_finish(struct st_writer *w, struct tril_error *err) {
    tril_status st;
    if (w->written != w->expected) {
        st = error_set(err, TRIL_ERR_INTERNAL, "cannot write %s: less data than declared", w->path);
    } else {
        st = file_writer_commit(w->file, err);
        w->file = NULL;
    }
    writer_free(w);
    return st;
}

void st_writer_abort(struct st_writer *w) {
    if (w)
        writer_free(w);
}
