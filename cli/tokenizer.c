/* tril tokenizer train | encode | decode | info. */
#include <errno.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "cli.h"
#include "input.h"
#include "json.h"
#include "options.h"
#include "tril/tokenizer.h"
#include "tril/tril.h"

#define NAME "tokenizer"

__attribute__((format(printf, 3, 4))) static tril_status
fail(struct tril_error *err, tril_status st, const char *format, ...) {
    va_list args;
    va_start(args, format);
    err->code = st;
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    return st;
}

/* The text of the one file given, or of standard input. */
static tril_status read_input(const struct option_list *files, char **text, size_t *size,
                              struct tril_error *err) {
    *text = NULL;
    if (files->count > 1)
        return fail(err, TRIL_ERR_ARGUMENT, "give one file, or none for standard input");
    *text = text_read(files->count ? files->values[0] : "-", size, err);
    return err->code;
}

/* Whether standard output took everything. */
static tril_status flush_output(struct tril_error *err) {
    if (fflush(stdout) != 0 || ferror(stdout))
        return fail(err, TRIL_ERR_IO, "cannot write standard output: %s", strerror(errno));
    return TRIL_OK;
}

static bool is_directory(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

static tril_status train(const struct tril_tokenizer_train_options *o, const char *out, bool json,
                         struct tril_error *err) {
    tril_tokenizer *t;
    struct tril_tokenizer_train_stats s;
    struct tril_tokenizer_info info;
    tril_status st = tril_tokenizer_train(&t, o, &s, err);
    if (st != TRIL_OK)
        return st;
    st = is_directory(out) ? tril_tokenizer_write_dir(t, out, err)
                           : tril_tokenizer_write(t, out, err);
    tril_tokenizer_info_get(t, &info);
    if (st == TRIL_OK && json)
        json_print(json_pack("{s:s, s:I, s:I, s:I, s:s, s:I, s:I, s:I, s:f, s:f}", "out", out,
                             "vocab_size", (json_int_t)info.vocab_size, "merges",
                             (json_int_t)info.merges, "specials", (json_int_t)info.specials,
                             "pattern", info.pattern, "bytes", (json_int_t)s.bytes, "words",
                             (json_int_t)s.words, "unique_words", (json_int_t)s.unique_words,
                             "count_seconds", s.count_seconds, "merge_seconds", s.merge_seconds));
    else if (st == TRIL_OK)
        printf("%s: %u tokens (%u merges, %u special) from %.1f MB, %lld words, %lld of them "
               "different, in %.2f s\n",
               out, info.vocab_size, info.merges, info.specials, (double)s.bytes / 1e6,
               (long long)s.words, (long long)s.unique_words, s.count_seconds + s.merge_seconds);
    if (st == TRIL_OK && info.vocab_size < o->vocab_size)
        fprintf(stderr, "tril tokenizer: the text has no more pairs to merge: %u tokens, not %u\n",
                info.vocab_size, o->vocab_size);
    tril_tokenizer_free(t);
    return st;
}

static int tokenizer_train_command(int argc, char **argv) {
    int64_t vocab = 8192, min_count = 1, threads = 0;
    const char *out = "tokenizer.json", *pattern = "gpt2";
    bool json = false, quiet = false;
    struct option_list files = {0}, specials = {0};
    struct tril_error err = {0};
    const struct option options[] = {
        {"vocab", "N", "tokens in all: special ones, the 256 bytes, and merges (8192)", OPTION_INT,
         &vocab, 256, 1 << 24, NULL},
        {"out", "FILE",
         "where to write; a directory gets tokenizer_config.json too (tokenizer.json)",
         OPTION_STRING, &out, 0, 0, NULL},
        {"pattern", "NAME", "how text is cut into words: gpt2, cl100k, o200k, ... (gpt2)",
         OPTION_STRING, &pattern, 0, 0, NULL},
        {"special", "S", "a special token, e.g. '<|endoftext|>'; may be given again",
         OPTION_REPEATED, &specials, 0, 0, NULL},
        {"min-count", "N", "merge only pairs seen so often (1)", OPTION_INT, &min_count, 1, 1e15,
         NULL},
        {"threads", "N", "threads (0: all)", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print one JSON object", OPTION_FLAG, &json, 0, 0, NULL},
        {"quiet", NULL, "no progress on stderr", OPTION_FLAG, &quiet, 0, 0, NULL}};
    const struct command command = {
        .name = "tokenizer train",
        .usage = "--vocab N --out FILE [OPTIONS] FILE...",
        .summary = "Trains a byte-level BPE tokenizer on text files (a directory means its .txt "
                   "files) and\n"
                   "writes a Hugging Face tokenizer.json.",
        .examples =
            "  tril tokenizer train --vocab 8192 --out tokenizer.json book.txt\n"
            "  tril tokenizer train --vocab 32000 --pattern cl100k --special '<|endoftext|>' "
            "--out my/ texts/",
        .options = options,
        .option_count = sizeof options / sizeof *options,
        .positional = &files};
    int code;
    if (command_begin(&command, argc, argv, &code)) {
        tril_threads_set((int)threads);
        struct tril_tokenizer_train_options o = {.files = files.values,
                                                 .file_count = (size_t)files.count,
                                                 .vocab_size = (uint32_t)vocab,
                                                 .pattern = pattern,
                                                 .specials = specials.values,
                                                 .special_count = (size_t)specials.count,
                                                 .min_count = min_count,
                                                 .quiet = quiet};
        tril_status st = train(&o, out, json, &err);
        if (st == TRIL_OK)
            st = flush_output(&err);
        if (st != TRIL_OK)
            code = command_fail(command.name, st, &err);
    }
    option_list_free(&files);
    option_list_free(&specials);
    return code;
}

/* Ids by the million: printed without printf. */
static void print_ids(const uint32_t *ids, size_t n, bool json) {
    char number[12];
    if (json)
        putchar('[');
    for (size_t i = 0; i < n; i++) {
        char *p = number + sizeof number;
        uint32_t v = ids[i];
        do {
            *--p = (char)('0' + v % 10);
        } while (v /= 10);
        if (i)
            fputs(json ? ", " : " ", stdout);
        fwrite(p, 1, (size_t)(number + sizeof number - p), stdout);
    }
    puts(json ? "]" : "");
}

/* What encode, decode and info share. */
struct common {
    const char *path, *pattern;
    int64_t threads;
    bool json;
    struct option_list files;
};

static tril_status load(tril_tokenizer **t, const struct common *c, struct tril_error *err) {
    *t = NULL;
    if (!c->path)
        return fail(err, TRIL_ERR_ARGUMENT,
                    "say which tokenizer: --tokenizer FILE (or a directory)");
    tril_threads_set((int)c->threads);
    return tril_tokenizer_load(t, c->path, c->pattern, err);
}

#define COMMON_OPTIONS(c)                                                                          \
    {"tokenizer",                                                                                  \
     "FILE",                                                                                       \
     "tokenizer.json, *.tiktoken, vocab.json, or a directory that holds one",                      \
     OPTION_STRING,                                                                                \
     &(c).path,                                                                                    \
     0,                                                                                            \
     0,                                                                                            \
     NULL},                                                                                        \
        {"pattern",                                                                                \
         "NAME",                                                                                   \
         "how a tiktoken file of unknown size cuts words: gpt2, cl100k, ..., or a regex",          \
         OPTION_STRING,                                                                            \
         &(c).pattern,                                                                             \
         0,                                                                                        \
         0,                                                                                        \
         NULL},                                                                                    \
    {                                                                                              \
        "threads", "N", "threads (0: all)", OPTION_INT, &(c).threads, 0, 1024, NULL                \
    }

static int encode_command(int argc, char **argv) {
    struct common c = {0};
    struct tril_error err = {0};
    bool no_special = false;
    const struct option options[] = {
        COMMON_OPTIONS(c),
        {"json", NULL, "print a JSON array", OPTION_FLAG, &c.json, 0, 0, NULL},
        {"no-special", NULL, "special tokens' strings in the text are ordinary text", OPTION_FLAG,
         &no_special, 0, 0, NULL}};
    const struct command command = {
        .name = "tokenizer encode",
        .usage = "--tokenizer FILE [OPTIONS] [FILE]",
        .summary = "Prints the token ids of a text (a file, or standard input).",
        .examples = "  echo -n 'Hello world' | tril tokenizer encode --tokenizer gpt2/ --json\n"
                    "  tril tokenizer encode --tokenizer cl100k_base.tiktoken book.txt > ids",
        .options = options,
        .option_count = sizeof options / sizeof *options,
        .positional = &c.files};
    int code;
    if (command_begin(&command, argc, argv, &code)) {
        tril_tokenizer *t;
        char *text = NULL;
        size_t size, n;
        uint32_t *ids = NULL;
        tril_status st = load(&t, &c, &err);
        if (st == TRIL_OK)
            st = read_input(&c.files, &text, &size, &err);
        if (st == TRIL_OK)
            st = tril_tokenizer_encode(t, text, size, !no_special, &ids, &n, &err);
        if (st == TRIL_OK) {
            print_ids(ids, n, c.json);
            st = flush_output(&err);
        }
        if (st != TRIL_OK)
            code = command_fail(command.name, st, &err);
        free(ids);
        free(text);
        tril_tokenizer_free(t);
    }
    option_list_free(&c.files);
    return code;
}

/* Reads "[1, 2, 3]", or ids with blanks between. */
static tril_status parse_ids(const char *text, size_t size, uint32_t **ids, size_t *n,
                             struct tril_error *err) {
    const char *p = text, *end = text + size, *space = " \t\r\n";
    *n = 0;
    *ids = malloc((size / 2 + 2) * sizeof **ids);
    if (!*ids)
        return fail(err, TRIL_ERR_MEMORY, "not enough memory for the ids");
    while (p < end && strchr(space, *p) && *p)
        p++;
    bool array = p < end && *p == '[';
    p += array;
    for (bool comma = false;;) {
        while (p < end && strchr(space, *p) && *p)
            p++;
        if (p == end || (array && *p == ']' && !comma))
            break;
        uint64_t v = 0;
        const char *digits = p;
        while (p < end && *p >= '0' && *p <= '9' && v <= UINT32_MAX)
            v = v * 10 + (uint64_t)(*p++ - '0');
        if (p == digits || v > UINT32_MAX)
            return fail(err, TRIL_ERR_FORMAT,
                        "byte %zu of the input is no token id: a JSON array of ids is expected",
                        (size_t)(digits - text));
        (*ids)[(*n)++] = (uint32_t)v;
        const char *behind = p;
        while (p < end && strchr(space, *p) && *p)
            p++;
        comma = array && p < end && *p == ',';
        p += comma;
        if (!comma && p < end && (array ? *p != ']' : p == behind))
            return fail(err, TRIL_ERR_FORMAT,
                        "byte %zu of the input: a comma or the end of the array is expected",
                        (size_t)(p - text));
    }
    if (array) {
        if (p == end)
            return fail(err, TRIL_ERR_FORMAT, "the input's array of ids has no end");
        for (p++; p < end; p++)
            if (!*p || !strchr(space, *p))
                return fail(err, TRIL_ERR_FORMAT, "byte %zu of the input stands behind the array",
                            (size_t)(p - text));
    }
    return TRIL_OK;
}

static int decode_command(int argc, char **argv) {
    struct common c = {0};
    struct tril_error err = {0};
    bool skip = false;
    const struct option options[] = {
        COMMON_OPTIONS(c),
        {"skip-special", NULL, "leave special tokens out", OPTION_FLAG, &skip, 0, 0, NULL}};
    const struct command command = {
        .name = "tokenizer decode",
        .usage = "--tokenizer FILE [OPTIONS] [FILE]",
        .summary = "Writes the bytes of token ids: a JSON array, or numbers with blanks between\n"
                   "(a file, or standard input).",
        .examples = "  echo '[15496, 995]' | tril tokenizer decode --tokenizer gpt2/",
        .options = options,
        .option_count = sizeof options / sizeof *options,
        .positional = &c.files};
    int code;
    if (command_begin(&command, argc, argv, &code)) {
        tril_tokenizer *t;
        char *input = NULL, *text = NULL;
        size_t size, n, text_size;
        uint32_t *ids = NULL;
        tril_status st = load(&t, &c, &err);
        if (st == TRIL_OK)
            st = read_input(&c.files, &input, &size, &err);
        if (st == TRIL_OK)
            st = parse_ids(input, size, &ids, &n, &err);
        if (st == TRIL_OK)
            st = tril_tokenizer_decode(t, ids, n, skip, &text, &text_size, &err);
        if (st == TRIL_OK) {
            fwrite(text, 1, text_size, stdout);
            st = flush_output(&err);
        }
        if (st != TRIL_OK)
            code = command_fail(command.name, st, &err);
        free(text);
        free(ids);
        free(input);
        tril_tokenizer_free(t);
    }
    option_list_free(&c.files);
    return code;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Measured on a text. */
struct measured {
    size_t bytes, tokens;
    double seconds;
    struct tril_build_info build;
};

static tril_status measure(const tril_tokenizer *t, const struct option_list *files,
                           struct measured *m, struct tril_error *err) {
    char *text;
    uint32_t *ids = NULL;
    tril_status st = read_input(files, &text, &m->bytes, err);
    if (st != TRIL_OK)
        return st;
    if (m->bytes == 0)
        st = fail(err, TRIL_ERR_FORMAT, "%s is empty", files->values[0]);
    double start = seconds();
    if (st == TRIL_OK)
        st = tril_tokenizer_encode(t, text, m->bytes, true, &ids, &m->tokens, err);
    m->seconds = seconds() - start;
    tril_build_info_get(&m->build);
    free(ids);
    free(text);
    return st;
}

static void info_json(const char *path, const tril_tokenizer *t,
                      const struct tril_tokenizer_info *info, const struct measured *m) {
    json_t *specials = json_object();
    for (uint32_t i = 0; i < info->specials; i++) {
        const char *text;
        size_t size;
        uint32_t id = tril_tokenizer_special(t, i, &text, &size);
        char *key = strndup(text, size);
        if (key)
            json_object_set_new(specials, key, json_integer(id));
        free(key);
    }
    json_t *root = json_pack("{s:s, s:I, s:I, s:s, s:o}", "tokenizer", path, "vocab_size",
                             (json_int_t)info->vocab_size, "merges", (json_int_t)info->merges,
                             "pattern", info->pattern, "specials", specials);
    if (info->bos >= 0)
        json_object_set_new(root, "bos", json_integer(info->bos));
    if (info->eos >= 0)
        json_object_set_new(root, "eos", json_integer(info->eos));
    if (m->bytes)
        json_object_update_new(
            root, json_pack("{s:I, s:I, s:f, s:f, s:s, s:s, s:i}", "bytes", (json_int_t)m->bytes,
                            "tokens", (json_int_t)m->tokens, "bytes_per_token",
                            (double)m->bytes / (double)m->tokens, "megabytes_per_second",
                            (double)m->bytes / 1e6 / m->seconds, "processor", m->build.processor,
                            "isa", m->build.isa, "threads", m->build.threads));
    json_print(root);
}

static void info_table(const char *path, const tril_tokenizer *t,
                       const struct tril_tokenizer_info *info, const struct measured *m) {
    printf("%s\n", path);
    printf("  vocabulary   %u tokens\n", info->vocab_size);
    printf("  merges       %u\n", info->merges);
    printf("  pattern      %s\n", info->pattern);
    printf("  specials     %u", info->specials);
    for (uint32_t i = 0; i < info->specials && i < 8; i++) {
        const char *text;
        size_t size;
        uint32_t id = tril_tokenizer_special(t, i, &text, &size);
        printf("%s%.*s = %u%s", i ? ", " : ": ", (int)size, text, id,
               id == info->eos ? " (end of text)" : "");
    }
    printf("%s\n", info->specials > 8 ? ", ..." : "");
    if (m->bytes)
        printf("  on the text  %zu bytes, %zu tokens: %.3f bytes/token; encoded at %.1f MB/s on %d "
               "threads of %s\n",
               m->bytes, m->tokens, (double)m->bytes / (double)m->tokens,
               (double)m->bytes / 1e6 / m->seconds, m->build.threads, m->build.processor);
}

static int info_command(int argc, char **argv) {
    struct common c = {0};
    struct tril_error err = {0};
    const struct option options[] = {
        COMMON_OPTIONS(c),
        {"json", NULL, "print one JSON object", OPTION_FLAG, &c.json, 0, 0, NULL}};
    const struct command command = {
        .name = "tokenizer info",
        .usage = "--tokenizer FILE [OPTIONS] [TEXT-FILE]",
        .summary = "Describes a tokenizer; with a text, also how well and how fast it encodes it.",
        .examples = "  tril tokenizer info --tokenizer tokenizer.json\n"
                    "  tril tokenizer info --tokenizer out/ --threads 1 --json book.txt",
        .options = options,
        .option_count = sizeof options / sizeof *options,
        .positional = &c.files};
    int code;
    if (command_begin(&command, argc, argv, &code)) {
        tril_tokenizer *t;
        struct tril_tokenizer_info info;
        struct measured m = {0};
        tril_status st = load(&t, &c, &err);
        if (st == TRIL_OK) {
            tril_tokenizer_info_get(t, &info);
            if (c.files.count)
                st = measure(t, &c.files, &m, &err);
        }
        if (st == TRIL_OK) {
            (c.json ? info_json : info_table)(c.path, t, &info, &m);
            st = flush_output(&err);
        }
        if (st != TRIL_OK)
            code = command_fail(command.name, st, &err);
        tril_tokenizer_free(t);
    }
    option_list_free(&c.files);
    return code;
}

int cmd_tokenizer(int argc, char **argv) {
    static const struct {
        const char *name, *text;
        int (*run)(int argc, char **argv);
    } commands[] = {{"train", "train byte-level BPE on text files", tokenizer_train_command},
                    {"encode", "text to ids", encode_command},
                    {"decode", "ids to text", decode_command},
                    {"info", "describe a tokenizer; measure it on a text", info_command}};
    const size_t count = sizeof commands / sizeof *commands;
    for (size_t i = 0; argc > 1 && i < count; i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].run(argc - 1, argv + 1);
    bool help = argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0);
    FILE *to = help ? stdout : stderr;
    if (argc > 1 && !help)
        fprintf(to, "tril " NAME ": there is no '%s'\n", argv[1]);
    fprintf(to, "usage: tril tokenizer train|encode|decode|info [OPTIONS]\n\n");
    for (size_t i = 0; i < count; i++)
        fprintf(to, "  %-8s %s\n", commands[i].name, commands[i].text);
    fprintf(to, "\n'tril tokenizer train --help' and so on describe each with examples:\n"
                "  tril tokenizer train --vocab 8192 --out tokenizer.json book.txt\n"
                "  echo -n 'Hello' | tril tokenizer encode --tokenizer tokenizer.json --json\n");
    return help ? 0 : tril_status_exit_code(TRIL_ERR_ARGUMENT);
}
