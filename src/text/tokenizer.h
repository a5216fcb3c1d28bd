/* Byte-level BPE tokenizers: load, encode, decode, write.
 *
 *   text -> added tokens cut out -> (NFC) -> pre-tokens (regular expression) -> bytes -> merges ->
 * ids
 *
 * Read: Hugging Face tokenizer.json, GPT-2's vocab.json + merges.txt, tiktoken rank files.
 * The ids are those of Hugging Face `tokenizers` (add_special_tokens=False) and of tiktoken on any
 * valid UTF-8; bytes that are no UTF-8 are tokenised one by one and survive a round trip (except
 * that a tokenizer which declares NFC normalises the valid parts, as the original does).
 * Time is linear in the text, whatever the text.
 *
 * A loaded tokenizer is immutable: any number of threads may encode and decode with it at once. */
#ifndef TEXT_TOKENIZER_H
#define TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

struct tokenizer;

/* Loads `path`: a tokenizer.json; a directory holding tokenizer.json, or vocab.json and merges.txt;
 * a vocab.json or merges.txt (the other one lies beside it); a *.tiktoken rank file. `pattern`:
 * NULL, or the pre-tokenisation pattern of a rank file whose count of ranks is not a published one:
 * "gpt2", "cl100k", "o200k", "llama3", "qwen2" or a regular expression (PCRE2); it is refused
 * elsewhere. Special strings in a rank file's text are ordinary text: rank files name none. */
tril_status tokenizer_load(struct tokenizer **out, const char *path, const char *pattern,
                           struct tril_error *err);
/* The same from the bytes of a tokenizer.json; `name` is used in messages. */
tril_status tokenizer_parse(struct tokenizer **out, const char *json, size_t size, const char *name,
                            struct tril_error *err);
void tokenizer_free(struct tokenizer *t); /* NULL is fine */

/* 1 + the greatest id: what a model needs as V. */
uint32_t tokenizer_vocab_size(const struct tokenizer *t);
/* Refuses a model (`name` in the message) of fewer embeddings than tokens: it belongs to another
 * tokenizer. More are padding. */
tril_status tokenizer_check_model(const struct tokenizer *t, int64_t embeddings, const char *name,
                                  struct tril_error *err);
/* Number of merges, added (special and other) tokens; the pattern's name ("gpt2", "cl100k", ...,
 * or the regular expression itself); where it was loaded from ("" after training). */
uint32_t tokenizer_merge_count(const struct tokenizer *t);
uint32_t tokenizer_added_count(const struct tokenizer *t);
const char *tokenizer_pattern(const struct tokenizer *t);
/* Identity: equal hashes mean equal ids for every text (a 64-bit hash of all that matters). */
uint64_t tokenizer_hash(const struct tokenizer *t);

/* The id of an added token by its exact content ("<|endoftext|>"), or -1. */
int64_t tokenizer_special_id(const struct tokenizer *t, const char *content);
/* The id of the i-th added token, 0 <= i < tokenizer_added_count, in order of id. */
uint32_t tokenizer_added_id(const struct tokenizer *t, uint32_t i);
/* Whether `id` is an added token marked special (control), which decoding may skip. */
bool tokenizer_is_special(const struct tokenizer *t, uint32_t id);
/* End-of-text token: the first of <|endoftext|>, <|end_of_text|>, </s>, <eos>, <|im_end|> that is
 * an added token, else -1. It separates documents and ends generation. */
int64_t tokenizer_eos(const struct tokenizer *t);
/* The token that tokenizer.json's post-processor puts before a text (Llama's <|begin_of_text|>), or
 * -1. tokenizer_encode never adds it; generation from such a model starts with it. */
int64_t tokenizer_bos(const struct tokenizer *t);
/* The id of a token by its bytes (added tokens by their content), or -1. */
int64_t tokenizer_token_id(const struct tokenizer *t, const void *bytes, size_t size);
/* The bytes of a token; NULL and 0 for an id that has none. Lives as long as the tokenizer. */
const unsigned char *tokenizer_token_bytes(const struct tokenizer *t, uint32_t id, size_t *size);

/* Encodes `size` bytes. `allow_special`: added tokens' contents in the text become their ids (what
 * Hugging Face does); false: they are ordinary text (tiktoken's encode_ordinary; use it for text
 * from strangers). On success *ids is malloc'ed (free it; non-NULL even for no ids) and *n counts.
 * On one thread, with a cache of words that is kept between calls. */
tril_status tokenizer_encode(const struct tokenizer *t, const char *text, size_t size,
                             bool allow_special, uint32_t **ids, size_t *n, struct tril_error *err);
/* The same ids, on threads_count() threads where the text is long (cut only at places where every
 * pattern ends a pre-token). */
tril_status tokenizer_encode_parallel(const struct tokenizer *t, const char *text, size_t size,
                                      bool allow_special, uint32_t **ids, size_t *n,
                                      struct tril_error *err);

/* The bytes of n ids, malloc'ed and NUL-terminated (the NUL not counted; the bytes may hold NULs
 * and need not be UTF-8). `skip_special` leaves special tokens out. An id without a token is
 * refused. */
tril_status tokenizer_decode(const struct tokenizer *t, const uint32_t *ids, size_t n,
                             bool skip_special, char **text, size_t *size, struct tril_error *err);

/* Decoding as tokens come: what `next` and `end` hand out never ends inside a UTF-8 character. At
 * most three bytes are held back, and only while they can still become a valid character; bytes
 * that cannot are handed out as they are. All pieces together are exactly tokenizer_decode's bytes.
 */
struct tokenizer_stream {
    const struct tokenizer *tokenizer;
    bool skip_special;
    unsigned char pending[4];
    unsigned pending_size;
    char *buffer; /* the piece handed out last */
    size_t capacity;
};
void tokenizer_stream_begin(struct tokenizer_stream *s, const struct tokenizer *t,
                            bool skip_special);
/* *text (of *size bytes, perhaps 0, NUL-terminated) is valid until the next call on s. */
tril_status tokenizer_stream_next(struct tokenizer_stream *s, uint32_t id, const char **text,
                                  size_t *size, struct tril_error *err);
/* What is still held back, at the end of the text. */
void tokenizer_stream_end(struct tokenizer_stream *s, const char **text, size_t *size);
void tokenizer_stream_free(struct tokenizer_stream *s);

/* Writes tokenizer.json at `path` (atomically). A tokenizer that was read from a tokenizer.json is
 * written as it was read, byte for byte. */
tril_status tokenizer_write(const struct tokenizer *t, const char *path, struct tril_error *err);
/* Writes DIR/tokenizer.json and DIR/tokenizer_config.json such that transformers' AutoTokenizer
 * uses exactly this tokenizer whatever model_type config.json names (write config.json first).
 * context: model_max_length, or 0. */
tril_status tokenizer_write_hf(const struct tokenizer *t, const char *dir, int64_t context,
                               struct tril_error *err);

#endif
