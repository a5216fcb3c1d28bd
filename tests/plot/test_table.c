/* Tables: the printed, CSV and JSON forms, with what needs quoting and what is missing. */
#include "plot/table.h"

#include <math.h>
#include <stdlib.h>

#include "base/file.h"
#include "support/support.h"

static struct table *example(void) {
    static const char *const columns[] = {"n", "loss", "a \"note\", quoted"};
    struct table *t;
    assert_int_equal(table_create(&t, columns, 3, NULL), TRIL_OK);
    table_add_int(t, 5);
    table_add_number(t, 0.1 + 0.2, 2);
    table_add_text(t, "x, y\n\"z\"");
    table_add_int(t, -12345678901234);
    table_add_number(t, NAN, 1);
    table_add_text(t, NULL);
    table_add_int(t, 7); /* an incomplete row is no row */
    return t;
}

static void test_csv(void **state) {
    (void)state;
    struct table *t = example();
    char *text;
    size_t size;
    assert_int_equal(table_rows(t), 2);
    assert_int_equal(table_write_csv(t, test_path("t.csv"), NULL), TRIL_OK);
    assert_int_equal(file_read(test_path("t.csv"), 1000, &text, &size, NULL), TRIL_OK);
    assert_string_equal(text, "n,loss,\"a \"\"note\"\", quoted\"\r\n"
                              "5,0.30000000000000004,\"x, y\n\"\"z\"\"\"\r\n"
                              "-12345678901234,,\r\n");
    free(text);
    table_free(t);
}

static void test_json(void **state) {
    (void)state;
    struct table *t = example();
    json_t *root;
    assert_int_equal(table_to_json(t, &root, NULL), TRIL_OK);
    json_t *want = json_pack("[{s:i, s:f, s:s}, {s:I, s:n, s:n}]", "n", 5, "loss", 0.1 + 0.2,
                             "a \"note\", quoted", "x, y\n\"z\"", "n", (json_int_t)-12345678901234,
                             "loss", "a \"note\", quoted");
    assert_true(json_equal(root, want));
    json_decref(want);
    json_decref(root);
    assert_int_equal(table_write_json(t, test_path("t.json"), NULL), TRIL_OK);
    table_free(t);

    static const char *const columns[] = {"bytes"};
    assert_int_equal(table_create(&t, columns, 1, NULL), TRIL_OK);
    table_add_text(t, "\xff");
    assert_int_equal(table_to_json(t, &root, NULL), TRIL_ERR_ARGUMENT);
    assert_null(root);
    table_free(t);
    table_free(NULL);
}

static void test_print(void **state) {
    (void)state;
    static const char *const columns[] = {"name", "perplexity", "x"};
    struct table *t;
    char *text;
    size_t size;
    assert_int_equal(table_create(&t, columns, 3, NULL), TRIL_OK);
    table_add_text(t, "caf\xc3\xa9");
    table_add_number(t, 38.46, 1);
    table_add_int(t, 1);
    table_add_text(t, "longest");
    table_add_number(t, 1e-7, -1);
    table_add_int(t, 1000);
    FILE *stream = open_memstream(&text, &size);
    assert_int_equal(table_print(t, stream, NULL), TRIL_OK);
    fclose(stream);
    assert_string_equal(text, "name     perplexity     x\n"
                              "caf\xc3\xa9           38.5     1\n"
                              "longest       1e-07  1000\n");
    free(text);
    table_free(t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_csv),
        cmocka_unit_test(test_json),
        cmocka_unit_test(test_print),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
