/* Which files a list of paths means: files as they are, directories as their .txt files by name. */
#ifndef TEXT_INPUT_H
#define TEXT_INPUT_H

#include <stddef.h>

#include "base/error.h"

struct input_files {
    char **paths;
    size_t count;
};

/* Refuses what is not there, and directories without a .txt file. */
tril_status input_files_find(struct input_files *f, const char *const *paths, size_t count,
                             struct tril_error *err);
void input_files_free(struct input_files *f);

#endif
