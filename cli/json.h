/* JSON on stdout: what --json prints. */
#ifndef CLI_JSON_H
#define CLI_JSON_H

#include <jansson.h>
#include <stddef.h>

/* A string of any bytes: what is no UTF-8 becomes U+FFFD. */
json_t *json_text(const char *bytes, size_t size);
/* A number; null where it is none (NaN) or has no end. */
json_t *json_measured(double x);
/* Prints one object and frees it. */
void json_print(json_t *root);

#endif
