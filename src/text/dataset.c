/* A data set: shards found in the cache or made, one stream of tokens over them, divided in two.
 *
 * The cache holds shards by content ("<hash of content, tokenizer, marker>.shard") and small notes
 * by path, size and time ("<hash of those>.note", naming the content's hash), so that a text that
 * has not been touched is not even read. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "text/dataset_impl.h"
#include "text/files.h"
#include "text/shard_file.h"
#include "text/tokenizer_impl.h"

struct piece {
    struct shard shard;
    uint64_t start;  /* in the stream */
    uint64_t tokens; /* with the end-of-text token put behind it, if one is */
};

struct dataset {
    const struct tokenizer *tokenizer;
    struct piece *pieces;
    size_t count;
    uint64_t *documents; /* where each begins in the stream */
    uint64_t document_count;
    uint64_t begin[DATASET_SPLITS], end[DATASET_SPLITS]; /* of the splits in the stream */
    uint64_t hash;
};

static tril_status no_memory(struct tril_error *err) {
    return error_set(err, TRIL_ERR_MEMORY, "not enough memory for the training data");
}

/* ------------------------------------------------------------------ the cache */

static tril_status cache_dir(const char *given, char **dir, struct tril_error *err) {
    const char *own = getenv("TRIL_CACHE"), *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (given && *given)
        *dir = strdup(given);
    else if (own && *own)
        *dir = strdup(own);
    else if (xdg && *xdg)
        *dir = path_join(xdg, "tril");
    else if (home && *home)
        *dir = path_join(home, ".cache/tril");
    else
        *dir = strdup(".tril-cache");
    return *dir ? dir_make(*dir, err) : no_memory(err);
}

static char *cache_path(const char *dir, uint64_t hash, const char *ending) {
    char name[40];
    snprintf(name, sizeof name, "%016" PRIx64 ".%s", hash, ending);
    return path_join(dir, name);
}

/* Reads the content's hash from a note. */
static bool read_note(const char *path, uint64_t *content) {
    struct tril_error ignored;
    char *text = NULL, *end;
    size_t size;
    if (!path_exists(path) || file_read(path, 64, &text, &size, &ignored) != TRIL_OK)
        return false;
    *content = strtoull(text, &end, 16);
    bool good = end == text + 16;
    free(text);
    return good;
}

/* Opens the shard if it is there, whole, and of this tokenizer. */
static bool try_shard(struct shard *s, const char *path, const struct dataset_options *o,
                      uint64_t content, uint64_t text_bytes) {
    struct tril_error ignored;
    if (!path_exists(path) || shard_open(s, path, true, &ignored) != TRIL_OK)
        return false;
    const struct shard_header *h = s->header;
    if (h->content_hash == content && h->text_bytes == text_bytes &&
        h->tokenizer_hash == tokenizer_hash(o->tokenizer) &&
        h->marker_hash == shard_marker_hash(o->marker))
        return true;
    shard_close(s);
    return false;
}

/* The shard of one text: from the cache, or made. */
static tril_status open_shard(struct shard *s, const char *path, const struct dataset_options *o,
                              const char *dir, struct tril_error *err) {
    struct file_map text = {0};
    char *note = NULL, *file = NULL, *real = realpath(path, NULL), line[24];
    uint64_t own[3] = {tokenizer_hash(o->tokenizer), shard_marker_hash(o->marker), 0}, content;
    tril_status st = TRIL_OK;
    TRY(file_map_open(&text, path, err));
    if (text.size == 0) {
        st = error_set(err, TRIL_ERR_FORMAT, "%s: this text is empty", path);
        goto done;
    }
    uint64_t stamp[2] = {text.size, (uint64_t)text.mtime_ns};
    const char *name = real ? real : path;
    uint64_t key = hash_bytes(own, sizeof own,
                              hash_bytes(stamp, sizeof stamp, hash_bytes(name, strlen(name), 4)));
    note = cache_path(dir, key, "note");
    if (!note) {
        st = no_memory(err);
        goto done;
    }
    bool known = read_note(note, &content);
    for (int attempt = known ? 0 : 1; attempt < 2; attempt++) {
        if (attempt == 1)
            content = hash_bytes(text.data, text.size, 5);
        own[2] = content;
        free(file);
        file = cache_path(dir, hash_bytes(own, sizeof own, 6), "shard");
        if (!file) {
            st = no_memory(err);
            goto done;
        }
        if (try_shard(s, file, o, content, text.size)) {
            if (attempt == 0)
                goto done;
            break;
        }
    }
    if (!s->header) {
        TRY(shard_write(file, &text, path, o->tokenizer, o->marker, content, o->quiet, err));
        TRY(shard_open(s, file, true, err));
    }
    snprintf(line, sizeof line, "%016" PRIx64 "\n", content);
    TRY(file_write_atomic(note, line, strlen(line), err));
done:
    file_map_close(&text);
    free(real);
    free(note);
    free(file);
    return st;
}

/* ------------------------------------------------------------------ the stream */

/* Appends the shards of a list of texts to the stream. */
static tril_status add_texts(struct dataset *d, const struct dataset_options *o,
                             const char *const *paths, size_t count, const char *dir,
                             struct tril_error *err) {
    struct text_files files = {0};
    int64_t eos = tokenizer_eos(o->tokenizer);
    tril_status st = TRIL_OK;
    TRY(text_files_expand(&files, paths, count, err));
    struct piece *grown = realloc(d->pieces, (d->count + files.count + 1) * sizeof *grown);
    if (!grown) {
        st = no_memory(err);
        goto done;
    }
    d->pieces = grown;
    for (size_t i = 0; i < files.count; i++) {
        struct piece *p = &d->pieces[d->count];
        const struct piece *last = d->count ? p - 1 : NULL;
        *p = (struct piece){.start = last ? last->start + last->tokens : 0};
        TRY(open_shard(&p->shard, files.paths[i], o, dir, err));
        d->count++;
        p->tokens = p->shard.header->tokens;
        int32_t final = -1;
        if (p->tokens)
            shard_read(&p->shard, p->tokens - 1, 1, &final);
        if (eos >= 0 && final != eos && i + 1 < files.count)
            p->tokens++;
    }
done:
    text_files_free(&files);
    return st;
}

static uint64_t stream_tokens(const struct dataset *d) {
    return d->count ? d->pieces[d->count - 1].start + d->pieces[d->count - 1].tokens : 0;
}

static tril_status list_documents(struct dataset *d, struct tril_error *err) {
    uint64_t n = 0;
    for (size_t i = 0; i < d->count; i++)
        n += d->pieces[i].shard.header->documents;
    d->documents = malloc((n + 1) * sizeof *d->documents);
    if (!d->documents)
        return no_memory(err);
    for (size_t i = 0; i < d->count; i++)
        for (uint64_t k = 0; k < d->pieces[i].shard.header->documents; k++)
            d->documents[d->document_count++] =
                d->pieces[i].start + d->pieces[i].shard.documents[k];
    return TRIL_OK;
}

/* Where validation begins: at a document where there are enough of them, else at a token. */
static uint64_t split_at(const struct dataset *d, double fraction) {
    uint64_t n = stream_tokens(d);
    if (fraction <= 0)
        return n;
    if (d->document_count >= 20) {
        uint64_t documents = (uint64_t)((double)d->document_count * fraction);
        return d->documents[d->document_count - (documents ? documents : 1)];
    }
    return n - (uint64_t)((double)n * fraction);
}

static void hash_all(struct dataset *d, const struct dataset_options *o) {
    uint64_t own[6] = {tokenizer_hash(o->tokenizer),
                       shard_marker_hash(o->marker),
                       d->begin[0],
                       d->end[0],
                       d->begin[1],
                       d->end[1]};
    d->hash = hash_bytes(own, sizeof own, 7);
    for (size_t i = 0; i < d->count; i++)
        d->hash = hash_bytes(&d->pieces[i].shard.header->content_hash, 8, d->hash);
}

tril_status dataset_open(struct dataset **out, const struct dataset_options *o,
                         struct tril_error *err) {
    struct dataset *d = calloc(1, sizeof *d);
    char *dir = NULL;
    tril_status st = TRIL_OK;
    *out = NULL;
    if (!d)
        return no_memory(err);
    d->tokenizer = o->tokenizer;
    TRY(cache_dir(o->cache_dir, &dir, err));
    TRY(add_texts(d, o, o->paths, o->path_count, dir, err));
    uint64_t own = stream_tokens(d);
    if (o->valid_path)
        TRY(add_texts(d, o, &o->valid_path, 1, dir, err));
    TRY(list_documents(d, err));
    d->end[DATASET_TRAIN] = o->valid_path ? own : split_at(d, o->valid_fraction);
    d->begin[DATASET_VALID] = d->end[DATASET_TRAIN];
    d->end[DATASET_VALID] = stream_tokens(d);
    hash_all(d, o);
    *out = d;
    d = NULL;
done:
    dataset_free(d);
    free(dir);
    return st;
}

void dataset_free(struct dataset *d) {
    if (!d)
        return;
    for (size_t i = 0; i < d->count; i++)
        shard_close(&d->pieces[i].shard);
    free(d->pieces);
    free(d->documents);
    free(d);
}

/* ------------------------------------------------------------------ asking */

uint64_t dataset_tokens(const struct dataset *d, enum dataset_split split) {
    return d->end[split] - d->begin[split];
}

/* How many documents begin before a place in the stream. */
static uint64_t documents_before(const struct dataset *d, uint64_t at) {
    uint64_t low = 0, high = d->document_count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (d->documents[middle] < at)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint64_t dataset_documents(const struct dataset *d, enum dataset_split split) {
    return documents_before(d, d->end[split]) - documents_before(d, d->begin[split]);
}

uint64_t dataset_bytes(const struct dataset *d, enum dataset_split split) {
    uint64_t bytes = 0;
    int32_t ids[4096];
    for (uint64_t at = 0, n = dataset_tokens(d, split); at < n; at += 4096) {
        size_t count = n - at < 4096 ? (size_t)(n - at) : 4096, size;
        dataset_read(d, split, at, count, ids);
        for (size_t i = 0; i < count; i++) {
            tokenizer_token_bytes(d->tokenizer, (uint32_t)ids[i], &size);
            bytes += size;
        }
    }
    return bytes;
}

uint64_t dataset_hash(const struct dataset *d) {
    return d->hash;
}

void dataset_read(const struct dataset *d, enum dataset_split split, uint64_t start, size_t n,
                  int32_t *out) {
    uint64_t at = d->begin[split] + start;
    size_t low = 0, high = d->count;
    while (high - low > 1) { /* the last piece that begins at or before `at` */
        size_t middle = low + (high - low) / 2;
        if (d->pieces[middle].start <= at)
            low = middle;
        else
            high = middle;
    }
    for (; n > 0; low++) {
        const struct piece *p = &d->pieces[low];
        uint64_t local = at - p->start, own = p->shard.header->tokens;
        if (local < own) {
            size_t take = own - local < n ? (size_t)(own - local) : n;
            shard_read(&p->shard, local, take, out);
            out += take;
            at += take;
            n -= take;
            local += take;
        }
        if (n > 0 && local < p->tokens) { /* the end-of-text token behind it */
            *out++ = (int32_t)tokenizer_eos(d->tokenizer);
            at++;
            n--;
        }
    }
}

bool dataset_document_begins(const struct dataset *d, enum dataset_split split, uint64_t at) {
    uint64_t place = d->begin[split] + at, i = documents_before(d, place);
    return i < d->document_count && d->documents[i] == place;
}

int64_t dataset_eos(const struct dataset *d) {
    return tokenizer_eos(d->tokenizer);
}
