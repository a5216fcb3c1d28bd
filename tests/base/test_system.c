/* Clocks, memory figures, the interrupt flag; and the spelling of durations, sizes and counts. */
#include "base/system.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/progress.h"
#include "support/support.h"

static void test_machine(void **state) {
    (void)state;
    double before = clock_seconds();
    usleep(2000);
    double passed = clock_seconds() - before;
    assert_true(passed >= 0.002 && passed < 60);
    assert_true(memory_peak_rss() > 100000);
    assert_true(memory_anonymous() > 10000 && memory_anonymous() <= memory_total());
    assert_true(memory_total() > 1 << 20);
    assert_true(cpu_quota() >= 0);
    assert_true(strlen(cpu_model_name()) > 0);
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    assert_false(stream_is_terminal(fds[0]));
    close(fds[0]);
    close(fds[1]);
}

static void test_signals(void **state) {
    (void)state;
    pid_t child = fork();
    if (child == 0) {
        signals_catch();
        if (signal_caught() != 0)
            _exit(1);
        raise(SIGTERM);
        if (signal_caught() != SIGTERM)
            _exit(2);
        raise(SIGINT); /* the second one kills */
        _exit(3);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT);
}

static void test_formats(void **state) {
    (void)state;
    char b[32];
    assert_string_equal(format_duration(1.5, b), "1.5 s");
    assert_string_equal(format_duration(0.0123, b), "12.3 ms");
    assert_string_equal(format_duration(4.2e-6, b), "4.2 us");
    assert_string_equal(format_duration(200, b), "3 min 20 s");
    assert_string_equal(format_duration(59.99, b), "1 min 0 s");
    assert_string_equal(format_duration(3599.9, b), "1 h 0 min");
    assert_string_equal(format_duration(7500, b), "2 h 5 min");
    assert_string_equal(format_duration(-1, b), "?");
    assert_string_equal(format_bytes(0, b), "0 B");
    assert_string_equal(format_bytes(999, b), "999 B");
    assert_string_equal(format_bytes(1200000000.0, b), "1.2 GB");
    assert_string_equal(format_bytes(340e6, b), "340 MB");
    assert_string_equal(format_bytes(999.7e6, b), "1.0 GB");
    assert_string_equal(format_count(124.4e6, b), "124.4M");
    assert_string_equal(format_count(999, b), "999");
    assert_string_equal(format_count(999960, b), "1.0M");
    assert_string_equal(format_count(1.76e12, b), "1.8T");
}

/* Off a terminal, short work draws nothing. */
static void test_progress_is_silent(void **state) {
    (void)state;
    int fds[2], saved = dup(STDERR_FILENO);
    char text[16];
    assert_int_equal(pipe(fds), 0);
    dup2(fds[1], STDERR_FILENO);
    struct progress p;
    progress_start(&p, "work", 10);
    for (int i = 0; i <= 10; i++)
        progress_update(&p, i, "detail");
    progress_end(&p);
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(fds[1]);
    assert_int_equal(read(fds[0], text, sizeof text), 0);
    close(fds[0]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_machine),
        cmocka_unit_test(test_signals),
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_progress_is_silent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
