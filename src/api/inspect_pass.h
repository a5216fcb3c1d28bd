/* What the commands that look inside share: a model, a text, and one forward pass over it. */
#ifndef API_INSPECT_PASS_H
#define API_INSPECT_PASS_H

#include "api/source.h"
#include "model/look.h"
#include "text/tokenizer.h"

struct inspected {
    struct op_context ctx;
    struct model *m;
    struct workspace *w;
    struct tokenizer *tokenizer; /* NULL: none */
    struct look *look;
    int32_t *ids; /* [tokens] */
    int64_t tokens;
    char **labels; /* [tokens], UTF-8 */
    double seconds;
};

/* Opens the model (random weights unless the source is a directory) and reads the text: prompt or
 * ids, its first `seq` tokens. Nothing runs yet. */
tril_status inspected_open(struct inspected *s, const struct tril_look_options *o,
                           struct tril_error *err);
/* The same for a text of any length, without labels. */
tril_status inspected_open_any(struct inspected *s, const struct tril_look_options *o,
                               struct tril_error *err);
void inspected_close(struct inspected *s);
/* One pass, watched by s->look. */
tril_status inspected_run(struct inspected *s, struct tril_error *err);

/* Which layers and heads an option (-1: all) means. */
static inline bool inspected_chosen(const struct tril_look_options *o, int64_t layer,
                                    int64_t head) {
    return (o->layer < 0 || layer == o->layer) && (o->head < 0 || head == o->head);
}

/* Writers of a finished look. */
tril_status look_write_tensors(const struct inspected *s, const struct tril_look_options *o,
                               struct tril_error *err);
tril_status look_write_picture(const struct inspected *s, const struct tril_look_options *o,
                               const char *path, struct tril_error *err);
/* `heads` are the summaries of all heads that were seen, in order; thumbs [count, size, size]. */
tril_status look_write_page(const struct inspected *s, const struct tril_look_options *o,
                            const struct tril_look_head *heads, int64_t count, const float *thumbs,
                            int64_t size, struct tril_error *err);
/* The page's limit of tokens, and the size of its small pictures for T tokens. */
enum { PAGE_TOKENS = 2048, PAGE_THUMB = 64 };

#endif
