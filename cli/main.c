/* tril: dispatches to the sub-commands, nothing else. */
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "cli.h"

static void usage(FILE *to) {
    fprintf(to, "tril: train, look inside and run causal language models\n\n"
                "usage: tril COMMAND [OPTIONS]\n\n");
#define COMMAND_ROW(name, text) fprintf(to, "  %-10s %s\n", #name, text);
    COMMAND_LIST(COMMAND_ROW)
#undef COMMAND_ROW
    fprintf(to, "\n'tril COMMAND --help' describes one with examples.\n");
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is a write error, reported as such */
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        usage(argc < 2 ? stderr : stdout);
        return argc < 2 ? 2 : 0;
    }
    if (strcmp(argv[1], "--version") == 0)
        return cmd_version(argc - 1, argv + 1);
#define COMMAND_CASE(name, text)                                                                   \
    if (strcmp(argv[1], #name) == 0)                                                               \
        return cmd_##name(argc - 1, argv + 1);
    COMMAND_LIST(COMMAND_CASE)
#undef COMMAND_CASE
    fprintf(stderr, "tril: there is no command '%s'; 'tril --help' lists them\n", argv[1]);
    return 2;
}
