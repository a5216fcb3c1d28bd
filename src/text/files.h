/* The text files that a list of paths means. */
#ifndef TEXT_FILES_H
#define TEXT_FILES_H

#include <stddef.h>

#include "base/error.h"

struct text_files {
    char **paths;
    size_t count;
};

/* Files stand for themselves, directories for their .txt files sorted by name (one that has none is
 * refused, as is a path that does not exist). Free with text_files_free, also after a failure. */
tril_status text_files_expand(struct text_files *f, const char *const *paths, size_t count,
                              struct tril_error *err);
void text_files_free(struct text_files *f);

/* Refuses what is no text: where more than a tenth of the first megabyte's bytes are neither UTF-8
 * nor printable. */
tril_status text_check(const char *path, const unsigned char *data, size_t size,
                       struct tril_error *err);

#endif
