/* Errors: every call that can fail returns a tril_status and fills the caller's tril_error.
 *
 * Zero is success, negative is failure. The message is one sentence: what is wrong, where (file,
 * field, line), and what to do. A NULL tril_error is allowed everywhere: the status alone is then
 * returned. Nothing in the library prints, exits or aborts. */
#ifndef TRIL_ERROR_H
#define TRIL_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

/* name, value, what it means, process exit code of the command */
#define TRIL_STATUS_LIST(X)                                                                        \
    X(OK, 0, "success", 0)                                                                         \
    X(ERR_ARGUMENT, -1, "an argument or option is wrong", 2)                                       \
    X(ERR_IO, -2, "a file cannot be read or written", 3)                                           \
    X(ERR_FORMAT, -3, "a file is damaged or not what it claims to be", 4)                          \
    X(ERR_MEMORY, -4, "not enough memory", 5)                                                      \
    X(ERR_UNSUPPORTED, -5, "valid, but tril does not support it", 6)                               \
    X(ERR_NUMERIC, -6, "a value is not finite", 7)                                                 \
    X(ERR_INTERRUPTED, -7, "stopped by a signal; state saved", 8)                                  \
    X(ERR_INTERNAL, -8, "a fault of tril itself", 9)

typedef enum tril_status {
#define TRIL_STATUS_ENUM(name, value, text, exit_code) TRIL_##name = value,
    TRIL_STATUS_LIST(TRIL_STATUS_ENUM)
#undef TRIL_STATUS_ENUM
} tril_status;

struct tril_error {
    tril_status code;
    char message[640]; /* UTF-8, one sentence, NUL-terminated */
};

/* What a status means in general ("not enough memory"). Never NULL. */
const char *tril_status_text(tril_status status);

/* The exit code (0 to 125) with which the tril command reports a status. */
int tril_status_exit_code(tril_status status);

#ifdef __cplusplus
}
#endif
#endif
