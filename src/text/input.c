/* Files and directories to a list of files. */
#include "text/input.h"

#include <stdlib.h>
#include <string.h>

#include "base/file.h"

static tril_status add(struct input_files *f, char *path, struct tril_error *err) {
    char **grown = path ? realloc(f->paths, (f->count + 1) * sizeof *grown) : NULL;
    if (!grown) {
        free(path);
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a list of files");
    }
    f->paths = grown;
    f->paths[f->count++] = path;
    return TRIL_OK;
}

static bool is_text(const char *name) {
    size_t n = strlen(name);
    return n > 4 && strcmp(name + n - 4, ".txt") == 0;
}

static tril_status add_dir(struct input_files *f, const char *dir, struct tril_error *err) {
    char **names = NULL;
    size_t count = 0, before = f->count;
    tril_status st = dir_list(dir, &names, &count, err);
    for (size_t i = 0; st == TRIL_OK && i < count; i++)
        if (is_text(names[i]))
            st = add(f, path_join(dir, names[i]), err);
    dir_list_free(names, count);
    if (st == TRIL_OK && f->count == before)
        st = error_set(err, TRIL_ERR_ARGUMENT, "%s: there is no .txt file in this directory", dir);
    return st;
}

tril_status input_files_find(struct input_files *f, const char *const *paths, size_t count,
                             struct tril_error *err) {
    tril_status st = TRIL_OK;
    *f = (struct input_files){0};
    for (size_t i = 0; i < count && st == TRIL_OK; i++)
        st = path_is_dir(paths[i]) ? add_dir(f, paths[i], err) : add(f, strdup(paths[i]), err);
    if (st != TRIL_OK)
        input_files_free(f);
    return st;
}

void input_files_free(struct input_files *f) {
    for (size_t i = 0; i < f->count; i++)
        free(f->paths[i]);
    free(f->paths);
    *f = (struct input_files){0};
}
