/* Any bytes: json_parse gives a value or one clear message, never both, and the same again. */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    json_t *root, *again;
    struct tril_error err = {0};
    tril_status st = json_parse(&root, (const char *)data, size, "fuzz", &err);
    if ((st == TRIL_OK) != (root != NULL) || (st != TRIL_OK && err.message[0] == '\0'))
        abort();
    if (json_parse(&again, (const char *)data, size, "fuzz", NULL) != st ||
        (root && !json_equal(root, again)))
        abort();
    int64_t n = 0;
    double x = 0;
    const char *s = "";
    json_get_int(root, "n", -5, 5, &n, "fuzz", &err);
    json_get_double(root, "x", 0, 1, &x, "fuzz", &err);
    json_get_string(root, "s", &s, "fuzz", &err);
    if (n < -5 || n > 5 || !(x >= 0 && x <= 1) || strlen(s) > size)
        abort();
    json_decref(root);
    json_decref(again);
    return 0;
}
