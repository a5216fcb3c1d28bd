/* tril bench attention. */
#ifndef CLI_BENCH_ATTENTION_H
#define CLI_BENCH_ATTENTION_H

#include "options.h"
#include "tril/bench.h"

/* Runs it with the rules in `visible` and prints the result; the exit code. */
int bench_attention(struct tril_bench_attention_options *o, const struct option_list *visible,
                    bool json);

#endif
