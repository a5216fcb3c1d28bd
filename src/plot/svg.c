/* The picture grows in an open_memstream: an error there (no memory) sticks until svg_end. */
#include "plot/svg.h"

#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "base/file.h"

extern char **environ;

tril_status svg_begin(struct svg *s, int width, int height, struct tril_error *err) {
    *s = (struct svg){0};
    s->out = open_memstream(&s->text, &s->size);
    if (!s->out)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a picture");
    fprintf(s->out,
            "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' viewBox='0 0 %d %d' "
            "font-family='Inter, system-ui, \"Segoe UI\", \"DejaVu Sans\", sans-serif'>\n"
            "<rect width='%d' height='%d' rx='8' fill='#ffffff'/>\n",
            width, height, width, height, width, height);
    return TRIL_OK;
}

tril_status svg_end(struct svg *s, const char *path, struct tril_error *err) {
    fputs("</svg>\n", s->out);
    bool good = !ferror(s->out);
    good = fclose(s->out) == 0 && good;
    tril_status st = good ? file_write_atomic(path, s->text, s->size, err)
                          : error_set(err, TRIL_ERR_MEMORY, "not enough memory for %s", path);
    free(s->text);
    *s = (struct svg){0};
    return st;
}

/* Bytes of the valid UTF-8 character at s (no surrogates, nothing overlong), or 0. */
static int utf8_length(const unsigned char *s) {
    if (s[0] < 0x80)
        return 1;
    int n = s[0] >= 0xc2 && s[0] < 0xe0 ? 2 : (s[0] & 0xf0) == 0xe0 ? 3 : 4;
    if (s[0] < 0xc2 || s[0] > 0xf4)
        return 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
        (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
        return 0;
    return n;
}

int utf8_width(const char *text) {
    int n = 0;
    for (; *text; text++)
        n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

void svg_escape(struct svg *s, const char *text) {
    const unsigned char *p = (const unsigned char *)text;
    while (*p) {
        int n = utf8_length(p);
        bool noncharacter = n == 3 && p[0] == 0xef && p[1] == 0xbf && p[2] >= 0xbe;
        if (n == 0 || *p < 0x20 || *p == 0x7f || noncharacter)
            fputs("\xef\xbf\xbd", s->out);
        else if (*p == '<')
            fputs("&lt;", s->out);
        else if (*p == '>')
            fputs("&gt;", s->out);
        else if (*p == '&')
            fputs("&amp;", s->out);
        else
            fwrite(p, 1, (size_t)n, s->out);
        p += n ? n : 1;
    }
}

void svg_at(struct svg *s, const char *before, double x, double y) {
    long tx = lround(x * 10), ty = lround(y * 10);
    fprintf(s->out, "%s%s%ld.%ld,%s%ld.%ld", before, tx < 0 ? "-" : "", labs(tx) / 10,
            labs(tx) % 10, ty < 0 ? "-" : "", labs(ty) / 10, labs(ty) % 10);
}

void svg_label(struct svg *s, double x, double y, enum svg_anchor anchor, int size,
               const char *colour, const char *attributes, const char *text) {
    static const char *const anchors[] = {"start", "middle", "end"};
    svg_at(s, "<text transform='translate(", x, y);
    fprintf(s->out, ")' text-anchor='%s' font-size='%d' fill='%s' %s>", anchors[anchor], size,
            colour, attributes);
    svg_escape(s, text);
    fputs("</text>\n", s->out);
}

void number_write(char *buf, size_t size, double x, int decimals) {
    if (decimals >= 0) {
        snprintf(buf, size, "%.*f", decimals > 30 ? 30 : decimals, x);
    } else if (decimals == NUMBER_EXACT) {
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(buf, size, "%.*g", digits, x);
            if (strtod(buf, NULL) == x)
                break;
        }
    } else {
        snprintf(buf, size, "%.6g", x);
    }
    for (char *p = buf; *p; p++) /* a locale may write anything for the point */
        if (!strchr("0123456789+-einfa.", *p))
            *p = '.';
}

tril_status plot_svg_to_png(const char *svg_path, const char *png_path, bool *made,
                            struct tril_error *err) {
    char *const command[] = {"rsvg-convert",
                             "--zoom",
                             "2",
                             "--output",
                             (char *)(uintptr_t)png_path,
                             (char *)(uintptr_t)svg_path,
                             NULL};
    pid_t child;
    int status;
    *made = false;
    int failed = posix_spawnp(&child, command[0], NULL, NULL, command, environ);
    if (failed == ENOENT)
        return TRIL_OK;
    if (failed != 0) {
        errno = failed;
        return error_set_errno(err, "cannot start rsvg-convert");
    }
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return error_set_errno(err, "cannot wait for rsvg-convert");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        return TRIL_OK; /* how an older C library says that there is no such program */
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        return error_set(err, TRIL_ERR_IO, "rsvg-convert could not turn %s into %s", svg_path,
                         png_path);
    *made = true;
    return TRIL_OK;
}
