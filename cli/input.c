/* Texts and token ids as commands are given them. */
#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "input.h"

int32_t *ids_parse(const char *text, int64_t *count, struct tril_error *err) {
    int32_t *ids = malloc((strlen(text) / 2 + 1) * sizeof *ids);
    *count = 0;
    if (!ids)
        err->code = TRIL_ERR_MEMORY;
    for (const char *p = text; ids && *p;) {
        char *end;
        if (isspace((unsigned char)*p) || *p == ',' || *p == '[' || *p == ']') {
            p++;
            continue;
        }
        errno = 0;
        long v = strtol(p, &end, 10);
        if (end == p || errno || v < 0 || v > INT32_MAX) {
            err->code = TRIL_ERR_ARGUMENT;
            snprintf(err->message, sizeof err->message, "--ids: '%.20s' is not a token id", p);
            free(ids);
            return NULL;
        }
        ids[(*count)++] = (int32_t)v;
        p = end;
    }
    return ids;
}

char *text_read(const char *path, size_t *size, struct tril_error *err) {
    const bool input = strcmp(path, "-") == 0;
    const char *name = input ? "standard input" : path;
    FILE *f = input ? stdin : fopen(path, "rb");
    char *text = NULL;
    size_t capacity = 0, n = 0;
    *size = 0;
    while (f) {
        if (*size + 1 >= capacity) {
            char *grown = realloc(text, capacity = 2 * capacity + 4096);
            if (!grown) {
                err->code = TRIL_ERR_MEMORY;
                snprintf(err->message, sizeof err->message, "not enough memory to read %s", name);
                break;
            }
            text = grown;
        }
        n = fread(text + *size, 1, capacity - *size - 1, f);
        *size += n;
        if (n == 0)
            break;
    }
    if (!f || ferror(f)) {
        err->code = TRIL_ERR_IO;
        snprintf(err->message, sizeof err->message, "cannot read %s: %s", name, strerror(errno));
    }
    if (f && !input)
        fclose(f);
    if (err->code) {
        free(text);
        return NULL;
    }
    text[*size] = '\0';
    return text;
}

tril_status look_text_read(struct tril_look_options *o, const char *file, const char *ids,
                           const char *choices, char **text, int32_t **list,
                           struct tril_error *err) {
    if ((file != NULL) + (o->prompt != NULL) + (ids != NULL) != 1) {
        err->code = TRIL_ERR_ARGUMENT;
        snprintf(err->message, sizeof err->message, "give one text: %s", choices);
        return err->code;
    }
    if (o->prompt) {
        o->prompt_size = strlen(o->prompt);
        return TRIL_OK;
    }
    if (file)
        o->prompt = *text = text_read(file, &o->prompt_size, err);
    else
        o->ids = *list = ids_parse(ids, &o->id_count, err);
    return err->code;
}
