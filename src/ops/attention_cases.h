/* Attention's cases for the tests and the benchmarks of the registry. */
#ifndef OPS_ATTENTION_CASES_H
#define OPS_ATTENTION_CASES_H

#include "ops/attention.h"

bool attention_forward_case(int index, struct op_case *out);
bool attention_backward_case(int index, struct op_case *out);
void attention_forward_fill(const struct op_case *c, struct tensor *args,
                            const struct random_key *key);
void attention_backward_fill(const struct op_case *c, struct tensor *args,
                             const struct random_key *key);

#endif
