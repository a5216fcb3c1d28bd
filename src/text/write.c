/* Writing tokenizer.json and tokenizer_config.json for Hugging Face libraries. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "text/tokenizer_impl.h"

struct text_out {
    char *data;
    size_t size, capacity;
    bool failed;
};

static void put(struct text_out *o, const char *data, size_t size) {
    if (size > o->capacity - o->size) {
        size_t capacity = (o->size + size) * 2 + 4096;
        char *p = realloc(o->data, capacity);
        if (!p) {
            o->failed = true;
            return;
        }
        o->data = p;
        o->capacity = capacity;
    }
    memcpy(o->data + o->size, data, size);
    o->size += size;
}

static void puts_out(struct text_out *o, const char *text) {
    put(o, text, strlen(text));
}

/* A JSON string's inside. The text is UTF-8 unless it is an added token of someone's making: a byte
 * that is no UTF-8 becomes U+FFFD, since JSON cannot hold it. */
static void put_escaped(struct text_out *o, const unsigned char *p, size_t size) {
    const unsigned char *end = p + size;
    while (p < end) {
        char buffer[8];
        unsigned n;
        uint32_t c = utf8_next(p, end, &n);
        if (c == UTF8_INVALID) {
            puts_out(o, "\xEF\xBF\xBD");
        } else if (c == '"' || c == '\\') {
            buffer[0] = '\\';
            buffer[1] = (char)c;
            put(o, buffer, 2);
        } else if (c < 0x20) {
            snprintf(buffer, sizeof buffer, "\\u%04x", c);
            puts_out(o, buffer);
        } else {
            put(o, (const char *)p, n);
        }
        p += n;
    }
}

/* A token in the byte alphabet (or, raw, as it is). */
static void put_token(struct text_out *o, const struct tokenizer *t, uint32_t id) {
    const struct trie_string *s = &t->tokens[id];
    if (t->flags[id] & TOKEN_RAW) {
        put_escaped(o, s->bytes, s->size);
        return;
    }
    for (uint32_t i = 0; i < s->size; i++) {
        unsigned char utf8[4];
        put_escaped(o, utf8, utf8_put(byte_to_char(s->bytes[i]), utf8));
    }
}

static void put_stage(struct text_out *o, const struct stage *s) {
    if (s->kind == STAGE_BYTE_LEVEL) {
        puts_out(o, "{\"type\": \"ByteLevel\", \"add_prefix_space\": ");
        puts_out(o, s->prefix_space ? "true" : "false");
        puts_out(o, ", \"trim_offsets\": true, \"use_regex\": ");
        puts_out(o, s->has_pattern ? "true}" : "false}");
    } else if (s->kind == STAGE_DIGITS) {
        puts_out(o, "{\"type\": \"Digits\", \"individual_digits\": ");
        puts_out(o, s->individual ? "true}" : "false}");
    } else {
        puts_out(o, "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"");
        put_escaped(o, (const unsigned char *)s->pattern.source, strlen(s->pattern.source));
        puts_out(o, "\"}, \"behavior\": \"");
        puts_out(o, s->keep_matches && s->keep_others ? "Isolated" : "Removed");
        puts_out(o, "\", \"invert\": ");
        puts_out(o, s->keep_matches && !s->keep_others ? "true}" : "false}");
    }
}

static const char *yes(bool b) {
    return b ? "true" : "false";
}

static void put_document(struct text_out *o, const struct tokenizer *t) {
    char line[256];
    puts_out(o, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n"
                "  \"added_tokens\": [");
    for (uint32_t i = 0; i < t->added_count; i++) {
        const struct added_token *a = &t->added[i];
        snprintf(line, sizeof line, "%s\n    {\"id\": %u, \"content\": \"", i ? "," : "", a->id);
        puts_out(o, line);
        put_escaped(o, a->content, a->size);
        snprintf(line, sizeof line,
                 "\", \"single_word\": %s, \"lstrip\": %s, \"rstrip\": %s, \"normalized\": %s, "
                 "\"special\": %s}",
                 yes(a->single_word), yes(a->lstrip), yes(a->rstrip), yes(a->normalized),
                 yes(a->special));
        puts_out(o, line);
    }
    puts_out(o, t->added_count ? "\n  ],\n" : "],\n");
    puts_out(o, t->nfc ? "  \"normalizer\": {\"type\": \"NFC\"},\n" : "  \"normalizer\": null,\n");
    puts_out(o, "  \"pre_tokenizer\": ");
    if (t->stage_count > 1)
        puts_out(o, "{\"type\": \"Sequence\", \"pretokenizers\": [\n    ");
    for (int i = 0; i < t->stage_count; i++) {
        puts_out(o, i ? ",\n    " : "");
        put_stage(o, &t->stages[i]);
    }
    puts_out(o, t->stage_count > 1 ? "\n  ]},\n" : ",\n");
    puts_out(o,
             "  \"post_processor\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, "
             "\"trim_offsets\": false, \"use_regex\": true},\n"
             "  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, "
             "\"trim_offsets\": true, \"use_regex\": true},\n"
             "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": ");
    if (t->unk_id >= 0) {
        puts_out(o, "\"");
        put_token(o, t, (uint32_t)t->unk_id);
        puts_out(o, "\"");
    } else {
        puts_out(o, "null");
    }
    snprintf(line, sizeof line,
             ",\n    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n"
             "    \"fuse_unk\": %s,\n    \"byte_fallback\": false,\n    \"ignore_merges\": %s,\n"
             "    \"vocab\": {",
             yes(t->fuse_unk), yes(t->ignore_merges));
    puts_out(o, line);
    bool first = true;
    for (uint32_t i = 0; i < t->vocab_size; i++) {
        if (!t->tokens[i].size)
            continue;
        puts_out(o, first ? "\n      \"" : ",\n      \"");
        put_token(o, t, i);
        snprintf(line, sizeof line, "\": %u", i);
        puts_out(o, line);
        first = false;
    }
    puts_out(o, "\n    },\n    \"merges\": [");
    for (uint32_t i = 0; i < t->merge_count;
         i++) { /* strings: versions before 0.20 read them too */
        puts_out(o, i ? ",\n      \"" : "\n      \"");
        put_token(o, t, t->merges[i].left);
        puts_out(o, " ");
        put_token(o, t, t->merges[i].right);
        puts_out(o, "\"");
    }
    puts_out(o, t->merge_count ? "\n    ]\n  }\n}\n" : "]\n  }\n}\n");
}

tril_status tokenizer_write(const struct tokenizer *t, const char *path, struct tril_error *err) {
    struct text_out o = {0};
    if (t->json)
        return file_write_atomic(path, t->json, t->json_size, err);
    put_document(&o, t);
    tril_status st = o.failed
                         ? error_set(err, TRIL_ERR_MEMORY, "not enough memory to write %s", path)
                         : file_write_atomic(path, o.data, o.size, err);
    free(o.data);
    return st;
}

/* Adds "key": the content of an added token, as transformers names special tokens. */
static bool set_token(json_t *root, const char *key, const struct tokenizer *t, int64_t id) {
    size_t size;
    if (id < 0)
        return true;
    const char *content = (const char *)tokenizer_token_bytes(t, (uint32_t)id, &size);
    json_t *value = json_stringn(content, size);
    return value && json_object_set_new(root, key, value) == 0;
}

/* transformers 5 replaces the tokenizer_class of some model types by one of its own, which builds
 * another pre-tokenizer around the vocabulary. It does not where an "auto_map" is present, which
 * for these types it then passes over (and so does 4.57, unless trust_remote_code asks for it). */
static bool class_is_overridden(const char *dir) {
    static const char *const types[] = {"qwen2", "qwen3_5", "qwen3_5_moe",
                                        "phi3",  "phimoe",  "jamba"};
    char *path = path_join(dir, "config.json");
    json_t *root = NULL;
    bool found = false;
    if (path && path_exists(path) && json_read(&root, path, 1 << 20, NULL) == TRIL_OK) {
        const char *type = json_string_value(json_object_get(root, "model_type"));
        for (size_t i = 0; type && i < sizeof types / sizeof *types; i++)
            found |= strcmp(type, types[i]) == 0;
    }
    json_decref(root);
    free(path);
    return found;
}

/* PreTrainedTokenizerFast is the class that takes tokenizer.json as it is. */
tril_status tokenizer_write_hf(const struct tokenizer *t, const char *dir, int64_t context,
                               struct tril_error *err) {
    tril_status st = TRIL_OK;
    char *json = path_join(dir, "tokenizer.json"),
         *config = path_join(dir, "tokenizer_config.json");
    json_t *root = json_pack("{s:s, s:b}", "tokenizer_class", "PreTrainedTokenizerFast",
                             "clean_up_tokenization_spaces", 0);
    bool complete = json && config && root;
    complete = complete && set_token(root, "bos_token", t, t->bos_id >= 0 ? t->bos_id : t->eos_id);
    complete = complete && set_token(root, "eos_token", t, t->eos_id);
    complete = complete && set_token(root, "unk_token", t, t->unk_id);
    if (complete && context > 0)
        complete = json_object_set_new(root, "model_max_length", json_integer(context)) == 0;
    if (complete && class_is_overridden(dir))
        complete = json_object_set_new(
                       root, "auto_map",
                       json_pack("{s:[n, s]}", "AutoTokenizer", "tokenizer.Tokenizer")) == 0;
    if (!complete) {
        st = error_set(err, TRIL_ERR_MEMORY, "not enough memory to write a tokenizer");
        goto done;
    }
    TRY(tokenizer_write(t, json, err));
    TRY(json_write(root, config, err));
done:
    json_decref(root);
    free(json);
    free(config);
    return st;
}
