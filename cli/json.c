/* JSON output through Jansson. */
#include "json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bytes of the UTF-8 character at p (at most `size` bytes are there), 0 if there is none. */
static size_t character(const char *p, size_t size) {
    for (size_t n = 1; n <= 4 && n <= size; n++) {
        json_t *s = json_stringn(p, n);
        json_decref(s);
        if (s)
            return n;
    }
    return 0;
}

json_t *json_text(const char *bytes, size_t size) {
    json_t *whole = json_stringn(bytes, size);
    char *repaired = whole ? NULL : malloc(3 * size + 1);
    size_t n = 0;
    if (!repaired)
        return whole;
    for (size_t i = 0; i < size;) {
        size_t length = character(bytes + i, size - i);
        memcpy(repaired + n, length ? bytes + i : "\xef\xbf\xbd", length ? length : 3);
        n += length ? length : 3;
        i += length ? length : 1;
    }
    whole = json_stringn(repaired, n);
    free(repaired);
    return whole;
}

json_t *json_measured(double x) {
    return isfinite(x) ? json_real(x) : json_null();
}

void json_print(json_t *root) {
    json_dumpf(root, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(12));
    putchar('\n');
    json_decref(root);
}
