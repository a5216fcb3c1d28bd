/* tril/tril.h: versions, threads, signals. */
#include "tril/tril.h"

#include "base/system.h"
#include "base/threads.h"
#include "cpu/cpu.h"

#ifdef TRIL_ONEDNN
#include <dnnl_version.h>
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
#define ONEDNN_VERSION                                                                             \
    TEXT(DNNL_VERSION_MAJOR) "." TEXT(DNNL_VERSION_MINOR) "." TEXT(DNNL_VERSION_PATCH)
#else
#define ONEDNN_VERSION NULL
#endif

const char *tril_version(void) {
    return TRIL_VERSION;
}

void tril_build_info_get(struct tril_build_info *info) {
    *info = (struct tril_build_info){
        .version = TRIL_VERSION,
#ifdef __clang__
        .compiler = "clang " __clang_version__,
#else
        .compiler = "gcc " __VERSION__,
#endif
        .onednn = ONEDNN_VERSION,
        .processor = cpu_model_name(),
        .isa = cpu_level_name(cpu_level_active()),
        .isa_best = cpu_level_name(cpu_level_available()),
        .threads = threads_count(),
    };
}

void tril_threads_set(int threads) {
    threads_set(threads);
}

void tril_signals_catch(void) {
    signals_catch();
}
