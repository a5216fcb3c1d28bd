/* The machine around us: clocks, memory use, terminal, interrupt flag. */
#ifndef BASE_SYSTEM_H
#define BASE_SYSTEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

double clock_seconds(void); /* monotonic */
/* Peak resident set of this process (VmHWM), and current anonymous memory (RssAnon); 0 unknown. */
size_t memory_peak_rss(void);
void memory_reset_peak(void); /* begins the peak anew, where the kernel lets us */
size_t memory_anonymous(void);
size_t memory_total(void); /* of the machine or the control group, whichever is smaller */
double cpu_quota(void);    /* processors' worth of time that the control group grants; 0 no limit */
const char *cpu_model_name(void); /* "AMD EPYC ..." as the OS gives it; never NULL */
bool stream_is_terminal(int fd);

/* After signals_catch(), SIGINT and SIGTERM only set a flag (a second one kills). */
void signals_catch(void);
int signal_caught(void); /* the signal's number, or 0 */

#endif
