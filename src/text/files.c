#include "text/files.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "text/unicode.h"

static tril_status add(struct text_files *f, char *path, struct tril_error *err) {
    char **paths = path ? realloc(f->paths, (f->count + 1) * sizeof *paths) : NULL;
    if (!paths) {
        free(path);
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a list of files");
    }
    f->paths = paths;
    f->paths[f->count++] = path;
    return TRIL_OK;
}

tril_status text_files_expand(struct text_files *f, const char *const *paths, size_t count,
                              struct tril_error *err) {
    tril_status st = TRIL_OK;
    char **names = NULL;
    size_t name_count = 0;
    memset(f, 0, sizeof *f);
    if (count == 0)
        return error_set(err, TRIL_ERR_ARGUMENT, "no text file is given");
    for (size_t i = 0; i < count; i++) {
        if (!path_exists(paths[i])) {
            errno = ENOENT;
            return error_set_errno(err, "cannot read %s", paths[i]);
        }
        if (!path_is_dir(paths[i])) {
            TRY(add(f, strdup(paths[i]), err));
            continue;
        }
        size_t before = f->count;
        TRY(dir_list(paths[i], &names, &name_count, err));
        for (size_t k = 0; k < name_count; k++) {
            size_t n = strlen(names[k]);
            if (n > 4 && strcmp(names[k] + n - 4, ".txt") == 0)
                TRY(add(f, path_join(paths[i], names[k]), err));
        }
        dir_list_free(names, name_count);
        names = NULL;
        if (f->count == before) {
            st = error_set(err, TRIL_ERR_IO, "the directory %s holds no .txt files", paths[i]);
            goto done;
        }
    }
done:
    if (names)
        dir_list_free(names, name_count);
    return st;
}

void text_files_free(struct text_files *f) {
    for (size_t i = 0; i < f->count; i++)
        free(f->paths[i]);
    free(f->paths);
    memset(f, 0, sizeof *f);
}

tril_status text_check(const char *path, const unsigned char *data, size_t size,
                       struct tril_error *err) {
    size_t sample = size < (1u << 20) ? size : 1u << 20, bad = 0;
    if (size < 16) /* too little to tell; an empty file has no data at all */
        return TRIL_OK;
    const unsigned char *p = data, *end = data + sample;
    while (p < end) {
        unsigned n;
        uint32_t c = utf8_next(p, end, &n);
        bad += c == UTF8_INVALID || (c < 0x20 && (c < 8 || c > 13) && c != 27);
        p += n;
    }
    if (bad * 10 > sample)
        return error_set(
            err, TRIL_ERR_FORMAT,
            "%s looks binary: %zu%% of its first bytes are neither UTF-8 nor printable; "
            "give text files",
            path, bad * 100 / sample);
    return TRIL_OK;
}
