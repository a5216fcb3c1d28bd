/* Texts and token ids as commands are given them. */
#ifndef CLI_INPUT_H
#define CLI_INPUT_H

#include <stddef.h>
#include <stdint.h>

#include "tril/error.h"
#include "tril/inspect.h"

/* "1 2 3", also with commas or brackets, as ids (free them). NULL with *err filled if it is none.
 */
int32_t *ids_parse(const char *text, int64_t *count, struct tril_error *err);
/* A whole file, or standard input for "-"; NULL with *err filled. free() it. */
char *text_read(const char *path, size_t *size, struct tril_error *err);
/* The text to look at: o->prompt, or a file, or ids, of which exactly one must be given (`choices`
 * names them in the message). What o then points to and the caller frees: *text, *list. */
tril_status look_text_read(struct tril_look_options *o, const char *file, const char *ids,
                           const char *choices, char **text, int32_t **list,
                           struct tril_error *err);

#endif
