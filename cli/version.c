/* tril version: what was found when it was built, and on this machine. */
#include <stdio.h>

#include "cli.h"
#include "json.h"
#include "options.h"
#include "tril/tril.h"

int cmd_version(int argc, char **argv) {
    bool json = false;
    const struct option options[] = {
        {"json", NULL, "print one JSON object", OPTION_FLAG, &json, 0, 0, NULL}};
    const struct command command = {
        .name = "version",
        .usage = "[--json]",
        .summary =
            "Says what this build and this machine offer. TRIL_CPU=generic|avx2|avx512|amx in "
            "the\nenvironment forces the instruction set down.",
        .examples = "  tril version\n  TRIL_CPU=avx2 tril version --json",
        .options = options,
        .option_count = 1};
    int code;
    if (!command_begin(&command, argc, argv, &code))
        return code;
    struct tril_build_info info;
    tril_build_info_get(&info);
    if (json) {
        json_print(json_pack("{s:s, s:s, s:s?, s:s?, s:s, s:s, s:s, s:i}", "version", info.version,
                             "compiler", info.compiler, "onednn", info.onednn, "cuda",
                             tril_cuda_info(), "processor", info.processor, "isa", info.isa,
                             "isa_best", info.isa_best, "threads", info.threads));
        return 0;
    }
    printf("tril %s (%s)\n", info.version, info.compiler);
    printf("  processor      %s, %d threads\n", info.processor, info.threads);
    printf("  instructions   %s (best of this machine: %s)\n", info.isa, info.isa_best);
    printf("  oneDNN         %s\n", info.onednn ? info.onednn : "not built in");
    const char *cuda = tril_cuda_info();
    printf("  CUDA           %s\n", cuda ? cuda : "not built in");
    return 0;
}
