/* Reading. A file is checked in whole before any of it is used: the header's length against the
 * file's size, then the JSON, then every tensor's shape against its bytes, and last that the
 * tensors, sorted by offset, cover the data exactly. Lookup is a binary search by name: no input
 * can make it slow. */
#include "formats/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/memory.h"

#define HEADER_LIMIT ((uint64_t)100000000)
#define SHARD_LIMIT 10000

struct shard {
    char *path;
    struct file_map map;
    json_t *header; /* owns the tensors' names and the metadata */
};

struct safetensors {
    struct shard *shards;
    size_t shard_count;
    struct st_tensor *tensors; /* by name */
    size_t count;
};

void safetensors_close(struct safetensors *s) {
    if (!s)
        return;
    for (size_t i = 0; i < s->shard_count; i++) {
        json_decref(s->shards[i].header);
        file_map_close(&s->shards[i].map);
        free(s->shards[i].path);
    }
    free(s->shards);
    free(s->tensors);
    free(s);
}

static tril_status no_memory(const char *path, struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", path);
}

/* A name from the file, for a message: cut short, and safe to print. */
struct shown {
    char text[72];
};
static struct shown show(const char *name) {
    struct shown s;
    size_t n = strlen(name), keep = n > 60 ? 57 : n;
    while (keep < n && keep > 0 && ((unsigned char)name[keep] & 0xc0) == 0x80)
        keep--;
    for (size_t i = 0; i < keep; i++)
        s.text[i] = (unsigned char)name[i] < 32 || name[i] == 127 ? '?' : name[i];
    snprintf(s.text + keep, sizeof s.text - keep, "%s", keep < n ? "..." : "");
    return s;
}

static bool dtype_find(const char *name, enum dtype *out) {
    for (int t = 0; t < DT_COUNT; t++) {
        if (strcmp(dtype_safetensors_name((enum dtype)t), name) == 0) {
            *out = (enum dtype)t;
            return true;
        }
    }
    return false;
}

/* An entry of the header. `data` and `size` are those of the file's data section. */
static tril_status tensor_parse(struct st_tensor *t, const char *name, const json_t *o,
                                const char *path, const unsigned char *data, size_t size,
                                struct tril_error *err) {
    const json_t *dtype = json_object_get(o, "dtype"), *shape = json_object_get(o, "shape");
    const json_t *offsets = json_object_get(o, "data_offsets");
    const struct shown shown = show(name);
    const char *what = shown.text;
    if (!json_is_string(dtype) || !json_is_array(shape) || !json_is_array(offsets) ||
        json_array_size(offsets) != 2)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: tensor \"%s\" must have a dtype, a shape and two data_offsets", path,
                         what);
    if (!dtype_find(json_string_value(dtype), &t->dtype))
        return error_set(err, TRIL_ERR_FORMAT, "%s: tensor \"%s\" has the unknown dtype \"%s\"",
                         path, what, show(json_string_value(dtype)).text);
    if (json_array_size(shape) > ST_MAX_RANK)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: tensor \"%s\" has %zu dimensions; at most %d are supported", path,
                         what, json_array_size(shape), ST_MAX_RANK);
    t->name = name;
    t->file = path;
    t->rank = (int)json_array_size(shape);
    t->bytes = dtype_size(t->dtype);
    bool fits = true;
    for (int i = 0; i < t->rank; i++) {
        const json_t *n = json_array_get(shape, (size_t)i);
        if (!json_is_integer(n) || json_integer_value(n) < 0)
            return error_set(err, TRIL_ERR_FORMAT,
                             "%s: the shape of tensor \"%s\" must be integers from 0 to 2^63 - 1",
                             path, what);
        t->shape[i] = json_integer_value(n);
        fits = fits && size_mul(t->bytes, (size_t)t->shape[i], &t->bytes);
    }
    if (!fits)
        return error_set(err, TRIL_ERR_FORMAT, "%s: the size of tensor \"%s\" overflows", path,
                         what);
    const json_t *b = json_array_get(offsets, 0), *e = json_array_get(offsets, 1);
    if (!json_is_integer(b) || !json_is_integer(e) || json_integer_value(b) < 0 ||
        json_integer_value(e) < json_integer_value(b))
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: the data_offsets of tensor \"%s\" must be two integers, the second "
                         "not below the first",
                         path, what);
    uint64_t begin = (uint64_t)json_integer_value(b), end = (uint64_t)json_integer_value(e);
    if (end > size)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: tensor \"%s\" ends at byte %llu of the data, but there are only %zu; "
                         "the file is cut short",
                         path, what, (unsigned long long)end, size);
    if (end - begin != t->bytes)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: tensor \"%s\" needs %zu bytes by its shape and dtype, but its "
                         "data_offsets span %llu",
                         path, what, t->bytes, (unsigned long long)(end - begin));
    t->data = data ? data + begin : NULL;
    return TRIL_OK;
}

static int compare_places(const void *a, const void *b) {
    const struct st_tensor *x = a, *y = b;
    if (x->data != y->data)
        return (uintptr_t)x->data < (uintptr_t)y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

/* The tensors of one file, sorted by place, must follow each other without overlap or hole. */
static tril_status cover_check(const struct st_tensor *t, size_t count, const char *path,
                               const unsigned char *data, size_t size, struct tril_error *err) {
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        size_t begin = data ? (size_t)((const unsigned char *)t[i].data - data) : 0;
        if (begin != at)
            return error_set(err, TRIL_ERR_FORMAT,
                             begin < at ? "%s: tensor \"%s\" overlaps the one before it (byte %zu "
                                          "of the data, where %zu is due)"
                                        : "%s: before tensor \"%s\" there is a hole in the data "
                                          "(byte %zu, where %zu is due)",
                             path, show(t[i].name).text, begin, at);
        at += t[i].bytes;
    }
    if (at != size)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: %zu bytes follow the last tensor; the file is damaged", path,
                         size - at);
    return TRIL_OK;
}

static tril_status metadata_check(const json_t *meta, const char *path, struct tril_error *err) {
    const char *key;
    const json_t *value;
    bool good = json_is_object(meta);
    if (good)
        json_object_foreach((json_t *)(uintptr_t)meta, key, value) {
            good = good && json_is_string(value);
        }
    if (!good)
        return error_set(err, TRIL_ERR_FORMAT,
                         "%s: __metadata__ must be an object whose values are strings", path);
    return TRIL_OK;
}

/* Opens one file into the next shard, and appends its tensors. */
static tril_status shard_open(struct safetensors *s, const char *path, struct tril_error *err) {
    struct shard *f = &s->shards[s->shard_count++];
    tril_status st;
    char *name = NULL;
    uint64_t length = 0;
    if (!(f->path = strdup(path))) {
        st = no_memory(path, err);
        goto done;
    }
    path = f->path;
    TRY(file_map_open(&f->map, path, err));
    if (f->map.size < 8) {
        st = error_set(err, TRIL_ERR_FORMAT,
                       "%s has only %zu bytes; a safetensors file begins with an 8-byte length",
                       path, f->map.size);
        goto done;
    }
    for (int i = 7; i >= 0; i--)
        length = length << 8 | f->map.data[i];
    if (length > HEADER_LIMIT || length > f->map.size - 8) {
        st = error_set(err, TRIL_ERR_FORMAT,
                       length > HEADER_LIMIT
                           ? "%s: the header would be %llu bytes long, more than the 100,000,000 "
                             "allowed; this is no safetensors file"
                           : "%s: the header of %llu bytes reaches beyond the end of the file; the "
                             "file is cut short",
                       path, (unsigned long long)length);
        goto done;
    }
    if (asprintf(&name, "%s: header", path) < 0) {
        name = NULL;
        st = no_memory(path, err);
        goto done;
    }
    const unsigned char *data = f->map.data + 8 + length;
    size_t size = f->map.size - 8 - (size_t)length;
    TRY(json_parse(&f->header, (const char *)f->map.data + 8, (size_t)length, name, err));
    if (!json_is_object(f->header)) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s: the header must be a JSON object", path);
        goto done;
    }
    size_t entries = json_object_size(f->header);
    struct st_tensor *grown = reallocarray(s->tensors, s->count + entries + 1, sizeof *grown);
    if (!grown) {
        st = no_memory(path, err);
        goto done;
    }
    s->tensors = grown;
    struct st_tensor *first = s->tensors + s->count;
    size_t count = 0;
    const char *key;
    json_t *value;
    json_object_foreach(f->header, key, value) {
        if (strcmp(key, "__metadata__") == 0) {
            TRY(metadata_check(value, path, err));
            continue;
        }
        first[count] = (struct st_tensor){0};
        TRY(tensor_parse(&first[count], key, value, path, data, size, err));
        count++;
    }
    if (count > 0)
        qsort(first, count, sizeof *first, compare_places);
    TRY(cover_check(first, count, path, data, size, err));
    s->count += count;
done:
    free(name);
    return st;
}

/* After all shards: sorted by name, each name once. */
static tril_status names_sort(struct safetensors *s, struct tril_error *err) {
    if (s->count > 0)
        qsort(s->tensors, s->count, sizeof *s->tensors, compare_names);
    for (size_t i = 1; i < s->count; i++)
        if (strcmp(s->tensors[i - 1].name, s->tensors[i].name) == 0)
            return error_set(err, TRIL_ERR_FORMAT, "tensor \"%s\" is in both %s and %s",
                             show(s->tensors[i].name).text, s->tensors[i - 1].file,
                             s->tensors[i].file);
    return TRIL_OK;
}

/* A file's name that cannot lead out of its directory. */
static bool name_is_plain(const char *name) {
    return name[0] && !strchr(name, '/') && strcmp(name, ".") != 0 && strcmp(name, "..") != 0 &&
           strlen(name) < 256;
}

/* The shards that an index names; then every entry of the index must be where it says. */
static tril_status index_open(struct safetensors *s, const char *dir, const char *path,
                              struct tril_error *err) {
    json_t *index = NULL, *files = NULL;
    const json_t *map;
    const char *key;
    json_t *value;
    char *joined = NULL;
    tril_status st;
    TRY(json_read(&index, path, HEADER_LIMIT, err));
    map = json_is_object(index) ? json_object_get(index, "weight_map") : NULL;
    if (!json_is_object(map)) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s: the object \"weight_map\" is missing", path);
        goto done;
    }
    files = json_object();
    json_object_foreach((json_t *)(uintptr_t)map, key, value) {
        const char *file = json_string_value(value);
        if (!file || strlen(file) != json_string_length(value) || !name_is_plain(file)) {
            st = error_set(err, TRIL_ERR_FORMAT,
                           "%s: the file of tensor \"%s\" must be a plain name in the same "
                           "directory",
                           path, show(key).text);
            goto done;
        }
        json_object_set(files, file, value);
    }
    size_t count = json_object_size(files);
    if (count > SHARD_LIMIT) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s names %zu files; at most %d are supported", path,
                       count, SHARD_LIMIT);
        goto done;
    }
    s->shards = calloc(count + 1, sizeof *s->shards);
    if (!s->shards) {
        st = no_memory(path, err);
        goto done;
    }
    json_object_foreach(files, key, value) {
        free(joined);
        if (!(joined = path_join(dir, key))) {
            st = no_memory(path, err);
            goto done;
        }
        TRY(shard_open(s, joined, err));
    }
    TRY(names_sort(s, err));
    json_object_foreach((json_t *)(uintptr_t)map, key, value) {
        const struct st_tensor *t = safetensors_find(s, key);
        const char *slash = t ? strrchr(t->file, '/') : NULL;
        if (!t || strcmp(slash ? slash + 1 : t->file, json_string_value(value)) != 0) {
            st = error_set(err, TRIL_ERR_FORMAT,
                           "%s: tensor \"%s\" is not in the file \"%s\" that is named for it", path,
                           show(key).text, show(json_string_value(value)).text);
            goto done;
        }
    }
done:
    free(joined);
    json_decref(files);
    json_decref(index);
    return st;
}

tril_status safetensors_open(struct safetensors **out, const char *path, struct tril_error *err) {
    tril_status st;
    char *single = NULL, *index = NULL;
    struct safetensors *s = calloc(1, sizeof *s);
    *out = NULL;
    if (!s) {
        st = no_memory(path, err);
        goto done;
    }
    if (path_is_dir(path)) {
        single = path_join(path, "model.safetensors");
        index = path_join(path, "model.safetensors.index.json");
        if (!single || !index) {
            st = no_memory(path, err);
            goto done;
        }
        if (!path_exists(single)) {
            if (path_exists(index))
                st = index_open(s, path, index, err);
            else
                st = error_set(err, TRIL_ERR_IO,
                               "%s holds neither model.safetensors nor "
                               "model.safetensors.index.json; give a model's directory",
                               path);
            goto done;
        }
    }
    if (!(s->shards = calloc(1, sizeof *s->shards))) {
        st = no_memory(path, err);
        goto done;
    }
    TRY(shard_open(s, single ? single : path, err));
    TRY(names_sort(s, err));
done:
    free(single);
    free(index);
    if (st == TRIL_OK)
        *out = s;
    else
        safetensors_close(s);
    return st;
}

size_t safetensors_count(const struct safetensors *s) {
    return s->count;
}

const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i) {
    return &s->tensors[i];
}

const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name) {
    const struct st_tensor key = {.name = name};
    return s->count ? bsearch(&key, s->tensors, s->count, sizeof key, compare_names) : NULL;
}

const char *safetensors_metadata(const struct safetensors *s, const char *key) {
    for (size_t i = 0; i < s->shard_count; i++) {
        const json_t *meta = json_object_get(s->shards[i].header, "__metadata__");
        const char *value = json_string_value(json_object_get(meta, key));
        if (value)
            return value;
    }
    return NULL;
}

void safetensors_forget(const struct safetensors *s, const struct st_tensor *t) {
    (void)s;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)t->data + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)t->data + t->bytes) / page * page;
    if (begin < end)
        madvise((void *)begin, end - begin, MADV_DONTNEED);
}
