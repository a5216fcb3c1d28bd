/* Token shards: texts tokenised once into memory-mapped files, and the loader that cuts batches.
 *
 *   files -> documents -> ids  => one shard file per text file, in the cache directory
 *   shards in order            => one token stream, divided into train and validation
 *   stream                     => windows of T+1 tokens => batches of B rows
 *
 * The stream. By default a file is encoded as Hugging Face `tokenizers` would encode the whole of
 * it (add_special_tokens=False): where its text contains the end-of-text token's string that token
 * stands in the stream, and begins a new document. Between files the end-of-text token is put (if
 * the tokenizer has one, and the file did not end with it), so that a single file's stream is
 * exactly its encoding. docs/tokenizer.md describes the shard file for other programs. */
#ifndef TEXT_SHARD_H
#define TEXT_SHARD_H

#include "text/tokenizer.h"

struct dataset_options {
    const char *const *paths; /* text files; a directory means its .txt files, sorted by name */
    size_t path_count;
    const char *valid_path; /* NULL, or a file or directory: then all of `paths` is for training */
    double valid_fraction; /* without valid_path: the last fraction of the tokens, from the document
                            * start nearest to it (unless that is off by more than half of the
                            * fraction); 0 for no validation split */
    const struct tokenizer *tokenizer; /* borrowed while the dataset lives */
    const char *marker;    /* NULL: the end-of-text string, wherever it stands; "": each file is one
                            * document, special strings are ordinary text; else a line that equals
                            * `marker` separates documents (the line is dropped, the end-of-text
                            * token put in its place, special strings are ordinary text) */
    const char *cache_dir; /* NULL: $TRIL_CACHE, else $XDG_CACHE_HOME/tril, else
                            * ~/.cache/tril, else .tril-cache */
    size_t group_bytes; /* small files that follow each other share a shard of up to so many bytes
                         * of text; 0: 64 MB */
    bool quiet;         /* no progress, no notes on stderr */
};

enum dataset_split { DATASET_TRAIN, DATASET_VALID, DATASET_SPLITS };

struct dataset;

/* Tokenises what the cache does not hold yet (in parallel), maps the shards, divides them. A text
 * is recognised by path, size and time of change, else by its content. Refused: missing, unreadable
 * or empty inputs; damaged shards are made anew. */
tril_status dataset_open(struct dataset **out, const struct dataset_options *options,
                         struct tril_error *err);
void dataset_free(struct dataset *d); /* NULL is fine */

/* Tokens, documents that begin in a split, and bytes of text they stand for (of the train and valid
 * splits of one text the bytes are exact; they are what bits-per-byte divides by). */
uint64_t dataset_tokens(const struct dataset *d, enum dataset_split split);
uint64_t dataset_documents(const struct dataset *d, enum dataset_split split);
uint64_t dataset_bytes(const struct dataset *d, enum dataset_split split);
/* A hash of all tokens' origins (tokenizer, contents, marker, split): a resumed run checks it. */
uint64_t dataset_hash(const struct dataset *d);
/* Tokens [start, start + n) of a split as int32; start + n <= dataset_tokens. */
void dataset_read(const struct dataset *d, enum dataset_split split, uint64_t start, size_t n,
                  int32_t *out);

enum loader_order {
    LOADER_SHUFFLED,   /* each epoch visits every window once, in an order drawn from (seed, epoch);
                        * the  windows of epoch e > 0 start 0 to T-1 tokens later, drawn likewise */
    LOADER_SEQUENTIAL, /* window after window; no randomness */
    LOADER_STREAMS /* every row of the batch reads a part of the text of its own, from its beginning
                    * to its end: a row goes on where it stopped in the batch before */
};

/* Windows. A split of n tokens x has W = floor((n - 1 - j) / T) windows (j: the epoch's jitter, 0
 * in sequential order); window w has inputs x[j + wT .. j + wT + T - 1] and targets one later. Rows
 * are numbered 0, 1, 2, ... over batches: row b of batch k is row kB + b. Sequential: row r is
 * window r mod W, epoch r / W. Shuffled: each epoch deals its W windows out; then the next epoch
 * begins, in the middle of a batch if need be. Streams: the split is cut into R = B * ranks parts
 * of floor((n - 1) / R) tokens, and an epoch ends for all rows at once, when less than T tokens are
 * left of each; row b of an epoch's batch k is x[b part + kT ..]. Batches are never short. */
struct loader_options {
    enum dataset_split split;
    int batch; /* rows B */
    int seq;   /* T */
    enum loader_order order;
    uint64_t seed;
    bool mask_documents;
    int rank, ranks; /* this loader gives rows rank*B .. rank*B+B-1 of global batches of ranks*B
                      * rows; 0, 0 means alone */
};

/* Where the loader stands: everything that a checkpoint must keep. Before the first batch: {0, 0}.
 */
struct loader_position {
    uint64_t epoch;
    uint64_t index; /* windows of this epoch already given */
};

struct loader {
    const struct dataset *dataset;
    struct loader_options options;
    struct loader_position position; /* read it, set it with loader_seek */
    uint64_t windows;                /* W of the epoch `position` stands in */
    uint64_t jitter;
    uint64_t tokens;
};

/* One batch, in the caller's buffers. */
struct loader_batch {
    int32_t *inputs;  /* [B*T] */
    int32_t *targets; /* [B*T]; -1: no target (only with mask_documents and no end-of-text token, at
                       * the last token of a document) */
    int32_t *positions; /* [B*T] or NULL: position within the row, or within the document */
    int32_t *offsets;   /* [B*T + 1] or NULL: sequences in the flattened batch: sequence s is tokens
                         * offsets[s] .. offsets[s+1]-1; offsets[0] = 0, offsets[sequences] = B*T */
    int sequences;      /* out (with offsets): B, or more with mask_documents */
    bool begins; /* out: streams: the rows begin their parts (anew): what was carried over from
                  * earlier batches ends here */
};

/* Prepares *l; refuses a split with fewer than T + 1 tokens. The loader owns no memory. */
tril_status loader_open(struct loader *l, const struct dataset *d,
                        const struct loader_options *options, struct tril_error *err);
/* Fills a batch and moves on. With mask_documents a new sequence begins at each end-of-text token
 * (which so opens the document after it) or, in tokenizers without one, at each document's start.
 */
void loader_next(struct loader *l, struct loader_batch *batch);
/* Goes to a saved position; refuses one that this split and order cannot have. */
tril_status loader_seek(struct loader *l, struct loader_position position, struct tril_error *err);
/* Windows (rows) that one epoch without jitter has. */
uint64_t loader_epoch_windows(const struct loader *l);

#endif
