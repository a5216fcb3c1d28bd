/* Windows of a data set in order or shuffled; stateless but for (epoch, index). */
#include <string.h>

#include "base/random.h"
#include "text/dataset_impl.h"

/* A permutation of 0 .. n-1 without memory: four Feistel rounds on just enough bits, keyed by seed
 * and epoch; results beyond n walk on (Black and Rogaway 2002). */
static uint64_t permute(uint64_t i, uint64_t n, uint64_t seed, uint64_t epoch) {
    struct random_key key = {.seed = seed, .step = epoch, .op = RANDOM_SHUFFLE};
    unsigned half = 1;
    while (half < 32 && (uint64_t)1 << (2 * half) < n)
        half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t next = left ^ (random_u32(&key, round << 33 | right) & mask);
            left = right;
            right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

/* Sets what follows from the epoch: jitter and the number of windows. */
static void enter_epoch(struct loader *l) {
    uint64_t T = (uint64_t)l->options.seq, epoch = l->position.epoch;
    l->jitter = 0;
    if (epoch > 0 && l->options.order == LOADER_SHUFFLED) {
        struct random_key key = {
            .seed = l->options.seed, .step = epoch, .layer = 1, .op = RANDOM_SHUFFLE};
        uint64_t room = l->tokens - 1 - T; /* one window must fit */
        l->jitter = random_below(&key, 0, (room < T - 1 ? room : T - 1) + 1);
    }
    l->windows = (l->tokens - 1 - l->jitter) / T;
}

tril_status loader_open(struct loader *l, const struct dataset *d,
                        const struct loader_options *options, struct tril_error *err) {
    *l = (struct loader){.dataset = d, .options = *options};
    l->tokens = dataset_tokens(d, options->split);
    if (l->options.ranks < 1)
        l->options.ranks = 1;
    if (options->batch < 1 || options->seq < 1 || options->rank < 0 ||
        options->rank >= l->options.ranks)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a batch has at least one row of at least one token");
    if (l->tokens < (uint64_t)options->seq + 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "the %s text has %llu tokens: too few for one row of %d and the token "
                         "after it; give more text or a smaller --seq",
                         options->split == DATASET_TRAIN ? "training" : "validation",
                         (unsigned long long)l->tokens, options->seq);
    enter_epoch(l);
    return TRIL_OK;
}

/* Sequences within one row: where a document begins, positions start anew. Tokens of `row` stand at
 * `at` in the split; first is the row's place in the batch. */
static void mask_row(const struct loader *l, struct loader_batch *b, int64_t first, uint64_t at) {
    int64_t eos = dataset_eos(l->dataset);
    int T = l->options.seq;
    int32_t position = 0;
    for (int i = 0; i < T; i++) {
        bool begins = i > 0 && (eos >= 0 ? b->inputs[first + i] == eos
                                         : dataset_document_begins(l->dataset, l->options.split,
                                                                   at + (uint64_t)i));
        if (begins || i == 0) {
            if (b->offsets)
                b->offsets[b->sequences] = (int32_t)(first + i);
            b->sequences++;
            position = 0;
        }
        if (b->positions)
            b->positions[first + i] = position++;
        if (eos < 0 && dataset_document_begins(l->dataset, l->options.split, at + (uint64_t)i + 1))
            b->targets[first + i] = -1;
    }
}

static void fill_row(const struct loader *l, struct loader_batch *b, int row) {
    int T = l->options.seq;
    int64_t first = (int64_t)row * T;
    uint64_t window = l->position.index;
    if (l->options.order == LOADER_SHUFFLED)
        window = permute(window, l->windows, l->options.seed, l->position.epoch);
    uint64_t at = l->jitter + window * (uint64_t)T;
    int32_t last;
    dataset_read(l->dataset, l->options.split, at, (size_t)T, b->inputs + first);
    dataset_read(l->dataset, l->options.split, at + (uint64_t)T, 1, &last);
    memcpy(b->targets + first, b->inputs + first + 1, (size_t)(T - 1) * sizeof *b->targets);
    b->targets[first + T - 1] = last;
    if (l->options.mask_documents) {
        mask_row(l, b, first, at);
        return;
    }
    if (b->offsets)
        b->offsets[row] = (int32_t)first;
    for (int i = 0; b->positions && i < T; i++)
        b->positions[first + i] = i;
    b->sequences++;
}

void loader_next(struct loader *l, struct loader_batch *b) {
    int B = l->options.batch, mine = l->options.rank * B;
    b->sequences = 0;
    for (int row = 0; row < B * l->options.ranks; row++) {
        if (row >= mine && row < mine + B)
            fill_row(l, b, row - mine);
        if (++l->position.index == l->windows) {
            l->position = (struct loader_position){l->position.epoch + 1, 0};
            enter_epoch(l);
        }
    }
    if (b->offsets)
        b->offsets[b->sequences] = (int32_t)((int64_t)B * l->options.seq);
}

tril_status loader_seek(struct loader *l, struct loader_position position, struct tril_error *err) {
    struct loader_position before = l->position;
    l->position = position;
    enter_epoch(l);
    if (position.index < l->windows)
        return TRIL_OK;
    l->position = before;
    enter_epoch(l);
    return error_set(err, TRIL_ERR_ARGUMENT,
                     "a position of window %llu in epoch %llu does not fit this data",
                     (unsigned long long)position.index, (unsigned long long)position.epoch);
}

uint64_t loader_epoch_windows(const struct loader *l) {
    return (l->tokens - 1) / (uint64_t)l->options.seq;
}
