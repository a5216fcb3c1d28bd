/* Malformed tokenizers: each is refused with its status and one clear sentence that names the
 * place. */
#include "text/text_support.h"
#include "text/tokenizer.h"

static struct tril_error err;

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true}"

/* A tokenizer.json of three tokens and one merge, with one thing replaced. */
struct json_case {
    const char *vocab, *merges, *added, *pre, *model, *root;
    tril_status status;
    const char *says;
};

static char *document(const struct json_case *c) {
    char *text;
    assert_true(
        asprintf(&text,
                 "{\"added_tokens\":%s,\"normalizer\":null,\"pre_tokenizer\":%s,\"decoder\":null,%s"
                 "\"model\":{\"type\":\"BPE\",%s\"vocab\":%s,\"merges\":%s}}",
                 c->added ? c->added : "[]", c->pre ? c->pre : BYTE_LEVEL, c->root ? c->root : "",
                 c->model ? c->model : "", c->vocab ? c->vocab : "{\"a\":0,\"b\":1,\"ab\":2}",
                 c->merges ? c->merges : "[\"a b\"]") > 0);
    return text;
}

/* One sentence: not empty, one line, naming the file. */
static void check_message(const char *name, const char *says) {
    assert_non_null(strstr(err.message, name));
    assert_null(strchr(err.message, '\n'));
    if (!strstr(err.message, says))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

static void tokenizer_json(void **state) {
    (void)state;
    const tril_status F = TRIL_ERR_FORMAT, U = TRIL_ERR_UNSUPPORTED;
    const struct json_case cases[] = {
        {.merges = "[\"a c\"]", .status = F, .says = "\"c\" is not in the vocabulary"},
        {.merges = "[[\"b\",\"a\"]]", .status = F, .says = "result \"ba\""},
        {.merges = "[\"ab\"]", .status = F, .says = "not a merge of two tokens"},
        {.merges = "[\"a b \"]", .status = F, .says = "merge number 0"},
        {.merges = "[[\"a\",\"b\",\"c\"]]", .status = F, .says = "neither"},
        {.merges = "[7]", .status = F, .says = "neither"},
        {.merges = "{}", .status = F, .says = "merges is not a list"},
        {.vocab = "{\"a\":0,\"b\":1,\"ab\":1}", .status = F, .says = "two tokens have the id 1"},
        {.vocab = "{\"a\":0,\"b\":1,\"ab\":3}", .status = F, .says = "has the id 3"},
        {.vocab = "{\"a\":0,\"b\":1,\"ab\":-1}", .status = F, .says = "whole number"},
        {.vocab = "{\"a\":0,\"b\":1,\"ab\":2.5}", .status = F, .says = "whole number"},
        {.vocab = "{\"a\":0,\"b\":1,\"ab\":99999999999}", .status = F, .says = "99999999999"},
        {.vocab = "{\"a\":0,\"b\":1,\"ab\":2,\"\":3}", .status = F, .says = "empty token"},
        {.vocab = "[\"a\"]", .status = F, .says = "vocab is not an object"},
        {.vocab = "{}", .merges = "[]", .status = F, .says = "vocabulary is empty"},
        {.vocab = "{\"a\":0,\"a\":1}", .status = F, .says = "duplicate"},
        {.added = "[{\"id\":4,\"content\":\"<x>\"}]", .status = F, .says = "only 4 tokens"},
        {.added = "[{\"id\":3,\"content\":\"\"}]", .status = F, .says = "empty"},
        {.added = "[{\"content\":\"<x>\"}]", .status = F, .says = "lacks its id"},
        {.added = "[{\"id\":-3,\"content\":\"<x>\"}]", .status = F, .says = "id"},
        {.added = "[{\"id\":1,\"content\":\"<x>\"}]", .status = F, .says = "another token's"},
        {.added = "[{\"id\":3,\"content\":\"ab\"}]", .status = F, .says = "2 in the vocabulary"},
        {.added = "[{\"id\":3,\"content\":\"<x>\"},{\"id\":3,\"content\":\"<y>\"}]",
         .status = F,
         .says = "two added tokens have the id 3"},
        {.added = "[{\"id\":3,\"content\":\"<x>\"},{\"id\":4,\"content\":\"<x>\"}]",
         .status = F,
         .says = "appears twice"},
        {.added = "[{\"id\":4,\"content\":\"<x>\"},{\"id\":2,\"content\":\"ab\"}]",
         .status = F,
         .says = "no token has the id 3"},
        {.added = "[{\"id\":3,\"content\":\"<x>\",\"special\":1}]", .status = F, .says = "special"},
        {.added = "7", .status = F, .says = "added_tokens is not a list"},
        {.pre = "null", .status = U, .says = "no ByteLevel"},
        {.pre = "{\"type\":\"Metaspace\",\"replacement\":\"_\"}", .status = U, .says = "Metaspace"},
        {.pre = "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL ",{\"type\":\"Digits\"}]}",
         .status = U,
         .says = "after ByteLevel"},
        {.pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Whitespace\"}]}",
         .status = U,
         .says = "Whitespace"},
        {.pre = "{\"type\":\"Sequence\",\"pretokenizers\":7}",
         .status = F,
         .says = "pretokenizers"},
        {.pre =
             "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":"
             "\"(\"},\"behavior\":\"Isolated\"}]}",
         .status = U,
         .says = "cannot be compiled"},
        {.pre =
             "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":"
             "\"a\"},\"behavior\":\"MergedWithNext\"}]}",
         .status = U,
         .says = "MergedWithNext"},
        {.pre = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\"}]}",
         .status = F,
         .says = "lacks its pattern"},
        {.model = "\"byte_fallback\":true,", .status = U, .says = "byte_fallback"},
        {.model = "\"dropout\":0.5,", .status = U, .says = "dropout"},
        {.model = "\"dropout\":7,", .status = F, .says = "dropout"},
        {.model = "\"unk_token\":\"<unk>\",", .status = F, .says = "unk_token"},
        {.model = "\"end_of_word_suffix\":\"</w>\",", .status = U, .says = "</w>"},
        {.model = "\"continuing_subword_prefix\":\"##\",", .status = U, .says = "##"},
        {.model = "\"ignore_merges\":\"yes\",", .status = F, .says = "ignore_merges"},
        {.root = "\"model\":{},", .status = F, .says = "duplicate"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tokenizer *t;
        char *text = document(&cases[i]);
        memset(&err, 0, sizeof err);
        tril_status st = tokenizer_parse(&t, text, strlen(text), "made.json", &err);
        if (st != cases[i].status || t)
            fail_msg("case %zu (%s): status %d, \"%s\"", i, cases[i].says, st, err.message);
        check_message("made.json", cases[i].says);
        assert_int_equal(tokenizer_parse(&t, text, strlen(text), "made.json", NULL), st);
        free(text);
    }
    /* The document itself is good. */
    struct tokenizer *t;
    char *text = document(&(struct json_case){0});
    if (tokenizer_parse(&t, text, strlen(text), "made.json", &err) != TRIL_OK)
        fail_msg("%s", err.message);
    uint32_t *ids;
    size_t n;
    assert_int_equal(tokenizer_encode(t, "aab", 3, true, &ids, &n, &err), TRIL_OK);
    assert_int_equal(n, 2);
    assert_int_equal(ids[1], 2);
    free(ids);
    /* Its vocabulary lacks most bytes, which is said when one is met. */
    assert_int_equal(tokenizer_encode(t, "abc", 3, true, &ids, &n, &err), TRIL_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "0x63"));
    tokenizer_free(t);
    /* Cut short anywhere, it is refused. */
    for (size_t size = 0; size < strlen(text); size++) {
        char *part = malloc(size + 1); /* exactly: the sanitizer sees a byte too far */
        memcpy(part, text, size);
        assert_int_not_equal(tokenizer_parse(&t, part, size, "cut.json", &err), TRIL_OK);
        check_message("cut.json", "");
        free(part);
    }
    free(text);
}

static void other_models(void **state) {
    (void)state;
    static const char *const types[] = {"Unigram", "WordPiece", "WordLevel"};
    for (int i = 0; i < 3; i++) {
        char text[256];
        struct tokenizer *t;
        snprintf(text, sizeof text,
                 "{\"pre_tokenizer\":%s,\"model\":{\"type\":\"%s\",\"vocab\":[]}}", BYTE_LEVEL,
                 types[i]);
        assert_int_equal(tokenizer_parse(&t, text, strlen(text), "made.json", &err),
                         TRIL_ERR_UNSUPPORTED);
        check_message("made.json", types[i]);
    }
    static const char *const others[] = {
        "",
        "7",
        "[]",
        "{}",
        "{\"model\":7}",
        "\"x\"",
        "{\"model\":{\"type\":\"BPE\"}} {}",
        "\xFF\xFE{}",
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"\\u0000\":0},\"merges\":[]}}"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        struct tokenizer *t;
        assert_int_not_equal(tokenizer_parse(&t, others[i], strlen(others[i]), "made.json", &err),
                             TRIL_OK);
        check_message("made.json", "");
    }
    char deep[300];
    struct tokenizer *t;
    memset(deep, '[', sizeof deep);
    assert_int_equal(tokenizer_parse(&t, deep, sizeof deep, "made.json", &err), TRIL_ERR_FORMAT);
    check_message("made.json", "deeper than 64");
}

static void write(const char *name, const char *text) {
    assert_int_equal(file_write_atomic(test_path(name), text, strlen(text), &err), TRIL_OK);
}

static void refused(const char *path, const char *pattern, tril_status status, const char *says) {
    struct tokenizer *t;
    memset(&err, 0, sizeof err);
    tril_status st = tokenizer_load(&t, path, pattern, &err);
    if (st != status || t)
        fail_msg("%s: status %d, \"%s\"", path, st, err.message);
    if (!strstr(err.message, says) || strchr(err.message, '\n'))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

static void pairs_of_files(void **state) {
    (void)state;
    write("vocab.json", "{\"a\":0,\"b\":1,\"ab\":2}");
    refused(test_path("vocab.json"), NULL, TRIL_ERR_IO, "merges.txt");
    write("merges.txt", "#version: 0.2\na b\nb q\n");
    refused(test_path("vocab.json"), NULL, TRIL_ERR_FORMAT, "line 3");
    write("merges.txt", "a b c\n");
    refused(test_path("merges.txt"), NULL, TRIL_ERR_FORMAT, "line 1");
    write("merges.txt", "#version: 0.2\r\na b\r\n\r\n");
    struct tokenizer *t;
    assert_int_equal(tokenizer_load(&t, test_path("merges.txt"), NULL, &err), TRIL_OK);
    assert_int_equal(tokenizer_merge_count(t), 1);
    tokenizer_free(t);
    refused(test_path("vocab.json"), "gpt2", TRIL_ERR_ARGUMENT, "its own pattern");
    write("vocab.json", "{\"a\":0,\"b\":1,\"ab\":7}");
    refused(test_path("vocab.json"), NULL, TRIL_ERR_FORMAT, "id 7");
    refused(test_path("nothing.json"), NULL, TRIL_ERR_IO, "nothing.json");
    refused(test_path("nothing"), NULL, TRIL_ERR_IO, "nothing");
    assert_int_equal(dir_make(test_path("empty"), &err), TRIL_OK);
    refused(test_path("empty"), NULL, TRIL_ERR_IO, "holds no tokenizer");
    write("empty/tokenizer.json", "{\"a\":0}");
    refused(test_path("empty"), NULL, TRIL_ERR_FORMAT, "tokenizer.json");
}

/* A rank file of the 256 bytes and `more`. */
static void write_ranks(const char *name, int bytes, const char *more) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *text = malloc(16384 + strlen(more));
    size_t n = 0;
    for (int b = 0; b < bytes; b++)
        n += (size_t)sprintf(text + n, "%c%c== %d\n", digits[b >> 2], digits[(b & 3) << 4], b);
    strcpy(text + n, more);
    write(name, text);
    free(text);
}

static void rank_files(void **state) {
    (void)state;
    const char *path = test_path("x.tiktoken");
    write("x.tiktoken", "");
    refused(path, "gpt2", TRIL_ERR_FORMAT, "empty");
    write_ranks("x.tiktoken", 255, "");
    refused(path, "gpt2", TRIL_ERR_FORMAT, "0xFF");
    write_ranks("x.tiktoken", 256, "");
    refused(path, NULL, TRIL_ERR_ARGUMENT, "256 ranks");
    refused(path, "nonsense", TRIL_ERR_ARGUMENT, "nonsense");
    static const struct {
        const char *line, *says;
    } lines[] = {{"YWI= 256 x\n", "line 257"},
                 {"YWI=\n", "line 257"},
                 {"YW= 256\n", "line 257"},
                 {"Y*I= 256\n", "line 257"},
                 {"YWI= -1\n", "line 257"},
                 {"YWI= 7\n", "repeats the rank 7"},
                 {"YWI= 12345678901\n", "line"},
                 {"YWI= 99999\n", "rank 99999"},
                 {"AA== 256\n", "repeats a token"},
                 {"YWI= 257\n", "no token has the id 256"},
                 {" 256\n", "line 257"},
                 {"Y=I= 256\n", "line 257"}};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        write_ranks("x.tiktoken", 256, lines[i].line);
        refused(path, "gpt2", TRIL_ERR_FORMAT, lines[i].says);
    }
    struct tokenizer *t;
    write_ranks("x.tiktoken", 256, "YWI= 256\r\n");
    assert_int_equal(tokenizer_load(&t, path, "gpt2", &err), TRIL_OK);
    assert_int_equal(tokenizer_token_id(t, "ab", 2), 256);
    tokenizer_free(t);
}

/* A single damaged byte: any result, but no crash, and never a silent hang. */
static void damage(void **state) {
    (void)state;
    char path[512], *text;
    size_t size;
    snprintf(path, sizeof path, "%s/tokenizer/qwen2.json", TEST_GOLDEN_DIR);
    assert_int_equal(file_read(path, 1 << 20, &text, &size, &err), TRIL_OK);
    struct dice d = dice_make(77);
    int good = 0;
    for (int i = 0; i < 3000; i++) {
        struct tokenizer *t;
        size_t at = dice_below(&d, (uint32_t)size);
        char was = text[at];
        text[at] = (char)dice_below(&d, 256);
        if (tokenizer_parse(&t, text, size, "damaged.json", &err) == TRIL_OK) {
            uint32_t *ids;
            size_t n;
            if (tokenizer_encode(t, "It\xE2\x80\x99s 12:30 <mask> caf\xC3\xA9\n", 23, true, &ids,
                                 &n, &err) == TRIL_OK)
                free(ids);
            tokenizer_free(t);
            good++;
        } else {
            assert_non_null(strstr(err.message, "damaged.json"));
        }
        text[at] = was;
    }
    assert_in_range(good, 1, 2999);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokenizer_json), cmocka_unit_test(other_models),
        cmocka_unit_test(pairs_of_files), cmocka_unit_test(rank_files), cmocka_unit_test(damage)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
