/* What Linux tells in /proc and in the control group. Elsewhere the files are missing, and the
 * answers are "unknown" (0). */
#include "base/system.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The rest of the first line of `path` that starts with `key`, without blanks and ':'. */
static bool proc_field(const char *path, const char *key, char *out, size_t size) {
    FILE *f = fopen(path, "re");
    bool found = false;
    char line[512];
    while (f && !found && fgets(line, sizeof line, f)) {
        if (strncmp(line, key, strlen(key)) != 0)
            continue;
        const char *s = line + strlen(key);
        s += strspn(s, " \t:");
        snprintf(out, size, "%.*s", (int)strcspn(s, "\n"), s);
        found = true;
    }
    if (f)
        fclose(f);
    return found;
}

static size_t proc_kilobytes(const char *path, const char *key) {
    char value[64];
    return proc_field(path, key, value, sizeof value) ? strtoull(value, NULL, 10) * 1024 : 0;
}

size_t memory_peak_rss(void) {
    return proc_kilobytes("/proc/self/status", "VmHWM");
}

void memory_reset_peak(void) {
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (f) {
        fputs("5", f); /* Linux: proc_pid_clear_refs(5) */
        fclose(f);
    }
}

size_t memory_anonymous(void) {
    return proc_kilobytes("/proc/self/status", "RssAnon");
}

/* Calls `visit` with the first line of `file` in our control group (version 2) and in each of its
 * parents: every one of them limits us. */
static void cgroup_walk(const char *file, void (*visit)(const char *line, void *arg), void *arg) {
    char group[512], path[640], line[128];
    if (!proc_field("/proc/self/cgroup", "0::", group, sizeof group))
        return;
    for (;;) {
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/%s", group, file);
        if (proc_field(path, "", line, sizeof line))
            visit(line, arg);
        char *slash = strrchr(group, '/');
        if (!slash)
            break;
        *slash = '\0';
    }
}

static void memory_visit(const char *line, void *arg) {
    size_t *limit = arg, value = strtoull(line, NULL, 10); /* "max" gives 0 */
    if (value > 0 && (*limit == 0 || value < *limit))
        *limit = value;
}

static size_t memory_found;
static void memory_find(void) {
    memory_found = proc_kilobytes("/proc/meminfo", "MemTotal");
    cgroup_walk("memory.max", memory_visit, &memory_found);
}

size_t memory_total(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, memory_find);
    return memory_found;
}

static void cpu_visit(const char *line, void *arg) {
    double *quota = arg, time, period; /* "200000 100000", or "max 100000" */
    if (sscanf(line, "%lf %lf", &time, &period) == 2 && period > 0 &&
        (*quota == 0 || time / period < *quota))
        *quota = time / period;
}

double cpu_quota(void) {
    double quota = 0;
    cgroup_walk("cpu.max", cpu_visit, &quota);
    return quota;
}

static char cpu_name[128];
static void cpu_find(void) {
    struct utsname u;
    if (!proc_field("/proc/cpuinfo", "model name", cpu_name, sizeof cpu_name) &&
        !proc_field("/proc/device-tree/model", "", cpu_name, sizeof cpu_name))
        snprintf(cpu_name, sizeof cpu_name, "%.100s processor",
                 uname(&u) == 0 ? u.machine : "unknown");
}

const char *cpu_model_name(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, cpu_find);
    return cpu_name;
}

bool stream_is_terminal(int fd) {
    return isatty(fd) == 1;
}

static volatile sig_atomic_t caught;

static void signal_note(int number) {
    caught = number;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
}

void signals_catch(void) {
    /* Without SA_RESTART: a read that waits for input returns, so that the flag is seen. */
    struct sigaction action = {.sa_handler = signal_note};
    sigemptyset(&action.sa_mask);
    caught = 0;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

int signal_caught(void) {
    return caught;
}
