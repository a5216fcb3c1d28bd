// ctest: timeout=60
/* Choosing a level: TRIL_CPU forces one down, never up, and says so once. Each choice is made in a
 * process of its own, since it is made once per process. */
#include "support/support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cpu/cpu.h"

struct choice {
    int available, requested, active, differing; /* operations that are not the reference */
    char said[1024];
};

/* The choice that a fresh process makes with TRIL_CPU=name (NULL: unset). */
static struct choice choose(const char *name) {
    struct choice c = {0};
    int result[2], messages[2];
    assert_int_equal(pipe(result), 0);
    assert_int_equal(pipe(messages), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (name)
            setenv("TRIL_CPU", name, 1);
        else
            unsetenv("TRIL_CPU");
        dup2(messages[1], 2);
        struct choice mine = {.active = (int)cpu_level_active(), /* (first: any order must do) */
                              .available = (int)cpu_level_available(),
                              .requested = (int)cpu_level_requested()};
        cpu_level_active();
        const struct backend *b = backend_cpu();
        for (int id = 0; id < OP_COUNT; id++) {
            mine.differing += b->table[id] != backend_reference()->table[id];
            if (!b->table[id])
                _exit(3);
        }
        _exit(write(result[1], &mine, sizeof mine) == sizeof mine && b == backend_cpu() &&
                      strcmp(b->name, "cpu") == 0
                  ? 0
                  : 2);
    }
    close(result[1]);
    close(messages[1]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(read(result[0], &c, sizeof c), sizeof c);
    ssize_t n = read(messages[0], c.said, sizeof c.said - 1);
    c.said[n < 0 ? 0 : n] = 0;
    close(result[0]);
    close(messages[0]);
    return c;
}

static void test_default(void **state) {
    (void)state;
    struct choice c = choose(NULL), empty = choose("");
    assert_int_equal(c.active, c.available);
    assert_int_equal(c.requested, c.available);
    assert_true(c.available != CPU_EMU512);
    assert_string_equal(c.said, "");
    assert_int_equal(empty.active, c.available);
    assert_true(c.differing > 0);
}

static void test_forcing(void **state) {
    (void)state;
    for (int level = CPU_GENERIC; level <= CPU_AMX; level++) {
        const char *name = cpu_level_name((enum cpu_level)level);
        struct choice c = choose(name);
        assert_int_equal(c.requested, level);
        if (level <= c.available) {
            assert_int_equal(c.active, level);
            assert_string_equal(c.said, "");
        } else { /* clipped, and one line that says to what */
            assert_int_equal(c.active, c.available);
            assert_non_null(strstr(c.said, name));
            assert_non_null(strstr(c.said, cpu_level_name((enum cpu_level)c.available)));
            assert_ptr_equal(strchr(c.said, '\n'), c.said + strlen(c.said) - 1);
        }
    }
}

static void test_emulation(void **state) {
    (void)state;
    struct choice c = choose("emu512");
#ifdef TRIL_EMULATE_512
    assert_int_equal(c.active, c.available >= CPU_AVX2 ? CPU_EMU512 : c.available);
#else
    assert_int_equal(c.active, c.available);
    assert_true(c.said[0] != 0);
#endif
}

static void test_unknown(void **state) {
    (void)state;
    struct choice c = choose("avx99");
    assert_int_equal(c.active, c.available);
    assert_non_null(strstr(c.said, "avx99"));
    assert_non_null(strstr(c.said, "generic, avx2, avx512, amx"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_default),
        cmocka_unit_test(test_forcing),
        cmocka_unit_test(test_emulation),
        cmocka_unit_test(test_unknown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
