/* tril export: a model written anew. */
#include <stdio.h>

#include "cli.h"
#include "model_options.h"
#include "options.h"
#include "tril/tril.h"

int cmd_export(int argc, char **argv) {
    struct tril_model_overrides overrides = tril_model_overrides_none();
    struct tril_export_options o = {.dtype = "fp32", .overrides = &overrides};
    struct tril_error err = {0};
    int64_t threads = 0;
    char type[32];
    int code;
    const struct option options[] = {
        {"model", "DIR", "a Hugging Face directory", OPTION_STRING, &o.model, 0, 0, NULL},
        {"out", "DIR", "the new one", OPTION_STRING, &o.out, 0, 0, NULL},
        {"dtype", "TYPE", "of the weights (fp32)", OPTION_CHOICE, &o.dtype, 0, 0, "fp32|bf16|fp16"},
        {"native", NULL, "as tril's own type, if transformers has none", OPTION_FLAG, &o.native, 0,
         0, NULL},
        {.kind = OPTION_HEADING, .help = "The model, changed where its parameters stay the same"},
        {"context", "N", "longest sequence", OPTION_INT, &overrides.context, 1, 1e8, NULL},
        VIEW_OPTIONS(overrides),
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
    };
    const struct command command = {
        .name = "export",
        .usage = "--model DIR --out DIR [OPTIONS]",
        .summary =
            "Writes a model anew: in another dtype, or with settings that leave its parameters as "
            "they are.\nWhat transformers has a model type for is written as that type; the rest "
            "is refused with the\nreason, unless --native is given.",
        .examples = "  tril export --model out --out out-bf16 --dtype bf16\n"
                    "  tril export --model out --out out-long --context 1024 --rope-scaling yarn",
        .options = options,
        .option_count = sizeof options / sizeof *options};
    if (!command_begin(&command, argc, argv, &code))
        return code;
    tril_threads_set((int)threads);
    tril_status st = tril_export(&o, type, &err);
    if (st != TRIL_OK)
        return command_fail("export", st, &err);
    printf("%s: %s, %s\n", o.out, type, o.dtype);
    return 0;
}
