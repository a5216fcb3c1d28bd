/* The registry's operations on a device backend against their references. */
#ifndef TESTS_OP_BACKEND_H
#define TESTS_OP_BACKEND_H

#include "ops/ops.h"

/* A test program's main: every operation that `b` does not leave to its reference, over all cases.
 * `travels`: the cases' memory is copied to the backend's and back; otherwise the backend can use
 * the host's (the emulated GPU). TRIL_TEST_OP=NAME chooses operations by a part of their name. */
int op_backend_test(const struct backend *b, bool travels);

/* For cases of a test's own. open: 0, or what main should return (after a line that says why). Then
 * op_backend_case judges a case as those of the registry are; `index` is only told. Returns the
 * number of faults. */
int op_backend_open(const struct backend *b, bool travels);
int op_backend_case(const struct op_info *info, int index, const struct op_case *c);
void op_backend_close(void);

#endif
