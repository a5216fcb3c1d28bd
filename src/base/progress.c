/* One line on stderr, and the spelling of durations, sizes and counts. */
#include "base/progress.h"

#include <math.h>
#include <stdio.h>
#include <unistd.h>

#include "base/system.h"

#define SILENT_SECONDS 0.5   /* short work draws nothing */
#define TERMINAL_SECONDS 0.1 /* between two drawings */
#define LOG_SECONDS 5.0      /* between two lines that are not redrawn */

static int quiet_wanted;

void progress_quiet(int quiet) {
    quiet_wanted = quiet;
}

void progress_start(struct progress *p, const char *what, int64_t total) {
    *p = (struct progress){.what = what, .total = total, .started = clock_seconds()};
    p->terminal = stream_is_terminal(STDERR_FILENO);
    p->last = p->started;
}

void progress_update(struct progress *p, int64_t done, const char *detail) {
    if (quiet_wanted)
        return;
    double now = clock_seconds(), elapsed = now - p->started;
    double wait = !p->terminal ? LOG_SECONDS : p->drawn ? TERMINAL_SECONDS : SILENT_SECONDS;
    if (now - p->last < wait)
        return;
    p->last = now;
    p->drawn = 1;
    char count[32], total[32], left[32];
    format_count((double)done, count);
    fprintf(stderr, p->terminal ? "\r\033[K%s: " : "%s: ", p->what);
    if (p->total > 0) {
        double share = (double)done / (double)p->total;
        fprintf(stderr, "%3.0f%% (%s of %s)", 100 * share, count,
                format_count((double)p->total, total));
        if (done > 0 && done < p->total)
            fprintf(stderr, ", %s left", format_duration(elapsed / share - elapsed, left));
    } else {
        fprintf(stderr, "%s", count);
    }
    if (detail && detail[0])
        fprintf(stderr, ", %s", detail);
    if (!p->terminal)
        fputc('\n', stderr);
    fflush(stderr);
}

void progress_end(struct progress *p) {
    if (p->drawn && p->terminal && !quiet_wanted) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
    }
    p->drawn = 0;
}

const char *format_duration(double seconds, char buf[32]) {
    if (!isfinite(seconds) || seconds < 0 || seconds > 1e12) {
        snprintf(buf, 32, "?");
    } else if (seconds < 0.9995e-3) {
        snprintf(buf, 32, "%.3g us", seconds * 1e6);
    } else if (seconds < 0.9995) {
        snprintf(buf, 32, "%.3g ms", seconds * 1e3);
    } else if (seconds < 59.95) {
        snprintf(buf, 32, "%.1f s", seconds);
    } else if (seconds < 3599.5) {
        int s = (int)(seconds + 0.5);
        snprintf(buf, 32, "%d min %d s", s / 60, s % 60);
    } else {
        long long minutes = (long long)(seconds / 60 + 0.5);
        snprintf(buf, 32, "%lld h %lld min", minutes / 60, minutes % 60);
    }
    return buf;
}

/* x in the largest of the units, 1000 apart, that leaves at least 1 after rounding; one decimal
 * below `whole_from`, none from there on and for whole numbers of the smallest unit. */
static const char *format_scaled(double x, const char *const *units, int count, double whole_from,
                                 char buf[32]) {
    double size = fabs(x);
    int unit = 0;
    while (unit + 1 < count && size >= (unit > 0 && whole_from > 1000 ? 999.95 : 999.5)) {
        size /= 1000;
        unit++;
    }
    int decimals = (unit == 0 && size == floor(size)) || size >= whole_from - 0.05 ? 0 : 1;
    snprintf(buf, 32, "%s%.*f%s", x < 0 ? "-" : "", decimals, size, units[unit]);
    return buf;
}

const char *format_bytes(double bytes, char buf[32]) {
    static const char *const units[] = {" B", " kB", " MB", " GB", " TB", " PB"};
    return format_scaled(bytes, units, 6, 100, buf);
}

const char *format_count(double n, char buf[32]) {
    static const char *const units[] = {"", "k", "M", "B", "T"};
    return format_scaled(n, units, 5, 1e9, buf);
}
