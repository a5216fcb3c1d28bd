/* What every test needs: cmocka with its includes, a temporary folder, and the way to skip. */
#ifndef TESTS_SUPPORT_H
#define TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#define TEST_SKIP 77 /* a test program's exit code for "skipped"; print why first */

/* A fresh folder, removed with all that is in it when the program ends. One per program. */
const char *test_dir(void);
/* test_dir() + "/" + name; valid until the eighth call from here. */
const char *test_path(const char *name);
/* Whether TRIL_CPU asks for a level that this machine has not got, which is then printed. For the
 * main function of tests that run once per level: if (level_missing()) return TEST_SKIP; */
bool level_missing(void);

#endif
