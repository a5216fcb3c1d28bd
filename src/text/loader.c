/* Windows of a split, in order or shuffled, as batches.
 *
 * The shuffle is a permutation computed, not stored: a Feistel network over the next even number of
 * bits, keyed by (seed, epoch), walked until it falls below W. So an epoch of any length needs no
 * memory and any position can be taken up again. */
#include "base/random.h"
#include "text/shard.h"
#include "text/stream.h"

#define ROUNDS 8
#define JITTER_LAYER 255

static uint64_t feistel(uint64_t x, unsigned half, const struct loader *l, uint64_t epoch) {
    uint64_t mask = ((uint64_t)1 << half) - 1, left = x >> half, right = x & mask;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        struct random_key key = {
            .seed = l->options.seed, .step = epoch, .layer = round, .op = RANDOM_SHUFFLE};
        uint32_t r[4];
        random_block(&key, right, r);
        uint64_t mixed = left ^ (((uint64_t)r[1] << 32 | r[0]) & mask);
        left = right;
        right = mixed;
    }
    return left << half | right;
}

/* Rows that a batch has over all ranks: the streams. */
static uint64_t all_rows(const struct loader *l) {
    return (uint64_t)l->options.batch * (uint64_t)(l->options.ranks > 1 ? l->options.ranks : 1);
}

/* The window that an epoch gives at `index`. */
static uint64_t window_at(const struct loader *l, uint64_t epoch, uint64_t index) {
    unsigned half = 1;
    if (l->options.order == LOADER_SEQUENTIAL)
        return index;
    while (half < 32 && (uint64_t)1 << 2 * half < l->windows)
        half++;
    uint64_t x = index;
    do
        x = feistel(x, half, l, epoch);
    while (x >= l->windows);
    return x;
}

/* Windows and jitter of the epoch that the position stands in. */
static void enter_epoch(struct loader *l) {
    uint64_t seq = (uint64_t)l->options.seq;
    l->jitter = 0;
    if (l->options.order == LOADER_SHUFFLED && l->position.epoch > 0) {
        struct random_key key = {.seed = l->options.seed,
                                 .step = l->position.epoch,
                                 .layer = JITTER_LAYER,
                                 .op = RANDOM_SHUFFLE};
        uint64_t room = l->tokens - seq; /* starts that leave a window */
        l->jitter = random_below(&key, 0, room < seq ? room : seq);
    }
    l->windows = (l->tokens - 1 - l->jitter) / seq;
    if (l->options.order == LOADER_STREAMS)
        l->windows = (l->tokens - 1) / all_rows(l) / seq * all_rows(l);
}

tril_status loader_open(struct loader *l, const struct dataset *d,
                        const struct loader_options *options, struct tril_error *err) {
    *l = (struct loader){.dataset = d, .options = *options};
    l->tokens = dataset_tokens(d, options->split);
    if (options->batch < 1 || options->seq < 1 || options->rank < 0 ||
        (options->ranks > 0 && options->rank >= options->ranks))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "batches of %d rows of %d tokens (rank %d of %d) cannot be cut",
                         options->batch, options->seq, options->rank, options->ranks);
    if (l->tokens < (uint64_t)options->seq + 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the %s text has %llu tokens, fewer than the %d that one row of %d needs: "
                         "give more text or a smaller --seq",
                         options->split == DATASET_TRAIN ? "training" : "validation",
                         (unsigned long long)l->tokens, options->seq + 1, options->seq);
    enter_epoch(l);
    if (options->order == LOADER_STREAMS && options->mask_documents)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "rows that continue from batch to batch and documents that are kept apart "
                         "exclude each other: choose another --order, or no --mask-documents");
    if (l->windows == 0)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the %s text has %llu tokens: too few for %llu streams of at least %d; "
                         "give more text, a smaller --batch or a smaller --seq",
                         options->split == DATASET_TRAIN ? "training" : "validation",
                         (unsigned long long)l->tokens, (unsigned long long)all_rows(l),
                         options->seq);
    return TRIL_OK;
}

tril_status loader_seek(struct loader *l, struct loader_position position, struct tril_error *err) {
    struct loader old = *l;
    l->position = position;
    enter_epoch(l);
    if (position.index <= l->windows)
        return TRIL_OK;
    tril_status st = error_set(err, TRIL_ERR_FORMAT,
                               "the saved position, window %llu of epoch %llu, lies beyond this "
                               "data's %llu windows: it is not the data of the checkpoint",
                               (unsigned long long)position.index,
                               (unsigned long long)position.epoch, (unsigned long long)l->windows);
    *l = old;
    return st;
}

uint64_t loader_epoch_windows(const struct loader *l) {
    return (l->tokens - 1) / (uint64_t)l->options.seq;
}

/* The start of the next row's window; moves on. */
static uint64_t next_window(struct loader *l) {
    if (l->position.index >= l->windows) {
        l->position.epoch++;
        l->position.index = 0;
        enter_epoch(l);
    }
    if (l->options.order == LOADER_STREAMS) {
        uint64_t i = l->position.index++, rows = all_rows(l);
        return i % rows * ((l->tokens - 1) / rows) + i / rows * (uint64_t)l->options.seq;
    }
    uint64_t w = window_at(l, l->position.epoch, l->position.index++);
    return l->jitter + w * (uint64_t)l->options.seq;
}

static void fill_row(const struct loader *l, struct loader_batch *b, uint64_t start, int64_t at) {
    const struct dataset *d = l->dataset;
    const enum dataset_split split = l->options.split;
    int seq = l->options.seq;
    int32_t eos = dataset_eos(d);
    bool mask = l->options.mask_documents;
    /* The last target lies one beyond: read through it, then shift. */
    dataset_read(d, split, start, 1, &b->inputs[at]);
    dataset_read(d, split, start + 1, (size_t)seq, &b->targets[at]);
    for (int t = 1; t < seq; t++)
        b->inputs[at + t] = b->targets[at + t - 1];
    uint64_t next = mask && eos < 0 ? dataset_document_after(d, split, start + 1) : UINT64_MAX;
    if (b->offsets)
        b->offsets[b->sequences++] = (int32_t)at;
    for (int t = 0, since = 0; t < seq; t++, since++) {
        bool begins = mask && t > 0 && eos >= 0 && b->inputs[at + t] == eos;
        if (start + (uint64_t)t == next && t > 0) {
            begins = true;
            next = dataset_document_after(d, split, next + 1);
        }
        if (begins) {
            since = 0;
            if (b->offsets)
                b->offsets[b->sequences++] = (int32_t)(at + t);
        }
        if (b->positions)
            b->positions[at + t] = since;
        if (start + (uint64_t)t + 1 == next) /* the first token of a document has no past */
            b->targets[at + t] = -1;
    }
}

void loader_next(struct loader *l, struct loader_batch *b) {
    int rows = l->options.batch, ranks = l->options.ranks > 1 ? l->options.ranks : 1;
    b->sequences = 0;
    b->begins = l->options.order == LOADER_STREAMS &&
                (l->position.index == 0 || l->position.index >= l->windows);
    for (int r = 0; r < ranks * rows; r++) {
        uint64_t start = next_window(l);
        if (ranks == 1 || r / rows == l->options.rank)
            fill_row(l, b, start, (int64_t)(r % rows) * l->options.seq);
    }
    if (b->offsets)
        b->offsets[b->sequences] = rows * l->options.seq;
    else
        b->sequences = rows;
}
