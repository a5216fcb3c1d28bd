/* Finding added tokens in a text. */
#include <string.h>

#include "text/tokenizer_impl.h"

bool matcher_build(struct matcher *m, const struct trie_string *contents, uint32_t count,
                   struct tril_error *err) {
    int firsts = 0;
    memset(m, 0, sizeof *m);
    m->only_first = -1;
    for (uint32_t i = 0; i < count; i++) {
        if (contents[i].size == 0)
            continue;
        m->any = true;
        if (!m->first[contents[i].bytes[0]]) {
            m->first[contents[i].bytes[0]] = true;
            m->only_first = firsts++ ? -1 : contents[i].bytes[0];
        }
    }
    return !m->any || trie_build(&m->trie, contents, count, err) == TRIL_OK;
}

void matcher_free(struct matcher *m) {
    trie_free(&m->trie);
}

bool matcher_find(const struct matcher *m, const unsigned char *text, size_t size, size_t from,
                  struct added_match *match) {
    const unsigned char *p = text + from, *end = text + size;
    if (!m->any)
        return false;
    for (; p < end; p++) {
        if (m->only_first >= 0) {
            p = memchr(p, m->only_first, (size_t)(end - p));
            if (!p)
                return false;
        } else if (!m->first[*p]) {
            continue;
        }
        uint32_t found = trie_longest(&m->trie, p, end);
        if (found != TRIE_NONE) {
            unsigned length = 0;
            uint32_t node = m->trie.root[*p]; /* walk again for the length: matches are rare */
            while (node != found)
                node = trie_step(&m->trie, node, p[++length]);
            *match =
                (struct added_match){(size_t)(p - text), (size_t)(p - text) + length + 1, found};
            return true;
        }
    }
    return false;
}
