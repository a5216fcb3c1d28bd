/* The registry's operations on a device backend against their references. */
#ifndef TESTS_OP_BACKEND_H
#define TESTS_OP_BACKEND_H

#include "ops/ops.h"

/* A test program's main: every operation that `b` does not leave to its reference, over all cases.
 * `travels`: the cases' memory is copied to the backend's and back; otherwise the backend can use
 * the host's (the emulated GPU). TRIL_TEST_OP=NAME chooses operations by a part of their name. */
int op_backend_test(const struct backend *b, bool travels);

#endif
