/* tril: dispatches to the sub-commands, nothing else. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli.h"
#include "tril/tril.h"

static void usage(FILE *to) {
    fprintf(to, "tril: train, look inside and run causal language models\n\n"
                "usage: tril COMMAND [OPTIONS]\n\n");
#define COMMAND_ROW(name, text) fprintf(to, "  %-10s %s\n", #name, text);
    COMMAND_LIST(COMMAND_ROW)
#undef COMMAND_ROW
    fprintf(to, "\n'tril COMMAND --help' describes one with examples.\n");
}

/* A command that could not say what it found has failed, unless nobody listens any more. */
static int finish(int code) {
    errno = 0;
    bool failed = fflush(stdout) != 0 || ferror(stdout);
    struct pollfd out = {.fd = STDOUT_FILENO, .events = POLLOUT};
    if (!failed || code || (poll(&out, 1, 0) == 1 && out.revents & POLLERR))
        return code;
    fprintf(stderr, "tril: standard output cannot be written%s%s\n", errno ? ": " : "",
            errno ? strerror(errno) : "");
    return tril_status_exit_code(TRIL_ERR_IO);
}

static int run(int argc, char **argv) {
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

int main(int argc, char **argv) {
    /* A closed pipe and a file too large are write errors, reported as such. */
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    return finish(run(argc, argv));
}
