/* Pictures of attention: one head's three matrices side by side, or the weights of many heads. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/inspect_pass.h"
#include "plot/heat.h"

enum { PICTURE_TOKENS = 1024, SMALL = 32 };

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a picture of attention");
}

/* Tokens as they can stand along a side: one line, no blanks around, at most 14 characters; blanks
 * alone are shown as such. */
static char **names_make(const struct inspected *s) {
    char **names = calloc((size_t)s->tokens + 1, sizeof *names);
    for (int64_t i = 0; names && i < s->tokens; i++) {
        const char *p = s->labels[i];
        size_t n = 0, characters = 0;
        while (*p == ' ' && p[1])
            p++;
        names[i] = malloc(3 * strlen(p) + 4);
        if (!names[i])
            continue;
        for (; *p; p++) {
            if (((unsigned char)*p & 0xc0) != 0x80 && ++characters > 14) {
                n += (size_t)sprintf(names[i] + n, "…");
                break;
            }
            if (*p == '\n')
                n += (size_t)sprintf(names[i] + n, "↵");
            else if (*p == ' ' && !p[1] && n == 0)
                n += (size_t)sprintf(names[i] + n, "␣");
            else
                names[i][n++] = *p;
        }
        names[i][n] = '\0';
    }
    return names;
}

static tril_status one_head(const struct inspected *s, const struct tril_look_options *o,
                            const char *path, struct tril_error *err) {
    const struct look_layer *l = &s->look->layer[o->layer];
    const size_t n = (size_t)(l->rows * l->keys);
    struct look_head *h = NULL;
    float *values[3] = {NULL};
    uint8_t *mask = malloc(n);
    char **names = names_make(s), title[160];
    double largest = 0, heaviest = 0;
    tril_status st = TRIL_OK;
    for (int i = 0; i < 3; i++)
        values[i] = malloc(n * sizeof(float));
    if (!mask || !names || !values[0] || !values[1] || !values[2])
        TRY(no_memory(err));
    if (s->tokens > PICTURE_TOKENS) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "a picture takes at most %d tokens and the text has %lld: --seq %d looks at "
                       "the first of them, --html has no such limit below %d",
                       PICTURE_TOKENS, (long long)s->tokens, PICTURE_TOKENS, PAGE_TOKENS);
        goto done;
    }
    TRY(look_head_open(&h, s->look, o->layer, o->head, err));
    look_head_scores(h, 0, l->rows, values[0]);
    look_head_mask(h, 0, l->rows, mask);
    TRY(look_head_weights(h, 0, l->rows, values[2], err));
    for (size_t i = 0; i < n; i++) {
        values[1][i] = mask[i];
        largest = fmax(largest, fabs((double)values[0][i]));
        if (!mask[i])
            values[2][i] = NAN;
        else
            heaviest = fmax(heaviest, (double)values[2][i]);
    }
    const bool square = l->rows == l->keys; /* else the keys are not the text's tokens alone */
    const char *const *along = square ? (const char *const *)names : NULL;
    const struct heat_map maps[3] = {{.title = "scaled QKᵀ",
                                      .y_label = "query",
                                      .x_label = "key",
                                      .values = values[0],
                                      .low = -largest,
                                      .high = largest,
                                      .diverging = true},
                                     {.title = "mask", .values = values[1], .high = 1},
                                     {.title = "softmax", .values = values[2], .high = heaviest}};
    struct heat_map drawn[3];
    for (int i = 0; i < 3; i++) {
        drawn[i] = maps[i];
        drawn[i].rows = l->rows;
        drawn[i].cols = l->keys;
        drawn[i].row_names = (const char *const *)names;
        drawn[i].col_names = along;
        drawn[i].y_label = "query";
        drawn[i].x_label = "key";
    }
    snprintf(title, sizeof title, "Layer %d, head %d", o->layer, o->head);
    const struct heat_grid grid = {
        .title = title, .maps = drawn, .count = 3, .columns = 3, .side = 420};
    TRY(heat_grid_write(&grid, path, err));
done:
    for (int i = 0; i < 3; i++)
        free(values[i]);
    for (int64_t i = 0; names && i < s->tokens; i++)
        free(names[i]);
    free(names);
    free(mask);
    look_head_close(h);
    return st;
}

/* A row for each layer; weights as their square roots, so that small ones show. */
static tril_status many_heads(const struct inspected *s, const struct tril_look_options *o,
                              const char *path, struct tril_error *err) {
    const struct look *k = s->look;
    const int64_t size = s->tokens < SMALL ? s->tokens : SMALL;
    int64_t count = 0, at = 0, columns = 0;
    struct look_summary summary;
    for (int64_t l = 0; l < k->layers; l++)
        for (int64_t h = 0, in_row = 0; k->layer[l].seen && h < k->layer[l].heads; h++)
            if (inspected_chosen(o, l, h)) {
                count++;
                columns = ++in_row > columns ? in_row : columns;
            }
    struct heat_map *maps = calloc((size_t)count + 1, sizeof *maps);
    float *values = calloc((size_t)(count * size * size) + 1, sizeof *values);
    char(*titles)[24] = calloc((size_t)count + 1, sizeof *titles), title[160];
    tril_status st = TRIL_OK;
    if (!maps || !values || !titles)
        TRY(no_memory(err));
    for (int64_t l = 0; l < k->layers; l++)
        for (int64_t h = 0; k->layer[l].seen && h < k->layer[l].heads; h++) {
            if (!inspected_chosen(o, l, h))
                continue;
            float *v = values + at * size * size;
            TRY(look_summarise(k, (int)l, h, &summary, v, size, err));
            for (int64_t i = 0; i < size * size; i++)
                v[i] = sqrtf(v[i]);
            snprintf(titles[at], sizeof *titles, "%d.%d", (int)l, (int)h);
            maps[at] = (struct heat_map){.title = titles[at],
                                         .values = v,
                                         .rows = size,
                                         .cols = size,
                                         .high = 1,
                                         .bare = true};
            at++;
        }
    snprintf(title, sizeof title, "Attention of %lld heads over %lld tokens", (long long)count,
             (long long)s->tokens);
    const struct heat_grid grid = {.title = title,
                                   .subtitle = "layer.head; rows ask, columns answer; darker: "
                                               "a larger weight (square root)",
                                   .maps = maps,
                                   .count = (int)count,
                                   .columns = o->layer >= 0 && columns > 6 ? 6 : (int)columns,
                                   .side = columns > 8 ? 64 : 96};
    TRY(heat_grid_write(&grid, path, err));
done:
    free(maps);
    free(values);
    free(titles);
    return st;
}

tril_status look_write_picture(const struct inspected *s, const struct tril_look_options *o,
                               const char *path, struct tril_error *err) {
    return o->layer >= 0 && o->head >= 0 ? one_head(s, o, path, err) : many_heads(s, o, path, err);
}
