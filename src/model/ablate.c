/* Ablations: the list is read into a mask for each layer, which the forward pass asks. */
#include "model/ablate.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    unsigned parts;
} names[] = {
    {"mlp", OFF_MLP}, {"attention", OFF_ATTENTION}, {"layer", OFF_MLP | OFF_ATTENTION},
    {"head", 0},      {"residual", OFF_RESIDUAL},   {"norm", OFF_NORM},
    {"q", OFF_Q},     {"scale", OFF_SCALE},         {"position", OFF_POSITION},
};
enum { NAMES = sizeof names / sizeof *names };

void ablation_free(struct ablation *a) {
    if (!a)
        return;
    free(a->ones);
    free(a->off);
    free(a->heads);
    free(a);
}

static bool number_read(const char **p, int64_t most, int64_t *out) {
    *out = 0;
    if (!isdigit((unsigned char)**p))
        return false;
    for (; isdigit((unsigned char)**p); ++*p) {
        *out = *out * 10 + (**p - '0');
        if (*out >= most)
            return false;
    }
    return true;
}

/* One entry: NAME, NAME:L, NAME:L-L, norm:final, head:L.H. */
static tril_status entry_read(struct ablation *a, const struct model_config *c, const char *entry,
                              struct tril_error *err) {
    const size_t n = strcspn(entry, ":");
    const char *p = entry + n;
    int64_t first = 0, last = c->layers - 1, head = 0;
    int which = 0;
    while (which < NAMES && (strlen(names[which].name) != n || memcmp(names[which].name, entry, n)))
        which++;
    if (which == NAMES)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "'%s' cannot be switched off; mlp, attention, layer:L, head:L.H, "
                         "residual, norm, q, scale and position can",
                         entry);
    const bool one_head = names[which].parts == 0;
    if (strcmp(entry, "norm:final") == 0) {
        a->off[0] |= OFF_NORM;
        return TRIL_OK;
    }
    if (*p) {
        p++;
        bool good = number_read(&p, c->layers, &first);
        last = first;
        if (good && one_head)
            good = *p++ == '.' && number_read(&p, c->heads, &head);
        else if (good && *p == '-')
            good = p++ && number_read(&p, c->layers, &last) && first <= last;
        if (!good || *p)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "'%s' names no %s of this model: its layers are 0 to %lld, its heads "
                             "0 to %lld",
                             entry, one_head ? "head (head:L.H)" : "layer",
                             (long long)c->layers - 1, (long long)c->heads - 1);
    } else if (one_head || strcmp(entry, "layer") == 0) {
        return error_set(err, TRIL_ERR_ARGUMENT, "say which %s is to be switched off: %s", entry,
                         one_head ? "head:3.5 is head 5 of layer 3" : "layer:4");
    } else {
        a->off[0] |= names[which].parts & (OFF_NORM | OFF_POSITION);
    }
    for (int64_t l = first; l <= last; l++)
        a->off[l + 1] |= names[which].parts;
    if (one_head)
        a->heads[first * c->heads + head] = a->any_head = true;
    return TRIL_OK;
}

static tril_status ones_make(struct ablation *a, const struct model *m, struct tril_error *err) {
    const int64_t n = m->config.heads * m->config.head_dim;
    a->ones = malloc((size_t)n * dtype_size(m->dtype));
    if (!a->ones)
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory for an ablation");
    const float one = 1;
    const size_t size = dtype_size(m->dtype);
    for (int64_t i = 0; i < n; i++)
        dtype_convert((char *)a->ones + (size_t)i * size, m->dtype, &one, DT_F32, 1);
    return TRIL_OK;
}

tril_status model_ablate(struct model *m, const char *list, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const struct model_config *c = &m->config;
    struct ablation *a = NULL;
    char *text = NULL;
    if (list && strspn(list, ", \t\n") < strlen(list)) {
        char *rest;
        text = strdup(list);
        a = calloc(1, sizeof *a);
        if (a) {
            a->off = calloc((size_t)c->layers + 1, sizeof *a->off);
            a->heads = calloc((size_t)(c->layers * c->heads), sizeof *a->heads);
        }
        if (!text || !a || !a->off || !a->heads)
            TRY(error_set(err, TRIL_ERR_MEMORY, "not enough memory for an ablation"));
        for (char *e = strtok_r(text, ", \t\n", &rest); e; e = strtok_r(NULL, ", \t\n", &rest))
            TRY(entry_read(a, c, e, err));
        TRY(ones_make(a, m, err));
    }
    ablation_free(m->ablation);
    m->ablation = a;
    a = NULL;
done:
    ablation_free(a);
    free(text);
    return st;
}

tril_status ablate_heads(const struct model *m, int layer, struct tensor heads,
                         struct tril_error *err) {
    const struct ablation *a = m->ablation;
    const int64_t H = m->config.heads, d = m->config.head_dim;
    const size_t size = dtype_size(heads.dtype);
    tril_status st = TRIL_OK;
    if (!a || !a->any_head)
        return TRIL_OK;
    for (int64_t h = 0; h < H; h++)
        for (int64_t n = 0; a->heads[layer * H + h] && n < heads.shape[0]; n++)
            TRY(m->ctx->backend->fill_zero(
                m->ctx, (char *)heads.data + (size_t)(n * heads.stride[0] + h * d) * size,
                d * (int64_t)size, err));
done:
    return st;
}

tril_status ablate_q(const struct model *m, struct tensor q, struct tril_error *err) {
    const size_t size = dtype_size(q.dtype);
    tril_status st = TRIL_OK;
    for (int64_t n = 0; n < q.shape[0]; n++)
        TRY(m->ctx->backend->upload(m->ctx, (char *)q.data + (size_t)(n * q.stride[0]) * size,
                                    m->ablation->ones, q.shape[1] * q.shape[2] * (int64_t)size,
                                    err));
done:
    return st;
}
