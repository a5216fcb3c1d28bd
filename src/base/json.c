/* Jansson does the work; this file adds the depth limit, the words of the messages, and numbers
 * written with no more digits than they need. */
#include "base/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"

/* The line of the first bracket that is nested deeper than the limit, or 0. */
static int depth_check(const char *text, size_t size) {
    int depth = 0, line = 1;
    bool in_string = false;
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (c == '\n')
            line++;
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > JSON_DEPTH_LIMIT)
                return line;
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return 0;
}

tril_status json_parse(json_t **out, const char *text, size_t size, const char *name,
                       struct tril_error *err) {
    json_error_t error;
    const size_t flags = JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL;
    *out = NULL;
    int line = depth_check(text, size);
    if (line)
        return error_set(err, TRIL_ERR_FORMAT, "%s: line %d: nested deeper than %d levels", name,
                         line, JSON_DEPTH_LIMIT);
    if (size > 0 &&
        memchr(text, '\0', size)) /* Jansson would take it for the end, whatever follows */
        return error_set(err, TRIL_ERR_FORMAT, "%s: not valid JSON: a NUL byte", name);
    *out = json_loadb(text, size, flags, &error);
    if (!*out && json_error_code(&error) == json_error_numeric_overflow)
        *out = json_loadb(text, size, flags | JSON_DECODE_INT_AS_REAL, &error);
    if (*out)
        return TRIL_OK;
    if (json_error_code(&error) == json_error_out_of_memory)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", name);
    for (char *p = error.text; *p; p++) /* it may quote the input, line breaks and all */
        if ((unsigned char)*p < 32 || *p == 127)
            *p = '?';
    return error_set(err, TRIL_ERR_FORMAT, "%s: line %d, column %d: not valid JSON: %s", name,
                     error.line, error.column, error.text);
}

tril_status json_read(json_t **out, const char *path, size_t limit, struct tril_error *err) {
    char *text;
    size_t size;
    *out = NULL;
    tril_status st = file_read(path, limit, &text, &size, err);
    if (st == TRIL_OK)
        st = json_parse(out, text, size, path, err);
    free(text);
    return st;
}

/* The fewest digits, from `least` up, that give every real in `value` back exactly. */
static int digits_needed(const json_t *value, int least) {
    if (json_is_real(value)) {
        char text[40];
        double x = json_real_value(value);
        while (least < 17 && (snprintf(text, sizeof text, "%.*g", least, x), atof(text) != x))
            least++;
    } else if (json_is_array(value)) {
        for (size_t i = 0; i < json_array_size(value); i++)
            least = digits_needed(json_array_get(value, i), least);
    } else if (json_is_object(value)) {
        const char *key;
        json_t *child;
        json_object_foreach((json_t *)(uintptr_t)value, key, child) {
            least = digits_needed(child, least);
        }
    }
    return least;
}

tril_status json_write(const json_t *root, const char *path, struct tril_error *err) {
    size_t flags = JSON_INDENT(2) | JSON_ENCODE_ANY | JSON_REAL_PRECISION(digits_needed(root, 1));
    tril_status st;
    struct file_writer *w = NULL;
    char *text = json_dumps(root, flags);
    if (!text)
        return error_set(err, TRIL_ERR_INTERNAL, "cannot write %s: the JSON value is unfit", path);
    TRY(file_writer_open(&w, path, err));
    TRY(file_writer_write(w, text, strlen(text), err));
    TRY(file_writer_write(w, "\n", 1, err));
    st = file_writer_commit(w, err);
    w = NULL;
done:
    file_writer_abort(w);
    free(text);
    return st;
}

/* The field, or NULL (with TRIL_OK) where it is absent or null. */
static tril_status field_find(const json_t *obj, const char *key, const json_t **out,
                              const char *where, struct tril_error *err) {
    *out = NULL;
    if (!json_is_object(obj))
        return error_set(err, TRIL_ERR_FORMAT, "%s: an object with the field \"%s\" is expected",
                         where, key);
    const json_t *value = json_object_get(obj, key);
    if (value && !json_is_null(value))
        *out = value;
    return TRIL_OK;
}

/* "field is <value>, but must be ..." */
static tril_status field_refuse(const json_t *value, const char *key, const char *must,
                                const char *where, struct tril_error *err) {
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(15));
    tril_status st =
        error_set(err, TRIL_ERR_FORMAT, "%s: \"%s\" is %.60s%s, but must be %s", where, key,
                  text ? text : "?", text && strlen(text) > 60 ? "..." : "", must);
    free(text);
    return st;
}

tril_status json_get_int(const json_t *obj, const char *key, int64_t min, int64_t max, int64_t *out,
                         const char *where, struct tril_error *err) {
    const json_t *value;
    tril_status st = field_find(obj, key, &value, where, err);
    if (st != TRIL_OK || !value)
        return st;
    int64_t n = 0;
    bool whole = json_is_integer(value);
    if (whole) {
        n = json_integer_value(value);
    } else if (json_is_real(value)) {
        double x = json_real_value(value);
        whole = x == floor(x) && x >= -0x1p63 && x < 0x1p63;
        n = whole ? (int64_t)x : 0;
    }
    if (!whole || n < min || n > max) {
        char must[96];
        snprintf(must, sizeof must, "an integer from %lld to %lld", (long long)min, (long long)max);
        return field_refuse(value, key, must, where, err);
    }
    *out = n;
    return TRIL_OK;
}

tril_status json_get_double(const json_t *obj, const char *key, double min, double max, double *out,
                            const char *where, struct tril_error *err) {
    const json_t *value;
    tril_status st = field_find(obj, key, &value, where, err);
    if (st != TRIL_OK || !value)
        return st;
    double x = json_number_value(value);
    if (!json_is_number(value) || !(x >= min && x <= max)) {
        char must[96];
        snprintf(must, sizeof must, "a number from %g to %g", min, max);
        return field_refuse(value, key, must, where, err);
    }
    *out = x;
    return TRIL_OK;
}

tril_status json_get_bool(const json_t *obj, const char *key, bool *out, const char *where,
                          struct tril_error *err) {
    const json_t *value;
    tril_status st = field_find(obj, key, &value, where, err);
    if (st != TRIL_OK || !value)
        return st;
    if (!json_is_boolean(value))
        return field_refuse(value, key, "true or false", where, err);
    *out = json_is_true(value);
    return TRIL_OK;
}

tril_status json_get_string(const json_t *obj, const char *key, const char **out, const char *where,
                            struct tril_error *err) {
    const json_t *value;
    tril_status st = field_find(obj, key, &value, where, err);
    if (st != TRIL_OK || !value)
        return st;
    if (!json_is_string(value))
        return field_refuse(value, key, "a string", where, err);
    if (strlen(json_string_value(value)) != json_string_length(value))
        return field_refuse(value, key, "a string without a NUL character", where, err);
    *out = json_string_value(value);
    return TRIL_OK;
}
