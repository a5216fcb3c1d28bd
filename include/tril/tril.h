/* tril: train, look inside and serve causal language models. Includes every public header. */
#ifndef TRIL_TRIL_H
#define TRIL_TRIL_H

#include "tril/attention.h"
#include "tril/bench.h"
#include "tril/config.h"
#include "tril/error.h"
#include "tril/eval.h"
#include "tril/export.h"
#include "tril/generate.h"
#include "tril/inspect.h"
#include "tril/lab.h"
#include "tril/plot.h"
#include "tril/tokenizer.h"
#include "tril/train.h"

#ifdef __cplusplus
extern "C" {
#endif

/* "0.1.0" */
const char *tril_version(void);

/* What this build and this machine offer. Strings live as long as the process. */
struct tril_build_info {
    const char *version, *compiler;
    const char *onednn;         /* its version, or NULL: built without */
    const char *processor;      /* as the operating system names it */
    const char *isa, *isa_best; /* level in use (TRIL_CPU forces it down), best of the machine */
    int threads;
};
void tril_build_info_get(struct tril_build_info *info);
/* CUDA's version and the GPU, or why none is used; NULL: built without. Asks the driver, which
 * takes a while. Lives as long as the process. */
const char *tril_cuda_info(void);

/* Threads that everything uses; 0: all processors available. */
void tril_threads_set(int threads);
/* From now on SIGINT and SIGTERM end long calls in order (with ERR_INTERRUPTED). */
void tril_signals_catch(void);

#ifdef __cplusplus
}
#endif
#endif
