/* Corpora and small training runs. */
#include "lab/learner.h"

#include <malloc.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/progress.h"
#include "base/system.h"
#include "lab/bench.h"
#include "text/bpe_train.h"
#include "train/evaluate.h"
#include "train/optimiser.h"
#include "train/schedule.h"

/* ------------------------------------------------------------------ text */

struct draw {
    struct random_key key;
    uint64_t next;
};

static uint64_t below(struct draw *d, uint64_t n) {
    return random_below(&d->key, d->next++, n);
}

/* Earlier words more often: Zipf's law, roughly. */
static const char *pick(struct draw *d, const char *const *words, uint64_t n) {
    uint64_t a = below(d, n), b = below(d, n);
    return words[a < b ? a : b];
}
#define PICK(d, words) pick(d, words, sizeof(words) / sizeof *(words))

/* A noun phrase and its verb agree in number, however far apart they stand. */
static void sentence(struct draw *d, FILE *f, const char *name) {
    static const char *const one[] = {"cat",    "king",  "river", "child", "ship",  "door",
                                      "letter", "storm", "horse", "song",  "stone", "garden"};
    static const char *const many[] = {"cats",   "kings", "rivers",  "children",
                                       "ships",  "doors", "letters", "storms",
                                       "horses", "songs", "stones",  "gardens"};
    static const char *const kinds[] = {"old", "small", "red", "quiet", "broken", "golden", "lost"};
    static const char *const does[] = {"sleeps", "waits", "falls", "sings", "turns", "burns"};
    static const char *const dos[] = {"sleep", "wait", "fall", "sing", "turn", "burn"};
    static const char *const where[] = {"by the sea", "in the hall", "under the moon",
                                        "at the gate", "near the wood"};
    static const char *const says[] = {"said", "asked", "answered", "whispered"};
    static const char *const numbers[] = {"two", "three", "four", "five", "many"};
    bool plural = below(d, 2), quoted = below(d, 5) == 0;
    if (quoted)
        fputs("\"", f);
    if (plural)
        fprintf(f, "%s ", PICK(d, numbers));
    else
        fputs("the ", f);
    if (below(d, 2))
        fprintf(f, "%s ", PICK(d, kinds));
    fputs(plural ? PICK(d, many) : PICK(d, one), f);
    if (below(d, 3) == 0) /* words between the noun and its verb */
        fprintf(f, " that the %s %s", PICK(d, one), below(d, 2) ? "loves" : "fears");
    fprintf(f, " %s", plural ? PICK(d, dos) : PICK(d, does));
    if (below(d, 2))
        fprintf(f, " %s", PICK(d, where));
    if (quoted)
        fprintf(f, ",\" %s %s", PICK(d, says), name);
    fputs(below(d, 4) == 0 ? ".\n" : ". ", f);
}

char *corpus_generate(size_t bytes, uint64_t seed) {
    static const char *const names[] = {"Ada", "Kim", "Lan", "Omar", "Vera", "Tuan"};
    struct draw d = {.key = {.seed = seed, .op = RANDOM_TEST}};
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return NULL;
    const char *name = names[0];
    for (int i = 0;; i++) {
        if (i % 8 == 0)
            name = PICK(&d, names); /* one speaker for a while: something to remember */
        sentence(&d, f, name);
        if (fflush(f) != 0 || size >= bytes)
            break;
    }
    if (fclose(f) != 0) {
        free(text);
        return NULL;
    }
    text[bytes < size ? bytes : size] = 0;
    return text;
}

/* All files, one after the other. */
static tril_status read_all(const struct lab *l, int64_t most, char **text, size_t *size,
                            struct tril_error *err) {
    tril_status st = TRIL_OK;
    *text = NULL;
    *size = 0;
    for (int i = 0; i < l->data_count && (most == 0 || *size < (size_t)most); i++) {
        struct file_map map = {0};
        TRY(file_map_open(&map, l->data[i], err));
        size_t room = most ? (size_t)most - *size : map.size, n = map.size < room ? map.size : room;
        char *longer = realloc(*text, *size + n + 1);
        if (longer) {
            *text = longer;
            if (n)
                memcpy(longer + *size, map.data, n);
            *size += n;
            longer[*size] = 0;
        }
        file_map_close(&map);
        if (!longer)
            return lab_no_memory(err);
    }
done:
    return st;
}

tril_status corpus_open(struct corpus *c, const struct lab *l, int64_t vocab, int64_t most,
                        struct tril_error *err) {
    struct bpe_train_options bpe = {.vocab_size = (uint32_t)vocab, .quiet = true};
    struct tokenizer *t = NULL;
    uint32_t *ids = NULL;
    char *text = NULL;
    size_t size = 0, n = 0;
    tril_status st = TRIL_OK;
    *c = (struct corpus){0};
    if (l->data_count > 0) {
        TRY(read_all(l, most, &text, &size, err));
        const char *slash = strrchr(l->data[0], '/');
        c->name = slash ? slash + 1 : l->data[0];
    } else {
        size = most > 0 ? (size_t)most : 1 << 20;
        text = corpus_generate(size, 1);
        c->name = "generated sentences";
    }
    if (!text) {
        st = lab_no_memory(err);
        goto done;
    }
    TRY(tokenizer_train_text(&t, text, size, &bpe, NULL, err));
    TRY(tokenizer_encode_parallel(t, text, size, false, &ids, &n, err));
    if (n < 4000) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "%s: %zu tokens are too few for the lab to learn from; give more text",
                       c->name, n);
        goto done;
    }
    c->vocab = tokenizer_vocab_size(t);
    c->bytes_per_token = (double)size / (double)n;
    c->train = malloc(n * sizeof *c->train);
    if (!c->train) {
        st = lab_no_memory(err);
        goto done;
    }
    for (size_t i = 0; i < n; i++)
        c->train[i] = (int32_t)ids[i];
    c->valid_count = (int64_t)n / 20;
    c->train_count = (int64_t)n - c->valid_count;
    c->valid = c->train + c->train_count;
    c->tokenizer = t;
    t = NULL;
done:
    free(ids);
    free(text);
    tokenizer_free(t);
    return st;
}

void corpus_free(struct corpus *c) {
    free(c->train);
    tokenizer_free(c->tokenizer);
    *c = (struct corpus){0};
}

/* ------------------------------------------------------------------ models */

struct model_config learner_config(bool gpt, int64_t layers, int64_t dim, int64_t heads,
                                   int64_t vocab, int64_t context) {
    struct model_config c = {0};
    struct tril_error ignored = {0};
    model_config_preset(&c, gpt ? "gpt2" : "nano", &ignored);
    c.layers = layers;
    c.dim = dim;
    c.heads = c.kv_heads = heads;
    c.head_dim = dim / heads;
    c.rope_dim = c.position == POSITION_ROPE ? c.head_dim : 0;
    c.ffn = gpt ? 4 * dim : (8 * dim / 3 + 7) / 8 * 8;
    c.vocab = vocab;
    c.context = context;
    c.bos_id = c.eos_id = -1;
    c.init_std = (float)(1 / sqrt((double)dim)); /* 0.02 is for widths of a thousand and more */
    if (gpt)
        c.qkv_bias = c.attention_out_bias = c.ffn_bias = false;
    return c;
}

static void windows(const struct learning *h, const struct corpus *text, int64_t step,
                    int32_t *inputs, int32_t *targets) {
    struct random_key key = {.seed = h->seed, .step = (uint64_t)step, .op = RANDOM_SHUFFLE};
    for (int64_t b = 0; b < h->batch; b++) {
        uint64_t room = (uint64_t)(text->train_count - h->seq);
        const int32_t *at = text->train + random_below(&key, (uint64_t)b, room);
        memcpy(inputs + b * h->seq, at, (size_t)h->seq * sizeof *at);
        memcpy(targets + b * h->seq, at + 1, (size_t)h->seq * sizeof *at);
    }
}

tril_status corpus_loss(struct model *m, const int32_t *ids, int64_t count, int64_t seq,
                        int64_t tokens, double *loss, struct tril_error *err) {
    int64_t batch = seq < 2048 ? 2048 / seq : 1, n = tokens > 0 && tokens < count ? tokens : count;
    struct workspace_options wo = {.max_tokens = batch * seq, .max_sequences = batch};
    struct workspace *w = NULL;
    struct evaluation e;
    tril_status st = TRIL_OK;
    TRY(workspace_create(&w, m, &wo, err));
    progress_quiet(1);
    st = evaluate_tokens(m, w, ids, n, seq, seq, batch, NULL, &e, err);
    progress_quiet(0);
    if (st == TRIL_OK)
        *loss = e.loss_sum / (double)e.tokens;
done:
    workspace_free(w);
    return st;
}

tril_status learn(struct op_context *ctx, const struct learning *h, const struct corpus *text,
                  struct model **m, struct learned *out, struct tril_error *err) {
    struct model_options mo = {.dtype = DT_F32, .training = true};
    int64_t n = h->batch * h->seq, count;
    struct workspace_options wo = {.max_tokens = n, .max_sequences = h->batch, .backward = true};
    struct adamw_params adamw = {0.9f, 0.95f, 1e-8f, (float)h->weight_decay};
    struct schedule schedule = {SCHEDULE_COSINE, h->lr, h->lr / 10, h->steps / 20, h->steps};
    struct optimiser optimiser = {0};
    struct workspace *w = NULL;
    struct model_counts counts;
    struct progress progress;
    int32_t *ids = NULL, *targets, *offsets;
    double *seconds = NULL, loss, norm, begun = clock_seconds();
    char detail[40];
    bool applied;
    tril_status st = TRIL_OK;
    *m = NULL;
    *out = (struct learned){.valid_loss = NAN};
    progress_start(&progress, h->what, h->steps);
    malloc_trim(0);
    memory_reset_peak();
    double before = (double)memory_peak_rss();
    seconds = malloc((size_t)h->steps * sizeof *seconds);
    out->losses = malloc((size_t)h->steps * sizeof *out->losses);
    ids = malloc((size_t)(2 * n + h->batch + 1) * sizeof *ids);
    if (!seconds || !out->losses || !ids) {
        st = lab_no_memory(err);
        goto done;
    }
    targets = ids + n;
    offsets = targets + n;
    for (int64_t b = 0; b <= h->batch; b++)
        offsets[b] = (int32_t)(b * h->seq);
    if (text && text->train_count <= h->seq + 1) {
        st = error_set(err, TRIL_ERR_ARGUMENT, "the text is too short for windows of %lld tokens",
                       (long long)h->seq);
        goto done;
    }
    TRY(model_create(m, h->config, &mo, ctx, err));
    TRY(model_init(*m, h->seed, err));
    TRY(workspace_create(&w, *m, &wo, err));
    TRY(optimiser_create(&optimiser, *m, &adamw, 1.0f, err));
    struct batch b = {
        .tokens = n, .sequences = h->batch, .ids = ids, .targets = targets, .offsets = offsets};
    for (int64_t step = 0; step < h->steps; step++) {
        double start = clock_seconds();
        if (h->batch_fill)
            h->batch_fill(h->arg, step, ids, targets);
        else
            windows(h, text, step, ids, targets);
        int64_t wanted = 0;
        for (int64_t i = 0; i < n; i++)
            wanted += targets[i] >= 0;
        struct train_call call = {.scale = 1.0f / (float)(wanted ? wanted : 1),
                                  .seed = h->seed,
                                  .step = (uint64_t)step,
                                  .overwrite = true};
        TRY(model_forward_backward(*m, w, &b, &call, &loss, &count, err));
        if (h->watch)
            TRY(h->watch(h->arg, *m, step, err));
        TRY(optimiser_step(&optimiser, step + 1, schedule_rate(&schedule, step), &norm, &applied,
                           err));
        seconds[step] = clock_seconds() - start;
        out->losses[step] = loss / (double)(count ? count : 1);
        snprintf(detail, sizeof detail, "loss %.3f", out->losses[step]);
        progress_update(&progress, step + 1, detail);
        if (!isfinite(out->losses[step]) || signal_caught()) {
            st = signal_caught() ? error_set(err, TRIL_ERR_INTERRUPTED, "stopped by a signal")
                                 : error_set(err, TRIL_ERR_NUMERIC,
                                             "%s: the loss is not finite after %lld steps", h->what,
                                             (long long)step);
            goto done;
        }
    }
    int64_t tail = h->steps / 10 > 0 ? h->steps / 10 : 1;
    for (int64_t i = h->steps - tail; i < h->steps; i++)
        out->train_loss += out->losses[i] / (double)tail;
    out->step_ms = bench_median(seconds, h->steps) * 1e3;
    out->tokens = (double)(h->steps * n);
    out->seconds = clock_seconds() - begun;
    out->peak_bytes = (double)memory_peak_rss() - before;
    out->workspace_bytes = (double)workspace_bytes(w);
    model_count(h->config, h->seq, &counts);
    out->parameters = counts.total;
    if (text)
        TRY(corpus_loss(*m, text->valid, text->valid_count, h->seq, 100000, &out->valid_loss, err));
done:
    progress_end(&progress);
    free(ids);
    free(seconds);
    optimiser_free(&optimiser);
    workspace_free(w);
    if (st != TRIL_OK) {
        model_free(*m);
        *m = NULL;
        free(out->losses);
        out->losses = NULL;
    }
    return st;
}

tril_status learner_copy(const struct model *from, const struct model_config *c,
                         struct op_context *ctx, struct model **to, struct tril_error *err) {
    struct model_options mo = {.dtype = DT_F32, .training = true};
    float *host = NULL;
    tril_status st = TRIL_OK;
    *to = NULL;
    TRY(model_create(to, c, &mo, ctx, err));
    TRY(model_init(*to, 1, err));
    for (int i = 0; i < (*to)->table.count; i++) {
        const struct param_row *r = &(*to)->table.rows[i];
        int source = model_row(from, r->role, r->layer);
        if (source < 0)
            continue;
        const struct param_row *f = &from->table.rows[source];
        int64_t mine = r->shape[0] * (r->rank > 1 ? r->shape[1] : 1);
        int64_t theirs = f->shape[0] * (f->rank > 1 ? f->shape[1] : 1);
        int64_t n = mine < theirs ? mine : theirs;
        free(host);
        host = malloc((size_t)n * sizeof *host);
        if (!host) {
            st = lab_no_memory(err);
            goto done;
        }
        TRY(model_row_download(from, source, 0, n, host, err));
        TRY(model_row_upload(*to, i, 0, n, host, DT_F32, err));
    }
    TRY(model_refresh(*to, err));
done:
    free(host);
    if (st != TRIL_OK) {
        model_free(*to);
        *to = NULL;
    }
    return st;
}

tril_status corpus_tail_loss(struct model *m, const int32_t *ids, int64_t count, int64_t past,
                             int64_t most, int64_t scored, int64_t stride, int64_t windows,
                             double *loss, struct tril_error *err) {
    struct workspace_options wo = {.max_tokens = past, .max_sequences = 1};
    struct workspace *w = NULL;
    int32_t *targets = malloc((size_t)past * sizeof *targets), offsets[2] = {0, (int32_t)past};
    double total = 0, part;
    int64_t scored_all = 0, n;
    tril_status st = TRIL_OK;
    if (!targets)
        return lab_no_memory(err);
    TRY(workspace_create(&w, m, &wo, err));
    for (int64_t k = 0; k < windows && most + k * stride + 1 <= count; k++) {
        const int32_t *at = ids + most + k * stride - past;
        for (int64_t i = 0; i < past; i++)
            targets[i] = i >= past - scored ? at[i + 1] : -1;
        struct batch b = {
            .tokens = past, .sequences = 1, .ids = at, .targets = targets, .offsets = offsets};
        TRY(model_loss(m, w, &b, &part, &n, NULL, err));
        total += part;
        scored_all += n;
    }
    if (scored_all == 0)
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "the text for validation is shorter than a window of %lld tokens",
                       (long long)most);
    *loss = total / (double)(scored_all ? scored_all : 1);
done:
    workspace_free(w);
    free(targets);
    return st;
}

/* ------------------------------------------------------------------ steps in turns */

enum { MOST_SHAPES = 16 };

tril_status learner_time(struct op_context *ctx, const struct model_config *configs, int64_t count,
                         int64_t seq, int64_t batch, int64_t rounds, double *ms,
                         struct tril_error *err) {
    struct model *m[MOST_SHAPES] = {0};
    struct workspace *w[MOST_SHAPES] = {0};
    struct optimiser o[MOST_SHAPES] = {0};
    struct model_options mo = {.dtype = DT_F32, .training = true};
    int64_t n = batch * seq, targets;
    struct workspace_options wo = {.max_tokens = n, .max_sequences = batch, .backward = true};
    struct adamw_params adamw = {0.9f, 0.95f, 1e-8f, 0.1f};
    struct train_call call = {.scale = 1.0f / (float)n, .overwrite = true};
    int32_t *ids = malloc((size_t)(n + batch + 1) * sizeof *ids), *offsets = ids + n;
    double loss, norm;
    bool applied;
    tril_status st = TRIL_OK;
    if (!ids)
        return lab_no_memory(err);
    for (int64_t b = 0; b <= batch; b++)
        offsets[b] = (int32_t)(b * seq);
    for (int64_t i = 0; i < count; i++) {
        TRY(model_create(&m[i], &configs[i], &mo, ctx, err));
        TRY(model_init(m[i], 1, err));
        TRY(workspace_create(&w[i], m[i], &wo, err));
        TRY(optimiser_create(&o[i], m[i], &adamw, 1.0f, err));
        ms[i] = INFINITY;
    }
    for (int64_t round = -1; round < rounds; round++) /* -1 warms up */
        for (int64_t i = 0; i < count; i++) {
            for (int64_t k = 0; k < n; k++)
                ids[k] = (int32_t)(k * 31 % configs[i].vocab);
            struct batch b = {
                .tokens = n, .sequences = batch, .ids = ids, .targets = ids, .offsets = offsets};
            double begun = clock_seconds();
            TRY(model_forward_backward(m[i], w[i], &b, &call, &loss, &targets, err));
            TRY(optimiser_step(&o[i], round + 2, 1e-4, &norm, &applied, err));
            double took = (clock_seconds() - begun) * 1e3;
            if (round >= 0 && took < ms[i])
                ms[i] = took;
        }
done:
    for (int64_t i = 0; i < count; i++) {
        optimiser_free(&o[i]);
        workspace_free(w[i]);
        model_free(m[i]);
    }
    free(ids);
    return st;
}
