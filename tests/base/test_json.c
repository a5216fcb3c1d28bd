/* Strict JSON: what is accepted, what is refused and in which words, and what comes back. */
#include "base/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "support/support.h"

static json_t *parse(const char *text) {
    json_t *root;
    struct tril_error err;
    if (json_parse(&root, text, strlen(text), "test.json", &err) != TRIL_OK)
        fail_msg("%s: %s", text, err.message);
    return root;
}

static void test_refused(void **state) {
    (void)state;
    static const char *const bad[] = {
        "",           "{",         "[1,]",          "{\"a\":1,\"a\":2}",
        "[1] x",      "\"\xff\"",  "[01]",          "[NaN]",
        "[Infinity]", "['a']",     "[1e400]",       "nul",
        "[\x01]",     "{\"a\" 1}", "[\"\\ud800\"]", "[\"\\\n\"]",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        json_t *root;
        struct tril_error err;
        assert_int_equal(json_parse(&root, bad[i], strlen(bad[i]), "x.json", &err),
                         TRIL_ERR_FORMAT);
        assert_null(root);
        assert_memory_equal(err.message, "x.json: line ", 13);
        assert_null(strchr(err.message, '\n'));
    }
    static const char *const nul[] = {"1\0", "[]\0", "\0[]", "[\0]"};
    for (size_t i = 0; i < sizeof nul / sizeof *nul; i++) {
        json_t *root;
        struct tril_error err;
        size_t size = i == 0 ? 2 : 3;
        assert_int_equal(json_parse(&root, nul[i], size, "x.json", &err), TRIL_ERR_FORMAT);
        assert_non_null(strstr(err.message, "NUL"));
    }
}

static void test_depth(void **state) {
    (void)state;
    char text[1000];
    for (int depth = 60; depth < 70; depth++) {
        json_t *root;
        snprintf(text, sizeof text, "%.*s\"[[[{\\\"[\"%.*s", depth,
                 "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", depth,
                 "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]");
        tril_status st = json_parse(&root, text, strlen(text), "deep", NULL);
        assert_int_equal(st, depth <= JSON_DEPTH_LIMIT ? TRIL_OK : TRIL_ERR_FORMAT);
        json_decref(root);
    }
}

/* Every file of the public JSON parsing suite: y_ must be read, n_ refused, i_ is free. */
static void test_suite(void **state) {
    (void)state;
    const char *dir = TEST_SHARED_DIR "/misc/json-parsing";
    char **names;
    size_t count, checked = 0;
    if (!path_is_dir(dir)) {
        print_message("skipped: no %s\n", dir);
        skip();
    }
    assert_int_equal(dir_list(dir, &names, &count, NULL), TRIL_OK);
    for (size_t i = 0; i < count; i++) {
        /* Stricter than the standard by design: duplicate keys, and NUL in a key. */
        bool stricter = strncmp(names[i], "y_object_duplicated_key", 23) == 0 ||
                        strcmp(names[i], "y_object_escaped_null_in_key.json") == 0;
        char *path = path_join(dir, names[i]);
        json_t *root;
        struct tril_error err = {0};
        tril_status st = json_read(&root, path, 1 << 20, &err);
        if (names[i][0] == 'y' && (st == TRIL_OK) == stricter)
            fail_msg("%s: %s", names[i], err.message);
        if (names[i][0] == 'n' && st != TRIL_ERR_FORMAT)
            fail_msg("%s is accepted", names[i]);
        assert_true((st == TRIL_OK) == (root != NULL));
        checked += names[i][0] == 'y' || names[i][0] == 'n';
        json_decref(root);
        free(path);
    }
    dir_list_free(names, count);
    assert_true(checked > 200);
}

static void test_getters(void **state) {
    (void)state;
    struct tril_error err;
    json_t *o =
        parse("{\"i\": 12, \"r\": 2.5, \"w\": 3.0, \"b\": true, \"s\": \"text\", \"z\": null,"
              " \"nul\": \"a\\u0000b\", \"long\": \""
              "0123456789012345678901234567890123456789"
              "012345678901234567890123456789\"}");
    int64_t i = -1;
    double d = -1;
    bool b = false;
    const char *s = "before";
    assert_int_equal(json_get_int(o, "i", 1, 12, &i, "c", &err), TRIL_OK);
    assert_int_equal(i, 12);
    assert_int_equal(json_get_int(o, "w", 1, 12, &i, "c", &err), TRIL_OK);
    assert_int_equal(i, 3);
    assert_int_equal(json_get_int(o, "absent", 1, 12, &i, "c", &err), TRIL_OK);
    assert_int_equal(json_get_int(o, "z", 1, 12, &i, "c", &err), TRIL_OK);
    assert_int_equal(i, 3);
    assert_int_equal(json_get_int(o, "i", 1, 11, &i, "c.json", &err), TRIL_ERR_FORMAT);
    assert_string_equal(err.message, "c.json: \"i\" is 12, but must be an integer from 1 to 11");
    assert_int_equal(json_get_int(o, "r", 1, 11, &i, "c", &err), TRIL_ERR_FORMAT);
    assert_int_equal(json_get_int(o, "s", 1, 11, &i, "c", &err), TRIL_ERR_FORMAT);
    assert_int_equal(json_get_int(o, "long", 1, 11, &i, "c", &err), TRIL_ERR_FORMAT);
    assert_int_equal(i, 3);

    assert_int_equal(json_get_double(o, "r", 0, 3, &d, "c", &err), TRIL_OK);
    assert_true(d == 2.5);
    assert_int_equal(json_get_double(o, "i", 0, 12, &d, "c", &err), TRIL_OK);
    assert_true(d == 12);
    assert_int_equal(json_get_double(o, "r", 0, 2, &d, "c", &err), TRIL_ERR_FORMAT);
    assert_int_equal(json_get_double(o, "b", 0, 2, &d, "c", &err), TRIL_ERR_FORMAT);

    assert_int_equal(json_get_bool(o, "b", &b, "c", &err), TRIL_OK);
    assert_true(b);
    assert_int_equal(json_get_bool(o, "i", &b, "c", &err), TRIL_ERR_FORMAT);

    assert_int_equal(json_get_string(o, "s", &s, "c", &err), TRIL_OK);
    assert_string_equal(s, "text");
    assert_int_equal(json_get_string(o, "absent", &s, "c", &err), TRIL_OK);
    assert_string_equal(s, "text");
    assert_int_equal(json_get_string(o, "i", &s, "c", &err), TRIL_ERR_FORMAT);
    assert_int_equal(json_get_string(o, "nul", &s, "c", &err), TRIL_ERR_FORMAT);
    json_decref(o);

    json_t *array = parse("[1]");
    assert_int_equal(json_get_int(array, "i", 0, 1, &i, "c", &err), TRIL_ERR_FORMAT);
    assert_int_equal(json_get_bool(NULL, "i", &b, "c", &err), TRIL_ERR_FORMAT);
    json_decref(array);
}

/* Hugging Face writes int(1e30) where it means "no limit". */
static void test_huge_integers(void **state) {
    (void)state;
    json_t *o = parse("{\"model_max_length\": 1000000000000000019884624838656, \"n\": 12}");
    int64_t n = 0;
    double x = 0;
    assert_int_equal(json_get_int(o, "n", 0, 100, &n, "c", NULL), TRIL_OK);
    assert_int_equal(n, 12);
    assert_int_equal(json_get_int(o, "model_max_length", 0, INT64_MAX, &n, "c", NULL),
                     TRIL_ERR_FORMAT);
    assert_int_equal(json_get_double(o, "model_max_length", 0, 1e31, &x, "c", NULL), TRIL_OK);
    assert_true(x == 1e30);
    json_decref(o);
}

static void test_write(void **state) {
    (void)state;
    json_t *o = parse("{\"z\": 1e-05, \"a\": [0.1, 3, 10000.0], \"t\": \"\\u20ac\"}"), *back;
    const char *path = test_path("out.json");
    assert_int_equal(json_write(o, path, NULL), TRIL_OK);
    assert_int_equal(json_read(&back, path, 1000, NULL), TRIL_OK);
    assert_true(json_equal(o, back));
    json_decref(back);
    char *text;
    size_t size;
    assert_int_equal(file_read(path, 1000, &text, &size, NULL), TRIL_OK);
    assert_string_equal(text, "{\n  \"z\": 1e-5,\n  \"a\": [\n    0.1,\n    3,\n    1e4\n  ],\n"
                              "  \"t\": \"\xe2\x82\xac\"\n}\n");
    free(text);
    json_object_set_new(o, "third", json_real(1.0 / 3));
    assert_int_equal(json_write(o, path, NULL), TRIL_OK);
    assert_int_equal(json_read(&back, path, 1000, NULL), TRIL_OK);
    assert_true(json_equal(o, back));
    json_decref(back);
    json_decref(o);
    assert_int_equal(json_read(&back, test_path("absent"), 1000, NULL), TRIL_ERR_IO);
    assert_null(back);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refused),       cmocka_unit_test(test_depth),
        cmocka_unit_test(test_suite),         cmocka_unit_test(test_getters),
        cmocka_unit_test(test_huge_integers), cmocka_unit_test(test_write),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
