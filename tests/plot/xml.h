/* A small check that XML is well-formed: tags nest, attributes are quoted, text is escaped. */
#ifndef TESTS_PLOT_XML_H
#define TESTS_PLOT_XML_H

#include <ctype.h>
#include <string.h>

#include "support/support.h"

static inline const char *check_tag(const char *s, char open[][16], int *depth) {
    char name[16] = "";
    bool closing = *s == '/';
    s += closing;
    for (size_t n = 0; isalpha((unsigned char)*s); s++) {
        assert_true(n < sizeof name - 1);
        name[n++] = *s;
    }
    assert_true(name[0] != '\0');
    if (closing) {
        assert_true(*depth > 0 && *s == '>');
        assert_string_equal(open[--*depth], name);
        return s + 1;
    }
    for (;;) {
        s += strspn(s, " \n");
        if (*s == '/' || *s == '>')
            break;
        size_t n = strspn(s, "abcdefghijklmnopqrstuvwxyzBX-");
        assert_true(n > 0 && s[n] == '=' && s[n + 1] == '\'');
        s += n + 2;
        n = strcspn(s, "'<&");
        assert_true(s[n] == '\'');
        s += n + 1;
    }
    if (*s == '/')
        return s + 2;
    assert_true(*depth < 8);
    strcpy(open[(*depth)++], name);
    return s + 1;
}

static inline void check_xml(const char *s) {
    char open[8][16];
    int depth = 0;
    assert_memory_equal(s, "<svg ", 5);
    while (*s) {
        if (*s == '<') {
            s = check_tag(s + 1, open, &depth);
        } else if (*s == '&') {
            assert_true(!strncmp(s, "&lt;", 4) || !strncmp(s, "&gt;", 4) ||
                        !strncmp(s, "&amp;", 5));
            s++;
        } else {
            assert_true((unsigned char)*s >= 0x20 || *s == '\n');
            assert_true(depth > 0 || *s == '\n');
            s++;
        }
    }
    assert_int_equal(depth, 0);
}

#endif
