/* Command-line options, described once per command: parsing, checking, --help and the messages all
 * come from one table. */
#ifndef CLI_OPTIONS_H
#define CLI_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "tril/error.h"

enum option_kind {
    OPTION_FLAG,     /* bool: --name */
    OPTION_INT,      /* int64_t within [min, max] */
    OPTION_NUMBER,   /* double within [min, max] */
    OPTION_STRING,   /* const char * */
    OPTION_CHOICE,   /* const char *, one of `choices` ("a|b|c") */
    OPTION_STRINGS,  /* struct option_list; takes every value up to the next option */
    OPTION_REPEATED, /* struct option_list; takes one value, may be given again */
    OPTION_HEADING   /* no option: a heading in --help */
};

struct option_list {
    const char **values;
    int count;
};

struct option {
    const char *name;  /* without the dashes */
    const char *value; /* placeholder in --help: "N", "FILE" */
    const char *help;
    enum option_kind kind;
    void *out;
    double min, max; /* OPTION_INT and OPTION_NUMBER; both 0: any */
    const char *choices;
};

struct command {
    const char *name;     /* "train" */
    const char *usage;    /* after "tril train " */
    const char *summary;  /* one paragraph */
    const char *examples; /* lines, indented by two blanks */
    const struct option *options;
    int option_count;
    struct option_list *positional; /* NULL: none are taken */
};

/* Parses argv[1..]. Values given later win; OPTION_STRINGS, OPTION_REPEATED and positionals collect
 * (free with option_list_free). --help prints and sets *help. Unknown options are refused with the
 * nearest known name. Only options that are given are written, so `out` holds the defaults
 * beforehand. */
tril_status options_parse(const struct command *c, int argc, char **argv, bool *help,
                          struct tril_error *err);
void option_list_free(struct option_list *l);
/* The values with blanks between them ("": none); free() it. NULL without memory. */
char *option_list_join(const struct option_list *l);
/* "64,32": two sizes from 1 on; false if the text is none. */
bool option_pair(const char *text, int64_t *a, int64_t *b);
/* The usual start of a command: parses; on --help or an error it has printed what there is to print
 * and returns false with *code the exit code. */
bool command_begin(const struct command *c, int argc, char **argv, int *code);
/* Prints "tril NAME: message" to stderr; returns the exit code. */
int command_fail(const char *name, tril_status st, const struct tril_error *err);

#endif
