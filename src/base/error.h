/* Filling a tril_error: the one way in which every room reports failure. */
#ifndef BASE_ERROR_H
#define BASE_ERROR_H

#include "tril/error.h"

/* Sets *err (may be NULL) to `code` with a printf-formatted message and returns `code`, so that
 * callers write: return error_set(err, TRIL_ERR_FORMAT, "%s: header is cut short ...", path); */
tril_status error_set(struct tril_error *err, tril_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "prefix: " in front of the message already in *err (to add the file or the layer). */
void error_prefix(struct tril_error *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* error_set with ERR_IO and strerror(errno) appended; `format` names the action and the path. */
tril_status error_set_errno(struct tril_error *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* goto done on failure: TRY(call) inside a function with `tril_status st` and a label `done`. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        st = (call);                                                                               \
        if (st != TRIL_OK)                                                                         \
            goto done;                                                                             \
    } while (0)

#endif
