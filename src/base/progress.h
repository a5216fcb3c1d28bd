/* Progress on stderr: redrawn in place on a terminal; elsewhere one line every few seconds. */
#ifndef BASE_PROGRESS_H
#define BASE_PROGRESS_H

#include <stdint.h>

struct progress {
    const char *what;
    double started, last;
    int64_t total;
    int drawn, terminal;
};

/* Nothing is drawn in the first half second, so short work stays silent. total 0: unknown. */
void progress_start(struct progress *p, const char *what, int64_t total);
/* `detail` may be NULL; e.g. "loss 3.21". */
void progress_update(struct progress *p, int64_t done, const char *detail);
void progress_end(struct progress *p); /* clears the line on a terminal */

/* "1.5 s", "3 min 20 s", "2 h 5 min"; "1.2 GB" (10^9), "340 MB". buf of at least 32 bytes. */
const char *format_duration(double seconds, char buf[32]);
const char *format_bytes(double bytes, char buf[32]);
const char *format_count(double n, char buf[32]); /* "124.4M" */

/* Whether progress and notes go to stderr at all (default yes). */
void progress_quiet(int quiet);

#endif
