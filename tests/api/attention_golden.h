/* `tril attention` on the small cases in tests/golden/attention, which oracle/check_attention.py
 * drew and computed in double with PyTorch's autograd: o, lse and every gradient within the bounds
 * that it derived. */
#ifndef TESTS_ATTENTION_GOLDEN_H
#define TESTS_ATTENTION_GOLDEN_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "formats/safetensors.h"
#include "support/support.h"

static double element(const struct st_tensor *t, int64_t i) {
    double wide = 0;
    const char *at = (const char *)t->data + (size_t)i * dtype_size(t->dtype);
    char copy[8];
    memcpy(copy, at, dtype_size(t->dtype));
    dtype_convert(&wide, DT_F64, copy, t->dtype, 1);
    return wide;
}

/* The largest difference; infinite where one is finite and the other is not. */
static double difference(const struct st_tensor *x, const struct st_tensor *y) {
    double most = 0;
    int64_t n = 1;
    assert_int_equal(x->rank, y->rank);
    for (int i = 0; i < x->rank; i++) {
        assert_int_equal(x->shape[i], y->shape[i]);
        n *= x->shape[i];
    }
    for (int64_t i = 0; i < n; i++) {
        double a = element(x, i), b = element(y, i);
        if (isinf(a) && a == b)
            continue;
        most = isfinite(a) && isfinite(b) ? fmax(most, fabs(a - b)) : INFINITY;
    }
    return most;
}

/* By the command `tril`, with the arguments `more`. */
static void check_case(const json_t *c, const char *tril, const char *impl, const char *more) {
    const char *name = json_string_value(json_object_get(c, "name"));
    char command[2048], in[512], want[512], arguments[1024] = "", bound_name[32];
    struct tril_error err = {0};
    struct safetensors *is, *should;
    size_t i;
    const json_t *word;
    json_array_foreach(json_object_get(c, "arguments"), i, word) {
        size_t n = strlen(arguments);
        snprintf(arguments + n, sizeof arguments - n, " '%s'", json_string_value(word));
    }
    snprintf(in, sizeof in, TEST_GOLDEN_DIR "/attention/%s-in.safetensors", name);
    snprintf(want, sizeof want, TEST_GOLDEN_DIR "/attention/%s-out.safetensors", name);
    const char *out = test_path("out.safetensors");
    snprintf(command, sizeof command,
             "'%s' attention --qkv '%s' --out '%s' --impl %s %s%s >/dev/null", tril, in, out, impl,
             more, arguments);
    if (system(command) != 0)
        fail_msg("failed: %s", command);
    if (safetensors_open(&is, out, &err) != TRIL_OK ||
        safetensors_open(&should, want, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    assert_int_equal(safetensors_count(is), safetensors_count(should));
    for (i = 0; i < safetensors_count(should); i++) {
        const struct st_tensor *y = safetensors_at(should, i), *x = safetensors_find(is, y->name);
        snprintf(bound_name, sizeof bound_name, "%s", y->name);
        double bound = json_number_value(json_object_get(json_object_get(c, "bounds"), bound_name));
        assert_non_null(x);
        double off = difference(x, y);
        if (!(off <= bound))
            fail_msg("%s: %s is off by %g, allowed %g: %s", name, y->name, off, bound, command);
    }
    safetensors_close(is);
    safetensors_close(should);
}

/* Every case under these implementations of the softmax's attention (then NULL), or as linear
 * attention. */
static void check_goldens(const char *tril, const char *const *impls, const char *more) {
    struct tril_error err = {0};
    json_t *cases;
    const json_t *c;
    size_t i;
    if (json_read(&cases, TEST_GOLDEN_DIR "/attention/cases.json", 1 << 20, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    assert_true(json_array_size(cases) >= 8);
    json_array_foreach(cases, i, c) {
        if (json_is_true(json_object_get(c, "linear")))
            check_case(c, tril, "linear", more);
        for (int k = 0; impls[k] && !json_is_true(json_object_get(c, "linear")); k++)
            check_case(c, tril, impls[k], more);
    }
    json_decref(cases);
}

#endif
