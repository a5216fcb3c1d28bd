/* Small pictures of visibility rules: a square for each query (down) and key (to the right), filled
 * where the one sees the other. */
#include "api/attention.h"
#include "plot/svg.h"

#define SEEN "#3478d8"
#define HIDDEN "#eef2f7"

static void cells_draw(struct svg *s, const struct visible_rule *rule, int rows, int columns,
                       int size, int left, int top) {
    /* One path of horizontal runs, in units of cells; then lines between them where there is room.
     */
    fprintf(s->out,
            "<g transform='translate(%d,%d) scale(%d)' shape-rendering='crispEdges'>\n"
            "<path fill='" HIDDEN "' d='M0 0h%dv%dh-%dz'/>\n<path fill='" SEEN "' d='",
            left, top, size, columns, rows, columns);
    for (int i = 0; i < rows; i++)
        for (int j = 0, end; j < columns; j = end) {
            bool seen = visible(rule, i, i + columns - rows, j);
            for (end = j + 1; end < columns && visible(rule, i, i + columns - rows, end) == seen;)
                end++;
            if (seen)
                fprintf(s->out, "M%d %dh%dv1h-%dz", j, i, end - j, end - j);
        }
    fputs("'/>\n", s->out);
    if (size >= 6) {
        fputs("<path stroke='#ffffff' stroke-width='0.1' d='", s->out);
        for (int i = 1; i < rows; i++)
            fprintf(s->out, "M0 %dh%d", i, columns);
        for (int j = 1; j < columns; j++)
            fprintf(s->out, "M%d 0v%d", j, rows);
        fputs("'/>\n", s->out);
    }
    fputs("</g>\n", s->out);
}

tril_status tril_attention_draw(const char *rule, int64_t head, int64_t queries, int64_t keys,
                                const char *path, struct tril_error *err) {
    struct visible_set set = {0};
    struct svg s;
    int64_t heads = head + 1;
    tril_status st = TRIL_OK;
    if (queries < 1 || keys < 1 || queries > 256 || keys > 256 || head < 0 || head > 4095)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a mask is drawn with 1 to 256 rows and columns, not %lld x %lld",
                         (long long)queries, (long long)keys);
    if (!rule)
        rule = "causal";
    TRY(visible_parse(rule, &set, err));
    for (int32_t k = 0; k < set.rule_count; k++)
        heads = set.heads[k].last >= heads ? set.heads[k].last + 1 : heads;
    TRY(visible_set_heads(&set, heads, err));
    if (visible_set_wants_blocks(&set)) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "a mask with the part 'blocks' cannot be drawn");
        goto done;
    }
    const struct visible_rule *one = &set.rules[set.head_rule[head]];
    TRY(visible_check(one, queries, keys, "--visible", err));
    int rows = (int)queries, columns = (int)keys, longer = rows > columns ? rows : columns;
    int size = longer > 96 ? 2 : longer > 48 ? 4 : longer > 24 ? 6 : 8;
    int width = columns * size + 24, text = utf8_width(rule) * 7 + 24;
    TRY(svg_begin(&s, width > text ? width : text, rows * size + 44, err));
    svg_label(&s, 12, 20, SVG_START, 12, PLOT_INK, "font-weight='600'", rule);
    cells_draw(&s, one, rows, columns, size, 12, 32);
    st = svg_end(&s, path, err);
done:
    visible_set_free(&set);
    return st;
}
