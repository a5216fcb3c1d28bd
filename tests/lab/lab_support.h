/* Running an experiment in its quick form and reading its result. */
#ifndef TESTS_LAB_SUPPORT_H
#define TESTS_LAB_SUPPORT_H

#include "support/support.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tril/lab.h"

/* The result of `tril lab run NAME --quick`; json_decref it. Tables must have rows, every plot must
 * be there, and something must have been found. */
static inline json_t *lab_result(const char *name) {
    struct tril_error err = {0};
    struct tril_lab_options o = {.name = name, .out = test_dir()};
    char *text = NULL, path[512];
    json_error_t at;
    json_t *item;
    size_t i;
    if (tril_lab_run(&o, &text, &err) != TRIL_OK)
        fail_msg("%s: %s", name, err.message);
    json_t *r = json_loads(text, 0, &at);
    if (!r)
        fail_msg("%s: %s", name, at.text);
    free(text);
    assert_true(json_array_size(json_object_get(r, "tables")) > 0);
    assert_true(json_array_size(json_object_get(r, "findings")) > 0);
    json_array_foreach(json_object_get(r, "tables"), i, item)
        assert_true(json_array_size(json_object_get(item, "rows")) > 0);
    assert_true(json_array_size(json_object_get(r, "plots")) > 0);
    json_array_foreach(json_object_get(r, "plots"), i, item) {
        const char *plot = json_string_value(json_object_get(item, "name"));
        snprintf(path, sizeof path, "%s/%s/%s.svg", test_dir(), name, plot);
        FILE *f = fopen(path, "r");
        if (!f)
            fail_msg("%s is missing", path);
        fclose(f);
    }
    return r;
}

/* A named value; the test fails where it is missing or no number. */
static inline double lab_number(const json_t *r, const char *name) {
    json_t *v = json_object_get(json_object_get(r, "values"), name);
    if (!json_is_number(v))
        fail_msg("there is no value %s", name);
    return json_number_value(v);
}

#define assert_between(r, name, low, high)                                                         \
    do {                                                                                           \
        double v_ = lab_number(r, name);                                                           \
        if (!(v_ >= (low) && v_ <= (high)))                                                        \
            fail_msg("%s is %g, not in [%g, %g]", name, v_, (double)(low), (double)(high));        \
    } while (0)

#endif
