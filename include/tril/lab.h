/* The lab: the founding papers' experiments, one command each. An experiment prints its tables with
 * the published figures beside its own, draws its plots, and says what it found; where that is not
 * what was published it says so too. */
#ifndef TRIL_LAB_H
#define TRIL_LAB_H

#include <stdbool.h>
#include <stdio.h>

#include "tril/error.h"

#ifdef __cplusplus
extern "C" {
#endif

struct tril_lab_experiment {
    const char *name;     /* "averaging" */
    const char *summary;  /* one line */
    const char *rows;     /* of the papers' table of claims: "A1", "E5" */
    double quick_seconds; /* about, on two AVX2 processors */
    double full_seconds;
    bool reads_text; /* --data is used */
    bool device;     /* can run on a GPU */
};

/* Number `index` (0, 1, ...) of the list; false when there are no more. */
bool tril_lab_get(int index, struct tril_lab_experiment *out);

enum tril_lab_size {
    TRIL_LAB_QUICK, /* seconds to a minute: enough for the claims to show */
    TRIL_LAB_FULL,  /* minutes to an hour: the figures in docs/lab.md */
    TRIL_LAB_PAPERS /* the published regime, for whoever has the machine; like full where the
                     * papers' own sizes are those of full */
};

struct tril_lab_options {
    const char *name; /* of the experiment */
    enum tril_lab_size size;
    const char *out;         /* results go to OUT/NAME/; NULL: "lab" */
    const char *const *data; /* text files for what trains on text; none: generated sentences */
    int data_count;
    int threads;        /* 0: all */
    const char *device; /* "cpu" (NULL) | "cuda", where the experiment can */
    FILE *print;        /* where tables and text go as they come; NULL: nowhere */
};

/* Runs one experiment. Writes OUT/NAME/result.json (everything: machine, tables, claims, findings,
 * values, plots), one CSV and one JSON a table, and the plots as SVG (and PNG where rsvg-convert is
 * installed). *json, if not NULL, receives the text of result.json (free() it). */
tril_status tril_lab_run(const struct tril_lab_options *options, char **json,
                         struct tril_error *err);

/* Collects the results found in OUT/<name>/ into one page that needs nothing else,
 * OUT/report.html, and into Markdown with links to the plots, OUT/report.md. *count receives how
 * many there were; none is ERR_ARGUMENT. */
tril_status tril_lab_report(const char *out, int *count, struct tril_error *err);

#ifdef __cplusplus
}
#endif
#endif
