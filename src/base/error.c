/* Messages are formatted aside first, so that the arguments may point into the error being filled.
 */
#include "base/error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *tril_status_text(tril_status status) {
    switch (status) {
#define STATUS_TEXT(name, value, text, exit_code)                                                  \
    case TRIL_##name:                                                                              \
        return text;
        TRIL_STATUS_LIST(STATUS_TEXT)
#undef STATUS_TEXT
    }
    return "an unknown error";
}

int tril_status_exit_code(tril_status status) {
    switch (status) {
#define STATUS_EXIT(name, value, text, exit_code)                                                  \
    case TRIL_##name:                                                                              \
        return exit_code;
        TRIL_STATUS_LIST(STATUS_EXIT)
#undef STATUS_EXIT
    }
    return tril_status_exit_code(TRIL_ERR_INTERNAL);
}

/* Copies text into the message; a message too long is cut between two UTF-8 characters. What it
 * quotes may hold anything: control characters become blanks, so that it stays one line. */
static void message_store(struct tril_error *err, const char *text) {
    size_t n = strlen(text), room = sizeof err->message - 1;
    if (n > room) {
        n = room;
        while (n > 0 && ((unsigned char)text[n] & 0xc0) == 0x80)
            n--;
    }
    memcpy(err->message, text, n);
    err->message[n] = '\0';
    for (char *p = err->message; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7F)
            *p = ' ';
}

/* Room for what a prefix and a message can hold before they are cut. */
#define SCRATCH (2 * sizeof(((struct tril_error *)0)->message))

tril_status error_set(struct tril_error *err, tril_status code, const char *format, ...) {
    if (err) {
        char text[SCRATCH];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        err->code = code;
        message_store(err, text);
    }
    return code;
}

void error_prefix(struct tril_error *err, const char *format, ...) {
    if (!err)
        return;
    char text[SCRATCH];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof err->message, format, args);
    va_end(args);
    size_t used = n < 0 ? 0 : (size_t)n < sizeof err->message ? (size_t)n : sizeof err->message - 1;
    snprintf(text + used, sizeof text - used, ": %s", err->message);
    message_store(err, text);
}

tril_status error_set_errno(struct tril_error *err, const char *format, ...) {
    int saved = errno;
    if (err) {
        char text[SCRATCH], reason[128];
        va_list args;
        va_start(args, format);
        int n = vsnprintf(text, sizeof err->message, format, args);
        va_end(args);
        size_t used = n < 0                             ? 0
                      : (size_t)n < sizeof err->message ? (size_t)n
                                                        : sizeof err->message - 1;
        /* The GNU strerror_r: returns the text, wherever it is. */
        snprintf(text + used, sizeof text - used, ": %s", strerror_r(saved, reason, sizeof reason));
        err->code = TRIL_ERR_IO;
        message_store(err, text);
    }
    errno = saved;
    return TRIL_ERR_IO;
}
