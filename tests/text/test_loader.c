/* Batches: sequential and shuffled order against their definitions, positions saved and restored,
 * ranks, and documents kept apart. */
#include <math.h>

#include "text/shard.h"
#include "text/text_support.h"

static struct tril_error err;
static struct tokenizer *with_eos, *without_eos;

/* A dataset of documents; `marker` as in dataset_options. */
static struct dataset *make_dataset(const char *name, const char *text, const struct tokenizer *t,
                                    const char *marker, double valid) {
    const char *path = text_write(name, text);
    const struct dataset_options o = {.paths = &path,
                                      .path_count = 1,
                                      .valid_fraction = valid,
                                      .tokenizer = t,
                                      .marker = marker,
                                      .cache_dir = test_path("cache"),
                                      .quiet = true};
    struct dataset *d;
    if (dataset_open(&d, &o, &err) != TRIL_OK)
        fail_msg("%s", err.message);
    return d;
}

static int setup(void **state) {
    (void)state;
    with_eos = golden_tokenizer("gpt2.json", NULL);
    without_eos = golden_tokenizer("ranks.tiktoken", "gpt2");
    return 0;
}

static int teardown(void **state) {
    (void)state;
    tokenizer_free(with_eos);
    tokenizer_free(without_eos);
    return 0;
}

static struct dataset *counting(size_t n, double valid) {
    char *text = calloc(1, n + 1);
    for (size_t i = 0; i < n; i++)
        text[i] = (char)('!' + i * 7 % 13);
    struct dataset *d = make_dataset("counting.txt", text, with_eos, NULL, valid);
    free(text);
    return d;
}

struct buffers {
    int32_t inputs[4096], targets[4096], positions[4096], offsets[4097];
};

static struct loader_batch batch_of(struct buffers *b) {
    return (struct loader_batch){.inputs = b->inputs,
                                 .targets = b->targets,
                                 .positions = b->positions,
                                 .offsets = b->offsets};
}

/* Row r of the batch is the window of the split that starts at token `start`. */
static void check_row(const struct dataset *d, enum dataset_split split,
                      const struct loader_batch *b, int r, int seq, uint64_t start) {
    int32_t want[512];
    dataset_read(d, split, start, (size_t)seq + 1, want);
    assert_memory_equal(b->inputs + r * seq, want, (size_t)seq * sizeof *want);
    assert_memory_equal(b->targets + r * seq, want + 1, (size_t)seq * sizeof *want);
}

static void sequential(void **state) {
    (void)state;
    struct dataset *d = counting(1000, 0.2);
    static struct buffers buffers;
    for (int split = 0; split < DATASET_SPLITS; split++)
        for (int seq = 1; seq < 60; seq += 19)
            for (int rows = 1; rows < 8; rows += 3) {
                const struct loader_options o = {.split = (enum dataset_split)split,
                                                 .batch = rows,
                                                 .seq = seq,
                                                 .order = LOADER_SEQUENTIAL};
                struct loader l;
                struct loader_batch b = batch_of(&buffers);
                assert_int_equal(loader_open(&l, d, &o, &err), TRIL_OK);
                uint64_t windows = (dataset_tokens(d, o.split) - 1) / (uint64_t)seq;
                assert_int_equal(loader_epoch_windows(&l), windows);
                for (uint64_t k = 0, row = 0; row < 3 * windows; k++) {
                    loader_next(&l, &b);
                    assert_int_equal(b.sequences, rows);
                    for (int r = 0; r < rows; r++, row++) {
                        check_row(d, o.split, &b, r, seq, row % windows * (uint64_t)seq);
                        assert_int_equal(b.offsets[r], r * seq);
                        for (int t = 0; t < seq; t++)
                            assert_int_equal(b.positions[r * seq + t], t);
                    }
                    assert_int_equal(b.offsets[rows], rows * seq);
                    assert_int_equal(l.position.epoch * windows + l.position.index, row);
                }
            }
    dataset_free(d);
}

/* The windows' places, told by the text: every 8 tokens of it are unlike any other 8. */
static struct dataset *distinct(size_t n) {
    char *text = calloc(1, n + 1);
    struct dice dice = dice_make(61);
    for (size_t i = 0; i < n; i++)
        text[i] = (char)('!' + dice_below(&dice, 14));
    struct dataset *d = make_dataset("distinct.txt", text, with_eos, NULL, 0);
    free(text);
    return d;
}

static uint64_t place_of(const int32_t *all, uint64_t n, const int32_t *row, int seq) {
    uint64_t found = UINT64_MAX;
    for (uint64_t i = 0; i + (uint64_t)seq < n; i++)
        if (memcmp(all + i, row, (size_t)seq * sizeof *row) == 0) {
            assert_true(found == UINT64_MAX);
            found = i;
        }
    assert_true(found != UINT64_MAX);
    return found;
}

/* Each epoch gives each window once; later epochs are shifted by less than a window; another order
 * each time, with another seed another one. */
static void shuffled(void **state) {
    (void)state;
    struct dataset *d = distinct(3000);
    const uint64_t n = dataset_tokens(d, DATASET_TRAIN);
    int32_t *all = malloc(n * sizeof *all);
    static struct buffers buffers;
    uint64_t orders[2][4][200];
    unsigned shifted = 0;
    dataset_read(d, DATASET_TRAIN, 0, n, all);
    for (uint64_t seed = 0; seed < 2; seed++) {
        const struct loader_options o = {
            .split = DATASET_TRAIN, .batch = 1, .seq = 16, .order = LOADER_SHUFFLED, .seed = seed};
        struct loader l;
        struct loader_batch b = batch_of(&buffers);
        assert_int_equal(loader_open(&l, d, &o, &err), TRIL_OK);
        for (uint64_t epoch = 0; epoch < 4; epoch++) {
            bool seen[4096] = {false};
            uint64_t first = UINT64_MAX, last = 0, windows = 0;
            do {
                loader_next(&l, &b);
                assert_int_equal(l.position.epoch, epoch);
                uint64_t at = place_of(all, n, b.inputs, 16);
                check_row(d, DATASET_TRAIN, &b, 0, 16, at);
                assert_false(seen[at]);
                seen[at] = true;
                orders[seed][epoch][windows++] = at;
                first = at < first ? at : first;
                last = at > last ? at : last;
            } while (l.position.index < l.windows);
            assert_true(first < 16 && (epoch > 0 || first == 0));
            assert_int_equal(windows, (n - 1 - first) / 16);
            assert_int_equal(last, first + 16 * (windows - 1)); /* they tile the split */
            shifted += first > 0;
        }
    }
    assert_true(shifted > 2);
    for (int e = 0; e < 3; e++) {
        assert_memory_not_equal(orders[0][e], orders[0][e + 1], 100 * sizeof orders[0][0][0]);
        assert_memory_not_equal(orders[0][e], orders[1][e], 100 * sizeof orders[0][0][0]);
    }
    /* It is a shuffle: on average a window moves by a third of the epoch. */
    double moved = 0;
    uint64_t windows = (n - 1) / 16;
    for (uint64_t i = 0; i < windows; i++)
        moved += fabs((double)(orders[0][0][i] / 16) - (double)i) / (double)windows;
    /* The mean of |i - j| / W over uniform i, j is 1/3 with a standard error of about
     * sqrt(1/18 / W); six of them. */
    assert_true(fabs(moved / (double)windows - 1.0 / 3) < 6 * sqrt(1.0 / 18 / (double)windows));
    free(all);
    dataset_free(d);
}

/* Each row reads its own part of the split, window after window, and begins it anew at the epoch's
 * end, all rows at once. */
static void streams(void **state) {
    (void)state;
    struct dataset *d = counting(1000, 0);
    const uint64_t n = dataset_tokens(d, DATASET_TRAIN);
    static struct buffers buffers;
    for (int rows = 1; rows < 8; rows += 3)
        for (int ranks = 1; ranks < 4; ranks += 2)
            for (int rank = 0; rank < ranks; rank++) {
                const struct loader_options o = {.split = DATASET_TRAIN,
                                                 .batch = rows,
                                                 .seq = 16,
                                                 .order = LOADER_STREAMS,
                                                 .rank = rank,
                                                 .ranks = ranks};
                struct loader l;
                struct loader_batch b = batch_of(&buffers);
                uint64_t part = (n - 1) / (uint64_t)(rows * ranks), windows = part / 16;
                if (loader_open(&l, d, &o, &err) != TRIL_OK)
                    fail_msg("%s", err.message);
                for (uint64_t k = 0; k < 2 * windows + 1; k++) {
                    loader_next(&l, &b);
                    assert_int_equal(b.begins, k % windows == 0);
                    for (int r = 0; r < rows; r++)
                        check_row(d, DATASET_TRAIN, &b, r, 16,
                                  (uint64_t)(rank * rows + r) * part + k % windows * 16);
                }
            }
    const struct loader_options thin = {
        .split = DATASET_TRAIN, .batch = 100, .seq = 16, .order = LOADER_STREAMS};
    struct loader_options apart = thin;
    apart.batch = 2;
    apart.mask_documents = true;
    struct loader l;
    assert_int_equal(loader_open(&l, d, &thin, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "streams"));
    assert_int_equal(loader_open(&l, d, &apart, &err), TRIL_ERR_ARGUMENT);
    dataset_free(d);
}

/* A loader taken up at a saved position gives what the first would have given. */
static void resumed(void **state) {
    (void)state;
    struct dataset *d = distinct(700);
    static struct buffers want[40], got;
    for (int order = 0; order < 3; order++)
        for (int rows = 1; rows < 6; rows += 2) {
            const struct loader_options o = {.split = DATASET_TRAIN,
                                             .batch = rows,
                                             .seq = 24,
                                             .order = (enum loader_order)order,
                                             .seed = 7};
            struct loader l, again;
            struct loader_position saved[40];
            assert_int_equal(loader_open(&l, d, &o, &err), TRIL_OK);
            for (int k = 0; k < 40; k++) {
                struct loader_batch b = batch_of(&want[k]);
                saved[k] = l.position;
                loader_next(&l, &b);
            }
            assert_true(saved[39].epoch >= 1);
            for (int k = 0; k < 40; k += 3) {
                assert_int_equal(loader_open(&again, d, &o, &err), TRIL_OK);
                assert_int_equal(loader_seek(&again, saved[k], &err), TRIL_OK);
                for (int i = k; i < 40; i++) {
                    struct loader_batch b = batch_of(&got);
                    loader_next(&again, &b);
                    size_t bytes = (size_t)rows * 24 * sizeof *b.inputs;
                    assert_memory_equal(got.inputs, want[i].inputs, bytes);
                    assert_memory_equal(got.targets, want[i].targets, bytes);
                }
            }
            /* A position that this data does not have leaves the loader where it was. */
            struct loader_position wild = {3, 1u << 20}, before = again.position;
            assert_int_equal(loader_seek(&again, wild, &err), TRIL_ERR_FORMAT);
            assert_non_null(strstr(err.message, "not the data of the checkpoint"));
            assert_memory_equal(&again.position, &before, sizeof before);
        }
    dataset_free(d);
}

/* Ranks share each batch's rows out. */
static void ranks(void **state) {
    (void)state;
    struct dataset *d = distinct(900);
    static struct buffers whole, part;
    for (int order = 0; order < 2; order++) {
        struct loader_options o = {
            .batch = 6, .seq = 20, .order = (enum loader_order)order, .seed = 3};
        struct loader one, three[3];
        assert_int_equal(loader_open(&one, d, &o, &err), TRIL_OK);
        o.batch = 2;
        o.ranks = 3;
        for (o.rank = 0; o.rank < 3; o.rank++)
            assert_int_equal(loader_open(&three[o.rank], d, &o, &err), TRIL_OK);
        for (int k = 0; k < 30; k++) {
            struct loader_batch b = batch_of(&whole);
            loader_next(&one, &b);
            for (int r = 0; r < 3; r++) {
                struct loader_batch p = batch_of(&part);
                loader_next(&three[r], &p);
                assert_memory_equal(p.inputs, b.inputs + r * 40, 40 * sizeof *p.inputs);
                assert_memory_equal(p.targets, b.targets + r * 40, 40 * sizeof *p.targets);
                assert_int_equal(three[r].position.index, one.position.index);
            }
        }
    }
    dataset_free(d);
}

/* Where documents begin, against the plain rule; buffers that are not asked for. */
static void check_documents(const struct dataset *d, const bool *begins, int64_t eos) {
    static struct buffers buffers;
    const struct loader_options o = {
        .batch = 2, .seq = 13, .order = LOADER_SEQUENTIAL, .mask_documents = true};
    struct loader l;
    unsigned apart = 0, untold = 0;
    assert_int_equal(loader_open(&l, d, &o, &err), TRIL_OK);
    for (uint64_t row = 0; row < 2 * loader_epoch_windows(&l);) {
        struct loader_batch b = batch_of(&buffers);
        loader_next(&l, &b);
        int sequences = 0;
        for (int r = 0; r < 2; r++, row++) {
            uint64_t start = row % loader_epoch_windows(&l) * 13;
            int32_t want[14];
            dataset_read(d, DATASET_TRAIN, start, 14, want);
            for (int t = 0, since = 0; t < 13; t++, since++) {
                int at = r * 13 + t;
                if (t == 0 || (eos >= 0 ? want[t] == eos : begins[start + (uint64_t)t])) {
                    assert_int_equal(b.offsets[sequences++], at);
                    apart += t > 0;
                    since = 0;
                }
                assert_int_equal(b.positions[at], since);
                assert_int_equal(b.inputs[at], want[t]);
                bool none = eos < 0 && begins[start + (uint64_t)t + 1];
                assert_int_equal(b.targets[at], none ? -1 : want[t + 1]);
                untold += none;
            }
        }
        assert_int_equal(b.sequences, sequences);
        assert_int_equal(b.offsets[sequences], 26);
        struct loader_batch bare = {.inputs = b.inputs, .targets = b.targets};
        struct loader copy = l;
        loader_next(&copy, &bare);
        assert_int_equal(bare.sequences, 2);
    }
    assert_true(apart > 10 && (eos >= 0 || untold > 10));
    dataset_free((struct dataset *)(uintptr_t)d);
}

static void documents(void **state) {
    (void)state;
    struct dice dice = dice_make(71);
    char text[8192], marked[8192];
    size_t n = 0, m = 0;
    for (int i = 0; i < 60; i++) {
        uint32_t size = 1 + dice_below(&dice, 25);
        for (uint32_t k = 0; k < size; k++)
            text[n++] = marked[m++] = (char)('!' + dice_below(&dice, 14));
        n += (size_t)sprintf(text + n, "<|endoftext|>");
        m += (size_t)sprintf(marked + m, "\n---\n");
    }
    struct dataset *d = make_dataset("eos.txt", text, with_eos, NULL, 0);
    check_documents(d, NULL, tokenizer_eos(with_eos));
    /* Without an end-of-text token the table of documents tells, and nothing is predicted across.
     */
    d = make_dataset("marked.txt", marked, without_eos, "---", 0);
    bool begins[8192] = {false};
    uint64_t at = 0;
    for (const char *p = marked; *p; p = strstr(p, "---\n") + 4) {
        uint32_t *ids;
        size_t count;
        begins[at] = true;
        assert_int_equal(tokenizer_encode(without_eos, p, (size_t)(strstr(p, "---\n") - p), false,
                                          &ids, &count, &err),
                         TRIL_OK);
        at += count;
        free(ids);
    }
    assert_int_equal(dataset_tokens(d, DATASET_TRAIN), at);
    check_documents(d, begins, -1);
}

static void refusals(void **state) {
    (void)state;
    struct dataset *d = distinct(100);
    struct loader l;
    uint64_t n = dataset_tokens(d, DATASET_TRAIN);
    struct loader_options o = {.batch = 1, .seq = (int)n - 1, .order = LOADER_SHUFFLED};
    static struct buffers buffers;
    struct loader_batch b = batch_of(&buffers);
    assert_int_equal(loader_open(&l, d, &o, &err), TRIL_OK); /* one window: again and again */
    for (int k = 0; k < 5; k++) {
        loader_next(&l, &b);
        check_row(d, DATASET_TRAIN, &b, 0, o.seq, 0);
    }
    o.seq++;
    assert_int_equal(loader_open(&l, d, &o, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "smaller --seq"));
    o.split = DATASET_VALID; /* which is empty */
    o.seq = 1;
    assert_int_equal(loader_open(&l, d, &o, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "validation"));
    const struct loader_options bad[] = {{.batch = 0, .seq = 1},
                                         {.batch = 1, .seq = 0},
                                         {.batch = -1, .seq = 1},
                                         {.batch = 1, .seq = 1, .rank = 2, .ranks = 2},
                                         {.batch = 1, .seq = 1, .rank = -1, .ranks = 2}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(loader_open(&l, d, &bad[i], &err), TRIL_ERR_ARGUMENT);
    dataset_free(d);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(sequential), cmocka_unit_test(shuffled),
                                       cmocka_unit_test(streams),    cmocka_unit_test(resumed),
                                       cmocka_unit_test(ranks),      cmocka_unit_test(documents),
                                       cmocka_unit_test(refusals)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
