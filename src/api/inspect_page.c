/* The attention page: web/attention.html with its style, its script and the data of one pass in
 * place of {{style}}, {{script}} and {{data}}.
 *
 *   meta       JSON: tokens, layers, figures of each head
 *   layer-L    base64: q [H, T, d], then k [K, T, d], fp32 or fp16; with relative positions then
 *              q + w [H, T, d] and r [H, R, d]
 *   lse-L      base64: fp32 [H, T]
 *   mask-N     base64: bits [T, (T + 7) / 8], of masks that are neither causal nor full
 *   thumbs     base64: a byte for each cell of each head's small picture, 255 sqrt(weight) */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/inspect_pass.h"
#include "base/file.h"

extern const unsigned char web_attention_html[], web_attention_css[], web_attention_js[];
extern const size_t web_attention_html_size, web_attention_css_size, web_attention_js_size;

/* Queries and keys above this many bytes are held as fp16. */
enum { FULL_BYTES = 12 << 20, MASK_CAUSAL = -1, MASK_FULL = -2 };

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the page");
}

/* ------------------------------------------------------------------ base64 */

struct encoder {
    struct file_writer *f;
    unsigned char held[3]; /* bytes that wait for their group of three */
    int count;
    char text[8192];
    size_t used;
};

static tril_status flush_text(struct encoder *e, struct tril_error *err) {
    tril_status st = file_writer_write(e->f, e->text, e->used, err);
    e->used = 0;
    return st;
}

static tril_status group_put(struct encoder *e, struct tril_error *err) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const unsigned b = (unsigned)e->held[0] << 16 | (unsigned)e->held[1] << 8 | e->held[2];
    char *out = e->text + e->used;
    out[0] = digits[b >> 18];
    out[1] = digits[b >> 12 & 63];
    out[2] = e->count > 1 ? digits[b >> 6 & 63] : '=';
    out[3] = e->count > 2 ? digits[b & 63] : '=';
    e->used += 4;
    e->count = 0;
    memset(e->held, 0, sizeof e->held);
    return e->used == sizeof e->text ? flush_text(e, err) : TRIL_OK;
}

static tril_status bytes_put(struct encoder *e, const void *bytes, size_t n,
                             struct tril_error *err) {
    const unsigned char *p = bytes;
    tril_status st = TRIL_OK;
    for (size_t i = 0; i < n && st == TRIL_OK; i++) {
        e->held[e->count++] = p[i];
        if (e->count == 3)
            st = group_put(e, err);
    }
    return st;
}

static tril_status bytes_end(struct encoder *e, struct tril_error *err) {
    tril_status st = e->count ? group_put(e, err) : TRIL_OK;
    return st == TRIL_OK ? flush_text(e, err) : st;
}

/* ------------------------------------------------------------------ data */

static tril_status text_put(struct file_writer *f, const char *text, struct tril_error *err) {
    return file_writer_write(f, text, strlen(text), err);
}

/* Opens an element that holds base64. */
static tril_status block_begin(struct encoder *e, struct file_writer *f, const char *name,
                               int64_t number, struct tril_error *err) {
    char tag[80];
    *e = (struct encoder){.f = f};
    if (number < 0)
        snprintf(tag, sizeof tag, "<script type=\"text/plain\" id=\"%s\">", name);
    else
        snprintf(tag, sizeof tag, "<script type=\"text/plain\" id=\"%s-%lld\">", name,
                 (long long)number);
    return text_put(f, tag, err);
}

static tril_status block_end(struct encoder *e, struct tril_error *err) {
    tril_status st = bytes_end(e, err);
    return st == TRIL_OK ? text_put(e->f, "</script>\n", err) : st;
}

/* Queries or keys, n values of dtype t. */
static tril_status values_put(struct encoder *e, const char *data, enum dtype t, int64_t n,
                              bool half, struct tril_error *err) {
    enum { PIECE = 4096 };
    float wide[PIECE];
    uint16_t narrow[PIECE];
    tril_status st = TRIL_OK;
    for (int64_t at = 0; at < n && st == TRIL_OK; at += PIECE) {
        int64_t count = n - at < PIECE ? n - at : PIECE;
        dtype_convert(wide, DT_F32, data + (size_t)at * dtype_size(t), t, (size_t)count);
        for (int64_t i = 0; half && i < count; i++)
            narrow[i] = f32_to_f16(wide[i]);
        st = half ? bytes_put(e, narrow, (size_t)count * sizeof *narrow, err)
                  : bytes_put(e, wide, (size_t)count * sizeof *wide, err);
    }
    return st;
}

/* The distinct masks that are neither causal nor full, as bits. */
struct masks {
    unsigned char **bits;
    int count;
    size_t bytes; /* of one */
};

static void masks_free(struct masks *m) {
    for (int i = 0; i < m->count; i++)
        free(m->bits[i]);
    free(m->bits);
}

/* Which mask a head has: its number, or one of MASK_*. */
static tril_status mask_number(struct masks *m, const struct inspected *s, int layer, int64_t head,
                               int *number, struct tril_error *err) {
    const int64_t T = s->tokens, stride = (T + 7) / 8;
    struct look_head *h = NULL;
    bool causal = true, full = true;
    tril_status st;
    uint8_t *row = malloc((size_t)T);
    unsigned char *bits = calloc((size_t)(T * stride), 1);
    m->bytes = (size_t)(T * stride);
    if (!row || !bits)
        TRY(no_memory(err));
    TRY(look_head_open(&h, s->look, layer, head, err));
    for (int64_t i = 0; i < T; i++) {
        look_head_mask(h, i, 1, row);
        for (int64_t j = 0; j < T; j++) {
            causal = causal && row[j] == (j <= i);
            full = full && row[j];
            bits[i * stride + j / 8] |= (unsigned char)(row[j] << j % 8);
        }
    }
    *number = causal ? MASK_CAUSAL : full ? MASK_FULL : 0;
    if (causal || full)
        goto done;
    while (*number < m->count && memcmp(m->bits[*number], bits, m->bytes) != 0)
        ++*number;
    if (*number < m->count)
        goto done;
    unsigned char **grown = realloc(m->bits, (size_t)(m->count + 1) * sizeof *grown);
    if (!grown)
        TRY(no_memory(err));
    m->bits = grown;
    m->bits[m->count++] = bits;
    bits = NULL;
done:
    free(row);
    free(bits);
    look_head_close(h);
    return st;
}

/* Whether queries and keys are held as fp16: they are many, and none is beyond its range. */
static bool hold_half(const struct inspected *s) {
    double bytes = 0;
    for (int64_t l = 0; l < s->look->layers; l++) {
        const struct look_layer *a = &s->look->layer[l];
        bytes += (double)((a->heads + a->kv_heads) * a->rows * a->width) * 4;
    }
    if (bytes <= FULL_BYTES)
        return false;
    for (int64_t l = 0; l < s->look->layers; l++) {
        const struct look_layer *a = &s->look->layer[l];
        for (int side = 0; a->seen && side < 2; side++) {
            const int64_t n = (side ? a->kv_heads : a->heads) * a->rows * a->width;
            for (int64_t i = 0; i < n; i++) {
                float x;
                dtype_convert(&x, DT_F32, (side ? a->k : a->q) + (size_t)i * dtype_size(a->dtype),
                              a->dtype, 1);
                if (fabsf(x) > 65000)
                    return false;
            }
        }
    }
    return true;
}

/* ------------------------------------------------------------------ meta */

static json_t *layer_json(const struct look_layer *a, int64_t thumb, const int *mask) {
    if (!a->seen)
        return json_pack("{s:b, s:i}", "seen", 0, "heads", 0);
    json_t *slopes = json_null(), *masks = json_array();
    if (a->slopes) {
        slopes = json_array();
        for (int64_t h = 0; h < a->heads; h++)
            json_array_append_new(slopes, json_real((double)a->slopes[h]));
    }
    for (int64_t h = 0; h < a->heads; h++)
        json_array_append_new(masks, json_integer(mask[h]));
    return json_pack("{s:b, s:I, s:I, s:I, s:f, s:f, s:o, s:b, s:o, s:I, s:I}", "seen", 1, "heads",
                     (json_int_t)a->heads, "kv", (json_int_t)a->kv_heads, "width",
                     (json_int_t)a->width, "scale", (double)a->scale, "softcap", (double)a->softcap,
                     "slopes", slopes, "sink", a->sink != NULL, "mask", masks, "thumb",
                     (json_int_t)thumb, "distances", (json_int_t)a->distances);
}

/* The name to show: of the directory or the preset. */
static const char *model_name(const struct tril_model_source *s, char *buffer, size_t size) {
    const char *path = s->preset ? s->preset : s->model ? s->model : s->config;
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        n--;
    size_t begin = n;
    while (begin > 0 && path[begin - 1] != '/')
        begin--;
    snprintf(buffer, size, "%.*s%s", (int)(n - begin), path + begin,
             s->model ? "" : " (random weights)");
    return buffer;
}

/* Writes `root` with "<" escaped, so that no token can end the element, and frees it. */
static tril_status json_put(struct file_writer *f, json_t *root, struct tril_error *err) {
    char *text =
        root ? json_dumps(root, JSON_COMPACT | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(9)) : NULL;
    tril_status st =
        text ? text_put(f, "<script type=\"application/json\" id=\"meta\">", err) : no_memory(err);
    for (const char *p = text; st == TRIL_OK && p && *p;) {
        size_t n = strcspn(p, "<");
        st = file_writer_write(f, p, n, err);
        p += n;
        if (*p && st == TRIL_OK) {
            st = text_put(f, "\\u003c", err);
            p++;
        }
    }
    if (st == TRIL_OK)
        st = text_put(f, "</script>\n", err);
    free(text);
    json_decref(root);
    return st;
}

static tril_status meta_put(const struct inspected *s, const struct tril_look_options *o,
                            struct file_writer *f, const struct tril_look_head *heads,
                            int64_t count, int64_t size, bool half, struct masks *masks,
                            struct tril_error *err) {
    json_t *tokens = json_array(), *layers = json_array(), *figures = json_array();
    char name[256];
    int64_t columns = 1, at = 0;
    int *numbers = NULL;
    tril_status st = TRIL_OK;
    for (int64_t i = 0; i < s->tokens; i++)
        json_array_append_new(tokens, json_string(s->labels[i]));
    for (int64_t l = 0; l < s->look->layers; l++) {
        const struct look_layer *a = &s->look->layer[l];
        json_t *of_layer = json_array();
        numbers = calloc((size_t)a->heads + 1, sizeof *numbers);
        if (!numbers)
            TRY(no_memory(err));
        columns = a->heads > columns ? a->heads : columns;
        const int64_t first = at;
        for (int64_t h = 0; a->seen && h < a->heads && at < count; h++, at++) {
            const struct tril_look_head *x = &heads[at];
            /* Heads under one rule have one mask; a bias hides what it will in each. */
            int64_t same = h;
            for (int64_t g = 0; !a->bias && g < h && same == h; g++)
                if (!a->rules || a->head_rule[g] == a->head_rule[h])
                    same = g;
            if (same < h)
                numbers[h] = numbers[same];
            else
                TRY(mask_number(masks, s, (int)l, h, &numbers[h], err));
            json_array_append_new(of_layer,
                                  json_pack("[f,f,f,f,f,f,f,f]", x->entropy, x->distance, x->first,
                                            x->previous, x->self, x->sink, x->largest, x->uniform));
        }
        json_array_append_new(layers, layer_json(a, first * size * size, numbers));
        json_array_append_new(figures, of_layer);
        free(numbers);
        numbers = NULL;
    }
    json_t *root = json_pack(
        "{s:s, s:s, s:s, s:s, s:b, s:I, s:I, s:I, s:[i,i], s:O, s:O, s:O}", "version", TRIL_VERSION,
        "model", model_name(o->source, name, sizeof name), "dtype", dtype_name(s->m->dtype),
        "ablated", o->ablate ? o->ablate : "", "half", half, "columns", (json_int_t)columns,
        "thumb", (json_int_t)size, "thumbs", (json_int_t)count, "start", o->layer, o->head,
        "layers", layers, "figures", figures, "tokens", tokens);
    TRY(json_put(f, root, err));
done:
    free(numbers);
    json_decref(tokens);
    json_decref(layers);
    json_decref(figures);
    return st;
}

static tril_status data_put(const struct inspected *s, const struct tril_look_options *o,
                            struct file_writer *f, const struct tril_look_head *heads,
                            int64_t count, const float *thumbs, int64_t size,
                            struct tril_error *err) {
    struct masks masks = {0};
    struct encoder e;
    const bool half = hold_half(s);
    tril_status st;
    TRY(meta_put(s, o, f, heads, count, size, half, &masks, err));
    TRY(block_begin(&e, f, "thumbs", -1, err));
    for (int64_t i = 0; i < count * size * size; i++) {
        unsigned char v = (unsigned char)lroundf(255 * sqrtf(fminf(thumbs[i], 1)));
        TRY(bytes_put(&e, &v, 1, err));
    }
    TRY(block_end(&e, err));
    for (int i = 0; i < masks.count; i++) {
        TRY(block_begin(&e, f, "mask", i, err));
        TRY(bytes_put(&e, masks.bits[i], masks.bytes, err));
        TRY(block_end(&e, err));
    }
    for (int64_t l = 0; l < s->look->layers; l++) {
        const struct look_layer *a = &s->look->layer[l];
        if (!a->seen)
            continue;
        TRY(block_begin(&e, f, "lse", l, err));
        TRY(bytes_put(&e, a->lse, (size_t)(a->heads * a->rows) * sizeof *a->lse, err));
        TRY(block_end(&e, err));
        TRY(block_begin(&e, f, "layer", l, err));
        TRY(values_put(&e, a->q, a->dtype, a->heads * a->rows * a->width, half, err));
        TRY(values_put(&e, a->k, a->dtype, a->kv_heads * a->rows * a->width, half, err));
        if (a->position_r) {
            TRY(values_put(&e, (const char *)a->position_q, DT_F32, a->heads * a->rows * a->width,
                           half, err));
            TRY(values_put(&e, (const char *)a->position_r, DT_F32,
                           a->heads * a->distances * a->width, half, err));
        }
        TRY(block_end(&e, err));
    }
done:
    masks_free(&masks);
    return st;
}

tril_status look_write_page(const struct inspected *s, const struct tril_look_options *o,
                            const struct tril_look_head *heads, int64_t count, const float *thumbs,
                            int64_t size, struct tril_error *err) {
    struct file_writer *f = NULL;
    const char *p = (const char *)web_attention_html, *end = p + web_attention_html_size;
    tril_status st = TRIL_OK;
    for (int64_t l = 0; l < s->look->layers; l++) {
        const struct look_layer *a = &s->look->layer[l];
        if (a->seen && (a->bias || a->keys != a->rows))
            return error_set(err, TRIL_ERR_UNSUPPORTED,
                             "layer %lld adds a bias to its scores or sees keys from before the "
                             "text, which the page cannot show: write arrays with --out",
                             (long long)l);
    }
    TRY(file_writer_open(&f, o->html, err));
    while (p < end) {
        const char *mark = memmem(p, (size_t)(end - p), "{{", 2);
        TRY(file_writer_write(f, p, (size_t)((mark ? mark : end) - p), err));
        if (!mark)
            break;
        const char *close = memmem(mark, (size_t)(end - mark), "}}", 2);
        p = close + 2;
        if (strncmp(mark, "{{style}}", 9) == 0)
            TRY(file_writer_write(f, web_attention_css, web_attention_css_size, err));
        else if (strncmp(mark, "{{script}}", 10) == 0)
            TRY(file_writer_write(f, web_attention_js, web_attention_js_size, err));
        else
            TRY(data_put(s, o, f, heads, count, thumbs, size, err));
    }
    struct file_writer *written = f;
    f = NULL;
    TRY(file_writer_commit(written, err));
done:
    if (f)
        file_writer_abort(f);
    return st;
}
