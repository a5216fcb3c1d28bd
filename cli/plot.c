/* tril plot: curves from a CSV. */
#include <stdio.h>

#include "cli.h"
#include "options.h"
#include "tril/tril.h"

int cmd_plot(int argc, char **argv) {
    struct tril_plot_options o = {0};
    struct tril_error err = {0};
    int code;
    const struct option options[] = {
        {"data", "FILE.csv", "a line of column names, then numbers; empty cells are gaps",
         OPTION_STRING, &o.data, 0, 0, NULL},
        {"out", "FILE.svg", "the picture", OPTION_STRING, &o.out, 0, 0, NULL},
        {"x", "COLUMN", "goes to the right (the first)", OPTION_STRING, &o.x, 0, 0, NULL},
        {"title", "TEXT", "above it", OPTION_STRING, &o.title, 0, 0, NULL},
        {"x-label", "TEXT", "below it", OPTION_STRING, &o.x_label, 0, 0, NULL},
        {"y-label", "TEXT", "beside it", OPTION_STRING, &o.y_label, 0, 0, NULL},
        {"log-x", NULL, "a logarithmic axis", OPTION_FLAG, &o.x_log, 0, 0, NULL},
        {"log-y", NULL, "a logarithmic axis", OPTION_FLAG, &o.y_log, 0, 0, NULL},
    };
    const struct command command = {
        .name = "plot",
        .usage = "--data FILE.csv --out FILE.svg [OPTIONS]",
        .summary = "Draws one line for every column of a table of numbers.",
        .examples = "  tril plot --data times.csv --out times.svg --log-x --log-y --y-label ms",
        .options = options,
        .option_count = sizeof options / sizeof *options};
    if (!command_begin(&command, argc, argv, &code))
        return code;
    tril_status st = TRIL_ERR_ARGUMENT;
    if (!o.data || !o.out)
        snprintf(err.message, sizeof err.message,
                 "name a table with --data and a picture with --out");
    else
        st = tril_plot(&o, &err);
    return st == TRIL_OK ? 0 : command_fail("plot", st, &err);
}
