/* tril/inspect.h: a look at attention: the pass, the summaries of its heads, arrays in files. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "api/inspect_pass.h"
#include "base/file.h"
#include "formats/safetensors.h"
#include "plot/svg.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for what attention shows");
}

/* ------------------------------------------------------------------ safetensors */

enum { SCORES, ADDED, WEIGHTS, LSE, MASK, KINDS, CHUNK = 1 << 22 };
static const char *const kinds[KINDS] = {"scores", "added", "weights", "lse", "mask"};

/* The order in the file: all kinds of each layer, but the masks, whose bytes would leave what comes
 * after them unaligned, at the end. */
static int kind_number(int64_t i, int64_t layers) {
    return i < MASK * layers ? (int)(i % MASK) : MASK;
}
static int64_t kind_layer(int64_t i, int64_t layers) {
    return i < MASK * layers ? i / MASK : i - MASK * layers;
}

static bool adds(const struct look_layer *l) {
    return l->softcap > 0 || l->slopes || l->bias || l->position_r;
}

static bool kind_wanted(const struct look_layer *l, int kind) {
    return kind != ADDED || adds(l);
}

static int64_t chosen_heads(const struct look_layer *l, const struct tril_look_options *o) {
    return o->head < 0 ? l->heads : o->head < l->heads ? 1 : 0;
}

/* The free bytes where `path` is to be written; -1: unknown. */
static double room_at(const char *path) {
    struct statvfs v;
    char *folder = strdup(path), *slash = folder ? strrchr(folder, '/') : NULL;
    if (slash)
        slash[slash == folder] = '\0';
    bool good = folder && statvfs(slash ? folder : ".", &v) == 0;
    free(folder);
    return good ? (double)v.f_bavail * (double)v.f_frsize : -1;
}

static tril_status write_head(const struct inspected *s, struct st_writer *w, int layer,
                              int64_t head, int kind, struct tril_error *err) {
    const struct look_layer *l = &s->look->layer[layer];
    const int64_t M = l->keys, rows = CHUNK / M < 1 ? 1 : CHUNK / M;
    struct look_head *h = NULL;
    float *values = NULL;
    tril_status st = TRIL_OK;
    if (kind == LSE)
        return st_writer_write(w, l->lse + head * l->rows, (size_t)l->rows * sizeof *l->lse, err);
    TRY(look_head_open(&h, s->look, layer, head, err));
    values = malloc((size_t)(rows * M) * sizeof *values);
    if (!values)
        TRY(no_memory(err));
    for (int64_t at = 0; at < l->rows; at += rows) {
        int64_t n = l->rows - at < rows ? l->rows - at : rows;
        size_t bytes = (size_t)(n * M) * sizeof *values;
        if (kind == MASK) {
            look_head_mask(h, at, n, (uint8_t *)values);
            bytes = (size_t)(n * M);
        } else if (kind == WEIGHTS) {
            TRY(look_head_weights(h, at, n, values, err));
        } else {
            look_head_scores(h, at, n, values);
            if (kind == ADDED)
                look_head_added(h, at, n, values);
        }
        TRY(st_writer_write(w, values, bytes, err));
    }
done:
    free(values);
    look_head_close(h);
    return st;
}

tril_status look_write_tensors(const struct inspected *s, const struct tril_look_options *o,
                               struct tril_error *err) {
    const int64_t L = s->look->layers;
    struct st_declare *d = calloc((size_t)(KINDS * L + 1), sizeof *d);
    char(*names)[40] = calloc((size_t)(KINDS * L), sizeof *names);
    struct st_writer *w = NULL;
    size_t count = 0;
    double bytes = 0;
    tril_status st = TRIL_OK;
    if (!d || !names)
        TRY(no_memory(err));
    d[count++] = (struct st_declare){"ids", DT_I32, 1, {s->tokens}};
    for (int64_t i = 0; i < KINDS * L; i++) {
        const int64_t l = kind_layer(i, L);
        const int k = kind_number(i, L);
        const struct look_layer *a = &s->look->layer[l];
        if (!a->seen || (o->layer >= 0 && l != o->layer) || !kind_wanted(a, k))
            continue;
        const int64_t H = chosen_heads(a, o);
        snprintf(names[i], sizeof *names, "layer.%lld.%s", (long long)l, kinds[k]);
        d[count++] = (struct st_declare){names[i],
                                         k == MASK ? DT_U8 : DT_F32,
                                         k == LSE ? 2 : 3,
                                         {H, a->rows, k == LSE ? 1 : a->keys}};
        bytes += (double)(H * a->rows) * (k == LSE ? 4 : (double)a->keys * (k == MASK ? 1 : 4));
    }
    double room = room_at(o->out);
    if (room >= 0 && bytes > room) {
        st = error_set(err, TRIL_ERR_IO,
                       "%s would take %.1f GB and there are %.1f GB free: choose a layer and a "
                       "head, or fewer tokens with --seq",
                       o->out, bytes / 1e9, room / 1e9);
        goto done;
    }
    const char *metadata[] = {"format", "tril attention"};
    TRY(st_writer_open(&w, o->out, d, count, metadata, 1, err));
    TRY(st_writer_write(w, s->ids, (size_t)s->tokens * sizeof *s->ids, err));
    for (int64_t i = 0; i < KINDS * L; i++) {
        const int64_t l = kind_layer(i, L);
        const int k = kind_number(i, L);
        const struct look_layer *a = &s->look->layer[l];
        for (int64_t h = 0; a->seen && kind_wanted(a, k) && h < a->heads; h++)
            if (inspected_chosen(o, l, h))
                TRY(write_head(s, w, (int)l, h, k, err));
    }
    struct st_writer *finished = w;
    w = NULL;
    TRY(st_writer_finish(finished, err));
done:
    if (w)
        st_writer_abort(w);
    free(d);
    free(names);
    return st;
}

/* ------------------------------------------------------------------ the call */

static tril_status check_choice(const struct inspected *s, const struct tril_look_options *o,
                                struct tril_error *err) {
    const struct model_config *c = &s->m->config;
    if (o->layer >= c->layers || o->head >= c->heads)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "there is no %s %d: layers are counted 0 to %lld, heads 0 to %lld",
                         o->layer >= c->layers ? "layer" : "head",
                         o->layer >= c->layers ? o->layer : o->head, (long long)c->layers - 1,
                         (long long)c->heads - 1);
    if (o->html && s->tokens > PAGE_TOKENS)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the page takes at most %d tokens and the text has %lld: --seq %d looks "
                         "at the first of them",
                         PAGE_TOKENS, (long long)s->tokens, PAGE_TOKENS);
    return TRIL_OK;
}

/* The matrices of the one head that was chosen. */
static tril_status matrices(const struct inspected *s, const struct tril_look_options *o,
                            struct tril_look *out, struct tril_error *err) {
    const struct look_layer *l = &s->look->layer[o->layer];
    const size_t n = (size_t)(l->rows * l->keys);
    struct look_head *h = NULL;
    tril_status st;
    TRY(look_head_open(&h, s->look, o->layer, o->head, err));
    out->scores = malloc(n * sizeof(float));
    out->weights = malloc(n * sizeof(float));
    out->mask = malloc(n);
    out->added = adds(l) ? malloc(n * sizeof(float)) : NULL;
    if (!out->scores || !out->weights || !out->mask || (adds(l) && !out->added))
        TRY(no_memory(err));
    look_head_scores(h, 0, l->rows, out->scores);
    look_head_mask(h, 0, l->rows, out->mask);
    TRY(look_head_weights(h, 0, l->rows, out->weights, err));
    if (out->added) {
        memcpy(out->added, out->scores, n * sizeof(float));
        look_head_added(h, 0, l->rows, out->added);
    }
done:
    look_head_close(h);
    return st;
}

/* The picture as SVG, as PNG by way of it, or both. */
static tril_status pictures(const struct inspected *s, const struct tril_look_options *o,
                            bool *png_made, struct tril_error *err) {
    char *between = NULL;
    const char *svg = o->svg;
    tril_status st = TRIL_OK;
    if (!svg) {
        between = malloc(strlen(o->png) + 8);
        if (!between)
            return no_memory(err);
        strcpy(between, o->png);
        strcat(between, ".svg");
        svg = between;
    }
    TRY(look_write_picture(s, o, svg, err));
    if (o->png)
        TRY(plot_svg_to_png(svg, o->png, png_made, err));
done:
    if (between)
        unlink(between);
    free(between);
    return st;
}

tril_status tril_look(const struct tril_look_options *o, struct tril_look *out,
                      struct tril_error *err) {
    struct inspected s = {0};
    float *thumbs = NULL;
    tril_status st;
    *out = (struct tril_look){0};
    TRY(inspected_open(&s, o, err));
    TRY(check_choice(&s, o, err));
    TRY(inspected_run(&s, err));
    if (o->layer >= 0 && !s.look->layer[o->layer].seen) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "layer %d has no softmax attention to look at: it is linear, or off",
                       o->layer);
        goto done;
    }
    const int64_t L = s.look->layers;
    const int64_t size = s.tokens < PAGE_THUMB ? s.tokens : PAGE_THUMB;
    int64_t most = 0;
    for (int64_t l = 0; l < L; l++)
        most += s.look->layer[l].seen ? s.look->layer[l].heads : 0;
    model_info_fill(&out->info, &s.m->config);
    out->seconds = s.seconds;
    out->heads = calloc((size_t)most + 1, sizeof *out->heads);
    thumbs = o->html ? malloc((size_t)(most * size * size) * sizeof *thumbs + 1) : NULL;
    if (!out->heads || (o->html && !thumbs))
        TRY(no_memory(err));
    for (int64_t l = 0; l < L; l++)
        for (int64_t h = 0; s.look->layer[l].seen && h < s.look->layer[l].heads; h++) {
            struct look_summary x;
            if (!inspected_chosen(o, l, h) && !o->html)
                continue;
            float *thumb = thumbs ? thumbs + out->head_count * size * size : NULL;
            TRY(look_summarise(s.look, (int)l, h, &x, thumb, size, err));
            out->heads[out->head_count++] =
                (struct tril_look_head){(int)l,     (int)h, x.entropy, x.distance, x.first,
                                        x.previous, x.self, x.sink,    x.largest,  x.uniform};
        }
    if (o->html) {
        TRY(look_write_page(&s, o, out->heads, out->head_count, thumbs, size, err));
        int64_t kept = 0; /* the page has all, the caller those that were asked for */
        for (int64_t i = 0; i < out->head_count; i++)
            if (inspected_chosen(o, out->heads[i].layer, out->heads[i].head))
                out->heads[kept++] = out->heads[i];
        out->head_count = kept;
    }
    if (o->out)
        TRY(look_write_tensors(&s, o, err));
    if (o->svg || o->png)
        TRY(pictures(&s, o, &out->png_made, err));
    if (o->layer >= 0 && o->head >= 0 && s.tokens <= 256)
        TRY(matrices(&s, o, out, err));
    out->tokens = s.tokens;
    out->ids = s.ids;
    out->labels = s.labels;
    s.ids = NULL;
    s.labels = NULL;
done:
    free(thumbs);
    inspected_close(&s);
    if (st != TRIL_OK)
        tril_look_free(out);
    return st;
}

void tril_look_free(struct tril_look *k) {
    for (int64_t i = 0; k->labels && i < k->tokens; i++)
        free(k->labels[i]);
    free(k->labels);
    free(k->ids);
    free(k->heads);
    free(k->scores);
    free(k->added);
    free(k->weights);
    free(k->mask);
    *k = (struct tril_look){0};
}
