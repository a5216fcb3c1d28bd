/* A model and a text, opened for looking inside. */
#include "api/inspect_pass.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/device.h"
#include "base/system.h"
#include "infer/generator.h"
#include "model/ablate.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory to look at the text");
}

static tril_status model_open(struct inspected *s, const struct tril_look_options *o,
                              struct tril_error *err) {
    struct model_options options = {.dtype = DT_F32};
    struct model_config c;
    tril_status st = TRIL_OK;
    TRY(device_open_as(&s->ctx, o->device, o->dtype, &options.dtype, err));
    TRY(source_config(o->source, &c, err));
    if (o->source->model) {
        options.overrides = &o->source->overrides;
        TRY(model_load(&s->m, o->source->model, &options, &s->ctx, err));
    } else {
        TRY(model_create(&s->m, &c, &options, &s->ctx, err));
        TRY(model_init(s->m, 0, err));
    }
    TRY(model_ablate(s->m, o->ablate, err));
done:
    return st;
}

static tril_status text_read(struct inspected *s, const struct tril_look_options *o,
                             struct tril_error *err) {
    struct tril_error unread;
    const char *where = o->tokenizer ? o->tokenizer : o->source->model;
    tril_status st = TRIL_OK;
    if (o->tokenizer)
        TRY(tokenizer_load(&s->tokenizer, o->tokenizer, NULL, err));
    else if (where && tokenizer_load(&s->tokenizer, where, NULL, &unread) != TRIL_OK)
        s->tokenizer = NULL; /* said when a text needs it */
    if (o->ids) {
        s->tokens = o->id_count;
        s->ids = malloc((size_t)(o->id_count + 1) * sizeof *s->ids);
        if (!s->ids)
            return no_memory(err);
        memcpy(s->ids, o->ids, (size_t)o->id_count * sizeof *s->ids);
    } else if (!o->prompt) {
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "give a text: --prompt TEXT, --prompt-file FILE or --ids \"1 2 3\"");
    } else if (!s->tokenizer) {
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "there is no tokenizer beside the model: give one with --tokenizer, or "
                         "token ids with --ids");
    } else {
        TRY(prompt_encode(s->tokenizer, o->prompt, o->prompt_size, &s->ids, &s->tokens, err));
    }
    if (o->seq > 0 && s->tokens > o->seq)
        s->tokens = o->seq;
    if (s->tokens < 1)
        return error_set(err, TRIL_ERR_ARGUMENT, "give at least one token");
done:
    return st;
}

/* Bytes of the valid UTF-8 character at s, at most n; 0 for none. */
static size_t character(const unsigned char *s, size_t n) {
    if (s[0] < 0x80)
        return 1;
    size_t length = s[0] >= 0xc2 && s[0] < 0xe0   ? 2
                    : (s[0] & 0xf0) == 0xe0       ? 3
                    : s[0] >= 0xf0 && s[0] < 0xf5 ? 4
                                                  : 0;
    if (!length || length > n)
        return 0;
    for (size_t i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) ||
        (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f))
        return 0;
    return length;
}

/* A token's text; bytes that are no character (a part of one) as <E1>. */
static char *label_make(const struct tokenizer *t, int32_t id) {
    size_t size = 0, n = 0;
    const unsigned char *bytes = t ? tokenizer_token_bytes(t, (uint32_t)id, &size) : NULL;
    char *label = malloc(bytes ? 4 * size + 1 : 16);
    if (!label)
        return NULL;
    if (!bytes)
        snprintf(label, 16, "#%d", id);
    for (size_t i = 0; bytes && i < size;) {
        size_t length = character(bytes + i, size - i);
        if (length) {
            memcpy(label + n, bytes + i, length);
            n += length;
            i += length;
        } else {
            n += (size_t)snprintf(label + n, 5, "<%02X>", bytes[i++]);
        }
    }
    if (bytes)
        label[n] = '\0';
    return label;
}

tril_status inspected_open_any(struct inspected *s, const struct tril_look_options *o,
                               struct tril_error *err) {
    tril_status st;
    *s = (struct inspected){0};
    TRY(model_open(s, o, err));
    TRY(text_read(s, o, err));
    TRY(look_create(&s->look, s->m, err));
done:
    if (st != TRIL_OK)
        inspected_close(s);
    return st;
}

tril_status inspected_open(struct inspected *s, const struct tril_look_options *o,
                           struct tril_error *err) {
    tril_status st;
    TRY(inspected_open_any(s, o, err));
    if (s->tokens > s->m->config.context) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "the text has %lld tokens, the model's context is %lld: --seq %lld looks at "
                       "the first of them",
                       (long long)s->tokens, (long long)s->m->config.context,
                       (long long)s->m->config.context);
        goto done;
    }
    s->labels = calloc((size_t)s->tokens, sizeof *s->labels);
    if (!s->labels)
        TRY(no_memory(err));
    for (int64_t i = 0; i < s->tokens; i++) {
        s->labels[i] = label_make(s->tokenizer, s->ids[i]);
        if (!s->labels[i])
            TRY(no_memory(err));
    }
done:
    if (st != TRIL_OK)
        inspected_close(s);
    return st;
}

void inspected_close(struct inspected *s) {
    for (int64_t i = 0; s->labels && i < s->tokens; i++)
        free(s->labels[i]);
    free(s->labels);
    free(s->ids);
    look_free(s->look);
    workspace_free(s->w);
    tokenizer_free(s->tokenizer);
    model_free(s->m);
    op_context_free(&s->ctx);
    *s = (struct inspected){0};
}

tril_status inspected_run(struct inspected *s, struct tril_error *err) {
    const int32_t offsets[2] = {0, (int32_t)s->tokens}, last = (int32_t)(s->tokens - 1);
    const struct workspace_options options = {
        .max_tokens = s->tokens, .max_sequences = 1, .max_rows = 1};
    const struct batch b = {.tokens = s->tokens,
                            .sequences = 1,
                            .ids = s->ids,
                            .offsets = offsets,
                            .rows = &last,
                            .row_count = 1};
    tril_status st;
    float *logits = malloc((size_t)s->m->config.vocab * sizeof *logits);
    if (!logits)
        return no_memory(err);
    TRY(workspace_create(&s->w, s->m, &options, err));
    TRY(workspace_watch_attention(s->w, look_hook, s->look, err));
    workspace_watch_relative(s->w, look_relative_hook);
    double begun = clock_seconds();
    TRY(model_forward(s->m, s->w, &b, logits, err));
    s->seconds = clock_seconds() - begun;
done:
    free(logits);
    return st;
}
