/* Hugging Face tokenizer.json. Each part is checked; what tril does not do is refused by name. */
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "text/vocab.h"

#define TOKENIZER_FILE_LIMIT ((size_t)256 << 20)

struct reader {
    const char *name; /* of the file, for messages */
    struct tokenizer_parts parts;
    struct tril_error *err;
};

/* obj.type, "" if it has none. */
static const char *type_of(const json_t *obj) {
    const char *type = json_string_value(json_object_get(obj, "type"));
    return type ? type : "";
}

static tril_status unsupported(struct reader *r, const char *part, const char *type,
                               const char *instead) {
    return error_set(r->err, TRIL_ERR_UNSUPPORTED,
                     "%s: the %s \"%.100s\" is not supported: tril %s", r->name, part, type,
                     instead);
}

/* An array of objects, at most `most` long. */
static tril_status list_of(struct reader *r, const json_t *obj, const char *key, size_t most,
                           const json_t **list) {
    *list = json_object_get(obj, key);
    if (!json_is_array(*list) || json_array_size(*list) > most)
        return error_set(r->err, TRIL_ERR_FORMAT, "%s: %s is not a list of at most %zu", r->name,
                         key, most);
    return TRIL_OK;
}

static tril_status read_normalizer(struct reader *r, const json_t *n) {
    tril_status st;
    if (!n || json_is_null(n))
        return TRIL_OK;
    const char *type = type_of(n);
    if (strcmp(type, "NFC") == 0) {
        r->parts.nfc = true;
        return TRIL_OK;
    }
    if (strcmp(type, "Sequence") != 0)
        return unsupported(r, "normalizer", type, "knows NFC only");
    const json_t *list;
    if ((st = list_of(r, n, "normalizers", MAX_STAGES, &list)) != TRIL_OK)
        return st;
    for (size_t i = 0; i < json_array_size(list) && st == TRIL_OK; i++)
        st = read_normalizer(r, json_array_get(list, i));
    return st;
}

/* A literal text as a regular expression. */
static char *escaped(const char *text) {
    char *out = malloc(2 * strlen(text) + 1), *p = out;
    for (; out && *text; text++) {
        if (strchr("\\|()[]{}^$*+?.", *text))
            *p++ = '\\';
        *p++ = *text;
    }
    if (out)
        *p = '\0';
    return out;
}

static tril_status read_split(struct reader *r, const json_t *p, struct stage *s) {
    const json_t *pattern = json_object_get(p, "pattern");
    const char *regex = json_string_value(json_object_get(pattern, "Regex"));
    const char *literal = json_string_value(json_object_get(pattern, "String"));
    const char *behavior = json_string_value(json_object_get(p, "behavior"));
    bool invert = false;
    tril_status st = json_get_bool(p, "invert", &invert, r->name, r->err);
    if (st != TRIL_OK)
        return st;
    if ((!regex && !literal) || !behavior)
        return error_set(r->err, TRIL_ERR_FORMAT,
                         "%s: a Split pre_tokenizer lacks its pattern or its behavior", r->name);
    s->keep_matches = s->keep_others = true;
    if (strcmp(behavior, "Removed") == 0)
        *(invert ? &s->keep_others : &s->keep_matches) = false;
    else if (strcmp(behavior, "Isolated") != 0)
        return unsupported(r, "Split behavior", behavior, "knows Isolated and Removed");
    char *from_literal = literal ? escaped(literal) : NULL;
    if (literal && !from_literal)
        return error_set(r->err, TRIL_ERR_MEMORY, "not enough memory to read %s", r->name);
    st = pattern_compile(&s->pattern, literal ? from_literal : regex, PATTERN_ONIGURUMA, r->err);
    free(from_literal);
    s->has_pattern = st == TRIL_OK;
    if (st != TRIL_OK)
        error_prefix(r->err, "%s", r->name);
    return st;
}

static tril_status read_pre_tokenizer(struct reader *r, const json_t *p, int depth) {
    const char *type = type_of(p);
    struct tokenizer_parts *parts = &r->parts;
    tril_status st = TRIL_OK;
    if (strcmp(type, "Sequence") == 0 && depth == 0) {
        const json_t *list;
        if ((st = list_of(r, p, "pretokenizers", MAX_STAGES, &list)) != TRIL_OK)
            return st;
        for (size_t i = 0; i < json_array_size(list) && st == TRIL_OK; i++)
            st = read_pre_tokenizer(r, json_array_get(list, i), 1);
        return st;
    }
    if (parts->stage_count && parts->stages[parts->stage_count - 1].kind == STAGE_BYTE_LEVEL)
        return error_set(r->err, TRIL_ERR_UNSUPPORTED,
                         "%s: a pre_tokenizer \"%.100s\" after ByteLevel is not supported", r->name,
                         type);
    struct stage *s = &parts->stages[parts->stage_count];
    memset(s, 0, sizeof *s);
    s->keep_matches = s->keep_others = true;
    if (strcmp(type, "Split") == 0) {
        s->kind = STAGE_SPLIT;
        st = read_split(r, p, s);
    } else if (strcmp(type, "Digits") == 0) {
        s->kind = STAGE_DIGITS;
        st = json_get_bool(p, "individual_digits", &s->individual, r->name, r->err);
    } else if (strcmp(type, "ByteLevel") == 0) {
        s->kind = STAGE_BYTE_LEVEL;
        s->prefix_space = s->has_pattern = true;
        st = json_get_bool(p, "add_prefix_space", &s->prefix_space, r->name, r->err);
        if (st == TRIL_OK)
            st = json_get_bool(p, "use_regex", &s->has_pattern, r->name, r->err);
        if (st == TRIL_OK && s->has_pattern)
            st = pattern_published(&s->pattern, SCAN_GPT2, r->err);
        s->has_pattern &= st == TRIL_OK;
    } else {
        return unsupported(r, "pre_tokenizer", type,
                           "reads byte-level tokenizers (ByteLevel, after Split or Digits)");
    }
    parts->stage_count += st == TRIL_OK;
    return st;
}

static tril_status read_decoder(struct reader *r, const json_t *d, int depth) {
    tril_status st = TRIL_OK;
    const char *type = type_of(d);
    if (!d || json_is_null(d) || strcmp(type, "ByteLevel") == 0)
        return TRIL_OK;
    if (strcmp(type, "Sequence") != 0 || depth)
        return unsupported(r, "decoder", type, "knows ByteLevel only");
    const json_t *list;
    if ((st = list_of(r, d, "decoders", MAX_STAGES, &list)) != TRIL_OK)
        return st;
    for (size_t i = 0; i < json_array_size(list) && st == TRIL_OK; i++)
        st = read_decoder(r, json_array_get(list, i), 1);
    return st;
}

/* The token that a template puts first, if it is one token; all else in a post-processor concerns
 * special tokens that tril's encode does not add. */
static void read_post_processor(struct reader *r, const json_t *p) {
    if (strcmp(type_of(p), "Sequence") == 0) {
        const json_t *list = json_object_get(p, "processors");
        for (size_t i = 0; i < json_array_size(list); i++)
            if (strcmp(type_of(json_array_get(list, i)), "TemplateProcessing") == 0)
                read_post_processor(r, json_array_get(list, i));
        return;
    }
    if (strcmp(type_of(p), "TemplateProcessing") != 0)
        return;
    const json_t *first = json_array_get(json_object_get(p, "single"), 0);
    const char *id =
        json_string_value(json_object_get(json_object_get(first, "SpecialToken"), "id"));
    if (!id)
        return;
    const json_t *ids =
        json_object_get(json_object_get(json_object_get(p, "special_tokens"), id), "ids");
    json_int_t bos = json_integer_value(json_array_get(ids, 0));
    if (json_array_size(ids) == 1 && bos >= 0 && bos < r->parts.vocab_size)
        r->parts.bos_id = bos;
}

/* Fields of the model that must have their neutral value. */
static tril_status check_model(struct reader *r, const json_t *model) {
    static const char *const empty[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    tril_status st;
    const char *type = type_of(model);
    if (!json_is_object(model))
        return error_set(r->err, TRIL_ERR_FORMAT, "%s: there is no \"model\" object in it",
                         r->name);
    if (strcmp(type, "BPE") != 0 && (*type || !json_object_get(model, "merges")))
        return unsupported(r, "model", *type ? type : "without a type", "reads byte-level BPE");
    for (size_t i = 0; i < 2; i++) {
        const char *text = "";
        st = json_get_string(model, empty[i], &text, r->name, r->err);
        if (st != TRIL_OK)
            return st;
        if (*text)
            return unsupported(r, empty[i], text, "reads byte-level BPE, which has none");
    }
    double dropout = 0;
    st = json_get_double(model, "dropout", 0, 1, &dropout, r->name, r->err);
    if (st == TRIL_OK && dropout > 0)
        st = unsupported(r, "model's", "dropout", "encodes without chance");
    bool byte_fallback; /* never used where every byte has a token: checked after loading */
    if (st == TRIL_OK)
        st = json_get_bool(model, "byte_fallback", &byte_fallback, r->name, r->err);
    if (st == TRIL_OK)
        st = json_get_bool(model, "fuse_unk", &r->parts.fuse_unk, r->name, r->err);
    if (st == TRIL_OK)
        st = json_get_bool(model, "ignore_merges", &r->parts.ignore_merges, r->name, r->err);
    return st;
}

static tril_status read_merges(struct reader *r, const json_t *merges, struct vocab *v) {
    tril_status st = TRIL_OK;
    if (!json_is_array(merges))
        return error_set(r->err, TRIL_ERR_FORMAT, "%s: model.merges is not a list", r->name);
    for (size_t i = 0; i < json_array_size(merges) && st == TRIL_OK; i++) {
        const json_t *m = json_array_get(merges, i), *left = json_array_get(m, 0),
                     *right = json_array_get(m, 1);
        if (json_is_string(m))
            st = vocab_merge_line(v, json_string_value(m), json_string_length(m), r->name,
                                  "merge number", i, r->err);
        else if (json_array_size(m) == 2 && json_is_string(left) && json_is_string(right))
            st = vocab_merge(v, json_string_value(left), json_string_length(left),
                             json_string_value(right), json_string_length(right), r->name,
                             "merge number", i, r->err);
        else
            st =
                error_set(r->err, TRIL_ERR_FORMAT,
                          "%s: merge number %zu is neither \"a b\" nor [\"a\", \"b\"]", r->name, i);
    }
    return st;
}

static tril_status read_added(struct reader *r, const json_t *list, const struct vocab *v,
                              struct added_token *added) {
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *o = json_array_get(list, i), *content = json_object_get(o, "content");
        struct added_token *a = &added[i];
        int64_t id = -1;
        tril_status st = json_get_int(o, "id", 0, UINT32_MAX - 1, &id, r->name, r->err);
        if (st != TRIL_OK)
            return st;
        if (!json_is_object(o) || id < 0 || !json_is_string(content))
            return error_set(r->err, TRIL_ERR_FORMAT,
                             "%s: added token number %zu lacks its id or its content", r->name, i);
        a->content = (const unsigned char *)json_string_value(content);
        a->size = (uint32_t)json_string_length(content);
        a->id = (uint32_t)id;
        if (a->size == 0)
            return error_set(r->err, TRIL_ERR_FORMAT, "%s: added token number %zu is empty",
                             r->name, i);
        struct {
            const char *key;
            bool *value;
        } flags[] = {{"special", &a->special},
                     {"single_word", &a->single_word},
                     {"lstrip", &a->lstrip},
                     {"rstrip", &a->rstrip},
                     {"normalized", &a->normalized}};
        for (size_t k = 0; k < sizeof flags / sizeof *flags; k++) {
            if (flags[k].value == &a->normalized)
                a->normalized = !a->special;
            st = json_get_bool(o, flags[k].key, flags[k].value, r->name, r->err);
            if (st != TRIL_OK)
                return st;
        }
        uint32_t known = vocab_find(v, json_string_value(content), a->size);
        int shown = (int)(a->size < 100 ? a->size : 100);
        if (known != NO_TOKEN && known != a->id)
            return error_set(r->err, TRIL_ERR_FORMAT,
                             "%s: the added token \"%.*s\" has the id %u, but %u in the vocabulary",
                             r->name, shown, a->content, a->id, known);
        if (a->id >= v->id_limit)
            return error_set(r->err, TRIL_ERR_FORMAT,
                             "%s: the added token \"%.*s\" has the id %u, but there are only %u "
                             "tokens",
                             r->name, shown, a->content, a->id, v->id_limit);
        if (known == NO_TOKEN && v->flags[a->id])
            return error_set(r->err, TRIL_ERR_FORMAT,
                             "%s: the added token \"%.*s\" has the id %u, which is another token's",
                             r->name, shown, a->content, a->id);
    }
    return TRIL_OK;
}

/* 1 + the greatest id in use; the rest of v's id_limit was room for added tokens that are in the
 * vocabulary already. */
static uint32_t count_ids(const struct vocab *v, const struct added_token *added, size_t n) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < v->id_limit; i++)
        if (v->flags[i])
            count = i + 1;
    for (size_t i = 0; i < n; i++)
        if (added[i].id >= count)
            count = added[i].id + 1;
    return count;
}

static tril_status read_root(struct reader *r, struct tokenizer **out, const json_t *root) {
    tril_status st = TRIL_OK;
    struct vocab v = {0};
    struct added_token *added = NULL;
    const json_t *model = json_object_get(root, "model"),
                 *list = json_object_get(root, "added_tokens");
    if (!json_is_object(root))
        return error_set(r->err, TRIL_ERR_FORMAT, "%s is not a JSON object", r->name);
    TRY(check_model(r, model));
    TRY(read_normalizer(r, json_object_get(root, "normalizer")));
    const json_t *pre = json_object_get(root, "pre_tokenizer");
    if (json_is_object(pre))
        TRY(read_pre_tokenizer(r, pre, 0));
    struct tokenizer_parts *parts = &r->parts;
    if (!parts->stage_count || parts->stages[parts->stage_count - 1].kind != STAGE_BYTE_LEVEL) {
        st = error_set(
            r->err, TRIL_ERR_UNSUPPORTED,
            "%s: it has no ByteLevel pre_tokenizer; tril reads byte-level tokenizers only",
            r->name);
        goto done;
    }
    TRY(read_decoder(r, json_object_get(root, "decoder"), 0));
    const json_t *vocabulary = json_object_get(model, "vocab");
    if (!json_is_object(vocabulary)) {
        st = error_set(r->err, TRIL_ERR_FORMAT, "%s: model.vocab is not an object", r->name);
        goto done;
    }
    if (list && !json_is_null(list) && !json_is_array(list)) {
        st = error_set(r->err, TRIL_ERR_FORMAT, "%s: added_tokens is not a list", r->name);
        goto done;
    }
    size_t n = json_array_size(list);
    if (n > 1u << 20) {
        st = error_set(r->err, TRIL_ERR_UNSUPPORTED, "%s: it has %zu added tokens", r->name, n);
        goto done;
    }
    added = calloc(n + 1, sizeof *added);
    if (!added) {
        st = error_set(r->err, TRIL_ERR_MEMORY, "not enough memory to read %s", r->name);
        goto done;
    }
    TRY(vocab_read(&v, vocabulary, (uint32_t)n, r->name, r->err));
    TRY(read_merges(r, json_object_get(model, "merges"), &v));
    TRY(read_added(r, list, &v, added));
    parts->vocab_size = count_ids(&v, added, n);
    if (parts->vocab_size == 0) {
        st = error_set(r->err, TRIL_ERR_FORMAT, "%s: the vocabulary is empty", r->name);
        goto done;
    }
    parts->tokens = v.tokens;
    parts->flags = v.flags;
    parts->merges = v.merges;
    parts->merge_count = v.merge_count;
    parts->added = added;
    parts->added_count = (uint32_t)n;
    const char *unk = NULL;
    TRY(json_get_string(model, "unk_token", &unk, r->name, r->err));
    if (unk) {
        uint32_t id = vocab_find(&v, unk, strlen(unk));
        for (size_t i = 0; i < n && id == NO_TOKEN; i++)
            if (added[i].size == strlen(unk) && memcmp(added[i].content, unk, added[i].size) == 0)
                id = added[i].id;
        if (id == NO_TOKEN) {
            st = error_set(r->err, TRIL_ERR_FORMAT,
                           "%s: the unk_token \"%.100s\" is not in the vocabulary", r->name, unk);
            goto done;
        }
        parts->unk_id = id;
    }
    read_post_processor(r, json_object_get(root, "post_processor"));
    TRY(tokenizer_build(out, parts, r->name, r->err));
    if (json_is_true(json_object_get(model, "byte_fallback")) && (*out)->bytes_missing) {
        tokenizer_free(*out);
        *out = NULL;
        st = unsupported(r, "model's", "byte_fallback",
                         "reads byte-level BPE, whose vocabulary has all 256 bytes");
    }
done:
    vocab_free(&v);
    free(added);
    tokenizer_parts_free_stages(&r->parts);
    return st;
}

tril_status tokenizer_parse(struct tokenizer **out, const char *json, size_t size, const char *name,
                            struct tril_error *err) {
    json_t *root;
    struct reader r = {.name = name, .err = err, .parts = {.unk_id = -1, .bos_id = -1}};
    *out = NULL;
    tril_status st = json_parse(&root, json, size, name, err);
    if (st != TRIL_OK)
        return st;
    st = read_root(&r, out, root);
    json_decref(root);
    if (st != TRIL_OK)
        return st;
    (*out)->json = malloc(size + 1);
    if (!(*out)->json) {
        tokenizer_free(*out);
        *out = NULL;
        return error_set(err, TRIL_ERR_MEMORY, "not enough memory to read %s", name);
    }
    memcpy((*out)->json, json, size);
    (*out)->json[size] = '\0';
    (*out)->json_size = size;
    return TRIL_OK;
}

tril_status tokenizer_load_json(struct tokenizer **out, const char *path, struct tril_error *err) {
    char *text;
    size_t size;
    *out = NULL;
    tril_status st = file_read(path, TOKENIZER_FILE_LIMIT, &text, &size, err);
    if (st == TRIL_OK)
        st = tokenizer_parse(out, text, size, path, err);
    free(text);
    return st;
}
