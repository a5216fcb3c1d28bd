/* Error messages: formatting, prefixes, cutting, and the table of statuses. */
#include "base/error.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "support/support.h"

static void test_set(void **state) {
    (void)state;
    struct tril_error err;
    assert_int_equal(error_set(&err, TRIL_ERR_FORMAT, "%s: line %d", "a.json", 7), TRIL_ERR_FORMAT);
    assert_int_equal(err.code, TRIL_ERR_FORMAT);
    assert_string_equal(err.message, "a.json: line 7");
    error_prefix(&err, "layer %d", 3);
    assert_string_equal(err.message, "layer 3: a.json: line 7");
    error_set(&err, TRIL_ERR_IO, "[%s]", err.message); /* arguments may lie in the error itself */
    assert_string_equal(err.message, "[layer 3: a.json: line 7]");
    assert_int_equal(error_set(NULL, TRIL_ERR_IO, "nobody listens"), TRIL_ERR_IO);
    error_prefix(NULL, "nobody");
}

static void test_errno(void **state) {
    (void)state;
    struct tril_error err;
    errno = ENOENT;
    assert_int_equal(error_set_errno(&err, "cannot read %s", "x"), TRIL_ERR_IO);
    assert_string_equal(err.message, "cannot read x: No such file or directory");
    assert_int_equal(errno, ENOENT);
}

static void test_long_messages_are_cut_between_characters(void **state) {
    (void)state;
    struct tril_error err;
    char text[2000];
    for (int lead = 0; lead < 3; lead++) {
        memset(text, 'a', sizeof text);
        for (int i = lead; i + 3 < (int)sizeof text; i += 3)
            memcpy(text + i, "\xe2\x82\xac", 3); /* the euro sign */
        text[sizeof text - 1] = '\0';
        error_set(&err, TRIL_ERR_IO, "%s", text);
        size_t n = strlen(err.message);
        assert_in_range(n, sizeof err.message - 3, sizeof err.message - 1);
        assert_int_equal((n - (size_t)lead) % 3, 0);
        error_prefix(&err, "%s", text);
        assert_in_range(strlen(err.message), 1, sizeof err.message - 1);
    }
}

static void test_statuses(void **state) {
    (void)state;
    int seen[126] = {0};
    for (int s = TRIL_OK; s >= TRIL_ERR_INTERNAL; s--) {
        assert_true(strlen(tril_status_text((tril_status)s)) > 0);
        int code = tril_status_exit_code((tril_status)s);
        assert_in_range(code, 0, 125);
        assert_int_equal(seen[code]++, 0);
        assert_int_equal(code == 0, s == TRIL_OK);
    }
    assert_non_null(tril_status_text((tril_status)-99));
    assert_int_not_equal(tril_status_exit_code((tril_status)-99), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_set),
        cmocka_unit_test(test_errno),
        cmocka_unit_test(test_long_messages_are_cut_between_characters),
        cmocka_unit_test(test_statuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
