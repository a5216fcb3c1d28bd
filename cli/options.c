/* Option tables: parsing, range checks, suggestions, --help. */
#include "options.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((format(printf, 2, 3))) static tril_status fail(struct tril_error *err,
                                                              const char *format, ...) {
    va_list args;
    va_start(args, format);
    err->code = TRIL_ERR_ARGUMENT;
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    return TRIL_ERR_ARGUMENT;
}

/* Levenshtein distance, for suggestions; names are short. */
static int distance(const char *a, const char *b) {
    int row[64], n = (int)strlen(b);
    if (n >= 63)
        return 99;
    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int up = row[j], best = diagonal + (a[i - 1] != b[j - 1]);
            if (up + 1 < best)
                best = up + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            diagonal = up;
            row[j] = best;
        }
    }
    return row[n];
}

static tril_status unknown(const struct command *c, const char *name, struct tril_error *err) {
    const char *nearest = NULL;
    int best = 4;
    for (int i = 0; i < c->option_count; i++) {
        if (c->options[i].kind == OPTION_HEADING)
            continue;
        int d = distance(name, c->options[i].name);
        if (d < best) {
            best = d;
            nearest = c->options[i].name;
        }
    }
    if (nearest)
        return fail(err, "unknown option --%s; did you mean --%s? (tril %s --help lists all)", name,
                    nearest, c->name);
    return fail(err, "unknown option --%s (tril %s --help lists all)", name, c->name);
}

static bool in_choices(const char *choices, const char *value) {
    size_t n = strlen(value);
    for (const char *p = choices; p && *p;) {
        const char *end = strchr(p, '|');
        size_t len = end ? (size_t)(end - p) : strlen(p);
        if (len == n && memcmp(p, value, n) == 0)
            return true;
        p = end ? end + 1 : NULL;
    }
    return false;
}

static tril_status list_add(struct option_list *l, const char *value, struct tril_error *err) {
    const char **grown = realloc(l->values, (size_t)(l->count + 1) * sizeof *grown);
    if (!grown) {
        err->code = TRIL_ERR_MEMORY;
        snprintf(err->message, sizeof err->message, "not enough memory for the arguments");
        return TRIL_ERR_MEMORY;
    }
    l->values = grown;
    l->values[l->count++] = value;
    return TRIL_OK;
}

static tril_status store(const struct option *o, const char *value, struct tril_error *err) {
    char *end;
    bool bounded = o->min != 0 || o->max != 0;
    errno = 0;
    switch (o->kind) {
    case OPTION_INT: {
        long long v = strtoll(value, &end, 10);
        if (end == value || *end || errno == ERANGE)
            return fail(err, "--%s takes a whole number, not '%s'", o->name, value);
        if (bounded && ((double)v < o->min || (double)v > o->max))
            return fail(err, "--%s takes a whole number from %.0f to %.0f, not %lld", o->name,
                        o->min, o->max, v);
        *(int64_t *)o->out = v;
        return TRIL_OK;
    }
    case OPTION_NUMBER: {
        double v = strtod(value, &end);
        if (end == value || *end || !isfinite(v))
            return fail(err, "--%s takes a number, not '%s'", o->name, value);
        if (bounded && (v < o->min || v > o->max))
            return fail(err, "--%s takes a number from %g to %g, not %g", o->name, o->min, o->max,
                        v);
        *(double *)o->out = v;
        return TRIL_OK;
    }
    case OPTION_CHOICE:
        if (!in_choices(o->choices, value))
            return fail(err, "--%s takes one of %s, not '%s'", o->name, o->choices, value);
        *(const char **)o->out = value;
        return TRIL_OK;
    case OPTION_STRING:
        *(const char **)o->out = value;
        return TRIL_OK;
    case OPTION_STRINGS:
    case OPTION_REPEATED:
        return list_add(o->out, value, err);
    case OPTION_FLAG:
    case OPTION_HEADING:
        break;
    }
    return TRIL_OK;
}

static void print_help(const struct command *c) {
    printf("tril %s %s\n\n%s\n", c->name, c->usage, c->summary);
    for (int i = 0; i < c->option_count; i++) {
        const struct option *o = &c->options[i];
        char left[64];
        if (o->kind == OPTION_HEADING) {
            printf("\n%s\n", o->help);
            continue;
        }
        snprintf(left, sizeof left, "--%s%s%s", o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        printf("  %-24s %s", left, o->help);
        if (o->kind == OPTION_CHOICE)
            printf(" (%s)", o->choices);
        putchar('\n');
    }
    if (c->examples)
        printf("\nExamples\n%s\n", c->examples);
    printf("\nExit codes\n  0  success\n");
#define EXIT_CODE(name, value, text, code)                                                         \
    if (code)                                                                                      \
        printf("  %d  %s\n", code, text);
    TRIL_STATUS_LIST(EXIT_CODE)
#undef EXIT_CODE
}

static const struct option *find(const struct command *c, const char *name) {
    for (int i = 0; i < c->option_count; i++)
        if (c->options[i].kind != OPTION_HEADING && strcmp(c->options[i].name, name) == 0)
            return &c->options[i];
    return NULL;
}

tril_status options_parse(const struct command *c, int argc, char **argv, bool *help,
                          struct tril_error *err) {
    *help = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            print_help(c);
            *help = true;
            return TRIL_OK;
        }
        if (strncmp(arg, "--", 2) != 0 || arg[2] == '\0') {
            if (!c->positional)
                return fail(err, "unexpected argument '%s' (tril %s --help lists the options)", arg,
                            c->name);
            if (list_add(c->positional, arg, err) != TRIL_OK)
                return err->code;
            continue;
        }
        char name[64];
        const char *equals = strchr(arg, '=');
        size_t length = equals ? (size_t)(equals - arg - 2) : strlen(arg + 2);
        if (length >= sizeof name)
            return fail(err, "unknown option %.40s...", arg);
        memcpy(name, arg + 2, length);
        name[length] = '\0';
        const struct option *o = find(c, name);
        if (!o)
            return unknown(c, name, err);
        if (o->kind == OPTION_FLAG) {
            if (equals)
                return fail(err, "--%s takes no value", name);
            *(bool *)o->out = true;
            continue;
        }
        const char *value = equals ? equals + 1 : i + 1 < argc ? argv[i + 1] : NULL;
        if (!value || (!equals && strncmp(value, "--", 2) == 0 && find(c, value + 2)))
            return fail(err, "--%s needs a value (%s)", name, o->value ? o->value : "VALUE");
        i += !equals;
        if (store(o, value, err) != TRIL_OK)
            return err->code;
        while (o->kind == OPTION_STRINGS && i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0)
            if (store(o, argv[++i], err) != TRIL_OK)
                return err->code;
    }
    return TRIL_OK;
}

void option_list_free(struct option_list *l) {
    free(l->values);
    *l = (struct option_list){0};
}

char *option_list_join(const struct option_list *l) {
    size_t length = 1, used = 0;
    for (int i = 0; i < l->count; i++)
        length += strlen(l->values[i]) + 1;
    char *text = calloc(length, 1);
    for (int i = 0; text && i < l->count; i++)
        used += (size_t)snprintf(text + used, length - used, "%s%s", i ? " " : "", l->values[i]);
    return text;
}

bool option_pair(const char *text, int64_t *a, int64_t *b) {
    char *end;
    *a = strtoll(text, &end, 10);
    if (end == text || *end != ',')
        return false;
    text = end + 1;
    *b = strtoll(text, &end, 10);
    return end != text && !*end && *a >= 1 && *b >= 1 && *a <= INT32_MAX && *b <= INT32_MAX;
}

int command_fail(const char *name, tril_status st, const struct tril_error *err) {
    fprintf(stderr, "tril %s: %s\n", name, err->message[0] ? err->message : tril_status_text(st));
    return tril_status_exit_code(st);
}

bool command_begin(const struct command *c, int argc, char **argv, int *code) {
    struct tril_error err = {0};
    bool help;
    tril_status st = options_parse(c, argc, argv, &help, &err);
    *code = 0;
    if (st != TRIL_OK)
        *code = command_fail(c->name, st, &err);
    return st == TRIL_OK && !help;
}
