/* The temporary folder of a test program, and the processor that it needs. */
#include "support/support.h"

#include <ftw.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "cpu/cpu.h"

static char folder[PATH_MAX];
static pid_t owner; /* a forked child must not remove its parent's folder */

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *ftw) {
    (void)info, (void)type, (void)ftw;
    return remove(path);
}

static void remove_folder(void) {
    if (getpid() == owner)
        nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

const char *test_dir(void) {
    if (!folder[0]) {
        const char *base = getenv("TMPDIR");
        snprintf(folder, sizeof folder, "%s/tril-test-XXXXXX", base && base[0] ? base : P_tmpdir);
        if (!mkdtemp(folder)) {
            perror(folder);
            exit(EXIT_FAILURE);
        }
        owner = getpid();
        atexit(remove_folder);
    }
    return folder;
}

const char *test_path(const char *name) {
    static char paths[8][PATH_MAX + 256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", test_dir(), name);
    return path;
}

bool level_missing(void) {
    enum cpu_level level = cpu_level_requested();
    if (cpu_level_supported(level))
        return false;
    printf("skipped: this machine has no %s\n", cpu_level_name(level));
    return true;
}
