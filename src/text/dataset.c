/* A dataset: shards mapped one after another as one stream, divided into two splits.
 *
 * Big files have a shard each; small ones that follow each other share one, so that a directory of
 * a hundred thousand texts is a few shards. A shard's name in the cache tells its sources' paths,
 * the tokenizer and the marker; its header tells what they were like. */
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/progress.h"
#include "text/files.h"
#include "text/shard.h"
#include "text/shard_make.h"
#include "text/stream.h"
#include "text/tokenizer_impl.h"

#define GROUP_BYTES ((size_t)64 << 20) /* of small files in one shard */

/* A segment of the stream: a shard, and perhaps an end-of-text token behind it. */
struct segment {
    struct shard shard;
    uint64_t start;    /* of its first token in the stream */
    uint64_t byte;     /* decoded bytes before it */
    uint64_t document; /* documents before it */
    bool eos_behind;
};

/* Consecutive shards. Validation may have a stream of its own. */
struct stream {
    struct segment *segments;
    size_t count;
    uint64_t tokens, bytes, documents;
    uint32_t eos;
    uint64_t hash;
};

struct dataset {
    struct stream streams[DATASET_SPLITS];
    const struct stream *of[DATASET_SPLITS]; /* both the first one, unless validation has its own */
    uint64_t begin[DATASET_SPLITS], end[DATASET_SPLITS];
    uint16_t *token_sizes;
    const struct tokenizer *tokenizer;
    bool has_eos;
    uint64_t hash;
};

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for a dataset");
}

/* The cache directory, malloc'ed. */
static tril_status cache_dir(const struct dataset_options *o, char **out, struct tril_error *err) {
    const char *named = o->cache_dir ? o->cache_dir : getenv("TRIL_CACHE");
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    int n;
    if (named && *named)
        n = asprintf(out, "%s", named);
    else if (xdg && *xdg)
        n = asprintf(out, "%s/tril", xdg);
    else if (home && *home)
        n = asprintf(out, "%s/.cache/tril", home);
    else
        n = asprintf(out, ".tril-cache");
    if (n < 0) {
        *out = NULL;
        return no_memory(err);
    }
    return TRIL_OK;
}

/* DIR/book.txt-0123456789abcdef.shard */
static char *shard_path(const char *dir, const struct shard_source *s) {
    uint64_t h = tokenizer_hash(s->tokenizer) ^ SHARD_VERSION, marker = shard_marker(s);
    char *path;
    for (size_t i = 0; i < s->count; i++) {
        char *real = realpath(s->paths[i], NULL);
        const char *name = real ? real : s->paths[i];
        h = hash_bytes(name, strlen(name) + 1, h);
        free(real);
    }
    h = hash_bytes(&marker, sizeof marker, h);
    const char *slash = strrchr(s->paths[0], '/'), *name = slash ? slash + 1 : s->paths[0];
    return asprintf(&path, "%s/%.60s-%016" PRIx64 ".shard", dir, name, h) < 0 ? NULL : path;
}

/* Whether the mapped shard is what the sources give now. */
static tril_status is_current(const struct shard *shard, const struct shard_source *s,
                              bool *current, struct tril_error *err) {
    const struct shard_header *h = &shard->header;
    uint64_t stamp, content;
    *current = false;
    if (h->tokenizer_hash != tokenizer_hash(s->tokenizer) || h->marker_hash != shard_marker(s) ||
        h->vocab_size != tokenizer_vocab_size(s->tokenizer))
        return TRIL_OK;
    tril_status st = shard_stamp(s, &stamp, err);
    if (st == TRIL_OK && stamp != h->stamp) {
        st = shard_content(s, &content, err);
        *current = st == TRIL_OK && content == h->content_hash;
    } else {
        *current = st == TRIL_OK;
    }
    return st;
}

/* Opens the sources' shard, made first where the cache has none that is good. */
static tril_status open_shard(struct shard *shard, const struct shard_source *s, const char *dir,
                              bool quiet, struct progress *progress, int64_t *done,
                              struct tril_error *err) {
    tril_status st;
    char *path = shard_path(dir, s);
    if (!path)
        return no_memory(err);
    if (path_exists(path)) {
        struct tril_error why;
        bool current;
        st = shard_open(shard, path, &why);
        if (st == TRIL_OK) {
            TRY(is_current(shard, s, &current, err));
            if (current)
                goto done;
            shard_close(shard);
        } else if (st == TRIL_ERR_MEMORY) {
            if (err)
                *err = why;
            goto done;
        } else if (!quiet) {
            fprintf(stderr, "tril: %s; it is made anew\n", why.message);
        }
    }
    TRY(dir_make(dir, err));
    TRY(shard_make(s, path, progress, done, err));
    TRY(shard_open(shard, path, err));
done:
    free(path);
    return st;
}

static void stream_close(struct stream *s) {
    for (size_t i = 0; i < s->count; i++)
        shard_close(&s->segments[i].shard);
    free(s->segments);
    memset(s, 0, sizeof *s);
}

/* How many of the files from `first` on share a shard of up to `most` bytes of text. */
static tril_status group_size(const struct text_files *files, size_t first, size_t most,
                              size_t *count, struct tril_error *err) {
    size_t bytes = 0;
    *count = 0;
    while (first + *count < files->count) {
        struct file_map map;
        tril_status st = file_map_open(&map, files->paths[first + *count], err);
        if (st != TRIL_OK)
            return st;
        size_t size = map.size;
        file_map_close(&map);
        if (*count && bytes + size > most)
            break;
        bytes += size;
        ++*count;
    }
    return TRIL_OK;
}

static int64_t total_bytes(const struct text_files *files) {
    int64_t bytes = 0;
    for (size_t i = 0; i < files->count; i++) {
        struct file_map map;
        if (file_map_open(&map, files->paths[i], NULL) == TRIL_OK) {
            bytes += (int64_t)map.size;
            file_map_close(&map);
        }
    }
    return bytes;
}

/* Shards of all files, in order. */
static tril_status stream_open(struct stream *s, const char *const *paths, size_t path_count,
                               const struct dataset_options *o, const char *dir,
                               struct tril_error *err) {
    struct text_files files;
    struct progress progress = {0};
    int64_t done = 0, eos = tokenizer_eos(o->tokenizer);
    tril_status st;
    memset(s, 0, sizeof *s);
    s->eos = (uint32_t)eos;
    TRY(text_files_expand(&files, paths, path_count, err));
    if (!o->quiet)
        progress_start(&progress, "tokenising", total_bytes(&files));
    for (size_t first = 0, n; first < files.count; first += n) {
        TRY(group_size(&files, first, o->group_bytes ? o->group_bytes : GROUP_BYTES, &n, err));
        struct shard_source source = {.paths = (const char *const *)files.paths + first,
                                      .count = n,
                                      .tokenizer = o->tokenizer,
                                      .marker = o->marker};
        struct segment *segments = realloc(s->segments, (s->count + 1) * sizeof *segments);
        if (!segments) {
            st = no_memory(err);
            goto done;
        }
        s->segments = segments;
        struct segment *segment = &segments[s->count];
        TRY(open_shard(&segment->shard, &source, dir, o->quiet, o->quiet ? NULL : &progress, &done,
                       err));
        const struct shard_header *h = &segment->shard.header;
        if (h->token_count == 0) {
            shard_close(&segment->shard);
            continue;
        }
        if (s->count) {
            struct segment *last = segment - 1;
            const struct shard *before = &last->shard;
            last->eos_behind =
                eos >= 0 && shard_token(before, before->header.token_count - 1) != eos;
            s->tokens += last->eos_behind;
        }
        segment->start = s->tokens;
        segment->byte = s->bytes;
        segment->document = s->documents;
        segment->eos_behind = false;
        s->tokens += h->token_count;
        s->bytes += h->text_bytes;
        s->documents += h->document_count;
        uint64_t what[4] = {h->content_hash, h->tokenizer_hash, h->marker_hash, h->token_count};
        s->hash = hash_bytes(what, sizeof what, s->hash);
        s->count++;
    }
    if (s->tokens == 0)
        st = error_set(err, TRIL_ERR_FORMAT, "%s%s: there is no text in it", paths[0],
                       path_count > 1 ? " and the other files" : "");
done:
    if (progress.what)
        progress_end(&progress);
    text_files_free(&files);
    if (st != TRIL_OK)
        stream_close(s);
    return st;
}

/* The segment that holds token i. */
static const struct segment *segment_of(const struct stream *s, uint64_t i) {
    size_t low = 0, high = s->count;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (s->segments[middle].start <= i)
            low = middle;
        else
            high = middle;
    }
    return &s->segments[low];
}

/* The last document of a shard that begins at or before its token i. */
static uint64_t document_of(const struct shard *shard, uint64_t i) {
    uint64_t low = 0, high = shard->header.document_count;
    while (high - low > 1) {
        uint64_t middle = (low + high) / 2;
        if (shard->documents[middle].token <= i)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The start of the document nearest to token i. */
static uint64_t nearest_document(const struct stream *s, uint64_t i) {
    const struct segment *g = segment_of(s, i);
    uint64_t best = g->start;
    const struct shard *shard = &g->shard;
    uint64_t d = document_of(shard, i - g->start);
    best = g->start + shard->documents[d].token;
    uint64_t next = d + 1 < shard->header.document_count ? g->start + shard->documents[d + 1].token
                    : g + 1 < s->segments + s->count     ? g[1].start
                                                         : best;
    return next > i && next - i < i - best ? next : best;
}

/* Documents that begin before token i of the stream. */
static uint64_t documents_before(const struct stream *s, uint64_t i) {
    if (i >= s->tokens)
        return s->documents;
    const struct segment *g = segment_of(s, i);
    uint64_t at = i - g->start;
    if (at >= g->shard.header.token_count)
        return g->document + g->shard.header.document_count;
    uint64_t d = document_of(&g->shard, at);
    return g->document + d + (g->shard.documents[d].token < at);
}

/* Decoded bytes before token i. */
static uint64_t bytes_before(const struct dataset *d, const struct stream *s, uint64_t i) {
    if (i >= s->tokens)
        return s->bytes;
    const struct segment *g = segment_of(s, i);
    uint64_t at = i - g->start;
    if (at >= g->shard.header.token_count)
        return g->byte + g->shard.header.text_bytes;
    const struct shard_document *document = &g->shard.documents[document_of(&g->shard, at)];
    uint64_t bytes = g->byte + document->byte;
    for (uint64_t k = document->token; k < at; k++)
        bytes += d->token_sizes[shard_token(&g->shard, k)];
    return bytes;
}

static void divide(struct dataset *d, double fraction) {
    const struct stream *s = d->of[DATASET_TRAIN];
    uint64_t n = s->tokens, cut = n - (uint64_t)((double)n * fraction);
    if (fraction > 0 && cut < n) {
        uint64_t at = nearest_document(s, cut), off = at > cut ? at - cut : cut - at;
        if (at > 0 && at < n && (double)off <= 0.5 * fraction * (double)n)
            cut = at;
    }
    d->begin[DATASET_TRAIN] = 0;
    d->end[DATASET_TRAIN] = cut;
    d->begin[DATASET_VALID] = cut;
    d->end[DATASET_VALID] = n;
}

tril_status dataset_open(struct dataset **out, const struct dataset_options *o,
                         struct tril_error *err) {
    tril_status st = TRIL_OK;
    char *dir = NULL;
    uint32_t vocab = tokenizer_vocab_size(o->tokenizer);
    struct dataset *d = *out = calloc(1, sizeof *d);
    if (!d || !(d->token_sizes = calloc(vocab, sizeof *d->token_sizes))) {
        st = no_memory(err);
        goto done;
    }
    if (!(o->valid_fraction >= 0 && o->valid_fraction < 1)) {
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "the fraction for validation is %g; it must be at least 0 and below 1",
                       o->valid_fraction);
        goto done;
    }
    d->tokenizer = o->tokenizer;
    d->has_eos = tokenizer_eos(o->tokenizer) >= 0;
    for (uint32_t i = 0; i < vocab; i++) {
        size_t size;
        tokenizer_token_bytes(o->tokenizer, i, &size);
        d->token_sizes[i] = (uint16_t)(tokenizer_is_special(o->tokenizer, i) ? 0
                                       : size > 65535                        ? 65535
                                                                             : size);
    }
    TRY(cache_dir(o, &dir, err));
    TRY(stream_open(&d->streams[DATASET_TRAIN], o->paths, o->path_count, o, dir, err));
    d->of[DATASET_TRAIN] = d->of[DATASET_VALID] = &d->streams[DATASET_TRAIN];
    if (o->valid_path) {
        TRY(stream_open(&d->streams[DATASET_VALID], &o->valid_path, 1, o, dir, err));
        d->of[DATASET_VALID] = &d->streams[DATASET_VALID];
        for (int i = 0; i < DATASET_SPLITS; i++)
            d->end[i] = d->of[i]->tokens;
    } else {
        divide(d, o->valid_fraction);
    }
    uint64_t what[] = {d->of[0]->hash, d->of[1]->hash, d->end[DATASET_TRAIN]};
    d->hash = hash_bytes(what, sizeof what, 31);
done:
    free(dir);
    if (st != TRIL_OK) {
        dataset_free(d);
        *out = NULL;
    }
    return st;
}

void dataset_free(struct dataset *d) {
    if (!d)
        return;
    for (int i = 0; i < DATASET_SPLITS; i++)
        stream_close(&d->streams[i]);
    free(d->token_sizes);
    free(d);
}

uint64_t dataset_tokens(const struct dataset *d, enum dataset_split split) {
    return d->end[split] - d->begin[split];
}

uint64_t dataset_documents(const struct dataset *d, enum dataset_split split) {
    const struct stream *s = d->of[split];
    return documents_before(s, d->end[split]) - documents_before(s, d->begin[split]);
}

uint64_t dataset_bytes(const struct dataset *d, enum dataset_split split) {
    const struct stream *s = d->of[split];
    return bytes_before(d, s, d->end[split]) - bytes_before(d, s, d->begin[split]);
}

uint64_t dataset_hash(const struct dataset *d) {
    return d->hash;
}

void dataset_read(const struct dataset *d, enum dataset_split split, uint64_t start, size_t n,
                  int32_t *out) {
    const struct stream *s = d->of[split];
    uint64_t at = d->begin[split] + start;
    for (const struct segment *g = segment_of(s, at); n; g++) {
        const struct shard *shard = &g->shard;
        uint64_t i = at - g->start, count = shard->header.token_count;
        for (; n && i < count; i++, n--, at++)
            *out++ = (int32_t)shard_token(shard, i);
        if (n && g->eos_behind) {
            *out++ = (int32_t)s->eos;
            n--;
            at++;
        }
    }
}

int32_t dataset_eos(const struct dataset *d) {
    return d->has_eos ? (int32_t)d->streams[DATASET_TRAIN].eos : -1;
}

uint64_t dataset_document_after(const struct dataset *d, enum dataset_split split, uint64_t from) {
    const struct stream *s = d->of[split];
    uint64_t at = d->begin[split] + from;
    if (at >= s->tokens)
        return UINT64_MAX;
    for (const struct segment *g = segment_of(s, at); g < s->segments + s->count; g++) {
        const struct shard *shard = &g->shard;
        if (at <= g->start)
            return g->start - d->begin[split];
        uint64_t i = at - g->start, k = document_of(shard, i);
        k += shard->documents[k].token < i;
        if (k < shard->header.document_count)
            return g->start + shard->documents[k].token - d->begin[split];
    }
    return UINT64_MAX;
}
