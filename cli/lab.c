/* tril lab: the papers' experiments. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli.h"
#include "json.h"
#include "options.h"
#include "tril/tril.h"

static const char *duration(double seconds, char buf[32]) {
    if (seconds < 90)
        snprintf(buf, 32, "%.0f s", seconds);
    else
        snprintf(buf, 32, "%.0f min", seconds / 60);
    return buf;
}

static void list(bool json) {
    struct tril_lab_experiment e;
    json_t *root = json_array();
    char quick[32], full[32];
    if (!json)
        printf("%-17s %-12s %6s %7s  %s\n", "name", "rows", "quick", "full",
               "what (*: on a GPU too)");
    for (int i = 0; tril_lab_get(i, &e); i++) {
        if (!json)
            printf("%-17s %-12s %6s %7s  %s%s%s\n", e.name, e.rows,
                   duration(e.quick_seconds, quick), duration(e.full_seconds, full), e.summary,
                   e.reads_text ? " (--data)" : "", e.device ? " *" : "");
        json_array_append_new(root, json_pack("{s:s, s:s, s:s, s:f, s:f, s:b, s:b}", "name", e.name,
                                              "rows", e.rows, "summary", e.summary, "quick_seconds",
                                              e.quick_seconds, "full_seconds", e.full_seconds,
                                              "reads_text", e.reads_text, "device", e.device));
    }
    if (json)
        json_print(json_pack("{s:o}", "experiments", root));
    else
        json_decref(root);
}

static tril_status run(struct tril_lab_options *o, const struct option_list *words, bool json,
                       struct tril_error *err) {
    tril_status st = TRIL_OK;
    if (words->count < 2) {
        snprintf(err->message, sizeof err->message,
                 "name the experiments to run (tril lab list), or all");
        return TRIL_ERR_ARGUMENT;
    }
    bool all = strcmp(words->values[1], "all") == 0;
    struct tril_lab_experiment e;
    for (int i = 0; st == TRIL_OK && (all ? tril_lab_get(i, &e) : i + 1 < words->count); i++) {
        char *text = NULL;
        if (all && !e.device && strcmp(o->device, "cpu") != 0)
            continue;
        o->name = all ? e.name : words->values[i + 1];
        o->print = json ? NULL : stdout;
        st = tril_lab_run(o, json ? &text : NULL, err);
        if (text)
            puts(text);
        free(text);
        if (!json)
            putchar('\n');
    }
    return st;
}

int cmd_lab(int argc, char **argv) {
    struct tril_lab_options o = {.out = "lab", .device = "cpu"};
    struct option_list words = {0}, data = {0};
    struct tril_error err = {0};
    bool json = false, quick = false, full = false, papers = false;
    int64_t threads = 0;
    int code = 0, count;
    const struct option options[] = {
        {"quick", NULL, "seconds to a minute: enough for the claims to show (default)", OPTION_FLAG,
         &quick, 0, 0, NULL},
        {"full", NULL, "minutes to an hour: the figures in docs/lab.md", OPTION_FLAG, &full, 0, 0,
         NULL},
        {"papers", NULL, "the published regime, where it is larger (depth)", OPTION_FLAG, &papers,
         0, 0, NULL},
        {"out", "DIR", "results go to DIR/NAME (lab)", OPTION_STRING, &o.out, 0, 0, NULL},
        {"data", "FILE", "text files to train on (default: generated sentences)", OPTION_STRINGS,
         &data, 0, 0, NULL},
        {"device", "NAME", "cuda: what can run on a GPU (list: *); all: only that", OPTION_CHOICE,
         &o.device, 0, 0, "cpu|cuda"},
        {"threads", "N", "0: all processors", OPTION_INT, &threads, 0, 1024, NULL},
        {"json", NULL, "print the result as JSON instead of tables", OPTION_FLAG, &json, 0, 0,
         NULL},
    };
    const struct command command = {
        .name = "lab",
        .usage = "list | run NAME...|all [--quick|--full] [--data FILE...] | report [--out DIR]",
        .summary =
            "The founding papers' experiments: each prints a table with the published figures "
            "beside its own,\nwrites CSV, JSON and plots, and says what it found. `report` makes "
            "one HTML page of all results.",
        .examples = "  tril lab list\n"
                    "  tril lab run averaging leak\n"
                    "  tril lab run depth --full --data book.txt\n"
                    "  tril lab run all --device cuda --full\n"
                    "  tril lab report",
        .options = options,
        .option_count = sizeof options / sizeof *options,
        .positional = &words};
    if (!command_begin(&command, argc, argv, &code))
        goto done;
    tril_status st = TRIL_OK;
    const char *what = words.count ? words.values[0] : "";
    o.size = papers ? TRIL_LAB_PAPERS : full ? TRIL_LAB_FULL : TRIL_LAB_QUICK;
    o.threads = (int)threads;
    o.data = data.values;
    o.data_count = data.count;
    if (quick + full + papers > 1) {
        st = TRIL_ERR_ARGUMENT;
        snprintf(err.message, sizeof err.message, "give one of --quick, --full and --papers");
    } else if (strcmp(what, "list") == 0) {
        list(json);
    } else if (strcmp(what, "run") == 0) {
        st = run(&o, &words, json, &err);
    } else if (strcmp(what, "report") == 0) {
        st = tril_lab_report(o.out, &count, &err);
        if (st == TRIL_OK && json)
            json_print(json_pack("{s:i, s:o}", "experiments", count, "report",
                                 json_sprintf("%s/report.html", o.out)));
        else if (st == TRIL_OK)
            printf("%d experiments in %s/report.html\n", count, o.out);
    } else {
        st = TRIL_ERR_ARGUMENT;
        snprintf(err.message, sizeof err.message, "say list, run NAME or report");
    }
    if (st != TRIL_OK)
        code = command_fail("lab", st, &err);
done:
    option_list_free(&words);
    option_list_free(&data);
    return code;
}
