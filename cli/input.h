/* Texts and token ids as commands are given them. */
#ifndef CLI_INPUT_H
#define CLI_INPUT_H

#include <stddef.h>
#include <stdint.h>

#include "tril/error.h"

/* "1 2 3", also with commas or brackets, as ids (free them). NULL with *err filled if it is none.
 */
int32_t *ids_parse(const char *text, int64_t *count, struct tril_error *err);
/* A whole file, or standard input for "-"; NULL with *err filled. free() it. */
char *text_read(const char *path, size_t *size, struct tril_error *err);

#endif
