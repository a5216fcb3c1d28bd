/* safetensors: what is accepted, every refusal of docs/formats.md in one sentence, sharded models,
 * and files as the writer makes them. All files are made here, in a directory of their own. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "formats/safetensors.h"
#include "support/support.h"

static const char *dir;
static struct tril_error err;

static const char *in_dir(const char *name) {
    static char path[4][256];
    static int next;
    char *p = path[next++ % 4];
    snprintf(p, sizeof path[0], "%s/%s", dir, name);
    return p;
}

/* length | header | `data` bytes 0, 1, 2, ... */
static void write_file(const char *name, uint64_t length, const char *header, size_t header_size,
                       size_t data) {
    FILE *f = fopen(in_dir(name), "wb");
    assert_non_null(f);
    for (int i = 0; i < 8; i++)
        fputc((int)(length >> (8 * i) & 0xff), f);
    fwrite(header, 1, header_size, f);
    for (size_t i = 0; i < data; i++)
        fputc((int)(i & 0xff), f);
    assert_int_equal(fclose(f), 0);
}

static void write_text(const char *name, const char *text) {
    assert_int_equal(file_write_atomic(in_dir(name), text, strlen(text), &err), TRIL_OK);
}

/* Opens and expects a refusal whose sentence names the file and says `words`. */
static void refused(const char *name, const char *words) {
    struct safetensors *s = (void *)1;
    memset(&err, 0, sizeof err);
    tril_status st = safetensors_open(&s, in_dir(name), &err);
    assert_null(s);
    assert_true(st == TRIL_ERR_FORMAT || st == TRIL_ERR_IO);
    assert_int_equal(err.code, st);
    if (!strstr(err.message, words))
        fail_msg("\"%s\" does not say \"%s\"", err.message, words);
    assert_non_null(strstr(err.message, dir));
    assert_null(strchr(err.message, '\n'));
}

static struct safetensors *opened(const char *name) {
    struct safetensors *s = NULL;
    if (safetensors_open(&s, in_dir(name), &err) != TRIL_OK)
        fail_msg("%s", err.message);
    return s;
}

#define T(name, dtype, shape, begin, end)                                                          \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end \
    "]}"

static void test_refusals(void **state) {
    (void)state;
    static const struct {
        const char *header;
        size_t data;
        const char *words;
    } cases[] = {
        {"", 0, "not valid JSON"},
        {"   ", 0, "not valid JSON"},
        {"{\"a\":", 0, "not valid JSON"},
        {"{} x", 0, "not valid JSON"},
        {"[]", 0, "must be a JSON object"},
        {"3", 0, "must be a JSON object"},
        {"null", 0, "must be a JSON object"},
        {"{\"\xff\":1}", 0, "not valid JSON"}, /* not UTF-8 */
        {"\xef\xbb\xbf{}", 0, "not valid JSON"},
        {"{\"a\\u0000b\":1}", 0, "not valid JSON"},
        {"{" T("a", "F32", "[1]", 0, 4) "," T("a", "F32", "[1]", 0, 4) "}", 4, "duplicate"},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
         "duplicate"},
        {"{\"__metadata__\":[]}", 0, "__metadata__"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "__metadata__"},
        {"{\"__metadata__\":{\"a\":null}}", 0, "__metadata__"},
        {"{\"a\":1}", 0, "tensor \"a\" must have"},
        {"{\"a\":{}}", 0, "tensor \"a\" must have"},
        {"{\"a\":{\"dtype\":1,\"shape\":[],\"data_offsets\":[0,4]}}", 4, "must have"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":1,\"data_offsets\":[0,4]}}", 4, "must have"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "must have"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, "must have"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "must have"},
        {"{" T("a", "F31", "[1]", 0, 4) "}", 4, "unknown dtype \"F31\""},
        {"{" T("a", "f32", "[1]", 0, 4) "}", 4, "unknown dtype"},
        {"{" T("a", "float32", "[1]", 0, 4) "}", 4, "unknown dtype"},
        {"{" T("a", "F8_E4M3", "[4]", 0, 4) "}", 4, "unknown dtype"},
        {"{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) "}", 4, "9 dimensions"},
        {"{" T("a", "F32", "[-1]", 0, 4) "}", 4, "must be integers"},
        {"{" T("a", "F32", "[1.0]", 0, 4) "}", 4, "must be integers"},
        {"{" T("a", "F32", "[\"1\"]", 0, 4) "}", 4, "must be integers"},
        {"{" T("a", "F32", "[null]", 0, 4) "}", 4, "must be integers"},
        {"{" T("a", "F32", "[18446744073709551616]", 0, 4) "}", 4, "must be integers"},
        {"{" T("a", "F32", "[4611686018427387904]", 0, 4) "}", 4, "overflows"},
        {"{" T("a", "F32", "[4294967296,4294967296]", 0, 4) "}", 4, "overflows"},
        {"{" T("a", "F32", "[4294967296,4294967296,0]", 0, 0) "}", 0, "overflows"},
        {"{" T("a", "F32", "[1]", 4, 0) "}", 4, "second not below"},
        {"{" T("a", "F32", "[1]", -4, 0) "}", 4, "second not below"},
        {"{" T("a", "F32", "[1]", 0, 4.0) "}", 4, "two integers"},
        {"{" T("a", "F32", "[2]", 0, 4) "}", 4, "needs 8 bytes"},
        {"{" T("a", "F32", "[1]", 0, 8) "}", 8, "needs 4 bytes"},
        {"{" T("a", "F32", "[]", 0, 0) "}", 0, "needs 4 bytes"},
        {"{" T("a", "F32", "[1]", 0, 4) "}", 3, "cut short"},
        {"{" T("a", "F32", "[2]", 0, 8) "}", 4, "cut short"},
        {"{" T("a", "F32", "[1]", 9223372036854775800, 9223372036854775804) "}", 4, "cut short"},
        {"{" T("a", "F32", "[1]", 0, 4) "}", 5, "1 bytes follow"},
        {"{}", 1, "1 bytes follow"},
        {"{" T("a", "F32", "[1]", 4, 8) "}", 8, "hole"},
        {"{" T("a", "F32", "[1]", 0, 4) "," T("b", "F32", "[1]", 8, 12) "}", 12, "hole"},
        {"{" T("a", "F32", "[1]", 0, 4) "," T("b", "F32", "[1]", 0, 4) "}", 4, "overlaps"},
        {"{" T("a", "F32", "[2]", 0, 8) "," T("b", "F32", "[1]", 4, 8) "}", 8, "overlaps"},
        {"{" T("a", "F32", "[2]", 0, 8) "," T("b", "F32", "[0]", 4, 4) "}", 8, "overlaps"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n = strlen(cases[i].header);
        write_file("bad.safetensors", n, cases[i].header, n, cases[i].data);
        refused("bad.safetensors", cases[i].words);
    }
    write_file("bad.safetensors", 3, "{}\0", 3, 0);
    refused("bad.safetensors", "NUL");
    /* Nested too deep, and a name that must not break the message. */
    char deep[200] = "{\"a\":", odd[300];
    memset(deep + 5, '[', 100);
    write_file("bad.safetensors", 105, deep, 105, 0);
    refused("bad.safetensors", "nested deeper");
    snprintf(odd, sizeof odd, "{\"%s\\n%0200d\":1}", "line", 0);
    write_file("bad.safetensors", strlen(odd), odd, strlen(odd), 0);
    refused("bad.safetensors", "line?000");
}

static void test_header_length(void **state) {
    (void)state;
    write_text("short", "");
    refused("short", "only 0 bytes");
    write_text("short", "1234567");
    refused("short", "only 7 bytes");
    write_file("short", 3, "{}", 2, 0);
    refused("short", "beyond the end");
    write_file("short", 100000001, "{}", 2, 0);
    refused("short", "100,000,000");
    write_file("short", 100000000, "{}", 2, 0);
    refused("short", "beyond the end");
    write_file("short", UINT64_MAX, "{}", 2, 0);
    refused("short", "100,000,000");
    write_file("short", UINT64_MAX - 7, "{}", 2, 0);
    refused("short", "100,000,000");
    write_file("short", 0, "{}", 2, 0);
    refused("short", "not valid JSON");
    refused("absent", "cannot read");
    write_text("binary", "%PDF-1.4 certainly not a model of anything");
    refused("binary", "no safetensors file");
}

/* Every prefix of a good file is refused, and says so in words. */
static void test_truncated(void **state) {
    (void)state;
    static const char header[] =
        "{" T("a", "BF16", "[2,2]", 0, 8) "," T("b", "F32", "[]", 8, 12) "}";
    size_t n = sizeof header - 1;
    write_file("whole", n, header, n, 12);
    char *data;
    size_t size;
    assert_int_equal(file_read(in_dir("whole"), 1 << 20, &data, &size, &err), TRIL_OK);
    for (size_t keep = 0; keep < size; keep++) {
        assert_int_equal(file_write_atomic(in_dir("cut"), data, keep, &err), TRIL_OK);
        refused("cut", keep < 8 ? "begins with an 8-byte length" : "cut short");
    }
    free(data);
    safetensors_close(opened("whole"));
}

static void test_accepted(void **state) {
    (void)state;
    /* Order of keys and of data differ; blanks around; rank 0; nothing; unaligned data. */
    static const char header[] = " \n\t{" T(
        "z", "F32", "[2]", 5,
        13) ", \"__metadata__\":{\"format\":\"pt\",\"x\":\"\"},"
            "\"e\":{\"data_offsets\":[5,5],\"shape\":[0,7],\"dtype\":\"F64\",\"more\":[1]}," T(
                "s", "I32", "[]", 1, 5) "," T("b", "BOOL", "[1,1]", 0, 1) "," T("e2", "U8", "[0]",
                                                                                13, 13) "}   ";
    size_t n = sizeof header - 1;
    write_file("good", n, header, n, 13);
    struct safetensors *s = opened("good");
    assert_int_equal(safetensors_count(s), 5);
    static const char *const names[] = {"b", "e", "e2", "s", "z"};
    for (size_t i = 0; i < 5; i++) {
        assert_string_equal(safetensors_at(s, i)->name, names[i]);
        assert_ptr_equal(safetensors_find(s, names[i]), safetensors_at(s, i));
    }
    assert_null(safetensors_find(s, "a"));
    assert_null(safetensors_find(s, "zz"));
    assert_null(safetensors_find(s, "__metadata__"));
    assert_string_equal(safetensors_metadata(s, "format"), "pt");
    assert_string_equal(safetensors_metadata(s, "x"), "");
    assert_null(safetensors_metadata(s, "y"));
    const struct st_tensor *t = safetensors_find(s, "z");
    assert_int_equal(t->dtype, DT_F32);
    assert_int_equal(t->rank, 1);
    assert_int_equal(t->shape[0], 2);
    assert_int_equal(t->bytes, 8);
    assert_memory_equal(t->data, "\5\6\7\10\11\12\13\14", 8);
    t = safetensors_find(s, "s");
    assert_int_equal(t->rank, 0);
    assert_int_equal(t->bytes, 4);
    assert_memory_equal(t->data, "\1\2\3\4", 4);
    assert_int_equal(safetensors_find(s, "e")->bytes, 0);
    safetensors_forget(s, t);
    safetensors_forget(s, safetensors_find(s, "e"));
    safetensors_close(s);
    write_file("good", 2, "{}", 2, 0);
    s = opened("good");
    assert_int_equal(safetensors_count(s), 0);
    assert_null(safetensors_find(s, "a"));
    safetensors_close(s);
    safetensors_close(NULL);
}

static void test_sharded(void **state) {
    (void)state;
    static const char one[] = "{" T("a", "F32", "[1]", 0, 4) "," T("c", "F16", "[1]", 4, 6) "}";
    static const char two[] = "{" T("b", "F32", "[1]", 0, 4) "}";
    assert_int_equal(mkdir(in_dir("model"), 0777), 0);
    refused("model", "neither model.safetensors nor");
    write_file("model/m-1.safetensors", sizeof one - 1, one, sizeof one - 1, 6);
    write_file("model/m-2.safetensors", sizeof two - 1, two, sizeof two - 1, 4);
    const char *index = "model/model.safetensors.index.json";
    write_text(index, "{\"metadata\":{\"total_size\":10},\"weight_map\":{\"a\":\"m-1.safetensors\","
                      "\"b\":\"m-2.safetensors\",\"c\":\"m-1.safetensors\"}}");
    struct safetensors *s = opened("model");
    assert_int_equal(safetensors_count(s), 3);
    assert_non_null(strstr(safetensors_find(s, "a")->file, "m-1.safetensors"));
    assert_non_null(strstr(safetensors_find(s, "b")->file, "m-2.safetensors"));
    assert_memory_equal(safetensors_find(s, "c")->data, "\4\5", 2);
    safetensors_close(s);
    static const struct {
        const char *text, *words;
    } cases[] = {
        {"", "not valid JSON"},
        {"[]", "weight_map"},
        {"{}", "weight_map"},
        {"{\"weight_map\":[]}", "weight_map"},
        {"{\"weight_map\":{\"a\":1}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"../x\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"sub/x\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\".\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"m-1.safetensors\\u0000x\"}}", "plain name"},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "cannot read"},
        {"{\"weight_map\":{\"d\":\"m-1.safetensors\"}}", "tensor \"d\" is not in the file"},
        {"{\"weight_map\":{\"a\":\"m-2.safetensors\",\"b\":\"m-1.safetensors\"}}", "is not in"},
        {"{\"weight_map\":{\"a\":\"m-1.safetensors\",\"a\":\"m-2.safetensors\"}}", "duplicate"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text(index, cases[i].text);
        refused("model", cases[i].words);
    }
    /* The same tensor in two files; and a single file goes before an index. */
    write_file("model/m-2.safetensors", sizeof one - 1, one, sizeof one - 1, 6);
    write_text(index, "{\"weight_map\":{\"a\":\"m-1.safetensors\",\"c\":\"m-2.safetensors\"}}");
    refused("model", "is in both");
    write_file("model/model.safetensors", sizeof two - 1, two, sizeof two - 1, 4);
    s = opened("model");
    assert_int_equal(safetensors_count(s), 1);
    safetensors_close(s);
}

static void test_writer(void **state) {
    (void)state;
    static const struct st_declare tensors[] = {
        {"weight", DT_F32, 2, {3, 5}},        {"empty", DT_F32, 2, {0, 5}},
        {"half \"quoted\"", DT_BF16, 1, {2}}, {"scalar", DT_F16, 0, {0}},
        {"\xe1\xba\xbf", DT_U8, 1, {1}},
    };
    static const char *const meta[] = {"format", "pt", "note", "line\nbreak"};
    float weight[15];
    for (int i = 0; i < 15; i++)
        weight[i] = (float)i / 7;
    const uint16_t half[] = {0x3f80, 0x4000}, scalar = 0x3c00;
    for (int again = 0; again < 2; again++) { /* the second time it replaces a file */
        struct st_writer *w;
        const char *path = in_dir("written.safetensors");
        assert_int_equal(st_writer_open(&w, path, tensors, 5, meta, 2, &err), TRIL_OK);
        assert_true(again || !path_exists(path));
        assert_int_equal(st_writer_write(w, weight, 10, &err), TRIL_OK);
        assert_int_equal(st_writer_write(w, (char *)weight + 10, 50, &err), TRIL_OK);
        assert_int_equal(st_writer_write(w, half, 4, &err), TRIL_OK);
        assert_int_equal(st_writer_write(w, &scalar, 2, &err), TRIL_OK);
        assert_int_equal(st_writer_write(w, "x", 1, &err), TRIL_OK);
        assert_int_equal(st_writer_write(w, "x", 1, &err), TRIL_ERR_INTERNAL);
        assert_int_equal(st_writer_finish(w, &err), TRIL_OK);
        struct safetensors *s = opened("written.safetensors");
        assert_int_equal(safetensors_count(s), 5);
        for (size_t i = 0; i < 5; i++) {
            const struct st_tensor *t = safetensors_find(s, tensors[i].name);
            assert_non_null(t);
            assert_int_equal(t->dtype, tensors[i].dtype);
            assert_int_equal(t->rank, tensors[i].rank);
            for (int d = 0; d < t->rank; d++)
                assert_int_equal(t->shape[d], tensors[i].shape[d]);
            assert_int_equal((uintptr_t)t->data % dtype_size(t->dtype), 0);
        }
        assert_int_equal((uintptr_t)safetensors_find(s, "weight")->data % 64, 0);
        assert_memory_equal(safetensors_find(s, "weight")->data, weight, sizeof weight);
        assert_memory_equal(safetensors_find(s, "scalar")->data, &scalar, 2);
        assert_string_equal(safetensors_metadata(s, "note"), "line\nbreak");
        safetensors_close(s);
    }
    /* What goes wrong leaves the earlier file alone, and no temporary one. */
    struct st_writer *w;
    const char *path = in_dir("written.safetensors");
    assert_int_equal(st_writer_open(&w, path, tensors, 5, NULL, 0, &err), TRIL_OK);
    assert_int_equal(st_writer_write(w, weight, 60, &err), TRIL_OK);
    assert_int_equal(st_writer_finish(w, &err), TRIL_ERR_INTERNAL);
    assert_int_equal(st_writer_open(&w, path, tensors, 5, NULL, 0, &err), TRIL_OK);
    st_writer_abort(w);
    st_writer_abort(NULL);
    const struct st_declare twice[] = {{"a", DT_F32, 1, {1}}, {"a", DT_F32, 1, {1}}};
    assert_int_equal(st_writer_open(&w, path, twice, 2, NULL, 0, &err), TRIL_ERR_INTERNAL);
    const struct st_declare crooked[] = {{"a", DT_U8, 1, {1}}, {"b", DT_F32, 1, {1}}};
    assert_int_equal(st_writer_open(&w, path, crooked, 2, NULL, 0, &err), TRIL_ERR_INTERNAL);
    const struct st_declare huge[] = {{"a", DT_F32, 2, {INT64_MAX, INT64_MAX}}};
    assert_int_equal(st_writer_open(&w, path, huge, 1, NULL, 0, &err), TRIL_ERR_INTERNAL);
    const struct st_declare bytes[] = {{"\xff", DT_F32, 1, {1}}};
    assert_int_equal(st_writer_open(&w, path, bytes, 1, NULL, 0, &err), TRIL_ERR_INTERNAL);
    assert_int_equal(st_writer_open(&w, in_dir("no/such/place"), tensors, 5, NULL, 0, &err),
                     TRIL_ERR_IO);
    struct safetensors *s = opened("written.safetensors");
    assert_int_equal(safetensors_count(s), 5);
    safetensors_close(s);
    char **names;
    size_t count;
    assert_int_equal(dir_list(dir, &names, &count, &err), TRIL_OK);
    for (size_t i = 0; i < count; i++)
        assert_null(strstr(names[i], ".tmp"));
    dir_list_free(names, count);
}

/* A full disk: /dev/full takes nothing. */
static void test_full_disk(void **state) {
    (void)state;
    if (!path_exists("/dev/full"))
        skip();
    const struct st_declare big[] = {{"a", DT_U8, 1, {1 << 20}}};
    static char data[1 << 20];
    struct st_writer *w;
    tril_status st = st_writer_open(&w, "/dev/full", big, 1, NULL, 0, &err);
    assert_int_equal(st, TRIL_OK);
    st = st_writer_write(w, data, sizeof data, &err);
    if (st == TRIL_OK)
        st = st_writer_finish(w, &err);
    else
        st_writer_abort(w);
    assert_int_equal(st, TRIL_ERR_IO);
    assert_non_null(strstr(err.message, "/dev/full"));
}

static int setup(void **state) {
    (void)state;
    dir = test_dir();
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refusals),  cmocka_unit_test(test_header_length),
        cmocka_unit_test(test_truncated), cmocka_unit_test(test_accepted),
        cmocka_unit_test(test_sharded),   cmocka_unit_test(test_writer),
        cmocka_unit_test(test_full_disk),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
