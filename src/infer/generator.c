/* Generation. Text leaves only when it is certain: whole characters, and no beginning of a stop
 * string. */
#include "infer/generator.h"

#include <stdlib.h>
#include <string.h>

#include "base/system.h"
#include "infer/sampler.h"

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the generated text");
}

void tril_generation_free(struct tril_generation *g) {
    free(g->text);
    free(g->tokens);
    *g = (struct tril_generation){0};
}

tril_status prompt_encode(const struct tokenizer *t, const char *text, size_t size, int32_t **ids,
                          int64_t *n, struct tril_error *err) {
    uint32_t *encoded = NULL;
    size_t count = 0;
    int64_t bos = tokenizer_bos(t), start = bos;
    tril_status st = tokenizer_encode(t, text, size, true, &encoded, &count, err);
    if (st != TRIL_OK)
        return st;
    if (count == 0 && start < 0)
        start = tokenizer_eos(t);
    *n = (int64_t)count + (start >= 0);
    *ids = malloc((size_t)(*n + 1) * sizeof **ids);
    if (!*ids)
        st = no_memory(err);
    else if (*n == 0)
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "the prompt is empty, and the tokenizer has no token to begin with: give a "
                       "prompt");
    else {
        if (start >= 0)
            (*ids)[0] = (int32_t)start;
        for (size_t i = 0; i < count; i++)
            (*ids)[(start >= 0) + (int64_t)i] = (int32_t)encoded[i];
    }
    if (st != TRIL_OK) {
        free(*ids);
        *ids = NULL;
    }
    free(encoded);
    return st;
}

#define MOST_TOKENS INT64_C(10000000)

/* The text so far, and how much of it the caller has. */
struct output {
    const struct tril_generate_options *o;
    char *text;
    size_t size, capacity, given;
    bool stopped; /* by the callback */
};

static tril_status output_add(struct output *out, const char *piece, size_t size,
                              struct tril_error *err) {
    if (out->size + size + 1 > out->capacity) {
        size_t capacity = 2 * (out->size + size) + 64;
        char *grown = realloc(out->text, capacity);
        if (!grown)
            return no_memory(err);
        out->text = grown;
        out->capacity = capacity;
    }
    if (size)
        memcpy(out->text + out->size, piece, size);
    out->size += size;
    out->text[out->size] = '\0';
    return TRIL_OK;
}

/* Cuts the text before the first stop string in it. */
static bool find_stop(struct output *out) {
    size_t first = SIZE_MAX;
    for (int i = 0; i < out->o->stop_count; i++) {
        size_t n = strlen(out->o->stop[i]);
        const char *hit =
            n ? memmem(out->text + out->given, out->size - out->given, out->o->stop[i], n) : NULL;
        if (hit && (size_t)(hit - out->text) < first)
            first = (size_t)(hit - out->text);
    }
    if (first == SIZE_MAX)
        return false;
    out->size = first;
    out->text[first] = '\0';
    return true;
}

/* Bytes at the end that may become a stop string. */
static size_t held_back(const struct output *out) {
    size_t most = 0;
    for (int i = 0; i < out->o->stop_count; i++) {
        size_t n = strlen(out->o->stop[i]), waiting = out->size - out->given;
        for (size_t k = n ? n - 1 : 0; k > most; k--)
            if (k <= waiting && memcmp(out->text + out->size - k, out->o->stop[i], k) == 0) {
                most = k;
                break;
            }
    }
    return most;
}

static void give(struct output *out, size_t keep) {
    size_t n = out->size - out->given - keep;
    if (n > 0 && out->o->on_text && !out->stopped)
        out->stopped = out->o->on_text(out->o->arg, out->text + out->given, n) != 0;
    out->given += n;
}

/* At the context's end: forget the older half, recompute the rest and the next token. */
static tril_status roll(struct session *s, int32_t next, struct tril_error *err) {
    int64_t n, keep;
    const int32_t *tokens = session_tokens(s, &n);
    keep = n - n / 2 < n ? n - n / 2 : n - 1;
    int32_t *rest = malloc((size_t)(keep + 1) * sizeof *rest);
    if (!rest)
        return no_memory(err);
    memcpy(rest, tokens + n - keep, (size_t)keep * sizeof *rest);
    rest[keep] = next;
    tril_status st = session_sync(s, rest, keep + 1, NULL, err);
    free(rest);
    return st;
}

tril_status generator_run(struct session *s, const struct tokenizer *tokenizer, int64_t eos,
                          const struct tril_generate_options *o, struct tril_generation *g,
                          struct tril_error *err) {
    struct sampler_options so = {.temperature = o->temperature,
                                 .top_k = o->top_k,
                                 .top_p = o->top_p,
                                 .min_p = o->min_p,
                                 .repetition_penalty = o->repetition_penalty,
                                 .seed = o->seed};
    struct op_context *ctx = session_context(s);
    struct sampler *sampler = NULL;
    struct output out = {.o = o};
    struct tokenizer_stream stream = {0};
    double begun = clock_seconds(), first = 0;
    int32_t *ids = NULL;
    const char *piece;
    size_t piece_size;
    int64_t n = 0;
    tril_status st = TRIL_OK;
    *g = (struct tril_generation){.finish = TRIL_FINISH_LENGTH};
    if (o->max_tokens < 0) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "the number of tokens to generate is negative");
        goto done;
    }
    if (o->prompt_ids) {
        n = o->prompt_id_count;
        ids = malloc((size_t)(n + 1) * sizeof *ids);
        if (!ids) {
            st = no_memory(err);
            goto done;
        }
        memcpy(ids, o->prompt_ids, (size_t)n * sizeof *ids);
    } else {
        TRY(prompt_encode(tokenizer, o->prompt, o->prompt_size, &ids, &n, err));
    }
    g->prompt_tokens = n;
    if (o->max_tokens > MOST_TOKENS) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "at most %lld tokens can be generated at once, not %lld",
                       (long long)MOST_TOKENS, (long long)o->max_tokens);
        goto done;
    }
    g->tokens = malloc((size_t)(o->max_tokens + 1) * sizeof *g->tokens);
    if (!g->tokens) {
        st = no_memory(err);
        goto done;
    }
    TRY(output_add(&out, "", 0, err));
    TRY(sampler_create(&sampler, ctx, &so, session_vocab(s), err));
    session_set_sampler(s, sampler);
    for (int64_t i = 0; i < n; i++)
        sampler_accept(sampler, ids[i]);
    if (tokenizer)
        tokenizer_stream_begin(&stream, tokenizer, true);
    TRY(session_sync(s, ids, n, NULL, err));
    TRY(ctx->backend->synchronise(ctx, err)); /* to know how long the prompt takes */
    g->prefill_tokens_per_second = (double)n / (clock_seconds() - begun);
    while (g->token_count < o->max_tokens) {
        int32_t token;
        int64_t held;
        TRY(sampler_read(sampler, &token, NULL, err));
        if (g->token_count == 0)
            first = clock_seconds();
        if (token == eos && !o->ignore_eos) {
            g->finish = TRIL_FINISH_EOS;
            break;
        }
        g->tokens[g->token_count++] = token;
        if (tokenizer) {
            TRY(tokenizer_stream_next(&stream, (uint32_t)token, &piece, &piece_size, err));
            TRY(output_add(&out, piece, piece_size, err));
            if (find_stop(&out)) {
                g->finish = TRIL_FINISH_STOP;
                break;
            }
            give(&out, held_back(&out));
            if (out.stopped) {
                g->finish = TRIL_FINISH_CALLBACK;
                break;
            }
        }
        if (g->token_count == o->max_tokens)
            break;
        session_tokens(s, &held);
        if (held == session_capacity(s)) {
            if (!o->roll) {
                g->finish = TRIL_FINISH_CONTEXT;
                break;
            }
            TRY(roll(s, token, err));
        } else {
            TRY(session_step(s, token, err));
        }
    }
    if (tokenizer && g->finish != TRIL_FINISH_STOP) {
        tokenizer_stream_end(&stream, &piece, &piece_size);
        TRY(output_add(&out, piece, piece_size, err));
    }
    give(&out, 0);
    double ended = clock_seconds();
    g->ttft_ms = first > 0 ? (first - begun) * 1e3 : 0;
    g->tokens_per_second = g->token_count > 1 ? (double)(g->token_count - 1) / (ended - first) : 0;
    g->found = session_found(s);
    g->text = out.text;
    g->size = out.size;
    out.text = NULL;
done:
    if (tokenizer && stream.tokenizer)
        tokenizer_stream_free(&stream);
    session_set_sampler(s, NULL);
    sampler_free(sampler);
    free(ids);
    free(out.text);
    if (st != TRIL_OK)
        tril_generation_free(g);
    return st;
}
